"""Defers the signals that end a process while C++ code or another process must not be interrupted halfway."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP in the yielded list, and lets them take effect when the context ends. Python
    handles signals only in the main thread, so other threads defer nothing."""
    held, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        handlers = {s: handler for s, handler in handlers.items() if callable(handler) or handler == signal.SIG_DFL}
    for signum in handlers:
        signal.signal(signum, lambda signum, frame: held.append(signum))
    try:
        yield held
    finally:
        for signum in reversed(handlers):  # SIGINT last, because KeyboardInterrupt would end the loop
            signal.signal(signum, handlers[signum])
        for signum in held:
            if handlers[signum] == signal.SIG_DFL:
                sys.exit(128 + signum)
            handlers[signum](signum, None)

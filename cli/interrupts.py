"""Decides what Ctrl-C, SIGTERM and SIGHUP do in a script. Every script begins with these lines, before imports that
take seconds:

    if __name__ == "__main__":
        sys.path.insert(0, ...)  # the project's folder, which Python leaves out for scripts/*.py and with python -I
        from cli.interrupts import exit_on_interrupt

        exit_on_interrupt()

So Ctrl-C ends the process at once while the script imports modules. In the script's main (script.py), Ctrl-C raises
KeyboardInterrupt, and the other two signals raise SystemExit. Then a half-written file can be removed first. This
module must not import torch."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

EXIT_INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT, as in shells
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # kill, and a terminal that is closed


def exit_on_interrupt():
    """Makes Ctrl-C, SIGTERM and SIGHUP end the process at once, without a message. Does nothing in an interactive
    interpreter (IPython's %run): there the user continues after the script."""
    if hasattr(sys, "ps1"):
        return

    def exit_now(signum, frame):
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, exit_now)
    for signum in END_SIGNALS:
        if signal.getsignal(signum) == raise_exit:
            signal.signal(signum, signal.SIG_DFL)


def raise_exit(signum, frame) -> NoReturn:
    sys.exit(128 + signum)


@contextlib.contextmanager
def raise_on_interrupt() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt, and SIGTERM and SIGHUP raise SystemExit, within this context. Does nothing
    in a process that ignores SIGINT (nohup) or leaves it to the system (torchrun's ranks).

    After an interrupt torch.save raises a RuntimeError, because the file that it closes is too short. Then this context
    raises the interrupt again."""
    if not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    handlers = {signum: raise_exit for signum in END_SIGNALS if signal.getsignal(signum) == signal.SIG_DFL}
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    except RuntimeError as e:
        if isinstance(e.__context__, KeyboardInterrupt | SystemExit):
            raise e.__context__ from None
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def exit_interrupted() -> NoReturn:
    print(file=sys.stderr)  # a new line after the ^C that the terminal shows
    sys.exit(EXIT_INTERRUPTED)

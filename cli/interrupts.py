"""What Ctrl-C does in a script:

    during imports    exit_on_interrupt    ends the process at once; every script calls this before it imports torch
    in main           raise_on_interrupt   raises KeyboardInterrupt, so that half-written files can be removed first

This module must not import torch."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

EXIT_INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT, as in shells


def exit_on_interrupt():
    """Makes Ctrl-C end the process at once, without a message. Does nothing in an interactive interpreter (IPython's
    %run), since the user goes on there after the script."""
    if hasattr(sys, "ps1"):
        return

    def exit_now(signum, frame):
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, exit_now)


@contextlib.contextmanager
def raise_on_interrupt() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt within this context. Does nothing in a process that ignores SIGINT (nohup)
    or leaves SIGINT to the system (torchrun's ranks)."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def exit_interrupted() -> NoReturn:
    print(file=sys.stderr)  # a new line after the ^C that the terminal shows
    sys.exit(EXIT_INTERRUPTED)

"""The shell around every script: Ctrl-C, one-line errors, and the options that several scripts share.

A script begins and ends like this:

    import cli
    if __name__ == "__main__":
        cli.exit_on_interrupt()

    import torch  # and everything else that takes long to load
    ...
    if __name__ == "__main__":
        cli.run(main)

Importing this file does not import torch, which takes seconds: until exit_on_interrupt(), Ctrl-C prints a traceback.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from config import UsageError

INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT, as shells have it
MISTAKE = 2  # exit status after the user's mistake, as argparse has it
PRECISIONS = ["bfloat16", "float16", "float32"]

# oneDNN, and PyTorch's layer above it, keep a compiled matrix product, of 0.3 to 1 MB, for every number of rows that
# they have met: 1024 of them, unless these variables say otherwise before the first product.
MATMUL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MATMUL_CACHE_SIZE = "128"


# ---- Errors and Ctrl-C ----------------------------------------------------------------------------------------------


def exit_on_interrupt():
    """Makes Ctrl-C end this process at once and without a word. For the time in which imports run; see run()."""

    def leave(signum, frame):
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, leave)


def run(main: Callable[[], None], oom_hint: str = "end other programs, or take a smaller model"):
    """Calls a script's main. What can go wrong ends in one line on stderr at most, and in an exit status:

    - a UsageError, an error of the file system, or a lack of memory, where oom_hint says what takes less: status 2.
    - Ctrl-C: status 130.
    - a reader of stdout that has gone, as in `| head`: status 0, for it has seen enough.

    Anything else is a bug, and keeps its traceback."""
    replace_closed_streams()
    for name in MATMUL_CACHES:
        os.environ.setdefault(name, MATMUL_CACHE_SIZE)
    try:
        with interrupts_raised():
            main()
    except KeyboardInterrupt:
        exit_interrupted()
    except UsageError as e:
        exit_with(str(e))
    except (MemoryError, RuntimeError) as e:
        # Ctrl-C in torch.save: as it closes its file, it finds that too short and raises RuntimeError.
        if isinstance(e.__context__, KeyboardInterrupt):
            exit_interrupted()
        why = explain_lack_of_memory(e, oom_hint)
        if why is None:
            raise
        exit_with(why)
    except OSError as e:
        # What is still to be flushed to stdout may have no place to go; to /dev/null it does not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(e, BrokenPipeError):
            exit_with(str(e))


def replace_closed_streams():
    """Makes print work where the shell has closed stdout or stderr (`>&-`), or stdout cannot show a character."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # which a test's replacement lacks
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; before and after, it does what the script has set. A process in which it
    does nothing (nohup), or in which the system handles it (torchrun's ranks), is left so."""
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
    print(file=sys.stderr)  # ends the line on which the terminal shows ^C
    sys.exit(INTERRUPTED)


def exit_with(error: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {' '.join(error.split())}", file=sys.stderr)  # on one line
    sys.exit(MISTAKE)


def explain_lack_of_memory(e: MemoryError | RuntimeError, oom_hint: str) -> str | None:
    """The error's one line; None if it is about anything else."""
    from machine import free_memory, lacks_memory  # here, for it imports torch; where memory runs out, that is loaded

    if not lacks_memory(e):
        return None
    # PyTorch's allocators say how much they tried to get, on a GPU also how much is free.
    match = re.search(r"(?i)(tried|unable) to (allocate|mmap) [\d.]+ \w+(.*? is free)?", str(e))
    details = match[0] if match else "there is no more"
    if "is free" not in details:
        details += f", {free_memory() / 1e9:.2f} GB free"
    return f"out of memory ({details}): {oom_hint}"


# ---- Options --------------------------------------------------------------------------------------------------------


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with the script's own docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_checkpoint_path(
    parser: argparse.ArgumentParser, default: Path | None = None, help: str = "model.pth, its tokenizer beside it"
):
    parser.add_argument("--checkpoint_path", type=Path, default=default, required=default is None, help=help)


def add_device(parser: argparse.ArgumentParser):
    parser.add_argument("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")


def add_precision(parser: argparse.ArgumentParser):
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="default: %(default)s")


def add_kernels(parser: argparse.ArgumentParser):
    help = "off: PyTorch's plain operations everywhere"
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto", help=help)

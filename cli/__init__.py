"""The command line. This file is what every script shares: Ctrl-C, errors, and common options.

    __init__.py  checkpoints.py  ranks.py                                            for all scripts
    arguments.py  prompts.py  startup.py  complete.py  report.py  terminal.py        for generate.py

A script begins and ends like this, with .parent.parent in a folder below:

    if __name__ == "__main__":
        sys.path.insert(0, str(Path(__file__).resolve().parent))  # so that python -I finds cli
        import cli

        cli.start()

    import torch  # and everything else that is slow to import
    ...
    if __name__ == "__main__":
        cli.run(main)

This file must not import torch, which takes seconds: until start() has run, Ctrl-C prints a traceback.
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

from config import OutOfMemoryError, UsageError

EXIT_INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT, as in shells
EXIT_USAGE_ERROR = 2  # exit status after the user's mistake, as in argparse
PRECISIONS = ["bfloat16", "float16", "float32"]

# oneDNN, and PyTorch's layer above it, cache a compiled matrix product for every number of tokens that occurs. Each
# takes 0.3 to 1 MB, and 1024 are cached by default. These variables lower that, if set before the first product.
MATMUL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MATMUL_CACHE_SIZE = "128"
MAX_THREADS = 1024
CHECKPOINT_HELP = "model.pth, its tokenizer beside it; or a model's folder or .gguf, which is converted once"


# ---- Errors and Ctrl-C ----------------------------------------------------------------------------------------------


def start():
    """Prepares a script's imports: Ctrl-C ends them without a traceback, and files beside the script can be imported,
    which python -I would not allow."""
    exit_on_interrupt()
    folder = str(Path(sys.argv[0]).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def exit_on_interrupt():
    """From now on Ctrl-C ends the process at once, without a message. In an interactive interpreter, which goes on
    after the script (%run), nothing changes."""
    if hasattr(sys, "ps1"):
        return

    def exit_now(signum, frame):
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, exit_now)


def run(main: Callable[[], None], oom_hint: str = "end other programs, or take a smaller model"):
    """Calls a script's main, with no more threads than machine.limit_threads allows. Turns these errors into an exit
    status and at most one line on stderr:

    - UsageError: status 2
    - out of memory: status 2, and the line ends with oom_hint, which says what needs less
    - an error of the file system, also within torch.compile: status 2
    - Ctrl-C: status 130
    - the reader of stdout has closed it, as in `| head`: status 0

    Anything else is a bug, and keeps its traceback."""
    replace_closed_streams()
    for name in MATMUL_CACHES:
        os.environ.setdefault(name, MATMUL_CACHE_SIZE)
    if "torch" in sys.modules:
        from machine import limit_threads  # here, since machine imports torch (see above)

        limit_threads()
    try:
        with interrupts_raised():
            main()
    except KeyboardInterrupt:
        exit_interrupted()
    except OutOfMemoryError as e:
        exit_with_error(f"{e}; {oom_hint}")
    except UsageError as e:
        exit_with_error(str(e))
    except (MemoryError, RuntimeError) as e:
        # Ctrl-C within torch.save becomes a RuntimeError: torch.save closes its file and finds that it is too short.
        if isinstance(e.__context__, KeyboardInterrupt):
            exit_interrupted()
        why = explain_out_of_memory(e, oom_hint) or explain_file_error(e)
        if why is None:
            raise
        exit_with_error(why)
    except OSError as e:
        # Python flushes stdout at exit. If stdout has failed, that would fail again, so send the rest to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(e, BrokenPipeError):
            exit_with_error(str(e))


def replace_closed_streams():
    """Makes print work if the shell has closed stdout or stderr (`>&-`), or if stdout cannot encode a character."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # pytest's replacement of stdout does not have it
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Within this context Ctrl-C raises KeyboardInterrupt. Not in a process that ignores SIGINT (nohup) or leaves it to
    the system (torchrun's ranks)."""
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


def exit_with_error(error: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {' '.join(error.split())}", file=sys.stderr)  # on one line
    sys.exit(EXIT_USAGE_ERROR)


def explain_out_of_memory(e: MemoryError | RuntimeError, oom_hint: str) -> str | None:
    """The one line that explains e; None if e does not mean that memory ran out."""
    from machine import free_memory, is_out_of_memory  # here, since machine imports torch (see above)

    if not is_out_of_memory(e):
        return None
    # PyTorch's allocators report how much they tried to get; on a GPU also how much is free.
    match = re.search(r"(?i)(tried|unable) to (allocate|mmap) [\d.]+ \w+(.*? is free)?", str(e))
    details = match[0] if match else "there is no more"
    if "is free" not in details:
        details += f", {free_memory() / 1e9:.2f} GB free"
    return f"out of memory ({details}): {oom_hint}"


def explain_file_error(e: MemoryError | RuntimeError) -> str | None:
    """The one line that explains e; None unless torch.compile could not write its files, or not load them."""
    reasons = "No space left on device|File too large|Read-only file system|Permission denied|failed to map segment"
    match = re.search(f"[^\n]*?({reasons})", str(e))
    if match is None or not type(e).__module__.startswith("torch."):
        return None
    return f"--compile cannot use its folder ({match[0]}): set TMPDIR, or TORCHINDUCTOR_CACHE_DIR, to another one"


# ---- Options --------------------------------------------------------------------------------------------------------


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with doc, the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_checkpoint_path(
    parser: argparse.ArgumentParser, default: Path | None = None, help: str = CHECKPOINT_HELP
):  # fmt: skip
    parser.add_argument("--checkpoint_path", type=Path, default=default, required=default is None, help=help)


def add_device(parser: argparse.ArgumentParser):
    parser.add_argument("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")


def add_precision(parser: argparse.ArgumentParser):
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="default: %(default)s")


def add_kernels(parser: argparse.ArgumentParser):
    help = "off: PyTorch's plain operations everywhere"
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto", help=help)


def add_threads(parser: argparse.ArgumentParser):
    help = "of a CPU (default: OMP_NUM_THREADS, else one for each core that the process may use)"
    parser.add_argument("--threads", type=int, metavar="N", help=help)


def set_threads(n: int | None):
    """Applies --threads to this process and to those that it starts. Raises UsageError."""
    if n is None:
        return
    if not 1 <= n <= MAX_THREADS:
        raise UsageError(f"--threads must be 1 to {MAX_THREADS}, not {n}")
    import torch  # here, since it is slow (see above)

    os.environ["OMP_NUM_THREADS"] = str(n)
    torch.set_num_threads(n)

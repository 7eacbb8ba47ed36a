"""Runs a script's main, and turns an error into an exit status and one line on stderr.

    if __name__ == "__main__":
        run_script(main)

Only functions that need torch import it: scripts/download.py does not use torch, and need not wait for the import.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cli.interrupts import exit_interrupted, raise_on_interrupt
from utils.errors import OutOfMemoryError, UsageError

EXIT_USAGE_ERROR = 2  # exit status after the user's mistake, as in argparse

# oneDNN, and PyTorch's layer above it, cache a compiled matmul for every number of tokens that occurs. The default is
# 1024 matmuls, of 0.3 to 1 MB each. These environment variables lower this number. Set them before
# the first matmul.
MATMUL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MATMUL_CACHE_SIZE = "128"


def run_script(main: Callable[[], None], oom_hint: str = "end other programs, or take a smaller model"):
    """Calls a script's main, with no more threads than utils/machine.py: limit_threads allows. Ends the script so:

        UsageError                                             status 2, one line on stderr
        out of memory                                          status 2, one line that ends with oom_hint
        an error of the file system, also in torch.compile     status 2, one line
        Ctrl-C                                                 status 130
        SIGTERM, SIGHUP                                        status 143, 129
        stdout is closed at the other end, as by `| head`      status 0

    Any other error is a bug and keeps its traceback. oom_hint: what the user can do to need less memory."""
    replace_closed_streams()
    for name in MATMUL_CACHES:
        os.environ.setdefault(name, MATMUL_CACHE_SIZE)
    if "torch" in sys.modules:
        from utils.machine import limit_threads  # here, because machine imports torch (see the first docstring)

        limit_threads()
    try:
        with raise_on_interrupt():
            main()
    except KeyboardInterrupt:
        exit_interrupted()
    except Exception as e:
        if isinstance(e, OSError):
            # Python flushes stdout at exit. If stdout has failed, that would fail again. So /dev/null takes the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            return
        error = explain(e, oom_hint)
        if error is None:
            raise
        exit_with_error(error)


def replace_closed_streams():
    """Makes print work if the shell has closed stdout or stderr (`>&-`), or if stdout cannot encode a character."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # pytest's replacement of stdout has no reconfigure
        sys.stdout.reconfigure(errors="replace")


def exit_with_error(error: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {' '.join(error.split())}", file=sys.stderr)  # on one line
    sys.exit(EXIT_USAGE_ERROR)


def explain(e: Exception, oom_hint: str) -> str | None:
    """Returns a text that explains e to the user, or None if e is a bug."""
    match e:
        case OutOfMemoryError():
            return f"{e}; {oom_hint}"
        case UsageError() | OSError():
            return str(e)
        case MemoryError() | RuntimeError():
            return explain_out_of_memory(e, oom_hint) or explain_file_error(e)
    return None


def explain_out_of_memory(e: MemoryError | RuntimeError, oom_hint: str) -> str | None:
    """Returns one line that explains e, or None if e does not mean that memory ran out."""
    from utils.machine import (  # here, because machine imports torch (see the first docstring)
        free_memory,
        is_out_of_memory,
    )

    if not is_out_of_memory(e):
        return None
    # PyTorch's allocators report how much they tried to allocate, and on a GPU also how much is free.
    match = re.search(r"(?i)(tried|unable) to (allocate|mmap) [\d.]+ \w+(.*? is free)?", str(e))
    details = match[0] if match else "there is no more"
    if "is free" not in details:
        details += f", {free_memory() / 1e9:.2f} GB free"
    return f"out of memory ({details}): {oom_hint}"


def explain_file_error(e: MemoryError | RuntimeError) -> str | None:
    """Returns one line that explains e if torch.compile could not write or load its files, else None."""
    reasons = "No space left on device|File too large|Read-only file system|Permission denied|failed to map segment"
    match = re.search(f"[^\n]*?({reasons})", str(e))
    if match is None or not type(e).__module__.startswith("torch."):
        return None
    return f"--compile cannot use its folder ({match[0]}): set TMPDIR, or TORCHINDUCTOR_CACHE_DIR, to another one"

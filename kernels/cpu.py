"""Compiles and loads the C++ kernels in kernels/csrc/, and puts weights into huge pages for them.

The kernels are compiled for this machine at first use, which takes some fifteen seconds, and cached in
~/.cache/gpt-fast, or in a temporary folder if the cache is not usable. The environment variables CXX and CXXFLAGS
choose the compiler and add flags. Compiled kernels need no compiler. Without kernels, everything runs on PyTorch's own,
slower operations.
"""

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import schema  # noqa: F401  (defines the schemas of the operations in the library)
from machine import use_huge_pages

SOURCES = Path(__file__).parent / "csrc"
CPU_FIELDS = (  # fields of /proc/cpuinfo that determine what -march=native compiles for
    "vendor_id", "cpu family", "model", "model name", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features", "isa",
)  # fmt: skip
FLAGS = [
    "-O3", "-std=c++20", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
    "-Werror=switch",  # so that the compiler names the places that a new format or activation must be added to
]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Loads the kernels, which become torch.ops.gptfast. If the cache has none, compiles them first; several processes
    may do so at once. On failure, prints one line to stderr and returns None.

    The returned library has the functions with which record.py records and replays tapes (kernels/csrc/tape.h).
    """
    library = find_or_compile()
    if library is not None:
        os.register_at_fork(after_in_child=use_one_thread)
    return library


def find_or_compile() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        why = "no C++ compiler ($CXX, g++ or clang++)"
    else:
        try:
            return load_cached(library_name(compiler)) or compile_and_load(compiler)
        except (OSError, subprocess.CalledProcessError) as e:
            why = f"kernels/csrc does not build here ({reason(e)})"
    library = load_cached(library_name(None))  # made earlier, by any compiler
    if library is None:
        print(f"{why}: running on PyTorch's own, slower operations", file=sys.stderr)
    return library


def use_one_thread():
    """Makes the child of a fork use one thread. OpenMP's other threads exist only in the parent, so a child with more
    would wait for ever."""
    torch.set_num_threads(1)


def max_dense_tokens(dtype: torch.dtype) -> int:
    """Returns up to how many tokens the kernels multiply dense weights of dtype faster than PyTorch does on this
    CPU."""
    return library().max_dense_tokens(dtype == torch.bfloat16)


def find_compiler() -> list[str] | None:
    for command in (shlex.split(os.environ.get("CXX", "")) or ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            return command
    return None


def compiler_flags() -> list[str]:
    torch_dir = Path(torch.__file__).parent
    ours = [*FLAGS, f"-I{torch_dir / 'include'}", f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    return ours + os.environ.get("CXXFLAGS", "").split()


# ---- The cache of compiled libraries --------------------------------------------------------------------------------


def library_name(compiler: list[str] | None) -> str:
    """Returns the compiled library's file name, kernels-A-B.so. A is a hash of the sources, the flags, the PyTorch
    version and the CPU; B is a hash of the compiler. Without a compiler, returns a pattern for the libraries of any
    compiler, or "" if the CPU is not known."""
    cpu = cpu_description()
    key = hashlib.sha256(repr((compiler_flags(), torch.__version__, cpu)).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    if compiler is None:
        return f"kernels-{key.hexdigest()[:16]}-*.so" if cpu else ""
    # The predefined macros name the compiler's version and the instruction sets that it will use.
    macros = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    compiler_key = hashlib.sha256(subprocess.run(macros, capture_output=True).stdout)
    return f"kernels-{key.hexdigest()[:16]}-{compiler_key.hexdigest()[:8]}.so"


def cpu_description() -> str:
    """Returns the model and the instruction sets of the machine's first CPU, as Linux reports them; "" on other
    systems."""
    with contextlib.suppress(OSError):
        first_cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        fields = dict(map(str.strip, line.partition(":")[::2]) for line in first_cpu.splitlines())
        return repr([fields[name] for name in CPU_FIELDS if name in fields])
    return ""


def cache_folders() -> list[Path]:
    """Returns the folders for compiled libraries, the preferred folder first."""
    folders = [Path(tempfile.gettempdir()) / f"gpt-fast-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # no home folder
        folders.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-fast")
    return folders


def check_folder(folder: Path):
    """Raises OSError if libraries in folder cannot be loaded, or must not be: where all users can make folders, the
    folder may be another user's."""
    status, parent = folder.lstat(), folder.parent.stat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    if parent.st_mode & stat.S_IWOTH and not is_own:
        raise OSError(f"{folder} is another user's")
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError(f"{folder} is mounted noexec")


def load_cached(name: str) -> ctypes.CDLL | None:
    """Loads a library whose name is, or fits the pattern, name. Returns None if there is none that loads."""
    for folder in cache_folders() if name else []:
        with contextlib.suppress(OSError):
            check_folder(folder)
            for path in folder.glob(name):
                with contextlib.suppress(OSError):
                    return load_library(path)
    return None


# ---- Compiling and loading ------------------------------------------------------------------------------------------


def compile_and_load(compiler: list[str]) -> ctypes.CDLL:
    """Compiles and loads the library, in the first of cache_folders that allows both. Prints why if that is not the
    preferred folder. Raises OSError or CalledProcessError if no folder does."""
    if sys.stderr and sys.stderr.isatty():
        print("compiling kernels/csrc for this machine, once", file=sys.stderr)
    preferred, *others = cache_folders()
    try:
        return compile_to(preferred, compiler)
    except (OSError, subprocess.CalledProcessError) as e:
        for folder in others:
            library = compile_to(folder, compiler)
            print(f"{preferred} does not serve ({reason(e)}): the kernels are in {folder}", file=sys.stderr)
            return library
        raise


def compile_to(folder: Path, compiler: list[str]) -> ctypes.CDLL:
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_folder(folder)
    library = folder / library_name(compiler)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = f"{scratch}/kernels.so"
        command = [*compiler, str(SOURCES / "ops.cpp"), "-o", out, *compiler_flags()]
        run_compiler(command, os.environ | {"TMPDIR": scratch})
        os.replace(out, library)  # atomic, so that other processes see a whole file or none
    return load_library(library)


def run_compiler(command: list[str], env: dict[str, str]):
    """Runs command. Raises CalledProcessError if it fails. If a signal ends this process meanwhile, everything that the
    command has started ends, too."""
    with defer_signals() as held, subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as process:  # fmt: skip
        errors = None
        while errors is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=0.1)
            if held and errors is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


@contextlib.contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Defers signals that would end the process: within this context a signal is only noted, in the yielded list, and
    takes effect at the end of the context. Python allows this in the main thread only; in another thread nothing is
    deferred."""
    held, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        handlers = {s: handler for s, handler in handlers.items() if callable(handler) or handler == signal.SIG_DFL}
    for signum in handlers:
        signal.signal(signum, lambda signum, frame: held.append(signum))
    try:
        yield held
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum in held:
            if handlers[signum] == signal.SIG_DFL:
                sys.exit(128 + signum)
            handlers[signum](signum, None)


def reason(e: Exception) -> str:
    """Returns the line that gives the reason, from a compiler's output or another error's message."""
    lines = (getattr(e, "stderr", None) or str(e)).splitlines()
    reasons = [line for word in ("No space left", "error") for line in lines if word in line]
    return reasons[0] if reasons else str(e)


def load_library(library: Path) -> ctypes.CDLL:
    """Loads the library and declares its functions. Raises OSError if it cannot be loaded."""
    torch.ops.load_library(library)
    functions = ctypes.CDLL(str(library))
    functions.tape_begin.restype = ctypes.c_void_p
    functions.tape_replay.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    functions.tape_replay.restype = ctypes.c_char_p
    functions.tape_free.argtypes = [ctypes.c_void_p]
    return functions


class HugePageArena:
    """An arena of huge pages. copy(t) copies a tensor to the next free place. With small pages, TLB misses would cost
    time."""

    MIN_ALLOCATION = 2**26  # bytes to allocate at a time; a larger tensor gets more
    PAGE_BYTES = 2**21
    ALIGNMENT = 64  # a cache line

    def __init__(self):
        self.memory, self.used = torch.empty(0, dtype=torch.uint8), 0

    def copy(self, t: Tensor) -> Tensor:
        if self.used + t.nbytes > self.memory.numel():  # a new chunk, with room to start at the beginning of a page
            self.memory = torch.empty(max(t.nbytes, self.MIN_ALLOCATION) + 2 * self.PAGE_BYTES, dtype=torch.uint8)
            self.used = -self.memory.data_ptr() % self.PAGE_BYTES
            use_huge_pages(self.memory[self.used :])
        copy = self.memory[self.used : self.used + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        self.used += -(-t.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        return copy

"""Compiles and loads the C++ kernels in kernels/csrc/: load_cpp_kernels().

The first use compiles the kernels for this machine. That takes some fifteen seconds. The compiled library is cached in
~/.cache/gpt-fast, or in a temporary folder if that cache is not usable. Loading a cached library needs no compiler. The
environment variable CXX chooses the compiler, and CXXFLAGS adds flags. Without a library, everything runs on PyTorch's
own, slower operations.
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
from functools import cache
from pathlib import Path

import torch

from formats import WeightFormat
from formats.cpu_layouts import ACT_GROUP_SIZE, CPU_BLOCK_N
from kernels.schema import (
    CLAMPED_SILU_ALPHA,
    CLAMPED_SILU_LIMIT,
    INVALID_TOKEN,
    MAX_CPU_TOKENS,
    SMALLEST_TEMPERATURE,
)
from utils.signals import defer_signals

SOURCES = Path(__file__).parent / "csrc"
CPU_FIELDS = (  # the fields of /proc/cpuinfo that -march=native depends on
    "vendor_id", "cpu family", "model", "model name", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features", "isa",
)
FLAGS = [
    "-O3", "-std=c++20", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC",
    "-Werror=switch",  # the compiler then names each place that lacks a case for a new activation
    # The numbers that csrc/weights.h, csrc/activation.h and csrc/sampling.h share with Python
    f"-DGPTFAST_MAX_CPU_TOKENS={MAX_CPU_TOKENS}",
    f"-DGPTFAST_BLOCK_N={CPU_BLOCK_N}",
    f"-DGPTFAST_ACT_GROUP_SIZE={ACT_GROUP_SIZE}",
    f"-DGPTFAST_CLAMPED_SILU_ALPHA={CLAMPED_SILU_ALPHA}",
    f"-DGPTFAST_CLAMPED_SILU_LIMIT={CLAMPED_SILU_LIMIT}",
    f"-DGPTFAST_INVALID_TOKEN={INVALID_TOKEN}",
    f"-DGPTFAST_SMALLEST_TEMPERATURE={SMALLEST_TEMPERATURE}",
]


@cache
def load_cpp_kernels() -> ctypes.CDLL | None:
    """Loads the kernels as torch.ops.gptfast_cpu, and compiles them first if the cache has no library. Several
    processes may do so at once. On failure, prints one line to stderr and returns None.

    The returned library has the functions that capture.py calls to fill and replay OpLists (kernels/csrc/op_list.h),
    and those that say what the kernels can compute (extern "C" in kernels/csrc/ops.cpp)."""
    library = find_or_compile()
    if library is not None:
        os.register_at_fork(after_in_child=use_one_thread)
    return library


def loaded_cpp_kernels() -> ctypes.CDLL | None:
    """The result of load_cpp_kernels() if this process has called it, or None. Never compiles."""
    return load_cpp_kernels() if load_cpp_kernels.cache_info().currsize else None


def find_or_compile() -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        why = "no C++ compiler ($CXX, g++ or clang++)"
    else:
        try:
            return load_cached(library_name(compiler)) or compile_and_load(compiler)
        except (OSError, subprocess.CalledProcessError) as e:
            why = f"kernels/csrc does not build here ({reason(e)})"
    library = load_cached(library_name(None))  # any compiler may have made it earlier
    if library is None:
        print(f"{why}: running on PyTorch's own, slower operations", file=sys.stderr)
    return library


def use_one_thread():
    """Makes the child of a fork use one thread. With more threads it would wait forever, because OpenMP's other threads
    exist only in the parent."""
    torch.set_num_threads(1)


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
    """The compiled library's file name, kernels-A-B.so. A is a hash of the sources, the flags, the PyTorch version and
    the CPU. B is a hash of the compiler. If compiler is None, returns a pattern for the libraries of any compiler, or
    "" if the CPU is unknown."""
    cpu = cpu_description()
    key = hashlib.sha256(repr((compiler_flags(), torch.__version__, cpu)).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    if compiler is None:
        return f"kernels-{key.hexdigest()[:16]}-*.so" if cpu else ""
    # The predefined macros have the compiler's version, and the instruction sets of -march=native.
    macros = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    compiler_key = hashlib.sha256(subprocess.run(macros, capture_output=True).stdout)
    return f"kernels-{key.hexdigest()[:16]}-{compiler_key.hexdigest()[:8]}.so"


def cpu_description() -> str:
    """The model and the instruction sets of the first CPU, as Linux reports them; "" on other systems."""
    with contextlib.suppress(OSError):
        first_cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        fields = dict(map(str.strip, line.partition(":")[::2]) for line in first_cpu.splitlines())
        return repr([fields[name] for name in CPU_FIELDS if name in fields])
    return ""


def cache_folders() -> list[Path]:
    """The folders for compiled libraries. The first is preferred."""
    folders = [Path(tempfile.gettempdir()) / f"gpt-fast-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # no home folder
        folders.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-fast")
    return folders


def check_folder(folder: Path):
    """Raises OSError if libraries cannot be loaded from folder, or if another user could have written them. In a parent
    that all users can write to, the folder must be this user's alone."""
    status, parent = folder.lstat(), folder.parent.stat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    if parent.st_mode & stat.S_IWOTH and not is_own:
        raise OSError(f"{folder} is another user's")
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError(f"{folder} is mounted noexec")


def load_cached(name: str) -> ctypes.CDLL | None:
    """Loads a cached library. name is a file name or a pattern. Returns None if nothing fits or loads."""
    for folder in cache_folders() if name else []:
        with contextlib.suppress(OSError):
            check_folder(folder)
            for path in folder.glob(name):
                with contextlib.suppress(OSError):
                    return load_library(path)
    return None


# ---- Compiling and loading ------------------------------------------------------------------------------------------


def compile_and_load(compiler: list[str]) -> ctypes.CDLL:
    """Compiles and loads the library in the first of cache_folders where that works. If the preferred folder does not
    work, prints why. If no folder works, raises OSError or CalledProcessError.

    Prints a line first: otherwise the program would seem to hang for some seconds."""
    if sys.stderr:  # None if the shell has closed stderr
        print("compiling kernels/csrc for this machine, once", file=sys.stderr, flush=True)
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
        os.replace(out, library)  # atomic: other processes see a whole file or no file
    return load_library(library)


def run_compiler(command: list[str], env: dict[str, str]):
    """Runs a compiler. Raises CalledProcessError if it fails. If a signal ends this process, kills the compiler and all
    processes that the compiler has started."""
    with defer_signals() as held, subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as process:
        errors = None
        while errors is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = process.communicate(timeout=0.1)
            if held and errors is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)


def reason(e: Exception) -> str:
    """The line of a compiler's output, or of another error's message, that says why it failed."""
    lines = (getattr(e, "stderr", None) or str(e)).splitlines()
    reasons = [line for word in ("No space left", "error") for line in lines if word in line]
    return reasons[0] if reasons else str(e)


def load_library(library: Path) -> ctypes.CDLL:
    """Loads the library and declares its functions. Raises OSError if it cannot be loaded."""
    torch.ops.load_library(library)
    functions = ctypes.CDLL(str(library))
    functions.op_list_begin.restype = ctypes.c_void_p
    functions.op_list_replay.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    functions.op_list_replay.restype = ctypes.c_char_p
    functions.op_list_free.argtypes = [ctypes.c_void_p]
    functions.format_names.restype = functions.activation_names.restype = ctypes.c_char_p
    return functions


def cpp_formats(library: ctypes.CDLL) -> list[str]:
    """The names of the classes in formats/ whose weights the C++ kernels read."""
    return library.format_names().decode().split(", ")


def quantizes_activations(library: ctypes.CDLL, format: WeightFormat) -> bool:
    """Whether a matmul of the C++ kernels with weights of format rounds 16-bit activations to int8."""
    return bool(library.format_quantizes_activations(type(format).__name__.encode()))


def cpp_activations(library: ctypes.CDLL) -> list[str]:
    """The activations of config.py: ACTIVATIONS that the C++ kernels compute."""
    return library.activation_names().decode().split(", ")

"""Compiles and loads the C++ kernels in kernels/csrc/, and puts weights into huge pages for them.

The kernels are compiled for this machine at first use, which takes some fifteen seconds, and cached in
~/.cache/gpt-fast. The environment variables CXX and CXXFLAGS choose the compiler and add to its flags. Without a C++
compiler, everything runs on PyTorch's own, slower operations.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import schema  # noqa: F401  (defines the schemas of the operations in the library)
from machine import use_huge_pages

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ["-O3", "-std=c++20", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


@cache
def build() -> ctypes.CDLL | None:
    """Loads the kernels, which then are torch.ops.gptfast. Compiles them first if they are not in the cache; several
    processes may do so at once. If it fails, prints one line to stderr and returns None.

    The library that is returned has the functions by which record.py records and replays tapes (kernels/csrc/tape.h).
    """
    compiler = find_compiler()
    if compiler is None:
        print("no C++ compiler ($CXX, g++ or clang++): running on PyTorch's own, slower operations", file=sys.stderr)
        return None
    try:
        return load_library(library_path(compiler), compiler)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as e:  # RuntimeError: no home folder
        lines = (getattr(e, "stderr", None) or str(e)).splitlines()
        why = next((line for line in lines if "error" in line), str(e))
        print(f"kernels/csrc does not build here ({why}): running on PyTorch's own, slower operations", file=sys.stderr)
        return None


def find_compiler() -> list[str] | None:
    for command in (shlex.split(os.environ.get("CXX", "")) or ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            return command
    return None


def compiler_flags() -> list[str]:
    torch_dir = Path(torch.__file__).parent
    ours = [*FLAGS, f"-I{torch_dir / 'include'}", f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    return ours + os.environ.get("CXXFLAGS", "").split()


def library_path(compiler: list[str]) -> Path:
    """Where the compiled library is, or will be. Its name is a hash of all that it depends on: the sources, the flags,
    the PyTorch version, the compiler and the CPU."""
    # The predefined macros name the compiler's version and the CPU's instruction sets.
    macros = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    key = hashlib.sha256(subprocess.run(macros, capture_output=True).stdout)
    key.update(repr((compiler_flags(), torch.__version__)).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-fast"
    return folder / f"kernels-{key.hexdigest()[:16]}.so"


def load_library(library: Path, compiler: list[str]) -> ctypes.CDLL:
    """Loads the library, compiled first if the file is missing or broken."""
    try:
        torch.ops.load_library(library)
    except OSError:
        if sys.stderr and sys.stderr.isatty():
            print("compiling kernels/csrc for this machine, once", file=sys.stderr)
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            out = f"{scratch}/kernels.so"
            command = [*compiler, str(SOURCES / "ops.cpp"), "-o", out, *compiler_flags()]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(out, library)  # atomic, so that other processes see a whole file or none
        torch.ops.load_library(library)
    functions = ctypes.CDLL(str(library))
    functions.tape_begin.restype = ctypes.c_void_p
    functions.tape_replay.argtypes = [ctypes.c_void_p]
    functions.tape_replay.restype = ctypes.c_char_p
    functions.tape_free.argtypes = [ctypes.c_void_p]
    return functions


class HugePages:
    """Copies tensors into huge pages, one behind the other. With small pages, TLB misses cost time."""

    CHUNK = 2**26  # bytes that are allocated at a time, or more for a larger tensor
    PAGE = 2**21
    ALIGNMENT = 64  # a cache line

    def __init__(self):
        self.memory, self.used = torch.empty(0, dtype=torch.uint8), 0

    def copy(self, t: Tensor) -> Tensor:
        if self.used + t.nbytes > self.memory.numel():  # a new chunk, with room to start at the beginning of a page
            self.memory = torch.empty(max(t.nbytes, self.CHUNK) + 2 * self.PAGE, dtype=torch.uint8)
            self.used = -self.memory.data_ptr() % self.PAGE
            use_huge_pages(self.memory[self.used :])
        copy = self.memory[self.used : self.used + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        self.used += -(-t.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        return copy

"""A C++ compiler that only copies a library, to test how kernels are built and cached."""

import os
from pathlib import Path

from kernels import build

SCRIPT = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
    -dM) echo "#define SCRIPT" ;;
    -o) sleep 1; cp {library} "$2" ;;
    esac
    shift
done
"""


def write_compiler(script: Path) -> str:
    """Writes the compiler, a script for $CXX, and returns its path."""
    assert build.load_cpp_kernels()
    name = build.library_name(build.find_compiler())
    library = next(folder / name for folder in build.cache_folders() if (folder / name).exists())
    script.write_text(SCRIPT.format(library=library))
    os.chmod(script, 0o755)
    return str(script)

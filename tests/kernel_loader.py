"""Loads the kernels in a process of its own, for test_kernels_builds.py.

The processes are forks of a process that has imported this module, so torch is imported only once."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import kernels.build

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def load_kernels(env: dict[str, str], err: Path) -> bool:
    """Loads the kernels in a process, with the variables env besides those of the test. stderr goes to the file err.
    Returns whether the kernels were loaded."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=load, args=(env, err, sender))
    process.start()
    sender.close()
    is_loaded = receiver.recv()
    process.join()
    return is_loaded


def load(env: dict[str, str], err: Path, sender):
    os.environ |= env
    tempfile.tempdir = None  # so that tempfile reads TMPDIR again
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sender.send(bool(kernels.build.load_cpp_kernels()))

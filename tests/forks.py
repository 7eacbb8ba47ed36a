"""Runs commands in forks of the test process, which has imported torch already. Tests stop a fork at any moment, or
give it little memory."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import eval
import generate
import quantize
from cli.interrupts import exit_on_interrupt
from cli.script import run_script
from scripts import convert_gguf, convert_hf_checkpoint, download

MAINS = {
    "convert": convert_hf_checkpoint.main,
    "gguf": convert_gguf.main,
    "quantize": quantize.main,
    "generate": generate.main,
    "eval": eval.main,
    "download": download.main,
}


def start(command: str, args: list, err: Path, out: Path = Path(os.devnull), memory: int | None = None):
    """Starts a fork that runs a command. out and err: files for stdout and stderr. memory: how many bytes it may
    allocate."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(command, args, out, err, memory))
    before = signal.getsignal(signal.SIGINT)
    exit_on_interrupt()  # as in a script before run_script
    process.start()
    signal.signal(signal.SIGINT, before)
    return process


def run(command: str, args: list, out: Path, err: Path, memory: int | None):
    os.setpgid(0, 0)
    tqdm.set_lock(threading.RLock())  # all forks share the default lock, which a killed fork would never release
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = [f"{command}.py", *map(str, args)]
    if memory is not None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory, in_use + memory))
    run_script(MAINS[command])


def finish(process: multiprocessing.Process) -> int:
    """Waits for process and returns its exit status."""
    process.join(300)
    assert not process.is_alive(), process.kill()
    return process.exitcode


def stop(sig: int, command: str, args: list, err: Path) -> Iterator[int]:
    """Runs the command twice to measure its time. Then runs it again and again, and sends sig a little later each time,
    until a run ends before its signal. Yields the exit status of every run but the first."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        status = finish(start(command, args, err))
        seconds.append(time.perf_counter() - began)
    yield status
    step, i = min(seconds) / 12, 0
    while i < 50:
        i += 1
        process = start(command, args, err)
        time.sleep(i * step)
        os.kill(process.pid, sig)
        status = finish(process)
        if status == 0 and i < 4 and step > 0.01:  # the measured runs were slower than this one: take smaller steps
            step, i = step / 4, 0
            continue
        yield status
        if status == 0:
            return

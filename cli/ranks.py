"""The ranks (processes) of a tensor-parallel run: how they start and end, and what only rank 0 does. tp.py shards the
model.

    with process_group():
        run_script(main)
"""

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.runner import ModelRunner
from layers.collectives import broadcast_json, collective_seconds, world_size

TIMEOUT = timedelta(minutes=10)  # for a rank that hangs; if a rank dies, torchrun ends the other ranks at once


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Joins torchrun's process group for as long as this context lasts. Does nothing without torchrun.

    Only rank 0 prints. This includes the one-line error that ends a script. After an error, the other ranks wait until
    rank 0 has printed it, because torchrun kills all ranks as soon as one rank has exited. Ctrl-C ends a rank at
    once."""
    names = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}  # a cluster may set only some
    if not names <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.accelerator.is_available() and local_rank < torch.accelerator.device_count():
        torch.accelerator.set_device_index(local_rank)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    dist.init_process_group(timeout=TIMEOUT)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the whole job
    errors = io.StringIO()  # what a rank other than 0 would have printed on stderr
    try:
        with contextlib.nullcontext() if dist.get_rank() == 0 else silence(errors):
            yield
    except SystemExit:
        wait_for_rank_0(errors.getvalue())
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def silence(errors: io.StringIO) -> Iterator[None]:
    """Discards what is printed to stdout within this context. Writes what is printed to stderr to errors."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(errors):
        yield


def wait_for_rank_0(errors: str):
    """Lets rank 0 print its error before any rank exits. Rank 0 calls this function after printing, and the other ranks
    wait for that call, at most 5 s. Without the call, rank 0 has had no error, and the waiting rank prints errors."""
    store = dist.distributed_c10d._get_default_store()  # the key-value store that all ranks share
    if dist.get_rank() == 0:
        store.set("rank 0 has printed", "")
        return
    try:
        store.wait(["rank 0 has printed"], timedelta(seconds=5))
    except dist.DistStoreError:
        print(errors, end="", file=sys.stderr)


def input_lines(read: Callable[[], str | None]) -> Iterator[str]:
    """Yields on every rank what read() returns on rank 0, until read returns None. While the user types, other ranks
    wait without a timeout and without using the processor."""
    if world_size() == 1:
        yield from iter(read, None)
        return
    store = dist.distributed_c10d._get_default_store()
    while (line := broadcast_json(store, read)) is not None:
        yield line


def rank_path(path: Path) -> Path:
    """Returns path, or with several ranks a path with this rank's number in the name."""
    return path if world_size() == 1 else path.with_stem(f"{path.stem}.rank{dist.get_rank()}")


@torch.inference_mode()
def communication_share(runner: ModelRunner) -> float | None:
    """Returns the fraction of a decode step's time that this rank spends in collectives, including the wait for other
    ranks. Returns None without torchrun, and for a compiled step on a CPU, whose collectives nobody times. The steps
    are at position 0, which the first prompt overwrites."""
    if world_size() == 1:
        return None
    tokens = torch.zeros(runner.kv_cache.batch_size, 1, dtype=torch.long, device=runner.device)
    step = partial(runner.decode, tokens, tokens[:, 0])
    device_type = step().device.type  # the first call may capture or compile
    if device_type == "cpu":
        before = collective_seconds.total()
        seconds = time_steps(step)
        spent = collective_seconds.total() - before
        return spent / seconds if spent else None
    # The profiler also sees the collectives in a graph. On a CPU, it would print lines of its own, and its thread calls
    # getenv, which crashes if another thread sets an environment variable.
    with torch.autograd.profiler.profile(use_device=device_type) as profile:
        seconds = time_steps(step)
    events = [event for event in profile.key_averages() if re.search("nccl|one_shot", event.key)]
    on_device = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    return sum(event.self_device_time_total for event in on_device) / 1e6 / seconds


def time_steps(step: Callable[[], Tensor], n_steps: int = 8) -> float:
    start = time.perf_counter()
    for _ in range(n_steps):
        step().tolist()
    return time.perf_counter() - start

"""Collectives: communication between the ranks of a tensor-parallel run. Without torchrun there is one rank.

    all_reduce, all_gather            tensors, within a step; tp.py inserts the calls into the model
    broadcast                         tensors, at the end of a step; the samplers call it
    gather_objects, call_on_rank_0    Python values, outside of steps

Tensors travel over gloo between CPUs and over NCCL between GPUs. If the GPUs can read each other's memory, small
tensors, such as those of a decode step, are reduced over peer memory (choose_all_reduce).
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import cache, wraps
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.capture import call_between_op_lists
from utils.errors import UsageError

ONE_SHOT_BYTES = 2**18  # up to this size, a one-shot all-reduce over peer memory is faster than NCCL
c10d = torch.ops._c10d_functional  # the functional collectives, which torch.compile can trace
# Name of a collective -> the time this process has spent in it. Only between CPUs, and not in a compiled step:
# torch.compile cannot trace a clock
collective_seconds: Counter[str] = Counter()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def collective(join_ranks: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Decorator for a function that joins the x of all ranks. With one rank the result is x itself.

    A CUDA graph captures the collective. A CPU graph is cut at it (kernels/capture.py: call_between_op_lists)."""

    def timed(x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return join_ranks(x)
        start = time.perf_counter()
        result = join_ranks(x)
        collective_seconds[join_ranks.__name__] += time.perf_counter() - start
        return result

    @wraps(join_ranks)
    def call(x: Tensor) -> Tensor:
        return x if world_size() == 1 else call_between_op_lists(timed, x)

    return call


@collective
def all_reduce(x: Tensor) -> Tensor:
    return c10d.wait_tensor(c10d.all_reduce(x.contiguous(), "sum", group_name()))


@collective
def broadcast(x: Tensor) -> Tensor:
    """Returns the x of rank 0. Samplers broadcast their tokens, because the ranks may have been seeded differently."""
    return c10d.wait_tensor(c10d.broadcast(x.contiguous(), 0, group_name()))


@collective
def all_gather(x: Tensor) -> Tensor:
    """x [..., X] of each rank -> [..., ranks * X]"""
    stacked = c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous(), world_size(), group_name()))
    return stacked.unflatten(0, (world_size(), -1)).movedim(0, -2).flatten(-2)  # [ranks, ..., X] -> [..., ranks * X]


def group_name() -> str:
    return dist.group.WORLD.group_name


def choose_all_reduce(like: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the fastest all-reduce that all ranks support for tensors with like's device and dtype."""
    if not all(gather_objects(can_one_shot(like))):
        return all_reduce
    one_shot = one_shot_all_reduce(like.device, like.dtype)

    def by_size(x: Tensor) -> Tensor:
        return one_shot(x) if x.nbytes <= ONE_SHOT_BYTES else all_reduce(x)

    return by_size


def can_one_shot(like: Tensor) -> bool:
    """Whether this rank can use PyTorch's one-shot all-reduce: its GPU can read the memory of all others, and the
    operation supports the dtype and the number of ranks. With 2, 4 or 8 ranks, all of them add in the same order."""
    n_ranks = world_size()
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float32) or n_ranks not in (2, 4, 8):
        return False
    if os.environ.get("LOCAL_WORLD_SIZE") != str(n_ranks):  # some ranks may be on another machine
        return False
    this = like.device
    return all(torch.cuda.can_device_access_peer(this, i) for i in range(n_ranks) if i != this.index)


@cache
def one_shot_all_reduce(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Returns an all-reduce that is one kernel over PyTorch's symmetric memory. It has a buffer of its own, because a
    CUDA graph needs a fixed address."""
    import torch.distributed._symmetric_memory as symmetric_memory  # here, because only several GPUs need it

    group = group_name()
    buffer = symmetric_memory.empty(ONE_SHOT_BYTES // dtype.itemsize, dtype=dtype, device=device)
    symmetric_memory.rendezvous(buffer, group)
    dtype_name = str(dtype).removeprefix("torch.")

    @torch.library.custom_op(f"gptfast_tp::one_shot_all_reduce_{dtype_name}", mutates_args=())
    def one_shot(x: Tensor) -> Tensor:
        shared = buffer[: x.numel()].view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x.contiguous(), "sum", group)

    one_shot.register_fake(torch.empty_like)
    return one_shot


def gather_objects(value) -> list:
    """Returns the values of all ranks, in the order of ranks, on every rank."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


broadcast_numbers = count()  # for the keys of broadcast_json: a key stays set, so every call needs a new one


def broadcast_json(store: dist.Store, function: Callable[[], object]):
    """Calls function on rank 0 while the other ranks wait, however long it takes. Every rank returns the result, a JSON
    value."""
    key = f"result {next(broadcast_numbers)}"
    if dist.get_rank() == 0:
        store.set(key, json.dumps(function()))
    store.wait([key], timedelta(days=1000))
    return json.loads(store.get(key))


def call_on_rank_0(function: Callable[[], str]) -> str:
    """Calls function on rank 0 while the other ranks wait. Every rank returns its result, or raises its UsageError."""

    def result_or_error() -> tuple[str | None, str | None]:
        try:
            return function(), None
        except UsageError as e:
            return None, str(e)

    if world_size() == 1:
        return function()
    store = dist.distributed_c10d._get_default_store()
    result, error = broadcast_json(store, result_or_error)
    if result is None:
        raise UsageError(error)
    return result

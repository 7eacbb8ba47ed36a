"""Tensor parallelism: one model on several devices or machines, one process (rank) for each, started by torchrun.

    torchrun --standalone --nproc_per_node=2 generate.py --checkpoint_path checkpoints/M/model.pth --prompt "Hello"

The layout is Megatron's (arXiv:1909.08053). A rank has some heads of every attention, a part of the width of every
feed-forward and expert, and a part of the output head's vocabulary. Embedding, norms and routers it has whole.

    qkv_proj, gate_up_proj    cut along their outputs: a rank computes some outputs in full
    o_proj, down_proj         cut along their inputs: a rank computes a part of every sum; an all-reduce adds them up
    output                    cut along its outputs; an all-gather puts the logits side by side

tp_plan is this table, shard applies it to a model and its checkpoint, insert_collectives makes the ranks work
together. model.py knows nothing of it. gloo carries the collectives between CPUs, NCCL between GPUs. GPUs that read
each other's memory add up the few numbers of a decode step through that instead.
"""

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from config import ModelConfig, UsageError
from kernels.formats import Format
from kernels.record import outside
from model import Attention, Transformer

TIMEOUT = timedelta(minutes=10)  # for a rank that hangs; when one dies, torchrun ends the others at once
ONE_SHOT_BYTES = 2**18  # Below this size one-shot all-reduce over peer memory beats NCCL.


@dataclass(frozen=True)
class ShardSpec:
    """How a linear layer is cut: along its outputs (rows of its weight) or its inputs (columns)."""

    along: str  # "outputs" or "inputs"
    sections: tuple[int, ...]  # stacked in one weight, as q, k and v are; each is cut for itself
    granularity: int = 1  # elements that stay together, as those of a head do


def tp_plan(config: ModelConfig) -> dict[str, ShardSpec]:
    """The linear layers that are cut, by the last component of their name. All other tensors every rank has whole."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "qkv_proj": ShardSpec("outputs", (q, kv, kv), granularity=config.head_dim),
        "o_proj": ShardSpec("inputs", (q,), granularity=config.head_dim),
        "gate_up_proj": ShardSpec("outputs", (config.ffn_dim, config.ffn_dim)),
        "down_proj": ShardSpec("inputs", (config.ffn_dim,)),
        "output": ShardSpec("outputs", (config.vocab_size,)),
    }


def shard_range(size: int, granularity: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """(start, length) of what a rank has of size elements. The length is the same on all ranks, so where it does not
    divide, the last ranks' ranges reach beyond the end. Of fewer pieces (of granularity elements) than ranks, as of
    key/value heads, several ranks have the same one."""
    n_pieces = size // granularity
    if n_pieces < n_ranks:
        return rank * n_pieces // n_ranks * granularity, granularity
    length = -(-n_pieces // n_ranks) * granularity  # rounded up
    return rank * length, length


def check_divides(config: ModelConfig, format: Format, n_ranks: int):
    """Raises UsageError, with what would be possible, if the model cannot be cut into n_ranks equal parts."""
    if divides(config, format, n_ranks):
        return
    possible = [str(n) for n in range(2, config.n_heads + 1) if divides(config, format, n)]
    unit = f", of which {format.name} keeps {format.unit} together," if format.unit > 1 else ""
    raise UsageError(
        f"{config.n_heads} heads, {config.n_kv_heads} key/value heads and a feed-forward of width {config.ffn_dim}"
        f"{unit} cannot be cut into {n_ranks} equal parts, but into {' or '.join(possible) or 'none'}"
    )


def divides(config: ModelConfig, format: Format, n_ranks: int) -> bool:
    """Whether n_ranks ranks can have equal parts. Key/value heads may be shared, and the vocabulary need not divide."""
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.ffn_dim
    if heads % n_ranks or width % n_ranks or config.vocab_size < n_ranks:
        return False
    if kv_heads % n_ranks and n_ranks % kv_heads:
        return False
    return heads // n_ranks * config.head_dim % format.unit == 0 and width // n_ranks % format.unit == 0


def check_device(device: torch.device):
    """Raises UsageError unless this rank has an accelerator of its own, or runs on the CPU."""
    local_rank, n_devices = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if device.type != "cpu" and (local_rank >= n_devices or device.index not in (None, local_rank)):
        raise UsageError(f"every process needs a device of its own, and here are {n_devices}; "
                         "start fewer, or give no number in --device")  # fmt: skip


def shard(model: Transformer, device: torch.device) -> Callable[[str, Tensor], Tensor]:
    """Makes model, which is on the meta device in its checkpoint's format, as small as this rank's part, and returns
    the function (name, tensor of the checkpoint) -> this rank's part of it. Raises UsageError for sizes that cannot be
    cut and for devices that are missing."""
    plan, format, n_ranks = tp_plan(model.config), model.format, world_size()
    check_device(device)
    check_divides(model.config, format, n_ranks)
    linears = dict(model.linears())

    def shard_tensor(name: str, tensor: Tensor) -> Tensor:
        """A copy, so that nothing else is read of a memory-mapped tensor; tensor itself if every rank has it whole."""
        module_name, _, kind = name.rpartition(".")
        spec = plan.get(module_name.rpartition(".")[2])
        if spec is None:
            return tensor
        if spec.along == "inputs":
            return shard_inputs(tensor, kind, spec, format)
        return shard_outputs(tensor, spec, dim=0 if linears[module_name].n_experts is None else 1)

    for name, linear in linears.items():
        spec = plan.get(name.rpartition(".")[2])
        if spec is None:
            continue
        for kind, tensor in linear.state_dict().items():
            linear.set_tensor(kind, shard_tensor(f"{name}.{kind}", tensor))
        n = sum(shard_range(size, spec.granularity, 0, n_ranks)[1] for size in spec.sections)  # the same on every rank
        if spec.along == "inputs":
            linear.in_features, linear.format = n, format.for_inputs(n)
        else:
            linear.out_features = n
    for module in model.modules():
        if isinstance(module, Attention):
            module.n_heads //= n_ranks
            module.n_kv_heads = -(-module.n_kv_heads // n_ranks)  # at least one
    return shard_tensor


def shard_inputs(tensor: Tensor, kind: str, spec: ShardSpec, format: Format) -> Tensor:
    """What this rank keeps of a layer's weight, scales, zeros or bias (kind), whose weight it has some columns of."""
    if kind == "bias":  # every rank's goes into the sum, so that all but one are 0
        return tensor.clone() if dist.get_rank() == 0 else torch.zeros_like(tensor)
    (size,) = spec.sections
    return format.slice_inputs(kind, tensor, *shard_range(size, spec.granularity, dist.get_rank(), world_size()))


def shard_outputs(tensor: Tensor, spec: ShardSpec, dim: int) -> Tensor:
    """Some of every section's outputs, which lie along dim, filled up with zeros where the range reaches beyond it."""
    parts = []
    for size, section in zip(spec.sections, tensor.split(spec.sections, dim), strict=True):
        start, length = shard_range(size, spec.granularity, dist.get_rank(), world_size())
        available = max(0, min(length, size - start))
        part = section.narrow(dim, min(start, size), available)
        pad_after_dim = (0, 0) * (tensor.dim() - 1 - dim)  # F.pad names the last dimension first
        parts.append(F.pad(part, (*pad_after_dim, 0, length - available)))
    return torch.cat(parts, dim)


def insert_collectives(model: Transformer):
    """The last step of making a model that shard has cut: puts the collectives behind the layers that need them."""
    reduce = choose_all_reduce(model.tok_embeddings.weight)
    for layer in model.layers:
        layer.attention.o_proj = RowParallelLinear(layer.attention.o_proj, reduce)
        layer.feed_forward.down_proj = RowParallelLinear(layer.feed_forward.down_proj, reduce)
    model.output = ParallelHead(model.output, model.config.vocab_size)


class RowParallelLinear(nn.Module):
    """A linear layer cut along its inputs: what the ranks make of theirs is added up. For o_proj and down_proj, of
    experts too. The residual is added after that, or every rank would add it."""

    def __init__(self, linear: nn.Module, all_reduce: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.all_reduce, self.backend = linear, all_reduce, linear.backend

    def forward(self, *args, residual: Tensor | None = None, **kwargs) -> Tensor:
        y = self.all_reduce(self.linear(*args, **kwargs))
        return y if residual is None else kernels.add(residual, y, self.backend)


class ParallelHead(nn.Module):
    """The output head cut along the vocabulary: the ranks' logits are put side by side."""

    def __init__(self, linear: nn.Module, vocab_size: int):
        super().__init__()
        self.linear, self.vocab_size, self.backend = linear, vocab_size, linear.backend

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return outside(self.all_gather, self.linear(x, **kwargs))

    def all_gather(self, logits: Tensor) -> Tensor:
        """[..., X] of every rank, the last of which may be filled up -> [..., V]."""
        gathered = collective("all_gather_into_tensor", world_size(), logits)  # [ranks * ..., X]
        by_rank = gathered.unflatten(0, (world_size(), -1))  # [ranks, ..., X]
        return by_rank.movedim(0, -2).flatten(-2)[..., : self.vocab_size]


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


# On a GPU torch.compile takes the collectives into its graph. A CPU's tape knows only leaf operations: there they
# happen between two tapes, at every replay.


def all_reduce(x: Tensor) -> Tensor:
    """The sum of all ranks' x."""
    return outside(partial(collective, "all_reduce", "sum"), x)


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's x on every rank: what the ranks sample, each with its own random numbers, becomes the same."""
    return x if world_size() == 1 else outside(partial(collective, "broadcast", 0), x)


def collective(name: str, argument: str | int, x: Tensor) -> Tensor:
    """One of PyTorch's functional collectives, which torch.compile takes into its graphs."""
    operation = getattr(torch.ops._c10d_functional, name)
    pending = operation(x.contiguous(), argument, dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(pending)


def choose_all_reduce(like: Tensor) -> Callable[[Tensor], Tensor]:
    """The fastest all-reduce that all ranks have, for tensors of the device and dtype of like."""
    if not all(gather_objects(can_one_shot(like))):
        return all_reduce
    one_shot = one_shot_all_reduce(like.device, like.dtype)

    def by_size(x: Tensor) -> Tensor:
        return one_shot(x) if x.nbytes <= ONE_SHOT_BYTES else all_reduce(x)

    return by_size


def can_one_shot(like: Tensor) -> bool:
    """Whether this rank's GPU reads the memory of all the others. PyTorch has the operation for these dtypes, and with
    these numbers of ranks it adds in the same order on all of them."""
    n_ranks = world_size()
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float32) or n_ranks not in (2, 4, 8):
        return False
    if os.environ["LOCAL_WORLD_SIZE"] != str(n_ranks):  # some are on another machine
        return False
    this = like.device
    return all(torch.cuda.can_device_access_peer(this, i) for i in range(n_ranks) if i != this.index)


@cache
def one_shot_all_reduce(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """All-reduce in one kernel, over PyTorch's symmetric memory. A custom op with the buffer inside, so that CUDA
    graphs see a fixed buffer address."""
    import torch.distributed._symmetric_memory as symmetric_memory  # needed with several GPUs alone

    group_name = dist.group.WORLD.group_name
    buffer = symmetric_memory.empty(ONE_SHOT_BYTES // dtype.itemsize, dtype=dtype, device=device)
    symmetric_memory.rendezvous(buffer, group_name)
    dtype_name = str(dtype).removeprefix("torch.")

    @torch.library.custom_op(f"gptfast_tp::one_shot_all_reduce_{dtype_name}", mutates_args=())
    def one_shot(x: Tensor) -> Tensor:
        shared = buffer[: x.numel()].view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x.contiguous(), "sum", group_name)

    one_shot.register_fake(torch.empty_like)
    return one_shot


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Makes this process one of those that torchrun started, for as long as the context lasts. Does nothing in a
    process that is alone. Rank 0 alone prints, also the line that says why a script cannot go on. The others wait for
    that, since torchrun ends all when one has ended. Ctrl-C ends a rank at once."""
    names = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}  # a cluster may set some of them
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
    errors = io.StringIO()  # what ranks other than 0 would print on stderr
    try:
        with contextlib.nullcontext() if dist.get_rank() == 0 else silence(errors):
            yield
    except SystemExit:
        wait_for_rank_0(errors.getvalue())
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def silence(errors: io.StringIO) -> Iterator[None]:
    """Throws away what is printed on stdout and keeps in errors what is printed on stderr."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(errors):
        yield


def wait_for_rank_0(errors: str):
    """Before a rank exits with an error: rank 0, which has printed it, lets the others go. If rank 0 has no reason to
    exit, this rank prints its own errors after all."""
    store = dist.distributed_c10d._get_default_store()  # through which the ranks found each other
    if dist.get_rank() == 0:
        store.set("rank 0 has printed", "")
        return
    try:
        store.wait(["rank 0 has printed"], timedelta(seconds=5))
    except dist.DistStoreError:
        print(errors, end="", file=sys.stderr)


def input_lines(read: Callable[[], str | None]) -> Iterator[str]:
    """What read returns on rank 0, call by call until it is None, on every rank. Typing takes as long as it takes: this
    waits without a time-out, and without using the processor."""
    if world_size() == 1:
        yield from iter(read, None)
        return
    store = dist.distributed_c10d._get_default_store()
    for i in count():
        key = f"line {i}"
        if dist.get_rank() == 0:
            store.set(key, json.dumps(read()))
        store.wait([key], timedelta(days=1000))
        line = json.loads(store.get(key))
        if line is None:
            return
        yield line


def gather_objects(value) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def rank_path(path: Path) -> Path:
    """path, with the rank in its name if there are several."""
    return path if world_size() == 1 else path.with_stem(f"{path.stem}.rank{dist.get_rank()}")


@torch.inference_mode()
def communication_share(step: Callable[[], Tensor], n_steps: int = 8) -> float:
    """The fraction of a step's time that this rank spends in collectives, waiting for the other ranks included. The
    profiler tells, which sees them in compiled steps too. On a CPU that is the old one, which costs less."""
    device_type = step().device.type  # the first call may record or compile
    on_cpu = device_type == "cpu"
    with torch.autograd.profiler.profile(use_device=None if on_cpu else device_type, use_kineto=not on_cpu) as profile:
        start = time.perf_counter()
        for _ in range(n_steps):
            step().tolist()
        seconds = time.perf_counter() - start
    collectives = [e for e in profile.key_averages() if re.search("c10d|nccl|one_shot", e.key)]
    if on_cpu:
        microseconds = sum(e.self_cpu_time_total for e in collectives)
    else:
        cpu = torch.autograd.DeviceType.CPU
        microseconds = sum(e.self_device_time_total for e in collectives if e.device_type != cpu)
    return microseconds / 1e6 / seconds

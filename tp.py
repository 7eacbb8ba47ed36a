"""Tensor parallelism: one model on several devices or machines, a process (rank) for each, started by torchrun.

    torchrun --standalone --nproc_per_node=2 generate.py --checkpoint_path checkpoints/M/model.pth --prompt "Hello"

Every rank has some heads of each attention, a part of the width of each feed-forward and expert, and a part of the
output head's vocabulary; embedding, norms and routers it has whole. Twice a layer the ranks' results are added up, and
behind the head they are gathered. model.py knows nothing of it: shard makes its layers smaller, join puts the sums in.
gloo carries them between CPUs, NCCL between GPUs; GPUs that read each other's memory add a decode step's few numbers
up through that.
"""

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache, partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attention, Experts, Linear, ModelConfig, Transformer, UsageError

OUT, IN = "outputs", "inputs"  # rows and columns of a weight
TIMEOUT = timedelta(minutes=10)  # for ranks that hang; of one that dies the others know at once
ONE_SHOT = 2**18  # bytes up to which every GPU reading from all the others is faster than NCCL


def cuts(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """The linears that are cut, by the end of their name: along what, its sections, each of which is cut for itself,
    and how many elements stay together. All other tensors every rank has whole."""
    d = config.head_dim
    q, kv, width = config.n_heads * d, config.n_kv_heads * d, config.ffn_dim
    return {
        "wqkv": (OUT, (q, kv, kv), d),
        "wo": (IN, (q,), d),
        "w13": (OUT, (width, width), 1),
        "w2": (IN, (width,), 1),
        "output": (OUT, (config.vocab_size,), 1),
    }


def span(section: int, unit: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, length) of a rank's part of a section; the length is the same on all ranks, so the last parts may reach
    beyond the end. Of fewer units than ranks (key/value heads), several ranks have the same one."""
    units = section // unit
    n = -(-units // ranks)
    return (rank * units // ranks if units < ranks else rank * n) * unit, n * unit


def part(config: ModelConfig, group: int | None, rank: int, ranks: int, name: str, t: Tensor) -> Tensor:
    """What a rank gets of the tensor called name: a copy of its part, so that no more than that is read from a file,
    or t itself if it is not cut. group: of int4."""
    *module, linear, kind = name.split(".")
    along, sections, unit = cuts(config).get(linear, (None, (), 0))
    if along == OUT:  # the first dimension behind the experts', whatever follows it
        dim, parts = int("experts" in module), []
        for size, section in zip(sections, t.split(sections, dim), strict=True):
            start, n = span(size, unit, rank, ranks)
            piece = section.narrow(dim, min(start, size), min(n, max(size - start, 0)))
            parts.append(F.pad(piece, (0, 0) * (t.dim() - 1 - dim) + (0, n - piece.shape[dim])))
        return torch.cat(parts, dim)
    if along == IN:  # the last dimension; a bias is added once, and int8's scales belong to the rows
        start, n = span(*sections, unit, rank, ranks)
        if kind == "weight":
            packed = sections[0] // t.shape[-1]  # numbers in one of its elements
            return t[..., start // packed : (start + n) // packed].clone()
        if kind == "bias":
            return t.clone() if rank == 0 else torch.zeros_like(t)
        if group:
            return t[..., torch.arange(start, start + n, math.gcd(n, group), device=t.device) // group]
    return t


def shard(model: Transformer, quantization: dict | None, device: torch.device) -> Callable[[str, Tensor], Tensor]:
    """Makes model, which is on the meta device, as small as this rank's part, and returns the function (name, tensor of
    the checkpoint) -> this rank's part of it. Raises UsageError for sizes that don't divide and devices that lack."""
    config, ranks, group = model.config, world_size(), (quantization or {}).get("groupsize")
    local = int(os.environ["LOCAL_RANK"])
    if device.type != "cpu" and (local >= torch.accelerator.device_count() or device.index not in (None, local)):
        raise UsageError(f"every process needs a device of its own, and here are {torch.accelerator.device_count()}; "
                         f"start fewer, or give no number in --device")  # fmt: skip
    if not divides(config, group, ranks):
        fit = [str(n) for n in range(2, config.n_heads + 1) if divides(config, group, n)]
        raise UsageError(
            f"{config.n_heads} heads, {config.n_kv_heads} key/value heads and a feed-forward of width {config.ffn_dim}"
            f"{', which 4 bits keep in eights,' if group else ''} cannot be cut into {ranks} equal parts, but into "
            f"{' or '.join(fit) or 'none'}"
        )
    cut = partial(part, config, group, dist.get_rank(), ranks)
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.n_heads //= ranks
            module.n_kv_heads = -(-module.n_kv_heads // ranks)
        along, sections, unit = cuts(config).get(name.split(".")[-1], (None, (), 0))
        if along:
            for kind, t in [*module.named_parameters(), *module.named_buffers()]:
                t = cut(f"{name}.{kind}", t)
                setattr(module, kind, nn.Parameter(t, False) if kind in module._parameters else t)
            n = sum(span(size, unit, 0, ranks)[1] for size in sections)
            if along == OUT:
                module.n_out = n
            else:
                module.n_in, module.group = n, math.gcd(n, module.group)  # groups that no cut goes through
    return cut


def divides(config: ModelConfig, group: int | None, ranks: int) -> bool:
    """Whether every rank can have its part. The vocabulary need not divide; int4's eights stay together."""
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.ffn_dim
    return (
        heads % ranks == width % ranks == 0
        and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
        and config.vocab_size >= ranks
        and not (group and (heads // ranks * config.head_dim % 8 or width // ranks % 8))
    )


def join(model: Transformer):
    """The last step of making a model that shard has cut: puts what the ranks compute together."""
    model.stack, add_up = None, adder(model.tok_embeddings.weight)
    for layer in model.layers:
        layer.attention.wo = Joined(layer.attention.wo, add_up)
        if model.config.moe:
            layer.feed_forward.experts = JoinedExperts(layer.feed_forward.experts, add_up)
        else:
            layer.feed_forward.w2 = Joined(layer.feed_forward.w2, add_up)
    model.output = Joined(model.output, partial(gather, model.config.vocab_size))


class Joined(nn.Module):
    """A linear that every rank has a part of."""

    fast = None  # kernels.cpp must not fuse it with what is before it: every rank would add the residual

    def __init__(self, linear: Linear, put_together: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.put_together = linear, put_together

    def forward(self, x: Tensor, residual: Tensor | None = None, **how) -> Tensor:
        y = self.put_together(self.linear(x, **how))
        return y if residual is None else residual + y


class JoinedExperts(nn.Module):
    def __init__(self, experts: Experts, put_together: Callable[[Tensor], Tensor]):
        super().__init__()
        self.experts, self.put_together = experts, put_together

    def forward(self, x: Tensor, norm: nn.Module, share: Tensor, chosen: Tensor) -> Tensor:
        return x + self.put_together(self.experts.mixture(norm(x), share, chosen))


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def collective(name: str, x: Tensor, *how) -> Tensor:
    """One of PyTorch's functional collectives, which torch.compile takes into its graphs."""
    pending = getattr(torch.ops._c10d_functional, name)(x, *how, dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(pending)


def gather(n: int, x: Tensor) -> Tensor:
    """Every rank's x [..., X] side by side, the first n of them: [..., n]."""
    every = collective("all_gather_into_tensor", x.contiguous(), world_size())  # [ranks * ..., X]
    return every.unflatten(0, (world_size(), -1)).movedim(0, -2).flatten(-2)[..., :n]


def agree(t: Tensor) -> Tensor:
    """Rank 0's t, for all: what the ranks sample, each with its own random numbers, becomes the same."""
    return collective("broadcast", t, 0) if world_size() > 1 else t


def adder(like: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of x that returns the sum of all ranks' x, of the device and dtype of like."""
    one_shot = one_shot_adder(like.device, like.dtype) if all(everywhere(can_one_shot(like))) else None

    def add_up(x: Tensor) -> Tensor:
        if one_shot is not None and x.numel() * x.element_size() <= ONE_SHOT:
            return one_shot(x)
        return collective("all_reduce", x, "sum")

    return add_up


def can_one_shot(like: Tensor) -> bool:
    """Whether this rank's GPU reads the memory of all the others. The operation exists for these types, and with these
    numbers of ranks it adds in the same order on all of them."""
    ranks, cuda = world_size(), torch.cuda
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float32) or ranks not in (2, 4, 8):
        return False
    if os.environ["LOCAL_WORLD_SIZE"] != str(ranks):
        return False
    return all(cuda.can_device_access_peer(like.device, i) for i in range(ranks) if i != like.device.index)


@cache
def one_shot_adder(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """All-reduce in one kernel, over PyTorch's symmetric memory. It is made an operation of its own, with the buffer
    inside, so that graphs of the device are captured with the buffer where it is."""
    import torch.distributed._symmetric_memory as symmetric_memory

    name = dist.group.WORLD.group_name
    buffer = symmetric_memory.empty(ONE_SHOT // dtype.itemsize, dtype=dtype, device=device)
    symmetric_memory.rendezvous(buffer, name)

    @torch.library.custom_op(f"gptfast::add_up_{str(dtype).split('.')[1]}", mutates_args=())
    def add_up(x: Tensor) -> Tensor:
        room = buffer[: x.numel()].view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x.contiguous(), "sum", name)

    add_up.register_fake(torch.empty_like)
    return add_up


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Makes this process one of those that torchrun started, for as long as the context lasts; does nothing in one that
    is alone. Rank 0 alone prints. It also prints the line with which a script exits that cannot go on; the others wait
    for that, since torchrun ends all when one has ended. Ctrl-C ends a rank at once."""
    needed = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}  # a cluster may set some of them
    if not needed <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    if torch.accelerator.is_available() and local < torch.accelerator.device_count():
        torch.accelerator.set_device_index(local)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    dist.init_process_group(timeout=TIMEOUT)
    store, first, errors = dist.distributed_c10d._get_default_store(), dist.get_rank() == 0, io.StringIO()
    if first:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends all
    try:
        with contextlib.ExitStack() as quiet:
            if not first:
                quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
                quiet.enter_context(contextlib.redirect_stderr(errors))
            yield
    except SystemExit:
        try:
            store.set("told", "") if first else store.wait(["told"], timedelta(seconds=5))
        except dist.DistStoreError:  # rank 0 has no reason to exit
            print(errors.getvalue(), end="", file=sys.stderr)
        raise
    dist.destroy_process_group()


def lines(read: Callable[[], str | None]) -> Iterator[str]:
    """What read returns on rank 0, call by call until it is None, on every rank. However long that takes: this waits
    without a time-out, and without work."""
    for i in count():
        if world_size() == 1:
            line = read()
        else:
            store = dist.distributed_c10d._get_default_store()
            if dist.get_rank() == 0:
                store.set(f"line {i}", json.dumps(read()))
            store.wait([f"line {i}"], timedelta(days=1000))
            line = json.loads(store.get(f"line {i}"))
        if line is None:
            return
        yield line


def everywhere(value) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def own(path: Path) -> Path:
    """path, with the rank in its name if there are several."""
    return path if world_size() == 1 else path.with_stem(f"{path.stem}.rank{dist.get_rank()}")


@torch.inference_mode()
def communication_share(step: Callable[[], Tensor]) -> float:
    """Which part of a step's time this rank spends in collectives, waiting for the others included. By the profiler,
    which also sees them in compiled steps; on the CPU by the old one, which prints nothing."""
    device = step().device.type
    gpu = device != "cpu"
    with torch.autograd.profiler.profile(use_device=device if gpu else None, use_kineto=gpu) as profile:
        began = time.perf_counter()
        for _ in range(8):
            step().tolist()
        seconds = time.perf_counter() - began
    events = [e for e in profile.key_averages() if re.search("c10d|nccl|one_shot", e.key)]
    if gpu:
        spent = sum(e.self_device_time_total for e in events if e.device_type != torch.autograd.DeviceType.CPU)
    else:
        spent = sum(e.self_cpu_time_total for e in events)
    return spent / 1e6 / seconds

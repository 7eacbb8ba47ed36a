"""Tensor parallelism: one model on several devices or machines, with one process (rank) per device, by torchrun.

    torchrun --standalone --nproc_per_node=2 generate.py --checkpoint_path checkpoints/M/model.pth --prompt "Hello"

The layout is Megatron's (arXiv:1909.08053). Two weights that follow each other are cut so that one all-reduce joins the
ranks. Between them is a function f of single outputs or heads: the activation, or attention. On two ranks,

                                          [ W1a ]
    W2 f(W1 x)   =   [ W2a  W2b ]   f (   [     ] x )   =   W2a f(W1a x)   +   W2b f(W1b x)
                                          [ W1b ]
                                                            rank 0             rank 1

so rank 0 keeps the first outputs of W1 and the first inputs of W2, all ranks compute their terms at the same time, and
the all-reduce leaves the sum on each of them. In Megatron's words, W1 is column-parallel and W2 row-parallel (Megatron
stores W^T, so its columns are our rows: the outputs).

    column-parallel    qkv_proj, cut between heads; gate_up_proj, also of every expert
    row-parallel       o_proj, cut between heads; down_proj, also of every expert
    lm_head            column-parallel without a W2: an all-gather concatenates the logits
    whole              embedding, norms, routers, and the residual stream x

tp_plan returns this table. load_model (loading.py) calls shard_model before it reads tensors, so a rank reads only its
shard. It calls insert_collectives after the weights are packed.

Every rank runs the same code on the same tokens, with a few exceptions. All ranks sample a token, and take that of
rank 0 (layers/collectives.py: broadcast). Rank 0 alone converts a checkpoint, prints, and reads what the user types
(cli/ranks.py). It alone keeps the biases of o_proj and down_proj, because the all-reduce would add them up. If outputs
do not divide evenly, zeros pad those of the last ranks.

Only generate.py and eval.py connect the ranks (cli/ranks.py: process_group). With other scripts, every process of
torchrun would do all of the work.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from formats import WeightFormat
from kernels.capture import call_between_op_lists
from layers.collectives import all_gather, choose_all_reduce, world_size
from layers.linear import Linear, LinearBase, add, quantizable_linears
from model import Attention, Transformer
from utils.errors import UsageError

ShardFn = Callable[[str, Tensor], Tensor]  # (name, tensor of the checkpoint) -> this rank's shard of the tensor


@dataclass(frozen=True)
class ShardSpec:
    style: str  # "column": column-parallel, along the outputs; "row": row-parallel, along the inputs
    sizes: tuple[int, ...]  # the width of each matrix that one weight stacks (q, k and v); each is sharded by itself
    head_size: int = 1  # elements that stay on one rank: those of a head, or 1 without heads


def tp_plan(config: ModelConfig) -> dict[str, ShardSpec]:
    """Returns {last component of a linear layer's name: how the layer is sharded}. All other tensors stay whole.

    A q/k norm over all heads together needs all heads. With such a norm every rank computes all of attention, and only
    o_proj is sharded."""
    plan = {
        "o_proj": ShardSpec("row", (config.q_dim,), head_size=config.head_dim),
        "gate_up_proj": ShardSpec("column", config.gate_up_dims),
        "down_proj": ShardSpec("row", (config.ffn_dim,)),
        "lm_head": ShardSpec("column", (config.vocab_size,)),
    }
    if not config.qk_norm_across_heads:
        qkv_dims = (config.q_dim, config.kv_dim, config.kv_dim)
        plan["qkv_proj"] = ShardSpec("column", qkv_dims, head_size=config.head_dim)
    return plan


def shard_range(size: int, head_size: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """Returns (start, length) of a rank's shard of size elements, cut between heads of head_size elements.

    All ranks have the same length. If length * n_ranks exceeds size, the ranges of the last ranks reach beyond the end.
    With fewer heads than ranks, as is common for key/value heads, several ranks share a head."""
    n_heads = size // head_size
    if n_heads < n_ranks:
        return rank * n_heads // n_ranks * head_size, head_size
    length = math.ceil(n_heads / n_ranks) * head_size
    return rank * length, length


def check_can_shard(config: ModelConfig, format: WeightFormat, n_ranks: int):
    """Raises UsageError if n_ranks ranks cannot have equal shards. The message names possible numbers of ranks."""
    if can_shard(config, format, n_ranks):
        return
    possible = [str(n) for n in range(2, config.n_heads + 1) if can_shard(config, format, n)]
    alignment = format.shard_alignment
    kept_together = f", of which {format.name} keeps {alignment} together," if alignment > 1 else ""
    raise UsageError(
        f"{config.n_heads} heads, {config.n_kv_heads} key/value heads and a feed-forward of width {config.ffn_dim}"
        f"{kept_together} cannot be cut into {n_ranks} equal parts, but into {' or '.join(possible) or 'none'}"
    )


def can_shard(config: ModelConfig, format: WeightFormat, n_ranks: int) -> bool:
    """Whether n_ranks ranks can have equal shards. Ranks may share key/value heads. The vocabulary is padded, so it may
    have any size."""
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.ffn_dim
    if heads % n_ranks or width % n_ranks or config.vocab_size < n_ranks:
        return False
    if kv_heads % n_ranks and n_ranks % kv_heads:
        return False
    inputs_per_rank = heads // n_ranks * config.head_dim, width // n_ranks  # the inputs of o_proj and of down_proj
    return all(n % format.shard_alignment == 0 for n in inputs_per_rank)


def check_device(device: torch.device):
    """Raises UsageError unless device is the CPU or an accelerator that no other rank uses."""
    local_rank = int(os.environ["LOCAL_RANK"])
    n_devices = torch.accelerator.device_count()
    if device.type != "cpu" and (local_rank >= n_devices or device.index not in (None, local_rank)):
        raise UsageError(f"every process needs a device of its own, and here are {n_devices}; "
                         "start fewer, or give no number in --device")


def shard_model(model: Transformer, device: torch.device) -> ShardFn:
    """Shards a model on the meta device. Returns the function that shards the checkpoint's tensors.

    device: where the shard will be."""
    check_device(device)
    plan = tp_plan(model.config)
    linears = dict(quantizable_linears(model))
    n_ranks = world_size()
    coarsest = max((linear.format for linear in linears.values()), key=lambda format: format.shard_alignment)
    check_can_shard(model.config, coarsest, n_ranks)
    shard_tensor = build_shard_fn(model)
    for name, linear in linears.items():
        spec = plan.get(name.rpartition(".")[2])
        if spec is None:
            continue
        for tensor_name, tensor in linear.state_dict().items():
            linear.set_tensor(tensor_name, shard_tensor(f"{name}.{tensor_name}", tensor))
        n = sum(shard_range(size, spec.head_size, 0, n_ranks)[1] for size in spec.sizes)  # the same on every rank
        if spec.style == "row":
            linear.in_features, linear.format = n, linear.format.shard_format(n)
        else:
            linear.out_features = n
    for module in model.modules():
        if isinstance(module, Attention) and "qkv_proj" in plan:
            shard_attention(module, n_ranks)
    return shard_tensor


def build_shard_fn(model: Transformer) -> ShardFn:
    """model: not sharded yet."""
    plan = tp_plan(model.config)
    linears = dict(quantizable_linears(model))
    n_heads = model.config.n_heads
    formats = {name: linear.format for name, linear in linears.items()}  # shard_model changes linear.format

    def shard_tensor(name: str, tensor: Tensor) -> Tensor:
        """Returns this rank's shard as a copy, or tensor itself if it stays whole. Copying reads only the shard's pages
        of a memory-mapped file."""
        module_name, _, tensor_name = name.rpartition(".")
        if tensor_name == "sinks":
            start, length = shard_range(n_heads, 1, dist.get_rank(), world_size())
            return tensor[start : start + length].clone()
        spec = plan.get(module_name.rpartition(".")[2])
        if spec is None:
            return tensor
        if spec.style == "row":
            return shard_row_parallel(tensor, tensor_name, spec, formats[module_name])
        if tensor_name == "input_order":
            return tensor
        return shard_column_parallel(tensor, spec, dim=0 if linears[module_name].n_experts is None else 1)

    return shard_tensor


def shard_attention(attention: Attention, n_ranks: int):
    start, length = shard_range(attention.n_heads, 1, dist.get_rank(), n_ranks)
    attention.n_heads, attention.n_kv_heads = length, math.ceil(attention.n_kv_heads / n_ranks)
    for tensor in (attention.sinks, attention.alibi_slopes):  # a number for each head
        if tensor is not None:
            tensor.data = tensor.data[start : start + length]


def shard_row_parallel(tensor: Tensor, tensor_name: str, spec: ShardSpec, format: WeightFormat) -> Tensor:
    """Returns this rank's inputs of a tensor of a row-parallel layer.

    tensor_name: weight, scales, zeros, input_order or bias."""
    if tensor_name == "bias":  # the all-reduce sums the biases of all ranks, so only rank 0 keeps them
        return tensor.clone() if dist.get_rank() == 0 else torch.zeros_like(tensor)
    (size,) = spec.sizes
    start, length = shard_range(size, spec.head_size, dist.get_rank(), world_size())
    if tensor_name == "input_order":
        return tensor[start : start + length].clone()
    return format.shard_inputs(tensor_name, tensor, start, length)


def shard_column_parallel(tensor: Tensor, spec: ShardSpec, dim: int) -> Tensor:
    """Returns this rank's outputs along dim, of each matrix that tensor stacks. Zeros pad a range that reaches beyond
    the end of a matrix."""
    shards = []
    for size, matrix in zip(spec.sizes, tensor.split(spec.sizes, dim), strict=True):
        start, length = shard_range(size, spec.head_size, dist.get_rank(), world_size())
        available = max(0, min(length, size - start))
        shard = matrix.narrow(dim, min(start, size), available)
        pad_after_dim = (0, 0) * (tensor.dim() - 1 - dim)  # F.pad names the last dimension first
        shards.append(F.pad(shard, (*pad_after_dim, 0, length - available)))
    if tensor.is_meta:  # torch.cat of meta tensors imports PyTorch's compiler, which takes a second
        shape = [*tensor.shape]
        shape[dim] = sum(shard.shape[dim] for shard in shards)
        return tensor.new_empty(shape)
    return torch.cat(shards, dim)


def insert_collectives(model: Transformer):
    """Adds the collectives to a sharded model. Must be the last step of load_model, because it changes the names of
    tensors: o_proj.weight becomes o_proj.linear.weight."""
    reduce = choose_all_reduce(model.norm.weight)
    shards_attention = "qkv_proj" in tp_plan(model.config)
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        attention.o_proj = RowParallelLinear(attention.o_proj, reduce, input_is_parallel=shards_attention)
        feed_forward.down_proj = RowParallelLinear(feed_forward.down_proj, reduce, input_is_parallel=True)
    model.lm_head = ParallelLMHead(model.lm_head, model.config.vocab_size)


class RowParallelLinear(nn.Module):
    """A linear layer that is sharded along the inputs: o_proj or down_proj, also of experts. An all-reduce adds up the
    partial sums of all ranks. The residual comes after it, because otherwise every rank would add the residual.

    input_is_parallel: x is only this rank's shard, because the layer before is sharded, too. Otherwise x is full."""

    def __init__(self, linear: LinearBase, all_reduce: Callable[[Tensor], Tensor], input_is_parallel: bool):
        super().__init__()
        self.linear, self.all_reduce, self.input_is_parallel = linear, all_reduce, input_is_parallel
        self.backend = linear.backend

    def forward(self, x: Tensor, *, residual: Tensor | None = None, **kwargs) -> Tensor:
        y = self.all_reduce(self.linear(self.inputs_of_linear(x), **kwargs))
        return y if residual is None else add(residual, y, self.backend)

    def inputs_of_linear(self, x: Tensor) -> Tensor:
        """Returns this rank's shard of x, but with act-order the full x: input_order may select inputs of any rank."""
        needs_full = isinstance(self.linear, Linear) and self.linear.input_order is not None
        if self.input_is_parallel:
            return all_gather(x) if needs_full else x
        return x if needs_full else call_between_op_lists(self.shard, x)

    def shard(self, x: Tensor) -> Tensor:
        n = self.linear.in_features
        return x.narrow(-1, dist.get_rank() * n, n).contiguous()


class ParallelLMHead(nn.Module):
    """The output head, sharded along the vocabulary. An all-gather concatenates the logits of all ranks."""

    def __init__(self, linear: nn.Module, vocab_size: int):
        super().__init__()
        self.linear, self.vocab_size, self.backend = linear, vocab_size, linear.backend

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return all_gather(self.linear(x, **kwargs))[..., : self.vocab_size]  # without the padding of the last ranks

"""The kernels as PyTorch operations: for each, the schema, and a function that allocates the result (define).

C++ implements an operation as torch.ops.gptfast.NAME (kernels/csrc/), Triton as torch.ops.gptfast_triton.NAME. Both
implement the same schema, so a changed schema changes both. kernels/ops.py describes the operations.

Arguments that several schemas share:

    WEIGHT        a weight W [N, K], in the order of WeightArguments: the tensors as packed for the backend,
                  WeightFormat.format_id, n = N, and group_size, the number of inputs that share a scale
    ATTENTION     AttentionOptions, which ops.py passes by name
    activation    a value of ACTIVATION_IDS

LayerCache and PositionTables are tensors of attention that belong together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from config import ACTIVATIONS

CPU_ONLY = ("gptfast",)
NAMESPACES = (*CPU_ONLY, "gptfast_triton")
ACTIVATION_IDS = {None: 0} | {name: i for i, name in enumerate(ACTIVATIONS, 1)}  # csrc/simd.h: Activation
GATED_IDS = {ACTIVATION_IDS[name] for name, is_gated in ACTIVATIONS.items() if is_gated}
WEIGHT = "Tensor weight, Tensor? scales, Tensor? zeros, int format_id, int n, int group_size"
ATTENTION = (
    "int n_heads, float scale, int window, float softcap, Tensor? q_norm_weight, Tensor? k_norm_weight, float eps, "
    "Tensor? sinks"
)
SCHEMAS: dict[str, str] = {}  # name -> schema of each operation that a tape can hold


class WeightArguments(NamedTuple):
    """A weight as a kernel takes it, in the order of WEIGHT."""

    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    format_id: int
    n: int
    group_size: int


class AttentionOptions(NamedTuple):
    """The options of attention, by the names in ATTENTION. The default of an option means that
    attention leaves it out."""

    n_heads: int  # H, the heads of queries
    scale: float  # multiplies the scores
    window: int = 0  # how many tokens a token sees, including itself; 0 means all
    softcap: float = 0.0  # scores, after scale, become softcap * tanh(score / softcap)
    q_norm_weight: Tensor | None = None  # of norms before RoPE: [D] norms each head, [H D] all heads together
    k_norm_weight: Tensor | None = None  # [D] or [G D]
    eps: float = 0.0  # of both norms
    sinks: Tensor | None = None  # [H], the scores of one more key, whose value is zero

    def only_scales(self, alibi_slopes: Tensor | None) -> bool:
        """Whether scale and the mask are all that attention does to the scores, so that PyTorch's SDPA can compute it.
        Norms and RoPE come before the scores. Unpacking all options makes a new one fail here until it is named, since
        SDPA would ignore it silently."""
        _n_heads, _scale, _window, softcap, _q_norm_weight, _k_norm_weight, _eps, sinks = self
        return not softcap and sinks is None and alibi_slopes is None


class LayerCache(NamedTuple):
    """The keys and values of earlier tokens, in a layer."""

    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]


class PositionTables(NamedTuple):
    """How a layer's attention tells positions apart. Made once for all positions of a KV cache (model.py:
    build_position_tables)."""

    rope: Tensor  # [S or more, D/2, 2] float32: cos and sin of the angles of every position
    alibi_slopes: Tensor | None = None  # [H] float32: slope * (position of key - position of query) is added to scores


def define(schema: str, recordable: bool = True, namespaces: tuple[str, ...] = NAMESPACES) -> Callable:
    """Decorator: its function empty_NAME defines the operation NAME in each namespace. It takes the arguments of
    schema, and allocates the result: an empty tensor of the right shape and dtype. torch.compile calls it in place of
    the kernel, on tensors without data ("fake" in PyTorch's terms).

    recordable: whether a tape can hold the operation (record.py)."""

    def register(empty_result: Callable) -> Callable:
        name = empty_result.__name__.removeprefix("empty_")
        for namespace in namespaces:
            torch.library.define(f"{namespace}::{name}", schema)
            torch.library.register_fake(f"{namespace}::{name}", empty_result)
        if recordable:
            SCHEMAS[name] = schema
        return empty_result

    return register


def triton_op(function: Callable) -> Callable:
    """Decorator: makes function the implementation of torch.ops.gptfast_triton.NAME, where NAME is the function's name.
    Registers it for CPU tensors, too, since Triton's interpreter runs on these."""
    name = f"gptfast_triton::{function.__name__}"
    torch.library.impl(name, ("CUDA", "CPU"), function)
    return function


@define(
    f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor? norm_weight, float eps, Tensor? residual, int activation, "
    "float out_scale, float softcap, float clip, bool float32_out) -> Tensor"
)
def empty_fused_linear(
    x, weight, scales, zeros, format_id, n, group_size, bias, norm_weight, eps, residual, activation, out_scale,
    softcap, clip, float32_out,
):
    dtype = torch.float32 if float32_out else x.dtype
    return x.new_empty(*x.shape[:-1], n // 2 if activation in GATED_IDS else n, dtype=dtype)


@define("(Tensor x, int activation) -> Tensor", namespaces=CPU_ONLY)
def empty_activate(x, activation):
    n = x.shape[-1]
    return x.new_empty(*x.shape[:-1], n // 2 if activation in GATED_IDS else n)


@define("(Tensor x, Tensor y) -> Tensor", namespaces=CPU_ONLY)
def empty_add(x, y):
    return torch.empty_like(x)


@define("(Tensor x, Tensor weight, float eps, Tensor? residual) -> Tensor")
def empty_rms_norm(x, weight, eps, residual):
    return torch.empty_like(x)


@define("(Tensor x, Tensor input_order) -> Tensor")
def empty_permute_inputs(x, input_order):
    return x.new_empty(*x.shape[:-1], len(input_order))


@define(f"(Tensor tokens, {WEIGHT}, int k, ScalarType dtype, float scale) -> Tensor")
def empty_embed(tokens, weight, scales, zeros, format_id, n, group_size, k, dtype, scale):
    return weight.new_empty(*tokens.shape, k, dtype=dtype)


# Comes before attention in PyTorch, which no tape records.
@define(
    "(Tensor qkv, Tensor start_pos, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rope, int n_heads, "
    "Tensor? q_norm_weight, Tensor? k_norm_weight, float eps) -> Tensor",
    recordable=False, namespaces=CPU_ONLY,
)
def empty_rope_and_cache(qkv, start_pos, k_cache, v_cache, rope, n_heads, q_norm_weight, k_norm_weight, eps):
    return qkv.new_empty(*qkv.shape[:-1], n_heads, k_cache.shape[-1])


@define(
    "(Tensor qkv, Tensor start_pos, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rope, Tensor? alibi_slopes, "
    f"{ATTENTION}) -> Tensor"
)
def empty_attend(qkv, start_pos, k_cache, v_cache, rope, alibi_slopes, n_heads, *other_options):
    return qkv.new_empty(*qkv.shape[:-1], n_heads * k_cache.shape[-1])


@define("(Tensor logits, int top_k, bool norm_topk_prob, int n_shared_experts) -> (Tensor, Tensor)")
def empty_route(logits, top_k, norm_topk_prob, n_shared_experts):
    shape = (*logits.shape[:-1], top_k + n_shared_experts)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@define(
    f"(Tensor x, {WEIGHT}, Tensor? bias, Tensor topk_ids, Tensor? norm_weight, float eps, int activation) -> Tensor"
)
def empty_experts_gate_up(
    x, weight, scales, zeros, format_id, n, group_size, bias, topk_ids, norm_weight, eps, activation
):
    return x.new_empty(*topk_ids.shape, n // 2 if activation in GATED_IDS else n)


@define(f"(Tensor hidden, {WEIGHT}, Tensor? bias, Tensor topk_ids, Tensor topk_weights, Tensor? residual) -> Tensor")
def empty_experts_down(hidden, weight, scales, zeros, format_id, n, group_size, bias, topk_ids, topk_weights, residual):
    return hidden.new_empty(*topk_ids.shape[:-1], n)


# Comes before a matrix product in PyTorch, which no tape records.
@define(f"({WEIGHT}, int k, ScalarType dtype) -> Tensor", recordable=False)
def empty_dequantize(weight, scales, zeros, format_id, n, group_size, k, dtype):
    return weight.new_empty(n, k, dtype=dtype)


# Takes the logits that a tape computes, so it comes after the tape.
@define("(Tensor logits, Tensor? noise, float temperature) -> Tensor", recordable=False)
def empty_sample(logits, noise, temperature):
    return logits.new_empty(len(logits), dtype=torch.int64)

"""The operations that a model is made of, called leaf operations. layers.py and model.py call kernels.attend(...), ...

    fused_linear       a matrix product with what comes before and after it. Each step but the product is optional:
                       1. RMSNorm of x   2. x W^T   3. bias   4. activation   5. out_scale   6. softcap
                       7. clip   8. residual
    rms_norm           a norm that no matrix product follows, and the residual after the norm
    permute_inputs     puts x in the order of the columns of a weight
    activate, add      an activation or a residual that fused_linear cannot fuse
    embed              looks tokens up in the embedding
    attend             q/k norm, RoPE or ALiBi, cache write, attention over the cache
    route              the router's choice of experts
    experts_gate_up, experts_down      the matrix products with the weights of the chosen experts

A model computes everything by calling leaf operations, and a leaf operation calls no module: hence the name, after the
leaves of a call tree. So a step is a list of leaf operations, which can be recorded (record.py). These functions are no
leaf operations:

    rope_and_cache          the first half of attend, if PyTorch computes attention
    sample                  from logits to token ids, after the model
    has_attention_kernel    whether attend calls a kernel
    has_sample_kernel       whether sample can be called

Each function calls the kernel of a backend, or computes the same function in plain PyTorch (torch_ops.py). Rounding
differs: see below.

    backend     kernels                                                        most tokens of a step
    "cpu"       C++, kernels/csrc/                                             MAX_CPU_TOKENS
    "triton"    Triton, kernels/triton/, for NVIDIA's and AMD's GPUs           MAX_TRITON_TOKENS
    "torch"     none: plain PyTorch, for any device

The tokens of all sequences of a step count together. An operation with more tokens runs in plain PyTorch. On a CPU four
small operations have no limit (SPECIAL_MAX_KERNEL_TOKENS), nor has attend where its kernel is faster than PyTorch
(has_prefill_attention_kernel). A weight that is not quantized may have a lower limit (max_kernel_tokens). Without a C++
compiler, PyTorch multiplies int8 and int4 weights by its own kernels (aten.py).

How rounding differs, with activations of 16 bits:

    "torch"     A quantized weight is rounded to 16 bits before the product (but see aten.py), and the result of every
                step of an operation is rounded.
    kernels     Most results within an operation stay float32, and the last one is rounded. Exceptions:
    "cpu"       A product with Int8, Int4, GroupedInt8 or MXFP4 rounds x, after the norm, to int8, in groups of 8 with a
                scale each (csrc/activations.h: quantize_token). AMX, for many tokens, does not round x, but weights to
                bfloat16 (csrc/amx.h). A norm rounds x / rms(x) before its weight multiplies that, as PyTorch does.
    "triton"    A fused norm multiplies x with its weight, rounds that, and divides by rms(x) after the product
                (triton/linear.py: fused_linear_kernel). For many tokens the norm is a kernel of its own.

With activations of 32 bits only the order of sums, the place of the division by rms(x), and the last bits of functions
such as exp differ. scripts/kernel_checks/ has the bounds of the errors.

Two rules for all operations:

    backend        An operation with a weight takes the backend of its layer, as in layers.py. Any other operation takes
                   backend as its last argument.
    contiguous     Kernels read contiguous activations, so every operation calls contiguous on its activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import ACTIVATIONS
from kernels import build, torch_ops
from kernels.arguments import AttentionOptions, LayerCache
from kernels.schema import ACTIVATION_IDS, kernel_namespace

if TYPE_CHECKING:  # layers.py imports this file
    from layers import Embedding, Linear, RMSNorm

MAX_CPU_TOKENS = 64  # of all sequences together; also in csrc/weights.h
MAX_TRITON_TOKENS = 64
# A program of Triton's attention holds these in registers:
MAX_TRITON_NEW_TOKENS = 16  # the new tokens of a sequence
MAX_TRITON_QUERIES = 64  # the queries of a key/value head
# A kernel computes blocks of 16 outputs. A fused gated activation needs whole blocks of gate and whole blocks of up. So
# with any other out_features, activate is a call of its own.
FUSED_GLU_MULTIPLE = 32
# The most tokens of all sequences together for which the kernel of an operation is called, by backend, and the
# operations with limits of their own. 0 means that the backend has no kernel.
MAX_KERNEL_TOKENS = {"cpu": MAX_CPU_TOKENS, "triton": MAX_TRITON_TOKENS}
SPECIAL_MAX_KERNEL_TOKENS = {
    "embed": {"cpu": MAX_CPU_TOKENS, "triton": 0},  # for a table that is not quantized
    "rms_norm": {"cpu": math.inf, "triton": MAX_TRITON_TOKENS},
    "activate": {"cpu": math.inf, "triton": 0},
    "add": {"cpu": math.inf, "triton": 0},
    "rope_and_cache": {"cpu": math.inf, "triton": 0},
}


def kernel_for(name: str, backend: str, n_tokens: int, max_tokens: float | None = None) -> Callable | None:
    """Returns the kernel of backend for the operation called name, with n_tokens tokens. Returns None if plain PyTorch
    computes the operation: without a kernel, without tokens, or with more than max_tokens. The default of max_tokens is
    in the tables above."""
    if backend == "torch":
        return None
    if max_tokens is None:
        max_tokens = SPECIAL_MAX_KERNEL_TOKENS.get(name, MAX_KERNEL_TOKENS)[backend]
    return getattr(kernel_namespace(backend), name) if 0 < n_tokens <= max_tokens else None


def linear_kernel(name: str, linear: Linear, n_tokens: int) -> Callable | None:
    """kernel_for, with the backend and the most tokens of linear."""
    return kernel_for(name, linear.backend, n_tokens, linear.max_kernel_tokens)


def fused_linear(
    x: Tensor, linear: Linear, norm: RMSNorm | None = None, residual: Tensor | None = None,
    activation: str | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies x [..., K] with the weight of linear: [..., N], or [..., N / 2] with a gated activation.

    norm: applied to x first.
    activation: if gated, W is a gate projection above an up projection, and the result is activation(gate) * up.
    Otherwise the result is activation(x W^T).
    residual: added last, after linear.out_scale, linear.softcap and linear.clip.
    out_dtype: None, which means x.dtype, or torch.float32."""
    kernel = linear_kernel("fused_linear", linear, count_tokens(x))
    if activation and (kernel is None or not can_fuse(activation, linear)):
        # activate after fused_linear comes too late if fused_linear applies out_scale, softcap or clip
        assert linear.out_scale == 1 and not linear.softcap and not linear.clip and out_dtype is None
        y = activate(fused_linear(x, linear, norm), activation, linear.backend)
        return y if residual is None else add(y, residual, linear.backend)
    if kernel is None:
        if norm is not None:
            x = rms_norm(x, norm)
        return torch_ops.fused_linear(x, linear, residual, out_dtype)
    norm_weight, eps = norm_arguments(norm)
    return kernel(
        contiguous(x),
        *linear.kernel_arguments(),  # weight, scales, zeros, format_id, n, group_size
        linear.bias, norm_weight, eps,
        residual=contiguous(residual),
        activation=ACTIVATION_IDS[activation],
        out_scale=linear.out_scale,
        softcap=linear.softcap,
        clip=linear.clip,
        float32_out=out_dtype == torch.float32,
    )


def can_fuse(activation: str, linear: Linear) -> bool:
    """Whether a kernel of linear can apply the activation."""
    is_gated = ACTIVATIONS[activation]
    return not is_gated or linear.out_features % FUSED_GLU_MULTIPLE == 0


def activate(x: Tensor, activation: str, backend: str) -> Tensor:
    """Applies an activation. If gated, x is gate and up [..., 2 F], and the result is activation(gate) * up [..., F].
    Otherwise it is activation(x), in the shape of x."""
    kernel = kernel_for("activate", backend, count_tokens(x))
    if kernel is None:
        return torch_ops.activate(x, activation)
    return kernel(contiguous(x), ACTIVATION_IDS[activation])


def add(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """x + y, of the same shape."""
    kernel = kernel_for("add", backend, count_tokens(x))
    if kernel is None:
        return x + y
    return kernel(contiguous(x), contiguous(y))


def rms_norm(x: Tensor, norm: RMSNorm, residual: Tensor | None = None) -> Tensor:
    """[residual +] x / rms(x) * weight, over the last dimension of x [..., dim]."""
    kernel = kernel_for("rms_norm", norm.backend, count_tokens(x))
    if kernel is None:
        return torch_ops.rms_norm(x, norm.weight, norm.eps, residual)
    return kernel(contiguous(x), norm.weight, norm.eps, contiguous(residual))


def permute_inputs(x: Tensor, input_order: Tensor, backend: str) -> Tensor:
    """x[..., input_order] for x [..., K] and input_order int32 [N]: [..., N]. N may be less than K: a tensor-parallel
    rank takes only the inputs of its own columns."""
    kernel = kernel_for("permute_inputs", backend, count_tokens(x))
    if kernel is None:
        return torch_ops.permute_inputs(x, input_order)
    return kernel(contiguous(x), input_order)


def embed(tokens: Tensor, table: Embedding, scale: float, dtype: torch.dtype) -> Tensor:
    """Looks up the rows of tokens [B, T] in table [V, dim], and multiplies them with scale: [B, T, dim] in dtype."""
    kernel = kernel_for("embed", table.backend, tokens.numel())
    if table.format.is_quantized and table.backend != "torch":  # only the kernel can read a packed table
        kernel = kernel_namespace(table.backend).embed
    if kernel is None:
        return torch_ops.embed(tokens, table, scale, dtype)
    return kernel(contiguous(tokens), *table.kernel_arguments(), table.in_features, dtype, scale)


def attend(qkv: Tensor, options: AttentionOptions, cache: LayerCache, start_pos: Tensor, backend: str) -> Tensor:
    """Causal attention of the T new tokens of each sequence: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. Writes the new
    keys and values to cache, the first at start_pos [B]."""
    B, T, _ = qkv.shape
    has_kernel = has_attention_kernel(backend, B, T, options.n_heads // cache.k.shape[1])
    if not has_kernel and not has_prefill_attention_kernel(backend, B, T, qkv.dtype):
        positions = start_pos[:, None] + torch.arange(T, device=qkv.device)  # [B, T]
        q = rope_and_cache(qkv, options, cache, positions, backend)
        return torch_ops.cached_attention(q, options, cache, positions)
    return kernel_namespace(backend).attend(
        contiguous(qkv), contiguous(start_pos),
        k_cache=cache.k, v_cache=cache.v, rope=cache.rope, alibi_slopes=cache.alibi_slopes,
        **options._asdict(),  # n_heads, scale, window, ..., as in schema.py: ATTENTION
    )


def rope_and_cache(
    qkv: Tensor, options: AttentionOptions, cache: LayerCache, positions: Tensor, backend: str
) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values into the cache at positions [B, T], which are
    contiguous in each sequence. Returns the queries [B, T, H, D]."""
    kernel = kernel_for("rope_and_cache", backend, count_tokens(qkv))
    if kernel is None:
        return torch_ops.rope_and_cache(qkv, options, cache, positions)
    return kernel(
        contiguous(qkv), contiguous(positions[:, 0]), k_cache=cache.k, v_cache=cache.v, rope=cache.rope,
        n_heads=options.n_heads, q_norm_weight=options.q_norm_weight, k_norm_weight=options.k_norm_weight,
        eps=options.eps,
    )


def has_attention_kernel(backend: str, batch: int, n_new_tokens: int, heads_per_kv_head: int) -> bool:
    """Whether attend calls a kernel of backend for n_new_tokens tokens in each of batch sequences."""
    if kernel_for("attend", backend, batch * n_new_tokens) is None:
        return False
    n_queries = n_new_tokens * heads_per_kv_head
    return backend == "cpu" or n_new_tokens <= MAX_TRITON_NEW_TOKENS and n_queries <= MAX_TRITON_QUERIES


def has_prefill_attention_kernel(backend: str, batch: int, n_new_tokens: int, dtype: torch.dtype) -> bool:
    """Whether attend calls a kernel for more new tokens than a step can have (csrc/prefill_attention.h). Compiled steps
    do without, since torch.compile cannot trace a call of the library."""
    if backend != "cpu" or torch.compiler.is_compiling() or batch * n_new_tokens <= MAX_CPU_TOKENS:
        return False
    return bool(build.library().has_prefill_attention(dtype == torch.bfloat16))


def route(
    logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int, backend: str
) -> tuple[Tensor, Tensor]:
    """float32 logits [..., E] of the router -> (topk_weights, topk_ids), both [..., top_k]. The weights are softmax
    probabilities.

    norm_topk_prob: scales the weights to sum to one.
    n_shared_experts: every token also uses these experts, with ids from E on. Then logits are [..., E + 1], the weight
    of each shared expert is the sigmoid of the last logit, and the results are [..., top_k + n_shared_experts]."""
    kernel = kernel_for("route", backend, count_tokens(logits))
    if kernel is None:
        return torch_ops.route(logits, top_k, norm_topk_prob, n_shared_experts)
    return kernel(contiguous(logits), top_k, norm_topk_prob, n_shared_experts)


def experts_gate_up(
    x: Tensor, linear: Linear, topk_ids: Tensor, norm: RMSNorm | None = None, activation: str | None = None
) -> Tensor:
    """Multiplies every token with the gate and up projections of the token's experts: x [B, T, dim],
    topk_ids [B, T, top_k] -> [B, T, top_k, F]. norm and activation are as in fused_linear."""
    kernel = linear_kernel("experts_gate_up", linear, count_tokens(x))
    if activation and (kernel is None or not can_fuse(activation, linear)):
        return activate(experts_gate_up(x, linear, topk_ids, norm), activation, linear.backend)
    if kernel is None:
        if norm is not None:
            x = rms_norm(x, norm)
        return torch_ops.experts_gate_up(x, linear, topk_ids)
    norm_weight, eps = norm_arguments(norm)
    return kernel(
        contiguous(x), *linear.kernel_arguments(), linear.bias, contiguous(topk_ids), norm_weight, eps,
        activation=ACTIVATION_IDS[activation],
    )


def experts_down(
    hidden: Tensor, linear: Linear, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Multiplies hidden [B, T, top_k, F] with the down projections of the experts. Sums the results of the experts of
    each token, weighted with topk_weights [B, T, top_k]: [residual +] [B, T, dim]."""
    kernel = linear_kernel("experts_down", linear, count_tokens(topk_ids))
    if kernel is None:
        return torch_ops.experts_down(hidden, linear, topk_ids, topk_weights, residual)
    return kernel(
        contiguous(hidden), *linear.kernel_arguments(), linear.bias, contiguous(topk_ids), contiguous(topk_weights),
        contiguous(residual),
    )


def has_sample_kernel(backend: str, is_greedy: bool) -> bool:
    """Whether backend has a kernel that samples. The CPU kernel only finds the likeliest token."""
    return backend == "triton" or backend == "cpu" and is_greedy


def sample(logits: Tensor, temperature: float, backend: str) -> Tensor:
    """Draws a token [B] for every row of float32 logits [B, V], with probabilities softmax(logits / temperature). At
    temperature 0, the only one of backend "cpu", it is the likeliest token. A row with a logit that is not finite gives
    -1. engine/sampling.py does the same in PyTorch."""
    logits, noise = contiguous(logits), None
    if temperature > 0:
        noise = torch.empty_like(logits, dtype=torch.float64).exponential_()
    return kernel_namespace(backend).sample(logits, noise, temperature)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x, copied if it is not contiguous."""
    return None if x is None else x.contiguous()


def count_tokens(x: Tensor) -> int:
    """The number of tokens in x [..., width], of all sequences together."""
    return x.numel() // x.shape[-1]


def norm_arguments(norm: RMSNorm | None) -> tuple[Tensor | None, float]:
    """(norm_weight, eps), as kernels take them."""
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)

"""The operations that a model is made of. Each calls the kernel of its backend, or does the same in plain PyTorch.

    fused_linear       a matrix product with what comes before and after it, of which each is optional:
                       1. RMSNorm of x   2. x W^T   3. bias   4. activation(gate) * up   5. out_scale   6. softcap
                       7. clip   8. residual
    rms_norm           a norm that no matrix product follows, and the residual after it
    permute_inputs      puts a product's inputs in the order of its weight's columns
    glu, add           an activation or a residual that fused_linear cannot fuse
    embed              looks tokens up in the embedding
    attend             q/k norm, RoPE or ALiBi, cache write, attention over the cache
    route              a router's choice of experts
    experts_gate_up, experts_down      the matrix products with the chosen experts' weights

They are called leaf operations, after the leaves of a call tree: a model calls them to compute anything, and they call
no module. So a step is a list of them, which can be recorded (record.py). Not among them are:

    rope_and_cache          what comes before attention, where PyTorch computes attention itself
    sample                  from logits to token ids, after the model
    has_attention_kernel    whether attend calls a kernel
    has_sample_kernel       whether sample can be called

A backend is "cpu" (C++, kernels/csrc/), "triton" (NVIDIA and AMD GPUs) or "torch" (any device, kernels/reference.py).
Kernels are made for steps of few tokens, of all sequences together: up to MAX_CPU_TOKENS on a CPU, MAX_TRITON_TOKENS on
a GPU. A step with more tokens runs in plain PyTorch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import reference
from kernels.params import AttentionParams, LayerCache, LinearParams, NormParams, WeightMatrix
from kernels.schema import ACTIVATION_IDS, kernel_namespace

MAX_CPU_TOKENS = 64  # that the CPU kernels take; also in csrc/weights.h
MAX_TRITON_TOKENS = 64  # that the Triton kernels take
MAX_TRITON_NEW_TOKENS = 16  # of a sequence, which one program of attention holds in registers
MAX_TRITON_QUERIES = 64  # of a key/value head, likewise
# Kernels compute 16 outputs at a time. To fuse an activation, the gate's and the up projection's outputs, each half of
# out_features, must both be a multiple of 16. Otherwise glu() is a call of its own.
FUSED_GLU_MULTIPLE = 32
# The most tokens of a call, of all sequences together, by backend. SPECIAL_MAX_TOKENS has the exceptions; 0 means that
# the backend lacks the kernel.
MAX_TOKENS = {"cpu": MAX_CPU_TOKENS, "triton": MAX_TRITON_TOKENS}
SPECIAL_MAX_TOKENS = {
    "embed": {"cpu": MAX_CPU_TOKENS, "triton": 0},  # of a table that is not quantized
    "rms_norm": {"cpu": math.inf, "triton": MAX_TRITON_TOKENS},
    "glu": {"cpu": math.inf, "triton": 0},
    "add": {"cpu": math.inf, "triton": 0},
    "rope_and_cache": {"cpu": math.inf, "triton": 0},
}


def kernel_for(name: str, backend: str, n_tokens: int, max_tokens: float | None = None) -> Callable | None:
    """The kernel of backend for the operation called name, on n_tokens tokens of all sequences together. None: plain
    PyTorch computes it, since there is no such kernel, or no token, or more than max_tokens (by default those of the
    tables above)."""
    if backend == "torch":
        return None
    if max_tokens is None:
        max_tokens = SPECIAL_MAX_TOKENS.get(name, MAX_TOKENS)[backend]
    return getattr(kernel_namespace(backend), name) if 0 < n_tokens <= max_tokens else None


def linear_kernel(name: str, linear: LinearParams, n_tokens: int) -> Callable | None:
    """kernel_for linear. None also if PyTorch is faster with so many tokens."""
    return kernel_for(name, linear.backend, n_tokens, linear.max_kernel_tokens)


def fused_linear(
    x: Tensor, linear: LinearParams, norm: NormParams | None = None, residual: Tensor | None = None,
    activation: str | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] -> [..., N], by linear.

    norm: is applied to x first.
    activation: W holds a gate projection and, below it, an up projection; the result is activation(gate) * up,
    [..., N / 2].
    residual: added last, after linear.out_scale, linear.softcap and linear.clip.
    out_dtype: x.dtype (None) or torch.float32."""
    kernel = linear_kernel("fused_linear", linear, count_tokens(x))
    if activation and (kernel is None or linear.out_features % FUSED_GLU_MULTIPLE):
        # Here the activation comes after out_scale, softcap and clip, so there must be none of these.
        assert linear.out_scale == 1 and not linear.softcap and not linear.clip and out_dtype is None
        y = glu(fused_linear(x, linear, norm), activation, linear.backend)
        return y if residual is None else add(y, residual, linear.backend)
    if kernel is None:
        if norm is not None:
            x = rms_norm(x, norm)
        return reference.fused_linear(x, linear, residual, out_dtype)
    norm_weight, eps = norm_arguments(norm)
    return kernel(
        x.contiguous(), *linear.kernel_arguments(), linear.bias, norm_weight, eps,
        residual=None if residual is None else residual.contiguous(),
        activation=ACTIVATION_IDS[activation],
        out_scale=linear.out_scale,
        softcap=linear.softcap,
        clip=linear.clip,
        float32_out=out_dtype == torch.float32,
    )  # fmt: skip


def glu(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    """[..., 2 F] -> [..., F]: activation(gate) * up."""
    kernel = kernel_for("glu", backend, count_tokens(gate_up))
    if kernel is None:
        return reference.glu(gate_up, activation)
    return kernel(gate_up, ACTIVATION_IDS[activation])


def add(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """x + y, of the same shape."""
    kernel = kernel_for("add", backend, count_tokens(x))
    if kernel is None:
        return x + y
    return kernel(x.contiguous(), y.contiguous())


def rms_norm(x: Tensor, norm: NormParams, residual: Tensor | None = None) -> Tensor:
    """[residual +] x / rms(x) * weight over the last dimension."""
    kernel = kernel_for("rms_norm", norm.backend, count_tokens(x))
    if kernel is None:
        return reference.rms_norm(x, norm, residual)
    return kernel(x.contiguous(), norm.weight, norm.eps, None if residual is None else residual.contiguous())


def permute_inputs(x: Tensor, input_order: Tensor, backend: str) -> Tensor:
    """x [..., K] -> [..., len(input_order)]: element i is element input_order[i] of x. input_order is int32."""
    kernel = kernel_for("permute_inputs", backend, count_tokens(x))
    if kernel is None:
        return reference.permute_inputs(x, input_order)
    return kernel(x.contiguous(), input_order)


def embed(tokens: Tensor, table: WeightMatrix, scale: float, dtype: torch.dtype) -> Tensor:
    """tokens [B, T] -> their rows of table [V, dim], times scale: [B, T, dim] in dtype."""
    kernel = kernel_for("embed", table.backend, tokens.numel())
    if table.format.is_quantized and table.backend != "torch":  # only the kernel can read what is packed for it
        kernel = kernel_namespace(table.backend).embed
    if kernel is None:
        return reference.embed(tokens, table, scale, dtype)
    return kernel(tokens.contiguous(), *table.kernel_arguments(), table.in_features, dtype, scale)


def attend(qkv: Tensor, params: AttentionParams, cache: LayerCache, start_pos: Tensor, backend: str) -> Tensor:
    """Causal attention of each sequence's T new tokens: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. The new keys and values
    are written to cache, the first at start_pos [B]."""
    B, T, _ = qkv.shape
    if not has_attention_kernel(backend, B, T, params.n_heads // cache.k.shape[1]):
        positions = start_pos[:, None] + torch.arange(T, device=qkv.device)  # [B, T]
        q = rope_and_cache(qkv, params, cache, positions, backend)
        return reference.cached_attention(q, params, cache, positions)
    return kernel_namespace(backend).attend(qkv, start_pos, *cache, *params.kernel_arguments())


def rope_and_cache(qkv: Tensor, params: AttentionParams, cache: LayerCache, positions: Tensor, backend: str) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values into the cache at positions [B, T], which follow
    each other. Returns the queries [B, T, H, D]."""
    kernel = kernel_for("rope_and_cache", backend, count_tokens(qkv))
    if kernel is None:
        return reference.rope_and_cache(qkv, params, cache, positions)
    arguments = params.kernel_arguments()
    start_pos = positions[:, 0].contiguous()
    return kernel(
        qkv.contiguous(), start_pos, cache.k, cache.v, cache.rope, arguments.n_heads, arguments.q_norm_weight,
        arguments.k_norm_weight, arguments.eps,
    )  # fmt: skip


def has_attention_kernel(backend: str, batch: int, n_new: int, heads_per_kv_head: int) -> bool:
    """Whether backend has a kernel for n_new new tokens in each of batch sequences."""
    if kernel_for("attend", backend, batch * n_new) is None:
        return False
    return backend == "cpu" or n_new <= MAX_TRITON_NEW_TOKENS and n_new * heads_per_kv_head <= MAX_TRITON_QUERIES


def route(
    logits: Tensor, top_k: int, norm_topk_prob: bool, backend: str, n_shared_experts: int = 0
) -> tuple[Tensor, Tensor]:
    """router logits [..., E], float32 -> the top_k experts' (softmax weights, ids), both [..., top_k].
    norm_topk_prob: scale the weights so that they sum to one.

    n_shared_experts: so many more experts, E and following, are used by every token. Then logits are [..., E + 1]. The
    sigmoid of the last one is the weight of each of them, and the results are [..., top_k + n_shared_experts]."""
    kernel = kernel_for("route", backend, count_tokens(logits))
    if kernel is None:
        return reference.route(logits, top_k, norm_topk_prob, n_shared_experts)
    return kernel(logits, top_k, norm_topk_prob, n_shared_experts)


def experts_gate_up(
    x: Tensor, linear: LinearParams, topk_ids: Tensor, norm: NormParams | None = None, activation: str | None = None
) -> Tensor:
    """Every token times the gate and up projections of each of its experts: x [B, T, dim], topk_ids [B, T, top_k] ->
    [B, T, top_k, F]. norm and activation are as in fused_linear."""
    kernel = linear_kernel("experts_gate_up", linear, count_tokens(x))
    if activation and (kernel is None or linear.out_features % FUSED_GLU_MULTIPLE):
        return glu(experts_gate_up(x, linear, topk_ids, norm), activation, linear.backend)
    if kernel is None:
        if norm is not None:
            x = rms_norm(x, norm)
        return reference.experts_gate_up(x, linear, topk_ids)
    norm_weight, eps = norm_arguments(norm)
    return kernel(
        x.contiguous(), *linear.kernel_arguments(), linear.bias, topk_ids, norm_weight, eps,
        activation=ACTIVATION_IDS[activation],
    )  # fmt: skip


def experts_down(
    hidden: Tensor, linear: LinearParams, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Each expert's hidden vector times its down projection, summed over a token's experts with topk_weights
    [B, T, top_k], plus residual: hidden [B, T, top_k, F] -> [B, T, dim]."""
    kernel = linear_kernel("experts_down", linear, count_tokens(topk_ids))
    if kernel is None:
        return reference.experts_down(hidden, linear, topk_ids, topk_weights, residual)
    return kernel(hidden, *linear.kernel_arguments(), linear.bias, topk_ids, topk_weights, residual)


def has_sample_kernel(backend: str, is_greedy: bool) -> bool:
    """Whether backend has a kernel that samples. A CPU's finds the likeliest token alone."""
    return backend == "triton" or backend == "cpu" and is_greedy


def sample(logits: Tensor, temperature: float, backend: str) -> Tensor:
    """A token [B] for every row of float32 logits [B, V], drawn with probabilities softmax(logits / temperature), at
    temperature 0 the likeliest; -1 for a row that is not finite. Backend "cpu" has temperature 0 only;
    engine/sampling.py does the same in PyTorch."""
    if backend == "cpu":
        return torch.ops.gptfast.sample(logits.contiguous(), None, temperature)
    noise = None
    if temperature > 0:
        noise = torch.empty_like(logits, dtype=torch.float64).exponential_()
    return torch.ops.gptfast_triton.sample(logits.contiguous(), noise, temperature)


def count_tokens(x: Tensor) -> int:
    """The number of tokens in x [..., width]."""
    return x.numel() // x.shape[-1]


def norm_arguments(norm: NormParams | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)

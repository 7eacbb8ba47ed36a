"""The operations that a model is made of. Layers compute by nothing else, so one forward serves every device, and a CPU
can capture a step as lists of operations (kernels/capture.py).

    fused_linear       a matmul with what comes before and after it. Each step but the matmul is optional:
                       1. RMSNorm of x   2. x W^T   3. bias   4. activation   5. the rest of Epilogue   6. residual
    rms_norm           a norm that no matmul follows, and the residual after the norm
    permute_inputs     puts x in the order of the columns of a weight
    activate, add      an activation or a residual that fused_linear cannot fuse
    embed              looks tokens up in the embedding
    attend             q/k norm, RoPE or ALiBi, cache write, attention over the cache
    rope_and_cache     the part of attend before PyTorch's attention: q/k norm, RoPE, cache write
    route              the router's choice of experts
    experts_gate_up, experts_down      the matmuls with the weights of the chosen experts
    sample             the next token, drawn or the likeliest

An operation asks a backend for a kernel: the backend of its layer, or the argument backend. Without a kernel the
operation calls torch_ops.py. backend.py lists the backends, their limits, and how their rounding differs.

A CUDA graph can hold all operations. Three operations are never captured on a CPU. sample runs after the captured step.
rope_and_cache and dequantize are called only where PyTorch does the attention or the matmul. That happens in prefill,
and prefill is not captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import is_gated
from kernels.arguments import ACTIVATION_IDS, AttentionParams, Epilogue, Filters, LayerCache, PositionTables
from ops import torch_ops
from ops.backend import Backend

if TYPE_CHECKING:  # layers.py imports this file
    from layers import ExpertsDown, ExpertsGateUp, Linear, LinearBase, RMSNorm, WeightMatrix

# Fused gating needs gate and up to be whole blocks of 16 outputs: out_features % 32 == 0.
FUSED_GLU_MULTIPLE = 32


def fused_linear(
    x: Tensor, linear: Linear, norm: RMSNorm | None = None, residual: Tensor | None = None,
    activation: str | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies x [..., K] with the weight of linear: [..., N], or [..., N / 2] with a gated activation.

    norm: applied to x first.
    activation: if gated, W is a gate projection above an up projection, and the result is activation(gate) * up.
    Otherwise the result is activation(x W^T).
    residual: added last, after linear.epilogue.
    out_dtype: None, which means x.dtype, or torch.float32."""
    kernel = linear.backend.kernel("fused_linear", count_tokens(x))
    if kernel is None or not supports_fused_activation(activation, linear):
        y = norm_and_matmul(x, linear, norm)
        y = activate(y, activation, linear.backend) if activation else y
        y = torch_ops.apply_epilogue(y, linear.epilogue, out_dtype)
        return y if residual is None else residual + y
    epilogue = linear.epilogue._replace(activation=ACTIVATION_IDS[activation])
    return kernel(
        contiguous(x), **linear.kernel_arguments(), bias=linear.bias, **norm_arguments(norm),
        residual=contiguous(residual), **epilogue._asdict(), float32_out=out_dtype == torch.float32,
    )


def norm_and_matmul(x: Tensor, linear: Linear, norm: RMSNorm | None) -> Tensor:
    """The steps of fused_linear before the activation."""
    kernel = linear.backend.kernel("fused_linear", count_tokens(x))
    if kernel is None:
        return torch_ops.matmul(x if norm is None else rms_norm(x, norm), linear)
    return kernel(
        contiguous(x), **linear.kernel_arguments(), bias=linear.bias, **norm_arguments(norm), residual=None,
        **Epilogue()._asdict(), float32_out=False,
    )


def supports_fused_activation(activation: str | None, linear: LinearBase) -> bool:
    """Whether a kernel of linear can apply the activation."""
    return not is_gated(activation) or linear.out_features % FUSED_GLU_MULTIPLE == 0


def activate(x: Tensor, activation: str, backend: Backend) -> Tensor:
    """Applies an activation after a matmul: needed without a kernel, or if the width is no multiple of
    FUSED_GLU_MULTIPLE. If gated, x is gate and up [..., 2 F], and the result is activation(gate) * up [..., F].
    Otherwise the result is activation(x), in the shape of x."""
    kernel = backend.kernel("activate", count_tokens(x))
    if kernel is None:
        return torch_ops.activate(x, activation)
    return kernel(contiguous(x), ACTIVATION_IDS[activation])


def add(x: Tensor, y: Tensor, backend: Backend) -> Tensor:
    """x + y, of the same shape. Needed for a residual that comes after an all-reduce (tp.py)."""
    kernel = backend.kernel("add", count_tokens(x))
    if kernel is None:
        return x + y
    return kernel(contiguous(x), contiguous(y))


def rms_norm(x: Tensor, norm: RMSNorm, residual: Tensor | None = None) -> Tensor:
    """[residual +] x / rms(x) * weight, over the last dimension of x [..., dim]."""
    kernel = norm.backend.kernel("rms_norm", count_tokens(x))
    if kernel is None:
        return torch_ops.rms_norm(x, norm.weight, norm.eps, residual)
    return kernel(contiguous(x), norm.weight, norm.eps, contiguous(residual))


def permute_inputs(x: Tensor, input_order: Tensor, backend: Backend) -> Tensor:
    """x[..., input_order] for x [..., K] and input_order int32 [N]: [..., N]. N may be less than K: a tensor-parallel
    rank takes only the inputs of its own columns."""
    kernel = backend.kernel("permute_inputs", count_tokens(x))
    if kernel is None:
        return torch_ops.permute_inputs(x, input_order)
    return kernel(contiguous(x), input_order)


def embed(tokens: Tensor, table: WeightMatrix, scale: float, dtype: torch.dtype) -> Tensor:
    """Looks up the rows of tokens [B, T] in table [V, dim], and multiplies them with scale: [B, T, dim] in dtype."""
    if table.is_packed:
        kernel = table.backend.required_kernel("embed")
    else:
        kernel = table.backend.kernel("embed", tokens.numel())
    if kernel is None:
        return torch_ops.embed(tokens, table, scale, dtype)
    return kernel(contiguous(tokens), **table.kernel_arguments(), k=table.in_features, dtype=dtype, scale=scale)


def attend(
    qkv: Tensor, params: AttentionParams, cache: LayerCache, tables: PositionTables, start_pos: Tensor,
    backend: Backend,
) -> Tensor:
    """Causal attention of the T new tokens of each sequence: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. Writes the new
    keys and values to cache, the first at start_pos [B]."""
    B, T, _ = qkv.shape
    kernel = backend.kernel("attend", B * T, n_new_tokens=T, heads_per_kv_head=params.n_heads // cache.k.shape[1])
    if kernel is None:
        positions = start_pos[:, None] + torch.arange(T, device=qkv.device)  # [B, T]
        q = rope_and_cache(qkv, params, cache, tables.cos_sin, positions, backend)
        return torch_ops.cached_attention(q, params, cache, tables.alibi_slopes, positions)
    return kernel(
        contiguous(qkv), contiguous(start_pos), cache.k, cache.v,
        cos_sin=tables.cos_sin, alibi_slopes=tables.alibi_slopes, **params._asdict(),
    )


def rope_and_cache(
    qkv: Tensor, params: AttentionParams, cache: LayerCache, cos_sin: Tensor, positions: Tensor, backend: Backend
) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values into the cache at positions [B, T], which are
    contiguous in each sequence. cos_sin: PositionTables.cos_sin. Returns the queries [B, T, H, D]."""
    kernel = backend.kernel("rope_and_cache", count_tokens(qkv))
    if kernel is None:
        return torch_ops.rope_and_cache(qkv, params, cache, cos_sin, positions)
    return kernel(
        contiguous(qkv), contiguous(positions[:, 0]), cache.k, cache.v,
        cos_sin=cos_sin, n_heads=params.n_heads, q_norm_weight=params.q_norm_weight,
        k_norm_weight=params.k_norm_weight, eps=params.eps,
    )


def route(
    logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int, backend: Backend
) -> tuple[Tensor, Tensor]:
    """float32 logits [..., E] of the router -> (topk_weights, topk_ids), both [..., top_k]. The weights are softmax
    probabilities.

    norm_topk_prob: scales the weights to sum to one.
    n_shared_experts: every token also uses these experts, with ids from E on. Then logits are [..., E + 1], the weight
    of each shared expert is the sigmoid of the last logit, and the results are [..., top_k + n_shared_experts]."""
    kernel = backend.kernel("route", count_tokens(logits))
    if kernel is None:
        return torch_ops.route(logits, top_k, norm_topk_prob, n_shared_experts)
    return kernel(
        contiguous(logits), top_k=top_k, norm_topk_prob=norm_topk_prob, n_shared_experts=n_shared_experts
    )


def experts_gate_up(
    x: Tensor, linear: ExpertsGateUp, topk_ids: Tensor, norm: RMSNorm | None = None, activation: str | None = None
) -> Tensor:
    """Multiplies every token with the gate and up projections of the token's experts: x [B, T, dim],
    topk_ids [B, T, top_k] -> [B, T, top_k, F]. norm and activation are as in fused_linear."""
    kernel = linear.backend.kernel("experts_gate_up", count_tokens(x))
    if kernel is None:
        if norm is not None:
            x = rms_norm(x, norm)
        y = torch_ops.experts_gate_up(x, linear, topk_ids)
        return activate(y, activation, linear.backend) if activation else y
    fused_activation = activation if supports_fused_activation(activation, linear) else None
    y = kernel(
        contiguous(x), **linear.kernel_arguments(), bias=linear.bias, topk_ids=contiguous(topk_ids),
        **norm_arguments(norm), activation=ACTIVATION_IDS[fused_activation],
    )
    return y if fused_activation == activation else activate(y, activation, linear.backend)


def experts_down(
    hidden: Tensor, linear: ExpertsDown, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Multiplies hidden [B, T, top_k, F] with the down projections of the experts. Sums the results of the experts of
    each token, weighted with topk_weights [B, T, top_k]: [residual +] [B, T, dim]."""
    kernel = linear.backend.kernel("experts_down", count_tokens(topk_ids))
    if kernel is None:
        return torch_ops.experts_down(hidden, linear, topk_ids, topk_weights, residual)
    return kernel(
        contiguous(hidden), **linear.kernel_arguments(), bias=linear.bias, topk_ids=contiguous(topk_ids),
        topk_weights=contiguous(topk_weights), residual=contiguous(residual),
    )


def sample(
    logits: Tensor, temperature: float, filters: Filters, backend: Backend, uniform: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Tensor:
    """Draws a token for every sequence: float32 logits [B, V] -> token ids [B]. At temperature 0 the token is the
    likeliest one. The id is -1 for a sequence with a logit that is not finite.

    uniform: random numbers float64 [B, 1] in [0, 1), one for each sequence; None: PyTorch's generator makes them.
    temperatures: one for each sequence, float32 [B, 1] and positive, in place of temperature, which must not be 0."""
    if not backend.supports_sampling(filters):
        return torch_ops.sample(logits, temperature, filters, uniform, temperatures)
    if temperature == 0:
        uniform = None
    elif uniform is None:
        uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device)
    return backend.required_kernel("sample")(
        contiguous(logits), temperature=temperature, temperatures=contiguous(temperatures), top_k=filters.top_k,
        top_p=filters.top_p, min_p=filters.min_p, uniform=contiguous(uniform),
    )


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def count_tokens(x: Tensor) -> int:
    """The number of tokens in x [..., width], of all sequences together."""
    return x.numel() // x.shape[-1]


def norm_arguments(norm: RMSNorm | None) -> dict:
    """norm as kernels take it, by name."""
    return {"norm_weight": None, "eps": 0.0} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}

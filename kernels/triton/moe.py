"""A mixture of experts in a decode step on a GPU, in Triton: the router's choice, and the experts' matmuls.

    route              chooses the experts of each token: softmax and top_k of the router's logits
    experts_gate_up    multiplies every token with the gate and up projections of the token's experts
    experts_down       multiplies the results with the down projections, and sums them with the router's weights

They implement torch.ops.gptfast_triton.* (kernels/schema.py). Both matmuls are the kernel of linear.py, with topk_ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.schema import WeightArguments, empty_experts_down, empty_route, register_triton
from kernels.triton.launch import pdl_options, pdl_wait
from kernels.triton.linear import fused_linear


@triton.jit
def route_kernel(
    logits_ptr, topk_weights_ptr, topk_ids_ptr,
    E: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, N_SHARED: tl.constexpr, BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Chooses experts by logits [M, E], or [M, E + 1] if N_SHARED: topk_weights and topk_ids [M, TOP_K + N_SHARED].
    Grid: [M]. Program m has token m.

    First come the TOP_K likeliest experts, weighted with their probabilities. Then come N_SHARED shared experts, with
    ids from E on. The weight of each shared expert is the sigmoid of the token's last logit. BLOCK is a power of two,
    at least E + N_SHARED and TOP_K + N_SHARED."""
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    token, e = tl.program_id(0), tl.arange(0, BLOCK)
    logits_ptr += token * (E + 1 if N_SHARED else E)
    logits = tl.load(logits_ptr + e, mask=e < E, other=-float("inf"))
    p = tl.exp(logits - tl.max(logits, axis=0))
    remaining = tl.where(p == p, p, 0.0)  # without NaN: argmax cannot compare it
    topk_weights, topk_ids = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(remaining, axis=0)
        topk_weights = tl.where(e == i, tl.max(remaining, axis=0), topk_weights)
        topk_ids = tl.where(e == i, best, topk_ids)
        remaining = tl.where(e == best, -1.0, remaining)
    total = tl.sum(p, axis=0)
    if NORMALIZE:
        total = total * 0 + tl.sum(topk_weights, axis=0)  # total * 0 is NaN if a logit is NaN
    topk_weights /= total
    if N_SHARED:
        topk_weights = tl.where(e < TOP_K, topk_weights, tl.sigmoid(tl.load(logits_ptr + E)))
        topk_ids = tl.where(e < TOP_K, topk_ids, E + e - TOP_K)
    offsets, mask = token * (TOP_K + N_SHARED) + e, e < TOP_K + N_SHARED
    tl.store(topk_weights_ptr + offsets, topk_weights, mask=mask)
    tl.store(topk_ids_ptr + offsets, topk_ids.to(tl.int64), mask=mask)


@triton.jit
def moe_combine_kernel(
    y_ptr, topk_weights_ptr, residual_ptr, out_ptr, N,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Computes out [M, N] = [residual +] the sum over TOP_K of topk_weights [M, TOP_K] * y [M, TOP_K, N].
    Grid: [N / BLOCK, M]. Program (i, m) has outputs [i * BLOCK, (i + 1) * BLOCK) of token m."""
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    token, offs_n = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if residual_ptr is not None:
        total = tl.load(residual_ptr + token * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        topk_weight = tl.load(topk_weights_ptr + pair)
        total += topk_weight * tl.load(y_ptr + pair * N + offs_n, mask=offs_n < N, other=0.0)
    tl.store(out_ptr + token * N + offs_n, total, mask=offs_n < N)


@register_triton
def experts_gate_up(x: Tensor, **arguments) -> Tensor:
    """Multiplies x [..., dim] with the experts topk_ids [..., top_k] of W [E, n, dim]: [..., top_k, n or n / 2].
    bias is [E, n]. All arguments are as in fused_linear. An expert that several tokens have is read once."""
    return fused_linear(x, **arguments)


@register_triton
def experts_down(
    hidden: Tensor, *, w: WeightArguments, bias: Tensor | None, topk_ids: Tensor, topk_weights: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """Multiplies hidden [..., top_k, F] with the experts topk_ids [..., top_k] of W [E, n, F], and adds bias [E, n].
    Sums the results over top_k, weighted with topk_weights [..., top_k]: [residual +] [..., n]."""
    y = fused_linear(hidden, w=w, bias=bias, out_dtype=torch.float32, topk_ids=topk_ids)
    out = empty_experts_down(hidden, w=w, topk_ids=topk_ids)
    grid = triton.cdiv(w.n, 512), out.numel() // w.n
    moe_combine_kernel[grid](
        y, topk_weights, residual, out, N=w.n, TOP_K=topk_ids.shape[-1], BLOCK=512, **pdl_options(out.device, grid)
    )
    return out


@register_triton
def route(logits: Tensor, *, top_k: int, norm_topk_prob: bool, n_shared_experts: int) -> tuple[Tensor, Tensor]:
    """Returns (topk_weights, topk_ids) for float32 logits [..., E], or [..., E + 1] with shared experts. Both are
    [..., top_k + n_shared_experts]. norm_topk_prob: the weights of the top_k experts are scaled to sum to one."""
    topk_weights, topk_ids = empty_route(logits, top_k=top_k, n_shared_experts=n_shared_experts)
    n_logits = logits.shape[-1]
    grid = (logits.numel() // n_logits,)
    route_kernel[grid](
        logits, topk_weights, topk_ids, E=n_logits - 1 if n_shared_experts else n_logits, TOP_K=top_k,
        NORMALIZE=norm_topk_prob, N_SHARED=n_shared_experts,
        BLOCK=triton.next_power_of_2(max(n_logits, top_k + n_shared_experts)),
        **pdl_options(logits.device, grid),
    )
    return topk_weights, topk_ids

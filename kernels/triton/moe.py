"""A mixture of experts in a decode step on a GPU, in Triton: the routing, and products with the chosen experts.

    route              which experts a token uses: the router's softmax and its top_k
    experts_gate_up    every token times its experts' gate and up projections
    experts_down       the results times their down projections, summed with the router's weights

They are registered as torch.ops.gptfast_triton.*, which kernels/ops.py calls. kernels/reference.py says in plain
PyTorch what each computes. The products are those of linear.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import schema
from kernels.schema import triton_op
from kernels.triton.launch import overlap_options, wait_for_previous_kernel
from kernels.triton.linear import launch_fused_linear


@triton.jit
def route_kernel(
    logits_ptr, topk_weights_ptr, topk_ids_ptr,
    E: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, N_SHARED: tl.constexpr, BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):  # fmt: skip
    """Chooses experts by logits [M, E], or [M, E + 1] if N_SHARED: topk_weights and topk_ids [M, TOP_K + N_SHARED].
    Grid: [M]. Program m has token m.

    The results are the TOP_K likeliest experts, with their probabilities, and then N_SHARED shared experts, with the
    ids E and following. The weight of a shared expert is the sigmoid of the last logit of the token. BLOCK is a power
    of two that has room for all logits and all results."""
    wait_for_previous_kernel(USE_PDL, TRIGGER_EARLY)
    token, e = tl.program_id(0), tl.arange(0, BLOCK)
    logits_ptr += token * (E + 1 if N_SHARED else E)
    logits = tl.load(logits_ptr + e, mask=e < E, other=-float("inf"))
    p = tl.exp(logits - tl.max(logits, axis=0))
    remaining = tl.where(p == p, p, 0.0)  # without NaN, which has no order
    topk_weights, topk_ids = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(remaining, axis=0)
        topk_weights = tl.where(e == i, tl.max(remaining, axis=0), topk_weights)
        topk_ids = tl.where(e == i, best, topk_ids)
        remaining = tl.where(e == best, -1.0, remaining)
    total = tl.sum(p, axis=0)
    if NORMALIZE:
        total = total * 0 + tl.sum(topk_weights, axis=0)  # NaN all the same if a logit is
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
):  # fmt: skip
    """Computes out [M, N] = [residual +] the sum over TOP_K of topk_weights [M, TOP_K] times y [M, TOP_K, N].
    Grid: [N / BLOCK, M]. Program (i, m) has outputs [i * BLOCK, (i + 1) * BLOCK) of token m."""
    wait_for_previous_kernel(USE_PDL, TRIGGER_EARLY)
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


@triton_op
def experts_gate_up(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, format_id: int, n: int, group_size: int,
    bias: Tensor | None, topk_ids: Tensor, norm_weight: Tensor | None, eps: float, activation: int,
) -> Tensor:  # fmt: skip
    """Multiplies x [..., dim] with the experts topk_ids [..., top_k] of W [E, n, dim], with bias [E, n], and norm and
    activation as in fused_linear: [..., top_k, n or n / 2]. Tokens share what is read of an expert."""
    y = x.new_empty(*topk_ids.shape, n // 2 if activation else n)
    launch_fused_linear(
        y, x, weight, scales, format_id, n, group_size, bias, norm_weight, eps,
        activation=activation, topk_ids=topk_ids,
    )  # fmt: skip
    return y


@triton_op
def experts_down(
    hidden: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, format_id: int, n: int,
    group_size: int, bias: Tensor | None, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """Multiplies hidden [..., top_k, F] with the experts topk_ids [..., top_k] of W [E, n, F], plus bias [E, n], summed
    with topk_weights: [residual +] [..., n]."""
    y = hidden.new_empty(*topk_ids.shape, n, dtype=torch.float32)
    launch_fused_linear(y, hidden, weight, scales, format_id, n, group_size, bias, topk_ids=topk_ids)
    out = hidden.new_empty(*topk_ids.shape[:-1], n)
    grid = triton.cdiv(n, 512), out.numel() // n
    moe_combine_kernel[grid](
        y, topk_weights, residual, out, n, TOP_K=topk_ids.shape[-1], BLOCK=512, **overlap_options(out.device, grid)
    )
    return out


@triton_op
def route(logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int) -> tuple[Tensor, Tensor]:
    """Returns the top_k largest of float32 logits [..., E]: softmax weights, made to sum to one if norm_topk_prob, and
    indices, both [..., top_k]. With n_shared_experts shared experts, whose weight is the sigmoid of one more
    logit: [..., top_k + n_shared_experts]."""
    topk_weights, topk_ids = schema.route(logits, top_k, norm_topk_prob, n_shared_experts)
    n_logits = logits.shape[-1]
    grid = (logits.numel() // n_logits,)
    route_kernel[grid](
        logits, topk_weights, topk_ids, n_logits - 1 if n_shared_experts else n_logits, top_k, norm_topk_prob,
        n_shared_experts,
        BLOCK=triton.next_power_of_2(max(n_logits, top_k + n_shared_experts)),
        **overlap_options(logits.device, grid),
    )  # fmt: skip
    return topk_weights, topk_ids

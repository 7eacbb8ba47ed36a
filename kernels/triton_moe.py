"""A mixture of experts' part of a decode step on a GPU, in Triton: the routing, and products with the chosen experts.

    route              which experts a token uses: the router's softmax and its top_k
    experts_gate_up    every token times its experts' gate and up projections
    experts_down       the results times their down projections, summed with the router's weights

They are registered as torch.ops.gptfast_triton.*, which kernels/__init__.py calls. kernels/reference.py says in plain
PyTorch what each computes. The products are triton_linear's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import schema
from kernels.schema import implement_in_triton
from kernels.triton_launch import overlap_options
from kernels.triton_linear import launch_linear


@triton.jit
def route_kernel(
    logits_ptr, topk_weights_ptr, topk_ids_ptr,
    E: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The TOP_K likeliest of a row of logits [rows, E] and their probabilities; BLOCK >= E is a power of two."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        if AT_ONCE:
            tl.extra.cuda.gdc_launch_dependents()
    row, e = tl.program_id(0), tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * E + e, mask=e < E, other=-float("inf"))
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
    tl.store(topk_weights_ptr + row * TOP_K + e, topk_weights / total, mask=e < TOP_K)
    tl.store(topk_ids_ptr + row * TOP_K + e, topk_ids.to(tl.int64), mask=e < TOP_K)


@triton.jit
def moe_combine(
    y_ptr, topk_weights_ptr, residual_ptr, out_ptr, N,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out [rows, N] = [residual +] the sum over TOP_K of topk_weights [rows, TOP_K] times y [rows, TOP_K, N]."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        if AT_ONCE:
            tl.extra.cuda.gdc_launch_dependents()
    row, n = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if residual_ptr is not None:
        total = tl.load(residual_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    else:
        total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        weight = tl.load(topk_weights_ptr + row * TOP_K + i)
        total += weight * tl.load(y_ptr + (row * TOP_K + i) * N + n, mask=n < N, other=0.0)
    tl.store(out_ptr + row * N + n, total, mask=n < N)


@implement_in_triton
def experts_gate_up(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, kind: int, n: int, group_size: int,
    topk_ids: Tensor, norm: Tensor | None, eps: float, activation: int,
) -> Tensor:  # fmt: skip
    """x [..., dim] times the experts topk_ids [..., top_k] of W [E, n, dim], with norm and activation as in linear:
    [..., top_k, n or n / 2]. Tokens share what is read of an expert."""
    y = x.new_empty(*topk_ids.shape, n // 2 if activation else n)
    launch_linear(
        y, x, weight, scales, kind, n, group_size, norm=norm, eps=eps, activation=activation, topk_ids=topk_ids
    )
    return y


@implement_in_triton
def experts_down(
    hidden: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, kind: int, n: int, group_size: int,
    topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """hidden [..., top_k, F] times the experts topk_ids [..., top_k] of W [E, n, F], summed with topk_weights:
    [residual +] [..., n]."""
    y = hidden.new_empty(*topk_ids.shape, n, dtype=torch.float32)
    launch_linear(y, hidden, weight, scales, kind, n, group_size, topk_ids=topk_ids)
    out = hidden.new_empty(*topk_ids.shape[:-1], n)
    grid = triton.cdiv(n, 512), out.numel() // n
    moe_combine[grid](
        y, topk_weights, residual, out, n, TOP_K=topk_ids.shape[-1], BLOCK=512, **overlap_options(out.device, grid)
    )
    return out


@implement_in_triton
def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Of float32 logits [..., E] the top_k largest: their softmax weights, made to sum to one if normalize, and their
    indices, both [..., top_k]."""
    topk_weights, topk_ids = schema.route(logits, top_k, normalize)
    n_experts = logits.shape[-1]
    grid = (logits.numel() // n_experts,)
    route_kernel[grid](
        logits, topk_weights, topk_ids, n_experts, top_k, normalize,
        BLOCK=triton.next_power_of_2(n_experts),
        **overlap_options(logits.device, grid),
    )  # fmt: skip
    return topk_weights, topk_ids

"""A mixture of experts.

    route                              the router's choice of experts
    experts_gate_up, experts_down      the matmuls with the weights of the chosen experts

The file begins with the operations, each a kernel or plain PyTorch. The definitions in plain PyTorch, NAME_torch,
follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import ACTIVATION_IDS
from ops.backend import Backend, contiguous, count_tokens
from ops.linear import activate, norm_arguments, rms_norm, supports_fused_activation

if TYPE_CHECKING:  # layers.py imports ops/
    from layers import ExpertsDown, ExpertsGateUp, LinearBase, RMSNorm


def route(
    logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int, backend: Backend
) -> tuple[Tensor, Tensor]:
    """float32 logits [..., E] of the router -> (topk_weights, topk_ids), both [..., top_k]. The weights are softmax
    probabilities.

    norm_topk_prob: scales the weights to sum to one.
    n_shared_experts: every token also uses these experts, with ids from E on. Then logits are [..., E + 1], the weight
    of each shared expert is the sigmoid of the last logit, and the results are [..., top_k + n_shared_experts]."""
    kernel = backend.find_kernel("route", count_tokens(logits))
    if kernel is None:
        return route_torch(logits, top_k, norm_topk_prob, n_shared_experts)
    return kernel(
        contiguous(logits), top_k=top_k, norm_topk_prob=norm_topk_prob, n_shared_experts=n_shared_experts
    )


def experts_gate_up(
    x: Tensor, linear: ExpertsGateUp, topk_ids: Tensor, norm: RMSNorm | None = None, activation: str | None = None
) -> Tensor:
    """Multiplies every token with the gate and up projections of the token's experts: x [B, T, dim],
    topk_ids [B, T, top_k] -> [B, T, top_k, F]. norm and activation are as in fused_linear."""
    kernel = linear.backend.find_kernel("experts_gate_up", count_tokens(x))
    if kernel is None:
        y = experts_gate_up_torch(x if norm is None else rms_norm(x, norm), linear, topk_ids)
    else:
        fuses_activation = supports_fused_activation(activation, linear)
        y = kernel(
            contiguous(x), **linear.kernel_arguments(), bias=linear.bias, topk_ids=contiguous(topk_ids),
            **norm_arguments(norm), activation=ACTIVATION_IDS[activation if fuses_activation else None],
        )
        if fuses_activation:
            return y
    return y if activation is None else activate(y, activation, linear.backend)


def experts_down(
    hidden: Tensor, linear: ExpertsDown, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Multiplies hidden [B, T, top_k, F] with the down projections of the experts. Sums the results of the experts of
    each token, weighted with topk_weights [B, T, top_k]: [residual +] [B, T, dim]."""
    kernel = linear.backend.find_kernel("experts_down", count_tokens(topk_ids))
    if kernel is None:
        return experts_down_torch(hidden, linear, topk_ids, topk_weights, residual)
    return kernel(
        contiguous(hidden), **linear.kernel_arguments(), bias=linear.bias, topk_ids=contiguous(topk_ids),
        topk_weights=contiguous(topk_weights), residual=contiguous(residual),
    )


# ---- The definition in plain PyTorch --------------------------------------------------------------------------------


def route_torch(logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    n_experts = logits.shape[-1] - (1 if n_shared_experts else 0)
    topk_weights, topk_ids = F.softmax(logits[..., :n_experts], dim=-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    if n_shared_experts:
        shared_ids = torch.arange(n_experts, n_experts + n_shared_experts, device=logits.device)
        shared_ids = shared_ids.expand(*topk_ids.shape[:-1], n_shared_experts)
        shared_weights = logits[..., n_experts:].sigmoid().expand(*topk_ids.shape[:-1], n_shared_experts)
        topk_ids, topk_weights = torch.cat([topk_ids, shared_ids], -1), torch.cat([topk_weights, shared_weights], -1)
    return topk_weights, topk_ids


def experts_gate_up_torch(x: Tensor, linear: ExpertsGateUp, topk_ids: Tensor) -> Tensor:
    """experts_gate_up without norm and activation, which are calls of their own."""
    repeated = x[..., None, :].expand(*topk_ids.shape, x.shape[-1])  # [B, T, top_k, dim]
    y = expert_matmuls(repeated.reshape(-1, x.shape[-1]), linear, topk_ids.flatten(), query_len=x.shape[-2])
    return y.view(*topk_ids.shape, linear.out_features)


def experts_down_torch(
    hidden: Tensor, linear: ExpertsDown, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    y = expert_matmuls(hidden.flatten(0, -2), linear, topk_ids.flatten(), query_len=hidden.shape[-3])
    y = y.view(*topk_ids.shape, linear.out_features) * topk_weights[..., None].to(y.dtype)
    y = y.sum(-2)
    return y if residual is None else residual + y


def expert_matmuls(x: Tensor, linear: LinearBase, expert_ids: Tensor, query_len: int) -> Tensor:
    """Multiplies row i of x [M, K] with the matrix [N, K] of expert expert_ids[i]: [M, N]. query_len: the
    number of new tokens of a sequence."""
    if not torch.compiler.is_compiling():
        return loop_over_experts(x, linear, expert_ids)
    if query_len == 1:
        return gather_experts(x, linear, expert_ids)
    return torch.compiler.disable(loop_over_experts)(x, linear, expert_ids)


def loop_over_experts(x: Tensor, linear: LinearBase, expert_ids: Tensor) -> Tensor:
    """One matmul for each expert that occurs in expert_ids. The host waits for the device to read expert_ids."""
    y = x.new_empty(len(x), linear.out_features)
    for e in expert_ids.unique().tolist():
        rows = torch.where(expert_ids == e)[0]
        bias = None if linear.bias is None else linear.bias[e]
        y[rows] = F.linear(x[rows], linear.dequantized_weight(x.dtype, e), bias)
    return y


def gather_experts(x: Tensor, linear: LinearBase, expert_ids: Tensor) -> Tensor:
    """One matrix for each row, for a compiled decode step, which has few rows. torch.compile fuses look-up,
    dequantization and matmul into one loop. Plain PyTorch would copy the weights of the experts."""
    y = (linear.dequantized_weight(x.dtype, expert_ids).float() * x[:, None].float()).sum(-1)
    return (y if linear.bias is None else y + linear.bias[expert_ids].float()).to(x.dtype)

"""Checks the operations of a mixture of experts. all_checks.py lists the sizes."""

import torch

from formats import WeightFormat
from layers.backend import TRITON_BACKEND
from layers.experts import ExpertsDown, ExpertsGateUp, route, route_torch
from layers.linear import FUSED_GLU_MULTIPLE
from layers.packing import pack_for_triton
from scripts.kernel_checks.check_linear import separate_norm_error
from scripts.kernel_checks.exact_results import (
    U32,
    Comparison,
    exact_linear,
    exact_norm,
    exact_product,
    exact_stored_activation,
    exact_sums_error,
    format_label,
    integers,
    matrix_and_bias,
    pytorch_error,
    stored_error,
    use_triton,
    with_residual,
)

TOP_K = 2  # experts of a token


def check_gate_up(dtype: torch.dtype, format: WeightFormat, size: tuple):
    """Checks matmuls with the gate and up projections of experts. Several tokens use the same expert. PyTorch computes
    the sizes that kernels do not support."""
    n_experts, dim, ffn_dim, has_bias, token_counts = size
    n, norm = 2 * ffn_dim, exact_norm(dim, dtype)
    w = exact_linear(
        n, dim, format, dtype, n_experts=n_experts, bias=has_bias, kind=ExpertsGateUp, activation="silu",
        gated=True,
    )
    matrix, bias = matrix_and_bias(w)
    use_triton(w)
    for num_tokens in token_counts:
        _, topk_ids = route_torch(torch.randn(1, num_tokens, n_experts) * 3, TOP_K, True)
        x = integers(1, num_tokens, dim, dtype=dtype)
        chosen_bias = bias[topk_ids][..., None, :] if has_bias else bias
        # [B, T, 1, 1, dim] times [B, T, top_k, dim, N]
        y, terms = (t.squeeze(-2) for t in exact_product(x[..., None, None, :], matrix[topk_ids], chosen_bias, norm))
        by_kernel = w.backend.kernel_for("experts_gate_up", num_tokens) is not None
        error = exact_sums_error(terms, dim, format) if by_kernel else pytorch_error(terms, dim, dtype)
        error = error + separate_norm_error(x[..., None, None, :], norm, matrix[topk_ids]).squeeze(-2)
        fused = by_kernel and n % FUSED_GLU_MULTIPLE == 0
        y, error = exact_stored_activation(y, error, "silu", True, dtype, fused)
        case = f"{format_label(format)}, {n_experts} of {n}x{dim}, {num_tokens} tokens"
        yield Comparison("experts_gate_up", case, w(x, topk_ids=topk_ids, norm=norm), y, error)


def check_down(dtype: torch.dtype, format: WeightFormat, size: tuple):
    n_experts, dim, ffn_dim, has_bias, token_counts = size
    w = exact_linear(dim, ffn_dim, format, dtype, n_experts=n_experts, bias=has_bias, kind=ExpertsDown)
    matrix, bias = matrix_and_bias(w)
    pack_for_triton([w])
    assert w.backend.name == ("triton" if format.kernels_can_read(ffn_dim) else "torch")
    for num_tokens in token_counts:
        topk_weights, topk_ids = route_torch(torch.randn(1, num_tokens, n_experts) * 3, TOP_K, True)
        hidden = integers(1, num_tokens, TOP_K, ffn_dim, dtype=dtype)
        residual = torch.randn(1, num_tokens, dim).to(dtype)
        chosen_bias = bias[topk_ids][..., None, :] if has_bias else bias
        # [B, T, top_k, 1, F] times [B, T, top_k, F, N], weighted and summed over top_k
        products = exact_product(hidden[..., None, :], matrix[topk_ids], chosen_bias)
        y, terms = ((t.squeeze(-2) * topk_weights.double()[..., None]).sum(-2) for t in products)
        by_kernel = w.backend.kernel_for("experts_down", num_tokens) is not None
        error = exact_sums_error(terms, ffn_dim, format) if by_kernel else pytorch_error(terms, ffn_dim, dtype)
        case = f"{format_label(format)}, {n_experts} of {dim}x{ffn_dim}, {num_tokens} tokens"
        routed = {"topk_ids": topk_ids, "topk_weights": topk_weights}
        yield Comparison("experts_down", case, w(hidden, **routed), y, stored_error(y, error, dtype))
        if not by_kernel:
            error = stored_error(y, error, dtype)
        total, error = with_residual(y, error, residual)
        ours = w(hidden, **routed, residual=residual)
        yield Comparison("experts_down", f"{case}, residual", ours, total, stored_error(total, error, dtype))


def check_route(num_tokens: int, n_experts: int, top_k: int, n_shared_experts: int, norm_topk_prob: bool):
    logits = torch.randn(1, num_tokens, n_experts + (n_shared_experts > 0)) * 3
    topk_weights, topk_ids = route_torch(logits, top_k, norm_topk_prob, n_shared_experts)
    our_weights, our_ids = route(logits, top_k, norm_topk_prob, n_shared_experts, TRITON_BACKEND)
    case = f"{top_k} of {n_experts} for {num_tokens} tokens, {n_shared_experts} shared, norm_topk_prob {norm_topk_prob}"
    yield Comparison("topk_ids", case, our_ids, topk_ids, torch.zeros(()))
    yield Comparison("topk_weights", case, our_weights, topk_weights, (n_experts + 32) * U32 * topk_weights)

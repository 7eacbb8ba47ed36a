"""Checks the matmuls of fused_linear with their prologue and epilogue, and four other operations: dequantize, embed,
rms_norm, permute_inputs. all_checks.py lists the sizes."""

import torch
from torch import Tensor

from formats import Int4, Int8, Unquantized, WeightFormat
from formats.integers import GroupwiseAffine
from kernels.triton import MAGIC_BIASES
from layers.backend import TRITON_BACKEND
from layers.linear import FUSED_GLU_MULTIPLE, RMSNorm, apply_softcap, permute_inputs
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.exact_results import (
    U32,
    Comparison,
    activate_with_error,
    exact_linear,
    exact_norm,
    exact_product,
    exact_rms_norm,
    exact_stored_activation,
    exact_sums_error,
    factor_dtype,
    format_label,
    integers,
    make_linear,
    make_norm,
    matrix_and_bias,
    softcap_error,
    stored_error,
    triton_rounding_error,
    use_triton,
    with_activation,
    with_residual,
)


def check_linear(dtype: torch.dtype, format: WeightFormat, size: tuple):
    """Checks a matmul of exact data: there, even the smallest mistake shows."""
    n, k, has_bias, token_counts = size
    w, norm = exact_linear(n, k, format, dtype, bias=has_bias), exact_norm(k, dtype)
    matrix, bias = matrix_and_bias(w)
    use_triton(w)
    for num_tokens in token_counts:
        case = f"{format_label(format)} {n}x{k} of {num_tokens} tokens"
        x, residual = integers(1, num_tokens, k, dtype=dtype), torch.randn(1, num_tokens, n).to(dtype)
        y, terms = exact_product(x, matrix, bias)
        ours = w(x, out_dtype=torch.float32)
        yield Comparison("float32_linear", case, ours, y, exact_sums_error(terms, k, format))

        y, terms = exact_product(x, matrix, bias, norm)
        error = exact_sums_error(terms, k, format) + separate_norm_error(x, norm, matrix)
        total, total_error = with_residual(y, error, residual)
        ours = w(x, norm=norm, residual=residual)
        yield Comparison("linear", case, ours, total, stored_error(total, total_error, dtype))

        y, error = exact_stored_activation(y, error, "silu", True, dtype, fused=n % FUSED_GLU_MULTIPLE == 0)
        yield Comparison("gated_linear", case, with_activation(w, "silu", gated=True)(x, norm=norm), y, error)


def check_random_linear(dtype: torch.dtype, format: WeightFormat, size: tuple):
    """Checks a matmul of random data: sums and products with the norm's weight are rounded, and Int4's magic bias costs
    bits."""
    n, k, num_tokens = size
    w, norm = make_linear(n, k, format, dtype), make_norm(k, dtype)
    matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
    if isinstance(format, GroupwiseAffine):  # the kernel computes (bias + q) x - (bias + zero) x
        bias = MAGIC_BIASES.get(factor_dtype(dtype), 0) if isinstance(format, Int4) else 128
        wide_scales = w.scales.double().repeat_interleave(format.group_size, -1)[:, :k]
        magnitude = magnitude + 2 * bias * wide_scales
    use_triton(w)
    x = torch.randn(1, num_tokens, k).to(dtype)
    case = f"{format_label(format)} {n}x{k} of {num_tokens} tokens, random"
    y = x.double() @ matrix.T
    error = bounds.product_error(x, magnitude, y, torch.float32)
    yield Comparison("float32_linear", case, w(x, out_dtype=torch.float32), y, error)

    normed = exact_rms_norm(x, norm)
    y = normed @ matrix.T
    rounded_factors = bounds.U[factor_dtype(dtype)] * (normed.abs() @ matrix.abs().T)
    error = bounds.product_error(normed, magnitude, y, torch.float32) + rounded_factors
    yield Comparison("float32_linear", case, w(x, norm=norm, out_dtype=torch.float32), y, error)


def separate_norm_error(x: Tensor, norm: RMSNorm, matrix: Tensor) -> Tensor:
    """Returns an additional error of x [B, T, ..., K] times matrix [..., N, K], or 0 for up to MMA_N tokens. With more
    tokens, a kernel of its own computes the norm, and rounds the normed x. So the matmul's data are not exact."""
    normed = exact_rms_norm(x, norm)
    error = stored_error(normed, 2 * (x.shape[-1] + 8) * U32 * normed.abs(), x.dtype) @ matrix.abs().mT
    from kernels.triton.launch import MMA_N  # here, because Triton is installed only where there is a GPU

    return error * (x.shape[1] > MMA_N)


def check_rows(dtype: torch.dtype, format: WeightFormat, size: tuple):
    n, k = size
    w = make_linear(n, k, format, dtype)
    exact = w.dequantize(torch.float32)
    use_triton(w)
    ours = w.dequantize(dtype)
    case = f"{format_label(format)} {n}x{k}"
    yield Comparison("dequantize", case, ours, exact, triton_rounding_error(exact, dtype))
    tokens, scale = torch.randint(n, (3, 4)), 1.7
    rows = exact[tokens]
    error = scale * triton_rounding_error(rows, dtype) + triton_rounding_error(2 * scale * rows, dtype)
    yield Comparison("embed", case, w.embedding(tokens, scale, dtype), scale * rows.double(), error)


def check_activation(dtype: torch.dtype, activation: str, gated: bool):
    """Checks an activation near zero, where it bends, and beyond the clamp. NaN stays NaN."""
    n, k, operation = 96, 72, f"{'gated_' if gated else ''}{activation}_linear"
    w = exact_linear(n, k, Unquantized(), dtype, bias=True)
    matrix, bias = matrix_and_bias(w)
    use_triton(w)
    for num_tokens in (1, 5):
        x = integers(1, num_tokens, k, dtype=dtype)
        y, terms = exact_product(x, matrix, bias)
        assert num_tokens == 1 or (y.abs().max() > 8 and y.abs().min() < 0.1)
        sum_error = exact_sums_error(terms, k, Unquantized())
        y, error = exact_stored_activation(y, sum_error, activation, gated, dtype, fused=True)
        ours = with_activation(w, activation, gated)(x)
        yield Comparison(operation, f"{n}x{k} of {num_tokens} tokens", ours, y, error)
    x[0, 3, 7] = torch.nan
    is_nan = with_activation(w, activation, gated)(x).isnan()
    expected = x.isnan().any(-1, keepdim=True).expand(is_nan.shape)
    yield Comparison(operation, "NaN", is_nan, expected, torch.zeros(()))


def check_epilogue(dtype: torch.dtype, scale: float, softcap: float, clip: float):
    """Checks scale, softcap and clip. The kernel applies them after the bias or the activation, before the residual."""
    n, k, operation = 96, 72, "clipped_linear" if clip else "capped_linear"
    w = exact_linear(n, k, Int8(), dtype, bias=True, out_scale=scale, softcap=softcap, clip=clip)
    matrix, bias = matrix_and_bias(w)
    use_triton(w)

    def epilogue(y: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        y, error = y * scale, error * scale + 2 * U32 * abs(y * scale)
        if softcap:
            y, error = apply_softcap(y, softcap), error + softcap_error(softcap)
        return y.clamp(-clip, clip) if clip else y, error

    for num_tokens in (1, 5):
        case = f"scale {scale}, softcap {softcap}, clip {clip}, {num_tokens} tokens"
        x, residual = integers(1, num_tokens, k, dtype=dtype), torch.randn(1, num_tokens, n).to(dtype)
        products, terms = exact_product(x, matrix, bias)
        sum_error = exact_sums_error(terms, k, Int8())
        y, error = epilogue(products, sum_error)
        yield Comparison(operation, case, w(x, out_dtype=torch.float32), y, error)
        total, error = with_residual(y, error, residual)
        ours = w(x, residual=residual)
        yield Comparison(operation, f"{case}, residual", ours, total, stored_error(total, error, dtype))
        y, error = epilogue(*activate_with_error(products, sum_error, "silu", gated=True))
        ours = with_activation(w, "silu", gated=True)(x)
        yield Comparison(operation, f"{case}, gated", ours, y, stored_error(y, error, dtype))


def check_rms_norm(dtype: torch.dtype, num_tokens: int, dim: int):
    norm, (x, residual) = make_norm(dim, dtype), (torch.randn(2, 1, num_tokens, dim) * 3).to(dtype)
    norm.backend = TRITON_BACKEND
    y = exact_rms_norm(x, norm)
    error = (dim + 8) * U32 * y.abs()
    yield Comparison("rms_norm", f"{num_tokens}x{dim}", norm(x), y, stored_error(y, error, dtype))
    total, error = with_residual(y, error, residual)
    ours = norm(x, residual)
    yield Comparison("rms_norm", f"{num_tokens}x{dim}, residual", ours, total, stored_error(total, error, dtype))


def check_permute_inputs(dtype: torch.dtype):
    """Checks that results are exact: for all inputs in another order, and for a part of them, as with several ranks."""
    for num_tokens, k, n in [(1, 5, 5), (3, 1032, 1032), (64, 2100, 1050)]:
        x, order = torch.randn(1, num_tokens, k).to(dtype), torch.randperm(k)[:n]
        y = permute_inputs(x, order.int(), TRITON_BACKEND)
        yield Comparison("permute_inputs", f"{num_tokens}x{k}, {n}", y, x[..., order].double(), torch.zeros(()))

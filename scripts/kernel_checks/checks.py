"""Checks every Triton kernel against exact results, on a GPU and in Triton's interpreter.

    python scripts/benchmark.py check --precision bfloat16      # on a GPU
    python -m pytest tests/test_triton.py                       # in the interpreter

A check is a generator of Comparisons. To check a new kernel, add a check to all_checks. exact_results.py makes the
data, the exact results and the bounds. All tensors are made on PyTorch's default device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from config import ACTIVATIONS
from formats import MXFP4, Float8, Int4, Int8, Unquantized, WeightFormat
from layers.backend import TRITON_BACKEND
from layers.experts import ExpertsDown, ExpertsGateUp, route, route_torch
from layers.linear import FUSED_GLU_MULTIPLE, RMSNorm, apply_softcap, permute_inputs
from layers.packing import pack_for_triton
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.attention import ATTENTION_OPTIONS, check_attention
from scripts.kernel_checks.exact_results import (
    CHECKED_FORMATS,
    MAGIC_BIASES,
    TRITON_FORMATS,
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
    pytorch_error,
    softcap_error,
    stored_error,
    triton_rounding_error,
    use_triton,
    with_activation,
    with_residual,
)
from scripts.kernel_checks.sampling import check_distribution, check_sample

Check = partial[Iterator[Comparison]]

# ---- What is checked -------------------------------------------------------------------------------------------------

NORMS = [(1, 5), (3, 37), (8, 64), (3, 1032), (8, 5120)]  # tokens, dim
TOP_K = 2  # experts of a token
EPILOGUES = [(0.22, 0.0, 6.0), (1.0, 5.0, 0.0), (3.0, 30.0, 20.0)]  # scale, softcap, clip
ROUTERS = [(1, 8, 2, 0), (5, 128, 8, 0), (8, 6, 6, 0), (1, 7, 2, 1), (3, 8, 8, 3)]  # tokens, experts, top_k, shared


@dataclass(frozen=True)
class Sizes:
    """The sizes to check. The interpreter is slow at large shapes, and a GPU's compiler is slow at many shapes, so each
    has sizes of its own."""

    linears: list[tuple]  # N, K, whether there is a bias, numbers of tokens
    random_linears: list[tuple]  # N, K, tokens
    matrices: list[tuple]  # N, K
    few_linears: list[tuple]  # as linears, for formats that are not in CHECKED_FORMATS; K is a multiple of 32
    expert_formats: list[WeightFormat]
    experts: list[tuple]  # E, dim, ffn_dim, whether there are biases, numbers of tokens
    attention: list[tuple]  # (n_heads, n_kv_heads, head_dim), window, caches (see check_attention), options
    vocab_sizes: list[int]


def gpu_sizes(dtype: torch.dtype) -> Sizes:
    heads = [(32, 8, 128), (9, 3, 64), (8, 1, 40), (4, 4, 256)]
    caches = [(1, [0], 100), (1, [8000], 9000), (1, [255, 248, 241], 2000), (8, [1020], 2000)]
    attention = [(h, window, caches, ("head_norms",) if h[2] == 40 else ()) for h in heads for window in (0, 1000)]
    attention += [(h, 1000, caches[-2:], ATTENTION_OPTIONS) for h in heads[:2]]
    real_linears = [(4096, 4096, False, (1, 5))] if dtype == torch.bfloat16 else []  # in one type, which saves time
    many = (9, 33, 64) if dtype != torch.float32 else ()  # float32 kernels take at most 8 tokens
    linears = [(1056, 1544, True, (1, 2, 5, 8, *many)), (6, 72, False, (1, 3)), *real_linears]
    return Sizes(
        linears,
        random_linears=[(1056, 1544, 5), (38, 72, 2)],
        matrices=[(n, k) for n, k, *_ in linears],
        few_linears=[(1056, 1568, True, (1, 5, 8, *many)), (38, 96, False, (2,))],
        expert_formats=TRITON_FORMATS,
        experts=[(8, 256, 512, False, (1,)), (8, 256, 512, True, (5, *many))],
        attention=attention,
        vocab_sizes=[5, 2048, 128_256],
    )


def interpreter_sizes(dtype: torch.dtype) -> Sizes:
    """Returns small sizes. With two multiprocessors, the largest product has more outputs than one program computes,
    and more columns than two steps of the program's loop."""
    caches = [(1, [0], 96), (4, [3, 150], 160), (8, [140], 160)]
    windows = {torch.float32: [0, 90], torch.bfloat16: [7], torch.float16: [0]}[dtype]
    heads = [(4, 4, 8), (6, 2, 64), (8, 1, 40)]
    attention = list(product(heads, windows, [caches], [()]))
    attention += product(heads if dtype == torch.bfloat16 else heads[-1:], windows, [caches], [("head_norms",)])
    if dtype == torch.float16:
        attention.append(((6, 2, 24), 7, [(16, [140], 160)], ()))  # the most new tokens
    else:
        options = [*((name,) for name in ATTENTION_OPTIONS), ATTENTION_OPTIONS]
        attention += product([(4, 4, 8), (6, 2, 24), (8, 1, 64)], windows[:1], [caches[:2]], options)
    experts = [(4, 64, 48, True, (1, 7, 65 if dtype == torch.float32 else 9))]
    if dtype == torch.float16:
        experts = [(4, 64, 64, True, (12,))]
    if dtype == torch.float32:  # PyTorch computes the parts of these sizes that no kernel takes
        experts += [(4, 64, ffn_dim, False, (1, 7, 65)) for ffn_dim in (40, 44)]
    many_linears = [(38, 136, False, (33,))] if dtype == torch.float16 else []
    few_linears = [(70, 160, True, (3, 16) if dtype == torch.float16 else (3,))]
    if dtype == torch.bfloat16:  # the interpreter computes in float32
        few_linears = []
    large = (96, 264) if dtype == torch.float32 else (160, 1032)
    return Sizes(
        linears=[(6, 32, False, (1,)), (70, 72, True, (3,)), (*large, False, (2,)), *many_linears],
        random_linears=[(38, 72, 2)],
        matrices=[(5, 8), (33, 136)],
        few_linears=few_linears,
        expert_formats=[Float8(32), MXFP4()] if dtype == torch.float16 else [Unquantized(), Int8(), Int4(32)],
        experts=experts,
        attention=attention,
        vocab_sizes=[5, 2048, 5000],
    )


def all_checks(dtype: torch.dtype, sizes: Sizes) -> list[Check]:
    """Returns all checks. A check is a partial of a function at module level, since pickle can send such a partial to
    another process."""
    checks = [partial(check_linear, dtype, *case) for case in product(CHECKED_FORMATS, sizes.linears)]
    checks += [partial(check_random_linear, dtype, *case) for case in product(CHECKED_FORMATS, sizes.random_linears)]
    checks += [partial(check_rows, dtype, *case) for case in product(CHECKED_FORMATS, sizes.matrices)]
    for format, (n, k, has_bias, token_counts) in product(TRITON_FORMATS[len(CHECKED_FORMATS) :], sizes.few_linears):
        checks.append(partial(check_linear, dtype, format, (n, k, has_bias, token_counts)))
        checks.append(partial(check_random_linear, dtype, format, (n, k, token_counts[-1])))
        checks.append(partial(check_rows, dtype, format, (n, k)))
    checks += [partial(check_activation, dtype, activation) for activation in ACTIVATIONS]
    checks += [partial(check_epilogue, dtype, *epilogue) for epilogue in EPILOGUES]
    checks += [partial(check_rms_norm, dtype, *norm) for norm in NORMS]
    checks.append(partial(check_permute_inputs, dtype))
    for format, size in product(sizes.expert_formats, sizes.experts):
        if size[2] % format.k_alignment == 0:
            checks += [partial(check_gate_up, dtype, format, size), partial(check_down, dtype, format, size)]
    checks += [partial(check_route, *router, norm_topk_prob) for router in ROUTERS for norm_topk_prob in (False, True)]
    checks += [partial(check_sample, vocab_size) for vocab_size in sizes.vocab_sizes]
    checks += [partial(check_distribution, operation) for operation in ("sample", "multinomial")]
    checks += [partial(check_attention, dtype, *case) for case in sizes.attention]
    return checks


def name_of(check: Check) -> str:
    return f"{check.func.__name__}({', '.join(str(argument) for argument in check.args)})"


# ---- Matmuls ---------------------------------------------------------------------------------------------------------


def check_linear(dtype: torch.dtype, format: WeightFormat, size: tuple):
    """Checks a matmul of exact data, where even the smallest mistake shows."""
    n, k, has_bias, token_counts = size
    w, norm = exact_linear(n, k, format, dtype, bias=has_bias), exact_norm(k, dtype)
    matrix, bias = matrix_and_bias(w)
    use_triton(w)
    for n_tokens in token_counts:
        case = f"{format_label(format)} {n}x{k} of {n_tokens} tokens"
        x, residual = integers(1, n_tokens, k, dtype=dtype), torch.randn(1, n_tokens, n).to(dtype)
        y, terms = exact_product(x, matrix, bias)
        ours = w(x, out_dtype=torch.float32)
        yield Comparison("float32_linear", case, ours, y, exact_sums_error(terms, k, format))

        y, terms = exact_product(x, matrix, bias, norm)
        error = exact_sums_error(terms, k, format) + separate_norm_error(x, norm, matrix)
        total, total_error = with_residual(y, error, residual)
        ours = w(x, norm=norm, residual=residual)
        yield Comparison("linear", case, ours, total, stored_error(total, total_error, dtype))

        y, error = exact_stored_activation(y, error, "swiglu", dtype, fused=n % FUSED_GLU_MULTIPLE == 0)
        yield Comparison("swiglu_linear", case, with_activation(w, "swiglu")(x, norm=norm), y, error)


def check_random_linear(dtype: torch.dtype, format: WeightFormat, size: tuple):
    """Checks a matmul of random data, where sums and products with the norm's weight are rounded, and Int4's magic
    bias costs bits."""
    n, k, n_tokens = size
    w, norm = make_linear(n, k, format, dtype), make_norm(k, dtype)
    matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
    if w.zeros is not None:  # the kernel computes (bias + q) x - (bias + zero) x
        bias = MAGIC_BIASES[factor_dtype(dtype)] if format.elements_per_byte == 2 else 128
        wide_scales = w.scales.double().repeat_interleave(format.group_size, -1)[:, :k]
        magnitude = magnitude + 2 * bias * wide_scales
    use_triton(w)
    x = torch.randn(1, n_tokens, k).to(dtype)
    case = f"{format_label(format)} {n}x{k} of {n_tokens} tokens, random"
    y = x.double() @ matrix.T
    error = bounds.product_error(x, magnitude, y, torch.float32)
    yield Comparison("float32_linear", case, w(x, out_dtype=torch.float32), y, error)

    normed = exact_rms_norm(x, norm)
    y = normed @ matrix.T
    rounded_factors = bounds.U[factor_dtype(dtype)] * (normed.abs() @ matrix.abs().T)
    error = bounds.product_error(normed, magnitude, y, torch.float32) + rounded_factors
    yield Comparison("float32_linear", case, w(x, norm=norm, out_dtype=torch.float32), y, error)


def separate_norm_error(x: Tensor, norm: RMSNorm, matrix: Tensor) -> Tensor:
    """Returns an additional error of x [B, T, ..., K] times matrix [..., N, K], or 0 for up to MMA_N tokens. With
    more tokens the norm has its own kernel. That kernel rounds the normed x, so the matmul's data are not exact."""
    normed = exact_rms_norm(x, norm)
    error = stored_error(normed, 2 * (x.shape[-1] + 8) * U32 * normed.abs(), x.dtype) @ matrix.abs().mT
    from kernels.triton.launch import MMA_N  # here, since Triton is installed only where there is a GPU

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
    yield Comparison("embed", case, w.lookup(tokens, scale, dtype), scale * rows.double(), error)


def check_activation(dtype: torch.dtype, activation: str):
    """Checks an activation near zero, where the activation bends, and beyond the clamp. NaN stays NaN."""
    n, k, operation = 96, 72, f"{activation}_linear"
    w = exact_linear(n, k, Unquantized(), dtype, bias=True)
    matrix, bias = matrix_and_bias(w)
    use_triton(w)
    for n_tokens in (1, 5):
        x = integers(1, n_tokens, k, dtype=dtype)
        y, terms = exact_product(x, matrix, bias)
        assert n_tokens == 1 or (y.abs().max() > 8 and y.abs().min() < 0.1)
        y, error = exact_stored_activation(y, exact_sums_error(terms, k, Unquantized()), activation, dtype, fused=True)
        ours = with_activation(w, activation)(x)
        yield Comparison(operation, f"{n}x{k} of {n_tokens} tokens", ours, y, error)
    x[0, 3, 7] = torch.nan
    is_nan = with_activation(w, activation)(x).isnan()
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

    for n_tokens in (1, 5):
        case = f"scale {scale}, softcap {softcap}, clip {clip}, {n_tokens} tokens"
        x, residual = integers(1, n_tokens, k, dtype=dtype), torch.randn(1, n_tokens, n).to(dtype)
        products, terms = exact_product(x, matrix, bias)
        sum_error = exact_sums_error(terms, k, Int8())
        y, error = epilogue(products, sum_error)
        yield Comparison(operation, case, w(x, out_dtype=torch.float32), y, error)
        total, error = with_residual(y, error, residual)
        ours = w(x, residual=residual)
        yield Comparison(operation, f"{case}, residual", ours, total, stored_error(total, error, dtype))
        y, error = epilogue(*activate_with_error(products, sum_error))
        ours = with_activation(w, "swiglu")(x)
        yield Comparison(operation, f"{case}, swiglu", ours, y, stored_error(y, error, dtype))


def check_rms_norm(dtype: torch.dtype, n_tokens: int, dim: int):
    norm, (x, residual) = make_norm(dim, dtype), (torch.randn(2, 1, n_tokens, dim) * 3).to(dtype)
    norm.backend = TRITON_BACKEND
    y = exact_rms_norm(x, norm)
    error = (dim + 8) * U32 * y.abs()
    yield Comparison("rms_norm", f"{n_tokens}x{dim}", norm(x), y, stored_error(y, error, dtype))
    total, error = with_residual(y, error, residual)
    ours = norm(x, residual)
    yield Comparison("rms_norm", f"{n_tokens}x{dim}, residual", ours, total, stored_error(total, error, dtype))


def check_permute_inputs(dtype: torch.dtype):
    """Checks that results are exact: for all inputs in another order, and for a part of the inputs, as with several
    ranks."""
    for n_tokens, k, n in [(1, 5, 5), (3, 1032, 1032), (64, 2100, 1050)]:
        x, order = torch.randn(1, n_tokens, k).to(dtype), torch.randperm(k)[:n]
        y = permute_inputs(x, order.int(), TRITON_BACKEND)
        yield Comparison("permute_inputs", f"{n_tokens}x{k}, {n}", y, x[..., order].double(), torch.zeros(()))


# ---- Mixture of experts ----------------------------------------------------------------------------------------------


def check_gate_up(dtype: torch.dtype, format: WeightFormat, size: tuple):
    """Checks matmuls with the gate and up projections of experts. Several tokens use one expert. PyTorch computes the
    sizes that kernels do not support."""
    n_experts, dim, ffn_dim, has_bias, token_counts = size
    n, norm = 2 * ffn_dim, exact_norm(dim, dtype)
    w = exact_linear(
        n, dim, format, dtype, n_experts=n_experts, bias=has_bias, kind=ExpertsGateUp, activation="swiglu"
    )
    matrix, bias = matrix_and_bias(w)
    use_triton(w)
    for n_tokens in token_counts:
        _, topk_ids = route_torch(torch.randn(1, n_tokens, n_experts) * 3, TOP_K, True)
        x = integers(1, n_tokens, dim, dtype=dtype)
        chosen_bias = bias[topk_ids][..., None, :] if has_bias else bias
        # [B, T, 1, 1, dim] times [B, T, top_k, dim, N]
        y, terms = (t.squeeze(-2) for t in exact_product(x[..., None, None, :], matrix[topk_ids], chosen_bias, norm))
        by_kernel = w.backend.find_kernel("experts_gate_up", n_tokens) is not None
        error = exact_sums_error(terms, dim, format) if by_kernel else pytorch_error(terms, dim, dtype)
        error = error + separate_norm_error(x[..., None, None, :], norm, matrix[topk_ids]).squeeze(-2)
        y, error = exact_stored_activation(y, error, "swiglu", dtype, fused=by_kernel and n % FUSED_GLU_MULTIPLE == 0)
        case = f"{format_label(format)}, {n_experts} of {n}x{dim}, {n_tokens} tokens"
        yield Comparison("experts_gate_up", case, w(x, topk_ids=topk_ids, norm=norm), y, error)


def check_down(dtype: torch.dtype, format: WeightFormat, size: tuple):
    n_experts, dim, ffn_dim, has_bias, token_counts = size
    w = exact_linear(dim, ffn_dim, format, dtype, n_experts=n_experts, bias=has_bias, kind=ExpertsDown)
    matrix, bias = matrix_and_bias(w)
    pack_for_triton([w])
    assert w.backend.name == ("triton" if format.kernels_can_read(ffn_dim) else "torch")
    for n_tokens in token_counts:
        topk_weights, topk_ids = route_torch(torch.randn(1, n_tokens, n_experts) * 3, TOP_K, True)
        hidden = integers(1, n_tokens, TOP_K, ffn_dim, dtype=dtype)
        residual = torch.randn(1, n_tokens, dim).to(dtype)
        chosen_bias = bias[topk_ids][..., None, :] if has_bias else bias
        # [B, T, top_k, 1, F] times [B, T, top_k, F, N], weighted and summed over top_k
        products = exact_product(hidden[..., None, :], matrix[topk_ids], chosen_bias)
        y, terms = ((t.squeeze(-2) * topk_weights.double()[..., None]).sum(-2) for t in products)
        by_kernel = w.backend.find_kernel("experts_down", n_tokens) is not None
        error = exact_sums_error(terms, ffn_dim, format) if by_kernel else pytorch_error(terms, ffn_dim, dtype)
        case = f"{format_label(format)}, {n_experts} of {dim}x{ffn_dim}, {n_tokens} tokens"
        routed = {"topk_ids": topk_ids, "topk_weights": topk_weights}
        yield Comparison("experts_down", case, w(hidden, **routed), y, stored_error(y, error, dtype))
        if not by_kernel:
            error = stored_error(y, error, dtype)
        total, error = with_residual(y, error, residual)
        ours = w(hidden, **routed, residual=residual)
        yield Comparison("experts_down", f"{case}, residual", ours, total, stored_error(total, error, dtype))


def check_route(n_tokens: int, n_experts: int, top_k: int, n_shared_experts: int, norm_topk_prob: bool):
    logits = torch.randn(1, n_tokens, n_experts + (n_shared_experts > 0)) * 3
    topk_weights, topk_ids = route_torch(logits, top_k, norm_topk_prob, n_shared_experts)
    our_weights, our_ids = route(logits, top_k, norm_topk_prob, n_shared_experts, TRITON_BACKEND)
    case = f"{top_k} of {n_experts} for {n_tokens} tokens, {n_shared_experts} shared, norm_topk_prob {norm_topk_prob}"
    yield Comparison("topk_ids", case, our_ids, topk_ids, torch.zeros(()))
    yield Comparison("topk_weights", case, our_weights, topk_weights, (n_experts + 32) * U32 * topk_weights)

"""The C++ kernels for matmuls, norms and embeddings against plain PyTorch, in odd shapes and every format.

test_kernels_attention.py, test_kernels_experts.py and test_kernels_sampling.py test the other kernels.
test_kernels_builds.py runs all these tests on the code for other CPUs.
"""

import copy
import itertools
import math

import pytest
import torch

from config import ACTIVATIONS
from formats import MXFP4, Float8, Int4, Int8, Unquantized
from formats.integers import GroupwiseAffine
from kernels.build import load_cpp_kernels
from kernels.schema import Epilogue
from layers.backend import CPU_BACKEND
from layers.experts import ExpertsDown
from layers.linear import Linear, activate, add, apply_softcap, permute_inputs, rms_norm_torch
from layers.packing import pack_weights
from model import DTYPES
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.exact_results import (
    CPU_FORMATS,
    activate_with_error,
    format_label,
    make_linear,
    make_norm,
    set_weight,
    with_activation,
)
from tests.cpu_kernels import as_seen, built, make_embedding, packed, quantizes_activations, step_of

SIZES = [(16, 32), (5, 8), (48, 72), (100, 576), (33, 1544), (32, 8)]  # N, K: not only multiples of the blocks
EPILOGUES = [  # N, K, scale, softcap, clip
    (33, 72, 0.25, 0.0, 0.0), (64, 72, 0.03, 5.0, 0.0), (33, 72, 1.0, 5.0, 0.0), (64, 8, 1e-3, 30.0, 0.0),
    (33, 72, 1.0, 0.0, 6.0), (64, 72, 0.5, 5.0, 4.0),
]
pytestmark = pytest.mark.usefixtures("threads")
EXACT_IN_BF16 = Unquantized | Int8 | MXFP4  # no scales but powers of two, or only after the sum
ANY_TOKENS = CPU_BACKEND.with_limits(fused_linear=math.inf)  # the kernel for prompts, too

# ---- Matmuls --------------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", SIZES)
def test_linear(format, dtype, n, k):
    torch.manual_seed(0)
    w = make_linear(n, k, format, dtype, bias=n % 2 == 0)
    matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
    bias = 0 if w.bias is None else w.bias.double()
    packed(w)
    norm = make_norm(k, dtype)
    for rows in (1, 2, 5, 8):
        x, residual = torch.randn(1, rows, k).to(dtype), torch.randn(1, rows, n).to(dtype)
        normed = rms_norm_torch(x, norm.weight, norm.eps)
        seen = as_seen(normed, format)
        y = seen.double() @ matrix.T + bias
        step = step_of(normed, quantized=seen is not normed) + step_of(normed, quantized=False)
        wide_bound = bounds.product_error(seen, magnitude, y, torch.float32, step)
        bounds.check(w(x, norm=norm, out_dtype=torch.float32), y, wide_bound, rows)
        bounds.check(w(x, norm=norm), y, wide_bound + bounds.rounding_error(y, dtype), rows)
        total = y + residual.double()
        ours = w(x, norm=norm, residual=residual)
        bounds.check(ours, total, wide_bound + bounds.rounding_error(total, dtype), rows)
        if n % 2 == 0:
            for activation, gated in itertools.product(ACTIVATIONS, (False, True)):
                if activation == "relu2" and gated and dtype == torch.float16 and k > 100:
                    continue  # cubes of such a y are beyond float16
                ours = with_activation(w, activation, gated)(x, norm=norm)
                check_activated(ours, activation, gated, y, wide_bound, n % 32 == 0 or not gated, rows)


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_many_tokens(format, dtype):
    """Matmuls of several blocks of tokens, on AMX if the CPU has it, and as in a prefill. Instead of bfloat16
    activations, AMX and prefill round weights with a scale for each group."""
    torch.manual_seed(0)
    is_bf16 = dtype == torch.bfloat16
    on_amx = is_bf16 and load_cpp_kernels().has_amx_bf16()
    is_prefill = load_cpp_kernels().has_prefill_linear(is_bf16) and not quantizes_activations(format, dtype)
    odd = [(21, 37)] if isinstance(format, Unquantized) else []  # quantized, K must be a multiple of 8
    for n, k in [(33, 72), (64, 200), *odd]:
        w, norm = make_linear(n, k, format, dtype, bias=n % 2 == 0), make_norm(k, dtype)
        matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
        bias = 0 if w.bias is None else w.bias.double()
        packed(w).backend = ANY_TOKENS
        for tokens in (6, 9, 15, 16, 17, 33, 64, 65, 67, 200):
            x, residual = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype)
            x[2], x[4, 1] = 0, torch.nan  # zeros and NaN do not change the results of other tokens
            for given_norm in (None, norm):
                case = f"{n}x{k}, {tokens} tokens, norm: {given_norm is not None}"
                normed = rms_norm_torch(x, norm.weight, norm.eps) if given_norm else x
                rounds_weights = on_amx and 8 < tokens <= 64 or is_prefill and tokens > 64
                seen = normed if rounds_weights else as_seen(normed, format)
                y = seen.double() @ matrix.T + bias
                step = step_of(normed.nan_to_num(), quantized=seen is not normed)
                step += step_of(normed.nan_to_num(), quantized=False)
                bound = bounds.product_error(seen, magnitude, y, torch.float32, step)
                if rounds_weights and not isinstance(format, EXACT_IN_BF16):
                    bound = bound + bounds.U[dtype] * (seen.double().abs() @ matrix.abs().T)
                ours = w(x, norm=given_norm, residual=residual)
                total = y + residual.double()
                assert ours[4].isnan().all(), case
                others = torch.arange(tokens) != 4
                bound_of_total = bound + bounds.rounding_error(total, dtype)
                bounds.check(ours[others], total[others], bound_of_total[others], case)
                if n % 32 == 0:
                    ours = with_activation(w, "silu", gated=True)(x, norm=given_norm)
                    check_activated(ours[others], "silu", True, y[others], bound[others], True, case)


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("n, k, tokens", [(176, 544, 70), (96, 1032, 131), (64, 520, 600)])
def test_linear_of_a_prompt(format, n, k, tokens):
    """Matmuls with several panels of inputs, several tasks, and a last task of fewer outputs or tokens
    (csrc/prefill_linear.h). With int8 activations: with a second slice of tokens (csrc/linear.h)."""
    is_int8 = quantizes_activations(format, torch.bfloat16)
    if not is_int8 and not load_cpp_kernels().has_prefill_linear(True):
        pytest.skip("this CPU has no instructions for bf16, or AMX")
    torch.manual_seed(0)
    w, norm = make_linear(n, k, format, torch.bfloat16, bias=True), make_norm(k, torch.bfloat16)
    matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
    packed(w).backend = ANY_TOKENS
    x, residual = torch.randn(tokens, k).bfloat16(), torch.randn(tokens, n).bfloat16()
    normed = rms_norm_torch(x, norm.weight, norm.eps)
    seen = as_seen(normed, format)
    y = seen.double() @ matrix.T + w.bias.double()
    step = step_of(normed, quantized=seen is not normed) + step_of(normed, quantized=False)
    bound = bounds.product_error(seen, magnitude, y, torch.float32, step)
    if not isinstance(format, EXACT_IN_BF16) and not is_int8:
        bound = bound + bounds.U[torch.bfloat16] * (normed.double().abs() @ matrix.abs().T)
    bounds.check(w(x, norm=norm, out_dtype=torch.float32), y, bound)
    total = y + residual.double()
    ours = w(x, norm=norm, residual=residual)
    bounds.check(ours, total, bound + bounds.rounding_error(total, torch.bfloat16))
    ours = with_activation(w, "silu", gated=True)(x, norm=norm)
    check_activated(ours, "silu", True, y, bound, fused=n % 32 == 0)


def check_activated(
    ours: torch.Tensor, activation: str, gated: bool, x: torch.Tensor, error: torch.Tensor, fused: bool,
    case: object = "",
):
    """Checks that ours is activate of x, for an x with an error of at most error."""
    if not fused:  # then x is rounded before
        error = error + bounds.rounding_error(x.abs() + error, ours.dtype)
    y, bound = activate_with_error(x, error, activation, gated)
    error = bound + bounds.rounding_error(y.abs() + bound, ours.dtype)
    bounds.check(ours, y, error, f"{activation}, gated: {gated}, {case}")


@built
@pytest.mark.parametrize("format", [Unquantized(), Int4(32)], ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, scale, softcap, clip", EPILOGUES)
def test_linear_scale_and_softcap(format, dtype, n, k, scale, softcap, clip):
    """Scale, softcap and clip come after bias and activation, and before the residual. The results lie where softcap is
    nearly linear, where it bends, and where it is flat."""
    torch.manual_seed(0)
    w = make_linear(n, k, format, dtype, bias=True, out_scale=scale, softcap=softcap, clip=clip)
    matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
    packed(w)
    for rows in (1, 5):
        x, residual = torch.randn(1, rows, k).to(dtype), torch.randn(1, rows, n).to(dtype)
        seen = as_seen(x, format)
        product = seen.double() @ matrix.T + w.bias.double()
        step = step_of(x, quantized=True) if seen is not x else 0.0
        error = bounds.product_error(seen, magnitude, product, torch.float32, step)
        y, bound = softcap_with_error(product, error, scale, softcap, clip)
        bounds.check(w(x, out_dtype=torch.float32), y, bound, rows)
        total = y + residual.double()
        bound = bound + bounds.rounding_error(total, dtype)
        bounds.check(w(x, residual=residual), total, bound, rows)
        if n % 32 == 0:
            activated = activate_with_error(product, error, "gelu_tanh", gated=True)
            y, bound = softcap_with_error(*activated, scale, softcap, clip)
            ours = with_activation(w, "gelu_tanh", gated=True)(x)
            bounds.check(ours, y, bound + bounds.rounding_error(y, dtype), rows)


@pytest.mark.parametrize("n, prepare", [(64, lambda w: w), pytest.param(48, packed, marks=built)])
def test_epilogue_that_no_kernel_fuses(n, prepare):
    """The order is activation, scale, softcap, clip, residual, also in plain PyTorch and where no kernel fuses the
    activation."""
    torch.manual_seed(0)
    w = make_linear(n, 72, Unquantized(), torch.float32, bias=True, out_scale=0.5, softcap=5.0, clip=4.0)
    matrix, bias = w.weight.double(), w.bias.double()
    w, x, residual = prepare(w), torch.randn(1, 3, 72), torch.randn(1, 3, n // 2)
    product = x.double() @ matrix.T + bias
    error = bounds.product_error(x, matrix.abs(), product, torch.float32)
    y, bound = softcap_with_error(*activate_with_error(product, error, "silu", gated=True), 0.5, 5.0, 4.0)
    total = y + residual.double()
    ours = with_activation(w, "silu", gated=True)(x, residual=residual)
    bounds.check(ours, total, bound + bounds.rounding_error(total, torch.float32))


def test_pytorch_applies_every_field_of_epilogue():
    """A new field: compute it in Linear.apply_epilogue, and give it a value here that changes the result."""
    torch.manual_seed(0)
    w, x = make_linear(64, 72, Unquantized(), torch.float32), torch.randn(3, 72)
    values = {"out_scale": 0.5, "softcap": 0.1, "clip": 0.1}
    assert values.keys() | {"activation", "gated"} == {*Epilogue._fields}
    plain = w(x)
    for name, value in values.items():
        w.epilogue = Epilogue(**{name: value})
        assert not torch.equal(w(x), plain)
    activated = with_activation(w, "silu", gated=False)(x)
    assert activated.shape == plain.shape and not torch.equal(activated, plain)
    assert with_activation(w, "silu", gated=True)(x).shape == (3, 32)


def softcap_with_error(
    y: torch.Tensor, error: torch.Tensor, scale: float, softcap: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y * scale, capped and clipped, and its error. error: of y. The slope of softcap never exceeds 1."""
    y = y * scale
    if softcap:
        y = apply_softcap(y, softcap)
    if clip:
        y = y.clamp(-clip, clip)
    return y, error * scale + 2**-20 * y.abs()  # exp is good to 2^-21 or so


@built
def test_softcap_of_extremes():
    """Softcap and clip leave numbers near zero unchanged, limit infinity, and keep NaN."""
    w = packed(make_linear(16, 16, Unquantized(), torch.float32, softcap=30.0))
    w.weight.data = torch.eye(16)
    x = torch.tensor([1e-30, -1e-6, 1e-3, 17.0, -20.0, 1e4, -1e30, 3e38] * 2)[None]
    y = apply_softcap(x.double(), 30.0)
    bounds.check(w(x), y, 2**-20 * y.abs())
    assert w(torch.full((1, 16), torch.nan)).isnan().all()
    w.epilogue = Epilogue(clip=10.0)
    assert torch.equal(w(x), x.clamp(-10, 10))
    assert w(torch.full((1, 16), torch.nan)).isnan().all()


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
def test_a_token_does_not_depend_on_the_tokens_beside_it(format):
    """A row has the same bits in a batch as alone, and in a prompt, if activations are rounded to int8. (AMX and plain
    rows of bf16 sum in another order.)"""
    if load_cpp_kernels().has_amx_bf16():
        pytest.skip("AMX multiplies many tokens")
    torch.manual_seed(0)
    w = packed(make_linear(64, 200, format, torch.bfloat16))
    if not w.is_packed:
        pytest.skip("plain rows of bf16")
    w.backend = ANY_TOKENS
    x = torch.randn(1100, 200).bfloat16()
    alone = torch.cat([w(row) for row in x.split(1)])
    in_prompts = [65, 511, 513, 1100] if quantizes_activations(format, torch.bfloat16) else []
    for num_tokens in (*range(2, 20), 33, 64, *in_prompts):
        assert torch.equal(w(x[:num_tokens]), alone[:num_tokens]), num_tokens


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("rows", [0, 1, 5, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_near_its_reference(format, rows, dtype):
    """The result differs from the weight-only matmul only by the rounding of activations, for every number of rows."""
    torch.manual_seed(0)
    plain = make_linear(96, 200, format, dtype)
    torch.manual_seed(0)
    fast = packed(make_linear(96, 200, format, dtype))
    x = torch.randn(rows, 200).to(dtype)
    expected, ours = plain(x), fast(x)
    assert expected.shape == ours.shape == (rows, 96)
    if rows:
        matrix = plain.dequantize(torch.float32).double()
        exact = x.double() @ matrix.T
        bound = bounds.product_error(x, bounds.magnitudes(plain), exact, dtype)
        bound = bound + bounds.U[dtype] * (x.double().abs() @ matrix.abs().T)  # weights are rounded, too
        if quantizes_activations(format, dtype):
            half_step = x.double().abs().max() / 254  # of an activation; the errors' signs are random
            bound = bound + 5 * half_step * matrix.norm(dim=1)
        bounds.check(ours, exact, bound)


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_packed(format, dtype):
    for n, k in SIZES:
        w = make_linear(n, k, format, dtype)
        expected = w.dequantize(dtype)
        assert torch.equal(packed(w).dequantize(dtype), expected), (n, k)
        packs_unquantized = dtype == torch.bfloat16 and load_cpp_kernels().has_prefill_linear(True)
        assert w.is_packed == (format.is_quantized or packs_unquantized)
    experts = make_linear(48, 72, format, dtype, n_experts=3, kind=ExpertsDown)
    expected, some = experts.dequantize(dtype), torch.tensor([2, 0, 1])
    for _ in range(2):
        assert torch.equal(experts.dequantize(dtype, 1), expected[1])
        assert torch.equal(experts.dequantize_experts(some, dtype), expected[some])
        packed(experts)


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(format, dtype):
    """Results stay within their bounds for weights and scales at the ends of their ranges. Activations that are not
    finite affect only their own row."""
    w = make_linear(32, 64, format, dtype)
    if isinstance(format, Int8):
        w.weight[:8], w.weight[8:16], w.scales[16:20] = -128, 127, 0
    elif isinstance(format, GroupwiseAffine):
        w.weight[:8], w.weight[8:16], w.scales[16:20], w.zeros[20:24], w.zeros[24:28] = 255, 0, 0, 255, 0
    elif isinstance(format, Float8):
        w.weight[:8], w.weight[8:16], w.scales[16:20] = 448, -448, 0
        w.weight[20:32] = (w.weight[20:32].float() * 2.0**-13).to(w.weight.dtype)  # most are subnormal, or 0
    elif isinstance(format, MXFP4):
        w.weight[:8], w.weight[8:16], w.scales[16:20], w.scales[20:24] = 255, 0x77, 0, 1
    matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
    x = torch.randn(2, 64).to(dtype)
    seen = as_seen(x, format)
    packed(w)
    y = seen.double() @ matrix.T
    step = step_of(x, quantized=True) if seen is not x else 0.0
    bounds.check(w(x), y, bounds.product_error(seen, magnitude, y, dtype, step))
    assert not w(torch.zeros(1, 64, dtype=dtype)).any()
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1, 3] = bad
        y = w(x)
        assert y[0].isfinite().all()
        finite = y[1].isfinite()
        assert not finite.all() if isinstance(format, Unquantized) else not finite.any()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_8_and_4_bits(dtype):
    """Every value is exact, dequantized and as a product with one-hot vectors, of few tokens and of many."""
    bytes_of_w = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 2)  # [N, K] of Float8, [N, K / 2] of MXFP4
    float8 = torch.where(bytes_of_w % 128 == 127, 0, bytes_of_w).view(torch.float8_e4m3fn)  # but no NaN
    ones = torch.full((16, 1), 127, dtype=torch.uint8)
    for format, k, tensors in [
        (Float8(), 32, {"weight": float8, "scales": torch.full((16, 1), 0.25)}),
        (MXFP4(), 64, {"weight": bytes_of_w, "scales": torch.cat([ones, ones + 1], 1)}),
    ]:
        w = make_linear(16, k, format, dtype)
        for name, tensor in tensors.items():
            w.set_tensor(name, tensor)
        matrix = w.dequantize(dtype)
        packed(w)
        assert torch.equal(w.dequantize(dtype), matrix)
        for x in torch.eye(k, dtype=dtype).split([1, 2, 8, k - 11]):
            assert torch.equal(w(127 * x), (127 * x.float() @ matrix.float().T).to(dtype))


class Unknown(Int8):
    """A format without a C++ struct, as every new class is at first."""


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_format_without_a_struct(dtype):
    """Its weights are dequantized, and the kernels multiply the result."""
    torch.manual_seed(0)
    w, embedding = make_linear(48, 72, Unknown(), dtype), make_embedding(48, 72, Unknown(), dtype)
    matrix, rows = w.dequantize(dtype), embedding.dequantize(dtype)
    unquantized = packed(set_weight(Linear(72, 48), matrix.clone(), Unquantized()))
    pack_weights([w, embedding], dtype)
    assert w.backend.name == embedding.backend.name == "cpu"
    w.backend, x, tokens = CPU_BACKEND, torch.randn(1, 3, 72).to(dtype), torch.tensor([[3, 47]])
    assert torch.equal(w.dequantize(dtype), matrix)
    assert torch.equal(w(x), unquantized(x))
    assert torch.equal(embedding.embedding(tokens, 1.0, dtype), rows[tokens])


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_operations(dtype):
    """add and activate give the same bits as PyTorch, or nearly so where an exponential is computed."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 37).to(dtype), torch.randn(2, 3, 37).to(dtype)
    assert torch.equal(add(x, y, CPU_BACKEND), x + y)
    gate_up = torch.randn(2, 3, 74).to(dtype) * 5
    gate_up[..., :4] = torch.tensor([0, -7, 200, -200])  # of gate
    gate_up[..., 37:41] /= 25  # up, since float16 ends at 65504
    gates = torch.linspace(-20, 20, 20_001).to(dtype)  # where every activation bends, and far beyond
    for t in (gate_up, torch.cat([gates, torch.ones_like(gates)])):
        no_error = torch.zeros(t.shape, dtype=torch.float64)
        for activation, gated in itertools.product(ACTIVATIONS, (False, True)):
            ours = activate(t, activation, gated, CPU_BACKEND)
            check_activated(ours, activation, gated, t.double(), no_error, fused=True)
            assert activate(gate_up * torch.nan, activation, gated, CPU_BACKEND).isnan().all()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_inputs(dtype):
    """permute_inputs is exact: for all inputs in another order, and for some of the inputs, which a rank gathers."""
    torch.manual_seed(0)
    for num_tokens, k, n in [(1, 5, 5), (3, 72, 72), (64, 70, 33), (65, 70, 33)]:  # the last in PyTorch
        x, order = torch.randn(1, num_tokens, k).to(dtype), torch.randperm(k)[:n]
        assert torch.equal(permute_inputs(x, order.int(), CPU_BACKEND), x[..., order])
    x = torch.zeros(1, 2, 8).to(dtype)
    for order in (torch.tensor([0, 8]).int(), torch.tensor([-1]).int(), torch.tensor([0, 1]), torch.zeros(1, 2).int()):
        with pytest.raises(RuntimeError, match="input_order"):
            permute_inputs(x, order, CPU_BACKEND)


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
def test_embed(dtype, format):
    """embed gives the same bits as PyTorch, for any number of tokens, even if the last group of a row is short."""
    torch.manual_seed(0)
    for k in (37,) if isinstance(format, Unquantized) else (64, 72):
        check_embed(make_embedding(50, k, format, dtype), dtype)
    if isinstance(format, Unquantized):
        check_embed(make_linear(50, 72, format, dtype), dtype)  # a head that is the embedding, too


def check_embed(table, dtype):
    (on_kernels,) = packed(torch.nn.ModuleList([copy.deepcopy(table)]))
    assert on_kernels.backend.name == "cpu"
    for query_len, scale in [(3, 1.0), (3, 48**0.5), (100, 1.0), (0, 1.0)]:
        tokens = torch.randint(50, (2, query_len))
        expected = table.embedding(tokens, scale, dtype)
        assert torch.equal(on_kernels.embedding(tokens, scale, dtype), expected)
    with pytest.raises(RuntimeError, match="vocabulary"):
        on_kernels.embedding(torch.tensor([[50]]), 1.0, dtype)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    torch.manual_seed(0)
    for k in (5, 37, 576):
        norm = make_norm(k, dtype)
        norm.backend = CPU_BACKEND
        for rows in (1, 3, 8, 17, 65):  # any number
            x, residual = (torch.randn(1, rows, k) * 3).to(dtype), torch.randn(1, rows, k).to(dtype)
            exact = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
            # The sum of squares, and the rounding before the product with the weight
            bound = ((k + 8) * bounds.U[torch.float32] + bounds.U[dtype]) * exact.abs() + bounds.SMALLEST[dtype]
            bound = bound + bounds.rounding_error(exact, dtype)
            bounds.check(norm(x), exact, bound, (k, rows))
            total = exact + residual.double()
            bounds.check(norm(x, residual), total, bound + bounds.rounding_error(total, dtype), (k, rows))
    with pytest.raises(RuntimeError, match="shape"):
        norm(x[:, :2], residual[:, :1])

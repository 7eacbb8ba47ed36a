"""kernels/csrc/ against its PyTorch references: odd shapes, every format, on what this CPU has and without it."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from config import ACTIVATIONS, ModelConfig
from kernels import prepare, reference
from kernels.formats import MXFP4, Dense, Float8, Int4, Int8
from kernels.formats.integers import GroupedFormat
from kernels.params import LayerCache, WeightMatrix
from layers import ExpertsDown, ExpertsGateUp, Linear
from model import FeedForward
from rope import alibi_slopes, rope_table
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.exact_results import (
    CPU_FORMATS,
    DTYPES,
    attend,
    exact_attention,
    exact_cache,
    format_label,
    glu_with_error,
    make_embedding,
    make_linear,
    make_norm,
)
from tests.compiler import write_compiler
from tests.tiny import ROOT

SIZES = [(16, 32), (5, 8), (48, 72), (100, 576), (33, 1544), (32, 8)]  # N, K: not only multiples of the blocks
built = pytest.mark.skipif(kernels.cpu.find_compiler() is None, reason="no C++ compiler")


def packed(module):
    """module on the kernels, for as many tokens as these can take."""
    layers = [layer for layer in module.modules() if isinstance(layer, WeightMatrix)]
    kernels.prepare_kernels(layers, torch.float32)
    for layer in layers:
        if isinstance(layer, Linear):
            assert layer.backend == "cpu" and 8 <= layer.max_tokens <= kernels.MAX_CPU_TOKENS
            layer.max_tokens = kernels.MAX_CPU_TOKENS
    return module


def rounded_activations(x: torch.Tensor) -> torch.Tensor:
    """What the kernels of 8- and 4-bit weights make of 16-bit activations: int8 in groups of 8."""
    groups = x.float().unflatten(-1, (-1, 8))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.clamp(min=1e-30)).round() * scale).flatten(-2)


def rounds_activations(format, dtype: torch.dtype) -> bool:
    return isinstance(format, Int8 | GroupedFormat | MXFP4) and dtype != torch.float32


def as_seen(x: torch.Tensor, format) -> torch.Tensor:
    """x as a product with weights of this format takes it."""
    return rounded_activations(x) if rounds_activations(format, x.dtype) else x


@pytest.fixture(autouse=True, params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# ---- Products -------------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(format, dtype):
    torch.manual_seed(0)
    for n, k in SIZES:
        w = make_linear(n, k, format, dtype, bias=n % 2 == 0)
        matrix, magnitude = w.dequantized_weight(torch.float32).double(), bounds.magnitudes(w)
        bias = 0 if w.bias is None else w.bias.double()
        packed(w)
        norm = make_norm(k, dtype)
        for rows in (1, 2, 5, 8):
            x, residual = torch.randn(1, rows, k).to(dtype), torch.randn(1, rows, n).to(dtype)
            normed = reference.rms_norm(x, norm)
            seen = as_seen(normed, format)
            y = seen.double() @ matrix.T + bias
            step = bounds.step_of(normed, quantized=seen is not normed) + bounds.step_of(normed, quantized=False)
            wide_bound = bounds.product_error(seen, magnitude, y, torch.float32, step)
            bounds.check(kernels.fused_linear(x, w, norm, out_dtype=torch.float32), y, wide_bound)
            bounds.check(kernels.fused_linear(x, w, norm), y, wide_bound + bounds.rounding_error(y, dtype))
            total = y + residual.double()
            ours = kernels.fused_linear(x, w, norm, residual)
            bounds.check(ours, total, wide_bound + bounds.rounding_error(total, dtype))
            if n % 2 == 0:
                for activation in ACTIVATIONS:
                    ours = kernels.fused_linear(x, w, norm, activation=activation)
                    check_glu(ours, activation, y, wide_bound, fused=n % 32 == 0)


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_many_tokens(format, dtype):
    """In several blocks of tokens, or on AMX, if the CPU has it. There bfloat16 activations are not rounded, but
    weights whose scales are those of groups are."""
    torch.manual_seed(0)
    on_amx = dtype == torch.bfloat16 and kernels.cpu.library().has_amx_bf16()
    odd = [(21, 37)] if isinstance(format, Dense) else []  # quantized, K must be a multiple of 8
    for n, k in [(33, 72), (64, 200), *odd]:
        w, norm = make_linear(n, k, format, dtype, bias=n % 2 == 0), make_norm(k, dtype)
        matrix, magnitude = w.dequantized_weight(torch.float32).double(), bounds.magnitudes(w)
        bias = 0 if w.bias is None else w.bias.double()
        packed(w)
        for tokens in (6, 9, 15, 16, 17, 33, 64):
            x, residual = torch.randn(tokens, k).to(dtype), torch.randn(tokens, n).to(dtype)
            x[2], x[4, 1] = 0, torch.nan  # neither changes another token's result
            for given_norm in (None, norm):
                normed = reference.rms_norm(x, norm) if given_norm else x
                seen = normed if on_amx and tokens > 8 else as_seen(normed, format)
                y = seen.double() @ matrix.T + bias
                step = bounds.step_of(normed.nan_to_num(), quantized=seen is not normed)
                step += bounds.step_of(normed.nan_to_num(), quantized=False)
                bound = bounds.product_error(seen, magnitude, y, torch.float32, step)
                if on_amx and isinstance(format, GroupedFormat):
                    bound = bound + bounds.U[dtype] * (seen.double().abs() @ matrix.abs().T)
                ours = kernels.fused_linear(x, w, given_norm, residual)
                total = y + residual.double()
                assert ours[4].isnan().all()
                others = torch.arange(tokens) != 4
                bounds.check(ours[others], total[others], (bound + bounds.rounding_error(total, dtype))[others])
                if n % 32 == 0:
                    ours = kernels.fused_linear(x, w, given_norm, activation="swiglu")
                    check_glu(ours[others], "swiglu", y[others], bound[others], fused=True)
    with pytest.raises(RuntimeError, match="1 to 64"):
        arguments = w.kernel_arguments()
        x = torch.zeros(65, k, dtype=dtype)
        torch.ops.gptfast.fused_linear(x, *arguments, None, None, 0, None, 0, 1, 0, 0, False)


def check_glu(ours: torch.Tensor, activation: str, gate_up: torch.Tensor, error: torch.Tensor, fused: bool):
    """ours is activation(gate) * up of a gate_up that is off by no more than error."""
    if not fused:  # then gate and up are rounded before
        error = error + bounds.rounding_error(gate_up.abs() + error, ours.dtype)
    y, bound = glu_with_error(gate_up, error, activation)
    bounds.check(ours, y, bound + bounds.rounding_error(y.abs() + bound, ours.dtype))


@built
@pytest.mark.parametrize("format", [Dense(), Int4(32)], ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_scale_and_softcap(format, dtype):
    """After bias and activation, before the residual: of results that softcap leaves alone, bends, and cuts off; and
    clip after them."""
    torch.manual_seed(0)
    for n, k, scale, softcap, clip in [
        (33, 72, 0.25, 0.0, 0.0), (64, 72, 0.03, 5.0, 0.0), (33, 72, 1.0, 5.0, 0.0), (64, 8, 1e-3, 30.0, 0.0),
        (33, 72, 1.0, 0.0, 6.0), (64, 72, 0.5, 5.0, 4.0),
    ]:  # fmt: skip
        w = make_linear(n, k, format, dtype, bias=True, out_scale=scale, softcap=softcap, clip=clip)
        matrix, magnitude = w.dequantized_weight(torch.float32).double(), bounds.magnitudes(w)
        packed(w)
        for rows in (1, 5):
            x, residual = torch.randn(1, rows, k).to(dtype), torch.randn(1, rows, n).to(dtype)
            seen = as_seen(x, format)
            product = seen.double() @ matrix.T + w.bias.double()
            step = bounds.step_of(x, quantized=True) if seen is not x else 0.0
            error = bounds.product_error(seen, magnitude, product, torch.float32, step)
            y, bound = softcap_error(product, error, scale, softcap, clip)
            bounds.check(kernels.fused_linear(x, w, out_dtype=torch.float32), y, bound)
            total = y + residual.double()
            bound = bound + bounds.rounding_error(total, dtype)
            bounds.check(kernels.fused_linear(x, w, residual=residual), total, bound)
            if n % 32 == 0:
                y, bound = softcap_error(*glu_with_error(product, error, "geglu_tanh"), scale, softcap, clip)
                ours = kernels.fused_linear(x, w, activation="geglu_tanh")
                bounds.check(ours, y, bound + bounds.rounding_error(y, dtype))


def softcap_error(
    y: torch.Tensor, error: torch.Tensor, scale: float, softcap: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y * scale, capped and clipped, and how far it may be off if y is off by no more than error. No slope of cap's is
    above 1."""
    y = y * scale
    if softcap:
        y = reference.apply_softcap(y, softcap)
    if clip:
        y = y.clamp(-clip, clip)
    return y, error * scale + 2**-20 * y.abs()  # exp is good to 2^-21 or so


@built
def test_softcap_of_extremes():
    """Close to zero, a cap or clip changes nothing; infinity it cuts off; and NaN stays NaN."""
    w = packed(make_linear(16, 16, Dense(), torch.float32, softcap=30.0))
    w.weight.data = torch.eye(16)
    x = torch.tensor([1e-30, -1e-6, 1e-3, 17.0, -20.0, 1e4, -1e30, 3e38] * 2)[None]
    y = reference.apply_softcap(x.double(), 30.0)
    bounds.check(kernels.fused_linear(x, w), y, 2**-20 * y.abs())
    assert kernels.fused_linear(torch.full((1, 16), torch.nan), w).isnan().all()
    w.softcap, w.clip = 0.0, 10.0
    assert torch.equal(kernels.fused_linear(x, w), x.clamp(-10, 10))
    assert kernels.fused_linear(torch.full((1, 16), torch.nan), w).isnan().all()


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("rows", [0, 1, 5, 64, 65])
def test_linear_near_its_reference(format, rows):
    """Within the rounding of activations of the weight-only product, whichever path the number of rows takes."""
    for dtype in DTYPES:
        torch.manual_seed(0)
        plain = make_linear(96, 200, format, dtype)
        torch.manual_seed(0)
        fast = packed(make_linear(96, 200, format, dtype))
        x = torch.randn(rows, 200).to(dtype)
        expected, ours = kernels.fused_linear(x, plain), kernels.fused_linear(x, fast)
        assert expected.shape == ours.shape == (rows, 96)
        if rows:
            matrix = plain.dequantized_weight(torch.float32).double()
            exact = x.double() @ matrix.T
            bound = bounds.product_error(x, bounds.magnitudes(plain), exact, dtype)
            bound = bound + bounds.U[dtype] * (x.double().abs() @ matrix.abs().T)  # weights are rounded, too
            if rounds_activations(format, dtype):
                half_step = x.double().abs().max() / 254  # of an activation; the errors' signs are random
                bound = bound + 5 * half_step * matrix.norm(dim=1)
            bounds.check(ours, exact, bound)


@pytest.mark.parametrize("format", CPU_FORMATS[1:], ids=format_label)
@pytest.mark.parametrize("n_experts", [None, 3])
def test_packing_is_undone_exactly(format, n_experts):
    for n, k in SIZES:
        before = make_linear(n, k, format, torch.float32, n_experts).tensors()
        after = format.unpack(format.pack(before, "cpu"), "cpu", n, k)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@built
@pytest.mark.parametrize("format", CPU_FORMATS[1:], ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_packed(format, dtype):
    for n, k in SIZES:
        w = make_linear(n, k, format, dtype)
        expected = w.dequantized_weight(dtype)
        assert torch.equal(packed(w).dequantized_weight(dtype), expected)
    experts = make_linear(48, 72, format, dtype, n_experts=3, kind=ExpertsDown)
    expected = experts.dequantized_weight(dtype)
    packed(experts)
    assert torch.equal(experts.dequantized_weight(dtype), expected)
    assert torch.equal(experts.dequantized_weight(dtype, 1), expected[1])
    some = torch.tensor([[2, 0], [1, 2]])
    assert torch.equal(experts.dequantized_weight(dtype, some), expected[some])


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
def test_extremes(format):
    """Weights and scales at the ends of their ranges, and activations that are not finite."""
    for dtype in DTYPES:
        w = make_linear(32, 64, format, dtype)
        if isinstance(format, Int8):
            w.weight[:8], w.weight[8:16], w.scales[16:20] = -128, 127, 0
        elif isinstance(format, GroupedFormat):
            w.weight[:8], w.weight[8:16], w.scales[16:20], w.zeros[20:24], w.zeros[24:28] = 255, 0, 0, 255, 0
        elif isinstance(format, Float8):
            w.weight[:8], w.weight[8:16], w.scales[16:20] = 448, -448, 0
            w.weight[20:32] = (w.weight[20:32].float() * 2.0**-13).to(w.weight.dtype)  # most are subnormal, or 0
        elif isinstance(format, MXFP4):
            w.weight[:8], w.weight[8:16], w.scales[16:20], w.scales[20:24] = 255, 0x77, 0, 1
        matrix, magnitude = w.dequantized_weight(torch.float32).double(), bounds.magnitudes(w)
        x = torch.randn(2, 64).to(dtype)
        seen = as_seen(x, format)
        packed(w)
        y = seen.double() @ matrix.T
        step = bounds.step_of(x, quantized=True) if seen is not x else 0.0
        bounds.check(kernels.fused_linear(x, w), y, bounds.product_error(seen, magnitude, y, dtype, step))
        assert not kernels.fused_linear(torch.zeros(1, 64, dtype=dtype), w).any()
        for bad in (torch.nan, torch.inf, -torch.inf):
            x[1, 3] = bad
            y = kernels.fused_linear(x, w)
            assert y[0].isfinite().all()
            finite = y[1].isfinite()
            assert not finite.all() if isinstance(format, Dense) else not finite.any()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_of_8_and_4_bits(dtype):
    """Exactly, as a matrix and as a product with one-hot vectors, of few tokens and of many."""
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
        matrix = w.dequantized_weight(dtype)
        packed(w)
        assert torch.equal(w.dequantized_weight(dtype), matrix)
        for x in torch.eye(k, dtype=dtype).split([1, 2, 8, k - 11]):
            assert torch.equal(kernels.fused_linear(127 * x, w), (127 * x.float() @ matrix.float().T).to(dtype))


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_operations(dtype):
    """add and glu are their references to the last bit, or for glu's exponential nearly."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 37).to(dtype), torch.randn(2, 3, 37).to(dtype)
    assert torch.equal(kernels.add(x, y, "cpu"), x + y)
    gate_up = torch.randn(2, 3, 74).to(dtype) * 5
    gate_up[..., :4] = torch.tensor([0, -7, 200, -200])  # of gate
    gates = torch.linspace(-20, 20, 20_001).to(dtype)  # where every activation bends, and far beyond
    for t in (gate_up, torch.cat([gates, torch.ones_like(gates)])):
        no_error = torch.zeros(t.shape, dtype=torch.float64)
        for activation in ACTIVATIONS:
            check_glu(kernels.glu(t, activation, "cpu"), activation, t.double(), no_error, fused=True)
    for activation in ACTIVATIONS:
        assert kernels.glu(gate_up * torch.nan, activation, "cpu").isnan().all()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_inputs(dtype):
    """To the last bit: all inputs in another order, and some of them, as a rank of several gathers."""
    torch.manual_seed(0)
    for n_tokens, k, n in [(1, 5, 5), (3, 72, 72), (64, 70, 33), (65, 70, 33)]:  # the last in PyTorch
        x, order = torch.randn(1, n_tokens, k).to(dtype), torch.randperm(k)[:n]
        assert torch.equal(kernels.gather_inputs(x, order.int(), "cpu"), x[..., order])
    x = torch.zeros(1, 2, 8).to(dtype)
    for order in (torch.tensor([0, 8]).int(), torch.tensor([-1]).int(), torch.tensor([0, 1]), torch.zeros(1, 2).int()):
        with pytest.raises(RuntimeError, match="input_order"):
            kernels.gather_inputs(x, order, "cpu")


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype):
    """To the last bit its reference, for any number of tokens, also where a row's last group is short."""
    torch.manual_seed(0)
    for format in CPU_FORMATS:
        for k in (37,) if isinstance(format, Dense) else (64, 72):
            table = make_embedding(50, k, format, dtype)
            (on_kernels,) = packed(torch.nn.ModuleList([copy.deepcopy(table)]))
            assert on_kernels.backend == "cpu"
            for n_tokens, scale in [(3, 1.0), (3, 48**0.5), (100, 1.0), (0, 1.0)]:
                tokens = torch.randint(50, (2, n_tokens))
                expected = reference.embed(tokens, table, scale, dtype)
                assert torch.equal(kernels.embed(tokens, on_kernels, scale, dtype), expected)
            with pytest.raises(RuntimeError, match="vocabulary"):
                kernels.embed(torch.tensor([[50]]), on_kernels, 1.0, dtype)


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    torch.manual_seed(0)
    for k in (5, 37, 576):
        norm = make_norm(k, dtype)
        for rows in (1, 3, 8, 17, 65):  # any number
            x, residual = (torch.randn(1, rows, k) * 3).to(dtype), torch.randn(1, rows, k).to(dtype)
            exact = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
            # The sum of squares, and the rounding before the product with the weight
            bound = ((k + 8) * bounds.U[torch.float32] + bounds.U[dtype]) * exact.abs() + bounds.SMALLEST[dtype]
            bound = bound + bounds.rounding_error(exact, dtype)
            bounds.check(norm(x, backend="cpu"), exact, bound)
            total = exact + residual.double()
            bounds.check(norm(x, residual, "cpu"), total, bound + bounds.rounding_error(total, dtype))
    with pytest.raises(RuntimeError, match="shape"):
        norm(x[:, :2], residual[:, :1], "cpu")


# ---- Attention ------------------------------------------------------------------------------------------------------


def check_attention(starts, n_tokens, n_heads, cache: LayerCache, window, norms, **options):
    """Of so many new tokens in each sequence, at the positions starts. The cache holds NaN where nothing has been
    written yet; afterwards the new tokens' keys and values are where they belong, and nothing else has changed."""
    (_, n_kv_heads, _, d), dtype = cache.k.shape, cache.k.dtype
    start_pos = torch.tensor(starts)
    qkv = torch.randn(len(starts), n_tokens, (n_heads + 2 * n_kv_heads) * d).to(dtype)
    before = cache._replace(k=cache.k.clone(), v=cache.v.clone())
    ours = attend(qkv, cache, start_pos, n_heads, "cpu", window, *norms, **options)
    bounds.check(ours, *exact_attention(qkv, before, start_pos, n_heads, window, norms, factor=dtype, **options))
    k, v, k_error = exact_cache(qkv, before, start_pos, n_heads, norms)
    bounds.check(cache.k.nan_to_num(9), k.nan_to_num(9), k_error)
    assert torch.equal(cache.v.nan_to_num(9), v.nan_to_num(9))


def make_cache(starts, n_kv_heads, d, dtype, rope, alibi=None) -> LayerCache:
    """As long as rope, with sequences of so many tokens."""
    k, v = torch.randn(2, len(starts), n_kv_heads, len(rope), d).to(dtype).unbind()
    for b, start in enumerate(starts):
        k[b, :, start:], v[b, :, start:] = torch.nan, torch.nan
    return LayerCache(k, v, rope, alibi)


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(4, 4, 8), (9, 3, 64), (8, 1, 128), (2, 1, 256), (6, 2, 40)])
@pytest.mark.parametrize("window", [0, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(n_heads, n_kv_heads, d, window, dtype):
    """Rows at positions of their own, in a cache that holds NaN where nothing has been written yet."""
    torch.manual_seed(0)
    config = ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024)
    rope = rope_table(config, 640)
    for qk_norm in (False, True):
        norms = [make_norm(d, dtype) if qk_norm else None for _ in "qk"]
        for tokens, starts in [(1, [0]), (1, [600]), (1, [255, 3, 639]), (4, [3, 510]), (8, [509]), (8, [0])]:
            check_attention(starts, tokens, n_heads, make_cache(starts, n_kv_heads, d, dtype, rope), window, norms)


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(9, 3, 64), (2, 1, 256), (6, 2, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_many_tokens(n_heads, n_kv_heads, d, dtype):
    """In one sequence or in many, and with larger chunks of keys than few tokens have."""
    torch.manual_seed(0)
    rope = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 4096), 1400)
    for window, tokens, starts in [
        (0, 9, [510]), (0, 64, [0]), (0, 33, [1340]), (300, 7, [0, 1390, 3, 600]), (0, 1, list(range(0, 1020, 60))),
    ]:  # fmt: skip
        cache = make_cache(starts, n_kv_heads, d, dtype, rope)
        check_attention(starts, tokens, n_heads, cache, window, norms=(None, None))


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(4, 4, 8), (9, 3, 64), (2, 1, 256), (6, 2, 40)])
@pytest.mark.parametrize("norm", ["no norm", "norm of heads", "norm of all heads"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_sinks_scale_softcap(n_heads, n_kv_heads, d, norm, dtype):
    """Each alone and together, and with ALiBi. sinks: far below the scores, among them, and far above."""
    torch.manual_seed(0)
    rope = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024), 640)
    widths = {"no norm": None, "norm of heads": (d, d), "norm of all heads": (n_heads * d, n_kv_heads * d)}[norm]
    norms = [None, None] if widths is None else [make_norm(width, dtype) for width in widths]
    sinks = (torch.randn(n_heads) * 4 + 2).to(dtype)
    sinks[:2] = torch.tensor([-200, 200])
    slopes = torch.tensor(alibi_slopes(n_heads))
    for window, options, alibi in [
        (0, {"sinks": sinks}, None), (0, {"scale": 0.3}, None), (7, {"softcap": 2.0}, None), (0, {}, slopes),
        (300, {"sinks": sinks, "scale": 0.3, "softcap": 5.0}, slopes),
    ]:  # fmt: skip
        for tokens, starts in [(1, [0]), (1, [255, 3, 639]), (4, [3, 510])]:
            cache = make_cache(starts, n_kv_heads, d, dtype, rope, alibi)
            check_attention(starts, tokens, n_heads, cache, window, norms, **options)


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(9, 3, 64), (6, 2, 40)])
@pytest.mark.parametrize("norm", ["no norm", "norm of heads", "norm of all heads"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_prompt(n_heads, n_kv_heads, d, norm, dtype, monkeypatch):
    """Of more tokens than the kernel takes. One of another kind rotates them and writes the cache, PyTorch attends."""
    torch.manual_seed(0)
    monkeypatch.setattr(reference, "EAGER_QUERIES", 30)
    rope = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024), 180)
    widths = {"no norm": None, "norm of heads": (d, d), "norm of all heads": (n_heads * d, n_kv_heads * d)}[norm]
    norms = [None, None] if widths is None else [make_norm(width, dtype) for width in widths]
    for window, options in [(0, {}), (20, {}), (20, {"sinks": torch.randn(n_heads).to(dtype)})]:
        for starts in ([0, 0], [5, 110]):
            k, v = torch.randn(2, 2, n_kv_heads, 180, d).to(dtype).unbind()
            cache, start_pos = LayerCache(k, v, rope), torch.tensor(starts)
            before = cache._replace(k=k.clone(), v=v.clone())
            qkv = torch.randn(2, 70, (n_heads + 2 * n_kv_heads) * d).to(dtype)
            ours = attend(qkv, cache, start_pos, n_heads, "cpu", window, *norms, **options)
            y, bound = exact_attention(qkv, before, start_pos, n_heads, window, norms, factor=dtype, **options)
            bounds.check(ours, y, bound + 4 * bounds.U[dtype] * v.double().abs().max())  # PyTorch rounds weights too
            exact_k, exact_v, k_error = exact_cache(qkv, before, start_pos, n_heads, norms)
            bounds.check(k, exact_k, k_error)
            assert torch.equal(v, exact_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reference(dtype):
    """The PyTorch version against the same exact result, also of more tokens than the kernels take."""
    torch.manual_seed(0)
    rope = rope_table(ModelConfig(64, 1, 6, 2, 16, 64, 64, 1024), 64)
    for tokens, starts, window in [(1, [5, 63], 0), (20, [0, 0], 0), (20, [0, 0], 6), (20, [44, 3], 9), (64, [0], 100)]:
        start_pos, qkv = torch.tensor(starts), torch.randn(len(starts), tokens, 10 * 16).to(dtype)
        k, v = torch.randn(2, len(starts), 2, 64, 16).to(dtype).unbind()
        cache = LayerCache(k, v, rope)
        y, bound = exact_attention(qkv, cache, start_pos, 6, window, (None, None), factor=dtype)
        ours = attend(qkv, cache, start_pos, 6, "torch", window)
        bounds.check(ours, y, bound + 4 * bounds.U[dtype] * v.double().abs().max())  # SDPA rounds weights too


def test_attention_reference_sinks_scale_softcap():
    torch.manual_seed(0)
    rope = rope_table(ModelConfig(64, 1, 6, 2, 16, 64, 64, 1024), 64)
    norms = [make_norm(6 * 16, torch.float32), make_norm(2 * 16, torch.float32)]
    slopes, everything = torch.tensor(alibi_slopes(6)), {"sinks": torch.randn(6), "scale": 0.3, "softcap": 2.0}
    for options, alibi in [
        ({"scale": 0.3}, None), ({"sinks": torch.randn(6)}, None), ({}, slopes), (everything, slopes),
    ]:  # fmt: skip
        for tokens, starts, window in [(1, [5, 63], 0), (20, [0, 0], 6), (64, [0], 100)]:
            start_pos, qkv = torch.tensor(starts), torch.randn(len(starts), tokens, 10 * 16)
            k, v = torch.randn(2, len(starts), 2, 64, 16).unbind()
            cache = LayerCache(k, v, rope, alibi)
            y, bound = exact_attention(qkv, cache, start_pos, 6, window, norms, factor=torch.float32, **options)
            ours = attend(qkv, cache, start_pos, 6, "torch", window, *norms, **options)
            bounds.check(ours, y, bound + 4 * bounds.U[torch.float32] * v.double().abs().max())


@built
def test_what_does_not_fit_is_refused():
    """An error, not a write beyond the cache."""
    rope, weight = rope_table(ModelConfig(64, 1, 4, 2, 16, 48, 64, 64), 8), torch.zeros(1, 2, 8, 16)
    cache = LayerCache(weight, weight.clone(), rope)
    for rows, tokens, start_pos in [(2, 1, [0]), (1, 1, [8]), (1, 1, [-1]), (1, 2, [7]), (1, 1, [0, 1])]:
        with pytest.raises(RuntimeError, match="no room"):
            attend(torch.randn(rows, tokens, 128), cache, torch.tensor(start_pos), 4, "cpu")
    with pytest.raises(RuntimeError, match="int64"):
        attend(torch.randn(1, 1, 128), cache, torch.zeros(1, dtype=torch.int32), 4, "cpu")
    with pytest.raises(RuntimeError, match="type"):
        attend(torch.randn(1, 1, 128).half(), cache, torch.zeros(1, dtype=torch.long), 4, "cpu")
    for norms, sinks, said in [
        ((64, 16), 4, "wide"), ((16, 32), 4, "wide"), ((48, 32), 4, "wide"), ((64, 32), 3, r"\[H\]"),
    ]:  # fmt: skip
        q_norm, k_norm = (make_norm(width, torch.float32) for width in norms)
        with pytest.raises(RuntimeError, match=said):
            attend(
                torch.randn(1, 1, 128), cache, torch.zeros(1, dtype=torch.long), 4, "cpu", 0, q_norm, k_norm,
                torch.zeros(sinks),
            )  # fmt: skip
    for slopes in (torch.zeros(3), torch.zeros(4).half()):
        with pytest.raises(RuntimeError, match="slopes"):
            view = cache._replace(alibi_slopes=slopes)
            attend(torch.randn(1, 1, 128), view, torch.zeros(1, dtype=torch.long), 4, "cpu")


def test_every_check_says_what_is_wrong():
    """In C++, with four words or more; or with the message of find_error."""
    code = "".join(path.read_text() for path in kernels.cpu.SOURCES.iterdir())
    checks = [text.partition(");")[0] for text in code.split("STD_TORCH_CHECK(")[1:]]
    bare = [check for check in checks if not re.search(r'"(\S+ ){3,}\S+"$', check)]
    assert len(checks) > 20 and bare == ['!error, error ? error : ""']


# ---- Feed-forward ---------------------------------------------------------------------------------------------------


def check_near(ours: torch.Tensor, expected: torch.Tensor, format):
    """Two products deep: a few roundings of the type, and where activations are quantized, of theirs to 8 bits (half a
    step of 1/127 of a group's largest, some three times the others: 0.7 % of an activation, twice)."""
    error = (ours.double() - expected.double()).norm() / expected.double().norm()
    assert error < (3e-2 if rounds_activations(format, ours.dtype) else 16 * bounds.U[ours.dtype])


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward(format, dtype):
    torch.manual_seed(0)
    for ffn_dim, bias in [(48, False), (48, True), (40, True)]:  # the last is not whole blocks of gate and up
        config, norm = ModelConfig(64, 1, 4, 2, 16, ffn_dim, 64, 64, ffn_bias=bias), make_norm(64, dtype)
        f = FeedForward(config)
        f.gate_up_proj = make_linear(2 * ffn_dim, 64, format, dtype, bias=bias)
        f.down_proj = make_linear(64, ffn_dim, format, dtype, bias=bias)
        xs = [torch.randn(1, rows, 64).to(dtype) for rows in (1, 3, 8)]
        expected = [f(x, norm, x) for x in xs]
        packed(f)
        for x, y in zip(xs, expected, strict=True):
            check_near(f(x, norm, x), y, format)


@built
@pytest.mark.parametrize("format", CPU_FORMATS, ids=format_label)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(format, dtype):
    torch.manual_seed(0)
    for ffn_dim, bias, activation in [
        (48, False, "swiglu"), (40, False, "swiglu"), (48, True, "clamped_swiglu"), (40, True, "geglu_tanh"),
    ]:  # fmt: skip
        norm = make_norm(64, dtype)
        gate_up = make_linear(2 * ffn_dim, 64, format, dtype, n_experts=6, bias=bias, kind=ExpertsGateUp)
        down = make_linear(64, ffn_dim, format, dtype, n_experts=6, bias=bias, kind=ExpertsDown)
        cases = []
        for rows in (1, 3, 8, 33, 64, 65):  # the last goes to PyTorch, from packed weights
            x = torch.randn(1, rows, 64).to(dtype)
            topk_weights, topk_ids = reference.route(torch.randn(1, rows, 6) * 2, 3, True)
            if rows == 64:  # more than 64 times the same expert
                topk_ids[:, :40] = 5
            hidden = gate_up(x, topk_ids, norm, activation)
            cases.append((x, topk_weights, topk_ids, hidden, down(hidden, topk_ids, topk_weights, x)))
        packed(gate_up), packed(down)
        for x, topk_weights, topk_ids, hidden, expected in cases:
            ours = gate_up(x, topk_ids, norm, activation)
            check_near(ours, hidden, format)
            check_near(down(ours, topk_ids, topk_weights, x), expected, format)
            check_near(down(ours, topk_ids, topk_weights), (expected.double() - x.double()), format)


@built
@pytest.mark.parametrize("vocab_size", [1, 15, 17, 511, 513, 5000, 49152])
def test_likeliest_token(vocab_size):
    """As PyTorch's argmax: of tied tokens the first, -1 where a logit is not finite, wherever these are."""
    assert kernels.cpu.library()
    logits = torch.randn(70, vocab_size, generator=torch.Generator().manual_seed(0))
    for i in range(10):
        logits[i, [i * vocab_size // 10, -1]] = 9.0  # ties, in two parts of the vocabulary
    logits[10], logits[11], logits[12] = 0.0, -3e38, -0.0
    logits[12, -1] = 0.0  # equal to -0.0
    for i, value in enumerate([torch.nan, torch.inf, -torch.inf] * 3):
        logits[20 + i, [0, vocab_size // 2, -1][i // 3]] = value
    expected = logits.argmax(-1)
    expected[20:29] = -1
    assert torch.equal(kernels.sample(logits, 0.0, "cpu"), expected)
    assert torch.equal(kernels.sample(logits[:, None].expand(70, 2, vocab_size)[:, -1], 0.0, "cpu"), expected)
    for i in (0, 25):
        assert kernels.sample(logits[i : i + 1], 0.0, "cpu") == expected[i]


@built
def test_logits_that_the_kernel_does_not_take():
    assert kernels.cpu.library()
    for wrong in (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(RuntimeError, match="logits must be float32"):
            kernels.sample(wrong, 0.0, "cpu")
    with pytest.raises(RuntimeError, match="only finds the likeliest"):
        kernels.sample(torch.zeros(2, 3), 0.5, "cpu")


@built
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route(norm_topk_prob):
    torch.manual_seed(0)
    for rows, n_experts, top_k in [(1, 8, 2), (5, 128, 8), (8, 6, 6)]:
        logits = torch.randn(1, rows, n_experts) * 3
        (topk_weights, topk_ids), ours = reference.route(logits, top_k, norm_topk_prob), kernels.route(
            logits, top_k, norm_topk_prob, "cpu"
        )
        assert torch.equal(ours[1], topk_ids)
        bounds.check(ours[0], topk_weights, (n_experts + 32) * bounds.U[torch.float32] * topk_weights.double())


@built
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_route_to_shared_experts(norm_topk_prob):
    torch.manual_seed(0)
    for rows, n_experts, top_k, n_shared_experts in [(1, 8, 2, 1), (5, 60, 4, 4), (8, 6, 6, 2)]:
        logits = torch.randn(1, rows, n_experts + 1) * 3
        ours = kernels.route(logits, top_k, norm_topk_prob, "cpu", n_shared_experts)
        topk_weights, topk_ids = reference.route(logits, top_k, norm_topk_prob, n_shared_experts)
        assert torch.equal(ours[1], topk_ids)
        assert (topk_ids[..., top_k:] == torch.arange(n_experts, n_experts + n_shared_experts)).all()
        bounds.check(ours[0], topk_weights, (n_experts + 32) * bounds.U[torch.float32] * topk_weights.double())


@built
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("logits", [[torch.nan] * 6, [1.0, torch.nan, 3.0, 0.0, 2.0, 4.0]])
def test_router_of_nan(logits, norm_topk_prob):
    """Some experts, none beyond the last and none twice; their weights say that something is wrong."""
    topk_weights, topk_ids = kernels.route(torch.tensor([logits]), 3, norm_topk_prob, "cpu")
    assert len({*topk_ids[0].tolist()} & {*range(6)}) == 3 and topk_weights.isnan().all()


# ---- Builds ---------------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("threads", [1], ids=["any_threads"], indirect=True)
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v3 -mavxvnni", "x86-64"])
def test_without_this_cpus_instructions(march):
    """The same tests, on the code for CPUs with AVX2 alone, for those of any kind, and for those that have AVX2 and
    AVX-VNNI, which only the products use. How the threads share the work is the same code everywhere."""
    if os.environ.get("CXXFLAGS") or os.uname().machine != "x86_64":
        return
    needs_vnni = "avxvnni" in march
    if needs_vnni and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-VNNI")
    env = os.environ | {"CXXFLAGS": f"-march={march}", "OMP_NUM_THREADS": "1"}
    cases = "one_thread and test_linear" if needs_vnni else "one_thread"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", cases, __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def build_in_a_process(expected: bool, **env: str) -> str:
    """Loads the kernels in a process of its own, with this environment. Returns what it says on stderr."""
    code = f"import kernels; assert bool(kernels.cpu.library()) is {expected}"
    command, env = [sys.executable, "-c", code], os.environ | env
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("threads", [1], ids=["any_threads"], indirect=True)
def test_builds(tmp_path, monkeypatch):
    """Several processes that build at once all get the library. A broken one is built again. Once it is built, it needs
    no compiler, whichever made it; but it is for these flags."""
    script = write_compiler(tmp_path / "compiler")
    cxx = f"{script} -O0"  # a command with an argument
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": cxx, "CXXFLAGS": "-O0", "TMPDIR": str(tmp_path)}
    with monkeypatch.context() as context:
        context.setenv("CXXFLAGS", "-O0")
        library = tmp_path / "gpt-fast" / kernels.cpu.library_name(cxx.split())
    library.parent.mkdir()
    library.touch()
    with ThreadPoolExecutor() as pool:
        assert [*pool.map(lambda _: build_in_a_process(True, **env), range(2))] == ["", ""]
    assert [*library.parent.iterdir()] == [library] and library.stat().st_size > 0

    for without in ({"PATH": "", "CXX": ""}, {"CXX": "false"}):
        assert build_in_a_process(True, **env | without) == ""
    said = build_in_a_process(False, **env | {"PATH": "", "CXX": "", "CXXFLAGS": "-O1"})
    assert "no C++ compiler" in said and said.count("\n") == 1

    # A cache that cannot be written
    env |= {"CXX": script, "XDG_CACHE_HOME": "/dev/null"}
    said = build_in_a_process(True, **env)
    elsewhere = tmp_path / f"gpt-fast-{os.getuid()}"
    assert said.count("\n") == 1 and "/dev/null/gpt-fast does not serve ([Errno 20] Not a directory" in said
    assert said.endswith(f": the kernels are in {elsewhere}\n")
    assert build_in_a_process(True, **env) == ""  # found there
    elsewhere.chmod(0o777)  # now others can write to it
    tmp_path.chmod(0o777)
    assert "another user" in build_in_a_process(False, **env)


@pytest.mark.parametrize("threads", [1], ids=["any_threads"], indirect=True)
def test_a_folder_from_which_nothing_is_run(tmp_path, monkeypatch):
    kernels.cpu.check_folder(tmp_path)
    mounted = SimpleNamespace(f_flag=getattr(os, "ST_NOEXEC", 0))
    monkeypatch.setattr(os, "statvfs", lambda folder: mounted)
    with pytest.raises(OSError, match="noexec"):
        kernels.cpu.check_folder(tmp_path)


@pytest.mark.parametrize("threads", [1], ids=["any_threads"], indirect=True)
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_the_compiler_ends_with_the_process(sig, tmp_path):
    """And with it what it has started, as g++ starts cc1plus."""
    script, pid = tmp_path / "compiler", tmp_path / "pid"
    script.write_text(f'#!/bin/sh\n[ "$1" = -march=native ] && exit\nsleep 60 &\necho $! >{pid}\nwait\n')
    script.chmod(0o755)
    env = os.environ | {"CXX": str(script), "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    code = "import kernels; kernels.cpu.library()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as process:
        while not (pid.exists() and pid.read_text().endswith("\n")):
            time.sleep(0.01)
        process.send_signal(sig)
        assert process.wait() in (128 + sig, -sig)
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":  # or it waits for its parent to be told
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not list((tmp_path / "gpt-fast").iterdir())  # nothing is left over


@pytest.mark.parametrize("threads", [1], ids=["any_threads"], indirect=True)
@pytest.mark.parametrize("compiler", ["false", "script"])
def test_no_compiler(compiler, tmp_path):
    """One line, and everything runs on PyTorch."""
    (tmp_path / "script").write_text("no program")
    (tmp_path / "script").chmod(0o755)
    cxx = "false" if compiler == "false" else str(tmp_path / "script")
    said = build_in_a_process(False, CXX=cxx, XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert said.count("\n") == 1 and "slower" in said


@pytest.mark.parametrize("threads", [1], ids=["any_threads"], indirect=True)
def test_without_kernels_weights_are_dequantized_once(monkeypatch, capsys):
    """To the last bit what PyTorch makes of the quantized ones; the format keeps its name."""
    monkeypatch.setattr(kernels.cpu, "library", lambda: None)
    monkeypatch.setattr(prepare, "QUANTIZE_CHUNK", 256)  # several chunks, and some rows over
    for format in CPU_FORMATS[1:]:
        torch.manual_seed(0)
        linear = make_linear(33, 72, format, torch.bfloat16, bias=True)
        experts = make_linear(10, 72, format, torch.bfloat16, n_experts=3, kind=ExpertsDown)
        expected = [w.dequantized_weight(torch.bfloat16) for w in (linear, experts)]
        with monkeypatch.context() as context:
            context.setattr(prepare, "free_memory", lambda: 2 * (33 * 72 + 3 * 10 * 72) - 1)
            kernels.prepare_kernels([linear, experts], torch.bfloat16)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "every token dequantizes" in said and linear.format == format
        kernels.prepare_kernels([linear, experts], torch.bfloat16)
        for w, matrix in zip((linear, experts), expected, strict=True):
            assert w.format.name == format.name and w.scales is w.zeros is None
            assert torch.equal(w.weight, matrix) and torch.equal(w.dequantized_weight(torch.bfloat16), matrix)
            assert w.backend == "torch" and capsys.readouterr().err == ""

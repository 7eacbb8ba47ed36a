"""The Triton kernels against exact results, in Triton's interpreter (conftest.py turns it on); and compiled for GPUs.

tests/exact.py has the data, the exact results, and the bounds of how far a kernel may be from them.
"""

import os
import subprocess
import sys

import pytest
import torch

import kernels
from config import ModelConfig
from kernels import reference, triton_attention, triton_launch, triton_linear, triton_moe, triton_sampling  # noqa: F401  (some register operations)
from kernels.formats import Dense, Int4, Int8
from kernels.triton_int4 import pack_int4_tiles, unpack_int4_tiles
from model import ExpertsDown, ExpertsGateUp, KVCache, LayerCache, Linear, alibi_slopes, rope_table
from tests import bounds
from tests.exact import (
    exact_attention,
    exact_linear,
    exact_norm,
    factor_dtype,
    integers,
    of_cap,
    of_exact_sums,
    of_glu,
    of_pytorch,
    of_rounding,
)
from tests.test_kernels import DTYPES, FORMATS, QUANTIZED, attend, check_cache, make, make_norm, names
from tests.tiny import ROOT, make_hf, to_ours

U32 = bounds.U[torch.float32]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about rows and columns of padding


@pytest.fixture
def small_gpu(monkeypatch):
    """As if there were two multiprocessors, so that even small products have programs of several tiles of W."""
    monkeypatch.setattr(triton_launch, "gpu_of", lambda device: triton_launch.Gpu(2, 8, False, {}))
    monkeypatch.setattr(triton_attention, "gpu_of", lambda device: triton_launch.Gpu(2, 8, False, {}))


def enabled(module):
    """On the Triton kernels, all of it."""
    linears = [m for m in module.modules() if isinstance(m, Linear)]
    kernels.pack_for_triton(linears)
    assert all(w.backend == "triton" for w in linears)
    return module


# ---- Products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(format, dtype, small_gpu):
    """Of sizes within a tile, beyond a tile, and beyond the rows of a program and two steps of its loop."""
    torch.manual_seed(0)
    large = (96, 264, 2) if dtype == torch.float32 else (160, 1032, 2)
    for n, k, rows in [(6, 32, 1), (70, 72, 3), large]:
        w, norm = exact_linear(n, k, format, dtype, bias=n == 70), exact_norm(k, dtype)
        matrix, bias = w.matrix(torch.float32).double(), 0 if w.bias is None else w.bias.double()
        enabled(w)
        x, residual = integers(1, rows, k, dtype=dtype), torch.randn(1, rows, n).to(dtype)

        y = x.double() @ matrix.T + bias + residual.double()
        terms = x.double().abs() @ matrix.abs().T + abs(bias) + residual.double().abs()
        error = of_exact_sums(terms, k, format) + of_rounding(y, dtype)
        bounds.check(kernels.linear(x, w, residual=residual), y, error)

        rms = (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
        normed = x.double() / rms * norm.weight.double()
        y = normed @ matrix.T + bias
        error = of_exact_sums(normed.abs() @ matrix.abs().T + abs(bias), k, format)
        bounds.check(kernels.linear(x, w, norm, out_dtype=torch.float32), y, error)
        if n % kernels.FUSED_GLU_MULTIPLE == 0:
            y, error = of_glu(y, error)
            bounds.check(kernels.linear(x, w, norm, activation="silu"), y, error + of_rounding(y.abs() + error, dtype))


@pytest.mark.parametrize("format", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_any_activations(format, dtype):
    """Not integers, so that sums and the product with the norm's weight are rounded, and int4's OFFSET costs bits."""
    torch.manual_seed(0)
    n, k = 38, 72
    w, norm = make(n, k, format, dtype), make_norm(k, dtype)
    matrix, magnitude = w.matrix(torch.float32).double(), bounds.magnitudes(w)
    if isinstance(format, Int4) and factor_dtype(dtype) == torch.float16:
        # OFFSET + q times x, less OFFSET + zero times x
        magnitude = magnitude + 2 * 1024 * w.scales.double().repeat_interleave(format.group_size, -1)[:, :k]
    enabled(w)
    x = torch.randn(1, 2, k).to(dtype)
    y = x.double() @ matrix.T
    bounds.check(kernels.linear(x, w, out_dtype=torch.float32), y, bounds.of_product(x, magnitude, y, torch.float32))
    rms = (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    normed = x.double() * norm.weight.double() / rms
    y = normed @ matrix.T
    rounded_factors = bounds.U[factor_dtype(dtype)] * (normed.abs() @ matrix.abs().T)
    error = bounds.of_product(normed, magnitude, y, torch.float32) + rounded_factors
    bounds.check(kernels.linear(x, w, norm, out_dtype=torch.float32), y, error)


@pytest.mark.parametrize("activation", ["gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(activation, dtype):
    """Near zero, where they bend, and beyond where they are clamped. What is not finite stays so."""
    torch.manual_seed(0)
    w = exact_linear(96, 72, Dense(), dtype, bias=True)
    matrix, bias = w.matrix(torch.float32).double(), w.bias.double()
    enabled(w)
    for rows in (1, 5):
        x = integers(rows, 72, dtype=dtype)
        y, terms = x.double() @ matrix.T + bias, x.double().abs() @ matrix.abs().T + abs(bias)
        assert rows == 1 or (y.abs().max() > 8 and y.abs().min() < 0.1)
        y, error = of_glu(y, of_exact_sums(terms, 72, Dense()), activation)
        bounds.check(kernels.linear(x, w, activation=activation), y, error + of_rounding(y.abs() + error, dtype))
    x[1, 3] = torch.nan
    y = kernels.linear(x, w, activation=activation)
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize("scale, softcap, clip", [(0.22, 0.0, 6.0), (1.0, 5.0, 0.0), (3.0, 30.0, 20.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_softcap(scale, softcap, clip, dtype):
    """After the bias or the activation, before the residual."""
    torch.manual_seed(0)
    w = exact_linear(96, 72, Int8(), dtype, bias=True, scale=scale, softcap=softcap, clip=clip)
    matrix, bias = w.matrix(torch.float32).double(), w.bias.double()
    enabled(w)
    x, residual = integers(3, 72, dtype=dtype), torch.randn(3, 96).to(dtype)
    products = x.double() @ matrix.T + bias
    sum_error = of_exact_sums(x.double().abs() @ matrix.abs().T + abs(bias), 72, Int8())

    def scaled(y, error):
        y, error = y * scale, error * scale + 2 * U32 * abs(y * scale)
        if softcap:
            y, error = reference.cap(y, softcap), error + of_cap(softcap)
        return y.clamp(-clip, clip) if clip else y, error

    y, error = scaled(products, sum_error)
    bounds.check(kernels.linear(x, w, out_dtype=torch.float32), y, error)
    total = y + residual.double()
    error = error + U32 * total.abs() + of_rounding(total.abs() + error, dtype)
    bounds.check(kernels.linear(x, w, residual=residual), total, error)
    y, error = scaled(*of_glu(products, sum_error))
    bounds.check(kernels.linear(x, w, activation="silu"), y, error + of_rounding(y.abs() + error, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    torch.manual_seed(0)
    for n, rows in [(5, 1), (64, 8), (1032, 3)]:
        norm, (x, residual) = make_norm(n, dtype), (torch.randn(2, 1, rows, n) * 3).to(dtype)
        y = reference.rms_norm(x.double(), norm.weight.double(), norm.eps)
        error = (n + 8) * U32 * y.abs()
        bounds.check(norm(x, backend="triton"), y, error + of_rounding(y, dtype))
        total = y + residual.double()
        error = error + U32 * total.abs() + of_rounding(total, dtype)
        bounds.check(norm(x, residual, "triton"), total, error)


@pytest.mark.parametrize("format", [Dense(), Int8(), Int4(32)], ids=names)
@pytest.mark.parametrize("rows", range(10))
def test_rows(format, rows):
    """0 to 8, and a 9th that goes to the matrix product."""
    torch.manual_seed(0)
    w = exact_linear(12, 64, format, torch.float32)
    matrix, x = w.matrix(torch.float32).double(), integers(rows, 64, dtype=torch.float32)
    y = x.double() @ matrix.T
    if rows:
        bounds.check(kernels.linear(x, enabled(w)), y, of_exact_sums(x.double().abs() @ matrix.abs().T, 64, format))
    else:
        assert kernels.linear(x, enabled(w)).shape == y.shape


@pytest.mark.parametrize("format", QUANTIZED, ids=names)
def test_extremes(format):
    """Weights, scales and zeros at the ends of their ranges; activations that are huge, tiny or not finite."""
    torch.manual_seed(0)
    w = make(32, 64, format, torch.float32)
    w.weight[:8], w.weight[8:16], w.scales[16:20] = (-128, 127, 0) if isinstance(format, Int8) else (255, 0, 0)
    if isinstance(format, Int4):
        w.zeros[20:24], w.zeros[24:28] = 255, 0
    matrix, magnitude = w.matrix(torch.float32).double(), bounds.magnitudes(w)
    enabled(w)
    for scale in (1.0, 1e10, 1e-15):
        x = torch.randn(2, 64) * scale
        y = x.double() @ matrix.T
        bounds.check(kernels.linear(x, w), y, bounds.of_product(x, magnitude, y, torch.float32))
    assert not kernels.linear(torch.zeros(1, 64), w).any()
    for bad in (torch.nan, torch.inf):
        x[1, 3] = bad
        y = kernels.linear(x, w)
        assert y[0].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("format", QUANTIZED, ids=names)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(format, dtype):
    """To the last bit, but for bfloat16 in the interpreter."""
    for n, k in [(5, 8), (33, 136)]:
        w = make(n, k, format, dtype)
        exact, expected = w.matrix(torch.float32), w.matrix(dtype)
        ours = enabled(w).matrix(dtype)
        if dtype == torch.bfloat16:
            bounds.check(ours, exact, of_rounding(exact, dtype))
        else:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("format", QUANTIZED, ids=names)
@pytest.mark.parametrize("n_experts", [None, 3])
def test_packing_is_undone_exactly(format, n_experts):
    for n, k in [(16, 64), (48, 136)]:
        w = make(n, k, format, torch.float32, n_experts)
        before = w.tensors()
        enabled(w)
        assert (w.weight.data_ptr() == before["weight"].data_ptr()) == isinstance(format, Int8)  # read as it is
        after = format.unpack(w.tensors(), "triton", n, k)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("shape", [(16, 64), (5, 8), (33, 200), (2, 16, 72)])
def test_int4_tiles(shape):
    """Every element is where the drawing in triton_int4.py has it; the rest is zeros."""
    q = torch.randint(16, shape, dtype=torch.uint8)
    n, k = shape[-2:]
    tiles = pack_int4_tiles(q)
    assert tiles.shape == (*shape[:-2], -(-n // 16), -(-k // 64), 128)
    assert torch.equal(unpack_int4_tiles(tiles, n, k), q)
    columns_of_bits = {0: 0, 4: 2, 8: 16, 12: 18, 16: 1, 20: 3, 24: 17, 28: 19}
    drawn = torch.zeros(*shape[:-2], tiles.shape[-3] * 16, tiles.shape[-2] * 64, dtype=torch.int32)
    for lane in range(32):
        for word in range(4):
            row, column = lane // 4 + 8 * (word // 2), 4 * (lane % 4) + 32 * (word % 2)
            for shift, offset in columns_of_bits.items():
                drawn[..., row::16, column + offset :: 64] = tiles[..., 4 * lane + word] >> shift & 15
    assert torch.equal(drawn[..., :n, :k], q.int()) and drawn.sum() == q.sum()


# ---- Mixture of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [Dense(), Int8(), Int4(32)], ids=names)
@pytest.mark.parametrize("dtype, ffn_dim", [*((dtype, 48) for dtype in DTYPES), (DTYPES[0], 40), (DTYPES[0], 44)])
def test_experts(format, dtype, ffn_dim):
    """Of a width that the kernels take, with biases, and of such that they leave to PyTorch, in part or whole."""
    torch.manual_seed(0)
    if isinstance(format, Int4):
        ffn_dim -= ffn_dim % 8
    options = {"n_experts": 4, "bias": ffn_dim == 48}
    gate_up = exact_linear(2 * ffn_dim, 64, format, dtype, kind=ExpertsGateUp, **options)
    down = exact_linear(64, ffn_dim, format, dtype, kind=ExpertsDown, **options)
    w_gate_up, w_down, norm = gate_up.matrix(torch.float32), down.matrix(torch.float32), exact_norm(64, dtype)
    gate_up_bias, down_bias = (torch.zeros(4, 1) if w.bias is None else w.bias.double() for w in (gate_up, down))
    kernels.pack_for_triton([gate_up, down])
    assert gate_up.backend == "triton" and down.backend == ("torch" if (format, ffn_dim) == (Int8(), 44) else "triton")
    for rows in (1, 7, 9):  # rows that share experts; and more than the kernels take
        by_kernels = rows < 9 and ffn_dim == 48
        topk_weights, topk_ids = reference.route(torch.randn(1, rows, 4) * 3, 2, True)

        x = integers(1, rows, 64, dtype=dtype)
        rms = (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
        normed = x.double() / rms * norm.weight.double()
        w = w_gate_up[topk_ids].double()  # [B, T, K, N, dim]
        y, terms = torch.einsum("btk,btenk->bten", normed, w), torch.einsum("btk,btenk->bten", normed.abs(), w.abs())
        bias = gate_up_bias[topk_ids]  # [B, T, top_k, N]
        y, terms = y + bias, terms + bias.abs()
        error = of_exact_sums(terms, 64, format) if by_kernels else of_pytorch(terms, 64, dtype)
        y, error = of_glu(y, error)
        error = error + of_rounding(y.abs() + error, dtype) * (1 if by_kernels else 4)
        bounds.check(gate_up(x, topk_ids, norm, "silu"), y, error)

        hidden, residual = integers(1, rows, 2, ffn_dim, dtype=dtype), torch.randn(1, rows, 64).to(dtype)
        w = w_down[topk_ids].double() * topk_weights[..., None, None]
        y, terms = torch.einsum("btek,btenk->btn", hidden.double(), w), hidden.double().abs()
        terms = torch.einsum("btek,btenk->btn", terms, w.abs())
        bias = down_bias[topk_ids] * topk_weights[..., None]
        y, terms = y + bias.sum(-2), terms + bias.abs().sum(-2)
        error = of_exact_sums(terms, ffn_dim, format) if by_kernels else of_pytorch(terms, ffn_dim, dtype)
        bounds.check(down(hidden, topk_ids, topk_weights), y, error + of_rounding(y, dtype))
        total = y + residual.double()
        error = error + U32 * residual.abs() + of_rounding(total, dtype) + (0 if by_kernels else of_rounding(y, dtype))
        bounds.check(down(hidden, topk_ids, topk_weights, residual), total, error)


@pytest.mark.parametrize("normalize", [True, False])
def test_route(normalize):
    torch.manual_seed(0)
    shapes = [(1, 8, 2, 0), (5, 128, 8, 0), (8, 6, 6, 0), (1, 7, 2, 1), (3, 8, 8, 3)]
    for rows, n_experts, top_k, n_shared_experts in shapes:
        logits = torch.randn(1, rows, n_experts + (n_shared_experts > 0)) * 3
        topk_weights, topk_ids = reference.route(logits, top_k, normalize, n_shared_experts)
        ours = kernels.route(logits, top_k, normalize, "triton", n_shared_experts)
        assert torch.equal(ours[1], topk_ids)
        bounds.check(ours[0], topk_weights, (n_experts + 32) * U32 * topk_weights)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("logits", [[torch.nan] * 6, [1.0, torch.nan, 3.0, 0.0, 2.0, 4.0]])
def test_router_of_nan(logits, normalize):
    """Some experts, none beyond the last and none twice; their weights say that something is wrong."""
    topk_weights, topk_ids = kernels.route(torch.tensor([logits]), 3, normalize, "triton")
    assert len({*topk_ids[0].tolist()} & {*range(6)}) == 3 and topk_weights.isnan().all()


# ---- Sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [5, 2048, 5000])
def test_sample(vocab_size):
    """The likeliest token, the first of equals; with noise as the formula says."""
    torch.manual_seed(0)
    logits = torch.randint(-20, 20, (3, vocab_size)).float()
    assert torch.equal(kernels.sample(logits, 0.0), logits.argmax(-1))
    logits = torch.randn(3, vocab_size)
    noise = torch.empty(3, vocab_size, dtype=torch.float64).exponential_()
    for temperature in (1e-30, 0.7, 1e30):
        ours = torch.ops.gptfast_triton.sample(logits, noise, temperature)
        scores = logits - temperature * noise.float().log()
        chosen = scores.gather(-1, ours[:, None])[:, 0]
        assert (chosen >= scores.amax(-1) - 4 * U32 * scores.abs().amax(-1)).all()


def test_sample_follows_the_distribution():
    torch.manual_seed(0)
    probabilities, temperature, n = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2]), 0.5, 3000
    logits = (probabilities.log() * temperature).clamp(min=-1e30)
    counts = kernels.sample(logits.expand(n, 5), temperature).bincount(minlength=5)
    deviation = (n * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - n * probabilities).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_sample_of_what_is_not_finite(value):
    logits = torch.randn(2, 3000)
    logits[1, 2500] = value
    for temperature in (0.0, 1.0):
        tokens = kernels.sample(logits, temperature)
        assert tokens[0] >= 0 and tokens[1] == -1


# ---- Attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(4, 4, 8), (6, 2, 64), (8, 1, 40)])
@pytest.mark.parametrize("window, dtype", [(0, DTYPES[0]), (90, DTYPES[0]), (7, DTYPES[1]), (0, DTYPES[2])])
def test_attention(n_heads, n_kv_heads, d, window, dtype, small_gpu):
    """Rows at positions of their own, in a cache that holds NaN where nothing has been written yet."""
    torch.manual_seed(0)
    rope = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024), 200)
    for qk_norm in {d == 40, window == 7}:
        norms = [make_norm(d, dtype) if qk_norm else None for _ in "qk"]
        for tokens, starts, length in [(1, [0], 96), (4, [3, 150], 160), (8, [140], 160)]:
            B = len(starts)
            positions, qkv = torch.tensor(starts), torch.randn(B, tokens, (n_heads + 2 * n_kv_heads) * d).to(dtype)
            k, v = torch.randn(2, B, n_kv_heads, 200, d).to(dtype).unbind()
            for b, start in enumerate(starts):
                k[b, :, start:], v[b, :, start:] = torch.nan, torch.nan
            before = LayerCache(k.clone(), v.clone(), rope)
            exact = exact_attention(qkv, before, positions, n_heads, window, norms)
            view = LayerCache(k[:, :, :length], v[:, :, :length], rope)
            ours = attend(qkv, view, positions, n_heads, "triton", window, *norms)
            bounds.check(ours, *exact)
            check_cache(qkv, LayerCache(k, v, rope), before, positions, n_heads, norms)


ATTENTION_OPTIONS = ["sinks", "scale", "softcap", "wide_norms", "alibi"]


@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(4, 4, 8), (6, 2, 24), (8, 1, 64)])
@pytest.mark.parametrize("options", [*([name] for name in ATTENTION_OPTIONS), ATTENTION_OPTIONS], ids=", ".join)
@pytest.mark.parametrize("window, dtype", [(0, DTYPES[0]), (7, DTYPES[1])])
def test_attention_options(n_heads, n_kv_heads, d, options, window, dtype, small_gpu):
    """Sinks, also one that takes nearly everything; a scale; a cap on scores; norms over all heads; ALiBi. One part of
    the cache, and several."""
    torch.manual_seed(0)
    rope = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024), 200)
    norms, values = [None, None], {}
    if "wide_norms" in options:
        norms = [make_norm(n * d, dtype) for n in (n_heads, n_kv_heads)]
    if "sinks" in options:
        values["sinks"] = torch.cat([torch.tensor([9.0]), torch.randn(n_heads - 1)]).to(dtype)
    if "scale" in options:
        values["scale"] = 0.3
    if "softcap" in options:
        values["softcap"] = 1.5
    slopes = torch.tensor(alibi_slopes(n_heads)) if "alibi" in options else None
    for tokens, starts, length in [(1, [0], 96), (4, [3, 150], 160)]:
        B = len(starts)
        positions, qkv = torch.tensor(starts), torch.randn(B, tokens, (n_heads + 2 * n_kv_heads) * d).to(dtype)
        k, v = torch.randn(2, B, n_kv_heads, length, d).to(dtype).unbind()
        before, cache = LayerCache(k.clone(), v.clone(), rope, slopes), LayerCache(k, v, rope, slopes)
        exact = exact_attention(qkv, before, positions, n_heads, window, norms, **values)
        ours = attend(qkv, cache, positions, n_heads, "triton", window, *norms, **values)
        bounds.check(ours, *exact)
        check_cache(qkv, cache, before, positions, n_heads, norms)


def test_attention_stays_in_the_cache():
    """Nothing before the first position or beyond the last is written or looked at; what fits is right."""
    torch.manual_seed(0)
    rope, G, D = rope_table(ModelConfig(64, 1, 4, 2, 16, 64, 64, 64), 16), 2, 16
    k, v = torch.randn(2, 5, G, 24, D).unbind()
    for cache in (k, v):
        cache[:, :, :4], cache[:, :, 20:] = torch.nan, torch.nan
    before, inside = LayerCache(k.clone(), v.clone(), rope), slice(4, 20)
    positions, qkv = torch.tensor([15, 18, 1000, -1, -1000]), torch.randn(5, 1, (4 + 2 * G) * D)
    ours = attend(qkv, LayerCache(k[:, :, inside], v[:, :, inside], rope), positions, 4, "triton")
    assert ours[:3].isfinite().all()
    fits = slice(0, 1)
    cache = LayerCache(before.k[fits, :, inside], before.v[fits, :, inside], rope)
    bounds.check(ours[fits], *exact_attention(qkv[fits], cache, positions[fits], 4, 0, (None, None)))
    for after, old in ((k, before.k), (v, before.v)):
        assert not torch.equal(after[0, :, 19], old[0, :, 19])
        after[0, :, 19] = old[0, :, 19]
        assert torch.equal(after.nan_to_num(9), old.nan_to_num(9))


# ---- Models ---------------------------------------------------------------------------------------------------------


def tiny_model(family: str, n_layers: int):
    """Smaller than tests/tiny.py's, since the interpreter is slow."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 40, "num_hidden_layers": n_layers}
    if family == "mixtral":
        sizes["num_local_experts"] = 4
    if family == "qwen3-moe":
        sizes["num_experts"] = 4
    return to_ours(make_hf(family, **sizes), use_kernels=False)


def logits_of(model, prompt: torch.Tensor, step=None) -> torch.Tensor:
    """Of a prompt's many tokens at once, of two one by one, and of four at once."""
    kv_cache, start, logits = KVCache(model, 1, 200), 0, []
    with torch.inference_mode():
        for tokens in prompt[None].split([len(prompt) - 6, 1, 1, 4], dim=1):
            logits.append((step or model)(tokens, torch.tensor([start]), kv_cache))
            start += tokens.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "family, format",
    [("llama3", Dense()), ("llama-bias", Int4(32)), ("mistral-window", Int8()), ("qwen3", Int4(32)),
     ("mixtral", Int8()), ("mixtral", Int4(32)), ("qwen3-moe", Dense())],
    ids=names,
)  # fmt: skip
def test_model(family, format, small_gpu):
    """The whole model: float32 logits as without kernels, so the same greedy tokens."""
    model, prompt = tiny_model(family, n_layers=2), torch.arange(3, 27)
    for _, w in model.quantizable_linears():
        tensors = format.quantize(w.weight.data)
        w.set_format(format)
        for name, tensor in tensors.items():
            w.set_tensor(name, tensor)
    expected = logits_of(model, prompt)
    ours = logits_of(enabled(model), prompt)
    # 5 products in each layer and the head follow each other. Each adds what a sum of 64 terms may lose, on either side
    assert (ours - expected).abs().max() <= 11 * 2 * (64 + 8) * U32 * expected.abs().max()
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_torch_compile(small_gpu):
    """A step in one graph, whose calls write into the caches that it is given."""
    model, prompt = enabled(tiny_model("qwen3-moe", n_layers=1)), torch.arange(3, 27)
    expected = logits_of(model, prompt)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")

    def step(tokens, positions, kv_cache):
        return (compiled if tokens.numel() <= kernels.MAX_TRITON_TOKENS else model)(tokens, positions, kv_cache)

    assert torch.equal(logits_of(model, prompt, step), expected)


def test_compiles_for_gpus():
    """Every kernel, for NVIDIA's Turing, Ampere and Hopper and for AMD's CDNA 3 and RDNA 3, down to machine code."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_triton"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

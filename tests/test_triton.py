"""The Triton kernels against exact results, in the interpreter (conftest.py turns it on), and compiled for GPUs.

scripts/kernel_checks/all_checks.py lists the checks that also run on a GPU. This file adds whole models, results that
cannot differ on a GPU, and whatever is not a result.
"""

import functools
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from triton.language.core import is_builtin
from triton.runtime import interpreter

from config import ModelConfig
from formats import MXFP4, Float8, GroupedInt8, Int4, Int8, Unquantized, WeightFormat
from formats.triton_layouts import pack_tiles
from kernels.schema import TokenFilters
from kernels.triton import (  # noqa: F401  (some register operations)
    TRITON_ACTIVATIONS,
    attention,
    launch,
    linear,
    moe,
    sampling,
)
from kernels.triton.formats import KERNEL_FORMATS
from layers.backend import TRITON_BACKEND
from layers.experts import ExpertsDown, route
from layers.kv_cache import KVCache, LayerCache
from layers.linear import LinearBase, quantizable_linears
from layers.packing import can_capture, pack_for_triton
from layers.rope import rope_table
from layers.sampling import sample
from model import DTYPES
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.all_checks import all_checks, interpreter_sizes, name_of
from scripts.kernel_checks.exact_results import (
    QUANTIZED,
    TRITON_FORMATS,
    attend,
    exact_attention,
    exact_linear,
    exact_sums_error,
    format_label,
    integers,
    make_linear,
    use_triton,
)
from tests.tiny import make_hf, to_ours
from utils.files import ROOT

U32 = bounds.U[torch.float32]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, for rows and columns of padding


@pytest.fixture(scope="module", autouse=True)
def fast_interpreter():
    """Caches two results that take 40 % of the time of the interpreter: the builtins of triton.language, searched in
    every call of a function, and a table of NumPy types, made for every operation."""
    convert_dtype, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = convert_dtype(dtype)
        return dtypes[name]

    @functools.cache
    def builtin_names(package) -> list[str]:
        return [name for name in dir(package) if is_builtin(getattr(package, name))]

    def patch_builtins(package, builder, scope):
        for name in builtin_names(package):
            member = getattr(package, name)
            if is_builtin(member):  # a patched one is not
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        context.setattr(interpreter, "_patch_builtin", patch_builtins)
        yield


@pytest.fixture
def small_gpu(monkeypatch):
    """The GPU seems to have two multiprocessors, so that programs compute several tiles of W even in small matmuls."""
    monkeypatch.setattr(launch, "gpu_info", lambda device: launch.Gpu(2, True, 8, False, {}))
    monkeypatch.setattr(attention, "gpu_info", lambda device: launch.Gpu(2, True, 8, False, {}))


CHECKS = {  # a check that does not depend on dtype occurs once
    name_of(check): check
    for dtype in DTYPES
    for check in all_checks(dtype, interpreter_sizes(dtype))
}


@pytest.mark.parametrize("name", CHECKS)
def test_check(name, small_gpu):
    """The checks for a GPU pass in the interpreter, in smaller sizes."""
    torch.manual_seed(0)
    for comparison in CHECKS[name]():
        bounds.check(comparison.ours, comparison.exact, comparison.bound)


# ---- Matmuls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [Unquantized(), Int8(), Int4(32)], ids=format_label)
@pytest.mark.parametrize("rows", [*range(10), 64, 65])
def test_rows(format, rows):
    """Matmuls of 0 to 64 rows are right, and of 65, which PyTorch multiplies."""
    torch.manual_seed(0)
    w = exact_linear(12, 64, format, torch.float32)
    matrix, x = w.dequantize(torch.float32).double(), integers(rows, 64, dtype=torch.float32)
    y = x.double() @ matrix.T
    if rows:
        bound = exact_sums_error(x.double().abs() @ matrix.abs().T, 64, format)
        bounds.check(use_triton(w)(x), y, bound)
    else:
        assert use_triton(w)(x).shape == y.shape


@pytest.mark.parametrize("format", QUANTIZED, ids=format_label)
def test_extremes(format):
    """Results stay within their bounds for weights, scales and zeros at the ends of their ranges, and for huge and tiny
    activations. Activations that are not finite affect only their own row."""
    torch.manual_seed(0)
    w = make_linear(32, 64, format, torch.float32)
    w.weight[:8], w.weight[8:16], w.scales[16:20] = (-128, 127, 0) if isinstance(format, Int8) else (255, 0, 0)
    if isinstance(format, Int4):
        w.zeros[20:24], w.zeros[24:28] = 255, 0
    matrix, magnitude = w.dequantize(torch.float32).double(), bounds.magnitudes(w)
    use_triton(w)
    for scale in (1.0, 1e10, 1e-15):
        x = torch.randn(2, 64) * scale
        y = x.double() @ matrix.T
        bounds.check(w(x), y, bounds.product_error(x, magnitude, y, torch.float32))
    assert not w(torch.zeros(1, 64)).any()
    for bad in (torch.nan, torch.inf):
        x[1, 3] = bad
        y = w(x)
        assert y[0].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("format", TRITON_FORMATS[1:], ids=format_label)
@pytest.mark.parametrize("n_experts", [None, 3])
def test_dequantize_packed(format, n_experts):
    for n, k in [(16, 64), (48, 160)]:
        kind = LinearBase if n_experts is None else ExpertsDown
        w = make_linear(n, k, format, torch.float32, n_experts=n_experts, kind=kind)
        checkpoint_weight, expected = w.weight, w.dequantize(torch.float32)
        use_triton(w)
        assert (w.weight.data_ptr() == checkpoint_weight.data_ptr()) == isinstance(format, Int8)  # Int8 is not packed
        if n_experts is None:
            assert torch.equal(w.dequantize(torch.float32), expected)
        else:
            some = torch.tensor([2, 0])
            assert torch.equal(w.dequantize(torch.float32, 1), expected[1])
            assert torch.equal(w.dequantize_experts(some, torch.float32), expected[some])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element(dtype):
    """Every element of 4 and 8 bits, also subnormal ones, is exact: dequantized, and as a product with 1 and zeros."""
    byte = torch.arange(256, dtype=torch.uint8)
    floats = byte.where(byte % 128 != 127, 0).view(torch.float8_e4m3fn)  # without NaN
    elements = {Float8(): floats, GroupedInt8(32): byte, MXFP4(): byte, Int4(32): byte}
    for format, weight in elements.items():
        w = make_linear(16, 32, format, dtype)
        w.set_tensor("weight", weight.repeat(w.weight.numel() // 256).view(w.weight.shape))
        w.set_tensor("scales", torch.full_like(w.scales, 127 if isinstance(format, MXFP4) else 1))
        expected = w.dequantize(torch.float32)
        use_triton(w)
        assert torch.equal(w.dequantize(torch.float32), expected)
        for x in torch.eye(32, dtype=dtype).split(8):
            assert torch.equal(w(x, out_dtype=torch.float32), x.float() @ expected.T)


@pytest.mark.parametrize("shape", [(16, 64), (5, 8), (33, 200), (2, 16, 72)])
def test_int4_tiles(shape):
    """Every element is at its place in the drawing of triton_layouts.py, and everything else is zero."""
    q = torch.randint(16, shape, dtype=torch.uint8)
    n, k = shape[-2:]
    tiles = pack_tiles(q)
    assert tiles.shape == (*shape[:-2], math.ceil(n / 16), math.ceil(k / 64), 128)
    columns_of_bits = {0: 0, 4: 2, 8: 16, 12: 18, 16: 1, 20: 3, 24: 17, 28: 19}
    drawn = torch.zeros(*shape[:-2], tiles.shape[-3] * 16, tiles.shape[-2] * 64, dtype=torch.int32)
    for lane in range(32):
        for word in range(4):
            row, column = lane // 4 + 8 * (word // 2), 4 * (lane % 4) + 32 * (word % 2)
            for shift, offset in columns_of_bits.items():
                drawn[..., row::16, column + offset :: 64] = tiles[..., 4 * lane + word] >> shift & 15
    assert torch.equal(drawn[..., :n, :k], q.int()) and drawn.sum() == q.sum()


def test_every_format_is_checked():
    """Every format with kernels has checks, and the checks call the kernels."""
    assert {type(format) for format in TRITON_FORMATS} == {format.format_class for format in KERNEL_FORMATS}


def test_every_activation_has_a_branch():
    """TRITON_ACTIVATIONS are the branches of the kernel."""
    epilogue_py = (ROOT / "kernels/triton/epilogue.py").read_text()
    assert set(re.findall(r'ACTIVATION == "(\w+)"', epilogue_py)) == set(TRITON_ACTIVATIONS)


class Unknown(Int4):
    """A format without kernels."""


def test_unknown_format():
    """It stays in PyTorch. A kernel that gets it raises an error."""
    w = make_linear(16, 64, Int4(32), torch.float32)
    w.format = Unknown(32)
    pack_for_triton([w])
    assert w.backend.name == "torch"
    w.format = Int4(32)
    use_triton(w).format = Unknown(32)
    for call in (lambda: w(torch.zeros(1, 64)), lambda: w.dequantize(torch.float32)):
        with pytest.raises(ValueError, match="not Unknown"):
            call()


def test_a_format_without_a_layout():
    """The error names the missing method, to_triton_layout. Formats with kernels have it."""

    @dataclass(frozen=True)
    class NoLayout(WeightFormat):
        group_size: int = 32
        mode = "no-layout"

    w = make_linear(16, 64, Int4(32), torch.float32)
    NoLayout.__name__ = "Int4"  # which KERNEL_FORMATS has
    w.format = NoLayout()
    with pytest.raises(NotImplementedError, match="no-layout is .* no method to_triton_layout"):
        pack_for_triton([w])
    for format in KERNEL_FORMATS:
        assert format.format_class.to_triton_layout is not WeightFormat.to_triton_layout


# ---- Mixture of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("logits", [[torch.nan] * 6, [1.0, torch.nan, 3.0, 0.0, 2.0, 4.0]])
def test_router_of_nan(logits, norm_topk_prob):
    """With NaN logits the router returns valid, different experts, and weights that are not finite."""
    topk_weights, topk_ids = route(torch.tensor([logits]), 3, norm_topk_prob, 0, TRITON_BACKEND)
    assert len({*topk_ids[0].tolist()} & {*range(6)}) == 3 and topk_weights.isnan().all()


# ---- Sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_sample_of_logits_that_are_not_finite(value):
    logits = torch.randn(2, 3000)
    logits[1, 2500] = value
    for temperature, options in ((0.0, {}), (1.0, {}), (1.0, {"top_p": 0.9}), (1.0, {"min_p": 0.1})):
        tokens = sample(logits, temperature, TokenFilters(**options), TRITON_BACKEND)
        assert tokens[0] >= 0 and tokens[1] == -1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_row_draws_the_token_that_it_draws_alone(top_p):
    """Also with a temperature of its own."""
    logits, uniform = torch.randn(6, 300), torch.rand(6, 1, dtype=torch.float64)
    temperatures, filters = torch.logspace(-30, 3, 6)[:, None], TokenFilters(top_p=top_p)
    together = sample(logits, 1.0, filters, TRITON_BACKEND, uniform, temperatures)
    for i, temperature in enumerate(temperatures[:, 0].tolist()):
        alone = sample(logits[i : i + 1], temperature, filters, TRITON_BACKEND, uniform[i : i + 1])
        assert alone == together[i]


# ---- Attention ------------------------------------------------------------------------------------------------------


def test_attention_stays_in_the_cache():
    """Positions before 0 or beyond the cache are neither read nor written, and all other positions are right."""
    torch.manual_seed(0)
    cos_sin, G, D = rope_table(ModelConfig(64, 1, 4, 2, 16, 64, 64, 64), 16), 2, 16
    k, v = torch.randn(2, 5, G, 24, D).unbind()
    for cache in (k, v):
        cache[:, :, :4], cache[:, :, 20:] = torch.nan, torch.nan
    before, inside = LayerCache(k.clone(), v.clone(), cos_sin), slice(4, 20)
    start_pos, qkv = torch.tensor([15, 18, 1000, -1, -1000]), torch.randn(5, 1, (4 + 2 * G) * D)
    cache = LayerCache(k[:, :, inside], v[:, :, inside], cos_sin)
    ours = attend(qkv, cache, start_pos, 4, TRITON_BACKEND)
    assert ours[:3].isfinite().all()
    fits = slice(0, 1)
    cache = LayerCache(before.k[fits, :, inside], before.v[fits, :, inside], cos_sin)
    bounds.check(ours[fits], *exact_attention(qkv[fits], cache, start_pos[fits], 4, 0, (None, None)))
    for after, old in ((k, before.k), (v, before.v)):
        assert not torch.equal(after[0, :, 19], old[0, :, 19])
        after[0, :, 19] = old[0, :, 19]
        assert torch.equal(after.nan_to_num(9), old.nan_to_num(9))


# ---- Models ---------------------------------------------------------------------------------------------------------


def tiny_model(family: str, n_layers: int):
    """Returns a model smaller than in tests/tiny.py, since the interpreter is slow."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 40, "num_hidden_layers": n_layers}
    if family == "mixtral":
        sizes["num_local_experts"] = 4
    if family == "qwen3-moe":
        sizes["num_experts"] = 4
    return to_ours(make_hf(family, **sizes), use_kernels=False)


def logits_of(model, prompt: torch.Tensor, step=None) -> torch.Tensor:
    """Returns the logits of a prompt with many tokens, then of two single tokens, then of four together."""
    kv_cache, start, logits = KVCache(model, 1, 200), 0, []
    with torch.inference_mode():
        for tokens in prompt[None].split([len(prompt) - 6, 1, 1, 4], dim=1):
            logits.append((step or model)(tokens, torch.tensor([start]), kv_cache))
            start += tokens.shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "family, format",
    [("llama3", Unquantized()), ("llama-bias", Int4(32)), ("mistral-window", Int8()), ("qwen3", Int4(32)),
     ("mixtral", Int8()), ("mixtral", Int4(32)), ("qwen3-moe", Unquantized())],
    ids=format_label,
)
def test_model(family, format, small_gpu):
    """A whole model gives the float32 logits of PyTorch, and so the same greedy tokens. Layers of Qwen3 have an
    input_order."""
    model, prompt = tiny_model(family, n_layers=2), torch.arange(3, 27)
    for _, w in quantizable_linears(model):
        if family == "qwen3":
            w.set_tensor("input_order", torch.randperm(w.in_features).int())
        tensors = format.quantize(w.weight.data)
        w.set_format(format)
        for name, tensor in tensors.items():
            w.set_tensor(name, tensor)
    expected = logits_of(model, prompt)
    ours = logits_of(use_triton(model), prompt)
    # 5 matmuls in each layer, and then the head. Each adds what a sum of 64 terms may lose, on either side
    assert (ours - expected).abs().max() <= 11 * 2 * (64 + 8) * U32 * expected.abs().max()
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_many_sequences(small_gpu):
    """With twelve sequences at different positions, kernels compute every matmul, attention and norm."""
    model, start_pos = tiny_model("llama3", n_layers=1), torch.arange(12) * 5
    for _, w in quantizable_linears(model):
        tensors = Int8().quantize(w.weight.data)
        w.set_format(Int8())
        for name, tensor in tensors.items():
            w.set_tensor(name, tensor)
    k, v = torch.randn(2, *KVCache(model, 12, 64).layers[0].k.shape)

    def step() -> torch.Tensor:
        kv_cache = KVCache(model, 12, 64)
        kv_cache.layers[0].k.copy_(k)
        kv_cache.layers[0].v.copy_(v)
        with torch.inference_mode():
            return model(torch.arange(3, 15)[:, None], start_pos, kv_cache)

    expected = step()
    use_triton(model)
    assert can_capture(model, 12, 1) and can_capture(model, 64, 1) and not can_capture(model, 65, 1)
    # 5 matmuls, and then the head, as in test_model
    assert (step() - expected).abs().max() <= 6 * 2 * (64 + 8) * U32 * expected.abs().max()


def test_without_matrix_units(monkeypatch):
    """In float32, and on a GPU whose tensor cores Triton does not use, the kernels take few tokens."""
    for dtype, has_cores, most in [(torch.bfloat16, True, 64), (torch.float32, True, 8), (torch.float16, False, 8)]:
        monkeypatch.setattr(launch, "gpu_info", lambda device, has=has_cores: launch.Gpu(2, has, 8, False, {}))
        w = make_linear(16, 64, Int8(), torch.float32)
        pack_for_triton([w], dtype)
        assert w.backend.token_limits["fused_linear"] == most


def test_torch_compile(small_gpu):
    """torch.compile makes one graph of a step, which writes to the caches that it gets."""
    model, prompt = use_triton(tiny_model("qwen3-moe", n_layers=1)), torch.arange(3, 27)
    expected = logits_of(model, prompt)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")

    def step(tokens, *others):
        return (compiled if tokens.numel() <= launch.MMA_N else model)(tokens, *others)

    assert torch.equal(logits_of(model, prompt, step), expected)


def test_compiles_for_gpus():
    """Every kernel compiles to machine code for Turing, Ampere and Hopper (NVIDIA), and CDNA 3 and RDNA 3 (AMD)."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_triton"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

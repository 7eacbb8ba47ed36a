"""kernels_triton.py against the PyTorch references, in Triton's interpreter (conftest.py); and compiled for GPUs."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kernels
import kernels_triton
from model import Attention, Experts, ModelConfig, MoE, RMSNorm, rope_table
from quantize import linears, quantize_int4, quantize_int8
from tests.test_kernels import DTYPES, FORMATS, ROUNDING, both_attentions, close, make
from tests.tiny import ROOT, make_hf, to_ours

SIZES = [(32, 32), (70, 72), (6, 4424), (96, 1160), (3104, 32)]  # N, K: beyond a program's rows, a step of its loop


def enabled(module):
    kernels_triton.enable(module)
    return module


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(form, dtype):
    torch.manual_seed(0)
    for n, k in SIZES[: None if dtype == torch.float16 else -1]:  # the last takes long
        w = make(n, k, form, dtype, bias=n != 32)
        matrix = w.matrix(torch.float32).double()
        assert enabled(w).gpu
        norm = SimpleNamespace(weight=torch.rand(k).to(dtype), eps=1e-5)
        for rows in (1,) if k > 72 else (1, 3):
            x, residual = torch.randn(1, rows, k).to(dtype), torch.randn(1, rows, n).to(dtype)
            bias = w.bias.double() if w.bias is not None else 0
            y = x.double() @ matrix.T + bias
            close(kernels.linear(x, w, residual=residual), y + residual.double(), ROUNDING[dtype])
            offset = form not in (None, "int8") and dtype != torch.float32  # of int4, subtracted at the end
            close(kernels.linear(x, w, wide=True), y, 1e-4 if offset else 2e-6)
            seen = x.double() * norm.weight.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            y = seen @ matrix.T + bias  # of 16-bit x, factors are rounded after the norm
            close(kernels.linear(x, w, norm, wide=True), y, ROUNDING[dtype])
            gate, up = y.chunk(2, -1)
            rounding = (2 if dtype == torch.float32 else 3) * ROUNDING[dtype]  # 16 bits: before it too
            close(kernels.linear(x, w, norm, swiglu=True), torch.nn.functional.silu(gate) * up, rounding)


@pytest.mark.parametrize("form", [None, "int8", 32])
@pytest.mark.parametrize("rows", range(9))
def test_rows(form, rows):
    """0 to 8, and a 9th that goes to the matrix product."""
    torch.manual_seed(0)
    w = make(12, 64, form, torch.float32)
    for x in (torch.randn(rows, 64), torch.randn(9, 64)):
        expected = kernels.linear_reference(x, w)
        close(kernels.linear(x, enabled(w)), expected, 2e-6) if len(x) else None


@pytest.mark.parametrize("form", FORMATS[1:])
def test_extremes(form):
    """Weights, scales and zeros at the ends of their ranges; activations that are huge, tiny or not finite."""
    w = make(32, 64, form, torch.float32)
    w.weight[:8], w.weight[8:16], w.scales[16:20] = (-128, 127, 0) if form == "int8" else (255, 0, 0)
    if form != "int8":
        w.zeros[20:24], w.zeros[24:28] = 255, 0
    x = torch.randn(2, 64)
    expected = kernels.linear_reference(x, w)
    enabled(w)
    for scale in (1.0, 1e10, 1e-15):
        close(kernels.linear(x * scale, w), expected * scale, 2e-6)
    assert not kernels.linear(torch.zeros(1, 64), w).any()
    for bad in (torch.nan, torch.inf):
        x[1, 3] = bad
        y = kernels.linear(x, w)
        assert y[0].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("form", FORMATS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(form, dtype):
    """To the last bit (of bfloat16 the interpreter cuts the rest off), and how they lie changes nothing."""
    for n, k in [(5, 8), (33, 1544)]:
        w = make(n, k, form, dtype)
        before = [t if t is None else t.clone() for t in (w.weight, w.scales, w.zeros)]
        expected = w.matrix(dtype)
        close(enabled(w).matrix(dtype), expected, ROUNDING[dtype] if dtype == torch.bfloat16 else 0)
        after, same = (w.weight, w.scales, w.zeros), slice(form != "int8", None)  # int4's weights are laid out anew
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[same], after[same], strict=True))


@pytest.mark.parametrize("heads, kv_heads, d", [(4, 4, 8), (6, 2, 64), (8, 1, 40)])
@pytest.mark.parametrize("window, dtype", [(None, DTYPES[0]), (200, DTYPES[0]), (7, DTYPES[1]), (None, DTYPES[2])])
def test_attention(heads, kv_heads, d, window, dtype):
    torch.manual_seed(0)
    for qk_norm in {d == 40, window == 7}:
        config = ModelConfig(64, 1, heads, kv_heads, d, 64, 64, 1024, sliding_window=window, qk_norm=qk_norm)
        a, norm = Attention(config).requires_grad_(False), RMSNorm(64, 1e-5)
        for n in (norm, a.q_norm, a.k_norm):
            if n is not None:
                n.weight.data = torch.rand(n.weight.shape).to(dtype)
        a.wqkv, a.wo = make((heads + 2 * kv_heads) * d, 64, None, dtype), make(64, heads * d, None, dtype)
        enabled(a)
        for batch, tokens, start, length in [(1, 1, 0, 96), (2, 4, 3, 160), (1, 8, 200, 260)]:
            a.setup_cache(batch, length, torch.empty(0, dtype=dtype))
            a.k_cache.normal_()
            a.v_cache.normal_()
            a.k_cache[:, :, start:], a.v_cache[:, :, start:] = torch.nan, torch.nan  # must not be looked at
            x, positions = torch.randn(batch, tokens, 64).to(dtype), torch.arange(start, start + tokens)
            ours, expected, k, v = both_attentions(a, x, norm, positions, rope_table(config, length)[positions])
            close(ours, expected, 3 * ROUNDING[dtype])
            filled = slice(0, start + tokens)
            close(k[:, :, filled], a.k_cache[:, :, filled], 2 * ROUNDING[dtype])
            close(v[:, :, filled], a.v_cache[:, :, filled], 2 * ROUNDING[dtype])
            assert k[:, :, start + tokens :].isnan().all() and v[:, :, start + tokens :].isnan().all()


@pytest.mark.parametrize("form", [None, "int8", 32])
@pytest.mark.parametrize("dtype, width", [*((dtype, 48) for dtype in DTYPES), (DTYPES[0], 40), (DTYPES[0], 44)])
def test_experts(form, dtype, width):
    """Of a width that the kernels take and of such that they leave to PyTorch."""
    torch.manual_seed(0)
    width -= width % 8 if form == 32 else 0
    config = ModelConfig(64, 1, 4, 2, 16, width, 64, 64, moe=MoE(6, 3))
    e, norm = Experts(config).requires_grad_(False), RMSNorm(64, 1e-5)
    norm.weight.data = torch.rand(64).to(dtype)
    e.w13, e.w2 = make(2 * width, 64, form, dtype, experts=6), make(64, width, form, dtype, experts=6)
    cases = []
    for rows in (1, 4, 9):  # the last beyond the kernels, but for the weights' order
        x, scores = torch.randn(1, rows, 64).to(dtype), torch.randn(1, rows, 6) * 3
        for normalize in (False, True) if rows < 9 else ():
            (share, chosen), ours = [kernels.route(scores, 3, normalize, gpu) for gpu in (False, True)]
            assert torch.equal(chosen, ours[1])
            close(ours[0], share, 1e-6)
        share, chosen = kernels.route(scores, 3, True, False)
        cases.append((x, share, chosen, e(x, norm, share, chosen)))
    enabled(e)
    for x, share, chosen, expected in cases:
        ours = e(x, norm, share, chosen)
        assert (ours.double() - expected.double()).norm() / expected.double().norm() < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("logits", [[torch.nan] * 6, [1.0, torch.nan, 3.0, 0.0, 2.0, 4.0]])
def test_router_of_nan(logits, normalize):
    """Some experts, none beyond the last and none twice; their shares say that something is wrong."""
    share, chosen = kernels.route(torch.tensor([logits]), 3, normalize, True)
    assert len({*chosen[0].tolist()} & {*range(6)}) == 3 and share.isnan().all()


def logits(model, prompt, step=None):
    """Of a prompt's many tokens at once, of two one by one, and of four at once."""
    model.setup_caches(1, 200)
    parts, step = torch.arange(len(prompt)).split([len(prompt) - 6, 1, 1, 4]), step or model.forward
    with torch.inference_mode():
        return torch.cat([step(prompt[None, part], part) for part in parts], dim=1)


@pytest.mark.parametrize(
    "family, form",
    [("llama3", None), ("llama-bias", 32), ("mistral-window", "int8"), ("qwen3", 32), ("mixtral", "int8"),
     ("mixtral", 32), ("qwen3-moe", None)],
)  # fmt: skip
def test_model(family, form):
    """The whole model: float32 logits as without kernels, so the same greedy tokens."""
    model, prompt = to_ours(make_hf(family, num_hidden_layers=2), fast=False), torch.arange(3, 27)
    for _, w in linears(model) if form else ():
        w.group = w.n_in if form == "int8" else form
        rows = w.weight.flatten(0, -2)
        parts = quantize_int8(rows) if form == "int8" else quantize_int4(rows, form)
        shape = w.weight.shape[:-1]
        del w.weight
        for name, t in zip(("weight", "scales", "zeros"), parts, strict=False):
            w.register_buffer(name, t.unflatten(0, shape))
    expected = logits(model, prompt)
    ours = logits(enabled(model), prompt)
    close(ours, expected, 1e-5)
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_torch_compile():
    """A step in one graph, whose calls write into the caches that it is given."""
    model, prompt = enabled(to_ours(make_hf("qwen3-moe", num_hidden_layers=1), fast=False)), torch.arange(3, 27)
    expected = logits(model, prompt)
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    ours = logits(model, prompt, lambda t, at: step(t, at) if t.numel() <= 8 else model(t, at))
    assert torch.equal(ours, expected)


GPUS = """
import re
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
import kernels, kernels_triton
from tests.test_kernels import make

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int8: "i8",
         torch.int32: "i32", torch.int64: "i64"}

def compiled(fn, *args, grid, warmup, **kwargs):
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(fn.arg_names, args)) | kwargs
    constants = {p.name: values[p.name] for p in fn.params
                 if p.is_constexpr or values[p.name] is None or type(values[p.name]) is int and values[p.name] == 1}
    signature, attributes = {}, {}
    for i, name in enumerate(fn.arg_names):
        v = values[name]
        signature[name] = ("constexpr" if name in constants else "*" + TYPES[v.dtype] if isinstance(v, torch.Tensor)
                           else "fp32" if isinstance(v, float) else "i32")
        if name not in constants and (isinstance(v, torch.Tensor) or isinstance(v, int) and v % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    code = triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=options)
    products = re.search("v_mfma|v_wmma|mma.sync|wgmma", code.asm["amdgcn" if target.backend == "hip" else "ptx"])
    what = fn.__name__, {name: v for name, v in values.items() if not isinstance(v, torch.Tensor)}
    assert code.metadata.shared <= room * 2**10, (code.metadata.shared, what)
    assert products or dtype == torch.float32 or target.arch == 75 or "TYPE" not in values, what
    seen.append(fn.__name__)

def compile_all(dtype):
    x, ops = torch.randn(1, 1, 2048).to(dtype), torch.ops.gptfast_triton
    for form in (None, "int8", 32, 64):
        w = make(256, 2048, form, dtype)
        kernels_triton.enable(w)
        ops.linear(x, *w.fast, 256, w.group, x[0, 0], 1e-5, None, False, True)
        ops.linear(x.expand(1, 8, 2048).contiguous(), *w.fast, 256, w.group, x[0, 0], 0.0, None, True, False)
        if form:
            ops.dequantize(*w.fast[:3], 256, 2048, w.group, dtype)
    w13, w2 = make(128, 2048, 64, dtype, 4), make(2048, 64, 64, dtype, 4)
    kernels_triton.enable(w13)
    kernels_triton.enable(w2)
    share, chosen = ops.route(torch.randn(1, 1, 4), 2, True)
    ops.experts(x, x[0, 0], 1e-5, share, chosen, *w13.fast[:3], *w2.fast[:3], 64, 64)
    cache = torch.zeros(1, 2, 1024, 64, dtype=dtype)
    positions, rope = torch.arange(2), torch.randn(2, 32, 2)
    ops.attend(torch.zeros(1, 2, 12 * 64, dtype=dtype), cache, cache.clone(), positions, rope, None, None, 1e-5, 8, 0)
    rope = torch.randn(8, 32, 2)  # and the most queries that a key head may have
    ops.attend(torch.zeros(1, 8, 20 * 64, dtype=dtype), cache, cache.clone(), positions, rope, None, None, 1e-5, 16, 0)

JITFunction.run = compiled
kernels_triton.factors = lambda x: getattr(tl, str(x.dtype)[6:])
NVIDIA = [GPUTarget("cuda", arch, 32) for arch in (75, 86, 90)]
AMD = [GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32)]
BF16, FP16 = torch.bfloat16, torch.float16
for target, dtype, room, processors in (
    (NVIDIA[0], FP16, 64, 100), (NVIDIA[1], BF16, 99, 100), (NVIDIA[1], BF16, 99, 1),  # one has larger tiles
    (NVIDIA[2], BF16, 99, 100), (NVIDIA[2], torch.float32, 64, 100), (AMD[0], BF16, 64, 100), (AMD[1], FP16, 64, 100),
):
    columns = 16 if target.backend == "hip" else 8 if target.arch >= 80 else 1
    kernels_triton.gpu, seen = lambda device: (processors, columns, {}), []
    compile_all(dtype)
    assert len(seen) == 19 - 2 * (processors == 1), seen  # whose attention has one part
"""


def test_compiles_for_gpus():
    """Every kernel, for NVIDIA's Turing, Ampere and Hopper and for AMD's CDNA3 and RDNA3, down to machine code."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", GPUS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

"""kernels.cpp against its PyTorch references, over odd shapes, in every format, on what this CPU has and without it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kernels
from model import Attention, Experts, FeedForward, Linear, ModelConfig, MoE, RMSNorm, Transformer, rope_table
from quantize import quantize_int4, quantize_int8
from tests.tiny import ROOT

SIZES = [(16, 32), (5, 8), (48, 72), (100, 576), (33, 1544), (32, 8)]  # N, K: not only multiples of the tiles
FORMATS = [None, "int8", 32, 64, 128, 256]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative, of a result of this type
built = pytest.mark.skipif(not kernels.build(), reason="no C++ compiler")


def make(n: int, k: int, form, dtype: torch.dtype, experts: int | None = None, bias: bool = False) -> Linear:
    """A random Linear in a format, not yet packed."""
    w = Linear(k, n, bias, experts).requires_grad_(False)
    torch.nn.init.normal_(w.weight)
    if bias:
        w.bias = torch.nn.Parameter(torch.randn(n).to(dtype), requires_grad=False)
    if form is None:
        w.weight = torch.nn.Parameter(w.weight.to(dtype), requires_grad=False)
        return w
    rows, w.group = w.weight.flatten(0, -2), k if form == "int8" else form
    parts = quantize_int8(rows) if form == "int8" else quantize_int4(rows, form)
    parts = [t.unflatten(0, w.weight.shape[:-1]) for t in parts]
    del w.weight
    for name, t in zip(("weight", "scales", "zeros"), parts, strict=False):
        w.register_buffer(name, t)
    return w


def packed(w: Linear) -> Linear:
    kernels.enable(w)
    assert w.fast
    return w


def rounded_activations(x: torch.Tensor) -> torch.Tensor:
    """What the kernels of 8- and 4-bit weights make of 16-bit activations: int8 in groups of 8."""
    groups = x.float().unflatten(-1, (-1, 8))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.clamp(min=1e-30)).round() * scale).flatten(-2)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float):
    assert ours.shape == expected.shape
    assert (ours.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max().clamp(min=1e-30)


def both_attentions(a: Attention, x, norm, positions, rope) -> tuple[torch.Tensor, ...]:
    """What the kernels make of x at positions and of the cache, and what the reference makes of the same: the results,
    and the kernels' keys and values; the reference's are left in a."""
    k, v, end = a.k_cache.clone(), a.v_cache.clone(), int(positions[-1]) + 1
    ours = a(x, norm, positions, rope, None, None)
    a.k_cache, k, a.v_cache, v = k, a.k_cache, v, a.v_cache
    keys = torch.arange(end)
    mask = (keys <= positions[:, None]) & (keys > positions[:, None] - (a.window or 10**9))
    return ours, a(x, norm, positions, rope, mask, end), k, v


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@built
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(form, dtype):
    torch.manual_seed(0)
    for n, k in SIZES:
        w = make(n, k, form, dtype, bias=n % 2 == 0)
        matrix = w.matrix(torch.float32 if form else dtype).double()
        packed(w)
        norm = SimpleNamespace(weight=torch.rand(k).to(dtype), eps=1e-5)
        for rows in (1, 2, 5, 8):
            x, residual = torch.randn(1, rows, k).to(dtype), torch.randn(1, rows, n).to(dtype)
            seen = kernels.rms_norm(x, norm.weight, norm.eps)
            if form and dtype != torch.float32:
                seen = rounded_activations(seen)
            y = seen.double() @ matrix.T + (w.bias.double() if w.bias is not None else 0)
            # one step of an activation's rounding apart, where its value lies on the border
            slack = 0 if form is None or dtype == torch.float32 else 2e-3
            close(kernels.linear(x, w, norm), y, ROUNDING[dtype] + slack)
            close(kernels.linear(x, w, norm, wide=True), y, 3e-3 if dtype != torch.float32 else 2e-6)
            close(kernels.linear(x, w, norm, residual), y + residual.double(), ROUNDING[dtype] + slack)
            if n % 32 == 0:
                gate, up = y.chunk(2, -1)
                both = torch.nn.functional.silu(gate) * up
                close(kernels.linear(x, w, norm, swiglu=True), both, 2 * ROUNDING[dtype] + 2 * slack)


@built
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [0, 1, 5, 64])
def test_linear_near_its_reference(form, rows):
    """Within the rounding of activations of the weight-only product, whichever path the number of rows takes."""
    for dtype in DTYPES:
        torch.manual_seed(0)
        plain, fast = make(96, 200, form, dtype), packed(make(96, 200, form, dtype))
        torch.manual_seed(0)
        fast_plain = make(96, 200, form, dtype)
        x = torch.randn(rows, 200).to(dtype)
        expected = kernels.linear_reference(x, fast_plain)
        assert expected.shape == kernels.linear(x, plain).shape == kernels.linear(x, fast).shape == (rows, 96)
        if rows:
            ours = kernels.linear(x, packed(fast_plain))
            error = (ours.float() - expected.float()).norm() / expected.float().norm()
            assert error < (2e-2 if form and dtype != torch.float32 else ROUNDING[dtype])


@pytest.mark.parametrize("form", FORMATS[1:])
@pytest.mark.parametrize("experts", [None, 3])
def test_packing_is_undone_exactly(form, experts):
    for n, k in SIZES:
        w = make(n, k, form, torch.float32, experts)
        parts = (w.weight, w.scales, w.zeros)
        back = kernels.unpack(*kernels.pack(*parts), n)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(parts, back, strict=True))


@built
@pytest.mark.parametrize("form", FORMATS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_packed(form, dtype):
    for n, k in SIZES:
        w = make(n, k, form, dtype)
        expected = w.matrix(dtype)
        assert torch.equal(packed(w).matrix(dtype), expected)


@built
@pytest.mark.parametrize("form", FORMATS)
def test_extremes(form):
    """Weights and scales at the ends of their ranges, and activations that are not finite."""
    for dtype in DTYPES:
        w = make(32, 64, form, dtype)
        if form == "int8":
            w.weight[:8], w.weight[8:16], w.scales[16:20] = -128, 127, 0
        elif form:
            w.weight[:8], w.weight[8:16], w.scales[16:20], w.zeros[20:24], w.zeros[24:28] = 255, 0, 0, 255, 0
        matrix, x = w.matrix(torch.float32), torch.randn(2, 64).to(dtype)
        seen = x if form is None or dtype == torch.float32 else rounded_activations(x)
        packed(w)
        close(kernels.linear(x, w), seen.double() @ matrix.double().T, ROUNDING[dtype] + 1e-3)
        assert not kernels.linear(torch.zeros(1, 64, dtype=dtype), w).any()
        for bad in (torch.nan, torch.inf, -torch.inf):
            x[1, 3] = bad
            y = kernels.linear(x, w)
            assert y[0].isfinite().all() and not y[1].isfinite().any() or form is None and not y[1].isfinite().all()


@built
@pytest.mark.parametrize("heads, kv_heads, d", [(4, 4, 8), (9, 3, 64), (8, 1, 128), (6, 2, 40)])
@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(heads, kv_heads, d, window, dtype):
    torch.manual_seed(0)
    for qk_norm in (False, True):
        config = ModelConfig(64, 1, heads, kv_heads, d, 64, 64, 1024, sliding_window=window, qk_norm=qk_norm)
        a = Attention(config).requires_grad_(False)
        for norm in (a.q_norm, a.k_norm):
            if norm is not None:
                norm.weight.data = torch.rand(d).to(dtype)
        width, norm = (heads + 2 * kv_heads) * d, RMSNorm(64, 1e-5)
        norm.weight.data = torch.rand(64).to(dtype)
        a.wqkv, a.wo = make(width, 64, None, dtype, bias=qk_norm), make(64, heads * d, None, dtype, bias=qk_norm)
        packed(a.wqkv), packed(a.wo)
        for batch, tokens, start in [(1, 1, 0), (1, 1, 600), (3, 1, 255), (2, 4, 3), (1, 8, 509), (1, 8, 0)]:
            a.setup_cache(batch, 640, torch.empty(0, dtype=dtype))
            a.k_cache.normal_()
            a.v_cache.normal_()
            a.v_cache[:, :, start + tokens :] = torch.nan  # what is not there yet must not be looked at
            x, positions = torch.randn(batch, tokens, 64).to(dtype), torch.arange(start, start + tokens)
            ours, expected, k, v = both_attentions(a, x, norm, positions, rope_table(config, 640)[positions])
            close(ours, expected, 3 * ROUNDING[dtype])
            close(k, a.k_cache, 2 * ROUNDING[dtype])
            close(v[:, :, : start + tokens], a.v_cache[:, :, : start + tokens], 2 * ROUNDING[dtype])


@built
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward(form, dtype):
    torch.manual_seed(0)
    for bias in (False, True):
        config, norm = ModelConfig(64, 1, 4, 2, 16, 48, 64, 64, ffn_bias=bias), RMSNorm(64, 1e-5)
        norm.weight.data = torch.rand(64).to(dtype)
        f = FeedForward(config).requires_grad_(False)
        f.w13, f.w2 = make(96, 64, form, dtype, bias=bias), make(64, 48, form, dtype, bias=bias)
        xs = [torch.randn(1, rows, 64).to(dtype) for rows in (1, 3, 8)]
        expected = [f(x, norm) for x in xs]
        kernels.enable(f)
        for x, y in zip(xs, expected, strict=True):
            error = (f(x, norm).float() - y.float()).norm() / y.float().norm()
            assert error < (3e-2 if form and dtype != torch.float32 else ROUNDING[dtype])


@built
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(form, dtype):
    torch.manual_seed(0)
    config = ModelConfig(64, 1, 4, 2, 16, 48, 64, 64, moe=MoE(6, 3))
    e, norm = Experts(config).requires_grad_(False), RMSNorm(64, 1e-5)
    norm.weight.data = torch.rand(64).to(dtype)
    e.w13, e.w2 = make(96, 64, form, dtype, experts=6), make(64, 48, form, dtype, experts=6)
    for rows in (1, 3, 8):
        x = torch.randn(1, rows, 64).to(dtype)
        share, chosen = torch.rand(1, rows, 6).softmax(-1).topk(3, dim=-1)
        for w in (e.w13, e.w2):
            w.fast = None
        expected = e(x, norm, share, chosen)
        quick = Experts(config)
        quick.w13, quick.w2 = make(96, 64, form, dtype, experts=6), make(64, 48, form, dtype, experts=6)
        quick.load_state_dict(e.state_dict(), strict=True, assign=True)
        kernels.enable(quick)
        ours = quick(x, norm, share, chosen)
        error = (ours.float() - expected.float()).norm() / expected.float().norm()
        assert error < (3e-2 if form and dtype != torch.float32 else ROUNDING[dtype])


@built
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [{}, {"qkv_bias": True, "sliding_window": 5}, {"qk_norm": True, "ffn_bias": True}])
def test_layers(form, dtype, family):
    """All blocks in one operation give what they give one by one, to the last bit."""
    torch.manual_seed(0)
    config = ModelConfig(64, 3, 4, 2, 16, 48, 64, 64, **family)
    model = Transformer(config).requires_grad_(False)
    for name, p in model.named_parameters():
        p.data = (torch.rand(p.shape) if "norm" in name else torch.randn(p.shape) * 0.2).to(dtype)
    for layer in model.layers:
        for half, name, n, k in [(layer.attention, "wqkv", 128, 64), (layer.attention, "wo", 64, 64),
                                 (layer.feed_forward, "w13", 96, 64), (layer.feed_forward, "w2", 64, 48)]:  # fmt: skip
            setattr(half, name, make(n, k, form, dtype, bias=getattr(half, name).bias is not None))
    kernels.enable(model)
    assert model.stack
    outputs = []
    for stack in (model.stack, None):
        model.stack = stack
        model.setup_caches(2, 16)
        steps = [torch.arange(0, 4), torch.arange(4, 5), torch.arange(5, 8)]
        outputs.append([model.hidden(torch.full((2, len(step)), 7), step) for step in steps])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@built
def test_what_does_not_fit_is_refused():
    """An error, not a write beyond the cache."""
    model = Transformer(ModelConfig(64, 1, 4, 2, 16, 48, 64, 64)).requires_grad_(False)
    kernels.enable(model)
    model.setup_caches(1, 8)
    for rows, positions in [(2, [0]), (1, [8]), (1, [-1]), (1, [7, 8])]:
        with pytest.raises(RuntimeError, match="no room"):
            n = len(positions)
            kernels.layers(torch.randn(rows, n, 64), model, torch.tensor(positions), model.rope[:n])
    with pytest.raises(RuntimeError, match="int64"):
        kernels.layers(torch.randn(1, 1, 64), model, torch.zeros(1, dtype=torch.int32), model.rope[:1])
    with pytest.raises(RuntimeError, match="type"):
        kernels.layers(torch.randn(1, 1, 64).half(), model, torch.zeros(1, dtype=torch.long), model.rope[:1])


@built
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_without_this_cpus_instructions(march):
    """The same tests, on the code for CPUs with AVX2 alone and for those of any kind."""
    if os.environ.get("CXXFLAGS") or os.uname().machine != "x86_64":
        return
    env = os.environ | {"CXXFLAGS": f"-march={march}"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_builds_do_not_meet(tmp_path):
    """Several processes that build at once, into one empty cache, all get the library. A broken one is built again."""
    command = [sys.executable, "-c", "import kernels; assert kernels.build()"]
    cxx = f"{os.environ.get('CXX', 'g++')} -O0"  # a command with an argument
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": cxx, "CXXFLAGS": "-O0"}
    runs = [subprocess.Popen(command, env=env, cwd=ROOT) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    (library,) = (tmp_path / "gpt-fast").iterdir()
    library.write_bytes(b"")
    assert subprocess.run(command, env=env, cwd=ROOT).returncode == 0 and library.stat().st_size > 0


@pytest.mark.parametrize("compiler", ["false", "script"])
def test_no_compiler(compiler, tmp_path):
    """One line, and everything runs on PyTorch."""
    command = [sys.executable, "-c", "import kernels; assert not kernels.build()"]
    (tmp_path / "script").write_text("no program")
    (tmp_path / "script").chmod(0o755)
    cxx = "false" if compiler == "false" else str(tmp_path / "script")
    env = os.environ | {"CXX": cxx, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "slower" in done.stderr

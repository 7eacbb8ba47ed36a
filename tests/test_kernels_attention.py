"""Attention in C++ and in PyTorch against attention in float64."""

import math
from typing import NamedTuple

import pytest
import torch

from config import ModelConfig
from kernels.schema import AttentionParams
from layers import attention
from layers.attention import is_sdpa_compatible
from layers.backend import CPU_BACKEND, TORCH_BACKEND
from layers.kv_cache import LayerCache
from layers.rope import alibi_slopes, rope_table
from model import DTYPES
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.exact_results import (
    attend,
    exact_attention,
    exact_cache,
    make_norm,
)
from tests.cpu_kernels import built

pytestmark = pytest.mark.usefixtures("threads")
ANY_TOKENS = CPU_BACKEND.with_limits(attend=math.inf)  # kernels for prompts, too, where PyTorch may be faster


def check_attention(starts, query_len, n_heads, cache: LayerCache, window, norms, **options):
    """Checks attention of query_len new tokens in each sequence, at the positions starts. The cache holds NaN where
    nothing has been written yet. Only the keys and values of the new tokens may change in it."""
    (_, n_kv_heads, _, d), dtype = cache.k.shape, cache.k.dtype
    start_pos = torch.tensor(starts)
    qkv = torch.randn(len(starts), query_len, (n_heads + 2 * n_kv_heads) * d).to(dtype)
    before = cache._replace(k=cache.k.clone(), v=cache.v.clone())
    ours = attend(qkv, cache, start_pos, n_heads, ANY_TOKENS, window, *norms, **options)
    exact = exact_attention(qkv, before, start_pos, n_heads, window, norms, factor=dtype, **options)
    bounds.check(ours, *exact)
    k, v, k_error = exact_cache(qkv, before, start_pos, n_heads, norms)
    bounds.check(cache.k.nan_to_num(9), k.nan_to_num(9), k_error)
    assert torch.equal(cache.v.nan_to_num(9), v.nan_to_num(9))


def make_cache(starts, n_kv_heads, length, d, dtype, cos_sin) -> LayerCache:
    """starts: how many tokens each sequence has in the cache"""
    k, v = torch.randn(2, len(starts), n_kv_heads, length, d).to(dtype).unbind()
    for b, start in enumerate(starts):
        k[b, :, start:], v[b, :, start:] = torch.nan, torch.nan
    return LayerCache(k, v, cos_sin)


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(4, 4, 8), (9, 3, 64), (8, 1, 128), (2, 1, 256), (6, 2, 40)])
@pytest.mark.parametrize("window", [0, 7, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(n_heads, n_kv_heads, d, window, dtype):
    """Sequences have different positions, in a cache that holds NaN where nothing has been written yet."""
    torch.manual_seed(0)
    config = ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024)
    cos_sin = rope_table(config, 640)
    for qk_norm in (False, True):
        norms = [make_norm(d, dtype) if qk_norm else None for _ in "qk"]
        for tokens, starts in [(1, [0]), (1, [600]), (1, [255, 3, 639]), (4, [3, 510]), (8, [509]), (8, [0])]:
            cache = make_cache(starts, n_kv_heads, 640, d, dtype, cos_sin)
            check_attention(starts, tokens, n_heads, cache, window, norms)


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(9, 3, 64), (2, 1, 256), (6, 2, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_many_tokens(n_heads, n_kv_heads, d, dtype):
    """Attention of more tokens, in one sequence or in many, with longer splits than few tokens have."""
    torch.manual_seed(0)
    cos_sin = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 4096), 1410)
    for window, tokens, starts in [
        (0, 9, [510]), (0, 64, [0]), (0, 33, [1340]), (300, 7, [0, 1390, 3, 600]), (0, 1, list(range(0, 1020, 60))),
    ]:
        cache = make_cache(starts, n_kv_heads, max(starts) + tokens + 8, d, dtype, cos_sin)
        check_attention(starts, tokens, n_heads, cache, window, norms=(None, None))


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(4, 4, 8), (9, 3, 64), (2, 1, 256), (6, 2, 40)])
@pytest.mark.parametrize("norm", ["no norm", "norm of heads", "norm of all heads"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_sinks_scale_softcap(n_heads, n_kv_heads, d, norm, dtype):
    """Sinks, scale and softcap, each alone and together, and with ALiBi. Sinks are far below, among and far above the
    scores."""
    torch.manual_seed(0)
    cos_sin = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024), 640)
    widths = {"no norm": None, "norm of heads": (d, d), "norm of all heads": (n_heads * d, n_kv_heads * d)}[norm]
    norms = [None, None] if widths is None else [make_norm(width, dtype) for width in widths]
    sinks = (torch.randn(n_heads) * 4 + 2).to(dtype)
    sinks[:2] = torch.tensor([-200, 200])
    alibi = {"alibi_slopes": alibi_slopes(n_heads)}
    for window, options in [
        (0, {"sinks": sinks}), (0, {"scale": 0.3}), (7, {"softcap": 2.0}), (0, alibi),
        (300, {"sinks": sinks, "scale": 0.3, "softcap": 5.0} | alibi),
    ]:
        for tokens, starts in [(1, [0]), (1, [255, 3, 639]), (4, [3, 510])]:
            cache = make_cache(starts, n_kv_heads, 640, d, dtype, cos_sin)
            check_attention(starts, tokens, n_heads, cache, window, norms, **options)


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(9, 3, 64), (6, 2, 40)])
@pytest.mark.parametrize("norm", ["no norm", "norm of heads", "norm of all heads"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_prompt_in_pytorch(n_heads, n_kv_heads, d, norm, dtype, monkeypatch):
    """The kernel rope_and_cache together with attention in PyTorch, for more tokens than a step has."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "EAGER_QUERIES", 30)
    cos_sin = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024), 180)
    widths = {"no norm": None, "norm of heads": (d, d), "norm of all heads": (n_heads * d, n_kv_heads * d)}[norm]
    norms = [None, None] if widths is None else [make_norm(width, dtype) for width in widths]
    for window, options in [(0, {}), (20, {}), (20, {"sinks": torch.randn(n_heads).to(dtype)})]:
        for starts in ([0, 0], [5, 110]):
            k, v = torch.randn(2, 2, n_kv_heads, 180, d).to(dtype).unbind()
            cache, start_pos = LayerCache(k, v, cos_sin), torch.tensor(starts)
            before = cache._replace(k=k.clone(), v=v.clone())
            qkv = torch.randn(2, 70, (n_heads + 2 * n_kv_heads) * d).to(dtype)
            ours = attend(qkv, cache, start_pos, n_heads, CPU_BACKEND, window, *norms, **options)
            y, bound = exact_attention(qkv, before, start_pos, n_heads, window, norms, factor=dtype, **options)
            bounds.check(ours, y, bound + 4 * bounds.U[dtype] * v.double().abs().max())  # PyTorch rounds weights too
            exact_k, exact_v, k_error = exact_cache(qkv, before, start_pos, n_heads, norms)
            bounds.check(k, exact_k, k_error)
            assert torch.equal(v, exact_v)


@built
@pytest.mark.parametrize("n_heads, n_kv_heads, d", [(4, 4, 8), (9, 3, 64), (8, 1, 128), (2, 1, 256), (6, 2, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_prompt(n_heads, n_kv_heads, d, dtype):
    """The kernel for prefill, for more tokens than a step has."""
    torch.manual_seed(0)
    cos_sin = rope_table(ModelConfig(64, 1, n_heads, n_kv_heads, d, 64, 64, 1024), 400)
    alibi, sinks = {"alibi_slopes": alibi_slopes(n_heads)}, (torch.randn(n_heads) * 4 + 2).to(dtype)
    sinks[:2] = torch.tensor([-200, 200])
    everything = {"sinks": sinks, "scale": 0.3, "softcap": 5.0} | alibi
    norms = [make_norm(n_heads * d, dtype), make_norm(n_kv_heads * d, dtype)]
    for tokens, starts, window, options in [
        (65, [0], 0, {}), (200, [131], 0, {}), (33, [0, 367], 0, {}), (130, [7], 1, {}),
        (90, [200, 0, 3], 70, {}), (150, [0], 0, alibi), (66, [64], 5, everything),
    ]:
        cache = make_cache(starts, n_kv_heads, 400, d, dtype, cos_sin)
        check_attention(starts, tokens, n_heads, cache, window, norms, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reference(dtype):
    """Attention in PyTorch against the same exact result, also for more tokens than the kernels take."""
    torch.manual_seed(0)
    cos_sin = rope_table(ModelConfig(64, 1, 6, 2, 16, 64, 64, 1024), 64)
    for tokens, starts, window in [(1, [5, 63], 0), (20, [0, 0], 0), (20, [0, 0], 6), (20, [44, 3], 9), (64, [0], 100)]:
        start_pos, qkv = torch.tensor(starts), torch.randn(len(starts), tokens, 10 * 16).to(dtype)
        k, v = torch.randn(2, len(starts), 2, 64, 16).to(dtype).unbind()
        cache = LayerCache(k, v, cos_sin)
        y, bound = exact_attention(qkv, cache, start_pos, 6, window, (None, None), factor=dtype)
        ours = attend(qkv, cache, start_pos, 6, TORCH_BACKEND, window)
        bounds.check(ours, y, bound + 4 * bounds.U[dtype] * v.double().abs().max())  # SDPA rounds weights too


def test_attention_reference_sinks_scale_softcap():
    torch.manual_seed(0)
    cos_sin = rope_table(ModelConfig(64, 1, 6, 2, 16, 64, 64, 1024), 64)
    norms = [make_norm(6 * 16, torch.float32), make_norm(2 * 16, torch.float32)]
    alibi = {"alibi_slopes": alibi_slopes(6)}
    everything = {"sinks": torch.randn(6), "scale": 0.3, "softcap": 2.0} | alibi
    for options in ({"scale": 0.3}, {"sinks": torch.randn(6)}, alibi, everything):
        for tokens, starts, window in [(1, [5, 63], 0), (20, [0, 0], 6), (64, [0], 100)]:
            start_pos, qkv = torch.tensor(starts), torch.randn(len(starts), tokens, 10 * 16)
            k, v = torch.randn(2, len(starts), 2, 64, 16).unbind()
            cache = LayerCache(k, v, cos_sin)
            y, bound = exact_attention(qkv, cache, start_pos, 6, window, norms, factor=torch.float32, **options)
            ours = attend(qkv, cache, start_pos, 6, TORCH_BACKEND, window, *norms, **options)
            bounds.check(ours, y, bound + 4 * bounds.U[torch.float32] * v.double().abs().max())


@built
def test_tokens_beyond_the_cache_are_refused():
    """New tokens beyond the cache raise an error, and nothing is written."""
    cos_sin, weight = rope_table(ModelConfig(64, 1, 4, 2, 16, 48, 64, 64), 8), torch.zeros(1, 2, 8, 16)
    cache = LayerCache(weight, weight.clone(), cos_sin)
    for rows, tokens, start_pos in [(2, 1, [0]), (1, 1, [8]), (1, 1, [-1]), (1, 2, [7]), (1, 1, [0, 1]), (1, 65, [0])]:
        with pytest.raises(RuntimeError, match="no room"):
            attend(torch.randn(rows, tokens, 128), cache, torch.tensor(start_pos), 4, ANY_TOKENS)
    with pytest.raises(RuntimeError, match="int64"):
        attend(torch.randn(1, 1, 128), cache, torch.zeros(1, dtype=torch.int32), 4, CPU_BACKEND)
    with pytest.raises(RuntimeError, match="type"):
        attend(torch.randn(1, 1, 128).half(), cache, torch.zeros(1, dtype=torch.long), 4, CPU_BACKEND)
    for norms, sinks, said in [
        ((64, 16), 4, "wide"), ((16, 32), 4, "wide"), ((48, 32), 4, "wide"), ((64, 32), 3, r"\[H\]"),
    ]:
        q_norm, k_norm = (make_norm(width, torch.float32) for width in norms)
        with pytest.raises(RuntimeError, match=said):
            attend(
                torch.randn(1, 1, 128), cache, torch.zeros(1, dtype=torch.long), 4, CPU_BACKEND, 0, q_norm,
                k_norm, torch.zeros(sinks),
            )
    for slopes in (torch.zeros(3), torch.zeros(4).half()):
        with pytest.raises(RuntimeError, match="slopes"):
            attend(
                torch.randn(1, 1, 128), cache, torch.zeros(1, dtype=torch.long), 4, CPU_BACKEND, alibi_slopes=slopes
            )


def test_sdpa_computes_no_option_that_it_lacks():
    """SDPA would ignore the option, also a new one, without an error."""
    class MoreParams(NamedTuple):
        n_heads: int
        sinks: torch.Tensor | None = None
        temperature_scale: float = 1.0

    assert is_sdpa_compatible(MoreParams(2)) and is_sdpa_compatible(MoreParams(4, temperature_scale=1.0))
    assert not is_sdpa_compatible(MoreParams(2, temperature_scale=0.9))
    params, weight = AttentionParams(n_heads=2, scale=0.25), torch.ones(16)
    assert is_sdpa_compatible(params._replace(window=5, q_norm_weight=weight, k_norm_weight=weight, eps=1e-6))
    for option in ({"softcap": 2.0}, {"sinks": torch.zeros(2)}, {"alibi_slopes": torch.zeros(2)}):
        assert not is_sdpa_compatible(params._replace(**option))

"""Attention.

    attend             q/k norm, RoPE or ALiBi, cache write, attention over the cache: one kernel, or attend_torch
    rope_and_cache     the first step of attend_torch: norm, RoPE and cache write. It may be a kernel of its own
    eager_attention    the second step, from queries to outputs: the definition of attention
    sdpa_attention     the second step by PyTorch's SDPA, where it can compute all options (is_sdpa_compatible)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.schema import AttentionParams, active_fields
from layers.backend import Backend, contiguous, count_tokens
from layers.kv_cache import LayerCache
from layers.linear import apply_softcap, rms_norm_torch

EAGER_QUERIES = 256  # queries whose scores eager_attention holds in memory at a time
# The fields of AttentionParams that SDPA can compute, or that rope_and_cache has computed before
SDPA_FIELDS = {"n_heads", "scale", "window", "q_norm_weight", "k_norm_weight", "eps"}


def attend(
    qkv: Tensor, params: AttentionParams, cache: LayerCache, start_pos: Tensor, backend: Backend
) -> Tensor:
    """Causal attention of the T new tokens of each sequence: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. Writes the new
    keys and values to cache, the first at start_pos [B]."""
    B, T, _ = qkv.shape
    kernel = backend.kernel_for("attend", B * T)
    if kernel is None or not backend.supports_queries(T, params.n_heads // cache.k.shape[1]):
        return attend_torch(qkv, params, cache, start_pos, backend)
    return kernel(
        contiguous(qkv), contiguous(start_pos), cache.k, cache.v, cos_sin=cache.cos_sin, **params._asdict()
    )


def attend_torch(
    qkv: Tensor, params: AttentionParams, cache: LayerCache, start_pos: Tensor, backend: Backend
) -> Tensor:
    B, T, _ = qkv.shape
    positions = start_pos[:, None] + torch.arange(T, device=qkv.device)  # [B, T]
    q = rope_and_cache(qkv, params, cache, positions, backend).transpose(1, 2)  # [B, H, T, D]
    if is_sdpa_compatible(params):
        y = sdpa_attention(q, params, cache, positions)
    else:
        chunk = T if torch.compiler.is_compiling() else EAGER_QUERIES  # a loop would specialize the graph
        chunks = zip(q.split(chunk, dim=2), positions.split(chunk, dim=1), strict=True)
        y = torch.cat([eager_attention(queries, params, cache, at) for queries, at in chunks], dim=2)
    return y.transpose(1, 2).reshape(B, T, -1)


def rope_and_cache(
    qkv: Tensor, params: AttentionParams, cache: LayerCache, positions: Tensor, backend: Backend
) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values into the cache at positions [B, T]. The positions
    of a sequence are contiguous. Returns the queries [B, T, H, D]."""
    kernel = backend.kernel_for("rope_and_cache", count_tokens(qkv))
    if kernel is None:
        return rope_and_cache_torch(qkv, params, cache, positions)
    return kernel(
        contiguous(qkv), contiguous(positions[:, 0]), cache.k, cache.v,
        cos_sin=cache.cos_sin, n_heads=params.n_heads, q_norm_weight=params.q_norm_weight,
        k_norm_weight=params.k_norm_weight, eps=params.eps,
    )


def rope_and_cache_torch(qkv: Tensor, params: AttentionParams, cache: LayerCache, positions: Tensor) -> Tensor:
    (B, T, _), (_, G, S, D) = qkv.shape, cache.k.shape
    H = params.n_heads
    qk, v = qkv.view(B, T, -1, D).split([H + G, G], dim=2)  # [B, T, heads, D]
    if params.q_norm_weight is not None:
        q, k = qk.split([H, G], dim=2)
        q = norm_heads(q, params.q_norm_weight, params.eps)
        k = norm_heads(k, params.k_norm_weight, params.eps)
        qk = torch.cat([q, k], dim=2)
    q, k = apply_rope(qk, cache.cos_sin[positions]).split([H, G], dim=2)
    if fills_cache(T, S):
        cache.k.copy_(k.transpose(1, 2))
        cache.v.copy_(v.transpose(1, 2))
    else:
        sequences = torch.arange(B, device=qkv.device)[:, None]
        cache.k[sequences, :, positions] = k
        cache.v[sequences, :, positions] = v
    return q


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norms x [B, T, H, D] over each head or, if weight is [H D], over all heads together."""
    if weight.numel() == x.shape[-1]:
        return rms_norm_torch(x, weight, eps)
    return rms_norm_torch(x.flatten(2), weight, eps).view_as(x)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates x [B, T, H, D] by cos_sin [B, T, D/2, 2]. Elements i and i + D/2 are a pair, as in transformers."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos_sin[:, :, None].unbind(-1)  # [B, T, 1, D/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def eager_attention(q: Tensor, params: AttentionParams, cache: LayerCache, positions: Tensor) -> Tensor:
    """Attends to the keys and values in the cache: q [B, H, T, D] at positions [B, T] -> [B, H, T, D]."""
    (B, H, T, D), (_, G, S, _) = q.shape, cache.k.shape
    grouped = q.view(B, G, H // G, T, D)
    scores = (grouped @ cache.k[:, :, None].mT).float() * params.scale  # [B, G, H/G, T, S]
    if params.softcap:
        scores = apply_softcap(scores, params.softcap)
    if params.alibi_slopes is not None:
        distances = torch.arange(S, device=q.device) - positions[..., None]  # [B, T, S]
        bias = params.alibi_slopes[:, None, None] * distances[:, None]  # [B, H, T, S]
        scores = scores + bias.view_as(scores)
    mask = causal_mask(positions, S, params.window)
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    if params.sinks is not None:  # the scores of an additional key without a value
        sinks = params.sinks.float().view(1, G, H // G, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    p = scores.softmax(-1)[..., :S].to(cache.v.dtype)
    return (p @ cache.v[:, :, None]).view(B, H, T, D)


def causal_mask(positions: Tensor, S: int, window: int) -> Tensor:
    """Returns whether the token at each of positions [B, T] sees each of S keys: [B, 1, T, S], for all heads."""
    queries, keys = positions[..., None], torch.arange(S, device=positions.device)
    mask = keys <= queries  # [B, T, S]
    if window:
        mask &= keys > queries - window
    return mask[:, None]


def is_sdpa_compatible(params: AttentionParams) -> bool:
    """Whether every option that PyTorch's SDPA lacks is off. A new option counts as one of these."""
    return active_fields(params) <= SDPA_FIELDS


def sdpa_attention(q: Tensor, params: AttentionParams, cache: LayerCache, positions: Tensor) -> Tensor:
    """eager_attention by PyTorch's scaled_dot_product_attention, which is faster."""
    (B, H, T, D), (_, G, S, _) = q.shape, cache.k.shape
    if T == 1:  # with the query heads of a key/value head in the dimension T, SDPA is several times faster
        mask = causal_mask(positions, S, params.window)
        y = F.scaled_dot_product_attention(q.view(B, G, -1, D), cache.k, cache.v, attn_mask=mask, scale=params.scale)
        return y.view(B, H, 1, D)
    k, v = cache.k, cache.v
    if q.is_cuda:  # with enable_gqa, SDPA's slowest kernel runs if there is a mask or in float32
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    if fills_cache(T, S) and not 0 < params.window < T:  # is_causal lets SDPA choose flash attention
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=params.scale, enable_gqa=True)
    mask = causal_mask(positions, S, params.window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=params.scale, enable_gqa=True)


def fills_cache(T: int, S: int) -> bool:
    """Whether T new tokens fill a cache of S positions. Then the first token is at position 0. False under
    torch.compile, where comparing T with S would specialize the graph."""
    return not torch.compiler.is_compiling() and S == T

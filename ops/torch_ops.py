"""The operations in plain PyTorch, for steps without kernels: prefill, other devices, and --kernels off. These
functions are also the definition with which the tests compare the kernels.

ops/dispatch.py describes the operations. A weight of any format is read through linear.dequantized_weight(dtype). If
the weight is packed for a backend, a kernel of this backend dequantizes the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import is_gated
from kernels.arguments import AttentionParams, Epilogue, Filters, LayerCache
from ops import aten

if TYPE_CHECKING:  # layers.py imports dispatch.py, which imports this file
    from layers import ExpertsDown, ExpertsGateUp, Linear, LinearBase, WeightMatrix

EAGER_QUERIES = 256  # queries whose scores eager_attention holds in memory at a time
SMALLEST_TEMPERATURE = 1e-30  # a smaller divisor could round to 0 in float32
# On a CPU sort_for_top_p searches for the likely tokens, so that it need not sort the whole vocabulary.
SMALL_VOCABULARY = 1000  # with this many tokens or fewer, sorting is faster than searching
FIRST_THRESHOLD = 2**-10  # a probability; fewer than 1024 tokens can exceed it
VOCAB_BLOCK = 64  # neighbouring token ids; the search skips a block if no token exceeds the threshold


def matmul(x: Tensor, linear: Linear) -> Tensor:
    """x W^T [+ bias] for x [..., K]: [..., N]."""
    n_tokens = x.numel() // x.shape[-1]
    if linear.aten_weight is not None and n_tokens <= aten.MAX_ATEN_TOKENS:
        y = aten.multiply(x.flatten(0, -2), linear.aten_weight).view(*x.shape[:-1], -1)
        return y if linear.bias is None else y + linear.bias
    weight, bias = linear.dequantized_weight(x.dtype), linear.bias
    if n_tokens == 1 and x.is_cpu and x.dtype.itemsize == 2 and not torch.compiler.is_compiling():
        y = torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)  # about twice as fast as F.linear
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def apply_epilogue(y: Tensor, epilogue: Epilogue, out_dtype: torch.dtype | None) -> Tensor:
    """The steps of epilogue after the activation: y [..., N] -> [..., N] in out_dtype, or in y.dtype."""
    _activation, out_scale, softcap, clip = epilogue  # all fields: a new field raises ValueError here
    if out_scale != 1:
        y = y * out_scale
    if out_dtype is not None:
        y = y.to(out_dtype)
    if softcap:
        y = apply_softcap(y, softcap)
    return y.clamp(-clip, clip) if clip else y


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm (arXiv:1910.07467). F.rms_norm computes x / rms(x) in float32 and rounds it to x.dtype. The weight
    is multiplied after the rounding, as in transformers."""
    y = F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    return y if residual is None else residual + y


def permute_inputs(x: Tensor, input_order: Tensor) -> Tensor:
    return x.index_select(-1, input_order)


def apply_softcap(x: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(x / softcap), which stays between -softcap and softcap."""
    return softcap * torch.tanh(x / softcap)


def activate(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1) if is_gated(activation) else (None, x)
    match activation:
        case "swiglu":
            return F.silu(gate) * up
        case "geglu":
            return F.gelu(gate) * up
        case "geglu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        case "clamped_swiglu":  # gpt-oss
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)
        case "gelu_pytorch_tanh":
            return F.gelu(up, approximate="tanh")
        case "relu2":
            return F.relu(up).square()
    raise ValueError(f"activation {activation!r} has no formula")


def embed(tokens: Tensor, table: WeightMatrix, scale: float, dtype: torch.dtype) -> Tensor:
    if table.format.is_quantized:
        x = table.format.dequantize({name: t[tokens] for name, t in table.tensors().items()}, dtype)
    else:
        x = F.embedding(tokens, table.weight)
    return x if scale == 1 else x * scale


# ---- Attention ------------------------------------------------------------------------------------------------------


def rope_and_cache(
    qkv: Tensor, params: AttentionParams, cache: LayerCache, cos_sin: Tensor, positions: Tensor
) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values into the cache at positions [B, T]. Returns the
    queries [B, T, H, D]."""
    (B, T, _), (_, G, S, D) = qkv.shape, cache.k.shape
    H = params.n_heads
    qk, v = qkv.view(B, T, -1, D).split([H + G, G], dim=2)  # [B, T, heads, D]
    if params.q_norm_weight is not None:
        q, k = qk.split([H, G], dim=2)
        q = norm_heads(q, params.q_norm_weight, params.eps)
        k = norm_heads(k, params.k_norm_weight, params.eps)
        qk = torch.cat([q, k], dim=2)
    q, k = apply_rope(qk, cos_sin[positions]).split([H, G], dim=2)
    if fills_cache(T, S):
        cache.k.copy_(k.transpose(1, 2))
        cache.v.copy_(v.transpose(1, 2))
    else:
        sequences = torch.arange(B, device=qkv.device)[:, None]
        cache.k[sequences, :, positions] = k
        cache.v[sequences, :, positions] = v
    return q


def cached_attention(
    q: Tensor, params: AttentionParams, cache: LayerCache, alibi_slopes: Tensor | None, positions: Tensor
) -> Tensor:
    """Attends from q [B, T, H, D] at positions [B, T] to the keys and values in the cache: [B, T, H D]."""
    B, T, _, _ = q.shape
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # cut the part of the cache that has no tokens yet
        n_keys = int(positions.max()) + 1
        cache = cache._replace(k=cache.k[:, :, :n_keys], v=cache.v[:, :, :n_keys])
    q = q.transpose(1, 2)  # [B, H, T, D]
    if params.is_sdpa_compatible(alibi_slopes):
        y = sdpa_attention(q, params, cache, positions)
    else:
        step = T if torch.compiler.is_compiling() else EAGER_QUERIES  # a loop would specialize the graph
        parts = zip(q.split(step, dim=2), positions.split(step, dim=1), strict=True)
        y = torch.cat([eager_attention(q, params, cache, alibi_slopes, positions) for q, positions in parts], dim=2)
    return y.transpose(1, 2).reshape(B, T, -1)


def fills_cache(T: int, S: int) -> bool:
    """Returns whether T new tokens fill a cache of S positions. Then the first token is at position 0. Returns False
    under torch.compile, where comparing T with S would specialize the graph."""
    return not torch.compiler.is_compiling() and S == T


def sdpa_attention(q: Tensor, params: AttentionParams, cache: LayerCache, positions: Tensor) -> Tensor:
    """Attends by PyTorch's scaled_dot_product_attention: q [B, H, T, D] at positions [B, T] -> [B, H, T, D]."""
    (B, H, T, D), (_, G, S, _) = q.shape, cache.k.shape
    if T == 1:  # fold the query heads of a key/value head into the dimension T: SDPA is then several times faster
        mask = causal_mask(positions, S, params.window)
        y = F.scaled_dot_product_attention(q.view(B, G, -1, D), cache.k, cache.v, attn_mask=mask, scale=params.scale)
        return y.view(B, H, 1, D)
    k, v = cache.k, cache.v
    if q.is_cuda:  # with enable_gqa SDPA uses its slowest kernel, if there is a mask or in float32
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    if fills_cache(T, S) and not 0 < params.window < T:  # is_causal lets SDPA choose flash attention
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=params.scale, enable_gqa=True)
    mask = causal_mask(positions, S, params.window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=params.scale, enable_gqa=True)


def eager_attention(
    q: Tensor, params: AttentionParams, cache: LayerCache, alibi_slopes: Tensor | None, positions: Tensor
) -> Tensor:
    """Attention with softcap, ALiBi or sinks, which SDPA lacks: q [B, H, T, D] at positions [B, T] -> [B, H, T, D]."""
    (B, H, T, D), (_, G, S, _) = q.shape, cache.k.shape
    grouped = q.view(B, G, H // G, T, D)
    scores = (grouped @ cache.k[:, :, None].mT).float() * params.scale  # [B, G, H/G, T, S]
    if params.softcap:
        scores = apply_softcap(scores, params.softcap)
    if alibi_slopes is not None:
        distances = torch.arange(S, device=q.device) - positions[..., None]  # [B, T, S]
        bias = alibi_slopes[:, None, None] * distances[:, None]  # [B, H, T, S]
        scores = scores + bias.view_as(scores)
    mask = causal_mask(positions, S, params.window)
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    if params.sinks is not None:  # the scores of one more key
        sinks = params.sinks.float().view(1, G, H // G, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    p = scores.softmax(-1)[..., :S].to(cache.v.dtype)
    return (p @ cache.v[:, :, None]).view(B, H, T, D)


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norms x [B, T, H, D] over each head or, if weight is [H D], over all heads together."""
    if weight.numel() == x.shape[-1]:
        return rms_norm(x, weight, eps)
    return rms_norm(x.flatten(2), weight, eps).view_as(x)


def causal_mask(positions: Tensor, S: int, window: int) -> Tensor:
    """Returns whether the token at each of positions [B, T] sees each of S keys: [B, 1, T, S], for all heads."""
    queries, keys = positions[..., None], torch.arange(S, device=positions.device)
    mask = keys <= queries  # [B, T, S]
    if window:
        mask &= keys > queries - window
    return mask[:, None]


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates x [B, T, H, D] by cos_sin [B, T, D/2, 2], cos and sin. Elements i and i + D/2 are a pair, as in Hugging
    Face transformers."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos_sin[:, :, None].unbind(-1)  # [B, T, 1, D/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


# ---- Mixture of experts ---------------------------------------------------------------------------------------------


def route(logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    n_experts = logits.shape[-1] - (1 if n_shared_experts else 0)
    topk_weights, topk_ids = F.softmax(logits[..., :n_experts], dim=-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    if n_shared_experts:
        shared_ids = torch.arange(n_experts, n_experts + n_shared_experts, device=logits.device)
        shared_ids = shared_ids.expand(*topk_ids.shape[:-1], n_shared_experts)
        shared_weights = logits[..., n_experts:].sigmoid().expand(*topk_ids.shape[:-1], n_shared_experts)
        topk_ids, topk_weights = torch.cat([topk_ids, shared_ids], -1), torch.cat([topk_weights, shared_weights], -1)
    return topk_weights, topk_ids


def experts_gate_up(x: Tensor, linear: ExpertsGateUp, topk_ids: Tensor) -> Tensor:
    """ops/dispatch.py: experts_gate_up without norm and activation, which are calls of their own."""
    repeated = x[..., None, :].expand(*topk_ids.shape, x.shape[-1])  # [B, T, top_k, dim]
    y = expert_matmuls(repeated.reshape(-1, x.shape[-1]), linear, topk_ids.flatten(), n_new_tokens=x.shape[-2])
    return y.view(*topk_ids.shape, linear.out_features)


def experts_down(
    hidden: Tensor, linear: ExpertsDown, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    y = expert_matmuls(hidden.flatten(0, -2), linear, topk_ids.flatten(), n_new_tokens=hidden.shape[-3])
    y = y.view(*topk_ids.shape, linear.out_features) * topk_weights[..., None].to(y.dtype)
    y = y.sum(-2)
    return y if residual is None else residual + y


def expert_matmuls(x: Tensor, linear: LinearBase, expert_ids: Tensor, n_new_tokens: int) -> Tensor:
    """Multiplies row i of x [M, K] with the matrix [N, K] of expert expert_ids[i]: [M, N]. n_new_tokens: of each
    sequence."""
    if not torch.compiler.is_compiling():
        return loop_over_experts(x, linear, expert_ids)
    if n_new_tokens == 1:
        return gather_experts(x, linear, expert_ids)
    return torch.compiler.disable(loop_over_experts)(x, linear, expert_ids)


def loop_over_experts(x: Tensor, linear: LinearBase, expert_ids: Tensor) -> Tensor:
    """One matmul for each expert that occurs in expert_ids. The host waits for the device to read expert_ids."""
    y = x.new_empty(len(x), linear.out_features)
    for e in expert_ids.unique().tolist():
        rows = torch.where(expert_ids == e)[0]
        bias = None if linear.bias is None else linear.bias[e]
        y[rows] = F.linear(x[rows], linear.dequantized_weight(x.dtype, e), bias)
    return y


def gather_experts(x: Tensor, linear: LinearBase, expert_ids: Tensor) -> Tensor:
    """One matrix for each row, for a compiled decode step, which has few rows. torch.compile fuses look-up,
    dequantization and matmul into one loop. Plain PyTorch would copy the weights of the experts."""
    y = (linear.dequantized_weight(x.dtype, expert_ids).float() * x[:, None].float()).sum(-1)
    return (y if linear.bias is None else y + linear.bias[expert_ids].float()).to(x.dtype)


# ---- Sampling -------------------------------------------------------------------------------------------------------
#
# A CUDA graph holds these functions, so on a GPU none may wait for the device (.item(), .tolist()).


def sample(
    logits: Tensor, temperature: float, filters: Filters, uniform: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Tensor:
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs, ids = filtered_probs(logits, temperature, filters, temperatures)
        drawn = multinomial(probs, uniform)
        tokens = drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
    is_finite = logits.isfinite().all(-1)
    return torch.where(is_finite, tokens, -1)


def filtered_probs(
    logits: Tensor, temperature: float, filters: Filters, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns probabilities and ids of the C tokens from which sample draws, both [B, C]. The probabilities of a
    sequence need not sum to one. If ids is None, C is V, and the tokens are in the order of their ids."""
    divisor: float | Tensor = max(temperature, SMALLEST_TEMPERATURE)
    if temperatures is not None:
        divisor = temperatures.clamp(min=SMALLEST_TEMPERATURE)
    # Subtracting the maximum makes the largest score 0 and all others negative. So with a small temperature no score
    # overflows to +inf, and the probabilities of the negative scores underflow to 0.
    scores = (logits - logits.amax(-1, keepdim=True)) / divisor
    has_top_k = 0 < filters.top_k < scores.shape[-1]
    ids = None
    if has_top_k:
        scores, ids = scores.topk(filters.top_k)  # the likeliest first
    probs = scores.softmax(-1)
    if filters.top_p < 1:
        if not has_top_k:
            probs, ids = sort_for_top_p(probs, filters.top_p)
        before = F.pad(probs.cumsum(-1)[:, :-1], (1, 0))  # the summed probability of all likelier tokens
        probs = probs.masked_fill(before >= filters.top_p, 0)
    if filters.min_p > 0:
        probs = probs.masked_fill(probs < filters.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def sort_for_top_p(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Finds the likeliest tokens of each sequence, enough for their probabilities to sum to top_p. probs [B, V] ->
    probabilities and ids, both [B, C], the likeliest first. Equally likely tokens are in the order of their ids. Zeros
    pad a sequence that needs fewer than C tokens."""
    # On a GPU and when compiled, C must not depend on the probabilities. So all V tokens are sorted there.
    if probs.device.type != "cpu" or torch.compiler.is_compiling() or probs.shape[-1] <= SMALL_VOCABULARY:
        return probs.sort(dim=-1, descending=True, stable=True)
    values, ids = zip(*[search_for_top_p(row, top_p) for row in probs], strict=True)
    return pad_sequence(values, batch_first=True), pad_sequence(ids, batch_first=True)


def search_for_top_p(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """sort_for_top_p for one sequence [V]. Sorts only the tokens above a threshold. If their probabilities sum to less
    than top_p, divides the threshold by 8 and searches again. Usually the first threshold is low enough."""
    missing = -len(probs) % VOCAB_BLOCK
    blocks = (F.pad(probs, (0, missing)) if missing else probs).view(-1, VOCAB_BLOCK)
    largest = blocks.amax(-1)
    threshold = FIRST_THRESHOLD
    while threshold > (1 - top_p) / len(probs):  # a lower threshold leaves out few tokens: sort all
        block_ids = (largest > threshold).nonzero()[:, 0]
        values = blocks[block_ids].flatten()
        indices = (values > threshold).nonzero()[:, 0]  # into values
        values, order = values[indices].sort(descending=True, stable=True)
        if len(values) and values.cumsum(-1)[-1] >= top_p:
            indices = indices[order]
            return values, block_ids[indices // VOCAB_BLOCK] * VOCAB_BLOCK + indices % VOCAB_BLOCK
        threshold /= 8
    return probs.sort(descending=True, stable=True)


def multinomial(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draws a token for each sequence: probs [B, V] -> ids [B]. The probabilities of a sequence need not sum to one. A
    token of probability 0 is never drawn.

    uniform: the random numbers [B, 1], in [0, 1); None: PyTorch's generator makes them."""
    # Inverse transform sampling: take the first token whose cumulative probability exceeds the random number. Not every
    # accelerator has float64.
    dtype = torch.float64 if probs.device.type in ("cpu", "cuda") else torch.float32
    cumulative = probs.cumsum(-1, dtype=dtype)
    if uniform is None:
        uniform = torch.rand(len(probs), 1, dtype=dtype, device=probs.device)
    uniform = uniform.to(dtype).clamp(max=1 - torch.finfo(dtype).eps)  # rounding could give 1
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)

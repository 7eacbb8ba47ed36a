"""Attention of a decode step on a GPU, in Triton: a few new tokens of each sequence attend to the KV cache.

    attend    q/k norm, RoPE, cache write and softmax([ALiBi] q k^T) v, registered as torch.ops.gptfast_triton.attend

This is Flash-Decoding. The cache is cut into splits. Each program goes over one split with FlashAttention's online
softmax (arXiv:2205.14135). The program that finishes last combines the results of all splits. Programs read on the
device how many tokens the cache holds, so one CUDA graph serves every position.

In shape comments B is sequences, T new tokens of a sequence, S max_seq_len of the cache, H query heads, G key/value
heads, D head_dim. In a program M is queries and N keys. BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_HALF and BLOCK_T are powers
of two. Queries and keys are two halves, lo and hi (heads.py says why).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.schema import AttentionParams, empty_attend, register_triton
from kernels.triton.epilogue import apply_softcap
from kernels.triton.heads import (
    HeadLayout,
    NewTokens,
    is_inside,
    load_halves,
    load_new_keys_values,
    load_new_queries,
    load_vectors,
    norm_and_rope,
    store_halves,
    store_vectors,
)
from kernels.triton.launch import dot_dtype, gpu_info, is_last_program, pdl_options, pdl_wait, semaphores

LOG2_E = tl.constexpr(1.4426950408889634)


class ScoreMod(NamedTuple):
    """The score_mod of FlexAttention: how q k^T becomes the scores of a base-2 softmax. None leaves the step out."""

    scale: tl.tensor
    softcap: tl.tensor | None
    slope: tl.tensor | None  # [BLOCK_M], ALiBi: slope * distance is added


class SoftmaxState(NamedTuple):
    """The softmax of M queries over the keys so far, with FlashAttention's names. The output is acc / l_i."""

    m_i: tl.tensor  # [M], the largest score
    l_i: tl.tensor  # [M], the sum of 2^(score - m_i)
    acc: tl.tensor  # [M, D], the sum of 2^(score - m_i) v


class AttentionSizes(NamedTuple):
    """The sizes of a program of attend."""

    BLOCK_M: int  # queries, padded to a power of two
    BLOCK_N: int  # cached tokens of a step
    N_SPLITS: int
    N_SPLITS_PADDED: int  # N_SPLITS, padded to a power of two


class Cache(NamedTuple):
    k_ptr: tl.tensor  # [B, G, S, D]
    v_ptr: tl.tensor  # [B, G, S, D]
    stride_b: tl.tensor  # from a sequence to the next, of both tensors
    stride_g: tl.tensor  # from a head to the next
    S: tl.tensor


class HeadNorms(NamedTuple):
    """The norms of queries and keys. None means no norm."""

    q_weight_ptr: tl.tensor | None  # [Q_NORM_HEADS, D]
    k_weight_ptr: tl.tensor | None  # [K_NORM_HEADS, D]
    eps: tl.tensor


class SplitResults(NamedTuple):
    """The results of the splits of a key/value head. The program that finishes last combines them."""

    out_ptr: tl.tensor  # [B, T, H, N_SPLITS, D] float32: acc
    ml_ptr: tl.tensor  # [B, T, H, N_SPLITS, 2] float32: m_i and l_i
    semaphores_ptr: tl.tensor  # [B, G]


@triton.jit
def attend_kernel(
    qkv_ptr, start_pos_ptr, cos_sin_ptr,  # [B, T, (H + 2 G) D], [B], [S, D / 2, 2]
    cache, norms,  # Cache, HeadNorms
    sinks_ptr, alibi_slopes_ptr,  # [H], [H], or None
    out_ptr, results,  # [B, T, H, D]; SplitResults, or None if N_SPLITS is 1
    qk_scale, qk_softcap, T,
    HEADS: tl.constexpr, SIZES: tl.constexpr,  # heads.py: HeadLayout; AttentionSizes
    WINDOW: tl.constexpr, DTYPE: tl.constexpr, USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Attends to one split. Grid: [N_SPLITS, G, B]. Program (i, g, b) has the T * H / G queries that use key/value head
    g, and split i of the cached tokens of sequence b. The program of the last split also has the new tokens:

        start_pos    0                              start           start + T
                     |   cached tokens              |   new tokens  |
        program i    |    0    |    1    |    2     |       2       |            for N_SPLITS = 3

    Only this program reads the new tokens, from qkv, and writes to the cache. So no program waits for another. The
    program of a sequence and key/value head that finishes last combines all splits.

    The softmax has base 2, because exp2 is one instruction: qk_scale and qk_softcap include a factor of LOG2_E."""
    # Prologue. Load the new tokens first: their addresses do not depend on start, whose load takes time
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    qkv_ptr += sequence * T * HEADS.TOKEN_STRIDE
    S, cache_offset = cache.S, sequence * cache.stride_b + kv_head.to(tl.int64) * cache.stride_g
    k_cache_ptr, v_cache_ptr = cache.k_ptr + cache_offset, cache.v_ptr + cache_offset
    start = tl.load(start_pos_ptr + sequence).to(tl.int32)  # position of the first new token
    q = load_new_queries(qkv_ptr, kv_head, T, HEADS, SIZES.BLOCK_M)
    k, v = load_new_keys_values(qkv_ptr, kv_head, T, HEADS)
    tokens = NewTokens(start, T, S, cos_sin_ptr)
    q = norm_and_rope(q, tokens, norms.q_weight_ptr, qkv_ptr, norms.eps, HEADS.Q_NORM_HEADS, HEADS, DTYPE)
    has_sink = q.mask & (split == SIZES.N_SPLITS - 1)  # the sink counts once, in the last split
    softmax = initial_softmax(sinks_ptr, q.head, has_sink, SIZES.BLOCK_M, HEADS.BLOCK_D)
    score_mod = ScoreMod(qk_scale, qk_softcap, load_slopes(alibi_slopes_ptr, q.head, q.mask))

    # Loop over the cached tokens of the split
    begin, end = split_bounds(start, S, split, WINDOW, SIZES.N_SPLITS, SIZES.BLOCK_N)
    softmax = attend_to_split(
        softmax, q, k_cache_ptr, v_cache_ptr, begin, end, start, score_mod, HEADS.D, WINDOW, SIZES.BLOCK_N
    )

    # The new tokens: attend to them, and write them into the cache
    if split == SIZES.N_SPLITS - 1:
        keys_ptr = qkv_ptr + HEADS.N_HEADS * HEADS.D
        new_k = norm_and_rope(k, tokens, norms.k_weight_ptr, keys_ptr, norms.eps, HEADS.K_NORM_HEADS, HEADS, DTYPE)
        mask_k = k.mask & is_inside(start + k.token, S)
        softmax = attend_to_new(softmax, q, new_k, v, mask_k, score_mod, WINDOW)
        store_halves(k_cache_ptr, (start + k.token) * HEADS.D, new_k.lo, new_k.hi, mask_k, HEADS.D)
        store_vectors(v_cache_ptr, (start + k.token) * HEADS.D, v, mask_k, HEADS.D)

    # Epilogue
    query = (sequence * T + q.token) * HEADS.N_HEADS + q.head  # index in [B, T, H]
    if SIZES.N_SPLITS == 1:
        store_vectors(out_ptr, query * HEADS.D, softmax.acc / softmax.l_i[:, None], q.mask, HEADS.D)
    else:
        semaphore = sequence * HEADS.N_KV_HEADS + kv_head  # index in [B, G]
        store_and_combine(
            softmax, out_ptr, results, query, split, semaphore, q.mask, HEADS.D, SIZES.N_SPLITS, SIZES.N_SPLITS_PADDED
        )


@triton.jit
def split_bounds(start, S, split, WINDOW: tl.constexpr, N_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the cached tokens [begin, end) of a split. The cached tokens that some new token sees are cut into
    N_SPLITS equal splits of whole blocks."""
    first = tl.maximum(start - WINDOW + 1, 0) if WINDOW else 0
    split_len = tl.cdiv(tl.cdiv(start - first, N_SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * split_len
    return begin, tl.minimum(begin + split_len, tl.minimum(start, S))


# ---- Softmax --------------------------------------------------------------------------------------------------------


@triton.jit
def initial_softmax(sinks_ptr, head, has_sink, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns the SoftmaxState before the first key. A sink is the score of a key whose value is zero."""
    m_i = tl.full([BLOCK_M], -1e38, tl.float32)  # not -inf: if a query sees no key, -inf - -inf is NaN
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=has_sink, other=0.0).to(tl.float32) * LOG2_E
        m_i = tl.where(has_sink, tl.maximum(sink, m_i, propagate_nan=tl.PropagateNan.ALL), m_i)
        l_i = tl.where(has_sink, tl.exp2(sink - m_i), l_i)
    return SoftmaxState(m_i, l_i, tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32))


@triton.jit
def load_slopes(alibi_slopes_ptr, head, mask):
    if alibi_slopes_ptr is None:
        return None
    else:
        return tl.load(alibi_slopes_ptr + head, mask=mask, other=0.0) * LOG2_E


@triton.jit
def attend_to_split(
    softmax, q, k_cache_ptr, v_cache_ptr, begin, end, start, score_mod,
    D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Adds the cached tokens [begin, end) to the softmax of the queries q (NewHeads). start: the first new token."""
    position = start + q.token
    for n in range(begin, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        k_lo, k_hi = load_halves(k_cache_ptr, key * D, key < end, D, q.lo.shape[1])
        v = load_vectors(v_cache_ptr, key * D, key < end, D, softmax.acc.shape[1])
        mask = (key < end)[None, :] & q.mask[:, None]
        if WINDOW:
            mask &= key[None, :] > position[:, None] - WINDOW
        distance = key[None, :] - position[:, None]
        softmax = online_softmax_step(softmax, q, k_lo, k_hi, v, mask, score_mod, distance)
    return softmax


@triton.jit
def attend_to_new(softmax, q, k, v, mask_k, score_mod, WINDOW: tl.constexpr):
    """Adds the new tokens to the softmax of the queries q: keys k (both NewHeads) and values v [BLOCK_T, BLOCK_D]. A
    query sees no later token."""
    mask = mask_k[None, :] & q.mask[:, None] & (k.token[None, :] <= q.token[:, None])
    if WINDOW:
        mask &= k.token[None, :] > q.token[:, None] - WINDOW
    distance = k.token[None, :] - q.token[:, None]
    return online_softmax_step(softmax, q, k.lo, k.hi, v, mask, score_mod, distance)


@triton.jit
def online_softmax_step(softmax, q, k_lo, k_hi, v, mask, score_mod, distance):
    """Adds keys [N, D] and values v [N, D] to the softmax of the queries q (NewHeads).

    mask [M, N]: whether a query sees a key.
    distance [M, N]: the position of the key minus the position of the query.
    Keys, values and p are rounded to the type of q, because both operands of tl.dot must have the same type."""
    m_i, l_i, acc = softmax
    k_lo, k_hi, v = k_lo.to(q.lo.dtype), k_hi.to(q.lo.dtype), v.to(q.lo.dtype)
    qk = tl.dot(q.lo, tl.trans(k_lo), input_precision="ieee") + tl.dot(q.hi, tl.trans(k_hi), input_precision="ieee")
    qk *= score_mod.scale
    if score_mod.softcap is not None:
        qk = apply_softcap(qk, score_mod.softcap)
    if score_mod.slope is not None:
        qk += score_mod.slope[:, None] * distance
    qk = tl.where(mask, qk, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(qk, axis=1))
    p = tl.exp2(qk - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    acc = acc * alpha[:, None] + tl.dot(p.to(q.lo.dtype), v, input_precision="ieee")
    l_i = l_i * alpha + tl.sum(p, axis=1)
    return SoftmaxState(m_new, l_i, acc)


@triton.jit
def store_and_combine(
    softmax, out_ptr, results, query, split, semaphore, mask_m,
    D: tl.constexpr, N_SPLITS: tl.constexpr, N_SPLITS_PADDED: tl.constexpr,
):
    """Stores the result of one split. The program that finishes last combines all splits and stores the output.
    query [BLOCK_M]: indices of the queries in [B, T, H]."""
    first_split = query * N_SPLITS  # index in [B, T, H, N_SPLITS]
    store_vectors(results.out_ptr, (first_split + split) * D, softmax.acc, mask_m, D)
    tl.store(results.ml_ptr + (first_split + split) * 2, softmax.m_i, mask=mask_m)
    tl.store(results.ml_ptr + (first_split + split) * 2 + 1, softmax.l_i, mask=mask_m)
    if is_last_program(results.semaphores_ptr + semaphore, N_SPLITS):
        out = combine_splits(results, first_split, mask_m, D, N_SPLITS, N_SPLITS_PADDED, softmax.acc.shape[1])
        store_vectors(out_ptr, query * D, out, mask_m, D)


@triton.jit
def combine_splits(
    results, first_split, mask_m,
    D: tl.constexpr, N_SPLITS: tl.constexpr, N_SPLITS_PADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Combines the results of all splits into the output [BLOCK_M, BLOCK_D]. first_split [BLOCK_M]: indices of the
    first split of each query in [B, T, H, N_SPLITS]. Other programs have just written the results, so loads bypass the
    L1 cache (.cg)."""
    split = tl.arange(0, N_SPLITS_PADDED)[None, :]
    ml_ptr, mask_ml = results.ml_ptr + (first_split[:, None] + split) * 2, mask_m[:, None] & (split < N_SPLITS)
    m_splits = tl.load(ml_ptr, mask=mask_ml, other=-1e38, cache_modifier=".cg")  # [BLOCK_M, N_SPLITS_PADDED]
    l_splits = tl.load(ml_ptr + 1, mask=mask_ml, other=0.0, cache_modifier=".cg")
    m_i = tl.max(m_splits, axis=1)
    l_i = tl.sum(tl.exp2(m_splits - m_i[:, None]) * l_splits, axis=1)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask_acc = mask_m[:, None] & (d < D)
    acc = tl.zeros([first_split.shape[0], BLOCK_D], tl.float32)
    for i in tl.range(0, N_SPLITS, loop_unroll_factor=4):
        index = first_split + i
        m_split = tl.load(results.ml_ptr + index * 2, mask=mask_m, other=-1e38, cache_modifier=".cg")
        acc_split = tl.load(results.out_ptr + index[:, None] * D + d, mask=mask_acc, other=0.0, cache_modifier=".cg")
        acc += tl.exp2(m_split - m_i)[:, None] * acc_split
    return acc / l_i[:, None]


# ---- The operation --------------------------------------------------------------------------------------------------


@register_triton
def attend(
    qkv: Tensor, start_pos: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos_sin: Tensor, **params
) -> Tensor:
    """Attends from T new tokens of each sequence: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. The first new token is at
    start_pos [B]. T may be up to MAX_TRITON_QUERY_LEN and T H / G up to MAX_TRITON_QUERIES, because a program holds all
    queries of a key/value head.

    k_cache, v_cache: [B, G, S, D], the keys and values of earlier tokens. attend writes those of the new tokens. Both
    may be views of longer caches: attend reads and writes nothing beyond S.
    params: the fields of AttentionParams (kernels/schema.py)."""
    params = AttentionParams(**params)
    n_heads, window, softcap = params.n_heads, params.window, params.softcap
    q_norm_weight, k_norm_weight = params.q_norm_weight, params.k_norm_weight
    (batch, query_len, _), (_, n_kv_heads, max_seq_len, head_dim) = qkv.shape, k_cache.shape
    n_splits = choose_splits(gpu_info(qkv.device).num_sms, batch * n_kv_heads, max_seq_len, window)
    block_d = max(16, triton.next_power_of_2(head_dim))
    n_queries = batch * query_len * n_heads
    out = empty_attend(qkv, start_pos, k_cache, v_cache, n_heads=n_heads)
    results = None
    if n_splits > 1:
        results = SplitResults(
            qkv.new_empty(n_queries, n_splits, head_dim, dtype=torch.float32),
            qkv.new_empty(n_queries, n_splits, 2, dtype=torch.float32),
            semaphores(qkv.device, batch * n_kv_heads),
        )
    grid = n_splits, n_kv_heads, batch
    attend_kernel[grid](
        qkv_ptr=qkv, start_pos_ptr=start_pos, cos_sin_ptr=cos_sin,
        cache=Cache(k_cache, v_cache, k_cache.stride(0), k_cache.stride(1), S=max_seq_len),
        norms=HeadNorms(q_norm_weight, k_norm_weight, params.eps),
        sinks_ptr=params.sinks, alibi_slopes_ptr=params.alibi_slopes, out_ptr=out, results=results,
        qk_scale=LOG2_E.value * params.scale, qk_softcap=LOG2_E.value * softcap if softcap else None, T=query_len,
        HEADS=HeadLayout(
            n_heads, n_kv_heads, HEADS_PER_KV_HEAD=n_heads // n_kv_heads, D=head_dim, TOKEN_STRIDE=qkv.shape[-1],
            BLOCK_D=block_d, BLOCK_HALF=max(16, triton.next_power_of_2(head_dim // 2)),
            Q_NORM_HEADS=1 if q_norm_weight is None else q_norm_weight.numel() // head_dim,
            K_NORM_HEADS=1 if k_norm_weight is None else k_norm_weight.numel() // head_dim,
        ),
        SIZES=AttentionSizes(
            BLOCK_M=max(16, triton.next_power_of_2(query_len * n_heads // n_kv_heads)),
            BLOCK_N=max(16, 8192 // (block_d * qkv.element_size())),  # 8 KB of keys, 8 KB of values, two stages
            N_SPLITS=n_splits, N_SPLITS_PADDED=triton.next_power_of_2(n_splits),
        ),
        WINDOW=window, DTYPE=dot_dtype(qkv), num_stages=2, **pdl_options(qkv.device, grid),
    )
    return out


def choose_splits(num_sms: int, programs_per_split: int, max_seq_len: int, window: int) -> int:
    """Returns N_SPLITS: two programs for every multiprocessor, but no split shorter than 64 tokens. A cache of up to
    128 tokens is one split, so nothing is combined."""
    n_visible = min(max_seq_len, window) if window else max_seq_len
    if n_visible <= 128:
        return 1
    return min(triton.cdiv(2 * num_sms, programs_per_split), triton.cdiv(n_visible, 64))

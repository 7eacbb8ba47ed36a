"""Attention of a decode step on a GPU, in Triton: a few new tokens in each row look at the tokens in the KV cache.

    attend    q/k norm, RoPE, cache write and softmax(q k^T) v, registered as torch.ops.gptfast_triton.attend

It is Flash-Decoding: each program goes over a part of the cache with FlashAttention's online softmax
(arXiv:2205.14135), and a second kernel combines the parts. How many tokens are in the cache is read on the device, so
one CUDA graph serves every position. kernels/reference.py computes the same in plain PyTorch.

In shape comments B is rows of the batch, T new tokens in each, S the cache's length, H query heads, G key/value heads,
D head_dim. RoPE rotates the two halves of a head against each other. So queries and keys are held as two halves, q_lo
and q_hi, of D / 2 elements each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.schema import implement_in_triton
from kernels.triton_linear import dot_dtype, gpu_of

MAX_TOKENS = tl.constexpr(16)  # new tokens in a row
LOG2_E = 1.4426950408889634


@triton.jit
def attend_kernel(
    qkv_ptr, k_cache_ptr, v_cache_ptr, positions_ptr, rope_ptr, q_norm_ptr, k_norm_ptr, out_ptr, stats_ptr,
    eps, qk_scale, cache_stride_b, cache_stride_g, S, T,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, N_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A program has one row of the batch, one key/value head with the BLOCK_M queries that look at it, and one of
    N_SPLITS equal parts of the cached tokens, which it reads BLOCK_N at a time. The last split also has the new tokens.
    It takes them from qkv, and it alone writes them into the cache: so no program waits for another.

    qk_scale is that of logits to base 2, whose exponential is one instruction."""
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HEADS_PER_KV: tl.constexpr = N_HEADS // N_KV_HEADS
    TOKEN_STRIDE: tl.constexpr = (N_HEADS + 2 * N_KV_HEADS) * D
    qkv_ptr += row * T * TOKEN_STRIDE
    k_cache_ptr += row * cache_stride_b + kv_head.to(tl.int64) * cache_stride_g
    v_cache_ptr += row * cache_stride_b + kv_head.to(tl.int64) * cache_stride_g
    start = tl.load(positions_ptr + row).to(tl.int32)  # position of the row's first new token

    # Queries: all heads of token 0, all heads of token 1, ...
    offs_m = tl.arange(0, BLOCK_M)
    token, head = offs_m // HEADS_PER_KV, kv_head * HEADS_PER_KV + offs_m % HEADS_PER_KV
    mask_m = token < T
    q_offset, mask_q = token * TOKEN_STRIDE + head * D, mask_m & is_inside(start + token, S)
    q_lo, q_hi = load_rotated(qkv_ptr, q_offset, q_norm_ptr, rope_ptr, start + token, mask_q, eps, D, BLOCK_HALF, DTYPE)
    m_i = tl.full([BLOCK_M], -1e38, tl.float32)  # not -inf: for a query that sees nothing, -inf - -inf would be NaN
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    begin = tl.maximum(start - WINDOW + 1, 0) if WINDOW else 0
    split_len = tl.cdiv(tl.cdiv(start - begin, N_SPLITS), BLOCK_N) * BLOCK_N
    begin += split * split_len
    end = tl.minimum(begin + split_len, tl.minimum(start, S))
    m_i, l_i, acc = attend_cached(
        q_lo, q_hi, m_i, l_i, acc, k_cache_ptr, v_cache_ptr, begin, end, start + token, mask_m, qk_scale,
        D, WINDOW, BLOCK_N,
    )  # fmt: skip

    if split == N_SPLITS - 1:
        new = tl.arange(0, MAX_TOKENS)
        mask_new = (new < T) & is_inside(start + new, S)
        k_offset = new * TOKEN_STRIDE + (N_HEADS + kv_head) * D
        k_lo, k_hi = load_rotated(
            qkv_ptr, k_offset, k_norm_ptr, rope_ptr, start + new, mask_new, eps, D, BLOCK_HALF, DTYPE
        )
        v = load_rows(qkv_ptr, k_offset + N_KV_HEADS * D, mask_new, D, BLOCK_D)
        mask = mask_new[None, :] & mask_m[:, None] & (new[None, :] <= token[:, None])
        if WINDOW:
            mask &= new[None, :] > token[:, None] - WINDOW
        m_i, l_i, acc = online_softmax_step(q_lo, q_hi, k_lo, k_hi, v, mask, qk_scale, m_i, l_i, acc)
        store_halves(k_cache_ptr, (start + new) * D, k_lo, k_hi, mask_new, D)
        store_rows(v_cache_ptr, (start + new) * D, v, mask_new, D)

    out_row = (row * T + token) * N_HEADS + head  # of [B, T, H]
    if N_SPLITS == 1:
        store_rows(out_ptr, out_row * D, acc / l_i[:, None], mask_m, D)
    else:  # [B, T, H, N_SPLITS, D] and their maxima and sums [B, T, H, N_SPLITS, 2]
        out_row = out_row * N_SPLITS + split
        store_rows(out_ptr, out_row * D, acc, mask_m, D)
        tl.store(stats_ptr + out_row * 2, m_i, mask=mask_m)
        tl.store(stats_ptr + out_row * 2 + 1, l_i, mask=mask_m)


@triton.jit
def attend_cached(
    q_lo, q_hi, m_i, l_i, acc, k_cache_ptr, v_cache_ptr, begin, end, position, mask_m, qk_scale,
    D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Takes the cached tokens [begin, end) into the running softmax of queries at position [BLOCK_M]."""
    for n in range(begin, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        k_lo, k_hi = load_halves(k_cache_ptr, key * D, key < end, D, q_lo.shape[1])
        v = load_rows(v_cache_ptr, key * D, key < end, D, acc.shape[1])
        mask = (key < end)[None, :] & mask_m[:, None]
        if WINDOW:
            mask &= key[None, :] > position[:, None] - WINDOW
        m_i, l_i, acc = online_softmax_step(q_lo, q_hi, k_lo, k_hi, v, mask, qk_scale, m_i, l_i, acc)
    return m_i, l_i, acc


@triton.jit
def online_softmax_step(q_lo, q_hi, k_lo, k_hi, v, mask, qk_scale, m_i, l_i, acc):
    """Takes keys [N, D] and values v [N, D] that mask [M, N] lets queries [M, D] see into a running softmax: its maxima
    m_i [M], its sums l_i [M] and the unnormalized output acc [M, D]. The products' factors are of q's type."""
    k_lo, k_hi, v = k_lo.to(q_lo.dtype), k_hi.to(q_lo.dtype), v.to(q_lo.dtype)
    qk = tl.dot(q_lo, tl.trans(k_lo), input_precision="ieee") + tl.dot(q_hi, tl.trans(k_hi), input_precision="ieee")
    qk = tl.where(mask, qk * qk_scale, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(qk, axis=1))
    p = tl.exp2(qk - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    acc = acc * alpha[:, None] + tl.dot(p.to(q_lo.dtype), v, input_precision="ieee")
    l_i = l_i * alpha + tl.sum(p, axis=1)
    return m_new, l_i, acc


@triton.jit
def load_rotated(
    ptr, offset, norm_ptr, rope_ptr, position, mask, eps, D: tl.constexpr, BLOCK_HALF: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Rows of D elements at ptr + offset [R], normed and rotated for position [R]: their halves, [R, BLOCK_HALF]
    each."""
    a, b = load_halves(ptr, offset, mask, D, BLOCK_HALF)
    a, b = a.to(tl.float32), b.to(tl.float32)
    d = tl.arange(0, BLOCK_HALF)
    d_mask = d < D // 2
    if norm_ptr is not None:
        inverse_rms = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + eps)[:, None]
        a *= inverse_rms * tl.load(norm_ptr + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        b *= inverse_rms * tl.load(norm_ptr + D // 2 + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
    angle_ptr = rope_ptr + position[:, None] * D + 2 * d[None, :]  # rope is [S, D / 2, 2]
    cos = tl.load(angle_ptr, mask=mask[:, None] & d_mask[None, :], other=0.0)
    sin = tl.load(angle_ptr + 1, mask=mask[:, None] & d_mask[None, :], other=0.0)
    return (a * cos - b * sin).to(DTYPE), (b * cos + a * sin).to(DTYPE)


@triton.jit
def is_inside(position, S):
    """Whether there is such a position in the cache."""
    return (position >= 0) & (position < S)


@triton.jit
def load_rows(ptr, offset, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH elements at ptr + offset [R]: [R, BLOCK], the rest zeros."""
    d = tl.arange(0, BLOCK)
    return tl.load(ptr + offset[:, None] + d[None, :], mask=mask[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def load_halves(ptr, offset, mask, D: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The same rows' halves: [R, BLOCK_HALF] each."""
    d = tl.arange(0, BLOCK_HALF)
    lo_ptr, mask = ptr + offset[:, None] + d[None, :], mask[:, None] & (d < D // 2)[None, :]
    lo = tl.load(lo_ptr, mask=mask, other=0.0)
    hi = tl.load(lo_ptr + D // 2, mask=mask, other=0.0)
    return lo, hi


@triton.jit
def store_rows(ptr, offset, x, mask, WIDTH: tl.constexpr):
    d = tl.arange(0, x.shape[1])
    tl.store(ptr + offset[:, None] + d[None, :], x, mask=mask[:, None] & (d < WIDTH)[None, :])


@triton.jit
def store_halves(ptr, offset, lo, hi, mask, D: tl.constexpr):
    d = tl.arange(0, lo.shape[1])
    lo_ptr, mask = ptr + offset[:, None] + d[None, :], mask[:, None] & (d < D // 2)[None, :]
    tl.store(lo_ptr, lo, mask=mask)
    tl.store(lo_ptr + D // 2, hi, mask=mask)


@triton.jit
def combine_splits_kernel(
    splits_ptr, stats_ptr, out_ptr, D: tl.constexpr, N_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One query's output [D] from its splits' [N_SPLITS, D] and their maxima and sums [N_SPLITS, 2]."""
    query, split, d = tl.program_id(0), tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    index, mask = query * N_SPLITS + split, split < N_SPLITS
    m_i = tl.load(stats_ptr + index * 2, mask=mask, other=-float("inf"))
    l_i = tl.load(stats_ptr + index * 2 + 1, mask=mask, other=0.0)
    alpha = tl.exp2(m_i - tl.max(m_i, axis=0))
    acc = load_rows(splits_ptr, index.to(tl.int64) * D, mask, D, BLOCK_D)
    out = tl.sum(acc * alpha[:, None], axis=0) / tl.sum(alpha * l_i, axis=0)
    tl.store(out_ptr + query * D + d, out, mask=d < D)


@implement_in_triton
def attend(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, rope: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, n_heads: int, window: int,
) -> Tensor:  # fmt: skip
    """qkv [B, T, (H + 2 G) D] -> [B, T, H D]. The first token of each row is at positions [B], the others right after
    it.

    Keys and values go into the caches [B, G, S, D], which hold those of earlier tokens and may be views of longer
    ones. Nothing is read or written beyond S. rope [S, D / 2, 2] is cosine and sine of every position's angles.
    window: a token sees no more than so many, itself included, if it is not 0. T H / G may be up to 64: a program has
    that much room."""
    (n_rows, n_tokens, _), (_, n_kv_heads, cache_len, head_dim) = qkv.shape, k_cache.shape
    n_splits = choose_splits(gpu_of(qkv.device).n_processors, n_rows * n_kv_heads, cache_len, window)
    block_d = max(16, triton.next_power_of_2(head_dim))
    n_queries = n_rows * n_tokens * n_heads
    out = qkv.new_empty(n_rows, n_tokens, n_heads * head_dim)
    if n_splits == 1:
        splits, stats = out, out
    else:
        splits = qkv.new_empty(n_queries, n_splits, head_dim, dtype=torch.float32)
        stats = qkv.new_empty(n_queries, n_splits, 2, dtype=torch.float32)
    attend_kernel[(n_splits, n_kv_heads, n_rows)](
        qkv, k_cache, v_cache, positions, rope, q_norm, k_norm, splits, stats,
        eps, LOG2_E * head_dim**-0.5, k_cache.stride(0), k_cache.stride(1), cache_len, n_tokens,
        n_heads, n_kv_heads, head_dim, window, n_splits,
        BLOCK_M=max(16, triton.next_power_of_2(n_tokens * n_heads // n_kv_heads)),
        BLOCK_N=max(16, 8192 // (block_d * qkv.element_size())),  # 8 KB of keys and of values, twice: any GPU has room
        BLOCK_D=block_d,
        BLOCK_HALF=max(16, triton.next_power_of_2(head_dim // 2)),
        DTYPE=dot_dtype(qkv),
        num_stages=2,
    )  # fmt: skip
    if n_splits > 1:
        combine_splits_kernel[(n_queries,)](
            splits, stats, out, head_dim, n_splits, block_d, triton.next_power_of_2(n_splits)
        )
    return out


def choose_splits(n_processors: int, n_programs: int, cache_len: int, window: int) -> int:
    """Into how many parts the cache is split: as many as give every multiprocessor two programs, of 64 tokens or more
    each. A short cache is one part, which saves the second kernel."""
    visible = min(cache_len, window) if window else cache_len
    if visible <= 128:
        return 1
    return min(triton.cdiv(2 * n_processors, n_programs), triton.cdiv(visible, 64))



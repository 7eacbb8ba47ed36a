"""The heads of new tokens in attention.py: loads and stores, norm and RoPE.

    load_new_queries, load_new_keys_values    the part of qkv that a program of attend_kernel has
    norm_and_rope                             norms and rotates new queries or keys

A program holds queries and keys as two halves, lo and hi, because RoPE rotates elements i and i + D / 2 of a head:

    lo    elements 0 ... D / 2 - 1      padded to BLOCK_HALF
    hi    elements D / 2 ... D - 1      padded to BLOCK_HALF

In shapes, X is the number of queries or keys that a function is called with.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.schema import MAX_TRITON_QUERY_LEN

BLOCK_T = tl.constexpr(MAX_TRITON_QUERY_LEN)  # tl.dot needs at least 16


class HeadLayout(NamedTuple):
    """The heads of a token in qkv: N_HEADS queries, N_KV_HEADS keys, N_KV_HEADS values, of D elements each."""

    N_HEADS: int
    N_KV_HEADS: int
    HEADS_PER_KV_HEAD: int  # N_HEADS / N_KV_HEADS
    D: int
    TOKEN_STRIDE: int  # elements of a token
    BLOCK_D: int  # D, padded to a power of two
    BLOCK_HALF: int  # D / 2, padded to a power of two
    Q_NORM_HEADS: int  # query heads that are normed together: 1, or all
    K_NORM_HEADS: int


class NewTokens(NamedTuple):
    """The T new tokens of a sequence: positions start, start + 1, ... in a cache of S positions."""

    start: tl.tensor
    T: tl.tensor
    S: tl.tensor
    cos_sin_ptr: tl.tensor  # [S, D / 2, 2]


class NewHeads(NamedTuple):
    """Queries or keys of new tokens."""

    lo: tl.tensor  # [X, BLOCK_HALF]
    hi: tl.tensor  # [X, BLOCK_HALF]
    token: tl.tensor  # [X], among the new tokens of the sequence
    head: tl.tensor  # [X], or one head for all
    mask: tl.tensor  # [X], false beyond the last new token


@triton.jit
def load_new_queries(qkv_ptr, kv_head, T, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Loads the queries that use kv_head: all heads of token 0, all heads of token 1, and so on."""
    offs_m = tl.arange(0, BLOCK_M)
    token = offs_m // HEADS.HEADS_PER_KV_HEAD
    head = kv_head * HEADS.HEADS_PER_KV_HEAD + offs_m % HEADS.HEADS_PER_KV_HEAD
    mask_m = token < T
    lo, hi = load_halves(qkv_ptr, token * HEADS.TOKEN_STRIDE + head * HEADS.D, mask_m, HEADS.D, HEADS.BLOCK_HALF)
    return NewHeads(lo, hi, token, head, mask_m)


@triton.jit
def load_new_keys_values(qkv_ptr, kv_head, T, HEADS: tl.constexpr):
    """Loads the keys and values [BLOCK_T, BLOCK_D] of kv_head."""
    token = tl.arange(0, BLOCK_T)
    offset, mask = token * HEADS.TOKEN_STRIDE + (HEADS.N_HEADS + kv_head) * HEADS.D, token < T
    lo, hi = load_halves(qkv_ptr, offset, mask, HEADS.D, HEADS.BLOCK_HALF)
    v = load_vectors(qkv_ptr, offset + HEADS.N_KV_HEADS * HEADS.D, mask, HEADS.D, HEADS.BLOCK_D)
    return NewHeads(lo, hi, token, kv_head, mask), v


# ---- Norm and RoPE --------------------------------------------------------------------------------------------------


@triton.jit
def norm_and_rope(
    x, tokens, weight_ptr, heads_ptr, eps, NORM_HEADS: tl.constexpr, HEADS: tl.constexpr, DTYPE: tl.constexpr
):
    """Norms new queries or keys x (NewHeads), if there is a weight, and applies RoPE. Heads beyond the end of the cache
    become zeros. tokens: NewTokens."""
    position = tokens.start + x.token
    mask = x.mask & is_inside(position, tokens.S)
    lo, hi = x.lo.to(tl.float32), x.hi.to(tl.float32)
    if weight_ptr is not None:
        lo, hi = norm_halves(x, weight_ptr, heads_ptr, tokens.T, eps, NORM_HEADS, HEADS)
    lo, hi = apply_rope(lo, hi, tokens.cos_sin_ptr, position, mask, HEADS.D, DTYPE)
    return NewHeads(lo, hi, x.token, x.head, x.mask)


@triton.jit
def norm_halves(x, weight_ptr, heads_ptr, T, eps, NORM_HEADS: tl.constexpr, HEADS: tl.constexpr):
    """Returns RMSNorm of the heads x (NewHeads), as float32 halves lo and hi [X, BLOCK_HALF].

    NORM_HEADS = 1: each head has an rms of its own, and the weight is [D].
    NORM_HEADS > 1: the NORM_HEADS heads of a token, at heads_ptr, share one rms, and the weight is [NORM_HEADS, D]."""
    lo, hi = x.lo.to(tl.float32), x.hi.to(tl.float32)
    if NORM_HEADS == 1:
        squares = tl.sum(lo * lo + hi * hi, axis=1)
        weight_offset = tl.zeros([1], tl.int32)
    else:
        squares = sum_of_squares(heads_ptr, x.token, T, NORM_HEADS * HEADS.D, HEADS.TOKEN_STRIDE)
        weight_offset = x.head * HEADS.D + tl.zeros([1], tl.int32)  # [X], or [1] if head is one number
    inverse_rms = tl.rsqrt(squares / (NORM_HEADS * HEADS.D) + eps)[:, None]
    all_true = weight_offset >= 0
    weight_lo, weight_hi = load_halves(weight_ptr, weight_offset, all_true, HEADS.D, HEADS.BLOCK_HALF)
    return lo * (inverse_rms * weight_lo.to(tl.float32)), hi * (inverse_rms * weight_hi.to(tl.float32))


@triton.jit
def sum_of_squares(ptr, token, T, WIDTH: tl.constexpr, TOKEN_STRIDE: tl.constexpr):
    """Returns the sum of squares of the first WIDTH elements of each token [X] at ptr: [X]. Reads each of the T tokens
    once, even if it occurs several times in token."""
    i = tl.arange(0, triton.next_power_of_2(WIDTH))
    total = tl.zeros(token.shape, tl.float32)
    for t in range(T):
        x = tl.load(ptr + t * TOKEN_STRIDE + i, mask=i < WIDTH, other=0.0).to(tl.float32)
        total = tl.where(token == t, tl.sum(x * x, axis=0), total)
    return total


@triton.jit
def apply_rope(lo, hi, cos_sin_ptr, position, mask, D: tl.constexpr, DTYPE: tl.constexpr):
    """Rotates vectors of D elements, as halves [X, BLOCK_HALF], by the angles of position [X]. Where mask [X] is false,
    a vector becomes zeros."""
    d = tl.arange(0, lo.shape[1])
    mask_d = d < D // 2
    angle_ptr = cos_sin_ptr + position[:, None] * D + 2 * d[None, :]  # cos_sin is [S, D / 2, 2]
    cos = tl.load(angle_ptr, mask=mask[:, None] & mask_d[None, :], other=0.0)
    sin = tl.load(angle_ptr + 1, mask=mask[:, None] & mask_d[None, :], other=0.0)
    return (lo * cos - hi * sin).to(DTYPE), (hi * cos + lo * sin).to(DTYPE)


# ---- Loads and stores -----------------------------------------------------------------------------------------------


@triton.jit
def is_inside(position, S):
    """Returns whether position is one of the S positions of the cache."""
    return (position >= 0) & (position < S)


@triton.jit
def load_vectors(ptr, offset, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads vectors of D elements at ptr + offset [X]: [X, BLOCK_D], padded with zeros."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + offset[:, None] + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_halves(ptr, offset, mask, D: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Loads vectors of D elements at ptr + offset [X] as two halves, [X, BLOCK_HALF] each, padded with zeros."""
    d = tl.arange(0, BLOCK_HALF)
    lo_ptr, mask_lo = ptr + offset[:, None] + d[None, :], mask[:, None] & (d < D // 2)[None, :]
    return tl.load(lo_ptr, mask=mask_lo, other=0.0), tl.load(lo_ptr + D // 2, mask=mask_lo, other=0.0)


@triton.jit
def store_vectors(ptr, offset, x, mask, D: tl.constexpr):
    d = tl.arange(0, x.shape[1])
    tl.store(ptr + offset[:, None] + d[None, :], x, mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def store_halves(ptr, offset, lo, hi, mask, D: tl.constexpr):
    d = tl.arange(0, lo.shape[1])
    lo_ptr, mask_lo = ptr + offset[:, None] + d[None, :], mask[:, None] & (d < D // 2)[None, :]
    tl.store(lo_ptr, lo, mask=mask_lo)
    tl.store(lo_ptr + D // 2, hi, mask=mask_lo)

"""The weight formats in the Triton kernels: how a step of fused_linear multiplies, and how a tile is dequantized.

A format is two functions, which are compiled into the kernels, and a line in FORMATS:

    multiply_...      (acc, x, weights) -> acc + W x, for the columns of one step. Arguments: x [K_SLICES, SLICE_K,
                      BLOCK_M]; acc [K_SLICES, BLOCK_N, BLOCK_M], a sum for each slice; where the step is, from k on.
    dequantize_...    a tile [TILE_N, TILE_K] of W in float32

Scales of a whole output (channel scales) are none of multiply's business: fused_linear applies them after its loop. For
scales of a group of columns, the slices are so narrow that each lies in one group. In shape comments a row of W is an
output, and a column an input. triton_weights.py loads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction

from kernels.formats import Dense, Int4, Int8
from kernels.schema import triton_op
from kernels.triton_int4 import TILE_K, TILE_N, TILE_WORDS, offset_of, tiles_to_floats, unpack_scale_words
from kernels.triton_weights import load_group_scales, load_rows, load_tiles

# ---- Dense and Int8 -------------------------------------------------------------------------------------------------


@triton.jit
def multiply_rows(
    acc, x, w_ptr, scales_ptr, magic, k, slice_k, offs_n, mask_n, N, N_OUT,
    K: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    w = load_rows(w_ptr, slice_k, offs_n, mask_n, K, x.shape[1])  # [K_SLICES, BLOCK_N, SLICE_K]
    return tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")


@triton.jit
def dequantize_rows(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE):
    w = tl.load(w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], mask=mask, other=0).to(tl.float32)
    if scales_ptr is not None:
        w *= tl.load(scales_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    return w


# ---- Int4 -----------------------------------------------------------------------------------------------------------


@triton.jit
def multiply_int4(
    acc, x, w_ptr, scales_ptr, magic, k, slice_k, offs_n, mask_n, N, N_OUT,
    K: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = acc.shape[1]
    words = load_tiles(w_ptr, k, N, N_OUT, K, BLOCK_N, BLOCK_OUT, x.shape[0] * x.shape[1])
    scale_words = load_group_scales(scales_ptr, slice_k, offs_n, mask_n, N, K, GROUP_SIZE)
    scale, zero = unpack_scale_words(scale_words)
    q = tiles_to_floats(words, magic, BLOCK_N // TILE_N, x.shape[1], x.dtype)  # [K_SLICES, BLOCK_N, SLICE_K]
    return acc + product_with_zeros(q, x, scale, zero + offset_of(x.dtype))


@triton.jit
def dequantize_int4(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE):
    tile = tile_n.to(tl.int64) * tl.cdiv(K, TILE_K) + tile_k
    words = tl.load(w_ptr + tile * TILE_WORDS + tl.arange(0, TILE_WORDS))
    q = tl.reshape(tiles_to_floats(words[None, :], 0, 1, TILE_K, tl.float32), [TILE_N, TILE_K])
    group = (offs_k // GROUP_SIZE).to(tl.int64)[None, :] * N + offs_n[:, None]
    scale, zero = unpack_scale_words(tl.load(scales_ptr + group, mask=mask, other=0))
    return (q - zero) * scale


@triton.jit
def product_with_zeros(q, x, scale, zero):
    """((q - zero) * scale) x, slice by slice: q [K_SLICES, BLOCK_N, SLICE_K] times x [K_SLICES, SLICE_K, BLOCK_M] is
    [K_SLICES, BLOCK_N, BLOCK_M]. scale and zero [K_SLICES, BLOCK_N, 1] are those of a whole slice, so

        sum of (q - zero) * scale * x  =  scale * (sum of q * x  -  zero * sum of x)

    The sum of x is a product with ones: the matrix unit has time to spare, and its result lies where it is needed. The
    ones come out of a join as q does, so that Triton gives both one layout and loads x once for the two products."""
    half = tl.full([q.shape[0], q.shape[1], q.shape[2] // 2], 1.0, q.dtype)
    ones = tl.reshape(tl.join(half, half), q.shape)
    sum_x = tl.dot(ones, x, input_precision="ieee")  # the same for every output
    return scale * (tl.dot(q, x, input_precision="ieee") - zero * sum_x)


# ---- The table ------------------------------------------------------------------------------------------------------


class KernelFormat(NamedTuple):
    """What the kernels must know of a format."""

    name: str  # in triton_tuned.json
    is_tiled: bool  # whether W lies in tiles, or in rows
    multiply: JITFunction
    dequantize: JITFunction


FORMATS = {
    Dense.format_id: KernelFormat("dense", False, multiply_rows, dequantize_rows),
    Int8.format_id: KernelFormat("int8", False, multiply_rows, dequantize_rows),
    Int4.format_id: KernelFormat("int4", True, multiply_int4, dequantize_int4),
}


def kernel_format(format_id: int) -> KernelFormat:
    """Raises ValueError for a format that the kernels do not read."""
    if format_id not in FORMATS:
        names = {number: format.name for number, format in FORMATS.items()}
        raise ValueError(f"the Triton kernels read the formats {names}, not {format_id}")
    return FORMATS[format_id]


def supports(layer) -> bool:
    """Whether the kernels can read the weight of layer, a model.Linear."""
    format = layer.format
    known = FORMATS.get(getattr(format, "format_id", None))
    if known is None or not format.fits_kernels("triton", layer.in_features):
        return False
    if not known.is_tiled:
        return True
    # An expert's tiles lie right behind the previous expert's, so they must be whole
    has_whole_tiles = layer.n_experts is None or layer.out_features % TILE_N.value == 0
    return format.group_size % 32 == 0 and has_whole_tiles


# ---- dequantize -----------------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(w_ptr, scales_ptr, y_ptr, N, K, GROUP_SIZE, DEQUANTIZE: tl.constexpr):
    """y [N, K] = W. Program (i, j) has rows [16 i, 16 (i + 1)) and columns [64 j, 64 (j + 1)): one tile."""
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    offs_n, offs_k = tile_n * TILE_N + tl.arange(0, TILE_N), tile_k * TILE_K + tl.arange(0, TILE_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    w = DEQUANTIZE(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE)
    tl.store(y_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], w, mask=mask)


@triton_op
def dequantize(
    weight: Tensor, scales: Tensor | None, zeros: Tensor | None, format_id: int, n: int, group_size: int, k: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix W [n, k] of a quantized weight."""
    y = weight.new_empty(n, k, dtype=dtype)
    grid = triton.cdiv(n, TILE_N.value), triton.cdiv(k, TILE_K.value)
    dequantize_kernel[grid](weight, scales, y, n, k, group_size, kernel_format(format_id).dequantize)
    return y

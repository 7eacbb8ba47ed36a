"""The weight formats in the Triton kernels: how fused_linear multiplies, how W is dequantized; dequantize and embed.

A format is a line in KERNEL_FORMATS (below) and two functions that are compiled into the kernels:

    dot_...           acc + W x for the columns [k, k + BLOCK_K) of one step of fused_linear's loop
    dequantize_...    a tile [TILE_N, TILE_K] of W in float32

The arguments of dot_... are

    acc         [K_SLICES, BLOCK_N, BLOCK_M], a sum for each slice
    x           [K_SLICES, SLICE_K, BLOCK_M]
    w           the weights of the program, a ProgramWeights (weights.py)
    k_starts    [K_SLICES], the first column of each slice

linear.py calls dot_..., and dequantize_kernel and embed_kernel call dequantize_.... Both load with weights.py, and
convert to floats with elements.py.

formats/__init__.py has the table of all formats: the tensors of a checkpoint, and their meaning.
formats/triton_layouts.py packs these tensors.

In shape comments a row of W is an output, and a column an input.
"""

from enum import Enum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import JITFunction

from formats import MXFP4, Float8, GroupedInt8, Int4, Int8, Unquantized, WeightFormat
from kernels.schema import WeightArguments, empty_dequantize, empty_embed, register_triton
from kernels.triton.elements import (
    decode_e8m0,
    e2m1_bias_factor,
    e2m1_pair,
    e4m3_to_floats,
    int4_pair,
    magic_bias,
    tiles_to_floats,
    unpack_scale_words,
)
from kernels.triton.weights import (
    TILE_K,
    TILE_N,
    TILE_WORDS,
    load_group_scales,
    load_rows,
    load_scales,
    load_tiles,
)

# ---- Unquantized and Int8 --------------------------------------------------------------------------------------------
#
# All dot_... have the same arguments, and so have all dequantize_.... A function ignores the arguments that its format
# does not need.


@triton.jit
def dot_unquantized_or_int8(
    acc, x, w, k, k_starts, K: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_OUT: tl.constexpr
):
    elements = load_rows(w, k_starts, K, x.shape[1])  # [K_SLICES, BLOCK_N, SLICE_K]
    return tl.dot(elements.to(x.dtype), x, acc, input_precision="ieee")


@triton.jit
def dequantize_int8(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE):
    q = tl.load(w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], mask=mask, other=0)
    return q.to(tl.float32) * tl.load(scales_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]


# ---- GroupedInt8: W holds q - 128 -----------------------------------------------------------------------------------


@triton.jit
def dot_grouped_int8(acc, x, w, k, k_starts, K: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_OUT: tl.constexpr):
    q = load_rows(w, k_starts, K, x.shape[1])  # [K_SLICES, BLOCK_N, SLICE_K]
    scale, zero = unpack_scale_words(load_group_scales(w, k_starts, K, GROUP_SIZE))
    return acc + dot_with_zeros(q.to(x.dtype), x, scale, zero - 128)


@triton.jit
def dequantize_grouped_int8(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE):
    q = tl.load(w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], mask=mask, other=0)
    scale, zero = unpack_scale_words(load_scales(scales_ptr, offs_n, offs_k, mask, N, GROUP_SIZE))
    return (q.to(tl.float32) - (zero - 128)) * scale


@triton.jit
def dot_with_zeros(q, x, scale, zero):
    """Computes ((q - zero) * scale) x, slice by slice, where all columns of a slice share scale and zero:

        sum of (q - zero) * scale * x  =  scale * (sum of q * x  -  zero * sum of x)

        q              [K_SLICES, BLOCK_N, SLICE_K]
        x              [K_SLICES, SLICE_K, BLOCK_M]
        scale, zero    [K_SLICES, BLOCK_N, 1]
        the result     [K_SLICES, BLOCK_N, BLOCK_M]

    The sum of x is tl.dot(ones, x), because tensor cores have time to spare. The sum then has the layout of the other
    tl.dot. Build `ones` with tl.join, like q: it gets q's register layout, and x is loaded once for both. With tl.full
    Triton would convert x twice."""
    half = tl.full([q.shape[0], q.shape[1], q.shape[2] // 2], 1.0, q.dtype)
    ones = tl.reshape(tl.join(half, half), q.shape)
    sum_x = tl.dot(ones, x, input_precision="ieee")  # equal in all rows
    return scale * (tl.dot(q, x, input_precision="ieee") - zero * sum_x)


# ---- Float8 ---------------------------------------------------------------------------------------------------------


@triton.jit
def dot_float8(acc, x, w, k, k_starts, K: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_OUT: tl.constexpr):
    words = load_rows(w, k_starts // 4, K // 4, x.shape[1] // 4)  # [K_SLICES, BLOCK_N, SLICE_K / 4]
    elements = e4m3_to_floats(words, x.dtype)  # [K_SLICES, BLOCK_N, SLICE_K]
    if GROUP_SIZE >= K:
        return tl.dot(elements, x, acc, input_precision="ieee")
    else:
        return acc + load_group_scales(w, k_starts, K, GROUP_SIZE) * tl.dot(elements, x, input_precision="ieee")


@triton.jit
def dequantize_float8(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE):
    offs_word = tile_k * (TILE_K // 4) + tl.arange(0, TILE_K // 4)
    offsets = offs_n.to(tl.int64)[:, None] * (K // 4) + offs_word[None, :]
    words = tl.load(w_ptr + offsets, mask=(offs_n < N)[:, None] & (offs_word < K // 4)[None, :], other=0)
    w = tl.reshape(e4m3_to_floats(words[None], tl.float32), [TILE_N, TILE_K])
    return w * load_scales(scales_ptr, offs_n, offs_k, mask, N, GROUP_SIZE)


# ---- Int4 -----------------------------------------------------------------------------------------------------------

ZERO_STEP = tl.constexpr(2.0**-Int4.zero_fraction_bits)  # what 1 means in a stored zero point


@triton.jit
def dot_int4(acc, x, w, k, k_starts, K: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_OUT: tl.constexpr):
    words = load_tiles(w, k, K, acc.shape[1], BLOCK_OUT, x.shape[0] * x.shape[1])
    scale, zero = unpack_scale_words(load_group_scales(w, k_starts, K, GROUP_SIZE))
    q = tiles_to_floats(words, w.magic_number, int4_pair, acc.shape[1] // TILE_N, x.shape[1], x.dtype)
    return acc + dot_with_zeros(q, x, scale, zero * ZERO_STEP + magic_bias(x.dtype))


@triton.jit
def dequantize_int4(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE):
    q = dequantize_tile(w_ptr, tile_n, tile_k, K, int4_pair)
    scale, zero = unpack_scale_words(load_scales(scales_ptr, offs_n, offs_k, mask, N, GROUP_SIZE))
    return (q - zero * ZERO_STEP) * scale


@triton.jit
def dequantize_tile(w_ptr, tile_n, tile_k, K, DECODE: tl.constexpr):
    """Loads a tile and decodes its elements with DECODE: [TILE_N, TILE_K], float32."""
    tile = tile_n.to(tl.int64) * tl.cdiv(K, TILE_K) + tile_k
    words = tl.load(w_ptr + tile * TILE_WORDS + tl.arange(0, TILE_WORDS))
    return tl.reshape(tiles_to_floats(words[None, :], 0, DECODE, 1, TILE_K, tl.float32), [TILE_N, TILE_K])


# ---- MXFP4 ----------------------------------------------------------------------------------------------------------


@triton.jit
def dot_mxfp4(acc, x, w, k, k_starts, K: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_OUT: tl.constexpr):
    words = load_tiles(w, k, K, acc.shape[1], BLOCK_OUT, x.shape[0] * x.shape[1])
    scale = decode_e8m0(load_group_scales(w, k_starts, K, GROUP_SIZE))
    q = tiles_to_floats(words, w.magic_number, e2m1_pair, acc.shape[1] // TILE_N, x.shape[1], x.dtype)
    return acc + scale * tl.dot(q * e2m1_bias_factor(x.dtype), x, input_precision="ieee")


@triton.jit
def dequantize_mxfp4(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE):
    q = dequantize_tile(w_ptr, tile_n, tile_k, K, e2m1_pair) * e2m1_bias_factor(tl.float32)
    return q * decode_e8m0(load_scales(scales_ptr, offs_n, offs_k, mask, N, GROUP_SIZE))


# ---- The table ------------------------------------------------------------------------------------------------------


class Scales(Enum):
    """The packed scales: [n_groups, N], or [N] of Int8."""

    NONE = "none"
    FLOAT32 = "float32"
    WITH_ZEROS = "words of a scale and a zero point"  # formats/triton_layouts.py: pack_scales
    E8M0 = "exponents of powers of two"


class KernelFormat(NamedTuple):
    """A weight format for the kernels. A scale is applied in one of two ways:

        channel scale    one float32 for an output: multiplies the output after the loop over K
        group scale      any other scale: multiplies the sum of a slice, in dot_.... A slice lies in one group"""

    format_class: type[WeightFormat]
    is_tiled: bool  # the layout of W: tiles of words of 8 elements, or rows of elements or words (weights.py)
    scales: Scales
    dot: JITFunction
    dequantize: JITFunction | None  # None if W is not quantized

    @property
    def name(self) -> str:
        """The name in tuned.json."""
        return self.format_class.__name__.lower()

    @property
    def bits(self) -> int:
        """The bits of an element. With tensor cores, a weight that is not quantized has 16."""
        return 16 if self.scales is Scales.NONE else 8 // self.format_class.elements_per_byte

    def has_channel_scales(self, group_size: int, k: int) -> bool:
        """Returns whether fused_linear applies the scales after the loop over K."""
        return self.scales is Scales.FLOAT32 and group_size >= k

    def has_group_scales(self, group_size: int, k: int) -> bool:
        """Returns whether dot_... applies the scales, to the sum of each slice."""
        return self.scales is not Scales.NONE and not self.has_channel_scales(group_size, k)

    def stride(self, weight: Tensor) -> int:
        """Returns how many elements, or words, the packed weight has for each output."""
        return weight.stride(-3) // TILE_N.value if self.is_tiled else weight.stride(-2)


KERNEL_FORMATS = [  # format_class, is_tiled, scales, dot, dequantize
    KernelFormat(Unquantized, False, Scales.NONE, dot_unquantized_or_int8, None),
    KernelFormat(Int8, False, Scales.FLOAT32, dot_unquantized_or_int8, dequantize_int8),
    KernelFormat(Int4, True, Scales.WITH_ZEROS, dot_int4, dequantize_int4),
    KernelFormat(GroupedInt8, False, Scales.WITH_ZEROS, dot_grouped_int8, dequantize_grouped_int8),
    KernelFormat(Float8, False, Scales.FLOAT32, dot_float8, dequantize_float8),
    KernelFormat(MXFP4, True, Scales.E8M0, dot_mxfp4, dequantize_mxfp4),
]
BY_CLASS_NAME = {format.format_class.__name__: format for format in KERNEL_FORMATS}


def kernel_format(class_name: str) -> KernelFormat:
    """Raises ValueError for a format that the kernels do not read."""
    if class_name not in BY_CLASS_NAME:
        raise ValueError(f"the Triton kernels read the formats {', '.join(BY_CLASS_NAME)}, not {class_name}")
    return BY_CLASS_NAME[class_name]


def triton_kernels_can_read(format: WeightFormat, n: int, k: int, is_experts: bool) -> bool:
    """Returns whether the kernels can read a weight [n, k] in format, or one for each expert."""
    known = BY_CLASS_NAME.get(type(format).__name__)
    if known is None or not format.kernels_can_read(k):
        return False
    narrowest_slice = 32 if known.is_tiled else 16
    if format.group_size is not None and format.group_size % narrowest_slice:
        return False
    # The tiles of an expert begin where those of the previous expert end, so N must be whole tiles
    return not known.is_tiled or not is_experts or n % TILE_N.value == 0


# ---- dequantize and embed -------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(w_ptr, scales_ptr, y_ptr, N, K, GROUP_SIZE, DEQUANTIZE: tl.constexpr):
    """Computes y [N, K] = W. Program (i, j) dequantizes the tile of rows [16 i, 16 (i + 1)) and columns
    [64 j, 64 (j + 1))."""
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    offs_n, offs_k = tile_n * TILE_N + tl.arange(0, TILE_N), tile_k * TILE_K + tl.arange(0, TILE_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    w = DEQUANTIZE(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE)
    tl.store(y_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], w, mask=mask)


@register_triton
def dequantize(*, w: WeightArguments, k: int, dtype: torch.dtype) -> Tensor:
    """Dequantizes a packed weight to W [n, k]."""
    y = empty_dequantize(w=w, k=k, dtype=dtype)
    grid = triton.cdiv(w.n, TILE_N.value), triton.cdiv(k, TILE_K.value)
    dequantize_kernel[grid](
        w.weight, w.scales, y, N=w.n, K=k, GROUP_SIZE=w.group_size, DEQUANTIZE=kernel_format(w.format).dequantize
    )
    return y


@triton.jit
def embed_kernel(tokens_ptr, w_ptr, scales_ptr, y_ptr, scale, N, K, GROUP_SIZE, DEQUANTIZE: tl.constexpr):
    """Computes y [num_tokens, K] = the rows of W at tokens, times scale. Program (i, j) has token i and columns
    [64 j, 64 (j + 1)). It dequantizes a whole tile, and stores one row of the tile."""
    i, tile_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(tokens_ptr + i)
    tile_n = token // TILE_N
    offs_n, offs_k = tile_n * TILE_N + tl.arange(0, TILE_N), tile_k * TILE_K + tl.arange(0, TILE_K)
    mask = (offs_n == token)[:, None] & (offs_k < K)[None, :]
    w = DEQUANTIZE(w_ptr, scales_ptr, tile_n, tile_k, offs_n, offs_k, mask, N, K, GROUP_SIZE)
    y = w.to(y_ptr.dtype.element_ty).to(tl.float32) * scale  # rounded twice, as the plain operations do
    y_ptrs = y_ptr + i * K + offs_k[None, :] + tl.zeros_like(offs_n)[:, None]
    tl.store(y_ptrs, y, mask=mask)


@register_triton
def embed(tokens: Tensor, *, w: WeightArguments, k: int, dtype: torch.dtype, scale: float) -> Tensor:
    """Dequantizes the rows of W [n, k] at tokens [...], and multiplies them with scale: [..., k]."""
    y = empty_embed(tokens, w=w, k=k, dtype=dtype)
    grid = tokens.numel(), triton.cdiv(k, TILE_K.value)
    if tokens.numel():
        embed_kernel[grid](
            tokens, w.weight, w.scales, y, scale=scale, N=w.n, K=k, GROUP_SIZE=w.group_size,
            DEQUANTIZE=kernel_format(w.format).dequantize,
        )
    return y

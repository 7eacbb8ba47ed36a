"""The weight formats in the Triton kernels: where the elements of W lie, and how a tile of W is multiplied.

    prefetch_weights, load_rows, load_int4_tiles, load_int4_scales    reading W [N, K]
    int4_product                                                      multiplying int4 without subtracting zeros first
    dequantize                                                        the whole matrix, for prefill

Dense and int8 weights lie row after row, int4 in tiles of 16 rows and 64 columns (triton_int4.py). A row of W is an
output, a column an input. A new format needs a branch wherever FORMAT_ID or IS_TILED is asked for, here and in
triton_linear.py. Until check_format names it, the kernels do not compile for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import Dense, Int4, Int8
from kernels.schema import triton_op
from kernels.triton_int4 import TILE_K, TILE_N, TILE_WORDS, tiles_to_floats, unpack_scale_words

DENSE, INT8, INT4 = (tl.constexpr(format.format_id) for format in (Dense, Int8, Int4))
WORD_BYTES = tl.constexpr(4)


def supports(layer) -> bool:
    """Whether the kernels can read the weight of layer, a model.Linear."""
    format = layer.format
    if not isinstance(format, Dense | Int8 | Int4) or not format.fits_kernels("triton", layer.in_features):
        return False
    if not isinstance(format, Int4):
        return True
    # An expert's tiles lie right behind the previous expert's, so they must be whole
    has_whole_tiles = layer.n_experts is None or layer.out_features % TILE_N.value == 0
    return format.group_size % 32 == 0 and has_whole_tiles


@triton.jit
def check_format(FORMAT_ID: tl.constexpr):
    """Stops the compilation for a format that is none of these. Otherwise it would be read as one of them."""
    tl.static_assert(FORMAT_ID == DENSE or FORMAT_ID == INT8 or FORMAT_ID == INT4, "no kernel for this weight format")


@triton.jit
def program_outputs(i, BLOCK_OUT: tl.constexpr, N_OUT):
    """Which row of W is a program's i-th. Program 1 of a product with an activation, whose W is a gate projection above
    an up projection, has

        i                             rows of W
        0 ... BLOCK_OUT - 1           BLOCK_OUT ... 2 BLOCK_OUT - 1               gate
        BLOCK_OUT ... BLOCK_N - 1     the same + N_OUT                            up

    In units of 16: which row of tiles is a program's i-th."""
    return tl.program_id(0) * BLOCK_OUT + i % BLOCK_OUT + i // BLOCK_OUT * N_OUT


# ---- Reading W ------------------------------------------------------------------------------------------------------


@triton.jit
def prefetch_weights(
    w_ptr, N, N_OUT,
    K: tl.constexpr, IS_TILED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PREFETCH_BYTES: tl.constexpr, N_THREADS: tl.constexpr,
):  # fmt: skip
    """Starts to bring the first PREFETCH_BYTES of a program's weights into the L2 cache: as much of each of its rows,
    or, if IS_TILED, of each of its rows of tiles. One thread asks for one row, since many small requests are slow."""
    UNIT_N: tl.constexpr = TILE_N if IS_TILED else 1  # outputs that are stored together
    N_UNITS: tl.constexpr = BLOCK_N // UNIT_N
    ELEMENT_BYTES: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    UNIT_BYTES: tl.constexpr = (K + TILE_K - 1) // TILE_K * TILE_WORDS * WORD_BYTES if IS_TILED else K * ELEMENT_BYTES
    PREFETCHED: tl.constexpr = min(UNIT_BYTES, PREFETCH_BYTES // N_UNITS) // 16 * 16  # bytes of each unit
    if PREFETCHED > 0 and UNIT_BYTES % 16 == 0:  # the instruction takes multiples of 16
        thread = tl.arange(0, N_THREADS)
        unit = program_outputs(thread % N_UNITS, BLOCK_OUT // UNIT_N, N_OUT // UNIT_N)
        unit = tl.minimum(unit, tl.cdiv(N, UNIT_N) - 1)
        address = w_ptr.to(tl.int64) + unit.to(tl.int64) * UNIT_BYTES
        size = tl.where(thread < N_UNITS, PREFETCHED, 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def slice_starts(IS_TILED: tl.constexpr, SLICE_K: tl.constexpr, K_SLICES: tl.constexpr):
    """In which of a step's columns each slice begins: [K_SLICES]. tiles_to_floats gives slices of half a tile in this
    order: all left halves, then all right halves."""
    i = tl.arange(0, K_SLICES)
    if IS_TILED:
        TILES_IN_STEP: tl.constexpr = K_SLICES * SLICE_K // TILE_K
        return i % TILES_IN_STEP * TILE_K + i // TILES_IN_STEP * SLICE_K
    return i * SLICE_K


@triton.jit
def load_rows(w_ptr, offs_n, mask_n, offs_k, K: tl.constexpr):
    """Outputs offs_n [BLOCK_N] and inputs offs_k [K_SLICES, SLICE_K] of a dense or int8 W:
    [K_SLICES, BLOCK_N, SLICE_K]."""
    offsets = offs_n.to(tl.int64)[None, :, None] * K + offs_k[:, None, :]
    return tl.load(w_ptr + offsets, mask=mask_n[None, :, None] & (offs_k < K)[:, None, :], other=0)


@triton.jit
def load_int4_tiles(
    w_ptr, k, N, N_OUT, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A program's outputs and inputs [k, k + BLOCK_K) of an int4 W: the words of whole tiles,
    [BLOCK_N / TILE_N * BLOCK_K / TILE_K, TILE_WORDS]."""
    TILES_IN_STEP: tl.constexpr = BLOCK_K // TILE_K  # side by side
    i = tl.arange(0, BLOCK_N // TILE_N * TILES_IN_STEP)
    tile_n = program_outputs(i // TILES_IN_STEP, BLOCK_OUT // TILE_N, N_OUT // TILE_N)
    tile_k = k // TILE_K + i % TILES_IN_STEP
    mask = (tile_n < tl.cdiv(N, TILE_N)) & (tile_k < tl.cdiv(K, TILE_K))
    tile = tile_n.to(tl.int64) * tl.cdiv(K, TILE_K) + tile_k
    offsets = tile[:, None] * TILE_WORDS + tl.arange(0, TILE_WORDS)[None, :]
    return tl.load(w_ptr + offsets, mask=mask[:, None], other=0)


@triton.jit
def load_int4_scales(scales_ptr, offs_n, mask_n, slice_k, N, K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The scales and zeros of outputs offs_n and of the slices that begin at inputs slice_k [K_SLICES]: both
    [K_SLICES, BLOCK_N, 1]. A slice lies in one group."""
    offsets = (slice_k // GROUP_SIZE)[:, None] * N + offs_n[None, :]
    mask = (slice_k < K)[:, None] & mask_n[None, :]
    scale, zero = unpack_scale_words(tl.load(scales_ptr + offsets, mask=mask, other=0))
    return scale[:, :, None], zero[:, :, None]


@triton.jit
def int4_product(q, x, scale, zero):
    """((q - zero) * scale) x, slice by slice: q [K_SLICES, BLOCK_N, SLICE_K] times x [K_SLICES, SLICE_K, BLOCK_M] is
    [K_SLICES, BLOCK_N, BLOCK_M]. scale and zero [K_SLICES, BLOCK_N, 1] are those of a whole slice, so

        sum of (q - zero) * scale * x  =  scale * (sum of q * x  -  zero * sum of x)

    The sum of x is a product with ones: the matrix unit has time to spare, and its result lies where it is needed. The
    ones come out of a join as q does, so that Triton gives both one layout and loads x once for the two products."""
    half = tl.full([q.shape[0], q.shape[1], q.shape[2] // 2], 1.0, q.dtype)
    ones = tl.reshape(tl.join(half, half), q.shape)
    sum_x = tl.dot(ones, x, input_precision="ieee")  # the same for every output
    return scale * (tl.dot(q, x, input_precision="ieee") - zero * sum_x)


# ---- dequantize -----------------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(w_ptr, scales_ptr, y_ptr, N, K, GROUP_SIZE, FORMAT_ID: tl.constexpr):
    """y [N, K] = W. Program (i, j) has outputs [16 i, 16 (i + 1)) and inputs [64 j, 64 (j + 1)): of int4 one tile."""
    check_format(FORMAT_ID)
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    offs_n, offs_k = tile_n * TILE_N + tl.arange(0, TILE_N), tile_k * TILE_K + tl.arange(0, TILE_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    offsets = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    if FORMAT_ID == INT4:
        tile = tile_n.to(tl.int64) * tl.cdiv(K, TILE_K) + tile_k
        words = tl.load(w_ptr + tile * TILE_WORDS + tl.arange(0, TILE_WORDS))
        q = tl.reshape(tiles_to_floats(words[None, :], 0, 1, TILE_K, tl.float32), [TILE_N, TILE_K])
        group = (offs_k // GROUP_SIZE).to(tl.int64)[None, :] * N + offs_n[:, None]
        scale, zero = unpack_scale_words(tl.load(scales_ptr + group, mask=mask, other=0))
        w = (q - zero) * scale
    else:
        w = tl.load(w_ptr + offsets, mask=mask, other=0).to(tl.float32)
        if FORMAT_ID == INT8:
            w *= tl.load(scales_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    tl.store(y_ptr + offsets, w, mask=mask)


@triton_op
def dequantize(
    weight: Tensor, scales: Tensor | None, zeros: Tensor | None, format_id: int, n: int, group_size: int, k: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix W [n, k] of an int8 or int4 weight."""
    y = weight.new_empty(n, k, dtype=dtype)
    grid = triton.cdiv(n, TILE_N.value), triton.cdiv(k, TILE_K.value)
    dequantize_kernel[grid](weight, scales, y, n, k, group_size, format_id)
    return y

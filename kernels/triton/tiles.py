"""The order in which the Triton kernels read weights of 4 bits.

    pack_tiles, unpack_tiles    from elements to this order and back, in PyTorch
    tiles_to_floats             in a kernel: from this order to a matrix unit's factor

A row of W is an output, a column an input. W is stored in tiles of 16 rows and 64 columns: 128 words of 8 elements. A
warp loads a tile with one instruction: lane l gets words 4 l to 4 l + 3. They hold exactly the elements that the matrix
unit wants from this lane, so nothing has to move between lanes.

The unit's instruction, mma.m16n8k16, multiplies a matrix A [16, 16] with a matrix B [16, 8]. A is a part of W. Each
lane of the warp holds 8 elements of A, four neighbours in each of two rows (kWidth = 4 in Triton, which puts B's rows
into the same order):

                     columns 0-3    4-7     8-11    12-15
    rows 0 and 8        lane 0       1       2       3
    rows 1 and 9        lane 4       5       6       7
    ...
    rows 7 and 15       lane 28      29      30      31

A tile is four such A, side by side. The elements of lane l start at row r = l / 4 and column c = 4 (l % 4):

    word 0    row r        columns c + (0 1 2 3  16 17 18 19)
    word 1    row r        columns c + (0 1 2 3  16 17 18 19) + 32
    word 2    row r + 8    as word 0
    word 3    row r + 8    as word 1

    bits of a word      31-28   27-24   23-20   19-16   15-12   11-8    7-4     3-0
    column, c +          19      17       3       1      18      16      2       0

Bits 0-3 and 16-19 are neighbours in a row, as are bits 4-7 and 20-23, and so on. Such a pair, as two 16-bit floats, is
one of the registers that the instruction reads.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE_N, TILE_K = tl.constexpr(16), tl.constexpr(64)  # rows and columns of a tile
TILE_WORDS = tl.constexpr(128)


def pack_tiles(q: Tensor) -> Tensor:
    """Elements q [..., N, K] uint8 in 0..15 -> tiles [..., N / 16, K / 64, 128] int32, filled up with zeros."""
    q = F.pad(q, (0, -q.shape[-1] % 64, 0, -q.shape[-2] % 16))
    q = q.unflatten(-1, (-1, 2, 2, 4, 2, 2))  # a column's digits: tile, 32, 16, lane % 4, 2, 1
    q = q.unflatten(-7, (-1, 2, 8))  # and a row's: tile, 8, lane / 4
    low, high = q.unbind(-2)  # columns + 0 and + 2 share a byte
    tiles = low | high << 4
    tile_n, row_8, lane_row, tile_k, column_32, column_16, lane_column, column_1 = range(-8, 0)
    lane, word, byte = (lane_row, lane_column), (row_8, column_32), (column_1, column_16)
    tiles = order_last(tiles, (tile_n, tile_k, *lane, *word, *byte))
    return tiles.flatten(-6).contiguous().view(torch.int32)


def unpack_tiles(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse: q [..., n, k]."""
    tiles = tiles.view(torch.uint8).unflatten(-1, (8, 4, 2, 2, 2, 2))
    tile_n, tile_k, lane_row, lane_column, row_8, column_32, column_1, column_16 = range(-8, 0)
    row, column = (tile_n, row_8, lane_row), (tile_k, column_32, column_16, lane_column, column_1)
    tiles = order_last(tiles, (*row, *column))
    q = torch.stack([tiles & 15, tiles >> 4], dim=-2)
    return q.flatten(-6).flatten(-4, -2)[..., :n, :k].contiguous()


def order_last(t: Tensor, axes: tuple[int, ...]) -> Tensor:
    """t with its last axes, all that axes names, in the order of axes."""
    first = range(t.dim() - len(axes))
    return t.permute(*first, *axes)


@triton.jit
def tiles_to_floats(
    words, packed_offset, DECODE: tl.constexpr, TILES_N: tl.constexpr, SLICE_K: tl.constexpr, DTYPE: tl.constexpr
):
    """The words [TILES_N * TILES_K, 128] of TILES_N rows of TILES_K tiles -> what DECODE, int4_pair or e2m1_pair, makes
    of their elements, in slices of SLICE_K columns: [64 TILES_K / SLICE_K, 16 TILES_N, SLICE_K]. A slice is a tile wide
    (64) or half a tile (32). Then all left halves come before all right halves."""
    TILES_K: tl.constexpr = words.shape[0] // TILES_N
    words = tl.reshape(words, [TILES_N, TILES_K, 8, 4, 4])  # tile_n, tile_k, lane / 4, lane % 4, word
    # Bits 0 and 16 hold columns c + 0 and c + 1, bits 8 and 24 columns c + 16 and c + 17, and so on: see the drawing
    columns_0_1_16_17 = tl.join(DECODE(words, packed_offset, DTYPE), DECODE(words >> 8, packed_offset, DTYPE))
    columns_2_3_18_19 = tl.join(DECODE(words >> 4, packed_offset, DTYPE), DECODE(words >> 12, packed_offset, DTYPE))
    q = tl.join(columns_0_1_16_17, columns_2_3_18_19)
    # Now there is an axis for every digit of an element's place:
    #
    #     axis   0       1       2         3            4      5          6         7          8
    #     digit  tile_n  tile_k  lane_row  lane_column  row_8  column_32  column_1  column_16  column_2
    #
    #     row    = 16 tile_n + 8 row_8 + lane_row                                                   axes 0 4 2
    #     column = 64 tile_k + 32 column_32 + 16 column_16 + 4 lane_column + 2 column_2 + column_1  axes 1 5 7 3 8 6
    q = tl.reshape(q, [TILES_N, TILES_K, 8, 4, 2, 2, 2, 2, 2])
    if SLICE_K == 64:
        q = tl.permute(q, 1, 0, 4, 2, 5, 7, 3, 8, 6)  # slice: 1    row: 0 4 2    column in the slice: 5 7 3 8 6
    else:
        q = tl.permute(q, 5, 1, 0, 4, 2, 7, 3, 8, 6)  # slice: 5 1    row: 0 4 2    column in the slice: 7 3 8 6
    return tl.reshape(q, [64 * TILES_K // SLICE_K, 16 * TILES_N, SLICE_K])

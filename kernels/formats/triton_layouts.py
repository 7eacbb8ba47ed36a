"""The layouts in which the Triton kernels read weights: tiles of 4-bit elements, words of 8-bit elements, scales.

    pack_tiles, unpack_tiles      Int4 and MXFP4: the order of a matrix unit, drawn below
    pack_words, unpack_words      Float8: four elements in a word
    pack_scales, unpack_scales    Int4 and GroupedInt8: a scale and a zero point in one word
    by_column                     other scales

All is plain PyTorch, since packing needs no Triton. kernels/triton/elements.py makes floats of it.

A row of W is an output, a column an input. A tile has 16 rows and 64 columns: 128 words of 8 elements. A warp loads it
with one instruction: lane l gets words 4 l to 4 l + 3. They hold exactly the elements that the matrix unit wants from
this lane, so nothing has to move between lanes.

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
from torch import Tensor


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


def pack_words(weight: Tensor) -> Tensor:
    """[..., K] of elements of 8 bits -> words int32 [..., K / 4]. A word has four neighbours, in the order 0 2 1 3: so
    the first two are 16 bits apart, and the last two."""
    return swap_middle(weight.view(torch.uint8)).view(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse, uint8."""
    return swap_middle(words.view(torch.uint8))


def swap_middle(t: Tensor) -> Tensor:
    """t [..., K] with the second and the third of every four elements swapped."""
    return t.unflatten(-1, (-1, 2, 2)).mT.flatten(-3)


def pack_scales(scales: Tensor, zeros: Tensor) -> Tensor:
    """scales [..., N, n_groups] bfloat16 or float16 and zeros uint8 -> words int32 of the same shape, stored column by
    column. A word is the scale as a float32, whose lowest 8 bits are zero, with the zero point in these."""
    return by_column(scales.float().view(torch.int32) | zeros.int())


def unpack_scales(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse, for scales of dtype."""
    return (words & -256).view(torch.float32).to(dtype), (words & 255).to(torch.uint8)


def by_column(scales: Tensor) -> Tensor:
    """scales [..., N, n_groups] in the same shape, but stored column by column."""
    return scales.mT.contiguous().mT

"""The layouts in which the Triton kernels read weights: tiles of 4-bit elements, words of 8-bit elements, scales.

    pack           from a checkpoint's tensors, by the following:
    pack_tiles     Int4 and MXFP4: the order of a matrix unit, drawn below
    pack_words     Float8: four elements in a word
    pack_scales    Int4 and GroupedInt8: a scale and a zero point in one word
    by_column      other scales

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

from kernels.formats.base import Dense, Tensors, WeightFormat, bytes_to_nibbles
from kernels.formats.floats import MXFP4, Float8
from kernels.formats.integers import GroupedInt8, Int4, Int8


def pack(format: WeightFormat, tensors: Tensors) -> Tensors:
    """A checkpoint's tensors as the kernels read them, in the layouts that triton/formats.py lists. Those of Dense and
    Int8 stay as they are."""
    weight, scales, zeros = (tensors.get(name) for name in ("weight", "scales", "zeros"))
    match format:
        case Int4():
            tiles = pack_tiles(bytes_to_nibbles(weight))
            return {"weight": tiles, "scales": pack_scales(scales, zeros), "zeros": None}
        case GroupedInt8():
            rows = (weight ^ 128).view(torch.int8)  # ^ 128 on a byte subtracts 128
            return {"weight": rows, "scales": pack_scales(scales, zeros), "zeros": None}
        case Float8():
            return {"weight": pack_words(weight), "scales": by_column(scales)}
        case MXFP4():
            return {"weight": pack_tiles(bytes_to_nibbles(weight)), "scales": by_column(scales)}
        case Dense() | Int8():
            return tensors
    raise TypeError(f"there is no layout for {format}")


def pack_tiles(q: Tensor) -> Tensor:
    """Elements q [..., N, K] uint8 in 0..15 -> tiles [..., N / 16, K / 64, 128] int32, filled up with zeros."""
    q = F.pad(q, (0, -q.shape[-1] % 64, 0, -q.shape[-2] % 16))
    q = q.unflatten(-1, (-1, 2, 2, 4, 2, 2))  # a column's digits: tile, 32, 16, lane % 4, 2, 1
    q = q.unflatten(-7, (-1, 2, 8))  # and a row's: tile, 8, lane / 4
    low, high = q.unbind(-2)  # columns + 0 and + 2 share a byte
    tiles = low | high << 4
    tile_n, row_8, lane_row, tile_k, column_32, column_16, lane_column, column_1 = range(-8, 0)
    lane, word, byte = (lane_row, lane_column), (row_8, column_32), (column_1, column_16)
    experts = range(tiles.dim() - 8)  # the axis in front, if there is one
    tiles = tiles.permute(*experts, tile_n, tile_k, *lane, *word, *byte)
    return tiles.flatten(-6).contiguous().view(torch.int32)


def pack_words(weight: Tensor) -> Tensor:
    """[..., K] of elements of 8 bits -> words int32 [..., K / 4]. A word has four neighbours, in the order 0 2 1 3: so
    the first two are 16 bits apart, and the last two."""
    return weight.view(torch.uint8).unflatten(-1, (-1, 2, 2)).mT.flatten(-3).view(torch.int32)


def pack_scales(scales: Tensor, zeros: Tensor) -> Tensor:
    """scales [..., N, n_groups] bfloat16 or float16 and zeros uint8 -> words int32 of the same shape, stored column by
    column. A word is the scale as a float32, whose lowest 8 bits are zero, with the zero point in these."""
    return by_column(scales.float().view(torch.int32) | zeros.int())


def by_column(scales: Tensor) -> Tensor:
    """scales [..., N, n_groups] in the same shape, but stored column by column."""
    return scales.mT.contiguous().mT

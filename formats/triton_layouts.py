"""The layouts of weights for the Triton kernels. WeightFormat.to_triton_layout of each format calls some of these:

    pack_tiles         tiles of 4-bit elements, in the order of the tensor cores (drawn below)
    pack_words         four elements of 8 bits in a word
    pack_scales        a scale and a zero point in one word
    to_column_major    scales without zero points

kernels/triton/elements.py decodes the words in the kernels. Packing itself is plain PyTorch and does not need Triton.

A row of W is an output, a column an input. A tile has 16 rows and 64 columns, in 128 words of 8 elements. A warp loads
a tile with one instruction: lane l loads words 4 l to 4 l + 3, the elements that the tensor core expects from lane l,
so that no element moves from lane to lane.

The instruction mma.m16n8k16 of the tensor cores multiplies a matrix A [16, 16] with a matrix B [16, 8]. A is a part of
W. Each lane of the warp holds 8 elements of A, four neighbours in each of two rows (kWidth = 4 in Triton, which
reorders the rows of B likewise):

                     columns 0-3    4-7     8-11    12-15
    rows 0 and 8        lane 0       1       2       3
    rows 1 and 9        lane 4       5       6       7
    ...
    rows 7 and 15       lane 28      29      30      31

A tile is four matrices A, side by side. The elements of lane l start at row r = l / 4 and column c = 4 (l % 4):

    word 0    row r        columns c + (0 1 2 3  16 17 18 19)
    word 1    row r        columns c + (0 1 2 3  16 17 18 19) + 32
    word 2    row r + 8    columns as in word 0
    word 3    row r + 8    columns as in word 1

    bits of a word      31-28   27-24   23-20   19-16   15-12   11-8    7-4     3-0
    column, c +          19      17       3       1      18      16      2       0

Bits 0-3 and 16-19 are neighbours in a row, as are bits 4-7 and 20-23, and so on. Two neighbours, converted to 16-bit
floats, fill one register of the instruction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_N, TILE_K = 16, 64  # rows and columns of a tile


def pack_tiles(q: Tensor) -> Tensor:
    """Elements q [..., N, K] uint8 in 0..15 -> tiles [..., N / 16, K / 64, 128] int32, padded with zeros."""
    q = F.pad(q, (0, -q.shape[-1] % TILE_K, 0, -q.shape[-2] % TILE_N))
    q = q.unflatten(-1, (-1, 2, 2, 4, 2, 2))  # the digits of a column: tile, 32, 16, lane % 4, 2, 1
    q = q.unflatten(-7, (-1, 2, 8))  # the digits of a row: tile, 8, lane / 4
    low, high = q.unbind(-2)  # columns c and c + 2 share a byte
    tiles = low | high << 4
    tile_n, row_8, lane_row, tile_k, column_32, column_16, lane_column, column_1 = range(-8, 0)
    lane, word, byte = (lane_row, lane_column), (row_8, column_32), (column_1, column_16)
    experts = range(tiles.dim() - 8)  # the axes in front: one, or none
    tiles = tiles.permute(*experts, tile_n, tile_k, *lane, *word, *byte)
    return tiles.flatten(-6).contiguous().view(torch.int32)


def pack_words(weight: Tensor) -> Tensor:
    """Elements of 8 bits [..., K] -> words int32 [..., K / 4]. A word holds four neighbours in the order 0 2 1 3, so
    that neighbours 0 and 1, and 2 and 3, are 16 bits apart."""
    return weight.view(torch.uint8).unflatten(-1, (-1, 2, 2)).mT.flatten(-3).view(torch.int32)


def pack_scales(scales: Tensor, zeros: Tensor) -> Tensor:
    """scales [..., N, n_groups] bfloat16 or float16, zeros [..., N, n_groups] uint8 -> words int32 [..., N, n_groups],
    stored column by column. A word is the scale as a float32, with the zero point in the lowest 8 bits. They are free,
    because the scale has 16 bits."""
    return to_column_major(scales.float().view(torch.int32) | zeros.int())


def to_column_major(scales: Tensor) -> Tensor:
    """Returns scales [..., N, n_groups] with strides of [..., n_groups, N]: stored column by column."""
    return scales.mT.contiguous().mT

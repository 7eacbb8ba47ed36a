"""The layout of weights for the C++ kernels. WeightFormat.to_cpu_layout calls these functions.

A block is 16 rows of W. A word is four bytes of a row: 2, 4 or 8 elements of 16, 8 or 4 bits. A packed block has word 0
of all 16 rows, then word 1 of all 16 rows, and so on (kernels/csrc/weights.h draws a block): a load of 64 bytes fills a
vector register, whose 16 lanes are 16 outputs. Rows are padded to a multiple of ACT_GROUP_SIZE elements. Scales and
zeros are packed likewise, group by group, without padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_BLOCK_N = 16  # rows of a block
ACT_GROUP_SIZE = 16  # activations that share a scale when rounded to int8 (kernels/csrc/prologue.h: ActGroup)


def words_to_blocks(weight: Tensor, elements_per_word: int) -> Tensor:
    """Rows of K elements in any dtype, [..., N, bytes of a row] -> words int32 [..., N / 16, words of a row, 16]."""
    return to_blocks(weight.view(torch.int32), ACT_GROUP_SIZE // elements_per_word)


def to_blocks(t: Tensor, row_multiple: int = 1) -> Tensor:
    """[..., N, X] -> [..., N / 16, X, 16]. Zeros pad N to a multiple of 16, and X to one of row_multiple. Without
    padding the result is a view, because HugePageArena (layers/packing.py) copies the weight anyway."""
    padding = (0, -t.shape[-1] % row_multiple, 0, -t.shape[-2] % CPU_BLOCK_N)
    if any(padding):
        t = F.pad(t, padding)
    return t.unflatten(-2, (-1, CPU_BLOCK_N)).mT


def pair_rows(words: Tensor) -> Tensor:
    """Reorders pairs of bytes among the words [..., 16] of 4 neighbouring rows: elements 0 and 1 of the 4 rows come
    first, then elements 2 and 3 (kernels/csrc/float8.h draws the order)."""
    pairs = words.contiguous().view(torch.int16).unflatten(-1, (-1, 4, 2))  # [..., four rows, row, pair]
    return pairs.mT.contiguous().flatten(-3).view(torch.int32)

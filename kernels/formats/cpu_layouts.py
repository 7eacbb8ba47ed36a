"""Packs the tensors of a checkpoint for the C++ kernels. kernels/prepare.py calls pack.

A block is 16 rows of W. A word is four bytes of a row: 4 elements of 8 bits, or 8 elements of 4 bits. A packed block
has word 0 of all 16 rows, then word 1 of all 16 rows, and so on (csrc/weights.h draws a block). So a load of 64 bytes
fills a vector register, and the 16 lanes of the register are 16 outputs. Scales and zeros are packed likewise, group by
group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats.base import Tensors, WeightFormat
from kernels.formats.floats import Float8
from kernels.formats.integers import Int8

CPU_BLOCK_N = 16  # rows of a block


def pack(format: WeightFormat, tensors: Tensors) -> Tensors:
    """Packs the tensors of a checkpoint. Unquantized weights stay the same. In most formats the results are words int32
    [..., N / 16, bytes of a row / 4, 16], and scales and zeros [..., N / 16, n_groups, 16]."""
    if not format.is_quantized:
        return tensors
    match format:
        case Int8():
            return pack_int8(tensors)
        case Float8():
            return pack_float8(tensors)
    words = {"weight": tensors["weight"].view(torch.int32)}
    return {name: to_blocks(t) for name, t in (tensors | words).items()}


def pack_int8(tensors: Tensors) -> Tensors:
    """Words of q + 128, and scales [N], which stay the same."""
    # ^ 128 on a byte adds 128. One expression, so that the result of ^ is freed before to_blocks copies
    words = to_blocks((tensors["weight"].view(torch.uint8) ^ 128).view(torch.int32))
    return {"weight": words, "scales": tensors["scales"]}


def pack_float8(tensors: Tensors) -> Tensors:
    """Words as in most formats, but with pairs of bytes reordered among the words of 4 neighbouring rows: elements 0
    and 1 of the 4 rows come first, then elements 2 and 3 (csrc/float8.h draws the order)."""
    words = to_blocks(tensors["weight"].view(torch.int32))
    pairs = words.view(torch.int16).unflatten(-1, (-1, 4, 2))  # [..., four rows, row, pair]
    words = pairs.mT.contiguous().flatten(-3).view(torch.int32)
    return {"weight": words, "scales": to_blocks(tensors["scales"])}


def to_blocks(t: Tensor) -> Tensor:
    """[..., N, X] -> [..., N / 16, X, 16]. N is padded with zeros to a multiple of 16."""
    t = F.pad(t, (0, 0, 0, -t.shape[-2] % CPU_BLOCK_N))
    return t.unflatten(-2, (-1, CPU_BLOCK_N)).mT.contiguous()

"""The order in which the C++ kernels read quantized weights: from a checkpoint's tensors to this order.

Rows of W are stored in blocks of 16, word by word (csrc/weights.h draws it). A word is four bytes of a row: 4 elements
of 8 bits, or 8 of 4 bits. Scales and zeros are stored alike, group by group. So the 16 lanes of a vector register are
16 outputs, and a load of 64 bytes fills it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats.base import Tensors, WeightFormat
from kernels.formats.floats import Float8
from kernels.formats.integers import Int8

CPU_BLOCK_N = 16  # rows of W that the kernels read side by side


def pack(format: WeightFormat, tensors: Tensors) -> Tensors:
    """A checkpoint's tensors as the kernels read them. Dense weights stay as they are. Here, for most formats: words
    int32 [..., N / 16, bytes of a row / 4, 16], scales and zeros [..., N / 16, n_groups, 16]."""
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
    """Words of elements that are each stored as q + 128. Scales [N], as they are."""
    # ^ 128 on a byte adds 128. In one expression, so that this temporary is freed before the next copy.
    words = to_blocks((tensors["weight"].view(torch.uint8) ^ 128).view(torch.int32))
    return {"weight": words, "scales": tensors["scales"]}


def pack_float8(tensors: Tensors) -> Tensors:
    """Of 4 words side by side, elements 0 and 1 of each come first, then elements 2 and 3 of each (csrc/float8.h)."""
    words = to_blocks(tensors["weight"].view(torch.int32))
    pairs = words.view(torch.int16).unflatten(-1, (-1, 4, 2))  # [..., four rows, row, pair]
    words = pairs.mT.contiguous().flatten(-3).view(torch.int32)
    return {"weight": words, "scales": to_blocks(tensors["scales"])}


def to_blocks(t: Tensor) -> Tensor:
    """[..., N, X] -> [..., N / 16, X, 16], with N padded with zeros to a multiple of 16."""
    t = F.pad(t, (0, 0, 0, -t.shape[-2] % CPU_BLOCK_N))
    return t.unflatten(-2, (-1, CPU_BLOCK_N)).mT.contiguous()

"""Decodes the quantized types of GGUF, for gguf_quantized.py. A block holds quantized values, scales and minima.

    groups = decode_rows(rows, GGMLType.Q4_K)    # rows: [N, bytes] uint8
    groups.q, groups.scales, groups.zeros        # w = (q - zero) * scale
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from formats import Tensors
from formats.base import pack_nibbles, unpack_nibbles_planar

FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)

# ---- Types ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockType:
    """A quantized type of GGUF. A weight is q * scale + offset.

    decode: blocks [..., bytes] uint8 -> q [..., inputs] uint8, scales and offsets [..., n_groups] float32"""

    bits: int  # of q
    group_size: int
    decode: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    has_minimum: bool = False  # whether blocks store minima; if so, offset / scale need not be an integer


def read_float16(blocks: Tensor, start: int) -> Tensor:
    """Reads the float16 at byte start of each block, as float32: [..., 1]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).float()


def select_bits(packed: Tensor, bit: int, n: int = 1) -> Tensor:
    return packed >> bit & ((1 << n) - 1)


def decode_q4(blocks: Tensor, n_header: int, fifth_bit: bool = False) -> Tensor:
    """Returns the 32 quantized values of a block of Q4_0, Q4_1, Q5_0 or Q5_1:

        n_header bytes    the scale, and perhaps the minimum
        4 bytes           the fifth bit of every value, only in Q5_0 and Q5_1
        16 bytes          the lower four bits of every value"""
    start = n_header + (4 if fifth_bit else 0)
    q = unpack_nibbles_planar(blocks[..., start : start + 16])
    if fifth_bit:
        high = blocks[..., n_header:start, None] >> torch.arange(8, dtype=torch.uint8) & 1  # [..., 4, 8]
        q = q | high.flatten(-2) << 4
    return q


def decode_symmetric(blocks: Tensor, zero: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Decodes Q4_0 and Q5_0: a scale and a fixed zero point."""
    scale = read_float16(blocks, 0)
    return decode_q4(blocks, 2, **options), scale, -zero * scale


def decode_asymmetric(blocks: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Decodes Q4_1 and Q5_1: a scale and a minimum."""
    return decode_q4(blocks, 4, **options), read_float16(blocks, 0), read_float16(blocks, 2)


def decode_q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = read_float16(blocks, 0)
    return blocks[..., 2:] ^ 128, scale, -128 * scale  # ^ 128 adds 128 to an int8


def decode_q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """32 bytes hold the q of two groups: the first in the low nibbles, the second in the high nibbles."""
    scales, offsets = decode_k_scales(blocks)
    return unpack_nibbles_planar(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-2), scales, offsets


def decode_q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The low 4 bits are stored as in Q4_K. Byte i of qh holds the fifth bit of input i for each of the 8 groups."""
    scales, offsets = decode_k_scales(blocks)
    qh, low = blocks[..., 16:48], unpack_nibbles_planar(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-2)
    high = torch.cat([select_bits(qh, group) for group in range(8)], dim=-1)
    return low | high << 4, scales, offsets


def decode_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scales and offsets of Q4_K and Q5_K: [..., 8] each. A block has a scale and a minimum in float16.
    Each group multiplies them by two 6-bit integers of its own. These are packed into 12 bytes:

        byte i     bits 0-5                                    bits 6-7
        0 - 3      scale of group i                            upper 2 bits of the scale of group i + 4
        4 - 7      minimum of group i - 4                      upper 2 bits of the minimum of group i

                   bits 0-3                                    bits 4-7
        8 - 11     lower 4 bits of the scale of group i - 4    lower 4 bits of the minimum of group i - 4"""
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=-1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=-1)
    return read_float16(blocks, 0) * scales, -read_float16(blocks, 2) * minima


def decode_q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block has two halves of 128 inputs, and an int8 scale for every 16 inputs. Each half has

        ql    64 bytes    in byte i the lower 4 bits of inputs i (low half) and i + 64 (high half)
        qh    32 bytes    in byte i the upper 2 bits of inputs i, i + 32, i + 64 and i + 96, from bit 0 on"""
    ql, qh = blocks[..., :128].unflatten(-1, (2, 64)), blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.cat([select_bits(qh, bit, 2) for bit in (0, 2, 4, 6)], dim=-1)
    q = (unpack_nibbles_planar(ql) | high << 4).flatten(-2)
    scales = read_float16(blocks, 208) * blocks[..., 192:208].view(torch.int8)
    return q, scales, -32 * scales


BLOCK_TYPES = {
    GGMLType.Q4_0: BlockType(4, 32, partial(decode_symmetric, zero=8)),
    GGMLType.Q4_1: BlockType(4, 32, decode_asymmetric, has_minimum=True),
    GGMLType.Q5_0: BlockType(5, 32, partial(decode_symmetric, zero=16, fifth_bit=True)),
    GGMLType.Q5_1: BlockType(5, 32, partial(decode_asymmetric, fifth_bit=True), has_minimum=True),
    GGMLType.Q8_0: BlockType(8, 32, decode_q8_0),
    GGMLType.Q4_K: BlockType(4, 32, decode_q4_k, has_minimum=True),
    GGMLType.Q5_K: BlockType(5, 32, decode_q5_k, has_minimum=True),
    GGMLType.Q6_K: BlockType(6, 16, decode_q6_k),
}


# ---- Rows -----------------------------------------------------------------------------------------------------------


@dataclass
class GroupedRows:
    """Decoded rows of a tensor: w = (q - zero) * scale, with q [N, K], and float32 scales and zeros [N, n_groups]."""

    block_type: BlockType
    q: Tensor
    scales: Tensor
    zeros: Tensor

    def expand(self, per_group: Tensor) -> Tensor:
        """Repeats the value of a group for each of its inputs: [N, n_groups] -> [N, K]."""
        return per_group[..., None].expand(*per_group.shape, self.block_type.group_size).flatten(-2)

    def dequantize(self) -> Tensor:
        return (self.q - self.expand(self.zeros)) * self.expand(self.scales)


def decode_rows(rows: Tensor, ggml_type: GGMLType) -> GroupedRows:
    block_type, (_, block_bytes) = BLOCK_TYPES[ggml_type], GGML_QUANT_SIZES[ggml_type]
    q, scales, offsets = (t.flatten(-2) for t in block_type.decode(rows.unflatten(-1, (-1, block_bytes))))
    groups, is_constant = GroupedRows(block_type, q, scales, -offsets / scales), scales == 0
    # With a scale of 0, all weights of a group equal its offset. Represent an offset above 0 by q 1, zero 0 and scale
    # offset, and one below 0 by q 0, zero 1 and scale -offset.
    if is_constant.any():
        groups.scales = torch.where(is_constant, offsets.abs(), scales)
        groups.zeros = torch.where(is_constant, (offsets < 0).float(), groups.zeros)
        groups.q = torch.where(groups.expand(is_constant), groups.expand((offsets > 0).to(torch.uint8)), q)
    return groups


def decode_mxfp4(rows: Tensor) -> Tensors:
    """Converts rows of GGUF's MXFP4 to the tensors of ours. A block holds an exponent and 32 values."""
    blocks = rows.unflatten(-1, (-1, GGML_QUANT_SIZES[GGMLType.MXFP4][1]))
    weight = pack_nibbles(unpack_nibbles_planar(blocks[..., 1:]).flatten(-2))
    return {"weight": weight, "scales": blocks[..., 0].contiguous()}

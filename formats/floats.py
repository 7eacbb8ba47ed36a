"""Float8 and MXFP4: weights as floats of 8 and 4 bits with a scale. float_bits.py has the floats."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.base import Tensors, WeightFormat, pack_nibbles, repeat_groups, unpack_nibbles
from formats.cpu_layouts import pair_rows, to_blocks, words_to_blocks
from formats.float_bits import FLOAT8_MAX, decode_mxfp4, round_mxfp4
from formats.integers import GROUP_SIZES, join_groups, split_groups
from formats.triton_layouts import pack_tiles, pack_words, to_column_major


@dataclass(frozen=True)
class Float8(WeightFormat):
    """8-bit floats, e4m3: 4 bits of exponent, 3 bits of mantissa, up to 448, no infinity. group_size inputs of an
    output share a scale; None: all inputs of an output."""

    group_size: int | None = None
    mode = "fp8"
    dtypes = {"weight": torch.float8_e4m3fn, "scales": torch.float32}

    def quantize_rows(self, w: Tensor) -> Tensors:
        k = w.shape[-1]
        groups = split_groups(w.float(), self.effective_group_size(k))
        scales = (groups.abs().amax(-1) / FLOAT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        q = join_groups(groups / scales[..., None], k)
        return {"weight": q.to(torch.float8_e4m3fn), "scales": scales}

    def dequantize(self, tensors, dtype):
        q = tensors["weight"].float()
        k = q.shape[-1]
        return (q * repeat_groups(tensors["scales"], self.effective_group_size(k), k)).to(dtype)

    def to_cpu_layout(self, tensors):
        words = pair_rows(words_to_blocks(tensors["weight"], 4))
        return {"weight": words, "scales": to_blocks(tensors["scales"])}

    def to_triton_layout(self, tensors):
        return {"weight": pack_words(tensors["weight"]), "scales": to_column_major(tensors["scales"])}

    def promote_format(self, other):
        if not isinstance(other, Float8):
            return None
        return Float8(math.gcd(self.group_size or 0, other.group_size or 0) or None)

    def to_dict(self):
        return super().to_dict() | ({"groupsize": self.group_size} if self.group_size else {})

    @classmethod
    def stored_formats(cls):
        return [cls(), *map(cls, GROUP_SIZES)]  # only converters make groups


@dataclass(frozen=True)
class MXFP4(WeightFormat):
    """4-bit floats, e2m1. 32 inputs of an output share a scale, a power of two, stored as an exponent (OCP Microscaling
    Formats, version 1.0)."""

    group_size: int = 32  # smaller in a shard that cuts through a group
    mode = "mxfp4"
    dtypes = {"weight": torch.uint8, "scales": torch.uint8}
    elements_per_byte = 2
    int8_activations = True
    k_alignment = 32
    shard_alignment = 8

    def quantize_rows(self, w: Tensor) -> Tensors:
        q, scales = round_mxfp4(split_groups(w.float(), self.group_size))
        return {"weight": pack_nibbles(join_groups(q, w.shape[-1])), "scales": scales}

    def dequantize(self, tensors, dtype):
        q = unpack_nibbles(tensors["weight"])
        scales = repeat_groups(tensors["scales"], self.group_size, q.shape[-1])
        return decode_mxfp4(q, scales).to(dtype)

    def to_triton_layout(self, tensors):
        tiles = pack_tiles(unpack_nibbles(tensors["weight"]))
        return {"weight": tiles, "scales": to_column_major(tensors["scales"])}

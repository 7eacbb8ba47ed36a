"""Float8 and MXFP4: weights as floats of 8 and 4 bits with a scale; and the rounding and decoding of MXFP4.

    e4m3 (FP8)     sign, 4 bits of exponent, 3 bits of mantissa, up to 448, no infinity: torch.float8_e4m3fn
    e2m1 (FP4)     sign, 2 bits of exponent, 1 bit of mantissa: q 0 to 7 are E2M1_VALUES, q 8 to 15 the negatives
    e8m0 (MX)      8 bits of exponent with a bias of 127: powers of two
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.base import Tensors, WeightFormat, pack_nibbles, repeat_groups, unpack_nibbles
from formats.cpu_layouts import pair_rows, to_blocks, words_to_blocks
from formats.integers import GROUP_SIZES, join_groups, split_groups
from formats.triton_layouts import pack_tiles, pack_words, to_column_major

FLOAT8_MAX = 448.0  # the largest e4m3
E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1_MAX_EXPONENT = 2  # the exponent of 4 and 6
E8M0_BIAS = 127


@dataclass(frozen=True)
class Float8(WeightFormat):
    """e4m3. group_size inputs of an output share a scale; None: all inputs of an output."""

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
    """e2m1. 32 inputs of an output share a scale, an e8m0 (OCP Microscaling Formats, version 1.0)."""

    group_size: int = 32  # smaller in a shard that cuts through a group
    mode = "mxfp4"
    dtypes = {"weight": torch.uint8, "scales": torch.uint8}
    elements_per_byte = 2
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


# ---- The floats of MXFP4 --------------------------------------------------------------------------------------------


def round_mxfp4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds groups [..., group_size] float32 to q [..., group_size] uint8 and scales [...] uint8.

    Each group tries two scales, and takes the scale with the smaller sum of squared errors:

        the standard's scale      divides the largest magnitude into [4, 8); a quotient above 6 is clamped to 6
        twice this scale          clamps nothing, but the steps between values are twice as wide"""
    _, exponents = groups.abs().amax(-1).frexp()  # the largest magnitude is in [2^(exponent - 1), 2^exponent)
    first = (exponents - 1 - E2M1_MAX_EXPONENT + E8M0_BIAS).clamp(min=1)  # the scale is not subnormal
    scales = torch.stack([first, first + 1])  # [2, ...]
    factors = decode_e8m0(scales)[..., None]
    q = encode_e2m1(groups / factors)  # [2, ..., group_size]
    errors = (decode_e2m1(q) * factors - groups).square().sum(-1)
    takes_first = errors[0] <= errors[1]
    return torch.where(takes_first[..., None], *q), torch.where(takes_first, *scales).to(torch.uint8)


def decode_mxfp4(q: Tensor, scales: Tensor) -> Tensor:
    """Decodes q and scales, both uint8 and of shapes that broadcast, to float32. The result is exact."""
    return decode_e2m1(q) * decode_e8m0(scales)


def encode_e2m1(x: Tensor) -> Tensor:
    """Rounds x to the nearest e2m1, ties to even: uint8. A magnitude above 6 becomes 6."""
    magnitude = x.abs().clamp(max=E2M1_VALUES[-1])
    # Neighbouring values are 0.5 apart from 0 to 2, 1 apart from 2 to 4, 2 apart from 4 to 6
    q = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return q.round().to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def decode_e2m1(q: Tensor) -> Tensor:
    """The inverse of encode_e2m1, float32."""
    values = torch.tensor(E2M1_VALUES + [-value for value in E2M1_VALUES], device=q.device)
    return values[q.int()]


def decode_e8m0(scales: Tensor) -> Tensor:
    """2^(scale - 127), float32. scale becomes the exponent of the float32, whose bias is 127, too. The exception is
    2^-127, a subnormal number with one bit set."""
    return (scales.int() << 23).clamp(min=1 << 22).view(torch.float32)

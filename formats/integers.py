"""Int8, Int4 and GroupedInt8: weights as integers with a scale; and the rounding for quantize.py and gptq.py."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from formats.base import Tensors, WeightFormat, pack_nibbles, repeat_groups, unpack_nibbles
from formats.cpu_layouts import words_to_blocks
from formats.triton_layouts import pack_scales, pack_tiles

GROUP_SIZES = (32, 64, 128, 256)  # of Int4 and Float8; GroupedInt8 may have 16, too


@dataclass(frozen=True)
class Int8(WeightFormat):
    """Symmetric, with one scale for each output. quantize.py makes q from -127 to 127."""

    mode = "int8"
    group_size = None

    def allocate(self, shape, dtype, device):
        return {
            "weight": torch.empty(shape, dtype=torch.int8, device=device),
            "scales": torch.empty(shape[:-1], dtype=torch.float32, device=device),
        }

    def quantize_rows(self, w: Tensor) -> Tensors:
        w = w.float()
        scales = w.abs().amax(-1) / 127
        q = (w / scales.clamp(min=1e-38)[:, None]).round()
        return {"weight": q.to(torch.int8), "scales": scales}

    def dequantize(self, tensors, dtype):
        return (tensors["weight"] * tensors["scales"][..., None]).to(dtype)

    def to_cpu_layout(self, tensors):
        # ^ 128 flips the top bit: int8, -128 to 127, becomes uint8, 0 to 255. The result has no name, so that it is
        # freed before the next line.
        words = words_to_blocks(tensors["weight"].view(torch.uint8) ^ 128, 4)
        return {"weight": words, "scales": tensors["scales"]}

    def to_triton_layout(self, tensors):
        return tensors


@dataclass(frozen=True)
class GroupwiseAffine(WeightFormat):
    """What Int4 and GroupedInt8 have in common: w = (q - zero) * scale, with q >= 0. Every group_size inputs of an
    output share a scale and a zero point. The last group may be shorter."""

    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16

    mode: ClassVar[str]
    zero_fraction_bits: ClassVar[int]  # zeros are fixed-point numbers: the zero point is zeros / 2^zero_fraction_bits

    def to_dict(self):
        return super().to_dict() | ({"scale_dtype": "float16"} if self.scale_dtype == torch.float16 else {})

    @classmethod
    def stored_formats(cls):
        return [cls(size, dtype) for size in cls.group_size_choices for dtype in (torch.bfloat16, torch.float16)]

    @property
    def dtypes(self):
        return {"weight": torch.uint8, "scales": self.scale_dtype, "zeros": torch.uint8}

    def pack_q(self, q: Tensor) -> Tensor:
        """Packs q [..., N, K] uint8 to the tensor "weight"."""
        return q.contiguous()

    def unpack_q(self, weight: Tensor) -> Tensor:
        """Unpacks the tensor "weight" to q [..., N, K] uint8."""
        return weight

    def dequantize(self, tensors, dtype):
        q = self.unpack_q(tensors["weight"])
        scales, zeros = (
            repeat_groups(t, self.group_size, q.shape[-1])
            for t in (tensors["scales"].float(), tensors["zeros"].float() / 2**self.zero_fraction_bits)
        )
        return ((q - zeros) * scales).to(dtype)

    def promote_format(self, other):
        """GroupedInt8 can hold another project's Int4 with the same scale_dtype: other projects have integer zero
        points."""
        if not isinstance(other, GroupwiseAffine) or other.scale_dtype != self.scale_dtype:
            return None
        format_class = type(self) if type(self) is type(other) else GroupedInt8
        return format_class(math.gcd(self.group_size, other.group_size), self.scale_dtype)


class Int4(GroupwiseAffine):
    """q from 0 to 15. A zero point is a multiple of 1/16, from 0 to 255/16: an integer would shift the range of q by up
    to half a step, and clamp weights at one end of the group."""

    mode = "int4"
    group_size_choices = GROUP_SIZES
    k_alignment = shard_alignment = 8
    elements_per_byte = 2
    zero_fraction_bits = 4

    def quantize_rows(self, w):
        groups = split_groups(w.float(), self.group_size)  # [N, n_groups, group_size]
        scales, zeros = choose_qparams(groups, self.scale_dtype)
        return self.round_groups(groups, scales, zeros, w.shape[-1])

    def round_groups(self, groups: Tensor, scales: Tensor, zeros: Tensor, k: int) -> Tensors:
        """The tensors for groups [N, n_groups, group_size] of rows of k elements. The last group may have padding."""
        q = quantize_affine(groups, scales.float()[..., None], decode_zeros(zeros)[..., None])
        return {"weight": self.pack_q(join_groups(q.to(torch.uint8), k)), "scales": scales, "zeros": zeros}

    def to_triton_layout(self, tensors):
        tiles = pack_tiles(unpack_nibbles(tensors["weight"]))
        return {"weight": tiles, "scales": pack_scales(tensors["scales"], tensors["zeros"]), "zeros": None}

    def promote_tensors(self, tensors, promoted, in_features):
        if isinstance(promoted, GroupedInt8):
            q, zeros = self.unpack_q(tensors["weight"]), tensors["zeros"] >> self.zero_fraction_bits
            tensors = tensors | {"weight": q, "zeros": zeros}
        return super().promote_tensors(tensors, promoted, in_features)

    def pack_q(self, q):
        return pack_nibbles(q)

    def unpack_q(self, weight):
        return unpack_nibbles(weight)


class GroupedInt8(GroupwiseAffine):
    """q from 0 to 255. A zero point is an integer from 0 to 255."""

    mode = "int8-grouped"
    group_size_choices = (16, *GROUP_SIZES)
    zero_fraction_bits = 0

    @property
    def name(self):
        return f"int8.g{self.group_size}"

    def quantize_rows(self, w):
        groups = split_groups(w.float(), self.group_size)  # [N, n_groups, group_size]
        # With 255, the group's largest weight could be clamped. 254 leaves headroom for two roundings: bfloat16 may
        # round the scale down by a factor of 1 + 2^-8, the zero point by 0.5. 254 * (1 + 2^-8) + 0.5 is below 255.5
        scales, zeros = choose_range(groups, 254, self.scale_dtype)
        zeros = zeros.round().clamp(0, 255)
        q = quantize_affine(groups, scales.float()[..., None], zeros[..., None], max_q=255)
        return {
            "weight": self.pack_q(join_groups(q.to(torch.uint8), w.shape[-1])),
            "scales": scales,
            "zeros": zeros.to(torch.uint8),
        }

    def to_triton_layout(self, tensors):
        rows = (tensors["weight"] ^ 128).view(torch.int8)  # flips the top bit: uint8 to int8
        return {"weight": rows, "scales": pack_scales(tensors["scales"], tensors["zeros"]), "zeros": None}


# ---- The arithmetic of groups, which quantize.py and gptq.py share --------------------------------------------------


def split_groups(w: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., n_groups, group_size]. The last element pads a shorter last group, whose minimum and maximum
    stay the same."""
    missing = -w.shape[-1] % group_size
    if missing:
        w = torch.cat([w, w[..., -1:].expand(*w.shape[:-1], missing)], dim=-1)
    return w.unflatten(-1, (-1, group_size))


def join_groups(groups: Tensor, k: int) -> Tensor:
    """The inverse of split_groups: [..., n_groups, group_size] -> [..., K], without the padding."""
    return groups.flatten(-2)[..., :k]


def choose_range(groups: Tensor, max_q: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Chooses scales [...] in scale_dtype and zero points [...] in float32 for groups [..., group_size]: q from 0 to
    max_q span the values of each group, and 0."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / max_q).to(scale_dtype)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, -low / scales.float()


def choose_qparams(groups: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """choose_range for int4: scales [...] and stored zero points [...] uint8."""
    scales, zero = choose_range(groups, 15, scale_dtype)
    return scales, encode_zeros(zero)


def quantize_affine(w: Tensor, scale: Tensor | float, zero: Tensor, max_q: int = 15) -> Tensor:
    """Returns the q in 0..max_q for which (q - zero) * scale is nearest to w. All are float32."""
    return (w / scale + zero).round_().clamp_(0, max_q)


def encode_zeros(zero: Tensor) -> Tensor:
    """Converts zero points to the stored numbers of int4: 16 * zero, rounded, uint8."""
    return (zero * 2**Int4.zero_fraction_bits).round().clamp(0, 255).to(torch.uint8)


def decode_zeros(zeros: Tensor) -> Tensor:
    """The inverse of encode_zeros, float32."""
    return zeros.float() / 2**Int4.zero_fraction_bits

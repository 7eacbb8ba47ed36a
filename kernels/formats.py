"""How weights are stored: Dense (16 or 32 bits), Int8, Int4, GroupedInt8, Float8, MXFP4. A format is a class here and a
branch in each kernel.

For a weight W [..., N, K] (N outputs, K inputs, experts in front) a format knows: which tensors a checkpoint holds, how
to make them (quantize), what they mean (dequantize, which is the reference for the kernels), which part of them a
tensor-parallel rank keeps (shard_inputs), and the order in which a backend's kernels read them (pack, unpack).

    Dense          weight [N, K]
    Int8           weight [N, K] int8, scales [N] float32                      w = q * scale
    Int4           weight [N, K / 2] uint8,                                    w = (q - zero / 16) * scale
                   scales [N, n_groups], zeros [N, n_groups] uint8
    GroupedInt8    weight [N, K] uint8, scales and zeros as Int4               w = (q - zero) * scale
    Float8         weight [N, K] float8_e4m3fn, scales [N, n_groups] float32   w = q * scale
    MXFP4          weight [N, K / 2] uint8, scales [N, K / 32] uint8           w = e2m1(q) * 2^(scale - 127)

In Int4 and GroupedInt8 group_size inputs of an output share a scale and a zero point. The scales are bfloat16, or
float16 where another project's checkpoint has those, since bfloat16 has fewer bits.

Int4 and MXFP4 store 8 elements in 4 bytes. Byte j holds element j in its low half and element j + 4 in its high half:

             byte        0        1        2        3
             low half    q0       q1       q2       q3
             high half   q4       q5       q6       q7
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UsageError
from kernels.float_bits import FLOAT8_MAX, decode_mxfp4, round_mxfp4

Tensors = dict[str, Tensor]  # "weight" and, if quantized, "scales" and "zeros"
CPU_BLOCK_N = 16  # rows of W that the CPU kernels read side by side
GROUP_SIZES = (32, 64, 128, 256)  # of Int4
INT8_GROUP_SIZES = (16, *GROUP_SIZES)
SCALE_DTYPES = ("bfloat16", "float16")  # of scales that a group shares
QUANTIZE_CHUNK = 2**18  # elements quantized at a time, so that their float32 copies stay in the processor's cache


class WeightFormat:
    """The interface of a format, with what most formats have in common."""

    format_id: int  # the format's number in the kernels
    name: str | None = None  # in the output of --json
    quantization: dict | None = None  # in model.pth
    pack_factor = 1  # inputs that share a word: W can only be cut at multiples of it
    input_multiple = 1  # a whole W must have a multiple of so many inputs

    def empty(self, shape: torch.Size, dtype: torch.dtype, device) -> Tensors:
        """Uninitialized tensors, as a checkpoint holds them, for W of this shape and dtype."""
        raise NotImplementedError

    def quantize(self, w: Tensor) -> Tensors:
        """The tensors for w [..., N, K], each element rounded to the nearest value that the format can store."""
        raise NotImplementedError

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """W [..., N, K] in dtype, from a checkpoint's tensors."""
        raise NotImplementedError

    def shard_inputs(self, name: str, tensor: Tensor, start: int, length: int) -> Tensor:
        """The part of one of the tensors that belongs to W's inputs [start, start + length)."""
        return tensor[..., start : start + length].clone() if name == "weight" else tensor

    def shard_format(self, length: int) -> "WeightFormat":
        """The format of such a shard."""
        return self

    def scale_group_size(self, in_features: int) -> int:
        """How many inputs of an output share a scale."""
        return in_features

    def fits_kernels(self, backend: str, in_features: int) -> bool:
        """Whether the kernels of backend ("cpu" or "triton") take a W with in_features inputs."""
        return True

    def pack(self, tensors: Tensors, backend: str) -> Tensors:
        """A checkpoint's tensors in the order in which the kernels of backend ("cpu" or "triton") read them."""
        return tensors

    def unpack(self, tensors: Tensors, backend: str, out_features: int, in_features: int) -> Tensors:
        """The inverse of pack, for W [..., out_features, in_features]."""
        return tensors


@dataclass(frozen=True)
class Dense(WeightFormat):
    """16 or 32 bits, unchanged."""

    format_id = 0

    def empty(self, shape, dtype, device):
        return {"weight": torch.empty(shape, dtype=dtype, device=device)}

    def quantize(self, w):
        return {"weight": w}

    def dequantize(self, tensors, dtype):
        return tensors["weight"]


@dataclass(frozen=True)
class Dequantized(Dense):
    """What a quantized weight becomes where there are no kernels for it (dequantize_weights in __init__.py)."""

    name: str  # of the format that the checkpoint has


@dataclass(frozen=True)
class Int8(WeightFormat):
    """Symmetric, q from -127 to 127, one scale for each output."""

    format_id = 1
    name = "int8"
    quantization = {"mode": "int8"}

    def empty(self, shape, dtype, device):
        return {
            "weight": torch.empty(shape, dtype=torch.int8, device=device),
            "scales": torch.empty(shape[:-1], dtype=torch.float32, device=device),
        }

    def quantize(self, w):
        return in_chunks(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        w = w.float()
        scales = w.abs().amax(-1) / 127
        q = (w / scales.clamp(min=1e-38)[:, None]).round()
        return {"weight": q.to(torch.int8), "scales": scales}

    def dequantize(self, tensors, dtype):
        return (tensors["weight"] * tensors["scales"][..., None]).to(dtype)

    def fits_kernels(self, backend, in_features):
        return in_features % 8 == 0

    def pack(self, tensors, backend):
        """cpu: words of four elements, each q + 128. The words of 16 rows lie side by side, then their next words:
        int32 [N / 16, K / 4, 16]."""
        if backend != "cpu":
            return tensors
        # ^ 128 on a byte adds 128. In one expression, so that this temporary is freed before the next copy.
        words = to_blocked_layout((tensors["weight"].view(torch.uint8) ^ 128).view(torch.int32))
        return {"weight": words, "scales": tensors["scales"]}

    def unpack(self, tensors, backend, out_features, in_features):
        if backend != "cpu":
            return tensors
        unsigned = from_blocked_layout(tensors["weight"], out_features).view(torch.uint8)
        return {"weight": (unsigned ^ 128).view(torch.int8), "scales": tensors["scales"]}


@dataclass(frozen=True)
class GroupedFormat(WeightFormat):
    """What Int4 and GroupedInt8 have in common. Asymmetric, q from 0 up. Every group_size inputs of an output share a
    scale and a zero point. The last group may be shorter."""

    group_size: int
    scale_dtype: torch.dtype = torch.bfloat16

    mode: ClassVar[str]
    elements_per_byte: ClassVar[int]
    zeros_per_step: ClassVar[int]  # zero points are stored in this part of a step of q

    @property
    def name(self):
        return f"{self.mode}.g{self.group_size}"

    @property
    def quantization(self):
        entry = {"mode": self.mode, "groupsize": self.group_size}
        return entry | ({"scale_dtype": "float16"} if self.scale_dtype == torch.float16 else {})

    def empty(self, shape, dtype, device):
        *outputs, k = shape
        n_groups = math.ceil(k / self.group_size)
        return {
            "weight": torch.empty((*outputs, k // self.elements_per_byte), dtype=torch.uint8, device=device),
            "scales": torch.empty((*outputs, n_groups), dtype=self.scale_dtype, device=device),
            "zeros": torch.empty((*outputs, n_groups), dtype=torch.uint8, device=device),
        }

    def quantize(self, w):
        return in_chunks(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        """quantize for w [N, K]."""
        raise NotImplementedError

    def unpack_elements(self, weight: Tensor) -> Tensor:
        """q [..., N, K] uint8 of the tensor "weight"."""
        return weight

    def dequantize(self, tensors, dtype):
        q = self.unpack_elements(tensors["weight"])
        scales, zeros = (
            t.repeat_interleave(self.group_size, -1)[..., : q.shape[-1]]
            for t in (tensors["scales"].float(), tensors["zeros"].float() / self.zeros_per_step)
        )
        return ((q - zeros) * scales).to(dtype)

    def shard_inputs(self, name, tensor, start, length):
        if name == "weight":
            return tensor[..., start // self.elements_per_byte : (start + length) // self.elements_per_byte].clone()
        if name in ("scales", "zeros"):
            return shard_groups(tensor, start, length, self.group_size, self.shard_format(length).group_size)
        return tensor

    def shard_format(self, length):
        # Small enough that no group spans two groups of W
        return replace(self, group_size=math.gcd(length, self.group_size))

    def scale_group_size(self, in_features):
        return self.group_size

    def pack(self, tensors, backend):
        """cpu: words of four bytes. The words of 16 rows lie side by side, then their next words: int32
        [N / 16, bytes of a row / 4, 16]; scales and zeros alike, [N / 16, n_groups, 16]."""
        if backend != "cpu":
            return tensors
        words = {"weight": tensors["weight"].view(torch.int32)}
        return {name: to_blocked_layout(t) for name, t in (tensors | words).items()}

    def unpack(self, tensors, backend, out_features, in_features):
        if backend != "cpu":
            return tensors
        rows = {name: from_blocked_layout(t, out_features) for name, t in tensors.items()}
        return rows | {"weight": rows["weight"].view(torch.uint8)}


class Int4(GroupedFormat):
    """q from 0 to 15, zero points in sixteenths of a step."""

    format_id = 2
    mode = "int4"
    pack_factor = input_multiple = 8
    elements_per_byte = 2
    zeros_per_step = 16

    def quantize_rows(self, w):
        groups = split_groups(w.float(), self.group_size)  # [N, n_groups, group_size]
        scales, zeros = choose_qparams(groups, self.scale_dtype)
        return self.round_groups(groups, scales, zeros, w.shape[-1])

    def round_groups(self, groups: Tensor, scales: Tensor, zeros: Tensor, k: int) -> Tensors:
        """The tensors for groups [N, n_groups, group_size], whose last one is padded beyond the k elements of a row."""
        q = round_int4(groups, scales.float()[..., None], decode_zeros(zeros)[..., None])
        return {"weight": pack_int4(q.to(torch.uint8).flatten(-2)[:, :k]), "scales": scales, "zeros": zeros}

    def unpack_elements(self, weight):
        return unpack_int4(weight)

    def fits_kernels(self, backend, in_features):
        return in_features % 8 == 0

    def pack(self, tensors, backend):
        """triton: tiles, drawn in triton_tiles.py; scales and zeros in words, column by column (triton_elements.py:
        pack_scales)."""
        if backend == "cpu":
            return super().pack(tensors, backend)
        from kernels.triton_elements import pack_scales  # here, since a CPU may lack Triton
        from kernels.triton_tiles import pack_tiles

        tiles = pack_tiles(unpack_int4(tensors["weight"]))
        return {"weight": tiles, "scales": pack_scales(tensors["scales"], tensors["zeros"]), "zeros": None}

    def unpack(self, tensors, backend, out_features, in_features):
        if backend == "cpu":
            return super().unpack(tensors, backend, out_features, in_features)
        from kernels.triton_elements import unpack_scales
        from kernels.triton_tiles import unpack_tiles

        scales, zeros = unpack_scales(tensors["scales"], self.scale_dtype)
        weight = pack_int4(unpack_tiles(tensors["weight"], out_features, in_features))
        return {"weight": weight, "scales": scales, "zeros": zeros}


class GroupedInt8(GroupedFormat):
    """q from 0 to 255, and so is the zero point."""

    format_id = 3
    mode = "int8"
    elements_per_byte = 1
    zeros_per_step = 1

    def quantize_rows(self, w):
        groups = split_groups(w.float(), self.group_size)  # [N, n_groups, group_size]
        # Not 255, so that 0..255 spans a group even if its scale is rounded down
        scales, zeros = choose_range(groups, 254, self.scale_dtype)
        zeros = zeros.round().clamp(0, 255)
        q = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 255)
        return {
            "weight": q.to(torch.uint8).flatten(-2)[:, : w.shape[-1]].contiguous(),
            "scales": scales,
            "zeros": zeros.to(torch.uint8),
        }

    def fits_kernels(self, backend, in_features):
        return in_features % 8 == 0

    def pack(self, tensors, backend):
        """triton: rows of int8, each q - 128; scales and zeros as Int4's."""
        if backend == "cpu":
            return super().pack(tensors, backend)
        from kernels.triton_elements import pack_scales

        weight = (tensors["weight"] ^ 128).view(torch.int8)  # ^ 128 on a byte subtracts 128, or adds it
        return {"weight": weight, "scales": pack_scales(tensors["scales"], tensors["zeros"]), "zeros": None}

    def unpack(self, tensors, backend, out_features, in_features):
        if backend == "cpu":
            return super().unpack(tensors, backend, out_features, in_features)
        from kernels.triton_elements import unpack_scales

        scales, zeros = unpack_scales(tensors["scales"], self.scale_dtype)
        return {"weight": tensors["weight"].view(torch.uint8) ^ 128, "scales": scales, "zeros": zeros}


@dataclass(frozen=True)
class Float8(WeightFormat):
    """8-bit floats, e4m3: 4 bits of exponent, 3 of mantissa, up to 448, no infinity. Every group_size inputs of an
    output share a scale; None: all of its inputs do."""

    group_size: int | None = None
    format_id = 4

    @property
    def name(self):
        return "fp8" if self.group_size is None else f"fp8.g{self.group_size}"

    @property
    def quantization(self):
        return {"mode": "fp8"} | ({} if self.group_size is None else {"groupsize": self.group_size})

    def empty(self, shape, dtype, device):
        *outputs, k = shape
        n_groups = math.ceil(k / self.scale_group_size(k))
        return {
            "weight": torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
            "scales": torch.empty((*outputs, n_groups), dtype=torch.float32, device=device),
        }

    def quantize(self, w):
        return in_chunks(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        k = w.shape[-1]
        groups = split_groups(w.float(), self.scale_group_size(k))
        scales = (groups.abs().amax(-1) / FLOAT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        q = (groups / scales[..., None]).flatten(-2)[:, :k]
        return {"weight": q.to(torch.float8_e4m3fn), "scales": scales}

    def dequantize(self, tensors, dtype):
        q = tensors["weight"].float()
        group_size = self.scale_group_size(q.shape[-1])
        scales = tensors["scales"].repeat_interleave(group_size, -1)[..., : q.shape[-1]]
        return (q * scales).to(dtype)

    def shard_inputs(self, name, tensor, start, length):
        if name == "scales" and self.group_size is not None:
            return shard_groups(tensor, start, length, self.group_size, self.shard_format(length).group_size)
        return super().shard_inputs(name, tensor, start, length)

    def shard_format(self, length):
        return self if self.group_size is None else Float8(math.gcd(length, self.group_size))

    def scale_group_size(self, in_features):
        return self.group_size or in_features

    def fits_kernels(self, backend, in_features):
        return in_features % 8 == 0

    def pack(self, tensors, backend):
        """cpu: words of four elements, blocked as Int8's. Of 4 rows side by side, elements 0 and 1 of each come first,
        then elements 2 and 3 of each (csrc/float8.h). Scales float32 [N / 16, n_groups, 16].
        triton: rows of words of four elements (triton_elements.py: pack_words); scales column by column."""
        if backend == "cpu":
            words = to_blocked_layout(tensors["weight"].view(torch.int32))
            return {"weight": swap_bytes(words, 4, 2), "scales": to_blocked_layout(tensors["scales"])}
        from kernels.triton_elements import by_column, pack_words

        return {"weight": pack_words(tensors["weight"]), "scales": by_column(tensors["scales"])}

    def unpack(self, tensors, backend, out_features, in_features):
        if backend == "cpu":
            words = from_blocked_layout(swap_bytes(tensors["weight"], 2, 4), out_features)
            scales = from_blocked_layout(tensors["scales"], out_features)
            return {"weight": words.view(torch.float8_e4m3fn), "scales": scales}
        from kernels.triton_elements import unpack_words

        return {"weight": unpack_words(tensors["weight"]).view(torch.float8_e4m3fn), "scales": tensors["scales"]}


@dataclass(frozen=True)
class MXFP4(WeightFormat):
    """4-bit floats, e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. 32 inputs of an output share a power of two,
    of which the scale is the exponent (OCP Microscaling Formats, version 1.0)."""

    group_size: int = 32  # smaller only in a shard that cuts through a group
    format_id = 5
    name = "mxfp4"
    quantization = {"mode": "mxfp4"}
    pack_factor = 8
    input_multiple = 32

    def empty(self, shape, dtype, device):
        *outputs, k = shape
        return {
            "weight": torch.empty((*outputs, k // 2), dtype=torch.uint8, device=device),
            "scales": torch.empty((*outputs, math.ceil(k / self.group_size)), dtype=torch.uint8, device=device),
        }

    def quantize(self, w):
        return in_chunks(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        q, scales = round_mxfp4(split_groups(w.float(), self.group_size))
        return {"weight": pack_int4(q.flatten(-2)[:, : w.shape[-1]]), "scales": scales}

    def dequantize(self, tensors, dtype):
        q = unpack_int4(tensors["weight"])
        scales = tensors["scales"].repeat_interleave(self.group_size, -1)[..., : q.shape[-1]]
        return decode_mxfp4(q, scales).to(dtype)

    def shard_inputs(self, name, tensor, start, length):
        if name == "weight":
            return tensor[..., start // 2 : (start + length) // 2].clone()
        if name == "scales":
            return shard_groups(tensor, start, length, self.group_size, self.shard_format(length).group_size)
        return tensor

    def shard_format(self, length):
        return MXFP4(math.gcd(length, self.group_size))

    def scale_group_size(self, in_features):
        return self.group_size

    def fits_kernels(self, backend, in_features):
        return in_features % 8 == 0

    def pack(self, tensors, backend):
        """cpu: words and scales, blocked as Int4's.
        triton: tiles, as Int4's; scales column by column."""
        if backend == "cpu":
            words = {"weight": tensors["weight"].view(torch.int32)}
            return {name: to_blocked_layout(t) for name, t in (tensors | words).items()}
        from kernels.triton_elements import by_column
        from kernels.triton_tiles import pack_tiles

        return {"weight": pack_tiles(unpack_int4(tensors["weight"])), "scales": by_column(tensors["scales"])}

    def unpack(self, tensors, backend, out_features, in_features):
        if backend == "cpu":
            rows = {name: from_blocked_layout(t, out_features) for name, t in tensors.items()}
            return rows | {"weight": rows["weight"].view(torch.uint8)}
        from kernels.triton_tiles import unpack_tiles

        weight = pack_int4(unpack_tiles(tensors["weight"], out_features, in_features))
        return {"weight": weight, "scales": tensors["scales"]}


@dataclass(frozen=True)
class WeightFormats:
    """The format of every linear layer of a model: most have the same, and a checkpoint may name others."""

    default: WeightFormat
    overrides: dict[str, WeightFormat] = field(default_factory=dict)  # by the layer's name

    def of_layer(self, name: str) -> WeightFormat:
        return self.overrides.get(name, self.default)


def parse_formats(quantization: dict | None) -> WeightFormats:
    """The formats that a checkpoint's "quantization" describes: of most layers, and in "layers" those of the others, by
    name. Raises UsageError."""
    overrides = quantization.get("layers", {}) if isinstance(quantization, dict) else {}
    if not isinstance(overrides, dict):
        raise UsageError(f"the checkpoint's quantized layers are {overrides!r}, which this version does not read")
    return WeightFormats(parse_format(quantization), {name: parse_format(value) for name, value in overrides.items()})


def parse_format(quantization: dict | None) -> WeightFormat:
    """The format that one entry of "quantization" describes. Raises UsageError."""
    if quantization is None:
        return Dense()
    if isinstance(quantization, dict):
        mode, group_size = quantization.get("mode"), quantization.get("groupsize")
        scale_dtype = quantization.get("scale_dtype", "bfloat16")
        if mode == "int8" and not quantization.keys() & {"groupsize", "scale_dtype"}:
            return Int8()
        if scale_dtype in SCALE_DTYPES:
            if mode == "int8" and group_size in INT8_GROUP_SIZES:
                return GroupedInt8(group_size, getattr(torch, scale_dtype))
            if mode == "int4" and group_size in GROUP_SIZES:
                return Int4(group_size, getattr(torch, scale_dtype))
        if mode == "fp8" and group_size in (None, *GROUP_SIZES):
            return Float8(group_size)
        if mode == "mxfp4" and group_size is None:
            return MXFP4()
    raise UsageError(f"the checkpoint is quantized as {quantization!r}, which this version does not read")


def in_chunks(quantize_rows: Callable[[Tensor], Tensors], w: Tensor) -> Tensors:
    """quantize_rows, which takes [rows, K], applied to w [..., N, K] a few rows at a time."""
    chunks = w.flatten(0, -2).split(max(1, QUANTIZE_CHUNK // w.shape[-1]))
    done = [quantize_rows(chunk) for chunk in chunks]
    return {name: torch.cat([tensors[name] for tensors in done]).unflatten(0, w.shape[:-1]) for name in done[0]}


def shard_groups(t: Tensor, start: int, length: int, group_size: int, shard_group_size: int) -> Tensor:
    """Scales or zeros t [..., n_groups] for W's inputs [start, start + length), which now are in groups of
    shard_group_size: for each of these, those of the group of W that it lies in."""
    first_inputs = torch.arange(start, start + length, shard_group_size, device=t.device)
    return t[..., first_inputs // group_size]


# ---- The arithmetic of groups, which quantize.py and gptq.py share --------------------------------------------------


def split_groups(w: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., n_groups, group_size]. A shorter last group is padded with its last element, which does not
    change the group's minimum and maximum."""
    missing = -w.shape[-1] % group_size
    if missing:
        w = torch.cat([w, w[..., -1:].expand(*w.shape[:-1], missing)], dim=-1)
    return w.unflatten(-1, (-1, group_size))


def choose_range(groups: Tensor, max_q: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales in scale_dtype and zero points in float32 [...], in steps of the scale, with which q = 0..max_q spans each
    group [..., group_size] and 0."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / max_q).to(scale_dtype)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, -low / scales.float()


def choose_qparams(groups: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Scales and zeros (uint8) [...] with which q = 0..15 spans each group [..., group_size] and 0."""
    scales, zero = choose_range(groups, 15, scale_dtype)
    return scales, encode_zeros(zero)


def round_int4(w: Tensor, scale: Tensor | float, zero: Tensor) -> Tensor:
    """The q in 0..15, as float32, with which (q - zero) * scale is nearest to w. The arguments are float32."""
    return (w / scale + zero).round_().clamp_(0, 15)


def encode_zeros(zero: Tensor) -> Tensor:
    """Zero points, in steps of the scale, as the checkpoint stores them: uint8, in sixteenths of a step."""
    return (zero * 16).round().clamp(0, 255).to(torch.uint8)


def decode_zeros(zeros: Tensor) -> Tensor:
    """The inverse of encode_zeros, float32."""
    return zeros.float() / 16


def pack_int4(q: Tensor) -> Tensor:
    """q [..., K] uint8 in 0..15 -> [..., K / 2], as drawn at the top of this file."""
    low, high = q.unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_int4(weight: Tensor) -> Tensor:
    """The inverse of pack_int4."""
    octets = weight.unflatten(-1, (-1, 4))  # [..., K / 8, 4]
    return torch.cat([octets & 15, octets >> 4], dim=-1).flatten(-2)


# ---- The layout of the CPU kernels ----------------------------------------------------------------------------------


def to_blocked_layout(t: Tensor) -> Tensor:
    """[..., N, X] -> [..., N / 16, X, 16], with N padded with zeros to a multiple of 16."""
    t = F.pad(t, (0, 0, 0, -t.shape[-2] % CPU_BLOCK_N))
    return t.unflatten(-2, (-1, CPU_BLOCK_N)).mT.contiguous()


def swap_bytes(words: Tensor, rows: int, columns: int) -> Tensor:
    """Words int32 [..., 16] of a blocked layout, with every 16 bytes, which are rows * columns pairs of bytes,
    transposed. Swapping rows and columns undoes it."""
    pairs = words.view(torch.int16).unflatten(-1, (-1, rows, columns))
    return pairs.mT.contiguous().flatten(-3).view(torch.int32)


def from_blocked_layout(t: Tensor, n: int) -> Tensor:
    """The inverse of to_blocked_layout, without the padding: the first n rows."""
    return t.mT.flatten(-3, -2)[..., :n, :].contiguous()

"""What the weight formats have in common: their interface, Dense, and how two elements share a byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # "weight" and, if quantized, "scales" and "zeros"
QUANTIZE_CHUNK = 2**18  # elements quantized at a time, so that their float32 copies stay in the processor's cache


class WeightFormat:
    """The interface of a format, with what most formats have in common. A class is a kind of format, an object of it a
    format with its options. What they are called, and where:

        class     format_id       2              in the kernels of C++ and Triton
                  mode            "int4"         in --mode and in model.pth; None: not quantized
        object    name            "int4.g32"     in a file's name and in the output of --json
                  quantization    {"mode": "int4", "groupsize": 32}, the entry of model.pth that parse reads
    """

    format_id: int  # its position in csrc/weights.h: Formats, and in FORMATS; model.pth has the mode instead
    mode: str | None = None
    is_cli_mode = True  # whether --mode has it. Some are no choice, or only converters make them
    group_size_options: tuple[int, ...] = ()  # what --groupsize may be; (): it has no such option
    group_size: int | None  # inputs of an output that share a scale. None: all of its inputs do, or there is none
    elements_per_byte = 1  # of "weight"
    input_multiple = 1  # the inputs of a whole W must be a multiple of it
    shard_multiple = 1  # those of a rank's shard, too, since a checkpoint's word cannot be cut

    @property
    def name(self) -> str | None:
        return self.mode if self.group_size is None else f"{self.mode}.g{self.group_size}"

    @property
    def quantization(self) -> dict | None:
        if self.mode is None:
            return None
        return {"mode": self.mode} | ({} if self.group_size is None else {"groupsize": self.group_size})

    @property
    def is_quantized(self) -> bool:
        return self.mode is not None

    @classmethod
    def from_options(cls, group_size: int) -> "WeightFormat":
        """What --mode with --groupsize makes."""
        return cls(group_size) if cls.group_size_options else cls()

    @classmethod
    def parse(cls, quantization: dict) -> "WeightFormat | None":
        """The inverse of quantization. None: it describes no format of this class. Here, for classes that have no
        options."""
        matches = quantization.get("mode") == cls.mode and quantization.get("groupsize") is None
        return cls() if matches else None

    def empty(self, shape: torch.Size, dtype: torch.dtype, device) -> Tensors:
        """Uninitialized tensors, as a checkpoint holds them, for W of this shape and dtype."""
        raise NotImplementedError

    def quantize(self, w: Tensor) -> Tensors:
        """The tensors for w [..., N, K], each element rounded to the nearest value that the format can store."""
        return in_chunks(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        """The same for some rows of one matrix, w [rows, K]."""
        raise NotImplementedError

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """W [..., N, K] in dtype, from a checkpoint's tensors."""
        raise NotImplementedError

    def fill_randomly(self, tensors: Tensors, std: float):
        """Fills a checkpoint's tensors in place, so that W has mean 0 and this standard deviation."""
        raise NotImplementedError

    def common_format(self, other: "WeightFormat") -> "WeightFormat | None":
        """The narrowest format that holds other projects' weights in both, without loss. None: there is none."""
        return self if self == other else None

    def widen(self, tensors: Tensors, wider: "WeightFormat", in_features: int) -> Tensors:
        """The tensors of wider, a format that common_format gives, with the same values. Here: of shorter groups."""
        sizes = self.inputs_per_scale(in_features), wider.inputs_per_scale(in_features)
        if sizes[0] == sizes[1]:
            return tensors
        groups = {name: shard_groups(t, 0, in_features, *sizes) for name, t in tensors.items() if name != "weight"}
        return tensors | groups

    def shard_inputs(self, name: str, tensor: Tensor, start: int, length: int) -> Tensor:
        """The part of one of the tensors that belongs to W's inputs [start, start + length)."""
        if name == "weight":
            return tensor[..., start // self.elements_per_byte : (start + length) // self.elements_per_byte].clone()
        if self.group_size is None:
            return tensor
        return shard_groups(tensor, start, length, self.group_size, self.shard_format(length).group_size)

    def shard_format(self, length: int) -> "WeightFormat":
        """The format of such a shard. Its groups are so small that none spans two groups of W."""
        return self if self.group_size is None else replace(self, group_size=math.gcd(length, self.group_size))

    def inputs_per_scale(self, in_features: int) -> int:
        """How many inputs of an output share a scale."""
        return self.group_size or in_features

    def fits_kernels(self, backend: str, in_features: int) -> bool:
        """Whether the kernels of backend ("cpu" or "triton") take a W with in_features inputs. Here, as all quantized
        formats have it: they read 8 elements at a time."""
        return in_features % 8 == 0




@dataclass(frozen=True)
class Dense(WeightFormat):
    """Not quantized: 16 or 32 bits, as PyTorch has them."""

    format_id = 0
    is_cli_mode = False
    group_size = None

    @classmethod
    def parse(cls, quantization):
        return None  # model.pth has no entry for it

    def empty(self, shape, dtype, device):
        return {"weight": torch.empty(shape, dtype=dtype, device=device)}

    def quantize(self, w):
        return {"weight": w}

    def fill_randomly(self, tensors, std):
        tensors["weight"].normal_(std=std)

    def fits_kernels(self, backend, in_features):
        return True

    def dequantize(self, tensors, dtype):
        return tensors["weight"]




@dataclass(frozen=True)
class Dequantized(Dense):
    """What a quantized weight becomes where there are no kernels for it (kernels/prepare.py: dequantize_weights)."""

    original_name: str  # of the format that the checkpoint has

    @property
    def name(self):
        return self.original_name


def in_chunks(quantize_rows: Callable[[Tensor], Tensors], w: Tensor) -> Tensors:
    """quantize_rows, which takes [rows, K], applied to w [..., N, K] a few rows at a time."""
    chunks = w.flatten(0, -2).split(max(1, QUANTIZE_CHUNK // w.shape[-1]))
    parts = [quantize_rows(chunk) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]).unflatten(0, w.shape[:-1]) for name in parts[0]}


def shard_groups(t: Tensor, start: int, length: int, group_size: int, shard_group_size: int) -> Tensor:
    """Scales or zeros t [..., n_groups] for W's inputs [start, start + length), which now are in groups of
    shard_group_size: for each of these, those of the group of W that it lies in."""
    first_inputs = torch.arange(start, start + length, shard_group_size, device=t.device)
    return t[..., first_inputs // group_size]


def repeat_groups(t: Tensor, group_size: int, k: int) -> Tensor:
    """Scales or zeros t [..., n_groups] for each of the k inputs: [..., k]."""
    return t.repeat_interleave(group_size, -1)[..., :k]


# ---- Elements of 4 bits ---------------------------------------------------------------------------------------------


def nibbles_to_bytes(q: Tensor) -> Tensor:
    """q [..., K] uint8 in 0..15 -> [..., K / 2], as drawn in __init__.py."""
    low, high = q.unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | high << 4).flatten(-2)


def bytes_to_nibbles(weight: Tensor) -> Tensor:
    """The inverse: q [..., K]."""
    return unpack_nibbles_planar(weight.unflatten(-1, (-1, 4))).flatten(-2)  # [..., K / 8, 4] -> [..., K / 8, 8]


def unpack_nibbles_planar(octets: Tensor) -> Tensor:
    """Unpacks the half-bytes of octets [..., n] to [..., 2 n]: all low halves, then all high halves."""
    return torch.cat([octets & 15, octets >> 4], dim=-1)


def unpack_nibbles_interleaved(octets: Tensor) -> Tensor:
    """Unpacks the half-bytes of octets [..., n] to [..., 2 n]: the low and the high half of every byte in turn."""
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)

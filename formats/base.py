"""WeightFormat, the interface of the weight formats; Unquantized; and how two elements of 4 bits share a byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from formats.cpu_layouts import to_blocks, words_to_blocks

Tensors = dict[str, Tensor]  # of a weight, by name: "weight" and, in some formats, "scales" and "zeros"
CHUNK_ELEMENTS = 2**18  # quantized or dequantized at a time: float32 copies of a chunk fit into the processor's cache


class WeightFormat:
    """How a weight is stored: the interface of the formats, with defaults that suit most of them.

    Int4 is a class. An object, such as Int4(group_size=32), says everything about one weight:

                           mode             name         to_dict()
        Int8()             "int8"           "int8"       {"mode": "int8"}
        Int4(32)           "int4"           "int4.g32"   {"mode": "int4", "groupsize": 32}
        GroupedInt8(32)    "int8-grouped"   "int8.g32"   {"mode": "int8-grouped", "groupsize": 32}

        mode         the class in --mode and in model.pth
        name         the object in file names, messages and --json
        to_dict()    the object in model.pth; __init__.py: format_from_dict is the inverse

    Kernels know a format by the name of its class.

    Layers and kernels rely on two limits. A byte holds a whole number of elements, so 3, 5 and 6 bits are impossible. A
    weight has no tensors but weight, scales and zeros, so there is no codebook, and there are no scales of scales.
    """

    # Class attributes, except group_size in the subclasses whose constructor takes it
    mode: str | None = None  # None: not quantized
    group_size: int | None  # inputs of an output that share a scale. None: all inputs do, or there are no scales
    # The choices of --groupsize. If there are any, model.pth names the size
    group_size_choices: tuple[int, ...] = ()
    dtypes: dict[str, torch.dtype]  # of the tensors of a checkpoint, for the default of allocate
    elements_per_byte = 1  # of "weight": an integer
    k_alignment = 1  # K must be a multiple of this number
    shard_alignment = 1  # K of a rank's shard must be a multiple of this number, because a word cannot be cut

    @property
    def is_quantized(self) -> bool:
        return self.mode is not None

    @property
    def name(self) -> str | None:
        size = (self.to_dict() or {}).get("groupsize")
        return f"{self.mode}.g{size}" if size else self.mode

    def to_dict(self) -> dict | None:
        if not self.is_quantized:
            return None
        return {"mode": self.mode} | ({"groupsize": self.group_size} if self.group_size_choices else {})

    @classmethod
    def stored_formats(cls) -> list["WeightFormat"]:
        """The formats of this class that model.pth may have."""
        return [cls(size) for size in cls.group_size_choices] or [cls()]

    @classmethod
    def from_options(cls, group_size: int) -> "WeightFormat":
        """group_size: used if the format has a choice."""
        return cls(group_size) if cls.group_size_choices else cls()

    def allocate(self, shape: torch.Size, dtype: torch.dtype, device) -> Tensors:
        """Uninitialized tensors of a checkpoint, for W [..., N, K] of this shape. dtype: of Unquantized. The default is
        for formats with groups: scales and zeros have one element for each group."""
        *outputs, k = shape
        n_groups = math.ceil(k / self.effective_group_size(k))
        sizes = {name: n_groups for name in self.dtypes} | {"weight": k // self.elements_per_byte}
        return {name: torch.empty((*outputs, sizes[name]), dtype=t, device=device) for name, t in self.dtypes.items()}

    def quantize(self, w: Tensor) -> Tensors:
        """The tensors of a checkpoint for w [..., N, K], rounded to nearest."""
        return in_chunks(self.quantize_rows, w)

    def quantize_rows(self, w: Tensor) -> Tensors:
        """Quantizes some rows of a matrix, w [rows, K]."""
        raise NotImplementedError

    def dequantize(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """W [..., N, K] in dtype, from the tensors of a checkpoint. The kernels are tested against this function."""
        raise NotImplementedError

    def promote_format(self, other: "WeightFormat") -> "WeightFormat | None":
        """Like torch.promote_types: the smallest format that holds weights of both formats without loss, or None. For
        stacked weights of other projects, such as q, k and v."""
        return self if self == other else None

    def promote_tensors(self, tensors: Tensors, promoted: "WeightFormat", in_features: int) -> Tensors:
        """Converts tensors to promoted, a format that promote_format returns, without loss. The default makes groups
        shorter."""
        sizes = self.effective_group_size(in_features), promoted.effective_group_size(in_features)
        if sizes[0] == sizes[1]:
            return tensors
        groups = {name: slice_groups(t, 0, in_features, *sizes) for name, t in tensors.items() if name != "weight"}
        return tensors | groups

    def shard_inputs(self, name: str, tensor: Tensor, start: int, length: int) -> Tensor:
        """The part of the tensor called name that belongs to inputs [start, start + length) of W. Scales without groups
        belong to all inputs. A part is a copy, because only its pages of a memory-mapped tensor should be read."""
        if name == "weight":
            return tensor[..., start // self.elements_per_byte : (start + length) // self.elements_per_byte].clone()
        if self.group_size is None:
            return tensor
        return slice_groups(tensor, start, length, self.group_size, self.shard_format(length).group_size)

    def shard_format(self, length: int) -> "WeightFormat":
        """The format of a shard of length inputs. No group of the shard spans two groups of W."""
        return self if self.group_size is None else replace(self, group_size=math.gcd(length, self.group_size))

    def effective_group_size(self, in_features: int) -> int:
        """group_size, or in_features if all inputs of an output share a scale."""
        return self.group_size or in_features

    def to_cpu_layout(self, tensors: Tensors) -> Tensors:
        """Packs a checkpoint's tensors for the C++ kernels. The default, for most formats: weight becomes words int32
        [..., N / 16, words of a row, 16], scales and zeros become [..., N / 16, n_groups, 16]."""
        words = words_to_blocks(tensors["weight"], 4 * self.elements_per_byte)
        return {"weight": words} | {name: to_blocks(t) for name, t in tensors.items() if name != "weight"}

    def to_triton_layout(self, tensors: Tensors) -> Tensors:
        """Packs a checkpoint's tensors for the Triton kernels, as KERNEL_FORMATS (kernels/triton/formats.py) says. A
        tensor that the kernels do not read becomes None."""
        raise NotImplementedError(f"the format {self.name} is in KERNEL_FORMATS, but has no method to_triton_layout")

    def kernels_can_read(self, in_features: int) -> bool:
        """Whether kernels can read a weight with in_features inputs. A backend may add conditions. The default is for
        quantized weights: kernels read 8 elements at a time."""
        return in_features % 8 == 0


@dataclass(frozen=True)
class Unquantized(WeightFormat):
    """A tensor of 16 or 32 bits."""

    group_size = None

    def allocate(self, shape, dtype, device):
        return {"weight": torch.empty(shape, dtype=dtype, device=device)}

    def quantize(self, w):
        return {"weight": w}

    def to_cpu_layout(self, tensors):
        """For bf16 on some CPUs. K must be even."""
        return {"weight": words_to_blocks(tensors["weight"], 2)}

    def to_triton_layout(self, tensors):
        return tensors

    def kernels_can_read(self, in_features):
        return True

    def dequantize(self, tensors, dtype):
        return tensors["weight"]


def in_chunks(quantize_rows: Callable[[Tensor], Tensors], w: Tensor) -> Tensors:
    """Applies quantize_rows to w [..., N, K], a few rows [rows, K] at a time."""
    chunks = w.flatten(0, -2).split(max(1, CHUNK_ELEMENTS // w.shape[-1]))
    parts = [quantize_rows(chunk) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]).unflatten(0, w.shape[:-1]) for name in parts[0]}


def slice_groups(t: Tensor, start: int, length: int, group_size: int, new_group_size: int) -> Tensor:
    """Selects scales or zeros t [..., n_groups] for inputs [start, start + length) of W, in shorter groups of
    new_group_size. A new group gets the scale or zero of the group around it."""
    first_inputs = range(start, start + length, new_group_size)
    return t[..., [i // group_size for i in first_inputs]]


def repeat_groups(t: Tensor, group_size: int, k: int) -> Tensor:
    """Repeats scales or zeros t [..., n_groups] for each of the k inputs: [..., k]."""
    return t.repeat_interleave(group_size, -1)[..., :k]


# ---- Elements of 4 bits ---------------------------------------------------------------------------------------------


def pack_nibbles(q: Tensor) -> Tensor:
    """Packs q [..., K] uint8 in 0..15 to [..., K / 2], as drawn in __init__.py."""
    low, high = q.unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_nibbles(weight: Tensor) -> Tensor:
    """Unpacks [..., K / 2], as drawn in __init__.py, to q [..., K]."""
    return unpack_nibbles_planar(weight.unflatten(-1, (-1, 4))).flatten(-2)  # [..., K / 8, 4] -> [..., K / 8, 8]


def unpack_nibbles_planar(octets: Tensor) -> Tensor:
    """Unpacks octets [..., n] to [..., 2 n]: all low nibbles, then all high nibbles."""
    return torch.cat([octets & 15, octets >> 4], dim=-1)

"""QuantizedWeight: a weight that another project has quantized, and whose values our checkpoint keeps.

    weight = QuantizedWeight(Int4(128), torch.Size([n, k]), read)    # read() returns the tensors of that format

Converters rename, split and reorder it like a tensor, without reading its data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from formats import GROUP_SIZES, Tensors, Unquantized, WeightFormat
from utils.errors import UsageError

CHANNEL_GROUP_SIZE = 128  # the group size to store if all inputs share a scale


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight [N, K], whose tensors stay on disk until read is called.

    format: Unquantized if a split has torn groups of act-order apart, so that no format can hold the weight.
    read: returns the tensors of format. Scales may have a wider dtype than format.scale_dtype.
    input_order: column i of the tensors multiplies x[..., input_order[i]], or x[..., i] if input_order is None.

    The act-order of GPTQ quantizes the inputs that matter most first, so a group has inputs from anywhere in the layer.
    With the columns in input_order, each group is contiguous."""

    format: WeightFormat
    shape: torch.Size
    read: Callable[[], Tensors]
    input_order: Tensor | None = None

    def dim(self) -> int:
        return len(self.shape)

    def select_rows(self, rows: Tensor) -> "QuantizedWeight":
        n_rows = torch.Size([len(rows), self.shape[1]])
        return replace(self, shape=n_rows, read=lambda: {name: t[rows] for name, t in self.read().items()})

    def slice_inputs(self, start: int, length: int) -> "QuantizedWeight":
        if self.input_order is not None:
            unquantized = QuantizedWeight(Unquantized(), self.shape, lambda: {"weight": self.dequantize(torch.float32)})
            return unquantized.slice_inputs(start, length)

        def read() -> Tensors:
            return {name: self.format.shard_inputs(name, t, start, length) for name, t in self.read().items()}

        return QuantizedWeight(self.format.shard_format(length), torch.Size([self.shape[0], length]), read)

    def tensor_split(self, sections: int | list[int], dim: int = 0) -> list["QuantizedWeight"]:
        parts = torch.arange(self.shape[dim]).tensor_split(sections)
        if dim == 0:
            return [self.select_rows(part) for part in parts]
        return [self.slice_inputs(int(part[0]), len(part)) for part in parts]

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        weight = self.format.dequantize(self.read(), dtype)
        if self.input_order is None:
            return weight
        in_order = torch.empty_like(weight)
        in_order[:, self.input_order] = weight
        return in_order

    def read_as(self, format: WeightFormat, dtype: torch.dtype) -> Tensors:
        """Reads the weight in a format from promote_formats, with the same values. dtype: for Unquantized."""
        if format == Unquantized():
            return {"weight": self.dequantize(dtype)}
        return self.format.promote_tensors(self.read(), format, self.shape[1])

    def is_storable(self) -> bool:
        """Whether model.pth can hold the weight in this format."""
        return self.format in self.format.stored_formats() and self.shape[1] % self.format.k_alignment == 0


def promote_formats(parts: list[Tensor | QuantizedWeight]) -> WeightFormat:
    """Returns a format that holds all parts of a stacked weight exactly, or Unquantized if there is none. Ignores
    input_order."""
    promoted = None
    for part in parts:
        if not isinstance(part, QuantizedWeight) or not part.is_storable():
            return Unquantized()
        promoted = part.format if promoted is None else promoted.promote_format(part.format)
        if promoted is None:
            return Unquantized()
    return promoted


def have_one_order(weights: list[QuantizedWeight]) -> bool:
    first, *others = (weight.input_order for weight in weights)
    if first is None:
        return all(order is None for order in others)
    return all(order is not None and torch.equal(order, first) for order in others)


def stored_group_size(group_size: int, k: int) -> int:
    """Returns the group size to store if group_size of k inputs share a scale: the largest of GROUP_SIZES that divides
    group_size, so that scales are only repeated, or group_size itself if none does."""
    if group_size >= k and group_size not in GROUP_SIZES:
        return CHANNEL_GROUP_SIZE
    fitting = [size for size in GROUP_SIZES if group_size % size == 0]
    return max(fitting, default=group_size)


# ---- Reading a layer of another project -----------------------------------------------------------------------------

SCALE_DTYPES = (torch.float8_e8m0fnu, torch.float16, torch.bfloat16, torch.float32)  # e8m0: powers of two
MAY_BE_LEFT_OVER = {"weight_shape"}  # compressed-tensors stores it for all weights, but only packed ones need it


@dataclass
class QuantizedLayer:
    """The tensors of a linear layer in a checkpoint of another project, by the last part of their names (kind), such as
    "qweight"."""

    name: str
    tensors: Tensors
    taken: set[str] = field(default_factory=set)

    def require(self, kind: str) -> Tensor:
        if kind not in self.tensors:
            raise UsageError(f"the checkpoint has no tensor {self.name}.{kind}")
        return self.tensors[kind]

    def take(self, kind: str, dtypes: tuple[torch.dtype, ...], *dims: int) -> Tensor:
        """Returns the tensor called kind. Raises UsageError if the dtype or the number of dimensions is wrong."""
        tensor = self.require(kind)
        if tensor.dtype not in dtypes or tensor.dim() not in dims or not tensor.numel():
            found = f"{list(tensor.shape)} {tensor.dtype}"
            needed = f"{' or '.join(map(str, dtypes))}, {' or '.join(f'{dim}-D' for dim in dims)}"
            raise UsageError(f"tensor {self.name}.{kind} is {found}; its format makes it {needed}")
        self.taken.add(kind)
        return tensor

    def take_scales(self, kind: str, *dims: int) -> Tensor:
        """Raises UsageError if a scale is not finite. Scales of 8 bits become float32."""
        scales = self.take(kind, SCALE_DTYPES, *dims)
        if scales.dtype == torch.float8_e8m0fnu:
            scales = scales.float()
        check_finite_scales(f"{self.name}.{kind}", scales.isfinite())
        return scales

    def take_row_scales(self, kind: str, n: int) -> Tensor:
        return self.expand_rows(kind, self.take_scales(kind, 0, 1, 2), n)

    def expand_rows(self, kind: str, tensor: Tensor, n: int) -> Tensor:
        """tensor: [N, n_groups], [N], or one number for all outputs. Returns [N, n_groups]."""
        rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, 1)
        if len(rows) not in (1, n):
            raise UsageError(f"tensor {self.name}.{kind} is {list(tensor.shape)} for {n} outputs")
        return rows.expand(n, -1)

    def check_all_taken(self):
        """Checks that every tensor was taken. One that nobody reads might change the values of the weight."""
        left_over = self.tensors.keys() - self.taken - MAY_BE_LEFT_OVER
        if left_over:
            read = ", ".join(sorted(self.taken))
            raise UsageError(f"tensor {self.name}.{min(left_over)} has no place in this format, which has {read}")

    def expect_shape(self, kind: str, *shape: int):
        found = list(self.tensors[kind].shape)
        if found != list(shape):
            raise UsageError(f"tensor {self.name}.{kind} is {found}; the layer's other tensors make it {list(shape)}")

    def expect(self, what: str, found, stated):
        """Checks that found, from the tensors, equals stated, from config.json, unless stated is None."""
        if stated is not None and found != stated:
            self.refuse(f"{what} {found}", f"{what} {stated if type(stated) is type(found) else repr(stated)}")

    def refuse(self, found: str, stated: str):
        raise UsageError(f"config.json says {stated}; the tensors of {self.name} have {found}")


def check_finite_scales(name: str, is_finite: Tensor):
    if not is_finite.all():
        raise UsageError(f"tensor {name} holds scales that are not finite")


def unpack_nibbles_interleaved(octets: Tensor) -> Tensor:
    """octets [..., n] -> [..., 2 n]: low nibble, high nibble, low nibble, ..."""
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)

"""Converts quantized tensors of a GGUF to our formats, for scripts/convert_gguf.py --keep. The stored values (q) stay
the same wherever one of our formats has room for them.

    kept = GGUFQuantizer(stacked, stored, row_order)    # chooses the formats
    write_model(path, CanonicalCheckpoint(config, tensors | kept.weights, kept.reader(read)))
    print(*kept.report(), sep="\\n")    # how each type was converted

A GGUF stores quantized values of 4, 5, 6 or 8 bits, and for every 16 or 32 inputs a scale and sometimes a minimum.
Values of 4 bits become Int4, all others GroupedInt8, with the same groups. Only scales and zeros are rounded. MXFP4
stays MXFP4. Weights that are stacked, such as q, k and v, get one format: floats, if some are floats.

The result may be SIZE_LIMIT times as large as the GGUF. If it would be larger, some weights are rounded again to
smaller formats. The weights that lose the least accuracy for each saved byte come first.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod, sqrt

import gguf
import torch
from gguf import GGMLQuantizationType as GGMLType
from torch import Tensor

from converters.canonical_checkpoint import TensorReader
from converters.gguf_blocks import BLOCK_TYPES, FLOATS, BlockType, GroupedRows, decode_mxfp4, decode_rows
from converters.gguf_file import GGUFTensor
from converters.hf_quantized_floats import E8M0_NAN
from converters.hf_tensors import reorder_heads
from converters.quantized_weight import QuantizedWeight, check_finite_scales
from converters.write_model import StackedTensor, check_finite_tensor
from formats import MXFP4, GroupedInt8, Int4, Int8, Tensors, Unquantized, WeightFormat
from formats.base import CHUNK_ELEMENTS
from formats.integers import GroupwiseAffine
from utils.errors import UsageError

SIZE_LIMIT = 1.1  # how large the result may be, as a multiple of the tensors in the GGUF
INT4, SMALLER_INT4 = Int4(32, torch.float16), Int4(128, torch.float16)
SMALLER_INT8, SMALLEST_INT8 = GroupedInt8(128, torch.float16), Int8()
# The accuracy that rounding a weight again loses, in arbitrary units. Rounding to 4 bits loses more where q has more
# bits, because llama.cpp gives more bits to more important weights. Rounding to 8 bits loses more in larger groups.
LOSS_OF_INT4 = {4: 1.0, 5: 1.0, 6: 2.0, 8: 8.0, 16: 16.0}  # by the bits of q; 16: floats
LOSS_OF_INT8 = {16: 0.003, 32: 0.005, 128: 0.01, None: 0.03}  # by the group size


# ---- Converting groups ----------------------------------------------------------------------------------------------


def keeps_q(block_type: BlockType, format: WeightFormat) -> bool:
    if not isinstance(format, GroupwiseAffine):
        return False
    return block_type.bits * format.elements_per_byte <= 8 and block_type.group_size % format.group_size == 0


def convert_groups(groups: GroupedRows, format: WeightFormat) -> tuple[Tensors, Tensor]:
    """Returns (the tensors of format, is_kept [N, n_groups]: whether a group keeps the stored q). All other groups are
    rounded again."""
    if not keeps_q(groups.block_type, format):
        return format.quantize(groups.dequantize()), torch.zeros_like(groups.scales, dtype=torch.bool)
    # A minimum makes a fractional zero, and rounding makes it an integer. If the format has more bits than q, multiply
    # both q and zeros by a factor that fills them. Then rounding a zero loses less.
    factor = 2 ** (8 // format.elements_per_byte - groups.block_type.bits) if groups.block_type.has_minimum else 1
    zeros = (groups.zeros * factor * 2**format.zero_fraction_bits).round()
    is_kept = (zeros >= 0) & (zeros <= 255)
    scales, zeros = (groups.scales / factor).to(format.scale_dtype), zeros.clamp(0, 255).to(torch.uint8)
    per_group = {"scales": scales, "zeros": zeros, "is_kept": is_kept}
    repeats = groups.block_type.group_size // format.group_size
    tensors = {"q": groups.q * factor} | {name: t.repeat_interleave(repeats, -1) for name, t in per_group.items()}
    if not is_kept.all():  # some groups have zeros beyond 0 to 255
        rounded = format.quantize(groups.dequantize())
        rounded["q"] = format.unpack_q(rounded["weight"])
        where = {"q": groups.expand(is_kept), "scales": tensors["is_kept"], "zeros": tensors["is_kept"]}
        tensors = {name: torch.where(kept, tensors[name], rounded[name]) for name, kept in where.items()}
    weight = format.pack_q(tensors["q"])
    return {"weight": weight, "scales": tensors["scales"], "zeros": tensors["zeros"]}, is_kept


# ---- Choosing formats -----------------------------------------------------------------------------------------------


@dataclass
class TargetWeight:
    """A weight of model.pth, and the tensors of the GGUF (parts) whose rows it stacks.

    formats: its possible formats, from the largest (loses nothing) to the smallest.
    gentle_format: the smallest format that neither rounds q to fewer bits nor rounds q of 4 bits again.
    n_bytes: its size in each format."""

    name: str
    stacked: StackedTensor
    parts: list[GGUFTensor]
    formats: list[WeightFormat] = field(init=False)
    gentle_format: WeightFormat = field(init=False)
    n_bytes: dict[WeightFormat, int] = field(init=False)

    def __post_init__(self):
        types = {part.ggml_type for part in self.parts}
        if types == {GGMLType.MXFP4}:
            formats = [MXFP4()]
        elif types <= {*FLOATS}:
            formats = [Unquantized()]
        elif all(t in BLOCK_TYPES and BLOCK_TYPES[t].bits == 4 for t in types):
            formats = [INT4, SMALLER_INT4]
        else:
            group_size = min(BLOCK_TYPES[t].group_size if t in BLOCK_TYPES else 32 for t in types)
            formats = [GroupedInt8(group_size, torch.float16), SMALLER_INT8, SMALLEST_INT8, INT4]
            if types & {GGMLType.MXFP4, *FLOATS}:
                formats.insert(0, Unquantized())
        tensors_of = {format: format.allocate(self.stacked.shape, self.stacked.dtype, "meta") for format in formats}
        self.n_bytes = {format: sum(t.nbytes for t in tensors.values()) for format, tensors in tensors_of.items()}
        self.formats = formats[:1]
        for format in formats[1:]:  # with few inputs, larger groups save nothing
            if self.n_bytes[format] < self.n_bytes[self.formats[-1]]:
                self.formats.append(format)
        largest = self.formats[0]
        gentle = [f for f in self.formats if type(f) is type(largest) and f != SMALLER_INT4]
        self.gentle_format = gentle[-1]

    @property
    def format(self) -> WeightFormat:
        return self.formats[0]

    def loss(self, format: WeightFormat) -> float:
        total = 0.0
        for part in self.parts:
            block_type = BLOCK_TYPES.get(part.ggml_type)  # None for floats and MXFP4
            if isinstance(format, Unquantized | MXFP4) or block_type is not None and keeps_q(block_type, format):
                continue
            bits = 16 if block_type is None else block_type.bits
            loss = LOSS_OF_INT4[bits] if isinstance(format, Int4) else LOSS_OF_INT8[format.group_size]
            total += loss * prod(part.shape())
        return total

    def cheapest_downgrade(self, n_excess: float) -> tuple[float, int]:
        """Returns (price, index into formats) of the smaller format with the lowest price. The price is the loss for
        each saved byte. At most n_excess saved bytes count, because no more are needed."""
        now, *smaller = self.formats
        prices = []
        for format in smaller:
            n_saved = min(self.n_bytes[now] - self.n_bytes[format], n_excess)
            prices.append((self.loss(format) - self.loss(now)) / n_saved)
        price = min(prices)
        return price, prices.index(price) + 1


def choose_formats(targets: list[TargetWeight], n_bytes: float):
    """Chooses the format of every target so that all of them take at most n_bytes, if that is possible."""
    n_excess = sum(target.n_bytes[target.format] for target in targets) - n_bytes
    targets = middle_layers_first(targets)  # min takes the first of several with the same price
    while n_excess > 0:
        steps = [(*target.cheapest_downgrade(n_excess), target) for target in targets if len(target.formats) > 1]
        if not steps:
            break
        _, i, target = min(steps, key=lambda step: step[0])
        n_excess -= target.n_bytes[target.format] - target.n_bytes[target.formats[i]]
        del target.formats[:i]
    if n_excess > 0:
        for target in targets:  # n_bytes is out of reach, so smaller formats would lose accuracy for nothing
            target.formats = [target.gentle_format]


def middle_layers_first(targets: list[TargetWeight]) -> list[TargetWeight]:
    """Sorts targets by the distance from the middle layer, because the first and last layers matter most."""
    layers = {target.name: int(match[1]) for target in targets if (match := re.match(r"layers\.(\d+)\.", target.name))}
    middle = max(layers.values(), default=0) / 2
    return sorted(targets, key=lambda target: abs(layers.get(target.name, 2 * middle) - middle))


# ---- All weights ----------------------------------------------------------------------------------------------------


@dataclass
class RoundingErrors:
    """Sums up how far the converted weights of one type are from the originals."""

    n_tensors: int = 0
    largest: float = 0.0  # error in groups that keep the stored q, in steps of q
    n_groups: int = 0
    n_rounded: int = 0  # groups that were rounded again
    squared_errors: float = 0.0  # sum over the weights in those groups
    squared_steps: float = 0.0  # sum of squared scales over the same weights

    def add(self, groups: GroupedRows, format: WeightFormat, tensors: Tensors, is_kept: Tensor):
        errors = (format.dequantize(tensors, torch.float32) - groups.dequantize()).abs_()
        errors = errors.unflatten(-1, (-1, groups.block_type.group_size))  # [N, n_groups, group_size]
        steps = groups.scales.abs().clamp(min=torch.finfo(torch.float32).tiny)
        self.largest = max(self.largest, (errors.amax(-1) / steps).where(is_kept, 0).max().item())
        self.n_groups += is_kept.numel()
        if not is_kept.all():
            rounded = errors[~is_kept]
            self.n_rounded += len(rounded)
            self.squared_errors += rounded.square().sum().item()
            self.squared_steps += steps[~is_kept].square().sum().item() * rounded.shape[-1]

    def __str__(self) -> str:
        rounded_by = f"by {sqrt(self.squared_errors / self.squared_steps):.2f} of a step" if self.squared_steps else ""
        if self.n_rounded == self.n_groups:
            return f"rounded again, {rounded_by} on average"
        kept = "exact" if self.largest == 0 else f"within {ceil(self.largest * 100) / 100:.2f} of a step"
        if self.n_rounded == 0:
            return kept
        return f"{kept}, but {self.n_rounded} of {self.n_groups} groups are rounded again, {rounded_by}"


class GGUFQuantizer:
    """Holds the weights of a GGUF that stay quantized, by canonical names.

    stacked: our tensors. stored: the tensors of the GGUF by canonical names. row_order: see reorder_heads."""

    def __init__(self, stacked: dict[str, StackedTensor], stored: dict[str, GGUFTensor], row_order: Tensor | None):
        targets, other_bytes = [], 0
        for name, tensor in stacked.items():
            if tensor.linear_format is None:
                other_bytes += prod(tensor.shape) * tensor.dtype.itemsize
                continue
            for part_name in tensor.part_names:
                check_type(part_name, stored[part_name].ggml_type)
            targets.append(TargetWeight(name, tensor, [stored[part_name] for part_name in tensor.part_names]))
        self.stored_bytes = sum(tensor.data.nbytes for tensor in stored.values())
        choose_formats(targets, SIZE_LIMIT * self.stored_bytes - other_bytes)
        self.n_bytes = other_bytes + sum(target.n_bytes[target.format] for target in targets)
        self.errors: dict[tuple[str, str], RoundingErrors] = defaultdict(RoundingErrors)  # by type and format
        self.became_unquantized: Counter[str] = Counter()  # tensors that are stacked with floats, by type
        self.n_rounded: Counter[tuple[str, str]] = Counter()  # floats that become quantized, by type and format
        self.weights: dict[str, QuantizedWeight] = {}
        for target in targets:
            if isinstance(target.format, Unquantized):
                types = [part.ggml_type for part in target.parts]
                self.became_unquantized.update(t.name for t in types if t not in FLOATS)
                continue
            for part_name, part in zip(target.stacked.part_names, target.parts, strict=True):
                read = partial(self.read, part_name, part, target.format, row_order)
                self.weights[part_name] = QuantizedWeight(target.format, torch.Size(part.shape()), read)

    def reader(self, read: TensorReader) -> TensorReader:
        return lambda name: self.weights[name] if name in self.weights else read(name)

    def read(self, name: str, stored: GGUFTensor, format: WeightFormat, row_order: Tensor | None) -> Tensors:
        if stored.ggml_type not in BLOCK_TYPES and format != MXFP4():
            self.n_rounded[stored.ggml_type.name, format.name] += 1
            weight = torch.from_numpy(gguf.dequantize(stored.data, stored.ggml_type))
            check_finite_tensor(name, weight)
            tensors = format.quantize(weight)
            check_scales_fit(name, tensors)
            return {kind: reorder_heads(name, t, row_order) for kind, t in tensors.items()}
        errors = self.errors[stored.ggml_type.name, format.name]
        errors.n_tensors += 1
        if stored.ggml_type == GGMLType.MXFP4:
            whole = decode_mxfp4(torch.tensor(stored.data))
            check_finite_scales(name, whole["scales"] != E8M0_NAN)
            errors.n_groups += whole["scales"].numel()  # all groups are exact
            return {kind: reorder_heads(name, t, row_order) for kind, t in whole.items()}
        n_rows = max(1, CHUNK_ELEMENTS // stored.shape()[1])
        parts = []
        for start in range(0, len(stored.data), n_rows):
            groups = decode_rows(torch.tensor(stored.data[start : start + n_rows]), stored.ggml_type)
            check_finite_scales(name, groups.scales.isfinite() & groups.zeros.isfinite())
            tensors, is_kept = convert_groups(groups, format)
            check_scales_fit(name, tensors)
            errors.add(groups, format, tensors, is_kept)
            parts.append(tensors)
        whole = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
        return {kind: reorder_heads(name, t, row_order) for kind, t in whole.items()}

    def report(self) -> list[str]:
        """Returns lines that say how each type was converted and how large the result is. Call it after all weights
        have been read."""
        lines = []
        for (type_name, format_name), errors in sorted(self.errors.items()):
            lines.append(f"{type_name}: {errors.n_tensors} tensors to {format_name}, {errors}")
        for (type_name, format_name), n in sorted(self.n_rounded.items()):
            lines.append(f"{type_name}: {n} tensors to {format_name}, rounded")
        for type_name, n in self.became_unquantized.items():
            lines.append(f"{type_name}: {n} tensors to floats, as what they are stacked with")
        ratio = self.n_bytes / self.stored_bytes
        lines.append(f"{self.n_bytes / 1e6:.1f} MB, {ratio:.2f} times the GGUF's")
        if ratio > SIZE_LIMIT:
            lines[-1] += f": smaller formats would not make it {SIZE_LIMIT} times either"
        elif self.n_rounded or any(errors.n_rounded == errors.n_groups for errors in self.errors.values()):
            lines[-1] += f": what is rounded again would make it larger than {SIZE_LIMIT} times"
        return lines


def check_scales_fit(name: str, tensors: Tensors):
    if not tensors["scales"].isfinite().all():
        raise UsageError(f"tensor {name} holds scales that are too large for float16; leave --keep out")


def check_type(name: str, ggml_type: GGMLType):
    known = (*BLOCK_TYPES, GGMLType.MXFP4)
    if ggml_type not in (*known, *FLOATS):
        kept = ", ".join(kept.name for kept in known)
        raise UsageError(f"{name} is {ggml_type.name}, and --keep takes {kept}; leave it out")

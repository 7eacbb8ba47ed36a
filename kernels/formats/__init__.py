"""How weights are stored: Dense (16 or 32 bits), Int8, Int4, GroupedInt8, Float8, MXFP4. A format is a class here, a
struct in csrc/weights.h and two functions in triton/formats.py. Integers are in integers.py, floats in floats.py, what
they have in common in base.py. Kernels read weights in orders of their own: cpu_layouts.py, triton_layouts.py.

For a weight W [..., N, K] (N outputs, K inputs, experts in front) a format knows: its names; which tensors a checkpoint
holds; how to make them (quantize); what they mean (dequantize, which is the reference for the kernels); which part of
them a tensor-parallel rank keeps (shard_inputs).

    Dense          weight [N, K]
    Int8           weight [N, K] int8, scales [N] float32                      w = q * scale
    Int4           weight [N, K / 2] uint8,                                    w = (q - zero / 16) * scale
                   scales [N, n_groups], zeros [N, n_groups] uint8
    GroupedInt8    weight [N, K] uint8, scales and zeros as Int4               w = (q - zero) * scale
    Float8         weight [N, K] float8_e4m3fn, scales [N, n_groups] float32   w = q * scale
    MXFP4          weight [N, K / 2] uint8, scales [N, K / 32] uint8           w = e2m1(q) * 2^(scale - 127)

In model.pth Int8 and GroupedInt8 have the same mode, "int8". An entry with a "groupsize" means GroupedInt8.

In Int4 and GroupedInt8 group_size inputs of an output share a scale and a zero point. The scales are bfloat16, or
float16 where another project's checkpoint has those, since bfloat16 has fewer bits.

Int4 and MXFP4 store 8 elements in 4 bytes. Byte j holds element j in its low half and element j + 4 in its high half:

             byte        0        1        2        3
             low half    q0       q1       q2       q3
             high half   q4       q5       q6       q7
"""

from dataclasses import dataclass, field

from errors import UsageError
from kernels.formats.base import Dense, Dequantized, Tensors, WeightFormat
from kernels.formats.floats import MXFP4, Float8
from kernels.formats.integers import GROUP_SIZES, GroupedInt8, Int4, Int8

__all__ = [
    "Dense", "Dequantized", "Int8", "Int4", "GroupedInt8", "Float8", "MXFP4", "WeightFormat", "QuantizationScheme",
    "Tensors", "FORMATS", "MODES", "GROUP_SIZES", "parse_formats", "parse_format",
]  # fmt: skip

FORMATS: tuple[type[WeightFormat], ...] = (Dense, Int8, Int4, GroupedInt8, Float8, MXFP4)
MODES = {format_class.mode: format_class for format_class in FORMATS if format_class.is_cli_mode}  # by --mode


@dataclass(frozen=True)
class QuantizationScheme:
    """Which format every linear layer of a model has: a default, and the layers for which a checkpoint names another
    format."""

    default: WeightFormat
    overrides: dict[str, WeightFormat] = field(default_factory=dict)  # by the layer's name
    act_order_layers: tuple[str, ...] = ()  # those with a tensor input_order

    def of_layer(self, name: str) -> WeightFormat:
        return self.overrides.get(name, self.default)


def parse_formats(quantization: dict | None) -> QuantizationScheme:
    """The formats that a checkpoint's "quantization" describes: of most layers, and in "layers" those of the others, by
    name; "act_order" lists layers. Raises UsageError."""
    fields = quantization if isinstance(quantization, dict) else {}
    overrides, act_order = fields.get("layers", {}), fields.get("act_order", [])
    if not isinstance(overrides, dict):
        raise UsageError(f"the checkpoint's quantized layers are {overrides!r}, which this version does not read")
    if not isinstance(act_order, list) or not all(isinstance(name, str) for name in act_order):
        raise UsageError(f"the checkpoint's act_order is {act_order!r}, not a list of layers; convert it again")
    formats = {name: parse_format(value) for name, value in overrides.items()}
    return QuantizationScheme(parse_format(quantization), formats, tuple(act_order))


def parse_format(quantization: dict | None) -> WeightFormat:
    """The format that one entry of "quantization" describes. Raises UsageError."""
    if quantization is None:
        return Dense()
    if isinstance(quantization, dict):
        for format_class in FORMATS:
            format = format_class.parse(quantization)
            if format is not None:
                return format
    raise UsageError(f"the checkpoint is quantized as {quantization!r}, which this version does not read")

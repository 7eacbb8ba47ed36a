"""Weight formats: how a weight W [N, K] of N outputs and K inputs is stored. The one table of all formats:

    class         --mode   tensors of a checkpoint                              meaning
    Unquantized            weight [N, K], 16 or 32 bits
    Int8          int8     weight [N, K] int8, scales [N] float32               w = q * scale
    Int4          int4     weight [N, K / 2] uint8,                             w = (q - zero / 16) * scale
                           scales [N, n_groups], zeros [N, n_groups] uint8
    GroupedInt8            weight [N, K] uint8, scales and zeros as Int4        w = (q - zero) * scale
    Float8        fp8      weight [N, K] float8_e4m3fn,                         w = q * scale
                           scales [N, n_groups] float32
    MXFP4         mxfp4    weight [N, K / 2] uint8, scales [N, K / 32] uint8    w = e2m1(q) * 2^(scale - 127)

q is an element of weight. Experts have one more dimension in front: [E, N, K]. group_size inputs of an output are a
group; n_groups is K / group_size, rounded up. The scales of Int4 and GroupedInt8 are bfloat16, or float16 if those of
another project's checkpoint are: bfloat16 has too few bits for these.

Only converters make GroupedInt8: from other projects' grouped weights with more bits or other group sizes than Int4.

Int4 and MXFP4 store 8 elements in 4 bytes. Byte j holds element j in the low half and element j + 4 in the high half:

             byte        0        1        2        3
             low half    q0       q1       q2       q3
             high half   q4       q5       q6       q7

The files. Each imports only from the files above it; base.py is the one to read first.

    cpu_layouts.py      the layout for the C++ kernels (kernels/csrc/weights.h has a struct for each format)
    triton_layouts.py   the layouts for the Triton kernels (kernels/triton/formats.py: two functions for each)
    base.py             WeightFormat, the interface; Unquantized; packing of 4-bit elements
    integers.py         Int8, Int4, GroupedInt8
    floats.py           Float8, MXFP4
"""

from dataclasses import dataclass, field

from formats.base import Tensors, Unquantized, WeightFormat
from formats.floats import MXFP4, Float8
from formats.integers import GROUP_SIZES, GroupedInt8, Int4, Int8
from utils.errors import UsageError

__all__ = [
    "Unquantized", "Int8", "Int4", "GroupedInt8", "Float8", "MXFP4", "WeightFormat", "QuantizationConfig", "Tensors",
    "FORMATS", "FORMAT_BY_MODE", "GROUP_SIZES", "format_from_dict",
]

FORMATS: tuple[type[WeightFormat], ...] = (Unquantized, Int8, Int4, GroupedInt8, Float8, MXFP4)
FORMAT_BY_MODE = {  # by --mode
    format_class.mode: format_class for format_class in FORMATS if format_class not in (Unquantized, GroupedInt8)
}


@dataclass(frozen=True)
class QuantizationConfig:
    """The format of every linear layer of a model: a default, and the layers with another format."""

    default: WeightFormat
    overrides: dict[str, WeightFormat] = field(default_factory=dict)  # by the layer's name
    act_order_layers: tuple[str, ...] = ()  # the layers with a tensor input_order

    @classmethod
    def from_dict(cls, quantization: dict | None) -> "QuantizationConfig":
        """quantization: that of a checkpoint, the to_dict of the default format with two more keys. "layers" has the
        to_dict of each layer with another format. "act_order" lists the layers with a tensor input_order. Raises
        UsageError."""
        default, overrides, act_order = quantization, {}, []
        if isinstance(quantization, dict):
            default = dict(quantization)
            overrides, act_order = default.pop("layers", {}), default.pop("act_order", [])
        if not isinstance(overrides, dict):
            raise UsageError(f"the checkpoint's quantized layers are {overrides!r}, which this version does not read")
        if not isinstance(act_order, list) or not all(isinstance(name, str) for name in act_order):
            raise UsageError(f"the checkpoint's act_order is {act_order!r}, not a list of layers; convert it again")
        formats = {name: format_from_dict(value) for name, value in overrides.items()}
        return cls(format_from_dict(default), formats, tuple(act_order))

    def of_layer(self, name: str) -> WeightFormat:
        return self.overrides.get(name, self.default)


def format_from_dict(quantization: dict | None) -> WeightFormat:
    """The inverse of to_dict for any class. Raises UsageError."""
    for format_class in FORMATS:
        for format in format_class.stored_formats():
            if format.to_dict() == quantization:
                return format
    raise UsageError(f"the checkpoint is quantized as {quantization!r}, which this version does not read")

"""Reads weights of 4 and 8 bits from GPTQ, AWQ and compressed-tensors into QuantizedWeight, without rounding.
hf_quantized.py calls gptq_weight, awq_weight, packed_weight and int8_weight.

In every format w = (q - zero) * scale, with a scale and a zero point for each output and group of inputs. Only the
layout of the tensors differs. A word is an int32. It holds 8 values of 4 bits or 4 values of 8 bits, the lowest bits
first. With 4 bits:

                          q                         scales         zero points
    GPTQ                  qweight [K / 8, N]        [n_groups, N]  qzeros [n_groups, N / 8]
    AWQ                   qweight [K, N / 8]        [n_groups, N]  qzeros [n_groups, N / 8]
    compressed-tensors:
      pack-quantized      weight_packed [N, K / 8]  [N, n_groups]  weight_zero_point [N / 8, n_groups], or 8
      int-quantized       weight [N, K] int8        [N, n_groups]  weight_zero_point [N, n_groups] int8, or 0
                          (int8 even if values have 4 bits)

Version 1 of GPTQ stores zero - 1 in qzeros. A word of AWQ holds 8 outputs in the order 0 2 4 6 1 3 5 7.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from converters.quantized_weight import QuantizedLayer, QuantizedWeight, stored_group_size, unpack_nibbles_interleaved
from formats import GroupedInt8, Int4, Int8, Tensors
from formats.base import slice_groups
from formats.integers import GroupwiseAffine
from utils.errors import UsageError

GPTQ_VERSIONS = ("gptq", "gptq_v2")  # as checkpoint_format in config.json calls them
SAMPLED_OUTPUTS, MIN_SAMPLED_WEIGHTS = 256, 2048  # for infer_version
AWQ_UNPACK_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the places of outputs 0 to 7 in a word


@dataclass
class UnpackedWeight:
    """A weight [N, K] in any of the formats above, unpacked: w = (q - zero) * scale, with q and zero unsigned."""

    shape: torch.Size
    bits: int
    group_size: int
    scales: Tensor  # [N, n_groups]
    read_q: Callable[[], Tensor]  # returns [N, K] uint8
    read_zeros: Callable[[], Tensor]  # returns [N, n_groups] uint8
    input_order: Tensor | None = None  # the order of inputs that makes groups contiguous; None if they already are

    @property
    def middle(self) -> int:
        """The zero point of symmetric weights."""
        return 1 << (self.bits - 1)

    @property
    def is_symmetric(self) -> bool:
        return bool((self.read_zeros() == self.middle).all())

    def to_weight(self, may_be_int8: bool = True) -> QuantizedWeight:
        """Returns the weight in one of our formats, with the same values. may_be_int8: False if config.json says
        asymmetric. Then layers that are stacked with this one may have zero points, and Int8 cannot store them."""
        if may_be_int8 and self.bits == 8 and self.scales.shape[1] == 1 and self.is_symmetric:
            return QuantizedWeight(Int8(), self.shape, self.read_int8)
        group_size = stored_group_size(self.group_size, self.shape[1])
        # Int4 lacks some group sizes, such as 16. Values of 4 bits in such groups are stored in 8 bits.
        format_class = Int4 if self.bits == 4 and group_size in Int4.group_size_choices else GroupedInt8
        format = format_class(group_size, stored_dtype(self.scales))
        return QuantizedWeight(format, self.shape, lambda: self.read_groups(format), self.input_order)

    def read_int8(self) -> Tensors:
        signed = (self.read_q() ^ self.middle).view(torch.int8)
        return {"weight": signed, "scales": self.scales[:, 0].float()}

    def read_groups(self, format: GroupwiseAffine) -> Tensors:
        q, k = self.read_q(), self.shape[1]
        if self.input_order is not None:
            q = q[:, self.input_order]
        # Scales keep their dtype here, so that a weight that becomes unquantized is rounded just once
        tensors = {"scales": self.scales, "zeros": self.read_zeros() << format.zero_fraction_bits}
        sizes = min(self.group_size, k), format.group_size
        groups = {name: slice_groups(t, 0, k, *sizes).contiguous() for name, t in tensors.items()}
        return {"weight": format.pack_q(q)} | groups


def stored_dtype(scales: Tensor) -> torch.dtype:
    """Returns the dtype in which our format stores scales:

        scales                                           dtype
        of 16 bits                                       unchanged
        float32, exact in bfloat16 or float16            bfloat16 or float16
        float32, within the normal range of float16      float16: a scale changes by at most 2^-11 of itself
        other float32                                    float32: no format here can hold it"""
    if scales.dtype != torch.float32:
        return scales.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return dtype
    float16, magnitudes = torch.finfo(torch.float16), scales.abs()
    is_normal = (magnitudes == 0) | (magnitudes >= float16.tiny) & (magnitudes <= float16.max)
    return torch.float16 if is_normal.all() else torch.float32


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], the lowest bits first"""
    # flatten, because rows of a single word may have strides that view(dtype) refuses
    by_byte = words.contiguous().flatten().view(torch.uint8).unflatten(0, (*words.shape[:-1], -1))
    return by_byte if bits == 8 else unpack_nibbles_interleaved(by_byte)


def infer_bits(layer: QuantizedLayer, n_words: int, n_values: int) -> int:
    """Returns how many bits a value has, 4 or 8, if n_words hold n_values."""
    for bits in (4, 8):
        if math.ceil(n_values * bits / 32) == n_words:
            return bits
    raise UsageError(f"the weight of {layer.name} has {32 * n_words / n_values:g} bits; 4 and 8 are supported")


def to_integer(field: str, value) -> int | None:
    """Returns the value of a field of quantization_config. Some programs write integers as strings."""
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    if not isinstance(value, int | None) or isinstance(value, bool):
        raise UsageError(f"config.json: quantization_config's {field} must be an integer, not {value!r}")
    return value


def check_group_size(layer: QuantizedLayer, stated: int | None, k: int, n_groups: int) -> int:
    """Returns the group size that config.json states, after a check that it fits n_groups. -1 and None mean one group
    of all k inputs."""
    stated = to_integer("group_size", stated)
    group_size = k if stated in (None, -1) else stated
    if group_size < 1 or math.ceil(k / group_size) != n_groups:
        layer.refuse(f"{n_groups} scales for {k} inputs", f"group_size {stated}")
    return group_size


def read_input_order(
    layer: QuantizedLayer, kind: str, k: int, group_size: int, n_groups: int, is_required: bool
) -> Tensor | None:
    """Returns the order of the inputs in which every group is contiguous, or None if the groups are contiguous already.

    kind: the tensor that holds the group of each input (g_idx). is_required: whether config.json says act-order. Then
    this tensor must exist."""
    if kind not in layer.tensors:
        if is_required and n_groups > 1:
            raise UsageError(f"tensor {layer.name}.{kind} is missing, although config.json says act-order (desc_act)")
        return None
    g_idx = layer.take(kind, (torch.int32, torch.int64), 1)
    layer.expect_shape(kind, k)
    if kind == "weight_g_idx" and (g_idx == -1).all():  # means no order in compressed-tensors
        return None
    unknown = g_idx[(g_idx < 0) | (g_idx >= n_groups)]
    if len(unknown):
        raise UsageError(f"tensor {layer.name}.{kind} names group {int(unknown[0])}; there are {n_groups}")
    groups = torch.arange(k) // group_size
    if torch.equal(g_idx.long(), groups):
        return None
    input_order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[input_order].long(), groups):
        raise UsageError(f"tensor {layer.name}.{kind} does not make groups of {group_size} inputs")
    return input_order


# ---- GPTQ and AWQ ---------------------------------------------------------------------------------------------------


def gptq_weight(layer: QuantizedLayer, quantization: dict) -> QuantizedWeight:
    quantization = quantization | find_dynamic(layer, quantization.get("dynamic") or {})
    qweight, qzeros, scales = take_qweight(layer)
    n_groups, n = scales.shape
    bits = infer_bits(layer, qzeros.shape[1], n)
    k = qweight.shape[0] * 32 // bits
    layer.expect_shape("qweight", qweight.shape[0], n)
    layer.expect_shape("qzeros", n_groups, qzeros.shape[1])
    layer.expect("bits", bits, to_integer("bits", quantization.get("bits")))
    group_size = check_group_size(layer, quantization.get("group_size"), k, n_groups)
    version = find_version(layer, qweight, qzeros, bits, n, quantization)

    def read_zeros() -> Tensor:
        return unpack_zeros(qzeros, bits, version).T[:n]

    has_order = bool(quantization.get("desc_act"))
    input_order = read_input_order(layer, "g_idx", k, group_size, n_groups, is_required=has_order)
    shape = torch.Size([n, k])
    weight = UnpackedWeight(
        shape, bits, group_size, scales.T, lambda: unpack_words(qweight.T, bits), read_zeros, input_order
    )
    if quantization.get("sym") is True and not weight.is_symmetric:
        layer.refuse(f"zero points other than {weight.middle}", "sym true")
    return weight.to_weight(may_be_int8=quantization.get("sym") is not False)


def find_dynamic(layer: QuantizedLayer, dynamic: dict) -> dict:
    """Returns the fields that "dynamic" overrides for a layer. Its keys are regular expressions, after "+:" or nothing,
    or after "-:" for layers that are not quantized. The first match counts."""
    for pattern, fields in dynamic.items():
        sign, expression = (pattern[:2], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("+:", pattern)
        if re.match(expression, layer.name):
            if sign == "-:" or fields is False:
                layer.refuse("a quantized weight", f"that {pattern!r} (dynamic) is not quantized")
            return fields
    return {}


def unpack_zeros(qzeros: Tensor, bits: int, version: str) -> Tensor:
    """Returns zero points [n_groups, N] uint8. Version 1 stores zero - 1."""
    if version == "gptq":
        # Adds 1 to every value in a word, with carries, as GPTQ subtracted it, with borrows
        qzeros = qzeros + (0x11111111 if bits == 4 else 0x01010101)
    return unpack_words(qzeros, bits)


def find_version(layer: QuantizedLayer, qweight: Tensor, qzeros: Tensor, bits: int, n: int, quantization: dict) -> str:
    """Returns the version of a layer's zero points: "gptq" (version 1) or "gptq_v2". The values decide if they can,
    otherwise config.json. The default is version 1.

        all zero points                 version
        the middle                      gptq_v2, as the weights are symmetric
        the middle minus one            gptq, as the weights are symmetric
        other, 4 bits                   the one in which the mean of q - zero is about 0; see infer_version"""
    stated = stated_version(quantization)
    stored, middle = unpack_zeros(qzeros, bits, "gptq_v2")[:, :n], 1 << (bits - 1)
    if (stored == middle).all():
        return "gptq_v2"
    if (stored == middle - 1).all():
        return "gptq"
    inferred = infer_version(qweight, qzeros, n) if bits == 4 else None
    if inferred is not None and stated is not None and inferred != stated:
        layer.refuse(f"zero points of {inferred}", f"checkpoint_format {stated}")
    return inferred or stated or "gptq"


def stated_version(quantization: dict) -> str | None:
    """Returns the version in config.json. GPTQModel writes checkpoint_format, some other programs write format."""
    return quantization.get("checkpoint_format") or quantization.get("format")


def infer_version(qweight: Tensor, qzeros: Tensor, n: int) -> str | None:
    """Returns the version in which the mean of the weights is about 0, or None if that is not clear.

    The zero points of the two versions differ by one step of the 4 bits. The mean of a layer's weights is far below a
    step. So the mean of q - zero is about 0 in the right version, and about 1 or -1 in the other version. A sample of
    outputs is enough. Weights with a different mean, such as all positive weights, do not reveal the version."""
    outputs = slice(0, min(n, SAMPLED_OUTPUTS))
    q = unpack_words(qweight[:, outputs].T, 4)  # [outputs, K]
    if q.numel() < MIN_SAMPLED_WEIGHTS:
        return None
    zeros = {version: unpack_zeros(qzeros, 4, version)[:, outputs] for version in GPTQ_VERSIONS}
    means = {version: abs(q.float().mean() - zeros[version].float().mean()).item() for version in GPTQ_VERSIONS}
    best, other = sorted(GPTQ_VERSIONS, key=means.__getitem__)
    return best if means[best] < 0.25 and means[other] > 0.75 else None


def awq_weight(layer: QuantizedLayer, quantization: dict) -> QuantizedWeight:
    qweight, qzeros, scales = take_qweight(layer)
    (k, n_words), (n_groups, n) = qweight.shape, scales.shape
    bits = infer_bits(layer, n_words, n)
    layer.expect("bits", bits, to_integer("bits", quantization.get("bits", quantization.get("w_bit"))))
    if bits != 4:
        raise UsageError(f"{layer.name} is AWQ of {bits} bits; 4 are supported")
    layer.expect_shape("qzeros", n_groups, n_words)
    stated = quantization.get("group_size", quantization.get("q_group_size"))
    group_size = check_group_size(layer, stated, k, n_groups)

    def unpack_awq(words: Tensor) -> Tensor:
        return unpack_words(words, 4).unflatten(-1, (-1, 8))[..., AWQ_UNPACK_ORDER].flatten(-2).T

    shape = torch.Size([n, k])
    weight = UnpackedWeight(shape, 4, group_size, scales.T, lambda: unpack_awq(qweight), lambda: unpack_awq(qzeros))
    return weight.to_weight()  # for AWQ, GPTQModel writes both sym and zero_point true, so sym means nothing


def take_qweight(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    qweight, qzeros = layer.take("qweight", (torch.int32,), 2), layer.take("qzeros", (torch.int32,), 2)
    return qweight, qzeros, layer.take_scales("scales", 2)


# ---- compressed-tensors ---------------------------------------------------------------------------------------------


def packed_weight(layer: QuantizedLayer, stated: dict) -> QuantizedWeight:
    """Reads pack-quantized. stated: the scheme for the weight in config.json."""
    packed = layer.take("weight_packed", (torch.int32,), 2)
    shape = layer.take("weight_shape", (torch.int32, torch.int64), 1).tolist()
    if len(shape) != 2 or min(shape) < 1 or shape[0] != len(packed):
        raise UsageError(f"tensor {layer.name}.weight_shape is {shape}, but weight_packed {list(packed.shape)}")
    n, k = shape
    bits = infer_bits(layer, packed.shape[1], k)
    return compressed_weight(layer, stated, bits, torch.Size([n, k]), lambda: unpack_words(packed, bits)[:, :k])


def int8_weight(layer: QuantizedLayer, stated: dict) -> QuantizedWeight:
    """Reads int-quantized. stated: the scheme for the weight in config.json."""
    weight = layer.take("weight", (torch.int8,), 2)
    bits = 4 if to_integer("num_bits", stated.get("num_bits")) == 4 else 8
    read_q = partial(signed_to_unsigned, layer, "weight", weight, bits)
    return compressed_weight(layer, stated, bits, weight.shape, read_q)


def compressed_weight(
    layer: QuantizedLayer, stated: dict, bits: int, shape: torch.Size, read_q: Callable[[], Tensor]
) -> QuantizedWeight:
    n, k = shape
    layer.expect("num_bits", bits, to_integer("num_bits", stated.get("num_bits")))
    scales = layer.take_row_scales("weight_scale", n)
    n_groups = scales.shape[1]
    has_groups = stated.get("strategy") in ("group", None)
    group_size = check_group_size(layer, stated.get("group_size") if has_groups else None, k, n_groups)
    # Early versions of compressed-tensors left out zero points that are all 0. A single zero point may well be 0. So
    # only weights with several scales must have zero points
    if stated.get("symmetric") is False and layer.tensors["weight_scale"].numel() > 1:
        layer.require("weight_zero_point")
    read_zeros = take_zeros(layer, bits, n, n_groups)
    has_order = stated.get("actorder") in ("group", "dynamic", True)  # three names for the same
    input_order = read_input_order(layer, "weight_g_idx", k, group_size, n_groups, is_required=has_order)
    weight = UnpackedWeight(shape, bits, group_size, scales, read_q, read_zeros, input_order)
    if stated.get("symmetric") is True and not weight.is_symmetric:
        layer.refuse(f"zero points other than {weight.middle}", "symmetric true")
    return weight.to_weight(may_be_int8=stated.get("symmetric") is not False)


def take_zeros(layer: QuantizedLayer, bits: int, n: int, n_groups: int) -> Callable[[], Tensor]:
    """Takes the zero points of compressed-tensors, if there are any. Returns a function that reads them: [N, n_groups]
    uint8."""
    kind = "weight_zero_point"
    if kind not in layer.tensors:
        return lambda: torch.full((n, n_groups), 1 << (bits - 1), dtype=torch.uint8)
    zeros = layer.take(kind, (torch.int32, torch.int8), 0, 1, 2)
    if zeros.dtype == torch.int8:
        zeros = layer.expand_rows(kind, zeros, n)
        if zeros.shape[1] != n_groups:
            layer.expect_shape(kind, n, n_groups)
        return partial(signed_to_unsigned, layer, kind, zeros, bits)
    layer.expect_shape(kind, math.ceil(n * bits / 32), n_groups)
    return lambda: unpack_words(zeros.T, bits)[:, :n].T


def signed_to_unsigned(layer: QuantizedLayer, kind: str, numbers: Tensor, bits: int) -> Tensor:
    """Returns numbers of this many bits, from the int8 tensor called kind, as uint8 with the middle as zero."""
    middle = 1 << (bits - 1)
    if bits == 4 and ((numbers < -middle) | (numbers >= middle)).any():
        layer.refuse(f"numbers beyond {-middle} to {middle - 1} in {kind}", f"num_bits {bits}")
    return numbers.view(torch.uint8) + middle

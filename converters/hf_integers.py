"""Reads weights of 4 and 8 bits from GPTQ, AWQ and compressed-tensors into LazyWeight, without rounding.
hf_quantized.py calls gptq_weight, awq_weight, packed_weight and int8_weight.

In every format w = (q - zero) * scale, with a scale and a zero point for every output and group of inputs. The formats
differ in the layout of the tensors. A word is an int32 and holds 8 numbers of 4 bits or 4 numbers of 8 bits, the lowest
bits first. With 4 bits:

                          q                         scales         zero points
    GPTQ                  qweight [K / 8, N]        [n_groups, N]  qzeros [n_groups, N / 8]
    AWQ                   qweight [K, N / 8]        [n_groups, N]  qzeros [n_groups, N / 8]
    compressed-tensors:
      pack-quantized      weight_packed [N, K / 8]  [N, n_groups]  weight_zero_point [N / 8, n_groups], or 8
      int-quantized       weight [N, K] int8        [N, n_groups]  weight_zero_point [N, n_groups] int8, or 0

Version 1 of GPTQ's format stores zero - 1 in qzeros. A word of AWQ holds 8 outputs in the order 0 2 4 6 1 3 5 7.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.quantized_weight import LazyWeight, SourceLayer, stored_group_size
from kernels.formats import GroupedInt8, Int4, Int8, Tensors
from kernels.formats.base import shard_groups, unpack_nibbles_interleaved
from kernels.formats.integers import GroupedFormat
from utils.errors import UsageError

AWQ_UNPACK_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the places of outputs 0 to 7 in a word


@dataclass
class UnpackedWeight:
    """A weight [N, K] in any of the formats above: w = (q - zero) * scale, with q and zero unsigned."""

    shape: torch.Size
    bits: int
    group_size: int
    scales: Tensor  # [N, n_groups]
    read_q: Callable[[], Tensor]  # returns [N, K] uint8
    read_zeros: Callable[[], Tensor]  # returns [N, n_groups] uint8
    input_order: Tensor | None = None  # order of inputs in which groups are contiguous; None: groups are so already

    @property
    def middle(self) -> int:
        """The zero point of symmetric weights."""
        return 1 << (self.bits - 1)

    def to_weight(self) -> LazyWeight:
        """Returns the weight in one of our formats, with the same values."""
        if self.bits == 8 and self.scales.shape[1] == 1 and bool((self.read_zeros() == self.middle).all()):
            return LazyWeight(Int8(), self.shape, self.read_int8)
        group_size = stored_group_size(self.group_size, self.shape[1])
        # Int4 lacks some group sizes, such as 16. Codes of 4 bits in such groups are stored in 8 bits.
        format_class = Int4 if self.bits == 4 and group_size in Int4.group_sizes else GroupedInt8
        format = format_class(group_size, stored_dtype(self.scales))
        return LazyWeight(format, self.shape, lambda: self.read_groups(format), self.input_order)

    def read_int8(self) -> Tensors:
        signed = (self.read_q() ^ self.middle).view(torch.int8)
        return {"weight": signed, "scales": self.scales[:, 0].float()}

    def read_groups(self, format: GroupedFormat) -> Tensors:
        q, k = self.read_q(), self.shape[1]
        if self.input_order is not None:
            q = q[:, self.input_order]
        tensors = {"scales": self.scales.to(format.scale_dtype), "zeros": self.read_zeros() * format.zeros_denominator}
        sizes = min(self.group_size, k), format.group_size
        groups = {name: shard_groups(t, 0, k, *sizes).contiguous() for name, t in tensors.items()}
        return {"weight": format.elements_to_bytes(q)} | groups


def stored_dtype(scales: Tensor) -> torch.dtype:
    """Returns the dtype in which our format stores scales:

        scales                                           dtype
        of 16 bits                                       unchanged
        float32, exact in bfloat16 or float16            bfloat16 or float16
        float32, within the normal range of float16      float16: a scale changes by at most 2^-11 of itself
        other float32                                    float32, for which no format exists here"""
    if scales.dtype != torch.float32:
        return scales.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).float(), scales):
            return dtype
    float16, magnitudes = torch.finfo(torch.float16), scales.abs()
    is_normal = (magnitudes == 0) | (magnitudes >= float16.tiny) & (magnitudes <= float16.max)
    return torch.float16 if is_normal.all() else torch.float32


def unpack_numbers(words: Tensor, bits: int) -> Tensor:
    """Unpacks int32 [..., n] to uint8 [..., n * 32 / bits], the lowest bits first."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else unpack_nibbles_interleaved(octets)


def infer_bits(layer: SourceLayer, n_words: int, n_numbers: int) -> int:
    """Returns how many bits a number has, 4 or 8, where n_words hold n_numbers."""
    for bits in (4, 8):
        if math.ceil(n_numbers * bits / 32) == n_words:
            return bits
    raise UsageError(f"the weight of {layer.name} has {32 * n_words / n_numbers:g} bits; 4 and 8 are supported")


def check_group_size(layer: SourceLayer, stated: int | None, k: int, n_groups: int) -> int:
    """Returns the group size that config.json states, and checks that it fits n_groups. -1 means that all k inputs are
    one group."""
    group_size = stated if isinstance(stated, int) and stated > 0 else k
    if math.ceil(k / group_size) != n_groups:
        layer.refuse(f"{n_groups} scales for {k} inputs", f"group_size {stated}")
    return group_size


def read_input_order(
    layer: SourceLayer, kind: str, k: int, group_size: int, n_groups: int, is_required: bool
) -> Tensor | None:
    """Returns the order of the inputs in which every group is contiguous, or None if groups are contiguous already.

    kind: the tensor that holds the group of each input (g_idx). is_required: whether config.json says act-order, so
    that the tensor must exist."""
    if kind not in layer.tensors:
        if is_required and n_groups > 1:
            raise UsageError(f"tensor {layer.name}.{kind} is missing, although config.json says act-order (desc_act)")
        return None
    g_idx = layer.take(kind, (torch.int32, torch.int64), 1)
    layer.expect_shape(kind, k)
    unknown = g_idx[(g_idx < 0) | (g_idx >= n_groups)]
    if len(unknown):
        raise UsageError(f"tensor {layer.name}.{kind} names group {int(unknown[0])}; there are {n_groups}")
    groups = torch.arange(k) // group_size
    if torch.equal(g_idx.long(), groups):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), groups):
        raise UsageError(f"tensor {layer.name}.{kind} does not make groups of {group_size} inputs")
    return order


# ---- GPTQ and AWQ ---------------------------------------------------------------------------------------------------


def gptq_weight(layer: SourceLayer, quantization: dict) -> LazyWeight:
    """Reads a weight of GPTQ.

    quantization: config.json's quantization_config. With "dynamic" in quantization, some layers may have other bits or
    another group_size than quantization states."""
    qweight, qzeros, scales = take_qweight(layer)
    n_groups, n = scales.shape
    bits = infer_bits(layer, qzeros.shape[1], n)
    k = qweight.shape[0] * 32 // bits
    layer.expect_shape("qweight", qweight.shape[0], n)
    layer.expect_shape("qzeros", n_groups, qzeros.shape[1])
    group_size = math.ceil(k / n_groups)
    if not quantization.get("dynamic"):
        layer.expect("bits", bits, quantization.get("bits"))
        group_size = check_group_size(layer, quantization.get("group_size"), k, n_groups)

    def read_zeros() -> Tensor:
        zeros = unpack_numbers(qzeros, bits)
        if has_v1_zeros(zeros, bits, quantization):
            # Add 1 to every number in a word, with carries: GPTQ subtracted 1 from every number, with borrows.
            ones = 0x11111111 if bits == 4 else 0x01010101
            zeros = unpack_numbers(qzeros + ones, bits)
        return zeros.T[:n]

    has_order = bool(quantization.get("desc_act"))
    order = read_input_order(layer, "g_idx", k, group_size, n_groups, is_required=has_order)
    shape = torch.Size([n, k])
    return UnpackedWeight(
        shape, bits, group_size, scales.T, lambda: unpack_numbers(qweight.T, bits), read_zeros, order
    ).to_weight()


def has_v1_zeros(zeros: Tensor, bits: int, quantization: dict) -> bool:
    """Returns whether zeros, as stored, are the zero points minus one, as in version 1 of GPTQ's format. In symmetric
    weights all zero points are the middle, so zeros show the version. For other weights config.json states the
    version."""
    middle = 1 << (bits - 1)
    if (zeros == middle).all():
        return False
    return bool((zeros == middle - 1).all()) or quantization.get("checkpoint_format") != "gptq_v2"


def awq_weight(layer: SourceLayer, quantization: dict) -> LazyWeight:
    """Reads a weight of AWQ. quantization: config.json's quantization_config."""
    qweight, qzeros, scales = take_qweight(layer)
    (k, n_words), (n_groups, n) = qweight.shape, scales.shape
    bits = infer_bits(layer, n_words, n)
    layer.expect("bits", bits, quantization.get("bits", quantization.get("w_bit")))
    if bits != 4:
        raise UsageError(f"{layer.name} is AWQ of {bits} bits; 4 are supported")
    layer.expect_shape("qzeros", n_groups, n_words)
    stated = quantization.get("group_size", quantization.get("q_group_size"))
    group_size = check_group_size(layer, stated, k, n_groups)

    def unpack_awq(words: Tensor) -> Tensor:
        return unpack_numbers(words, 4).unflatten(-1, (-1, 8))[..., AWQ_UNPACK_ORDER].flatten(-2).T

    shape = torch.Size([n, k])
    stored = UnpackedWeight(shape, 4, group_size, scales.T, lambda: unpack_awq(qweight), lambda: unpack_awq(qzeros))
    return stored.to_weight()


def take_qweight(layer: SourceLayer) -> tuple[Tensor, Tensor, Tensor]:
    qweight, qzeros = layer.take("qweight", (torch.int32,), 2), layer.take("qzeros", (torch.int32,), 2)
    return qweight, qzeros, layer.take_scales("scales", 2)


# ---- compressed-tensors ---------------------------------------------------------------------------------------------


def packed_weight(layer: SourceLayer, stated: dict) -> LazyWeight:
    """Reads a weight of pack-quantized. stated: the weight's scheme in config.json."""
    packed = layer.take("weight_packed", (torch.int32,), 2)
    shape = layer.take("weight_shape", (torch.int32, torch.int64), 1).tolist()
    if len(shape) != 2 or min(shape) < 1 or shape[0] != len(packed):
        raise UsageError(f"tensor {layer.name}.weight_shape is {shape}, but weight_packed {list(packed.shape)}")
    n, k = shape
    bits = infer_bits(layer, packed.shape[1], k)
    return compressed_weight(layer, stated, bits, torch.Size([n, k]), lambda: unpack_numbers(packed, bits)[:, :k])


def int8_weight(layer: SourceLayer, stated: dict) -> LazyWeight:
    """Reads a weight of int-quantized. stated: the weight's scheme in config.json."""
    weight = layer.take("weight", (torch.int8,), 2)
    return compressed_weight(layer, stated, 8, weight.shape, lambda: weight.view(torch.uint8) ^ 128)


def compressed_weight(
    layer: SourceLayer, stated: dict, bits: int, shape: torch.Size, read_q: Callable[[], Tensor]
) -> LazyWeight:
    n, k = shape
    layer.expect("num_bits", bits, stated.get("num_bits"))
    scales = layer.take_row_scales("weight_scale", n)
    n_groups = scales.shape[1]
    has_groups = stated.get("strategy") == "group"
    group_size = check_group_size(layer, stated.get("group_size") if has_groups else None, k, n_groups)
    middle, zeros = 1 << (bits - 1), None
    if "weight_zero_point" in layer.tensors:
        zeros = layer.take("weight_zero_point", (torch.int32, torch.int8), 2)
        layer.expect_shape("weight_zero_point", n if zeros.dtype == torch.int8 else math.ceil(n * bits / 32), n_groups)

    def read_zeros() -> Tensor:
        if zeros is None:
            return torch.full((n, n_groups), middle, dtype=torch.uint8)
        if zeros.dtype == torch.int8:
            return (zeros.short() + middle).to(torch.uint8)
        return unpack_numbers(zeros.T, bits)[:, :n].T

    has_order = stated.get("actorder") == "group"
    order = read_input_order(layer, "weight_g_idx", k, group_size, n_groups, is_required=has_order)
    return UnpackedWeight(shape, bits, group_size, scales, read_q, read_zeros, order).to_weight()

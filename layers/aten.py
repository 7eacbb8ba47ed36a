"""Matmuls with 8- and 4-bit weights by PyTorch's own CPU kernels, for machines without a C++ compiler.

    weight = to_aten_weight(linear.format, linear.tensors(), torch.bfloat16)    # None: PyTorch has no kernel
    y = multiply(x, weight)                                                     # [M, K] -> [M, N]

A decode step then reads 8 or 4 bits for each weight, and not dequantized weights of 16 bits. PyTorch's kernels take as
long for each token as for the first one, so with more than MAX_ATEN_TOKENS tokens it is faster to dequantize first.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from formats import Int4, Int8, Tensors, WeightFormat

MAX_ATEN_TOKENS = 128
KERNEL_BLOCK = 16  # inputs that PyTorch's int8 kernel reads at a time; outputs that the int4 kernel computes at a time
CHUNK_ROWS = 1024  # rows converted at a time, to bound the memory of the int32 copy; a multiple of the kernel's blocks


class AtenInt8(NamedTuple):
    weight: Tensor  # int8 [N, K]
    scales: Tensor  # [N], in the dtype of the activations


class AtenInt4(NamedTuple):
    weight: Tensor  # uint8 [N, K / 2], in the order of PyTorch's kernel
    group_size: int
    scales_and_offsets: Tensor  # [n_groups, N, 2], in the dtype of the activations; a weight is (q - 8) scale + offset


def to_aten_weight(format: WeightFormat, tensors: Tensors, dtype: torch.dtype) -> AtenInt8 | AtenInt4 | None:
    """Returns W [N, K], stored in format, for multiply with activations in dtype. Returns None if PyTorch has no kernel
    for W."""
    if dtype.itemsize != 2:
        return None  # plain PyTorch computes float32 exactly, from dequantized weights
    match format:
        case Int8():
            if tensors["weight"].shape[1] % KERNEL_BLOCK:
                return None
            return AtenInt8(tensors["weight"], tensors["scales"].to(dtype))
        case Int4():
            q = format.unpack_q(tensors["weight"])  # [N, K]
            n, k = q.shape
            if n % KERNEL_BLOCK or k % format.group_size:
                return None
            scales = tensors["scales"].float()  # [N, n_groups]
            offsets = (8 - tensors["zeros"].float() / 2**format.zero_fraction_bits) * scales
            scales_and_offsets = torch.stack([scales, offsets], dim=-1).transpose(0, 1).to(dtype).contiguous()
            packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(rows.int(), 1) for rows in q.split(CHUNK_ROWS)]
            return AtenInt4(torch.cat(packed), format.group_size, scales_and_offsets)
    return None


def multiply(x: Tensor, weight: AtenInt8 | AtenInt4) -> Tensor:
    """x [M, K] W^T: [M, N]."""
    if isinstance(weight, AtenInt8):
        return torch.ops.aten._weight_int8pack_mm(x, *weight)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, *weight)

"""Reads FP8 (e4m3) and MXFP4 weights of Hugging Face checkpoints into QuantizedWeight, without rounding.
hf_quantized.py calls float8_weight for each layer, and split_mxfp4 once.

    fp8                          weight [N, K], weight_scale_inv [N / 128, K / 128]: a scale for each block
    float-quantized, fbgemm_fp8  weight [N, K], weight_scale [N, 1], or one scale for all of W
    modelopt                     the same, or weight_scale [N / 128, 1, K / 128, 1]
    mxfp4 (gpt-oss)              X_blocks [E, N, K / 32, 16] for E experts: two numbers in a byte, the low half first
                                 X_scales [E, N, K / 32]: exponents of powers of two, with a bias of 127

These checkpoints may also ask for 8-bit activations. Here activations keep 16 bits.
"""

import math
import re

import torch
from torch import Tensor

from converters.quantized_weight import (
    QuantizedLayer,
    QuantizedWeight,
    check_finite_scales,
    stored_group_size,
    unpack_nibbles_interleaved,
)
from formats import MXFP4, Float8, Tensors
from formats.base import pack_nibbles, slice_groups
from utils.errors import UsageError

E4M3_NAN = 0x7F  # without the sign bit
E8M0_NAN = 0xFF


def float8_weight(layer: QuantizedLayer, block_shape: list[int] | None) -> QuantizedWeight:
    """block_shape: how many outputs and inputs share a scale. None: each output has a scale, or the whole weight has
    one."""
    weight = layer.take("weight", (torch.float8_e4m3fn,), 2)
    n, k = weight.shape
    kind = "weight_scale_inv" if "weight_scale_inv" in layer.tensors else "weight_scale"
    if block_shape is None:
        scales, n_rows, n_columns, format = layer.take_row_scales(kind, n), 1, k, Float8()
    else:
        scales, (n_rows, n_columns) = layer.take_scales(kind, 2, 4), block_shape
        if scales.dim() == 4:  # [n_blocks, 1, n_blocks, 1] of ModelOpt
            scales = scales.flatten(-2).flatten(0, 1)
        format = Float8(stored_group_size(n_columns, k))
    n_blocks = math.ceil(n / n_rows), math.ceil(k / n_columns)
    if scales.shape != n_blocks:
        layer.refuse(f"scales {list(scales.shape)}", f"blocks that make them {list(n_blocks)}")

    def read() -> Tensors:
        if (weight.view(torch.uint8) & E4M3_NAN == E4M3_NAN).any():
            raise UsageError(f"tensor {layer.name}.weight holds numbers that are not finite")
        by_row = scales.float().repeat_interleave(n_rows, 0)[:n]
        return {"weight": weight, "scales": slice_groups(by_row, 0, k, n_columns, format.effective_group_size(k))}

    return QuantizedWeight(format, weight.shape, read)


def split_mxfp4(tensors: dict[str, Tensor | QuantizedWeight]):
    """Replaces gpt-oss's tensors of stacked experts, in place, by a weight for each projection of each expert. In
    gate_up_proj, rows of gate and up alternate."""
    for blocks_name in list(tensors):
        match = re.fullmatch(r"((.*\.experts)\.(gate_up_proj|down_proj))_blocks", blocks_name)
        if match is None:
            continue
        name, prefix, projection = match.groups()
        if f"{name}_scales" not in tensors:
            raise UsageError(f"the checkpoint has no tensor {name}_scales")
        if name in tensors:
            raise UsageError(f"the checkpoint has {name} twice: in 16 bits, and as {name}_blocks")
        blocks, scales = tensors.pop(blocks_name), tensors.pop(f"{name}_scales")
        check_mxfp4(name, blocks, scales)
        rows_of = {"down_proj": slice(None)}
        if projection == "gate_up_proj":
            rows_of = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        for e in range(len(blocks)):
            for part, rows in rows_of.items():
                tensors[f"{prefix}.{e}.{part}.weight"] = mxfp4_weight(name, blocks[e][rows], scales[e][rows])


def check_mxfp4(name: str, blocks: Tensor, scales: Tensor):
    is_bytes = blocks.dtype == scales.dtype == torch.uint8
    if not is_bytes or scales.dim() != 3 or blocks.shape != (*scales.shape, 16):
        names = f"{name}_blocks and {name}_scales"
        raise UsageError(f"tensors {names} are not MXFP4: bytes [E, N, K/32, 16] and [E, N, K/32]")


def mxfp4_weight(name: str, blocks: Tensor, scales: Tensor) -> QuantizedWeight:
    """blocks: [N, K / 32, 16]. scales: [N, K / 32]. name: of the tensor, for error messages."""

    def read() -> Tensors:
        check_finite_scales(f"{name}_scales", scales != E8M0_NAN)
        return {"weight": pack_nibbles(unpack_nibbles_interleaved(blocks.flatten(-2))), "scales": scales}

    return QuantizedWeight(MXFP4(), torch.Size([len(blocks), blocks.shape[1] * 32]), read)

"""How far a result may be from the exact one. All bounds follow from the arithmetic, for sums in any order; none is a
measurement.

u is half the distance between 1 and the next number of a type. A float32 sum of K products is off by at most (K + 8)
u32 times the sum of the products' magnitudes, the 8 being for what comes before and after the sum. A result that is
stored in 16 bits is off by another u16 of itself. Where a value is rounded on the way (a normed or quantized
activation), two ways of computing it may round to neighbours if it lies next to the border between them; that is rare
enough (the borders are thousands of float32 steps apart) for no more than FLIPS such in one sum.
"""

import torch
from torch import Tensor

from kernels.formats.float_bits import decode_e8m0

U = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # half of the smallest step
FLIPS = 8


def magnitudes(w) -> Tensor:
    """Returns, for each weight of a WeightMatrix as in a checkpoint, the sum of the magnitudes of what a kernel adds up
    and takes off again: [N, K]. In a quantized weight the offset of an unsigned number and the zero point count,
    too."""
    weight, scales = w.weight.double(), w.scales
    if scales is None:
        return weight.abs()
    if w.weight.dtype == torch.float8_e4m3fn:
        return w.dequantized_weight(torch.float64).abs()
    if w.weight.dtype == torch.int8:  # q + 128, and 128
        return (weight.abs() + 256) * scales.double()[..., None]
    if scales.dtype == torch.uint8:  # exponents, of e2m1 as 12 + 2 e2m1, and 12, times half the scale
        wide = decode_e8m0(scales).repeat_interleave(w.format.group_size, -1)[..., : w.in_features]
        return w.dequantized_weight(torch.float64) + 12 * wide
    ones = {"weight": w.weight, "scales": w.scales.abs(), "zeros": torch.zeros_like(w.zeros)}
    zeros = w.zeros.double().repeat_interleave(w.format.group_size, -1)[..., : w.in_features]
    wide = w.scales.abs().double().repeat_interleave(w.format.group_size, -1)[..., : w.in_features]
    return w.format.dequantize(ones, torch.float64) + zeros / w.format.zeros_per_step * wide


def product_error(x: Tensor, magnitude: Tensor, y: Tensor, dtype: torch.dtype, step: float = 0.0) -> Tensor:
    """Returns the bound for y = x W^T, stored in dtype. magnitude [N, K]: of W. step: how much one flip changes an
    element of x."""
    k = x.shape[-1]
    total = x.double().abs() @ magnitude.mT
    flips = FLIPS * step * magnitude.max()
    return (k + 8) * U[torch.float32] * total + flips + rounding_error(y, dtype)


def rounding_error(y: Tensor, dtype: torch.dtype) -> Tensor:
    return U[dtype] * y.double().abs() + SMALLEST[dtype]


def step_of(x: Tensor, quantized: bool) -> float:
    """Returns the largest distance between neighbouring values of x: in the type of x, or in 8 bits in groups of 8."""
    largest = x.double().abs().max().item()
    return largest / 127 if quantized else 2 * U[x.dtype] * largest


def check(ours: Tensor, exact: Tensor, bound: Tensor):
    assert ours.shape == exact.shape
    error = (ours.double() - exact.double()).abs()
    worst = (error - bound).argmax()
    assert (error <= bound).all(), (error.flatten()[worst].item(), bound.expand_as(error).flatten()[worst].item())

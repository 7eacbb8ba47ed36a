"""Bounds of the error of a result. All bounds follow from the arithmetic, for sums in any order. No bound is measured.

u is the unit roundoff of a type: half the distance between 1 and the next number. An error has up to three parts:

    sum       (K + 8) u32 times the sum of the products' magnitudes, for a float32 sum of K products. The 8 covers the
              operations before and after the sum.
    storing   u16 times the result, for a result that is stored in 16 bits.
    flips     A value may be rounded before the product: a normed or quantized activation. If the value is close to the
              border between two roundings, two ways of computing it may give different roundings: a flip. Borders are
              thousands of float32 steps apart, so a sum has no more than FLIPS flips.
"""

import torch
from torch import Tensor

from formats.floats import decode_e8m0

U = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoffs
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # half of the smallest subnormal number
FLIPS = 8


def magnitudes(w) -> Tensor:
    """Returns the magnitude of each weight of w, a WeightMatrix as in a checkpoint: [N, K]. A kernel computes a
    quantized weight as a difference, such as (q + 128) - 128. The magnitude is the sum of both magnitudes."""
    weight, scales = w.weight.double(), w.scales
    if scales is None:
        return weight.abs()
    if w.weight.dtype == torch.int8:  # (q + 128) - 128
        return (weight.abs() + 256) * scales.double()[..., None]
    if scales.dtype == torch.uint8:  # MXFP4: ((12 + 2 e2m1) - 12) * scale / 2, with exponents as scales
        wide = decode_e8m0(scales).repeat_interleave(w.format.group_size, -1)[..., : w.in_features]
        return w.dequantize(torch.float64) + 12 * wide
    if w.zeros is None:  # a number times its scale, no difference
        return w.dequantize(torch.float64).abs()
    ones = {"weight": w.weight, "scales": w.scales.abs(), "zeros": torch.zeros_like(w.zeros)}
    zeros = w.zeros.double().repeat_interleave(w.format.group_size, -1)[..., : w.in_features]
    wide = w.scales.abs().double().repeat_interleave(w.format.group_size, -1)[..., : w.in_features]
    return w.format.dequantize(ones, torch.float64) + zeros / 2**w.format.zero_fraction_bits * wide


def product_error(x: Tensor, magnitude: Tensor, y: Tensor, dtype: torch.dtype, step: float = 0.0) -> Tensor:
    """Returns the bound of the error of y = x W^T, stored in dtype. magnitude [N, K]: the magnitudes of W. step: how
    much one flip changes an element of x."""
    k = x.shape[-1]
    total = x.double().abs() @ magnitude.mT
    flips = FLIPS * step * magnitude.max()
    return (k + 8) * U[torch.float32] * total + flips + rounding_error(y, dtype)


def rounding_error(y: Tensor, dtype: torch.dtype) -> Tensor:
    return U[dtype] * y.double().abs() + SMALLEST[dtype]


def check(ours: Tensor, exact: Tensor, bound: Tensor, case: object = ""):
    """Asserts that all errors are within bound. case: for the message."""
    assert ours.shape == exact.shape, case
    error = (ours.double() - exact.double()).abs()
    worst = (error - bound).argmax()
    largest = f"{case}: error {error.flatten()[worst].item()}, bound {bound.expand_as(error).flatten()[worst].item()}"
    assert (error <= bound).all(), largest

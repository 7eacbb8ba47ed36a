"""Bounds of the error of a result. All bounds follow from the arithmetic, for sums in any order. No bound is measured.

u is the unit roundoff of a type: half the distance between 1 and the next number. An error has up to three parts:

    sum       (K + 8) u32 times the sum of the products' magnitudes, for a float32 sum of K products. The 8 covers the
              operations before and after the sum.
    storing   u16 times the result, for a result that is stored in 16 bits.
    flips     A normed or quantized activation is rounded before the product. If it is close to the border between two
              roundings, two ways of computing it may round it differently: a flip. Borders are thousands of float32
              steps apart, so a sum has at most FLIPS flips.
"""

import torch
from torch import Tensor

from formats import MXFP4, Int8
from formats.base import repeat_groups
from formats.floats import decode_e8m0
from formats.integers import GroupwiseAffine

U = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoffs
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # half of the smallest subnormal number
FLIPS = 8


def magnitudes(w) -> Tensor:
    """Returns the magnitude of each weight of w, a WeightMatrix as in a checkpoint: [N, K].

    The kernels of some formats compute a weight as a difference, such as (q + 128) - 128. The magnitude is then the sum
    of both magnitudes. Such a format needs a case here."""
    match w.format:
        case Int8():  # ((q + 128) - 128) * scale
            return (w.weight.double().abs() + 256) * w.scales.double()[..., None]
        case MXFP4():  # ((12 + 2 e2m1) - 12) * scale / 2
            return w.dequantize(torch.float64) + 12 * per_weight(w, decode_e8m0(w.scales))
        case GroupwiseAffine(zero_fraction_bits=bits):  # (q - zeros / 2^bits) * scale
            without_zeros = {"weight": w.weight, "scales": w.scales.abs(), "zeros": torch.zeros_like(w.zeros)}
            zeros = per_weight(w, w.zeros.double() / 2**bits * w.scales.double().abs())
            return w.format.dequantize(without_zeros, torch.float64) + zeros
        case _:  # a number, or a number times its scale; dequantize leaves an unquantized weight in its type
            return w.dequantize(torch.float64).double().abs()


def per_weight(w, per_group: Tensor) -> Tensor:
    """Repeats a number of each group of weights [N, n_groups] for all weights of the group: [N, K]."""
    return repeat_groups(per_group.double(), w.format.group_size, w.in_features)


def product_error(x: Tensor, magnitude: Tensor, y: Tensor, dtype: torch.dtype, step: float = 0.0) -> Tensor:
    """Returns the bound of the error of y = x W^T, stored in dtype.

    magnitude: the magnitudes of W [N, K].
    step: how much one flip changes an element of x."""
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

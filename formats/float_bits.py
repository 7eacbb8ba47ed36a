"""Rounding to floats of 8 and 4 bits, and decoding, for floats.py and the converters.

    e4m3 (FP8)     sign, 4 bits of exponent, 3 bits of mantissa: torch.float8_e4m3fn
    e2m1 (FP4)     sign, 2 bits of exponent, 1 bit of mantissa: q 0 to 7 are E2M1_VALUES, q 8 to 15 the negatives
    e8m0 (MX)      8 bits of exponent with a bias of 127: powers of two

MXFP4 is groups of e2m1. Each group has a scale, which is an e8m0 (OCP Microscaling Formats, version 1.0).
"""

import torch
from torch import Tensor

FLOAT8_MAX = 448.0  # the largest e4m3
E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1_MAX_EXPONENT = 2  # the exponent of 4 and 6
E8M0_BIAS = 127


def round_mxfp4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds groups [..., group_size] float32 to q [..., group_size] uint8 and scales [...] uint8.

    Each group tries two scales, and takes the scale with the smaller sum of squared errors:

        the standard's scale      divides the largest magnitude into [4, 8); a quotient above 6 is clamped to 6
        twice this scale          clamps nothing, but the steps between values are twice as wide"""
    _, exponents = groups.abs().amax(-1).frexp()  # the largest magnitude is in [2^(exponent - 1), 2^exponent)
    first = (exponents - 1 - E2M1_MAX_EXPONENT + E8M0_BIAS).clamp(min=1)  # the scale is not subnormal
    scales = torch.stack([first, first + 1])  # [2, ...]
    factors = decode_e8m0(scales)[..., None]
    q = encode_e2m1(groups / factors)  # [2, ..., group_size]
    errors = (decode_e2m1(q) * factors - groups).square().sum(-1)
    takes_first = errors[0] <= errors[1]
    return torch.where(takes_first[..., None], *q), torch.where(takes_first, *scales).to(torch.uint8)


def decode_mxfp4(q: Tensor, scales: Tensor) -> Tensor:
    """Decodes q and scales, both uint8 and of shapes that broadcast, to float32. The result is exact."""
    return decode_e2m1(q) * decode_e8m0(scales)


def encode_e2m1(x: Tensor) -> Tensor:
    """Rounds x to the nearest e2m1, ties to even: uint8. A magnitude above 6 becomes 6."""
    magnitude = x.abs().clamp(max=E2M1_VALUES[-1])
    # Neighbouring values are 0.5 apart from 0 to 2, 1 apart from 2 to 4, 2 apart from 4 to 6
    q = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return q.round().to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def decode_e2m1(q: Tensor) -> Tensor:
    """The inverse of encode_e2m1, float32."""
    values = torch.tensor(E2M1_VALUES + [-value for value in E2M1_VALUES], device=q.device)
    return values[q.int()]


def decode_e8m0(scales: Tensor) -> Tensor:
    """2^(scale - 127), float32. scale becomes the float32's exponent, which has the bias 127, too. The exception is
    2^-127, a subnormal number with one bit set."""
    return (scales.int() << 23).clamp(min=1 << 22).view(torch.float32)

"""Numbers of 8 and 4 bits with an exponent: how weights are rounded to them, and what they stand for.

    e4m3 (FP8)     sign, 4 bits of exponent, 3 of mantissa: torch.float8_e4m3fn
    e2m1 (FP4)     sign, 2 bits of exponent, 1 of mantissa: q 0 to 7 are E2M1_VALUES, 8 to 15 the same, negative
    e8m0 (MX)      8 bits of exponent with a bias of 127: powers of two

MXFP4 is groups of e2m1, with an e8m0 that scales each (OCP Microscaling Formats, version 1.0).
"""

import torch
from torch import Tensor

FLOAT8_MAX = 448.0  # of e4m3
E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1_MAX_EXPONENT = 2  # of 4 and 6
E8M0_BIAS = 127


def round_mxfp4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """q [..., group_size] uint8 and scales [...] uint8 for groups [..., group_size] float32.

    The standard's exponent is the one with which a group's largest magnitude lies in [4, 8); what is above 6 becomes 6.
    With the next one nothing is cut off, but the steps are twice as wide. The one with the smaller sum of squared
    errors is taken."""
    _, exponents = groups.abs().amax(-1).frexp()  # the largest lies in [2^(exponent - 1), 2^exponent)
    first = (exponents - 1 - E2M1_MAX_EXPONENT + E8M0_BIAS).clamp(min=1)  # no subnormal factor
    scales = torch.stack([first, first + 1])  # [2, ...]
    factors = decode_e8m0(scales)[..., None]
    q = encode_e2m1(groups / factors)  # [2, ..., group_size]
    errors = (decode_e2m1(q) * factors - groups).square().sum(-1)
    takes_first = errors[0] <= errors[1]
    return torch.where(takes_first[..., None], *q), torch.where(takes_first, *scales).to(torch.uint8)


def decode_mxfp4(q: Tensor, scales: Tensor) -> Tensor:
    """What q with these scales stand for, float32, which is exact. Both are uint8, of shapes that broadcast."""
    return decode_e2m1(q) * decode_e8m0(scales)


def encode_e2m1(x: Tensor) -> Tensor:
    """The nearest e2m1 to x, ties to even, uint8. Beyond 6 it is 6."""
    magnitude = x.abs().clamp(max=E2M1_VALUES[-1])
    # Between 0 and 2, 2 and 4, 4 and 6 the values are 0.5, 1 and 2 apart
    q = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return q.round().to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def decode_e2m1(q: Tensor) -> Tensor:
    """The inverse of encode_e2m1, float32."""
    values = torch.tensor(E2M1_VALUES + [-value for value in E2M1_VALUES], device=q.device)
    return values[q.int()]


def decode_e8m0(scales: Tensor) -> Tensor:
    """2^(scale - 127), float32, whose exponent has the same bias. 2^-127 is a subnormal number, with one bit set."""
    return (scales.int() << 23).clamp(min=1 << 22).view(torch.float32)

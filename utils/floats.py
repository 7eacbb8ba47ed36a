"""A float as a PyTorch dtype rounds it."""

import math

import torch


def round_to_dtype(x: float, dtype: torch.dtype) -> float:
    """Returns the number of dtype that is nearest to x; of two, the even one. x must be in dtype's normal range. Uses
    no tensor, since a step that is recorded may call only the operations of kernels/schema.py."""
    _, exponent = math.frexp(x)
    spacing = math.ldexp(torch.finfo(dtype).eps, exponent - 1)  # of the numbers that dtype has near x
    return round(x / spacing) * spacing

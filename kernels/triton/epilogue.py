"""The epilogue of fused_linear_kernel (linear.py): the steps after the matmul, in the order of ops/linear.py.

    epilogue         bias, activation, out_scale, softcap, clip and residual
    activate         the activations
    apply_softcap    a softcap, also of attention scores (attention.py)
"""

from typing import NamedTuple

import triton
import triton.language as tl


class EpilogueArguments(NamedTuple):
    """The arguments of fused_linear_kernel for the epilogue. None means that the step is left out."""

    bias_ptr: tl.tensor | None  # [N], of experts [E, N]
    residual_ptr: tl.tensor | None  # [M, N_OUT]
    out_scale: tl.tensor | None
    softcap: tl.tensor | None
    clip: tl.tensor | None


class EpilogueOperands(NamedTuple):
    """What a program has loaded for the epilogue. None means that the step is left out."""

    bias: tl.tensor | None  # [BLOCK_N, 1]
    out_scale: tl.tensor | None
    softcap: tl.tensor | None
    clip: tl.tensor | None
    residual: tl.tensor | None  # [BLOCK_OUT, BLOCK_M]


@triton.jit
def epilogue(y, operands, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr):
    """y [BLOCK_N, BLOCK_M] -> [BLOCK_OUT, BLOCK_M]"""
    if operands.bias is not None:
        y += operands.bias
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION, IS_GATED)
    if operands.out_scale is not None:
        y *= operands.out_scale
    if operands.softcap is not None:
        y = apply_softcap(y, operands.softcap)
    if operands.clip is not None:
        y = tl.clamp(y, -operands.clip, operands.clip, propagate_nan=tl.PropagateNan.ALL)
    if operands.residual is not None:
        y += operands.residual
    return y


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr):
    """Computes activation(gate) * up [F, M] of y [2 F, M], gate above up. If not IS_GATED, computes activation(y).
    A new activation is one more branch."""
    if IS_GATED:
        halves = tl.reshape(y, [2, y.shape[0] // 2, y.shape[1]])
        x, up = tl.split(tl.permute(halves, [1, 2, 0]))
    else:
        x, up = y, None
    if ACTIVATION == "swiglu":
        x *= tl.sigmoid(x)
    elif ACTIVATION == "geglu":
        x *= 0.5 * (1 + tl.erf(0.70710678 * x))
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x *= x
    elif ACTIVATION == "geglu_tanh" or ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), and 1.5957691 = 2 sqrt(2 / pi)
        x *= tl.sigmoid(1.5957691 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu", "no kernel for this activation")
        x = tl.minimum(x, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL) + 1
        x *= tl.sigmoid(1.702 * x)
    if IS_GATED:
        x *= up
    return x


@triton.jit
def apply_softcap(x, softcap):
    """Returns softcap * tanh(x / softcap), which stays between -softcap and softcap."""
    return softcap * (2 * tl.sigmoid(2 / softcap * x) - 1)

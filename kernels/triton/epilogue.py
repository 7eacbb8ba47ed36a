"""The epilogue of fused_linear_kernel: the steps after the matmul, in the order of layers/linear.py: Linear.

    epilogue         bias, activation, out_scale, softcap, clip and residual
    activate         the activations
    apply_softcap    a softcap, also of attention scores (attention.py)
"""

from typing import NamedTuple

import triton
import triton.language as tl


class EpilogueScalars(NamedTuple):
    """The numbers of the epilogue. None means that the step is left out."""

    out_scale: tl.tensor | None
    softcap: tl.tensor | None
    clip: tl.tensor | None


@triton.jit
def epilogue(y, bias, scalars, residual, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr):
    """y [BLOCK_N, BLOCK_M] -> [BLOCK_OUT, BLOCK_M]. bias [BLOCK_N, 1] and residual [BLOCK_OUT, BLOCK_M] may be
    None."""
    if bias is not None:
        y += bias
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION, IS_GATED)
    if scalars.out_scale is not None:
        y *= scalars.out_scale
    if scalars.softcap is not None:
        y = apply_softcap(y, scalars.softcap)
    if scalars.clip is not None:
        y = tl.clamp(y, -scalars.clip, scalars.clip, propagate_nan=tl.PropagateNan.ALL)
    if residual is not None:
        y += residual
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

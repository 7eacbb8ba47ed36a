"""The epilogue of fused_linear_kernel: the steps after the matmul, in the order of layers/linear.py: Linear.

    load_per_output, load_residual    load the epilogue's operands
    inverse_rms                       1 / rms(x), for the norm before the matmul
    epilogue                          bias, activation, out_scale, softcap, clip and residual
    activate                          the activations
    apply_softcap                     a softcap, also of attention scores (attention.py)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels import schema

ALPHA, LIMIT = tl.constexpr(schema.CLAMPED_SILU_ALPHA), tl.constexpr(schema.CLAMPED_SILU_LIMIT)


class EpilogueArgs(NamedTuple):
    """The epilogue's operands. An operand that is None leaves its step out."""

    bias_ptr: tl.tensor | None  # [N], of experts [E, N]
    residual_ptr: tl.tensor | None  # [M, N_OUT]
    out_scale: tl.tensor | None
    softcap: tl.tensor | None
    clip: tl.tensor | None


@triton.jit
def load_per_output(ptr, w):
    """Loads a number for each row of W that the program has: [BLOCK_N, 1], float32."""
    if ptr is None:
        return None
    else:
        return tl.load(ptr + w.offs_n, mask=w.mask_n, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_residual(residual_ptr, y_offsets, mask_y):
    if residual_ptr is None:
        return None
    else:
        return tl.load(residual_ptr + y_offsets, mask=mask_y, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(squares, eps, NUM_TOKENS_CONST: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns 1 / rms of every token: [BLOCK_M]."""
    offs_m, total = tl.arange(0, BLOCK_M), tl.zeros([BLOCK_M], tl.float32)
    for m in tl.static_range(NUM_TOKENS_CONST):
        total = tl.where(offs_m == m, tl.sum(tl.sum(squares[m], axis=1), axis=0), total)
    return tl.rsqrt(total / K + eps)


@triton.jit
def epilogue(y, bias, residual, args, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr):
    """y [BLOCK_N, BLOCK_M] -> [BLOCK_OUT, BLOCK_M]. bias is [BLOCK_N, 1] or None, residual [BLOCK_OUT, BLOCK_M] or
    None, as loaded. args: EpilogueArgs."""
    if bias is not None:
        y += bias
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION, IS_GATED)
    if args.out_scale is not None:
        y *= args.out_scale
    if args.softcap is not None:
        y = apply_softcap(y, args.softcap)
    if args.clip is not None:
        y = tl.clamp(y, -args.clip, args.clip, propagate_nan=tl.PropagateNan.ALL)
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
    if ACTIVATION == "silu":
        x *= tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x *= 0.5 * (1 + tl.erf(0.70710678 * x))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), and 1.5957691 = 2 sqrt(2 / pi)
        x *= tl.sigmoid(1.5957691 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x *= x
    else:
        tl.static_assert(ACTIVATION == "clamped_silu", "no kernel for this activation")
        x = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        x *= tl.sigmoid(x * ALPHA)
        if IS_GATED:
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1
    if IS_GATED:
        x *= up
    return x


@triton.jit
def apply_softcap(x, softcap):
    """Returns softcap * tanh(x / softcap): between -softcap and softcap."""
    return softcap * (2 * tl.sigmoid(2 / softcap * x) - 1)

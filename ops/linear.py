"""Operations for each token alone: matmuls and what comes before and after them.

    fused_linear       a matmul with what comes before and after it. Each step but the matmul is optional:
                       1. RMSNorm of x   2. x W^T   3. bias   4. activation   5. the rest of Epilogue   6. residual
    rms_norm           a norm that no matmul follows, and the residual after the norm
    permute_inputs     puts x in the order of the columns of a weight
    activate, add      an activation or a residual that fused_linear cannot fuse
    embed              looks tokens up in the embedding

The file begins with the operations, each a kernel or plain PyTorch. The definitions in plain PyTorch, NAME_torch,
follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from config import is_gated
from kernels.arguments import ACTIVATION_IDS, SWIGLU_ALPHA, SWIGLU_LIMIT, Epilogue
from ops import aten
from ops.backend import Backend, contiguous, count_tokens

if TYPE_CHECKING:  # layers.py imports ops/
    from layers import Linear, LinearBase, RMSNorm, WeightMatrix

# Fused gating needs gate and up to be whole blocks of 16 outputs: out_features % 32 == 0.
FUSED_GLU_MULTIPLE = 32


def fused_linear(
    x: Tensor, linear: Linear, norm: RMSNorm | None = None, residual: Tensor | None = None,
    activation: str | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiplies x [..., K] with the weight of linear: [..., N], or [..., N / 2] with a gated activation.

    norm: applied to x first.
    activation: if gated, W is a gate projection above an up projection, and the result is activation(gate) * up.
    Otherwise the result is activation(x W^T).
    residual: added last, after linear.epilogue.
    out_dtype: None, which means x.dtype, or torch.float32."""
    kernel = linear.backend.find_kernel("fused_linear", count_tokens(x))
    if kernel is None:
        y = matmul(x if norm is None else rms_norm(x, norm), linear)
    else:
        fuses_all = supports_fused_activation(activation, linear)  # otherwise only the steps up to the bias
        epilogue = linear.epilogue._replace(activation=ACTIVATION_IDS[activation]) if fuses_all else Epilogue()
        y = kernel(
            contiguous(x), **linear.kernel_arguments(), bias=linear.bias, **norm_arguments(norm),
            residual=contiguous(residual) if fuses_all else None, **epilogue._asdict(),
            float32_out=fuses_all and out_dtype == torch.float32,
        )
        if fuses_all:
            return y
    if activation is not None:
        y = activate(y, activation, linear.backend)
    y = apply_epilogue(y, linear.epilogue, out_dtype)
    return y if residual is None else residual + y


def supports_fused_activation(activation: str | None, linear: LinearBase) -> bool:
    """Whether a kernel can apply the activation to the outputs of linear."""
    if activation is None:
        return True
    has_whole_blocks = not is_gated(activation) or linear.out_features % FUSED_GLU_MULTIPLE == 0
    return has_whole_blocks and activation in linear.backend.activations


def norm_arguments(norm: RMSNorm | None) -> dict:
    """The arguments of a kernel that stand for norm, by name."""
    return {"norm_weight": None, "eps": 0.0} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}


def activate(x: Tensor, activation: str, backend: Backend) -> Tensor:
    """Applies an activation after a matmul, where no kernel applies the activation with the matmul. If gated, x is gate
    and up [..., 2 F], and the result is activation(gate) * up [..., F]. Otherwise the result is activation(x), in the
    shape of x."""
    kernel = backend.find_kernel("activate", count_tokens(x))
    if kernel is None or activation not in backend.activations:
        return activate_torch(x, activation)
    return kernel(contiguous(x), ACTIVATION_IDS[activation])


def add(x: Tensor, y: Tensor, backend: Backend) -> Tensor:
    """x + y, of the same shape. Needed for a residual that comes after an all-reduce (tp.py)."""
    kernel = backend.find_kernel("add", count_tokens(x))
    if kernel is None:
        return x + y
    return kernel(contiguous(x), contiguous(y))


def rms_norm(x: Tensor, norm: RMSNorm, residual: Tensor | None = None) -> Tensor:
    """[residual +] x / rms(x) * weight, over the last dimension of x [..., dim]."""
    kernel = norm.backend.find_kernel("rms_norm", count_tokens(x))
    if kernel is None:
        return rms_norm_torch(x, norm.weight, norm.eps, residual)
    return kernel(contiguous(x), norm.weight, norm.eps, contiguous(residual))


def permute_inputs(x: Tensor, input_order: Tensor, backend: Backend) -> Tensor:
    """x[..., input_order] for x [..., K] and input_order int32 [N]: [..., N]. N may be less than K: a tensor-parallel
    rank takes only the inputs of its own columns."""
    kernel = backend.find_kernel("permute_inputs", count_tokens(x))
    if kernel is None:
        return permute_inputs_torch(x, input_order)
    return kernel(contiguous(x), input_order)


def embed(tokens: Tensor, table: WeightMatrix, scale: float, dtype: torch.dtype) -> Tensor:
    """Looks up the rows of tokens [B, T] in table [V, dim], and multiplies them with scale: [B, T, dim] in dtype."""
    if table.is_packed:
        kernel = table.backend.get_kernel("embed")
    else:
        kernel = table.backend.find_kernel("embed", tokens.numel())
    if kernel is None:
        return embed_torch(tokens, table, scale, dtype)
    return kernel(contiguous(tokens), **table.kernel_arguments(), k=table.in_features, dtype=dtype, scale=scale)


# ---- The definition in plain PyTorch --------------------------------------------------------------------------------


def matmul(x: Tensor, linear: Linear) -> Tensor:
    """x W^T [+ bias] for x [..., K]: [..., N]."""
    n_tokens = count_tokens(x)
    if linear.aten_weight is not None and n_tokens <= aten.MAX_ATEN_TOKENS:
        y = aten.multiply(x.flatten(0, -2), linear.aten_weight).view(*x.shape[:-1], -1)
        return y if linear.bias is None else y + linear.bias
    weight, bias = linear.dequantized_weight(x.dtype), linear.bias
    if n_tokens == 1 and x.is_cpu and x.dtype.itemsize == 2 and not torch.compiler.is_compiling():
        y = torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)  # about twice as fast as F.linear
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def apply_epilogue(y: Tensor, epilogue: Epilogue, out_dtype: torch.dtype | None) -> Tensor:
    """The steps of epilogue after the activation: y [..., N] -> [..., N] in out_dtype, or in y.dtype."""
    _activation, out_scale, softcap, clip = epilogue  # all fields: a new field raises ValueError here
    if out_scale != 1:
        y = y * out_scale
    if out_dtype is not None:
        y = y.to(out_dtype)
    if softcap:
        y = apply_softcap(y, softcap)
    return y.clamp(-clip, clip) if clip else y


def apply_softcap(x: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(x / softcap), which stays between -softcap and softcap."""
    return softcap * torch.tanh(x / softcap)


def activate_torch(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1) if is_gated(activation) else (None, x)
    match activation:
        case "swiglu":
            return F.silu(gate) * up
        case "geglu":
            return F.gelu(gate) * up
        case "geglu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        case "clamped_swiglu":  # gpt-oss
            gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
            return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
        case "gelu_pytorch_tanh":
            return F.gelu(up, approximate="tanh")
        case "relu2":
            return F.relu(up).square()
    raise ValueError(f"activation {activation!r} has no formula")


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm (arXiv:1910.07467). F.rms_norm computes x / rms(x) in float32 and rounds the result to x.dtype. The
    weight is multiplied after the rounding, as in transformers."""
    y = F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    return y if residual is None else residual + y


def permute_inputs_torch(x: Tensor, input_order: Tensor) -> Tensor:
    return x.index_select(-1, input_order)


def embed_torch(tokens: Tensor, table: WeightMatrix, scale: float, dtype: torch.dtype) -> Tensor:
    if table.format.is_quantized:
        x = table.format.dequantize({name: t[tokens] for name, t in table.tensors().items()}, dtype)
    else:
        x = F.embedding(tokens, table.weight)
    return x if scale == 1 else x * scale

"""What computes each token alone: norms, matmuls and activations.

    RMSNorm             [residual +] x / rms(x) * weight
    Linear              activation(norm(x) W^T + bias), scaled and capped, + residual: one kernel, fused_linear
    LinearBase          what Linear and the experts share

    activate, add, permute_inputs    steps that fused_linear cannot fuse
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats.cpu_layouts import CPU_BLOCK_N
from kernels.schema import CLAMPED_SILU_ALPHA, CLAMPED_SILU_LIMIT, Epilogue
from layers import aten
from layers.aten import AtenInt4, AtenInt8
from layers.backend import TORCH_BACKEND, Backend, contiguous, count_tokens
from layers.weight import WeightMatrix

# A gated activation can be fused if out_features is a multiple of this: gate and up must be whole blocks
FUSED_GLU_MULTIPLE = 2 * CPU_BLOCK_N


# ---- Norm -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """weight: [dim]. eps: added to the mean square. backend: set by pack_model (packing.py)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.backend: Backend = TORCH_BACKEND
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[residual +] x / rms(x) * weight, over the last dimension of x [..., dim]."""
        kernel = self.backend.kernel_for("rms_norm", count_tokens(x))
        if kernel is None:
            return rms_norm_torch(x, self.weight, self.eps, residual)
        return kernel(contiguous(x), self.weight, self.eps, contiguous(residual))


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm (arXiv:1910.07467). F.rms_norm computes x / rms(x) in float32 and rounds it to x.dtype. The weight comes
    after the rounding, as in transformers."""
    y = F.rms_norm(x, x.shape[-1:], eps=eps) * weight
    return y if residual is None else residual + y


def norm_arguments(norm: RMSNorm | None) -> dict:
    """A fused norm as the arguments of a matmul's kernel, by name."""
    return {"norm_weight": None, "eps": 0.0} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}


# ---- Linear ---------------------------------------------------------------------------------------------------------


class LinearBase(WeightMatrix):
    """A WeightMatrix for matmuls, with a bias [N], of experts [E, N], or None.

    epilogue: what follows x W^T + bias. With gated, W is a gate projection above an up projection."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, n_experts: int | None = None, **epilogue
    ):
        """epilogue: the fields of Epilogue."""
        super().__init__(in_features, out_features, n_experts)
        self.epilogue = Epilogue(**epilogue)
        self.bias = nn.Parameter(torch.empty(self.weight.shape[:-1]), requires_grad=False) if bias else None

    def can_fuse_activation(self) -> bool:
        """Whether the backend's kernel of the matmul can apply the activation."""
        if self.epilogue.activation is None:
            return True
        has_whole_blocks = not self.epilogue.gated or self.out_features % FUSED_GLU_MULTIPLE == 0
        return has_whole_blocks and self.epilogue.activation in self.backend.activations


def quantizable_linears(model: nn.Module) -> Iterator[tuple[str, LinearBase]]:
    """Yields (name, layer) for every linear layer that quantize.py quantizes and tp.py shards: all but the routers."""
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and not name.endswith(".router"):
            yield name, module


class Linear(LinearBase):
    """y = epilogue(x W^T + bias).

    input_order: int32 [K] for checkpoints of GPTQ with act-order, or None. Column i of the stored W belongs to input
    input_order[i], so forward permutes x first. The weight of a fused norm is stored in the same order, because the
    norm follows the permutation.
    aten_weight: W for PyTorch's own kernels, on a CPU without a C++ compiler, or None."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **epilogue):
        super().__init__(in_features, out_features, bias, **epilogue)
        self.aten_weight: AtenInt8 | AtenInt4 | None = None
        self.register_buffer("input_order", None)

    def forward(
        self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [..., K] -> [..., N], or [..., N / 2] if gated.

        norm, residual: applied to x first, added to y last. They are arguments because the kernel fuses them.
        out_dtype: None, which means x.dtype, or torch.float32."""
        if self.input_order is not None:
            x = permute_inputs(x, self.input_order, self.backend)
        kernel = self.backend.kernel_for("fused_linear", count_tokens(x))
        if kernel is not None and self.can_fuse_activation():
            return self.call_kernel(kernel, x, norm, self.epilogue, residual, out_dtype)
        y = self.matmul(x, norm) if kernel is None else self.call_kernel(kernel, x, norm, Epilogue())
        return self.apply_epilogue(y, residual, out_dtype)

    def call_kernel(
        self, kernel: Callable, x: Tensor, norm: RMSNorm | None, epilogue: Epilogue, residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return kernel(
            contiguous(x), **self.kernel_arguments(), bias=self.bias, **norm_arguments(norm),
            residual=contiguous(residual), **epilogue._asdict(), out_dtype=out_dtype or x.dtype,
        )

    def matmul(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """norm(x) W^T + bias in PyTorch: [..., K] -> [..., N]. With apply_epilogue, it defines what the kernel
        computes."""
        if norm is not None:
            x = norm(x)
        y = self.fast_matmul(x)
        return F.linear(x, self.dequantize(x.dtype), self.bias) if y is None else y

    def fast_matmul(self, x: Tensor) -> Tensor | None:
        """x W^T + bias by a function of PyTorch that is faster than F.linear. Returns None if there is none."""
        num_tokens = count_tokens(x)
        if self.aten_weight is not None and num_tokens <= aten.MAX_ATEN_TOKENS:
            y = aten.multiply(x.flatten(0, -2), self.aten_weight)
        elif num_tokens == 1 and x.is_cpu and x.dtype.itemsize == 2 and not torch.compiler.is_compiling():
            y = torch.mv(self.dequantize(x.dtype), x.flatten())  # about twice as fast
        else:
            return None
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def apply_epilogue(self, y: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
        """All that follows the matmul, y [..., N], with the result in out_dtype, or in y.dtype."""
        activation, gated, out_scale, softcap, clip = self.epilogue
        if activation is not None:
            y = activate(y, activation, gated, self.backend)
        if out_scale != 1:
            y = y * out_scale
        if out_dtype is not None:
            y = y.to(out_dtype)
        if softcap:
            y = apply_softcap(y, softcap)
        if clip:
            y = y.clamp(-clip, clip)
        return y if residual is None else residual + y


def apply_softcap(x: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(x / softcap)"""
    return softcap * torch.tanh(x / softcap)


# ---- Steps that fused_linear cannot fuse ----------------------------------------------------------------------------


def activate(x: Tensor, activation: str, gated: bool, backend: Backend) -> Tensor:
    """activation(x), in the shape of x. If gated, x is gate and up [..., 2 F], and the result is activation(gate) * up
    [..., F]."""
    kernel = backend.kernel_for("activate", count_tokens(x))
    if kernel is None or activation not in backend.activations:
        return activate_torch(x, activation, gated)
    return kernel(contiguous(x), activation, gated)


def activate_torch(x: Tensor, activation: str, gated: bool) -> Tensor:
    x, up = x.chunk(2, dim=-1) if gated else (x, None)
    match activation:
        case "silu":
            y = F.silu(x)
        case "gelu":
            y = F.gelu(x)
        case "gelu_tanh":
            y = F.gelu(x, approximate="tanh")
        case "clamped_silu":  # gpt-oss
            x = x.clamp(max=CLAMPED_SILU_LIMIT)
            y = x * torch.sigmoid(CLAMPED_SILU_ALPHA * x)
            if gated:
                up = up.clamp(-CLAMPED_SILU_LIMIT, CLAMPED_SILU_LIMIT) + 1
        case "relu2":
            y = F.relu(x).square()
        case _:
            raise ValueError(f"activation {activation!r} has no formula")
    return y * up if gated else y


def add(x: Tensor, y: Tensor, backend: Backend) -> Tensor:
    """x + y, of the same shape: a residual after an all-reduce (tp.py)."""
    kernel = backend.kernel_for("add", count_tokens(x))
    if kernel is None:
        return x + y
    return kernel(contiguous(x), contiguous(y))


def permute_inputs(x: Tensor, input_order: Tensor, backend: Backend) -> Tensor:
    """x[..., input_order] for x [..., K] and input_order int32 [N]: [..., N]. A tensor-parallel rank takes only the
    inputs of its own columns, so N may be less than K."""
    kernel = backend.kernel_for("permute_inputs", count_tokens(x))
    if kernel is None:
        return x.index_select(-1, input_order)
    return kernel(contiguous(x), input_order)

"""The layers that hold the weights of a model.

    RMSNorm        x / rms(x) * weight
    WeightMatrix   what the layers below share: W in some format (formats/), packed for some backend
    LinearBase     what the linear layers share: a WeightMatrix for matmuls, with a bias
    Linear         y = x W^T + bias, and what is applied to y
    ExpertsGateUp, ExpertsDown    matmuls with the W of each expert that the router chose
    Embedding      a row of W for every token

A forward calls an operation of ops/ with the layer itself. The operation runs on the kernels of the layer's backend or
in plain PyTorch. model.py composes the layers.
"""

import torch
from torch import Tensor, nn

import ops
from formats import Tensors, Unquantized, WeightFormat
from kernels.arguments import Epilogue, WeightArguments
from ops.aten import AtenInt4, AtenInt8
from ops.backend import TORCH_BACKEND, Backend


class RMSNorm(nn.Module):
    """weight [dim]; eps, which is added to the mean square; and backend, which model.py: pack_weights sets."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.backend: Backend = TORCH_BACKEND
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[residual +] x / rms(x) * weight."""
        return ops.rms_norm(x, self, residual)


class WeightMatrix(nn.Module):
    """A weight W [N, K] of N outputs and K inputs, or a W for each expert [E, N, K].

    format: how W is stored (formats/).
    backend: what computes with W (ops/backend.py).
    is_packed: whether the tensors are in the order of the backend's kernels, so that only these can read W. Otherwise
    the tensors are as in a checkpoint of this format.
    is_embedding: whether a step reads only some rows of W."""

    is_embedding = False

    def __init__(self, in_features: int, out_features: int, n_experts: int | None = None):
        super().__init__()
        self.in_features, self.out_features, self.n_experts = in_features, out_features, n_experts
        self.format: WeightFormat = Unquantized()
        self.backend: Backend = TORCH_BACKEND
        self.is_packed = False
        shape = (out_features, in_features) if n_experts is None else (n_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.register_buffer("scales", None)
        self.register_buffer("zeros", None)

    def tensors(self) -> Tensors:
        """The tensors that store W, by name: weight and, if the format has them, scales and zeros."""
        named = {"weight": self.weight, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def set_tensor(self, name: str, tensor: Tensor | None):
        """Replaces the tensor called name. weight and bias become Parameters."""
        if name in ("weight", "bias"):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(self, name, tensor)

    def set_format(self, format: WeightFormat):
        """Changes the format of W, and replaces the tensors by uninitialized tensors of the new format."""
        for name, tensor in format.allocate(self.weight.shape, self.weight.dtype, self.weight.device).items():
            self.set_tensor(name, tensor)
        self.format = format

    def kernel_arguments(self) -> dict:
        """W as a kernel takes it: WeightArguments by name."""
        return WeightArguments(
            self.weight, self.scales, self.zeros, self.format.format_id, n=self.out_features,
            group_size=self.format.effective_group_size(self.in_features),
        )._asdict()

    def dequantized_weight(self, dtype: torch.dtype, experts: int | slice | Tensor = slice(None)) -> Tensor:
        """W [N, K] in dtype. With a W for each expert, experts selects: an index gives [N, K], a slice or a tensor
        of indices gives [X, N, K]."""
        tensors = self.tensors()
        if self.n_experts is not None:
            tensors = {name: t[experts] for name, t in tensors.items()}
        if not self.is_packed:
            return self.format.dequantize(tensors, dtype)
        if self.n_experts is None or isinstance(experts, int):
            return self.dequantize_packed(tensors, dtype)
        matrices = [{name: t[i] for name, t in tensors.items()} for i in range(len(tensors["weight"]))]
        return torch.stack([self.dequantize_packed(matrix, dtype) for matrix in matrices])

    def dequantize_packed(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Dequantizes one matrix from its packed tensors, by the kernel of the backend: [N, K] in dtype."""
        arguments = self.kernel_arguments() | tensors
        return self.backend.get_kernel("dequantize")(**arguments, k=self.in_features, dtype=dtype)


class LinearBase(WeightMatrix):
    """A WeightMatrix for matmuls, with a bias [N], of experts [E, N], or None. quantize.py quantizes and tp.py shards
    every LinearBase of a model except the routers."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, n_experts: int | None = None):
        super().__init__(in_features, out_features, n_experts)
        self.bias = nn.Parameter(torch.empty(self.weight.shape[:-1]), requires_grad=False) if bias else None


class Linear(LinearBase):
    """y = epilogue(x W^T + bias).

    epilogue: an Epilogue of out_scale, softcap and clip. Its activation is 0, since forward gets the activation.
    input_order: int32 [K], or None; for checkpoints of GPTQ with act-order. Column i of the stored W belongs to input
    input_order[i], so forward permutes x first. A fused norm follows the permutation, so the norm's weight is stored
    in the same order.
    aten_weight: W for PyTorch's own kernels, or None; only on a CPU without a C++ compiler."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, out_scale: float = 1.0, softcap: float = 0.0,
        clip: float = 0.0,
    ):
        super().__init__(in_features, out_features, bias)
        self.epilogue = Epilogue(out_scale=out_scale, softcap=softcap, clip=clip)
        self.aten_weight: AtenInt8 | AtenInt4 | None = None
        self.register_buffer("input_order", None)

    def forward(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None,
        activation: str | None = None, out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [..., K] -> [..., N], or [..., N / 2] with a gated activation. norm, activation and residual are arguments,
        since kernels fuse them. ops/linear.py: fused_linear describes the arguments."""
        if self.input_order is not None:
            x = ops.permute_inputs(x, self.input_order, self.backend)
        return ops.fused_linear(x, self, norm, residual, activation, out_dtype)


class ExpertsGateUp(LinearBase):
    """The gate and up projections of all experts."""

    def forward(
        self, x: Tensor, topk_ids: Tensor, norm: RMSNorm | None = None, activation: str | None = None
    ) -> Tensor:
        """x [B, T, dim], topk_ids [B, T, top_k] -> x W^T for each expert of every token: [B, T, top_k, F]."""
        return ops.experts_gate_up(x, self, topk_ids, norm, activation)


class ExpertsDown(LinearBase):
    """The down projections of all experts."""

    def forward(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """hidden [B, T, top_k, F] -> the weighted sum over the experts of each token: [B, T, dim]."""
        return ops.experts_down(hidden, self, topk_ids, topk_weights, residual)


class Embedding(WeightMatrix):
    """W [V, dim] has a row for every token. Embedding has no forward, because a tied head, which is a Linear, takes the
    place of the Embedding (model.py: tie_embedding): model.py: embed calls ops/linear.py: embed with either layer."""

    is_embedding = True

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(in_features=embedding_dim, out_features=num_embeddings)

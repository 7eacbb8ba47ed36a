"""What the layers with weights share: a weight in some format (formats/), packed for some backend.

    WeightMatrix   W, its tensors, and what needs no more than W: dequantize, embedding
    Embedding      a WeightMatrix with a row for every token
"""

import math

import torch
from torch import Tensor, nn

from formats import Tensors, Unquantized, WeightFormat
from kernels.schema import WeightArguments
from layers.backend import TORCH_BACKEND, Backend, contiguous


class WeightMatrix(nn.Module):
    """A weight W [N, K] of N outputs and K inputs, or a W for each expert [E, N, K].

    format: how W is stored (formats/).
    backend: what computes with W (backend.py).
    is_packed: whether the tensors are in the order of the backend's kernels. Then only these can read W. Otherwise the
    tensors are as in a checkpoint.
    is_embedding: True for an embedding that is not tied to the head. A step reads only the rows of its tokens."""

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
            self.weight, self.scales, self.zeros, type(self.format).__name__, n=self.out_features,
            group_size=self.format.effective_group_size(self.in_features),
        )._asdict()

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """W [N, K] in dtype. With a W for each expert: that of expert or, while unpacked, all [E, N, K]."""
        tensors = self.tensors() if expert is None else {name: t[expert] for name, t in self.tensors().items()}
        if self.is_packed:
            return self.dequantize_packed(tensors, dtype)
        return self.format.dequantize(tensors, dtype)

    def dequantize_packed(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Dequantizes one matrix from its packed tensors, by the kernel of the backend: [N, K] in dtype."""
        arguments = self.kernel_arguments() | tensors
        return self.backend.op("dequantize")(**arguments, k=self.in_features, dtype=dtype)

    def embedding(self, tokens: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """The rows of tokens [B, T], times scale: [B, T, K] in dtype."""
        if self.is_packed:  # only the kernel can read W
            kernel = self.backend.op("embed")
        else:
            kernel = self.backend.kernel_for("embed", tokens.numel())
        if kernel is not None:
            return kernel(contiguous(tokens), **self.kernel_arguments(), k=self.in_features, dtype=dtype, scale=scale)
        rows = self.format.dequantize({name: t[tokens] for name, t in self.tensors().items()}, dtype)
        return rows if scale == 1 else rows * scale


class Embedding(WeightMatrix):
    """W [V, dim] has a row for every token. There is no forward, because a tied head takes the place of an Embedding
    (model.py: tie_embedding), and the forward of a Linear is the matmul."""

    is_embedding = True

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(in_features=embedding_dim, out_features=num_embeddings)


def round_to_dtype(value: float, dtype: torch.dtype) -> float:
    """Rounds a positive number to the nearest number of dtype, ties to even. Without a tensor, because a captured step
    cannot make one."""
    _, exponent = math.frexp(value)  # value is in [2^(exponent - 1), 2^exponent)
    ulp = math.ldexp(torch.finfo(dtype).eps, exponent - 1)  # the distance between two numbers of dtype there
    return round(value / ulp) * ulp

"""The arguments of operations besides x: a weight, a norm, the options of attention, the KV cache of a layer.

    WeightMatrix       W in some format (formats/), packed for some backend
    LinearParams       W, and what is applied to the products with W
    NormParams         the weight of an RMSNorm
    AttentionParams    the options of attention
    LayerCache         what a layer of a KVCache holds: keys and values, and the tables of positions
    WeightArguments    a weight, in the order of kernel arguments

layers.Linear(LinearParams), model.Attention(AttentionParams), ... add only forward, which calls an operation of ops.py.
Parameters and forward are in two files, because ops.py must import the parameters, and forward must import ops.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.aten import AtenInt4, AtenInt8
from kernels.formats import Tensors, Unquantized, WeightFormat
from kernels.schema import kernel_namespace


class WeightArguments(NamedTuple):
    """A weight as a kernel takes it, in the order of kernels/schema.py: WEIGHT, which describes each argument."""

    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    format_id: int
    n: int
    group_size: int


class WeightMatrix(nn.Module):
    """A weight W [N, K] of N outputs and K inputs, or a W for each expert [E, N, K].

    format: how W is stored (kernels/formats/).
    backend: "cpu" or "triton" means that W is packed for the kernels of this backend. "torch" means that W is stored as
    in the checkpoint, for plain PyTorch.
    is_embedding: whether a step reads only some rows of W."""

    is_embedding = False

    def __init__(self, in_features: int, out_features: int, n_experts: int | None = None):
        super().__init__()
        self.in_features, self.out_features, self.n_experts = in_features, out_features, n_experts
        self.format: WeightFormat = Unquantized()
        self.backend = "torch"
        shape = (out_features, in_features) if n_experts is None else (n_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.register_buffer("scales", None)
        self.register_buffer("zeros", None)

    def tensors(self) -> Tensors:
        """The tensors that store W, by name: weight and, if the format has them, scales and zeros."""
        named = {"weight": self.weight, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def set_tensor(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """Replaces the tensor called name. Returns the new tensor; weight and bias become Parameters."""
        if name in ("weight", "bias"):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(self, name, tensor)
        return tensor

    def set_format(self, format: WeightFormat):
        """Changes the format of W, and replaces the tensors by uninitialized tensors of the new format."""
        for name, tensor in format.empty(self.weight.shape, self.weight.dtype, self.weight.device).items():
            self.set_tensor(name, tensor)
        self.format = format

    def kernel_arguments(self) -> WeightArguments:
        group_size = self.format.inputs_per_scale(self.in_features)
        return WeightArguments(
            self.weight, self.scales, self.zeros, self.format.format_id, self.out_features, group_size
        )

    def dequantized_weight(self, dtype: torch.dtype, experts: int | slice | Tensor = slice(None)) -> Tensor:
        """W [N, K] in dtype. With a W for each expert, experts selects: an index gives [N, K], a slice or a tensor
        of indices gives [X, N, K]."""
        tensors = self.tensors()
        if self.n_experts is not None:
            tensors = {name: t[experts] for name, t in tensors.items()}
        if self.backend == "torch" or not self.format.is_quantized:
            return self.format.dequantize(tensors, dtype)
        if self.n_experts is None or isinstance(experts, int):
            return self.dequantize_packed(tensors, dtype)
        matrices = [{name: t[i] for name, t in tensors.items()} for i in range(len(tensors["weight"]))]
        return torch.stack([self.dequantize_packed(matrix, dtype) for matrix in matrices])

    def dequantize_packed(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Dequantizes one matrix from its packed tensors, by the kernel of the backend: [N, K] in dtype."""
        arguments = self.kernel_arguments()._replace(**tensors)
        return kernel_namespace(self.backend).dequantize(*arguments, self.in_features, dtype)


class LinearParams(WeightMatrix):
    """A weight W, and what is applied to y = x W^T, in this order:

        bias         y + bias                          bias [N], of experts [E, N], or None
        out_scale    y * out_scale
        softcap      softcap * tanh(y / softcap)       if softcap is not 0
        clip         y, clamped to [-clip, clip]       if clip is not 0

    input_order: int32 [K], or None; GPTQ and Marlin call it perm. Column i of W multiplies x[..., input_order[i]]. With
    act-order the inputs of a quantization group are scattered; sorting the columns makes each group contiguous.
    Linear.forward permutes x before the fused norm, so conversion permutes the weight of this norm, too.
    max_kernel_tokens: the most tokens for which the kernels of the backend compute y. Plain PyTorch takes more.
    aten_weight: W for PyTorch's own kernels, or None; only on a CPU without a C++ compiler."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, n_experts: int | None = None,
        out_scale: float = 1.0, softcap: float = 0.0, clip: float = 0.0,
    ):
        super().__init__(in_features, out_features, n_experts)
        self.out_scale, self.softcap, self.clip = out_scale, softcap, clip
        self.max_kernel_tokens = 0
        self.aten_weight: AtenInt8 | AtenInt4 | None = None
        self.register_buffer("input_order", None)
        self.bias = nn.Parameter(torch.empty(self.weight.shape[:-1]), requires_grad=False) if bias else None


class NormParams(nn.Module):
    """The parameters of an RMSNorm: weight [dim]; eps, which is added to the mean square; and backend, as in
    WeightMatrix."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.backend = "torch"
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)


class AttentionParams(nn.Module):
    """The options of attention. The default of an option means that attention leaves it out.

    n_heads: H, the heads of queries.
    scale: multiplies the scores.
    window: how many tokens a token sees, including itself. 0 means all.
    softcap: scores, after scale, become softcap * tanh(score / softcap).
    q_norm, k_norm: applied before RoPE. A weight of D elements norms each head, a wider weight all heads together.
    sinks: [H], the scores of one more key, whose value is zero."""

    def __init__(
        self, n_heads: int, scale: float, window: int = 0, softcap: float = 0.0, q_norm: NormParams | None = None,
        k_norm: NormParams | None = None, sinks: Tensor | None = None,
    ):
        super().__init__()
        self.n_heads, self.scale, self.window, self.softcap = n_heads, scale, window, softcap
        self.q_norm, self.k_norm, self.sinks = q_norm, k_norm, sinks

    def kernel_arguments(self) -> dict[str, int | float | Tensor | None]:
        """The options as a kernel takes them, by the names in kernels/schema.py: ATTENTION."""
        q_norm_weight = k_norm_weight = None
        eps = 0.0
        if self.q_norm is not None:
            q_norm_weight, k_norm_weight, eps = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        return {
            "n_heads": self.n_heads, "scale": self.scale, "window": self.window, "softcap": self.softcap,
            "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight, "eps": eps, "sinks": self.sinks,
        }


class LayerCache(NamedTuple):
    """What attention reads besides weights: the keys and values of earlier tokens, and the tables of RoPE and ALiBi.
    The tables are computed once, on the cache's device and for all its positions."""

    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]
    rope: Tensor  # [S, D/2, 2] float32: cos and sin of the angles of every position
    alibi_slopes: Tensor | None = None  # [H] float32: slope * (position of key - position of query) is added to scores

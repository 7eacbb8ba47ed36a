"""The attributes of a model's layers that the operations read, and the KV cache of a layer.

model.py has the layers themselves. Tests and benchmarks pass others with these attributes.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.formats import Tensors, WeightFormat


class MatrixLayer(Protocol):
    """A weight W [N, K], or one for each expert [E, N, K]."""

    out_features: int  # N
    in_features: int  # K
    n_experts: int | None  # E; None: W is one matrix
    weight: Tensor  # W, or what its format stores in its place
    scales: Tensor | None  # of a quantized W
    zeros: Tensor | None  # of a quantized W
    format: WeightFormat  # how W is stored
    backend: str  # for which it is packed: "cpu" or "triton". "torch": as in the checkpoint
    is_embedding: bool  # whether a step reads only a few of its rows, as of an embedding

    def tensors(self) -> Tensors:
        """weight, scales and zeros by name, without those that are None."""

    def set_tensor(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """Replaces weight, scales, zeros or bias."""


class LinearLayer(MatrixLayer, Protocol):
    """A weight, and what is applied to its products."""

    bias: Tensor | None  # [N] or [E, N]
    scale: float  # the product is multiplied by it
    softcap: float  # if not 0, the product then becomes softcap * tanh(product / softcap)
    clip: float  # if not 0, the product is then clamped to -clip ... clip
    max_tokens: int  # for which the backend's kernels are faster than plain PyTorch

    def dequantized_weight(self, dtype: torch.dtype, experts=slice(None)) -> Tensor:
        """W in dtype. For experts: the matrices that experts selects."""


class NormLayer(Protocol):
    """An RMSNorm."""

    weight: Tensor
    eps: float


class AttentionLayer(Protocol):
    n_heads: int  # H
    q_norm: NormLayer | None  # applied before RoPE to every head, or to all heads together if it is so wide
    k_norm: NormLayer | None
    window: int  # how many tokens a token sees, itself included; 0: all
    scale: float  # the scores are multiplied by it
    softcap: float  # if not 0, scores then become softcap * tanh(score / softcap)
    sinks: Tensor | None  # [H]: scores of a key whose value is zero
    backend: str


class LayerCache(NamedTuple):
    """The keys and values of a layer, and the tables of its positions: what attention reads besides weights."""

    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]
    rope: Tensor  # [S, D/2, 2]: cos and sin of every position's angles, float32
    alibi_slopes: Tensor | None = None  # [H], float32: slope * (key's position - query's) is added to the scores

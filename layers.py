"""The layers that hold the weights of a model. Each layer is a class of kernels/params.py with a forward.

    Linear         y = x W^T, with W in the format of the checkpoint (kernels/formats/)
    ExpertsGateUp, ExpertsDown    Linear with a W for each expert, for the experts that the router chose
    Embedding      a row of W for every token
    RMSNorm        x / rms(x) * weight

A forward calls an operation of kernels/ops.py, which runs on the kernels of the layer's backend or in plain PyTorch.
The weights themselves are declared in kernels/params.py, because kernels/ops.py, which forward calls, needs these
classes. model.py composes the layers.
"""

import torch
from torch import Tensor

import kernels
from kernels.params import LinearParams, NormParams, WeightMatrix


class Linear(LinearParams):
    """y = x W^T [+ bias]. norm, activation and residual are arguments of forward, since kernels fuse them."""

    def forward(
        self, x: Tensor, norm: NormParams | None = None, residual: Tensor | None = None,
        activation: str | None = None, out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [..., K] -> [..., N], or [..., N / 2] with a gated activation. kernels/ops.py: fused_linear describes the
        arguments."""
        if self.input_order is not None:
            x = kernels.permute_inputs(x, self.input_order, self.backend)
        return kernels.fused_linear(x, self, norm, residual, activation, out_dtype)


class ExpertsGateUp(Linear):
    """The gate and up projections of all experts."""

    def forward(
        self, x: Tensor, topk_ids: Tensor, norm: NormParams | None = None, activation: str | None = None
    ) -> Tensor:
        """x [B, T, dim], topk_ids [B, T, top_k] -> the product of every token with each of its experts:
        [B, T, top_k, F]."""
        return kernels.experts_gate_up(x, self, topk_ids, norm, activation)


class ExpertsDown(Linear):
    """The down projections of all experts."""

    def forward(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """hidden [B, T, top_k, F] -> the weighted sum over the experts of each token: [B, T, dim]."""
        return kernels.experts_down(hidden, self, topk_ids, topk_weights, residual)


class Embedding(WeightMatrix):
    """Looks up a row of W [V, dim] for every token."""

    is_embedding = True

    def forward(self, tokens: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """tokens [B, T] -> the rows of tokens, times scale: [B, T, dim] in dtype."""
        return kernels.embed(tokens, self, scale, dtype)


class RMSNorm(NormParams):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[residual +] x / rms(x) * weight."""
        return kernels.rms_norm(x, self, residual)

"""The experts of a mixture.

    route                          the router's choice of experts
    ExpertsGateUp, ExpertsDown     matmuls with the W of each expert that the router chose
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.schema import Epilogue
from layers.backend import Backend, contiguous, count_tokens
from layers.linear import LinearBase, RMSNorm, activate, norm_arguments


def route(
    logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int, backend: Backend
) -> tuple[Tensor, Tensor]:
    """float32 logits [..., E] of the router -> (topk_weights, topk_ids), both [..., top_k]. The weights are softmax
    probabilities.

    norm_topk_prob: scales the weights to sum to one.
    n_shared_experts: every token also uses these experts, with ids from E on. Then logits are [..., E + 1], the weight
    of each shared expert is the sigmoid of the last logit, and the results are [..., top_k + n_shared_experts]."""
    kernel = backend.kernel_for("route", count_tokens(logits))
    if kernel is None:
        return route_torch(logits, top_k, norm_topk_prob, n_shared_experts)
    return kernel(
        contiguous(logits), top_k=top_k, norm_topk_prob=norm_topk_prob, n_shared_experts=n_shared_experts
    )


def route_torch(logits: Tensor, top_k: int, norm_topk_prob: bool, n_shared_experts: int = 0) -> tuple[Tensor, Tensor]:
    n_experts = logits.shape[-1] - (1 if n_shared_experts else 0)
    topk_weights, topk_ids = F.softmax(logits[..., :n_experts], dim=-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    if n_shared_experts:
        shared_ids = torch.arange(n_experts, n_experts + n_shared_experts, device=logits.device)
        shared_ids = shared_ids.expand(*topk_ids.shape[:-1], n_shared_experts)
        shared_weights = logits[..., n_experts:].sigmoid().expand(*topk_ids.shape[:-1], n_shared_experts)
        topk_ids, topk_weights = torch.cat([topk_ids, shared_ids], -1), torch.cat([topk_weights, shared_weights], -1)
    return topk_weights, topk_ids


class ExpertsBase(LinearBase):
    """A W and a bias for each expert: [E, N, K] and [E, N]."""

    def matmul(self, x: Tensor, expert_ids: Tensor, query_len: int) -> Tensor:
        """Row i of x [M, K] times W of expert expert_ids[i], plus its bias, in PyTorch: [M, N]. query_len: the number
        of new tokens of a sequence."""
        if not torch.compiler.is_compiling():
            return self.loop_over_experts(x, expert_ids)
        if query_len == 1:
            return self.gather_experts(x, expert_ids)
        return torch.compiler.disable(self.loop_over_experts)(x, expert_ids)

    def loop_over_experts(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """One matmul for each expert that occurs in expert_ids. The host waits for the device to read expert_ids."""
        y = x.new_empty(len(x), self.out_features)
        for e in expert_ids.unique().tolist():
            rows = torch.where(expert_ids == e)[0]
            y[rows] = F.linear(x[rows], self.dequantize(x.dtype, e), None if self.bias is None else self.bias[e])
        return y

    def gather_experts(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """One matrix for each row, for the few rows of a compiled decode step. torch.compile fuses gather,
        dequantization and matmul into one loop. Plain PyTorch would copy the weights of the experts."""
        y = (self.dequantize_experts(expert_ids, x.dtype).float() * x[:, None].float()).sum(-1)
        return (y if self.bias is None else y + self.bias[expert_ids].float()).to(x.dtype)

    def dequantize_experts(self, expert_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The W of each of expert_ids [M]: [M, N, K] in dtype."""
        tensors = {name: t[expert_ids] for name, t in self.tensors().items()}
        if not self.is_packed:
            return self.format.dequantize(tensors, dtype)
        matrices = [{name: t[i] for name, t in tensors.items()} for i in range(len(expert_ids))]
        return torch.stack([self.dequantize_packed(matrix, dtype) for matrix in matrices])


class ExpertsGateUp(ExpertsBase):
    """The gate and up projections of all experts."""

    def forward(self, x: Tensor, *, topk_ids: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """activation(norm(x) W^T + bias) for each expert of every token: x [B, T, dim], topk_ids [B, T, top_k] ->
        [B, T, top_k, F]."""
        kernel = self.backend.kernel_for("experts_gate_up", count_tokens(x))
        if kernel is None:
            return self.forward_torch(x, topk_ids, norm)
        fused = self.epilogue if self.can_fuse_activation() else Epilogue()
        y = kernel(
            contiguous(x), **self.kernel_arguments(), bias=self.bias, topk_ids=contiguous(topk_ids),
            **norm_arguments(norm), activation=fused.activation, gated=fused.gated,
        )
        return y if fused == self.epilogue else self.apply_activation(y)

    def forward_torch(self, x: Tensor, topk_ids: Tensor, norm: RMSNorm | None) -> Tensor:
        """Defines what the kernel computes."""
        if norm is not None:
            x = norm(x)
        repeated = x[..., None, :].expand(*topk_ids.shape, x.shape[-1])  # [B, T, top_k, dim]
        y = self.matmul(repeated.flatten(0, -2), topk_ids.flatten(), query_len=x.shape[-2])
        return self.apply_activation(y.view(*topk_ids.shape, self.out_features))

    def apply_activation(self, y: Tensor) -> Tensor:
        activation, gated = self.epilogue.activation, self.epilogue.gated
        return y if activation is None else activate(y, activation, gated, self.backend)


class ExpertsDown(ExpertsBase):
    """The down projections of all experts."""

    def forward(
        self, hidden: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """The sum of topk_weights * (hidden W^T + bias) over the experts of each token [+ residual]:
        hidden [B, T, top_k, F], topk_ids and topk_weights [B, T, top_k] -> [B, T, dim]."""
        kernel = self.backend.kernel_for("experts_down", count_tokens(topk_ids))
        if kernel is not None:
            return kernel(
                contiguous(hidden), **self.kernel_arguments(), bias=self.bias, topk_ids=contiguous(topk_ids),
                topk_weights=contiguous(topk_weights), residual=contiguous(residual),
            )
        y = self.matmul(hidden.flatten(0, -2), topk_ids.flatten(), query_len=hidden.shape[-3])
        y = y.view(*topk_ids.shape, self.out_features) * topk_weights[..., None].to(y.dtype)
        y = y.sum(-2)
        return y if residual is None else residual + y

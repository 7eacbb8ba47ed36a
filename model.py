"""The model: one Transformer for every supported family, dense or mixture of experts, made of kernels' leaf operations.

    Transformer       embedding, blocks, head: forward(tokens, positions, kv_cache) -> logits
    TransformerBlock  the only place where a block is composed, for prefill, decode and verification, on any device
    KVCache           the keys and values of earlier tokens; made for so many rows and positions, and passed in
    Linear            y = x W^T, W in whatever format the checkpoint has (kernels/formats.py)

Letters in the shape comments: B rows, T new tokens, S cache length, H query heads, G key/value heads, D head_dim,
F feed-forward width, E experts, K experts a token uses, V vocabulary. Nothing here is run from the command line; see
generate.py.
"""

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from config import ModelConfig, UsageError
from kernels.formats import Dense, Format, Tensors


class Transformer(nn.Module):
    """tokens -> logits. Its weights are whatever state_dict is loaded."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # from_pretrained, since nn.Embedding's own random numbers import PyTorch's compiler: a second and 150 MB
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)

    def forward(self, tokens: Tensor, positions: Tensor, kv_cache: "KVCache") -> Tensor:
        """tokens [B, T], the first of each row at positions [B] and the others right after it -> float32 logits
        [B, T, V]. Their keys and values go into kv_cache, which must hold those of everything before them."""
        return self.logits(self.hidden(tokens, positions, kv_cache))

    def hidden(self, tokens: Tensor, positions: Tensor, kv_cache: "KVCache") -> Tensor:
        """forward without the head: [B, T, dim]."""
        x = self.embed(tokens)
        for layer, cache in zip(self.layers, kv_cache.layers, strict=True):
            x = layer(x, positions, cache)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, dim], by the kernels of the head's backend, which is that of the whole model."""
        return kernels.embed(tokens, self.tok_embeddings.weight, self.output.backend)

    def logits(self, x: Tensor) -> Tensor:
        """The head: hidden [..., dim] -> float32 logits [..., V]."""
        return self.output(x, norm=self.norm, out_dtype=torch.float32)

    def linears(self) -> Iterator[tuple[str, "Linear"]]:
        """The layers that quantization rewrites, by name: all but the routers."""
        for name, module in self.named_modules():
            if isinstance(module, Linear) and not name.endswith(".router"):
                yield name, module

    @property
    def format(self) -> Format:
        """The format of the linears."""
        return self.layers[0].attention.qkv_proj.format

    def uses_kernels(self, batch: int, n_tokens: int) -> bool:
        """Whether linears and attention of a step of n_tokens in each of batch rows are kernels, so that it can be
        recorded."""
        backends = {module.backend for module in self.modules() if isinstance(module, Linear)}
        if len(backends) > 1:
            return False
        attention = self.layers[0].attention
        return kernels.attend_fits(*backends, batch, n_tokens, attention.n_heads // attention.n_kv_heads)

    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all but the embedding's other rows and the idle experts."""
        total = 0
        for name, tensor in self.state_dict().items():
            if name.startswith("tok_embeddings"):
                continue
            of_experts = self.config.moe and ".feed_forward." in name and ".router." not in name
            used = self.config.moe.top_k / self.config.moe.n_experts if of_experts else 1
            total += tensor.nbytes * used
        return round(total)


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoE(config) if config.moe else FeedForward(config)

    def forward(self, x: Tensor, positions: Tensor, cache: "LayerCache") -> Tensor:
        """x [B, T, dim] -> the same."""
        # x = x + attention(norm(x))
        # x = x + feed_forward(norm(x))
        # The norm and the residual x are passed in: the first product of each half fuses the one, the last the other.
        x = self.attention(x, positions, cache, norm=self.attention_norm, residual=x)
        return self.feed_forward(x, norm=self.ffn_norm, residual=x)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, with grouped key/value heads and RoPE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.window = config.sliding_window or 0
        self.qkv_proj = Linear(config.dim, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, config.qkv_bias)
        self.o_proj = Linear(self.n_heads * self.head_dim, config.dim, config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, positions: Tensor, cache: "LayerCache", norm: "RMSNorm", residual: Tensor) -> Tensor:
        qkv = self.qkv_proj(x, norm=norm)  # [B, T, (H + 2 G) D]
        y = kernels.attend(
            qkv, cache, positions, self.n_heads, self.qkv_proj.backend, self.window, self.q_norm, self.k_norm
        )  # [B, T, H D]
        return self.o_proj(y, residual=residual)


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), with gate and up one above the other in one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.dim, 2 * config.ffn_dim, config.ffn_bias)
        self.down_proj = Linear(config.ffn_dim, config.dim, config.ffn_bias)

    def forward(self, x: Tensor, norm: "RMSNorm", residual: Tensor) -> Tensor:
        hidden = self.gate_up_proj(x, norm=norm, activation="silu")  # [B, T, F]
        return self.down_proj(hidden, residual=residual)


class MoE(nn.Module):
    """The top_k best experts' feed-forwards, weighted by the router's softmax. Sources: Mixtral (arXiv:2401.04088) and
    Qwen3, which differ only in whether the weights of the chosen are made to sum to one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.moe = config.moe
        self.router = Linear(config.dim, config.moe.n_experts)
        self.gate_up_proj = ExpertsGateUp(config.dim, 2 * config.ffn_dim, n_experts=config.moe.n_experts)
        self.down_proj = ExpertsDown(config.ffn_dim, config.dim, n_experts=config.moe.n_experts)

    def forward(self, x: Tensor, norm: "RMSNorm", residual: Tensor) -> Tensor:
        logits = self.router(x, norm=norm, out_dtype=torch.float32)  # [B, T, E]
        topk_weights, topk_ids = kernels.route(
            logits, self.moe.top_k, self.moe.norm_topk_prob, self.router.backend
        )  # [B, T, K]
        hidden = self.gate_up_proj(x, topk_ids, norm=norm, activation="silu")  # [B, T, K, F]
        return self.down_proj(hidden, topk_ids, topk_weights, residual=residual)


class Linear(nn.Module):
    """y = x W^T [+ bias], or a stack of experts' matrices [E, N, K].

    format: how W is stored (kernels/formats.py). backend: whose kernels read it, in whose layout its tensors are
    packed; "torch" is plain PyTorch and the checkpoint's layout."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, n_experts: int | None = None):
        super().__init__()
        self.in_features, self.out_features, self.n_experts = in_features, out_features, n_experts
        self.format: Format = Dense()
        self.backend = "torch"
        shape = (out_features, in_features) if n_experts is None else (n_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_buffer("scales", None)
        self.register_buffer("zeros", None)

    def forward(self, x: Tensor, norm=None, residual=None, activation=None, out_dtype=None) -> Tensor:
        return kernels.linear(x, self, norm, residual, activation, out_dtype)

    def tensors(self) -> Tensors:
        """What W is stored as, by name."""
        named = {"weight": self.weight, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def set_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Puts tensor in place of the one called name; returns it as it is kept."""
        if name in ("weight", "bias"):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(self, name, tensor)
        return tensor

    def set_format(self, format: Format):
        """Makes room for W in another format; what it was is lost."""
        for name, tensor in format.empty(self.weight.shape, self.weight.dtype, self.weight.device).items():
            self.set_tensor(name, tensor)
        self.format = format

    def matrix(self, dtype: torch.dtype, experts=slice(None)) -> Tensor:
        """W in dtype; of the experts in experts (an index, or a tensor of them) alone."""
        return kernels.dequantize(self, dtype, experts)


class ExpertsGateUp(Linear):
    """The gate and up projections of all experts."""

    def forward(self, x: Tensor, topk_ids: Tensor, norm=None, activation=None) -> Tensor:
        """x [B, T, dim] -> what each token's experts make of it: [B, T, K, F]."""
        return kernels.experts_gate_up(x, self, topk_ids, norm, activation)


class ExpertsDown(Linear):
    """The down projections of all experts."""

    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, residual=None) -> Tensor:
        """hidden [B, T, K, F] -> the weighted sum over each token's experts: [B, T, dim]."""
        return kernels.experts_down(hidden, self, topk_ids, topk_weights, residual)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


# ---- Cache and positions --------------------------------------------------------------------------------------------


class LayerCache(NamedTuple):
    """What one layer's attention needs besides its weights."""

    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]
    rope: Tensor  # [S, D/2, 2]: cos and sin of every position's angles, float32


class KVCache:
    """Keys and values for batch_size rows of up to length tokens. It does not know how many it holds: every step says
    at which position of each row its tokens go."""

    def __init__(self, model: Transformer, batch_size: int, length: int):
        """On the device and in the dtype of model's weights. Raises UsageError if model was not made for so many
        positions."""
        if length > model.config.max_seq_len:
            raise UsageError(f"{length} tokens do not fit the model's context of {model.config.max_seq_len}")
        self.batch_size, self.length = batch_size, length
        weight = model.tok_embeddings.weight
        rope = rope_table(model.config, length).to(weight.device)
        self.layers = []
        for layer in model.layers:
            shape = (batch_size, layer.attention.n_kv_heads, length, layer.attention.head_dim)
            self.layers.append(LayerCache(weight.new_zeros(shape), weight.new_zeros(shape), rope))

    def prefix(self, n: int) -> "KVCache":
        """The same cache as if it had n positions: attention in plain PyTorch looks at every position that there is."""
        view = copy.copy(self)
        view.length = n
        view.layers = [LayerCache(c.k[:, :, :n], c.v[:, :, :n], c.rope[:n]) for c in self.layers]
        return view

    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token of every row takes."""
        return sum(c.k[:, :, :1].nbytes + c.v[:, :, :1].nbytes for c in self.layers)


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """cos and sin of every position's angles: [length, D/2, 2], float32."""
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rope_frequencies(config)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of elements: [D/2], float32 (arXiv:2104.09864; llama3's scaling as published
    with Llama 3.1)."""
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    # llama3: keep what turns fast, stretch what turns less than once in the trained context, blend in between
    turns = scaling.original_max_seq_len * freqs / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / scaling.factor

"""The model: one Transformer for every supported family, with or without a mixture of experts.

    Transformer       embedding, blocks, head: forward(tokens, start_pos, kv_cache) -> logits
    TransformerBlock  the only place where a block is composed, for prefill, decode and verification, on any device

Every computation is a layer of layers/. A layer calls a kernel or plain PyTorch, so one forward runs on every device.
The maths is in layers/linear.py and layers/attention.py.

Letters in the shape comments: B batch size, T new tokens of each sequence, S cache length, H query heads, G key/value
heads, D head_dim, F feed-forward width, E experts, V vocabulary. A weight [N, K] has N outputs and K inputs.
"""

import torch
from torch import Tensor, nn

from config import ModelConfig
from formats import Unquantized, WeightFormat
from kernels.schema import AttentionParams
from layers.attention import attend
from layers.backend import Backend
from layers.experts import ExpertsDown, ExpertsGateUp, route
from layers.kv_cache import KVCache, LayerCache
from layers.linear import Linear, RMSNorm
from layers.rope import alibi_slopes
from layers.weight import Embedding, WeightMatrix, round_to_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the choices for activations (--precision)


class Transformer(nn.Module):
    """tokens -> logits. The weights are uninitialized until a state_dict is loaded."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # The file's default format, for reports. Single layers may differ: some have a format of their own, and those
        # without a kernel are dequantized at load time.
        self.weight_format: WeightFormat = Unquantized()
        self.embed_tokens: WeightMatrix = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(
            config.dim, config.vocab_size, config.head_bias, out_scale=config.logit_scale, softcap=config.logit_softcap
        )

    def forward(self, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache) -> Tensor:
        """tokens [B, T] -> float32 logits [B, T, V]. start_pos [B] is where each sequence's first new token stands.
        kv_cache must hold the keys and values of all earlier tokens. forward adds those of the new tokens."""
        return self.compute_logits(self.compute_hidden(tokens, start_pos, kv_cache))

    def compute_hidden(self, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache) -> Tensor:
        """forward without the final norm and the head: [B, T, dim]."""
        x = self.embed(tokens)
        for block, cache in zip(self.layers, kv_cache.layers, strict=True):
            x = block(x, start_pos, cache)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, dim]."""
        scale = round_to_dtype(self.config.embed_scale, self.dtype)  # as transformers rounds the scale
        return self.embed_tokens.embedding(tokens, scale, self.dtype)

    def compute_logits(self, x: Tensor) -> Tensor:
        """The final norm and the head: hidden [..., dim] -> float32 logits [..., V]."""
        return self.lm_head(x, norm=self.norm, out_dtype=torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations and of all unquantized weights."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def tie_embedding(self):
        """Makes lm_head and embed_tokens one layer under two names."""
        # The Linear stays, because its kernels choose the packing: a step reads the whole head, but only a few rows of
        # the embedding. In model.pth the weight has the embedding's name (checkpoint.py: with_tied_head).
        del self.embed_tokens  # or named_modules would yield the layer as embed_tokens
        self.embed_tokens = self.lm_head

    @property
    def is_tied(self) -> bool:
        return self.embed_tokens is self.lm_head


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()

        def norm(enabled: bool) -> RMSNorm | None:
            return RMSNorm(config.dim, config.norm_eps) if enabled else None

        self.pre_attention_norm = norm(config.pre_norm)
        self.attention = Attention(config, layer_idx)
        self.post_attention_norm = norm(config.post_norm)
        self.pre_ffn_norm = norm(config.pre_norm)
        self.feed_forward = MoE(config) if config.moe else FeedForward(config)
        self.post_ffn_norm = norm(config.post_norm)
        self.parallel_residual = config.parallel_residual

    def forward(self, x: Tensor, start_pos: Tensor, cache: LayerCache) -> Tensor:
        """x [B, T, dim] -> [B, T, dim].

        A sublayer takes the norm before it and the residual as arguments, because the kernel of a matmul fuses both. A
        norm after a sublayer adds the residual itself. A model has only some of the norms."""
        block_input = x
        # x = x + post_attention_norm(attention(pre_attention_norm(x)))
        if self.post_attention_norm is None:
            x = self.attention(x, start_pos, cache, norm=self.pre_attention_norm, residual=x)
        else:
            y = self.attention(x, start_pos, cache, norm=self.pre_attention_norm)
            x = self.post_attention_norm(y, residual=x)
        # x = x + post_ffn_norm(feed_forward(pre_ffn_norm(ffn_input)))
        ffn_input = block_input if self.parallel_residual else x
        if self.post_ffn_norm is None:
            return self.feed_forward(ffn_input, norm=self.pre_ffn_norm, residual=x)
        return self.post_ffn_norm(self.feed_forward(ffn_input, norm=self.pre_ffn_norm), residual=x)


class Attention(nn.Module):
    """Grouped-query attention with RoPE or ALiBi. forward computes:

        q, k, v = split(qkv_proj(norm(x)))
        q, k = rope(q_norm(q)), rope(k_norm(k))
        cache[start_pos:] = k, v
        p = softmax(softcap(scale * q k^T) + slope * distance + mask)    of all keys in cache and window, and the sinks
        y = residual + o_proj(p v)

    A model has only some of the norms, softcap, slopes, window and sinks. Everything between the matmuls qkv_proj and
    o_proj is one kernel, layers/attention.py: attend."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.window = config.window(layer_idx)
        self.q_norm = self.k_norm = self.sinks = None
        if config.qk_norm:
            q_heads, k_heads = (config.n_heads, config.n_kv_heads) if config.qk_norm_across_heads else (1, 1)
            self.q_norm = RMSNorm(q_heads * self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(k_heads * self.head_dim, config.norm_eps)
        if config.sinks:
            self.sinks = nn.Parameter(torch.empty(config.n_heads), requires_grad=False)
        # Not persistent, because a checkpoint does not have it
        self.register_buffer("alibi_slopes", alibi_slopes(config.n_heads) if config.alibi else None, persistent=False)
        qkv_dim = config.q_dim + 2 * config.kv_dim
        self.qkv_proj = Linear(config.dim, qkv_dim, config.qkv_bias, clip=config.clip_qkv)
        self.o_proj = Linear(config.q_dim, config.dim, config.o_proj_bias, out_scale=config.residual_scale)

    def forward(
        self, x: Tensor, start_pos: Tensor, cache: LayerCache, *, norm: RMSNorm | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        qkv = self.qkv_proj(x, norm=norm)  # [B, T, (H + 2 G) D]
        y = attend(qkv, self.attention_params(), cache, start_pos, self.backend)  # [B, T, H D]
        return self.o_proj(y, residual=residual)

    def attention_params(self) -> AttentionParams:
        """Built in each forward, because loading, sharding and Module.to replace the tensors. Replays skip it."""
        params = AttentionParams(
            self.n_heads, self.scale, self.window, self.softcap, sinks=self.sinks, alibi_slopes=self.alibi_slopes
        )
        if self.q_norm is None:
            return params
        q_norm, k_norm = self.q_norm, self.k_norm
        return params._replace(q_norm_weight=q_norm.weight, k_norm_weight=k_norm.weight, eps=q_norm.eps)

    @property
    def backend(self) -> Backend:
        return self.qkv_proj.backend


class FeedForward(nn.Module):
    """down(activation(gate x) * up x). gate_up_proj stacks gate above up: 2 F outputs. Without a gate:
    down(activation(up x)). Then gate_up_proj is up alone: F outputs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(
            config.dim, sum(config.gate_up_dims), config.ffn_bias, activation=config.activation, gated=config.gated
        )
        self.down_proj = Linear(config.ffn_dim, config.dim, config.ffn_bias, out_scale=config.residual_scale)

    def forward(self, x: Tensor, *, norm: RMSNorm | None, residual: Tensor | None = None) -> Tensor:
        hidden = self.gate_up_proj(x, norm=norm)  # [B, T, F]
        return self.down_proj(hidden, residual=residual)


class MoE(nn.Module):
    """A mixture of experts (Mixtral, arXiv:2401.04088). The router chooses top_k experts for each token, and each is a
    feed-forward. The softmax of the router's logits weights the sum of their outputs. Every token also uses the shared
    experts (Qwen2-MoE), whose ids are the highest.

    norm_topk_prob: the chosen weights are scaled to sum to one, as Mixtral's always are."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.top_k, self.norm_topk_prob, self.n_shared_experts = moe.top_k, moe.norm_topk_prob, moe.n_shared_experts
        n_experts, bias = moe.n_experts + moe.n_shared_experts, moe.bias
        self.router = Linear(config.dim, moe.n_experts + (1 if moe.n_shared_experts else 0), bias)
        self.gate_up_proj = ExpertsGateUp(
            config.dim, sum(config.gate_up_dims), bias, n_experts, activation=config.activation, gated=config.gated
        )
        self.down_proj = ExpertsDown(config.ffn_dim, config.dim, bias, n_experts)

    def forward(self, x: Tensor, *, norm: RMSNorm | None, residual: Tensor | None = None) -> Tensor:
        # Both matmuls take the norm, because their kernels fuse it. Plain PyTorch computes it twice, at little cost.
        logits = self.router(x, norm=norm, out_dtype=torch.float32)  # [B, T, E]
        topk_weights, topk_ids = route(
            logits, self.top_k, self.norm_topk_prob, self.n_shared_experts, self.router.backend
        )  # [B, T, top_k]
        hidden = self.gate_up_proj(x, topk_ids=topk_ids, norm=norm)  # [B, T, top_k, F]
        return self.down_proj(hidden, topk_ids=topk_ids, topk_weights=topk_weights, residual=residual)

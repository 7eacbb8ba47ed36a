"""The model: one Transformer for every supported family, with or without a mixture of experts.

    Transformer       embedding, blocks, head: forward(tokens, start_pos, kv_cache) -> logits
    TransformerBlock  the only place where a block is composed, for prefill, decode and verification, on any device
    KVCache           the keys, values and ids of earlier tokens, and RoPE's tables; allocated once, passed in

Every computation is a layer of layers/, which calls a kernel or plain PyTorch, so one forward runs on every device. To
read the maths, read layers/linear.py and layers/attention.py.

Letters in the shape comments: B batch size, T new tokens of each sequence, S cache length, H query heads, G key/value
heads, D head_dim, F feed-forward width, E experts, V vocabulary. A weight [N, K] has N outputs and K inputs.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from config import ModelConfig
from formats import Unquantized, WeightFormat
from kernels.schema import AttentionParams
from layers.attention import LayerCache, attend
from layers.backend import Backend
from layers.experts import ExpertsDown, ExpertsGateUp, route
from layers.linear import Linear, LinearBase, RMSNorm
from layers.packing import pack_weights
from layers.rope import alibi_slopes, rope_tables
from layers.weight import Embedding, WeightMatrix
from utils.errors import UsageError
from utils.machine import check_memory

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the choices for activations (--precision)


class Transformer(nn.Module):
    """tokens -> logits. The weights are uninitialized until a state_dict is loaded."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # The format of most linear layers in the checkpoint, for reports. A layer's own format may be another one, also
        # because weights without kernels are dequantized while loading (layers/packing.py: dequantize_weights).
        self.weight_format: WeightFormat = Unquantized()
        self.embed_tokens: WeightMatrix = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(
            config.dim, config.vocab_size, config.head_bias, out_scale=config.logit_scale, softcap=config.logit_softcap
        )

    def forward(self, tokens: Tensor, start_pos: Tensor, kv_cache: "KVCache") -> Tensor:
        """tokens [B, T] -> float32 logits [B, T, V]. start_pos [B] is where each sequence's first new token stands.
        kv_cache must hold the keys and values of all earlier tokens. forward adds those of the new tokens."""
        return self.compute_logits(self.compute_hidden(tokens, start_pos, kv_cache))

    def compute_hidden(self, tokens: Tensor, start_pos: Tensor, kv_cache: "KVCache") -> Tensor:
        """forward without the final norm and the head: [B, T, dim]."""
        x = self.embed(tokens)
        for block, cache in zip(self.layers, kv_cache.layers, strict=True):
            x = block(x, start_pos, cache)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, dim]."""
        scale = round_to_dtype(self.config.embed_scale, self.dtype)  # as transformers rounds the scale
        return self.embed_tokens.lookup(tokens, scale, self.dtype)

    def compute_logits(self, x: Tensor) -> Tensor:
        """The final norm and the head: hidden [..., dim] -> float32 logits [..., V]."""
        return self.lm_head(x, norm=self.norm, out_dtype=torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations, and of all weights that are not quantized."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def tie_embedding(self):
        """Makes lm_head and embed_tokens one layer under two names."""
        # The head keeps the weight, and its kernels choose the packing, since a step reads the whole head but only a
        # few rows of the embedding. In model.pth the weight has the embedding's name (checkpoint.py: with_tied_head).
        del self.embed_tokens  # otherwise named_modules would find the layer first as embed_tokens
        self.embed_tokens = self.lm_head

    @property
    def is_tied(self) -> bool:
        return self.embed_tokens is self.lm_head

    def pack_weights(self, is_mmapped: bool = False):
        """Switches to the kernels for the model's device: see layers/packing.py: pack_weights."""
        matrices = [module for module in self.modules() if isinstance(module, WeightMatrix)]
        pack_weights(matrices, self.dtype, is_mmapped)
        for module in self.modules():
            # A norm has no packed form. A norm uses the head's backend: if the head has kernels, so do norms.
            if isinstance(module, RMSNorm):
                module.backend = self.lm_head.backend

    def quantizable_linears(self) -> Iterator[tuple[str, LinearBase]]:
        """Yields (name, layer) for every linear layer that quantization rewrites: all but the routers."""
        for name, module in self.named_modules():
            if isinstance(module, LinearBase) and not name.endswith(".router"):
                yield name, module

    def has_kernels_for(self, batch_size: int, n_new_tokens: int) -> bool:
        """Whether there are kernels for all operations of a step with n_new_tokens in each of batch_size sequences,
        all on one backend. Then the step can be captured."""
        matrices = [module for module in self.modules() if isinstance(module, LinearBase)]
        if self.embed_tokens.format.is_quantized:  # an unquantized embedding can always be captured
            matrices.append(self.embed_tokens)
        backend = self.lm_head.backend
        attention = self.layers[0].attention  # all layers have the same numbers of heads
        heads_per_kv_head = attention.n_heads // attention.n_kv_heads
        all_on_one_backend = all(matrix.backend.name == backend.name for matrix in matrices)
        return all_on_one_backend and backend.supports_step(
            batch_size, n_new_tokens, heads_per_kv_head, self.config.activation
        )

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values for one token of one sequence, on this rank."""
        n_elements = sum(2 * block.attention.n_kv_heads * block.attention.head_dim for block in self.layers)
        return n_elements * self.dtype.itemsize


def round_to_dtype(value: float, dtype: torch.dtype) -> float:
    """Rounds a positive number to the nearest number of dtype, ties to even. Without a tensor, since a captured step
    cannot make one."""
    _, exponent = math.frexp(value)  # value is in [2^(exponent - 1), 2^exponent)
    ulp = math.ldexp(torch.finfo(dtype).eps, exponent - 1)  # the distance between two numbers of dtype there
    return round(value / ulp) * ulp


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
        self.is_parallel = config.parallel_blocks

    def forward(self, x: Tensor, start_pos: Tensor, cache: LayerCache) -> Tensor:
        """x [B, T, dim] -> [B, T, dim].

        The kernel of a matmul also computes the norm before it and the addition after it, so a sublayer takes both as
        arguments. A norm after a sublayer takes the addition. A model has only some of the norms."""
        block_input = x
        # x = x + post_attention_norm(attention(pre_attention_norm(x)))
        if self.post_attention_norm is None:
            x = self.attention(x, start_pos, cache, norm=self.pre_attention_norm, residual=x)
        else:
            y = self.attention(x, start_pos, cache, norm=self.pre_attention_norm)
            x = self.post_attention_norm(y, residual=x)
        # x = x + post_ffn_norm(feed_forward(pre_ffn_norm(ffn_input)))
        ffn_input = block_input if self.is_parallel else x
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
        # Not persistent, since a checkpoint does not have it. Loading moves it to the device.
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
        """Made anew for each step, because loading replaces the tensors, and tensor parallelism also n_heads."""
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
    """A mixture of experts (Mixtral, arXiv:2401.04088). For each token the router chooses top_k experts, each a
    feed-forward. The sum of their outputs is weighted by the softmax of the router's logits. norm_topk_prob: the chosen
    weights are scaled to sum to one, as Mixtral's always are. Every token uses the shared experts (Qwen2-MoE), whose
    ids are the highest."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.top_k, self.norm_topk_prob, self.n_shared_experts = moe.top_k, moe.norm_topk_prob, moe.n_shared_experts
        n_experts, bias = moe.n_experts + moe.n_shared_experts, moe.bias
        self.router = Linear(config.dim, moe.n_experts + (1 if moe.n_shared_experts else 0), bias)
        self.gate_up_proj = ExpertsGateUp(
            config.dim, sum(config.gate_up_dims), bias, n_experts, config.activation, config.gated
        )
        self.down_proj = ExpertsDown(config.ffn_dim, config.dim, bias, n_experts)

    def forward(self, x: Tensor, *, norm: RMSNorm | None, residual: Tensor | None = None) -> Tensor:
        # Both matmuls take the norm, because the kernels fuse the norm with the matmul. So plain PyTorch computes the
        # norm twice, which costs little beside the experts' matmuls.
        logits = self.router(x, norm=norm, out_dtype=torch.float32)  # [B, T, E]
        topk_weights, topk_ids = route(
            logits, self.top_k, self.norm_topk_prob, self.n_shared_experts, self.router.backend
        )  # [B, T, top_k]
        hidden = self.gate_up_proj(x, topk_ids=topk_ids, norm=norm)  # [B, T, top_k, F]
        return self.down_proj(hidden, topk_ids=topk_ids, topk_weights=topk_weights, residual=residual)


# ---- KV cache -------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys, values and token ids of batch_size sequences of up to max_seq_len tokens. The cache does not count its
    tokens: every step passes the position of each sequence's first new token. Rejected draft tokens stay in the cache:
    attention and the repetition penalty read nothing beyond a sequence's last token, and later steps overwrite them.

    layers: the LayerCache of each layer.
    token_ids [B, S]: for the repetition penalty, which depends on the whole text. Steps with the penalty store the ids,
        and so do all steps of the scheduler, since a later sequence with the penalty may reuse the cached tokens."""

    def __init__(self, model: Transformer, batch_size: int, max_seq_len: int):
        """Allocates the cache on the device and in the dtype of model's weights. Raises UsageError if max_seq_len
        exceeds the model's context, and OutOfMemoryError if the device is a CPU with too little memory."""
        if max_seq_len > model.config.max_seq_len:
            raise UsageError(f"{max_seq_len} tokens do not fit the model's context of {model.config.max_seq_len}")
        if model.device.type == "cpu":
            n_bytes = batch_size * max_seq_len * model.kv_bytes_per_token()
            check_memory(n_bytes, f"the KV cache of {batch_size} x {max_seq_len} tokens")
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.device = model.device
        self.layers = []
        cos_sin_tables = rope_tables(model.config, max_seq_len, self.device)
        for block, cos_sin in zip(model.layers, cos_sin_tables, strict=True):
            shape = (batch_size, block.attention.n_kv_heads, max_seq_len, block.attention.head_dim)
            k, v = (torch.zeros(shape, dtype=model.dtype, device=self.device) for _ in range(2))
            self.layers.append(LayerCache(k, v, cos_sin))
        self.token_ids = torch.zeros(batch_size, max_seq_len, dtype=torch.long, device=self.device)

    def view_positions(self, n: int) -> "KVCache":
        """A view of the first n positions. Attention in plain PyTorch computes scores for every position of the cache,
        so a shorter view costs less."""
        view = copy.copy(self)
        view.max_seq_len = n
        view.layers = [cache._replace(k=cache.k[:, :, :n], v=cache.v[:, :, :n]) for cache in self.layers]
        view.token_ids = self.token_ids[:, :n]
        return view

    def view_sequences(self, start: int, n: int) -> "KVCache":
        """A view of n sequences, the first of which is number start."""
        if n == self.batch_size:  # always, except in a scheduler's steps
            return self
        view = copy.copy(self)
        rows = slice(start, start + n)
        view.batch_size = n
        view.layers = [cache._replace(k=cache.k[rows], v=cache.v[rows]) for cache in self.layers]
        view.token_ids = self.token_ids[rows]
        return view

    def copy_sequence(self, source: int, target: int, n: int):
        """Copies the first n tokens of sequence source to sequence target."""
        for cache in self.layers:
            cache.k[target, :, :n] = cache.k[source, :, :n]
            cache.v[target, :, :n] = cache.v[source, :, :n]
        self.token_ids[target, :n] = self.token_ids[source, :n]

    def swap_sequences(self, i: int, j: int, n: int):
        """Exchanges the first n tokens of sequences i and j."""
        for cache in self.layers:
            for tensor in (cache.k[:, :, :n], cache.v[:, :, :n]):
                tensor[[i, j]] = tensor[[j, i]]
        self.token_ids[[i, j], :n] = self.token_ids[[j, i], :n]

    def clear_sequence(self, i: int):
        for cache in self.layers:
            cache.k[i].zero_()
            cache.v[i].zero_()

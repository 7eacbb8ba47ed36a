"""The model: one Transformer for every Llama-family checkpoint, dense or mixture of experts.

    ModelConfig    what a checkpoint says of itself, read from Hugging Face's config.json field by field
    Transformer    embedding, blocks, head; a static KV cache; forward(tokens, positions) -> logits
    Linear         y = x W^T, W in 32, 16, 8 or 4 bits; kernels.py does the work

Letters in the shape comments: B rows, T new tokens, S cache length, H query heads, G key/value heads, D head_dim,
F feed-forward width, E experts, K experts a token uses. Nothing here runs from the command line; see generate.py.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels


class UsageError(ValueError):
    """What the user gave cannot work; str() is the one line that says what is wrong and what would be right."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretches RoPE's wavelengths beyond the trained context: all of them ("linear") or the long ones ("llama3")."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class MoE:
    n_experts: int
    n_active: int  # experts a token is sent to
    normalize: bool = True  # make the chosen experts' weights sum to one


@dataclass(frozen=True)
class ModelConfig:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int  # of one expert, in a MoE
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every query and key head before RoPE
    tie_embeddings: bool = False
    moe: MoE | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        """Raises UsageError for a size that no model can have."""
        for name in "dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size max_seq_len".split():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**31:
                raise UsageError(f"the model's {name} must be a positive integer, not {value!r}")
        if self.moe and any(type(n) is not int for n in (self.moe.n_experts, self.moe.n_active)):
            raise UsageError(f"the numbers of experts must be integers, not {self.moe}")
        if self.n_layers > 2**16 or (self.moe and self.moe.n_experts > 2**16):  # each is an object in memory
            raise UsageError(f"{self.n_layers} layers or {self.moe} are more than any model has")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise UsageError(
                f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}, or head_dim is odd"
            )
        if self.moe and not 0 < self.moe.n_active <= self.moe.n_experts:
            raise UsageError(f"a token cannot use {self.moe.n_active} of {self.moe.n_experts} experts")
        if self.sliding_window is not None and (
            type(self.sliding_window) is not int or not 0 < self.sliding_window < 2**31
        ):
            raise UsageError(f"sliding_window must be a positive integer, not {self.sliding_window!r}")
        kind, *numbers = asdict(self.rope_scaling).values() if self.rope_scaling else ("linear",)
        numbers += [self.norm_eps, self.rope_theta]
        if kind not in ("linear", "llama3") or not all(isinstance(x, (int, float)) and 0 < x < 1e15 for x in numbers):
            raise UsageError(f"norm_eps, rope_theta and {self.rope_scaling} must be of positive numbers, not {numbers}")
        if not all(isinstance(i, int) for i in self.eos_ids):
            raise UsageError(f"eos_ids must be token ids, not {self.eos_ids}")

    @classmethod
    def from_dict(cls, d: dict) -> "ModelConfig":
        """The inverse of dataclasses.asdict, for the config stored in model.pth."""
        try:
            d = dict(d, eos_ids=tuple(d["eos_ids"]))
            d["rope_scaling"] = RopeScaling(**d["rope_scaling"]) if d["rope_scaling"] else None
            d["moe"] = MoE(**d["moe"]) if d["moe"] else None
            return cls(**d)
        except (TypeError, KeyError) as e:
            raise UsageError(f"the checkpoint's config does not fit this version ({e}); convert it again") from None

    @classmethod
    def from_hf(cls, hf: dict, generation: dict | None = None) -> "ModelConfig":
        """From Hugging Face's config.json, old spelling (rope_theta, rope_scaling) or new (rope_parameters), and
        generation_config.json, whose end tokens are added. Raises UsageError naming what is not supported."""
        try:
            return config_from_hf(hf, generation or {})
        except (AttributeError, LookupError, TypeError) as e:
            raise UsageError(f"config.json holds something of the wrong kind ({e})") from None


# What transformers takes for a field that config.json leaves out, where the architectures differ
DEFAULTS = {
    "Llama": dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    "Mistral": dict(max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8,
                    sliding_window=4096),
    "Mixtral": dict(max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8,
                    rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
    "Qwen2": dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096),
    "Qwen3": dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096, head_dim=128),
    "Qwen3Moe": dict(max_position_embeddings=32768, num_key_value_heads=4, sliding_window=4096,
                     num_local_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
}  # fmt: skip
ARCHITECTURES = list(DEFAULTS)
# Fields that change the maths in ways this model does not follow, with the values under which they change nothing.
NEUTRAL = {
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "alibi": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
}


def config_from_hf(hf: dict, generation: dict) -> ModelConfig:
    if not isinstance(hf, dict) or not isinstance(generation, dict):
        raise UsageError("config.json and generation_config.json must each hold one object")
    names = [f"{a}ForCausalLM" for a in ARCHITECTURES]
    arch = hf.get("architectures")
    arch = (arch if isinstance(arch, str) else (arch or [None])[0]) or {
        a.lower().replace("moe", "_moe"): n for a, n in zip(ARCHITECTURES, names, strict=True)
    }.get(hf.get("model_type"))
    if arch not in names:
        raise UsageError(f"architecture {arch or hf.get('model_type')!r} is not one of {', '.join(names)}")
    hf = DEFAULTS[arch.removesuffix("ForCausalLM")] | hf
    for field, allowed in NEUTRAL.items():
        if hf.get(field) not in (None, False, *allowed):
            raise UsageError(f"config.json: {field} = {hf[field]!r} is not supported")
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UsageError(f"config.json: hidden_act = {hf['hidden_act']!r} is not supported, only silu")

    def need(*fields):
        for field in fields:
            if hf.get(field) is not None:
                return hf[field]
        raise UsageError(f"config.json: {' or '.join(fields)} is missing")

    dim, n_layers, n_heads = need("hidden_size"), need("num_hidden_layers"), need("num_attention_heads")
    head_dim = hf.get("head_dim")
    if head_dim is None:
        if not isinstance(dim, int) or not isinstance(n_heads, int) or n_heads < 1 or dim % n_heads:
            raise UsageError(f"config.json: hidden_size {dim!r} is not a multiple of num_attention_heads {n_heads!r}")
        head_dim = dim // n_heads

    # Sliding window: one rule for all layers, or none. Qwen has a switch for it and a first layer.
    window, qwen = hf.get("sliding_window") if arch != "LlamaForCausalLM" else None, arch.startswith("Qwen")
    if qwen and not hf.get("use_sliding_window"):
        window = None
    if window and arch not in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):  # whose windows are on all layers
        first, types = hf.get("max_window_layers", 28) if qwen else 0, hf.get("layer_types") or []
        if type(first) is not int or not isinstance(types, list) or type(n_layers) is not int or n_layers > 2**16:
            raise UsageError(f"config.json: max_window_layers {first!r} or layer_types {types!r} makes no sense")
        full = min(first, n_layers)  # layers before the first with a window
        kinds = types or ["full_attention"] * full + ["sliding_attention"] * (n_layers - full)
        if len(set(kinds)) > 1:
            raise UsageError("config.json: a sliding window on some layers only (layer_types) is not supported")
        window = window if kinds[:1] and kinds[0] == "sliding_attention" else None

    rope, kind = {"rope_theta": hf.get("rope_theta", 10000.0)}, "default"
    for field in ("rope_parameters", "rope_scaling"):
        rope |= (new := hf.get(field) or {})
        kind = new.get("rope_type", new.get("type", kind))
    if rope.get("partial_rotary_factor", 1) != 1 or any(isinstance(value, dict) for value in rope.values()):
        raise UsageError("config.json: rope_parameters with partial_rotary_factor or per layer type are not supported")
    if kind == "linear":
        scaling = RopeScaling("linear", rope.get("factor"))
    elif kind == "llama3":
        rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
        keys = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
        if any(not isinstance(rope.get(k), (int, float)) for k in keys):
            raise UsageError(f"config.json: rope_scaling of type llama3 needs numbers for {', '.join(keys)}")
        scaling = RopeScaling("llama3", *(rope[k] for k in keys))
    elif kind == "default":
        scaling = None
    else:
        raise UsageError(f"config.json: rope_scaling of type {kind!r} is not supported; default, linear and llama3 are")

    ffn_dim = need("moe_intermediate_size" if arch == "Qwen3MoeForCausalLM" else "intermediate_size")
    moe, bias = None, bool(hf.get("attention_bias"))
    if arch == "MixtralForCausalLM":
        moe = MoE(need("num_local_experts"), need("num_experts_per_tok"))
    elif arch == "Qwen3MoeForCausalLM":
        moe = MoE(
            need("num_experts", "num_local_experts"), need("num_experts_per_tok"), bool(hf.get("norm_topk_prob"))
        )
    ends = []
    for source in (hf, generation):
        ids = source.get("eos_token_id")
        ends += [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i not in ends]
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocab_size=need("vocab_size"),
        max_seq_len=need("max_position_embeddings"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        sliding_window=window or None,
        qkv_bias=bias or arch == "Qwen2ForCausalLM",
        out_bias=bias and arch != "Qwen2ForCausalLM",
        ffn_bias=bool(hf.get("mlp_bias")),
        qk_norm=arch.startswith("Qwen3"),
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        moe=moe,
        bos_id=hf.get("bos_token_id") if isinstance(hf.get("bos_token_id"), int) else None,
        eos_ids=tuple(ends),
    )


class Transformer(nn.Module):
    """tokens -> logits. Call setup_caches once before the first forward; weights are whatever state_dict was loaded."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Not made of random numbers, for which PyTorch would import its compiler: a second and 150 MB
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        self.stack = None  # of the layers, what kernels.layers takes

    def setup_caches(self, batch_size: int, length: int):
        """Makes the KV cache for batch_size rows of length tokens, and the RoPE table, on the weights' device.
        Raises UsageError if the model was not made for so many positions."""
        if length > self.config.max_seq_len:
            raise UsageError(f"{length} tokens do not fit the model's context of {self.config.max_seq_len}")
        weight = self.tok_embeddings.weight
        for layer in self.layers:
            layer.attention.setup_cache(batch_size, length, weight)
        self.caches = [[getattr(layer.attention, name) for layer in self.layers] for name in ("k_cache", "v_cache")]
        self.rope = rope_table(self.config, length).to(weight.device)  # [S, D/2, 2] float32
        self.cache_positions = torch.arange(length, device=weight.device)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens [B, T] at positions [T] (the same in every row, consecutive) -> float32 logits [B, T, vocab_size].
        Their keys and values go into the cache; everything before them must be in it."""
        return self.logits(self.hidden(tokens, positions))

    def hidden(self, tokens: Tensor, positions: Tensor, kv_len: int | None = None, block=None) -> Tensor:
        """forward without the head: [B, T, dim]. kv_len, where the caller knows it, is the number of cache entries
        in use, the new tokens included: only they are looked at. block stands in for TransformerBlock.forward."""
        x, rope, mask = self.tok_embeddings(tokens), self.rope[positions], None
        if self.layers[0].attention.is_fast(tokens):
            if self.stack and block is None:
                return kernels.layers(x, self, positions, rope)
        else:  # [T, S] True: may look
            if kv_len is None and block is None and tokens.device.type == "cpu":  # where to ask costs nothing
                kv_len = int(positions[-1]) + 1
            keys = self.cache_positions[:kv_len]
            mask = keys <= positions[:, None]
            if self.config.sliding_window:
                mask &= keys > positions[:, None] - self.config.sliding_window
        for layer in self.layers:
            x = (block or TransformerBlock.forward)(layer, x, positions, rope, mask, kv_len)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The head: hidden [..., dim] -> float32 logits [..., vocab_size]."""
        return self.output(x, norm=self.norm, wide=True)

    def step_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all but the embedding's other rows and the idle experts."""
        total = sum(t.nbytes for name, t in self.state_dict().items() if not name.startswith("tok_embeddings"))
        if moe := self.config.moe:
            experts = sum(t.nbytes for name, t in self.state_dict().items() if ".experts." in name)
            total -= experts * (moe.n_experts - moe.n_active) // moe.n_experts
        return total

    def cache_bytes(self, length: int, compiled: bool) -> int:
        """Bytes of keys and values that a decode step, compiled or not, reads when length tokens are in the cache."""
        attention = self.layers[0].attention
        k = attention.k_cache
        if attention.is_fast(k[:, 0, :1, 0]):
            seen = min(length, self.config.sliding_window or length)
        else:
            seen = length if k.device.type == "cpu" and not compiled else k.shape[2]
        return 2 * self.config.n_layers * k[:, :, :1].nbytes * seen


class TransformerBlock(nn.Module):
    """What a layer computes. Decode steps go through kernels.layers and its like instead, which compute the same: who
    changes a block here changes kernels.cpp and kernels_triton.py too, or runs with --kernels off."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoEFeedForward(config) if config.moe else FeedForward(config)

    def forward(self, x: Tensor, positions: Tensor, rope: Tensor, mask: Tensor | None, kv_len: int | None) -> Tensor:
        """x [B, T, dim] -> the same; each half adds what it makes of the normed x to x."""
        x = self.attention(x, self.attention_norm, positions, rope, mask, kv_len)
        return self.feed_forward(x, self.ffn_norm)


class Attention(nn.Module):
    """x + wo(softmax(q k^T / sqrt(D)) v), the keys and values of earlier tokens kept in a cache."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.window = config.sliding_window or 0
        self.wqkv = Linear(config.dim, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, config.qkv_bias)
        self.wo = Linear(self.n_heads * self.head_dim, config.dim, config.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def setup_cache(self, batch_size: int, length: int, like: Tensor):
        shape = (batch_size, self.n_kv_heads, length, self.head_dim)
        self.register_buffer("k_cache", like.new_zeros(shape), persistent=False)
        self.register_buffer("v_cache", like.new_zeros(shape), persistent=False)

    def is_fast(self, tokens: Tensor) -> bool:
        """Whether the fused kernel does tokens [B, T]: a decode step or a short run."""
        if not self.wqkv.fast or not 0 < tokens.numel() <= kernels.MAX_ROWS:
            return False
        if self.wqkv.gpu:  # the queries of a key head are in one program's memory
            return tokens.shape[1] * self.n_heads // self.n_kv_heads <= 64
        return bool(self.wo.fast)

    def forward(self, x: Tensor, norm: "RMSNorm", positions: Tensor, rope: Tensor, mask, kv_len) -> Tensor:
        if mask is None:
            return kernels.attention(x, self, norm, positions, rope)
        qkv = self.wqkv(x, norm=norm)  # [B, T, (H + 2 G) D]
        return self.wo(self.attend(qkv, positions, rope, mask, kv_len), residual=x)

    def attend(self, qkv: Tensor, positions: Tensor, rope: Tensor, mask: Tensor, kv_len: int | None) -> Tensor:
        """Queries, keys and values [B, T, (H + 2 G) D] -> [B, T, H D]; the keys and values go into the cache."""
        (B, T, _), D = qkv.shape, self.head_dim
        heads = qkv.view(B, T, -1, D)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)  # [B, T, H or G, D]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2), v.transpose(1, 2)
        self.k_cache.index_copy_(2, positions, k)
        self.v_cache.index_copy_(2, positions, v)
        k, v = self.k_cache[:, :, :kv_len], self.v_cache[:, :, :kv_len]  # [B, G, S, D]
        if T == 1:  # the heads that share keys and values as the rows of one product: several times faster
            return F.scaled_dot_product_attention(q.view(B, k.shape[1], -1, D), k, v, attn_mask=mask).reshape(B, 1, -1)
        if q.is_cuda:  # where only the slowest kernel takes fewer key heads, if in float32 or with a mask
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for t in (k, v))
        # All there is: the fastest kernels take no mask. One compiled block is for every length, so it does with one
        if not torch.compiler.is_compiling() and kv_len == T <= (self.window or T):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [B, H, T, D]
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2).reshape(B, T, -1)


class FeedForward(nn.Module):
    """x + w2(silu(w1 x) * (w3 x)), with w1 and w3 stacked in one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_dim, config.ffn_bias)
        self.w2 = Linear(config.ffn_dim, config.dim, config.ffn_bias)

    def forward(self, x: Tensor, norm: "RMSNorm") -> Tensor:
        return self.w2(self.w13(x, norm=norm, swiglu=True), residual=x)


class MoEFeedForward(nn.Module):
    """x + the n_active best experts' outputs, weighted by the router's softmax. Sources: Mixtral (arXiv:2401.04088)
    and Qwen3, which differ only in whether the chosen weights are made to sum to one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.moe = config.moe
        self.gate = Linear(config.dim, config.moe.n_experts)
        self.experts = Experts(config)

    def forward(self, x: Tensor, norm: "RMSNorm") -> Tensor:
        logits = self.gate(x, norm=norm, wide=True)  # [B, T, E] float32
        on_gpu = self.gate.gpu and kernels.fits(x, self.gate)
        share, chosen = kernels.route(logits, self.moe.n_active, self.moe.normalize, on_gpu)  # [B, T, K]
        return self.experts(x, norm, share, chosen)


class Experts(nn.Module):
    """Every expert's feed-forward, stacked."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_dim, experts=config.moe.n_experts)
        self.w2 = Linear(config.ffn_dim, config.dim, experts=config.moe.n_experts)

    def forward(self, x: Tensor, norm: "RMSNorm", share: Tensor, chosen: Tensor) -> Tensor:
        """x [B, T, dim] + the sum over each token's chosen [B, T, K] experts of share [B, T, K] times their output."""
        if kernels.fits(x, self.w13) and self.whole():
            return kernels.experts(x, self, norm, share, chosen)
        return x + self.mixture(norm(x), share, chosen)

    def whole(self) -> bool:
        """Whether kernels.experts does few rows: every weight fast, whole blocks of them."""
        return bool(self.w13.fast and self.w2.fast) and self.w2.n_in % kernels.ROWS == 0

    def mixture(self, x: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        """forward without the norm before and the addition after it."""
        share, chosen = share.to(x.dtype).flatten(0, 1), chosen.flatten(0, 1)  # [N, K]
        compute = self.grouped
        if torch.compiler.is_compiling():
            tiled = self.w13.gpu and self.w13.zeros is not None  # which dequantizes one expert at a time
            compute = self.gathered if x.shape[1] == 1 and not tiled else torch.compiler.disable(self.grouped)
        return compute(x.flatten(0, 1), share, chosen).view_as(x)

    def gathered(self, x: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        """A decode step's few rows, to be compiled: look-up, dequantization, product and sum fuse into one loop that
        reads the chosen experts' weights and keeps no copy of them. Uncompiled it would keep one."""
        gate, up = (self.w13.matrix(x.dtype, chosen).float() * x[:, None, None].float()).sum(-1).chunk(2, dim=-1)
        h = (F.silu(gate) * up).to(x.dtype)[:, :, None]  # [N, K, 1, F]
        y = (self.w2.matrix(x.dtype, chosen).float() * h.float()).sum(-1)  # [N, K, dim]
        return (y * share[..., None]).sum(1).to(x.dtype)

    def grouped(self, x: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        """Any number of rows: every expert takes its own in one go, so memory grows with the rows alone."""
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            row, slot = torch.where(chosen == e)
            gate, up = F.linear(x[row], self.w13.matrix(x.dtype, e)).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.w2.matrix(x.dtype, e))
            out.index_add_(0, row, y * share[row, slot, None])
        return out


class Linear(nn.Module):
    """y = x W^T [+ bias], or a stack of experts' matrices [experts, n_out, n_in]. kernels.py says how W may be stored;
    scales and zeros are there if it is quantized; fast is what the device's kernels take, once enabled, and gpu whether
    these are kernels_triton's."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False, experts: int | None = None):
        super().__init__()
        self.n_in, self.n_out, self.group, self.fast = n_in, n_out, n_in, None
        self.gpu = False
        self.weight = nn.Parameter(torch.empty(*([experts] if experts else []), n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.register_buffer("scales", None)
        self.register_buffer("zeros", None)

    def forward(self, x: Tensor, norm=None, residual: Tensor | None = None, swiglu=False, wide=False) -> Tensor:
        return kernels.linear(x, self, norm, residual, swiglu, wide)

    def matrix(self, dtype: torch.dtype, expert=slice(None)) -> Tensor:
        """W as numbers of dtype; of the experts in expert (an index, or a tensor of them) alone."""
        return kernels.matrix(self, dtype, expert)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of elements: [head_dim / 2], float32 (arXiv:2104.09864; llama3 scaling as
    published with Llama 3.1)."""
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if not (s := config.rope_scaling):
        return freqs
    if s.kind == "linear":
        return freqs / s.factor
    # llama3: keep what turns fast, stretch what turns less than once in the trained context, blend between
    turns = s.original_max_seq_len * freqs / (2 * math.pi)
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / s.factor


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """cos and sin of every position's angles: [length, head_dim / 2, 2], float32."""
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rope_frequencies(config)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates x [B, T, H, D] by rope [T, D/2, 2], pairing element i with i + D/2 as Hugging Face does."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = rope[:, None].unbind(-1)  # [T, 1, D/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

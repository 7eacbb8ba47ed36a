"""The families: how the config.json of each supported architecture is read.

    config = config_from_hf(json.load(open("config.json")))

To add a family, add an entry to FAMILIES; docs/add_a_model.md has an example. This file has no command line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from config import MAX_OBJECTS, ModelConfig, MoEConfig, RopeScaling, UsageError


@dataclass(frozen=True)
class Family:
    """How the config.json of one architecture is read, and how its tensors differ from Llama's."""

    model_type: str  # the value of config.json's "model_type"
    defaults: dict  # what transformers assumes for a field that config.json leaves out
    window: str = "none"  # which layers have the sliding window: "none", "all", or as "layer_types" lists them
    window_switch: bool = False  # whether the window needs use_sliding_window to be true
    full_attention_every: int | None = 0  # see read_window_layers
    ffn_dim_field: str = "intermediate_size"
    n_experts_fields: tuple[str, ...] = ()  # the first one that is there counts; (): the feed-forward is dense
    norm_topk_prob: bool | None = True  # None: as config.json's norm_topk_prob
    shared_expert: bool = False  # whether every token also uses an expert of shared_expert_intermediate_size
    experts_bias: bool = False  # whether the router and the experts have biases
    rename_fields: Callable[[dict], dict] = lambda hf: hf  # gives config.json's fields Llama's names
    handled_fields: tuple[str, ...] = ()  # those of UNSUPPORTED_FIELDS that config_overrides reads
    config_overrides: Callable[[dict], dict] = lambda hf: {}  # config.json -> more fields of ModelConfig
    norm_offset: float = 0.0  # added to the weights of norms at conversion: Gemma computes x * (1 + w)
    layer_norm: bool = False  # norms subtract the mean of x; conversion makes this mean zero
    interleaved_rope: bool = False  # RoPE rotates elements 2 i and 2 i + 1, and not i and i + half of them


def gemma(hf: dict) -> dict:
    activation = hf.get("hidden_activation") or hf["hidden_act"]
    if activation not in ("gelu", "gelu_pytorch_tanh"):  # Gemma's first config.json calls the tanh form "gelu", too
        raise UsageError(f"config.json: hidden_act or hidden_activation = {activation!r} is not supported")
    return {"embed_scale": required(hf, "hidden_size") ** 0.5, "activation": "gelu_tanh"}


def gemma2(hf: dict) -> dict:
    return gemma(hf) | {
        "post_norm": True,
        "attention_scale": required(hf, "query_pre_attn_scalar") ** -0.5,
        "attention_softcap": hf.get("attn_logit_softcapping") or 0.0,
        "logit_softcap": hf.get("final_logit_softcapping") or 0.0,
    }


def gemma3(hf: dict) -> dict:
    return gemma2(hf) | {"qk_norm": True}


def olmo2(hf: dict) -> dict:
    return {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_all_heads": True}


def smollm3(hf: dict) -> dict:
    n_layers, interval = required(hf, "num_hidden_layers"), hf.get("no_rope_layer_interval") or 4
    has_rope = hf.get("no_rope_layers") or [(i + 1) % interval for i in range(min(n_layers, MAX_OBJECTS))]
    if len(has_rope) != n_layers:
        raise UsageError(f"config.json: no_rope_layers is about {len(has_rope)} layers; the model has {n_layers}")
    return {"rope_layers": tuple(bool(x) for x in has_rope)}


def granite(hf: dict) -> dict:
    return {
        "embed_scale": hf["embedding_multiplier"],
        "residual_scale": hf["residual_multiplier"],
        "attention_scale": hf["attention_multiplier"],
        "logit_scale": 1 / hf["logits_scaling"],
    }


def glm(hf: dict) -> dict:
    return {"out_bias": False}


def glm4(hf: dict) -> dict:
    return {"out_bias": False, "post_norm": True}


def seed_oss(hf: dict) -> dict:
    return {"out_bias": bool(hf.get("attention_out_bias"))}


def ernie(hf: dict) -> dict:
    return dict.fromkeys(("qkv_bias", "out_bias", "ffn_bias"), bool(hf.get("use_bias")))


def qwen2(hf: dict) -> dict:
    return {"qkv_bias": True, "out_bias": False}


def qwen2_moe(hf: dict) -> dict:
    return {"qkv_bias": bool(hf.get("qkv_bias")), "out_bias": False}


def qwen3(hf: dict) -> dict:
    return {"qk_norm": True}


def gpt_oss(hf: dict) -> dict:
    if (hf["swiglu_alpha"], hf["swiglu_limit"]) != (1.702, 7.0):
        raise UsageError("config.json: only swiglu_alpha 1.702 and swiglu_limit 7 are supported")
    method = (hf.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise UsageError(f"config.json: weights quantized by {method!r} are not supported; mxfp4 is")
    return {"activation": "clamped_swiglu", "sinks": True}


def grok(hf: dict) -> dict:
    return {
        "post_norm": True,
        "activation": "gelu_tanh",
        "embed_scale": hf["embedding_multiplier_scale"],
        "attention_scale": hf["attn_output_multiplier"],
        "attention_softcap": hf["max_attn_value"],
        "logit_scale": hf["output_multiplier_scale"],
    }


def baichuan(hf: dict) -> dict:
    """7B has RoPE, 13B ALiBi. They say so by the name of the field that holds the context's length."""
    dim, n_layers = required(hf, "hidden_size"), required(hf, "num_hidden_layers")
    if hf.get("max_position_embeddings") is None:
        return {"alibi": True, "rope_layers": (False,) * min(n_layers, MAX_OBJECTS)}
    if dim > 4096:
        raise UsageError(
            f"config.json: a Baichuan of hidden_size {dim} has ALiBi and model_max_length, not max_position_embeddings"
        )
    return {}


DBRX_NAMES = {
    "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
}  # fmt: skip


def rename_dbrx(hf: dict) -> dict:
    """DBRX has other names for most fields, and half of them in attn_config and ffn_config."""
    hf = {DBRX_NAMES.get(name, name): value for name, value in hf.items()}
    attention, ffn = hf.get("attn_config") or {}, hf.get("ffn_config") or {}
    rope = hf.get("rope_parameters") or {}
    if "rope_theta" in attention:  # the checkpoint's own, beside which transformers 5 writes its default
        rope = rope | {"rope_theta": attention["rope_theta"]}
    activation = ffn.get("ffn_act_fn") or {}
    if activation.get("name", "silu") not in UNSUPPORTED_FIELDS["hidden_act"]:
        raise UsageError(f"config.json: ffn_act_fn = {activation!r} is not supported")
    p = ffn.get("moe_normalize_expert_weights", 1)  # of the p-norm by which a token's experts' weights are divided
    if p not in (None, 1):
        raise UsageError(f"config.json: moe_normalize_expert_weights = {p!r} is not supported; 1 and null are")
    return hf | {
        "rope_parameters": rope,
        "clip_qkv": attention.get("clip_qkv"),
        "num_key_value_heads": attention.get("kv_n_heads", 1),
        "ffn_hidden_size": ffn.get("ffn_hidden_size", 3584),
        "num_experts": ffn.get("moe_num_experts", 4),
        "num_experts_per_tok": ffn.get("moe_top_k", 1),
        "norm_topk_prob": p == 1,
    }


def dbrx(hf: dict) -> dict:
    if hf.get("tie_word_embeddings"):  # conversion changes the embedding, and must not change the head
        raise UsageError("config.json: tie_word_embeddings = True is not supported for DBRX")
    return {"norm_eps": 1e-5, "clip_qkv": hf["clip_qkv"] or 0.0}


MISTRAL = dict(max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8)
QWEN = dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096, max_window_layers=28)
GEMMA = dict(
    max_position_embeddings=8192, bos_token_id=2, eos_token_id=1, head_dim=256, tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
OLMO = dict(max_position_embeddings=2048, eos_token_id=50279, rms_norm_eps=1e-5)
GLM = dict(
    max_position_embeddings=131072, head_dim=128, num_key_value_heads=2, attention_bias=True, partial_rotary_factor=0.5,
    rms_norm_eps=1.5625e-7, eos_token_id=[151329, 151336, 151338],
)  # fmt: skip
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
GPT_OSS_ROPE = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
)
BAICHUAN = Family("baichuan", dict(bos_token_id=1, eos_token_id=2), config_overrides=baichuan)
FAMILIES = {
    "LlamaForCausalLM": Family("llama", dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)),
    "MistralForCausalLM": Family("mistral", MISTRAL | dict(sliding_window=4096), window="layer_types"),
    "MixtralForCausalLM": Family(
        "mixtral",
        MISTRAL | dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        window="all",
        n_experts_fields=("num_local_experts",),
    ),
    "Qwen2ForCausalLM": Family("qwen2", QWEN, window="layer_types", window_switch=True, config_overrides=qwen2),
    "Qwen3ForCausalLM": Family(
        "qwen3", QWEN | dict(head_dim=128), window="layer_types", window_switch=True, config_overrides=qwen3
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        QWEN | dict(
            num_key_value_heads=16, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632, qkv_bias=True,
        ),
        window="layer_types",
        window_switch=True,
        full_attention_every=None,
        ffn_dim_field="moe_intermediate_size",
        n_experts_fields=("num_experts",),
        norm_topk_prob=None,
        shared_expert=True,
        config_overrides=qwen2_moe,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        QWEN
        | dict(num_key_value_heads=4, num_local_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        window="all",
        window_switch=True,
        ffn_dim_field="moe_intermediate_size",
        n_experts_fields=("num_experts", "num_local_experts"),
        norm_topk_prob=None,
        config_overrides=qwen3,
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        GEMMA | dict(num_key_value_heads=16),
        handled_fields=("hidden_act",),
        config_overrides=gemma,
        norm_offset=1.0,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        GEMMA | dict(
            num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        window="layer_types",
        full_attention_every=2,
        handled_fields=("hidden_act", *SOFTCAPS),
        config_overrides=gemma2,
        norm_offset=1.0,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        GEMMA | dict(
            max_position_embeddings=131072, num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256,
            rope_theta=1e6, rope_local_base_freq=10000.0,
        ),
        window="layer_types",
        full_attention_every=6,
        handled_fields=("hidden_act", *SOFTCAPS),
        config_overrides=gemma3,
        norm_offset=1.0,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        dict(
            max_position_embeddings=4096, original_max_position_embeddings=4096, bos_token_id=1, eos_token_id=32000,
            rms_norm_eps=1e-5,
        ),
        window="all",
        handled_fields=("partial_rotary_factor",),
    ),
    "Olmo2ForCausalLM": Family("olmo2", OLMO, config_overrides=olmo2),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        OLMO | dict(sliding_window=4096, rope_theta=5e5),
        window="layer_types",
        full_attention_every=4,
        config_overrides=olmo2,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        dict(
            max_position_embeddings=32768, bos_token_id=128000, eos_token_id=128001, num_key_value_heads=4,
            rope_theta=2e6, tie_word_embeddings=True,
        ),
        window="layer_types",
        window_switch=True,
        full_attention_every=None,
        config_overrides=smollm3,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2) | dict.fromkeys(MULTIPLIERS, 1.0),
        handled_fields=MULTIPLIERS,
        config_overrides=granite,
    ),
    "GlmForCausalLM": Family(
        "glm", GLM, handled_fields=("partial_rotary_factor",), config_overrides=glm, interleaved_rope=True
    ),
    "Glm4ForCausalLM": Family(
        "glm4", GLM, handled_fields=("partial_rotary_factor",), config_overrides=glm4, interleaved_rope=True
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        dict(
            max_position_embeddings=524288, bos_token_id=0, eos_token_id=2, num_key_value_heads=8, head_dim=128,
            attention_bias=True,
        ),
        config_overrides=seed_oss,
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        dict(
            max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=2, head_dim=128,
            rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        ),
        config_overrides=ernie,
        interleaved_rope=True,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        dict(
            max_position_embeddings=131072, num_key_value_heads=8, head_dim=64, sliding_window=128, rope_theta=150000.0,
            rms_norm_eps=1e-5, attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0, num_local_experts=128,
            num_experts_per_tok=4, rope_parameters=GPT_OSS_ROPE,
        ),
        window="layer_types",
        full_attention_every=2,
        n_experts_fields=("num_local_experts", "num_experts"),
        experts_bias=True,
        handled_fields=("quantization_config",),
        config_overrides=gpt_oss,
    ),
    "Grok1ModelForCausalLM": Family(
        "grok-1",
        dict(
            max_position_embeddings=8192, num_key_value_heads=8, rms_norm_eps=1e-5, num_experts=8,
            num_experts_per_tok=2, attn_output_multiplier=0.08838834764831845, max_attn_value=30.0,
            embedding_multiplier_scale=78.38367176906169, output_multiplier_scale=0.5773502691896257,
        ),
        n_experts_fields=("num_experts",),
        norm_topk_prob=False,
        handled_fields=("hidden_act",),
        config_overrides=grok,
    ),
    "DbrxForCausalLM": Family(
        "dbrx",
        dict(max_position_embeddings=2048),
        rename_fields=rename_dbrx,
        ffn_dim_field="ffn_hidden_size",
        n_experts_fields=("num_experts",),
        norm_topk_prob=None,
        handled_fields=("clip_qkv",),
        config_overrides=dbrx,
        layer_norm=True,
    ),
    "BaiChuanForCausalLM": BAICHUAN,  # Baichuan 7B, the first one
    "BaichuanForCausalLM": BAICHUAN,
}  # fmt: skip
MODEL_TYPES = {family.model_type: name for name, family in FAMILIES.items()}  # for a config without "architectures"
# Fields that change the maths in a way that model.py does not implement -> the values with which they change nothing
UNSUPPORTED_FIELDS = {
    "hidden_act": ("silu", "swish"),
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
    "partial_rotary_factor": (1,),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "use_bidirectional_attention": (),
}
# Fields by which config.json shows that an unknown architecture has what model.py has not
UNSUPPORTED_PARTS = {
    "vision_config": "a model of images and text",
    "audio_config": "a model of sound and text",
    "kv_lora_rank": "multi-head latent attention",
    "linear_num_key_heads": "layers of linear attention",
    "linear_attn_config": "layers of linear attention",
    "mamba_d_state": "layers with a state in place of attention",
    "ssm_state_size": "layers with a state in place of attention",
    "state_size": "layers with a state in place of attention",
    "is_encoder_decoder": "an encoder and a decoder",
}


def config_from_hf(hf: dict, generation: dict | None = None) -> ModelConfig:
    """Reads Hugging Face's config.json (hf), in its old spelling (rope_theta, rope_scaling) or its new one
    (rope_parameters). generation, if given, is generation_config.json, which may name more end tokens. Raises
    UsageError for what is not supported."""
    generation = generation or {}
    if not isinstance(hf, dict) or not isinstance(generation, dict):
        raise UsageError("config.json and generation_config.json must each hold one object")
    try:
        return read_config(hf, generation)
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise UsageError(f"config.json holds something of the wrong kind ({e})") from None


def read_config(hf: dict, generation: dict) -> ModelConfig:
    family = find_family(hf)
    if hf.get("rope_scaling"):  # the older spelling of rope_parameters, whose default it replaces
        hf = {"rope_parameters": None} | hf
    hf = family.defaults | family.rename_fields(hf)
    for field, allowed in UNSUPPORTED_FIELDS.items():
        if field not in family.handled_fields and hf.get(field) not in (None, False, *allowed):
            raise UsageError(f"config.json: {field} = {hf[field]!r} is not supported")
    check_layer_types(hf)
    attention_bias = bool(hf.get("attention_bias"))
    n_heads = required(hf, "num_attention_heads")
    bos_id = hf.get("bos_token_id")
    fields = dict(
        dim=required(hf, "hidden_size"),
        n_layers=required(hf, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=hf.get("num_key_value_heads") or n_heads,
        head_dim=read_head_dim(hf),
        ffn_dim=required(hf, family.ffn_dim_field),
        vocab_size=required(hf, "vocab_size"),
        max_seq_len=required(hf, "max_position_embeddings", "model_max_length"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        ffn_bias=bool(hf.get("mlp_bias")),
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        moe=read_moe(hf, family),
        bos_id=bos_id if isinstance(bos_id, int) else None,
        eos_ids=read_eos_ids(hf, generation),
    )
    fields |= read_window(hf, family)
    fields |= read_positions(hf, family)
    return ModelConfig(**fields | family.config_overrides(hf))


def required(hf: dict, *fields: str):
    """The value of the first of fields that config.json has. Raises UsageError if it has none of them."""
    for field in fields:
        if hf.get(field) is not None:
            return hf[field]
    raise UsageError(f"config.json: {' or '.join(fields)} is missing")


def find_family(hf: dict) -> Family:
    names = hf.get("architectures") or [MODEL_TYPES.get(hf.get("model_type"), hf.get("model_type"))]
    name = names if isinstance(names, str) else names[0]
    if name in FAMILIES:
        return FAMILIES[name]
    for field, what in UNSUPPORTED_PARTS.items():
        if hf.get(field):
            raise UsageError(f"architecture {name!r} is not supported: config.json's {field} means {what}")
    raise UsageError(f"architecture {name!r} is not one of {', '.join(FAMILIES)}")


def read_head_dim(hf: dict) -> int:
    if hf.get("head_dim") is not None:
        return hf["head_dim"]
    dim, n_heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    if not isinstance(dim, int) or not isinstance(n_heads, int) or n_heads < 1 or dim % n_heads:
        raise UsageError(f"config.json: hidden_size {dim!r} is not a multiple of num_attention_heads {n_heads!r}")
    return dim // n_heads


def read_window(hf: dict, family: Family) -> dict:
    """ModelConfig's sliding_window and, if only some layers have it, window_layers."""
    window = hf.get("sliding_window")
    if not window or family.window == "none" or family.window_switch and not hf.get("use_sliding_window"):
        return {}
    if family.window == "all":
        return {"sliding_window": window}
    has_window = read_window_layers(hf, family)
    if not any(has_window):
        return {}
    return {"sliding_window": window, "window_layers": None if all(has_window) else has_window}


def read_window_layers(hf: dict, family: Family) -> tuple[bool, ...]:
    """Whether each layer has the window, by config.json's layer_types. Without these, by full_attention_every n:

        n > 0    every n-th layer sees all tokens, the others have the window
        n = 0    every layer has the window (Qwen's: from number max_window_layers on)
        None     layer_types are required"""
    pattern = hf.get("sliding_window_pattern") if family.model_type == "gemma3_text" else None
    period = pattern or family.full_attention_every
    if hf.get("layer_types") is not None or period is None:
        return tuple(layer_type == "sliding_attention" for layer_type in required(hf, "layer_types"))
    n_layers = required(hf, "num_hidden_layers")
    first = hf["max_window_layers"] if "max_window_layers" in family.defaults else 0
    return tuple(i >= first and (period == 0 or (i + 1) % period != 0) for i in range(min(n_layers, MAX_OBJECTS)))


def check_layer_types(hf: dict):
    """Raises UsageError for a list that does not fit the layers, or for kinds of attention that model.py has not."""
    types, n_layers = hf.get("layer_types"), required(hf, "num_hidden_layers")
    if types is None:
        return
    if not isinstance(types, list) or len(types) != n_layers:
        raise UsageError(f"config.json: layer_types must be a list with the type of each of {n_layers} layers")
    for layer_type in types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UsageError(f"config.json: layers of type {layer_type!r} are not supported")


def read_positions(hf: dict, family: Family) -> dict:
    """ModelConfig's fields of RoPE."""
    rope, window_rope = read_rope(hf, family)
    theta, scaling = rope["rope_theta"], read_rope_scaling(rope, hf)
    fields = {"rope_theta": theta, "rope_scaling": scaling}
    if window_rope is not None and window_rope["rope_type"] != "default":
        raise UsageError("config.json: scaled RoPE in layers with a sliding window is not supported")
    if window_rope is not None and (window_rope["rope_theta"] != theta or scaling is not None):
        fields["window_rope_theta"] = window_rope["rope_theta"]
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1
    if partial != 1:
        if "partial_rotary_factor" not in family.handled_fields:
            raise UsageError(f"config.json: partial_rotary_factor = {partial!r} is not supported")
        fields["rotary_dim"] = int(read_head_dim(hf) * partial)
    if scaling is not None and scaling.rope_type in ("dynamic", "yarn"):  # config.json may state the trained context
        stretched = int(scaling.original_max_seq_len * scaling.factor)
        fields["max_seq_len"] = max(required(hf, "max_position_embeddings"), stretched)
    return fields


def read_rope(hf: dict, family: Family) -> tuple[dict, dict | None]:
    """RoPE's fields (rope_theta, rope_type, factor ...), collected from where a config.json may have them; and those of
    the layers with a sliding window, if they have their own."""
    common = {"rope_theta": hf.get("rope_theta", 10000.0), "rope_type": "default"}
    rope, window_rope = dict(common), None
    if hf.get("rope_local_base_freq") is not None:
        window_rope = common | {"rope_theta": hf["rope_local_base_freq"]}
    elif family.model_type == "olmo3":  # only its other layers have rope_scaling
        window_rope = dict(common)
    for field in ("rope_parameters", "rope_scaling"):
        fields = hf.get(field) or {}
        if not isinstance(fields, dict):
            raise UsageError(f"config.json: {field} must be an object, not {fields!r}")
        if any(isinstance(value, dict) for value in fields.values()):  # an object for each type of layer
            window_rope = (window_rope or common) | fields.get("sliding_attention", {})
            fields = fields.get("full_attention", {})
        rope |= fields
        if "rope_type" not in fields and "type" in fields:  # the older spelling
            rope["rope_type"] = fields["type"]
    return rope, window_rope


def read_rope_scaling(rope: dict, hf: dict) -> RopeScaling | None:
    rope_type = {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])
    if rope_type == "default":
        return None
    max_seq_len = required(hf, "max_position_embeddings")
    original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or max_seq_len
    if rope_type == "dynamic":
        original = max_seq_len
    factor = rope.get("factor")
    if factor is None and rope_type in ("yarn", "longrope"):
        factor = max_seq_len / original
    fields = {"rope_type": rope_type, "factor": factor, "original_max_seq_len": original}
    if rope_type == "llama3":
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if name in rope and not isinstance(rope[name], (int, float)):
                raise UsageError(f"config.json: rope_scaling of type llama3 needs a number for {name}")
        fields |= {name: required(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
    elif rope_type == "yarn":
        fields |= {name: rope[name] for name in ("beta_fast", "beta_slow", "truncate") if rope.get(name) is not None}
        fields["attention_factor"] = yarn_attention_factor(rope, factor)
    elif rope_type == "longrope":
        fields |= {name: tuple(required(rope, name)) for name in ("short_factor", "long_factor")}
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        fields["attention_factor"] = rope.get("attention_factor") or default
    return RopeScaling(**fields)


def yarn_attention_factor(rope: dict, factor: float) -> float:
    """What YaRN multiplies cosine and sine by (arXiv:2309.00071; with mscale, as DeepSeek does)."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1)


def read_moe(hf: dict, family: Family) -> MoEConfig | None:
    if not family.n_experts_fields:
        return None
    normalize = family.norm_topk_prob
    if normalize is None:
        normalize = bool(hf.get("norm_topk_prob"))
    return MoEConfig(
        n_experts=required(hf, *family.n_experts_fields),
        top_k=required(hf, "num_experts_per_tok"),
        norm_topk_prob=normalize,
        n_shared=read_n_shared(hf, family) if family.shared_expert else 0,
        bias=family.experts_bias,
    )


def read_n_shared(hf: dict, family: Family) -> int:
    """How many experts' widths a shared expert has: it is the sum of so many experts."""
    shared_dim, ffn_dim = required(hf, "shared_expert_intermediate_size"), required(hf, family.ffn_dim_field)
    if shared_dim % ffn_dim:
        raise UsageError(f"config.json: a shared expert of {shared_dim} is no multiple of {ffn_dim}, an expert's width")
    return shared_dim // ffn_dim


def read_eos_ids(hf: dict, generation: dict) -> tuple[int, ...]:
    """The end tokens of config.json and generation_config.json, without duplicates."""
    eos_ids = []
    for source in (hf, generation):
        ids = source.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if isinstance(i, int) and i not in eos_ids:
                eos_ids.append(i)
    return tuple(eos_ids)

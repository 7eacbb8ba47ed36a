"""Reads fields of config.json that only one family has, or a few. The rows of families.py name these functions.

A function for Family.read_config_fields returns fields of ModelConfig. Most functions have the name of their family.
How to read a field of config.json:

    hf_config[name]              if every family that reads it has a default
    required(hf_config, name)    if there is no default; raises UsageError if config.json lacks the field
    hf_config.get(name)          if the model works without it
    read_flag(hf_config, name)   if the field is true or false; missing means false
"""

from config import MAX_MODULES
from kernels.schema import CLAMPED_SILU_ALPHA, CLAMPED_SILU_LIMIT
from utils.errors import UsageError

SILU_NAMES = ("silu", "swish")

# ---- Reading one field ----------------------------------------------------------------------------------------------


def required(hf_config: dict, *names: str):
    """Returns the value of a field that config.json must have, under the first of names that it has."""
    for name in names:
        if hf_config.get(name) is not None:
            return hf_config[name]
    raise UsageError(f"config.json: {' or '.join(names)} is missing")


def read_flag(hf_config: dict, name: str) -> bool:
    value = hf_config.get(name)
    if not isinstance(value, bool | None):
        raise UsageError(f"config.json: {name} must be true or false, not {value!r}")
    return bool(value)


def layer_numbers(hf_config: dict) -> range:
    """Returns the numbers of the layers, from 0, but at most MAX_MODULES numbers: an absurd num_hidden_layers would
    fill memory before ModelConfig refuses it."""
    return range(min(required(hf_config, "num_hidden_layers"), MAX_MODULES))


# ---- read_config_fields: fields of ModelConfig that come from config.json -------------------------------------------


def gemma(hf_config: dict) -> dict:
    for name in ("hidden_activation", "hidden_act"):
        # null is the default. The first config.json of Gemma says "gelu" for the tanh form, too
        if hf_config.get(name) not in (None, "gelu", "gelu_pytorch_tanh"):
            raise UsageError(f"config.json: {name} = {hf_config[name]!r} is not supported")
    return {"embed_scale": required(hf_config, "hidden_size") ** 0.5, "activation": "gelu_tanh"}


def gemma2(hf_config: dict) -> dict:
    return gemma(hf_config) | {
        "activation": "gelu" if hf_config.get("hidden_activation") == "gelu" else "gelu_tanh",
        "post_norm": True,
        "attention_scale": required(hf_config, "query_pre_attn_scalar") ** -0.5,
        "attention_softcap": hf_config.get("attn_logit_softcapping") or 0.0,
        "logit_softcap": hf_config.get("final_logit_softcapping") or 0.0,
    }


def gemma3(hf_config: dict) -> dict:
    return gemma2(hf_config) | {"attention_softcap": 0.0}  # transformers does not use attn_logit_softcapping


def smollm3(hf_config: dict) -> dict:
    """no_rope_layers has a 0 for each layer without RoPE. Without the list, every no_rope_layer_interval-th layer has
    no RoPE."""
    n_layers = required(hf_config, "num_hidden_layers")
    interval = hf_config.get("no_rope_layer_interval") or 4
    has_rope = hf_config.get("no_rope_layers") or [(i + 1) % interval for i in layer_numbers(hf_config)]
    if len(has_rope) != n_layers:
        raise UsageError(f"config.json: no_rope_layers is about {len(has_rope)} layers; the model has {n_layers}")
    return {"layer_has_rope": tuple(bool(x) for x in has_rope)}


def arcee(hf_config: dict) -> dict:
    return ungated(hf_config, "relu2", "relu2")


def nanochat(hf_config: dict) -> dict:
    if hf_config.get("tie_word_embeddings"):  # conversion norms the embedding, but must not change the head
        raise UsageError("config.json: tie_word_embeddings = True is not supported for nanochat")
    return ungated(hf_config, "relu2", "relu2") | {"logit_softcap": hf_config["final_logit_softcapping"] or 0.0}


def nemotron(hf_config: dict) -> dict:
    return ungated(hf_config, "relu2", "relu2") | {"norm_eps": hf_config["norm_eps"]}


def olmo(hf_config: dict) -> dict:
    return {"clip_qkv": hf_config.get("clip_qkv") or 0.0}


def starcoder2(hf_config: dict) -> dict:
    activation = ungated(hf_config, "gelu_tanh", "gelu_pytorch_tanh")
    return activation | bias_everywhere(hf_config) | {"norm_eps": hf_config["norm_epsilon"]}


def ungated(hf_config: dict, activation: str, *hidden_acts: str) -> dict:
    """For a family without gates. hidden_acts: transformers' names of the family's activation."""
    found = hf_config["hidden_act"]
    if found not in hidden_acts:
        raise UsageError(f"config.json: hidden_act = {found!r} is not supported")
    return {"activation": activation, "gated": False}


def bias_everywhere(hf_config: dict) -> dict:
    return dict.fromkeys(("qkv_bias", "o_proj_bias", "ffn_bias"), read_flag(hf_config, "use_bias"))


def cohere(hf_config: dict) -> dict:
    return {"norm_eps": hf_config["layer_norm_eps"], "logit_scale": hf_config["logit_scale"], "parallel_residual": True}


def cohere2(hf_config: dict) -> dict:
    return cohere(hf_config) | {"layer_has_rope": layers_with_window(hf_config)}


def exaone4(hf_config: dict) -> dict:
    return {"layer_has_rope": layers_with_window(hf_config)} if hf_config["sliding_window"] else {}


def layers_with_window(hf_config: dict) -> tuple[bool, ...]:
    layer_types = hf_config.get("layer_types") or full_attention_by_pattern(4, hf_config)
    return tuple(layer_type == "sliding_attention" for layer_type in layer_types)


def stablelm(hf_config: dict) -> dict:
    return {
        "norm_eps": hf_config["layer_norm_eps"],
        "qkv_bias": read_flag(hf_config, "use_qkv_bias"),
        "parallel_residual": read_flag(hf_config, "use_parallel_residual"),
    }


def phi(hf_config: dict) -> dict:
    biases = dict.fromkeys(("qkv_bias", "o_proj_bias", "ffn_bias", "head_bias"), True)
    biases |= {"norm_eps": hf_config["layer_norm_eps"], "parallel_residual": True}
    return ungated(hf_config, "gelu_tanh", "gelu_new", "gelu_pytorch_tanh") | biases


def granite(hf_config: dict) -> dict:
    return {
        "embed_scale": hf_config["embedding_multiplier"],
        "residual_scale": hf_config["residual_multiplier"],
        "attention_scale": hf_config["attention_multiplier"],
        "logit_scale": 1 / hf_config["logits_scaling"],
    }


def seed_oss(hf_config: dict) -> dict:
    return {"o_proj_bias": read_flag(hf_config, "attention_out_bias")}


def qwen2_moe(hf_config: dict) -> dict:
    return {"qkv_bias": read_flag(hf_config, "qkv_bias"), "o_proj_bias": False}


def gpt_oss(hf_config: dict) -> dict:
    alpha, limit = CLAMPED_SILU_ALPHA, CLAMPED_SILU_LIMIT
    if hf_config["swiglu_alpha"] != alpha or hf_config["swiglu_limit"] != limit:
        raise UsageError(f"config.json: only swiglu_alpha {alpha} and swiglu_limit {limit} are supported")
    return {"activation": "clamped_silu", "sinks": True}


def grok(hf_config: dict) -> dict:
    return {
        "post_norm": True,
        "activation": "gelu_tanh",
        "embed_scale": hf_config["embedding_multiplier_scale"],
        "attention_scale": hf_config["attn_output_multiplier"],
        "attention_softcap": hf_config["max_attn_value"],
        "logit_scale": hf_config["output_multiplier_scale"],
    }


def baichuan(hf_config: dict) -> dict:
    """Baichuan 7B has RoPE, and its context is max_position_embeddings. 13B has ALiBi, and model_max_length."""
    dim = required(hf_config, "hidden_size")
    if hf_config.get("max_position_embeddings") is None:
        return {"alibi": True, "layer_has_rope": tuple(False for _ in layer_numbers(hf_config))}
    if dim > 4096:
        raise UsageError(
            f"config.json: a Baichuan of hidden_size {dim} has ALiBi and model_max_length, not max_position_embeddings"
        )
    return {}


def dbrx(hf_config: dict) -> dict:
    if hf_config.get("tie_word_embeddings"):  # conversion centers the embedding, but must not change the head
        raise UsageError("config.json: tie_word_embeddings = True is not supported for DBRX")
    return olmo(hf_config) | {"norm_eps": 1e-5}


# ---- default_layer_types --------------------------------------------------------------------------------------------


def all_sliding(hf_config: dict) -> list[str]:
    return ["sliding_attention" for _ in layer_numbers(hf_config)]


def sliding_from_max_window_layers(hf_config: dict) -> list[str]:
    """All layers except the first max_window_layers have a window."""
    first = hf_config["max_window_layers"]
    return ["sliding_attention" if i >= first else "full_attention" for i in layer_numbers(hf_config)]


def sliding_below_max_window_layers(hf_config: dict) -> list[str]:
    """Layers 0, 2, 4 ... below max_window_layers have a window."""
    end = hf_config["max_window_layers"]
    return ["full_attention" if i % 2 or i >= end else "sliding_attention" for i in layer_numbers(hf_config)]


def full_attention_every(n: int, hf_config: dict) -> list[str]:
    """All layers except every n-th have a window."""
    return ["sliding_attention" if (i + 1) % n else "full_attention" for i in layer_numbers(hf_config)]


def full_attention_by_pattern(default: int, hf_config: dict) -> list[str]:
    """Every n-th layer has no window. n is sliding_window_pattern, or default if the field is missing."""
    n = hf_config.get("sliding_window_pattern") or default
    if not isinstance(n, int):
        raise UsageError(f"config.json: sliding_window_pattern {n!r} is not a number; layer_types must list the layers")
    return full_attention_every(n, hf_config)


def smollm3_layer_types(hf_config: dict) -> list[str]:
    """If use_sliding_window is true, exactly the layers without RoPE have a window."""
    if not read_flag(hf_config, "use_sliding_window"):
        return full_attention_every(1, hf_config)
    return ["full_attention" if has_rope else "sliding_attention" for has_rope in smollm3(hf_config)["layer_has_rope"]]


# ---- normalize_hf_config --------------------------------------------------------------------------------------------


def normalize_phi3(hf_config: dict) -> dict:
    """In older files of Phi 3, "yarn" and "su" mean longrope."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf_config.get(name)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            hf_config = hf_config | {name: rope | {"rope_type": "longrope"}}
    return hf_config


DBRX_FIELDS_TO_LLAMA = {
    "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
    "max_seq_len": "max_position_embeddings",
}


def normalize_dbrx(hf_config: dict) -> dict:
    """Renames fields, and moves the fields of attn_config and ffn_config to the top level."""
    hf_config = {DBRX_FIELDS_TO_LLAMA.get(name, name): value for name, value in hf_config.items()}
    attention = hf_config.get("attn_config") or {}
    ffn = hf_config.get("ffn_config") or {}
    rope = hf_config.get("rope_parameters") or {}
    if rope.get("rope_theta", 10000.0) == 10000.0 and "rope_theta" in attention:  # transformers 5 writes this default
        rope = rope | {"rope_theta": attention["rope_theta"]}
    activation = ffn.get("ffn_act_fn") or {}
    if activation.get("name", "silu") not in SILU_NAMES:
        raise UsageError(f"config.json: ffn_act_fn = {activation!r} is not supported")
    p = ffn.get("moe_normalize_expert_weights", 1)  # the weights of a token's experts are divided by their p-norm
    if p not in (None, 1):
        raise UsageError(f"config.json: moe_normalize_expert_weights = {p!r} is not supported; 1 and null are")
    return hf_config | {
        "rope_parameters": rope,
        "clip_qkv": attention.get("clip_qkv"),
        "num_key_value_heads": attention.get("kv_n_heads", 1),
        "ffn_hidden_size": ffn.get("ffn_hidden_size", 3584),
        "num_experts": ffn.get("moe_num_experts", 4),
        "num_experts_per_tok": ffn.get("moe_top_k", 1),
        "norm_topk_prob": p == 1,
    }

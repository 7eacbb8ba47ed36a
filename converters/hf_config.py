"""Makes a ModelConfig from a config.json of Hugging Face. A row of families.py: FAMILIES says how.

    config = config_from_hf(json.load(open("config.json")))

A field that changes the maths is refused unless model.py implements the change.
"""

import math
import re

from config import ModelConfig, MoEConfig, RopeScaling
from converters.families import COMMON_DEFAULTS, FAMILIES, MODEL_TYPES
from converters.family import Family
from converters.family_config import SILU_NAMES, read_flag, required
from utils.errors import UsageError, convert_type_errors


def config_from_hf(hf_config: dict, generation: dict | None = None) -> ModelConfig:
    """hf_config: the contents of config.json, with the old fields for RoPE (rope_theta, rope_scaling) or the new field
    (rope_parameters). generation: the contents of generation_config.json. It may name more end tokens."""
    generation = generation or {}
    if not isinstance(hf_config, dict) or not isinstance(generation, dict):
        raise UsageError("config.json and generation_config.json must each hold one object")
    with convert_type_errors("config.json"):
        family = find_family(hf_config)
        try:
            return read_hf_config(hf_config, generation, family)
        except UsageError as e:
            raise UsageError(with_hf_names(str(e), hf_config, family)) from None


def find_family(hf_config: dict) -> Family:
    """Finds the family by model_type rather than "architectures", as transformers does. Refuses an unknown architecture
    that comes with code (auto_map): the code may change the maths even if model_type is "llama"."""
    model_type = hf_config.get("model_type")
    names = hf_config.get("architectures") or [MODEL_TYPES.get(model_type, model_type)]
    name = names if isinstance(names, str) else names[0]
    if model_type in MODEL_TYPES and (name in FAMILIES or not hf_config.get("auto_map")):
        return FAMILIES[MODEL_TYPES[model_type]]
    if name in FAMILIES:
        return FAMILIES[name]
    part = unsupported_part(hf_config)
    if part is not None:
        raise UsageError(f"architecture {name!r} is not supported: {part}")
    raise UsageError(f"architecture {name!r} is not one of {', '.join(FAMILIES)}")


# ---- What is not supported ------------------------------------------------------------------------------------------

# Fields that change the maths -> the values that change nothing, in addition to null and false. All other values are
# refused, unless the family has the field in handled_hf_fields.
HF_NO_OP_VALUES = {
    "hidden_act": SILU_NAMES,
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
    "use_qk_norm": (),
    "qk_layernorm": (),
}
# Field of ModelConfig -> its name in config.json, for error messages
OUR_NAMES_TO_HF = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
}
# Fields that reveal an unsupported part -> the part
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


def check_no_op_values(fields: dict, family: Family):
    if "hidden_act" not in family.handled_hf_fields and fields.get("hidden_act", "silu") is None:
        raise UsageError("config.json: hidden_act is null; it must name the activation, such as 'silu'")
    for name, no_op in HF_NO_OP_VALUES.items():
        if name not in family.handled_hf_fields and fields.get(name) not in (None, False, *no_op):
            raise UsageError(f"config.json: {name} = {fields[name]!r} is not supported")


def check_layer_types(hf_config: dict):
    """Checks that layer_types has an entry for each layer, and names only kinds of attention that model.py has."""
    types, n_layers = hf_config.get("layer_types"), required(hf_config, "num_hidden_layers")
    if types is None:
        return
    if not isinstance(types, list) or len(types) != n_layers:
        raise UsageError(f"config.json: layer_types must be a list with the type of each of {n_layers} layers")
    for layer_type in types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UsageError(f"config.json: layers of type {layer_type!r} are not supported")


def unsupported_part(hf_config: dict) -> str | None:
    """Returns which part of an unknown architecture model.py lacks, or None if config.json names none."""
    for name, meaning in UNSUPPORTED_PARTS.items():
        if hf_config.get(name):
            return f"config.json's {name} means {meaning}"
    return None


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_hf_config(hf_config: dict, generation: dict, family: Family) -> ModelConfig:
    hf_config = family.normalize_hf_config(hf_config)
    hf_config = COMMON_DEFAULTS | family.hf_defaults | replace_rope_parameters(hf_config)
    check_no_op_values(hf_config, family)
    check_layer_types(hf_config)
    fields = read_sizes(hf_config, family)
    fields["moe"] = read_moe(hf_config, family)
    bos_id = hf_config.get("bos_token_id")
    fields["bos_id"] = bos_id if isinstance(bos_id, int) else None
    fields["eos_ids"] = read_eos_ids(hf_config, generation)
    fields |= read_sliding_window(hf_config, family)
    fields |= read_rope(hf_config, family)
    fields |= family.config_fields
    fields |= family.read_config_fields(hf_config)
    return ModelConfig(**fields)


def with_hf_names(message: str, hf_config: dict, family: Family) -> str:
    """Replaces names of ModelConfig fields by their names in config.json, in an error message of config.py."""
    for ours, theirs in (OUR_NAMES_TO_HF | {"ffn_dim": family.ffn_dim_field}).items():
        message = re.sub(rf"(the model's )?\b{ours}\b", theirs, message)
    if not hf_config.get("rope_scaling"):
        message = message.replace("rope_scaling's", "rope_parameters'").replace("rope_scaling", "rope_parameters")
    return message if message.startswith("config.json") else f"config.json: {message}"


def read_sizes(hf_config: dict, family: Family) -> dict:
    n_heads = required(hf_config, "num_attention_heads")
    has_attention_bias = read_flag(hf_config, "attention_bias")
    return dict(
        dim=required(hf_config, "hidden_size"),
        n_layers=required(hf_config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads if hf_config.get("num_key_value_heads") is None else hf_config["num_key_value_heads"],
        head_dim=read_head_dim(hf_config),
        ffn_dim=required(hf_config, family.ffn_dim_field),
        vocab_size=required(hf_config, "vocab_size"),
        max_seq_len=required(hf_config, "max_position_embeddings", "model_max_length"),
        norm_eps=hf_config["rms_norm_eps"],
        qkv_bias=has_attention_bias,
        o_proj_bias=has_attention_bias,
        ffn_bias=read_flag(hf_config, "mlp_bias"),
        tie_embeddings=read_flag(hf_config, "tie_word_embeddings"),
    )


def read_head_dim(hf_config: dict) -> int:
    if hf_config.get("head_dim") is not None:
        return hf_config["head_dim"]
    dim, n_heads = required(hf_config, "hidden_size"), required(hf_config, "num_attention_heads")
    if not isinstance(dim, int) or not isinstance(n_heads, int) or n_heads < 1 or dim % n_heads:
        raise UsageError(f"config.json: hidden_size {dim!r} is not a multiple of num_attention_heads {n_heads!r}")
    return dim // n_heads


def read_eos_ids(hf_config: dict, generation: dict) -> tuple[int, ...]:
    """Reads the end tokens of config.json and generation_config.json, without duplicates."""
    eos_ids = []
    for fields in (hf_config, generation):
        ids = fields.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if not isinstance(i, int | None):
                raise UsageError(f"config.json: eos_token_id {ids!r} is not a token's number, nor a list of these")
            if i is not None and i not in eos_ids:
                eos_ids.append(i)
    return tuple(eos_ids)


def read_moe(hf_config: dict, family: Family) -> MoEConfig | None:
    if not family.n_experts_fields:
        return None
    norm_topk_prob = family.norm_topk_prob
    if norm_topk_prob is None:
        norm_topk_prob = read_flag(hf_config, "norm_topk_prob")
    return MoEConfig(
        n_experts=required(hf_config, *family.n_experts_fields),
        top_k=required(hf_config, "num_experts_per_tok"),
        norm_topk_prob=norm_topk_prob,
        n_shared_experts=read_n_shared_experts(hf_config, family) if family.shared_expert else 0,
        bias=family.experts_bias,
    )


def read_n_shared_experts(hf_config: dict, family: Family) -> int:
    """Returns how many experts of ffn_dim are as wide as the one shared expert that config.json describes."""
    shared_dim = required(hf_config, "shared_expert_intermediate_size")
    ffn_dim = required(hf_config, family.ffn_dim_field)
    if shared_dim % ffn_dim:
        what = f"shared_expert_intermediate_size {shared_dim} is not a multiple of {family.ffn_dim_field} {ffn_dim}"
        raise UsageError(f"config.json: {what}")
    return shared_dim // ffn_dim


# ---- Sliding window -------------------------------------------------------------------------------------------------


def read_sliding_window(hf_config: dict, family: Family) -> dict:
    """Returns sliding_window and, if only some layers have a window, layer_has_window."""
    window = hf_config.get("sliding_window")
    if not window or family.sliding_layers == "none":
        return {}
    if family.needs_use_sliding_window and not read_flag(hf_config, "use_sliding_window"):
        return {}
    if family.sliding_layers == "all":
        return {"sliding_window": window}
    if hf_config.get("layer_types") is None and family.default_layer_types is not None:
        layer_types = family.default_layer_types(hf_config)
    else:
        layer_types = required(hf_config, "layer_types")
    has_window = tuple(layer_type == "sliding_attention" for layer_type in layer_types)
    if not any(has_window):
        return {}
    return {"sliding_window": window, "layer_has_window": None if all(has_window) else has_window}


# ---- RoPE -----------------------------------------------------------------------------------------------------------


def read_rope(hf_config: dict, family: Family) -> dict:
    """Returns the fields for RoPE, and also max_seq_len if its scaling makes the context longer."""
    rope, sliding_rope = collect_rope_fields(hf_config, family)
    check_no_op_values(rope, family)
    theta, scaling = rope["rope_theta"], read_rope_scaling(rope, hf_config)
    fields = {"rope_theta": theta, "rope_scaling": scaling}
    if sliding_rope is not None:
        if sliding_rope["rope_type"] != "default":
            raise UsageError("config.json: rope_parameters scales RoPE in layers with a sliding window: not supported")
        if sliding_rope["rope_theta"] != theta or scaling is not None:
            fields["local_rope_theta"] = sliding_rope["rope_theta"]
    rotary_factor = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor")) or 1
    if rotary_factor != 1:
        fields["rotary_dim"] = int(read_head_dim(hf_config) * rotary_factor)
    if scaling is not None and scaling.rope_type in ("dynamic", "yarn"):  # config.json may state a shorter context
        stretched = int(scaling.original_max_seq_len * scaling.factor)
        fields["max_seq_len"] = max(required(hf_config, "max_position_embeddings"), stretched)
    return fields


def replace_rope_parameters(hf_config: dict) -> dict:
    """If config.json has the older rope_scaling, removes rope_parameters, even the family's default. Both stay if
    rope_parameters has an object for each type of layer: then rope_scaling changes the layers without a sliding
    window."""
    if not hf_config.get("rope_scaling") or has_layer_types(hf_config.get("rope_parameters")):
        return hf_config
    return hf_config | {"rope_parameters": None}


def has_layer_types(rope) -> bool:
    """Whether rope, the value of rope_parameters, has an object for each type of layer."""
    return isinstance(rope, dict) and any(isinstance(value, dict) for value in rope.values())


def collect_rope_fields(hf_config: dict, family: Family) -> tuple[dict, dict | None]:
    """Returns two dicts of fields for RoPE (rope_theta, rope_type, factor and so on): of layers without a sliding
    window, and of layers with one. The second is None if all layers have the same fields.

    rope_theta may be at the top level of config.json. All other fields are in rope_parameters or, in older files, in
    rope_scaling. Both may have an object for each type of layer."""
    unscaled = {"rope_theta": hf_config["rope_theta"], "rope_type": "default"}
    rope, sliding_rope = dict(unscaled), None
    if family.sliding_rope_theta_field is not None:
        sliding_rope = unscaled | {"rope_theta": hf_config[family.sliding_rope_theta_field]}
    for name in ("rope_parameters", "rope_scaling"):
        fields = hf_config.get(name) or {}
        if not isinstance(fields, dict):
            raise UsageError(f"config.json: {name} must be an object, not {fields!r}")
        if has_layer_types(fields):
            sliding_rope = (sliding_rope or unscaled) | fields.get("sliding_attention", {})
            fields = fields.get("full_attention", {})
        rope |= fields
        if "rope_type" not in fields and "type" in fields:  # the older name
            rope["rope_type"] = fields["type"]
    return rope, sliding_rope


def read_rope_scaling(rope: dict, hf_config: dict) -> RopeScaling | None:
    rope_type = {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])  # "su" is the older name
    if rope_type == "default":
        return None
    max_seq_len = required(hf_config, "max_position_embeddings")
    name = "original_max_position_embeddings"
    original = hf_config.get(name) or rope.get(name) or max_seq_len
    if rope_type == "dynamic":
        original = max_seq_len
    factor = rope.get("factor")
    if rope_type == "yarn" and "factor" not in rope:  # a factor of null means max_seq_len / original
        raise UsageError("config.json: rope_scaling of type yarn needs a factor")
    if factor is None and rope_type in ("yarn", "longrope"):
        factor = max_seq_len / original
    fields = {"rope_type": rope_type, "factor": factor, "original_max_seq_len": original}
    if rope_type == "llama3":
        fields |= read_llama3(rope)
    elif rope_type == "yarn":
        fields |= read_yarn(rope, factor)
    elif rope_type == "longrope":
        fields |= read_longrope(rope, factor, original)
    return RopeScaling(**fields)


def read_llama3(rope: dict) -> dict:
    for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        if name in rope and not isinstance(rope[name], (int, float)):
            raise UsageError(f"config.json: rope_scaling of type llama3 needs a number for {name}")
    return {name: required(rope, name) for name in ("low_freq_factor", "high_freq_factor")}


def read_yarn(rope: dict, factor: float) -> dict:
    """YaRN: arXiv:2309.00071. With mscale, attention_factor is computed as in DeepSeek models."""

    def log_scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

    fields = {name: rope[name] for name in ("beta_fast", "beta_slow", "truncate") if rope.get(name) is not None}
    if rope.get("attention_factor") is not None:
        fields["attention_factor"] = rope["attention_factor"]
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        fields["attention_factor"] = log_scale(rope["mscale"]) / log_scale(rope["mscale_all_dim"])
    else:
        fields["attention_factor"] = log_scale(1)
    return fields


def read_longrope(rope: dict, factor: float, original: int) -> dict:
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "short_factor": tuple(required(rope, "short_factor")),
        "long_factor": tuple(required(rope, "long_factor")),
        "attention_factor": rope.get("attention_factor") or default,
    }

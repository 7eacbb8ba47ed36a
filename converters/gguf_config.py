"""Makes a ModelConfig from the metadata of a GGUF: turns them into a config.json for hf_config.py.

    config = read_gguf_config(metadata, tensors)    # both from gguf_file.py: read_gguf

To add an architecture whose family is in families.py, add a row to ARCHITECTURES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from config import ModelConfig, RopeScaling
from converters.gguf_file import GGUFTensor
from converters.hf_config import config_from_hf
from utils.errors import UsageError

# Name of a field in a GGUF, without the prefix of its architecture ("llama.") -> name in config.json
REQUIRED_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GGUF_FIELDS = REQUIRED_FIELDS | {
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# Fields that change the maths in a way that model.py does not implement -> values that change nothing
GGUF_NO_OP_VALUES = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "expert_gating_func": (0, 1),  # 1: softmax
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.dimension_sections": (),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
# Tensors that belong to no module: divisors of the RoPE frequencies, for all contexts or for long and short ones
ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


# ---- The architectures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    family: str  # a key of families.py: FAMILIES
    fields: dict[str, str] = field(default_factory=dict)  # more rows of GGUF_FIELDS
    extra_fields: Callable[[dict], dict] = lambda hf_config: {}  # fields of config.json that the metadata lack
    names: dict[str, str] = field(default_factory=dict)  # more rows of convert_gguf.py: GGUF_TO_CANONICAL
    ffn_up_has_gate: bool = False  # whether ffn_up stacks gate above up
    interleaved_rope: bool = False  # whether the two rows of a RoPE pair are adjacent in Q and K, as in Meta's files


def llama_fields(hf_config: dict) -> dict:
    return {"architectures": ["MixtralForCausalLM"]} if hf_config.get("num_local_experts") else {}


def gemma2_fields(hf_config: dict) -> dict:
    window = hf_config.get("sliding_window", 4096)
    return {"query_pre_attn_scalar": query_dim(hf_config, n_layers_of_27b=46), "sliding_window": window}


def gemma3_fields(hf_config: dict) -> dict:
    return {"query_pre_attn_scalar": query_dim(hf_config, n_layers_of_27b=62)}


def query_dim(hf_config: dict, n_layers_of_27b: int) -> int:
    """Returns query_pre_attn_scalar: head_dim, except dim / n_heads in the 27B models. Its square root divides the
    scores."""
    if hf_config["num_hidden_layers"] == n_layers_of_27b:
        return hf_config["hidden_size"] // hf_config["num_attention_heads"]
    return hf_config["head_dim"]


def olmo2_fields(hf_config: dict) -> dict:
    """With a window this is Olmo 3. Olmo 2 has the same architecture in GGUF, but no window."""
    return {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"} if hf_config.get("sliding_window") else {}


def granite_fields(hf_config: dict) -> dict:
    return {"attention_multiplier": hf_config.get("attention_multiplier") or hf_config["head_dim"] ** -0.5}


def qwen3moe_fields(hf_config: dict) -> dict:
    return {"norm_topk_prob": hf_config.get("norm_topk_prob", True)}


def gpt_oss_fields(hf_config: dict) -> dict:
    """Leaves the limits of YaRN unrounded, as OpenAI's code does; llama.cpp rounds them."""
    return {"rope_scaling": (hf_config["rope_scaling"] or {}) | {"truncate": False}}


# Some fields are neither in the metadata nor in extra_fields, and take the default of the family: the local rope_theta
# (Gemma 3), the layers with a window (Gemma 2, Gemma 3, gpt-oss), the layers without RoPE (SmolLM3).
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", extra_fields=llama_fields, interleaved_rope=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        {"expert_feed_forward_length": "moe_intermediate_size", "expert_weights_norm": "norm_topk_prob"},
        qwen3moe_fields,
    ),
    "gemma": Architecture("GemmaForCausalLM"),
    "gemma2": Architecture("Gemma2ForCausalLM", extra_fields=gemma2_fields),
    "gemma3": Architecture("Gemma3ForCausalLM", {"rope.freq_base_swa": "rope_local_base_freq"}, gemma3_fields),
    "phi3": Architecture("Phi3ForCausalLM", ffn_up_has_gate=True),
    "olmo2": Architecture("Olmo2ForCausalLM", extra_fields=olmo2_fields),
    "olmoe": Architecture("OlmoeForCausalLM"),
    "exaone4": Architecture("Exaone4ForCausalLM"),
    "smollm3": Architecture("SmolLM3ForCausalLM", interleaved_rope=True),
    "granite": Architecture("GraniteForCausalLM", extra_fields=granite_fields, interleaved_rope=True),
    "arcee": Architecture("ArceeForCausalLM", interleaved_rope=True),
    "glm4": Architecture("Glm4ForCausalLM", ffn_up_has_gate=True),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        {"expert_feed_forward_length": "intermediate_size"},
        gpt_oss_fields,
        names={"post_attention_norm": "pre_ffn_norm"},
    ),
}


def find_architecture(metadata: dict) -> Architecture:
    name = metadata["general.architecture"]
    if name not in ARCHITECTURES:
        raise UsageError(f"GGUF architecture {name!r} is not supported; these are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_gguf_config(metadata: dict, tensors: dict[str, GGUFTensor]) -> ModelConfig:
    """Raises UsageError if a feature is not supported, and other errors if metadata are missing or broken."""
    try:
        config = config_from_hf(gguf_to_config_json(metadata, tensors))
    except UsageError as e:
        raise UsageError(str(e).replace("config.json", "the GGUF's metadata")) from None
    config = replace(
        config,
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        o_proj_bias="blk.0.attn_output.bias" in tensors,
        ffn_bias="blk.0.ffn_down.bias" in tensors,
    )
    if ROPE_FACTORS in tensors:
        config = replace(config, rope_scaling=read_divisors(tensors[ROPE_FACTORS]))
    return config


def gguf_to_config_json(metadata: dict, tensors: dict[str, GGUFTensor]) -> dict:
    """Returns what config.json would hold for the same model."""
    name, architecture = metadata["general.architecture"], find_architecture(metadata)
    fields = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    check_fields(fields, name)
    hf_names = GGUF_FIELDS | architecture.fields
    hf_config = {hf_names[name]: value for name, value in fields.items() if name in hf_names}
    hf_config.setdefault("head_dim", hf_config["hidden_size"] // hf_config["num_attention_heads"])
    if fields.get("attention.value_length", hf_config["head_dim"]) != hf_config["head_dim"]:
        raise UsageError(f"{name}.attention.value_length differs from key_length, which is not supported")
    rotary_dim = fields.get("rope.dimension_count", hf_config["head_dim"])
    end_ids = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    hf_config |= window_pattern(fields.get("attention.sliding_window_pattern")) | {
        "vocab_size": tensors["token_embd.weight"].data.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "partial_rotary_factor": Fraction(rotary_dim, hf_config["head_dim"]),  # exact, because a float might round down
        "rope_scaling": rope_scaling(name, fields, tensors),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [i for i in end_ids if i is not None],
    }
    defaults = {  # llama.cpp's defaults differ from the family's
        "architectures": [architecture.family],
        "num_key_value_heads": hf_config["num_attention_heads"],
        "rope_theta": 10000.0,
        "sliding_window": None,
    }
    return defaults | hf_config | architecture.extra_fields(hf_config)


def check_fields(fields: dict, name: str):
    for key, no_op in GGUF_NO_OP_VALUES.items():
        if key in fields and fields[key] not in no_op:
            raise UsageError(f"{name}.{key} = {fields[key]!r} is not supported")
    for key in REQUIRED_FIELDS:
        if key not in fields:
            raise KeyError(f"{name}.{key}")


def window_pattern(pattern: int | list | None) -> dict:
    """Returns the field of config.json that says which layers have the window. pattern: a list with an entry for each
    layer, or a number n if every n-th layer has no window."""
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in pattern]}
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def rope_scaling(name: str, fields: dict, tensors: dict[str, GGUFTensor]) -> dict | None:
    rope_type = fields.get("rope.scaling.type", "linear")
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        return {
            "rope_type": "longrope",
            "long_factor": tensors[LONG_FACTORS].data.view(np.float32).tolist(),
            "short_factor": tensors[SHORT_FACTORS].data.view(np.float32).tolist(),
            "attention_factor": fields.get("rope.scaling.attn_factor"),
        }
    if rope_type == "linear":
        factor = fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 0.0))
        return {"rope_type": "linear", "factor": factor} if factor else None  # 0 means no scaling
    if rope_type == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": fields["rope.scaling.factor"],
            "attention_factor": fields.get("rope.scaling.yarn_attn_factor"),
            "beta_fast": fields.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": fields.get("rope.scaling.yarn_beta_slow"),
        }
        return {field: value for field, value in scaling.items() if value is not None}
    if rope_type != "none":
        raise UsageError(f"{name}.rope.scaling.type = {rope_type!r} is not supported")
    return None


def read_divisors(stored: GGUFTensor) -> RopeScaling:
    """Returns the scaling that divides each RoPE frequency by a stored number. Llama 3.1 has one, for example."""
    divisors = tuple(stored.data.view(np.float32).tolist())
    return RopeScaling("longrope", factor=1.0, short_factor=divisors, long_factor=divisors)

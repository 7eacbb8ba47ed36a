"""The table of families: FAMILIES has a row for each architecture, and the class Family explains the columns. Some are
functions, in family_config.py (of config.json) and family_tensors.py (of tensors).

To add a family, add a row. docs/add_a_model.md has an example.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from config import ModelConfig
from converters.canonical_checkpoint import SourceTensors
from converters.family_config import (
    all_sliding,
    arcee,
    baichuan,
    bias_everywhere,
    cohere,
    cohere2,
    dbrx,
    exaone4,
    full_attention_by_pattern,
    full_attention_every,
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    grok,
    nanochat,
    nemotron,
    normalize_dbrx,
    normalize_phi3,
    olmo,
    phi,
    qwen2_moe,
    seed_oss,
    sliding_below_max_window_layers,
    sliding_from_max_window_layers,
    smollm3,
    smollm3_layer_types,
    stablelm,
    starcoder2,
)
from converters.family_tensors import (
    BAICHUAN_TO_CANONICAL,
    DBRX_TO_CANONICAL,
    GEMMA_NORMS_TO_CANONICAL,
    GLM4_NORMS_TO_CANONICAL,
    GPT_OSS_TO_CANONICAL,
    GROK_TO_CANONICAL,
    MIXTRAL_TO_CANONICAL,
    NANOCHAT_TO_CANONICAL,
    PHI_TO_CANONICAL,
    STARCODER2_TO_CANONICAL,
    is_baichuan2,
    split_dbrx_experts,
    split_stacked_experts,
)


@dataclass(frozen=True)
class Family:
    """How to read the config.json of one architecture, and how to make its tensors canonical."""

    model_type: str  # "model_type" in config.json
    hf_defaults: dict  # what transformers assumes for fields that config.json lacks, beyond COMMON_DEFAULTS

    # Gives the fields of config.json the names and the nesting that they have in Llama's
    normalize_hf_config: Callable[[dict], dict] = lambda hf_config: hf_config

    # Sliding window
    sliding_layers: str = "none"  # which layers have a window: "none", "all", or "layer_types" (config.json lists them)
    default_layer_types: Callable[[dict], list[str]] | None = None  # if config.json lacks layer_types; None is an error
    needs_use_sliding_window: bool = False  # layers have a window only if use_sliding_window is true
    scales_sliding_rope: bool = True  # whether rope_scaling also changes layers with a window
    sliding_rope_theta_field: str | None = None  # name in config.json of rope_theta for layers with a window

    # Feed-forward
    ffn_dim_field: str = "intermediate_size"
    n_experts_fields: tuple[str, ...] = ()  # n_experts in config.json; the first found counts; () if there are none
    norm_topk_prob: bool | None = True  # norm_topk_prob of MoEConfig; None if config.json has it
    shared_expert: bool = False  # whether every token also uses an expert of shared_expert_intermediate_size
    experts_bias: bool = False  # whether the router and the experts have biases

    # Everything else that changes the maths. A field in HF_NO_OP_VALUES (hf_config.py) is refused if it has another
    # value, unless it is in handled_hf_fields. Then read_config_fields reads and checks it.
    handled_hf_fields: tuple[str, ...] = ()
    config_fields: dict = field(default_factory=dict)  # fields of ModelConfig with one value for the whole family
    read_config_fields: Callable[[dict], dict] = lambda hf_config: {}  # config.json -> fields, which override others

    # Tensors, at conversion. family_tensors.py defines what these columns name, and hf_tensors.py applies it.
    tensor_renames: dict[str, str] = field(default_factory=dict)  # part of a name -> part of a canonical name; in order
    # Splits tensors that hold all experts of a layer
    split_experts: Callable[[SourceTensors, ModelConfig], None] = split_stacked_experts
    # Whether conversion scales each row of the head to length one
    normalizes_head: Callable[[ModelConfig], bool] = lambda config: False
    # Whether conversion norms each row of the embedding: a model with a norm before its first layer
    normalizes_embedding: bool = False
    has_norm_weights: bool = True  # if not, conversion makes weights of ones
    norm_offset: float = 0.0  # added to the weights of norms; Gemma computes x * (1 + w)
    layer_norm: bool = False  # whether norms subtract the mean of x; conversion makes it zero
    norm_bias: bool = False  # whether LayerNorms have biases; conversion moves each into the layers after the norm
    interleaved_rope: bool = False  # whether RoPE pairs elements 2 i and 2 i + 1, instead of i and i + rotary_dim / 2
    reversed_rope: bool = False  # whether RoPE rotates by the negative angle


# ---- The table ------------------------------------------------------------------------------------------------------

COMMON_DEFAULTS = dict(rms_norm_eps=1e-6, rope_theta=10000.0)  # of most architectures
MISTRAL = dict(max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=8)
QWEN = dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096, max_window_layers=28)
GEMMA = dict(
    max_position_embeddings=8192, bos_token_id=2, eos_token_id=1, head_dim=256, tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
)
OLMO = dict(max_position_embeddings=2048, eos_token_id=50279, rms_norm_eps=1e-5)
OLMO_NORMS = dict(pre_norm=False, post_norm=True, qk_norm=True, qk_norm_across_heads=True)
GLM = dict(
    max_position_embeddings=131072, head_dim=128, num_key_value_heads=2, attention_bias=True, partial_rotary_factor=0.5,
    rms_norm_eps=1.5625e-7, eos_token_id=[151329, 151336, 151338],
)
COHERE = dict(
    max_position_embeddings=8192, bos_token_id=5, eos_token_id=255001, layer_norm_eps=1e-5, logit_scale=0.0625,
    tie_word_embeddings=True,
)
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
GPT_OSS_ROPE = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
)
BAICHUAN = Family(
    "baichuan", dict(bos_token_id=1, eos_token_id=2), read_config_fields=baichuan,
    tensor_renames=BAICHUAN_TO_CANONICAL, normalizes_head=is_baichuan2,
)
FAMILIES = {
    "LlamaForCausalLM": Family("llama", dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)),
    "MistralForCausalLM": Family(
        "mistral",
        MISTRAL | dict(sliding_window=4096),
        sliding_layers="layer_types",
        default_layer_types=all_sliding,
    ),
    "MinistralForCausalLM": Family(
        "ministral",
        MISTRAL | dict(sliding_window=4096),
        sliding_layers="layer_types",
        default_layer_types=all_sliding,
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        MISTRAL | dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        sliding_layers="all",
        n_experts_fields=("num_local_experts",),
        tensor_renames=MIXTRAL_TO_CANONICAL,
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        QWEN,
        sliding_layers="layer_types",
        default_layer_types=sliding_from_max_window_layers,
        needs_use_sliding_window=True,
        config_fields=dict(qkv_bias=True, o_proj_bias=False),
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        QWEN | dict(head_dim=128),
        sliding_layers="layer_types",
        default_layer_types=sliding_from_max_window_layers,
        needs_use_sliding_window=True,
        config_fields=dict(qk_norm=True),
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        QWEN | dict(
            num_key_value_heads=16, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632, qkv_bias=True,
        ),
        sliding_layers="layer_types",
        default_layer_types=sliding_below_max_window_layers,
        needs_use_sliding_window=True,
        ffn_dim_field="moe_intermediate_size",
        n_experts_fields=("num_experts",),
        norm_topk_prob=None,
        shared_expert=True,
        read_config_fields=qwen2_moe,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        QWEN
        | dict(num_key_value_heads=4, num_local_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        sliding_layers="all",
        needs_use_sliding_window=True,
        ffn_dim_field="moe_intermediate_size",
        n_experts_fields=("num_experts", "num_local_experts"),
        norm_topk_prob=None,
        config_fields=dict(qk_norm=True),
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        GEMMA | dict(num_key_value_heads=16),
        handled_hf_fields=("hidden_act",),
        read_config_fields=gemma,
        norm_offset=1.0,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        GEMMA | dict(
            num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        sliding_layers="layer_types",
        default_layer_types=partial(full_attention_every, 2),
        handled_hf_fields=("hidden_act", *SOFTCAPS),
        read_config_fields=gemma2,
        tensor_renames=GEMMA_NORMS_TO_CANONICAL,
        norm_offset=1.0,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        GEMMA | dict(
            max_position_embeddings=131072, num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256,
            rope_theta=1e6, rope_local_base_freq=10000.0,
        ),
        sliding_layers="layer_types",
        default_layer_types=partial(full_attention_by_pattern, 6),
        sliding_rope_theta_field="rope_local_base_freq",
        handled_hf_fields=("hidden_act", *SOFTCAPS),
        config_fields=dict(qk_norm=True),
        read_config_fields=gemma3,
        tensor_renames=GEMMA_NORMS_TO_CANONICAL,
        norm_offset=1.0,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        dict(
            max_position_embeddings=4096, original_max_position_embeddings=4096, bos_token_id=1, eos_token_id=32000,
            rms_norm_eps=1e-5,
        ),
        normalize_hf_config=normalize_phi3,
        sliding_layers="all",
        handled_hf_fields=("partial_rotary_factor",),
    ),
    "PhiForCausalLM": Family(
        "phi",
        dict(
            max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, layer_norm_eps=1e-5,
            partial_rotary_factor=0.5, hidden_act="gelu_new",
        ),
        handled_hf_fields=("hidden_act", "partial_rotary_factor"),
        read_config_fields=phi,
        tensor_renames=PHI_TO_CANONICAL,
        layer_norm=True,
        norm_bias=True,
    ),
    "OlmoForCausalLM": Family(
        "olmo",
        OLMO,
        handled_hf_fields=("clip_qkv",),
        read_config_fields=olmo,
        layer_norm=True,
        has_norm_weights=False,
    ),
    "Olmo2ForCausalLM": Family("olmo2", OLMO, config_fields=OLMO_NORMS, tensor_renames=GEMMA_NORMS_TO_CANONICAL),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        OLMO | dict(sliding_window=4096, rope_theta=5e5),
        sliding_layers="layer_types",
        default_layer_types=partial(full_attention_every, 4),
        scales_sliding_rope=False,
        config_fields=OLMO_NORMS,
        tensor_renames=GEMMA_NORMS_TO_CANONICAL,
    ),
    "OlmoeForCausalLM": Family(
        "olmoe",
        OLMO | dict(max_position_embeddings=4096, num_local_experts=64, num_experts_per_tok=8),
        n_experts_fields=("num_experts", "num_local_experts"),
        norm_topk_prob=None,
        config_fields=dict(qk_norm=True, qk_norm_across_heads=True),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        dict(
            max_position_embeddings=32768, bos_token_id=128000, eos_token_id=128001, num_key_value_heads=4,
            rope_theta=2e6, tie_word_embeddings=True,
        ),
        sliding_layers="layer_types",
        default_layer_types=smollm3_layer_types,
        read_config_fields=smollm3,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2) | dict.fromkeys(MULTIPLIERS, 1.0),
        handled_hf_fields=MULTIPLIERS,
        read_config_fields=granite,
    ),
    "GlmForCausalLM": Family(
        "glm",
        GLM,
        handled_hf_fields=("partial_rotary_factor",),
        config_fields=dict(o_proj_bias=False),
        interleaved_rope=True,
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        GLM,
        handled_hf_fields=("partial_rotary_factor",),
        config_fields=dict(o_proj_bias=False, post_norm=True),
        tensor_renames=GLM4_NORMS_TO_CANONICAL,
        interleaved_rope=True,
    ),
    "CohereForCausalLM": Family(
        "cohere",
        COHERE | dict(rope_theta=5e5),
        handled_hf_fields=("logit_scale",),
        read_config_fields=cohere,
        layer_norm=True,
        interleaved_rope=True,
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        COHERE | dict(sliding_window=4096),
        sliding_layers="layer_types",
        default_layer_types=partial(full_attention_by_pattern, 4),
        handled_hf_fields=("logit_scale",),
        read_config_fields=cohere2,
        layer_norm=True,
        interleaved_rope=True,
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        dict(
            max_position_embeddings=4096, num_key_value_heads=32, bos_token_id=0, eos_token_id=0, layer_norm_eps=1e-5,
            partial_rotary_factor=0.25,
        ),
        handled_hf_fields=("partial_rotary_factor",),
        read_config_fields=stablelm,
        layer_norm=True,
        norm_bias=True,
    ),
    "Exaone4ForCausalLM": Family(
        "exaone4",
        dict(
            max_position_embeddings=2048, bos_token_id=0, eos_token_id=2, num_key_value_heads=32, sliding_window=4096,
            rms_norm_eps=1e-5,
        ),
        sliding_layers="layer_types",
        default_layer_types=partial(full_attention_by_pattern, 4),
        config_fields=dict(pre_norm=False, post_norm=True, qk_norm=True),
        read_config_fields=exaone4,
        tensor_renames=GEMMA_NORMS_TO_CANONICAL,
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        dict(
            max_position_embeddings=524288, bos_token_id=0, eos_token_id=2, num_key_value_heads=8, head_dim=128,
            attention_bias=True,
        ),
        read_config_fields=seed_oss,
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        dict(
            max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=2, head_dim=128,
            rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        ),
        read_config_fields=bias_everywhere,
        interleaved_rope=True,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        dict(
            max_position_embeddings=131072, num_key_value_heads=8, head_dim=64, sliding_window=128, rope_theta=150000.0,
            rms_norm_eps=1e-5, attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0, num_local_experts=128,
            num_experts_per_tok=4, rope_parameters=GPT_OSS_ROPE,
        ),
        sliding_layers="layer_types",
        default_layer_types=partial(full_attention_every, 2),
        n_experts_fields=("num_local_experts", "num_experts"),
        experts_bias=True,
        read_config_fields=gpt_oss,
        tensor_renames=GPT_OSS_TO_CANONICAL,
        split_experts=partial(split_stacked_experts, are_transposed=True),
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
        handled_hf_fields=("hidden_act",),
        read_config_fields=grok,
        tensor_renames=GROK_TO_CANONICAL,
    ),
    "DbrxForCausalLM": Family(
        "dbrx",
        dict(max_position_embeddings=2048),
        normalize_hf_config=normalize_dbrx,
        ffn_dim_field="ffn_hidden_size",
        n_experts_fields=("num_experts",),
        norm_topk_prob=None,
        handled_hf_fields=("clip_qkv",),
        read_config_fields=dbrx,
        tensor_renames=DBRX_TO_CANONICAL,
        split_experts=split_dbrx_experts,
        layer_norm=True,
    ),
    "ArceeForCausalLM": Family(
        "arcee",
        dict(
            max_position_embeddings=4096, bos_token_id=128000, eos_token_id=128001, rms_norm_eps=1e-5,
            hidden_act="relu2",
        ),
        handled_hf_fields=("hidden_act",),
        read_config_fields=arcee,
    ),
    "NanoChatForCausalLM": Family(
        "nanochat",
        dict(
            max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, final_logit_softcapping=15.0,
            hidden_act="relu2",
        ),
        handled_hf_fields=("hidden_act", "final_logit_softcapping"),
        config_fields=dict(qk_norm=True),
        read_config_fields=nanochat,
        tensor_renames=NANOCHAT_TO_CANONICAL,
        normalizes_embedding=True,
        has_norm_weights=False,
        reversed_rope=True,
    ),
    "NemotronForCausalLM": Family(
        "nemotron",
        dict(
            max_position_embeddings=4096, bos_token_id=2, eos_token_id=3, norm_eps=1e-5, partial_rotary_factor=0.5,
            hidden_act="relu2",
        ),
        handled_hf_fields=("hidden_act", "partial_rotary_factor"),
        read_config_fields=nemotron,
        norm_offset=1.0,
        layer_norm=True,
        norm_bias=True,
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        dict(
            max_position_embeddings=4096, num_key_value_heads=2, bos_token_id=50256, eos_token_id=50256,
            norm_epsilon=1e-5, use_bias=True, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
        ),
        sliding_layers="all",
        handled_hf_fields=("hidden_act",),
        read_config_fields=starcoder2,
        tensor_renames=STARCODER2_TO_CANONICAL,
        layer_norm=True,
        norm_bias=True,
    ),
    "BaiChuanForCausalLM": BAICHUAN,  # Baichuan 1, 7B
    "BaichuanForCausalLM": BAICHUAN,
}
MODEL_TYPES = {family.model_type: name for name, family in FAMILIES.items()}

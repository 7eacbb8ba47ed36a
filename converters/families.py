"""The table of families: FAMILIES has a row for each architecture. family.py explains the columns. Some columns are
functions: of config.json in family_config.py, of tensors in family_tensors.py.

To add a family, add a row. docs/add_a_model.md has an example.
"""

from functools import partial

from converters import family_config, family_tensors
from converters.family import Family

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
    "baichuan", dict(bos_token_id=1, eos_token_id=2), read_config_fields=family_config.baichuan,
    tensor_renames=family_tensors.BAICHUAN_TO_CANONICAL, find_change=family_tensors.find_change_of_baichuan,
)
FAMILIES = {
    "LlamaForCausalLM": Family("llama", dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)),
    "MistralForCausalLM": Family(
        "mistral",
        MISTRAL | dict(sliding_window=4096),
        sliding_layers="layer_types",
        default_layer_types=family_config.all_sliding,
    ),
    "MinistralForCausalLM": Family(
        "ministral",
        MISTRAL | dict(sliding_window=4096),
        sliding_layers="layer_types",
        default_layer_types=family_config.all_sliding,
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        MISTRAL | dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
        sliding_layers="all",
        n_experts_fields=("num_local_experts",),
        tensor_renames=family_tensors.MIXTRAL_TO_CANONICAL,
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        QWEN,
        sliding_layers="layer_types",
        default_layer_types=family_config.sliding_from_max_window_layers,
        needs_use_sliding_window=True,
        config_fields=dict(qkv_bias=True, o_proj_bias=False),
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        QWEN | dict(head_dim=128),
        sliding_layers="layer_types",
        default_layer_types=family_config.sliding_from_max_window_layers,
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
        default_layer_types=family_config.sliding_below_max_window_layers,
        needs_use_sliding_window=True,
        ffn_dim_field="moe_intermediate_size",
        n_experts_fields=("num_experts",),
        norm_topk_prob=None,
        shared_expert=True,
        read_config_fields=family_config.qwen2_moe,
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
        read_config_fields=family_config.gemma,
        norm_offset=1.0,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        GEMMA | dict(
            num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        sliding_layers="layer_types",
        default_layer_types=partial(family_config.full_attention_every, 2),
        handled_hf_fields=("hidden_act", *SOFTCAPS),
        read_config_fields=family_config.gemma2,
        tensor_renames=family_tensors.GEMMA_NORMS_TO_CANONICAL,
        norm_offset=1.0,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        GEMMA | dict(
            max_position_embeddings=131072, num_key_value_heads=4, sliding_window=4096, query_pre_attn_scalar=256,
            rope_theta=1e6, rope_local_base_freq=10000.0,
        ),
        sliding_layers="layer_types",
        default_layer_types=partial(family_config.full_attention_by_pattern, 6),
        sliding_rope_theta_field="rope_local_base_freq",
        handled_hf_fields=("hidden_act", *SOFTCAPS),
        config_fields=dict(qk_norm=True),
        read_config_fields=family_config.gemma3,
        tensor_renames=family_tensors.GEMMA_NORMS_TO_CANONICAL,
        norm_offset=1.0,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        dict(
            max_position_embeddings=4096, original_max_position_embeddings=4096, bos_token_id=1, eos_token_id=32000,
            rms_norm_eps=1e-5,
        ),
        normalize_hf_config=family_config.normalize_phi3,
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
        read_config_fields=family_config.phi,
        tensor_renames=family_tensors.PHI_TO_CANONICAL,
        layer_norm=True,
        norm_bias=True,
    ),
    "OlmoForCausalLM": Family(
        "olmo",
        OLMO,
        handled_hf_fields=("clip_qkv",),
        read_config_fields=family_config.olmo,
        layer_norm=True,
        has_norm_weights=False,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", OLMO, config_fields=OLMO_NORMS, tensor_renames=family_tensors.GEMMA_NORMS_TO_CANONICAL
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        OLMO | dict(sliding_window=4096, rope_theta=5e5),
        sliding_layers="layer_types",
        default_layer_types=partial(family_config.full_attention_every, 4),
        sliding_rope_theta_field="rope_theta",
        config_fields=OLMO_NORMS,
        tensor_renames=family_tensors.GEMMA_NORMS_TO_CANONICAL,
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
        default_layer_types=family_config.smollm3_layer_types,
        read_config_fields=family_config.smollm3,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2) | dict.fromkeys(MULTIPLIERS, 1.0),
        handled_hf_fields=MULTIPLIERS,
        read_config_fields=family_config.granite,
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
        tensor_renames=family_tensors.GLM4_NORMS_TO_CANONICAL,
        interleaved_rope=True,
    ),
    "CohereForCausalLM": Family(
        "cohere",
        COHERE | dict(rope_theta=5e5),
        handled_hf_fields=("logit_scale",),
        read_config_fields=family_config.cohere,
        layer_norm=True,
        interleaved_rope=True,
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        COHERE | dict(sliding_window=4096),
        sliding_layers="layer_types",
        default_layer_types=partial(family_config.full_attention_by_pattern, 4),
        handled_hf_fields=("logit_scale",),
        read_config_fields=family_config.cohere2,
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
        read_config_fields=family_config.stablelm,
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
        default_layer_types=partial(family_config.full_attention_by_pattern, 4),
        config_fields=dict(pre_norm=False, post_norm=True, qk_norm=True),
        read_config_fields=family_config.exaone4,
        tensor_renames=family_tensors.GEMMA_NORMS_TO_CANONICAL,
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        dict(
            max_position_embeddings=524288, bos_token_id=0, eos_token_id=2, num_key_value_heads=8, head_dim=128,
            attention_bias=True,
        ),
        read_config_fields=family_config.seed_oss,
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        dict(
            max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, num_key_value_heads=2, head_dim=128,
            rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        ),
        read_config_fields=family_config.bias_everywhere,
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
        default_layer_types=partial(family_config.full_attention_every, 2),
        n_experts_fields=("num_local_experts", "num_experts"),
        experts_bias=True,
        read_config_fields=family_config.gpt_oss,
        tensor_renames=family_tensors.GPT_OSS_TO_CANONICAL,
        split_experts=partial(family_tensors.split_stacked_experts, are_transposed=True),
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
        read_config_fields=family_config.grok,
        tensor_renames=family_tensors.GROK_TO_CANONICAL,
    ),
    "DbrxForCausalLM": Family(
        "dbrx",
        dict(max_position_embeddings=2048),
        normalize_hf_config=family_config.normalize_dbrx,
        ffn_dim_field="ffn_hidden_size",
        n_experts_fields=("num_experts",),
        norm_topk_prob=None,
        handled_hf_fields=("clip_qkv",),
        read_config_fields=family_config.dbrx,
        tensor_renames=family_tensors.DBRX_TO_CANONICAL,
        split_experts=family_tensors.split_dbrx_experts,
        layer_norm=True,
    ),
    "ArceeForCausalLM": Family(
        "arcee",
        dict(
            max_position_embeddings=4096, bos_token_id=128000, eos_token_id=128001, rms_norm_eps=1e-5,
            hidden_act="relu2",
        ),
        handled_hf_fields=("hidden_act",),
        read_config_fields=family_config.arcee,
    ),
    "NanoChatForCausalLM": Family(
        "nanochat",
        dict(
            max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, final_logit_softcapping=15.0,
            hidden_act="relu2",
        ),
        handled_hf_fields=("hidden_act", "final_logit_softcapping"),
        config_fields=dict(qk_norm=True),
        read_config_fields=family_config.nanochat,
        tensor_renames=family_tensors.NANOCHAT_TO_CANONICAL,
        find_change=family_tensors.find_change_of_nanochat,
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
        read_config_fields=family_config.nemotron,
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
        read_config_fields=family_config.starcoder2,
        tensor_renames=family_tensors.STARCODER2_TO_CANONICAL,
        layer_norm=True,
        norm_bias=True,
    ),
    "BaiChuanForCausalLM": BAICHUAN,  # Baichuan 1, 7B
    "BaichuanForCausalLM": BAICHUAN,
}
MODEL_TYPES = {family.model_type: name for name, family in FAMILIES.items()}

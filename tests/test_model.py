"""Every family gives the logits of transformers in float32, in chunks, batches and single tokens, and its config.json
is read."""

import pytest
import torch
import transformers as hf
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from checkpoint import empty_model
from config import ModelConfig, MoEConfig
from converters.families import MODEL_TYPES
from converters.hf_config import config_from_hf
from layers.kv_cache import KVCache
from layers.rope import rope_table
from layers.weight import round_to_dtype
from tests.tiny import FAMILIES, LAYER_TYPES, SIZES
from utils.errors import UsageError


@pytest.mark.parametrize("use_kernels", [True, False], ids=["kernels", "PyTorch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, use_kernels, both_models):
    theirs, ours = both_models(family, use_kernels)
    tokens = torch.randint(0, 97, (2, 120), generator=torch.Generator().manual_seed(1))  # seven sliding windows
    start, kv_cache = torch.zeros(2, dtype=torch.long), KVCache(ours, 2, 128)
    with torch.inference_mode():
        expected = theirs(tokens).logits
        whole = ours(tokens, start, KVCache(ours, 2, 128))
        ends = [0, 7, 24, 80, *range(81, 121)]  # three chunks, then token by token
        parts = [ours(tokens[:, a:b], start + a, kv_cache) for a, b in zip(ends, ends[1:], strict=False)]
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_kernels", [True, False], ids=["kernels", "PyTorch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_have_positions_of_their_own(family, use_kernels, both_models):
    """Rows with different start_pos give the logits that they give alone, even with more tokens than the kernels
    take."""
    _, ours = both_models(family, use_kernels)
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    together, starts = KVCache(ours, 2, 64), torch.tensor([30, 7])
    with torch.inference_mode():
        ours(tokens[:, :30], torch.zeros(2, dtype=torch.long), together)
        logits = []
        for n in (1, 3, 9, 17):
            rows = torch.stack([tokens[b, start : start + n] for b, start in enumerate(starts.tolist())])
            logits.append(ours(rows, starts, together))
            starts = starts + n
        for b, first in enumerate((30, 7)):
            alone = KVCache(ours, 1, 64)
            expected = ours(tokens[b : b + 1, : first + 30], torch.tensor([0]), alone)[0, first:]
            torch.testing.assert_close(torch.cat(logits, 1)[b], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_scale_is_rounded(dtype):
    """The scale of the embedding is rounded to the dtype of the activations, half to even."""
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2 - 2**-9]  # halfway between neighbours
    scales = [1.0, 0.5, 12.0, 0.022, 78.38367176906169, *ties, *(dim**0.5 for dim in range(60, 6000, 77))]
    for scale in scales:
        rounded = torch.tensor(scale, dtype=dtype).item()
        assert round_to_dtype(scale, dtype) == rounded
        config = ModelConfig(16, 1, 1, 1, 16, 16, 97, 64, embed_scale=scale)
        model = empty_model(config).to_empty(device="cpu").to(dtype)
        model.embed_tokens.weight.fill_(1)
        assert (model.embed(torch.tensor([[3]])) == rounded).all()


WITH_WINDOWS = "mistral-window gemma2 gemma3 phi4-mini olmo3 gpt-oss starcoder2 cohere2 exaone4".split()


@pytest.mark.parametrize("use_kernels", [True, False], ids=["kernels", "PyTorch"])
@pytest.mark.parametrize("family", WITH_WINDOWS)
def test_prompts_longer_than_every_window(family, use_kernels, both_models):
    """Such a prompt is right in one chunk, in a cache of its length and in a larger one."""
    theirs, ours = both_models(family, use_kernels)
    n = ours.config.sliding_window + 30
    tokens = torch.randint(0, 97, (1, n), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(tokens).logits
        for length in (n, 256):
            logits = ours(tokens, torch.tensor([0]), KVCache(ours, 1, length))
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# ---- Positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, n",
    [("phi4-mini", 16), ("phi4-mini", 17), ("dynamic", 256), ("dynamic", 257), ("dynamic", 400)],
)
def test_rope_that_depends_on_the_length(family, n, both_models):
    """RoPE is right below and above the trained context. Here the length of the cache counts, in transformers the
    number of tokens."""
    theirs, ours = both_models(family, False)
    tokens = torch.randint(0, 97, (1, n), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        kv_cache = KVCache(ours, 1, n)
        chunks = [(0, tokens[:, :9]), (9, tokens[:, 9:])]
        parts = [ours(chunk, torch.tensor([start]), kv_cache) for start, chunk in chunks]
        torch.testing.assert_close(torch.cat(parts, 1), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
}
ROPES = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    YARN,
    YARN | {"factor": 1.0},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
    YARN | {"mscale": 1.0},
    YARN | {"attention_factor": 1.3, "mscale": 0.7, "mscale_all_dim": 1.0},
    YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    YARN | {"truncate": False, "beta_fast": 4.0, "beta_slow": 4.0},
    LONGROPE,
    LONGROPE | {"factor": 5.0},
    LONGROPE | {"attention_factor": 1.3},
]


@pytest.mark.parametrize("rope", ROPES)
def test_rope_tables_equal_transformers(rope):
    config = hf.LlamaConfig(**SIZES, rope_parameters=dict(rope))
    ours = config_from_hf(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    theirs = LlamaRotaryEmbedding(config)
    for n in (20, 64, 65, 256, 300):
        cos, sin = theirs(torch.ones(()), torch.arange(n)[None])
        torch.testing.assert_close(rope_table(ours, n), torch.stack([cos, sin], -1)[0, :, :6], atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GptOssForCausalLM"])
def test_yarn_stretches_the_context(architecture):
    """rope_scaling alone stretches the context, as Qwen's pages say. It replaces the scaling of the family."""
    sizes = SIZES | {"max_position_embeddings": 64, "architectures": [architecture]}
    config = config_from_hf(sizes | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert config.max_seq_len == 256 and config.rope_scaling.original_max_seq_len == 64
    assert config.rope_scaling.truncate


# ---- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [hf.MistralConfig, hf.Qwen2Config, hf.Qwen3Config])
def test_windows_of_layers(kind):
    sizes = {"architectures": [kind.__name__.replace("Config", "ForCausalLM")], "num_hidden_layers": 3}
    good = kind().to_dict() | sizes | {"sliding_window": 9, "use_sliding_window": True}
    expected = {
        ("full_attention",) * 3: (0, None),
        ("sliding_attention",) * 3: (9, None),
        tuple(LAYER_TYPES): (9, (True, False, True)),
    }
    for types, windows in expected.items():
        config = config_from_hf(good | {"layer_types": list(types)})
        assert (config.sliding_window, config.layer_has_window) == windows


def test_old_and_new_spelling_together():
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = config_from_hf(hf.LlamaConfig().to_dict() | both | {"architectures": "LlamaForCausalLM"})
    assert config.rope_scaling.factor == 2


def test_dbrx_as_published():
    published = {
        "architectures": ["DbrxForCausalLM"], "d_model": 6144, "n_heads": 48, "n_layers": 40, "max_seq_len": 32768,
        "vocab_size": 100352, "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_jitter_eps": 0.01},
    }
    config = config_from_hf(published)
    assert (config.dim, config.n_layers, config.ffn_dim) == (6144, 40, 10752)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (48, 8, 128)
    assert (config.max_seq_len, config.rope_theta, config.clip_qkv, config.norm_eps) == (32768, 500000, 8, 1e-5)
    assert config.moe == MoEConfig(16, 4) and not config.tie_embeddings
    saved_again = published | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert config_from_hf(saved_again) == config
    ffn = published["ffn_config"] | {"moe_normalize_expert_weights": None}
    assert config_from_hf(published | {"ffn_config": ffn}).moe == MoEConfig(16, 4, norm_topk_prob=False)


def test_only_whole_pairs_are_rotated():
    good = hf.Glm4Config().to_dict() | {"architectures": ["Glm4ForCausalLM"], "rope_parameters": None}
    with pytest.raises(UsageError, match="cannot rotate 89 of 128"):
        config_from_hf(good | {"partial_rotary_factor": 0.7})


def test_unsupported_is_named():
    good = hf.LlamaConfig().to_dict() | {"architectures": ["LlamaForCausalLM"], "model_type": None}
    bad_fields = {
        "architectures": ["FalconForCausalLM"],
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4},
        "vocab_size": -1,
        "partial_rotary_factor": 0.5,
        "attn_logit_softcapping": 50.0,
        "logit_scale": 0.25,
        "clip_qkv": 8.0,
    }
    messages = "Falcon|hidden_act|mrope|vocab_size|partial_rotary_factor|attn_logit_softcapping|logit_scale|clip_qkv"
    for field, bad in bad_fields.items():
        with pytest.raises(UsageError, match=messages):
            config_from_hf(good | {field: bad})


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("wrong", ["x", ["a", "b"]])
def test_rope_of_the_wrong_kind_is_refused(field, wrong):
    good = hf.LlamaConfig().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UsageError, match=f"{field} must be an object"):
        config_from_hf(good | {field: wrong})


WRONG = [
    ("gemma", {"hidden_act": "silu"}, "hidden_act.* = 'silu'"),
    ("gemma2", {"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
    ("gemma2", {"attn_logit_softcapping": "x"}, "attention_softcap must be a positive number"),
    ("gemma2", {"final_logit_softcapping": -3}, "logit_softcap must be a positive number"),
    ("gemma2", {"query_pre_attn_scalar": -1}, "attention_scale must be a positive number"),
    ("gemma3", {"layer_types": LAYER_TYPES[:2]}, "layer_types must be a list with the type of each of 3 layers"),
    ("gemma3", {"layer_types": "full_attention"}, "layer_types must be a list"),
    ("gemma3", {"layer_types": [*LAYER_TYPES[:2], "linear_attention"]}, "type 'linear_attention' are not supported"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "type 'chunked_attention' are not supported"),
    ("llama2", {"num_key_value_heads": 0}, "^config.json: num_key_value_heads must be a positive integer, not 0$"),
    ("llama2", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3$"),
    ("llama2", {"rms_norm_eps": 0}, "^config.json: rms_norm_eps must be a positive number, not 0$"),
    ("llama2", {"intermediate_size": 0}, "^config.json: intermediate_size must be a positive integer, not 0$"),
    ("qwen3-moe", {"moe_intermediate_size": 0}, "^config.json: moe_intermediate_size must be a positive integer"),
    ("llama2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
    ("llama2", {"hidden_act": None}, "hidden_act is null"),
    ("llama-linear", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling's factor must be a positive"),
    ("llama-linear", {"rope_parameters": {"factor": 0}}, "^config.json: rope_parameters' factor must be a positive"),
    ("llama2", {"rope_scaling": {"type": "yarn"}}, "rope_scaling of type yarn needs a factor"),
    ("qwen2-moe", {"shared_expert_intermediate_size": 63}, "intermediate_size 63 is no multiple of moe_intermediate"),
    ("qwen2-moe", {"shared_expert_intermediate_size": -64}, "number of shared experts"),
    ("qwen2-moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is about 2 layers; the model has 3"),
    ("phi4-mini", {"rope_parameters": {"short_factor": [1.0] * 5}}, "6 short and long factors"),
    ("phi4-mini", {"rope_parameters": {"long_factor": ["x"] * 6}}, "factor of rope_parameters must be a positive"),
    ("phi4-mini", {"rope_parameters": {"long_factor": None}}, "long_factor is missing"),
    ("yarn", {"rope_parameters": {"factor": "x"}}, "holds something of the wrong kind|must be a positive number"),
    ("yarn", {"rope_parameters": {"beta_fast": "x"}}, "beta_fast must be a positive number"),
    ("llama3", {"rope_parameters": {"low_freq_factor": "x"}}, "needs a number for low_freq_factor"),
    ("llama-linear", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a positive number"),
    ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
    ("yarn", {"rope_parameters": {"rope_theta": 1}}, "RoPE with theta 1 and 12 elements cannot be scaled"),
    ("dynamic", {"head_dim": 2}, "RoPE with theta 10000.0 and 2 elements cannot be scaled"),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "layers with a sliding window"),
    ("granite", {"logits_scaling": 0}, "wrong kind"),
    ("granite", {"residual_multiplier": "x"}, "residual_scale must be a positive number"),
    ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
    ("gemma", {"hidden_activation": "gelu", "hidden_act": "silu"}, "^config.json: hidden_act = 'silu' is not support"),
    ("arcee", {"hidden_act": "silu"}, "^config.json: hidden_act = 'silu' is not supported$"),
    ("arcee", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh' is not supported$"),
    ("starcoder2", {"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported$"),
    ("nemotron", {"norm_eps": 0}, "norm_eps must be a positive number, not 0"),
    ("starcoder2", {"hidden_act": "gelu"}, "^config.json: hidden_act = 'gelu' is not supported$"),
    ("phi", {"hidden_act": "gelu"}, "^config.json: hidden_act = 'gelu' is not supported$"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm = True is not supported"),
    ("cohere", {"use_qk_norm": True}, "use_qk_norm = True is not supported"),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": "LLG"}, "sliding_window_pattern 'LLG' is no number"),
    ("nanochat", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
    ("dbrx", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
    ("dbrx", {"attn_config": {"clip_qkv": -1}}, "clip_qkv must be a positive number"),
    ("dbrx", {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "ffn_act_fn = {'name': 'gelu'} is not supported"),
    ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2.0}}, "moe_normalize_expert_weights = 2.0 is not supp"),
]


def hf_config(family: str) -> dict:
    config_class, changes = FAMILIES[family]
    return config_class(**SIZES | changes).to_dict() | {"architectures": [MODEL_TYPES[config_class.model_type]]}


@pytest.mark.parametrize("family, changes, message", WRONG)
def test_options_that_a_family_lacks_are_refused(family, changes, message):
    good = hf_config(family)
    if "rope_parameters" in changes:
        changes = {"rope_parameters": good["rope_parameters"] | changes["rope_parameters"]}
    with pytest.raises(UsageError, match=message) as e:
        config_from_hf(good | changes)
    assert "\n" not in str(e.value)


UNSUPPORTED = [
    ("Gemma3ForConditionalGeneration", {"vision_config": {"depth": 1}}, "vision_config means a model of images"),
    ("Qwen2_5_VLForConditionalGeneration", {"vision_config": {"depth": 1}}, "vision_config means a model of images"),
    ("DeepseekV3ForCausalLM", {"kv_lora_rank": 512}, "kv_lora_rank means multi-head latent attention"),
    ("Qwen3NextForCausalLM", {"linear_num_key_heads": 16}, "linear_num_key_heads means layers of linear attention"),
    ("MambaForCausalLM", {"state_size": 16}, "state_size means layers with a state"),
    ("GPT2LMHeadModel", {}, "is not one of LlamaForCausalLM, "),
]


@pytest.mark.parametrize("architecture, fields, message", UNSUPPORTED)
def test_other_architectures_are_named(architecture, fields, message):
    for more in ({}, fields):
        with pytest.raises(UsageError, match=f"architecture '{architecture}'") as e:
            config_from_hf(SIZES | {"architectures": [architecture]} | more)
        assert "\n" not in str(e.value)
    assert message in str(e.value)


def paths_of(config: dict):
    """Returns the paths to all values of an object, also in objects within it."""
    for name, value in config.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *path) for path in paths_of(value))


def replaced(config: dict, path: tuple, value) -> dict:
    name, *rest = path
    return config | {name: replaced(config[name], rest, value) if rest else value}


@pytest.mark.parametrize("odd", ["x", -1, 0, [], {"a": {}}, None, float("nan"), 10**400], ids=lambda x: str(x)[:9])
def test_odd_values_are_read_or_refused(odd):
    for family in FAMILIES:
        good = hf_config(family)
        for path in paths_of(good):
            try:
                config = config_from_hf(replaced(good, path, odd))
            except UsageError as e:
                assert "\n" not in str(e)
            else:
                assert isinstance(config, ModelConfig)


def test_every_architecture_is_tested():
    """tests/tiny.py has every architecture that transformers has."""
    tested = {config_class.model_type for config_class, _ in FAMILIES.values()}
    assert {model_type for model_type in MODEL_TYPES if model_type in hf.CONFIG_MAPPING} == tested

"""Tiny random checkpoints of every family, made with transformers."""

import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers as hf

from checkpoint import empty_model, read_checkpoint, save_checkpoint
from converters.convert_folder import convert_folder
from formats import QuantizationConfig
from layers.kv_cache import KVCache
from layers.linear import quantizable_linears
from loading import load_model
from scripts.tiny_model import write_tokenizer
from utils.errors import UsageError

PACKAGES = ("cli", "converters", "engine", "evaluation", "formats", "kernels", "layers", "text", "utils")

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN3_MOE = {
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
QWEN2_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
SOFTCAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 9,
    "layer_types": LAYER_TYPES,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
PHI4_MINI = {
    "hidden_size": 64,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 16,
    "sliding_window": 200,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
    },
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 8.0,
}
GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 9,
    "rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": False},
}
DBRX = {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 5e5},
    "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 6, "moe_top_k": 3},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
FAMILIES = {  # name: (config class in transformers, changes of SIZES)
    "llama2": (hf.LlamaConfig, {"num_key_value_heads": 4}),
    "llama3": (hf.LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": (hf.LlamaConfig, {"rope_parameters": LINEAR}),
    "llama-bias": (hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": (hf.MistralConfig, {"sliding_window": 16}),
    "mistral-nemo": (hf.MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "ministral": (hf.MinistralConfig, {"head_dim": 16, "sliding_window": 9, "layer_types": LAYER_TYPES}),
    "mixtral": (hf.MixtralConfig, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16}),
    "qwen3-moe": (hf.Qwen3MoeConfig, QWEN3_MOE),
    "qwen2-moe": (hf.Qwen2MoeConfig, QWEN2_MOE),
    "gemma": (hf.GemmaConfig, {"head_dim": 16}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24} | SOFTCAPS),
    "gemma3": (hf.Gemma3TextConfig, GEMMA3),
    "phi3": (hf.Phi3Config, {"pad_token_id": 0}),
    "phi4-mini": (hf.Phi3Config, PHI4_MINI),
    "olmo": (hf.OlmoConfig, {"clip_qkv": 1.0, "tie_word_embeddings": True}),
    "olmo2": (hf.Olmo2Config, {}),
    "olmo3": (hf.Olmo3Config, {"sliding_window": 9, "layer_types": LAYER_TYPES, "rope_scaling": YARN}),
    "smollm3": (hf.SmolLM3Config, {"no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
    "granite": (hf.GraniteConfig, GRANITE),
    "glm": (hf.GlmConfig, {"head_dim": 16, "pad_token_id": 0}),
    "glm4": (hf.Glm4Config, {"head_dim": 16, "pad_token_id": 0}),
    "seed-oss": (hf.SeedOssConfig, {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
    "ernie4.5": (hf.Ernie4_5Config, {"head_dim": 16, "use_bias": True}),
    "gpt-oss": (hf.GptOssConfig, GPT_OSS),
    "dbrx": (hf.DbrxConfig, DBRX),
    "arcee": (hf.ArceeConfig, {"mlp_bias": True}),
    "nemotron": (hf.NemotronConfig, {"head_dim": 16}),
    "starcoder2": (hf.Starcoder2Config, {"sliding_window": 9}),
    "nanochat": (hf.NanoChatConfig, {}),
    "phi": (hf.PhiConfig, {}),
    "olmoe": (hf.OlmoeConfig, {"num_experts": 6, "num_experts_per_tok": 3}),
    "cohere": (hf.CohereConfig, {}),
    "cohere2": (hf.Cohere2Config, {"sliding_window": 9, "layer_types": LAYER_TYPES}),
    "stablelm": (hf.StableLmConfig, {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm-parallel": (hf.StableLmConfig, {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    "exaone4": (hf.Exaone4Config, {"sliding_window": 9, "layer_types": LAYER_TYPES}),
    "yarn": (hf.LlamaConfig, {"rope_parameters": YARN | {"rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 1.0}}),
    "dynamic": (hf.LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
}


def make_hf(family: str, **sizes):
    """Returns a model of a family in transformers, float32."""
    torch.manual_seed(0)
    config_class, changes = FAMILIES[family]
    config = config_class(**SIZES | changes | sizes)
    if family == "dbrx":  # ffn_config does not take hidden_size from d_model
        config.ffn_config.hidden_size = config.hidden_size
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, p in model.named_parameters():  # biases and norms that matter
        is_norm = "norm" in name and p.dim() == 1
        if is_norm or "bias" in name or "sinks" in name:
            torch.nn.init.normal_(p, mean=1.0 if is_norm else 0.0, std=0.3)
    return model.float().eval()


def convert(folder: Path) -> Path:
    """Converts a Hugging Face folder. Returns the file, model.pth or a quantized one."""
    return convert_folder(folder)


def assert_refused(folder: Path, match: str, lora: Path | None = None):
    """Checks that convert_folder refuses folder, or a LoRA adapter for it, with one line that matches, and leaves both
    as they were."""
    folders = [folder] if lora is None else [folder, lora]
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    with pytest.raises(UsageError, match=match) as e:
        convert_folder(folder, lora)
    assert "\n" not in str(e.value)
    assert {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()} == before


def call_main(main, *args):
    """Calls the main of a script with these arguments."""
    with mock.patch.object(sys, "argv", ["script.py", *map(str, args)]):
        main()


# Version of model.pth -> the names that the next version replaced: new name -> old name. Written independently of
# UPGRADES (checkpoint.py), so that a mistake there fails a test.
EARLIER_TENSORS = {  # by regular expressions
    5: {r"\.pre_(\w+_norm)\.": r".\1."},
    2: {r"^embed_tokens\.": "tok_embeddings.", r"^lm_head\.": "output."},
    1: {
        r"\.qkv_proj\.": ".wqkv.", r"\.o_proj\.": ".wo.", r"\.gate_up_proj\.": ".w13.", r"\.down_proj\.": ".w2.",
        r"\.router\.": ".gate.",
    },
}
EARLIER_FIELDS = {
    6: {
        "o_proj_bias": "out_bias", "qk_norm_across_heads": "qk_norm_all_heads", "local_rope_theta": "window_rope_theta",
    },
    4: {"layer_has_window": "window_layers", "layer_has_rope": "rope_layers"},
    3: {"n_shared_experts": "n_shared"},
    2: {"rope_type": "kind"},
    1: {"top_k": "n_active", "norm_topk_prob": "normalize"},
}
ACTIVATIONS_OF_VERSION_7 = {  # activation and gated -> activation; up to version 4 as today, and all were gated
    ("silu", True): "swiglu", ("gelu", True): "geglu", ("gelu_tanh", True): "geglu_tanh",
    ("clamped_silu", True): "clamped_swiglu", ("gelu_tanh", False): "gelu_pytorch_tanh", ("relu2", False): "relu2",
}


def write_earlier_version(path: Path, version: int):
    """Rewrites the checkpoint in path as a file of an earlier version, from 1 to 7."""
    data = torch.load(path, weights_only=True)
    config, tensors = data["config"], data["tensors"]
    config["sliding_window"] = config["sliding_window"] or None
    for earlier in range(6, version - 1, -1):
        for new, old in EARLIER_TENSORS.get(earlier, {}).items():
            tensors = {re.sub(new, old, name): t for name, t in tensors.items()}
        for fields in (config, config["moe"] or {}, config["rope_scaling"] or {}):
            for new, old in EARLIER_FIELDS.get(earlier, {}).items():
                if new in fields:
                    fields[old] = fields.pop(new)
    activation = ACTIVATIONS_OF_VERSION_7[config["activation"], config.pop("gated")]
    if version > 4:
        config["activation"] = activation
    if version == 1 and config["moe"] is not None:
        tensors = {re.sub(r"\.(w13|w2)\.", r".experts.\1.", name): t for name, t in tensors.items()}
        assert not config["moe"].pop("n_shared") and not config["moe"].pop("bias")  # version 1 had neither
    assert version > 2 or "tok_embeddings.weight" in tensors
    torch.save(data | {"format": f"gpt-fast/{version}", "tensors": tensors}, path)


def to_ours(theirs, use_kernels: bool = True):
    """Converts theirs, a model of transformers, to ours, float32."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return load_model(convert(Path(folder)), torch.device("cpu"), torch.float32, use_kernels)


def same_logits(path: Path, theirs, atol: float = 1e-4, use_kernels: bool = True):
    """Checks that the model in path, in float32, gives the logits of theirs, from transformers."""
    ours = load_model(path, torch.device("cpu"), torch.float32, use_kernels)
    tokens = torch.randint(0, theirs.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = ours(tokens, torch.tensor([0]), KVCache(ours, 1, 24))
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=atol, rtol=1e-4)


def write_folder(family: str, folder: Path, **sizes):
    """Writes a checkpoint as on the hub, with a chat template and a tokenizer of bytes, <s> and </s>."""
    defaults = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 256, "eos_token_id": 257}
    make_hf(family, **defaults | sizes).save_pretrained(folder)
    write_tokenizer(folder)


def quantize_embedding(source: Path, target: Path, is_tied: bool = True) -> Path:
    """Copies source, a quantized checkpoint of a model with a tied head, to target, and gives the embedding the
    quantized tensors of the head. is_tied: whether the file has them only once."""
    config, quantization, tensors = read_checkpoint(source)
    head = {name: t for name, t in tensors.items() if name.startswith("lm_head.")}
    others = {name: t for name, t in tensors.items() if not name.startswith(("lm_head.", "embed_tokens."))}
    tensors = {name.replace("lm_head", "embed_tokens"): t for name, t in head.items()} | others
    tensors |= {} if is_tied else head
    save_checkpoint(target, config, tensors, quantization | {"layers": {"embed_tokens": quantization}})
    return target


def give_input_orders(source: Path, target: Path):
    """Copies source, a quantized checkpoint, to target, and gives every linear layer a random order of inputs, as with
    act-order. The result is another model."""
    config, quantization, tensors = read_checkpoint(source)
    generator = torch.Generator().manual_seed(0)
    linears = dict(quantizable_linears(empty_model(config, QuantizationConfig.from_dict(quantization))))
    names = [name for name, linear in linears.items() if linear.n_experts is None]
    for name in names:
        order = torch.randperm(linears[name].in_features, generator=generator)
        tensors[f"{name}.input_order"] = order.int()
    save_checkpoint(target, config, tensors, quantization | {"act_order": names})

"""config.json and tensors that transformers would write otherwise are read as transformers reads them, or refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from checkpoint import read_checkpoint
from tests.tiny import assert_refused, convert, make_hf, same_logits


@pytest.fixture
def llama(tmp_path) -> Path:
    """A folder with a tiny checkpoint."""
    make_hf("llama2").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, changes: dict):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def same_as_transformers(folder: Path):
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    same_logits(convert(folder), theirs)


def change_tensors(folder: Path, change):
    """Replaces the tensors in a checkpoint by change(tensors)."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


# ---- config.json ----------------------------------------------------------------------------------------------------

PHI3_ROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}
ROPES = {
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3000.0},
    "rope_scaling": {"rope_type": "linear", "factor": 5.0},
}
AS_TRANSFORMERS = {  # changes of config.json that transformers interprets in its own way
    "longrope called yarn": ("phi3", {"rope_scaling": {"type": "yarn"} | PHI3_ROPE, "rope_parameters": None}),
    "architecture of another family": ("mistral-window", {"architectures": ["LlamaForCausalLM"]}),
    "unknown architecture": ("llama2", {"architectures": ["LLaMAForCausalLM"]}),
    "Gemma 3's capped scores": ("gemma3", {"attn_logit_softcapping": 5.0}),
    "a field of Gemma 3": ("qwen2", {"rope_local_base_freq": 55.0}),
    "both places of DBRX's theta": ("dbrx", {"rope_parameters": {"rope_type": "default", "rope_theta": 3000.0}}),
    "a window that is switched off": (
        "smollm3", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 5, "use_sliding_window": False}
    ),
    "exact GELU": ("gemma2", {"hidden_activation": "gelu"}),
    "both names of RoPE's fields": ("llama2", ROPES),
    "both, for each type of layer": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
}


@pytest.mark.parametrize("family, changes", AS_TRANSFORMERS.values(), ids=AS_TRANSFORMERS)
def test_config_means_what_it_means_to_transformers(family, changes, tmp_path):
    make_hf(family).save_pretrained(tmp_path)
    change_config(tmp_path, changes)
    same_as_transformers(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", "gemma gemma3 dbrx nemotron starcoder2 stablelm nanochat cohere".split())
def test_conversion_computes_in_float32(family, dtype, tmp_path):
    """Sums with 16-bit weights are not rounded to 16 bits."""
    make_hf(family).to(dtype).save_pretrained(tmp_path)
    same_as_transformers(tmp_path)


def test_an_architecture_with_code_of_its_own_is_refused(llama):
    """An architecture with code of its own is refused, even if its model_type is known."""
    change_config(llama, {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}})
    assert_refused(llama, "architecture 'Mine' is not one of LlamaForCausalLM, ")
    change_config(llama, {"architectures": ["LlamaForCausalLM"]})
    assert convert(llama) == llama / "model.pth"


def test_ids_beyond_the_vocabulary_are_ignored(llama, capsys):
    change_config(llama, {"bos_token_id": 999, "eos_token_id": [2, 9999, -1]})
    config = read_checkpoint(convert(llama)).config
    assert (config.bos_id, config.eos_ids) == (None, (2,))
    said = "bos_token_id or eos_token_id 999, 9999, -1 is ignored: the vocabulary has 97 tokens"
    assert said in capsys.readouterr().err


# ---- Tensors --------------------------------------------------------------------------------------------------------

ATTENTION = [f"model.layers.{i}.self_attn" for i in range(3)]
EXTRA = {  # what transformers ignores
    "buffers": {
        f"{a}.rotary_emb.{name}_cached": torch.ones(1, 1, 256, 12) for a in ATTENTION for name in ("cos", "sin")
    }
    | {f"{a}.masked_bias": torch.tensor(-1e4) for a in ATTENTION},
    "biases of zeros": {f"{a}.{x}_proj.bias": torch.zeros(48) for a in ATTENTION for x in "qkvo"},
    "layers for more tokens": {"mtp.fc.weight": torch.ones(3, 3), "mtp.norm.weight": torch.ones(3)},
}


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_tensors_that_change_nothing(llama, extra, capsys):
    change_tensors(llama, lambda tensors: tensors | extra)
    same_as_transformers(llama)
    said = capsys.readouterr().err
    assert ("2 tensors are ignored, as mtp.fc.weight: " in said) == ("mtp.fc.weight" in extra)


def test_a_bias_that_changes_something_is_refused(llama):
    bias = f"{ATTENTION[1]}.q_proj.bias"
    change_tensors(llama, lambda tensors: tensors | {bias: torch.eye(48)[0].clone()})
    assert_refused(llama, f"tensor {bias} has no place")


SPELLINGS = {
    "no prefix": lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()},
    "float64": lambda tensors: {name: t.double() for name, t in tensors.items()},
    "only the head": lambda tensors: {name.replace("model.embed_tokens", "lm_head"): t for name, t in tensors.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_names_and_dtypes_are_the_same_model(spelling, tmp_path):
    make_hf("llama3").save_pretrained(tmp_path)
    change_tensors(tmp_path, SPELLINGS[spelling])
    same_as_transformers(tmp_path)
    assert {t.dtype for t in read_checkpoint(tmp_path / "model.pth").tensors.values()} == {torch.float32}

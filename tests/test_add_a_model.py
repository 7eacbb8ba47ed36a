"""docs/add_a_model.md: its diffs, applied to a copy of the tree, make Gemma run as transformers does, and add min_p.

The copy's own tests judge the new family, as the page promises, and those in MORE. Compiling the C++ kernels takes most
of the time.
"""

import re
import shutil
import subprocess
import sys

import pytest

from tests.tiny import ROOT

MAX_CHANGED_LINES = 64  # of the first diff: a family is cheap
MORE = '''
import pytest
import torch
import transformers as hf

import kernels
from arguments import parse_args
from config import ModelConfig, UsageError
from generate import generate
from model import KVCache, Linear
from sampling import Sampling, probabilities
from steps import build_steps
from tests.tiny import call

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=16, vocab_size=97)
REFUSED = [
    ("gemma", "hidden_act", "silu"),
    ("gemma", "use_bidirectional_attention", True),
    ("llama", "hidden_act", "gelu"),
]


@pytest.mark.parametrize("with_kernels", [True, False])
def test_gemma_greedy(with_kernels, pair):
    theirs, ours = pair("gemma", with_kernels)
    assert ours.uses_kernels(2, 1) == with_kernels
    theirs.generation_config.eos_token_id = None
    prompt = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    options = dict(do_sample=False, max_new_tokens=20, pad_token_id=0)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, 40:]
    steps = build_steps(ours, KVCache(ours, 2, 60), Sampling())
    assert torch.equal(torch.tensor(list(generate(steps, prompt, 0, 20))).T, expected)


def test_gemma_config():
    full = ModelConfig.from_hf(hf.GemmaConfig(**SIZES).to_dict() | {"architectures": ["GemmaForCausalLM"]})
    assert ModelConfig.from_hf(SIZES | {"model_type": "gemma"}) == full
    assert ModelConfig.from_hf(SIZES | {"model_type": "gemma", "hidden_act": "gelu"}) == full
    for model_type, field, value in REFUSED:
        with pytest.raises(UsageError, match=field):
            ModelConfig.from_hf(SIZES | {"model_type": model_type, field: value})


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("n", [64, 72])  # the activation fused, and of its own
def test_gemma_activation(n, backend):
    """Of each backend's kernels; Triton's run in its interpreter."""
    torch.manual_seed(0)
    w, x = Linear(64, n), torch.randn(3, 64)
    w.weight.copy_(torch.randn(n, 64))
    gate, up = (x @ w.weight.T).chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    if backend == "cpu":
        kernels.enable(torch.nn.ModuleList([w]))
    else:
        kernels.pack_for_triton([w])
    assert w.backend == backend
    torch.testing.assert_close(kernels.linear(x, w, activation="gelu_tanh"), expected, atol=1e-4, rtol=1e-4)


def test_gemma_min_p():
    logits = torch.tensor([[1.0, 0.5, 0.1]]).log()
    probs = probabilities(logits, Sampling(temperature=1.0, min_p=0.2))
    torch.testing.assert_close(probs, torch.tensor([[2 / 3, 1 / 3, 0.0]]))
    for wrong in (0.0, 1.5):
        with pytest.raises(UsageError, match="min_p"):
            Sampling(min_p=wrong)


def test_gemma_min_p_option():
    def options():
        assert parse_args("").sampling.min_p == 0.3

    call(options, "--min_p", "0.3", "--checkpoint_path", "model.pth")
'''
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/add_a_model.md").read_text(), re.S)


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources with the page's diffs."""
    for name in ("kernels", "scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    return tmp_path


def test_the_diff_is_small():
    gemma, _ = DIFFS
    assert len(re.findall(r"^[+-](?![+-]{2} )", gemma, re.M)) < MAX_CHANGED_LINES


def test_gemma(tree):
    (tree / "tests/test_more.py").write_text(MORE)
    files = ["tests/test_more.py", "tests/test_model.py", "tests/test_generate.py", "tests/test_convert.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gemma or llama3", *files]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (n_passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(n_passed) > 20 and "failed" not in done.stdout
    changed = re.findall(r"^\+\+\+ b/(.*\.py)$", "".join(DIFFS), re.M)
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", *changed], cwd=tree, check=True)

"""docs/add_a_model.md is right: its excerpts are in the files that it names, and its diffs apply and work.

Each diff is applied to a copy of the tree.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.tiny import PACKAGES
from utils.files import ROOT

PAGE = (ROOT / "docs/add_a_model.md").read_text()
EXCERPTS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S)
EPSILON_DIFF, NF4_DIFF = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
EPSILON_TESTS = '''
import pytest
import torch

import kernels.build
import kernels.triton.sampling  # registers the operation, which runs in Triton's interpreter
from cli.generate_args import parse_args
from engine.sampling_params import SamplingParams
from kernels.schema import TokenFilters
from layers.backend import CPU_BACKEND, TRITON_BACKEND
from layers.sampling import compute_probs, has_sample_kernel, sample
from scripts.kernel_checks.check_sampling import exact_gumbel_noise
from tests.tiny import call_main
from utils.errors import UsageError

LOGITS = 3 * torch.randn(300, generator=torch.Generator().manual_seed(0))
FILTERS = [{}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_p": 0.9, "min_p": 0.01}]


def test_epsilon_cutoff():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for epsilon, kept in [(0.15, [4, 3, 2]), (0.3 - 1e-6, [4, 3]), (0.9, [4])]:
        filters = SamplingParams(temperature=1.0, epsilon_cutoff=epsilon).filters
        expected = torch.tensor([kept + [0] * (4 - len(kept))]) / sum(kept)
        torch.testing.assert_close(compute_probs(logits, 1.0, filters), expected)
    for wrong in (-1.0, float("inf")):
        with pytest.raises(UsageError, match="epsilon_cutoff"):
            SamplingParams(epsilon_cutoff=wrong)
    assert SamplingParams(1.0, epsilon_cutoff=0.0) == SamplingParams(1.0)
    assert SamplingParams(1.0).filters == TokenFilters() != SamplingParams(1.0, epsilon_cutoff=0.1).filters


def test_epsilon_cutoff_option():
    def options():
        assert parse_args("").sampling_params == SamplingParams(0.8, epsilon_cutoff=0.3)

    call_main(options, "--epsilon_cutoff", "0.3", "--checkpoint_path", "model.pth")


@pytest.mark.skipif(kernels.build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("epsilon", [1e-3, 0.03, 0.9])
@pytest.mark.parametrize("others", [*FILTERS, {"top_k": 5}], ids=str)
def test_epsilon_cutoff_on_a_cpu(others, epsilon):
    """n evenly spaced random numbers draw a token of probability p about n p times, give or take one."""
    assert kernels.build.load_cpp_kernels()
    n, filters = 500, TokenFilters(**others, epsilon_cutoff=epsilon)
    assert has_sample_kernel(CPU_BACKEND, filters)
    rand = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    tokens = sample(LOGITS.expand(n, -1), 1.3, filters, CPU_BACKEND, rand)
    expected = compute_probs(LOGITS[None], 1.3, filters)[0]
    assert (tokens.bincount(minlength=len(LOGITS)) - n * expected).abs().max() < 1.01


@pytest.mark.parametrize("epsilon", [1e-3, 0.03, 0.9])
@pytest.mark.parametrize("others", FILTERS, ids=str)
def test_epsilon_cutoff_on_a_gpu(others, epsilon):
    """The drawn token has the best score, logit + temperature * noise, of the tokens that the filters keep."""
    filters, rand = TokenFilters(**others, epsilon_cutoff=epsilon), torch.rand(5, 1, dtype=torch.float64)
    assert has_sample_kernel(TRITON_BACKEND, filters)
    scores = LOGITS + 1.3 * exact_gumbel_noise(rand, len(LOGITS))
    is_kept = compute_probs(LOGITS[None], 1.3, filters) > 0
    tokens = sample(LOGITS.expand(5, -1), 1.3, filters, TRITON_BACKEND, rand)
    assert torch.equal(tokens, scores.masked_fill(~is_kept, -torch.inf).argmax(-1))
'''


NF4_TESTS = '''
import pytest
import torch

import kernels.build

import kernels.triton.linear  # registers the operations, which run in Triton's interpreter
from formats.nf4 import NF4, VALUES
from layers.backend import CPU_BACKEND
from layers.packing import pack_weights
from model import DTYPES
from tests import tiny

from scripts.benchmarking.speed import random_linear
from scripts.kernel_checks.exact_results import use_triton


def test_nf4_rounds_to_the_nearest():
    w = torch.randn(20, 136)
    tensors = NF4().quantize(w)
    scales = tensors["scales"].float().repeat_interleave(64, 1)[:, :136, None]
    nearest = (scales * torch.tensor(VALUES) - w[..., None]).abs().amin(-1)
    error = (NF4().dequantize(tensors, w.dtype) - w).abs()
    torch.testing.assert_close(error, nearest, atol=1e-6, rtol=0)


def test_nf4_at_random():
    w = random_linear((200, 600), NF4(), torch.device("cpu"), torch.bfloat16).dequantize(torch.float32)
    assert abs(w.mean()) < 0.05 * 600**-0.5 and w.std().item() == pytest.approx(600**-0.5, rel=0.1)


def check_matmuls(w, exact, x, weight_error, rounding_error):
    """A dot product of length K in float32, of weights with a relative error, and rounded to 32 or 16 bits."""
    assert torch.equal(w.dequantize(torch.float32), exact)
    y, terms = x.double() @ exact.double().T, x.double().abs() @ exact.double().abs().T
    bound = ((x.shape[-1] + 8) * 2**-24 + weight_error) * terms + rounding_error * y.abs() + 2**-25
    assert ((w(x).double() - y).abs() <= bound).all()


@pytest.mark.skipif(kernels.build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_on_a_cpu(dtype):
    """AMX rounds weights to bfloat16."""
    for n, k, num_tokens in [(48, 72, 1), (33, 200, 5), (48, 136, 33)]:
        w = random_linear((n, k), NF4(), torch.device("cpu"), dtype)
        exact = w.dequantize(torch.float32)
        pack_weights([w], dtype)
        assert w.backend.name == "cpu"
        w.backend = CPU_BACKEND
        u = torch.finfo(dtype).eps / 2
        check_matmuls(w, exact, torch.randn(num_tokens, k).to(dtype), u if dtype == torch.bfloat16 else 0, u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_on_a_gpu(dtype):
    """Both factors of a product have the type of x. Truncating to bfloat16, as the interpreter does, doubles errors."""
    for n, k, num_tokens in [(16, 64, 3), (48, 72, 1), (33, 200, 5)]:
        w = random_linear((n, k), NF4(), torch.device("cpu"), dtype)
        exact = w.dequantize(torch.float32)
        use_triton(w)
        u = torch.finfo(dtype).eps / 2
        error = 2 * u if dtype == torch.bfloat16 else u
        check_matmuls(w, exact, torch.randn(num_tokens, k).to(dtype), 0 if dtype == torch.float32 else error, error)
'''
# Tests that go through a list of formats and do not take minutes
FORMAT_TESTS = ["tests/test_quantize.py", "tests/test_kernels.py", "tests/test_triton.py::test_every_format_is_checked"]
EXAMPLES = {  # name -> diff, tests of ours, and which tests in the tree also try it
    "epsilon_cutoff": (EPSILON_DIFF, EPSILON_TESTS, ["tests/test_sampling.py"]),
    "nf4": (NF4_DIFF, NF4_TESTS, FORMAT_TESTS),
}


def test_every_block_is_checked():
    assert len(EXCERPTS) == PAGE.count("```python")
    assert len(EXCERPTS) + len(EXAMPLES) == PAGE.count("```") / 2


@pytest.mark.parametrize("file, excerpt", EXCERPTS, ids=[file for file, _ in EXCERPTS])
def test_excerpts_are_the_code(file, excerpt):
    """An excerpt has whole lines of the file, in their order. "..." stands for lines that are left out."""
    code, start = "\n" + (ROOT / file).read_text(), 0
    for piece in excerpt.split("...\n"):
        found = code.find("\n" + piece, start)
        assert found >= 0, f"{file} has no lines\n{piece}"
        start = found + len(piece)


@pytest.fixture
def tree(tmp_path):
    """Returns a copy of the sources."""
    for name in (*PACKAGES, "scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", EXAMPLES)
def test_diff_finds_its_place(name):
    """The old lines of each hunk are in the file exactly once, so git apply finds the place after other changes,
    too."""
    for file, hunks in re.findall(r"^--- a/(.*)\n\+\+\+ .*\n((?:[@ +-].*\n)*?)(?=---|\Z)", EXAMPLES[name][0], re.M):
        for hunk in re.split(r"^@@ .*\n", hunks, flags=re.M)[1:]:
            old = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
            assert old and (ROOT / file).read_text().count(f"\n{old}") == 1, f"{file}: {old}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_diff_does_what_the_page_says(name, tree):
    diff, tests, others = EXAMPLES[name]
    subprocess.run(["git", "apply", "--unidiff-zero", "-"], input=diff, text=True, cwd=tree, check=True)
    (tree / "tests/test_more.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_more.py", *others]
    env = os.environ | {"CXXFLAGS": "-O0"}  # less time to compile the kernels
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    (n_passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(n_passed) > 5 and "failed" not in done.stdout
    changed = re.findall(r"^\+\+\+ b/(.*\.py)$", diff, re.M)
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", *changed], cwd=tree, check=True)

"""docs/add_a_model.md: its excerpts stand in the files that they name; its diff, applied to a copy of the tree, adds
top_n_sigma."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.tiny import PACKAGES, ROOT

PAGE = (ROOT / "docs/add_a_model.md").read_text()
EXCERPTS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S)
(DIFF,) = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
MORE = '''
import pytest
import torch

from cli.arguments import parse_args
from config import UsageError
from sampling import SamplingParams, probabilities
from tests.tiny import call


def test_top_n_sigma():
    logits = torch.tensor([[2.0, 1.0, 0.0, -5.0]])
    probs = probabilities(logits, SamplingParams(temperature=3.0, top_n_sigma=0.5))  # the deviation is 3.1
    torch.testing.assert_close(probs[0, :2], torch.tensor([2 / 3, 1 / 3]).softmax(-1))
    assert probs[0, 2:].tolist() == [0, 0]
    for wrong in (0.0, float("inf")):
        with pytest.raises(UsageError, match="top_n_sigma"):
            SamplingParams(top_n_sigma=wrong)


def test_top_n_sigma_option():
    def options():
        assert parse_args("").sampling == SamplingParams(0.8, top_n_sigma=0.3)

    call(options, "--top_n_sigma", "0.3", "--checkpoint_path", "model.pth")
'''


def test_every_block_is_checked():
    assert len(EXCERPTS) == PAGE.count("```python")
    assert len(EXCERPTS) + 1 == PAGE.count("```") / 2


@pytest.mark.parametrize("file, excerpt", EXCERPTS, ids=[file for file, _ in EXCERPTS])
def test_excerpts_are_the_code(file, excerpt):
    """Whole lines, and in the file's order. Where the page has "...", the file has more."""
    code, start = "\n" + (ROOT / file).read_text(), 0
    for piece in excerpt.split("...\n"):
        found = code.find("\n" + piece, start)
        assert found >= 0, f"{file} has no lines\n{piece}"
        start = found + len(piece)


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources with the page's diff."""
    for name in (*PACKAGES, "scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", "-"], input=DIFF, text=True, cwd=tmp_path, check=True)
    return tmp_path


def test_top_n_sigma(tree):
    (tree / "tests/test_more.py").write_text(MORE)
    files = ["tests/test_more.py", "tests/test_sampling.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (n_passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(n_passed) > 5 and "failed" not in done.stdout
    changed = re.findall(r"^\+\+\+ b/(.*\.py)$", DIFF, re.M)
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", *changed], cwd=tree, check=True)

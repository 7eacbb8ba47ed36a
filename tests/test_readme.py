"""Every command in the READMEs runs, on tiny random checkpoints; what needs the network or a real model is left out.
The README's tables are what scripts/tables.py makes of benchmarks/*.json."""

import os
import re
import subprocess

import pytest

from tests.tiny import ROOT, convert, write_folder

import tables  # isort: skip  (tests.tiny put scripts/ on the path)

COMMANDS = [
    re.sub(r"\s+#.*", "", line.strip())
    for readme in (ROOT / "README.md", ROOT / "mixtral-moe/README.md")
    for line in readme.read_text().splitlines()
    if re.match(r"    (\w+=\S+ )?(python|torchrun|\./)", line)
]
ELSEWHERE = "demo.sh test.sh download.py scripts/prepare.sh convert_gguf measure_speculation compare_llama_cpp".split()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the scripts with a tiny model as checkpoints/M."""
    tree = tmp_path_factory.mktemp("tree")
    for name in [p.name for p in ROOT.iterdir() if p.suffix in (".py", ".cpp")] + ["scripts", "mixtral-moe", "tests"]:
        os.symlink(ROOT / name, tree / name)
    write_folder("llama3", tree / "checkpoints/M")
    convert(tree / "checkpoints/M")
    (tree / "prompts.txt").write_text("Hello\nOnce\n")
    return tree


def test_tables():
    text = (ROOT / "README.md").read_text()
    assert tables.with_tables(text) == text and text.count("| --: |") >= len(tables.TABLES)


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in ELSEWHERE)])
def test_command(tree, command):
    command = command.replace("meta-llama/Llama-3.2-1B", "M").replace("TinyLlama-1.1B", "checkpoints/M/config.json")
    if "generate" in command:
        command += " --max_new_tokens 4"
    elif "benchmark" in command:
        command += " --max_new_tokens 4"
    done = subprocess.run(command, shell=True, cwd=tree, input="Hi\n", capture_output=True, text=True,
                          env=os.environ | {"TINY": "1", "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"})  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout

"""Every command in the READMEs runs, on tiny random checkpoints; what needs the network is left out."""

import os
import re
import subprocess

import pytest

from tests.tiny import ROOT, convert, write_folder

COMMANDS = [
    re.sub(r"\s+#.*", "", line.strip())
    for readme in (ROOT / "README.md", ROOT / "mixtral-moe/README.md")
    for line in readme.read_text().splitlines()
    if re.match(r"    (\w+=\S+ )?(python|\./)", line)
]
ONLINE = ("scripts/demo.sh", "scripts/test.sh", "scripts/download.py", "scripts/prepare.sh", "convert_gguf")


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


def test_there_are_commands():
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in ONLINE)])
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

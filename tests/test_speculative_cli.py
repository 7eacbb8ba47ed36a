"""Speculative decoding from the command line and by scripts/speculate.sh."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import generate
import llm
import quantize
from checkpoint import empty_model, read_checkpoint, save_checkpoint
from cli.speculation import warn_without_kernels
from config import ModelConfig
from engine import speculate as speculate_module
from layers.backend import CPU_BACKEND, TRITON_BACKEND
from layers.linear import quantizable_linears
from tests.byte_models import random_folder, set_up
from tests.test_readme import calls_of_script, copy_of_scripts, run_python
from tests.tiny import call_main, convert, write_folder
from utils.errors import UsageError
from utils.files import ROOT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a model that answers in capitals, and of one with another vocabulary."""
    model = random_folder(tmp_path_factory.mktemp("model"), max_seq_len=128)
    other = random_folder(tmp_path_factory.mktemp("other"), max_seq_len=128)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {"<0x41>": 66, "<0x42>": 65}
    (other / "tokenizer.json").write_text(json.dumps(data))
    return model, other


def run_main(capsys, monkeypatch, folder, *arguments, stdin: str = ""):
    set_up(monkeypatch, folder / "model.pth", arguments, stdin)
    generate.main()
    return capsys.readouterr()


WAYS = [["--prompt_lookup"], ["--prompt_lookup", "2", "--speculate_k", "3"], ["--draft_checkpoint_path"]]


@pytest.mark.parametrize("way", WAYS, ids=["lookup", "lookup2", "draft"])
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_json(way, temperature, folders, capsys, monkeypatch):
    folder = folders[0]
    if way[0].startswith("--draft"):
        way = [*way, str(folder / "model.pth")]
        # Otherwise a draft as large as the model would not pay
        monkeypatch.setattr(speculate_module, "estimate_verify_cost", lambda model: -1.0)
    flags = ["--prompt=ABCABCABC", f"--temperature={temperature}", "--precision=float32", "--json"]
    flags += ["--max_new_tokens=119"]  # to the end of the context
    ours = json.loads(run_main(capsys, monkeypatch, folder, *flags, *way).out)
    again = json.loads(run_main(capsys, monkeypatch, folder, *flags, *way).out)
    assert ours["tokens"] == again["tokens"]
    theirs = json.loads(run_main(capsys, monkeypatch, folder, *flags).out)
    if temperature == "0":
        for key in ("text", "tokens", "generated_tokens", "finish_reason"):
            assert ours[key] == theirs[key]
    counts = ours["accept_counts"]
    assert theirs["accept_counts"] is None and len(counts) == {"3": 4, "--prompt_lookup": 8}.get(way[-1], 6)
    assert 1 + sum(n * count for n, count in enumerate(counts, 1)) == ours["generated_tokens"]
    assert sum(counts[1:]) > 0


def test_an_end_token_in_a_step_ends_it(folders, capsys, monkeypatch):
    folder = folders[0]
    flags = ["--prompt=AB", "--temperature=0", "--precision=float32", "--max_new_tokens=100", "--json"]
    tokens = json.loads(run_main(capsys, monkeypatch, folder, *flags).out)["tokens"][0]
    load = llm.load

    def with_end(end: int):
        def loaded(*args, **options):
            model, tokenizer = load(*args, **options)
            object.__setattr__(model.config, "eos_ids", (end,))
            return model, tokenizer

        return loaded

    ends = sorted(set(tokens), key=tokens.index)[1:8]
    for end in ends:
        monkeypatch.setattr(llm, "load", with_end(end))
        monkeypatch.setattr(speculate_module, "estimate_verify_cost", lambda model: -1.0)
        way = ["--draft_checkpoint_path", str(folder / "model.pth"), "--speculate_k=7"]
        result = json.loads(run_main(capsys, monkeypatch, folder, *flags, *way).out)
        assert result["tokens"][0] == tokens[: tokens.index(end) + 1]
        assert result["finish_reason"] == ["stop"]
        assert 1 + sum(n * count for n, count in enumerate(result["accept_counts"], 1)) == result["generated_tokens"]


@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_conversation(way, folders, capsys, monkeypatch):
    folder = folders[0]
    way = ["--prompt_lookup"] if way == "lookup" else ["--draft_checkpoint_path", str(folder / "model.pth")]
    flags = ["--chat", "--temperature=0", "--precision=float32", "--max_new_tokens=20"]
    said = "Hello\nWho?\n/reset\nHello\nAnd so on and so on\n"
    expected = run_main(capsys, monkeypatch, folder, *flags, stdin=said).out
    assert run_main(capsys, monkeypatch, folder, *flags, *way, stdin=said).out == expected and len(expected) > 40


def short_draft(folder) -> list[str]:
    """Returns the flags of a draft with a context of 32 tokens."""
    config, _, tensors = read_checkpoint(folder / "model.pth")
    save_checkpoint(folder / "short.pth", replace(config, max_seq_len=32), tensors)
    return ["--draft_checkpoint_path", str(folder / "short.pth"), "--max_new_tokens=20"]


def test_a_conversation_as_long_as_the_drafts_context(folders, capsys, monkeypatch):
    flags = ["--chat", *short_draft(folders[0])]
    said = run_main(capsys, monkeypatch, folders[0], *flags, stdin="Hello\nWho?\n" * 3).err
    assert said.startswith("The draft's context of 32") and "context is full" in said


def test_mistakes(folders, capsys, monkeypatch):
    model, other = folders
    draft, short = ["--draft_checkpoint_path", str(model / "model.pth")], short_draft(model)
    for flags, said in [
        ([*draft, "--prompt_lookup"], "choose one"),
        (["--speculate_k=3"], "belongs to"),
        ([*draft, "--batch_size=2"], "one sequence"),
        (["--prompt_lookup=1"], "at least 2"),
        ([*draft, "--speculate_k=0"], "at least 1"),
        (["--draft_checkpoint_path", str(other / "model.pth")], "vocabulary"),
        (["--draft_checkpoint_path", str(model / "none.pth")], "none.pth does not exist"),
        (["--draft_checkpoint_path", str(model.parent / "none" / "model.pth")], "none/model.pth does not exist"),
        ([*short, "--prompt", "a" * 20], "the context of 32 tokens, the draft's; lower --max_new_tokens"),
    ]:
        with pytest.raises(UsageError, match=said):
            run_main(capsys, monkeypatch, model, *flags)


@pytest.mark.parametrize("heads_per_kv_head, most", [(1, 15), (4, 15), (7, 8), (16, 3)])
def test_only_a_gpu_verifies_without_kernels(heads_per_kv_head, most, capsys):
    model = empty_model(ModelConfig(64, 1, 16 * heads_per_kv_head, 16, 4, 64, 64, 64))
    cases = [(TRITON_BACKEND, most, False), (TRITON_BACKEND, most + 1, True), (CPU_BACKEND, 32, False)]
    for backend, k, warns in cases:
        for _, linear in quantizable_linears(model):
            linear.backend = backend
        warn_without_kernels(k, model)
        said = f"More than {most} tokens at a time are verified without the kernels.\n"
        assert capsys.readouterr().err == said * warns


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project with a tiny model and a tiny draft where the scripts look for large ones."""
    tree = copy_of_scripts(tmp_path_factory.mktemp("tree"))
    for name, family in (("target", "llama2"), ("draft", "qwen3")):
        write_folder(family, tree / name)
        call_main(quantize.main, "--checkpoint_path", convert(tree / name), "--mode", "int4")
    links = {
        "meta-llama/Llama-2-70b-chat-hf": "target", "meta-llama/Llama-2-7b-chat-hf": "draft",
        "codellama/CodeLlama-34b-Python-hf": "target", "codellama/CodeLlama-7b-Python-hf": "draft",
    }
    for link, name in links.items():
        (tree / "checkpoints" / link).parent.mkdir(parents=True, exist_ok=True)
        (tree / "checkpoints" / link).symlink_to(tree / name)
    return tree


@pytest.mark.parametrize("setup", ["7B_int4", "34B_bf16", "70B_int4", "tp_70B_bf16"])
def test_script(setup, tree, monkeypatch, capsys):
    """The Python calls of a script run in this process, because torch takes seconds to load. Only ranks are started by
    the script."""
    monkeypatch.chdir(tree)
    command = f"scripts/speculate_{setup}.sh --max_new_tokens=8 --device=cpu --json --ignore_eos"
    if setup.startswith("tp"):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # torchrun and python of this environment
        environment = os.environ | {"RANKS": "2", "PATH": path}
        done = subprocess.run(command.split(), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        (arguments,) = calls_of_script(command, tree)
        run_python(arguments, less={})
        printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["generated_tokens"] == 8 and len(result["accept_counts"]) == 6
    assert result["quantization"] == ("int4.g32" if setup == "70B_int4" else None)


def test_script_needs_two_models():
    done = subprocess.run([ROOT / "scripts/speculate.sh", "13B"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and "70B_int4" in done.stderr

"""generate.py as a command: the fields of --json, the output and its order, and the same text for the same options.
test_mistakes.py tests wrong options, test_chat.py conversations."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch

import generate
from cli import report
from cli.script import run_script
from config import MoEConfig
from engine import scheduler
from tests.byte_models import END, VOCAB_SIZE, random_folder, set_up
from tests.cpu_kernels import stored_rows
from text.tokenizer import load_tokenizer
from utils import machine
from utils.files import ROOT

FIELDS = {
    "text": list,
    "tokens": list,
    "prompt_tokens": int,
    "generated_tokens": int,
    "finish_reason": list,
    "samples": list,
    "prompt": str,
    "seed": int,
    "prefill_seconds": float,
    "decode_tokens_per_sec": float,
    "total_tokens_per_sec": float,
    "compile_seconds": float,
    "load_seconds": float,
    "model_bytes": int,
    "bandwidth_gb_per_sec": float,
    "peak_memory_bytes": int,
    "device": str,
    "precision": str,
    "quantization": type(None),
    "accept_counts": type(None),
}


@pytest.mark.parametrize("precision, size", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=5, top_k=2)], ids=["dense", "moe"])
def test_json_adds_up(tmp_path, ask, moe, precision, size):
    folder = random_folder(tmp_path, max_seq_len=64, tie_embeddings=moe is None, moe=moe)
    options = ["--prompt=Hello", "--max_new_tokens=9", "--num_samples=2", "--ignore_eos", "--batch_size=3"]
    (r,) = ask(folder, *options, f"--precision={precision}")
    assert {name: type(value) for name, value in r.items()} == FIELDS
    assert r["prompt_tokens"] == 5 and r["generated_tokens"] == 27 and [len(row) for row in r["tokens"]] == [9, 9, 9]
    tokenizer = load_tokenizer(folder)
    assert len(r["samples"]) == 2 and r["samples"][1] == {name: r[name] for name in ("text", "tokens", "finish_reason")}
    assert (r["prompt"], r["seed"]) == ("Hello", 1234)
    assert r["total_tokens_per_sec"] == 3 * r["decode_tokens_per_sec"]
    assert r["text"] == [tokenizer.decode(row, prefix_ids=tokenizer.encode("Hello")) for row in r["tokens"]]
    assert (r["finish_reason"], r["device"], r["precision"]) == (["length"] * 3, "cpu", precision)

    attention = (4 + 2 * 2) * 8 * 32 + 4 * 8 * 32
    ffn = 3 * 48 * 32
    router, head = (stored_rows(n, getattr(torch, precision)) * 32 for n in (5, VOCAB_SIZE))
    layer = 2 * 32 + attention + (ffn if moe is None else router + 2 * ffn)
    assert r["model_bytes"] == size * (2 * layer + 32 + head)
    position = 3 * 2 * 2 * 2 * 8 * size  # rows, layers, keys and values, heads, head_dim
    active_weight_bytes = r["bandwidth_gb_per_sec"] * 1e9 / r["decode_tokens_per_sec"]
    assert 6 * position <= active_weight_bytes * 1.0001 - r["model_bytes"] <= 14 * position * 1.01
    assert all(r[name] > 0 for name, kind in FIELDS.items() if kind is float and name != "compile_seconds")
    assert r["peak_memory_bytes"] > 2**20


def test_rows_are_samples_and_seeds_repeat(recall_model, ask, cli):
    options = ["--prompt=a", "--max_new_tokens=12", "--batch_size=8"]
    (first,), (again,), (other,) = (ask(recall_model, *options, f"--seed={seed}") for seed in (1, 1, 2))
    assert first["tokens"] == again["tokens"] != other["tokens"]
    assert len(set(first["text"])) == 8 and len({text[0] for text in first["text"]}) > 1
    printed = cli(recall_model, *options, "--seed=1").splitlines()
    assert [line for line in printed if not line.startswith("---")] == first["text"]
    (two,) = ask(recall_model, *options, "--seed=1", "--num_samples=2")
    assert two["tokens"] != first["tokens"] and two["generated_tokens"] == 96
    (greedy,) = ask(recall_model, *options, "--temperature=0")
    assert greedy["text"] == ["a" * 12] * 8  # the lowest id of the tied ones


def test_texts_are_labelled(recall_model, cli, tmp_path):
    (tmp_path / "prompts").write_text("5\n0\n")
    flags = [f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=2", "--temperature=0"]
    assert cli(recall_model, "--prompt=0", *flags[1:]) == "12\n"
    assert cli(recall_model, *flags) == "--- prompt 1\n67\n--- prompt 2\n12\n"
    numbers = [(i, j, k) for i in (1, 2) for j in (1, 2) for k in (1, 2)]
    lines = cli(recall_model, *flags, "--num_samples=2", "--batch_size=2").splitlines()
    assert lines[::2] == [f"--- prompt {i}, sample {j}, sequence {k}" for i, j, k in numbers]
    assert lines[1::2] == ["67"] * 4 + ["12"] * 4


def test_prompt_file_runs_each_line(recall_model, ask, tmp_path):
    (tmp_path / "prompts").write_text("S\n\n  \nab\u2028P\r\né0", encoding="utf-8-sig")  # a mark first
    results = ask(recall_model, f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=12")
    assert [r["prompt_tokens"] for r in results] == [1, 6, 3]
    assert [r["text"] for r in results] == [["🙂E"], [""], ["123456789012"]]
    assert [r["finish_reason"] for r in results] == [["stop"], ["stop"], ["length"]]


@pytest.mark.parametrize("prompt, text, end", [("S", "🙂E", END), ("P", "", ord(".")), ("W", " X", ord("!"))])
def test_end_tokens_end(recall_model, ask, prompt, text, end):
    (r,) = ask(recall_model, f"--prompt={prompt}", "--batch_size=2")
    assert r["tokens"] == [[*text.encode(), end]] * 2 and r["generated_tokens"] == 2 * len(r["tokens"][0])
    assert (r["text"], r["finish_reason"]) == ([text] * 2, ["stop"] * 2)


def test_ignore_eos_goes_on(recall_model, ask):
    (r,) = ask(recall_model, "--prompt=S", "--max_new_tokens=9", "--ignore_eos")
    assert r["tokens"] == [[*"🙂E".encode(), END, END, END, END]] and r["finish_reason"] == ["length"]
    (r,) = ask(recall_model, "--prompt=P", "--max_new_tokens=3", "--ignore_eos")
    assert r["tokens"] == [[46] * 3] and r["text"] == ["..."]


def test_one_token_and_a_full_context(recall_model, ask):
    (r,) = ask(recall_model, "--prompt=0", "--max_new_tokens=1")
    assert r["text"] == ["1"] and r["decode_tokens_per_sec"] == r["bandwidth_gb_per_sec"] == 0
    (r,) = ask(recall_model, "--prompt_tokens=252", "--max_new_tokens=4", "--ignore_eos")
    assert r["prompt_tokens"] == 252 and r["generated_tokens"] == 4


def test_prompt_tokens_repeat(chat_model, ask):
    options = ["--prompt_tokens=40", "--max_new_tokens=8", "--temperature=0"]
    (a,), (b,), (c,) = (ask(chat_model, *options, f"--seed={seed}") for seed in (1, 1, 2))
    assert a["tokens"] == b["tokens"] != c["tokens"]


@pytest.mark.parametrize("rows", [1, 2])
def test_whole_characters_stream(recall_model, cli, monkeypatch, rows):
    printed = []

    class Terminal(io.StringIO):
        def write(self, text):
            printed.extend([text] if text else [])

    monkeypatch.setattr(sys, "stdout", Terminal())
    cli(recall_model, "--prompt=S", f"--batch_size={rows}")
    label = ["--- sequence 1", "\n"] if rows > 1 else []
    assert printed[: len(label) + 3] == [*label, "🙂", "E", "\n"] and "".join(printed).count("🙂E\n") == rows


def test_profile(recall_model, cli, tmp_path):
    cli(recall_model, "--prompt=0", "--max_new_tokens=3", "--json", f"--profile={tmp_path / 'trace.json'}")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_compiled_is_eager(chat_model, ask):
    options = ["--prompt=Hello", "--max_new_tokens=155", "--num_samples=2", "--temperature=0", "--precision=float32"]
    (eager,), (compiled,) = ask(chat_model, *options), ask(chat_model, *options, "--compile", "--compile_prefill")
    (plain,) = ask(chat_model, *options, "--kernels=off")
    assert compiled["tokens"] == eager["tokens"] == plain["tokens"]


@pytest.mark.parametrize("prompt, status", [("S", 0), ("", 2)])
def test_process(recall_model, prompt, status):
    """In a process of its own, generate.py prints one JSON object or nothing to stdout, and nothing or one line to
    stderr."""
    python = [sys.executable, "-I"] if status == 0 else [sys.executable]  # -I: sys.path lacks the script's folder
    command = [*python, ROOT / "generate.py", f"--checkpoint_path={recall_model / 'model.pth'}", "--device=cpu"]
    done = subprocess.run([*command, f"--prompt={prompt}", "--json"], capture_output=True, text=True)
    assert done.returncode == status and (done.stdout + done.stderr).count("\n") == 1
    assert json.loads(done.stdout)["text"] == ["🙂E"] if status == 0 else done.stderr.startswith("generate.py: ")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 512.00 MiB")])
def test_the_summary_without_room_for_a_measurement(recall_model, tmp_path, monkeypatch, capsys, error):
    def refuse(tensors):
        raise error

    (tmp_path / "prompts").write_text("a\nb\nc\n")
    options = [f"--prompt_file={tmp_path}/prompts", "--max_new_tokens=4", "--batch_size=3", "--ignore_eos"]
    set_up(monkeypatch, recall_model / "model.pth", options)
    monkeypatch.setattr(report, "measure_read_bandwidth_on", refuse)
    run_script(generate.main)
    out, err = capsys.readouterr()
    assert out.count(", sequence 2\n") == 3 and "%" not in err
    assert len(re.findall(r"12 generated in 3 sequences, at [\d.]+ tokens/s each: [\d.]+ GB/s \(load", err)) == 3


@pytest.mark.parametrize(
    "is_parallel, free, hint",
    [(False, 1000, generate.OOM_HINT), (True, 1000, generate.OOM_HINT), (True, 2000, "--parallel 1 fits")],
)
def test_an_out_of_memory_error_ends_with_advice(
    recall_model, tmp_path, monkeypatch, capsys, is_parallel, free, hint
):
    (tmp_path / "prompts").write_text("a\nb\n")
    flags = [f"--prompt_file={tmp_path}/prompts", "--kernels=off", *(["--parallel=2"] if is_parallel else [])]
    set_up(monkeypatch, recall_model / "model.pth", flags)
    for module in (machine, scheduler):
        monkeypatch.setattr(module, "free_memory", lambda: free)
    with pytest.raises(SystemExit) as stopped:
        run_script(generate.main, generate.OOM_HINT)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert f" tokens takes 0.00 GB of memory, of which 0.00 are free; {hint}" in line


@pytest.mark.parametrize("caches_hold_it", [False, True])
def test_the_summary_states_the_share_of_bandwidth(recall_model, monkeypatch, capsys, caches_hold_it):
    """The summary states the share of memory bandwidth, unless the model fits into the caches of the processor."""
    monkeypatch.setattr(machine, "cache_bytes", lambda: 2**20 if caches_hold_it else 0)
    set_up(monkeypatch, recall_model / "model.pth", ["--prompt=a", "--max_new_tokens=4", "--ignore_eos"])
    run_script(generate.main)
    share = "" if caches_hold_it else r", \d+ % of the [\d.]+ GB/s this machine reads"
    sentence = rf"4 generated at [\d.]+ tokens/s: [\d.]+ GB/s{share} \(load"
    assert re.search(sentence, capsys.readouterr().err)

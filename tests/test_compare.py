"""compare_llama_cpp.py gives both sides the same weights, and computes the right medians and ratios. llama.cpp is not
needed."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from checkpoint import read_checkpoint, save_checkpoint
from cli.script import run_script
from config import ModelConfig, RopeScaling
from converters.canonical_checkpoint import CanonicalCheckpoint
from converters.convert_gguf import dequantize_gguf_tensors, rename_gguf_tensors
from converters.gguf_config import find_architecture, read_gguf_config
from converters.gguf_file import read_gguf
from converters.write_model import write_model
from formats import Unquantized
from layers.rope import rope_frequencies
from scripts import compare_llama_cpp as compare
from scripts import tables
from scripts.benchmarking import compare_files, compare_speed
from scripts.benchmarking.speed import checkpoint_tensors, random_model
from tests.tiny import make_hf
from tests.tiny_gguf import write_gguf
from utils.errors import UsageError

TINY = ModelConfig(64, 2, 4, 2, 16, 96, 80, 512, norm_eps=2**-16, rope_theta=5e5)  # an eps that is the same in float32
VARIANTS = {
    "plain": {},
    "tied": dict(tie_embeddings=True, rope_scaling=RopeScaling("llama3", 8.0)),
    "biases": dict(head_dim=32, n_kv_heads=4, qkv_bias=True, o_proj_bias=True, ffn_bias=True),
}


@pytest.fixture(params=VARIANTS)
def model(request, tmp_path):
    """Returns (config, weights) of a checkpoint bf16.pth in tmp_path, and of BF16.gguf, made of the checkpoint."""
    config = replace(TINY, **VARIANTS[request.param])
    meta = checkpoint_tensors(random_model(config, Unquantized(), torch.device("meta"), torch.bfloat16))
    weights = {name: torch.randn(t.shape).bfloat16() for name, t in meta.items()}
    save_checkpoint(tmp_path / "bf16.pth", config, weights)
    compare_files.write_gguf(tmp_path / "bf16.pth", tmp_path / "BF16.gguf")
    return config, weights


def test_both_sides_hold_the_same_weights(model, tmp_path):
    config, weights = model
    meta, stored = read_gguf(tmp_path / "BF16.gguf")
    back = read_gguf_config(meta, stored)
    tensors, read = dequantize_gguf_tensors(*rename_gguf_tensors(stored, back, find_architecture(meta)), torch.bfloat16)
    write_model(tmp_path / "back.pth", CanonicalCheckpoint(back, tensors, read))
    _, _, tensors = read_checkpoint(tmp_path / "back.pth")
    # A GGUF has the divisors of the RoPE frequencies, but not the rule that gives them.
    assert replace(back, rope_scaling=config.rope_scaling) == config
    torch.testing.assert_close(rope_frequencies(back, length=1), rope_frequencies(config, length=1))
    assert tensors.keys() == weights.keys() and all(torch.equal(t, weights[name]) for name, t in tensors.items())

    compare_files.make_ours(tmp_path)
    for name, format in compare_files.OURS.items():
        assert read_checkpoint(tmp_path / f"{name}.pth")[1] == format.to_dict()
    files = compare_files.files_in(tmp_path)
    sizes = compare_speed.bytes_per_token({name: files[name] for name in ("bf16", *compare_files.OURS, "BF16")})
    wider = 2 * sum(t.numel() for t in weights.values() if t.dim() == 1)  # theirs are float32
    assert sizes["BF16"] == sizes["bf16"] + wider + (4 * 8 if config.rope_scaling else 0)
    assert sizes["bf16"] > sizes["int8"] > sizes["int4.g32"]
    step = sum(t.nbytes for name, t in weights.items() if config.tie_embeddings or "embed_tokens" not in name)
    assert sizes["bf16"] == step + 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * (5 + 32.5)


@pytest.mark.parametrize(("family", "tokens_read"), [("gemma3", (6 + 7 + 8 + 61 * 9) / 64), ("qwen3-moe", 5 + 32.5)])
def test_a_gguf_of_any_architecture(family, tokens_read, tmp_path, monkeypatch):
    """A GGUF of another architecture is compared, too. A function that copies files stands in for llama.cpp."""
    theirs = make_hf(family, hidden_size=64, intermediate_size=96, max_position_embeddings=512)
    files = compare_files.files_in(tmp_path) | {"file": write_gguf(tmp_path / "m.gguf", theirs)}
    compare_files.make_model(None, files["file"], files["bf16"])
    compare_files.make_ours(tmp_path)

    made = []

    def quantize(source: bytes, target: bytes, params) -> int:
        made.append((Path(source.decode()).name, Path(target.decode()).name, params.ftype))
        shutil.copy(source, target)
        return 0 if params.allow_requantize else 1

    llama_cpp = SimpleNamespace(
        llama_model_quantize_default_params=SimpleNamespace,
        llama_model_quantize=quantize,
        llama_print_system_info=lambda: b"A CPU",
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", llama_cpp)
    assert compare_files.make_theirs(files, threads=1) == "A CPU"
    assert made == [
        ("m.gguf", "BF16.gguf", 32), ("BF16.gguf", "Q8_0.gguf", 7), ("BF16.gguf", "Q4_0.gguf", 2),
        ("BF16.gguf", "Q4_1.gguf", 3), ("BF16.gguf", "Q4_K_M.gguf", 15),
    ]
    sizes = compare_speed.bytes_per_token(files)
    assert sizes.keys() >= {name for pair in compare.PAIRS + compare.PAIRS_OF_FILE for name in pair}
    cache = 2 * 2 * 3 * 2 * 16 * tokens_read
    assert sizes["file"] - cache == 2 * (sizes["bf16"] - cache)  # the file's weights are float32
    monkeypatch.setattr(llama_cpp, "llama_model_quantize", lambda *args: 1)
    with pytest.raises(UsageError, match="llama.cpp cannot make BF16 of .*m.gguf"):
        compare_files.make_theirs(files, threads=1)


@pytest.mark.parametrize("model", ["plain"], indirect=True)
def test_rounds(model, tmp_path, monkeypatch):
    """measure returns a row for each round. Our own side stands in for llama.cpp."""
    monkeypatch.setitem(compare_speed.LOADERS, "theirs", compare_speed.load_ours)
    compare_files.make_ours(tmp_path)
    files = {"file": tmp_path / "bf16.pth", "int4.g32": tmp_path / "int4.g32.pth"}
    sizes = {"file": 2000, "int4.g32": 1000}
    pair, bar = compare_speed.Pair("file", "int4.g32"), tqdm(disable=True)
    rounds = compare_speed.measure(files, pair, sizes, 2, 1, bar, tasks=[*compare_speed.TASKS, 1, 9])
    assert len(rounds) == 2
    for side in (r[side] for r in rounds for side in ("ours", "theirs")):
        assert side.keys() == {"decode", "prefill", 1, 9, "share_of_read"} and min(side.values()) > 0
    for r in rounds:
        assert r["theirs"]["share_of_read"] == r["theirs"]["decode"] * 1000 / r["read_bytes_per_sec"]
        for side in ("ours", "theirs"):
            r[side] = {task: r[side][task] for task in (1, 9)}
    row = compare_speed.summarize(pair, rounds, sizes)
    assert row["ours"].keys() == {1, 9, "file", "bytes_per_token"} and row["9_ratio"] > 0
    lines = tables.table("parallel", {"pairs": [row] * 3}).splitlines()
    assert len(lines) == 4 and lines[-1].startswith("| 9 |")
    files["file"].unlink()
    with pytest.raises(UsageError, match="bf16.pth does not exist"):
        compare_speed.measure(files, pair, sizes, 2, 1, bar)


def test_medians_over_rounds():
    """The ratio is the median of the ratios 2, 1 and 3 in the rounds, not the ratio of the medians, which are equal."""
    sizes = {name: 10**6 for pair in compare.PAIRS for name in pair}
    rounds = []
    for ours, theirs in ((10, 5), (20, 20), (60, 20)):
        sides = {"ours": ours, "theirs": theirs}
        pair = {side: {"decode": x, "prefill": 10 * x, "share_of_read": x / 100} for side, x in sides.items()}
        rounds.append(pair | {"read_bytes_per_sec": 1e8})
    rows = [compare_speed.summarize(names, rounds, sizes) for names in compare.PAIRS]
    assert [(row["ours"]["file"], row["theirs"]["file"]) for row in rows] == compare.PAIRS
    for row in rows:
        assert (row["decode_ratio"], row["prefill_ratio"]) == (2, 2)
        assert row["ours"]["decode"] == row["theirs"]["decode"] == 20 and row["ours"]["share_of_read"] == 0.2
    last_line = tables.table("llama_cpp", {"model": "M", "pairs": rows}).splitlines()[-1]
    assert last_line == "| M, int4.g32 / Q4_K_M | 20.0 / 20.0 | **2.00** | 20% / 20% | 200 / 200 | **2.00** |"


@pytest.mark.parametrize(
    ["missing", "flags", "words"],
    [
        ("llama_cpp", "", "llama_cpp is missing; pip install llama-cpp-python gguf matplotlib"),
        ("gguf", "", "pip install llama-cpp-python gguf matplotlib"),
        (None, "--rounds 0", "at least 1"),
        (None, "--threads 0", "1 to 1024"),
        (None, "--parallel 8 0", "from 1 to 102"),
        (None, "--json nowhere/x.json", "a folder that exists"),
        (None, "--plot .", "must be a file"),
        (None, "--gguf x.gguf", "not allowed with argument --config"),
    ],
)
def test_one_line_for_a_mistake(missing, flags, words, monkeypatch, capsys):
    if missing:
        monkeypatch.setitem(sys.modules, "llama_cpp", sys)  # as if llama_cpp were installed
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", f"compare_llama_cpp.py --config TinyLlama-1.1B {flags}".split())
    with pytest.raises(SystemExit) as exit:
        run_script(compare.main)
    assert exit.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ["name", "words"],
    [("TinyLlama", "neither a config.json"), ("x.json", "does not exist"), ("Mixtral-8x7B", "this model has moe"),
     ("Qwen3-8B", "this model has qk_norm")],
)
def test_models_that_cannot_be_compared(name, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        compare_files.make_model(name, None, tmp_path / "bf16.pth")
    assert not any(tmp_path.iterdir())

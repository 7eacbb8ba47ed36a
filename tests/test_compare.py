"""compare_llama_cpp.py gives both sides the same weights and judges its rounds as it says; without llama.cpp here."""

import argparse
import sys
from dataclasses import replace

import pytest
import torch

from checkpoint import read_checkpoint, run, save_checkpoint
from model import ModelConfig, RopeScaling, UsageError
from scripts import compare_llama_cpp as compare
from scripts.convert_gguf import convert, read_config, read_gguf, read_tensors

TINY = ModelConfig(64, 2, 4, 2, 16, 96, 80, 512, norm_eps=2**-16, rope_theta=5e5)  # an eps that is the same in float32
VARIANTS = {
    "plain": {},
    "tied": dict(tie_embeddings=True, rope_scaling=RopeScaling("llama3", 8.0)),
    "biases": dict(head_dim=32, n_kv_heads=4, qkv_bias=True, out_bias=True, ffn_bias=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_sides_hold_the_same_weights(variant, tmp_path, monkeypatch):
    config = replace(TINY, **VARIANTS[variant])
    weights = {name: torch.randn(shape).bfloat16() for name, shape in compare.shapes(config).items()}
    table = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    save_checkpoint(tmp_path / "bf16.pth", config, table, weights.items())
    compare.write_gguf(tmp_path / "bf16.pth", tmp_path / "BF16.gguf")
    meta, found = read_gguf(tmp_path / "BF16.gguf")
    back = read_config(meta, found)
    convert(tmp_path / "back.pth", back, *read_tensors(found, back, torch.bfloat16))
    _, _, tensors = read_checkpoint(tmp_path / "back.pth")
    assert back == config
    assert tensors.keys() == weights.keys() and all(torch.equal(t, weights[name]) for name, t in tensors.items())

    compare.make_ours(tmp_path)
    for name, kind in compare.OURS.items():
        assert read_checkpoint(tmp_path / f"{name}.pth")[1] == kind
    monkeypatch.setattr(compare, "THEIRS", {})  # which llama.cpp would have to make
    sizes = compare.bytes_per_token(tmp_path)
    wider = 2 * sum(t.numel() for t in weights.values() if t.dim() == 1)  # theirs are float32
    assert sizes["BF16"] == sizes["bf16"] + wider + (4 * 8 if config.rope_scaling else 0)
    assert sizes["bf16"] > sizes["int8"] > sizes["int4.g32"]
    if variant == "plain":
        monkeypatch.setattr(compare, "CHILD", compare.CHILD + "\nllama_cpp_generate = our_generate")
        (tmp_path / "bf16.gguf").symlink_to(tmp_path / "bf16.pth")
        settings, bar = argparse.Namespace(threads=1, rounds=2), compare.tqdm(disable=True)
        rounds = compare.measure(tmp_path, ("int4.g32", "bf16"), sizes, settings, bar)
        assert len(rounds) == 2
        for done in (r[side] for r in rounds for side in ("ours", "theirs")):
            assert done.keys() == {"decode", "prefill", "share_of_read"} and min(done.values()) > 0
        (tmp_path / "bf16.gguf").unlink()
        with pytest.raises(UsageError, match="bf16.gguf.* failed with status 1"):
            compare.measure(tmp_path, ("int4.g32", "bf16"), sizes, settings, bar)


def test_medians_over_rounds():
    """The ratio is the median of the rounds' ratios, 2, 1 and 3, and not that of the medians, which are equal."""
    sizes = {name: 10**6 for pair in compare.PAIRS for name in pair}
    rounds = []
    for ours, theirs in ((10, 5), (20, 20), (60, 20)):
        sides = {"ours": ours, "theirs": theirs}
        pair = {side: {"decode": x, "prefill": 10 * x, "share_of_read": x / 100} for side, x in sides.items()}
        rounds.append(pair | {"read_bytes_per_sec": 1e8})
    rows = [compare.summarize(names, rounds, sizes) for names in compare.PAIRS]
    assert [(row["ours"]["file"], row["theirs"]["file"]) for row in rows] == compare.PAIRS
    for row in rows:
        assert (row["decode_ratio"], row["prefill_ratio"]) == (2, 2)
        assert row["ours"]["decode"] == row["theirs"]["decode"] == 20 and row["ours"]["share_of_read"] == 0.2
    keys = "model threads cores cpu date torch llama_cpp_python".split()
    lines = compare.table(dict.fromkeys(keys, 1) | {"pairs": rows, "rounds": [rounds] * len(rows)}).splitlines()
    assert len({map(len, lines[-6:])}) == 1 and lines[-1].split()[:5] == ["int4.g32", "Q4_K_M", "20.0", "20.0", "2.00"]


@pytest.mark.parametrize(
    ["missing", "flags", "words"],
    [
        ("llama_cpp", "", "llama_cpp is missing; pip install llama-cpp-python gguf matplotlib"),
        ("gguf", "", "pip install llama-cpp-python gguf matplotlib"),
        (None, "--rounds 0", "at least 1"),
        (None, "--threads 0", "at least 1"),
        (None, "--json nowhere/x.json", "a folder that exists"),
        (None, "--plot .", "must be a file"),
        (None, "--gguf x.gguf", "not allowed with argument --config"),
    ],
)
def test_one_line_for_a_mistake(missing, flags, words, monkeypatch, capsys):
    if missing:
        monkeypatch.setitem(sys.modules, "llama_cpp", sys)  # as if it were here
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", f"compare_llama_cpp.py --config TinyLlama-1.1B {flags}".split())
    with pytest.raises(SystemExit) as exit:
        run(compare.main)
    assert exit.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ["name", "words"],
    [("TinyLlama", "neither a config.json"), ("x.json", "does not exist"), ("Mixtral-8x7B", "dense"),
     ("Qwen3-8B", "without q/k norm")],
)  # fmt: skip
def test_models_that_cannot_be_compared(name, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        compare.make_model(argparse.Namespace(config=name, gguf=None), tmp_path / "bf16.pth")
    assert not any(tmp_path.iterdir())

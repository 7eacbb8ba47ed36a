"""convert_hf_checkpoint.py: every spelling of a checkpoint gives the same model.pth, and a broken one gives none."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from checkpoint import read_checkpoint
from converters.families import MODEL_TYPES
from converters.hf_config import config_from_hf
from tests.tiny import FAMILIES, SIZES, assert_refused, convert, make_hf, same_logits
from tests.tiny_gguf import in_meta_order
from utils.errors import UsageError
from utils.files import ROOT


def hub_config(config: dict) -> dict:
    """Returns a transformers-5 config.json in the form that older versions wrote to the hub."""
    if config["model_type"] == "dbrx":  # attn_config has the rest
        return {name: x for name, x in config.items() if name not in ("rope_parameters", "num_key_value_heads")}
    rope = config.pop("rope_parameters")
    old = config | {"torch_dtype": config.pop("dtype"), "rope_scaling": None}
    if "full_attention" in rope:  # one RoPE for each type of layer
        if config["model_type"] == "gemma3_text":
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            assert old.pop("layer_types") == ["sliding_attention", "full_attention", "sliding_attention"]
            old["sliding_window_pattern"] = 2
        rope = rope["full_attention"]
    kind = rope.pop("rope_type")
    for field in ("rope_theta", "partial_rotary_factor"):
        if field in rope:
            old[field] = rope.pop(field)
    if kind != "default":
        old["rope_scaling"] = rope | {"rope_type" if kind == "llama3" else "type": kind}
    if old.get("head_dim") in (None, old["hidden_size"] // old["num_attention_heads"]):
        old.pop("head_dim", None)
    if old["num_key_value_heads"] == old["num_attention_heads"]:
        del old["num_key_value_heads"]
    if "use_sliding_window" in old:  # Qwen names a window, and switches the window off
        old |= {"sliding_window": 131072, "max_window_layers": 28}
        old.pop("layer_types", None)
    if not old["tie_word_embeddings"]:
        del old["tie_word_embeddings"]
    return old


def write_shards(folder: Path, stem: str, tensors: dict, save):
    """Writes two files and their index. The order of the tensors must not matter, so it is reversed."""
    name, kind = stem.rsplit(".", 1)
    halves = [dict(list(tensors.items())[::-1][k::2]) for k in range(2)]
    files = [f"{name}-0000{k + 1}-of-00002.{kind}" for k in range(2)]
    for half, file in zip(halves, files, strict=True):
        save(half, folder / file)
    weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_is_the_same_model(family, tmp_path):
    theirs = make_hf(family).bfloat16()
    theirs.save_pretrained(tmp_path)
    config, _, tensors = read_checkpoint(convert(tmp_path))
    changed = {"gemma", "gemma2", "gemma3", "dbrx", "nemotron", "starcoder2", "nanochat", "olmo"}  # computed in float32
    changed |= {"phi", "cohere", "cohere2", "stablelm", "stablelm-parallel"}
    wide = {torch.float32} if family in changed else set()
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16} | wide
    named = load_file(tmp_path / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    hub = json.dumps(hub_config(json.loads((tmp_path / "config.json").read_text())))

    def hub_safetensors(folder):
        write_shards(folder, "model.safetensors", named, save_file)

    def hub_bin(folder):
        shared = OrderedDict(named)
        if config.tie_embeddings:
            shared["lm_head.weight"] = shared["model.embed_tokens.weight"]
        torch.save(shared, folder / "pytorch_model.bin")

    def hub_bins(folder):
        write_shards(folder, "pytorch_model.bin", named, torch.save)

    def fused(folder):  # as transformers 5 keeps experts in memory
        theirs.save_pretrained(folder, save_original_format=False)

    for write in (hub_safetensors, hub_bin, hub_bins, fused):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder)
        if write is not fused:
            (folder / "config.json").write_text(hub)
        config2, _, tensors2 = read_checkpoint(convert(folder))
        assert (config2, tensors2.keys()) == (config, tensors.keys())
        assert all(torch.equal(tensors2[name], t) for name, t in tensors.items())


WINDOW = {"sliding_window": 5, "use_sliding_window": True}


@pytest.mark.parametrize("changes", [{}, WINDOW], ids=["sizes", "window"])
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name in hf.CONFIG_MAPPING])
def test_config_defaults_are_transformers(model_type, changes):
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 96,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "vocab_size": 97,
    } | changes
    architectures = {"architectures": [MODEL_TYPES[model_type]]}
    full = config_from_hf(hf.CONFIG_MAPPING[model_type](**sizes).to_dict() | architectures)
    assert config_from_hf(sizes | architectures) == full
    assert config_from_hf(sizes | {"model_type": model_type}) == full


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny checkpoint and an older model.pth, and the tensors of the checkpoint."""
    make_hf("llama2").save_pretrained(tmp_path)
    (tmp_path / "model.pth").write_text("old")
    return tmp_path, {name: t.clone() for name, t in load_file(tmp_path / "model.safetensors").items()}


def test_wrong_tensors_are_named(llama):
    folder, tensors = llama
    k, q = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    beyond = "model.layers.3.mlp.up_proj.weight"
    wrong = {
        f"no tensor {k}": {name: t for name, t in tensors.items() if name != k},
        "tensor model.extra.weight has no place": tensors | {"model.extra.weight": torch.ones(3)},
        f"tensor {beyond} has no place": tensors | {beyond: torch.ones(3)},
        rf"{k} is \[47, 48\]; the config makes it \[48, 48\]": tensors | {k: tensors[k][:47].clone()},
        rf"{q} is \[48\]": tensors | {q: tensors[q][0].clone()},
        "k_proj is quantized, and .* no quantization_config": tensors | {k: tensors[k].to(torch.float8_e4m3fn)},
        f"{k} is torch.int64": tensors | {k: tensors[k].long()},
    }
    for match, content in wrong.items():
        save_file(content, folder / "model.safetensors")
        assert_refused(folder, match)
    # Of several dtypes ours gets the one that loses nothing.
    save_file(tensors | {k: tensors[k].half()}, folder / "model.safetensors")
    assert read_checkpoint(convert(folder))[2]["layers.1.attention.qkv_proj.weight"].dtype == torch.float32


def test_a_tensor_under_two_names(tmp_path):
    make_hf("starcoder2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    up_proj = {"model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.c_fc.weight"].clone()}
    save_file(tensors | up_proj, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "tensors model.layers.1.mlp.* and model.layers.1.mlp.* are the same weight")


MISSING = [
    ("gemma3", "pre_feedforward_layernorm", None),
    ("gemma3", "post_feedforward_layernorm", None),
    ("gemma3", "self_attn.k_norm", None),
    ("olmo2", "post_attention_layernorm", None),
    ("glm4", "post_self_attn_layernorm", None),
    ("phi3", "self_attn.qkv_proj", "self_attn.q_proj"),
    ("phi3", "mlp.gate_up_proj", "mlp.gate_proj"),
    ("gpt-oss", "self_attn.sinks", None),
    ("gpt-oss", "mlp.experts.gate_up_proj_bias", "mlp.experts.0.gate_proj.bias"),
    ("qwen2-moe", "mlp.shared_expert.up_proj", "mlp.experts.6.up_proj"),
    ("qwen2-moe", "mlp.shared_expert_gate", None),
    ("arcee", "mlp.up_proj", None),
    ("starcoder2", "mlp.c_fc", "mlp.up_proj"),
    ("dbrx", "norm_attn_norm.norm_2", None),
    ("dbrx", "norm_attn_norm.attn.Wqkv", "self_attn.q_proj"),
    ("dbrx", "ffn.experts.mlp.w2", "mlp.experts.0.down_proj"),
]


@pytest.mark.parametrize("family, theirs, reported", MISSING)
def test_a_tensor_that_a_layer_lacks(family, theirs, reported, tmp_path):
    """A tensor that one layer lacks, or that has another shape, is named."""
    make_hf(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (name,) = (n for n in tensors if re.fullmatch(rf"\w+\.(layers|blocks)\.1\.{theirs}(\.weight)?", n))
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
    assert_refused(tmp_path, "no tensor model.layers.1." + (reported or "(self_attn|mlp|pre|post)"))
    for wrong in (torch.ones(()), torch.ones(7), torch.ones(2, 3), torch.ones(2, 3, 5, 7)):
        save_file(tensors | {name: wrong}, tmp_path / "model.safetensors")
        assert_refused(tmp_path, "no tensor model.layers.1.|tensor model.layers.1.* is .*; the config makes it ")


def test_a_head_that_differs_from_the_embedding_is_kept(llama):
    """A head that differs from the embedding is kept even if config.json calls it tied, as in transformers."""
    folder, tensors = llama
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    head = read_checkpoint(convert(folder))[2]["lm_head.weight"]
    assert torch.equal(head, tensors["lm_head.weight"])
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert "lm_head.weight" not in read_checkpoint(convert(folder))[2]


# ---- Broken files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_named(llama, bad):
    """A number that is not finite is found anywhere in a tensor, even if the tensor is stacked with others."""
    folder, tensors = llama
    for name in ("model.norm.weight", "model.layers.2.self_attn.v_proj.weight", "model.embed_tokens.weight"):
        changed = tensors[name].clone()
        changed.flatten()[-1] = bad
        save_file(tensors | {name: changed}, folder / "model.safetensors", {"format": "pt"})
        assert_refused(folder, f"tensor {name} holds numbers that are not finite")


def test_broken_safetensors_are_refused(llama):
    folder, _ = llama
    good = (folder / "model.safetensors").read_bytes()
    header = good[8 : 8 + int.from_bytes(good[:8], "little")]

    def with_header(data):
        return len(data).to_bytes(8, "little") + data + good[8 + len(header) :]

    huge = header.replace(b"[48,48]", b"[4800000000000,48]", 1)
    broken = [b"", b"garbage", good[:-1], good[: len(good) // 2], b"\xff" * 7 + b"\x7f"]
    broken += [with_header(data) for data in (huge, b"{}", b"[" * 9999)]
    for content in broken:
        (folder / "model.safetensors").write_bytes(content)
        assert_refused(folder, "truncated or not safetensors|no tensor")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "neither model.safetensors nor pytorch_model.bin")
    index = folder / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        assert_refused(folder, "not a file of the folder itself|does not exist|is a folder")
    for text in ("[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'):
        index.write_text(text)
        assert_refused(folder, "weight_map|not readable JSON|no tensor")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointers_of_git_lfs_are_called_so(llama, name):
    folder, _ = llama
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    assert_refused(folder, f"{name} is a pointer of Git LFS, not the file itself; run `git lfs pull`")


def test_a_tensor_in_two_files(llama):
    """The index decides which of two files counts. A tensor in both that it does not name is refused."""
    folder, tensors = llama
    right = read_checkpoint(convert(folder))[2]["norm.weight"]
    (folder / "model.safetensors").unlink()
    (folder / "model.pth").unlink()
    write_shards(folder, "model.safetensors", tensors, save_file)
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    content, name = json.loads(index.read_text()), "model.norm.weight"
    for file in files:
        for k in range(2):
            copies = {n: t for n, t in load_file(files[k]).items() if n != name}
            save_file(copies | {name: tensors[name] + (file != files[k])}, files[k])
        content["weight_map"][name] = file.name
        index.write_text(json.dumps(content))
        assert torch.equal(read_checkpoint(convert(folder))[2]["norm.weight"], right)
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    (folder / "model.pth").unlink()
    assert_refused(folder, f"both have the tensor {name}, which .*index.json does not name")


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "stories15M.pt"])
def test_broken_pickles_are_refused(llama, name):
    folder, tensors = llama
    (folder / "model.safetensors").unlink()
    if name == "stories15M.pt":
        (folder / "config.json").unlink()
    file = folder / name
    torch.save(tensors, file)
    good = file.read_bytes()
    for content in (b"", b"garbage", good[: len(good) // 2], good[:-30]):
        file.write_bytes(content)
        assert_refused(folder, "truncated or not a PyTorch file")
    for content in ([1], 3, "odd", {"a": 1}, torch.ones(3), {"model": {}, "model_args": 1}, {"model": 1}):
        torch.save(content, file)
        assert_refused(folder, "not a table of tensors|not one of tinyllamas")
    torch.save({"a": Bomb(folder / "ran")}, file)
    assert_refused(folder, "holds more than weights")
    assert not (folder / "ran").exists()


def test_folders_without_a_checkpoint(tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_text("")
    assert_refused(tmp_path, "no config.json, nor exactly one .pt")
    with pytest.raises(UsageError, match="is not a folder"):
        convert(tmp_path / "a.pt")


def test_end_tokens_are_numbers(llama):
    folder, _ = llama
    config = json.loads((folder / "config.json").read_text())
    for wrong in ("</s>", [2, "</s>"], 2.0):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": wrong}))
        assert_refused(folder, "eos_token_id .* is not a token's number")


def test_a_config_of_huge_sizes_takes_no_memory(llama):
    folder, _ = llama
    config, huge = json.loads((folder / "config.json").read_text()), 2**31 - 4

    def refused_with(changes, match):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert_refused(folder, match)

    refused_with({"num_hidden_layers": huge, "head_dim": 12}, "layers")
    refused_with({"vocab_size": huge, "head_dim": 12}, "embed_tokens")
    refused_with({"hidden_size": huge, "head_dim": 12}, "embed_tokens")
    refused_with({"intermediate_size": huge, "head_dim": 12}, "mlp")
    refused_with({"hidden_size": huge, "vocab_size": huge}, "no model has the sizes")
    make_hf("mixtral").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    refused_with({"num_local_experts": 2**31}, "more than any model has")


def test_a_full_disk_leaves_the_old_model(llama):
    folder, _ = llama
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, 200_000):  # while the file is laid out, while tensors are written
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            assert_refused(folder, "cannot write .*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# ---- Memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
from pathlib import Path
from converters.convert_folder import convert_folder

def anonymous_megabytes():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous_megabytes())
        time.sleep(0.001)

convert_folder(Path(sys.argv[1]))
before = peak = anonymous_megabytes()
threading.Thread(target=watch, daemon=True).start()
for folder in sys.argv[2:]:
    convert_folder(Path(folder))
    print(peak - before)
"""


def test_memory_is_one_tensor(tmp_path, llama):
    """A conversion needs anonymous memory for one tensor. (Mapped pages of files do not count, since Linux can drop
    them.)"""
    dim, ffn, layers = 512, 2048, 7  # 120 MB; the largest of our tensors, gate_up_proj, is 8 MB
    sizes = {"hidden_size": dim, "intermediate_size": ffn, "num_hidden_layers": layers, "num_key_value_heads": 4}
    shapes = {"model.embed_tokens": (97, dim), "lm_head": (97, dim), "model.norm": (dim,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{x}_proj": (dim, dim) for x in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{x}_proj": (ffn, dim) for x in ("gate", "up")}
        shapes |= {f"model.layers.{i}.{x}_layernorm": (dim,) for x in ("input", "post_attention")}
        shapes[f"model.layers.{i}.mlp.down_proj"] = (dim, ffn)
    tensors = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    folders = [tmp_path / "safetensors", tmp_path / "bin"]
    for folder in folders:
        folder.mkdir()
        config = SIZES | sizes | {"architectures": ["LlamaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folders[0] / "model.safetensors")
    torch.save(tensors, folders[1] / "pytorch_model.bin")
    command = [sys.executable, "-c", MEASURE, llama[0], *folders]
    grown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert len(grown) == 2 and all(float(megabytes) < 40 for megabytes in grown), grown


# ---- tinyllamas -----------------------------------------------------------------------------------------------------

TINYLLAMAS_NAMES = {
    "model.": "",
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "lm_head": "output",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def test_tinyllamas_give_transformers_logits(tmp_path):
    torch.manual_seed(0)
    changes = {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | changes)).eval()
    state = {}
    for name, t in theirs.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            t = in_meta_order(t, 4 if "q_proj" in name else 2)
        for old, new in TINYLLAMAS_NAMES.items():
            name = name.replace(old, new)
        state[f"_orig_mod.{name}"] = t
    args = {
        "dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 97,
        "multiple_of": 16,
        "max_seq_len": 256,
    }
    torch.save({"model": state, "model_args": args, "iter_num": 1, "config": {}}, tmp_path / "stories15M.pt")
    path = convert(tmp_path)
    same_logits(path, theirs)
    config = read_checkpoint(path)[0]
    assert config.tie_embeddings and (config.bos_id, config.eos_ids) == (1, (1,))


@pytest.mark.parametrize("family", ["nemotron", "starcoder2", "stablelm"])
def test_the_bias_of_every_norm_is_needed(family, tmp_path):
    make_hf(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for theirs, canonical in [
        ("layers.1.input_layernorm", "layers.1.pre_attention_norm"),
        ("layers.0.post_attention_layernorm", "layers.0.pre_ffn_norm"),
        ("norm", "norm"),
    ]:
        name, reported = f"model.{theirs}.bias", f"model.{canonical}.bias"
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
        assert_refused(tmp_path, f"^tensor {reported} is missing$")
        save_file(tensors | {name: torch.ones(7)}, tmp_path / "model.safetensors")
        assert_refused(tmp_path, rf"tensor {reported} is \[7\]; the config makes it \[48\]")


@pytest.mark.parametrize(
    ("family", "changes"), [("nemotron", {"mlp_bias": True, "attention_bias": True}), ("starcoder2", {})]
)
def test_biases_are_those_of_the_config(family, changes, tmp_path):
    """Except for those of norms, no bias is made up, and one that config.json denies is refused."""
    make_hf(family, **changes).save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    theirs = {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"} if family == "starcoder2" else {}
    for name in names:
        bias = f"model.layers.1.{theirs.get(name, name)}.bias"
        save_file({n: t for n, t in tensors.items() if n != bias}, tmp_path / "model.safetensors")
        assert_refused(tmp_path, f"no tensor model.layers.1.{name}.bias")
    denied = dict.fromkeys(("attention_bias", "mlp_bias", "use_bias"), False)
    (tmp_path / "config.json").write_text(json.dumps(config | denied))
    for name in names:
        bias = f"model.layers.1.{theirs.get(name, name)}.bias"
        kept = {n: t for n, t in tensors.items() if not n.endswith("_proj.bias") and "c_fc.bias" not in n}
        save_file(kept | {bias: tensors[bias]}, tmp_path / "model.safetensors")
        assert_refused(tmp_path, f"tensor model.layers.1.{name}.bias has no place")

"""Converters: every spelling of a checkpoint gives the same model.pth, and nothing but a whole one is ever left."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import gguf
import mistral_common
import numpy as np
import pytest
import sentencepiece
import tokenizers as tk
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from checkpoint import read_checkpoint, save_checkpoint
from model import ModelConfig, UsageError
from tests.tiny import FAMILIES, LLAMA3, ROOT, SIZES, convert, make_hf

from convert_gguf import SPLITS, convert_gguf  # isort: skip  (tests.tiny put scripts/ on the path)
from generate import load_model
from tokenizer import load_tokenizer

TEXTS = ["Hello world", "  two  spaces\n\n\tand a tab ", "it's 12345 o'clock, I'LL go", "na\u00efve \u4e2d\u6587",
         "\U0001f600 <s>[INST]</s>", ""]  # fmt: skip


def hub_config(config: dict) -> dict:
    """A transformers-5 config.json as older versions wrote it to the hub."""
    rope = config.pop("rope_parameters")
    kind = rope.pop("rope_type")
    old = config | {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype"), "rope_scaling": None}
    if kind != "default":
        old["rope_scaling"] = rope | {"rope_type" if kind == "llama3" else "type": kind}
    if old.get("head_dim") in (None, old["hidden_size"] // old["num_attention_heads"]):
        old.pop("head_dim", None)
    if old["num_key_value_heads"] == old["num_attention_heads"]:
        del old["num_key_value_heads"]
    if "use_sliding_window" in old:  # Qwen states a window and switches it off
        old |= {"sliding_window": 131072, "max_window_layers": 28}
        old.pop("layer_types", None)
    if not old["tie_word_embeddings"]:
        del old["tie_word_embeddings"]
    return old


def shard(folder: Path, stem: str, tensors: dict, save):
    """Two files and their index."""
    name, kind = stem.rsplit(".", 1)
    halves = [dict(list(tensors.items())[k::2]) for k in range(2)]
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
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    named = load_file(tmp_path / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    hub = json.dumps(hub_config(json.loads((tmp_path / "config.json").read_text())))

    def hub_safetensors(folder):
        shard(folder, "model.safetensors", named, save_file)

    def hub_bin(folder):
        shared = OrderedDict(named)
        if config.tie_embeddings:
            shared["lm_head.weight"] = shared["model.embed_tokens.weight"]
        torch.save(shared, folder / "pytorch_model.bin")

    def hub_bins(folder):
        shard(folder, "pytorch_model.bin", named, torch.save)

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


@pytest.mark.parametrize("kind", [hf.LlamaConfig, hf.MistralConfig, hf.MixtralConfig, hf.Qwen2Config, hf.Qwen3Config,
                                  hf.Qwen3MoeConfig])  # fmt: skip
def test_config_defaults_are_transformers(kind):
    architecture = kind.__name__.replace("Config", "ForCausalLM")
    sizes = dict(hidden_size=4096, intermediate_size=96, num_hidden_layers=2, num_attention_heads=32, vocab_size=97)
    full = ModelConfig.from_hf(kind(**sizes).to_dict() | {"architectures": [architecture]})
    assert ModelConfig.from_hf(sizes | {"architectures": [architecture]}) == full
    assert ModelConfig.from_hf(sizes | {"model_type": kind.model_type}) == full


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny checkpoint and an older model.pth, and its tensors."""
    make_hf("llama2").save_pretrained(tmp_path)
    (tmp_path / "model.pth").write_text("old")
    return tmp_path, {name: t.clone() for name, t in load_file(tmp_path / "model.safetensors").items()}


def refused(folder: Path, match: str):
    """convert fails in one line that matches, leaving the folder as it was."""
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    with pytest.raises(UsageError, match=match) as e:
        convert(folder)
    assert "\n" not in str(e.value)
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_wrong_tensors_are_named(llama):
    folder, tensors = llama
    k, q = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    wrong = {
        f"no tensor {k}": {name: t for name, t in tensors.items() if name != k},
        "tensor model.extra.weight has no place": tensors | {"model.extra.weight": torch.ones(3)},
        "tensor model.layers.3.mlp.up_proj.weight has no place": tensors
        | {"model.layers.3.mlp.up_proj.weight": torch.ones(3)},
        rf"{k} is \[47, 48\]; the config makes it \[48, 48\]": tensors | {k: tensors[k][:47].clone()},
        rf"{q} is \[48\]": tensors | {q: tensors[q][0].clone()},
        f"{k} is torch.float8_e4m3fn": tensors | {k: tensors[k].to(torch.float8_e4m3fn)},
        f"{k} is torch.int64": tensors | {k: tensors[k].long()},
    }
    for match, content in wrong.items():
        save_file(content, folder / "model.safetensors")
        refused(folder, match)
    save_file(tensors | {k: tensors[k].half()}, folder / "model.safetensors")  # a group's dtype loses nothing
    assert read_checkpoint(convert(folder))[2]["layers.1.attention.wqkv.weight"].dtype == torch.float32


def test_a_head_that_differs_from_the_embedding_is_kept(llama):
    """As transformers does, though config.json calls it tied."""
    folder, tensors = llama
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    head = read_checkpoint(convert(folder))[2]["output.weight"]
    assert torch.equal(head, tensors["lm_head.weight"])
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert "output.weight" not in read_checkpoint(convert(folder))[2]


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_broken_files_are_refused(llama):
    folder, tensors = llama
    good = (folder / "model.safetensors").read_bytes()
    header = good[8 : 8 + int.from_bytes(good[:8], "little")]

    def with_header(data):
        return len(data).to_bytes(8, "little") + data + good[8 + len(header) :]

    huge = header.replace(b"[48,48]", b"[4800000000000,48]", 1)
    for content in (b"", b"garbage", good[:-1], good[: len(good) // 2], b"\xff" * 7 + b"\x7f", with_header(huge),
                    with_header(b"{}"), with_header(b"[" * 9999)):  # fmt: skip
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, "truncated or not safetensors|no tensor")
    (folder / "model.safetensors").unlink()
    refused(folder, "neither model.safetensors nor pytorch_model.bin")
    for name in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "gone.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        refused(folder, "not a file of the folder itself|does not exist")
    for index in ("[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        refused(folder, "weight_map|not readable JSON")
    (folder / "model.safetensors.index.json").unlink()
    for stem in ("pytorch_model.bin", "stories15M.pt"):
        if stem.endswith("pt"):
            (folder / "config.json").unlink()
        torch.save(tensors, folder / stem)
        good = (folder / stem).read_bytes()
        for content in (b"", b"garbage", good[: len(good) // 2], good[:-30]):
            (folder / stem).write_bytes(content)
            refused(folder, "truncated or not a PyTorch file")
        for content in ([1], 3, {"a": 1}, torch.ones(3), {"model": {}, "model_args": 1}, {"model": 1}):
            torch.save(content, folder / stem)
            refused(folder, "not a table of tensors|not one of tinyllamas")
        torch.save({"a": Bomb(folder / "ran")}, folder / stem)
        refused(folder, "holds more than weights")
        assert not (folder / "ran").exists()
        (folder / stem).unlink()
    for name in "ab":
        (folder / f"{name}.pt").write_text("")
    refused(folder, "no config.json, nor exactly one .pt")
    with pytest.raises(UsageError, match="is not a folder"):
        convert(folder / "model.pth")


def test_a_config_of_huge_sizes_takes_no_memory(llama):
    folder, _ = llama
    config = json.loads((folder / "config.json").read_text())
    for field, match in {"num_hidden_layers": "layers", "vocab_size": "embed_tokens",
                         "hidden_size": "embed_tokens", "intermediate_size": "mlp"}.items():  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | {field: 2**31 - 4, "head_dim": 12}))
        refused(folder, match)
    (folder / "config.json").write_text(json.dumps(config | dict.fromkeys(("hidden_size", "vocab_size"), 2**31 - 4)))
    refused(folder, "no model has the sizes")
    make_hf("mixtral").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 2**31}))
    refused(folder, "more than any model has")


def test_a_failed_write_leaves_the_old_model(llama):
    folder, _ = llama
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, 200_000):  # as a full disk: while the file is laid out, while tensors are written
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            refused(folder, "cannot write .*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    killed = """
import os, pathlib, sys, torch
from checkpoint import save_checkpoint
from model import ModelConfig
def tensors():
    yield "a", torch.ones(9)
    os.kill(os.getpid(), 9)
save_checkpoint(pathlib.Path(sys.argv[1]), ModelConfig(*[2] * 8), dict.fromkeys("ab", ((9,), torch.float32)), tensors())
"""
    subprocess.run([sys.executable, "-c", killed, folder / "model.pth"], cwd=ROOT)
    assert (folder / "model.pth").read_text() == "old" and len(list(folder.glob("*.tmp"))) == 1
    read_checkpoint(convert(folder))
    assert not list(folder.glob("*.tmp"))
    path, config, shapes = folder / "model.pth", ModelConfig(*[2] * 8), {"a": ((9,), torch.float32)}

    def overtaken():  # by another run
        save_checkpoint(path, config, shapes, [("a", torch.ones(9))])
        yield "a", torch.zeros(9)

    with pytest.raises(UsageError, match="cannot write"):
        save_checkpoint(path, config, shapes, overtaken())
    assert torch.equal(read_checkpoint(path)[2]["a"], torch.ones(9))
    path.unlink()
    path.mkdir()
    refused(folder, "cannot write .*model.pth: Is a directory")
    with pytest.raises(UsageError, match="cannot write .*No such file or directory"):
        save_checkpoint(folder / "gone" / "model.pth", config, {}, [])


def test_memory_is_one_group_of_tensors(tmp_path, llama):
    """Anonymous memory, that is: mapped pages of the files are the kernel's to drop."""
    big = tmp_path / "big"
    big.mkdir()
    dim, ffn, layers = 512, 2048, 7  # 120 MB; the largest group, w1 and w3, is 8 MB
    config = SIZES | dict(hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers, num_key_value_heads=4)
    (big / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    shapes = {"model.embed_tokens": (97, dim), "lm_head": (97, dim), "model.norm": (dim,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{x}_proj": (dim, dim) for x in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{x}_proj": (ffn, dim) for x in ("gate", "up")}
        shapes |= {f"model.layers.{i}.{x}_layernorm": (dim,) for x in ("input", "post_attention")}
        shapes[f"model.layers.{i}.mlp.down_proj"] = (dim, ffn)
    tensors = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    measure = """
import sys, threading, time
from pathlib import Path
sys.path.insert(0, "scripts")
from convert_hf_checkpoint import convert_folder
anon = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
convert_folder(Path(sys.argv[1]))
before = peak = anon()
def watch():
    global peak
    while True:
        peak = max(peak, anon())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
for folder in sys.argv[2:]:
    convert_folder(Path(folder))
    print(peak - before)
"""
    folders = [tmp_path / "big", tmp_path / "big2"]
    folders[1].mkdir()
    shutil.copy(big / "config.json", folders[1])
    save_file(tensors, big / "model.safetensors")
    torch.save(tensors, folders[1] / "pytorch_model.bin")
    command = [sys.executable, "-c", measure, llama[0], *folders]
    grown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert all(float(megabytes) < 40 for megabytes in grown), grown


def in_meta_order(weight, n_heads):
    """Rows of Q or K from Hugging Face's order to Meta's, as Meta's and llama.cpp's own tools permute them."""
    return weight.reshape(n_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def same_logits(path: Path, theirs, atol=1e-4):
    ours = load_model(path, torch.device("cpu"), torch.float32)
    tokens = torch.randint(0, theirs.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    ours.setup_caches(1, 24)
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens, torch.arange(24)), theirs(tokens).logits, atol=atol, rtol=1e-4)


def test_tinyllamas(tmp_path):
    sizes = SIZES | dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5)
    torch.manual_seed(0)
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    names = {"model.": "", "embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm", "lm_head": "output",
             "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
             "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
             }  # fmt: skip
    state = {}
    for name, t in theirs.state_dict().items():
        t = in_meta_order(t, 4 if "q_proj" in name else 2) if "q_proj" in name or "k_proj" in name else t
        for old, new in names.items():
            name = name.replace(old, new)
        state["_orig_mod." + name] = t
    args = dict(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=97, multiple_of=16, max_seq_len=256)
    torch.save({"model": state, "model_args": args, "iter_num": 1, "config": {}}, tmp_path / "stories15M.pt")
    same_logits(convert(tmp_path), theirs)
    config = read_checkpoint(tmp_path / "model.pth")[0]
    assert config.tie_embeddings and (config.bos_id, config.eos_ids) == (1, (1,))


# GGUF: names as llama.cpp's converter gives them
GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
              "model.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.o_proj": "attn_output", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v",
              "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
              "mlp.experts.down_proj": "ffn_down_exps", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "mlp.gate.": "ffn_gate_inp."}  # fmt: skip
BPE = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b"],
       "tokenizer.ggml.tokens": ["a", "b", "ab", "<e>"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
       "tokenizer.ggml.eos_token_id": 3}  # fmt: skip


def write_gguf(path: Path, theirs=None, qtype="F32", meta=BPE):
    """theirs as a GGUF; its weights become what the stored ones stand for."""
    q, writer = gguf.GGMLQuantizationType[qtype], gguf.GGUFWriter(path, "llama")
    if theirs is not None:
        c, state, rng = theirs.config, theirs.state_dict(), np.random.default_rng(0)
        for name in [name for name in state if "gate_up_proj" in name]:
            stem, (gate, up) = name.removesuffix("gate_up_proj"), state.pop(name).chunk(2, dim=1)
            state |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
            state[f"{stem}down_proj.weight"] = state.pop(f"{stem}down_proj")
        sizes = dict(block_count=c.num_hidden_layers, context_length=c.max_position_embeddings)
        sizes |= dict(embedding_length=c.hidden_size, feed_forward_length=c.intermediate_size)
        sizes |= {"attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads}
        if "num_local_experts" in c.to_dict():
            sizes |= dict(expert_count=c.num_local_experts, expert_used_count=c.num_experts_per_tok)
        for key, value in sizes.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
        writer.add_float32("llama.rope.freq_base", c.rope_parameters["rope_theta"])
        if c.rope_parameters["rope_type"] == "linear":
            writer.add_string("llama.rope.scaling.type", "linear")
            writer.add_float32("llama.rope.scaling.factor", c.rope_parameters["factor"])
        if c.rope_parameters["rope_type"] == "llama3":
            base = c.rope_parameters["rope_theta"] ** -(torch.arange(0, 64, 2) / 64)
            writer.add_tensor("rope_freqs.weight", (base / theirs.model.rotary_emb.inv_freq).numpy())
        for name, t in state.items():
            if c.tie_word_embeddings and name == "lm_head.weight":
                continue
            data, kind = t.numpy(), gguf.GGMLQuantizationType.F32
            if t.dim() > 1 and "mlp.gate." not in name:
                kind = q
                if "_K" in qtype:  # any bytes will do that make small scales
                    shape = gguf.quant_shape_to_byte_shape(data.shape, q)
                    data = rng.integers(0, 0x20, shape, dtype=np.uint8)
                else:
                    data = gguf.quantize(data, q)
                t.copy_(torch.tensor(gguf.dequantize(data, q)))
            if "q_proj" in name or "k_proj" in name:
                data = in_meta_order(data, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
            for old, new in GGUF_NAMES.items():
                name = name.replace(old, new)
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    for key, value in meta.items():
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        kinds[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_llama(kind=hf.LlamaConfig, **extra):
    sizes = SIZES | dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, initializer_range=0.05) | extra
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(kind(**sizes), attn_implementation="eager").eval()


@pytest.mark.parametrize("qtype", "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split())
def test_gguf_types(qtype, tmp_path):
    theirs = make_llama(tie_word_embeddings=qtype in ("F32", "Q6_K"))
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, qtype), tmp_path / "new/folder", torch.float32)
    same_logits(tmp_path / "new/folder/model.pth", theirs)


@pytest.mark.parametrize("kind, extra", [
    (hf.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2)),
    (hf.LlamaConfig, dict(rope_parameters=LLAMA3 | dict(original_max_position_embeddings=8192))),
    (hf.LlamaConfig, dict(rope_parameters=dict(rope_type="linear", rope_theta=1e6, factor=4.0))),
    (hf.LlamaConfig, dict(attention_bias=True)),
])  # fmt: skip
def test_gguf_kinds(kind, extra, tmp_path):
    theirs = make_llama(kind, **extra)
    for name, p in theirs.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(p)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, "Q8_0"), tmp_path, torch.float32)
    same_logits(tmp_path / "model.pth", theirs)


def test_broken_gguf_is_refused(tmp_path):
    theirs = make_llama(hidden_size=64, intermediate_size=64)
    file = write_gguf(tmp_path / "m.gguf", theirs)
    good = file.read_bytes()
    tokens = b"tokenizer.ggml.tokens" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    at = good.index(tokens) + len(tokens)
    typed = good.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    dims = good.index(b"token_embd.weight") + len("token_embd.weight") + 4
    broken = [b"", b"GGUF", good[: at + 3], good[: len(good) // 2], good[:-1], b"X" + good[1:]]
    for place in (8, 16, at, at + 8, typed, dims):  # the numbers of tensors, of fields, of tokens; a length; sizes
        broken += [good[:place] + n.to_bytes(8, "little") + good[place + 8 :] for n in (2**62, 2**36, 2**23)]
    for content in broken:
        file.write_bytes(content)
        with pytest.raises(UsageError, match="is truncated or not GGUF"):
            convert_gguf(file, tmp_path / "out", torch.float32)
    for match, meta in {
        "one of 3 parts": BPE | {"split.count": 3},
        "tokenizer.ggml.pre = 'odd'": BPE | {"tokenizer.ggml.pre": "odd"},
        "lacks metadata.*tokenizer.ggml.tokens": {},
        "lacks metadata.*list index": BPE | {"tokenizer.ggml.eos_token_id": 4},
        "'bert' is not supported": BPE | {"tokenizer.ggml.model": "bert"},
        "scaling.type = 'yarn'": BPE | {"llama.rope.scaling.type": "yarn"},
    }.items():
        file.unlink()
        write_gguf(file, theirs, meta=meta)
        with pytest.raises(UsageError, match=match):
            convert_gguf(file, tmp_path / "out", torch.float32)
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(UsageError, match="tensor blk.1.attn_x.weight has no place"):
        convert_gguf(file, tmp_path / "out", torch.float32)
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.bias\0\0"))
    with pytest.raises(UsageError, match="tensor blk.1.attn_k.bias"):
        convert_gguf(file, tmp_path / "out", torch.float32)
    file.write_bytes(good[: dims + 16] + (26).to_bytes(4, "little") + good[dims + 20 :])
    with pytest.raises(UsageError, match="model.embed_tokens.weight is I32, which"):
        convert_gguf(file, tmp_path / "out", torch.float32)
    with pytest.raises(UsageError, match="does not exist"):
        convert_gguf(tmp_path / "gone.gguf", tmp_path / "out", torch.float32)
    assert not list((tmp_path / "out").iterdir())


def test_gguf_sentencepiece(tmp_path):
    file = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    original = sentencepiece.SentencePieceProcessor(str(file))
    ids, n = range(original.vocab_size()), original.vocab_size()
    kind = {2: original.is_unknown, 3: original.is_control, 6: original.is_byte, 1: lambda i: True}
    meta = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [original.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": [next(k for k, test in kind.items() if test(i)) for i in ids],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text("of another model")
    theirs = make_llama(hidden_size=64, vocab_size=n, num_hidden_layers=1)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, "Q8_0", meta), tmp_path, torch.bfloat16)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == [1, *original.encode(text)]
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode_chat([{"role": "user", "content": "Hi"}]) == [1, *original.encode("Hi"), 2]
    config = read_checkpoint(tmp_path / "model.pth")[0]
    assert (config.vocab_size, config.bos_id, config.eos_ids) == (n, 1, (2, 5))


def pre_tokenizer(pre: str):
    """As the tokenizer.json of a model with this tokenizer.ggml.pre has it."""
    byte_level = tk.pre_tokenizers.ByteLevel
    if pre == "gpt-2":
        return byte_level(False)
    if pre == "smollm":
        return tk.pre_tokenizers.Sequence([tk.pre_tokenizers.Digits(individual_digits=True), byte_level(False)])
    split = tk.pre_tokenizers.Split(tk.Regex(SPLITS[pre][0]), "isolated")
    return tk.pre_tokenizers.Sequence([split, byte_level(False, use_regex=False)])


@pytest.mark.parametrize("pre", SPLITS)
def test_gguf_byte_level_bpe(pre, tmp_path):
    tok = tk.Tokenizer(tk.models.BPE(ignore_merges=pre in ("llama-bpe", "llama3", "tekken")))
    tok.pre_tokenizer, tok.decoder = pre_tokenizer(pre), tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False,
                                     initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tok.train_from_iterator([(ROOT / "model.py").read_text(), *TEXTS], trainer)
    tok.add_tokens(["<fim>"])
    saved, vocab = json.loads(tok.to_str()), tok.get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    meta = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.merges": [" ".join(m) for m in saved["model"]["merges"]],
            "tokenizer.ggml.token_type": [3 if i < 2 else 4 if p == "<fim>" else 1 for i, p in enumerate(pieces)],
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "<s>{{ messages[0].content }}</s>"}  # fmt: skip
    theirs = make_llama(hidden_size=64, vocab_size=len(pieces), num_hidden_layers=1)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, "Q8_0", meta), tmp_path, torch.bfloat16)
    ours, bos = load_tokenizer(tmp_path), [0] * (pre in ("llama-bpe", "llama3", "tekken"))
    tok.encode_special_tokens = True
    for text in [*TEXTS, "a<fim>b"]:
        assert ours.encode(text) == bos + tok.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode_chat([{"role": "user", "content": "Hi</s>"}])[0] == 0

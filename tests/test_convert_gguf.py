"""convert_gguf.py: every type and kind of GGUF gives the logits of transformers, and a broken one is refused."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from converters.convert_gguf import convert_gguf
from converters.gguf_config import gguf_to_config_json
from converters.gguf_file import read_gguf
from tests.tiny import LINEAR, LLAMA3, YARN, make_hf, same_logits
from tests.tiny_gguf import BPE, gguf_bytes, make_llama, write_gguf
from utils.errors import UsageError
from utils.files import ROOT


@pytest.mark.parametrize("qtype", "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split())
def test_every_tensor_type_gives_transformers_logits(qtype, tmp_path):
    theirs = make_llama(tie_word_embeddings=qtype in ("F32", "Q6_K"))
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, qtype), tmp_path / "new/folder", torch.float32)
    same_logits(tmp_path / "new/folder/model.pth", theirs)


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (hf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        (hf.LlamaConfig, {"rope_parameters": LLAMA3}),
        (hf.LlamaConfig, {"rope_parameters": LINEAR}),
        (hf.LlamaConfig, {"attention_bias": True}),
    ],
)
def test_variants_of_llama_give_transformers_logits(config_class, changes, tmp_path):
    theirs = make_llama(config_class, **changes)
    for name, p in theirs.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(p)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, "Q8_0"), tmp_path, torch.float32)
    same_logits(tmp_path / "model.pth", theirs)


SEVEN_LAYERS = {"num_hidden_layers": 7, "layer_types": None}  # the sixth has no window
ONE_WITHOUT_ROPE = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
QWEN3_YARN = {"rope_parameters": YARN | {"rope_theta": 1e4, "beta_fast": 16.0, "attention_factor": 1.3}}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", QWEN3_YARN),
        ("qwen3-moe", {}),
        ("gemma", {}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"query_pre_attn_scalar": 16} | SEVEN_LAYERS),
        ("phi3", {}),
        ("phi4-mini", {}),
        ("olmo2", {}),
        ("olmo3", {}),
        ("olmoe", {}),
        ("exaone4", {"num_hidden_layers": 4, "layer_types": None}),
        ("smollm3", ONE_WITHOUT_ROPE),
        ("granite", {}),
        ("arcee", {}),
        ("glm4", {}),
        ("gpt-oss", {}),
    ],
)
def test_every_architecture_gives_transformers_logits(family, changes, tmp_path):
    theirs = make_hf(family, **changes)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs), tmp_path, torch.float32)
    same_logits(tmp_path / "model.pth", theirs)


@pytest.mark.parametrize(("family", "qtype"), [("gpt-oss", "MXFP4"), ("phi3", "Q4_0"), ("glm4", "Q8_0")])
def test_quantized_tensors_of_several_matrices_are_split(family, qtype, tmp_path):
    """A quantized tensor that holds several matrices, such as all experts or gate and up, is split."""
    theirs = make_hf(family, hidden_size=64, intermediate_size=64)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, qtype), tmp_path, torch.float32)
    same_logits(tmp_path / "model.pth", theirs)


def test_options_that_metadata_lack(tmp_path):
    """Options that the metadata lack follow from the sizes of the published models: Gemma 2 27B and Gemma 3 27B divide
    their scores by the square roots of 144 and 168."""
    for name, sizes, query_dim in [
        ("gemma2", (26, 2304, 8, 256), 256),
        ("gemma2", (42, 3584, 16, 256), 256),
        ("gemma2", (46, 4608, 32, 128), 144),
        ("gemma3", (34, 2560, 8, 256), 256),
        ("gemma3", (62, 5376, 32, 128), 168),
    ]:
        keys = ("block_count", "embedding_length", "attention.head_count", "attention.key_length")
        meta = dict(zip(keys, sizes, strict=True)) | {"context_length": 9, "attention.layer_norm_rms_epsilon": 1e-6}
        meta = {f"{name}.{key}": value for key, value in meta.items()} | {"general.architecture": name}
        _, stored = read_gguf(write_gguf(tmp_path / "m.gguf", make_hf("gemma")))
        assert gguf_to_config_json(meta, stored)["query_pre_attn_scalar"] == query_dim


# ---- Several files --------------------------------------------------------------------------------------------------


def test_parts(assert_refused, tmp_path):
    theirs = make_llama(hidden_size=64, intermediate_size=64)
    write_gguf(tmp_path / "m.gguf", theirs, tensors_per_part=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, part in enumerate(parts):
        convert_gguf(part, tmp_path / f"from_{i}", torch.float32)
        same_logits(tmp_path / f"from_{i}/model.pth", theirs)

    good = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    assert_refused(parts[0], "m-00002-of-00003.gguf is not part 2 of 3")
    parts[1].write_bytes(good[:-1])
    assert_refused(parts[0], "m-00002-of-00003.gguf is truncated or not GGUF")
    parts[1].unlink()
    assert_refused(parts[2], "m-00002-of-00003.gguf does not exist; .*m-00003-of-00003.gguf needs all 3 parts")
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    assert_refused(tmp_path / "renamed.gguf", "one of 3 parts, but not named like x-00001-of-00003.gguf")


@pytest.mark.parametrize("missing", [False, True])
def test_missing_things_are_named(missing, tmp_path):
    """A folder instead of a file, and a missing gguf package, are refused in one line, also under python -I."""
    code = f"""
import runpy, sys
if {missing}:
    sys.modules["gguf"] = None
sys.argv = ["convert_gguf.py", "{tmp_path}", "--checkpoint_dir={tmp_path}"]
runpy.run_path("{ROOT}/scripts/convert_gguf.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    said = "needs `pip install gguf protobuf`" if missing else f"{tmp_path} is a folder"
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- Broken files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return make_llama(hidden_size=64, intermediate_size=64)


@pytest.fixture
def assert_refused(tmp_path):
    """(file, match): checks that the conversion fails in one line that matches, and writes nothing."""

    def check(file: Path, match: str):
        with pytest.raises(UsageError, match=match) as e:
            convert_gguf(file, tmp_path / "out", torch.float32)
        assert "\n" not in str(e.value)

    yield check
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_broken_headers_are_refused(llama, assert_refused, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", llama)
    good = file.read_bytes()
    tokens_name = b"tokenizer.ggml.tokens" + (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    n_tokens = good.index(tokens_name) + len(tokens_name)
    types_name = b"tokenizer.ggml.token_type"
    element_type = good.index(types_name) + len(types_name) + 8
    shape = good.index(b"token_embd.weight") + len("token_embd.weight") + 4
    broken = [b"", b"GGUF", good[: n_tokens + 3], good[: len(good) // 2], good[:-1], b"X" + good[1:]]
    n_tensors, n_fields, token_length = 8, 16, n_tokens + 8
    for offset in (n_tensors, n_fields, n_tokens, token_length, element_type, shape):
        for n in (2**62, 2**36, 2**23):
            broken.append(good[:offset] + n.to_bytes(8, "little") + good[offset + 8 :])
    for content in broken:
        file.write_bytes(content)
        assert_refused(file, "is truncated or not GGUF")
    tensor_type = shape + 16
    file.write_bytes(good[:tensor_type] + (31).to_bytes(4, "little") + good[tensor_type + 4 :])  # Q4_0_4_4, withdrawn
    assert_refused(file, "token_embd.weight has type 31, which the gguf package does not know")
    kind = shape + 16
    file.write_bytes(good[:kind] + (26).to_bytes(4, "little") + good[kind + 4 :])
    assert_refused(file, "model.embed_tokens.weight is I32, which")
    assert_refused(tmp_path / "gone.gguf", "does not exist")


def test_odd_metadata_and_names_are_refused(llama, assert_refused, tmp_path):
    file = tmp_path / "m.gguf"
    for match, meta in {
        "one of 3 parts": BPE | {"split.count": 3},
        "llama.attention.temperature_scale = 1 is not supported": BPE | {"llama.attention.temperature_scale": 1},
        "llama.rope.dimension_sections": BPE | {"llama.rope.dimension_sections": [8, 8]},
        "llama.attention.value_length differs": BPE | {"llama.attention.value_length": 8},
        r"partial_rotary_factor = Fraction\(1, 2\)": BPE | {"llama.rope.dimension_count": 8},
        r"partial_rotary_factor = Fraction\(9, 8\)": BPE | {"llama.rope.dimension_count": 18},
        "the GGUF's metadata: logits_scaling = 2": BPE | {"llama.logit_scale": 2},
        "tokenizer.ggml.pre = 'odd'": BPE | {"tokenizer.ggml.pre": "odd"},
        "lacks metadata.*tokenizer.ggml.tokens": {},
        "lacks metadata, or .*no 'tokenizer.ggml.merges'": {k: v for k, v in BPE.items() if not k.endswith("merges")},
        "lacks metadata.*list index": BPE | {"tokenizer.ggml.eos_token_id": 4},
        "'bert' is not supported": BPE | {"tokenizer.ggml.model": "bert"},
        "scaling.type = 'odd'": BPE | {"llama.rope.scaling.type": "odd"},
        "lacks metadata.*rope.scaling.factor": BPE | {"llama.rope.scaling.type": "yarn"},
    }.items():
        file.unlink(missing_ok=True)
        assert_refused(write_gguf(file, llama, meta=meta), match)
    file.unlink()
    good = write_gguf(file, llama).read_bytes()
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    assert_refused(file, "tensor blk.1.attn_x.weight has no place")
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.bias\0\0"))
    assert_refused(file, "tensor blk.1.attn_k.bias")
    with torch.no_grad():
        damaged = copy.deepcopy(llama)
        damaged.model.layers[1].self_attn.o_proj.weight[3, 5] = torch.nan
    file.unlink()
    assert_refused(
        write_gguf(file, damaged), "tensor model.layers.1.self_attn.o_proj.weight holds numbers that are not"
    )
    file.write_bytes(good)
    meta, tensors = read_gguf(file)
    for match, changes in {
        "architecture 'odd' is not supported; these are: llama, qwen2, qwen3": {"general.architecture": "odd"},
        "lacks metadata.*qwen2.block_count": {"general.architecture": "qwen2"},
        "lacks metadata.*unsupported operand": {"llama.embedding_length": "64"},
        "max_position_embeddings must be a positive integer": {"llama.context_length": [1]},
        "the GGUF's metadata: intermediate_size is missing": {"llama.feed_forward_length": None},
    }.items():
        changed = {key: value for key, value in (meta | changes).items() if value is not None}
        file.write_bytes(gguf_bytes(changed, tensors))
        assert_refused(file, match)

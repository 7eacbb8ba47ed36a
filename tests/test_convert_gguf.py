"""convert_gguf.py: every type and kind of GGUF gives transformers' logits and tokens; what is broken is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import mistral_common
import pytest
import regex
import sentencepiece
import tiktoken_ext.openai_public
import tokenizers as tk
import torch
import transformers as hf
from sentencepiece import sentencepiece_model_pb2
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from checkpoint import read_checkpoint
from config import UsageError
from tests.tiny import LINEAR, LLAMA3, ROOT, YARN, make_hf, same_logits
from tests.tiny_gguf import BPE, gguf_bytes, make_llama, write_gguf
from tests.tiny_tokenizers import TEXTS as MORE_TEXTS
from tokenizer import load_tokenizer

from convert_gguf import convert_gguf, hf_config, read_gguf  # isort: skip  (tests.tiny put scripts/ on the path)
from gguf_tokenizer import SPLITS  # isort: skip

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\tand a tab ",
    "it's 12345 o'clock, I'LL go",
    "na\u00efve \u4e2d\u6587",
    "\U0001f600 <s>[INST]</s>",
    "",
]


@pytest.mark.parametrize("qtype", "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split())
def test_types(qtype, tmp_path):
    theirs = make_llama(tie_word_embeddings=qtype in ("F32", "Q6_K"))
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, qtype), tmp_path / "new/folder", torch.float32)
    same_logits(tmp_path / "new/folder/model.pth", theirs)


LLAMA3_8192 = LLAMA3 | {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (hf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        (hf.LlamaConfig, {"rope_parameters": LLAMA3_8192}),
        (hf.LlamaConfig, {"rope_parameters": LINEAR}),
        (hf.LlamaConfig, {"attention_bias": True}),
    ],
)
def test_kinds(config_class, changes, tmp_path):
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
        ("smollm3", ONE_WITHOUT_ROPE),
        ("granite", {}),
        ("glm4", {}),
        ("gpt-oss", {}),
    ],
)
def test_architectures(family, changes, tmp_path):
    theirs = make_hf(family, **changes)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs), tmp_path, torch.float32)
    same_logits(tmp_path / "model.pth", theirs)


@pytest.mark.parametrize(("family", "qtype"), [("gpt-oss", "MXFP4"), ("phi3", "Q4_0"), ("glm4", "Q8_0")])
def test_quantized_parts(family, qtype, tmp_path):
    """Of a tensor that holds several: all experts', or gate and up."""
    theirs = make_hf(family, hidden_size=64, intermediate_size=64)
    convert_gguf(write_gguf(tmp_path / "m.gguf", theirs, qtype), tmp_path, torch.float32)
    same_logits(tmp_path / "model.pth", theirs)


def test_what_metadata_lack(tmp_path):
    """Published sizes of Gemma 2 and 3, whose 27B divide their scores by the square root of 144 and 168."""
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
        assert hf_config(meta, stored)["query_pre_attn_scalar"] == query_dim


# ---- Several files --------------------------------------------------------------------------------------------------


def test_parts(refused, tmp_path):
    theirs = make_llama(hidden_size=64, intermediate_size=64)
    write_gguf(tmp_path / "m.gguf", theirs, tensors_per_part=9)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, part in enumerate(parts):
        convert_gguf(part, tmp_path / f"from_{i}", torch.float32)
        same_logits(tmp_path / f"from_{i}/model.pth", theirs)

    good = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    refused(parts[0], "m-00002-of-00003.gguf is not part 2 of 3")
    parts[1].write_bytes(good[:-1])
    refused(parts[0], "m-00002-of-00003.gguf is truncated or not GGUF")
    parts[1].unlink()
    refused(parts[2], "m-00002-of-00003.gguf does not exist; .*m-00003-of-00003.gguf needs all 3 parts")
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "one of 3 parts, but not named like x-00001-of-00003.gguf")


@pytest.mark.parametrize("missing", [False, True])
def test_what_is_needed_is_said(missing, tmp_path):
    """A file, not a folder; and the gguf package, which requirements.txt does not name. Also under python -I."""
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
def refused(tmp_path):
    """(file, match) -> its conversion fails in one line that matches, and writes nothing."""

    def check(file: Path, match: str):
        with pytest.raises(UsageError, match=match) as e:
            convert_gguf(file, tmp_path / "out", torch.float32)
        assert "\n" not in str(e.value)

    yield check
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_broken_headers_are_refused(llama, refused, tmp_path):
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
        refused(file, "is truncated or not GGUF")
    kind = shape + 16
    file.write_bytes(good[:kind] + (26).to_bytes(4, "little") + good[kind + 4 :])
    refused(file, "model.embed_tokens.weight is I32, which")
    refused(tmp_path / "gone.gguf", "does not exist")


def test_odd_metadata_and_names_are_refused(llama, refused, tmp_path):
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
        "lacks metadata.*list index": BPE | {"tokenizer.ggml.eos_token_id": 4},
        "'bert' is not supported": BPE | {"tokenizer.ggml.model": "bert"},
        "scaling.type = 'odd'": BPE | {"llama.rope.scaling.type": "odd"},
        "lacks metadata.*rope.scaling.factor": BPE | {"llama.rope.scaling.type": "yarn"},
    }.items():
        file.unlink(missing_ok=True)
        refused(write_gguf(file, llama, meta=meta), match)
    file.unlink()
    good = write_gguf(file, llama).read_bytes()
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    refused(file, "tensor blk.1.attn_x.weight has no place")
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.bias\0\0"))
    refused(file, "tensor blk.1.attn_k.bias")
    file.write_bytes(good)
    meta, tensors = read_gguf(file)
    for match, changes in {
        "architecture 'odd' is not supported; these are: llama, qwen2, qwen3": {"general.architecture": "odd"},
        "lacks metadata.*qwen2.block_count": {"general.architecture": "qwen2"},
        "lacks metadata.*TypeError": {"llama.embedding_length": "64"},
        "model's max_seq_len must be a positive integer": {"llama.context_length": [1]},
        "the GGUF's metadata: intermediate_size is missing": {"llama.feed_forward_length": None},
    }.items():
        changed = {key: value for key, value in (meta | changes).items() if value is not None}
        file.write_bytes(gguf_bytes(changed, tensors))
        refused(file, match)


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def convert_vocabulary(meta: dict, folder: Path):
    """The tokenizer that comes of a GGUF with this vocabulary."""
    theirs = make_llama(hidden_size=64, vocab_size=len(meta["tokenizer.ggml.tokens"]), num_hidden_layers=1)
    convert_gguf(write_gguf(folder / "m.gguf", theirs, "Q8_0", meta), folder, torch.bfloat16)
    return load_tokenizer(folder)


def test_sentencepiece(tmp_path):
    file = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    original = sentencepiece.SentencePieceProcessor(str(file))
    n = original.vocab_size()

    def kind(i: int) -> int:
        if original.is_unknown(i):
            return 2
        if original.is_control(i):
            return 3
        return 6 if original.is_byte(i) else 1

    (tmp_path / "tokenizer.json").write_text("of another model")
    ours = convert_vocabulary(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(n)],
            "tokenizer.ggml.scores": [original.get_score(i) for i in range(n)],
            "tokenizer.ggml.token_type": [kind(i) for i in range(n)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.eom_token_id": 2,
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        },
        tmp_path,
    )
    for text in TEXTS:
        assert ours.encode_parts([text]) == original.encode(text)
        assert ours.decode(ours.encode_parts([text])) == text
    assert ours.encode("Hi") == [1, *original.encode("Hi")]
    assert ours.encode_chat([{"role": "user", "content": "Hi"}]) == [1, *original.encode("Hi"), 2]
    config = read_checkpoint(tmp_path / "model.pth")[0]
    assert (config.vocab_size, config.bos_id, config.eos_ids) == (n, 1, (2, 5))


def test_sentencepiece_of_gemma(tmp_path):
    """No space before a text, pieces of spaces and newlines that are never cut, and an <unk> that is called control."""
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.bos_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 1, 0, 2
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    pieces = [("<eos>", 3), ("<bos>", 3), ("<unk>", 2), ("\n\n", 4), ("▁▁", 4), ("▁▁▁▁", 4), ("<h1>", 4)]
    pieces += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    pieces += [(piece, 1) for piece in [*"▁helowrd", "lo", "he", "▁w", "hel", "rl", "▁h", "\n"]]
    for i, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-i, type=kind)
    original = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    ours = convert_vocabulary(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [piece.replace("▁", " ") if kind == 4 else piece for piece, kind in pieces],
            "tokenizer.ggml.scores": [float(-i) for i in range(len(pieces))],
            "tokenizer.ggml.token_type": [3 if piece == "<unk>" else kind for piece, kind in pieces],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.unknown_token_id": 2,
            "tokenizer.ggml.add_space_prefix": False,
        },
        tmp_path,
    )
    for text in [*TEXTS, "hello  world", "hello\n\n\n      world", "   <h1>hello"]:
        assert ours.encode_parts([text]) == original.encode(text)
        assert ours.decode(original.encode(text)) == text
    assert ours.encode("hello") == [1, *original.encode("hello")]
    assert len(ours.encode("hello  world", bos=False)) < len("hello  world")


def published_patterns() -> dict[str, str]:
    """By which tiktoken, transformers and mistral_common cut texts, for some values of tokenizer.ggml.pre."""
    with mock.patch.object(tiktoken_ext.openai_public, "load_tiktoken_bpe", return_value={}):
        cl100k, o200k = tiktoken_ext.openai_public.cl100k_base(), tiktoken_ext.openai_public.o200k_base()
    tekken = json.loads((Path(mistral_common.__file__).parent / "data/tekken_240911.json").read_text())
    return {
        "dbrx": cl100k["pat_str"],
        "gpt-4o": o200k["pat_str"],
        "gpt-2": tiktoken_ext.openai_public.r50k_pat_str,
        "tekken": tekken["config"]["pattern"],
        "qwen2": PRETOKENIZE_REGEX,
    }


def test_texts_are_cut_as_published():
    code = [(ROOT / name).read_text() for name in ("README.md", "model.py")]
    for pre, pattern in published_patterns().items():
        ours = tk.pre_tokenizers.Sequence([tk.pre_tokenizers.Split(tk.Regex(p), "isolated") for p in SPLITS[pre]])
        for text in [*TEXTS, *MORE_TEXTS, *code, "HTMLParser CAN'Tdo it, I'LLwait/\n\n", "x\r\n \t\n  y  \n"]:
            assert [piece for piece, _ in ours.pre_tokenize_str(text)] == regex.findall(pattern, text)


def pre_tokenizer(pre: str):
    """As the tokenizer.json of a model with this tokenizer.ggml.pre has it."""
    byte_level = tk.pre_tokenizers.ByteLevel
    if pre == "gpt-2":
        return byte_level(False)
    if pre in ("smollm", "refact"):
        return tk.pre_tokenizers.Sequence([tk.pre_tokenizers.Digits(individual_digits=True), byte_level(False)])
    split = tk.pre_tokenizers.Split(tk.Regex(SPLITS[pre][0]), "isolated")
    return tk.pre_tokenizers.Sequence([split, byte_level(False, use_regex=False)])


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_bpe(pre, tmp_path):
    like_llama3 = pre in ("llama-bpe", "llama3", "tekken")
    tok = tk.Tokenizer(tk.models.BPE(ignore_merges=like_llama3))
    tok.pre_tokenizer, tok.decoder = pre_tokenizer(pre), tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False, initial_alphabet=alphabet
    )
    tok.train_from_iterator([(ROOT / "model.py").read_text(), *TEXTS], trainer)
    tok.add_tokens(["<fim>"])
    if pre == "qwen2":
        tok.normalizer = tk.normalizers.NFC()
    saved, vocab = json.loads(tok.to_str()), tok.get_vocab()
    pieces = sorted(vocab, key=vocab.get)
    ours = convert_vocabulary(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in saved["model"]["merges"]],
            "tokenizer.ggml.token_type": [{"<s>": 3, "</s>": 3, "<fim>": 4}.get(piece, 1) for piece in pieces],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "<s>{{ messages[0].content }}</s>",
        },
        tmp_path,
    )
    bos = [0] if like_llama3 else []
    tok.encode_special_tokens = True
    for text in [*TEXTS, "a<fim>b"]:
        assert ours.encode_parts([text]) == tok.encode(text).ids
        assert ours.decode(tok.encode(text).ids) == text
    assert ours.encode("e\u0301") == bos + tok.encode("e\u0301").ids  # qwen2 makes one character of it
    assert ours.encode_chat([{"role": "user", "content": "Hi</s>"}])[0] == 0


def test_glm4_begins_with_two_tokens(tmp_path):
    pieces = {"a": 1, "b": 1, "ab": 1, "[gMASK]": 3, "<sop>": 3}
    vocabulary = {
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": [*pieces],
        "tokenizer.ggml.token_type": [*pieces.values()],
    }
    ours = convert_vocabulary(BPE | vocabulary, tmp_path)
    assert ours.encode("ab") == [3, 4, 2] and ours.encode("ab", bos=False) == [2]

"""convert_gguf.py: every type and kind of GGUF gives transformers' logits and tokens; what is broken is refused."""

import json
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tokenizers as tk
import torch
import transformers as hf

from checkpoint import read_checkpoint
from config import UsageError
from tests.tiny import LINEAR, LLAMA3, ROOT, same_logits
from tests.tiny_gguf import BPE, make_llama, write_gguf
from tokenizer import load_tokenizer

from convert_gguf import SPLITS, convert_gguf  # isort: skip  (tests.tiny put scripts/ on the path)

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
        "tokenizer.ggml.pre = 'odd'": BPE | {"tokenizer.ggml.pre": "odd"},
        "lacks metadata.*tokenizer.ggml.tokens": {},
        "lacks metadata.*list index": BPE | {"tokenizer.ggml.eos_token_id": 4},
        "'bert' is not supported": BPE | {"tokenizer.ggml.model": "bert"},
        "scaling.type = 'yarn'": BPE | {"llama.rope.scaling.type": "yarn"},
    }.items():
        file.unlink(missing_ok=True)
        refused(write_gguf(file, llama, meta=meta), match)
    file.unlink()
    good = write_gguf(file, llama).read_bytes()
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    refused(file, "tensor blk.1.attn_x.weight has no place")
    file.write_bytes(good.replace(b"blk.1.attn_q.weight", b"blk.1.attn_k.bias\0\0"))
    refused(file, "tensor blk.1.attn_k.bias")


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
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        },
        tmp_path,
    )
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
        assert ours.encode(text) == bos + tok.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode_chat([{"role": "user", "content": "Hi</s>"}])[0] == 0

"""gguf_tokenizer.py: a tokenizer made from the vocabulary of a GGUF encodes like the original."""

import json
from pathlib import Path
from unittest import mock

import mistral_common
import pytest
import regex
import sentencepiece
import tiktoken_ext.openai_public
import tokenizers as tk
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from checkpoint import read_checkpoint
from converters.convert_gguf import convert_gguf
from converters.gguf_tokenizer import SPLITS
from tests.tiny_gguf import BPE, make_llama, write_gguf
from tests.tiny_tokenizers import TEXTS as MORE_TEXTS
from text.tokenizer import load_tokenizer
from utils.files import ROOT

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\tand a tab ",
    "it's 12345 o'clock, I'LL go",
    "na\u00efve \u4e2d\u6587",
    "\U0001f600 <s>[INST]</s>",
    "",
]


def convert_vocabulary(meta: dict, folder: Path):
    """Returns the tokenizer made from a GGUF with this vocabulary."""
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
    """The tokenizer of Gemma adds no space before a text, never cuts pieces of spaces and newlines, and has an <unk> of
    type control."""
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
    """Returns the patterns with which tiktoken, transformers and mistral_common cut texts, by tokenizer.ggml.pre."""
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
    """Returns the pre_tokenizer in tokenizer.json for this tokenizer.ggml.pre."""
    byte_level = tk.pre_tokenizers.ByteLevel
    if pre in ("gpt-2", "mellum"):
        return byte_level(False)
    if pre in ("smollm", "refact", "starcoder", "minerva-7b"):
        return tk.pre_tokenizers.Sequence([tk.pre_tokenizers.Digits(individual_digits=True), byte_level(False)])
    split = tk.pre_tokenizers.Split(tk.Regex(SPLITS[pre][0]), "isolated")
    return tk.pre_tokenizers.Sequence([split, byte_level(False, use_regex=False)])


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_bpe(pre, tmp_path):
    like_llama3 = pre in ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
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
    assert ours.encode("e\u0301") == bos + tok.encode("e\u0301").ids  # qwen2 normalizes to one character
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

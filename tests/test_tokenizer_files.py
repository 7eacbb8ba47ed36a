"""text/tokenizer_files.py against transformers: special and added tokens that only the files beside the tokenizer have,
and tokenizers without tokenizer.json or without a decoder."""

import json

import pytest
import tokenizers
import transformers as hf
from tokenizers import decoders, models, pre_tokenizers

from tests.tiny_tokenizers import TEMPLATES, TEXTS, conversations, train_byte_level, write
from text.tokenizer import load_tokenizer
from utils.errors import UsageError

START, END, THINK = "<|im_start|>", "<|im_end|>", "<think>"


def files_beside(n: int, rstrip: bool) -> dict[str, dict[str, dict]]:
    """Returns files by name, for each way to add three tokens, two of them special, to a tokenizer of n tokens. rstrip:
    whether END absorbs the white space after it."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    decoder = {
        n: flags | {"content": START, "special": True},
        n + 1: flags | {"content": END, "special": True, "rstrip": rstrip},
        n + 2: flags | {"content": THINK, "special": False, "lstrip": True},
    }
    added = {"added_tokens.json": {THINK: n + 2, START: n, END: n + 1}}
    unread = {"added_tokens.json": {"a": n}, "special_tokens_map.json": {"eos_token": START}}
    names = {"bos_token": START, "eos_token": {"content": END, "rstrip": rstrip}, "pad_token": "<pad>"}
    plain_names = {"bos_token": START, "eos_token": END}
    return {
        "only names": {"special_tokens_map.json": names},
        "names override": {"tokenizer_config.json": plain_names, "special_tokens_map.json": names},
        "added": added,
        "added and named": added | {"special_tokens_map.json": names},
        "added and listed": added | {"tokenizer_config.json": {"additional_special_tokens": [START, END, "|x|"]}},
        "names of its own": {
            "tokenizer_config.json": {"extra_special_tokens": {"image_token": START}},
            "special_tokens_map.json": {"additional_special_tokens": [END], "eos_token": END},
        },
        "decoder": {"tokenizer_config.json": plain_names | {"added_tokens_decoder": decoder}} | unread,
        "decoder, not named": {"tokenizer_config.json": {"added_tokens_decoder": decoder}} | unread,
        "id of another": {"added_tokens.json": {START: 0, END: n}},
    }


def write_tokenizer(kind: str, folder) -> tuple[int, dict]:
    """Returns the number of tokens and the fields of tokenizer_config.json."""
    if kind.startswith(("GPT2", "Qwen2")):
        tok = train_byte_level("qwen2")
        tok.model.save(str(folder))
        return tok.get_vocab_size(), {"tokenizer_class": kind, "add_bos_token": kind == "GPT2Tokenizer"}
    tok = train_byte_level("qwen2")
    if kind == "words":
        tok = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "Hello": 3}, unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "word pieces":
        pieces = ["[UNK]", "a", "b", "He", "##llo", ",", ".", "my", "##name", "user", "\u4f60"]
        tok = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    if kind != "byte level":
        tok.add_special_tokens(["|x|"])
    tok.save(str(folder / "tokenizer.json"))
    return tok.get_vocab_size(), {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("way", files_beside(0, True))
@pytest.mark.parametrize("kind", ["byte level", "words", "word pieces", "GPT2Tokenizer", "Qwen2TokenizerFast"])
def test_files_beside_the_tokenizer_like_transformers(tmp_path, kind, way):
    n, fields = write_tokenizer(kind, tmp_path)
    # Qwen2Tokenizer in transformers forgets that a special token has rstrip.
    files = files_beside(n, rstrip="Qwen2" not in kind)[way]
    fields |= {"chat_template": "{{ bos_token }}{{ eos_token }}" + TEMPLATES["chatml"]}
    files = files | {"tokenizer_config.json": fields | files.get("tokenizer_config.json", {})}
    for name, contents in files.items():
        (tmp_path / name).write_text(json.dumps(contents))
    ours, theirs = load_tokenizer(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    added = (START, f"Hello {END} \n a", f"a  {THINK}  b{THINK}", "|x| a<pad>b", "<|endoftext|>a")
    for text in (*TEXTS, *added):
        ids = theirs(text).input_ids
        assert ours.encode(text) == (ids[1:] if ids[:2] == 2 * [theirs.bos_token_id] else ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        for messages in conversations(text) if text in TEXTS else ():
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ours.encode_chat(messages) == expected
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    eos = theirs.eos_token_id
    assert eos is None or eos in ours.eos_ids()


def test_vocab_json_needs_merges_and_a_class(tmp_path):
    write_tokenizer("GPT2Tokenizer", tmp_path)
    write(tmp_path, {"tokenizer_class": "CTRLTokenizer"})
    with pytest.raises(UsageError, match="tokenizer_class of GPT2Tokenizer or Qwen2Tokenizer"):
        load_tokenizer(tmp_path)
    write(tmp_path, {"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / "merges.txt").write_text("a missing\n")
    with pytest.raises(UsageError, match="vocab.json or merges.txt is broken") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UsageError, match="only with merges.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tokenizer.json", b"{", "not a tokenizer that tokenizers"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is a tiktoken file; use tokenizer.json"),
        ("tokenizer.model", b"\x80 not sentencepiece", "not a sentencepiece model"),
        ("tokenizer.model", b"", "not a sentencepiece model"),
        ("tokenizer_config.json", b"{", "not readable JSON"),
        ("tokenizer_config.json", b"[1]", "is broken"),
        ("tokenizer_config.json", b'{"bos_token": {}}', "is broken"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"-1": {"content": "a"}}}', "a token without number"),
        ("special_tokens_map.json", b"{", "not readable JSON"),
        ("special_tokens_map.json", b"[1]", "is broken"),
        ("special_tokens_map.json", b'{"eos_token": {"content": "\\ud800"}}', "is broken"),
        ("special_tokens_map.json", b'{"additional_special_tokens": [5]}', "is broken"),
        ("added_tokens.json", b"[1]", "is broken"),
        ("added_tokens.json", b'{"a": "b"}', "a token without number"),
        ("added_tokens.json", b'{"": 5}', "a token without text"),
        ("vocab.json", b"{}", "write tokenizer.json with transformers: AutoTokenizer.from_pretrained"),
        ("chat_template.jinja", b"\xff", "is broken"),
        ("README.md", b"", "holds neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_broken_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=says) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and (name in str(error.value) or name == "README.md")


def test_template_sources(tmp_path):
    """A template in a file takes precedence over one in the settings. Of several named ones, "default" is used."""
    write(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]}, "v1")
    assert load_tokenizer(tmp_path).chat_template == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load_tokenizer(tmp_path).chat_template == "z"

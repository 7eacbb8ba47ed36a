"""Reads the files of a checkpoint's tokenizer.

    config = read_tokenizer_config(Path("checkpoints/SmolLM2-135M-Instruct"))
    library = read_tokenizer_json(Path("checkpoints/SmolLM2-135M-Instruct/tokenizer.json"))

The tokenizer is in tokenizer.json, or tokenizer.model (sentencepiece), or vocab.json with merges.txt. TokenizerConfig
holds the contents of all other files: special tokens, added tokens, the chat template. Where files disagree, the same
file wins as in transformers.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from text.chat_template import check_unicode
from utils.errors import UsageError
from utils.files import read_json

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # the first one that exists counts
TOKENIZER_FILES = (*TOKENIZERS, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja")
# Special tokens without an id get new ids in this order.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
UNNAMED_TOKENS = ("extra_special_tokens", "additional_special_tokens")  # the first one that is set counts
TIKTOKEN_LINE = rb"[A-Za-z0-9+/=]+ \d+\r?\n"  # the first line of a tokenizer.model for the tiktoken library

# Qwen2 cuts a text by this pattern before byte-level BPE.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer_class -> its special tokens, if the files name none. Only these classes are read from vocab.json and
# merges.txt.
END_OF_TEXT = "<|endoftext|>"
VOCAB_CLASSES = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
}


@dataclass(frozen=True)
class TokenizerConfig:
    """The contents of the files next to the tokenizer. Each of these files may be missing."""

    fields: dict  # of tokenizer_config.json; fields of special_tokens_map.json may override them
    special_tokens_map: dict[str, str]  # bos_token, eos_token ... -> text of the special token
    special_tokens: list[AddedToken]  # the tokens of special_tokens_map, then the special tokens without a name
    added_tokens: dict[int, AddedToken]  # by id
    overrides_tokenizer: bool  # whether added_tokens override the added tokens in tokenizer.json
    chat_template: str | None

    def merge_added_tokens(self, own: dict[int, AddedToken]) -> dict[int, AddedToken]:
        """Returns all added tokens by id. own: the added tokens in tokenizer.json. A token with a name, such as
        bos_token, is special."""
        table = own | self.added_tokens if self.overrides_tokenizer else self.added_tokens | own
        for token in table.values():
            token.special = token.special or token.content in self.special_tokens_map.values()
        return dict(sorted(table.items()))

    def missing_special_tokens(self, added_tokens: dict[int, AddedToken]) -> list[AddedToken]:
        """Returns the special tokens that are not in added_tokens."""
        known = {token.content for token in added_tokens.values()}
        return [token for token in self.special_tokens if token.content not in known]


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Reads the files next to the tokenizer in folder. As in transformers, special_tokens_map.json and
    added_tokens.json count only if tokenizer_config.json has no added_tokens_decoder. A token in added_tokens.json is
    special if it is among the special tokens of the other files."""
    path = folder / "tokenizer_config.json"
    fields = read_fields(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        defaults = VOCAB_CLASSES.get(tokenizer_class(fields), {})
        fields = {name: build_added_token(token, special=True) for name, token in defaults.items()} | fields
    added_tokens, overrides_tokenizer = {}, "added_tokens_decoder" in fields
    if overrides_tokenizer:
        with refuse_broken(path):
            for i, token in fields["added_tokens_decoder"].items():
                added_tokens[check_id(int(i))] = build_added_token(token)
    else:
        fields |= read_fields(folder / "special_tokens_map.json")
    named, unnamed = special_tokens(fields)
    if not overrides_tokenizer:
        contents = {token.content for token in (*named.values(), *unnamed)}
        with refuse_broken(folder / "added_tokens.json"):
            for piece, i in read_json(folder / "added_tokens.json", {}).items():
                added_tokens[check_id(i)] = build_added_token(piece, special=piece in contents)
    special_tokens_map = {name: token.content for name, token in named.items()}
    template = read_chat_template(folder, fields)
    every = [*named.values(), *unnamed]
    return TokenizerConfig(fields, special_tokens_map, every, added_tokens, overrides_tokenizer, template)


def read_fields(path: Path) -> dict:
    """Reads the fields of a JSON file, and turns special tokens into AddedTokens. Returns {} if path does not exist."""
    fields = read_json(path, {})
    with refuse_broken(path):
        for key, value in fields.items():
            if key.endswith("_token") and isinstance(value, (str, dict)):
                fields[key] = build_added_token(value, special=True)
            elif key in UNNAMED_TOKENS and isinstance(value, dict):  # name -> token
                fields[key] = {name: build_added_token(token, special=True) for name, token in value.items()}
            elif key in UNNAMED_TOKENS and value:
                fields[key] = [build_added_token(token, special=True) for token in value]
        return fields


@contextlib.contextmanager
def refuse_broken(path: Path) -> Iterator[None]:
    """Raises UsageError if reading the contents of path fails within this context."""
    try:
        yield
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is broken ({type(e).__name__}: {e})") from None


def special_tokens(fields: dict) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Returns (special tokens with a name, such as bos_token, by name; special tokens without a name)."""
    named = {key: value for key, value in fields.items() if isinstance(value, AddedToken)}
    unnamed = next((fields[key] for key in UNNAMED_TOKENS if fields.get(key)), [])
    if isinstance(unnamed, dict):
        named, unnamed = named | unnamed, []
    order = [*(name for name in SPECIAL_TOKEN_NAMES if name in named), *named]  # a repeated key keeps its first place
    return {name: named[name] for name in order}, unnamed


def build_added_token(token: str | dict, special: bool | None = None) -> AddedToken:
    """token: as JSON has it, a text or a dict with flags. special: overrides the dict's flag."""
    token = {"content": token} if isinstance(token, str) else token
    if not token["content"]:
        raise ValueError("a token without text")
    check_unicode(token["content"], "a token")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    values = {flag: token[flag] for flag in flags if flag in token}
    return AddedToken(token["content"], **values | ({} if special is None else {"special": special}))


def check_id(i: int) -> int:
    if not isinstance(i, int) or i < 0:
        raise ValueError("a token without number")
    return i


def read_chat_template(folder: Path, fields: dict) -> str | None:
    path = folder / "chat_template.jinja"
    with refuse_broken(path):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    template = fields.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
        with refuse_broken(folder / "tokenizer_config.json"):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


# ---- The libraries' tokenizers --------------------------------------------------------------------------------------


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise UsageError(f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {e}") from None
    library.no_truncation()
    library.no_padding()
    return library


def tokenizer_class(fields: dict) -> str:
    return str(fields.get("tokenizer_class")).removesuffix("Fast")


def read_vocab_and_merges(folder: Path, fields: dict) -> tokenizers.Tokenizer:
    """Makes a byte-level BPE tokenizer from vocab.json and merges.txt. These files do not say how a text is split
    before BPE, so tokenizer_class in fields must be one of VOCAB_CLASSES."""
    kind = tokenizer_class(fields)
    if kind not in VOCAB_CLASSES or not (folder / "merges.txt").is_file():
        raise UsageError(
            f"{folder} has no tokenizer.json, and its vocab.json is read only with merges.txt and a tokenizer_class of "
            f"{' or '.join(VOCAB_CLASSES)} in tokenizer_config.json; write tokenizer.json with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as e:  # tokenizers raises bare Exception
        raise UsageError(f"{folder}: vocab.json or merges.txt is broken ({e})") from None
    is_qwen2 = kind == "Qwen2Tokenizer"
    library = byte_level_bpe(bpe, [QWEN2_SPLIT] if is_qwen2 else [], bool(fields.get("add_prefix_space")))
    if is_qwen2:
        library.normalizer = normalizers.NFC()
    return library


def byte_level_bpe(bpe: models.BPE, splits: list[str], add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """splits: regular expressions that split a text before BPE, one after the other. Without any, GPT-2's does."""
    library = tokenizers.Tokenizer(bpe)
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space, use_regex=not splits)
    library.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
    library.decoder = decoders.ByteLevel()
    return library


def read_tokenizer_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        data = path.read_bytes()
        if re.match(TIKTOKEN_LINE, data[:200]):
            raise UsageError(f"{path} is a tiktoken file; use tokenizer.json of the same repository")
        library = sentencepiece.SentencePieceProcessor()
        library.load_from_serialized_proto(data)
        return library
    except (OSError, RuntimeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not a sentencepiece model ({str(e).splitlines()[0]})") from None

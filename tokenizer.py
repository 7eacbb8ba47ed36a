"""Text and conversations to token ids and back, by tokenizer.json or, without one, tokenizer.model (sentencepiece).

    tokenizer = load_tokenizer(Path("checkpoints/SmolLM2-135M-Instruct"))
    tokenizer.decode(tokenizer.encode("Hello"))
    tokenizer.encode_chat([{"role": "user", "content": "Hello"}])

What looks like a special token ("</s>") is text, in a prompt and in a message. Only a chat template makes special ones.
"""

import codecs
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers

from chat_template import LLAMA2_TEMPLATE, render
from checkpoint import read_json
from config import UsageError

SENTINEL = str(secrets.randbits(128))  # occurs in nobody's text; of digits, so that no template's filter changes it
NOTHING = "(?!)"  # a regular expression that matches nowhere

Part = str | int  # of a text: some of its characters, or the id of a special token that stands there


@dataclass(frozen=True)
class TokenizerConfig:
    """What tokenizer_config.json and chat_template.jinja say; both may be missing."""

    fields: dict  # of tokenizer_config.json
    special_names: dict[str, str]  # what chat templates call special tokens: bos_token, eos_token ...
    chat_template: str | None


class Tokenizer:
    """What the rest of the project uses. A subclass for each library sets these fields and the last two methods."""

    vocab_size: int  # one more than the largest id
    bos_ids: list[int]  # what a text begins with
    special: dict[str, int]  # id of each special token
    drops_space: bool  # whether the library begins a text's first token with a space that is not the text's

    def __init__(self, config: TokenizerConfig):
        self.special_names, self.chat_template = config.special_names, config.chat_template

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text to continue. First the beginning-of-sequence token, if the checkpoint uses one (bos False:
        never); no end-of-sequence token, even if the tokenizer's settings append one."""
        ids = self.encode_parts([text])
        return self.bos_ids + ids if bos else ids

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text of ids. A special token has none, and bytes that are no character are U+FFFD. after: the ids before
        them; if there are any, a first token's space belongs to the text."""
        return "".join(stream(self, ids, after))

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation [{"role": "system" | "user" | "assistant", "content": text}] in the checkpoint's
        own template. Raises UsageError if it has none or the template refuses."""
        template, names = self.chat_template, self.special_names
        if template is None and (names.get("bos_token"), names.get("eos_token")) == ("<s>", "</s>"):
            template = LLAMA2_TEMPLATE
        if template is None:
            raise UsageError("this checkpoint has no chat template; use --prompt without --chat")
        marked = [message | {"content": self.mark_as_text(message["content"])} for message in messages]
        return self.encode_parts(self.split_special(render(template, names, marked, add_generation_prompt)))

    def mark_as_text(self, text: str) -> str:
        """text with SENTINEL after the first character of everything that looks like a special token, so that
        split_special does not find it."""
        starts = "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in self.special)
        return re.sub(starts or NOTHING, rf"\g<0>{SENTINEL}", text)

    def split_special(self, text: str) -> list[Part]:
        """text cut at the special tokens written in it, which become their ids; without any SENTINEL."""
        pieces = "|".join(re.escape(piece) for piece in sorted(self.special, key=len, reverse=True))  # longest first
        parts: list[Part] = []
        for k, fragment in enumerate(re.split(f"({pieces or NOTHING})(?!{SENTINEL})", text)):
            is_text = k % 2 == 0  # text, token, text, token ... text
            parts.append(fragment.replace(SENTINEL, "") if is_text else self.special[fragment])
        return parts

    def encode_parts(self, parts: list[Part]) -> list[int]:
        """The ids of one text that is given in parts. In them, what looks like a special token is text."""
        raise NotImplementedError

    def token_bytes(self, i: int) -> bytes:
        """A token's UTF-8, which may be an incomplete character; of a special token, or one that is none, nothing."""
        raise NotImplementedError


class TextStream:
    """Decodes ids as they arrive, whole characters only. All pieces together are tokenizer.decode(ids, after)."""

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = tokenizer.drops_space and not any(tokenizer.token_bytes(i) for i in after)

    def push(self, i: int) -> str:
        """The text that one more id completes, which may be none."""
        data = self.tokenizer.token_bytes(i)
        if self.at_start and data:
            data = data.removeprefix(b" ")
            self.at_start = False
        return self.utf8.decode(data)

    def end(self) -> str:
        """What is left after the last id: U+FFFD if it was not the end of a character."""
        return self.utf8.decode(b"", final=True)


def stream(tokenizer: Tokenizer, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
    """The pieces of tokenizer.decode(ids, after) as the ids arrive."""
    text = TextStream(tokenizer, after)
    for i in ids:
        piece = text.push(i)
        if piece:
            yield piece
    rest = text.end()
    if rest:
        yield rest


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder. Raises UsageError."""
    config = read_tokenizer_config(folder)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json", config)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model", config)
    raise UsageError(f"{folder} holds neither tokenizer.json nor tokenizer.model; copy it from the model's repository")


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    path = folder / "tokenizer_config.json"
    fields = read_json(path, {})
    try:
        special_names = {}
        for key, value in fields.items():
            if key.endswith("_token") and isinstance(value, (str, dict)):
                special_names[key] = value if isinstance(value, str) else value["content"]
                special_names[key].encode()  # raises ValueError for what is no text, like half of a surrogate pair
        template = fields.get("chat_template")
        if isinstance(template, list):  # of several, each with a name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        path = folder / "chat_template.jinja"
        if path.is_file():
            template = path.read_text(encoding="utf-8")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is broken ({type(e).__name__}: {e})") from None
    return TokenizerConfig(fields, special_names, template)


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


class JsonTokenizer(Tokenizer):
    def __init__(self, path: Path, config: TokenizerConfig):
        super().__init__(config)
        self.library = read_tokenizer_json(path)
        self.vocab_size = max(self.library.get_vocab().values(), default=-1) + 1
        self.make_special(config.special_names)
        self.special_tokens = {i: t for i, t in self.library.get_added_tokens_decoder().items() if t.special}
        self.special = {token.content: i for i, token in self.special_tokens.items()}
        self.add_placeholders()
        example = self.library.encode("a")  # shows what the file's post-processor puts before a text
        n_before = (example.special_tokens_mask + [0]).index(0)
        self.bos_ids = example.ids[:n_before]
        self.drops_space = self.library.decoder.decode(["▁a"]) == "a"
        self.byte_level = self.library.decoder.decode(["Ċ"]) == "\n"
        self.byte_of = byte_level_alphabet()

    def make_special(self, special_names: dict[str, str]):
        """Makes those tokens special that tokenizer_config.json names, whatever tokenizer.json says of them."""
        known = {t.content for t in self.library.get_added_tokens_decoder().values() if t.special}
        named = [name for name in special_names.values() if self.library.token_to_id(name) is not None]
        self.library.add_special_tokens([name for name in named if name not in known])

    def add_placeholders(self):
        """Makes the library take special tokens in a text as text, and gives each a placeholder that it still finds.
        With these encode_parts writes a text of parts in one string, so that the library sees the text as a whole."""
        self.library.encode_special_tokens = True
        self.placeholder = {i: f"<{SENTINEL}:{i}>" for i in self.special_tokens}
        placeholders = []
        for i, t in self.special_tokens.items():
            token = tokenizers.AddedToken(self.placeholder[i], lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
            placeholders.append(token)
        self.library.add_tokens(placeholders)
        self.real_id = {self.library.token_to_id(piece): i for i, piece in self.placeholder.items()}

    def encode_parts(self, parts: list[Part]) -> list[int]:
        text = "".join(self.placeholder[part] if isinstance(part, int) else part for part in parts)
        ids = self.library.encode(text, add_special_tokens=False).ids
        return [self.real_id.get(i, i) for i in ids]

    def token_bytes(self, i: int) -> bytes:
        piece = self.library.id_to_token(i)
        if piece is None or i >= self.vocab_size or i in self.special_tokens:
            return b""
        if self.byte_level and self.byte_of.keys() >= set(piece):
            return bytes(self.byte_of[character] for character in piece)
        if not self.byte_level and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        # The decoder may take a space from the first piece of a text; so this one is made the second.
        return self.library.decoder.decode(["a", piece])[1:].encode()


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise UsageError(f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {e}") from None
    if library.decoder is None:
        raise UsageError(f"{path} has no decoder, so its tokens have no text")
    library.no_truncation()
    library.no_padding()
    return library


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for, as GPT-2 has it: a byte that is a printing
    character stands for itself, and the others are written, in order, as U+0100, U+0101 ..."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printing = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


# ---- tokenizer.model ------------------------------------------------------------------------------------------------


class SentencePieceTokenizer(Tokenizer):
    ANCHOR = "\ue000"  # a character that is in no piece, so that it is encoded by itself

    def __init__(self, path: Path, config: TokenizerConfig):
        super().__init__(config)
        self.library = library = read_tokenizer_model(path)
        self.n_pieces = library.vocab_size()
        control = {library.id_to_piece(i): i for i in range(self.n_pieces) if library.is_control(i)}
        self.special = control | read_added_tokens(path.with_name("tokenizer_config.json"), config.fields)
        self.silent = {library.unk_id(), *self.special.values()}
        self.vocab_size = max(self.n_pieces - 1, *self.special.values(), 0) + 1
        for name, i in {"bos_token": library.bos_id(), "eos_token": library.eos_id()}.items():
            if i >= 0:
                self.special_names = {name: library.id_to_piece(i)} | self.special_names
        adds_bos = library.bos_id() >= 0 and config.fields.get("add_bos_token") is not False
        self.bos_ids = [library.bos_id()] if adds_bos else []
        self.drops_space = library.encode("a", out_type=str)[0].startswith("▁")
        self.legacy = config.fields.get("legacy", True)

    def encode_parts(self, parts: list[Part]) -> list[int]:
        """Sentencepiece puts a space before every text. Of our parts only the first is to have one, and, if the
        checkpoint was made so (legacy), the others that do not begin with one themselves. Where there is to be none,
        it goes before the anchor, whose ids are then cut off."""
        n_anchor, ids = len(self.library.encode(self.ANCHOR)), []
        for k, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif k == 0 or (self.legacy and not part.startswith(" ")):
                ids += self.library.encode(part)
            else:
                ids += self.library.encode(self.ANCHOR + part)[n_anchor:]
        return ids

    def token_bytes(self, i: int) -> bytes:
        if i >= self.n_pieces or i in self.silent:
            return b""
        piece = self.library.id_to_piece(i)
        if self.library.is_byte(i):  # <0x0A>
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()


def read_tokenizer_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        data = path.read_bytes()
        if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", data[:200]):
            raise UsageError(f"{path} is a tiktoken file; use tokenizer.json of the same repository")
        library = sentencepiece.SentencePieceProcessor()
        library.load_from_serialized_proto(data)
        return library
    except (OSError, RuntimeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not a sentencepiece model ({str(e).splitlines()[0]})") from None


def read_added_tokens(path: Path, fields: dict) -> dict[str, int]:
    """The special tokens that only tokenizer_config.json (fields, in path) has."""
    try:
        added = {token["content"]: int(i) for i, token in fields.get("added_tokens_decoder", {}).items()}
        if not all(piece.encode() and i >= 0 for piece, i in added.items()):
            raise ValueError("a token without text or number")
        return added
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UsageError(f"{path}: added_tokens_decoder is broken ({type(e).__name__}: {e})") from None

"""Text and conversations to token ids and back, by the libraries tokenizers and sentencepiece.

    tokenizer = load_tokenizer(Path("checkpoints/SmolLM2-135M-Instruct"))
    tokenizer.decode(tokenizer.encode("Hello"))
    tokenizer.encode_chat([{"role": "user", "content": "Hello"}])

Read Tokenizer first, and then IncrementalDetokenizer, which decodes tokens as they arrive. The subclasses for the two
libraries are at the end.

"<|im_start|>" in a text to continue is the special token of that name, as in transformers and llama.cpp. In the
messages of a conversation "<|im_start|>" is plain text: only the chat template writes special tokens there.
"""

import codecs
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from text.chat_template import LLAMA2_TEMPLATE, render
from text.tokenizer_files import (
    TokenizerConfig,
    read_tokenizer_config,
    read_tokenizer_json,
    read_tokenizer_model,
    read_vocab_and_merges,
)
from utils.errors import UsageError

# Inserted into a special token's text, so that it is not read as the token. SENTINEL is a random number, so no user's
# text contains it. It has only digits, so no filter of a template (such as upper) changes it.
SENTINEL = str(secrets.randbits(128))
MATCHES_NOTHING = "(?!)"  # a regular expression

Part = str | int  # a piece of a prompt: text, or the id of a special token


class Tokenizer:
    """The interface to both libraries. A subclass sets these fields, and implements encode_parts and token_bytes."""

    vocab_size: int  # one more than the largest id
    bos_ids: list[int]  # the ids with which every text begins: bos_token, or none
    special_token_ids: dict[str, int]  # a special token's text -> its id
    added_token_ids: dict[str, int] = {}  # text -> id of added tokens that are not special and that the library lacks
    ids_with_lstrip: set[int]  # special and added tokens that swallow white space on the left
    drops_space: bool  # whether the library puts a space before a text, and decoding drops it

    def __init__(self, config: TokenizerConfig):
        self.special_tokens_map, self.chat_template = config.special_tokens_map, config.chat_template

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Encodes a text to continue. Special tokens that are written in text become special tokens.

        With bos, the ids begin with bos_ids (empty for checkpoints without a bos token). A text that begins with the
        bos token gets no second bos token. No eos token is appended, even if the tokenizer's settings say so."""
        ids = self.encode_parts(self.split_at_special_tokens(text))
        has_bos = ids[: len(self.bos_ids)] == self.bos_ids
        return self.bos_ids + ids if bos and not has_bos else ids

    def decode(self, ids: Iterable[int], prefix_ids: Iterable[int] = ()) -> str:
        """Returns the text of ids. Special tokens have no text. Bytes that are not valid UTF-8 become U+FFFD.

        prefix_ids: the ids that precede ids. A tokenizer with drops_space drops the first id's leading space at the
        start of a text, but not after prefix_ids that have text."""
        return "".join(detokenize(self, ids, prefix_ids))

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Encodes a conversation [{"role": "system" | "user" | "assistant", "content": text}] up to the beginning of
        the next answer. Raises UsageError as split_chat does."""
        return self.encode_parts(self.split_chat(messages))

    def split_chat(self, messages: list[dict]) -> list[Part]:
        """Renders a conversation with the checkpoint's chat template, up to the beginning of the next answer. Special
        tokens that are written in a message stay text. Raises UsageError without a template, or if it fails."""
        starts = self.special_token_starts()
        # SENTINEL after the first character of a special token's text hides the text from split_at_special_tokens
        marked = [message | {"content": starts.sub(rf"\g<0>{SENTINEL}", message["content"])} for message in messages]
        return self.split_at_special_tokens(self.render_chat(marked, add_generation_prompt=True))

    def render_chat(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """Renders a conversation as a text that contains the texts of the template's special tokens."""
        template, names = self.chat_template, self.special_tokens_map
        if template is None and (names.get("bos_token"), names.get("eos_token")) == ("<s>", "</s>"):
            template = LLAMA2_TEMPLATE
        if not template:
            places = "neither in tokenizer_config.json nor in chat_template.jinja next to its tokenizer"
            raise UsageError(f"this checkpoint has no chat template, {places}; use --prompt without --chat")
        return render(template, names, messages, add_generation_prompt)

    def eos_ids(self) -> list[int]:
        """Returns the tokens that end a text: eos_token, and the chat template's token after an assistant's message."""
        ends = [self.special_token_ids.get(self.special_tokens_map.get("eos_token")), self.end_of_turn()]
        return [i for i in ends if i is not None]

    def end_of_turn(self) -> int | None:
        """Returns the special or added token that the chat template puts right after an assistant's message, ignoring
        white space. Returns None if there is no such token, or if the template fails."""
        answer = "An answer."
        messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
        try:
            _, found, rest = self.render_chat(messages, add_generation_prompt=False).rpartition(answer)
        except UsageError:
            return None
        parts = split_at(rest, self.special_token_ids | self.plain_added_tokens())
        follows_directly = found and len(parts) > 1 and not parts[0].strip()
        return parts[1] if follows_directly else None

    def plain_added_tokens(self) -> dict[str, int]:
        """Returns text -> id of the added tokens that are not special."""
        return self.added_token_ids

    def drop_special_tokens(self, n_tokens: int):
        """Turns special and added tokens whose ids are n_tokens or more into plain text. Does nothing if an ordinary
        token has such an id. The smallest Gemma 3 has no embedding for the tokenizer's image token."""
        droppable = {*self.special_token_ids.values(), *self.added_token_ids.values()}
        if all(i in droppable for i in range(n_tokens, self.vocab_size)):
            self.special_token_ids = {piece: i for piece, i in self.special_token_ids.items() if i < n_tokens}
            self.added_token_ids = {piece: i for piece, i in self.added_token_ids.items() if i < n_tokens}
            self.vocab_size = min(self.vocab_size, n_tokens)

    def special_token_starts(self) -> re.Pattern:
        """Returns a pattern of the first character of everything that looks like a special token."""
        starts = "|".join(f"{re.escape(piece[0])}(?={re.escape(piece[1:])})" for piece in self.special_token_ids)
        return re.compile(starts or MATCHES_NOTHING)

    def split_at_special_tokens(self, text: str) -> list[Part]:
        return split_at(text, self.special_token_ids)

    def encode_parts(self, parts: list[Part]) -> list[int]:
        """Encodes the parts of one prompt. What looks like a special token within a text part stays text."""
        raise NotImplementedError

    def token_bytes(self, i: int) -> bytes:
        """Returns the UTF-8 bytes of token i. They may end within a character. Returns b"" for a special token and for
        an unknown id."""
        raise NotImplementedError


def split_at(text: str, ids: dict[str, int]) -> list[Part]:
    """Splits text at tokens. These become ids. Removes every SENTINEL. ids: a token's text -> its id."""
    longest_first = sorted(ids, key=len, reverse=True)
    pieces = "|".join(map(re.escape, longest_first))
    parts: list[Part] = []
    for number, fragment in enumerate(re.split(f"({pieces or MATCHES_NOTHING})(?!{SENTINEL})", text)):
        is_text = number % 2 == 0  # re.split returns text, token, text, token ... text
        parts.append(fragment.replace(SENTINEL, "") if is_text else ids[fragment])
    return parts


class IncrementalDetokenizer:
    """Decodes ids as they arrive. A piece of text consists of whole characters. The pieces join to
    tokenizer.decode(ids, prefix_ids), up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prefix_ids: Iterable[int] = (), stop: Iterable[str] = ()):
        self.tokenizer, self.stop_finder = tokenizer, StopStringFinder(stop)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = tokenizer.drops_space and not any(tokenizer.token_bytes(i) for i in prefix_ids)

    def push(self, i: int) -> str:
        """Returns the text that id i completes. Holds back an incomplete character or stop string."""
        data = self.tokenizer.token_bytes(i)
        if self.at_start and data:
            data = data.removeprefix(b" ")
            self.at_start = False
        return self.stop_finder.push(self.utf8.decode(data))

    def end(self) -> str:
        """Returns the text that was held back, with U+FFFD for an incomplete character. No id may follow."""
        return self.stop_finder.push(self.utf8.decode(b"", final=True)) + self.stop_finder.end()

    @property
    def found_stop(self) -> bool:
        return self.stop_finder.found


def detokenize(tokenizer: Tokenizer, ids: Iterable[int], prefix_ids: Iterable[int] = ()) -> Iterator[str]:
    """Yields the pieces of tokenizer.decode(ids, prefix_ids) as the ids arrive."""
    detokenizer = IncrementalDetokenizer(tokenizer, prefix_ids)
    for i in ids:
        piece = detokenizer.push(i)
        if piece:
            yield piece
    rest = detokenizer.end()
    if rest:
        yield rest


def common_prefix_length(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class StopStringFinder:
    """Cuts a text that arrives in pieces before the first stop string. Holds back its end while that may be the
    beginning of a stop string."""

    def __init__(self, stop: Iterable[str]):
        self.stop = tuple(stop)
        self.held = ""  # the end of the text, held back
        self.found = False  # whether a stop string has come

    def push(self, piece: str) -> str:
        """Returns the text that certainly comes before any stop string."""
        text, self.held = self.held + piece, ""
        if self.found:
            return ""
        places = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stop if stop in text]
        if places:
            self.found = True
            _, start = min(places)  # the stop string that is complete first
            return text[:start]
        n_held = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        n_known = len(text) - n_held
        self.held = text[n_known:]
        return text[:n_known]

    def end(self) -> str:
        """Returns the text that was held back. No piece may follow."""
        rest, self.held = self.held, ""
        return rest


def load_tokenizer(folder: Path) -> Tokenizer:
    config = read_tokenizer_config(folder)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(read_tokenizer_json(folder / "tokenizer.json"), config)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder / "tokenizer.model", config)
    if (folder / "vocab.json").is_file():
        tokenizer = JsonTokenizer(read_vocab_and_merges(folder, config.fields), config)
        if config.fields.get("add_bos_token") and "bos_token" in config.special_tokens_map:
            tokenizer.bos_ids = [tokenizer.special_token_ids[config.special_tokens_map["bos_token"]]]
        return tokenizer
    raise UsageError(f"{folder} holds neither tokenizer.json nor tokenizer.model; copy it from the model's repository")


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


class JsonTokenizer(Tokenizer):
    def __init__(self, library: tokenizers.Tokenizer, config: TokenizerConfig):
        super().__init__(config)
        self.library = library
        added = config.merge_added_tokens(library.get_added_tokens_decoder())
        library.add_tokens(list(added.values()))  # a token that the library already has gets the flags of added
        library.add_tokens(config.missing_special_tokens(added))
        self.vocab_size = max(library.get_vocab().values(), default=-1) + 1
        self.special_tokens = {i: t for i, t in self.library.get_added_tokens_decoder().items() if t.special}
        self.special_token_ids = {token.content: i for i, token in self.special_tokens.items()}
        self.ids_with_lstrip = {i for i, token in self.library.get_added_tokens_decoder().items() if token.lstrip}
        self.add_placeholders()
        example = self.library.encode("a")  # begins with the special tokens that the post-processor puts before a text
        n_bos = (example.special_tokens_mask + [0]).index(0)
        self.bos_ids = example.ids[:n_bos]
        words = ("a", "▁a")
        self.drops_space = any(self.decode_pieces(["a", w]) == "a a" and self.decode_pieces([w]) == "a" for w in words)
        self.byte_level = self.decode_pieces(["Ċ"]) == "\n"
        self.byte_of = byte_level_alphabet()

    def add_placeholders(self):
        """Adds a placeholder token for each special token, and makes the library read special tokens as text. So
        encode_parts can join text and placeholders into one string, and the library encodes it as a whole."""
        self.library.encode_special_tokens = True
        self.placeholder = {i: f"<{SENTINEL}:{i}>" for i in self.special_tokens}
        placeholders = []
        for i, t in self.special_tokens.items():
            token = tokenizers.AddedToken(self.placeholder[i], lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
            placeholders.append(token)
        self.library.add_tokens(placeholders)
        self.real_id = {self.library.token_to_id(piece): i for i, piece in self.placeholder.items()}

    def plain_added_tokens(self) -> dict[str, int]:
        added = {t.content: i for i, t in self.library.get_added_tokens_decoder().items() if not t.special}
        return {piece: i for piece, i in added.items() if piece.strip() and i < self.vocab_size}

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
        # At the start of a text the decoder may drop a space. So decode the piece after an "a", and cut that off.
        return self.decode_pieces(["a", piece])[1:].encode()

    def decode_pieces(self, pieces: list[str]) -> str:
        return self.library.decoder.decode(pieces) if self.library.decoder else " ".join(pieces)


def byte_level_alphabet() -> dict[str, int]:
    """Returns the byte for each character of a byte-level piece, as in GPT-2. A printable byte stands for the same
    character. All other bytes are, in order, U+0100, U+0101 ..."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printing = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


# ---- tokenizer.model ------------------------------------------------------------------------------------------------


class SentencePieceTokenizer(Tokenizer):
    ANCHOR = "\ue000"  # no piece contains this character, so it has the same ids whatever follows

    def __init__(self, path: Path, config: TokenizerConfig):
        super().__init__(config)
        self.library = library = read_tokenizer_model(path)
        self.n_pieces = library.vocab_size()
        pieces = {library.id_to_piece(i): i for i in range(self.n_pieces)}
        added = config.merge_added_tokens({})
        ids = pieces | {token.content: i for i, token in added.items()}
        further = config.missing_special_tokens(added)
        for token in further:
            ids.setdefault(token.content, max(ids.values(), default=-1) + 1)
        tokens = [*added.values(), *further]
        control = {piece: i for piece, i in pieces.items() if library.is_control(i)}
        self.special_token_ids = control | {token.content: ids[token.content] for token in tokens if token.special}
        others = {token.content: i for i, token in added.items() if not token.special}
        self.added_token_ids = {piece: i for piece, i in others.items() if pieces.get(piece) != i}
        self.ids_with_lstrip = {ids[token.content] for token in tokens if token.lstrip}
        self.ids_with_rstrip = {ids[token.content] for token in tokens if token.rstrip}
        self.text_of = {i: piece for piece, i in self.added_token_ids.items()}
        self.ids_without_text = {library.unk_id(), *self.special_token_ids.values()}
        self.vocab_size = max(ids.values(), default=-1) + 1
        for name, i in {"bos_token": library.bos_id(), "eos_token": library.eos_id()}.items():
            if i >= 0:
                self.special_tokens_map = {name: library.id_to_piece(i)} | self.special_tokens_map
        adds_bos = library.bos_id() >= 0 and config.fields.get("add_bos_token") is not False
        self.bos_ids = [library.bos_id()] if adds_bos else []
        self.drops_space = library.encode("a", out_type=str)[0].startswith("▁")
        self.legacy = config.fields.get("legacy", True)

    def encode_parts(self, parts: list[Part]) -> list[int]:
        """Encodes the parts one by one. Sentencepiece puts a space before every text that it encodes:

            a first part                                                  the space is right
            a later part, "legacy" is set, no space at the beginning      the space is right
            any other later part                                          the space is wrong

        If the space is wrong, this method encodes ANCHOR + part, and cuts off the ids of space and ANCHOR."""
        parts = self.swallow_spaces([piece for part in parts for piece in self.split_at_added_tokens(part)])
        n_anchor, ids = len(self.library.encode(self.ANCHOR)), []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif number == 0 or (self.legacy and not part.startswith(" ")):
                ids += self.library.encode(part)
            else:
                ids += self.library.encode(self.ANCHOR + part)[n_anchor:]
        return ids

    def split_at_added_tokens(self, part: Part) -> list[Part]:
        """Splits a text at added tokens that are not special: a chat's message may contain such a token."""
        return split_at(part, self.added_token_ids) if isinstance(part, str) else [part]

    def swallow_spaces(self, parts: list[Part]) -> list[Part]:
        """Cuts the white space before added tokens with lstrip, and after added tokens with rstrip."""
        for k, text in enumerate(parts):
            if isinstance(text, str):
                if k > 0 and parts[k - 1] in self.ids_with_rstrip:
                    text = text.lstrip()
                if k + 1 < len(parts) and parts[k + 1] in self.ids_with_lstrip:
                    text = text.rstrip()
                parts[k] = text
        return parts

    def token_bytes(self, i: int) -> bytes:
        if i in self.text_of and i < self.vocab_size:
            return self.text_of[i].encode()
        if i >= self.n_pieces or i in self.ids_without_text:
            return b""
        piece = self.library.id_to_piece(i)
        if self.library.is_byte(i):  # <0x0A>
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()

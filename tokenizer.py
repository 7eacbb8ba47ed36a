"""Text to token ids and back, for tokenizer.json (tokenizers) and tokenizer.model (sentencepiece), and chat templates.

    tok = load_tokenizer(Path("checkpoints/SmolLM2-135M-Instruct"))
    tok.decode(tok.encode("Hello"))
    tok.encode_chat([{"role": "user", "content": "Hello"}])

What looks like a special token ("</s>") is text, in a prompt and in a message; only a chat template's own words make
special tokens.
"""

import codecs
import contextlib
import json
import re
import secrets
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint import read_json
from model import UsageError

# Llama-2's form, which Mistral follows, for checkpoints of theirs that come without a template
INST = """\
{%- if messages[0].role == 'system' -%}
{%- set begin, messages = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + (begin if loop.first and begin else '') + m.content + ' [/INST]' }}
{%- else -%}
{{ ' ' + m.content + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
NONCE = str(secrets.randbits(128))  # occurs in nobody's text; digits, so that no template's filter changes it
PATIENCE = 10  # seconds that a chat template, which is a program, may run


@dataclass
class Tokenizer:
    """One tokenizer, whatever its library: encode_parts and token_bytes do the library's work."""

    encode_parts: Callable[[list[str | int]], list[int]]  # one text in which ids stand for special tokens
    token_bytes: Callable[[int], bytes]  # a token's UTF-8, maybe a part of a character; of a special token nothing
    drops_space: bool  # a text's first token begins with a space that is not the text's
    vocab_size: int  # one more than the largest id
    bos_ids: list[int]  # what a text begins with
    special: dict[str, int]
    chat_template: str | None
    names: dict[str, str]  # what chat templates call special tokens: bos_token, eos_token ...

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text to continue: first the beginning-of-sequence token, if the checkpoint uses one (bos False:
        never); no end-of-sequence token, even if the tokenizer's settings append one."""
        return self.bos_ids * bos + self.encode_parts([text])

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text of ids. A special token has none; a torn character is U+FFFD. After other ids, a first token's
        space counts."""
        return "".join(stream(self, ids, after))

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation [{"role": "system" | "user" | "assistant", "content": text}] in the checkpoint's
        own template. Raises UsageError if it has none or the template refuses."""
        template = self.chat_template
        if template is None and (self.names.get("bos_token"), self.names.get("eos_token")) == ("<s>", "</s>"):
            template = INST
        if template is None:
            raise UsageError("this checkpoint has no chat template; use --prompt without --chat")
        # In a message, NONCE after the first character of every special piece keeps it from being found in the end.
        firsts = "|".join(f"{re.escape(p[0])}(?={re.escape(p[1:])})" for p in self.special) or "(?!)"
        messages = [m | {"content": re.sub(firsts, rf"\g<0>{NONCE}", m["content"])} for m in messages]
        text = render(template, self.names, messages, add_generation_prompt)
        pieces = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)"
        parts = re.split(f"({pieces})(?!{NONCE})", text)  # text, piece, text ... piece, text
        return self.encode_parts([self.special[p] if k % 2 else p.replace(NONCE, "") for k, p in enumerate(parts)])


def stream(tokenizer: Tokenizer, ids: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
    """The pieces of tokenizer.decode(ids, after) as the ids arrive, whole characters only."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    at_start = tokenizer.drops_space and not any(map(tokenizer.token_bytes, after))
    for i in ids:
        data = tokenizer.token_bytes(i)
        if at_start and data:
            data, at_start = data.removeprefix(b" "), False
        if text := utf8.decode(data):
            yield text
    if text := utf8.decode(b"", final=True):
        yield text


def render(template: str, names: dict[str, str], messages: list[dict], add_generation_prompt: bool) -> str:
    """A chat template's text, with the variables and functions that transformers offers. Raises UsageError."""

    def raise_exception(message):
        raise TemplateError(message)

    def times(a, b):
        size = [x if isinstance(x, (int, float)) else len(x) for x in (a, b)]  # of a text or a list, how often
        if size != [a, b] and size[0] * size[1] > 10**6:
            raise_exception("it makes a text of millions of characters")
        return a * b

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's own escapes HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.intercepted_binops = frozenset({"**", "*"})  # of which the first may take forever, deaf to signals
    env.binop_table |= {"**": lambda a, b: raise_exception("it computes a power"), "*": times}
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        # {% generation %} tells training which words are the model's; to a reader it is a scope.
        template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", template)
        with at_most(PATIENCE):
            text = env.from_string(template).render(names | values)
        text.encode()  # or it is no text
        return text
    except Exception as e:  # a template is a program and fails like one
        why = " ".join(str(e).split()) or type(e).__name__
        raise UsageError(f"the checkpoint's chat template failed: {why}") from None


@contextlib.contextmanager
def at_most(seconds: int):
    """Raises TemplateError in what takes longer; not outside the main thread, which alone hears signals."""

    def stop(*_):
        raise TemplateError(f"it takes more than {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder: tokenizer.json if there is one, else tokenizer.model."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path, {})
    try:
        tokens = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, (str, dict))}
        names = {k: v if isinstance(v, str) else v["content"] for k, v in tokens.items()}
        for name in names.values():
            name.encode()  # or it is no text
        template = settings.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {t["name"]: t["template"] for t in template}.get("default")
        path = folder / "chat_template.jinja"
        if path.is_file():
            template = path.read_text(encoding="utf-8")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is broken ({type(e).__name__}: {e})") from None
    if (folder / "tokenizer.json").is_file():
        return from_tokenizers(folder / "tokenizer.json", template, names)
    if (folder / "tokenizer.model").is_file():
        return from_sentencepiece(folder / "tokenizer.model", settings, template, names)
    raise UsageError(f"{folder} holds neither tokenizer.json nor tokenizer.model; copy it from the model's repository")


def from_tokenizers(path: Path, template: str | None, names: dict[str, str]) -> Tokenizer:
    import tokenizers

    try:
        tok = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise UsageError(f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {e}") from None
    if tok.decoder is None:
        raise UsageError(f"{path} has no decoder, so its tokens have no text")
    tok.no_truncation()
    tok.no_padding()
    size, decode = max(tok.get_vocab().values(), default=-1) + 1, tok.decoder.decode
    # What the settings name is special, whatever the file says.
    known = [t.content for t in tok.get_added_tokens_decoder().values() if t.special]
    tok.add_special_tokens([n for n in names.values() if n not in known and tok.token_to_id(n) is not None])
    added = {i: t for i, t in tok.get_added_tokens_decoder().items() if t.special}
    # From here on special tokens are text, and encode_parts writes aliases for them, which nobody's text holds.
    tok.encode_special_tokens = True
    alias = {i: f"<{NONCE}:{i}>" for i in added}
    flags = {i: {"lstrip": t.lstrip, "rstrip": t.rstrip, "normalized": False} for i, t in added.items()}
    tok.add_tokens([tokenizers.AddedToken(a, **flags[i]) for i, a in alias.items()])
    real = {tok.token_to_id(a): i for i, a in alias.items()}

    def encode_parts(parts):
        text = "".join(alias[p] if isinstance(p, int) else p for p in parts)
        return [real.get(i, i) for i in tok.encode(text, add_special_tokens=False).ids]

    sample = tok.encode("a")  # shows what the file's post-processor puts before a text
    bos_ids = sample.ids[: (sample.special_tokens_mask + [0]).index(0)]

    # Byte-level pieces are written in 256 characters: a byte that prints is itself, the others follow in order.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    byte_of = dict(zip(alphabet, sorted(range(256), key=lambda b: chr(b) not in alphabet), strict=True))
    byte_level = decode(["Ċ"]) == "\n"

    def token_bytes(i):
        piece = tok.id_to_token(i)
        if piece is None or i >= size or i in alias:
            return b""
        if byte_level and byte_of.keys() >= set(piece):
            return bytes(byte_of[c] for c in piece)
        if not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return decode(["a", piece])[1:].encode()  # "a", for the first piece may lose its space

    drops_space, special = decode(["▁a"]) == "a", {t.content: i for i, t in added.items()}
    return Tokenizer(encode_parts, token_bytes, drops_space, size, bos_ids, special, template, names)


def from_sentencepiece(path: Path, settings: dict, template: str | None, names: dict[str, str]) -> Tokenizer:
    import sentencepiece

    try:
        data = path.read_bytes()
        if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", data[:200]):
            raise UsageError(f"{path} is a tiktoken file; use tokenizer.json of the same repository")
        tok = sentencepiece.SentencePieceProcessor()
        tok.load_from_serialized_proto(data)
        size, bos, eos = tok.vocab_size(), tok.bos_id(), tok.eos_id()
    except (OSError, RuntimeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not a sentencepiece model ({str(e).splitlines()[0]})") from None
    try:
        added = {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}
        if not all(piece.encode() and i >= 0 for piece, i in added.items()):
            raise ValueError("a token without text or number")
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        config = path.with_name("tokenizer_config.json")
        raise UsageError(f"{config}: added_tokens_decoder is broken ({type(e).__name__}: {e})") from None
    special = {tok.id_to_piece(i): i for i in range(size) if tok.is_control(i)} | added
    silent = {tok.unk_id(), *special.values()}
    names = {k: tok.id_to_piece(i) for k, i in (("bos_token", bos), ("eos_token", eos)) if i >= 0} | names
    legacy, anchor = settings.get("legacy", True), "\ue000"  # a character of no piece

    def encode_parts(parts):
        """Sentencepiece puts a space before a text, and before one after a special token if the checkpoint was made
        so (legacy) and it has none; otherwise the anchor takes it."""
        ids = []
        for k, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif k and (not legacy or part.startswith(" ")):
                ids += tok.encode(anchor + part)[len(tok.encode(anchor)) :]
            else:
                ids += tok.encode(part)
        return ids

    def token_bytes(i):
        if i >= size or i in silent:
            return b""
        piece = tok.id_to_piece(i)
        return bytes.fromhex(piece[3:5]) if tok.is_byte(i) else piece.replace("▁", " ").encode()

    bos_ids = [bos] if bos >= 0 and settings.get("add_bos_token") is not False else []
    drops_space = tok.encode("a", out_type=str)[0].startswith("▁")
    vocab_size = max(size - 1, *special.values(), 0) + 1
    return Tokenizer(encode_parts, token_bytes, drops_space, vocab_size, bos_ids, special, template, names)

"""Text to token ids and back, for tokenizer.json (tokenizers) and tokenizer.model (sentencepiece), and chat templates.

    tok = load_tokenizer(Path("checkpoints/SmolLM2-135M-Instruct"))
    tok.decode(tok.encode("Hello"))
    tok.encode_chat([{"role": "user", "content": "Hello"}])

Text that looks like a special token ("</s>") is text to encode(); only a chat template's own words make special tokens.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint import read_json
from model import UsageError

INST_TEMPLATE = (  # Llama-2's and Mistral's form, for their checkpoints that carry no template
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 and messages[0].role"
    " == 'system' %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass
class Tokenizer:
    """encode_text(text, bos) and decode(ids) do the work of one library; special maps special pieces to ids."""

    encode_text: Callable[[str, bool], list[int]]
    decode_ids: Callable[[list[int]], str]
    vocab_size: int  # one more than the largest id
    special: dict[str, int]
    chat_template: str | None
    bos_token: str
    eos_token: str

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The ids of a text, after the beginning-of-sequence token if the checkpoint uses one (bos False: never)."""
        return self.encode_text(text, bos)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens have none, a torn character is U+FFFD."""
        return self.decode_ids(list(ids))

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation [{"role": "system" | "user" | "assistant", "content": text}] in the checkpoint's
        own template. Raises UsageError if it has none or the template refuses."""
        if self.chat_template is None:
            raise UsageError("this checkpoint has no chat template; use --prompt without --chat")
        options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        env = ImmutableSandboxedEnvironment(**options)
        env.globals["raise_exception"] = raise_template_error
        try:
            text = env.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError) as e:
            raise UsageError(f"the checkpoint's chat template failed: {e}") from None
        if not self.special:
            return self.encode_text(text, False)
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")", text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self.encode_text(part, False)
        return ids


def raise_template_error(message: str):
    raise TemplateError(message)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder: tokenizer.json if there is one, else tokenizer.model."""
    settings = read_json(folder / "tokenizer_config.json", {})
    if not isinstance(settings, dict):
        raise UsageError(f"{folder / 'tokenizer_config.json'} must hold one object")

    def piece(key):  # a string, or an object with its content
        value = settings.get(key)
        return (value.get("content") if isinstance(value, dict) else value) or ""

    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    chat = {"chat_template": template, "bos_token": piece("bos_token"), "eos_token": piece("eos_token")}
    if (folder / "tokenizer.json").is_file():
        return from_tokenizers(folder / "tokenizer.json", chat)
    if (folder / "tokenizer.model").is_file():
        return from_sentencepiece(folder / "tokenizer.model", chat, settings.get("add_bos_token"))
    raise UsageError(f"{folder} holds neither tokenizer.json nor tokenizer.model; copy it from the model's repository")


def from_tokenizers(path: Path, chat: dict) -> Tokenizer:
    import tokenizers

    try:
        tok = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise UsageError(f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {e}") from None
    tok.no_truncation()
    tok.no_padding()
    tok.encode_special_tokens = True  # in text, "</s>" is four characters
    added = tok.get_added_tokens_decoder()
    return Tokenizer(
        lambda text, bos: tok.encode(text, add_special_tokens=bos).ids,
        lambda ids: tok.decode(ids, skip_special_tokens=True),
        max(tok.get_vocab().values(), default=-1) + 1,
        {t.content: i for i, t in added.items()},
        **chat,
    )


def from_sentencepiece(path: Path, chat: dict, add_bos: bool | None) -> Tokenizer:
    import sentencepiece

    data = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", data[:200]):
        raise UsageError(f"{path} is a tiktoken file; use tokenizer.json of the same repository")
    try:
        tok = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = tok.vocab_size()
    except Exception as e:
        raise UsageError(f"{path} is not a sentencepiece model ({str(e).splitlines()[0]})") from None
    special = {tok.id_to_piece(i): i for i in range(size) if tok.is_control(i)}
    bos, eos = tok.bos_id(), tok.eos_id()
    chat["bos_token"] = chat["bos_token"] or (tok.id_to_piece(bos) if bos >= 0 else "")
    chat["eos_token"] = chat["eos_token"] or (tok.id_to_piece(eos) if eos >= 0 else "")
    if chat["chat_template"] is None and bos >= 0 and eos >= 0:
        chat["chat_template"] = INST_TEMPLATE
    return Tokenizer(
        lambda text, with_bos: [bos] * (with_bos and bos >= 0 and add_bos is not False) + tok.encode(text),
        tok.decode,
        size,
        special,
        **chat,
    )


def stream(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as tokens arrive, whole characters only: what may still change waits for the next token.
    Joined, they are tokenizer.decode(all ids)."""
    done, start, end = [], 0, 0  # text of done[start:end] is printed; earlier tokens no longer matter
    for i in ids:
        done.append(i)
        before, now = tokenizer.decode(done[start:end]), tokenizer.decode(done[start:])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, end = end, len(done)
    rest = tokenizer.decode(done[start:])[len(tokenizer.decode(done[start:end])) :]
    if rest:
        yield rest

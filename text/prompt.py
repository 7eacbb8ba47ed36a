"""Turns a prompt into token ids. A prompt is a text to continue or a chat's messages.

    ids = encode_prompt("Hello", tokenizer, max_seq_len=2048)
    ids = encode_prompt([{"role": "user", "content": "Hello"}], tokenizer, max_seq_len=2048)
"""

from text.chat_template import check_unicode, read_message
from text.tokenizer import Part, Tokenizer
from utils.errors import UsageError


def encode_prompt(
    prompt: str | list[dict], tokenizer: Tokenizer, max_seq_len: int, limit: str = "the model's context of "
) -> list[int]:
    """Encodes a text, or a chat's messages [{"role": ..., "content": ...}]. An empty prompt has no ids. Raises
    UsageError as read_prompt does, and also if the prompt is certainly longer than max_seq_len tokens, because encoding
    it would take long. limit: the name of max_seq_len in the message."""
    prompt = read_prompt(prompt)
    is_chat = isinstance(prompt, list)
    for text in [message["content"] for message in prompt] if is_chat else [prompt]:
        if is_certainly_longer(tokenizer, text, max_seq_len):
            raise UsageError(f"a prompt of {len(text)} characters exceeds {limit}{max_seq_len} tokens")
    if not prompt:
        return []
    if not is_chat:
        return tokenizer.encode(prompt)
    parts = tokenizer.split_chat(prompt)
    if is_certainly_longer(tokenizer, parts, max_seq_len):
        raise UsageError(f"a chat of {len(prompt)} messages exceeds {limit}{max_seq_len} tokens")
    return tokenizer.encode_parts(parts)


def read_prompt(prompt: str | list[dict]) -> str | list[dict]:
    """Returns a user's prompt: a text unchanged, or a chat's messages after read_message. Raises UsageError if the
    prompt is neither, or not valid UTF-8."""
    if isinstance(prompt, list):
        return [read_message(message) for message in prompt]
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt must be a text or a list of messages, not {prompt!r:.80}")
    check_unicode(prompt, "the prompt")
    return prompt


# ---- Whether a prompt is too long, without encoding all of it: 100 MB would take minutes -----------------------------

SAMPLE_LENGTH = 16  # characters for each token; few texts have longer tokens
SAMPLE_GROWTH = 4


def is_certainly_longer(tokenizer: Tokenizer, prompt: str | list[Part], n_tokens: int) -> bool:
    """Returns whether prompt certainly has more than n_tokens tokens. prompt: a text to continue, or a prompt's parts.

    Encodes longer and longer beginnings of prompt, until a beginning has twice n_tokens. The text after a beginning can
    change the last tokens of the beginning, but not half of them."""
    if isinstance(prompt, list) and count_special_tokens(prompt) > n_tokens:
        return True
    length = SAMPLE_LENGTH * n_tokens
    total = len(prompt) if isinstance(prompt, str) else sum(map(n_characters, prompt))
    while total > length:
        if isinstance(prompt, str):
            beginning = tokenizer.split_at_special_tokens(prompt[:length])
        else:
            beginning = first_characters(prompt, length)
        if tokenizer.ids_with_lstrip and isinstance(beginning[-1], str):
            beginning[-1] = beginning[-1].rstrip()  # a token that follows may swallow this white space
        if count_special_tokens(beginning) > n_tokens or len(tokenizer.encode_parts(beginning)) > 2 * n_tokens:
            return True
        length *= SAMPLE_GROWTH
    return False


def count_special_tokens(parts: list[Part]) -> int:
    return sum(isinstance(part, int) for part in parts)


def n_characters(part: Part) -> int:
    """Returns the length of part. A special token counts as one character."""
    return len(part) if isinstance(part, str) else 1


def first_characters(parts: list[Part], n: int) -> list[Part]:
    beginning: list[Part] = []
    for part in parts:
        if n <= 0:
            break
        beginning.append(part[:n] if isinstance(part, str) else part)
        n -= n_characters(part)
    return beginning

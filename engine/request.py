"""Requests: a prompt and how to continue it. Everything that generates text makes a Request of its input:

    request = build_request("Hello", tokenizer, context, max_new_tokens=100)    # a text, or a chat's messages
    request = Request(prompt_ids, max_new_tokens=100)                           # token ids

scheduler.py computes the new tokens of many requests, and completion.py makes texts of them.
"""

from dataclasses import KW_ONLY, dataclass

from engine.sampling import SamplingParams
from text.chat_template import check_unicode, read_message
from text.tokenizer import Tokenizer
from utils.errors import UsageError

GREEDY = SamplingParams()


@dataclass(eq=False)
class Request:
    """A prompt to continue."""

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    _: KW_ONLY
    seed: int = 0
    stop: tuple[str, ...] = ()  # strings that end the new text; completion.py looks for them
    is_chat: bool = False  # True: the new text is a chat's answer, which is detokenized without the prompt as context
    n_logprobs: int | None = None  # report the log-probabilities of this many of the likeliest tokens; None: of none
    start_time: float | None = None  # when prefill began


def build_request(
    prompt: str | list[dict], tokenizer: Tokenizer, context: int, max_new_tokens: int, **options
) -> Request:
    """Returns a Request that continues prompt: a text, or a chat's messages. Raises UsageError as encode_prompt does,
    and if stop is a string: its letters would be stop strings.

    options: further fields of Request."""
    stop = options.get("stop", ())
    if isinstance(stop, str) or "" in stop:
        raise UsageError(f"stop must be a tuple of strings that are not empty, not {stop!r:.80}")
    ids = encode_prompt(prompt, tokenizer, context)
    return Request(ids, max_new_tokens, is_chat=not isinstance(prompt, str), **options)


def encode_prompt(prompt: str | list[dict], tokenizer: Tokenizer, context: int) -> list[int]:
    """Encodes a text, or a chat's messages [{"role": ..., "content": ...}]. An empty prompt gives no ids. Raises
    UsageError if messages are malformed, if a text is not valid UTF-8, or if a text is so long that it must exceed
    context, the model's in tokens (encoding would take long)."""
    is_chat = not isinstance(prompt, str)
    messages = [read_message(message) for message in prompt] if is_chat else []
    for text in [message["content"] for message in messages] if is_chat else [prompt]:
        try:
            check_unicode(text)
        except UnicodeEncodeError:
            raise UsageError("the prompt is not valid UTF-8") from None
        if tokenizer.exceeds(text, context):
            raise UsageError(f"a prompt of {len(text)} characters exceeds the model's context of {context} tokens")
    if not prompt:
        return []
    return tokenizer.encode_chat(messages) if is_chat else tokenizer.encode(prompt)


def check_max_new_tokens(max_new_tokens: int):
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


def check_length(n_prompt_tokens: int, max_new_tokens: int, max_seq_len: int, limit: str = "the model's context of "):
    """Raises UsageError if the prompt is empty, or if the prompt and the new tokens together exceed max_seq_len.
    limit: what max_seq_len is, for the error's text."""
    if n_prompt_tokens == 0:
        raise UsageError("the prompt is empty; give some text")
    if n_prompt_tokens + max_new_tokens > max_seq_len:
        excess = f"{n_prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed"
        raise UsageError(f"{excess} {limit}{max_seq_len}")


def find_finish_reason(token: int, n_new_tokens: int, max_new_tokens: int, eos_ids: set[int]) -> str | None:
    """Returns why a text ends at token, the last of n_new_tokens. "stop": token is an end token. "length": the text has
    max_new_tokens. None: the text goes on. Stop strings are not found here, but in completion.py."""
    if token in eos_ids:
        return "stop"
    return "length" if n_new_tokens == max_new_tokens else None

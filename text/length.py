"""Whether a prompt is too long, without encoding all of it: 100 MB would take minutes.

    exceeds(tokenizer, "Hello", 2048)                             # a text to continue
    exceeds(tokenizer, tokenizer.split_chat(messages), 2048)      # a conversation
"""

from text.tokenizer import Part, Tokenizer

SAMPLE_LENGTH = 16  # characters for each token that a prompt may have; few texts have longer tokens
SAMPLE_GROWTH = 4


def exceeds(tokenizer: Tokenizer, prompt: str | list[Part], n_tokens: int) -> bool:
    """Returns whether prompt certainly has more than n_tokens tokens. prompt: a text to continue, or a prompt's parts.

    Encodes longer and longer beginnings of prompt, until a beginning has twice n_tokens. The text after a beginning can
    change the last tokens of the beginning, but not half of the tokens."""
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

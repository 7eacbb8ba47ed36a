"""A conversation with a chat model.

    conversation = LLM("checkpoints/M/model.pth").chat()  # of generate.py
    for piece in conversation.answer("Hello!", max_new_tokens=100):
        print(piece, end="", flush=True)

Every turn writes out the whole conversation with the checkpoint's chat template. The KV cache still holds the tokens of
earlier turns, so the model only gets those behind the common beginning. What the context has no room for any more is
forgotten, the oldest messages first. cli/terminal.py leads a conversation on a terminal.
"""

import sys
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Protocol

from config import UsageError
from tokenizer import IncrementalDetokenizer, Tokenizer, common_prefix_length

# If less than an eighth of the context is left for an answer, the oldest messages are forgotten, until a quarter is
# left. That is more than is needed, so that the tokens behind them are not computed anew in every turn.
MIN_ROOM, ROOM = 1 / 8, 1 / 4
CUT = ("length", "context", "interrupted")  # what finish_reason is after an answer that can go on


class ContextFull(UsageError):
    """A message or an answer takes the whole context."""


class TokenGenerator(Protocol):
    """What continues a text: generate.build_token_generator makes one, and partial(speculate, speculation) of
    speculate.py is one."""

    def __call__(self, history: list[int], start: int, max_new_tokens: int) -> Iterator[list[list[int]]]:
        """Continues history, the token ids of a text, of which the first start tokens are in the KV cache. Yields the
        new tokens of each step, [n][B]: n tokens of each of B sequences."""


class Conversation:
    def __init__(
        self, tokenizer: Tokenizer, generate_tokens: TokenGenerator, max_seq_len: int, eos_ids: Sequence[int],
        system: str | None = None,
    ):  # fmt: skip
        """max_seq_len: that of generate_tokens' KV cache. system: the system message. Raises UsageError if the
        checkpoint has no chat template."""
        self.tokenizer, self.generate_tokens = tokenizer, generate_tokens
        self.max_seq_len, self.eos_ids = max_seq_len, set(eos_ids)
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict] = []  # the user's and the model's, in turn
        self.cached: list[int] = []  # the tokens whose keys and values are in the KV cache
        self.n_forgotten = 0  # how many messages were forgotten to make room for the last answer
        # Of the last answer:
        self.answer_ids: list[int] = []  # its tokens, without the end token
        self.token_times: list[float] = []  # when each token arrived, its end token included; since it went on
        self.finish_reason: str | None = None  # "stop" (an end token), one of CUT, or None: there is no answer
        self.detokenizer = IncrementalDetokenizer(tokenizer)
        self.encode("Hello", [])  # raises if there is no chat template

    def encode(self, message: str, earlier: list[dict] | None = None) -> list[int]:
        """The token ids of the conversation with one more message. earlier: the messages before it, by default all."""
        earlier = self.messages if earlier is None else earlier
        return self.tokenizer.encode_chat([*self.system, *earlier, {"role": "user", "content": message}])

    def answer(self, message: str, max_new_tokens: int = sys.maxsize) -> Iterator[str]:
        """Yields the answer to message, piece by piece, as long as the context has room. Raises ContextFull if there is
        no room for the message alone. If the caller stops early, the conversation keeps the part of the answer that
        was generated; if there is none, it drops the message too."""
        ids = self.make_room(self.messages, message, [], max_new_tokens)
        self.answer_ids, self.detokenizer = [], IncrementalDetokenizer(self.tokenizer)
        turn = [{"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        return self.stream(ids, max_new_tokens, turn)

    def continue_answer(self, max_new_tokens: int = sys.maxsize) -> Iterator[str]:
        """Goes on with the last answer, token by token where it was cut, and yields what follows. Raises ContextFull if
        the answer takes the whole context, and UsageError if it was not cut."""
        if not self.messages or self.finish_reason not in CUT:
            raise UsageError("There is no cut answer to go on with.")
        *earlier, question, _ = self.messages
        ids = self.make_room(earlier, question["content"], self.answer_ids, max_new_tokens)
        return self.stream(ids, max_new_tokens, [])

    def make_room(self, earlier: list[dict], message: str, answer_ids: list[int], max_new_tokens: int) -> list[int]:
        """The token ids of the conversation: earlier messages, message, and as much of its answer as there is. If that
        leaves little room, forgets the oldest of the earlier messages, in pairs of a message and its answer."""

        def ids_without(n_pairs: int) -> list[int]:
            return self.encode(message, earlier[2 * n_pairs :]) + answer_ids

        def has_room(n_pairs: int) -> bool:
            return self.max_seq_len - len(ids_without(n_pairs)) >= self.max_seq_len * ROOM

        if self.tokenizer.exceeds(message, self.max_seq_len):
            raise ContextFull(f"That is far longer than the context of {self.max_seq_len} tokens: shorten it.")
        n_pairs, ids = 0, ids_without(0)
        if self.max_seq_len - len(ids) < min(max_new_tokens, self.max_seq_len * MIN_ROOM):
            n_pairs = bisect_left(range(len(earlier) // 2), True, key=has_room)  # all, if even that is not enough
            ids = ids_without(n_pairs)
        if len(ids) >= self.max_seq_len:
            what, hint = ("Message and answer take", "") if answer_ids else ("That takes", ": shorten it")
            raise ContextFull(f"{what} {len(ids)} tokens, and the context has {self.max_seq_len}{hint}.")
        self.n_forgotten = 2 * n_pairs
        del self.messages[: self.n_forgotten]
        return ids

    def stream(self, ids: list[int], max_new_tokens: int, turn: list[dict]) -> Iterator[str]:
        """Yields what follows ids, and adds it to the last message. turn: messages that are added before. A character
        whose last bytes are missing when the answer is cut comes when it goes on."""
        n_free = self.max_seq_len - len(ids)
        self.messages += turn
        self.token_times, self.finish_reason = [], "interrupted"
        has_ended = False
        try:
            for token in self.new_tokens(ids, min(max_new_tokens, n_free)):
                has_ended = token in self.eos_ids
                if has_ended:
                    piece = self.detokenizer.end()
                else:
                    self.answer_ids.append(token)
                    piece = self.detokenizer.push(token)
                self.messages[-1]["content"] += piece
                if piece:
                    yield piece
            is_full = len(self.token_times) == n_free
            self.finish_reason = "stop" if has_ended else "context" if is_full else "length"
        finally:
            if self.finish_reason == "interrupted" and not self.answer_ids:
                self.finish_reason = None
                del self.messages[-2:]

    def new_tokens(self, ids: list[int], max_new_tokens: int) -> Iterator[int]:
        """Yields the tokens that follow ids, up to an end token. Updates self.cached, which is all tokens but the
        newest: that one is fed to the model only in the next step."""
        # The model needs at least one token to continue from.
        n_cached = min(common_prefix_length(self.cached, ids), len(ids) - 1)
        del self.cached[n_cached:]
        not_cached = ids[n_cached:]
        for step_tokens in self.generate_tokens(ids, n_cached, max_new_tokens):
            for (token,) in step_tokens:
                self.token_times.append(time.perf_counter())
                self.cached += not_cached
                not_cached = [token]
                yield token
                if token in self.eos_ids:
                    return

    def forget_oldest(self) -> list[dict]:
        """Forgets the oldest message and its answer, and returns them."""
        forgotten = self.messages[:2]
        del self.messages[:2]
        return forgotten

    def forget_all(self):
        self.messages.clear()

    def to_list(self) -> list[dict]:
        """All messages, the system message included: [{"role", "content"}]."""
        return [*self.system, *self.messages]

    def load(self, messages: list[dict]):
        """Replaces all messages, the system message included, by those that to_list gave. Raises UsageError if they are
        not a conversation, or not one that the chat template takes; then nothing has changed."""
        messages = check_messages(messages)
        self.tokenizer.encode_chat([*messages, {"role": "user", "content": "Hello"}])
        n_system = len(messages) % 2
        self.system, self.messages = messages[:n_system], messages[n_system:]
        self.finish_reason = None


def check_messages(messages) -> list[dict]:
    """A copy of messages. Raises UsageError if they are not a conversation."""
    try:
        if not isinstance(messages, list):
            raise TypeError
        copy = [{"role": m["role"], "content": m["content"]} for m in messages]
        "".join(m["content"] for m in copy).encode()  # raises for half of a surrogate pair, which is not text
    except (KeyError, TypeError, UnicodeError):
        raise UsageError('A conversation is a list of {"role": ..., "content": text}.') from None
    roles = ["system"] * (len(copy) % 2) + ["user", "assistant"] * (len(copy) // 2)
    if [m["role"] for m in copy] != roles:
        raise UsageError("A conversation is at most one system message, then user's and assistant's messages in turn.")
    return copy

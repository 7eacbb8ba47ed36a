"""A conversation with a chat model.

    conversation = LLM("checkpoints/M/model.pth").chat()  # of llm.py
    for piece in conversation.answer("Hello!", max_new_tokens=100):
        print(piece, end="", flush=True)

In every turn the checkpoint's chat template writes out the whole conversation. The KV cache still holds the tokens of
earlier turns, so the model computes only the tokens that differ from the cached ones, and those after. When the context
is nearly full, the oldest messages are dropped. cli/terminal.py leads a conversation on a terminal.
"""

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from engine.completion import Completion, TokenGenerator, add_steps
from engine.scheduler import Request
from errors import UsageError
from text.chat_template import check_unicode, read_message
from text.tokenizer import Tokenizer, common_prefix_length

# If less than DROP_BELOW of the context is free for an answer, the oldest messages are dropped until DROP_UNTIL is
# free. Dropping a message changes the positions of all tokens after it, which must then be computed again. More is
# freed than one answer needs, so that not every turn drops a message.
DROP_BELOW, DROP_UNTIL = 1 / 8, 1 / 4
RESUMABLE = ("length", "context", "interrupted")  # finish_reason of an answer that continue_answer can go on with


class ContextFull(UsageError):
    """A message or an answer takes the whole context."""


class Conversation:
    def __init__(
        self, tokenizer: Tokenizer, generate_tokens: TokenGenerator, max_seq_len: int, eos_ids: Sequence[int],
        system: str | None = None,
    ):  # fmt: skip
        """max_seq_len: how many tokens the KV cache of generate_tokens holds. system: the system message. A checkpoint
        without a chat template is refused."""
        self.tokenizer, self.generate_tokens = tokenizer, generate_tokens
        self.max_seq_len, self.eos_ids = max_seq_len, set(eos_ids)
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict] = []  # the user's and the model's, in turn
        self.cached_ids: list[int] = []  # the tokens whose keys and values are in the KV cache
        self.n_dropped = 0  # how many messages were dropped to make room for the last answer
        # About the last answer
        self.completion = self.new_completion()
        self.finish_reason: str | None = None  # "stop": an end token; one of RESUMABLE; None: no answer
        self.encode("Hello", [])  # raises UsageError without a chat template

    def new_completion(self) -> Completion:
        """Returns an answer that has no tokens yet. The method stream sets how many tokens the answer may have."""
        request = Request([], max_new_tokens=0, is_chat=True)
        return Completion(request, self.tokenizer, self.eos_ids, resumable=True)

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the last answer, without the end token."""
        ids = self.completion.tokens
        return ids[:-1] if self.completion.finish_reason == "stop" else ids

    @property
    def token_times(self) -> list[float]:
        """The times at which the tokens of the last answer arrived, the end token included. If the answer was
        continued, only the tokens since then."""
        return self.completion.step_times

    def encode(self, message: str, earlier: list[dict] | None = None) -> list[int]:
        """Returns the token ids of the conversation with one more message. earlier: the messages before that message;
        None takes all."""
        earlier = self.messages if earlier is None else earlier
        return self.tokenizer.encode_chat([*self.system, *earlier, {"role": "user", "content": message}])

    def answer(self, message: str, max_new_tokens: int = sys.maxsize) -> Iterator[str]:
        """Yields the answer to message, piece by piece, as long as the context has room. Raises ContextFull if message
        alone does not fit. If the caller stops early, the conversation keeps the part of the answer that was generated.
        If nothing was generated, the conversation drops the message."""
        ids = self.make_room(self.messages, message, [], max_new_tokens)
        self.completion = self.new_completion()
        new_messages = [{"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        return self.stream(ids, max_new_tokens, new_messages)

    def continue_answer(self, max_new_tokens: int = sys.maxsize) -> Iterator[str]:
        """Continues the last answer after its last token, and yields the text that follows. Raises ContextFull if the
        answer fills the whole context, and UsageError if the answer was not cut."""
        if not self.messages or self.finish_reason not in RESUMABLE:
            raise UsageError("There is no cut answer to go on with.")
        *earlier, question, _ = self.messages
        ids = self.make_room(earlier, question["content"], self.answer_ids, max_new_tokens)
        return self.stream(ids, max_new_tokens, [])

    def make_room(self, earlier: list[dict], message: str, answer_ids: list[int], max_new_tokens: int) -> list[int]:
        """Returns the token ids of the conversation: the earlier messages, message, and answer_ids, the tokens that the
        answer has so far. If these leave little room, drops the oldest of the earlier messages, each with its
        answer."""

        def ids_without(n_pairs: int) -> list[int]:
            return self.encode(message, earlier[2 * n_pairs :]) + answer_ids

        def is_enough(n_pairs: int) -> bool:
            return self.max_seq_len - len(ids_without(n_pairs)) >= self.max_seq_len * DROP_UNTIL

        if self.tokenizer.exceeds(message, self.max_seq_len):
            raise ContextFull(f"That is far longer than the context of {self.max_seq_len} tokens: shorten it.")
        n_pairs, ids = 0, ids_without(0)
        if self.max_seq_len - len(ids) < min(max_new_tokens, self.max_seq_len * DROP_BELOW):
            # Drop the fewest pairs that are enough; all pairs if no number is.
            n_pairs = bisect_left(range(len(earlier) // 2), True, key=is_enough)
            ids = ids_without(n_pairs)
        if len(ids) >= self.max_seq_len:
            what, hint = ("Message and answer take", "") if answer_ids else ("That takes", ": shorten it")
            raise ContextFull(f"{what} {len(ids)} tokens, and the context has {self.max_seq_len}{hint}.")
        self.n_dropped = 2 * n_pairs
        del self.messages[: self.n_dropped]
        return ids

    def stream(self, ids: list[int], max_new_tokens: int, new_messages: list[dict]) -> Iterator[str]:
        """Yields the text that follows ids, and appends the text to the last message. new_messages are added to the
        conversation first. If max_new_tokens cuts the answer within a character, that character comes when the answer
        is continued."""
        n_free = self.max_seq_len - len(ids)
        max_new_tokens = min(max_new_tokens, n_free)
        completion = self.completion
        completion.resume(max_new_tokens)
        self.messages += new_messages
        self.finish_reason = "interrupted"  # remains if the caller stops early
        try:
            for (piece,) in add_steps([completion], self.token_steps(ids, max_new_tokens)):
                self.messages[-1]["content"] += piece
                if piece:
                    yield piece
            is_full = max_new_tokens == n_free and completion.finish_reason != "stop"
            self.finish_reason = "context" if is_full else completion.finish_reason
        finally:
            if self.finish_reason == "interrupted" and not self.answer_ids:
                self.finish_reason = None
                del self.messages[-2:]

    def token_steps(self, ids: list[int], max_new_tokens: int) -> Iterator[list[list[int]]]:
        """Yields the tokens that follow ids, at most max_new_tokens, each as a step of its own [1][1]. Keeps
        self.cached_ids up to date. cached_ids ends before the newest token, which the model gets only in the next
        step."""
        # Compute at least one token: logits come only from tokens that are computed.
        n_cached = min(common_prefix_length(self.cached_ids, ids), len(ids) - 1)
        del self.cached_ids[n_cached:]
        not_cached = ids[n_cached:]
        for step_tokens in self.generate_tokens(ids, n_cached, max_new_tokens):
            for token in step_tokens[0]:
                self.cached_ids += not_cached
                not_cached = [token]
                yield [[token]]

    def drop_oldest(self) -> list[dict]:
        """Drops the oldest message and its answer, and returns both."""
        dropped = self.messages[:2]
        del self.messages[:2]
        return dropped

    def drop_all(self):
        self.messages.clear()

    def to_list(self) -> list[dict]:
        """Returns all messages, the system message included: [{"role", "content"}]."""
        return [*self.system, *self.messages]

    def load(self, messages: list[dict]):
        """Replaces all messages, the system message included. messages: as to_list returns them. Changes nothing if
        messages are not a conversation, or if the chat template does not take them."""
        messages = check_messages(messages)
        self.tokenizer.encode_chat([*messages, {"role": "user", "content": "Hello"}])
        n_system = len(messages) % 2
        self.system, self.messages = messages[:n_system], messages[n_system:]
        self.finish_reason = None


def check_messages(messages) -> list[dict]:
    """Returns a copy of messages. Refuses what is not a conversation."""
    if not isinstance(messages, list):
        raise UsageError('A conversation is a list of {"role": ..., "content": text}.')
    copy = [read_message(message) for message in messages]
    try:
        check_unicode("".join(message["content"] for message in copy))
    except UnicodeEncodeError:
        raise UsageError("A message of the conversation is not valid UTF-8.") from None
    roles = ["system"] * (len(copy) % 2) + ["user", "assistant"] * (len(copy) // 2)
    if [message["role"] for message in copy] != roles:
        raise UsageError("A conversation is at most one system message, then user's and assistant's messages in turn.")
    return copy

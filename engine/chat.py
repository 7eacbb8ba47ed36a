"""A conversation with a chat model.

    conversation = LLM("checkpoints/SmolLM2-135M-Instruct/model.pth").chat()  # llm.py
    for piece in conversation.answer("Hello!", max_new_tokens=100):
        print(piece, end="", flush=True)

In every turn the checkpoint's chat template writes out the whole conversation. The KV cache still holds the tokens of
earlier turns, so the model computes only from the first token that differs. When the context is nearly full, the oldest
messages are dropped.
"""

import sys
import weakref
from bisect import bisect_left
from collections.abc import Collection, Iterator

from engine.generation import GenerationLoop, stream_texts
from engine.sequence import Sequence, build_generator, check_seed, check_stop
from text.chat_template import read_message
from text.prompt import is_certainly_longer
from text.tokenizer import Tokenizer, common_prefix_length
from utils.errors import UsageError, check_integer

# If less than DROP_BELOW of the context is free for an answer, the oldest messages are dropped until DROP_UNTIL is
# free. A dropped message changes the positions of all later tokens, so they must be computed again. DROP_UNTIL is
# larger, because then not every turn drops a message.
DROP_BELOW, DROP_UNTIL = 1 / 8, 1 / 4
RESUMABLE = ("length", "context", "interrupted")  # values of finish_reason after which continue_answer works


class ContextFull(UsageError):
    """A message or an answer fills the whole context."""


class Conversation:
    """A chat's messages, and the answer that is being generated. There is one answer at a time: a call that begins an
    answer or changes the messages ends an earlier one, as if its caller had stopped."""

    def __init__(
        self, tokenizer: Tokenizer, loop: GenerationLoop, max_seq_len: int, eos_ids: Collection[int],
        system: str | None = None, stop: tuple[str, ...] = (), seed: int | None = None,
    ):
        """Raises UsageError if the checkpoint has no chat template, or if the template refuses a system message.

        max_seq_len: how many tokens the KV cache of loop holds.
        system: the system message.
        stop: strings that end an answer. The answer does not contain them.
        seed: answer i, or the i-th piece of an answer of continue_answer, samples with seed + i. Without a seed, all
            draw from PyTorch's global generator."""
        check_stop(stop)
        check_seed(seed)
        self.tokenizer = tokenizer
        self.loop = loop
        self.max_seq_len = max_seq_len
        self.eos_ids = eos_ids
        self.stop = stop
        self.next_seed = seed
        self.system: list[dict] = []  # the system message, or nothing
        self.messages: list[dict] = []  # the user's and the model's, in turn
        self.sequence: Sequence | None = None  # the last answer
        self.finish_reason: str | None = None  # why the last answer ended, if there is one: "stop" or one of RESUMABLE
        # The iterator of the last answer. A strong reference would be a cycle: the KV cache of an unused conversation
        # would stay in memory until Python's next garbage collection.
        self.running: weakref.ref[Iterator[str]] | None = None
        self.n_dropped = 0  # how many messages were dropped to make room for the last answer
        self.cached_ids: list[int] = []  # the tokens whose keys and values are in the KV cache
        self.load([{"role": "system", "content": system}] if system else [])

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the last answer, without the end token."""
        ids = self.sequence.new_ids
        return ids[:-1] if self.sequence.finish_reason == "stop" else ids

    @property
    def token_times(self) -> list[float]:
        """When the tokens of the last answer arrived, end token included. After continue_answer, only the new ones."""
        return self.sequence.token_times if self.sequence else []

    def encode(self, message: str, earlier: list[dict] | None = None) -> list[int]:
        """Returns the token ids of the conversation with one more message. earlier: the messages before it, by default
        self.messages."""
        earlier = self.messages if earlier is None else earlier
        return self.tokenizer.encode_chat([*self.system, *earlier, {"role": "user", "content": message}])

    def answer(self, message: str, max_new_tokens: int = sys.maxsize) -> Iterator[str]:
        """Yields the answer to message, piece by piece, until the context is full. Raises ContextFull if message alone
        does not fit. If the caller stops early, the conversation keeps what has been generated, or drops the message if
        that is nothing."""
        check_integer("max_new_tokens", max_new_tokens, 1)
        message = read_message({"role": "user", "content": message})["content"]
        self.end_answer()
        ids = self.make_room(self.messages, message, [], max_new_tokens)
        limit = min(max_new_tokens, self.max_seq_len - len(ids))
        sequence = Sequence(
            ids, limit, tokenizer=self.tokenizer, eos_ids=self.eos_ids, stop=self.stop, is_chat=True, resumable=True
        )
        new_messages = [{"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        return self.start_answer(sequence, ids, new_messages)

    def continue_answer(self, max_new_tokens: int = sys.maxsize) -> Iterator[str]:
        """Continues the last answer, and yields the new text piece by piece. Raises ContextFull if it fills the whole
        context, and UsageError if it was not cut."""
        check_integer("max_new_tokens", max_new_tokens, 1)
        self.end_answer()
        if not self.messages or self.finish_reason not in RESUMABLE:
            raise UsageError("There is no cut answer to continue.")
        *earlier, question, _ = self.messages
        ids = self.make_room(earlier, question["content"], self.answer_ids, max_new_tokens)
        self.sequence.resume(min(max_new_tokens, self.max_seq_len - len(ids)))
        return self.start_answer(self.sequence, ids, [])

    def start_answer(self, sequence: Sequence, ids: list[int], new_messages: list[dict]) -> Iterator[str]:
        pieces = self.stream_answer(sequence, ids, new_messages)
        self.running = weakref.ref(pieces)
        return pieces

    def end_answer(self):
        """Ends the answer that is being generated, as if its caller had stopped."""
        if self.running is not None and (pieces := self.running()) is not None:
            pieces.close()

    def make_room(self, earlier: list[dict], message: str, answer_ids: list[int], max_new_tokens: int) -> list[int]:
        """Returns the token ids of earlier, message and answer_ids, in this order. If these leave little room, first
        drops the oldest messages and the answers to them.

        earlier: the messages before message, a prefix of self.messages.
        answer_ids: the tokens of the answer so far."""

        def ids_without(n_pairs: int) -> list[int]:
            return self.encode(message, earlier[2 * n_pairs :]) + answer_ids

        def is_enough(n_pairs: int) -> bool:
            return self.max_seq_len - len(ids_without(n_pairs)) >= self.max_seq_len * DROP_UNTIL

        if is_certainly_longer(self.tokenizer, message, self.max_seq_len):
            raise ContextFull(f"That is far longer than the context of {self.max_seq_len} tokens: shorten it.")
        n_pairs = 0
        ids = ids_without(0)
        if self.max_seq_len - len(ids) < min(max_new_tokens, self.max_seq_len * DROP_BELOW):
            # Drop as few pairs as possible. If even all pairs do not free enough, drop all.
            n_pairs = bisect_left(range(len(earlier) // 2), True, key=is_enough)
            ids = ids_without(n_pairs)
        if len(ids) >= self.max_seq_len:
            what, hint = ("Message and answer take", "") if answer_ids else ("That takes", ": shorten it")
            raise ContextFull(f"{what} {len(ids)} tokens, and the context has {self.max_seq_len}{hint}.")
        self.n_dropped = 2 * n_pairs
        del self.messages[: self.n_dropped]
        return ids

    def stream_answer(self, sequence: Sequence, ids: list[int], new_messages: list[dict]) -> Iterator[str]:
        """Adds new_messages to the conversation. Then yields the text that follows ids, and appends it to the last
        message. If the limit of new tokens cuts a character, the whole character follows after continue_answer."""
        self.sequence = sequence
        # Compute at least the last token: only a computed token has logits.
        n_cached = min(common_prefix_length(self.cached_ids, ids), len(ids) - 1)
        del self.cached_ids[n_cached:]
        not_cached = ids[n_cached:]
        fills_context = len(ids) + sequence.max_new_tokens - len(sequence.new_ids) == self.max_seq_len
        self.messages += new_messages
        answer = self.messages[-1]
        self.finish_reason = "interrupted"  # overwritten below unless the caller stops early
        generator = build_generator(self.next_seed)
        if self.next_seed is not None:
            self.next_seed += 1
        try:
            for (piece,) in stream_texts(self.loop, [sequence], ids, n_cached, generator):
                # The newest token is not in the cache: the model takes it as input only in the next step.
                self.cached_ids += not_cached
                not_cached = sequence.new_ids[-1:]
                answer["content"] = sequence.text
                if piece:
                    yield piece
            is_full = fills_context and sequence.finish_reason == "length"
            self.finish_reason = "context" if is_full else sequence.finish_reason
        finally:
            answer["content"] = sequence.text  # Ctrl-C may have come after the last token, before the loop's same line
            if self.finish_reason == "interrupted" and not self.answer_ids:
                self.finish_reason = None
                del self.messages[-2:]

    def drop_oldest(self) -> list[dict]:
        """Drops the oldest message and its answer. Returns both."""
        self.end_answer()
        dropped = self.messages[:2]
        del self.messages[:2]
        return dropped

    def drop_all(self):
        self.end_answer()
        self.messages.clear()

    def to_list(self) -> list[dict]:
        """Returns all messages, system message included: [{"role": ..., "content": ...}]."""
        return [*self.system, *self.messages]

    def load(self, messages: list[dict]):
        """Replaces all messages, system message included, with those that to_list returned. Raises UsageError and
        changes nothing if they are not a conversation, or if the chat template refuses them."""
        messages = check_messages(messages)
        # Only rendering shows whether a template accepts them. It may need a user's message at the end.
        self.tokenizer.render_chat([*messages, {"role": "user", "content": "Hello"}], add_generation_prompt=True)
        self.end_answer()
        n_system = len(messages) % 2
        self.system, self.messages = messages[:n_system], messages[n_system:]
        self.finish_reason = None


def check_messages(messages) -> list[dict]:
    """Returns a copy of messages. Raises UsageError if they are not a conversation."""
    if not isinstance(messages, list):
        raise UsageError('A conversation is a list of {"role": ..., "content": text}.')
    copy = [read_message(message) for message in messages]
    roles = ["system"] * (len(copy) % 2) + ["user", "assistant"] * (len(copy) // 2)
    if [message["role"] for message in copy] != roles:
        raise UsageError("A conversation is at most one system message, then user's and assistant's messages in turn.")
    return copy

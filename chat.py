"""A conversation with a chat model, from Python or on a terminal.

    conversation = LLM("checkpoints/M/model.pth").chat()  # of generate.py
    for piece in conversation.answer("Hello!", max_new_tokens=100):
        print(piece, end="", flush=True)

Every turn writes out the whole conversation with the checkpoint's chat template. The KV cache still holds the tokens of
earlier turns, so the model only gets those behind the common beginning. On a terminal:

    python generate.py --checkpoint_path checkpoints/M/model.pth --chat
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import tp
from config import UsageError
from tokenizer import Tokenizer, detokenize

COMMANDS = "Type a message; /drop forgets the oldest, /reset all of them, /exit ends."
FULL = "The context is full: /drop forgets the oldest message and its answer, /reset all of them."


class ContextFull(UsageError):
    """The conversation and the new message leave no room for an answer."""


class TokenGenerator(Protocol):
    """What continues a text: generate.build_token_generator makes one, and partial(speculate, speculation) of
    speculate.py is one."""

    def __call__(self, history: list[int], start: int, max_new_tokens: int) -> Iterator[list[list[int]]]:
        """Continues history, the token ids of a text, of which the first start tokens are in the KV cache. Yields the
        new tokens of each step, [n][B]: n tokens of each of B sequences."""


class Conversation:
    def __init__(
        self, tokenizer: Tokenizer, generate_tokens: TokenGenerator, context_length: int, eos_ids: Sequence[int],
        system: str | None = None,
    ):  # fmt: skip
        """context_length: the length of generate_tokens' KV cache. system: the system message. Raises UsageError if the
        checkpoint has no chat template."""
        self.tokenizer, self.generate_tokens = tokenizer, generate_tokens
        self.context_length, self.eos_ids = context_length, set(eos_ids)
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict] = []  # the user's and the model's, in turn
        self.cached: list[int] = []  # the tokens whose keys and values are in the KV cache
        self.answer_ids: list[int] = []  # the last answer's tokens
        self.token_times: list[float] = []  # when each token of the last answer arrived, its end token included
        self.is_full = False  # whether the last answer ended because the KV cache was full
        self.encode("Hello")  # raises if there is no chat template

    def encode(self, message: str) -> list[int]:
        """The token ids of the conversation with one more message."""
        return self.tokenizer.encode_chat([*self.system, *self.messages, {"role": "user", "content": message}])

    def answer(self, message: str, max_new_tokens: int) -> Iterator[str]:
        """Yields the answer to message, piece by piece. If the caller stops early, the conversation keeps the part of
        the answer that was generated; if there is none, it drops the message too. Raises ContextFull if there is no
        room for the message."""
        self.answer_ids, self.token_times, self.is_full = [], [], False
        ids = self.encode(message)
        n_free = self.context_length - len(ids)
        if n_free < 1:
            raise ContextFull(f"That takes {len(ids)} tokens, and the context has {self.context_length}: shorten it.")
        is_complete = False
        try:
            yield from detokenize(self.tokenizer, self.new_tokens(ids, min(max_new_tokens, n_free)))
            is_complete = True
        finally:
            self.is_full = len(self.answer_ids) == n_free
            if is_complete or self.answer_ids:
                answer = self.tokenizer.decode(self.answer_ids)
                self.messages.append({"role": "user", "content": message})
                self.messages.append({"role": "assistant", "content": answer})

    def new_tokens(self, ids: list[int], max_new_tokens: int) -> Iterator[int]:
        """Yields the tokens of an answer, without its end token. Updates self.cached, which is all tokens but the
        newest: that one is fed to the model only in the next step."""
        n_cached = 0
        limit = min(len(self.cached), len(ids) - 1)  # the model needs at least one token to continue from
        while n_cached < limit and self.cached[n_cached] == ids[n_cached]:
            n_cached += 1
        del self.cached[n_cached:]
        not_cached = ids[n_cached:]
        for step_tokens in self.generate_tokens(ids, n_cached, max_new_tokens):
            for (token,) in step_tokens:
                self.token_times.append(time.perf_counter())
                self.cached += not_cached
                not_cached = [token]
                if token in self.eos_ids:
                    return
                self.answer_ids.append(token)
                yield token

    def forget_oldest(self):
        del self.messages[:2]  # a message and its answer

    def forget_all(self):
        self.messages.clear()


# ---- On a terminal --------------------------------------------------------------------------------------------------


def converse(conversation: Conversation, max_new_tokens: int):
    """Reads messages from standard input, prints answers to standard output and everything else to standard error."""
    note(COMMANDS)
    for line in tp.input_lines(read_line):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.forget_all()
            note("0 messages left.")
        elif line == "/drop":
            conversation.forget_oldest()
            note(f"{len(conversation.messages)} messages left.")
        elif re.fullmatch(r"/\w+", line):
            note(COMMANDS)
        elif line:
            take_turn(conversation, line, max_new_tokens)


def take_turn(conversation: Conversation, message: str, max_new_tokens: int):
    """Prints the answer to message. Ctrl-C stops the answer, not the conversation."""
    try:
        with contextlib.closing(conversation.answer(message, max_new_tokens)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except ContextFull as e:
        note(FULL if conversation.messages else str(e))
        return
    except KeyboardInterrupt:
        pass
    print(flush=True)
    times = conversation.token_times
    if len(times) > 1:
        note(f"{len(times)} tokens, {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s")
    if conversation.is_full:
        note(FULL)


def note(text: str):
    """Prints a message of the program, not of the model."""
    if sys.stderr.isatty():
        text = f"\033[2m{text}\033[0m"  # dim
    print(text, file=sys.stderr, flush=True)


def read_line() -> str | None:
    """The next line of standard input, stripped; None after the last."""
    if sys.stdin is None:  # the shell has closed it (<&-)
        return None
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        line.encode()  # raises for bytes that are not UTF-8, which some locales let pass
        return line
    except EOFError:
        return None
    except UnicodeError:
        raise UsageError("what came on standard input is not UTF-8 text") from None

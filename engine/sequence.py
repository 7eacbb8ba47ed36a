"""Sequence: a prompt, how to continue it, and the tokens and the text that follow it.

    sequence = build_sequence("Hello", tokenizer, model.config, max_new_tokens=100)    # a string, or a chat's messages
    sequences = build_sequences(["One", "Two"], tokenizer, model.config, max_new_tokens=100, seed=1)
    sequence = Sequence(prompt_ids, max_new_tokens=100)                                # token ids only
    update = sequence.append(token)   # adds a new token; update.text is the new text
    sequence.finish_reason            # None until the sequence ends

Only append decides where a sequence ends.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from config import ModelConfig
from engine.sampling_params import GREEDY, SamplingParams
from text.prompt import encode_prompt
from text.tokenizer import IncrementalDetokenizer, Tokenizer
from utils.errors import UsageError, check_integer

# (ids of the prompt and of the new tokens so far, logits [V]) -> logits [V] for the next token. -inf excludes a token.
LogitsProcessor = Callable[[list[int], Tensor], Tensor]


class Logprobs(NamedTuple):
    """Natural logarithms of the model's probabilities, before any sampling option is applied."""

    logprob: float  # the new token's
    top: list[tuple[int, float]]  # (token, log-probability) of each of the likeliest tokens


class SequenceUpdate(NamedTuple):
    """What a step has added to a sequence, in fields named as in Sequence. Later steps do not change it, so another
    thread may read it."""

    sequence: "Sequence"
    new_ids: list[int]  # one token, or none if the sequence has failed
    text: str
    logprobs: list[Logprobs]
    finish_reason: str | None


@dataclass(eq=False)
class Sequence:
    """A prompt, its options and its new tokens. dataclasses.replace(sequence) gives one without the new tokens."""

    prompt_ids: list[int]
    max_new_tokens: int
    params: SamplingParams = GREEDY
    _: KW_ONLY
    prompt: str | list[dict] | None = None  # what prompt_ids encode, for reports: a string, or a chat's messages
    is_chat: bool = False  # the text is a chat's answer. False: it continues the text of prompt_ids
    tokenizer: Tokenizer | None = None  # without one, the sequence has no text, and finds no stop strings
    eos_ids: Collection[int] = ()  # tokens that end the sequence
    stop: tuple[str, ...] = ()  # strings that end the sequence; the text ends before them
    seed: int | None = None  # of self.generator; None: PyTorch's global generator
    # Only a Scheduler uses the next two.
    logits_processor: LogitsProcessor | None = None  # applied after the repetition penalty
    n_logprobs: int | None = None  # report log-probabilities, also of that many of the likeliest tokens
    # max_new_tokens may cut a character or a possible stop string. True keeps that tail for resume. False appends it to
    # the text, with U+FFFD for a partial character.
    resumable: bool = False

    new_ids: list[int] = field(default_factory=list, init=False)  # all new tokens, including an end token
    text: str = field(default="", init=False)  # the text of the new tokens
    finish_reason: str | None = field(default=None, init=False)  # "stop": end token or stop string; "length"; "error"
    error: str | None = field(default=None, init=False)
    logprobs: list[Logprobs] = field(default_factory=list, init=False)  # one a new token, if n_logprobs is not None
    start_time: float = field(default_factory=time.perf_counter, init=False)  # when prefill began
    token_times: list[float] = field(default_factory=list, init=False)  # when each new token arrived

    def __post_init__(self):
        check_seed(self.seed)
        check_stop(self.stop)
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise UsageError(f"logits_processor must be a function, not {self.logits_processor!r:.80}")
        self.detokenizer = None
        if self.tokenizer is not None:
            # A tokenizer may drop the space at the beginning of a text. Between prompt and completion it must stay.
            prefix_ids = () if self.is_chat else self.prompt_ids
            self.detokenizer = IncrementalDetokenizer(self.tokenizer, prefix_ids, self.stop)

    @cached_property
    def generator(self) -> torch.Generator:
        return build_generator(self.seed)

    def append(self, token: int, logprobs: Logprobs | None = None) -> SequenceUpdate:
        """Adds a new token, and decides whether the sequence ends. A sequence that has ended takes no more tokens."""
        if self.finish_reason is not None:
            return SequenceUpdate(self, [], "", [], self.finish_reason)
        text, finish_reason = "", None
        if token in self.eos_ids:  # an end token has no text
            finish_reason = "stop"
        elif self.detokenizer is not None:
            text = self.detokenizer.push(token)
            finish_reason = "stop" if self.detokenizer.found_stop else None
        if finish_reason is None and len(self.new_ids) + 1 == self.max_new_tokens:
            finish_reason = "length"
        if self.detokenizer is not None and (finish_reason == "stop" or (finish_reason and not self.resumable)):
            text += self.detokenizer.end()
        # Change all fields at once, at the end: Ctrl-C may come at any time, and chat.py continues the sequence.
        self.new_ids.append(token)
        self.text += text
        self.finish_reason = finish_reason
        self.token_times.append(time.perf_counter())
        new_logprobs = [] if logprobs is None else [logprobs]
        self.logprobs += new_logprobs
        return SequenceUpdate(self, [token], text, new_logprobs, finish_reason)

    def resume(self, max_new_tokens: int):
        """Allows max_new_tokens more tokens. The sequence must not have ended with "stop". Clears token_times."""
        self.max_new_tokens = len(self.new_ids) + max_new_tokens
        self.finish_reason, self.token_times = None, []

    def fail(self, error: str) -> SequenceUpdate:
        self.finish_reason, self.error = "error", error
        return SequenceUpdate(self, [], "", [], "error")


def build_sequence(
    prompt: str | list[dict], tokenizer: Tokenizer, config: ModelConfig, max_new_tokens: int,
    max_seq_len: int | None = None, hint: str = "", **options,
) -> Sequence:
    """Returns a Sequence that continues prompt: a string, or a chat's messages. Raises UsageError if encode_prompt,
    check_length or Sequence refuse an argument.

    max_seq_len, hint: the arguments of check_length. The default of max_seq_len is the model's context.
    options: further fields of Sequence. The default of eos_ids is the model's."""
    check_integer("max_new_tokens", max_new_tokens, 1)
    ids = encode_prompt(prompt, tokenizer, config.max_seq_len)
    check_length(len(ids), max_new_tokens, max_seq_len or config.max_seq_len, hint)
    options = {"eos_ids": config.eos_ids} | options
    is_chat = isinstance(prompt, list)
    return Sequence(ids, max_new_tokens, prompt=prompt, is_chat=is_chat, tokenizer=tokenizer, **options)


def build_sequences(
    prompts: Iterable[str | list[dict]], tokenizer: Tokenizer, config: ModelConfig, max_new_tokens: int,
    seed: int | None, **options,
) -> list[Sequence]:
    """Returns a Sequence for each of prompts. Prompt i samples with seed + i. If build_sequence refuses a prompt, its
    Sequence has failed with the error."""
    sequences = []
    for i, prompt in enumerate(prompts):
        own_seed = None if seed is None else seed + i
        try:
            sequence = build_sequence(prompt, tokenizer, config, max_new_tokens, seed=own_seed, **options)
        except UsageError as e:
            sequence = Sequence([], max_new_tokens, prompt=prompt)
            sequence.fail(str(e))
        sequences.append(sequence)
    return sequences


def check_seed(seed: int | None):
    if seed is not None:
        check_integer("seed", seed)


def build_generator(seed: int | None) -> torch.Generator:
    """Returns a sequence's own generator, or PyTorch's global one if seed is None. DecodeLoop and Scheduler draw one
    float64 from it for each new token, so a seed draws the same tokens in both."""
    return torch.default_generator if seed is None else torch.Generator().manual_seed(to_64_bits(seed))


def to_64_bits(seed: int) -> int:
    """Returns a seed as PyTorch takes it. The seed of prompt i, seed + i, may need more bits."""
    return seed % 2**64


def check_stop(stop: tuple[str, ...]):
    """Raises UsageError if stop is not a tuple or list of strings. (The letters of a string would be stop strings.)"""
    if not isinstance(stop, tuple | list) or not all(isinstance(text, str) and text for text in stop):
        raise UsageError(f"stop must be a tuple of strings that are not empty, not {stop!r:.80}")


def check_length(n_prompt_tokens: int, max_new_tokens: int, max_seq_len: int, hint: str = ""):
    """Raises UsageError if the prompt is empty, or if prompt and new tokens exceed max_seq_len. The second message ends
    with hint."""
    if n_prompt_tokens == 0:
        raise UsageError("the prompt is empty; give some text")
    if n_prompt_tokens + max_new_tokens > max_seq_len:
        n_tokens = f"{n_prompt_tokens} prompt tokens and {max_new_tokens}"
        raise UsageError(f"{n_tokens} new ones exceed the context of {max_seq_len} tokens{hint}")

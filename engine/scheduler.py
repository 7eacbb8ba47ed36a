"""Many prompts at once: continuous batching over a static KV cache.

    scheduler = Scheduler(model, n_slots=16, max_seq_len=2048)
    scheduler.submit(Request(prompt_ids, max_new_tokens=100))  # at any time
    while scheduler.has_work():
        for new in scheduler.step():
            print(new.token, new.finish_reason)

engine/completion.py makes texts of the tokens.

A slot of the KV cache holds one sequence, at a position of its own. When a sequence ends, the next prompt is prefilled
into its slot. The running sequences are always in the first slots, so that a step computes no padding. A slot keeps its
keys and values after its sequence has ended. A prompt that begins like the tokens of any slot copies what they share
(prefix caching):

    slot 0   Question: 2 + 2?  Answer: 4       runs
    slot 1   Question: 3 + 5?  Answer:         has copied "Question: " from slot 0
    slot 2   (has ended)                       is free for the next prompt

Each prompt has random numbers of its own, so that its text does not depend on what runs beside it. It does depend on
max_seq_len if RoPE is of the types dynamic and longrope, as in every KV cache.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import collectives
from engine.sampling import SamplingParams, sample
from engine.steps import (
    ModelRunner,
    apply_repetition_penalty,
    check_sampled_ids,
    kv_bytes_per_token,
    make_kv_cache,
    prefill_logits,
)
from errors import UsageError
from kernels.record import with_tape_threads
from machine import free_memory
from model import Transformer
from text.tokenizer import common_prefix_length

GREEDY = SamplingParams()


@dataclass(eq=False)
class Request:
    """A prompt to continue."""

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()  # stop strings, which end the new text; see engine/completion.py
    is_chat: bool = False  # the new text is an answer: detokenize it without the prompt as context
    n_logprobs: int | None = None  # how many of the likeliest tokens to report in each step; None: no probabilities
    start_time: float | None = None  # when prefill began


def check_length(n_prompt_tokens: int, max_new_tokens: int, max_seq_len: int, limit_name: str | None = None):
    """Refuses a prompt that is empty, or that exceeds max_seq_len with its new tokens. limit_name: what the error calls
    max_seq_len."""
    if n_prompt_tokens == 0:
        raise UsageError("the prompt is empty; give some text")
    if n_prompt_tokens + max_new_tokens > max_seq_len:
        excess = f"{n_prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed"
        raise UsageError(f"{excess} {limit_name or max_seq_len}")


def find_finish_reason(token: int, n_new_tokens: int, max_new_tokens: int, eos_ids: set[int]) -> str | None:
    """Says why token, the last of n_new_tokens, ends a text. "stop": token is an end token. "length": the text has all
    max_new_tokens. None: the text goes on. engine/completion.py looks for stop strings."""
    if token in eos_ids:
        return "stop"
    return "length" if n_new_tokens == max_new_tokens else None


class Logprobs(NamedTuple):
    """Natural logarithms of the model's probabilities, before temperature and the other options of sampling."""

    token: float  # of the new token
    top: list[tuple[int, float]]  # (token, its logprob) of the likeliest tokens


class NewToken(NamedTuple):
    request: Request
    token: int
    finish_reason: str | None  # see the function finish_reason
    logprobs: Logprobs | None


@dataclass(eq=False)
class RunningRequest:
    """A request that runs in a slot of the KV cache."""

    request: Request
    generator: torch.Generator  # of random numbers, for sampling
    new_ids: list[int] = field(default_factory=list)  # the model has not been fed the last one yet


class Scheduler:
    """Decides what the next step computes, and samples. A sequence begins with submit. It ends with an end token, after
    max_new_tokens, or by cancel."""

    def __init__(
        self, model: Transformer, n_slots: int, max_seq_len: int, eos_ids: set[int] | None = None,
        compile: bool = False,
    ):  # fmt: skip
        """n_slots: how many sequences run at a time. max_seq_len: most tokens of a sequence, its prompt included.
        eos_ids: the tokens that end a sequence; None: the model's. compile: record the steps on a GPU, too. Raises
        OutOfMemoryError if memory is too small for the KV cache."""
        self.model, self.n_slots, self.max_seq_len = model, n_slots, max_seq_len
        self.eos_ids = set(model.config.eos_ids) if eos_ids is None else eos_ids
        self.kv_cache = make_kv_cache(model, n_slots, max_seq_len)
        # torch.compile would compile anew for every number of running sequences, so not without kernels.
        compile = compile and model.uses_kernels(n_slots, 1)
        self.decode_step = ModelRunner(model, self.kv_cache, return_logits, compile)
        self.waiting: deque[Request] = deque()
        self.running: list[RunningRequest | None] = []  # by slot; None: the request has ended
        # For each slot, the ids of the tokens whose keys and values it holds. They stay after the slot's sequence has
        # ended, for a later prompt that begins with the same tokens.
        self.cached_ids: list[list[int]] = [[] for _ in range(n_slots)]

    def submit(self, request: Request):
        """Queues request. Refuses a request that does not fit a slot."""
        check_length(len(request.prompt_ids), request.max_new_tokens, self.max_seq_len)
        self.waiting.append(request)

    def cancel(self, request: Request):
        """Ends request, whether it waits or runs."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot, sequence in enumerate(self.running):
            if sequence is not None and sequence.request is request:
                self.running[slot] = None

    def has_work(self) -> bool:
        return bool(self.waiting) or any(self.running)

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """Prefills the whole of a waiting prompt if there is a free slot. Otherwise decodes: the next token of all
        sequences that run."""
        if self.waiting and (slot := self.reserve_slot()) is not None:
            return self.prefill(self.waiting.popleft(), slot)
        self.compact()
        return self.decode() if self.running else []

    def reserve_slot(self) -> int | None:
        """A free slot, at the end of self.running if there is none before. None: all are in use."""
        if None in self.running:
            return self.running.index(None)
        if len(self.running) == self.n_slots:
            return None
        self.running.append(None)
        return len(self.running) - 1

    def prefill(self, request: Request, slot: int) -> list[NewToken]:
        """Starts request in a slot of the cache, with its first new token."""
        request.start_time = time.perf_counter()
        n_cached = self.copy_shared_prefix(request.prompt_ids, slot)
        tokens = torch.tensor([request.prompt_ids[n_cached:]], device=self.kv_cache.device)
        start_pos = torch.tensor([n_cached], device=self.kv_cache.device)
        logits = prefill_logits(self.model, tokens, start_pos, self.kv_cache.narrow_batch(slot, 1))
        self.cached_ids[slot] = list(request.prompt_ids)
        self.running[slot] = RunningRequest(request, torch.Generator().manual_seed(request.seed))
        return self.sample_next(range(slot, slot + 1), logits, tokens, start_pos)

    def decode(self) -> list[NewToken]:
        """The next token of all in self.running, which has no gaps after compact."""
        device = self.kv_cache.device
        slots = range(len(self.running))
        last_ids = torch.tensor([sequence.new_ids[-1:] for sequence in self.running], device=device)
        start_pos = torch.tensor([len(self.cached_ids[slot]) for slot in slots], device=device)
        logits = self.decode_step(last_ids, start_pos)
        for slot in slots:
            self.cached_ids[slot].append(self.running[slot].new_ids[-1])
        return with_tape_threads(self.sample_next, slots, logits, last_ids, start_pos)

    def sample_next(self, slots: range, logits: Tensor, tokens: Tensor, start_pos: Tensor) -> list[NewToken]:
        """Samples a token for each of n neighbouring slots, from the logits [n, 1, V] after tokens [n, T]. The slots of
        sequences that end become free."""
        sequences = self.running[slots.start : slots.stop]
        scores = self.apply_repetition_penalties(slots, logits, tokens, start_pos)
        ids = collectives.broadcast(sample_each(scores[:, -1], sequences, self.model.lm_head.backend)).tolist()
        check_sampled_ids(ids)
        new_tokens = []
        for i, (slot, sequence, token) in enumerate(zip(slots, sequences, ids, strict=True)):
            request = sequence.request
            sequence.new_ids.append(token)
            reason = find_finish_reason(token, len(sequence.new_ids), request.max_new_tokens, self.eos_ids)
            logprobs = None
            if request.n_logprobs is not None:
                logprobs = compute_logprobs(logits[i, -1], token, request.n_logprobs)
            new_tokens.append(NewToken(request, token, reason, logprobs))
            if reason:
                self.running[slot] = None
        return new_tokens

    def apply_repetition_penalties(self, slots: range, logits: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
        """The logits [n, 1, V] with each sequence's repetition_penalty."""
        kv_cache = self.kv_cache.narrow_batch(slots.start, len(slots))
        penalties = [self.running[slot].request.sampling.repetition_penalty for slot in slots]
        if all(penalty == 1 for penalty in penalties):
            kv_cache.store_token_ids(tokens, start_pos)  # a later request may copy this slot and have a penalty
            return logits
        by_sequence = torch.tensor(penalties, device=logits.device).view(-1, 1, 1)
        return apply_repetition_penalty(logits, tokens, start_pos, kv_cache, by_sequence)

    def copy_shared_prefix(self, prompt_ids: list[int], slot: int) -> int:
        """Finds the slot whose tokens share the longest prefix with prompt_ids, and copies that prefix to slot, unless
        it is there. Returns the length of the prefix. At least the last token is left, since logits come only from a
        token that is computed."""
        shared = [common_prefix_length(ids, prompt_ids[:-1]) for ids in self.cached_ids]
        n = max(shared)
        source = slot if shared[slot] == n else shared.index(n)
        if source != slot:
            self.kv_cache.copy_sequence(source, slot, n)
        self.cached_ids[slot] = prompt_ids[:n]
        return n

    def compact(self):
        """Moves the last sequences into the slots of sequences that have ended, so that the first slots are all in use.
        The keys and values in the old slots stay there, for later prompts."""
        while None in self.running:
            sequence = self.running.pop()
            if sequence is None:
                continue
            source, target = len(self.running), self.running.index(None)
            self.kv_cache.copy_sequence(source, target, len(self.cached_ids[source]))
            self.running[target], self.cached_ids[target] = sequence, list(self.cached_ids[source])


def build_scheduler(
    model: Transformer, requests: list[Request], parallel: int, eos_ids: set[int] | None = None, compile: bool = False
) -> Scheduler:
    """Returns a Scheduler for requests, which runs up to parallel of them at a time."""
    n_slots = max(1, min(parallel, len(requests)))
    return Scheduler(model, n_slots, longest_seq_len(model, requests), eos_ids, compile)


def longest_seq_len(model: Transformer, requests: list[Request]) -> int:
    """Returns the length of the longest of requests, with its new tokens, but at most the model's context.
    Scheduler.submit refuses what is longer."""
    longest = max((len(request.prompt_ids) + request.max_new_tokens for request in requests), default=1)
    return min(longest, model.config.max_seq_len)


def return_logits(logits: Tensor, *_) -> Tensor:
    """A sampler for ModelRunner that leaves sampling to the scheduler: each sequence has its own options."""
    return logits


def max_slots(model: Transformer, max_seq_len: int) -> int:
    """Returns how many sequences of max_seq_len tokens main memory has room for."""
    return int(free_memory() // (kv_bytes_per_token(model) * max_seq_len))


def sample_each(logits: Tensor, sequences: list[RunningRequest], backend: str = "torch") -> Tensor:
    """Samples a token for each of n sequences: logits [n, V] -> ids [n]. Each sequence has its own sampling options and
    random numbers. backend: whose kernel may sample (kernels/ops.py)."""
    options = {sequence.request.sampling for sequence in sequences}
    if len(options) > 1:
        return torch.cat([sample_each(logits[i : i + 1], [sequence], backend) for i, sequence in enumerate(sequences)])
    (sampling,) = options
    if sampling.is_greedy:
        return sample(logits, sampling, backend)
    uniform = [torch.rand(1, dtype=torch.float64, generator=sequence.generator) for sequence in sequences]
    return sample(logits, sampling, uniform=torch.stack(uniform).to(logits.device))


def compute_logprobs(logits: Tensor, token: int, n: int) -> Logprobs:
    """Computes the log-probability of token and the n likeliest tokens, from logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return Logprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))

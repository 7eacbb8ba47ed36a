"""Many prompts at once: continuous batching over a static KV cache.

    scheduler = Scheduler(model, n_slots=16, max_seq_len=2048)
    scheduler.submit(Request(prompt_ids, max_new_tokens=100))  # at any time
    while scheduler.has_work():
        for new in scheduler.step():
            print(new.token)

completion.py makes texts of the tokens, and knows why a text has ended.

A slot of the KV cache holds one sequence. Every sequence has its own position. When a sequence ends, the next prompt is
prefilled into the free slot. Running sequences are always in the first slots, so that a step computes no padding. Keys
and values stay in a slot after the sequence has ended. A new prompt copies the longest prefix that it shares with any
slot (prefix caching):

    slot 0   Question: 2 + 2?  Answer: 4       runs
    slot 1   Question: 3 + 5?  Answer:         has copied "Question: " from slot 0
    slot 2   (has ended)                       is free for the next prompt

Each sequence has its own random numbers, so that the text of a prompt does not depend on the other prompts. With RoPE
of type dynamic or longrope the text depends on max_seq_len, as with every KV cache.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import collectives
from engine.request import Request, check_length, find_finish_reason
from engine.sampling import process_logits, sample
from engine.steps import ModelRunner, check_sampled_ids, make_kv_cache, prefill_logits
from engine.token_history import TokenHistory
from kernels.backend import TORCH, Backend
from kernels.record import call_with_tape_threads
from model import Transformer
from text.tokenizer import common_prefix_length
from utils.machine import free_memory


class Logprobs(NamedTuple):
    """Natural logarithms of the model's probabilities, before any sampling option is applied."""

    token: float  # the new token's
    top: list[tuple[int, float]]  # (token, log-probability) of each of the likeliest tokens


class NewToken(NamedTuple):
    request: Request
    token: int
    logprobs: Logprobs | None


@dataclass(eq=False)
class RunningSequence:
    """A sequence in a slot of the KV cache."""

    request: Request
    generator: torch.Generator  # draws the random numbers for sampling
    new_ids: list[int] = field(default_factory=list)  # the sampled tokens; the next step takes the last one as input


class Scheduler:
    """Runs the requests that submit receives. A request ends with an end token, after max_new_tokens, or by cancel."""

    def __init__(
        self, model: Transformer, n_slots: int, max_seq_len: int, eos_ids: set[int] | None = None,
        compile: bool = False,
    ):
        """Raises OutOfMemoryError if memory is too small for the KV cache.

        n_slots: the most sequences that run at a time.
        max_seq_len: the most tokens of a sequence, prompt included.
        eos_ids: the tokens that end a sequence; None: those of the model.
        compile: record the steps on a GPU, too."""
        self.model, self.n_slots, self.max_seq_len = model, n_slots, max_seq_len
        self.eos_ids = set(model.config.eos_ids) if eos_ids is None else eos_ids
        self.kv_cache = make_kv_cache(model, n_slots, max_seq_len)
        self.position_tables = model.make_position_tables(self.kv_cache)
        self.history = TokenHistory(n_slots, max_seq_len, self.kv_cache.device)
        # Without kernels the step would use torch.compile, which compiles anew for every number of running sequences.
        compile = compile and model.can_record(n_slots, 1)
        self.decode_step = ModelRunner(model, self.kv_cache, self.position_tables, return_logits, compile)
        self.waiting: deque[Request] = deque()
        self.running: list[RunningSequence | None] = []  # running[slot]; None: the slot is free
        # cached_ids[slot]: the tokens whose keys and values are in the slot. The ids stay after the sequence has ended,
        # for a later prompt that begins with the same tokens.
        self.cached_ids: list[list[int]] = [[] for _ in range(n_slots)]

    def submit(self, request: Request):
        """Appends request to the queue. Raises UsageError as check does."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request):
        """Raises UsageError if the prompt is empty, or if request does not fit into a slot."""
        check_length(len(request.prompt_ids), request.max_new_tokens, self.max_seq_len, limit="")

    def cancel(self, request: Request):
        """Ends a waiting or running request. Does nothing if request has ended."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot, sequence in enumerate(self.running):
            if sequence is not None and sequence.request is request:
                self.running[slot] = None

    def has_work(self) -> bool:
        return bool(self.waiting) or any(self.running)

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """Prefills one whole prompt if a prompt waits and a slot is free. Otherwise decodes one token of every running
        sequence."""
        if self.waiting and (slot := self.reserve_slot()) is not None:
            return self.prefill(self.waiting.popleft(), slot)
        self.compact()
        return self.decode() if self.running else []

    def reserve_slot(self) -> int | None:
        """Returns the number of a free slot, or None if all slots are in use."""
        if None in self.running:
            return self.running.index(None)
        if len(self.running) == self.n_slots:
            return None
        self.running.append(None)
        return len(self.running) - 1

    def prefill(self, request: Request, slot: int) -> list[NewToken]:
        """Computes the prompt of request in slot, and samples the first new token."""
        request.start_time = time.perf_counter()
        n_cached = self.copy_shared_prefix(request.prompt_ids, slot)
        tokens = torch.tensor([request.prompt_ids[n_cached:]], device=self.kv_cache.device)
        start_pos = torch.tensor([n_cached], device=self.kv_cache.device)
        kv_cache = self.kv_cache.narrow_batch(slot, 1)
        logits = prefill_logits(self.model, tokens, start_pos, kv_cache, self.position_tables)
        self.cached_ids[slot] = list(request.prompt_ids)
        self.running[slot] = RunningSequence(request, torch.Generator().manual_seed(request.seed))
        return self.sample_next(range(slot, slot + 1), logits, tokens, start_pos)

    def decode(self) -> list[NewToken]:
        """Computes the next token of every sequence. self.running must have no gaps: see compact."""
        device = self.kv_cache.device
        slots = range(len(self.running))
        last_tokens = torch.tensor([sequence.new_ids[-1:] for sequence in self.running], device=device)
        start_pos = torch.tensor([len(self.cached_ids[slot]) for slot in slots], device=device)
        logits = self.decode_step(last_tokens, start_pos)
        for slot in slots:
            self.cached_ids[slot].append(self.running[slot].new_ids[-1])
        return call_with_tape_threads(self.sample_next, slots, logits, last_tokens, start_pos)

    def sample_next(self, slots: range, logits: Tensor, tokens: Tensor, start_pos: Tensor) -> list[NewToken]:
        """Samples a token for each of n neighbouring slots, from the logits [n, 1, V] after tokens [n, T]. Frees the
        slots of sequences that end."""
        sequences = self.running[slots.start : slots.stop]
        history = self.history.narrow_batch(slots.start, len(slots))
        samplings = [sequence.request.sampling for sequence in sequences]
        # Even if no option needs the ids now: a later request that has such an option may copy this slot's prefix.
        history.store(tokens, start_pos)
        scores = process_logits(logits, tokens, start_pos, history, samplings)
        ids = collectives.broadcast(sample_each(scores[:, -1], sequences, self.model.lm_head.backend)).tolist()
        check_sampled_ids(ids)
        new_tokens = []
        for i, (slot, sequence, token) in enumerate(zip(slots, sequences, ids, strict=True)):
            request = sequence.request
            sequence.new_ids.append(token)
            if find_finish_reason(token, len(sequence.new_ids), request.max_new_tokens, self.eos_ids):
                self.running[slot] = None
            logprobs = None
            if request.n_logprobs is not None:
                logprobs = compute_logprobs(logits[i, -1], token, request.n_logprobs)
            new_tokens.append(NewToken(request, token, logprobs))
        return new_tokens

    def copy_shared_prefix(self, prompt_ids: list[int], slot: int) -> int:
        """Finds the longest prefix of prompt_ids that any slot holds, and copies the prefix to slot. Returns the length
        of the prefix. The prefix never contains the last token, since only a token that is computed gives logits."""
        shared = [common_prefix_length(ids, prompt_ids[:-1]) for ids in self.cached_ids]
        n = max(shared)
        source = slot if shared[slot] == n else shared.index(n)
        if source != slot:
            self.copy_slot(source, slot, n)
        self.cached_ids[slot] = prompt_ids[:n]
        return n

    def copy_slot(self, source: int, target: int, n: int):
        """Copies the first n tokens of slot source to slot target."""
        self.kv_cache.copy_sequence(source, target, n)
        self.history.copy_sequence(source, target, n)
        self.cached_ids[target] = self.cached_ids[source][:n]

    def compact(self):
        """Moves the last sequences into free slots before them, until no gap is left. A slot that a sequence has left
        still holds keys and values, for later prompts."""
        while None in self.running:
            sequence = self.running.pop()
            if sequence is None:
                continue
            source, target = len(self.running), self.running.index(None)
            self.copy_slot(source, target, len(self.cached_ids[source]))
            self.running[target] = sequence


def build_scheduler(
    model: Transformer, requests: list[Request], parallel: int, eos_ids: set[int] | None = None, compile: bool = False
) -> Scheduler:
    """Returns a Scheduler with slots that fit requests. The Scheduler runs up to parallel requests at a time."""
    n_slots = max(1, min(parallel, len(requests)))
    return Scheduler(model, n_slots, longest_seq_len(model, requests), eos_ids, compile)


def longest_seq_len(model: Transformer, requests: list[Request]) -> int:
    """Returns the length of the longest request, new tokens included, but at most the model's context. Scheduler.submit
    refuses longer requests."""
    longest = max((len(request.prompt_ids) + request.max_new_tokens for request in requests), default=1)
    return min(longest, model.config.max_seq_len)


def return_logits(logits: Tensor, *_) -> Tensor:
    """A sampler for ModelRunner that does not sample. The scheduler samples, as every sequence has its own options."""
    return logits


def max_slots(model: Transformer, max_seq_len: int) -> int:
    """Returns how many sequences of max_seq_len tokens fit into the free main memory."""
    return int(free_memory() // (model.kv_bytes_per_token() * max_seq_len))


def sample_each(logits: Tensor, sequences: list[RunningSequence], backend: Backend = TORCH) -> Tensor:
    """Samples a token for each of n sequences, with the sequence's own options and random numbers: logits [n, V] ->
    ids [n]. backend: as for sampling.py: sample."""
    options = {sequence.request.sampling for sequence in sequences}
    if len(options) > 1:
        return torch.cat([sample_each(logits[i : i + 1], [sequence], backend) for i, sequence in enumerate(sequences)])
    (sampling,) = options
    if sampling.is_greedy:
        return sample(logits, sampling, backend)
    uniform = [torch.rand(1, dtype=torch.float64, generator=sequence.generator) for sequence in sequences]
    return sample(logits, sampling, uniform=torch.stack(uniform).to(logits.device))


def compute_logprobs(logits: Tensor, token: int, n: int) -> Logprobs:
    """Computes the log-probabilities of token and of the n likeliest tokens, from logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return Logprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))

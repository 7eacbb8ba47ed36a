"""Many sequences at once: continuous batching over a static KV cache.

    scheduler = Scheduler(model, n_slots=16, max_seq_len=2048)
    scheduler.submit(Sequence(prompt_ids, max_new_tokens=100))  # at any time
    while scheduler.has_unfinished_sequences():
        for update in scheduler.step():
            print(update.new_ids)

    for i, sequence in scheduler.run(sequences):  # or all of a list, in its order
        print(i, sequence.text)

A slot of the KV cache holds one sequence, at its own position. When it ends, the next prompt is prefilled into a free
slot. Decoding sequences are always in the first slots, so a step computes no padding. Keys and values stay in a slot
after its sequence has ended, and a new prompt copies the longest prefix that it shares with any slot (prefix caching):

    slot 0   Question: 2 + 2?  Answer: 4       decodes
    slot 1   Question: 3 + 5?  Answer:         has copied "Question: " from slot 0
    slot 2   (has ended)                       is free for the next prompt

While sequences decode, a prompt is computed in chunks, so that a long prompt does not stall them (chunked prefill).

A sequence with a seed has random numbers of its own, so its text does not depend on the other sequences. But a copied
prefix may round differently in 16 bits. With RoPE of type dynamic or longrope a text depends on max_seq_len.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.runner import NOT_FINITE, ModelRunner
from engine.sampler import apply_repetition_penalty, return_logits, store_token_ids
from engine.sequence import Logprobs, Sequence, SequenceUpdate, check_length
from kernels.capture import graph_num_threads
from kernels.schema import INVALID_TOKEN, TokenFilters
from layers import collectives
from layers.backend import TORCH_BACKEND, Backend
from layers.kv_cache import KVCache, kv_bytes_per_token
from layers.packing import can_capture
from layers.sampling import draw_uniform, sample, uniform_dtype
from model import Transformer
from text.tokenizer import common_prefix_length
from utils.errors import UsageError
from utils.machine import free_memory

# With small chunks prefill is slow: every chunk reads all weights.
PREFILL_CHUNK_TOKENS = 512
EXCLUDED_LOGIT = -1e30  # takes the place of -inf, with which a logits_processor excludes a token


@dataclass
class Slot:
    sequence: Sequence | None = None  # None if the slot is free
    # The tokens whose keys and values are in the slot. They stay after the sequence has ended, for a later prompt that
    # begins with the same tokens.
    cached_ids: list[int] = field(default_factory=list)
    freed_step: int = 0  # the step in which the slot became free, or 0 if it was never used

    @property
    def is_prefilling(self) -> bool:
        return self.sequence is not None and not self.sequence.new_ids

    @property
    def is_decoding(self) -> bool:
        return self.sequence is not None and bool(self.sequence.new_ids)


class Scheduler:
    """Runs the sequences that submit receives. A sequence ends as Sequence.append decides, by cancel, or with an error
    if its logits are not finite."""

    def __init__(
        self, model: Transformer, n_slots: int, max_seq_len: int, compile: bool = False,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ):
        """Raises OutOfMemoryError if memory is too small for the KV cache.

        n_slots: the most sequences that run at a time.
        max_seq_len: the most tokens of a sequence, prompt included.
        compile: capture the steps also on a GPU.
        chunk_tokens: how many tokens of prompts are computed between two decode steps: one chunk of a long prompt, or
            several short prompts."""
        self.model = model
        self.max_seq_len = max_seq_len
        self.chunk_tokens = chunk_tokens
        self.kv_cache = KVCache(model, n_slots, max_seq_len)
        # Without kernels the step would use torch.compile, which compiles anew for every number of sequences.
        self.runner = ModelRunner(model, self.kv_cache, compile=compile and can_capture(model, n_slots, 1))
        self.decode_step = self.runner.build_step(return_logits)
        self.waiting: deque[Sequence] = deque()
        self.slots = [Slot() for _ in range(n_slots)]
        self.n_steps = 0
        self.prefill_tokens_since_decode = 0  # how many tokens of prompts were computed since the last decode step

    def submit(self, sequence: Sequence):
        self.check(sequence)
        self.waiting.append(sequence)

    def check(self, sequence: Sequence):
        """Raises UsageError if the prompt is empty, or if the sequence does not fit into a slot. So does submit."""
        check_length(len(sequence.prompt_ids), sequence.max_new_tokens, self.max_seq_len)

    def cancel(self, sequence: Sequence):
        """Ends a waiting or running sequence, and does nothing to one that has ended."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        for i, slot in enumerate(self.slots):
            if slot.sequence is sequence:
                if slot.is_prefilling:  # no logits have shown yet whether the keys and values are finite
                    self.reset_slot(i)
                self.free_slot(i)

    def free_slot(self, i: int):
        self.slots[i].sequence, self.slots[i].freed_step = None, self.n_steps

    def reset_slot(self, i: int):
        """Clears slot i, whose keys and values may not be finite. Attention hides a position by multiplying its value
        with 0. But 0 * NaN is NaN."""
        self.kv_cache.clear_sequence(i)
        self.slots[i].cached_ids = []

    def has_unfinished_sequences(self) -> bool:
        return bool(self.waiting) or any(slot.sequence for slot in self.slots)

    def run(self, sequences: Iterable[Sequence]) -> Iterator[tuple[int, Sequence]]:
        """Yields (number, sequence) for each of sequences, in their order, when it has ended. A sequence that submit
        refuses gets an error, and all other sequences run. After Ctrl-C, yields the sequences that have ended,
        and raises KeyboardInterrupt again."""
        left = deque(enumerate(sequences))
        for _, sequence in left:
            try:
                if not sequence.error:
                    self.submit(sequence)
            except UsageError as e:
                sequence.fail(str(e))
        try:
            while left:
                while left and left[0][1].finish_reason:
                    yield left.popleft()
                self.step()
        except KeyboardInterrupt:
            yield from ((i, sequence) for i, sequence in left if sequence.finish_reason)
            raise

    # ---- Steps ----

    @torch.inference_mode()
    def step(self) -> list[SequenceUpdate]:
        """Computes one token of every decoding sequence, or a chunk of a prompt, of which only the last chunk gives a
        token. Returns an update for each new token."""
        self.n_steps += 1
        n_decoding = sum(slot.is_decoding for slot in self.slots)
        if self.may_prefill(n_decoding):
            self.admit()
            for i, slot in enumerate(self.slots):
                if slot.is_prefilling:
                    return self.prefill(i, self.chunk_tokens if n_decoding else self.max_seq_len)
        self.prefill_tokens_since_decode = 0
        return self.decode(n_decoding) if n_decoding else []

    def may_prefill(self, n_decoding: int) -> bool:
        """Whether prompts come before decoding in this step. Prompts come first, because more sequences then share a
        decode step. But after chunk_tokens tokens of prompts, the n_decoding sequences have waited long enough."""
        return n_decoding == 0 or self.prefill_tokens_since_decode < self.chunk_tokens

    def admit(self):
        """Moves the next sequence from the queue into a free slot, unless there is none or another prompt is being
        computed. Copies the longest prefix that its prompt shares with any slot, but never the prompt's last token,
        since only a token that is computed gives logits.

        The best free slot is one whose whole text the prompt continues, as in a conversation that goes on: no cached
        tokens are lost. Otherwise the new sequence takes the slot that has been free for the longest time."""
        free_slots = [i for i, slot in enumerate(self.slots) if slot.sequence is None]
        if not self.waiting or not free_slots or any(slot.is_prefilling for slot in self.slots):
            return
        sequence = self.waiting.popleft()
        prefix_lengths = [common_prefix_length(slot.cached_ids, sequence.prompt_ids[:-1]) for slot in self.slots]
        continued_slots = [i for i in free_slots if prefix_lengths[i] == len(self.slots[i].cached_ids)]
        if continued_slots:
            target = max(continued_slots, key=lambda i: prefix_lengths[i])
        else:
            target = min(free_slots, key=lambda i: self.slots[i].freed_step)
        n = max(prefix_lengths)
        if prefix_lengths[target] < n:
            self.kv_cache.copy_sequence(prefix_lengths.index(n), target, n)
        self.slots[target].cached_ids = sequence.prompt_ids[:n]
        self.slots[target].sequence = sequence
        sequence.start_time = time.perf_counter()

    def prefill(self, i: int, n: int) -> list[SequenceUpdate]:
        """Computes the next n tokens of the prompt in slot i. After the prompt's last token, samples the first new
        token."""
        slot = self.slots[i]
        device = self.runner.device
        prompt_ids = slot.sequence.prompt_ids
        n_cached = len(slot.cached_ids)
        chunk = prompt_ids[n_cached : n_cached + n]
        tokens = torch.tensor([chunk], device=device)
        start_pos = torch.tensor([n_cached], device=device)
        self.prefill_tokens_since_decode += len(chunk)
        # Store the ids even if no option uses them now: a later prompt with a repetition penalty may copy this prefix.
        store_token_ids(self.kv_cache.token_ids[i : i + 1], tokens, start_pos)
        if n_cached + n < len(prompt_ids):
            self.runner.fill_kv_cache(tokens, start_pos, first_slot=i)
            slot.cached_ids += chunk
            return []
        logits = self.runner.prefill_logits(tokens, start_pos, first_slot=i)
        slot.cached_ids += chunk
        return self.sample_and_append(range(i, i + 1), logits)

    def decode(self, n: int) -> list[SequenceUpdate]:
        self.move_decoding_first(n)
        slots = self.slots[:n]
        device = self.runner.device
        last_ids = [slot.sequence.new_ids[-1] for slot in slots]
        tokens = torch.tensor(last_ids, device=device)[:, None]
        start_pos = torch.tensor([len(slot.cached_ids) for slot in slots], device=device)
        logits = self.decode_step(tokens, start_pos)
        store_token_ids(self.kv_cache.token_ids[:n], tokens, start_pos)  # as in prefill
        for slot, token in zip(slots, last_ids, strict=True):
            slot.cached_ids.append(token)
        with graph_num_threads():
            return self.sample_and_append(range(n), logits)

    def move_decoding_first(self, n: int):
        """Moves the n decoding sequences into the first n slots. The slots swap their contents, so the tokens of
        sequences that have ended stay, as prefixes of later prompts."""
        gaps = [i for i in range(n) if not self.slots[i].is_decoding]
        sources = [i for i in range(n, len(self.slots)) if self.slots[i].is_decoding]
        for i, j in zip(gaps, sources, strict=True):
            length = max(len(self.slots[i].cached_ids), len(self.slots[j].cached_ids))
            self.kv_cache.swap_sequences(i, j, length)
            self.slots[i], self.slots[j] = self.slots[j], self.slots[i]

    def sample_and_append(self, slot_ids: range, logits: Tensor) -> list[SequenceUpdate]:
        """Samples a token for the sequence in each of n slots, from the logits [n, 1, V] after its cached tokens."""
        slots = [self.slots[i] for i in slot_ids]
        sequences = [slot.sequence for slot in slots]
        adjusted = logits
        if any(sequence.params.needs_token_ids for sequence in sequences):
            token_ids = self.kv_cache.token_ids[slot_ids.start : slot_ids.stop]
            last_positions = torch.tensor([[len(slot.cached_ids) - 1] for slot in slots], device=logits.device)
            penalties = logits.new_tensor([sequence.params.repetition_penalty for sequence in sequences])
            adjusted = apply_repetition_penalty(logits, token_ids, last_positions, penalties.view(-1, 1, 1))
        adjusted = apply_logits_processors(adjusted[:, 0], sequences)
        ids = collectives.broadcast(sample_batch(adjusted, sequences, self.model.lm_head.backend)).tolist()
        return [self.add_token(i, token, row[0]) for i, token, row in zip(slot_ids, ids, logits, strict=True)]

    def add_token(self, i: int, token: int, logits: Tensor) -> SequenceUpdate:
        """Appends a token, sampled from logits [V], to the sequence in slot i. Frees the slot if that ends it."""
        sequence = self.slots[i].sequence
        if token == INVALID_TOKEN:  # ends this sequence, and no other
            update = sequence.fail(NOT_FINITE)
            self.reset_slot(i)
        else:
            n_top = sequence.n_logprobs
            update = sequence.append(token, None if n_top is None else compute_logprobs(logits, token, n_top))
        if sequence.finish_reason:
            self.free_slot(i)
        return update


def build_scheduler(model: Transformer, sequences: list[Sequence], parallel: int, compile: bool = False) -> Scheduler:
    """Returns a Scheduler with slots that fit sequences. The Scheduler runs up to parallel sequences at a time."""
    n_slots = max(1, min(parallel, len(sequences)))
    return Scheduler(model, n_slots, longest_seq_len(model, sequences), compile)


def longest_seq_len(model: Transformer, sequences: list[Sequence]) -> int:
    """Returns the length of the longest sequence, new tokens included. Skips sequences that have an error, and
    sequences beyond the model's context, which Scheduler.submit refuses."""
    lengths = [len(one.prompt_ids) + one.max_new_tokens for one in sequences if not one.error]
    return max((length for length in lengths if length <= model.config.max_seq_len), default=1)


def max_slots(model: Transformer, max_seq_len: int) -> int:
    """Returns how many sequences of max_seq_len tokens fit into the free main memory."""
    return int(free_memory() // (kv_bytes_per_token(model) * max_seq_len))


def apply_logits_processors(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Applies the logits_processor of each of n sequences to its row of logits [n, V]. Leaves logits as they
    are, since compute_logprobs needs them."""
    if all(sequence.logits_processor is None for sequence in sequences):
        return logits
    rows = list(logits.clone())
    for i, sequence in enumerate(sequences):
        if sequence.logits_processor is not None:
            row = sequence.logits_processor(sequence.prompt_ids + sequence.new_ids, rows[i])
            if not isinstance(row, Tensor) or row.shape != rows[i].shape or not row.is_floating_point():
                raise UsageError("logits_processor must return a tensor of floats, of the shape of its logits")
            row = row.to(logits)
            largest = row.max()  # NaN if any logit is NaN
            if not largest.isfinite():
                raise UsageError("logits_processor returned NaN or infinity, or excluded every token")
            # sample takes -inf for an error of the model. Without the subtraction, which changes no probability, a
            # logit that the function only made small could become EXCLUDED_LOGIT.
            rows[i] = (row - largest).clamp(min=EXCLUDED_LOGIT)
    return torch.stack(rows)


def sample_batch(logits: Tensor, sequences: list[Sequence], backend: Backend = TORCH_BACKEND) -> Tensor:
    """Samples a token for each of n sequences, with the sequence's own options and random numbers: logits [n, V] ->
    ids [n]. One call of sample serves all sequences with the same filters. backend: the backend of the model's head."""
    batches: dict[tuple[bool, TokenFilters], list[int]] = {}
    for i, sequence in enumerate(sequences):
        batches.setdefault((sequence.params.is_greedy, sequence.params.filters), []).append(i)
    ids = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
    for (is_greedy, filters), indices in batches.items():
        batch = [sequences[i] for i in indices]
        rows = logits if len(batches) == 1 else logits[indices]
        if is_greedy:
            ids[indices] = sample(rows, 0.0, filters, backend)
            continue
        host = torch.device("cpu")
        uniform = torch.cat([draw_uniform(1, host, sequence.generator) for sequence in batch])
        uniform = uniform.to(logits.device, uniform_dtype(logits.device))  # all in one copy
        temperatures = logits.new_tensor([[sequence.params.temperature] for sequence in batch])
        ids[indices] = sample(rows, 1.0, filters, backend, uniform, temperatures)
    return ids


def compute_logprobs(logits: Tensor, token: int, n: int) -> Logprobs:
    """Computes the log-probabilities of token and of the n likeliest tokens, from logits [V]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return Logprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))

"""Many prompts at once: continuous batching over a static KV cache.

    for i, text in generate_many(model, tokenizer, prompts, parallel=16, max_new_tokens=100):
        print(i, text)

A row of the KV cache holds one sequence, at a position of its own. When a sequence ends, the next prompt is prefilled
into its row. The running sequences are always in the first rows, so that a step computes them and nothing else: there
is no padding. Prompts that begin alike are prefilled once, since all rows keep their keys and values for the next:

    row 0   Question: 2 + 2?  Answer: 4       runs
    row 1   Question: 3 + 5?  Answer:         has copied "Question: " from row 0
    row 2   (has ended)                       is the next prompt's, which copies what it shares with any of the rows

Each prompt has random numbers of its own, so that its text does not depend on what runs beside it. The parts, for
programs that add prompts at any time:

    scheduler = Scheduler(model, n_rows=16, length=2048)
    scheduler.submit(Request(prompt_ids, max_new_tokens=100))
    while scheduler.has_work():
        for new in scheduler.step():
            print(new.token, new.finish_reason)
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import tp
from config import UsageError
from machine import free_memory
from model import Transformer
from sampling import Sampling, sample
from steps import (
    OOM_HINT,
    build_model_step,
    check_finite,
    hidden_in_chunks,
    kv_bytes_per_token,
    make_kv_cache,
    penalized,
)
from tokenizer import IncrementalDetokenizer, Tokenizer, common_prefix_length

GREEDY = Sampling()

# ---- Tokens ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A prompt to continue."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end the new text; complete_all finds them
    is_chat: bool = False  # whether the new text is one of its own, the answer to a message
    n_logprobs: int | None = None  # how many of the likeliest tokens to report in each step; None: no probabilities
    start_time: float | None = None  # when its prefill began


class Logprobs(NamedTuple):
    """Natural logarithms of the model's probabilities, before temperature and the other options of sampling."""

    token: float  # of the new token
    top: list[tuple[int, float]]  # (token, its logprob) of the likeliest ones


class NewToken(NamedTuple):
    request: Request
    token: int
    finish_reason: str | None  # "stop": token is an end token; "length": it is the last one; None: more will follow
    logprobs: Logprobs | None


@dataclass(eq=False)
class Sequence:
    """A request that is running."""

    request: Request
    ids: list[int]  # the prompt and the new tokens; all but the last are in the KV cache
    random: torch.Generator

    def finish_reason(self, eos_ids: set[int]) -> str | None:
        if self.ids[-1] in eos_ids:
            return "stop"
        is_last = len(self.ids) == len(self.request.prompt) + self.request.max_new_tokens
        return "length" if is_last else None


class Scheduler:
    def __init__(
        self, model: Transformer, n_rows: int, length: int, eos_ids: set[int] | None = None, compile: bool = False,
        oom_hint: str = OOM_HINT,
    ):  # fmt: skip
        """n_rows: sequences at a time. length: most tokens of a sequence, its prompt included. eos_ids: the tokens that
        end a sequence; None: the model's. compile: record the steps on a GPU, too. Raises UsageError if memory is too
        small for the KV cache."""
        self.model, self.n_rows, self.length = model, n_rows, length
        self.eos_ids = set(model.config.eos_ids) if eos_ids is None else eos_ids
        self.kv_cache = make_kv_cache(model, n_rows, length, oom_hint)
        # torch.compile would compile anew for every number of running sequences, so not without kernels.
        compile = compile and model.uses_kernels(n_rows, 1)
        self.compute_logits = build_model_step(model, self.kv_cache, only_logits, compile)
        self.waiting: deque[Request] = deque()
        self.rows: list[Sequence | None] = []  # what runs in the first rows of the cache; None: it has ended
        self.cached: list[list[int]] = [[]] * n_rows  # all of these ids but the last are in that row of the cache

    def submit(self, request: Request):
        """Queues request. Raises UsageError if it does not fit a row."""
        n = len(request.prompt)
        if n + request.max_new_tokens > self.length:
            raise UsageError(f"{n} prompt tokens and {request.max_new_tokens} new ones exceed {self.length}")
        if n == 0:
            raise UsageError("the prompt is empty; give some text")
        self.waiting.append(request)

    def cancel(self, request: Request):
        """Ends request, whether it waits or runs."""
        if request in self.waiting:
            self.waiting.remove(request)
        self.rows = [None if row is not None and row.request is request else row for row in self.rows]

    def has_work(self) -> bool:
        return bool(self.waiting) or any(self.rows)

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """Prefills a waiting prompt if there is a free row. Otherwise computes the next token of all that run."""
        if self.waiting and (row := self.free_row()) is not None:
            return self.prefill(self.waiting.popleft(), row)
        self.close_gaps()
        return self.decode() if self.rows else []

    def free_row(self) -> int | None:
        if None in self.rows:
            return self.rows.index(None)
        if len(self.rows) == self.n_rows:
            return None
        self.rows.append(None)
        return len(self.rows) - 1

    def prefill(self, request: Request, row: int) -> list[NewToken]:
        """Starts request in a row of the cache, with its first new token."""
        request.start_time = time.perf_counter()
        start = self.copy_shared_prefix(request.prompt, row)
        tokens = torch.tensor([request.prompt[start:]], device=self.kv_cache.device)
        positions = torch.tensor([start], device=self.kv_cache.device)
        for hidden in hidden_in_chunks(self.model, tokens, positions, self.kv_cache.narrow_batch(row, 1)):
            last_hidden = hidden[:, -1:]
        sequence = Sequence(request, list(request.prompt), torch.Generator().manual_seed(request.seed))
        self.rows[row], self.cached[row] = sequence, sequence.ids
        return self.add_tokens([row], self.model.compute_logits(last_hidden), tokens, positions)

    def decode(self) -> list[NewToken]:
        """The next token of the sequences in all of self.rows."""
        device = self.kv_cache.device
        last_ids = torch.tensor([sequence.ids[-1:] for sequence in self.rows], device=device)
        positions = torch.tensor([len(sequence.ids) - 1 for sequence in self.rows], device=device)
        logits = self.compute_logits(last_ids, positions)
        return self.add_tokens(list(range(len(self.rows))), logits, last_ids, positions)

    def add_tokens(self, rows: list[int], logits: Tensor, tokens: Tensor, positions: Tensor) -> list[NewToken]:
        """Samples a token for each of n rows, one after the other, from the logits [n, 1, V] after tokens [n, T]. Rows
        that end become free."""
        sequences = [self.rows[row] for row in rows]
        scores = self.penalized(rows, logits, tokens, positions)
        ids = tp.broadcast(sample_each(scores[:, -1], sequences)).tolist()
        check_finite(ids)
        new_tokens = []
        for i, (row, sequence, token) in enumerate(zip(rows, sequences, ids, strict=True)):
            sequence.ids.append(token)
            finish_reason, n = sequence.finish_reason(self.eos_ids), sequence.request.n_logprobs
            logprobs = None if n is None else logprobs_of(logits[i, -1], token, n)
            new_tokens.append(NewToken(sequence.request, token, finish_reason, logprobs))
            if finish_reason:
                self.rows[row] = None
        return new_tokens

    def penalized(self, rows: list[int], logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """The logits with each row's repetition_penalty."""
        kv_cache = self.kv_cache.narrow_batch(rows[0], len(rows))
        penalties = [self.rows[row].request.sampling.repetition_penalty for row in rows]
        if all(penalty == 1 for penalty in penalties):
            kv_cache.note_tokens(tokens, positions)  # for a request that copies them and has a penalty
            return logits
        column = torch.tensor(penalties, device=logits.device).view(-1, 1, 1)
        return penalized(logits, tokens, positions, kv_cache, column)

    def copy_shared_prefix(self, prompt: list[int], row: int) -> int:
        """Copies to row what its cache lacks of the longest beginning that prompt shares with any row. Returns how many
        tokens that is: at least one of prompt is left, since the model must compute something."""
        shared = [common_prefix_length(ids[:-1], prompt[:-1]) for ids in self.cached]
        n = max(shared)
        source = row if shared[row] == n else shared.index(n)
        if source != row:
            self.kv_cache.copy_sequence(source, row, n)
        self.cached[row] = [*prompt[:n], -1]  # until prefill is complete
        return n

    def close_gaps(self):
        """Moves the last sequences into the rows of those that have ended."""
        while None in self.rows:
            sequence = self.rows.pop()
            if sequence is None:
                continue
            source, row = len(self.rows), self.rows.index(None)
            self.kv_cache.copy_sequence(source, row, len(sequence.ids) - 1)
            self.rows[row], self.cached[row] = sequence, sequence.ids


def rows_that_fit(model: Transformer, length: int) -> int:
    """For how many sequences of length tokens main memory has room."""
    return int(free_memory() // (kv_bytes_per_token(model) * length))


def only_logits(logits: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """What a step returns: logits [n, 1, V], from which add_tokens samples."""
    return logits


def sample_each(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """A token [n] for each of n sequences, from its logits [n, V], its sampling options and its random numbers."""
    uniform = [torch.rand(1, dtype=torch.float64, generator=sequence.random) for sequence in sequences]
    uniform = torch.stack(uniform).to(logits.device)  # [n, 1]
    samplings = [sequence.request.sampling for sequence in sequences]
    if len(set(samplings)) == 1:
        return sample(logits, samplings[0], uniform=uniform)
    return torch.cat(
        [sample(logits[i : i + 1], samplings[i], uniform=uniform[i : i + 1]) for i in range(len(sequences))]
    )


def logprobs_of(logits: Tensor, token: int, n: int) -> Logprobs:
    """By logits [V]: the log-probability of token, and the n likeliest tokens."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return Logprobs(logprobs[token].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


# ---- Text -----------------------------------------------------------------------------------------------------------


@dataclass
class TextCompletion:
    """What follows one of several prompts."""

    index: int  # of the prompt
    request: Request
    detokenizer: IncrementalDetokenizer
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # the new ones, an end token included
    token_times: list[float] = field(default_factory=list)  # when each arrived
    logprobs: list[Logprobs] = field(default_factory=list)  # of each, if the request asks for them
    finish_reason: str | None = None  # "stop", "length", or "error": the prompt cannot be completed
    error: str | None = None

    def add(self, new: NewToken):
        self.tokens.append(new.token)
        self.token_times.append(time.perf_counter())
        if new.logprobs is not None:
            self.logprobs.append(new.logprobs)
        self.finish_reason = new.finish_reason
        if new.finish_reason != "stop":  # an end token has no text
            self.text += self.detokenizer.push(new.token)
        if new.finish_reason:
            self.text += self.detokenizer.end()
        if self.detokenizer.found_stop:
            self.finish_reason = "stop"


def complete_all(scheduler: Scheduler, tokenizer: Tokenizer, requests: Iterable[Request]) -> Iterator[TextCompletion]:
    """Yields what follows each of requests, in their order. After Ctrl-C it yields what is complete by then, and raises
    KeyboardInterrupt again. A request that scheduler refuses does not stop the others."""
    completions = {}
    for index, request in enumerate(requests):
        prefix_ids = () if request.is_chat else request.prompt
        detokenizer = IncrementalDetokenizer(tokenizer, prefix_ids, request.stop)
        completions[request] = completion = TextCompletion(index, request, detokenizer)
        try:
            scheduler.submit(request)
        except UsageError as e:
            completion.finish_reason, completion.error = "error", str(e)
    in_order = deque(completions.values())
    try:
        while in_order:
            while in_order and in_order[0].finish_reason:
                yield in_order.popleft()
            for new in scheduler.step():
                completion = completions[new.request]
                completion.add(new)
                if completion.detokenizer.found_stop:
                    scheduler.cancel(new.request)
    except KeyboardInterrupt:
        yield from (completion for completion in in_order if completion.finish_reason)
        raise


def generate_many(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str | list[dict]], parallel: int = 16,
    max_new_tokens: int = 200, sampling: Sampling = GREEDY, stop: tuple[str, ...] = (), seed: int = 0,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yields (number, continuation) of each of prompts, in order, parallel of them computed at a time. A prompt is a
    text, or a chat's messages [{"role": ..., "content": ...}]. Prompt i samples with seed + i. stop: texts at which a
    continuation ends; they are not part of it. Raises UsageError."""
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    requests = [
        Request(prompt, max_new_tokens, sampling, seed + i, stop, is_chat=not isinstance(prompts[i], str))
        for i, prompt in enumerate(ids)
    ]
    length = max(map(len, ids), default=1) + max_new_tokens
    scheduler = Scheduler(model, max(1, min(parallel, len(requests))), length)
    for completion in complete_all(scheduler, tokenizer, requests):
        if completion.error:
            raise UsageError(f"prompt {completion.index}: {completion.error}")
        yield completion.index, completion.text

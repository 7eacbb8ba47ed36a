"""The loop of generation: a prompt to new tokens, with one decode step per token.

    runner = ModelRunner(model, kv_cache, params)  # runner.py
    for ids in generate(runner, prompt, n_cached=0, max_new_tokens=50):
        print(ids)  # the next token of each sequence

generate is the loop. A TokenGenerator is a loop bound to a model: this loop, speculate.py's or scheduler.py's.
engine/__init__.py compares the loops. stream_texts goes from a TokenGenerator's tokens to text.

Shapes: B sequences, T new tokens per sequence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.runner import ModelRunner, check_sampled_ids
from engine.sequence import Sequence


def generate(runner: ModelRunner, prompt: Tensor, n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Yields the next token of each sequence, max_new_tokens times. The KV cache already holds n_cached tokens before
    prompt [B, T]. The cache must have room for n_cached + T + max_new_tokens - 1 tokens. Raises UsageError if logits
    are not finite."""
    reads = map(copy_to_host_async, run_steps(runner, prompt, n_cached, max_new_tokens))
    # On a GPU the next step is queued before the host waits for the tokens of this step. Then the GPU computes while
    # the host handles the tokens. A CPU would compute the next step at once, and in vain if the caller stops here.
    for read_ids in one_ahead(reads) if prompt.is_cuda else reads:
        yield check_sampled_ids(read_ids())


def run_steps(runner: ModelRunner, prompt: Tensor, n_cached: int, max_new_tokens: int) -> Iterator[Tensor]:
    """Runs prefill, then the decode steps. Yields each step's tokens [B] on the device. The next step may overwrite the
    tokens, which may be a static buffer of a captured graph."""
    start_pos = torch.full(prompt.shape[:1], n_cached, device=prompt.device)
    tokens = runner.prefill(prompt, start_pos)
    start_pos = start_pos + prompt.shape[1]
    yield tokens
    for _ in range(max_new_tokens - 1):
        # Token -1 stands for logits that are not finite. On a GPU this step starts before the host has checked the
        # tokens, and the embedding has no row -1, so clamp the tokens.
        tokens = runner.decode(tokens[:, None].clamp(min=0), start_pos)
        start_pos = start_pos + 1
        yield tokens


def one_ahead(reads: Iterator[Callable]) -> Iterator[Callable]:
    """Yields the items of reads. Takes each item before the previous item is yielded."""
    read = next(reads)
    for next_read in reads:
        yield read
        read = next_read
    yield read


def copy_to_host_async(tokens: Tensor) -> Callable[[], list[int]]:
    """Starts to copy tokens [B] to the host. Returns a function that waits for the copy and returns the tokens. Steps
    that are queued later run after the copy, so they may overwrite tokens."""
    if not tokens.is_cuda:
        return tokens.tolist
    copy = tokens.to("cpu", non_blocking=True)  # to pinned memory, so the host does not wait here
    is_done = torch.cuda.Event()
    is_done.record()

    def read() -> list[int]:
        is_done.synchronize()
        return copy.tolist()

    return read


class TokenGenerator(Protocol):
    """A loop that continues one text: PlainGenerator, SpeculativeGenerator of speculate.py, or SlotGenerator of
    scheduler.py."""

    def generate(self, token_ids: list[int], n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
        """Continues token_ids, of which the first n_cached are in the KV cache, in each of B sequences. Yields the next
        token of each sequence, [B], max_new_tokens times."""


def stream_texts(
    generator: TokenGenerator, batch: list[Sequence], token_ids: list[int], n_cached: int = 0
) -> Iterator[list[str]]:
    """Continues token_ids, of which the first n_cached are in the KV cache, until all sequences of batch have ended.
    Yields the new text of each sequence after every token. The sequences are samples of one prompt, with one limit of
    new tokens."""
    max_new_tokens = batch[0].max_new_tokens - len(batch[0].new_ids)
    for ids in generator.generate(token_ids, n_cached, max_new_tokens):
        yield [sequence.append(token).text for sequence, token in zip(batch, ids, strict=True)]
        if all(sequence.finish_reason for sequence in batch):
            break


@dataclass(frozen=True)
class PlainGenerator:
    """A TokenGenerator with a decode step for every token."""

    runner: ModelRunner

    def generate(self, token_ids: list[int], n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
        prompt = torch.tensor([token_ids[n_cached:]] * self.runner.kv_cache.batch_size, device=self.runner.device)
        return generate(self.runner, prompt, n_cached, max_new_tokens)

    @torch.inference_mode()
    def warm_up(self, max_new_tokens: int):
        """Runs each kind of step once that a text of max_new_tokens may need, to compile or to capture the step.
        Overwrites the first tokens of the KV cache."""
        zeros = torch.zeros(self.runner.kv_cache.batch_size, 1, dtype=torch.long, device=self.runner.device)
        self.runner.decode(zeros, zeros[:, 0])

    def accept_counts(self) -> list[int] | None:
        """Returns how many steps of the last text accepted 0, 1 ... k proposed tokens. None: nothing proposes."""
        return None

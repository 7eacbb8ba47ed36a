"""The loop of generation: a prompt to new tokens, with one decode step per token.

    runner = ModelRunner(model, kv_cache, params)  # runner.py
    for ids in generate(runner, prompt, n_cached=0, max_new_tokens=50):
        print(ids)  # the next token of each sequence

generate is the loop. A DecodeLoop is the loop bound to a runner, and stream_texts goes from its tokens to text.
engine/__init__.py compares the loop with the Scheduler.

Shapes: B sequences, T new tokens per sequence.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.runner import ModelRunner, check_sampled_ids
from engine.sequence import Sequence


def generate(
    runner: ModelRunner, prompt: Tensor, n_cached: int, max_new_tokens: int, generator: torch.Generator | None = None
) -> Iterator[list[int]]:
    """Yields the next token of each sequence, max_new_tokens times. The KV cache already holds n_cached tokens before
    prompt [B, T]. The cache must have room for n_cached + T + max_new_tokens - 1 tokens. Raises UsageError if logits
    are not finite. generator: as in ModelRunner.draw_uniform."""
    steps = run_steps(runner, prompt, n_cached, max_new_tokens, generator)
    if prompt.is_cuda:
        steps = read_one_step_later(steps)
    for tokens in steps:
        yield check_sampled_ids(tokens.tolist())


def run_steps(
    runner: ModelRunner, prompt: Tensor, n_cached: int, max_new_tokens: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Runs prefill, then the decode steps. Yields each step's tokens [B] on the device. The next step may overwrite the
    tokens, which may be a static buffer of a captured graph."""
    start_pos = torch.full(prompt.shape[:1], n_cached, device=prompt.device)
    uniforms = runner.draw_uniform(max_new_tokens, len(prompt), generator)
    tokens = runner.prefill(prompt, start_pos, next(uniforms))
    start_pos = start_pos + prompt.shape[1]
    yield tokens
    for uniform in uniforms:
        # Token -1 stands for logits that are not finite. On a GPU this step starts before the host has checked the
        # tokens, and the embedding has no row -1, so clamp the tokens.
        tokens = runner.decode(tokens[:, None].clamp(min=0), start_pos, uniform)
        start_pos = start_pos + 1
        yield tokens


def read_one_step_later(steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yields the tokens of every step on the host. Queues step i + 1 before the host waits for the tokens of step i, so
    that the GPU computes while the host handles the tokens. A CPU would compute step i + 1 first, and then yield step
    i's tokens late."""
    copy = HostCopy(next(steps))
    for tokens in steps:
        next_copy = HostCopy(tokens)
        yield copy.wait()
        copy = next_copy
    yield copy.wait()


class HostCopy:
    """A copy of a GPU's tokens [B] to the host, which the constructor only starts. Steps that are queued later run
    after the copy, so they may overwrite tokens."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens.to("cpu", non_blocking=True)  # to pinned memory, so the host does not wait here
        self.is_done = torch.cuda.Event()
        self.is_done.record()

    def wait(self) -> Tensor:
        self.is_done.synchronize()
        return self.tokens


class DecodeLoop:
    """generate, bound to a runner: continues one text with a decode step for every token. SpeculativeLoop
    (speculate.py) is a DecodeLoop whose steps also verify proposals."""

    def __init__(self, runner: ModelRunner):
        self.runner = runner

    def generate(
        self, token_ids: list[int], n_cached: int, max_new_tokens: int, generator: torch.Generator | None = None
    ) -> Iterator[list[int]]:
        """Continues token_ids, of which the first n_cached are in the KV cache, in each of B sequences. Yields the next
        token of each sequence, [B], max_new_tokens times. generator: as in ModelRunner.draw_uniform."""
        prompt = torch.tensor([token_ids[n_cached:]] * self.runner.kv_cache.batch_size, device=self.runner.device)
        return generate(self.runner, prompt, n_cached, max_new_tokens, generator)

    @torch.inference_mode()
    def warm_up(self, max_new_tokens: int):
        """Runs each kind of step once that a text of max_new_tokens may need, to compile or to capture the step.
        Overwrites the first tokens of the KV cache."""
        zeros = torch.zeros(self.runner.kv_cache.batch_size, 1, dtype=torch.long, device=self.runner.device)
        self.runner.decode(zeros, zeros[:, 0])

    def accept_counts(self) -> list[int] | None:
        """Returns how many steps of the last text accepted 0, 1 ... k proposed tokens. None: nothing proposes."""
        return None


def stream_texts(
    loop: DecodeLoop, batch: list[Sequence], token_ids: list[int], n_cached: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[list[str]]:
    """Continues token_ids, of which the first n_cached are in the KV cache, until all sequences of batch have ended.
    Yields the new text of each sequence after every token. The sequences are samples of one prompt, with one limit of
    new tokens, and draw from one generator: see DecodeLoop."""
    max_new_tokens = batch[0].max_new_tokens - len(batch[0].new_ids)
    for ids in loop.generate(token_ids, n_cached, max_new_tokens, generator):
        yield [sequence.append(token).text for sequence, token in zip(batch, ids, strict=True)]
        if all(sequence.finish_reason for sequence in batch):
            break

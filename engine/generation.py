"""The loop of generation: a prompt to new tokens, with one decode step per token.

    loop = DecodeLoop(ModelRunner(model, kv_cache, params))  # runner.py
    for ids in loop.decode_tokens(prompt, max_new_tokens=50):
        print(ids)  # the next token of each sequence

Four generators. Each takes what the one on its left yields at every step:

    generate_steps --> run_one_step_ahead --> decode_tokens --> stream_texts
    tokens [B]       on a GPU only:         a list of B       the new text of
    on the device    the same, on the       checked ids       B sequences
                     host

engine/__init__.py compares the loop with the Scheduler. Shapes: B sequences, T tokens of a prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.runner import ModelRunner, check_sampled_ids
from engine.sequence import Sequence


class GenerationLoop(ABC):
    """Continues sequences step by step: DecodeLoop, or SpeculativeLoop (speculate.py)."""

    def __init__(self, runner: ModelRunner):
        self.runner = runner

    @abstractmethod
    def decode_tokens(
        self, token_ids: Tensor, max_new_tokens: int, n_cached: int = 0, generator: torch.Generator | None = None
    ) -> Iterator[list[int]]:
        """Continues token_ids [B, T]. Yields the next token of each sequence, max_new_tokens times. Raises UsageError
        if logits are not finite.

        n_cached: how many tokens of each sequence the KV cache already holds, less than T. The cache must have room for
            T + max_new_tokens - 1 tokens.
        generator: see ModelRunner.rand_per_step."""

    def warm_up(self, max_new_tokens: int):
        """Compiles or captures each kind of step that max_new_tokens tokens may need. Overwrites the first tokens of
        the KV cache."""
        # Not in inference mode, as in decode_tokens: torch.compile would compile again for tensors of another mode.
        if max_new_tokens > 1:  # prefill computes the first token
            zeros = torch.zeros(self.runner.kv_cache.batch_size, 1, dtype=torch.long, device=self.runner.device)
            self.runner.decode(zeros, zeros[:, 0])


class DecodeLoop(GenerationLoop):
    """Runs a decode step for every token."""

    def generate_steps(
        self, token_ids: Tensor, max_new_tokens: int, n_cached: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yields the tokens [B] of prefill and of each decode step, on the device. The next step may overwrite them: a
        captured graph always writes to the same buffer.

        The random numbers of all steps are drawn first, because a step takes its numbers as an input. So one captured
        step serves every generator, and a GPU never waits for a draw.

        On a GPU a step is queued before the host has checked the last tokens. They may be INVALID_TOKEN, -1, and the
        embedding has no such row: hence the clamp. The host raises the error later."""
        prompt = token_ids[:, n_cached:].to(self.runner.device)
        start_pos = torch.full((len(prompt),), n_cached, device=prompt.device)
        first, *others = self.runner.rand_per_step(max_new_tokens, len(prompt), generator)
        tokens = self.runner.prefill(prompt, start_pos, first)
        start_pos = start_pos + prompt.shape[1]
        yield tokens
        for rand in others:
            tokens = self.runner.decode(tokens[:, None].clamp(min=0), start_pos, rand)
            start_pos = start_pos + 1
            yield tokens

    def decode_tokens(
        self, token_ids: Tensor, max_new_tokens: int, n_cached: int = 0, generator: torch.Generator | None = None
    ) -> Iterator[list[int]]:
        steps = self.generate_steps(token_ids, max_new_tokens, n_cached, generator)
        if self.runner.device.type == "cuda":
            steps = run_one_step_ahead(steps)
        for tokens in steps:
            yield check_sampled_ids(tokens.tolist())


def stream_texts(
    loop: GenerationLoop, batch: list[Sequence], token_ids: list[int], n_cached: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[list[str]]:
    """Continues token_ids until all sequences of batch have ended. Yields the new text of each sequence after every
    token. The sequences are samples of one prompt: they have one limit of new tokens and one generator.

    n_cached: how many of token_ids the KV cache already holds."""
    prompt = torch.tensor([token_ids] * len(batch))
    max_new_tokens = batch[0].max_new_tokens - len(batch[0].new_ids)
    for ids in loop.decode_tokens(prompt, max_new_tokens, n_cached, generator):
        yield [sequence.append(token).text for sequence, token in zip(batch, ids, strict=True)]
        if all(sequence.finish_reason for sequence in batch):
            break


# ---- A GPU computes while the host handles the previous token -------------------------------------------------------


def run_one_step_ahead(steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yields the tokens of each step on the host. Step i + 1 is queued before the host waits for the tokens of step i,
    so the GPU computes while the host handles them. (A CPU computes a step when it is queued. There every token would
    come a step late.)"""
    copy = HostCopy(next(steps))
    for tokens in steps:
        next_copy = HostCopy(tokens)
        yield copy.wait()
        copy = next_copy
    yield copy.wait()


class HostCopy:
    """A copy of a GPU's tokens [B] to the host. The constructor only queues the copy. Steps that are queued later run
    after it, so they may overwrite tokens."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens.to("cpu", non_blocking=True)  # to pinned memory, so the host does not wait here
        self.is_done = torch.cuda.Event()
        self.is_done.record()

    def wait(self) -> Tensor:
        self.is_done.synchronize()
        return self.tokens

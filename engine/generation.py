"""The loop of generation: a prompt to new tokens, with one decode step per token.

    steps = build_steps(model, kv_cache, sampling)  # steps.py
    for ids in generate(steps, prompt, n_cached=0, max_new_tokens=50):
        print(ids)  # the next token of each sequence

generate is the loop. A DecodeLoop is what generate.py, llm.py and chat.py call: this loop or that of speculate.py,
bound to a KV cache. scheduler.py has a loop of its own, since its sequences begin and end at different times.

Shapes: B sequences, T new tokens per sequence.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from engine.steps import Steps, check_sampled_ids
from model import KVCache


def generate(steps: Steps, prompt: Tensor, n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Yields the next token of each sequence, max_new_tokens times. The KV cache already holds n_cached tokens before
    prompt [B, T]. The cache must have room for n_cached + T + max_new_tokens - 1 tokens. Raises UsageError if logits
    are not finite."""
    start_pos = torch.full(prompt.shape[:1], n_cached, device=prompt.device)
    tokens = steps.prefill(prompt, start_pos)
    start_pos = start_pos + prompt.shape[1]
    for n_left in reversed(range(max_new_tokens)):
        read_ids = copy_to_host_async(tokens)
        # A CPU would compute the next step at once, and in vain if the caller stops after this token.
        if not prompt.is_cuda:
            yield check_sampled_ids(read_ids())
        if n_left > 0:
            # Token -1 stands for logits that are not finite. On a GPU this step starts before the host has checked the
            # tokens, and the embedding has no row -1, so clamp the tokens.
            tokens = steps.decode(tokens[:, None].clamp(min=0), start_pos)
            start_pos = start_pos + 1
        # On a GPU the next step is queued before the host waits for the tokens of this step. Then the GPU computes
        # while the host handles the tokens. The next step may overwrite tokens, since tokens may be a recording's
        # static buffer. But the copy to the host comes first in the stream.
        if prompt.is_cuda:
            yield check_sampled_ids(read_ids())


def copy_to_host_async(tokens: Tensor) -> Callable[[], list[int]]:
    """Starts to copy tokens [B] to the host. Returns a function that waits for the copy and returns the tokens. The
    function does not wait for steps that are queued after the copy."""
    if not tokens.is_cuda:
        return tokens.tolist
    copy = tokens.to("cpu", non_blocking=True)
    is_done = torch.cuda.Event()
    is_done.record()

    def read() -> list[int]:
        is_done.synchronize()
        return copy.tolist()

    return read


class DecodeLoop(Protocol):
    """A function that continues a text. There are two: the result of build_decode_loop, and speculate.py:
    SpeculativeDecoder."""

    def __call__(self, token_ids: list[int], n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
        """Continues the text token_ids in each of B sequences. Yields the next token of each sequence, [B],
        max_new_tokens times. The first n_cached of token_ids are in the KV cache."""


def build_decode_loop(steps: Steps, kv_cache: KVCache) -> DecodeLoop:
    """Returns the DecodeLoop of plain decoding: a decode step for every token."""

    def decode_loop(token_ids: list[int], n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
        prompt = torch.tensor([token_ids[n_cached:]] * kv_cache.batch_size, device=kv_cache.device)
        return generate(steps, prompt, n_cached, max_new_tokens)

    return decode_loop

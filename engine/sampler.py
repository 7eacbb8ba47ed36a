"""The end of a step, from logits to the next token: the repetition penalty, then the operation sample.

    sampler = Sampler([SamplingParams(temperature=0.8)], kv_cache.token_ids, model.lm_head.backend)
    tokens = sampler(logits[:, None], tokens, start_pos)  # [B, V] -> [B]

Nothing here waits for the device, so the next step can start before the host has read the token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling_params import SamplingParams
from layers import collectives
from layers.backend import Backend
from layers.sampling import sample


@dataclass(frozen=True)
class Sampler:
    """The end of a prefill or decode step. Verification and the Scheduler have samplers of their own, which differ in
    draw."""

    all_params: list[SamplingParams]  # of each sequence, or one for all sequences
    token_ids: Tensor  # [B, S], KVCache.token_ids
    backend: Backend  # the backend of the model's head

    def __call__(self, logits: Tensor, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None) -> Tensor:
        """Returns what draw gives, the same on all ranks.

        logits [B, n, V]: those after the last n of tokens [B, T].
        start_pos [B]: the position of each sequence's first token.
        inputs: further arguments of draw."""
        logits = apply_repetition_penalty(logits, tokens, start_pos, self.token_ids, self.all_params)
        return collectives.broadcast(self.draw(logits, *inputs))

    def draw(self, logits: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Draws the next token of each sequence: [B]. uniform [B, 1]: as for the operation sample."""
        params = self.params
        return sample(logits[:, -1], params.temperature, params.filters, self.backend, uniform)

    @property
    def params(self) -> SamplingParams:
        """The one SamplingParams for all sequences."""
        (params,) = self.all_params
        return params


def store_token_ids(token_ids: Tensor, tokens: Tensor, start_pos: Tensor):
    """Stores tokens [B, T] in token_ids [B, S] of a KVCache, the first of each sequence at start_pos [B]."""
    positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    token_ids.scatter_(1, positions, tokens)


def seen_token_mask(token_ids: Tensor, last_positions: Tensor, vocab_size: int) -> Tensor:
    """Whether each token of the vocabulary occurs in the text up to each of last_positions [B, n]: bool [B, n, V].
    token_ids [B, S] must hold the text up to there."""
    is_later = torch.arange(token_ids.shape[1], device=token_ids.device) > last_positions[..., None]  # [B, n, S]
    ids = token_ids[:, None].masked_fill(is_later, vocab_size)
    seen = torch.zeros(*last_positions.shape, vocab_size + 1, dtype=torch.bool, device=token_ids.device)
    return seen.scatter_(-1, ids, True)[..., :vocab_size]


def apply_repetition_penalty(
    logits: Tensor, tokens: Tensor, start_pos: Tensor, token_ids: Tensor, all_params: list[SamplingParams]
) -> Tensor:
    """Returns the logits [B, n, V] with the repetition penalty, the only option that depends on the text. The penalty
    is no part of sample, so one call of sample serves sequences with different penalties (scheduler.py: sample_batch).

    The arguments are those of Sampler. token_ids must hold the text before tokens, which this function stores there."""
    if not any(params.needs_token_ids for params in all_params):
        return logits
    store_token_ids(token_ids, tokens, start_pos)
    n = logits.shape[1]
    last_positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)[-n:]  # [B, n]
    seen = seen_token_mask(token_ids, last_positions, logits.shape[-1])
    penalty: float | Tensor = all_params[0].repetition_penalty
    if len(all_params) > 1:  # only in the scheduler, since a CUDA graph cannot hold the copy to the GPU
        penalties = [params.repetition_penalty for params in all_params]
        penalty = torch.tensor(penalties, device=logits.device).view(-1, 1, 1)
    # A penalty above 1 lowers a logit, positive or negative.
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

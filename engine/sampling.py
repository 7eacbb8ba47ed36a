"""From logits to the next token: the likeliest token, or a token drawn with temperature, top_k, top_p and min_p.

    sample(logits, SamplingParams())                          # the likeliest token
    sample(logits, SamplingParams(temperature=0.8, top_k=50))

apply_repetition_penalty comes before sample (layers/sampling.py). No function waits for the device, so that the next
step can start before the host has read the sampled token.
"""

import torch
from torch import Tensor

from engine.sampling_params import SamplingParams
from layers import sampling
from layers.backend import TORCH_BACKEND, Backend
from layers.sampling import filtered_probs


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

    logits: those of the last n of tokens [B, T]. The first token of each sequence is at start_pos [B].
    token_ids [B, S]: KVCache.token_ids. If an option depends on the text, token_ids must hold the text and tokens.
    all_params: the SamplingParams of each sequence, or one SamplingParams for all sequences."""
    if not any(params.needs_token_ids for params in all_params):
        return logits
    n = logits.shape[1]
    last_positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)[-n:]  # [B, n]
    seen = seen_token_mask(token_ids, last_positions, logits.shape[-1])
    penalty: float | Tensor = all_params[0].repetition_penalty
    if len(all_params) > 1:  # only in the scheduler, since a CUDA graph cannot hold the copy to the GPU
        penalties = [params.repetition_penalty for params in all_params]
        penalty = torch.tensor(penalties, device=logits.device).view(-1, 1, 1)
    # A penalty above 1 lowers a logit, positive or negative.
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Tensor, params: SamplingParams, backend: Backend = TORCH_BACKEND, uniform: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Tensor:
    """float32 logits [B, V] -> token ids [B]. backend: the backend of the model. layers/sampling.py: sample
    describes the other arguments."""
    return sampling.sample(logits, params.temperature, params.filters, backend, uniform, temperatures)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Returns the distribution [B, V] from which sample draws. params must not be greedy."""
    probs, ids = filtered_probs(logits, params.temperature, params.filters)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits).scatter_add(-1, ids, probs)

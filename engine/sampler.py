"""From logits to the next token. Each kind of step ends with a sampler:

    prefill, decode    Sampler             adjust_logits, sample
    verification       RejectionSampler    adjust_logits, rejection_sample; or sample if the draft was not sampled
    draft              DraftSampler        sample or multinomial, without adjust_logits
    scheduler          return_logits       nothing. Scheduler.sample_and_append follows the step: adjust_logits,
                                           logits_processor, sample_batch

RejectionSampler and DraftSampler are in speculate.py. A sampler takes logits [B, n, V], and then the step's own
arguments: tokens [B, T], and start_pos [B], the position of each sequence's first token. After prefill n is 1, for the
last token. After other steps n is T.

    sampler = Sampler(SamplingParams(temperature=0.8), kv_cache.token_ids, model.lm_head.backend)
    tokens = sampler(logits[:, None], tokens, start_pos)  # [B, V] -> [B]

Nothing here waits for the device, because a CUDA graph captures model and sampler. Every rank gets rank 0's tokens.
"""

import torch
from torch import Tensor

from engine.sampling_params import SamplingParams
from layers import collectives
from layers.backend import Backend
from layers.sampling import sample


class Sampler:
    """The end of a prefill or decode step."""

    def __init__(self, params: SamplingParams, token_ids: Tensor, backend: Backend):
        """token_ids [B, S]: KVCache.token_ids. backend: the backend of the model's head."""
        self.params, self.token_ids, self.backend = params, token_ids, backend
        # A tensor on the device, because a CUDA graph cannot read the host. Made once: steps need not allocate it.
        self.temperature = 0.0
        if not params.is_greedy:
            self.temperature = torch.full((1, 1), params.temperature, dtype=torch.float32, device=token_ids.device)

    def __call__(self, logits: Tensor, tokens: Tensor, start_pos: Tensor, rand: Tensor | None = None) -> Tensor:
        """Returns the next tokens [B]. rand [B, 1]: see layers/sampling.py."""
        logits = adjust_logits(logits[:, -1:], tokens, start_pos, self.token_ids, self.params)
        return collectives.broadcast(self.sample(logits[:, 0], rand))

    def sample(self, logits: Tensor, rand: Tensor | None = None) -> Tensor:
        """Returns a token for each row of logits [n, V]."""
        return sample(logits, self.temperature, self.params.filters, self.backend, rand)


def return_logits(logits: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
    """The sampler of a Scheduler's step, which samples after the step. Its sequences have options of their own, and a
    CUDA graph would keep those of the capture."""
    return logits


def adjust_logits(
    logits: Tensor, tokens: Tensor, start_pos: Tensor, token_ids: Tensor, params: SamplingParams | list[SamplingParams]
) -> Tensor:
    """Applies the options that depend on the sequence so far. Returns the logits [B, n, V] after the last n of a step's
    tokens [B, T], the first of each sequence at start_pos [B].

    token_ids [B, S]: KVCache.token_ids. Only adjust_logits stores new ids there, and only while an option needs them.
        So it must get all tokens of such a sequence: the prompt from its beginning, and then those of each step.
    params: one for all sequences, or a list with one for each."""
    if not any(one.needs_token_ids for one in (params if isinstance(params, list) else [params])):
        return logits
    positions = store_token_ids(token_ids, tokens, start_pos)
    if isinstance(params, list):
        penalty = logits.new_tensor([one.repetition_penalty for one in params]).view(-1, 1, 1)
    else:
        penalty = params.repetition_penalty
    return apply_repetition_penalty(logits, token_ids, positions[:, -logits.shape[1] :], penalty)


def store_token_ids(token_ids: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
    """Stores tokens [B, T] in token_ids [B, S], the first of each sequence at start_pos [B]. Returns the positions of
    all tokens: [B, T]."""
    positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    token_ids.scatter_(1, positions, tokens)
    return positions


def apply_repetition_penalty(
    logits: Tensor, token_ids: Tensor, last_positions: Tensor, penalty: float | Tensor
) -> Tensor:
    """Returns the logits [B, n, V] with the repetition penalty.

    token_ids [B, S], last_positions [B, n]: as for seen_token_mask.
    penalty: one for all sequences, or one for each: [B, 1, 1]."""
    seen = seen_token_mask(token_ids, last_positions, logits.shape[-1])
    # A penalty above 1 lowers a logit, positive or negative.
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_token_mask(token_ids: Tensor, last_positions: Tensor, vocab_size: int) -> Tensor:
    """Whether each token of the vocabulary occurs in the sequence up to each of last_positions [B, n]: bool [B, n, V].
    token_ids [B, S] must hold the sequence up to there."""
    is_later = torch.arange(token_ids.shape[1], device=token_ids.device) > last_positions[..., None]  # [B, n, S]
    ids = token_ids[:, None].masked_fill(is_later, vocab_size)
    seen = torch.zeros(*last_positions.shape, vocab_size + 1, dtype=torch.bool, device=token_ids.device)
    return seen.scatter_(-1, ids, True)[..., :vocab_size]



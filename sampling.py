"""From logits to the next token: the likeliest one, or one drawn with temperature, top_k and top_p.

    sample(logits, Sampling())                          # the likeliest
    sample(logits, Sampling(temperature=0.8, top_k=50))

Nothing here waits for the device, so that a sampled token can be fed to the next step before the host has seen it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from config import UsageError

SMALLEST_TEMPERATURE = 1e-30  # float32 cannot divide by less


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature, top_k and top_p (arXiv:1904.09751) apply in this order."""

    temperature: float = 0.0  # 0: the likeliest token, whatever the other fields say
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have this probability

    def __post_init__(self):
        """Raises UsageError, in a sentence that begins with the field's name."""
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def sample(logits: Tensor, sampling: Sampling, backend: str = "torch") -> Tensor:
    """float32 logits [B, V] -> token ids [B]; -1 for a row that is not finite. backend: see kernels."""
    only_temperature = sampling == Sampling(sampling.temperature)
    if backend == "triton" and (sampling.is_greedy or only_temperature):
        return kernels.sample(logits, sampling.temperature)
    tokens = logits.argmax(-1) if sampling.is_greedy else multinomial(probabilities(logits, sampling))
    is_finite = logits.sum(-1).isfinite()
    return torch.where(is_finite, tokens, -1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V] that sample draws from; sampling must not be greedy."""
    # The largest score becomes 0, so that a small temperature makes the others underflow and nothing overflow.
    scores = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        values, tokens = scores.topk(sampling.top_k)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, tokens, values)
    if sampling.top_p is not None and sampling.top_p < 1:
        probs, order = scores.softmax(-1).sort(-1, descending=True)
        before = probs.cumsum(-1) - probs  # of all tokens that are likelier
        drop = before >= sampling.top_p  # these are enough without it
        scores = scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return scores.softmax(-1)


def multinomial(probs: Tensor) -> Tensor:
    """A token [B] for every row of probs [B, V], which need not sum to one. Never a token of probability 0."""
    if probs.is_cuda:
        # With E exponentially distributed, E / p is the time until the first event of a process that has p events a
        # second on average. Of several such processes, number i is the first with probability p[i]. This is one
        # elementwise kernel and an argmax; a cumulative sum along a single row is slow there.
        exponential = torch.empty_like(probs, dtype=torch.float64).exponential_()
        return (probs / exponential).argmax(-1)
    # The first token at which the cumulative sum exceeds a random number. Some devices have no float64.
    dtype = torch.float64 if probs.device.type == "cpu" else torch.float32
    cumulative = probs.cumsum(-1, dtype=dtype)
    number = torch.rand(len(probs), 1, dtype=dtype, device=probs.device) * cumulative[:, -1:]
    return (cumulative <= number).sum(-1).clamp(max=probs.shape[-1] - 1)

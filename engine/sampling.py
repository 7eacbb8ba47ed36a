"""From logits to the next token: the likeliest one, or one drawn with temperature, top_k, top_p and min_p.

    sample(logits, SamplingParams())                          # the likeliest
    sample(logits, SamplingParams(temperature=0.8, top_k=50))

Nothing here waits for the device, so that a sampled token can be fed to the next step before the host has seen it.
"""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import kernels
from errors import UsageError

SMALLEST_TEMPERATURE = 1e-30  # float32 cannot divide by less
# How sorted_nucleus avoids sorting a whole vocabulary on a CPU
SMALL_VOCABULARY = 1000  # up to so many tokens, sorting all is faster than searching
FIRST_THRESHOLD = 2**-10  # a probability, which fewer than 1024 tokens can exceed
VOCAB_BLOCK = 64  # tokens with neighbouring ids, skipped together if none of them exceeds the threshold


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen. First comes repetition_penalty (arXiv:1909.05858), outside of sample, which does not know
    the text (steps.py: apply_repetition_penalty). Then sample applies temperature, top_k, top_p (arXiv:1904.09751) and
    min_p (arXiv:2407.01082), in this order."""

    temperature: float = 0.0  # 0: the likeliest token (greedy); top_k, top_p and min_p then have no effect
    _: KW_ONLY
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have this probability
    min_p: float | None = None  # only tokens that are at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that the text has already are less likely; see penalize

    def __post_init__(self):
        """Raises UsageError, whose message begins with the field's name."""
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UsageError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        # These values change nothing. As None they keep the fast path of sample.
        if self.top_p == 1:
            object.__setattr__(self, "top_p", None)
        if self.min_p == 0:
            object.__setattr__(self, "min_p", None)

    @classmethod
    def from_options(cls, options: Mapping) -> "SamplingParams":
        """Of options, such as a request's, those that have a field's name. None: the default. Raises UsageError."""
        chosen = {}
        for field in fields(cls):
            value, is_integer = options.get(field.name), field.type == int | None
            if value is not None:
                if type(value) is not int and (is_integer or type(value) is not float):
                    raise UsageError(f"{field.name} must be {'an integer' if is_integer else 'a number'}")
                chosen[field.name] = value
        return cls(**chosen)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters_tokens(self) -> bool:
        """Whether an option is set that excludes tokens: top_k, top_p, min_p, and every field to come. All but
        temperature and repetition_penalty count."""
        return self != SamplingParams(self.temperature, repetition_penalty=self.repetition_penalty)


def sample(logits: Tensor, sampling: SamplingParams, backend: str = "torch", uniform: Tensor | None = None) -> Tensor:
    """float32 logits [B, V] -> token ids [B]; -1 where a sequence's logits are not finite.

    backend: whose kernel may sample (kernels/ops.py).
    uniform: a random number for each sequence, see multinomial; None: PyTorch's next ones."""
    # A kernel finds the likeliest token, or draws one of all tokens with its own random numbers.
    draws_from_all = uniform is None and not sampling.filters_tokens
    if (sampling.is_greedy or draws_from_all) and kernels.has_sample_kernel(backend, sampling.is_greedy):
        return kernels.sample(logits, sampling.temperature, backend)
    if sampling.is_greedy:
        tokens = logits.argmax(-1)
    else:
        probs, ids = filtered_probs(logits, sampling)
        drawn = multinomial(probs, uniform)
        tokens = drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
    is_finite = logits.sum(-1).isfinite()
    return torch.where(is_finite, tokens, -1)


def probabilities(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution [B, V] that sample draws from; sampling must not be greedy."""
    probs, ids = filtered_probs(logits, sampling)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits).scatter_add(-1, ids, probs)


def filtered_probs(logits: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Returns the probabilities and the ids of the tokens that sample draws from, both [B, C]. The probabilities of a
    sequence need not sum to one. If ids is None, C is V: all tokens in order."""
    # The largest score becomes 0. Then a small temperature makes the others underflow, and nothing overflows.
    scores = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    has_top_k = sampling.top_k is not None and sampling.top_k < scores.shape[-1]
    ids = None
    if has_top_k:
        scores, ids = scores.topk(sampling.top_k)  # the likeliest first
    probs = scores.softmax(-1)
    if sampling.top_p is not None:
        if not has_top_k:
            probs, ids = sorted_nucleus(probs, sampling.top_p)
        before = F.pad(probs.cumsum(-1)[:, :-1], (1, 0))  # what all likelier tokens have together
        probs = probs.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p is not None:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def sorted_nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Finds the likeliest tokens of each sequence, at least so many that their probabilities sum to top_p. probs [B, V]
    -> probabilities and ids, both [B, C], the likeliest first. Equally likely tokens are in the order of their ids. A
    sequence that needs fewer than C tokens is padded with zeros."""
    # On a GPU and when compiled, C must not depend on the probabilities, so all V tokens are sorted.
    if probs.device.type != "cpu" or torch.compiler.is_compiling() or probs.shape[-1] <= SMALL_VOCABULARY:
        return probs.sort(dim=-1, descending=True, stable=True)
    values, ids = zip(*[search_nucleus(row, top_p) for row in probs], strict=True)
    return pad_sequence(values, batch_first=True), pad_sequence(ids, batch_first=True)


def search_nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """sorted_nucleus for one sequence [V]. Only the tokens above a threshold are sorted. If their probabilities sum to
    less than top_p, the threshold is divided by 8 and the search begins again. The first threshold mostly serves."""
    missing = -len(probs) % VOCAB_BLOCK
    blocks = (F.pad(probs, (0, missing)) if missing else probs).view(-1, VOCAB_BLOCK)
    largest = blocks.amax(-1)
    threshold = FIRST_THRESHOLD
    while threshold > (1 - top_p) / len(probs):  # below that, so few tokens are left out that all may be sorted
        block_ids = (largest > threshold).nonzero()[:, 0]
        values = blocks[block_ids].flatten()
        indices = (values > threshold).nonzero()[:, 0]  # into values
        values, order = values[indices].sort(descending=True, stable=True)
        if len(values) and values.cumsum(-1)[-1] >= top_p:
            indices = indices[order]
            return values, block_ids[indices // VOCAB_BLOCK] * VOCAB_BLOCK + indices % VOCAB_BLOCK
        threshold /= 8
    return probs.sort(descending=True, stable=True)


def penalize(logits: Tensor, penalty: float | Tensor) -> Tensor:
    """Applies the repetition penalty to logits. A penalty above 1 makes their tokens less likely."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def multinomial(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draws a token [B] for each sequence of probs [B, V], whose probabilities need not sum to one. It never draws a
    token of probability 0. uniform [B, 1]: the random numbers in [0, 1) that choose; None: PyTorch's next ones."""
    if probs.is_cuda and uniform is None:
        # An exponential race, like the Gumbel-max trick: with E[i] drawn from Exp(1), the argmax of p[i] / E[i] is i
        # with probability p[i]. An elementwise kernel and an argmax are faster on a GPU than a cumulative sum.
        exponential = torch.empty_like(probs, dtype=torch.float64).exponential_()
        return (probs / exponential).argmax(-1)
    # The first token at which the cumulative sum exceeds a random number. Not all devices have float64.
    dtype = torch.float64 if probs.device.type == "cpu" else torch.float32
    cumulative = probs.cumsum(-1, dtype=dtype)
    if uniform is None:
        uniform = torch.rand(len(probs), 1, dtype=dtype, device=probs.device)
    uniform = uniform.to(dtype).clamp(max=1 - torch.finfo(dtype).eps)  # rounding could make it 1
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)

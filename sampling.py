"""From logits to the next token: the likeliest one, or one drawn with temperature, top_k, top_p and min_p.

    sample(logits, SamplingParams())                          # the likeliest
    sample(logits, SamplingParams(temperature=0.8, top_k=50))

Nothing here waits for the device, so that a sampled token can be fed to the next step before the host has seen it.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import kernels
from config import UsageError

SMALLEST_TEMPERATURE = 1e-30  # float32 cannot divide by less
CHUNK = 64  # neighbouring tokens that a CPU skips together if none of them has enough probability
SMALL_VOCABULARY = 1000  # tokens that are sorted sooner than searched
FIRST_THRESHOLD = 2**-10  # fewer than 1024 tokens can have more probability than this


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen. repetition_penalty (arXiv:1909.05858), temperature, top_k, top_p (arXiv:1904.09751) and
    min_p (arXiv:2407.01082) apply in this order."""

    temperature: float = 0.0  # 0: the likeliest token, whatever the other fields say
    _: KW_ONLY
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that together have this probability
    min_p: float | None = None  # only tokens that are at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that the text has already are less likely; see penalize

    def __post_init__(self):
        """Raises UsageError, in a sentence that begins with the field's name."""
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

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters_tokens(self) -> bool:
        """Whether an option beside temperature and repetition_penalty may keep tokens from being drawn."""
        return self != SamplingParams(self.temperature, repetition_penalty=self.repetition_penalty)


def sample(logits: Tensor, sampling: SamplingParams, backend: str = "torch", uniform: Tensor | None = None) -> Tensor:
    """float32 logits [B, V] -> token ids [B]; -1 for a row that is not finite. backend: see kernels. uniform: a random
    number for each row, see multinomial."""
    if backend == "triton" and uniform is None and (sampling.is_greedy or not sampling.filters_tokens):
        return kernels.sample(logits, sampling.temperature)
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
    """The tokens that sample draws from: their probabilities and ids, both [B, C]. The probabilities of a row need not
    sum to one. ids None: all tokens."""
    # The largest score becomes 0, so that a small temperature makes the others underflow and nothing overflow.
    scores = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    has_top_k = sampling.top_k is not None and sampling.top_k < scores.shape[-1]
    has_top_p = sampling.top_p is not None and sampling.top_p < 1
    ids = None
    if has_top_k:
        scores, ids = scores.topk(sampling.top_k)  # the likeliest first
    probs = scores.softmax(-1)
    if has_top_p:
        if not has_top_k:
            probs, ids = sorted_nucleus(probs, sampling.top_p)
        before = F.pad(probs.cumsum(-1)[:, :-1], (1, 0))  # what all likelier tokens have together
        probs = probs.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def sorted_nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row of probs [B, V], at least as many as have top_p together: their probabilities
    and ids, both [B, C], the likeliest first. Of equally likely tokens, lower ids come first. Rows that have fewer than
    C such tokens end with zeros."""
    # On a GPU and when compiled, C must not depend on the probabilities.
    if probs.device.type != "cpu" or torch.compiler.is_compiling() or probs.shape[-1] <= SMALL_VOCABULARY:
        return probs.sort(dim=-1, descending=True, stable=True)
    values, ids = zip(*[sorted_nucleus_of_row(row, top_p) for row in probs], strict=True)
    return pad_sequence(values, batch_first=True), pad_sequence(ids, batch_first=True)


def sorted_nucleus_of_row(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """sorted_nucleus for one row [V], without sorting all of it: sorts only the tokens above a threshold, and lowers it
    eightfold until they have top_p together. Mostly the first one serves."""
    missing = -len(probs) % CHUNK
    chunks = (F.pad(probs, (0, missing)) if missing else probs).view(-1, CHUNK)
    largest = chunks.amax(-1)
    threshold = FIRST_THRESHOLD
    while threshold > (1 - top_p) / len(probs):  # all tokens below this have less than 1 - top_p together
        chunk_ids = (largest > threshold).nonzero()[:, 0]
        values = chunks[chunk_ids].flatten()
        places = (values > threshold).nonzero()[:, 0]  # in values
        values, order = values[places].sort(descending=True, stable=True)
        if len(values) and values.cumsum(-1)[-1] >= top_p:
            places = places[order]
            return values, chunk_ids[places // CHUNK] * CHUNK + places % CHUNK
        threshold /= 8
    return probs.sort(descending=True, stable=True)


def penalize(logits: Tensor, penalty: float | Tensor) -> Tensor:
    """What the logits of a repeated token become: less likely if penalty is above 1."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def multinomial(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """A token [B] for every row of probs [B, V], which need not sum to one. Never a token of probability 0. uniform
    [B, 1]: the random numbers in [0, 1) that choose; None: PyTorch's next ones."""
    if probs.is_cuda and uniform is None:
        # An exponential race, as the Gumbel-max trick: with E[i] drawn from Exp(1), the argmax of p[i] / E[i] is i with
        # probability p[i]. One elementwise kernel and an argmax; a cumulative sum along a row is slow on a GPU.
        exponential = torch.empty_like(probs, dtype=torch.float64).exponential_()
        return (probs / exponential).argmax(-1)
    # The first token at which the cumulative sum exceeds a random number. Some devices have no float64.
    dtype = torch.float64 if probs.device.type == "cpu" else torch.float32
    cumulative = probs.cumsum(-1, dtype=dtype)
    if uniform is None:
        uniform = torch.rand(len(probs), 1, dtype=dtype, device=probs.device)
    uniform = uniform.to(dtype).clamp(max=1 - torch.finfo(dtype).eps)  # rounding could make it 1
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)

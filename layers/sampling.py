"""From logits to a token: temperature, top_k, top_p, min_p, and the draw.

    sample           the next token, drawn or the likeliest: a kernel, or sample_torch
    compute_probs    the distribution from which sample draws, for speculation

A CUDA graph holds these functions, so on a GPU none may wait for the device (.item(), .tolist()).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kernels.schema import INVALID_TOKEN, KERNEL_FILTERS, SMALLEST_TEMPERATURE, TokenFilters, active_fields
from layers.backend import Backend, contiguous

# On a CPU sort_for_top_p searches for the likely tokens, instead of sorting the whole vocabulary.
SMALL_VOCABULARY = 1000  # with this many tokens or fewer, sorting is faster than searching
FIRST_THRESHOLD = 2**-10  # a probability; fewer than 1024 tokens can exceed it
VOCAB_BLOCK = 64  # neighbouring token ids; the search skips a block if no token exceeds the threshold


def sample(
    logits: Tensor, temperature: float, filters: TokenFilters, backend: Backend, uniform: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Tensor:
    """Draws a token for every sequence: float32 logits [B, V] -> token ids [B]. At temperature 0 the token is the
    likeliest token. The id is INVALID_TOKEN for a sequence with a logit that is not finite.

    uniform: random numbers [B, 1] of draw_uniform, by default from the device's global generator.
    temperatures: one for each sequence, float32 [B, 1] and positive, in place of temperature, which must not be 0."""
    if not has_sample_kernel(backend, filters):
        return sample_torch(logits, temperature, filters, uniform, temperatures)
    if temperature == 0:
        uniform = None
    elif uniform is None:
        uniform = draw_uniform(len(logits), logits.device)
    return backend.op("sample")(
        contiguous(logits), temperature=temperature, temperatures=contiguous(temperatures),
        uniform=contiguous(uniform), **{name: getattr(filters, name) for name in KERNEL_FILTERS},
    )


def has_sample_kernel(backend: Backend, filters: TokenFilters) -> bool:
    return backend.namespace is not None and backend.filters >= active_fields(filters)


def sample_torch(
    logits: Tensor, temperature: float, filters: TokenFilters, uniform: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Tensor:
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs, ids = apply_temperature_and_filters(logits, temperature, filters, temperatures)
        drawn = multinomial(probs, uniform)
        tokens = drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
    is_finite = logits.isfinite().all(-1)
    return torch.where(is_finite, tokens, INVALID_TOKEN)


def apply_temperature_and_filters(
    logits: Tensor, temperature: float, filters: TokenFilters, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns probabilities and ids of the C tokens from which sample draws, both [B, C]. The probabilities of a
    sequence need not sum to one. If ids is None, C is V, and the tokens are in the order of their ids."""
    divisor: float | Tensor = max(temperature, SMALLEST_TEMPERATURE)
    if temperatures is not None:
        divisor = temperatures.clamp(min=SMALLEST_TEMPERATURE)
    # Subtracting the maximum makes the largest score 0 and all others negative. So with a small temperature no score
    # overflows to +inf, and the probabilities of the negative scores underflow to 0.
    scores = (logits - logits.amax(-1, keepdim=True)) / divisor
    has_top_k = 0 < filters.top_k < scores.shape[-1]
    ids = None
    if has_top_k:
        scores, ids = scores.topk(filters.top_k)  # the likeliest first
    probs = scores.softmax(-1)
    if filters.top_p < 1:
        if not has_top_k:
            probs, ids = sort_for_top_p(probs, filters.top_p)
        before = F.pad(probs.cumsum(-1)[:, :-1], (1, 0))  # the summed probability of all likelier tokens
        probs = probs.masked_fill(before >= filters.top_p, 0)
    if filters.min_p > 0:
        probs = probs.masked_fill(probs < filters.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def compute_probs(logits: Tensor, temperature: float, filters: TokenFilters) -> Tensor:
    """Returns the distribution [B, V] from which sample draws. temperature must not be 0."""
    probs, ids = apply_temperature_and_filters(logits, temperature, filters)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits).scatter_add(-1, ids, probs)


def draw_uniform(n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Returns random numbers [n, 1] in [0, 1) on device. By default they are drawn there, by the device's global
    generator. A generator draws on its own device, so a seeded generator of the CPU gives every device the same."""
    source = device if generator is None else generator.device
    uniform = torch.rand(n, 1, dtype=uniform_dtype(source), device=source, generator=generator)
    return uniform.to(device, uniform_dtype(device))


def uniform_dtype(device: torch.device) -> torch.dtype:
    """The type of the random numbers on device: float64, but float32 on an accelerator that may lack float64, as MPS
    does."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def multinomial(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draws a token for each sequence: probs [B, V] -> ids [B]. The probabilities of a sequence need not sum to one. A
    token of probability 0 is never drawn.

    uniform: as for sample."""
    # Inverse transform sampling: take the first token whose cumulative probability exceeds the random number.
    dtype = uniform_dtype(probs.device)
    cumulative = probs.cumsum(-1, dtype=dtype)
    if uniform is None:
        uniform = draw_uniform(len(probs), probs.device)
    uniform = uniform.to(dtype).clamp(max=1 - torch.finfo(dtype).eps)  # rounding could give 1
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)


# ---- Faster in PyTorch ----------------------------------------------------------------------------------------------


def sort_for_top_p(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Finds the likeliest tokens of each sequence, enough for their probabilities to sum to top_p. probs [B, V] ->
    probabilities and ids, both [B, C], the likeliest first. Equally likely tokens are in the order of their ids. Zeros
    pad a sequence that needs fewer than C tokens."""
    # On a GPU and when compiled, C must not depend on the probabilities. So all V tokens are sorted there.
    if probs.device.type != "cpu" or torch.compiler.is_compiling() or probs.shape[-1] <= SMALL_VOCABULARY:
        return probs.sort(dim=-1, descending=True, stable=True)
    values, ids = zip(*[search_for_top_p(row, top_p) for row in probs], strict=True)
    return pad_sequence(values, batch_first=True), pad_sequence(ids, batch_first=True)


def search_for_top_p(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """sort_for_top_p for one sequence [V]. Sorts only the tokens above a threshold. If the probabilities of these
    tokens sum to less than top_p, divides the threshold by 8 and searches again. Usually the first threshold is low
    enough."""
    missing = -len(probs) % VOCAB_BLOCK
    blocks = (F.pad(probs, (0, missing)) if missing else probs).view(-1, VOCAB_BLOCK)
    largest = blocks.amax(-1)
    threshold = FIRST_THRESHOLD
    while threshold > (1 - top_p) / len(probs):  # a lower threshold leaves out few tokens: sort all
        block_ids = (largest > threshold).nonzero()[:, 0]
        values = blocks[block_ids].flatten()
        indices = (values > threshold).nonzero()[:, 0]  # into values
        values, order = values[indices].sort(descending=True, stable=True)
        if len(values) and values.cumsum(-1)[-1] >= top_p:
            indices = indices[order]
            return values, block_ids[indices // VOCAB_BLOCK] * VOCAB_BLOCK + indices % VOCAB_BLOCK
        threshold /= 8
    return probs.sort(descending=True, stable=True)

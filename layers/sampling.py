"""From logits to a token: temperature, top_k, top_p, min_p, and the draw.

    sample           the next token, drawn or the likeliest: a kernel, or sample_torch
    compute_probs    the distribution from which sample draws, for speculation

On a GPU no function here may wait for the device (.item(), .tolist()), because a CUDA graph captures it.
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
    logits: Tensor, temperature: float | Tensor, filters: TokenFilters, backend: Backend, rand: Tensor | None = None
) -> Tensor:
    """Draws a token for every sequence: float32 logits [B, V] -> token ids [B]. The id is INVALID_TOKEN for a sequence
    with a logit that is not finite.

    temperature: a number, or a float32 tensor of positive numbers: [B, 1], or [1, 1] for all sequences. The number 0
        takes the likeliest token.
    rand: random numbers [B, 1] of draw_rand, by default from the device's global generator. PyTorch and C++ invert the
        cumulative distribution at the number. Triton seeds the noise of the row's logits with its bits, so there the
        same number draws another token."""
    if not has_sample_kernel(backend, filters):
        return sample_torch(logits, temperature, filters, rand)
    if is_greedy(temperature):
        temperature = rand = None
    else:
        if not isinstance(temperature, Tensor):
            temperature = logits.new_full((1, 1), temperature)
        if rand is None:
            rand = draw_rand(len(logits), logits.device)
    return backend.op("sample")(
        contiguous(logits), temperature=temperature, rand=contiguous(rand),
        **{name: getattr(filters, name) for name in KERNEL_FILTERS},
    )


def is_greedy(temperature: float | Tensor) -> bool:
    """Does not read a tensor, because that would wait for the device."""
    return not isinstance(temperature, Tensor) and temperature == 0


def has_sample_kernel(backend: Backend, filters: TokenFilters) -> bool:
    return backend.namespace is not None and backend.filters >= active_fields(filters)


def sample_torch(
    logits: Tensor, temperature: float | Tensor, filters: TokenFilters, rand: Tensor | None = None
) -> Tensor:
    if is_greedy(temperature):
        tokens = logits.argmax(-1)
    else:
        probs, ids = apply_temperature_and_filters(logits, temperature, filters)
        drawn = multinomial(probs, rand)
        tokens = drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
    is_finite = logits.isfinite().all(-1)
    return torch.where(is_finite, tokens, INVALID_TOKEN)


def apply_temperature_and_filters(
    logits: Tensor, temperature: float | Tensor, filters: TokenFilters
) -> tuple[Tensor, Tensor | None]:
    """Returns probabilities and ids of the C tokens from which sample draws, both [B, C]. A row of probabilities need
    not sum to one. If ids is None, C is V, and the tokens are in the order of their ids."""
    if isinstance(temperature, Tensor):
        divisor = temperature.clamp(min=SMALLEST_TEMPERATURE)
    else:
        divisor = max(temperature, SMALLEST_TEMPERATURE)
    # Subtract the maximum: the largest score becomes 0, the others negative. So no score overflows with a small
    # temperature, and the probabilities of negative scores underflow to 0.
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


def draw_rand(n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Returns random numbers [n, 1] in [0, 1) on device. By default the device's global generator draws them there. A
    generator draws on its own device, so a seeded generator of the CPU draws the same numbers for every device."""
    source = device if generator is None else generator.device
    rand = torch.rand(n, 1, dtype=rand_dtype(source), device=source, generator=generator)
    return rand.to(device, rand_dtype(device))


def rand_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on an accelerator that may lack float64, such as MPS."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def multinomial(probs: Tensor, rand: Tensor | None = None) -> Tensor:
    """Draws a token for each sequence: probs [B, V] -> ids [B]. A row need not sum to one. A token of probability 0 is
    never drawn.

    rand: see sample."""
    # Inverse transform sampling: take the first token whose cumulative probability exceeds the random number.
    dtype = rand_dtype(probs.device)
    cumulative = probs.cumsum(-1, dtype=dtype)
    if rand is None:
        rand = draw_rand(len(probs), probs.device)
    rand = rand.to(dtype).clamp(max=1 - torch.finfo(dtype).eps)  # rounding could give 1
    return (cumulative <= rand * cumulative[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)


# ---- Faster in PyTorch ----------------------------------------------------------------------------------------------


def sort_for_top_p(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Finds the likeliest tokens of each sequence, enough for their probabilities to sum to top_p. probs [B, V] ->
    probabilities and ids, both [B, C], the likeliest first. Equally likely tokens are in the order of their ids. Zeros
    pad a sequence that needs fewer than C tokens."""
    # On a GPU and when compiled, C must not depend on the probabilities. So sort all V tokens there.
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

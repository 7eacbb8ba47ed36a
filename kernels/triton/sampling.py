"""The choice of the next token on a GPU, in Triton.

    sample    logits and random numbers -> token ids, registered as torch.ops.gptfast_triton.sample

A token is drawn with the probabilities softmax(logits / T) by the Gumbel-max trick: it is the argmax of logits / T + G,
where G is Gumbel noise, one number for each logit. So sample_kernel needs neither a softmax nor a sum. It takes the
argmax of logits + T G, because that also works for T = 0. A row's random number, rand, seeds the noise of its logits
(gumbel_noise).

top_p and min_p keep the likeliest tokens. The drawn token is the argmax among these. A second kernel finds it without
sorting, by rejections as in FlashInfer's sampling kernels:

    1. The argmax of all tokens is the candidate.
    2. The sum of the probabilities of all likelier tokens says whether the candidate is kept. If so, it is drawn.
    3. If not, every token that is not likelier is excluded as well. The argmax of the likelier tokens is the next
       candidate.

With top_p 0.9 the first candidate is kept in nine of ten cases. So all programs share step 2 of the first candidate,
and one program does the rest.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import schema
from kernels.schema import TRITON_FILTERS, TokenFilters, active_fields, empty_sample, register_triton
from kernels.triton.launch import is_last_program, pdl_options, pdl_wait, semaphores

BLOCK_V = 2048  # tokens of the vocabulary that a program of sample_kernel has
TOP_P_BLOCK_V, TOP_P_WARPS = 8192, 16  # of top_p_min_p_kernel, where one program may read all tokens
INVALID_TOKEN = tl.constexpr(schema.INVALID_TOKEN)
SMALLEST_TEMPERATURE = tl.constexpr(schema.SMALLEST_TEMPERATURE)
LARGEST_TEMPERATURE = tl.constexpr(1e30)  # a larger factor could make scores infinite
SEEDS = tl.constexpr(2.0**53)  # a seed has 53 bits, as a random number of float64 has
SMALL_U = tl.constexpr(2.0**-6)  # below, gumbel_noise computes -log(1 - u) by its Taylor series


class BlockResults(NamedTuple):
    """What the programs of sample_kernel store for the last program of a sequence."""

    scores_ptr: tl.tensor  # [B, N_BLOCKS], the best score of each block
    tokens_ptr: tl.tensor  # [B, N_BLOCKS], the token with that score
    sums_ptr: tl.tensor | None  # [2, B, N_BLOCKS]: store_sum
    semaphores_ptr: tl.tensor  # [B]


@triton.jit
def sample_kernel(
    logits_ptr, rand_ptr, tokens_ptr, sums_ptr,  # [B, V], [B] or None, [B], [2, B] or None
    results,  # BlockResults
    temperature_ptr, temperature_stride, V,  # [B], or [1] with stride 0, or None; a number; a number
    BLOCK_V: tl.constexpr, N_BLOCKS: tl.constexpr,
    N_BLOCKS_PADDED: tl.constexpr,  # N_BLOCKS, padded to a power of two
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Grid: [N_BLOCKS, B]. Program (i, b) finds the best of the tokens [i * BLOCK_V, (i + 1) * BLOCK_V) for sequence b.
    The last program of a sequence to finish finds the best token of all blocks. A logit that is not finite has the
    score +inf and the token INVALID_TOKEN, so it wins the argmax.

    sums: for each sequence the largest logit, and the sum of the weights exp((logit - largest logit) / temperature)."""
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    block, sequence = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + sequence * V + token, mask=token < V, other=-1e38)
    scores = logits
    if rand_ptr is not None:
        temperature = load_temperature(temperature_ptr, temperature_stride, sequence)
        scores += temperature * gumbel_noise(load_seed(rand_ptr, sequence), token)
    is_finite = tl.abs(logits) < float("inf")  # false for NaN, too
    scores = tl.where(is_finite, scores, float("inf"))
    best_score, best_index = tl.max(scores, axis=0), tl.argmax(scores, axis=0)
    best_token = tl.where(best_score == float("inf"), INVALID_TOKEN, block * BLOCK_V + best_index)

    tl.store(results.scores_ptr + sequence * N_BLOCKS + block, best_score)
    tl.store(results.tokens_ptr + sequence * N_BLOCKS + block, best_token)
    if sums_ptr is not None:
        store_sum(results.sums_ptr, logits, token < V, temperature, N_BLOCKS)
    if is_last_program(results.semaphores_ptr + sequence, N_BLOCKS):
        best_of_all = best_of_blocks(results.scores_ptr, results.tokens_ptr, sequence, N_BLOCKS, N_BLOCKS_PADDED)
        tl.store(tokens_ptr + sequence, best_of_all.to(tl.int64))
        if sums_ptr is not None:
            combine_sums(results.sums_ptr, sums_ptr, temperature, N_BLOCKS, N_BLOCKS_PADDED)


@triton.jit
def load_temperature(temperature_ptr, temperature_stride, sequence):
    temperature = tl.load(temperature_ptr + sequence * temperature_stride)
    return tl.minimum(tl.maximum(temperature, SMALLEST_TEMPERATURE), LARGEST_TEMPERATURE)


@triton.jit
def load_seed(rand_ptr, sequence):
    """Returns the seed of a sequence's noise: the bits of its random number."""
    return (tl.load(rand_ptr + sequence) * SEEDS).to(tl.int64)


@triton.jit
def gumbel_noise(seed, token):
    """Returns the noise of each token, a function of the seed and the token. So both kernels draw with the same noise.

    The noise is G = -log E with E = -log(1 - u). u and 1 - u come from 32 random bits of Philox, a generator without
    state. The highest score has a small E, so a small E needs a small relative error. But for small u, 1 - u has lost
    most bits of u. There E is u + u^2 / 2 + u^3 / 3."""
    bits = tl.randint(seed, token)
    u = (bits.to(tl.float32) + 0.5) * 2**-32  # the 0.5 keeps both u and 1 - u above 0
    complement = ((0xFFFFFFFF - bits).to(tl.float32) + 0.5) * 2**-32  # 1 - u
    exponential = tl.where(u < SMALL_U, u + u * u * (0.5 + u / 3), -tl.log(complement))
    return -tl.log(exponential)


@triton.jit
def store_sum(block_sums_ptr, logits, mask, temperature, N_BLOCKS: tl.constexpr):
    """Stores the largest logit of the program's block, and the sum of the weights relative to this logit."""
    block, sequence, n_blocks_of_all = tl.program_id(0), tl.program_id(1), tl.num_programs(1) * N_BLOCKS
    largest = tl.max(logits, axis=0)
    weights = tl.where(mask, tl.exp((logits - largest) / temperature), 0.0)
    tl.store(block_sums_ptr + sequence * N_BLOCKS + block, largest)
    tl.store(block_sums_ptr + n_blocks_of_all + sequence * N_BLOCKS + block, tl.sum(weights, axis=0))


@triton.jit
def combine_sums(block_sums_ptr, sums_ptr, temperature, N_BLOCKS: tl.constexpr, N_BLOCKS_PADDED: tl.constexpr):
    """Stores the largest logit and the sum of the weights of the program's sequence, from the results of all blocks."""
    sequence, n_blocks_of_all = tl.program_id(1), tl.num_programs(1) * N_BLOCKS
    block = tl.arange(0, N_BLOCKS_PADDED)
    row_ptr, mask = block_sums_ptr + sequence * N_BLOCKS + block, block < N_BLOCKS
    block_largest = tl.load(row_ptr, mask=mask, other=-1e38, cache_modifier=".cg")
    block_sums = tl.load(row_ptr + n_blocks_of_all, mask=mask, other=0.0, cache_modifier=".cg")
    row_largest = tl.max(block_largest, axis=0)
    row_sum = tl.sum(block_sums * tl.exp((block_largest - row_largest) / temperature), axis=0)
    tl.store(sums_ptr + sequence, row_largest)
    tl.store(sums_ptr + tl.num_programs(1) + sequence, row_sum)


@triton.jit
def best_of_blocks(block_scores_ptr, block_tokens_ptr, sequence, N_BLOCKS: tl.constexpr, N_BLOCKS_PADDED: tl.constexpr):
    """Returns the token of a sequence whose block has the highest score. Other programs have just written scores and
    tokens, so loads bypass the L1 cache (.cg)."""
    block = tl.arange(0, N_BLOCKS_PADDED)
    offsets, mask = sequence * N_BLOCKS + block, block < N_BLOCKS
    scores = tl.load(block_scores_ptr + offsets, mask=mask, other=-float("inf"), cache_modifier=".cg")
    tokens = tl.load(block_tokens_ptr + offsets, mask=mask, other=0, cache_modifier=".cg")
    return tl.sum(tl.where(block == tl.argmax(scores, axis=0), tokens, 0), axis=0)


@triton.jit
def top_p_min_p_kernel(
    logits_ptr, rand_ptr, tokens_ptr, sums_ptr,  # [B, V], [B], [B], [2, B]
    block_above_ptr, semaphores_ptr,  # [B, N_BLOCKS], [B]
    temperature_ptr, temperature_stride, filters, V,  # [B], or [1] with stride 0; a number; TokenFilters; a number
    BLOCK_V: tl.constexpr, N_BLOCKS: tl.constexpr, N_BLOCKS_PADDED: tl.constexpr,
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Grid: [N_BLOCKS, B]. The tokens of sample_kernel are the first candidates. Replaces each by the best of the
    tokens that top_p and min_p keep. Program (i, b) adds up the weights of the likelier tokens in block i. The last
    program of a sequence to finish does the rest alone."""
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    block, sequence = tl.program_id(0), tl.program_id(1)
    row_logits_ptr = logits_ptr + sequence * V
    temperature = load_temperature(temperature_ptr, temperature_stride, sequence)
    seed = load_seed(rand_ptr, sequence)
    candidate = tl.load(tokens_ptr + sequence).to(tl.int32)  # or INVALID_TOKEN
    threshold = tl.load(row_logits_ptr + tl.maximum(candidate, 0))
    largest = tl.load(sums_ptr + sequence)
    total = tl.load(sums_ptr + tl.num_programs(1) + sequence)

    weights = likelier_weights(row_logits_ptr, block, threshold, candidate, largest, temperature, V, BLOCK_V)
    tl.store(block_above_ptr + sequence * N_BLOCKS + block, tl.sum(weights, axis=0))
    if is_last_program(semaphores_ptr + sequence, N_BLOCKS):
        index = tl.arange(0, N_BLOCKS_PADDED)
        block_above_ptrs = block_above_ptr + sequence * N_BLOCKS + index
        above = tl.sum(tl.load(block_above_ptrs, mask=index < N_BLOCKS, other=0.0, cache_modifier=".cg"), axis=0)
        while (candidate != INVALID_TOKEN) & is_excluded(
            above, total, tl.exp((threshold - largest) / temperature), filters
        ):
            candidate = best_of_likelier(
                row_logits_ptr, seed, threshold, candidate, temperature, V, BLOCK_V, N_BLOCKS
            )
            threshold = tl.load(row_logits_ptr + candidate)
            sums = tl.zeros((BLOCK_V,), tl.float32)
            for i in range(N_BLOCKS):
                sums += likelier_weights(row_logits_ptr, i, threshold, candidate, largest, temperature, V, BLOCK_V)
            above = tl.sum(sums, axis=0)
        tl.store(tokens_ptr + sequence, candidate.to(tl.int64))


@triton.jit
def likelier_weights(row_logits_ptr, block, threshold, candidate, largest, temperature, V, BLOCK_V: tl.constexpr):
    """Returns the weights of a block's tokens [BLOCK_V], 0 for tokens that are not likelier than the candidate."""
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(row_logits_ptr + token, mask=token < V, other=-float("inf"))
    weights = tl.exp((logits - largest) / temperature)
    return tl.where(is_likelier(logits, token, threshold, candidate), weights, 0.0)


@triton.jit
def is_likelier(logits, token, threshold, candidate):
    """Whether each token is likelier than the candidate, whose logit is threshold. Of tied tokens the first counts as
    the likeliest."""
    return (logits > threshold) | ((logits == threshold) & (token < candidate))


@triton.jit
def is_excluded(above, total, weight, filters):
    """Whether top_p or min_p excludes a token. above, total: the sums of the weights of all likelier tokens, and of all
    tokens. weight: the token's. The likeliest token has the weight 1, and is never excluded."""
    return (above > 0) & (((above >= total * filters.top_p) & (filters.top_p < 1)) | (weight < filters.min_p))


@triton.jit
def best_of_likelier(
    row_logits_ptr, seed, threshold, candidate, temperature, V, BLOCK_V: tl.constexpr, N_BLOCKS: tl.constexpr
):
    """Returns the best of the tokens that are likelier than the candidate."""
    best_scores = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    best_tokens = tl.zeros((BLOCK_V,), tl.int32)
    for i in range(N_BLOCKS):
        token = i * BLOCK_V + tl.arange(0, BLOCK_V)
        logits = tl.load(row_logits_ptr + token, mask=token < V, other=-float("inf"))
        scores = logits + temperature * gumbel_noise(seed, token)
        is_better = is_likelier(logits, token, threshold, candidate) & (scores > best_scores)
        best_scores = tl.where(is_better, scores, best_scores)
        best_tokens = tl.where(is_better, token, best_tokens)
    best = tl.argmax(best_scores, axis=0)
    return tl.sum(tl.where(tl.arange(0, BLOCK_V) == best, best_tokens, 0), axis=0)


@register_triton
def sample(logits: Tensor, *, temperature: Tensor | None, rand: Tensor | None, **filters) -> Tensor:
    """Draws token ids [B] by float32 logits [B, V]. A row whose logits are not all finite gives INVALID_TOKEN.

    temperature: float32 [B, 1], or [1, 1] for all rows.
    rand: float64 random numbers [B, 1] in [0, 1). If it and temperature are None, the likeliest token is taken."""
    filters = TokenFilters(**filters)
    assert active_fields(filters) <= {*TRITON_FILTERS}  # layers/sampling.py: has_sample_kernel
    batch, vocab_size = logits.shape
    temperature_stride = 0 if temperature is None or len(temperature) == 1 else temperature.stride(0)
    has_filters = rand is not None and bool(active_fields(filters))
    n_blocks = triton.cdiv(vocab_size, BLOCK_V)
    tokens = empty_sample(logits)
    sums = logits.new_empty(2, batch) if has_filters else None
    grid = n_blocks, batch
    sample_kernel[grid](
        logits_ptr=logits, rand_ptr=rand, tokens_ptr=tokens, sums_ptr=sums,
        results=BlockResults(
            logits.new_empty(batch, n_blocks), logits.new_empty(batch, n_blocks, dtype=torch.int32),
            logits.new_empty(2, batch, n_blocks) if has_filters else None, semaphores(logits.device, batch),
        ),
        temperature_ptr=temperature, temperature_stride=temperature_stride, V=vocab_size, BLOCK_V=BLOCK_V,
        N_BLOCKS=n_blocks, N_BLOCKS_PADDED=triton.next_power_of_2(n_blocks), **pdl_options(logits.device, grid),
    )
    if has_filters:
        n_blocks = triton.cdiv(vocab_size, TOP_P_BLOCK_V)
        grid = n_blocks, batch
        top_p_min_p_kernel[grid](
            logits_ptr=logits, rand_ptr=rand, tokens_ptr=tokens, sums_ptr=sums,
            block_above_ptr=logits.new_empty(batch, n_blocks), semaphores_ptr=semaphores(logits.device, batch),
            temperature_ptr=temperature, temperature_stride=temperature_stride, filters=filters, V=vocab_size,
            BLOCK_V=TOP_P_BLOCK_V, N_BLOCKS=n_blocks, N_BLOCKS_PADDED=triton.next_power_of_2(n_blocks),
            num_warps=TOP_P_WARPS, **pdl_options(logits.device, grid),
        )
    return tokens

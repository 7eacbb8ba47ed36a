"""The choice of the next token on a GPU, in Triton.

    sample    logits and noise -> token ids, registered as torch.ops.gptfast_triton.sample

A token with probabilities softmax(logits / T) is drawn by the Gumbel-max trick: it is
the argmax of logits / T - log E, where E is noise of the exponential distribution, one number for each logit. So the
kernel needs neither a softmax nor a sum. The kernel takes the argmax of logits - T log E, which also works for T = 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.schema import triton_op
from kernels.triton.launch import pdl_options, pdl_wait, semaphores

BLOCK_V = 2048  # tokens of the vocabulary that a program has


@triton.jit
def sample_kernel(
    logits_ptr, noise_ptr, tokens_ptr,  # [B, V], [B, V], [B]
    block_scores_ptr, block_tokens_ptr, semaphores_ptr,  # [B, N_BLOCKS], [B, N_BLOCKS], [B]
    temperature, V,
    BLOCK_V: tl.constexpr, N_BLOCKS: tl.constexpr,
    N_BLOCKS_PADDED: tl.constexpr,  # N_BLOCKS, padded to a power of two
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Grid: [N_BLOCKS, B]. Program (i, b) finds the best of the tokens [i * BLOCK_V, (i + 1) * BLOCK_V) for sequence b.
    The last program of a sequence to finish finds the best token of all blocks. A logit that is not finite gets the
    score infinity and the token -1, so -1 is the result of the sequence."""
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    block, sequence = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + sequence * V + token, mask=token < V, other=-1e38)
    scores = logits
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + sequence * V + token, mask=token < V, other=1.0)
        scores -= temperature * tl.log(noise.to(tl.float32))
    is_finite = tl.abs(logits) < float("inf")  # false for NaN, too
    scores = tl.where(is_finite, scores, float("inf"))
    best_score, best_index = tl.max(scores, axis=0), tl.argmax(scores, axis=0)
    best_token = tl.where(best_score == float("inf"), -1, block * BLOCK_V + best_index)

    tl.store(block_scores_ptr + sequence * N_BLOCKS + block, best_score)
    tl.store(block_tokens_ptr + sequence * N_BLOCKS + block, best_token)
    tl.debug_barrier()  # all threads of the program have stored before the program counts
    if tl.atomic_add(semaphores_ptr + sequence, 1, sem="acq_rel") == N_BLOCKS - 1:
        tl.store(semaphores_ptr + sequence, 0)
        best_of_all = best_of_blocks(block_scores_ptr, block_tokens_ptr, sequence, N_BLOCKS, N_BLOCKS_PADDED)
        tl.store(tokens_ptr + sequence, best_of_all.to(tl.int64))


@triton.jit
def best_of_blocks(block_scores_ptr, block_tokens_ptr, sequence, N_BLOCKS: tl.constexpr, N_BLOCKS_PADDED: tl.constexpr):
    """Returns the token of a sequence whose block has the highest score. Other programs have just written scores and
    tokens, so loads bypass the L1 cache (.cg)."""
    block = tl.arange(0, N_BLOCKS_PADDED)
    offsets, mask = sequence * N_BLOCKS + block, block < N_BLOCKS
    scores = tl.load(block_scores_ptr + offsets, mask=mask, other=-float("inf"), cache_modifier=".cg")
    tokens = tl.load(block_tokens_ptr + offsets, mask=mask, other=0, cache_modifier=".cg")
    return tl.sum(tl.where(block == tl.argmax(scores, axis=0), tokens, 0), axis=0)


@triton_op
def sample(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """Draws token ids [B] by float32 logits [B, V] and noise [B, V] of the exponential distribution. Without noise they
    are the likeliest tokens. A row whose logits are not all finite gives -1."""
    batch, vocab_size = logits.shape
    n_blocks = triton.cdiv(vocab_size, BLOCK_V)
    tokens = logits.new_empty(batch, dtype=torch.int64)
    block_scores = logits.new_empty(batch, n_blocks)
    block_tokens = logits.new_empty(batch, n_blocks, dtype=torch.int32)
    grid = n_blocks, batch
    sample_kernel[grid](
        logits_ptr=logits, noise_ptr=noise, tokens_ptr=tokens, block_scores_ptr=block_scores,
        block_tokens_ptr=block_tokens, semaphores_ptr=semaphores(logits.device, batch), temperature=temperature,
        V=vocab_size, BLOCK_V=BLOCK_V, N_BLOCKS=n_blocks, N_BLOCKS_PADDED=triton.next_power_of_2(n_blocks),
        **pdl_options(logits.device, grid),
    )
    return tokens

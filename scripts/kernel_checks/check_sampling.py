"""Checks of sampling: chosen tokens against scores computed here, and how often tokens are drawn."""

from itertools import product

import torch
from torch import Tensor

from kernels.schema import INVALID_TOKEN, TokenFilters
from layers.backend import TRITON_BACKEND
from layers.sampling import multinomial, sample
from scripts.kernel_checks.exact_results import U32, Comparison, kept_tokens

TEMPERATURES = [(1e-30,), (0.7,), (1e30,), (0.2, 0.7, 3.0)]  # of all rows, or of each row
# The error of kernels/triton/sampling.py: gumbel_noise. A GPU's log2 has an absolute error of 2^-22 between 0.5 and 2,
# and elsewhere a relative error of 2^-22.
#
#     E = -log(1 - u) >= 2^-6    (ln 2 2^-22 for the log, 2^-25 for rounding 1 - u) / 2^-6, the relative error: 1.3e-5
#     log E, with |log E| < 5    5 2^-22 = 1.2e-6
#     E below 2^-6               2^-20 for the series, and a few roundings: at most 2^-19 = 1.9e-6
#     log E, with |log E| < 23   23 2^-22 = 5.5e-6
GUMBEL_ERROR = 2**-16


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """The first of the four words of Philox-4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3), for
    the key seed [B, 1] and the counters [V]: int64 [B, V], in [0, 2^32)."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = counter, 0, torch.zeros_like(counter), 0
    k0, k1 = seed & mask, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # the products wrap at 2^64, which keeps all bits
        c0, c1, c2, c3 = (b >> 32 & mask) ^ c1 ^ k0, b & mask, (a >> 32 & mask) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


def exact_gumbel_noise(rand: Tensor, vocab_size: int) -> Tensor:
    """The noise [B, V] with which Triton's kernels draw by random numbers [B, 1]."""
    u = (philox((rand * 2**53).long(), torch.arange(vocab_size)).double() + 0.5) / 2**32
    return -(-torch.log1p(-u)).log()


def check_sample(vocab_size: int):
    """Checks that greedy sampling finds the first of the likeliest tokens, or returns INVALID_TOKEN if a logit is not
    finite. With a temperature, checks the score of the chosen token, the best one that top_p and min_p keep."""
    logits = torch.randint(-20, 20, (3, vocab_size)).float()
    expected = logits.argmax(-1)
    logits[2, 3], expected[2] = torch.nan, INVALID_TOKEN
    ours = sample(logits, 0.0, TokenFilters(), TRITON_BACKEND)
    yield Comparison("sample", f"greedy, {vocab_size} tokens", ours, expected, torch.zeros(()))
    logits, rand = torch.randn(3, vocab_size), torch.rand(3, 1, dtype=torch.float64)
    noise = exact_gumbel_noise(rand, vocab_size)
    for temperatures, top_p, min_p in product(TEMPERATURES, (1.0, 0.613, 1e-9), (0.0, 0.05)):
        column = torch.tensor(temperatures).view(-1, 1)  # [3, 1], or [1, 1] for all rows
        filters = TokenFilters(top_p=top_p, min_p=min_p)
        ours = sample(logits, column, filters, TRITON_BACKEND, rand)
        scores = logits + column * noise
        bound = column[:, 0] * 2 * GUMBEL_ERROR + 4 * U32 * scores.abs().amax(-1)
        scores = scores.masked_fill(~kept_tokens(logits, column, top_p=top_p, min_p=min_p), -torch.inf)
        chosen = scores.gather(-1, ours[:, None])[:, 0]
        case = f"{vocab_size} tokens, temperatures {temperatures}, top_p {top_p}, min_p {min_p}"
        yield Comparison("sample", case, chosen, scores.amax(-1), bound)


def check_distribution(operation: str):
    """Checks how often each token is drawn, within five standard deviations, and all counts at once by Pearson's
    chi-square statistic. The statistic has the mean df and the variance 2 df, where df is the number of possible tokens
    but one. multinomial is PyTorch code, but sums in another order on a GPU than on a CPU."""
    logits, temperature = torch.randn(40), 0.7
    logits[[0, 3]] = -1e30  # never drawn
    for top_p, n in [(1.0, 300), (0.9, 300)] if operation == "sample" else [(1.0, 100_000)]:
        is_kept = kept_tokens(logits[None], temperature, top_p=top_p)[0] & (logits > -1e30)
        probabilities = (logits.double() / temperature).masked_fill(~is_kept, -torch.inf).softmax(-1)
        if operation == "sample":
            tokens = sample(logits.expand(n, -1), temperature, TokenFilters(top_p=top_p), TRITON_BACKEND)
        else:
            tokens = multinomial(probabilities.expand(n, -1))
        frequencies = tokens.bincount(minlength=len(logits)) / n
        deviation = (probabilities * (1 - probabilities) / n).sqrt()
        yield Comparison(operation, f"distribution, top_p {top_p}", frequencies, probabilities, 5 * deviation + U32)
        statistic = (n * (frequencies - probabilities) ** 2 / probabilities)[is_kept].sum()
        df = is_kept.sum() - 1.0
        yield Comparison(operation, f"chi-square, top_p {top_p}", statistic, df, 5 * (2 * df).sqrt())

"""kernels/csrc/sampling.h: the likeliest token, and draws from the distribution that top_k, top_p and min_p leave."""

import pytest
import torch

import kernels.build
from kernels.schema import TokenFilters
from layers.backend import CPU_BACKEND, TORCH_BACKEND
from layers.sampling import sample
from scripts.kernel_checks.exact_results import kept_tokens
from tests.cpu_kernels import built

pytestmark = pytest.mark.usefixtures("threads")

# ---- The likeliest token --------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("vocab_size", [1, 15, 17, 511, 513, 5000, 49152])
def test_likeliest_token(vocab_size):
    """The likeliest token is the argmax of PyTorch, the first of several tied ones, or -1 if a logit is not finite."""
    assert kernels.build.load_cpp_kernels()
    logits = torch.randn(70, vocab_size, generator=torch.Generator().manual_seed(0))
    for i in range(10):
        logits[i, [i * vocab_size // 10, -1]] = 9.0  # ties, in two parts of the vocabulary
    logits[10], logits[11], logits[12] = 0.0, -3e38, -0.0
    logits[12, -1] = 0.0  # equal to -0.0
    for i, value in enumerate([torch.nan, torch.inf, -torch.inf] * 3):
        logits[20 + i, [0, vocab_size // 2, -1][i // 3]] = value
    expected = logits.argmax(-1)
    expected[20:29] = -1
    assert torch.equal(sample(logits, 0.0, TokenFilters(), CPU_BACKEND), expected)
    strided = logits[:, None].expand(70, 2, vocab_size)[:, -1]
    assert torch.equal(sample(strided, 0.0, TokenFilters(), CPU_BACKEND), expected)
    assert torch.equal(sample(logits, 0.0, TokenFilters(), TORCH_BACKEND), expected)
    for i in (0, 25):
        assert sample(logits[i : i + 1], 0.0, TokenFilters(), CPU_BACKEND) == expected[i]


@built
def test_logits_that_the_kernel_does_not_take():
    assert kernels.build.load_cpp_kernels()
    for wrong in (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(RuntimeError, match="logits must be float32"):
            sample(wrong, 0.0, TokenFilters(), CPU_BACKEND)
    for options in ({"rand": torch.rand(2, 1)}, {"rand": torch.rand(1, 1).double()}):
        with pytest.raises(RuntimeError, match="random numbers must be float64"):
            sample(torch.zeros(2, 3), 0.5, TokenFilters(), CPU_BACKEND, **options)
    for wrong in (torch.ones(3, 1), torch.ones(1, 1).double()):
        with pytest.raises(RuntimeError, match="temperature must be float32"):
            sample(torch.zeros(2, 3), wrong, TokenFilters(), CPU_BACKEND)


# ---- A random token -------------------------------------------------------------------------------------------------


TRUNCATIONS = [{}, {"top_k": 1}, {"top_k": 7}, {"top_k": 4000}, {"top_p": 1e-9}, {"top_p": 0.613}, {"top_p": 0.9999}]
TRUNCATIONS += [{"min_p": 0.3}, {"min_p": 1.0}, {"top_k": 50, "top_p": 0.9}, {"top_k": 20, "top_p": 0.6, "min_p": 0.1}]


@built
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 17, 300, 5000])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_drawn_tokens(vocab_size, truncation):
    """Draws follow the distribution: for few and many likely tokens, for ties, of which the first tokens are kept, and
    for extreme logits. n evenly spaced random numbers draw a token of probability p about n p times, give or take
    one."""
    assert kernels.build.load_cpp_kernels()
    n, noise = 500, 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    rand = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    for logits in (noise, 3 * noise, noise.round(), (noise > 2).float(), torch.zeros(vocab_size), 1e37 * noise):
        for temperature in (1e-6, 0.7, 1e3):
            weights = ((logits.double() - logits.max()) / temperature).exp()
            weights *= kept_tokens(logits[None], temperature, **truncation)[0]
            expected, rows = weights / weights.sum(), logits.expand(n, vocab_size)
            tokens = sample(rows, temperature, TokenFilters(**truncation), CPU_BACKEND, rand)
            assert (tokens.diff() >= 0).all()  # more likely tokens need not come first
            assert (torch.bincount(tokens, minlength=vocab_size) - n * expected).abs().max() < 1.01
            if "top_k" not in truncation or len(logits.unique()) == vocab_size:  # of tied logits, topk may keep any
                tokens = sample(rows, temperature, TokenFilters(**truncation), TORCH_BACKEND, rand)
                assert (torch.bincount(tokens, minlength=vocab_size) - n * expected).abs().max() < 1.01


@built
def test_each_row_has_its_own_temperature():
    assert kernels.build.load_cpp_kernels()
    logits, rand = torch.randn(9, 300), torch.rand(9, 1, dtype=torch.float64)
    rand[4] = 1.0  # which rounding of a random number can give
    temperatures = torch.logspace(-30, 3, 9)[:, None]
    logits[2, 7] = torch.nan
    filters = TokenFilters(top_p=0.9)
    tokens = sample(logits, temperatures, filters, CPU_BACKEND, rand)
    for i, temperature in enumerate(temperatures[:, 0].tolist()):
        alone = sample(logits[i : i + 1], temperature, filters, CPU_BACKEND, rand[i : i + 1])
        alike = sample(logits, temperatures[i : i + 1], filters, CPU_BACKEND, rand)  # all rows have one
        assert alone == tokens[i] == alike[i] and (alone == -1) == (i == 2)

"""sample(): tokens of the distribution that temperature, top_k and top_p leave, and of no other."""

import numpy as np
import pytest
import torch

from config import UsageError
from sampling import Sampling, sample


def expected_distribution(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """The probabilities of one row, the slow and plain way."""
    weights = np.exp(logits.double().numpy() / sampling.temperature)
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[: sampling.top_k]
    if sampling.top_p is not None:
        total, kept = sum(weights[i] for i in ranked), []
        for i in ranked:
            if sum(weights[j] for j in kept) / total >= sampling.top_p:
                break
            kept.append(i)
        ranked = kept
    probs = np.zeros(len(weights))
    probs[ranked] = weights[ranked] / weights[ranked].sum()
    return probs


@pytest.mark.parametrize(
    "sampling, compiled",
    [
        (Sampling(1.0), False),
        (Sampling(0.5), False),
        (Sampling(2.0, top_k=3), False),
        (Sampling(1.0, top_k=1), False),
        (Sampling(1.0, top_k=12, top_p=1.0), False),
        (Sampling(1.0, top_k=100), False),
        (Sampling(1.0, top_p=0.7), False),
        (Sampling(1.5, top_p=1e-6), False),
        (Sampling(0.7, top_k=5, top_p=0.8), False),  # 0.8 of what top_k left
        (Sampling(0.7, top_k=5, top_p=0.8), True),
    ],
    ids=str,
)
def test_samples_have_the_filtered_distribution(sampling, compiled):
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    expected = expected_distribution(logits, sampling)
    draw = torch.compile(sample, fullgraph=True) if compiled else sample
    n = 100_000
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(draw(logits.expand(n, 12), sampling))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2]) == (expected.max() == 1)
    shares = torch.bincount(drawn[0], minlength=12).numpy() / n
    assert ((shares > 0) == (expected > 0)).all()
    four_deviations = 4 * np.sqrt(expected * (1 - expected) / n)
    assert (abs(shares - expected) <= four_deviations).all()


def test_greedy_takes_the_lowest_of_tied_tokens():
    ties = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(ties, Sampling()).tolist() == [1, 0]


ONE_TOKEN = [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1e-9), Sampling(1e-300)]


@pytest.mark.parametrize("sampling", ONE_TOKEN, ids=str)
def test_nothing_left_but_the_likeliest(sampling):
    logits = torch.randn(500, 97, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, sampling), logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.8, 5, 0.9)], ids=str)
def test_rows_that_are_not_finite(sampling):
    logits = torch.randn(500, 97, generator=torch.Generator().manual_seed(0))
    logits[1, 5], logits[2, 6], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    assert (sample(logits, sampling) == -1).nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1.0}, {"temperature": torch.inf}, {"temperature": torch.nan}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.1}, {"top_p": torch.nan}],
    ids=str,
)  # fmt: skip
def test_mistakes_are_named(fields):
    (name,) = fields
    with pytest.raises(UsageError, match=f"^{name} must be"):
        Sampling(**fields)

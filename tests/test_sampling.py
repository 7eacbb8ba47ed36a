"""sample draws from exactly the distribution that temperature, top_k, top_p and min_p leave."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from engine.generation import DecodeLoop
from engine.runner import ModelRunner
from engine.sampler import seen_token_mask, store_token_ids
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.speculate import NgramProposer, SpeculativeLoop
from kernels.schema import INVALID_TOKEN, TokenFilters, active_fields
from layers import sampling
from layers.backend import CPU_BACKEND, TORCH_BACKEND, TRITON_BACKEND
from layers.kv_cache import KVCache
from layers.sampling import compute_probs, has_sample_kernel
from scripts.kernel_checks.exact_results import kept_tokens
from utils.errors import UsageError


def sample(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return sampling.sample(logits, params.temperature, params.filters, TORCH_BACKEND)


def expected_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Returns the probabilities [B, V] of the tokens that remain, found by sorting."""
    is_kept = kept_tokens(logits, params.temperature, params.top_k or 0, params.top_p or 1.0)
    return (logits.double() / params.temperature).masked_fill(~is_kept, -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    "params, compiled",
    [
        (SamplingParams(1.0), False),
        (SamplingParams(0.5), False),
        (SamplingParams(2.0, top_k=3), False),
        (SamplingParams(1.0, top_k=1), False),
        (SamplingParams(1.0, top_k=12, top_p=1.0), False),
        (SamplingParams(1.0, top_k=100), False),
        (SamplingParams(1.0, top_p=0.7), False),
        (SamplingParams(1.5, top_p=1e-6), False),
        (SamplingParams(0.7, top_k=5, top_p=0.8), False),  # 0.8 of what top_k left
        (SamplingParams(0.7, top_k=5, top_p=0.8), True),
    ],
    ids=str,
)
def test_samples_have_the_filtered_distribution(params, compiled):
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    expected = expected_distribution(logits[None], params)[0]
    draw = torch.compile(sample, fullgraph=True) if compiled else sample
    n = 100_000
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(draw(logits.expand(n, 12), params))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2]) == (expected.max() == 1)
    shares = torch.bincount(drawn[0], minlength=12) / n
    assert ((shares > 0) == (expected > 0)).all()
    four_deviations = 4 * (expected * (1 - expected) / n).sqrt()
    assert (abs(shares - expected) <= four_deviations).all()


SAMPLINGS = [
    SamplingParams(0.7),
    SamplingParams(1.3, top_k=7),
    SamplingParams(0.8, top_p=0.6),
    SamplingParams(1.0, min_p=0.3),
    SamplingParams(1.2, top_k=20, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("params", SAMPLINGS, ids=str)
def test_distribution_equals_transformers(params):
    logits = 3 * torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    expected = hf.TemperatureLogitsWarper(params.temperature)(None, logits)
    for value, warper in [
        (params.top_k, hf.TopKLogitsWarper),
        (params.top_p, hf.TopPLogitsWarper),
        (params.min_p, hf.MinPLogitsWarper),
    ]:
        expected = expected if value is None else warper(value)(None, expected)
    ours = compute_probs(logits, params.temperature, params.filters)
    torch.testing.assert_close(ours, expected.softmax(-1))


def test_repetition_penalty_equals_transformers(both_models):
    """The penalty counts prompt and output, in plain and in speculative decoding, and beside prompts without a
    penalty."""
    theirs, ours = both_models("llama3", True)
    prompt = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    n, params = 24, SamplingParams(repetition_penalty=1.3)
    options = dict(do_sample=False, max_new_tokens=n, min_new_tokens=n, repetition_penalty=1.3, eos_token_id=96)
    expected = theirs.generate(prompt, **options)[0, 40:].tolist()

    kv_cache, ids = KVCache(ours, 1, 64), prompt[0].tolist()
    runner = ModelRunner(ours, kv_cache, params)
    loop = DecodeLoop(runner)
    assert [i for (i,) in loop.decode_tokens(prompt, n)] == expected
    rest = loop.decode_tokens(torch.tensor([ids + expected[:5]]), n - 5, n_cached=44)  # as a conversation goes on
    assert [i for (i,) in rest] == expected[5:]

    lookup = SpeculativeLoop(runner, NgramProposer(2, torch.device("cpu")), max_k=4)
    assert [i for (i,) in lookup.decode_tokens(prompt, n)] == expected

    for order in ([0, 1, 2], [2, 0, 1]):  # the second time, penalized moves to the slot of short
        plain, penalized, short = Sequence(ids, n), Sequence(ids, n, params), Sequence(ids[:7], 3, params)
        scheduler = Scheduler(ours, 3, 64)
        for i in order:
            scheduler.submit([plain, penalized, short][i])
        while scheduler.has_unfinished_sequences():
            scheduler.step()
        assert penalized.new_ids == expected and plain.new_ids != expected


@settings(deadline=None)
@given(st.data())
def test_a_cache_holds_the_tokens_of_the_text(both_models, data):
    """A cache holds the ids and keys of the text after storing, copying, swapping, and storing again from an earlier
    position."""
    n_texts, length, vocab_size = 3, 12, 9
    kv_cache, texts = KVCache(both_models("llama3")[1], n_texts, length), [[] for _ in range(n_texts)]
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["store", "copy", "swap"]))
        if action != "store":
            source, target = data.draw(st.tuples(*[st.integers(0, n_texts - 1)] * 2))
            n = data.draw(st.integers(0, len(texts[source])))
            if action == "copy":
                kv_cache.copy_sequence(source, target, n)
                texts[target] = texts[source][:n]
            else:
                kv_cache.swap_sequences(source, target, max(len(texts[source]), len(texts[target])))
                texts[source], texts[target] = texts[target], texts[source]
            continue
        first, n_new = data.draw(st.integers(0, n_texts - 1)), data.draw(st.integers(1, 4))
        rows = range(first, data.draw(st.integers(first + 1, n_texts)))
        starts = [data.draw(st.integers(0, min(len(texts[row]), length - n_new))) for row in rows]
        tokens = [data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=n_new, max_size=n_new)) for _ in rows]
        view = kv_cache.view_sequences(first, len(rows)).view_positions(max(starts) + n_new)
        store_token_ids(view.token_ids, torch.tensor(tokens), torch.tensor(starts))
        for i, (row, start, new) in enumerate(zip(rows, starts, tokens, strict=True)):
            view.layers[-1].k[i, 0, start : start + n_new, 0] = torch.tensor(new)  # the keys are the token ids
            texts[row] = texts[row][:start] + new
        last = torch.tensor(starts)[:, None] + torch.arange(n_new)
        seen_tokens = seen_token_mask(view.token_ids, last, vocab_size)
        for row, start, seen in zip(rows, starts, seen_tokens, strict=True):
            for i, mask in enumerate(seen):
                assert set(mask.nonzero()[:, 0].tolist()) == set(texts[row][: start + i + 1])
    for i, text in enumerate(texts):
        assert kv_cache.token_ids[i, : len(text)].tolist() == text
        assert kv_cache.layers[-1].k[i, 0, : len(text), 0].tolist() == text


def sorted_distribution(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Returns the probabilities that top_p leaves, found by sorting. All sums are float32, as in compute_probs. With
    float64, as in kept_tokens, other tokens would remain where a sum is close to top_p."""
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(probs.cumsum(-1)[:, :-1], (1, 0))
    kept = probs.masked_fill(before >= top_p, 0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


@pytest.mark.parametrize("vocab_size", [12, 1280, 5000])  # the last is not a multiple of CHUNK
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1 - 1e-7])
def test_top_p_equals_sorting(vocab_size, top_p):
    """The logits have few likely tokens, many, and ties, of which the first are kept."""
    noise = 3 * torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0))
    for logits in (noise, 3 * noise, noise.round(), (noise > 2).float(), torch.zeros(3, vocab_size)):
        expected = sorted_distribution(logits, top_p)
        ours = compute_probs(logits, 1.0, TokenFilters(top_p=top_p))
        assert torch.equal(ours > 0, expected > 0)
        torch.testing.assert_close(ours, expected, atol=0, rtol=1e-5)


def test_top_p_compiled():
    """A compiled sampler, which sorts as on a GPU so that the host need not wait, gives the same distribution."""
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    ours = torch.compile(compute_probs, fullgraph=True)(logits, 1.0, TokenFilters(top_p=0.7))
    torch.testing.assert_close(ours, sorted_distribution(logits, 0.7))


def test_options_that_change_nothing_are_off():
    """Options that change nothing equal the defaults, so sample can use the kernel of a GPU, and the scheduler samples
    such sequences together."""
    params = SamplingParams(0.8, top_p=1, min_p=0.0, repetition_penalty=1.1)
    assert params == SamplingParams(0.8, repetition_penalty=1.1) and params.filters == TokenFilters()
    for options in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert SamplingParams(0.8, **options).filters == TokenFilters(**options)
        assert active_fields(TokenFilters(**options)) == {*options}
        assert SamplingParams(0.0, **options).filters == TokenFilters()


@pytest.mark.parametrize("option", ["temperature", "top_k", "repetition_penalty"])
def test_numbers_beyond_64_bits_are_refused(option):
    for value in (2**63, 10**400):
        with pytest.raises(UsageError, match=f"{option} is too large"):
            SamplingParams(**{option: value})
    assert SamplingParams(top_k=2**63 - 1).top_k == 2**63 - 1


def test_no_kernel_draws_with_an_option_that_it_does_not_take():
    class MoreFilters(NamedTuple):
        top_p: float = 1.0
        top_n_sigma: float = 0.0

    for backend in (CPU_BACKEND, TRITON_BACKEND):
        assert has_sample_kernel(backend, MoreFilters(top_p=0.9))
        assert not has_sample_kernel(backend, MoreFilters(top_n_sigma=1.0))
    assert has_sample_kernel(CPU_BACKEND, TokenFilters(top_k=5))
    assert has_sample_kernel(TRITON_BACKEND, TokenFilters(top_p=0.9, min_p=0.1))
    assert not has_sample_kernel(TRITON_BACKEND, TokenFilters(top_k=5))
    assert not has_sample_kernel(TORCH_BACKEND, TokenFilters())


def test_greedy_takes_the_lowest_of_tied_tokens():
    ties = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(ties, SamplingParams()).tolist() == [1, 0]


ONE_TOKEN = [SamplingParams(1.0, top_k=1), SamplingParams(1.0, top_p=1e-9), SamplingParams(1e-9)]
ONE_TOKEN.append(SamplingParams(1e-300))


@pytest.mark.parametrize("params", ONE_TOKEN, ids=str)
def test_options_that_leave_only_the_likeliest(params):
    logits = torch.randn(500, 97, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, params), logits.argmax(-1))


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(1.0), SamplingParams(0.8, top_k=5, top_p=0.9)], ids=str
)
def test_rows_that_are_not_finite(params):
    logits = torch.randn(500, 97, generator=torch.Generator().manual_seed(0))
    logits[1, 5], logits[2, 6], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    assert (sample(logits, params) == INVALID_TOKEN).nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1.0}, {"temperature": torch.inf}, {"temperature": torch.nan}, {"top_k": 0}, {"top_p": 0.0},
     {"top_p": 1.1}, {"top_p": torch.nan}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}],
    ids=str,
)
def test_mistakes_are_named(fields):
    (name,) = fields
    with pytest.raises(UsageError, match=f"^{name} must be"):
        SamplingParams(**fields)

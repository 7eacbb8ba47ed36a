"""Speculative decoding gives the greedy tokens of the model itself, and samples from its distribution."""

import itertools
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import quantize
from engine import speculate as speculate_module
from engine.generation import DecodeLoop
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.speculate import (
    DraftModelProposer,
    NgramProposer,
    SpeculativeLoop,
    best_k,
    estimate_verify_cost,
    k_choices,
    rejection_sample,
)
from layers.backend import TORCH_BACKEND
from layers.kv_cache import KVCache
from layers.sampling import compute_probs
from loading import load_model
from tests.tiny import FAMILIES, call_main, convert, make_hf, to_ours
from utils.errors import UsageError

CPU = torch.device("cpu")
GREEDY = SamplingParams()

TEXT = torch.randint(3, 97, (20,), generator=torch.Generator().manual_seed(1)).tolist()
TEXT = TEXT + TEXT[:12]  # something to look up


def loop_of(model, draft, length: int, k: int, compile: bool = False) -> SpeculativeLoop:
    """The loop of generate.py, with caches of this length. Proposals cost nothing here, so each step has some."""
    if draft is None:
        proposer = NgramProposer(3, CPU)
    else:
        proposer = DraftModelProposer(ModelRunner(draft, KVCache(draft, 1, length), GREEDY, compile), model)
        proposer.cost = 0.0
    return SpeculativeLoop(ModelRunner(model, KVCache(model, 1, length), GREEDY, compile), proposer, k)


def plain(model, text: list[int], n: int) -> list[int]:
    """Returns the tokens without speculation."""
    runner = ModelRunner(model, KVCache(model, 1, len(text) + n), GREEDY)
    return [i for (i,) in DecodeLoop(runner).decode_tokens(torch.tensor([text]), n)]


def flat(tokens) -> list[int]:
    return [i for (i,) in tokens]


@pytest.fixture(scope="module")
def drafts(both_models, tmp_path_factory):
    """(family, name) -> draft"""

    @cache
    def make(family: str, name: str):
        if name == "lookup":
            return None
        if name == "itself":
            return to_ours(both_models(family)[0])
        if name == "random":  # another family, and less deep
            return to_ours(make_hf("llama2" if family != "llama2" else "qwen3", num_hidden_layers=1))
        folder = tmp_path_factory.mktemp(family)
        both_models(family)[0].save_pretrained(folder)
        call_main(quantize.main, "--checkpoint_path", convert(folder), "--mode", "int4")
        return load_model(folder / "model_int4.g32.pth", CPU, torch.float32)

    return make


@pytest.mark.parametrize("name", ["lookup", "itself", "random", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_models_own(family, name, both_models, drafts):
    model, draft = both_models(family)[1], drafts(family, name)
    expected = plain(model, TEXT, 40)
    for k in range(1, 9) if family == "llama3" else (1, 4, 8):
        loop = loop_of(model, draft, len(TEXT) + 39, k)  # not one place more than plain decoding takes
        loop.verify_cost = 0.1
        assert flat(loop.decode_tokens(torch.tensor([TEXT]), 40)) == expected
        sizes = loop.n_tokens_per_step
        assert sum(sizes) == 40 and max(sizes) <= k + 1
        assert loop.accept_counts() == [sizes[1:].count(n + 1) for n in range(k + 1)]
        if name == "itself":
            assert sizes[1:-1].count(k + 1) >= (39 // (k + 1)) - 1


@pytest.mark.parametrize("name", ["lookup", "int4"])
def test_a_text_goes_on_where_the_cache_ends(name, both_models, drafts):
    """A text is right if it begins with part of the text and answer in the cache, as in a conversation."""
    model, draft = both_models("llama3")[1], drafts("llama3", name)
    loop = loop_of(model, draft, 160, 4)
    answer = flat(loop.decode_tokens(torch.tensor([TEXT]), 21))
    for kept in (20, 7, 0):
        text = TEXT + answer[:kept] + TEXT[5:15]
        assert flat(loop.decode_tokens(torch.tensor([text]), 20, len(TEXT) + kept)) == plain(model, text, 20)
        flat(loop.decode_tokens(torch.tensor([TEXT]), 21, len(TEXT) - 1))


def test_another_generator_is_refused(both_models):
    """A seed could not give the text that it gives without speculation."""
    loop = loop_of(both_models("llama3")[1], None, 40, 4)
    prompt = torch.tensor([TEXT])
    with pytest.raises(UsageError, match="global generators"):
        flat(loop.decode_tokens(prompt, 9, generator=torch.Generator()))
    assert len(flat(loop.decode_tokens(prompt, 9, generator=torch.default_generator))) == 9


@pytest.mark.parametrize("family, use_kernels, k", [("qwen3", True, 3), ("qwen3", False, 3), ("mixtral", True, 10)])
def test_compiled(family, use_kernels, k, both_models):
    """With kernels, only a verification of 11 tokens is compiled, since that is more than they take."""
    model = both_models(family, use_kernels)[1]
    loop = loop_of(model, None, len(TEXT) + 20, k, compile=True)
    assert flat(loop.decode_tokens(torch.tensor([TEXT]), 20)) == plain(model, TEXT, 20)


# ---- Sampling -------------------------------------------------------------------------------------------------------

V = 5


def toy_logits(seed: int, never: int | None = None) -> torch.Tensor:
    """Returns float32 logits [V, V, V] that depend on the last two tokens: a model that is a table."""
    table = torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed))
    if never is not None:
        table[..., never] = -1e4  # with probability 0, in float32
    return table


def toy_probs(table: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return compute_probs(table.flatten(0, 1), params.temperature, params.filters).view_as(table)


class ToyRunner:
    """A ModelRunner whose model is a table, and whose cache holds the tokens of the text."""

    device = CPU

    def __init__(self, table: torch.Tensor, params: SamplingParams, text: list[int]):
        self.table, self.tokens = table, list(text)
        self.model = torch.nn.LayerNorm(1)  # its bytes are the cost, for draft and model
        self.model.config = SimpleNamespace(vocab_size=V, moe=None)
        self.sampler = Sampler(params, torch.zeros(1, len(text), dtype=torch.long), TORCH_BACKEND)
        self.prefill = self.decode = self.build_step(self.sampler)

    def fill_kv_cache(self, tokens, start_pos):
        self.tokens[int(start_pos) :] = tokens[0].tolist()

    def build_step(self, sampler):
        def step(tokens, start_pos, *inputs):
            self.fill_kv_cache(tokens, start_pos)
            before, after = [0, *self.tokens], self.tokens
            logits = self.table[before[int(start_pos) : len(after)], after[int(start_pos) :]]
            return sampler(logits[None], tokens, start_pos, *inputs)

        return step


@pytest.mark.parametrize(
    ("draft", "params", "samples"),
    [
        ("random", SamplingParams(0.8), 8000),
        ("random", SamplingParams(1.3, top_k=3), 4000),
        ("random", SamplingParams(1.0, top_p=0.7), 4000),
        ("never", SamplingParams(1.0), 4000),  # q = 0 where p > 0
        ("lookup", SamplingParams(0.8), 4000),
    ],
    ids=str,
)
def test_sampled_tokens_have_the_models_distribution(draft, params, samples):
    """The first three tokens have the probabilities of the model, by the chain rule and a chi-square test."""
    text = [*torch.randint(V, (60,), generator=torch.Generator().manual_seed(0)).tolist(), 0, 1]
    table = toy_logits(1)
    if draft == "lookup":
        proposer = NgramProposer(3, CPU)
    else:
        runner = ToyRunner(toy_logits(2, never=3 if draft == "never" else None), params, text)
        proposer = DraftModelProposer(runner, runner.model)
        proposer.cost = 0.0
    loop = SpeculativeLoop(ToyRunner(table, params, text), proposer, max_k=2)

    torch.manual_seed(0)
    counts, n_speculated = torch.zeros(V, V, V), 0
    for _ in range(samples):
        counts[tuple(flat(loop.decode_tokens(torch.tensor([text]), 3)))] += 1
        n_speculated += len(loop.n_tokens_per_step) < 3
    assert n_speculated > samples // 20  # speculation took part

    probs = toy_probs(table, params)
    p = torch.zeros(V, V, V)
    for a, b in itertools.product(range(V), repeat=2):
        p[a, b] = probs[0, 1, a] * probs[1, a, b] * probs[a, b]
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * samples
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    freedom = expected.numel() - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_rejection_sampling_keeps_what_both_agree_on():
    logits = torch.full((3, V), -30.0)
    logits[[0, 1, 2], [4, 2, 1]] = 30.0
    draft_probs = logits[:2].softmax(-1)
    for params in (GREEDY, SamplingParams(1.0)):
        q = None if params is GREEDY else draft_probs
        swapped = None if q is None else q[:, [0, 1, 3, 2, 4]]
        assert rejection_sample(logits, torch.tensor([4, 2]), q, params).tolist() == [2, 4, 2, 1]
        assert rejection_sample(logits, torch.tensor([4, 3]), swapped, params).tolist()[:3] == [1, 4, 2]
        bad = rejection_sample(logits * torch.nan, torch.tensor([4, 2]), q, params)
        assert bad[0] == 0 and bad[1] == -1


# ---- Proposals ------------------------------------------------------------------------------------------------------


def test_lookup_proposes_what_came_after():
    lookup = NgramProposer(3, CPU)

    def propose(text: str, k: int) -> str | None:
        proposal = lookup.propose(list(map(ord, text)), k)
        return proposal and "".join(map(chr, proposal.tokens.tolist()))

    assert propose("abcdxbcd", 2) == "xb"
    assert propose("abcdxbcdyxb", 3) == "cdy"  # two tokens will do
    assert propose("abcdxbcdyxbq", 3) is None
    lookup.rewind(0)
    assert propose("ababab", 5) == "ababa"  # and so on
    lookup.rewind(1)  # from here on another text: nothing of the first is left
    assert propose("babcbabdab", 2) == "da"
    lookup.rewind(10)  # the same text goes on, so all of the text is kept
    assert propose("babcbabdabd", 2) == "ab"


def test_the_number_of_tokens_follows_what_is_accepted():
    assert k_choices(5) == [1, 5] and k_choices(1) == [1]
    assert best_k([5, 2, 1], 1.0, 0.3) == 5
    assert best_k([5, 2, 1], 0.3, 0.2) == 1
    assert best_k([5, 2, 1], 0.05, 0.3) == 0
    assert best_k([], 1.0, 0.1) == 0
    rate = speculate_module.AcceptanceRate()
    first = rate.rate
    for _ in range(20):
        rate.update(n_accepted=0, is_rejected=True)
    assert rate.rate < 0.2
    for _ in range(200):
        rate.decay(speculate_module.IDLE_DECAY)  # after a while proposals are tried again
    assert abs(rate.rate - first) < 0.01


def test_experts_cost_more_to_verify(both_models):
    dense, moe = both_models("llama3")[1], both_models("mixtral")[1]
    assert estimate_verify_cost(dense) < 0.2 < estimate_verify_cost(moe) < 1
    of_dense, of_moe = (best_k([1, 2, 5], 0.3, estimate_verify_cost(model)) for model in (dense, moe))
    assert of_dense > of_moe

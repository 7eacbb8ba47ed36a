"""generate(), its steps and sample(): transformers' tokens, however the prompt is cut, batched, cached or compiled."""

import numpy as np
import pytest
import torch

import generate
import kernels
from tests.tiny import FAMILIES

GREEDY = {"temperature": 0, "top_k": None, "top_p": None}
SOME = ["llama3", "mistral-window", "mixtral"]


def prompt_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def run(steps, prompt: torch.Tensor, n: int, start: int = 0) -> torch.Tensor:
    """The n new tokens of every row: [B, n]."""
    return torch.tensor(list(generate.generate(*steps, prompt, start, n))).T


def steps_of(model, rows: int, length: int, **sampling):
    model.setup_caches(rows, length)
    return generate.build_steps(model, GREEDY | sampling, compile=False, compile_prefill=False)


def caches(model) -> torch.Tensor:
    return torch.stack([c for layer in model.layers for c in layer.attention.buffers()])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family, pair):
    theirs, ours = pair(family)
    theirs.generation_config.eos_token_id = None
    prompt = prompt_of(3, 50)
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(run(steps_of(ours, 3, 79), prompt, 30), expected[:, 50:])


@pytest.mark.parametrize("family", FAMILIES)
def test_rescoring_gives_the_same_log_probabilities(family, pair, monkeypatch):
    ours, prompt = pair(family)[1], prompt_of(3, 30)
    steps, logits, seen = steps_of(ours, 3, 64, temperature=1.0), ours.logits, []
    monkeypatch.setattr(ours, "logits", lambda x: seen.append(logits(x)) or seen[-1])
    torch.manual_seed(0)
    new = run(steps, prompt, 30)
    monkeypatch.undo()
    assert torch.unique(new).numel() > 20  # drawn, not stuck
    with torch.inference_mode():
        rescored = ours(torch.cat([prompt, new], 1), torch.arange(60))[:, 29:-1]
    seen, rescored = (x.log_softmax(-1).gather(-1, new[..., None]) for x in (torch.stack(seen, 1), rescored))
    torch.testing.assert_close(seen, rescored, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_rows_are_independent(family, pair):
    ours, prompt = pair(family)[1], prompt_of(3, 20)
    together = run(steps_of(ours, 3, 50), prompt, 30)
    alone = [run(steps_of(ours, 1, 50), row[None], 30) for row in prompt]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("family", SOME)
def test_what_the_cache_held_before_does_not_matter(family, pair):
    ours = pair(family)[1]
    steps = steps_of(ours, 2, 80)
    expected = run(steps, prompt_of(2, 5), 20)
    run(steps, prompt_of(2, 50), 30)
    assert torch.equal(run(steps, prompt_of(2, 5), 20), expected)
    for layer in ours.layers:
        for cache in layer.attention.buffers():
            cache.fill_(1e4)
    assert torch.equal(run(steps, prompt_of(2, 5), 20), expected)


@pytest.mark.parametrize("family", SOME)
def test_conversation_continues_from_the_cache(family, pair):
    ours, first, second = pair(family)[1], prompt_of(2, 21), prompt_of(2, 9)
    steps = steps_of(ours, 2, 80)
    answer = run(steps, first, 20)
    more = torch.cat([answer[:, -1:], second], 1)  # the last token of an answer has not been fed yet
    continued = run(steps, more, 20, start=40)
    whole = torch.cat([first, answer, second], 1)
    assert torch.equal(continued, run(steps_of(ours, 2, 80), whole, 20))


@pytest.mark.parametrize("chunk", [1, 5, 16, 49])
@pytest.mark.parametrize("family", SOME)
def test_prefill_in_chunks_is_prefill(family, chunk, pair, monkeypatch):
    ours, prompt = pair(family)[1], prompt_of(2, 50)
    expected, at_once = run(steps_of(ours, 2, 60), prompt, 10), caches(ours)
    monkeypatch.setattr(generate, "CHUNK", chunk)
    assert torch.equal(run(steps_of(ours, 2, 60), prompt, 10), expected)
    torch.testing.assert_close(caches(ours), at_once, atol=1e-5, rtol=1e-4)


def check_compiled(ours, rows: int, warm, lengths, **compile):
    """Compiled steps give the eager ones' tokens and, after the calls in warm, compile nothing more for lengths: both
    lists of (start, prompt tokens, new tokens). Returns dynamo's counters."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = steps_of(ours, rows, 64)
    run(eager, prompt_of(rows, 30), 34)  # something in the cache for start > 0
    steps = generate.build_steps(ours, GREEDY, **compile)
    for start, length, n in warm:
        run(steps, prompt_of(rows, length), n, start)
    with torch.compiler.set_stance("fail_on_recompile"):
        for start, length, n in lengths:
            tokens = run(steps, prompt_of(rows, length), n, start)
            assert torch.equal(tokens, run(eager, prompt_of(rows, length), n, start))
    return torch._dynamo.utils.counters


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_compiled_decode(family, fast, rows, pair):
    lengths = [(0, 1, 2), (0, 9, 20), (29, 2, 9), (0, 40, 24)]
    counters = check_compiled(pair(family, fast)[1], rows, [(0, 3, 3)], lengths, compile=True, compile_prefill=False)
    assert not counters["graph_break"]
    # one block for all layers, and the head; nothing where kernels.cpp's operations do the work
    assert counters["stats"]["unique_graphs"] == (0 if fast and kernels.build() else 2)


@pytest.mark.parametrize("family", ["llama3", "mixtral", "qwen3"])
def test_kernels_compile(family, pair):
    """torch.compile of a whole model whose blocks are kernels.cpp's operations: no graph break, the same logits."""
    ours = pair(family)[1]
    ours.setup_caches(1, 20)
    step = torch.compile(ours, fullgraph=True)
    for i in range(4):
        token, position = torch.tensor([[i + 5]]), torch.tensor([i])
        with torch.inference_mode():
            torch.testing.assert_close(step(token, position), ours(token, position))


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_compiled_prefill(family, pair, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 16)
    warm, lengths = [(5, 9, 1)], [(0, 2, 9), (0, 11, 9), (29, 5, 9), (0, 1, 9), (0, 63, 2)]
    counters = check_compiled(pair(family)[1], 2, warm, lengths, compile=False, compile_prefill=True)
    if family == "llama3":  # a mixture reads on the host which experts are in use
        assert not counters["graph_break"]


def distribution(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """What sample() must draw from: the probabilities of one row, the slow and plain way."""
    weights = np.exp(logits.double().numpy() / temperature)
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
    if top_p is not None:
        total, kept = sum(weights[i] for i in ranked), []
        for i in ranked:
            if sum(weights[j] for j in kept) / total >= top_p:
                break
            kept.append(i)
        ranked = kept
    probs = np.zeros(len(weights))
    probs[ranked] = weights[ranked] / weights[ranked].sum()
    return probs


@pytest.mark.parametrize(
    "temperature, top_k, top_p, compiled",
    [
        (1.0, None, None, False),
        (0.5, None, None, False),
        (2.0, 3, None, False),
        (1.0, 1, None, False),
        (1.0, 12, 1.0, False),
        (1.0, 100, None, False),
        (1.0, None, 0.7, False),
        (1.5, None, 1e-6, False),
        (0.7, 5, 0.8, False),  # 0.8 of what top_k left
        (0.7, 5, 0.8, True),
    ],
)
def test_sample_draws_from_the_filtered_distribution(temperature, top_k, top_p, compiled):
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    expected = distribution(logits, temperature, top_k, top_p)
    draw, n = torch.compile(generate.sample, fullgraph=True) if compiled else generate.sample, 100_000
    batches = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches.append(draw(logits.expand(n, 12), temperature, top_k, top_p))
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2]) == (expected.max() == 1)
    shares = torch.bincount(batches[0], minlength=12).numpy() / n
    assert ((shares > 0) == (expected > 0)).all()
    assert (abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()


def test_sample_edges():
    ties = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert generate.sample(ties, 0).tolist() == [1, 0]
    logits = torch.randn(500, 97, generator=torch.Generator().manual_seed(0))
    for options in ((1.0, 1, None), (1.0, None, 1e-9), (1e-9, None, None), (1e-300, None, None)):
        assert torch.equal(generate.sample(logits, *options), logits.argmax(-1)), options
    logits[1, 5], logits[2, 6], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    for options in ((0, None, None), (1.0, None, None), (0.8, 5, 0.9)):
        assert (generate.sample(logits, *options) == -1).nonzero().flatten().tolist() == [1, 2, 3]

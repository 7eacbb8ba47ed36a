"""DecodeLoop gives transformers' tokens, whether the prompt is cut into chunks, batched, cached or compiled."""

import gc
import weakref
from functools import partial
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from engine import runner as runner_module
from engine import sampler
from engine.generation import DecodeLoop, run_one_step_ahead
from engine.runner import ModelRunner, choose_mode
from engine.sampling_params import SamplingParams
from kernels import build
from layers.kv_cache import KVCache, kv_bytes_per_token
from tests.tiny import FAMILIES

SOME = ["llama3", "mistral-window", "mixtral"]  # dense, with a window, of experts
GREEDY = SamplingParams()


def prompt_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(length))


def new_tokens(runner, prompt: torch.Tensor, n: int, n_cached: int = 0) -> torch.Tensor:
    """Returns the new tokens, [B, n]."""
    return torch.tensor(list(DecodeLoop(runner).decode_tokens(prompt, n, n_cached))).T


def fresh_runner(model, rows: int, length: int, params: SamplingParams = GREEDY):
    return ModelRunner(model, KVCache(model, rows, length), params)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family, both_models):
    theirs, ours = both_models(family)
    theirs.generation_config.eos_token_id = None
    prompt = prompt_of(3, 50)
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(new_tokens(fresh_runner(ours, 3, 79), prompt, 30), expected[:, 50:])


@pytest.mark.parametrize("family", FAMILIES)
def test_rescoring_gives_the_same_log_probabilities(family, both_models, monkeypatch):
    ours, prompt = both_models(family)[1], prompt_of(3, 30)
    seen = []

    def sample_and_note(logits, *options):
        seen.append(logits.clone())  # the next step overwrites the logits
        return sample(logits, *options)

    sample = sampler.sample
    monkeypatch.setattr(sampler, "sample", sample_and_note)
    torch.manual_seed(0)
    new = new_tokens(fresh_runner(ours, 3, 64, SamplingParams(temperature=1.0)), prompt, 30)
    assert torch.unique(new).numel() > 20  # tokens are drawn, and differ
    with torch.inference_mode():
        rescored = ours(torch.cat([prompt, new], 1), torch.zeros(3, dtype=torch.long), KVCache(ours, 3, 60))
    seen, rescored = torch.stack(seen, 1), rescored[:, 29:-1]
    seen, rescored = (x.log_softmax(-1).gather(-1, new[..., None]) for x in (seen, rescored))
    torch.testing.assert_close(seen, rescored, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_rows_are_independent(family, both_models):
    ours = both_models(family)[1]
    for rows, length, n in [(3, 20, 30), (16, 3, 12)]:
        prompt = prompt_of(rows, length)
        together = new_tokens(fresh_runner(ours, rows, 50), prompt, n)
        alone = [new_tokens(fresh_runner(ours, 1, 50), row[None], n) for row in prompt]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("family", SOME)
def test_old_contents_of_the_cache_do_not_matter(family, both_models):
    ours = both_models(family)[1]
    kv_cache = KVCache(ours, 2, 80)
    runner = ModelRunner(ours, kv_cache, GREEDY)
    expected = new_tokens(runner, prompt_of(2, 5), 20)
    new_tokens(runner, prompt_of(2, 50), 30)
    assert torch.equal(new_tokens(runner, prompt_of(2, 5), 20), expected)
    for layer in kv_cache.layers:
        layer.k.fill_(1e4)
        layer.v.fill_(1e4)
    assert torch.equal(new_tokens(runner, prompt_of(2, 5), 20), expected)


@pytest.mark.parametrize("family", SOME)
def test_the_size_of_a_cache_is_known_before_it_is_allocated(family, both_models):
    ours = both_models(family)[1]
    layers = KVCache(ours, 2, 7).layers
    assert 2 * 7 * kv_bytes_per_token(ours) == sum(layer.k.nbytes + layer.v.nbytes for layer in layers)


def test_a_cache_that_nothing_uses_is_freed_at_once(both_models):
    """No KV cache is part of a reference cycle, although captured steps refer to it."""
    model = both_models("llama3")[1]
    kv_cache = KVCache(model, 1, 12)
    runner = ModelRunner(model, kv_cache, SamplingParams())
    new_tokens(runner, prompt_of(1, 5), 4)
    is_alive = weakref.ref(kv_cache)
    gc.disable()
    try:
        del kv_cache, runner
        assert is_alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("n", [1, 3])
def test_on_a_gpu_a_step_is_queued_before_the_host_waits_for_the_last_one(n, monkeypatch):
    """The class Event has only the methods of torch.cuda.Event. Tokens are in the copy on the host once its Event is
    complete."""
    calls, copies, event_class = [], [], torch.cuda.Event

    def new_event():
        event, i = create_autospec(event_class, instance=True), len(copies) - 1
        event.record.side_effect = lambda: calls.append(f"record {i}")
        event.synchronize.side_effect = lambda: (calls.append(f"wait {i}"), copies[i].fill_(i))
        return event

    def to_host(device, non_blocking):
        copies.append(torch.full((2,), -7))
        return copies[-1]

    def generate_steps():
        for i in range(n):
            calls.append(f"queue {i}")
            yield SimpleNamespace(to=to_host)

    monkeypatch.setattr(torch.cuda, "Event", new_event)
    tokens = [tokens.tolist() for tokens in run_one_step_ahead(generate_steps())]
    assert tokens == [[i, i] for i in range(n)]
    expected = ["queue 0", "record 0"]
    for i in range(1, n):
        expected += [f"queue {i}", f"record {i}", f"wait {i - 1}"]
    assert calls == [*expected, f"wait {n - 1}"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_random_numbers_are_those_of_single_draws(batch_size, both_models):
    """rand_per_step draws the numbers of all steps at once. They equal those that a Scheduler draws one by one."""
    runner = fresh_runner(both_models("llama3")[1], batch_size, 8, SamplingParams(1.0))
    drawn = list(runner.rand_per_step(300, batch_size, torch.Generator().manual_seed(5)))
    generator = torch.Generator().manual_seed(5)
    singles = [torch.rand(1, dtype=torch.float64, generator=generator) for _ in range(300 * batch_size)]
    assert torch.equal(torch.stack(drawn), torch.cat(singles).view(300, batch_size, 1))


def test_modes_of_a_step():
    """A step has the mode that the table of engine/runner.py says, for each device."""
    for device, has_kernels, expected in [
        ("cpu", True, ["cpu_graph", "cpu_graph"]),
        ("cpu", False, ["eager", "compiled"]),
        ("cuda", True, ["eager", "cuda_graph"]),
        ("cuda", False, ["eager", "compiled"]),
        ("mps", False, ["eager", "compiled"]),
    ]:
        for compile, mode in zip((False, True), expected, strict=True):
            assert choose_mode(has_kernels, device, compile) == mode


@pytest.mark.parametrize("family", SOME)
def test_conversation_continues_from_the_cache(family, both_models):
    ours, first, second = both_models(family)[1], prompt_of(2, 21), prompt_of(2, 9)
    runner = fresh_runner(ours, 2, 80)
    answer = new_tokens(runner, first, 20)
    whole = torch.cat([first, answer, second], 1)
    continued = new_tokens(runner, whole, 20, n_cached=40)  # the last token of the answer has not been fed yet
    assert torch.equal(continued, new_tokens(fresh_runner(ours, 2, 80), whole, 20))


@pytest.mark.parametrize("family", SOME)
def test_two_caches_of_one_model(family, both_models):
    """The steps of two caches can take turns."""
    ours, prompts = both_models(family)[1], [prompt_of(1, 12), prompt_of(1, 30)]
    alone = [new_tokens(fresh_runner(ours, 1, 60), prompt, 20)[0].tolist() for prompt in prompts]
    turns = [DecodeLoop(fresh_runner(ours, 1, 60)).decode_tokens(prompt, 20) for prompt in prompts]
    in_turn = [[], []]
    for _ in range(20):
        for k, turn in enumerate(turns):
            in_turn[k] += next(turn)
    assert in_turn == alone


@pytest.mark.parametrize("chunk", [1, 5, 16, 49])
@pytest.mark.parametrize("family", SOME)
def test_prefill_in_chunks_is_prefill(family, chunk, both_models, monkeypatch):
    ours, prompt = both_models(family)[1], prompt_of(2, 50)

    def tokens_and_cache():
        kv_cache = KVCache(ours, 2, 60)
        tokens = new_tokens(ModelRunner(ours, kv_cache, GREEDY), prompt, 10)
        return tokens, torch.stack([t for layer in kv_cache.layers for t in (layer.k, layer.v)])

    expected, expected_cache = tokens_and_cache()
    monkeypatch.setattr(runner_module, "CPU_PREFILL_CHUNK_TOKENS", 2 * chunk)  # of two sequences
    tokens, cache = tokens_and_cache()
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(cache, expected_cache, atol=1e-5, rtol=1e-4)


def check_compiled(ours, rows: int, warm, cases, **compile):
    """Checks that compiled steps give the tokens of eager ones, and that after the calls in warm, nothing more is
    compiled for cases. Both are lists of (start, prompt tokens, new tokens). Returns the counters of dynamo."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager_cache, cache = KVCache(ours, rows, 64), KVCache(ours, rows, 64)
    eager, compiled = ModelRunner(ours, eager_cache, GREEDY), ModelRunner(ours, cache, GREEDY, **compile)
    for start, length, n in warm:
        new_tokens(compiled, prompt_of(rows, start + length), n, start)
    new_tokens(eager, prompt_of(rows, 30), 34)  # something in the cache for start > 0
    for layer, eager_layer in zip(cache.layers, eager_cache.layers, strict=True):
        layer.k.copy_(eager_layer.k)
        layer.v.copy_(eager_layer.v)
    with torch.compiler.set_stance("fail_on_recompile"):
        for start, length, n in cases:
            tokens = new_tokens(compiled, prompt_of(rows, start + length), n, start)
            assert torch.equal(tokens, new_tokens(eager, prompt_of(rows, start + length), n, start))
    return torch._dynamo.utils.counters


@pytest.fixture
def without_inductor(monkeypatch):
    """torch.compile captures and guards graphs, but runs them in PyTorch, since Inductor takes long."""

    torch_compile = torch.compile

    def compile(function, mode=None, **options):
        return torch_compile(function, backend="eager", **options)

    return partial(monkeypatch.setattr, torch, "compile", compile)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_compiled_decode(family, use_kernels, rows, both_models, without_inductor):
    if (family, rows) not in (("llama3", 3), ("mixtral", 1)):  # a dense model of one row is in test_speculative.py
        without_inductor()
    cases = [(0, 1, 2), (0, 9, 20), (29, 2, 9), (0, 40, 24)]
    counters = check_compiled(both_models(family, use_kernels)[1], rows, [(0, 3, 3)], cases, compile=True)
    assert not counters["graph_break"]
    # one block for all layers, and the head; nothing where the kernels do the work
    assert counters["stats"]["unique_graphs"] == (0 if use_kernels and build.load_cpp_kernels() else 2)


@pytest.mark.parametrize("family", ["llama3", "mixtral", "qwen3"])
def test_kernels_compile(family, both_models):
    """torch.compile of a model with kernels has no graph break, and gives the same logits."""
    ours = both_models(family)[1]
    # One family goes all the way to machine code. The others show that calls are captured without a break.
    step = torch.compile(ours, fullgraph=True, backend="inductor" if family == "qwen3" else "aot_eager")
    kv_cache, compiled_cache = KVCache(ours, 1, 20), KVCache(ours, 1, 20)
    for i in range(4):
        token, position = torch.tensor([[i + 5]]), torch.tensor([i])
        with torch.inference_mode():
            expected = ours(token, position, kv_cache)
            torch.testing.assert_close(step(token, position, compiled_cache), expected)


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_compiled_prefill(family, both_models, monkeypatch, without_inductor):
    if family == "mixtral":  # its experts are not compiled, and its other layers are those of llama3
        without_inductor()
    monkeypatch.setattr(runner_module, "CPU_PREFILL_CHUNK_TOKENS", 2 * 16)  # of two sequences
    warm, cases = [(5, 9, 1)], [(0, 2, 9), (0, 11, 9), (29, 5, 9), (0, 1, 9), (0, 63, 2)]
    counters = check_compiled(both_models(family)[1], 2, warm, cases, compile_prefill=True)
    if family == "llama3":  # a mixture reads on the host which experts are in use
        assert not counters["graph_break"]


def test_compiled_prefill_with_kernels(both_models, monkeypatch, without_inductor):
    """A compiled prefill, with more tokens in a chunk than in a step, uses the kernels for prompts if there are any."""
    without_inductor()
    monkeypatch.setattr(runner_module, "CPU_PREFILL_CHUNK_TOKENS", 2 * 40)  # of two sequences
    cases = [(0, 37, 9), (29, 34, 1), (0, 63, 1)]
    counters = check_compiled(both_models("llama3", True)[1], 2, [(5, 49, 1)], cases, compile_prefill=True)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] > 0

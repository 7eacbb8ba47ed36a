"""Scheduler: each of many prompts gets the text that it gets alone, and no token is computed twice or in vain."""

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.async_engine import AsyncEngine, GenerationError
from engine.generation import DecodeLoop
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, sample_batch
from engine.sequence import Sequence, build_sequence
from formats import MXFP4, Float8, Int4, Int8
from layers.backend import TORCH_BACKEND
from layers.kv_cache import KVCache
from layers.linear import quantizable_linears
from layers.packing import pack_model
from layers.sampling import sample
from llm import LLM
from loading import load
from model import Transformer
from tests.tiny import make_hf, to_ours
from text.tokenizer import StopStringFinder
from utils.errors import UsageError

FAMILIES = ["llama3", "mixtral", "gemma3", "qwen2-moe", "gpt-oss"]


def make_prompts(n: int) -> list[list[int]]:
    """Returns prompts of many lengths, some longer than a window. Some begin alike, one is the beginning of another,
    and two are equal."""
    rng = random.Random(0)
    shared = [rng.randrange(97) for _ in range(25)]
    prompts = []
    for _ in range(n):
        own = [rng.randrange(97) for _ in range(rng.randrange(1, 12))]
        prompts.append(shared[: rng.randrange(26)] + own)
    return [*prompts, prompts[0], prompts[1][:-1] or [5]]


def run_alone(model: Transformer, prompt: list[int], n: int) -> list[int]:
    runner = ModelRunner(model, KVCache(model, 1, len(prompt) + n), SamplingParams())
    return [ids[0] for ids in DecodeLoop(runner).decode_tokens(torch.tensor([prompt]), n)]


def run(scheduler: Scheduler, sequences: list[Sequence]) -> list[list[int]]:
    """Returns the new tokens of each sequence."""
    tokens = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        scheduler.submit(sequence)
    while scheduler.has_unfinished_sequences():
        for update in scheduler.step():
            tokens[update.sequence] += update.new_ids
    assert list(tokens.values()) == [sequence.new_ids for sequence in sequences]
    return list(tokens.values())


@contextlib.contextmanager
def count_computed(model: Transformer) -> Iterator[list[int]]:
    """Yields a list of how many tokens each forward has computed."""
    n_computed = []
    hook = model.layers[0].register_forward_hook(lambda layer, args, y: n_computed.append(y.shape[0] * y.shape[1]))
    try:
        yield n_computed
    finally:
        hook.remove()


@pytest.mark.parametrize("use_kernels", [True, False], ids=["kernels", "PyTorch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_gets_what_it_gets_alone(family, use_kernels, both_models):
    _, model = both_models(family, use_kernels)
    prompts = make_prompts(7)
    lengths = [random.Random(i).randrange(1, 9) for i in range(len(prompts))]
    expected = [run_alone(model, prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]
    for n_rows, chunk_tokens in ((1, 512), (3, 512), (20, 512), (3, 5), (20, 1)):
        scheduler = Scheduler(model, n_rows, 48, chunk_tokens=chunk_tokens)
        for order in (range(9), (4, 8, 0, 2, 6, 1, 7, 3, 5)):  # the second time, rows hold other prompts' tokens
            found = run(scheduler, [Sequence(prompts[i], lengths[i]) for i in order])
            assert found == [expected[i] for i in order]


def test_a_conversation_that_has_moved_goes_on(both_models):
    """A conversation goes on after its sequence has moved to another slot. The old one holds only the tokens from
    before the move."""
    _, model = both_models("llama3", True)
    short, moving, other = [1, 2, 3], [4, 5, 6, 7], [9, 8, 7, 6]
    scheduler = Scheduler(model, 2, 48)
    _, new = run(scheduler, [Sequence(short, 2), Sequence(moving, 12)])
    prompts = [other, [*moving, *new, 5]]  # the first takes the slot where the sequence ended
    found = run(scheduler, [Sequence(prompt, 8) for prompt in prompts])
    assert found == [run_alone(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("format", [Int8(), Int4(32), Float8(), MXFP4()], ids=["int8", "int4", "fp8", "mxfp4"])
def test_quantized(format):
    model = to_ours(make_hf("llama3"), use_kernels=False)
    for _, linear in quantizable_linears(model):
        linear.format = format
        for name, tensor in format.quantize(linear.weight).items():
            linear.set_tensor(name, tensor)
    pack_model(model)
    prompts = make_prompts(4)
    found = run(Scheduler(model, 4, 48), [Sequence(prompt, 8) for prompt in prompts])
    assert found == [run_alone(model, prompt, 8) for prompt in prompts]


def test_end_tokens_and_cancelled_sequences_leave_the_others_alone(both_models):
    _, model = both_models("llama3", True)
    prompts = make_prompts(6)
    expected = [run_alone(model, prompt, 8) for prompt in prompts]
    end = expected[2][3]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in expected]
    scheduler = Scheduler(model, 3, 48)
    sequences = [Sequence(prompt, 8, eos_ids={end}) for prompt in prompts]
    for sequence in sequences:
        scheduler.submit(sequence)
    found = {sequence: [] for sequence in sequences}
    while scheduler.has_unfinished_sequences():
        for update in scheduler.step():
            found[update.sequence] += update.new_ids
        if len(found[sequences[0]]) == 2:
            scheduler.cancel(sequences[0])  # runs
            scheduler.cancel(sequences[7])  # waits
    assert found[sequences[0]] == expected[0][:2] and found[sequences[7]] == []
    for i in (1, 2, 3, 4, 5, 6):
        assert found[sequences[i]] == expected[i]


def test_random_numbers_are_a_prompts_own(both_models):
    """A prompt's text depends on its seed, not on its row or on other prompts."""
    _, model = both_models("llama3", True)
    prompts, params = make_prompts(6), SamplingParams(temperature=1.0, top_p=0.9)

    def sample(n_rows: int, order: list[int]) -> dict[int, list[int]]:
        sequences = [Sequence(prompts[i], 8, params, seed=i) for i in order]
        return dict(zip(order, run(Scheduler(model, n_rows, 48), sequences), strict=True))

    first = sample(3, [0, 1, 2, 3, 4, 5, 6, 7])
    assert first == sample(8, [5, 4, 7, 6, 0, 1, 3, 2]) and first[0] != first[6]  # the same prompt, another seed
    (greedy, sampled) = run(
        Scheduler(model, 2, 48),
        [Sequence(prompts[1], 8), Sequence(prompts[1], 8, params, seed=1)],  # two sets of options
    )
    assert sampled == first[1] and greedy == run_alone(model, prompts[1], 8)


def test_the_likeliest_token_takes_no_random_numbers():
    sequences = [Sequence([1], 1, params, seed=0) for params in (SamplingParams(), SamplingParams(1.0))]
    states = [sequence.generator.get_state() for sequence in sequences]
    sample_batch(torch.randn(2, 50), sequences)
    is_same = [torch.equal(s.generator.get_state(), state) for s, state in zip(sequences, states, strict=True)]
    assert is_same == [True, False]


def test_nothing_is_computed_twice_or_in_vain(both_models):
    _, model = both_models("llama3", False)
    shared = list(range(20, 50))
    with count_computed(model) as n_computed:
        run(Scheduler(model, 4, 64), [Sequence([*shared, 50 + i, 3], 1 + i) for i in range(6)])
    prefilled = len(shared) + 6 * 2
    decoded = sum(range(6))  # the first new token of each comes from prefill
    assert sum(n_computed) == prefilled + decoded


def test_a_text_stays_for_later_prompts_as_long_as_another_slot_is_older(both_models):
    _, model = both_models("llama3", False)
    scheduler = Scheduler(model, 3, 64)
    texts = [list(range(start, start + 20)) for start in (0, 20, 40, 60)]

    def n_prefilled(*prompts: list[int], n: int = 1) -> int:
        """Computes n new tokens for each prompt, the first one by prefill. Returns how many tokens all prefills
        computed."""
        with count_computed(model) as n_computed:
            run(scheduler, [Sequence(prompt, n) for prompt in prompts])
        return sum(n_computed) - len(prompts) * (n - 1)

    assert n_prefilled(texts[0]) == n_prefilled(texts[1]) == 20  # one after the other, in two slots
    assert n_prefilled([*texts[0], 90], n=4) == 1  # takes the slot of the text that the prompt continues
    assert n_prefilled(texts[2]) == 20  # the third slot
    assert n_prefilled(texts[3]) == 20  # in place of the oldest text, which is texts[1]
    assert n_prefilled([*texts[0], 91]) == n_prefilled([*texts[2], 92]) == n_prefilled([*texts[3], 93]) == 1
    assert n_prefilled(texts[1]) == 20


def test_moving_a_sequence_loses_no_text(both_models):
    """A sequence that moves to the slot of an ended one swaps places with its text."""
    _, model = both_models("llama3", False)
    scheduler = Scheduler(model, 2, 64)
    first, second = list(range(20)), list(range(30, 50))
    run(scheduler, [Sequence(first, 2), Sequence(second, 9)])  # the second one moves
    with count_computed(model) as n_computed:
        found = run(scheduler, [Sequence([*first, 60], 3), Sequence([*second, 61], 3)])
    assert n_computed[:2] == [1, 1]  # the last token of each prompt
    assert found == [run_alone(model, [*first, 60], 3), run_alone(model, [*second, 61], 3)]


def test_a_long_prompt_does_not_stall_the_others(both_models):
    _, model = both_models("llama3", False)
    scheduler = Scheduler(model, 3, 64, chunk_tokens=8)
    running, long, short = Sequence([1, 2, 3], 30), Sequence(list(range(50)), 2), Sequence([4, 5], 2)
    scheduler.submit(running)
    scheduler.step()
    scheduler.submit(long)
    scheduler.submit(short)
    with count_computed(model) as n_computed:
        while scheduler.has_unfinished_sequences():
            scheduler.step()
    # Between two decode steps, which compute one token of each sequence, there is one chunk of 8 or fewer. The short
    # prompt follows the last 2 of the long one.
    assert n_computed[:15] == [8, 1, 8, 1, 8, 1, 8, 1, 8, 1, 8, 1, 2, 2, 3]
    for sequence in (running, long, short):
        assert sequence.new_ids == run_alone(model, sequence.prompt_ids, sequence.max_new_tokens)


class CountSoftmax(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.name() == "aten::_softmax"
        return func(*args, **kwargs or {})


def test_sequences_of_different_temperatures_are_sampled_in_one_pass():
    """Each sequence is sampled as it is alone. Sequences that differ in other options are sampled in groups."""
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(0))
    all_params = [SamplingParams(0.1 * i, top_k=20 if i > 8 else None, repetition_penalty=1 + i / 9) for i in range(16)]

    def sample_together(rows: list[int]) -> tuple[list[int], int]:
        with CountSoftmax() as count:
            ids = sample_batch(logits[rows], [Sequence([1], 1, all_params[i], seed=i) for i in rows])
        return ids.tolist(), count.n

    alone = []
    for i, params in enumerate(all_params):
        uniform = torch.rand(1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        row, backend = logits[i : i + 1], TORCH_BACKEND
        alone += sample(row, params.temperature, params.filters, backend, uniform).tolist()
    assert sample_together(list(range(16))) == (alone, 2)  # greedy without a softmax; with top_k; without
    assert sample_together([15, 0, 3, 12]) == ([alone[i] for i in (15, 0, 3, 12)], 2)
    assert sample_together([5, 4]) == ([alone[5], alone[4]], 1)


@pytest.mark.parametrize("use_kernels", [True, False], ids=["kernels", "PyTorch"])
def test_logits_that_are_not_finite_end_one_sequence(use_kernels):
    """Other sequences, and later ones in the same slot, get the tokens that they get alone."""
    model = to_ours(make_hf("llama3", tie_word_embeddings=False), use_kernels)
    prompts = make_prompts(6)
    expected = [run_alone(model, prompt, 8) for prompt in prompts]
    rest = {*range(97)}.difference(*prompts, *expected)
    model.embed_tokens.weight[max(rest)] = torch.nan
    bad = [Sequence([*range(30), max(rest)], 8), Sequence([max(rest)], 8)]
    good = [Sequence(prompt, 8) for prompt in prompts]
    scheduler = Scheduler(model, 3, 48)
    for sequence in (bad[0], *good[:3], bad[1], *good[3:]):
        scheduler.submit(sequence)
    while scheduler.has_unfinished_sequences():
        scheduler.step()
    assert [sequence.new_ids for sequence in good] == expected
    for sequence in bad:
        assert sequence.new_ids == [] and sequence.finish_reason == "error" and "not finite" in sequence.error


def test_a_prompt_that_is_cancelled_leaves_no_nan():
    """NaN in the slot of a cancelled prompt does not reach the next one, although none of its logits were checked, and
    attention in PyTorch multiplies with masked values."""
    model = to_ours(make_hf("llama3", tie_word_embeddings=False), use_kernels=False)
    prompts, expected = [[1, 2, 3], [4, 5]], [run_alone(model, [1, 2, 3], 30), run_alone(model, [4, 5], 5)]
    unused = max({*range(97)}.difference(*prompts, *expected))
    model.embed_tokens.weight[unused] = torch.nan
    running, cancelled, good = Sequence(prompts[0], 30), Sequence([unused] * 20, 4), Sequence(prompts[1], 5)
    scheduler = Scheduler(model, 2, 48, chunk_tokens=4)
    for sequence in (running, cancelled):
        scheduler.submit(sequence)
    for _ in range(6):
        scheduler.step()
    assert scheduler.slots[1].is_prefilling and len(scheduler.slots[1].cached_ids) > 2
    scheduler.cancel(cancelled)
    scheduler.submit(good)
    while scheduler.has_unfinished_sequences():
        scheduler.step()
    assert [running.new_ids, good.new_ids] == expected


def test_logprobs(both_models):
    """One forward over prompt and answer gives the same log-probabilities, for every sampling."""
    _, model = both_models("llama3", True)
    prompts = make_prompts(2)
    scheduler = Scheduler(model, 2, 48)
    for prompt, params in zip(prompts, (SamplingParams(), SamplingParams(1.5, top_k=3)), strict=False):
        scheduler.submit(Sequence(prompt, 5, params, n_logprobs=4))
    found = [[], []]
    while scheduler.has_unfinished_sequences():
        for update in scheduler.step():
            found[prompts.index(update.sequence.prompt_ids)].append(update)
    for prompt, answer in zip(prompts, found, strict=False):
        ids = [*prompt, *(update.new_ids[0] for update in answer)]
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1]]), torch.tensor([0]), KVCache(model, 1, len(ids)))[0]
        expected = logits[len(prompt) - 1 :].log_softmax(-1)
        for update, logprobs in zip(answer, expected, strict=True):
            (found_logprobs,), (token,) = update.logprobs, update.new_ids
            values, tokens = logprobs.topk(4)
            assert found_logprobs.logprob == pytest.approx(logprobs[token].item(), abs=1e-4)
            assert [token for token, _ in found_logprobs.top] == tokens.tolist()
            assert [value for _, value in found_logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_sequences_that_do_not_fit_are_refused(both_models):
    _, model = both_models("llama3", True)
    scheduler = Scheduler(model, 2, 16)
    with pytest.raises(UsageError, match="12 prompt tokens and 5 new ones exceed the context of 16 tokens"):
        scheduler.submit(Sequence([5] * 12, 5))
    with pytest.raises(UsageError, match="empty"):
        scheduler.submit(Sequence([], 5))
    assert not scheduler.has_unfinished_sequences() and scheduler.step() == []


# ---- Text -----------------------------------------------------------------------------------------------------------


def test_generate_many(recall_model):
    generate_many = LLM(recall_model / "model.pth", "cpu", torch.float32).generate_many
    prompts = ["S", "0", "W", "0123", "P"]
    found = list(generate_many(prompts, parallel=2, max_new_tokens=6, stop=("78", "X")))
    assert found == [(0, "🙂E"), (1, "123456"), (2, " "), (3, "456"), (4, "")]
    with pytest.raises(UsageError, match="context"):
        list(generate_many(["0" * 300], max_new_tokens=6))
    with pytest.raises(UsageError, match="prompt 1: a prompt of 9000 characters exceeds the model's context of"):
        list(generate_many(["S", "0" * 9000], max_new_tokens=6))
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1, not 0"):
        list(generate_many(["S"], max_new_tokens=0))
    for wrong in ([{"role": "user"}], [{"role": "user", "content": None}], ["Hi"]):
        with pytest.raises(UsageError, match="prompt 1: .*message.* not "):
            list(generate_many(["S", wrong], max_new_tokens=6))
    with pytest.raises(UsageError, match="prompt 0: the prompt is empty"):
        list(generate_many([""], max_new_tokens=6))
    with pytest.raises(UsageError, match="prompt 0: the prompt is not valid UTF-8"):
        list(generate_many(["\ud800"], max_new_tokens=6))
    assert list(generate_many([])) == []
    with pytest.raises(UsageError, match="parallel must be at least 1, not 0"):
        list(generate_many(["S"], parallel=0))
    largest_seed = list(generate_many(["abc", "abc"], max_new_tokens=20, seed=2**64 - 1))
    assert len(largest_seed) == 2  # the second seed has 65 bits


def test_callers_in_asyncio(recall_model):
    """Each caller gets its text, although one stops early and a step fails. In the end, all slots are free."""
    model, tokenizer = load(recall_model / "model.pth", dtype=torch.float32)
    engine = AsyncEngine(scheduler := Scheduler(model, 2, 64))

    def start(text: str, n: int = 6) -> Sequence:
        return build_sequence(text, tokenizer, model.config, n)

    async def text_of(text: str, n_steps: int = 100) -> str:
        found, sequence = "", start(text)
        async with contextlib.aclosing(engine.generate([sequence])) as steps:
            async for updates in steps:
                found += "".join(update.text for update in updates)
                n_steps -= 1
                if n_steps == 0:
                    return found
        assert found == sequence.text
        return found

    async def check():
        assert await asyncio.gather(*map(text_of, ["S", "0", "W", "5"])) == ["🙂E", "123456", " X", "678901"]
        stopped, whole = await asyncio.gather(text_of("0", 4), text_of("3"))
        assert "123456".startswith(stopped) and whole == "456789"
        with pytest.raises(UsageError, match="exceed"):
            await anext(engine.generate([start("0", 99)]))
        scheduler.step, step = None, scheduler.step  # None cannot be called
        with pytest.raises(GenerationError, match="callable"):
            await text_of("0")
        scheduler.step = step
        assert await text_of("0") == "123456"
        engine.thread.shutdown()
        assert not engine.inboxes and not scheduler.has_unfinished_sequences()

    asyncio.run(check())


def test_logits_that_are_not_finite_are_one_callers_error(recall_model):
    model, tokenizer = load(recall_model / "model.pth", dtype=torch.float32)
    weight = model.embed_tokens.weight.clone()
    weight[ord("7")] = torch.nan
    model.embed_tokens.weight = torch.nn.Parameter(weight, requires_grad=False)
    engine = AsyncEngine(Scheduler(model, 2, 64))

    async def text_of(text: str) -> str:
        found = ""
        async for updates in engine.generate([build_sequence(text, tokenizer, model.config, 12)]):
            found += "".join(update.text for update in updates)
        return found

    async def check():
        texts = await asyncio.gather(*map(text_of, ["5", "S", "0", "7", "W"]), return_exceptions=True)
        assert [texts[1], texts[4]] == ["🙂E", " X"]
        for error in (texts[0], texts[2], texts[3]):
            assert isinstance(error, GenerationError) and "not finite" in str(error)
        engine.thread.shutdown()

    asyncio.run(check())


def test_interrupt_keeps_complete_results(recall_model):
    """After Ctrl-C, results that wait for an earlier prompt are yielded, and then KeyboardInterrupt is raised."""
    model, tokenizer = load(recall_model / "model.pth", dtype=torch.float32)
    scheduler = Scheduler(model, 3, 64)
    sequences = [build_sequence(text, tokenizer, model.config, 50) for text in ("0", "S", "P")]
    step, n_steps = scheduler.step, iter(range(100))

    def interrupted_step():
        if next(n_steps) == 10:
            raise KeyboardInterrupt
        return step()

    scheduler.step = interrupted_step
    found = []
    with pytest.raises(KeyboardInterrupt):
        for i, sequence in scheduler.run(sequences):
            found.append((i, sequence.text))
    assert found == [(1, "🙂E"), (2, "")]


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_finder(text, stop, data):
    """However the text is cut into pieces, it ends before the stop string that is complete first."""
    finder, found, start = StopStringFinder(stop), "", 0
    while start < len(text):
        end = data.draw(st.integers(start + 1, len(text)))
        found += finder.push(text[start:end])
        start = end
    found += finder.end()
    ends = [(end, end - len(s)) for s in stop for end in range(len(text) + 1) if text[:end].endswith(s)]
    assert found == (text[: min(ends)[1]] if ends else text) and finder.found == bool(ends)

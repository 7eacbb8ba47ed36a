"""Speculative decoding says what the model alone would say: the same tokens, or tokens of the same distribution."""

import itertools
import json
import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import generate
import quantize
from checkpoint import read_checkpoint, save_checkpoint
from cli.startup import warn_about_size
from config import ModelConfig
from engine import speculate as speculate_module
from engine.sampling import SamplingParams, multinomial, probabilities, sample
from engine.speculate import (
    DraftModel,
    PromptLookup,
    SpeculativeDecoder,
    best_draft_length,
    build_draft_model,
    build_speculative_decoder,
    draft_lengths,
    estimate_verify_cost,
    rejection_sample,
)
from engine.steps import GenerationSteps, build_steps
from model import KVCache, empty_model
from tests.byte_models import random_folder, set_up
from tests.test_readme import calls_of_script, copy_of_scripts, run_python
from tests.tiny import FAMILIES, ROOT, call, convert, make_hf, to_ours, write_folder
from utils.errors import UsageError

CPU = torch.device("cpu")
GREEDY = SamplingParams()

TEXT = torch.randint(3, 97, (20,), generator=torch.Generator().manual_seed(1)).tolist()
TEXT = TEXT + TEXT[:12]  # something to look up


def decoder_of(model, draft, length: int, k: int, compile: bool = False) -> SpeculativeDecoder:
    """As generate.py makes it, with caches of this length; but proposals cost nothing, so that there always is one."""
    kv_cache = KVCache(model, 1, length)
    steps = build_steps(model, kv_cache, GREEDY, compile)
    if draft is None:
        proposer = PromptLookup(3, CPU)
    else:
        proposer = build_draft_model(draft, KVCache(draft, 1, length), model, GREEDY, compile)
        proposer.cost = 0.0
    return build_speculative_decoder(model, kv_cache, steps, GREEDY, proposer, k, compile)


def plain(model, text: list[int], n: int) -> list[int]:
    """What the model says alone."""
    steps = build_steps(model, KVCache(model, 1, len(text) + n), GREEDY)
    return [i for (i,) in generate.generate(steps, torch.tensor([text]), 0, n)]


def flat(steps_tokens) -> list[int]:
    return [i for (tokens,) in steps_tokens for i in tokens]


@pytest.fixture(scope="module")
def drafts(pair, tmp_path_factory):
    """(family, name) -> draft."""

    @cache
    def make(family: str, name: str):
        if name == "lookup":
            return None
        if name == "itself":
            return to_ours(pair(family)[0])
        if name == "random":  # another family, and less deep
            return to_ours(make_hf("llama2" if family != "llama2" else "qwen3", num_hidden_layers=1))
        folder = tmp_path_factory.mktemp(family)
        pair(family)[0].save_pretrained(folder)
        call(quantize.main, "--checkpoint_path", convert(folder), "--mode", "int4")
        return generate.load_model(folder / "model_int4.g32.pth", CPU, torch.float32)

    return make


@pytest.mark.parametrize("name", ["lookup", "itself", "random", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_models_own(family, name, pair, drafts):
    model, draft = pair(family)[1], drafts(family, name)
    expected = plain(model, TEXT, 40)
    for k in range(1, 9) if family == "llama3" else (1, 4, 8):
        decoder = decoder_of(model, draft, len(TEXT) + 39, k)  # not one place more than plain decoding takes
        decoder = replace(decoder, verify_cost=0.1)
        steps_tokens = list(decoder(TEXT, 0, 40))
        assert flat(steps_tokens) == expected
        sizes = [len(tokens) for (tokens,) in steps_tokens]
        assert max(sizes) <= k + 1
        if name == "itself":
            assert sizes[1:-1].count(k + 1) >= (39 // (k + 1)) - 1


@pytest.mark.parametrize("name", ["lookup", "int4"])
def test_a_text_goes_on_where_the_cache_ends(name, pair, drafts):
    """As in a conversation: the second text shares a beginning with the first one and its answer."""
    model, draft = pair("llama3")[1], drafts("llama3", name)
    continuation = decoder_of(model, draft, 160, 4)
    answer = flat(continuation(TEXT, 0, 21))
    for kept in (20, 7, 0):
        text = TEXT + answer[:kept] + TEXT[5:15]
        assert flat(continuation(text, len(TEXT) + kept, 20)) == plain(model, text, 20)
        flat(continuation(TEXT, len(TEXT) - 1, 21))


@pytest.mark.parametrize("family, use_kernels, k", [("qwen3", True, 3), ("qwen3", False, 3), ("mixtral", True, 10)])
def test_compiled(family, use_kernels, k, pair):
    """With kernels nothing is, except a verification of 11 tokens, which are too many for them."""
    model = pair(family, use_kernels)[1]
    decoder = decoder_of(model, None, len(TEXT) + 20, k, compile=True)
    assert flat(decoder(TEXT, 0, 20)) == plain(model, TEXT, 20)


# ---- Sampling -------------------------------------------------------------------------------------------------------

V = 5


def toy_logits(seed: int, never: int | None = None) -> torch.Tensor:
    """A model as a table: float32 logits that depend on the last two tokens, [V, V, V]."""
    table = torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed))
    if never is not None:
        table[..., never] = -1e4  # with probability 0, in float32
    return table


def toy_probs(table: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    return probabilities(table.flatten(0, 1), sampling).view_as(table)


class ToyCache:
    """The tokens that a cache would hold the keys and values of, and what the model says after them."""

    def __init__(self, table: torch.Tensor, text: list[int]):
        self.table, self.tokens = table, list(text)

    def prefill(self, tokens, start_pos):
        self.tokens[int(start_pos) :] = tokens[0].tolist()

    def feed(self, tokens, start_pos) -> torch.Tensor:
        """What the table has after each of tokens [1, T]: [T, V]."""
        self.prefill(tokens, start_pos)
        start = int(start_pos)
        return self.table[self.tokens[start - 1 : -1], self.tokens[start:]]


def toy_draft(table: torch.Tensor, sampling: SamplingParams, text: list[int]) -> DraftModel:
    cache = ToyCache(toy_probs(table, sampling), text)

    def step(tokens, start_pos):
        probs = cache.feed(tokens, start_pos)[-1:]
        return multinomial(probs), probs

    return DraftModel(prefill=cache.prefill, step=step, vocab_size=V, device=CPU)


@pytest.mark.parametrize(
    ("draft", "sampling", "samples"),
    [
        ("random", SamplingParams(0.8), 8000),
        ("random", SamplingParams(1.3, top_k=3), 4000),
        ("random", SamplingParams(1.0, top_p=0.7), 4000),
        ("never", SamplingParams(1.0), 4000),  # q = 0 where p > 0
        ("lookup", SamplingParams(0.8), 4000),
    ],
    ids=str,
)
def test_sampled_tokens_have_the_models_distribution(draft, sampling, samples):
    """The first three tokens, against the chain rule, by a chi-square test."""
    text = [*torch.randint(V, (60,), generator=torch.Generator().manual_seed(0)).tolist(), 0, 1]
    table = toy_logits(1)
    cache = ToyCache(table, text)

    def prefill(tokens, start_pos):
        cache.tokens[:] = text
        return sample(table[text[-2], text[-1]][None], sampling)

    def decode(tokens, start_pos):
        return sample(cache.feed(tokens, start_pos), sampling)

    def verify(tokens, start_pos, draft_tokens, draft_probs=None):
        return rejection_sample(cache.feed(tokens, start_pos), draft_tokens, draft_probs, sampling)

    if draft == "lookup":
        proposer = PromptLookup(3, CPU)
    else:
        proposer = toy_draft(toy_logits(2, never=3 if draft == "never" else None), sampling, text)
    decoder = SpeculativeDecoder(GenerationSteps(prefill, decode), verify, proposer, k=2, device=CPU)

    torch.manual_seed(0)
    counts, n_speculated = torch.zeros(V, V, V), 0
    for _ in range(samples):
        steps_tokens = list(decoder(text, 0, 3))
        n_speculated += len(steps_tokens) < 3
        counts[tuple(flat(steps_tokens))] += 1
    assert n_speculated > samples // 20  # speculation took part

    probs = toy_probs(table, sampling)
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
    for sampling in (GREEDY, SamplingParams(1.0)):
        q = None if sampling is GREEDY else draft_probs
        swapped = None if q is None else q[:, [0, 1, 3, 2, 4]]
        assert rejection_sample(logits, torch.tensor([4, 2]), q, sampling).tolist() == [2, 4, 2, 1]
        assert rejection_sample(logits, torch.tensor([4, 3]), swapped, sampling).tolist()[:3] == [1, 4, 2]
        bad = rejection_sample(logits * torch.nan, torch.tensor([4, 2]), q, sampling)
        assert bad[0] == 0 and bad[1] == -1


# ---- Proposals ------------------------------------------------------------------------------------------------------


def test_lookup_proposes_what_came_after():
    lookup = PromptLookup(3, CPU)

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
    lookup.rewind(10)  # the same text goes on: all of it is
    assert propose("babcbabdabd", 2) == "ab"


def test_the_number_of_tokens_follows_what_is_accepted():
    assert draft_lengths(5) == [1, 5] and draft_lengths(1) == [1]
    assert best_draft_length([5, 2, 1], 1.0, 0.3) == 5
    assert best_draft_length([5, 2, 1], 0.3, 0.2) == 1
    assert best_draft_length([5, 2, 1], 0.05, 0.3) == 0
    assert best_draft_length([], 1.0, 0.1) == 0
    rate = speculate_module.AcceptanceRate()
    first = rate.rate
    for _ in range(20):
        rate.update(n_accepted=0, is_rejected=True)
    assert rate.rate < 0.2
    for _ in range(200):
        rate.decay(speculate_module.IDLE_DECAY)  # is worth another try
    assert abs(rate.rate - first) < 0.01


def test_experts_cost_more_to_verify(pair):
    dense, moe = pair("llama3")[1], pair("mixtral")[1]
    assert estimate_verify_cost(dense) < 0.2 < estimate_verify_cost(moe) < 1
    of_dense, of_moe = (best_draft_length([1, 2, 5], 0.3, estimate_verify_cost(model)) for model in (dense, moe))
    assert of_dense > of_moe


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that answers in capitals, and one that has another vocabulary."""
    model = random_folder(tmp_path_factory.mktemp("model"), max_seq_len=128)
    other = random_folder(tmp_path_factory.mktemp("other"), max_seq_len=128)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {"<0x41>": 66, "<0x42>": 65}
    (other / "tokenizer.json").write_text(json.dumps(data))
    return model, other


def run_main(capsys, monkeypatch, folder, *arguments, stdin: str = ""):
    set_up(monkeypatch, folder / "model.pth", arguments, stdin)
    generate.main()
    return capsys.readouterr()


WAYS = [["--prompt_lookup"], ["--prompt_lookup", "2", "--speculate_k", "3"], ["--draft_checkpoint_path"]]


@pytest.mark.parametrize("way", WAYS, ids=["lookup", "lookup2", "draft"])
@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_json(way, temperature, folders, capsys, monkeypatch):
    folder = folders[0]
    if way[0].startswith("--draft"):
        way = [*way, str(folder / "model.pth")]
        # Otherwise a draft as large as the model would not pay
        monkeypatch.setattr(speculate_module, "estimate_verify_cost", lambda model: -1.0)
    flags = ["--prompt=ABCABCABC", f"--temperature={temperature}", "--precision=float32", "--json"]
    flags += ["--max_new_tokens=119"]  # to the end of the context
    ours = json.loads(run_main(capsys, monkeypatch, folder, *flags, *way).out)
    again = json.loads(run_main(capsys, monkeypatch, folder, *flags, *way).out)
    assert ours["tokens"] == again["tokens"]
    theirs = json.loads(run_main(capsys, monkeypatch, folder, *flags).out)
    if temperature == "0":
        for key in ("text", "tokens", "generated_tokens", "finish_reason"):
            assert ours[key] == theirs[key]
    counts = ours["accept_counts"]
    assert theirs["accept_counts"] is None and len(counts) == {"3": 4, "--prompt_lookup": 8}.get(way[-1], 6)
    assert 1 + sum(n * count for n, count in enumerate(counts, 1)) == ours["generated_tokens"]
    assert sum(counts[1:]) > 0


def test_an_end_token_in_a_step_ends_it(folders, capsys, monkeypatch):
    folder = folders[0]
    flags = ["--prompt=AB", "--temperature=0", "--precision=float32", "--max_new_tokens=100", "--json"]
    tokens = json.loads(run_main(capsys, monkeypatch, folder, *flags).out)["tokens"][0]
    load = generate.load

    def with_end(end: int):
        def loaded(*args, **options):
            model, tokenizer = load(*args, **options)
            object.__setattr__(model.config, "eos_ids", (end,))
            return model, tokenizer

        return loaded

    ends = sorted(set(tokens), key=tokens.index)[1:8]
    for end in ends:
        monkeypatch.setattr(generate, "load", with_end(end))
        monkeypatch.setattr(speculate_module, "estimate_verify_cost", lambda model: -1.0)
        way = ["--draft_checkpoint_path", str(folder / "model.pth"), "--speculate_k=7"]
        result = json.loads(run_main(capsys, monkeypatch, folder, *flags, *way).out)
        assert result["tokens"][0] == tokens[: tokens.index(end) + 1]
        assert result["finish_reason"] == ["stop"]
        assert 1 + sum(n * count for n, count in enumerate(result["accept_counts"], 1)) == result["generated_tokens"]


@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_conversation(way, folders, capsys, monkeypatch):
    folder = folders[0]
    way = ["--prompt_lookup"] if way == "lookup" else ["--draft_checkpoint_path", str(folder / "model.pth")]
    flags = ["--chat", "--temperature=0", "--precision=float32", "--max_new_tokens=20"]
    said = "Hello\nWho?\n/reset\nHello\nAnd so on and so on\n"
    expected = run_main(capsys, monkeypatch, folder, *flags, stdin=said).out
    assert run_main(capsys, monkeypatch, folder, *flags, *way, stdin=said).out == expected and len(expected) > 40


def short_draft(folder) -> list[str]:
    """The flags for a draft of a context of 32."""
    config, _, tensors = read_checkpoint(folder / "model.pth")
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    save_checkpoint(folder / "short.pth", replace(config, max_seq_len=32), shapes, tensors.items())
    return ["--draft_checkpoint_path", str(folder / "short.pth"), "--max_new_tokens=20"]


def test_a_conversation_as_long_as_the_drafts_context(folders, capsys, monkeypatch):
    flags = ["--chat", *short_draft(folders[0])]
    said = run_main(capsys, monkeypatch, folders[0], *flags, stdin="Hello\nWho?\n" * 3).err
    assert said.startswith("The draft's context of 32") and "context is full" in said


def test_mistakes(folders, capsys, monkeypatch):
    model, other = folders
    draft, short = ["--draft_checkpoint_path", str(model / "model.pth")], short_draft(model)
    for flags, said in [
        ([*draft, "--prompt_lookup"], "choose one"),
        (["--speculate_k=3"], "belongs to"),
        ([*draft, "--batch_size=2"], "one sequence"),
        (["--prompt_lookup=1"], "at least 2"),
        ([*draft, "--speculate_k=0"], "at least 1"),
        (["--draft_checkpoint_path", str(other / "model.pth")], "vocabulary"),
        (["--draft_checkpoint_path", str(model / "none.pth")], "none.pth does not exist"),
        (["--draft_checkpoint_path", str(model.parent / "none" / "model.pth")], "none/model.pth does not exist"),
        ([*short, "--prompt", "a" * 20], "draft's context of 32"),
    ]:
        with pytest.raises(UsageError, match=said):
            run_main(capsys, monkeypatch, model, *flags)


@pytest.mark.parametrize("heads_per_kv_head, most", [(1, 15), (4, 15), (7, 8), (16, 3)])
def test_only_a_gpu_verifies_without_kernels(heads_per_kv_head, most, capsys):
    model = empty_model(ModelConfig(64, 1, 16 * heads_per_kv_head, 16, 4, 64, 64, 64))
    for backend, k, warns in [("triton", most, False), ("triton", most + 1, True), ("cpu", 32, False)]:
        for _, linear in model.quantizable_linears():
            linear.backend, linear.max_kernel_tokens = backend, 64
        warn_about_size(k, model)
        said = f"More than {most} tokens at a time are verified without the kernels.\n"
        assert capsys.readouterr().err == said * warns


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The project, with one of the two tiny models that the scripts take with TINY=1. They make the one that is not
    there."""
    tree = copy_of_scripts(tmp_path_factory.mktemp("tree"))
    target = tree / "checkpoints/tiny/target"
    write_folder("llama2", target)
    call(quantize.main, "--checkpoint_path", convert(target), "--mode", "int4")
    return tree


@pytest.mark.parametrize("setup", ["7B_int4", "34B_bf16", "70B_int4", "tp_70B_bf16"])
def test_script(setup, tree, monkeypatch, capsys):
    """What the script calls runs here, for torch takes seconds to load; only ranks are started by the script itself."""
    monkeypatch.chdir(tree)
    command = f"scripts/speculate.sh {setup} --max_new_tokens=8 --device=cpu --json --ignore_eos"
    if setup.startswith("tp"):
        environment = os.environ | {"TINY": "1", "RANKS": "2", "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
        done = subprocess.run(command.split(), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        for arguments in calls_of_script(command, tree):
            run_python(arguments, less={})
        printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["generated_tokens"] == 8 and len(result["accept_counts"]) == 6
    assert result["quantization"] == ("int4.g32" if setup == "70B_int4" else None)


def test_script_knows_its_setups():
    done = subprocess.run([ROOT / "scripts/speculate.sh", "13B"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and "70B_int4" in done.stderr

"""Speculative decoding says what the model alone would say: the same tokens, or tokens of the same distribution."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import generate
import quantize
from checkpoint import read_checkpoint, save_checkpoint
from model import UsageError
from tests.test_cli import random_folder, set_up
from tests.tiny import FAMILIES, ROOT, convert, make_hf, to_ours

CPU = torch.device("cpu")
GREEDY = {"temperature": 0, "top_k": None, "top_p": None}


def run_of(model, draft, k: int, compile: bool = False):
    """generate's speculate(), made as its main does, as a function of (text, start, max_new_tokens)."""
    verify, propose, _ = generate.build_speculation(model, draft, 3, GREEDY, compile)
    steps = generate.build_steps(model, GREEDY, compile, False)
    return partial(generate.speculate, (*steps, verify), propose, 0.0, k, CPU)  # at no cost, so that it always tries


def plain(model, text: list[int], n: int) -> list[int]:
    steps = generate.build_steps(model, GREEDY, False, False)
    return [i for (i,) in generate.generate(*steps, torch.tensor([text]), 0, n)]


def flat(runs) -> list[int]:
    return [i for run in runs for (i,) in run]


TEXT = torch.randint(3, 97, (20,), generator=torch.Generator().manual_seed(1)).tolist()
TEXT = TEXT + TEXT[:12]  # something to look up


@pytest.fixture(scope="module")
def drafts(pair, tmp_path_factory):
    """family -> name -> draft."""

    def make(family: str, name: str):
        if name == "lookup":
            return None
        if name == "itself":
            return to_ours(pair(family)[0])
        if name == "random":  # another family, and less deep
            draft = make_hf("llama2" if family != "llama2" else "qwen3", num_hidden_layers=1)
            return to_ours(draft)
        folder = tmp_path_factory.mktemp(family)
        pair(family)[0].save_pretrained(folder)
        path = convert(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["quantize.py", "--checkpoint_path", str(path), "--mode", "int4"])
            quantize.main()
        return generate.load_model(folder / "model_int4.g32.pth", CPU, torch.float32)

    return make


@pytest.mark.parametrize("name", ["lookup", "itself", "random", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_models_own(family, name, pair, drafts):
    model, draft = pair(family)[1], drafts(family, name)
    for m in (model, draft) if draft else (model,):
        m.setup_caches(1, len(TEXT) + 39)  # not one place more than plain decoding takes
    expected = plain(model, TEXT, 40)
    for k in range(1, 9):
        runs = list(run_of(model, draft, k)(TEXT, 0, 40))
        assert flat(runs) == expected
        assert max(map(len, runs)) <= k + 1
        if name == "itself":
            assert [len(run) for run in runs][1:-1].count(k + 1) >= (39 // (k + 1)) - 1


@pytest.mark.parametrize("name", ["lookup", "int4"])
def test_a_text_goes_on_where_the_cache_ends(name, pair, drafts):
    """As in a conversation: the second text shares a beginning with the first one and its answer."""
    model, draft = pair("llama3")[1], drafts("llama3", name)
    for m in (model, draft) if draft else (model,):
        m.setup_caches(1, 160)
    run = run_of(model, draft, 4)
    answer = flat(run(TEXT, 0, 21))
    for kept in (20, 7, 0):
        text = TEXT + answer[:kept] + TEXT[5:15]
        assert flat(run(text, len(TEXT) + kept, 20)) == plain(model, text, 20)
        flat(run(TEXT, len(TEXT) - 1, 21))


@pytest.mark.parametrize("family, fast, k", [("qwen3", True, 3), ("qwen3", False, 3), ("mixtral", False, 10)])
def test_compiled(family, fast, k, pair):
    model = pair(family, fast)[1]
    model.setup_caches(1, len(TEXT) + 20)
    expected = plain(model, TEXT, 20)
    assert flat(run_of(model, None, k, compile=True)(TEXT, 0, 20)) == expected


V = 5


def toy(seed: int, never: int | None = None):
    """A model as a function: float32 logits that depend on the last two tokens, as [2 or more] -> [T - 1, V]."""
    table = torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed))
    if never is not None:
        table[..., never] = -1e4  # with probability 0, in float32
    return lambda tokens: table[tokens[:-1], tokens[1:]]


@pytest.mark.parametrize(
    ("draft", "sampling", "samples"),
    [
        ("random", {"temperature": 0.8}, 20000),
        ("random", {"temperature": 1.3, "top_k": 3}, 4000),
        ("random", {"temperature": 1.0, "top_p": 0.7}, 4000),
        ("never", {"temperature": 1.0}, 4000),  # q = 0 where p > 0
        ("lookup", {"temperature": 0.8}, 4000),
    ],
)
def test_sampled_tokens_have_the_models_distribution(draft, sampling, samples):
    """The first three tokens after the first, against the chain rule, by a chi-square test."""
    model, text = toy(1), [*torch.randint(V, (60,), generator=torch.Generator().manual_seed(0)).tolist(), 0, 1]
    history = list(text)

    def logits(model, tokens, positions):  # what a cache would know: the token before
        del history[int(positions[0]) :]
        history.extend(tokens[0].tolist())
        return model(torch.tensor(history[int(positions[0]) - 1 :]))

    def prefill(tokens, positions):
        history[:] = text
        return generate.sample(model(torch.tensor(text[-2:])), **sampling)

    def decode(tokens, positions):
        return generate.sample(logits(model, tokens, positions), **sampling)

    def verify(tokens, positions, drafted, probs):
        return generate.verified(logits(model, tokens, positions), drafted, probs, sampling)

    other, seen = toy(2, never=3 if draft == "never" else None), list(text)

    def draft_step(tokens, positions):
        del seen[int(positions[0]) :]
        seen.extend(tokens[0].tolist())
        probs = generate.probabilities(other(torch.tensor(seen[-2:])), **sampling)
        return generate.draw(probs), probs

    def draft_prefill(tokens, positions):
        del seen[int(positions[0]) :]
        seen.extend(tokens[0].tolist())

    if draft == "lookup":
        propose = generate.prompt_lookup(3, CPU)
    else:
        propose = generate.draft_model(draft_prefill, draft_step, V, CPU)
    torch.manual_seed(0)
    counts, drafted = torch.zeros(V, V, V), 0
    for _ in range(samples):
        runs = list(generate.speculate((prefill, decode, verify), propose, 0.0, 2, CPU, text, 0, 3))
        drafted += len(runs) < 3
        counts[tuple(flat(runs))] += 1
    assert drafted > samples // 20  # speculation took part
    p = torch.zeros(V, V, V)
    step = lambda *last: generate.probabilities(model(torch.tensor(last)), **sampling)[0]  # noqa: E731
    for a, b in itertools.product(range(V), repeat=2):
        p[a, b] = step(0, 1)[a] * step(1, a)[b] * step(a, b)
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * samples
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum().item()
    freedom = expected.numel() - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_verified_keeps_what_both_agree_on():
    logits = torch.full((3, V), -30.0)
    logits[[0, 1, 2], [4, 2, 1]] = 30.0
    probs = logits[:2].softmax(-1)
    for sampling in (GREEDY, {"temperature": 1.0}):
        q = None if sampling is GREEDY else probs
        swapped = None if q is None else q[:, [0, 1, 3, 2, 4]]
        assert generate.verified(logits, torch.tensor([4, 2]), q, sampling).tolist() == [2, 4, 2, 1]
        assert generate.verified(logits, torch.tensor([4, 3]), swapped, sampling).tolist()[:3] == [1, 4, 2]
        bad = generate.verified(logits * torch.nan, torch.tensor([4, 2]), q, sampling)
        assert bad[0] == 0 and bad[1] == -1


def test_lookup_proposes_what_came_after():
    propose = generate.prompt_lookup(3, CPU)
    ask = lambda text, k: (found := propose(list(text), k)) and "".join(map(chr, found[0].tolist()))  # noqa: E731
    as_ids = lambda text: list(map(ord, text))  # noqa: E731
    assert ask(as_ids("abcdxbcd"), 2) == "xb"
    assert ask(as_ids("abcdxbcdyxb"), 3) == "cdy"  # two tokens will do
    assert ask(as_ids("abcdxbcdyxbq"), 3) is None
    assert ask(as_ids("ababab"), 5) == "ababa"  # and so on
    assert ask(as_ids("b"), 0) is None  # from here on another text: nothing of the first is left
    assert ask(as_ids("babcbabdab"), 2) == "da"
    assert ask(as_ids("zz"), 0) is None


def test_the_number_of_tokens_follows_what_is_kept():
    assert generate.sizes(5) == [1, 5] and generate.sizes(1) == [1]
    assert generate.best_size([5, 2, 1], 1.0, 0.2) == 5
    assert generate.best_size([5, 2, 1], 0.3, 0.1) == 1
    assert generate.best_size([5, 2, 1], 0.05, 0.2) == 0
    assert generate.best_size([], 1.0, 0.0) == 0


# ---- The command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that answers in capitals, and one that has another vocabulary."""
    model = random_folder(tmp_path_factory.mktemp("model"), max_seq_len=128)
    other = random_folder(tmp_path_factory.mktemp("other"), max_seq_len=128)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {"<0x41>": 66, "<0x42>": 65}
    (other / "tokenizer.json").write_text(json.dumps(data))
    return model, other


def call(capsys, monkeypatch, folder, *arguments, stdin: str = ""):
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
        monkeypatch.setattr(generate, "VERIFY", -1.0)  # or a draft as large as the model would not pay
    flags = ["--prompt=ABCABCABC", f"--temperature={temperature}", "--precision=float32", "--json"]
    flags += ["--max_new_tokens=119"]  # to the end of the context
    ours = json.loads(call(capsys, monkeypatch, folder, *flags, *way).out)
    again = json.loads(call(capsys, monkeypatch, folder, *flags, *way).out)
    assert ours["tokens"] == again["tokens"]
    theirs = json.loads(call(capsys, monkeypatch, folder, *flags).out)
    if temperature == "0":
        for key in ("text", "tokens", "generated_tokens", "finish_reason"):
            assert ours[key] == theirs[key]
    counts = ours["accept_counts"]
    assert theirs["accept_counts"] is None and len(counts) == {"3": 4, "--prompt_lookup": 8}.get(way[-1], 6)
    assert 1 + sum(n * count for n, count in enumerate(counts, 1)) == ours["generated_tokens"]
    assert sum(counts[1:]) > 0


def test_an_end_token_in_a_run_ends_it(folders, capsys, monkeypatch):
    folder = folders[0]
    flags = ["--prompt=AB", "--temperature=0", "--precision=float32", "--max_new_tokens=100", "--json"]
    tokens = json.loads(call(capsys, monkeypatch, folder, *flags).out)["tokens"][0]
    load = generate.load_model

    def with_end(end: int):
        def loaded(*args, **more):
            model = load(*args, **more)
            object.__setattr__(model.config, "eos_ids", (end,))
            return model

        return loaded

    ends = sorted(set(tokens), key=tokens.index)[1:8]
    for end in ends:
        monkeypatch.setattr(generate, "load_model", with_end(end))
        monkeypatch.setattr(generate, "VERIFY", -1.0)
        way = ["--draft_checkpoint_path", str(folder / "model.pth"), "--speculate_k=7"]
        result = json.loads(call(capsys, monkeypatch, folder, *flags, *way).out)
        assert result["tokens"][0] == tokens[: tokens.index(end) + 1]
        assert result["finish_reason"] == ["stop"]
        assert 1 + sum(n * count for n, count in enumerate(result["accept_counts"], 1)) == result["generated_tokens"]


@pytest.mark.parametrize("way", ["lookup", "draft"])
def test_conversation(way, folders, capsys, monkeypatch):
    folder = folders[0]
    way = ["--prompt_lookup"] if way == "lookup" else ["--draft_checkpoint_path", str(folder / "model.pth")]
    flags = ["--chat", "--temperature=0", "--precision=float32", "--max_new_tokens=20"]
    said = "Hello\nWho?\n/reset\nHello\nAnd so on and so on\n"
    expected = call(capsys, monkeypatch, folder, *flags, stdin=said).out
    assert call(capsys, monkeypatch, folder, *flags, *way, stdin=said).out == expected and len(expected) > 40


def short_draft(folder) -> list[str]:
    """The flags for a draft of a context of 32."""
    config, _, tensors = read_checkpoint(folder / "model.pth")
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    save_checkpoint(folder / "short.pth", replace(config, max_seq_len=32), shapes, tensors.items())
    return ["--draft_checkpoint_path", str(folder / "short.pth"), "--max_new_tokens=20"]


def test_a_conversation_as_long_as_the_drafts_context(folders, capsys, monkeypatch):
    said = call(capsys, monkeypatch, folders[0], "--chat", *short_draft(folders[0]), stdin="Hello\nWho?\n" * 3).err
    assert said.startswith("The draft's context of 32") and "context is full" in said


def test_mistakes(folders, capsys, monkeypatch):
    model, other = folders
    draft, short = ["--draft_checkpoint_path", str(model / "model.pth")], short_draft(model)
    for flags, said in [
        ([*draft, "--prompt_lookup"], "choose one"),
        (["--speculate_k=3"], "belongs to"),
        ([*draft, "--batch_size=2"], "one row"),
        (["--prompt_lookup=1"], "at least 2"),
        ([*draft, "--speculate_k=0"], "at least 1"),
        (["--draft_checkpoint_path", str(other / "model.pth")], "vocabulary"),
        (["--draft_checkpoint_path", str(model / "none.pth")], "none.pth does not exist"),
        (["--draft_checkpoint_path", str(model.parent / "none" / "model.pth")], "none/model.pth does not exist"),
        ([*short, "--prompt", "a" * 20], "draft's context of 32"),
    ]:
        with pytest.raises(UsageError, match=said):
            call(capsys, monkeypatch, model, *flags)


@pytest.mark.parametrize("script", ["7B_int4", "34B_bf16", "70B_int4", "tp_70B_bf16"])
def test_scripts(script, tmp_path):
    """Each on tiny random models, which it makes."""
    for path in [p for p in ROOT.iterdir() if p.suffix in (".py", ".cpp")] + [ROOT / "scripts", ROOT / "tests"]:
        (tmp_path / path.name).symlink_to(path)
    environment = os.environ | {"TINY": "1", "RANKS": "2", "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
    command = [f"scripts/speculate_{script}.sh", "--max_new_tokens", "8", "--device", "cpu", "--json", "--ignore_eos"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["generated_tokens"] == 8 and len(result["accept_counts"]) == 6
    assert result["quantization"] == ("int4.g32" if script == "70B_int4" else None)

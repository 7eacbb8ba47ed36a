"""generate.py as its user meets it: what --json says, what is printed, conversations, and every way to ask wrongly."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

import checkpoint
import generate
import kernels
from model import ModelConfig, MoE, Transformer
from tests.tiny import ROOT
from tokenizer import load_tokenizer

V = 260  # the 256 bytes, then
SPECIAL = ["<s>", "</s>", "<|user|>", "<|bot|>"]
END = 257
TEMPLATE = (
    "{% for m in messages %}{{ {'system': '<s>', 'user': '<|user|>', 'assistant': '<|bot|>'}[m.role] }}{{ m.content }}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
CHAIN = ["S🙂E\0", "W X!", "P.", "01234567890"]  # each byte is followed by the next one; \0 stands for END
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=V, eos_ids=(END,))


def write_folder(folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> Path:
    """model.pth and a tokenizer whose ids are bytes, decoded as Llama-2's are."""
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    checkpoint.save_checkpoint(folder / "model.pth", config, shapes, tensors.items())
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({f"<0x{b:02X}>": b for b in range(256)}, [], byte_fallback=True))
    d = tokenizers.decoders
    tok.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tok.add_special_tokens(SPECIAL)
    tok.save(str(folder / "tokenizer.json"))
    return folder


def zeros(config: ModelConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return {name: torch.zeros(t.shape, device="cpu") for name, t in Transformer(config).state_dict().items()}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A model that knows CHAIN by heart; after one of a to h, any of a to h is as likely. It ends with END and ".",
    which its config.json names, and "!", which its generation_config.json names."""
    hf = dict(
        architectures=["LlamaForCausalLM"], hidden_size=V, intermediate_size=1, num_hidden_layers=1, vocab_size=V,
        num_attention_heads=1, head_dim=2, max_position_embeddings=256, eos_token_id=[END, ord(".")],
    )  # fmt: skip
    config = ModelConfig.from_hf(hf, {"eos_token_id": ord("!")})
    tensors = zeros(config) | {"tok_embeddings.weight": torch.eye(V), "norm.weight": torch.ones(V)}
    after = tensors["output.weight"]  # [next, last]
    after[END, END] = after[ord("."), ord(".")] = 4
    after[ord("a") : ord("h") + 1, ord("a") : ord("h") + 1] = 4
    for text in map(str.encode, CHAIN):
        for last, following in zip(text, text[1:], strict=False):
            after[following or END, last] = 4
    return write_folder(tmp_path_factory.mktemp("chain"), config, tensors)


def random_folder(folder: Path, **config) -> Path:
    """A random model, attention and all, that answers in capitals, and a chat template."""
    config = ModelConfig(**SIZES, **config)
    torch.manual_seed(0)
    tensors = {n: torch.randn(t.shape) / (4 if t.ndim > 1 else 1) for n, t in zeros(config).items()}
    if config.tie_embeddings:
        del tensors["output.weight"]
    tensors["tok_embeddings.weight" if config.tie_embeddings else "output.weight"][ord("A") : ord("Z") + 1] *= 4
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    return write_folder(folder, config, tensors)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return random_folder(tmp_path_factory.mktemp("chatty"), max_seq_len=160)


def set_up(monkeypatch, model: Path, args, stdin: str | bytes = ""):
    monkeypatch.setattr(sys, "argv", ["generate.py", f"--checkpoint_path={model}", "--device=cpu", *args])
    stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))


@pytest.fixture
def cli(monkeypatch, capsys):
    """(folder, arguments) -> what generate.py prints on stdout."""

    def call(folder: Path, *args: str, stdin: str = "") -> str:
        set_up(monkeypatch, folder / "model.pth", args, stdin)
        capsys.readouterr()
        checkpoint.run(generate.main)
        return capsys.readouterr().out

    return call


@pytest.fixture
def ask(cli):
    """(folder, arguments) -> the object that --json prints for each prompt."""

    def no_number(constant):
        raise AssertionError(f"{constant} is not JSON")

    return lambda *args: [json.loads(x, parse_constant=no_number) for x in cli(*args, "--json").splitlines()]


FIELDS = {
    "text": list, "tokens": list, "prompt_tokens": int, "generated_tokens": int, "finish_reason": list,
    "prefill_seconds": float, "decode_tokens_per_sec": float, "compile_seconds": float, "load_seconds": float,
    "model_bytes": int, "bandwidth_gb_per_sec": float, "peak_memory_bytes": int,
    "device": str, "precision": str, "quantization": type(None), "accept_counts": type(None),
}  # fmt: skip


@pytest.mark.parametrize("precision, size", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("moe", [None, MoE(n_experts=5, n_active=2)], ids=["dense", "moe"])
def test_json_adds_up(tmp_path, ask, moe, precision, size):
    folder = random_folder(tmp_path, max_seq_len=64, tie_embeddings=moe is None, moe=moe)
    options = ["--prompt=Hello", "--max_new_tokens=9", "--num_samples=2", "--ignore_eos", "--batch_size=3"]
    (r,) = ask(folder, *options, f"--precision={precision}")
    assert {name: type(value) for name, value in r.items()} == FIELDS
    assert r["prompt_tokens"] == 5 and r["generated_tokens"] == 27 and [len(row) for row in r["tokens"]] == [9, 9, 9]
    tokenizer = load_tokenizer(folder)
    assert r["text"] == [tokenizer.decode(row, after=tokenizer.encode("Hello")) for row in r["tokens"]]
    assert (r["finish_reason"], r["device"], r["precision"]) == (["length"] * 3, "cpu", precision)

    attention, ffn = (4 + 2 * 2) * 8 * 32 + 4 * 8 * 32, 3 * 48 * 32
    layer = 2 * 32 + attention + (ffn if moe is None else 5 * 32 + 2 * ffn)
    assert r["model_bytes"] == size * (2 * layer + 32 + V * 32)
    position = 3 * 2 * 2 * 2 * 8 * size  # rows, layers, keys and values, heads, head_dim
    step_bytes = r["bandwidth_gb_per_sec"] * 1e9 / r["decode_tokens_per_sec"]
    assert 6 * position <= step_bytes * 1.0001 - r["model_bytes"] <= 14 * position * 1.01
    assert all(r[name] > 0 for name, kind in FIELDS.items() if kind is float and name != "compile_seconds")
    assert r["peak_memory_bytes"] > 2**20


def test_rows_are_samples_and_seeds_repeat(chain, ask, cli):
    options = ["--prompt=a", "--max_new_tokens=12", "--batch_size=8"]
    (first,), (again,), (other,) = (ask(chain, *options, f"--seed={seed}") for seed in (1, 1, 2))
    assert first["tokens"] == again["tokens"] != other["tokens"]
    assert len(set(first["text"])) == 8 and len({text[0] for text in first["text"]}) > 1
    printed = cli(chain, *options, "--seed=1").splitlines()
    assert [line for line in printed if not line.startswith("---")] == first["text"]
    (two,) = ask(chain, *options, "--seed=1", "--num_samples=2")
    assert two["tokens"] != first["tokens"] and two["generated_tokens"] == 96
    (greedy,) = ask(chain, *options, "--temperature=0")
    assert greedy["text"] == ["a" * 12] * 8  # the lowest id of the tied ones


def test_prompt_file_runs_each_line(chain, ask, tmp_path):
    (tmp_path / "prompts").write_text("S\n\n  \nab\u2028P\r\né0", encoding="utf-8-sig")  # a mark first
    results = ask(chain, f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=12")
    assert [r["prompt_tokens"] for r in results] == [1, 6, 3]
    assert [r["text"] for r in results] == [["🙂E"], [""], ["123456789012"]]
    assert [r["finish_reason"] for r in results] == [["stop"], ["stop"], ["length"]]


@pytest.mark.parametrize("prompt, text, end", [("S", "🙂E", END), ("P", "", ord(".")), ("W", " X", ord("!"))])
def test_end_tokens_end(chain, ask, prompt, text, end):
    (r,) = ask(chain, f"--prompt={prompt}", "--batch_size=2")
    assert r["tokens"] == [[*text.encode(), end]] * 2 and r["generated_tokens"] == 2 * len(r["tokens"][0])
    assert (r["text"], r["finish_reason"]) == ([text] * 2, ["stop"] * 2)


def test_ignore_eos_goes_on(chain, ask):
    (r,) = ask(chain, "--prompt=S", "--max_new_tokens=9", "--ignore_eos")
    assert r["tokens"] == [[*"🙂E".encode(), END, END, END, END]] and r["finish_reason"] == ["length"]
    (r,) = ask(chain, "--prompt=P", "--max_new_tokens=3", "--ignore_eos")
    assert r["tokens"] == [[46] * 3] and r["text"] == ["..."]


def test_one_token_and_a_full_context(chain, ask):
    (r,) = ask(chain, "--prompt=0", "--max_new_tokens=1")
    assert r["text"] == ["1"] and r["decode_tokens_per_sec"] == r["bandwidth_gb_per_sec"] == 0
    (r,) = ask(chain, "--prompt_tokens=252", "--max_new_tokens=4", "--ignore_eos")
    assert r["prompt_tokens"] == 252 and r["generated_tokens"] == 4


def test_prompt_tokens_repeat(chatty, ask):
    options = ["--prompt_tokens=40", "--max_new_tokens=8", "--temperature=0"]
    (a,), (b,), (c,) = (ask(chatty, *options, f"--seed={seed}") for seed in (1, 1, 2))
    assert a["tokens"] == b["tokens"] != c["tokens"]


@pytest.mark.parametrize("rows", [1, 2])
def test_whole_characters_stream(chain, cli, monkeypatch, rows):
    printed = []

    class Terminal(io.StringIO):
        def write(self, text):
            printed.extend([text] if text else [])

    monkeypatch.setattr(sys, "stdout", Terminal())
    cli(chain, "--prompt=S", f"--batch_size={rows}")
    assert printed[:3] == ["🙂", "E", "\n"] and "".join(printed).count("🙂E\n") == rows


def test_profile(chain, cli, tmp_path):
    cli(chain, "--prompt=0", "--max_new_tokens=3", "--json", f"--profile={tmp_path / 'trace.json'}")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


GREEDY = ["--temperature=0", "--precision=float32", "--max_new_tokens=12"]


def fresh_answer(folder: Path, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(the prompt's ids, the answer's ids) by a model that has heard nothing before."""
    model = generate.load_model(folder / "model.pth", torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(folder)
    model.setup_caches(1, 160)
    ids = tokenizer.encode_chat(messages)
    steps = generate.build_steps(model, {"temperature": 0}, False, False)
    new = [i for (i,) in generate.generate(*steps, torch.tensor([ids]), 0, 12)]
    return ids, new[: new.index(END)] if END in new else new


def expected_conversation(folder: Path, lines: list[str], system: str | None = None):
    """For each line (ids of the whole prompt, ids of the answer, its text)."""
    messages, turns = [{"role": "system", "content": system}] if system else [], []
    for line in lines:
        messages.append({"role": "user", "content": line})
        ids, answer = fresh_answer(folder, messages)
        turns.append((ids, answer, bytes(answer).decode()))
        messages.append({"role": "assistant", "content": turns[-1][2]})
    return turns


@pytest.fixture
def fed():
    """How many tokens each prefill feeds; append to fed.interrupt to have Ctrl-C come at that prefill."""

    class Fed(list):
        interrupt = None

    def hear(module, args):
        if isinstance(module, torch.nn.Embedding) and args[0].shape[1] > 1:
            fed.append(args[0].shape[1])
            if len(fed) == fed.interrupt:
                raise KeyboardInterrupt

    fed = Fed()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(hear)
    yield fed
    handle.remove()


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("m.content", "m.content | lower")])
@pytest.mark.parametrize("args", [["--chat"], ["--interactive", "--system=Be brief"]])
def test_conversation_is_a_fresh_prefill(chatty, cli, fed, tmp_path, args, template):
    """And of what it heard before, all that the template says again is not fed again."""
    for name in ("model.pth", "tokenizer.json"):
        (tmp_path / name).symlink_to(chatty / name)
    (tmp_path / "chat_template.jinja").write_text(template)
    lines = ["Hi", "how are you?", "bye"]
    turns = expected_conversation(tmp_path, lines, "Be brief" if len(args) > 1 else None)
    fed.clear()
    assert cli(tmp_path, *args, *GREEDY, stdin="\n".join(lines)).splitlines() == [text for _, _, text in turns]
    in_cache = [[]] + [ids + answer[:-1] for ids, answer, _ in turns]
    known = [len(os.path.commonprefix([ids, cached])) for (ids, _, _), cached in zip(turns, in_cache, strict=False)]
    assert fed == [len(ids) - k for (ids, _, _), k in zip(turns, known, strict=True)]


def test_compiled_is_eager(chatty, ask, cli):
    options = ["--prompt=Hello", "--max_new_tokens=155", "--num_samples=2", *GREEDY[:2]]
    (eager,), (compiled,) = ask(chatty, *options), ask(chatty, *options, "--compile", "--compile_prefill")
    (plain,) = ask(chatty, *options, "--kernels=off")
    assert compiled["tokens"] == eager["tokens"] == plain["tokens"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lines = ["Hi", "how are you?", "bye"]
    out = cli(chatty, "--chat", "--compile", "--compile_prefill", *GREEDY, stdin="\n".join(lines))
    assert out.splitlines() == [text for _, _, text in expected_conversation(chatty, lines)]
    # a block for prefill and, without the C++ operations, one for decode and the head: nothing again in the second turn
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if kernels.build() else 3)


def test_conversation_reset_and_exit(chatty, cli):
    hi, bye = (expected_conversation(chatty, [line])[0][2] for line in ("Hi", "bye"))
    out = cli(chatty, "--chat", *GREEDY, stdin="Hi\n\n/reset\nbye\n/reset\n  Hi \n/exit\nHi\n")
    assert out.splitlines() == [hi, bye, hi]


def test_conversation_survives_an_interrupt(chatty, cli, fed):
    fed.interrupt = 2
    printed = cli(chatty, "--chat", *GREEDY, stdin="Hi\nhow are you?\nbye\n").splitlines()
    hi = expected_conversation(chatty, ["Hi"])[0][2]
    rest = [(), ({"role": "user", "content": "how are you?"}, {"role": "assistant", "content": ""})]
    first = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": hi})
    last = {"role": "user", "content": "bye"}  # with or without the unanswered turn
    assert printed[0] == hi
    assert printed[-1] in [bytes(fresh_answer(chatty, [*first, *r, last])[1]).decode() for r in rest]


def test_conversation_fills_the_context(chatty, cli, capsys):
    out = cli(chatty, "--chat", *GREEDY, stdin=f"{'x' * 155}\n{'x' * 200}\nHi\n/reset\nHi\n").splitlines()
    assert len(out) == 2 and len(out[0]) <= 2 and out[1] == expected_conversation(chatty, ["Hi"])[0][2]


def test_a_full_conversation_drops_its_oldest_message(chatty, cli, capsys):
    hi, ho = (answer for _, _, answer in expected_conversation(chatty, ["Hi", "Ho"]))
    said = f"{'x' * 155}\nHi\n/drop\nHi\nHo\n/drop\n/drop\n/drop\nHi\n"
    out = cli(chatty, "--chat", *GREEDY, stdin=said).splitlines()
    assert out[1:] == [hi, ho, hi]


def test_chat_applies_the_template(chatty, ask, tmp_path):
    expected = expected_conversation(chatty, ["Hi"], "Be brief")[0]
    (tmp_path / "prompts").write_text("Hi\n")
    for prompt in ("--prompt=Hi", f"--prompt_file={tmp_path / 'prompts'}"):
        (r,) = ask(chatty, "--chat", prompt, "--system=Be brief", *GREEDY)
        assert (r["prompt_tokens"], r["text"]) == (len(expected[0]), [expected[2]])


@pytest.fixture
def refused(monkeypatch, capsys):
    """(model.pth, arguments, word): generate.py must stop with status 2 and one line on stderr with that word in it."""

    def check(model: Path, args, word: str, stdin: str | bytes = ""):
        set_up(monkeypatch, model, args, stdin)
        with pytest.raises(SystemExit) as stopped:
            checkpoint.run(generate.main)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == ""
        assert word in err and err.startswith("generate.py: ") and err.count("\n") == 1 and err.endswith("\n")

    return check


@pytest.mark.parametrize(
    "args, word",
    [
        ("--device=nonsense", "nonsense"),
        ("--device=cuda:99", "cuda:99"),
        ("--device=meta", "meta"),
        ("--prompt=", "empty"),
        ("--prompt=\udcff", "prompt"),
        (f"--prompt_file={__file__}.missing", "cannot read"),
        (f"--prompt_file={ROOT}", "cannot read"),
        ("--prompt_file={tmp}/empty", "empty"),
        ("--prompt_file={tmp}/blank", "empty"),
        ("--prompt_file={tmp}/latin1", "cannot read"),
        ("--prompt_tokens=0", "prompt_tokens"),
        ("--prompt_tokens=256", "context"),
        ("--max_new_tokens=0", "max_new_tokens"),
        ("--max_new_tokens=256", "context"),
        ("--max_new_tokens=10000000000000000000000", "context"),
        ("--num_samples=0", "num_samples"),
        ("--batch_size=0", "batch_size"),
        ("--temperature=-1", "temperature"),
        ("--temperature=nan", "temperature"),
        ("--top_k=0", "top_k"),
        ("--top_p=0", "top_p"),
        ("--top_p=2", "top_p"),
        ("--top_p=nan", "top_p"),
        ("--seed=18446744073709551616", "seed"),
        ("--profile={tmp}/missing/trace.json", "trace.json"),
        ("--profile=/dev/full", "/dev/full"),
        ("--prompt_lookup --speculate_k=1000000000000", "speculate_k"),
        ("--prompt_lookup=33", "prompt_lookup"),
        ("--chat --json", "json"),
        ("--chat --batch_size=2", "batch_size"),
        ("--chat --prompt=Hi", "template"),
        ("--chat", "template"),
    ],
)
def test_wrong_argument(chain, refused, tmp_path, args, word):
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text(" \n\n")
    (tmp_path / "latin1").write_bytes("Häuser\n".encode("latin-1"))
    prompt = [] if "prompt" in args or "chat" in args else ["--prompt=0"]
    refused(chain / "model.pth", [*args.format(tmp=tmp_path).split(" "), *prompt], word, stdin="Hi\n")


@pytest.mark.parametrize(
    "args", ["--nonsense", "--max_new_tokens=x", "--precision=int8", "--prompt=a --prompt_tokens=3", "stray"]
)
def test_argparse_refuses(chain, monkeypatch, capsys, args):
    """argparse's own form: how to use it, then the one line."""
    set_up(monkeypatch, chain / "model.pth", args.split())
    with pytest.raises(SystemExit) as stopped:
        checkpoint.run(generate.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith("usage: generate.py")
    assert err.splitlines()[-1].startswith("generate.py: error: ")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran code')",)


WRONG_FILES = {  # what is in place of model.pth, and a word of what is said of it
    "missing": (lambda path, data: None, "does not exist"),
    "directory": (lambda path, data: path.mkdir(), "is a folder"),
    "empty": (lambda path, data: path.touch(), "truncated or not a PyTorch file"),
    "text": (lambda path, data: path.write_text("Hello\n"), "not"),
    "truncated": (lambda path, data: path.write_bytes(data[: len(data) // 2]), "truncated"),
    "tensor": (lambda path, data: torch.save(torch.ones(3), path), "not a gpt-fast/1 checkpoint"),
    "pickle": (lambda path, data: torch.save({"format": "gpt-fast/1", "tensors": Evil()}, path), "more than weights"),
    "old pickle": (lambda path, data: torch.save(Evil(), path, _use_new_zipfile_serialization=False), "not a PyTorch"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_checkpoint_file(chain, refused, tmp_path, kind):
    make, word = WRONG_FILES[kind]
    (tmp_path / "tokenizer.json").symlink_to(chain / "tokenizer.json")
    make(tmp_path / "model.pth", (chain / "model.pth").read_bytes())
    refused(tmp_path / "model.pth", ["--prompt=0"], word)


def test_wrong_checkpoint_path(refused, tmp_path):
    refused(tmp_path / "nowhere" / "model.pth", ["--prompt=0"], "nowhere/model.pth does not exist")
    for name, script in (("a.gguf", "convert_gguf.py"), ("a.safetensors", "convert_hf_checkpoint.py")):
        (tmp_path / name).touch()
        refused(tmp_path / name, ["--prompt=0"], f"scripts/{script} makes one of it")


def small_embedding(data):
    data["config"]["vocab_size"] = 100
    for name in ("tok_embeddings.weight", "output.weight"):
        data["tensors"][name] = data["tensors"][name][:100].clone()


WRONG_CONTENTS = {
    "missing": (lambda d: d["tensors"].pop("norm.weight"), "norm.weight"),
    "left over": (lambda d: d["tensors"].update(extra=torch.zeros(1)), "extra"),
    "shape": (lambda d: d["tensors"].update({"norm.weight": torch.ones(3)}), "norm.weight"),
    "integers": (lambda d: d["tensors"].update({"norm.weight": torch.ones(V, dtype=torch.int64)}), "norm.weight"),
    "no tensor": (lambda d: d["tensors"].update({"norm.weight": 5}), "table of tensors"),
    "NaN": (lambda d: d["tensors"]["norm.weight"].fill_(torch.nan), "not finite"),
    "infinite": (lambda d: d["tensors"]["output.weight"].fill_(torch.inf), "not finite"),
    "vocabulary": (small_embedding, "tokens"),
    "format": (lambda d: d.update(format="gpt-fast/9"), "gpt-fast/1"),
    "no config": (lambda d: d.update(config=None), "config"),
    "config lacks": (lambda d: d["config"].pop("dim"), "dim"),
    "config wrong": (lambda d: d["config"].update(dim=-1), "dim"),
    "config unknown": (lambda d: d["config"].update(alibi=True), "alibi"),
    "layers": (lambda d: d["config"].update(n_layers=2), "layers.1"),
    "quantization": (lambda d: d.update(quantization={"bits": 3}), "quantiz"),
}


@pytest.mark.parametrize("kind", WRONG_CONTENTS)
def test_wrong_checkpoint_content(chain, refused, tmp_path, kind):
    change, word = WRONG_CONTENTS[kind]
    data = torch.load(chain / "model.pth", weights_only=True)
    change(data)
    torch.save(data, tmp_path / "model.pth")
    (tmp_path / "tokenizer.json").symlink_to(chain / "tokenizer.json")
    refused(tmp_path / "model.pth", ["--prompt=0"], word)


@pytest.mark.parametrize("content", [None, b"{}", b"not JSON", b"\xff"])
def test_wrong_tokenizer(chain, refused, tmp_path, content):
    (tmp_path / "model.pth").symlink_to(chain / "model.pth")
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    refused(tmp_path / "model.pth", ["--prompt=0"], "tokenizer")


def test_prompt_of_no_tokens(chain, refused, tmp_path):
    (tmp_path / "model.pth").symlink_to(chain / "model.pth")
    tok = tokenizers.Tokenizer.from_file(str(chain / "tokenizer.json"))
    tok.normalizer = tokenizers.normalizers.Strip()
    tok.save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path / "model.pth", ["--prompt= "], "empty")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is Python's in the C locale
def test_stdin_that_is_not_text(chatty, monkeypatch, capsys, errors):
    set_up(monkeypatch, chatty / "model.pth", ["--chat"], b"H\xe4user\n")
    sys.stdin.reconfigure(errors=errors)
    with pytest.raises(SystemExit) as stopped:
        checkpoint.run(generate.main)
    assert stopped.value.code == 2 and "UTF-8" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("prompt, status", [("S", 0), ("", 2)])
def test_process(chain, prompt, status):
    """As a process of its own: stdout holds the one object or nothing, stderr nothing or the one line."""
    command = [sys.executable, ROOT / "generate.py", f"--checkpoint_path={chain / 'model.pth'}", "--device=cpu"]
    done = subprocess.run([*command, f"--prompt={prompt}", "--json"], capture_output=True, text=True)
    assert done.returncode == status and (done.stdout + done.stderr).count("\n") == 1
    assert json.loads(done.stdout)["text"] == ["🙂E"] if status == 0 else done.stderr.startswith("generate.py: ")

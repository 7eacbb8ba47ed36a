"""generate.py --parallel and --prompt_file: the output, errors of one prompt, and errors that end the command."""

import json
import sys

import pytest
import torch

from cli.parallel import generate_in_parallel
from cli.report import Reporter
from engine.scheduler import build_scheduler
from engine.sequence import Sequence, build_sequence
from loading import load


@pytest.fixture
def mistake(cli, capsys):
    """(folder, arguments) -> the line in which generate.py refuses them"""

    def call(*args) -> str:
        with pytest.raises(SystemExit) as e:
            cli(*args)
        assert e.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return call


def test_parallel_on_the_command_line(recall_model, ask, cli, tmp_path):
    (tmp_path / "prompts").write_text("S\n0\n\nW\n8\n")
    flags = [f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=5", "--precision=float32"]
    one_by_one, parallel = ask(recall_model, *flags), ask(recall_model, *flags, "--parallel=3")
    for results in (one_by_one, parallel):
        assert [r.pop("seed") for r in results] == [1234, 1235, 1236, 1237]
    for r in (*one_by_one, *parallel):
        for name in [name for name, value in r.items() if isinstance(value, float) or name == "peak_memory_bytes"]:
            del r[name]  # times differ from run to run
    assert parallel == one_by_one and [r["prompt"] for r in parallel] == ["S", "0", "W", "8"]
    printed = cli(recall_model, *flags, "--parallel=2", "--stop=34")
    assert printed == "--- prompt 1\n🙂E\n--- prompt 2\n12\n--- prompt 3\n X\n--- prompt 4\n90123\n"


def test_each_prompt_can_be_sampled_again_alone(recall_model, ask, tmp_path):
    """The seed that --json reports gives the same text again, alone."""
    (tmp_path / "prompts").write_text("a\nb\na\n")
    flags = ["--max_new_tokens=20", "--ignore_eos", "--temperature=1"]
    together = ask(recall_model, f"--prompt_file={tmp_path / 'prompts'}", "--parallel=2", *flags)
    for r in together:
        (alone,) = ask(recall_model, f"--prompt={r['prompt']}", f"--seed={r['seed']}", "--logprobs=0", *flags)
        assert alone["text"] == r["text"] and alone["seed"] == r["seed"]
    assert together[0]["text"] != together[2]["text"]
    largest = 2**64 - 1  # the next seed has 65 bits
    flags += [f"--prompt_file={tmp_path / 'prompts'}", "--parallel=2", f"--seed={largest}"]
    assert len(ask(recall_model, *flags)) == 3


TOO_LONG = {  # a prompt that cannot be completed -> why
    "5" * 300: "300 prompt tokens and 3 new ones exceed the context of 256 tokens",
    "5" * 9000: "a prompt of 9000 characters exceeds the model's context of 256 tokens",
}


def test_a_seed_gives_the_same_texts_in_parallel(chat_model, ask, tmp_path):
    """On a CPU --seed gives the same texts with and without --parallel, because both use the same kind of generator."""
    (tmp_path / "prompts").write_text("Hello\nHello\nHi\n")
    flags = [f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=12", "--ignore_eos", "--temperature=1.5"]
    options = ([], ["--parallel=2"], ["--logprobs=0"])
    texts, *others = ([r["text"] for r in ask(chat_model, *flags, *more)] for more in options)
    assert others == [texts, texts] and texts[0] != texts[1]


@pytest.mark.parametrize("prompt", TOO_LONG)
def test_a_prompt_beyond_the_context_does_not_stop_the_others(prompt, recall_model, cli, mistake, tmp_path, capsys):
    (tmp_path / "prompts").write_text(f"0\n\n{prompt}\n7\n")
    flags = [f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=3"]
    with pytest.raises(SystemExit) as e:
        cli(recall_model, *flags, "--parallel=2", "--json")
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("text") for line in lines] == [["123"], None, ["890"]]
    assert TOO_LONG[prompt] in lines[1]["error"] and e.value.code == 2
    assert all(note in err for note in ("line 2 is empty", "prompt 2", "1 of 3 prompts"))
    assert f"prompt 2: {TOO_LONG[prompt]}" in mistake(recall_model, *flags)  # without --parallel


def test_a_prompt_that_is_refused_takes_no_memory(recall_model):
    """A refused prompt does not make slots longer than the other prompts need."""
    model, tokenizer = load(recall_model / "model.pth", dtype=torch.float32)
    options = {"tokenizer": tokenizer, "eos_ids": model.config.eos_ids}
    sequences = [Sequence(tokenizer.encode(text), 5, **options) for text in ("0", "5" * 300, "S")]
    scheduler = build_scheduler(model, sequences, 16)
    assert scheduler.max_seq_len == max(len(sequences[i].prompt_ids) for i in (0, 2)) + 5
    texts = [sequence.text or sequence.error for _, sequence in scheduler.run(sequences)]
    assert texts[0] == "12345" and "exceed" in texts[1] and texts[2] == "🙂E"


def test_a_mistake_in_every_prompt_is_one_line(recall_model, mistake, capsys, tmp_path):
    (tmp_path / "prompts").write_text("a\nb\n")
    flags = [f"--prompt_file={tmp_path / 'prompts'}", "--parallel=2"]
    assert "prompt 1: 1 prompt tokens and 999 new ones" in mistake(recall_model, *flags, "--max_new_tokens=999")
    assert "chat template" in mistake(recall_model, *flags, "--chat")


def test_a_prompt_is_the_same_wherever_it_stands(recall_model, ask, tmp_path):
    """A prompt keeps its spaces, even in the last line. Line breaks and empty lines at the end of the file do not
    count."""
    for end in ("", "\n", "\r\n", "\n\n  \n"):
        (tmp_path / "prompts").write_bytes(f"0 \r\n1\r\n0 {end}".encode())
        found = ask(recall_model, f"--prompt_file={tmp_path / 'prompts'}", "--max_new_tokens=1", "--parallel=2")
        assert [r["prompt"] for r in found] == ["0 ", "1", "0 "]


def test_ctrl_c_keeps_complete_results(recall_model, capsys, monkeypatch):
    """After Ctrl-C at any moment, each complete result is printed exactly once."""
    model, tokenizer = load(recall_model / "model.pth", dtype=torch.float32)
    reporter = Reporter(model, "float32", compile=False, as_json=False, load_seconds=0.0)
    interrupted_at = 0
    while True:
        n_left = interrupted_at = interrupted_at + 1

        def interrupt(frame, event, arg):
            nonlocal n_left
            if frame.f_code.co_name in ("generate_in_parallel", "print_sequence", "step"):
                n_left -= event in ("call", "return")
                if n_left == 0:
                    raise KeyboardInterrupt

        sequences = [build_sequence(text, tokenizer, model.config, 9) for text in ("0", "S", "P", "W", "S", "3")]
        capsys.readouterr()
        try:
            sys.setprofile(interrupt)
            generate_in_parallel(model, sequences, 3, reporter)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        printed = capsys.readouterr().out
        expected = [f"--- prompt {i}\n{one.text}\n" for i, one in enumerate(sequences, 1) if one.finish_reason]
        assert printed == "".join(expected)
        if n_left > 0:  # the run ended before Ctrl-C
            break
    assert interrupted_at > 40


def test_logprobs_on_the_command_line(recall_model, ask):
    (r,) = ask(recall_model, "--prompt=0", "--max_new_tokens=3", "--logprobs=2")
    (row,) = r["logprobs"]
    assert [len(step["top"]) for step in row] == [2, 2, 2]
    assert [step["top"][0] for step in row] == [[i, step["token"]] for i, step in zip(r["tokens"][0], row, strict=True)]
    (r,) = ask(recall_model, "--prompt=0", "--max_new_tokens=3", "--logprobs=0")
    assert [step["top"] for step in r["logprobs"][0]] == [[], [], []]


def test_jsonl_prompts(chat_model, ask, tmp_path):
    lines = [{"prompt": "two\nlines"}, {"messages": [{"role": "user", "content": "two\nlines"}]}]
    parts = [{"type": "text", "text": word} for word in ("two", "lines")]
    lines.append({"messages": [{"role": "user", "content": parts}]})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--max_new_tokens=8", "--temperature=0"]
    (plain,) = ask(chat_model, "--prompt=two\nlines", *flags)
    (chat,) = ask(chat_model, "--prompt=two\nlines", "--chat", *flags)
    from_file = ask(chat_model, f"--prompt_file={tmp_path / 'prompts.jsonl'}", *flags, "--parallel=2")
    assert [r["text"] for r in from_file] == [plain["text"], chat["text"], chat["text"]]


BROKEN_LINES = ["{", "5", "{}", '{"prompt": 5}', '{"messages": []}', '{"messages": [{"role": "user"}]}']


@pytest.mark.parametrize("line", BROKEN_LINES)
def test_broken_jsonl_is_named(line, chat_model, mistake, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line)
    assert "line 2" in mistake(chat_model, f"--prompt_file={tmp_path / 'prompts.jsonl'}")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--parallel=2"], "--prompt_file"),
        (["--parallel=0", "--prompt_file=FILE"], "at least 1"),
        (["--parallel=2", "--chat"], "--prompt_file"),
        (["--parallel=2", "--prompt_file=FILE", "--prompt_lookup"], "speculation"),
        (["--parallel=2", "--prompt_file=FILE", "--batch_size=2"], "--batch_size"),
        (["--prompt=a", "--stop="], "--stop"),
        (["--prompt=a", "--logprobs=1"], "--json"),
        (["--prompt=a", "--logprobs=-1", "--json"], "0 or more"),
        (["--prompt=a", "--logprobs=1", "--json", "--batch_size=2"], "--batch_size"),
    ],
)
def test_wrong_options_are_named(flags, message, recall_model, mistake, tmp_path):
    (tmp_path / "prompts").write_text("a\nb\n")
    flags = [flag.replace("FILE", str(tmp_path / "prompts")) for flag in flags]
    assert message in mistake(recall_model, *flags)

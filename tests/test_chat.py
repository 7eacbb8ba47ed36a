"""A conversation gives the same answers with its KV cache as with an empty cache."""

import os
import sys
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import generate
from cli.script import run_script
from converters.hf_config import config_from_hf
from engine import generation
from engine.chat import ContextFull, Conversation
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from kernels import build
from layers.kv_cache import KVCache
from llm import LLM
from loading import load, load_model
from model import Transformer
from tests.byte_models import END, TEMPLATE, set_up, write_folder, zero_tensors
from tests.tiny_tokenizers import TEMPLATES, train, write
from text.tokenizer import load_tokenizer
from utils.errors import UsageError

GREEDY = ["--temperature=0", "--precision=float32", "--max_new_tokens=12"]
CONTEXT = 160  # of chat_model


@cache
def model_of(path: Path) -> Transformer:
    return load_model(path, dtype=torch.float32)


def fresh_answer(folder: Path, messages: list[dict], n: int = 12) -> tuple[list[int], list[int]]:
    """Returns the ids of the prompt, and up to n ids of the answer, computed with an empty cache."""
    ids = load_tokenizer(folder).encode_chat(messages)
    return ids, fresh_tokens(folder, ids, n)


def fresh_tokens(folder: Path, ids: list[int], n: int) -> list[int]:
    model = model_of((folder / "model.pth").resolve())
    runner = ModelRunner(model, KVCache(model, 1, CONTEXT), SamplingParams())
    new = [i for (i,) in generation.DecodeLoop(runner).decode_tokens(torch.tensor([ids]), n)]
    return new[: new.index(END)] if END in new else new


def expected_conversation(folder: Path, lines: list[str], system: str | None = None):
    """Returns for each line: the ids of the whole prompt, the ids of the answer, and its text."""
    messages, turns = [{"role": "system", "content": system}] if system else [], []
    for line in lines:
        messages.append({"role": "user", "content": line})
        ids, answer = fresh_answer(folder, messages)
        text = bytes(answer).decode()
        turns.append((ids, answer, text))
        messages.append({"role": "assistant", "content": text})
    return turns


@pytest.fixture
def fed(monkeypatch):
    """Records how many tokens each prefill computes. fed.interrupt: the number of the prefill that Ctrl-C
    interrupts."""

    class Fed(list):
        interrupt = None

    fed, hidden = Fed(), Transformer.compute_hidden

    def listen(self, tokens, *others):
        if tokens.shape[1] > 1:
            fed.append(tokens.shape[1])
            if len(fed) == fed.interrupt:
                raise KeyboardInterrupt
        return hidden(self, tokens, *others)

    monkeypatch.setattr(Transformer, "compute_hidden", listen)
    return fed


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("m.content", "m.content | lower")])
@pytest.mark.parametrize("args", [["--chat"], ["--interactive", "--system=Be brief"]])
def test_cached_answers_equal_uncached_ones(chat_model, cli, fed, tmp_path, args, template):
    """An answer equals one with an empty cache, and prefill computes only tokens that are not in the cache."""
    for name in ("model.pth", "tokenizer.json"):
        (tmp_path / name).symlink_to(chat_model / name)
    (tmp_path / "chat_template.jinja").write_text(template)
    lines = ["Hi", "how are you?", "bye"]
    turns = expected_conversation(tmp_path, lines, "Be brief" if len(args) > 1 else None)
    fed.clear()
    assert cli(tmp_path, *args, *GREEDY, stdin="\n".join(lines)).splitlines() == [text for _, _, text in turns]
    in_cache = [[]] + [ids + answer[:-1] for ids, answer, _ in turns]
    known = [len(os.path.commonprefix([ids, cached])) for (ids, _, _), cached in zip(turns, in_cache, strict=False)]
    assert fed == [len(ids) - k for (ids, _, _), k in zip(turns, known, strict=True)]


def test_compiled_conversation(chat_model, cli, monkeypatch):
    """All turns of a conversation share compiled code. Inductor is left out, since test_generate.py tests its code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lines = ["Hi", "how are you?", "bye"]
    out = cli(chat_model, "--chat", "--compile", "--compile_prefill", *GREEDY, stdin="\n".join(lines))
    assert out.splitlines() == [text for _, _, text in expected_conversation(chat_model, lines)]
    # a block for prefill and, without kernels, one for decode and the head: nothing again in any turn
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if build.load_cpp_kernels() else 3)


def test_conversation_reset_and_exit(chat_model, cli):
    hi, bye = (expected_conversation(chat_model, [line])[0][2] for line in ("Hi", "bye"))
    out = cli(chat_model, "--chat", *GREEDY, stdin="Hi\n\n/reset\nbye\n/reset\n  Hi \n/exit\nHi\n")
    assert out.splitlines() == [hi, bye, hi]


def test_conversation_survives_an_interrupt(chat_model, cli, fed):
    fed.interrupt = 2
    printed = cli(chat_model, "--chat", *GREEDY, stdin="Hi\nhow are you?\nbye\n").splitlines()
    hi = expected_conversation(chat_model, ["Hi"])[0][2]
    rest = [(), ({"role": "user", "content": "how are you?"}, {"role": "assistant", "content": ""})]
    first = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": hi})
    last = {"role": "user", "content": "bye"}  # with or without the unanswered turn
    assert printed[0] == hi
    assert printed[-1] in [bytes(fresh_answer(chat_model, [*first, *r, last])[1]).decode() for r in rest]


def test_an_interrupted_answer_stays(chat_model):
    """After Ctrl-C, the next answer is that of an empty cache and only the tokens before the interrupt."""
    model, tokenizer = load(chat_model / "model.pth", dtype=torch.float32)
    kv_cache = KVCache(model, 1, CONTEXT)
    loop = generation.DecodeLoop(ModelRunner(model, kv_cache))
    conversation = Conversation(tokenizer, loop, CONTEXT, model.config.eos_ids)
    pieces = conversation.answer("Hi", 12)
    heard = next(pieces) + next(pieces)
    pieces.close()
    hi = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": heard}]
    assert conversation.messages == hi and len(heard) == 2
    answer = "".join(conversation.answer("bye", 12))
    assert answer == bytes(fresh_answer(chat_model, [*hi, {"role": "user", "content": "bye"}])[1]).decode()
    conversation.drop_oldest()
    assert [m["content"] for m in conversation.messages] == ["bye", answer]


@pytest.fixture
def conversation(chat_model) -> Conversation:
    return LLM(chat_model / "model.pth", "cpu", torch.float32, CONTEXT, temperature=0).chat("Be brief")


def test_the_oldest_messages_are_forgotten(chat_model, conversation, fed):
    """As few messages as possible are forgotten. The next answer is the one without them."""
    n_dropped, cached = [], []
    for i in range(12):
        before, question = conversation.to_list(), {"role": "user", "content": f"{i} " * (i + 1)}
        fed.clear()
        answer = "".join(conversation.answer(question["content"], 12))
        n_fed = list(fed)
        messages = [before[0], *before[1 + conversation.n_dropped :], question]
        ids, expected = fresh_answer(chat_model, messages)
        assert answer == bytes(expected).decode()
        assert conversation.to_list() == [*messages, {"role": "assistant", "content": answer}]
        assert n_fed == [len(ids) - len(os.path.commonprefix([ids, cached]))]
        cached = (ids + expected)[: len(conversation.cached_ids)]
        assert conversation.cached_ids == cached
        n_dropped.append(conversation.n_dropped)
        all_ids = conversation.tokenizer.encode_chat([*before, question])
        assert (len(all_ids) + 12 > CONTEXT) == (n_dropped[-1] > 0)
        assert n_dropped[-1] == 0 or len(messages) == 2 or len(ids) <= CONTEXT * 3 / 4
    assert 2 < sum(n > 0 for n in n_dropped) < 8 and not any(n % 2 for n in n_dropped)


def test_continued_answer(chat_model, conversation):
    """A continued answer has the tokens that it has uninterrupted, even if older messages had to be forgotten."""
    question = {"role": "user", "content": "Hi"}
    _, expected = fresh_answer(chat_model, [*conversation.system, question])
    heard = "".join(conversation.answer("Hi", 5))
    assert conversation.finish_reason == "length" and heard == bytes(expected[:5]).decode()
    stopped = conversation.continue_answer(7)
    heard += next(stopped)
    stopped.close()
    assert conversation.finish_reason == "interrupted"
    heard += "".join(conversation.continue_answer(6))
    assert heard == bytes(expected).decode()
    conversation.messages += [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y" * 50}]
    "".join(conversation.answer("Ho"))
    while conversation.finish_reason == "stop":  # until one fills the context
        "".join(conversation.answer("Ho"))
    assert conversation.finish_reason == "context"
    said, pieces = conversation.messages[-1]["content"], conversation.continue_answer(9)
    ids = conversation.encode("Ho", conversation.messages[:-2]) + conversation.answer_ids
    expected = fresh_tokens(chat_model, ids, 9)
    assert "".join(pieces) == bytes(expected).decode() and conversation.n_dropped > 0
    assert conversation.messages[-1]["content"] == said + bytes(expected).decode()


def test_answers_that_cannot_be_continued(conversation):
    with pytest.raises(UsageError, match="no cut answer"):
        conversation.continue_answer()
    "".join(conversation.answer("x" * 140))
    assert conversation.finish_reason == "context"
    before = conversation.to_list()
    with pytest.raises(ContextFull, match="take 160 tokens"):
        conversation.continue_answer()
    with pytest.raises(ContextFull, match="That takes 213 tokens, and the context has 160: shorten it."):
        conversation.answer("x" * 200)
    assert conversation.to_list() == before
    conversation.drop_oldest()
    with pytest.raises(UsageError, match="no cut answer"):
        conversation.continue_answer()


def test_notes_on_stderr(chat_model, monkeypatch, capsys):
    """stderr has all notes, in order, and stdout has only the four answers."""
    said = f"/what\n/help\nHi\n/DROP\n{'x' * 200}\n{'x' * 155}\nHi\n/reset\n"
    said += "/drop\n/drop it\n/save\n//drop it\n/drop\n/etc/motd\n"
    set_up(monkeypatch, chat_model / "model.pth", ["--chat", *GREEDY], said)
    with pytest.raises(SystemExit) as stopped:
        run_script(generate.main)
    out, err = capsys.readouterr()
    hi, drop, path = (expected_conversation(chat_model, [line])[0][2] for line in ("Hi", "/drop it", "/etc/motd"))
    answers = out.splitlines()
    assert answers[:1] + answers[2:] == [hi, hi, drop, path] and len(answers[1]) <= 2
    notes = [note for note in err.splitlines() if not note.endswith("tokens/s")]
    unknown = "{0} is none of the commands; to say it, write /{0}. Type a message"
    assert [note.split("; /continue")[0] for note in notes] == [
        "Type a message", unknown.format("/what"), "Type a message", "Cut by --max_new_tokens",
        '"Hi" and its answer are forgotten; 0 messages left.',
        "That takes 203 tokens, and the context has 160: shorten it.", "Cut because the context is full",
        "The context is full: from now on the oldest messages are forgotten.", "Cut by --max_new_tokens",
        "0 messages left.", "There is nothing to forget; 0 messages left.",
        "/drop stands alone; to say it, write //drop it.",
        "/save needs the name of a file; to say it, write //save.", "Cut by --max_new_tokens",
        '"/drop it" and its answer are forgotten; 0 messages left.', "Cut by --max_new_tokens",
        "generate.py: lines on standard input that could not be answered: 4",
    ]
    assert stopped.value.code == 2


def test_chat_applies_the_template(chat_model, ask, tmp_path):
    expected = expected_conversation(chat_model, ["Hi"], "Be brief")[0]
    (tmp_path / "prompts").write_text("Hi\n")
    for prompt in ("--prompt=Hi", f"--prompt_file={tmp_path / 'prompts'}"):
        (r,) = ask(chat_model, "--chat", prompt, "--system=Be brief", *GREEDY)
        assert (r["prompt_tokens"], r["text"]) == (len(expected[0]), [expected[2]])


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is Python's in the C locale
def test_stdin_that_is_not_text(chat_model, monkeypatch, capsys, errors):
    set_up(monkeypatch, chat_model / "model.pth", ["--chat", *GREEDY], b"Hi\nH\xe4user\n\nbye\nbye")
    sys.stdin.reconfigure(errors=errors)
    with pytest.raises(SystemExit) as stopped:
        run_script(generate.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == expected_conversation(chat_model, ["Hi"])[0][2] + "\n"
    assert err.splitlines()[-2] == "Lines on standard input that were not read: 2."
    assert "UTF-8" in err.splitlines()[-1]


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory) -> Path:
    """Returns the folder of a model that was fine-tuned on ChatML: config.json names the end token of the base model,
    and the model has more tokens than its tokenizer. After a line break it generates "<think>a</think>B<|im_end|>",
    with a token before B that has no text."""
    size = 448
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": size,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "vocab_size": size,
        "num_attention_heads": 1,
        "head_dim": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
    }
    config, tok = config_from_hf(hf), train("qwen2")
    tensors = zero_tensors(config)
    tensors |= {"embed_tokens.weight": torch.eye(size), "norm.weight": torch.ones(size)}
    line_break, *answer = map(tok.token_to_id, ["Ċ", "<think>", "a", "</think>", "B", "<|im_end|>"])
    for last, following in pairwise([line_break, *answer[:3], size - 1, *answer[3:]]):
        tensors["lm_head.weight"][following, last] = 4
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATES["qwen3"]}
    folder = write_folder(write(tmp_path_factory.mktemp("fine_tune"), settings), config, tensors)
    tok.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "args", [["--chat", "--prompt=Hi"], ["--prompt=<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]]
)
def test_a_fine_tune_ends_its_turn(fine_tune, cli, ask, args):
    """A turn ends at <|im_end|>, in a chat and in a prompt that contains special tokens of the template."""
    tokenizer = load_tokenizer(fine_tune)
    (r,) = ask(fine_tune, *args, *GREEDY, "--batch_size=2")
    assert r["prompt_tokens"] == len(tokenizer.encode_chat([{"role": "user", "content": "Hi"}]))
    assert r["text"] == ["<think>a</think>B"] * 2 and r["finish_reason"] == ["stop"] * 2
    assert r["tokens"][0][3:] == [447, *tokenizer.encode("B<|im_end|>")]
    assert cli(fine_tune, *args, *GREEDY) == "<think>a</think>B\n"


def test_thoughts_are_shown_but_forgotten(fine_tune, cli):
    """Thoughts are printed, but are not part of later prompts, because the template leaves them out."""
    assert cli(fine_tune, "--chat", *GREEDY, stdin="Hi\nHo\n") == "<think>a</think>B\n" * 2
    conversation = LLM(fine_tune / "model.pth", "cpu", torch.float32).chat()
    for message in ("Hi", "Ho"):
        ids = conversation.encode(message)
        assert "think" not in conversation.tokenizer.decode(ids)
        assert list(conversation.answer(message, 12)) == ["<think>", "a", "</think>", "B"]
        assert conversation.messages[-1]["content"] == "<think>a</think>B"
        assert conversation.cached_ids == ids + conversation.answer_ids


@pytest.mark.parametrize("change", [
    lambda chat: "".join(chat.answer("Ho", 6)), lambda chat: "".join(chat.continue_answer(6)),
    lambda chat: chat.load([]), lambda chat: chat.drop_oldest(), lambda chat: chat.drop_all(),
])
@pytest.mark.parametrize("n_taken", [0, 1, 3])
def test_a_conversation_has_one_answer_at_a_time(chat_model, change, n_taken):
    """Another answer, or a change to the messages, ends the first answer as its caller could have."""
    llm = LLM(chat_model / "model.pth", device="cpu", max_seq_len=CONTEXT)
    results = []
    for is_closed in (True, False):
        chat = llm.chat(system="Be brief")
        "".join(chat.answer("Hi", 4))
        pieces = chat.answer("Hey", 12)
        taken = [next(pieces) for _ in range(n_taken)]
        if is_closed:
            pieces.close()
        results.append([taken, change(chat), chat.to_list(), chat.finish_reason, chat.cached_ids])
        assert next(pieces, None) is None
        results[-1] += [chat.to_list(), "".join(chat.answer("bye", 6))]
    assert results[0] == results[1]

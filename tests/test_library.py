"""As a library, the project gives the same results as the commands, and importing it changes nothing in the process."""

import gc
import json
import os
import subprocess
import sys
from functools import partial
from itertools import zip_longest

import pytest
import torch

from engine.chat import Conversation
from engine.sampling_params import SamplingParams
from llm import LLM, DecodeLoop, KVCache, ModelRunner, load
from tests.tiny import PACKAGES, write_folder
from text.tokenizer import detokenize
from utils.errors import UsageError
from utils.files import ROOT


def test_text(chat_model, ask):
    """The functions of the library generate the same text as generate.py --prompt."""
    model, tokenizer = load(str(chat_model / "model.pth"), device="cpu", dtype=torch.bfloat16)
    kv_cache = KVCache(model, batch_size=1, max_seq_len=100)
    loop = DecodeLoop(ModelRunner(model, kv_cache, SamplingParams(temperature=0.8, top_p=0.9)))
    prompt = tokenizer.encode("Hello, my name is")
    torch.manual_seed(1234)
    tokens = [ids[0] for ids in loop.decode_tokens(torch.tensor([prompt]), max_new_tokens=20)]
    text = "".join(detokenize(tokenizer, tokens, prefix_ids=prompt))

    (result,) = ask(chat_model, "--prompt=Hello, my name is", "--max_new_tokens=20", "--top_p=0.9", "--ignore_eos")
    assert result["tokens"] == [tokens] and result["text"] == [text] and len(text) > 10


def test_conversation(chat_model, cli):
    """Conversation gives the same answers as generate.py --chat. Another cache of the same model does not change."""
    model, tokenizer = load(chat_model / "model.pth")
    kv_cache, other_kv_cache = (KVCache(model, 1, 160) for _ in range(2))
    runner, other_runner = (ModelRunner(model, cache, SamplingParams()) for cache in (kv_cache, other_kv_cache))
    other = DecodeLoop(other_runner).decode_tokens(torch.tensor([tokenizer.encode("Hello")]), 30)
    loop = DecodeLoop(runner)
    conversation = Conversation(tokenizer, loop, kv_cache.max_seq_len, model.config.eos_ids)
    answers, other_ids = [], []
    for message in ("Hi", "how are you?"):
        other_ids += next(other) + next(other)
        answers.append("".join(conversation.answer(message, max_new_tokens=12)))

    flags = ["--temperature=0", "--max_new_tokens=12"]
    assert cli(chat_model, "--chat", *flags, stdin="Hi\nhow are you?\n").splitlines() == answers
    assert cli(chat_model, "--prompt=Hello", *flags, "--max_new_tokens=4") == bytes(other_ids).decode() + "\n"


def test_llm(chat_model, cli):
    """LLM gives the texts of generate.py, up to an end token, even if one comes between two turns of a conversation."""
    llm = LLM(chat_model / "model.pth", device="cpu", max_seq_len=160)
    flags = ["--temperature=0", "--max_new_tokens=12"]
    text = cli(chat_model, "--prompt=Hello", *flags).removesuffix("\n")
    answers = cli(chat_model, "--chat", "--system=Be brief", *flags, stdin="Hi\nhow are you?\n").splitlines()
    conversation = llm.chat(system="Be brief")
    for message, answer in zip(("Hi", "how are you?"), answers, strict=True):
        assert "".join(conversation.answer(message, max_new_tokens=12)) == answer
        assert "".join(llm.generate("Hello", max_new_tokens=12)) == text
    both = zip(llm.generate("Hello", max_new_tokens=12), llm.generate("Hello", max_new_tokens=12), strict=True)
    assert "".join(a + b for a, b in both) == "".join(2 * letter for letter in text)  # two at once
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert "".join(llm.generate(messages, max_new_tokens=12)) == answers[0]
    assert "".join(llm.generate("Hello", max_new_tokens=12, stop=(text[4:6],))) == text.split(text[4:6])[0]
    stop = (answers[0][2:4],)
    brief = llm.chat(system="Be brief", stop=stop)
    assert "".join(brief.answer("Hi", max_new_tokens=12)) == answers[0].split(stop[0])[0]
    assert list(llm.generate_many(["Hello", "Hello"], max_new_tokens=12)) == [(0, text), (1, text)]
    with pytest.raises(UsageError, match="the prompt is empty"):
        llm.generate("", max_new_tokens=12)
    with pytest.raises(UsageError, match="exceed the context of 160 tokens$"):
        llm.generate("Hello", max_new_tokens=160)
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1, not -1"):
        llm.generate("Hello", max_new_tokens=-1)
    with pytest.raises(UsageError, match="max_new_tokens must be an integer, not 2.5"):
        llm.generate("Hello", max_new_tokens=2.5)
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1, not 0"):
        conversation.answer("Hello", max_new_tokens=0)
    for wrong in ("no", ("",), (5,), None):
        with pytest.raises(UsageError, match="stop must be a tuple of strings"):
            llm.generate("Hello", max_new_tokens=12, stop=wrong)
    for wrong in (5, None, b"Hello"):
        with pytest.raises(UsageError, match="a prompt must be a text or a list of messages, not "):
            llm.generate(wrong, max_new_tokens=12)
    with pytest.raises(UsageError, match="a list of prompts"):
        llm.generate_many("Hello")
    for wrong in ([{"role": "user"}], [{"role": "user", "content": None}], ["Hi"]):
        with pytest.raises(UsageError, match="message.* not "):
            llm.generate(wrong, max_new_tokens=12)
    for start in (partial(LLM, chat_model / "model.pth"), partial(llm.generate, "Hello", 12),
                  partial(llm.generate_many, ["Hello"]), llm.chat):
        with pytest.raises(UsageError, match="^foo is not a sampling option; these are: temperature, top_k"):
            start(foo=1)
        with pytest.raises(UsageError, match="^top_k must be at least 1, not 0"):
            start(top_k=0)
    with pytest.raises(UsageError, match="temperature must be a number, not 'hot'"):
        LLM(chat_model / "model.pth", temperature="hot")
    for wrong in ("bfloat16", torch.int8, None):
        with pytest.raises(UsageError, match="dtype must be torch.bfloat16, torch.float16 or torch.float32, not "):
            LLM(chat_model / "model.pth", dtype=wrong)
    with pytest.raises(UsageError, match="exceed the context of 20 tokens, which is LLM's max_seq_len; raise it"):
        LLM(chat_model / "model.pth", max_seq_len=20).generate("Hello", max_new_tokens=16)
    assert LLM(chat_model / "model.pth", max_seq_len=10**6, temperature=0.5).max_seq_len == llm.model.config.max_seq_len


def test_texts_at_once(chat_model):
    """Two chats and other texts, in turns, come out as they do alone. Afterwards the LLM keeps one KV cache."""
    llm = LLM(chat_model / "model.pth", device="cpu", max_seq_len=160)

    def texts() -> list:
        """Texts that have not begun."""
        chats = [llm.chat(), llm.chat(system="Be brief"), llm.chat(seed=3, temperature=2.0)]
        answers = [chat.answer(message, 12) for chat, message in zip(chats, ("Hi", "Ho", "Hi"), strict=True)]
        return [*answers, llm.generate("Hello", 12), llm.generate("Hi", 12), llm.generate("Hello", 12, seed=5)]

    alone = ["".join(text) for text in texts()]
    in_turns = zip_longest(*texts(), fillvalue="")
    assert ["".join(parts) for parts in zip(*in_turns, strict=True)] == alone
    in_turns = None
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is KVCache and o.token_ids.shape[1] == 160]
    assert [id(o) for o in alive] == [id(llm.spare_loop.runner.kv_cache)]


@pytest.mark.parametrize("family, n", [("llama3", 40), ("dynamic", 40), ("phi4-mini", 9)])
def test_a_logits_processor_does_not_change_the_angles(family, n, tmp_path):
    """RoPE of type dynamic or longrope depends on the KV cache's length. A text with a logits_processor that changes
    nothing is the text without it. Where the length changes no text, the cache has just the text's length."""
    write_folder(family, tmp_path)
    llm = LLM(tmp_path, device="cpu", dtype=torch.float32, max_seq_len=400)
    text = "".join(llm.generate("Hello", n))
    before = {id(o) for o in gc.get_objects() if type(o) is KVCache}
    pieces = llm.generate("Hello", n, logits_processor=lambda ids, logits: logits)
    first = next(pieces)
    new = [o for o in gc.get_objects() if type(o) is KVCache and id(o) not in before]
    assert first + "".join(pieces) == text
    length = len(llm.tokenizer.encode("Hello")) + n if family == "llama3" else llm.max_seq_len
    assert {kv_cache.max_seq_len for kv_cache in new} == {length}


WRONG_ARGUMENTS = [
    (lambda path: LLM(None), "checkpoint_path must be a path, not None"),
    (lambda path: LLM(path, max_seq_len="x"), "max_seq_len must be an integer, not 'x'"),
    (lambda path: LLM(path, max_seq_len=0), "max_seq_len must be at least 1, not 0"),
    (lambda path: LLM(path, device="cud"), "device 'cud' is not available"),
    (lambda path: LLM(path, device=5), "device 5 is not available"),
    (lambda llm: llm.generate("Hi", True), "max_new_tokens must be an integer, not True"),
    (lambda llm: llm.generate("Hi", 5, seed=True), "seed must be an integer, not True"),
    (lambda llm: llm.generate("Hi", 5, logits_processor=5), "logits_processor must be a function, not 5"),
    (lambda llm: llm.generate("Hi", 5, repetition_penalty=1e-39), "repetition_penalty must be 0.01 to 100, not 1e-39"),
    (lambda llm: llm.generate_many(None), "generate_many takes a list of prompts, not None"),
    (lambda llm: llm.generate_many(5), "generate_many takes a list of prompts, not 5"),
    (lambda llm: llm.generate_many({"role": "user", "content": "Hi"}), "generate_many takes a list of prompts, not {"),
    (lambda llm: llm.generate_many(["Hi"], parallel="x"), "parallel must be an integer, not 'x'"),
    (lambda llm: llm.generate_many(["Hi"], parallel=0), "parallel must be at least 1, not 0"),
    (lambda llm: llm.generate_many(["Hi"], seed="abc"), "seed must be an integer, not 'abc'"),
    (lambda llm: llm.chat(seed="abc"), "seed must be an integer, not 'abc'"),
    (lambda llm: llm.chat(stop="abc"), "stop must be a tuple of strings"),
    (lambda llm: llm.chat(system=5), "a message must have a role .* not {'role': 'system', 'content': 5}"),
    (lambda llm: llm.chat(system="\ud800"), "a message is not valid UTF-8"),
    (lambda llm: llm.chat().answer(None), "a message must have a role .* not {'role': 'user', 'content': None}"),
    (lambda llm: llm.chat().answer("\ud800"), "a message is not valid UTF-8"),
    (lambda llm: llm.chat().answer("Hi", "x"), "max_new_tokens must be an integer, not 'x'"),
    (lambda llm: llm.chat().load(5), "A conversation is a list of"),
    (lambda llm: llm.build_loop(llm.params, batch_size=0), "batch_size must be at least 1, not 0"),
    (lambda llm: llm.build_loop(llm.params, max_seq_len=1.5), "max_seq_len must be an integer, not 1.5"),
]


def test_wrong_arguments(chat_model):
    """Each is refused at the call, in one line."""
    path = chat_model / "model.pth"
    llm = LLM(path, device="cpu")
    for call, message in WRONG_ARGUMENTS:
        with pytest.raises(UsageError, match=f"^{message}[^\n]*$"):
            call(path if call.__code__.co_varnames == ("path",) else llm)


def test_sampling_options_of_a_call(chat_model):
    """Options of a call replace those of the LLM for that call, even while a text with other options is generated."""
    greedy, hot = (LLM(chat_model / "model.pth", device="cpu", temperature=t, top_k=20) for t in (0, 5.0))

    def text(llm: LLM, **sampling) -> str:
        torch.manual_seed(0)
        return "".join(llm.generate("Hello", max_new_tokens=20, **sampling))

    expected = text(greedy), text(hot)
    assert expected[0] != expected[1]
    for _ in range(2):
        assert (text(hot, temperature=0), text(greedy, temperature=5)) == expected
        assert (text(greedy), text(hot)) == expected
    assert text(hot, top_k=1) == expected[0] and text(greedy, temperature=5, top_k=None) != expected[1]
    assert greedy.spare_loop is not None

    pieces = greedy.generate("Hello", max_new_tokens=20)
    first = next(pieces)
    assert text(greedy, temperature=5) == expected[1]
    assert first + "".join(pieces) == expected[0]

    many = list(hot.generate_many(["Hello"], max_new_tokens=20, temperature=0))
    assert many == [(0, expected[0])] and many != list(hot.generate_many(["Hello"], max_new_tokens=20))
    answers = ["".join(llm.chat(**options).answer("Hi", 20)) for llm, options in ((greedy, {}), (hot, {"top_k": 1}))]
    assert answers[0] == answers[1]


def test_seeds(chat_model):
    """A text with a seed depends neither on other texts nor on the generator of PyTorch, and leaves that unchanged."""
    llm = LLM(chat_model / "model.pth", device="cpu", temperature=2.0)
    torch.manual_seed(5)
    expected = ["".join(llm.generate("Hello", 20, seed=seed)) for seed in (7, 8, 9)]
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert len(set(expected)) == 3
    pieces = [llm.generate("Hello", 20, seed=seed) for seed in (7, 8)]
    in_turns = list(zip_longest(*pieces, fillvalue=""))
    assert ["".join(parts) for parts in zip(*in_turns, strict=True)] == expected[:2]
    next(llm.generate("Hello", 20, seed=1))  # the rest is never taken
    for parallel in (1, 2, 3):
        many = llm.generate_many(["Hello"] * 3, parallel, max_new_tokens=20, seed=7)
        assert list(many) == list(enumerate(expected))
    chats = [llm.chat(seed=3) for _ in range(2)]
    first, second = (["".join(chat.answer(message, 12)) for message in ("Hi", "Oh")] for chat in chats)
    assert first == second
    messages = [{"role": "user", "content": "Hi"}]
    assert first[0] == "".join(llm.generate(messages, 12, seed=3))
    messages += [{"role": "assistant", "content": first[0]}, {"role": "user", "content": "Oh"}]
    assert first[1] == "".join(llm.generate(messages, 12, seed=4))


def test_without_a_seed(chat_model):
    """Texts follow torch.manual_seed, in every loop. A greedy text draws no random number."""
    llm = LLM(chat_model / "model.pth", device="cpu", temperature=2.0)

    def texts() -> list[str]:
        texts = []
        for text in (
            llm.generate("Hello", 20), (text for _, text in llm.generate_many(["Hello"], max_new_tokens=20)),
            llm.generate("Hello", 20, logits_processor=lambda ids, logits: logits),
        ):
            torch.manual_seed(7)
            texts.append("".join(text))
        return texts

    assert texts() == ["".join(llm.generate("Hello", 20, seed=7))] * 3
    torch.manual_seed(5)
    for generated in (llm.generate("Hello", 20, temperature=0), llm.chat(temperature=0).answer("Hello", 20)):
        assert len("".join(generated)) > 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("result", [
    lambda logits: logits[:10], lambda logits: logits[None], lambda logits: None, lambda logits: logits.long(),
    lambda logits: logits * torch.nan, lambda logits: logits - torch.inf, lambda logits: logits.double() * 1e300,
])
def test_a_logits_processor_that_is_wrong(chat_model, result):
    llm = LLM(chat_model / "model.pth", device="cpu", max_seq_len=160)
    with pytest.raises(UsageError, match="logits_processor"):
        "".join(llm.generate("Hello", 6, logits_processor=lambda ids, logits: result(logits)))
    half = llm.generate("Hello", 6, logits_processor=lambda ids, logits: logits.bfloat16())
    assert len("".join(half)) > 0
    with pytest.raises(UsageError, match="seed must be an integer"):
        llm.generate("Hello", 6, seed=1.5)


def test_logits_processor(chat_model):
    """A logits_processor gets the ids of prompt and text, excludes tokens with -inf, and affects no other text."""
    llm = LLM(chat_model / "model.pth", device="cpu", max_seq_len=160)
    free, prompt_ids, seen = "".join(llm.generate("Hello", 12)), llm.tokenizer.encode("Hello"), []
    allowed = llm.tokenizer.encode("ab", bos=False)

    def alternate(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(token_ids)
        others = torch.ones_like(logits, dtype=torch.bool)
        others[allowed[len(seen) % 2 - 1]] = False
        return logits.masked_fill(others, -torch.inf)

    for options in ({}, {"temperature": 1e6}, {"temperature": 0.5, "top_p": 0.9, "seed": 1}):
        seen.clear()
        assert "".join(llm.generate("Hello", 6, logits_processor=alternate, **options)) == "ababab"
        new_ids = (allowed * 3)[:5]
        assert seen == [prompt_ids + new_ids[:n] for n in range(6)]
    assert "".join(llm.generate("Hello", 12, logits_processor=lambda ids, logits: logits)) == free

    def allow_with_a_small_logit(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(allowed[0]), -3e38)

    assert "".join(llm.generate("Hello", 3, logits_processor=allow_with_a_small_logit, temperature=1.0)) == "aaa"
    many = llm.generate_many(["Hello", "Hello"], max_new_tokens=12, logits_processor=lambda ids, logits: -logits)
    texts = [text for _, text in many]
    assert texts[0] == texts[1] != free == "".join(llm.generate("Hello", 12))


IMPORTS = """
import importlib, json, os, signal, sys, warnings
import gguf, jinja2, numpy, sentencepiece, tokenizers, torch, tqdm, triton  # whose own doings do not count

def state():
    return {
        "signal handlers": [str(signal.getsignal(s)) for s in signal.valid_signals()],
        "environment": dict(os.environ),
        "default dtype": [str(torch.get_default_dtype()), str(torch.get_default_device())],
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "warning filters": [str(f) for f in warnings.filters],
        "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()],
        "module path": list(sys.path),
        "streams": [id(sys.stdout), id(sys.stderr), id(sys.excepthook)],
        "compiler": "torch._dynamo" in sys.modules,
    }

changes = {}
for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    changed = [what for what, value in state().items() if value != before[what]]
    if changed:
        changes[name] = changed
print(json.dumps(changes))
"""


def test_imports_change_nothing():
    names = [path.stem for path in ROOT.glob("*.py")]
    for folder in PACKAGES:
        names += [f"{folder}.{path.stem}" for path in ROOT.glob(f"{folder}/*.py") if path.stem != "__init__"]
    assert len(names) > 20
    command = [sys.executable, "-c", IMPORTS, *sorted(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


WITHOUT = """
import importlib, sys

sys.modules |= dict.fromkeys(["gguf", "lm_eval", "starlette", "transformers", "triton"])  # None: not installed
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_requirements_are_enough():
    """All commands start without the packages of requirements-dev.txt, except those that are made for them."""
    need_more = {"convert_gguf", "serve", "tiny_model"}
    names = [path.stem for path in ROOT.glob("*.py")]
    names += [f"scripts.{path.stem}" for path in ROOT.glob("scripts/*.py") if path.stem not in need_more]
    assert "scripts.benchmark" in names
    done = subprocess.run([sys.executable, "-c", WITHOUT, *names], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


IN_A_NOTEBOOK = """
import os, runpy, signal, sys
sys.ps1 = "In : "
sys.argv = ["generate.py", *sys.argv[1:]]
handler = signal.getsignal(signal.SIGINT)
runpy.run_path("generate.py", run_name="__main__")  # as %run does
assert signal.getsignal(signal.SIGINT) is handler
child = os.fork()
if child == 0:
    signal.alarm(60)
    runpy.run_path("generate.py", run_name="__main__")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


UNFINISHED = """
import sys
from generate import LLM

text = LLM(sys.argv[1]).generate("Hello", max_new_tokens=12)
print(next(text))
"""


def test_a_text_may_stay_unfinished(chat_model):
    """A text that is never finished raises nothing, even at the end of the program, when functions of PyTorch are
    gone."""
    command = [sys.executable, "-c", UNFINISHED, chat_model / "model.pth"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_a_notebook_goes_on(chat_model):
    """After %run generate.py, Ctrl-C does what it did before, and a fork can generate, too."""
    flags = ["--prompt=Hello", "--temperature=0", "--max_new_tokens=12"]
    flags.append(f"--checkpoint_path={chat_model / 'model.pth'}")
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", IN_A_NOTEBOOK, *flags]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second


def test_a_text_after_one_that_failed(chat_model):
    """A text whose logits are not finite may leave NaN in its KV cache, so the next text gets another cache."""
    llm = LLM(chat_model / "model.pth", device="cpu", max_seq_len=160)
    expected = "".join(llm.generate("Hello", max_new_tokens=8))
    weight = llm.model.layers[0].pre_attention_norm.weight
    before = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(UsageError, match="not finite"):
        list(llm.generate("Hello there", max_new_tokens=8))
    weight.copy_(before)
    assert "".join(llm.generate("Hello", max_new_tokens=8)) == expected
    assert llm.spare_loop.runner.kv_cache.layers[0].k.isfinite().all()

"""scripts/serve.py as its clients meet it: OpenAI's own client, curl, and those who send anything or hang up. Two tiny
models are served in threads of this process, so that the tests see what the completer holds; what concerns the process
itself (signals, memory, the command line) runs in processes of its own."""

import contextlib
import http.client
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.interrupts import EXIT_INTERRUPTED
from cli.script import run_script
from engine.scheduler import Scheduler
from engine.steps import make_kv_cache
from loading import load
from scripts import serve
from scripts.async_completer import AsyncCompleter
from tests.byte_models import VOCAB_SIZE
from tests.tiny import ROOT

N_ROWS, KEY = 4, "a key"
USER = {"role": "user", "content": "Hello"}
SECONDS = 60  # after which something hangs


# ---- Servers and clients --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def no_proxy():
    """The clients ask the servers and no proxy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("no_proxy", "*")
        yield


def start(folder: Path, api_key: str | None = None) -> SimpleNamespace:
    """A server in a thread. Its port, its completer, what stops it."""
    model, tokenizer = load(folder / "model.pth", dtype=torch.float32)
    completer = AsyncCompleter(Scheduler(model, N_ROWS, model.config.max_seq_len))
    server = serve.Server(completer, tokenizer, folder.name, api_key)
    listener = serve.listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # of its connections, for those who do not read
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()

    def stop():
        server.should_exit = server.force_exit = True
        thread.join()

    port = listener.getsockname()[1]
    return SimpleNamespace(port=port, server=server, completer=completer, model=model, tokenizer=tokenizer, stop=stop)


@pytest.fixture(scope="module")
def chatty_server(chatty):
    server = start(chatty)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chain_server(chain):
    server = start(chain, api_key=KEY)
    yield server
    server.stop()


def client_of(server, api_key: str = "none") -> openai.OpenAI:
    """OpenAI's client."""
    return openai.OpenAI(base_url=url_of(server), api_key=api_key, max_retries=0, timeout=SECONDS)


def url_of(server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture(scope="module")
def chat(chatty_server):
    """client.chat.completions.create of the server with a chat template."""
    with client_of(chatty_server) as client:
        yield client.chat.completions.create


@pytest.fixture(scope="module")
def complete(chatty_server):
    with client_of(chatty_server) as client:
        yield client.completions.create


@pytest.fixture(scope="module")
def complete_chain(chain_server):
    with client_of(chain_server, KEY) as client:
        yield partial(client.completions.create, model="chain", temperature=0)


def joined(stream) -> tuple[list[str], list[str | None]]:
    """The texts and finish reasons of a stream's choices, by their index."""
    texts, reasons = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + piece
            assert reasons.get(choice.index) is None
            reasons[choice.index] = choice.finish_reason
    return [texts[i] for i in sorted(texts)], [reasons[i] for i in sorted(reasons)]


def ask_http(server, path: str, body=None, method: str = "POST") -> tuple[int, bytes]:
    """Status and content of the response to any request. body: bytes, pieces of bytes (sent without Content-Length), or
    what becomes JSON."""
    if not isinstance(body, (bytes, Iterator)):
        body = json.dumps(body).encode()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        connection.request(method, f"/v1/{path}", body)
        response = connection.getresponse()
        return response.status, response.read()


def check_error(answer: tuple[int, bytes], status: int, word: str = ""):
    error = json.loads(answer[1])["error"]
    assert answer[0] == status and word in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")


# ---- Texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hello", "é🙂", "<|user|>Hi</s><|bot|>", "x" * 100])
def test_texts_are_those_of_generate(prompt, complete, chat, chatty, ask):
    flags = [f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=20", "--precision=float32"]
    options = {"model": "m", "temperature": 0, "max_tokens": 20}
    (expected,) = ask(chatty, *flags)
    found = complete(prompt=prompt, **options)
    assert found.choices[0].text == expected["text"][0]
    assert found.choices[0].finish_reason == expected["finish_reason"][0]
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected["prompt_tokens"], expected["generated_tokens"])
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert joined(complete(prompt=prompt, stream=True, **options)) == (expected["text"], expected["finish_reason"])

    (expected,) = ask(chatty, *flags, "--chat", "--system=Be brief")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": prompt}]
    found = chat(messages=messages, **options)
    assert found.choices[0].message.content == expected["text"][0] and found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == expected["prompt_tokens"]
    assert joined(chat(messages=messages, stream=True, **options)) == (expected["text"], expected["finish_reason"])


def test_objects(chatty_server, complete, chat):
    with client_of(chatty_server) as client:
        (model,) = client.models.list().data
    assert model.id.startswith("chatty") and model.object == "model"
    assert complete(model="m", prompt="a").object == "text_completion"
    assert complete(model="m", prompt="a").usage.completion_tokens == 16  # OpenAI's default
    found = chat(model="m", messages=[USER], temperature=0)
    assert found.object == "chat.completion" and found.model == model.id
    chunks = list(chat(model="m", messages=[USER], temperature=0, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage == found.usage and chunks[-1].choices == []
    roles = [chunk.choices[0].delta.role for chunk in chunks[:-1]]
    assert roles == ["assistant"] + [None] * (len(roles) - 1)
    assert found.usage.total_tokens == 160 or found.choices[0].finish_reason == "stop"  # all that fits, or its end


def test_messages_as_openai_writes_them(chat):
    ask = partial(chat, model="m", temperature=0, max_completion_tokens=9)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hel\nlo"}]
    other = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
    assert ask(messages=plain).choices == ask(messages=other).choices
    assert ask(messages=[USER]).choices == ask(messages=[USER | {"name": "me"}]).choices


def test_several_prompts_and_texts(complete):
    ask = partial(complete, model="m", max_tokens=8)
    alone = [ask(prompt=p, seed=5 + i).choices[0].text for i, p in enumerate(["ab", "ab", "cd", "cd"])]
    found = ask(prompt=["ab", "cd"], n=2, seed=5)
    assert [(c.index, c.text) for c in found.choices] == list(enumerate(alone)) and len({*alone}) == 4
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, 32)
    assert joined(ask(prompt=["ab", "cd"], n=2, seed=5, stream=True))[0] == alone
    ids = [list(b"ab"), list(b"cd")]
    assert ask(prompt=ids, n=2, seed=5).choices == found.choices
    assert ask(prompt=ids[0], seed=5).choices[0].text == alone[0]


def test_sampling(complete):
    ask = partial(complete, model="m", prompt="Hello", max_tokens=30)
    greedy = ask(temperature=0).choices[0].text
    assert ask(temperature=0, seed=1).choices[0].text == greedy
    assert ask(extra_body={"top_k": 1}).choices[0].text == greedy
    assert ask(top_p=1e-9).choices[0].text == greedy
    assert ask(temperature=2, extra_body={"min_p": 1}).choices[0].text == greedy
    assert ask(temperature=0, extra_body={"repetition_penalty": 100}).choices[0].text != greedy
    hot = [ask(temperature=2, seed=seed).choices[0].text for seed in (7, 7, -8)]
    assert hot[0] == hot[1] != hot[2]
    assert ask(temperature=2).choices[0].text != ask(temperature=2).choices[0].text  # another seed each time


def test_sixteen_clients_at_once_get_what_they_get_alone(complete, chat):
    def request(i: int) -> tuple:
        options = {"model": "m", "max_tokens": 5 + 4 * i, "seed": i, "temperature": i % 3 / 2, "stream": i % 2 == 0}
        if i % 4 < 2:
            found = complete(prompt="Hello"[: 1 + i % 5] * (1 + i % 3), n=1 + i % 2, **options)
        else:
            found = chat(messages=[USER | {"content": "Hello" * (i % 7)}], **options)
        if options["stream"]:
            return joined(found)
        texts = [c.text if hasattr(c, "text") else c.message.content for c in found.choices]
        return texts, [c.finish_reason for c in found.choices]

    alone = [request(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(request, range(16))) == alone
    assert len({str(answer) for answer in alone}) == 16


def test_a_long_prompt_does_not_hold_up_the_others(complete, chatty_server, monkeypatch):
    encode, is_encoding, others_are_done = chatty_server.tokenizer.encode, threading.Event(), threading.Event()

    def slow_encode(text: str) -> list[int]:
        if text == "long":
            is_encoding.set()
            assert others_are_done.wait(SECONDS)
        return encode(text)

    monkeypatch.setattr(chatty_server.tokenizer, "encode", slow_encode)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, model="m", prompt="long", max_tokens=3)
        assert is_encoding.wait(SECONDS)
        assert complete(model="m", prompt="a", max_tokens=3).usage.completion_tokens <= 3
        others_are_done.set()
    assert answer.result().usage.prompt_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "stop", "text", "reason"),
    [
        ("0", ["456"], "123", "stop"),  # a token is a byte
        ("0", ["9X", "78", "6789"], "123456", "stop"),
        ("0", "4X", "123456789012", "length"),  # what may be its beginning is held back
        ("0", ["2X", "12X"], "123456789012", "length"),
        ("S", "E", "🙂", "stop"),
        ("S", "🙂", "", "stop"),
        ("S", None, "🙂E", "stop"),  # by an end token
        ("W", ["X!"], " X", "stop"),  # "!" is an end token, without text
    ],
)
def test_stop(prompt, stop, text, reason, complete_chain):
    ask = partial(complete_chain, prompt=prompt, stop=stop, max_tokens=12)
    found = ask()
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text, reason)
    assert joined(ask(stream=True)) == ([text], [reason])


def test_a_stop_text_ends_one_of_several_texts(complete_chain):
    found = complete_chain(prompt=["0", "5"], stop="3", max_tokens=6)
    assert [c.text for c in found.choices] == ["12", "678901"]
    assert found.usage.completion_tokens == 9  # and nothing is computed after it


def score(server, ids: list[int], n_prompt: int) -> torch.Tensor:
    """The log-probabilities [n, V] after each of ids but the last, from those after the prompt on."""
    with torch.inference_mode():
        logits = server.model(torch.tensor([ids[:-1]]), torch.tensor([0]), make_kv_cache(server.model, 1, len(ids)))
    return logits[0, n_prompt - 1 :].log_softmax(-1)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(stream, chat, chatty_server):
    options = {"model": "m", "messages": [USER], "max_tokens": 12, "seed": 3, "logprobs": True, "top_logprobs": 5}
    found = chat(stream=stream, **options)
    steps = [step for part in (found if stream else [found]) for step in part.choices[0].logprobs.content]
    prompt, new = chatty_server.tokenizer.encode_chat([USER]), [byte for step in steps for byte in step.bytes]
    assert len(new) == len(steps) == 12  # a token is a byte
    expected = score(chatty_server, prompt + new, len(prompt))
    total = sum(step.logprob for step in steps)
    assert total == pytest.approx(expected[range(12), new].sum().item(), abs=1e-3)
    for step, logprobs in zip(steps, expected, strict=True):
        values, ids = logprobs.topk(5)
        assert [top.logprob for top in step.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert [top.bytes for top in step.top_logprobs] == [[i] if i < 256 else [] for i in ids]
    assert all(step.top_logprobs == [] for step in chat(**options | {"top_logprobs": 0}).choices[0].logprobs.content)
    assert chat(**options | {"logprobs": False, "top_logprobs": None}).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(stream, complete, chatty_server):
    options = {"model": "m", "prompt": "Hello", "max_tokens": 12, "seed": 3, "logprobs": 4}
    found = complete(stream=stream, **options)
    parts = [part.choices[0].logprobs for part in (found if stream else [found])]
    tokens, values = ([x for part in parts for x in getattr(part, name)] for name in ("tokens", "token_logprobs"))
    tops = [top for part in parts for top in part.top_logprobs]
    offsets = [offset for part in parts for offset in part.text_offset]
    new = list("".join(tokens).encode())
    assert offsets == list(range(12))  # a token is a character
    expected = score(chatty_server, [*b"Hello", *new], 5)
    assert sum(values) == pytest.approx(expected[range(12), new].sum().item(), abs=1e-3)
    for token, value, top, logprobs in zip(tokens, values, tops, expected, strict=True):
        assert top[token] == value and len(top) in (4, 5)  # the token is among them, too
        assert sorted(top.values())[-4:] == pytest.approx(sorted(logprobs.topk(4).values.tolist()), abs=1e-4)


def test_pieces_of_logprobs(complete_chain, chain_server):
    """Whatever a token is, its name is its own: a part of a character, a special token."""
    found = complete_chain(prompt="S", logprobs=20, max_tokens=9).choices[0].logprobs
    assert found.tokens == [*(f"\\x{byte:02x}" for byte in "🙂".encode()), "E", "</s>"]
    assert all(len(top) in (20, 21) for top in found.top_logprobs)
    assert len(chain_server.tokenizer.special_token_ids) == 4 and VOCAB_SIZE == 260


# ---- Errors ---------------------------------------------------------------------------------------------------------


WRONG = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [5, 300]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": "a" * 160}, "159 tokens"),
    ({"prompt": ["a"] * 65}, "64 texts"),
    ({"prompt": ["a"] * 33, "n": 2}, "64 texts"),
    ({"prompt": "a", "n": 0}, "n must be"),
    ({"prompt": "a", "n": True}, "n must be"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 160}, "from 1 to 159"),
    ({"prompt": "a", "max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_k": 0}, "top_k"),
    ({"prompt": "a", "min_p": 1.5}, "min_p"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "a", "seed": 2**70}, "seed"),
    ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a", "stop": 5}, "stop"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ({"prompt": "a", "stop": "x" * 257}, "stop"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "message"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "role"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, "content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "content"),
    ({"messages": [USER], "tools": [{}]}, "tools"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
]


def test_wrong_requests_are_named(chatty_server):
    for body, word in WRONG:
        path = "chat/completions" if "messages" in body else "completions"
        check_error(ask_http(chatty_server, path, body), 400, word)
    for body in (b"", b"{", b"\xff", b"5", b"[]", b"[" * 10**5, b'{"prompt": "\\ud800"}', b'{"n": %b}' % (b"9" * 5000)):
        check_error(ask_http(chatty_server, "completions", body), 400)
    nulls = dict.fromkeys(["n", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "stream", "tools"])
    assert ask_http(chatty_server, "completions", {"prompt": "a"} | nulls)[0] == 200


def test_errors_as_openais_client_sees_them(chatty_server, chain_server, complete, complete_chain):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        complete(model="m", prompt="a", temperature=3)
    with pytest.raises(openai.BadRequestError, match="chat template"):  # chain has none
        client_of(chain_server, KEY).chat.completions.create(model="m", messages=[USER])
    for key in ("none", KEY[:-1], KEY + "s"):
        with pytest.raises(openai.AuthenticationError, match="key"):
            client_of(chain_server, key).models.list()
    check_error(ask_http(chain_server, "models", method="GET"), 401)
    check_error(ask_http(chain_server, "completions", {"prompt": "0"}), 401)
    with pytest.raises(openai.NotFoundError):
        client_of(chatty_server).embeddings.create(model="m", input="a")
    check_error(ask_http(chatty_server, "completions", method="GET"), 405)
    assert complete_chain(prompt="0", max_tokens=2).choices[0].text == "12"


def test_a_request_may_have_so_many_bytes(chatty_server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BODY", 100_000)
    body = json.dumps({"prompt": "a", "user": ""}).encode()
    fits = body.replace(b'""', b'"%b"' % (b"x" * (100_000 - len(body))))
    for content, status in ((fits, 200), (fits + b" ", 413)):
        pieces = iter([content[:50_000], content[50_000:]])
        assert ask_http(chatty_server, "completions", content)[0] == status
        assert ask_http(chatty_server, "completions", pieces)[0] == status
    check_error(ask_http(chatty_server, "completions", content), 413, "100000 bytes")


def test_what_fails_in_the_completer_fails_alone(complete, chat, chatty_server, monkeypatch):
    """Those who are waiting get an error, the next ones are served."""

    def fail():
        raise RuntimeError("the logits are not finite")

    expected = complete(model="m", prompt="a", temperature=0).choices
    with monkeypatch.context() as m:
        m.setattr(chatty_server.completer.scheduler, "step", fail)
        with pytest.raises(openai.InternalServerError, match="not finite"):
            complete(model="m", prompt="a")
        with pytest.raises(openai.APIError, match="not finite"):
            list(chat(model="m", messages=[USER], stream=True))
    assert complete(model="m", prompt="a", temperature=0).choices == expected


VALID = {
    "n": [1, 2],
    "max_tokens": [1, 3],
    "max_completion_tokens": [1, 3],
    "temperature": [0, 0.5, 2, 1e-300],
    "top_p": [1e-300, 0.5, 1],
    "top_k": [1, 5, 10**9],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [0.5, 1, 2],
    "seed": [0, -1, 2**62],
    "stop": ["A", ["A", "B"], ""],
    "logprobs": [None, 0, 3, 20],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}, {}],
    "model": ["m"],
}
PROMPTS = {
    "prompt": ["a", "é", ["a", "b"], [1, 2], [[1], [2]], "</s>"],
    "messages": [[USER], [USER, {"role": "assistant", "content": "B"}], [USER | {"content": [{"text": "a"}]}]],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def objects(*values) -> st.SearchStrategy:
    """Requests whose fields have one of these values."""
    prompts, options = ({name: st.sampled_from(v) for name, v in d.items()} for d in (PROMPTS, VALID))
    for name in (prompts | options) if values else ():
        (prompts if name in prompts else options)[name] |= st.one_of(*values)
    return st.fixed_dictionaries(prompts, optional=options)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(path=st.sampled_from(["completions", "chat/completions"]), body=objects() | objects(JSON) | JSON | st.binary())
def test_whatever_is_sent_gets_an_answer(path, body, chatty_server):
    status, content = ask_http(chatty_server, path, body)
    if status != 200:
        assert 400 <= status < 500
        check_error((status, content), status)
    elif isinstance(body, dict) and body.get("stream"):
        assert content.endswith(b"data: [DONE]\n\n") and b'"error"' not in content
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in json.loads(content)["choices"])
    assert not chatty_server.completer.completions


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.binary())
def test_whatever_a_connection_brings(data, chatty_server):
    with socket.create_connection(("127.0.0.1", chatty_server.port), timeout=SECONDS) as connection:
        connection.sendall(data)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: [\r\nContent-Length: 9\r\n\r\n{")
    assert ask_http(chatty_server, "models", method="GET")[0] == 200


# ---- Clients that hang up -------------------------------------------------------------------------------------------


class Gate:
    """In place of a scheduler's step: lets a step through when the test says so."""

    def __init__(self, scheduler: Scheduler):
        self.step, self.permits, self.n_steps = scheduler.step, threading.Semaphore(0), 0

    def __call__(self) -> list:
        assert self.permits.acquire(timeout=SECONDS)
        self.n_steps += 1
        return self.step()


def connect(server, body: dict, buffer: int | None = None) -> socket.socket:
    """Sends a request for completions, and reads nothing. buffer: how many bytes wait to be read, at most."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(SECONDS)
    connection.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    header = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(content)
    connection.sendall(header + content)
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        new = connection.recv(2**16)
        assert new, data
        data += new
    return data


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(stream, complete, chatty_server, monkeypatch):
    """All rows are its own for a hundred steps, and more of its texts wait. The next client waits for a few steps."""
    completer, n = chatty_server.completer, N_ROWS + 2
    answer = partial(complete, model="m", prompt="b", max_tokens=3, temperature=0)
    expected, gate = answer().choices, Gate(completer.scheduler)
    monkeypatch.setattr(completer.scheduler, "step", gate)
    with ThreadPoolExecutor(1) as pool:
        gone = connect(chatty_server, {"prompt": "a", "n": n, "max_tokens": 100, "seed": 1, "stream": stream})
        gate.permits.release(n)
        wait_for(lambda: gate.n_steps == n)
        if stream:
            read_until(gone, b"data: ")
        next_answer = pool.submit(answer)
        wait_for(lambda: len(completer.completions) == n + 1)
        gone.close()
        if stream:
            wait_for(lambda: len(completer.completions) == 1)  # without any further step
        wait_for(lambda: gate.permits.release() or next_answer.done())
    assert next_answer.result().choices == expected
    assert gate.n_steps < n + 10 and not completer.completions
    gate.permits.release(10)  # for a step that may have begun
    wait_for(lambda: completer.step.done())


# A response of 2 KB a token
UNREAD = {"prompt": "a", "n": 6, "max_tokens": 100, "logprobs": 20, "temperature": 2, "seed": 1, "stream": True}


def test_a_client_that_does_not_read(complete, chatty_server):
    """The server has filled the connection's buffers and waits for it. Others do not. When the client reads
    after all, nothing is missing; when it hangs up, its rows are free."""
    completer, connections = chatty_server.completer, chatty_server.server.server_state.connections
    answer = partial(complete, model="m", prompt="b", max_tokens=3, temperature=0)
    expected, texts = answer().choices, [c.text for c in complete(model="m", **UNREAD | {"stream": False}).choices]
    for reads in (True, False):
        with connect(chatty_server, UNREAD, buffer=4096) as connection:
            wait_for(lambda: any(c.flow.write_paused for c in connections))
            assert completer.completions
            if reads:
                assert answer().choices == expected
                found = [""] * len(texts)
                for line in read_until(connection, b"[DONE]").split(b"\n"):
                    if line.startswith(b"data: {"):
                        (choice,) = json.loads(line[6:])["choices"]
                        found[choice["index"]] += choice["text"]
                assert found == texts
        wait_for(lambda: not any(c.flow.write_paused for c in connections) and not completer.completions)
        assert answer().choices == expected


# ---- curl -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(chatty_server, chain_server):
    def curl(server, path: str, *flags: str) -> str:
        command = ["curl", "--silent", "--max-time", str(SECONDS), *flags, f"{url_of(server)}/{path}"]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode()

    key = ["-H", f"Authorization: Bearer {KEY}"]
    body = {"prompt": "S", "max_tokens": 9, "temperature": 0}
    found = json.loads(curl(chain_server, "completions", *key, "-d", json.dumps(body)))
    assert found["choices"] == [{"index": 0, "text": "🙂E", "logprobs": None, "finish_reason": "stop"}]
    events = curl(chain_server, "completions", *key, "-N", "-d", json.dumps(body | {"stream": True})).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "🙂E"
    assert '"error"' in curl(chain_server, "models") and "data" in json.loads(curl(chain_server, "models", *key))
    body = {"messages": [USER], "max_tokens": 3}
    headers = curl(chatty_server, "chat/completions", "-i", "-H", "Origin: http://evil.example", "-d", json.dumps(body))
    assert headers.startswith("HTTP/1.1 200 ") and "access-control" not in headers.lower()


# ---- Processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(chatty):
    """Two servers, which are ready after the line on stderr that says where."""
    command = [sys.executable, ROOT / "scripts/serve.py", f"--checkpoint_path={chatty / 'model.pth'}", "--port=0"]
    command += ["--device=cpu", "--precision=float32", "--threads=1"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    yield [(process, wait_until_ready(process)) for process in processes]
    for process in processes:
        process.kill()
        process.communicate()


def wait_until_ready(process: subprocess.Popen) -> SimpleNamespace:
    line = process.stderr.readline().decode()
    assert line.startswith("http://127.0.0.1:") and line.endswith("/v1\n"), line + process.stderr.read().decode()
    return SimpleNamespace(port=int(line.split(":")[2].split("/")[0]))


def test_many_requests_leave_memory_flat(processes):
    (process, server), _ = processes
    statm, size, n = Path(f"/proc/{process.pid}/statm"), 2**15, 800
    if not statm.exists():
        pytest.skip("no /proc")

    def request(i: int) -> int:
        body = {"prompt": "a" * (1 + i % 100), "max_tokens": 3, "logprobs": 3, "user": "x" * size, "stream": i % 2}
        return ask_http(server, "completions", body)[0]

    def resident_after(numbers: range) -> int:
        assert {*pool.map(request, numbers)} == {200}
        return int(statm.read_text().split()[1]) * resource.getpagesize()

    with ThreadPoolExecutor(8) as pool:
        before = resident_after(range(200))
        grown = resident_after(range(n)) - before
    assert grown < n * size / 8  # a server that keeps what it reads grows by eight times as much


def wait_until_closed(server):
    """Until the server takes no more connections."""

    def is_closed() -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", server.port)) != 0

    wait_for(is_closed)


def test_kill_completes_what_is_in_flight(processes):
    (process, server), _ = processes
    with connect(server, UNREAD | {"n": 24, "max_tokens": 150}, buffer=4096) as connection:
        read_until(connection, b"data: ")
        process.send_signal(signal.SIGTERM)  # the response, 9 MB, has no room in the connection's buffers
        wait_until_closed(server)
        assert process.poll() is None
        data = read_until(connection, b"[DONE]")
    assert data.count(b'"finish_reason": "length"') + data.count(b'"finish_reason": "stop"') == 24
    out, err = process.communicate(timeout=SECONDS)
    assert (out, err, process.returncode) == (b"", b"", 0)


def test_a_second_ctrl_c_ends_it_at_once(processes):
    _, (process, server) = processes
    with connect(server, UNREAD | {"n": 64, "max_tokens": 150}, buffer=4096) as connection:
        read_until(connection, b"data: ")
        process.send_signal(signal.SIGINT)
        wait_until_closed(server)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == EXIT_INTERRUPTED and process.stderr.read() == b""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port=PORT"], "port PORT: "),
        (["--port=70000"], "70000"),
        (["--port=-1"], "-1"),
        (["--host=no.such.host.invalid"], "no.such.host.invalid"),
        (["--host=a..b"], "a..b"),
        (["--host="], "--host"),
        (["--api_key="], "--api_key"),
        (["--parallel=0"], "--parallel"),
        (["--max_seq_length=0"], "--max_seq_length"),
        (["--checkpoint_path=/no/model.pth"], "/no/model.pth"),
        (["--device=no"], "device"),
        (["--threads=0"], "--threads"),
    ],
)
def test_mistakes_on_the_command_line(flags, message, chatty, chatty_server, monkeypatch, capsys):
    port = str(chatty_server.port)
    path = f"--checkpoint_path={chatty / 'model.pth'}"
    monkeypatch.setattr(sys, "argv", ["serve.py", path, "--port=0", *(flag.replace("PORT", port) for flag in flags)])
    with pytest.raises(SystemExit) as stopped:
        run_script(serve.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith("serve.py: ") and err.count("\n") == 1
    assert message.replace("PORT", port) in err

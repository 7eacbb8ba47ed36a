"""scripts/serve.py refuses wrong requests, and answers requests of any content. A mistake on its command line ends it
with one line."""

import json
import socket
import sys

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.script import run_script
from scripts import serve
from tests.serving import KEY, SECONDS, USER, ask_http, check_error, client_of, read_until

pytest_plugins = ["tests.serving"]


WRONG = [
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [5, 300]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": "a" * 160}, "159 tokens"),
    ({"prompt": "a" * 10**5}, "100000 characters exceeds"),  # is not encoded
    ({"messages": [USER | {"content": "a" * 10**5}]}, "100000 characters exceeds"),
    ({"messages": [USER] * 10**4}, "10000 messages exceeds"),
    ({"prompt": ["a"] * 65}, "64 completions"),
    ({"prompt": ["a"] * 33, "n": 2}, "64 completions"),
    ({"prompt": "a", "n": 0}, "n must be"),
    ({"prompt": "a", "n": True}, "n must be"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 160}, "max_tokens must be 1 to 159, not 160"),
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
    ({"prompt": "a", "stop": False}, "stop"),
    ({"prompt": "a", "stop": {}}, "stop"),
    ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    ({"prompt": "a", "stream": True, "stream_options": [True]}, "stream_options must be a JSON object"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "best_of": True}, "best_of"),
    ({"prompt": "a", "stream": "false"}, "stream must be true or false"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "message"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "role"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, "content"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "content"),
    ({"messages": [USER], "tools": [{}]}, "tools"),
    ({"messages": [USER], "functions": [{}]}, "functions"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [USER], "logprobs": 5}, "logprobs must be true or false"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": [USER], "top_logprobs": "x"}, "top_logprobs must be an integer, not 'x'"),
    ({"messages": [USER], "top_logprobs": 3}, "top_logprobs needs logprobs"),
    ({"messages": [USER | {"content": "\ud800"}]}, "a message is not valid UTF-8"),
]


def test_wrong_requests_are_named(chat_server):
    for body, word in WRONG:
        path = "chat/completions" if "messages" in body else "completions"
        check_error(ask_http(chat_server, path, body), 400, word)
    for body in (b"", b"{", b"\xff", b"5", b"[]", b"[" * 10**5, b'{"prompt": "\\ud800"}', b'{"n": %b}' % (b"9" * 5000)):
        check_error(ask_http(chat_server, "completions", body), 400)
    nulls = dict.fromkeys(["n", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "stream", "tools"])
    assert ask_http(chat_server, "completions", {"prompt": "a"} | nulls)[0] == 200
    defaults = {"best_of": 1, "echo": False, "suffix": "", "logit_bias": {}, "presence_penalty": 0.0, "tools": []}
    defaults |= {"response_format": {"type": "text"}, "model": "gpt-4", "a field of tomorrow": 5}
    assert ask_http(chat_server, "completions", {"prompt": "a"} | defaults)[0] == 200


def test_errors_as_openais_client_sees_them(chat_server, recall_server, complete, complete_recall):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        complete(model="m", prompt="a", temperature=3)
    with pytest.raises(openai.BadRequestError, match="chat template"):  # recall_model has none
        client_of(recall_server, KEY).chat.completions.create(model="m", messages=[USER])
    for key in ("none", KEY[:-1], KEY + "s"):
        with pytest.raises(openai.AuthenticationError, match="key"):
            client_of(recall_server, key).models.list()
    check_error(ask_http(recall_server, "models", method="GET"), 401)
    check_error(ask_http(recall_server, "completions", {"prompt": "0"}), 401)
    with pytest.raises(openai.NotFoundError):
        client_of(chat_server).embeddings.create(model="m", input="a")
    check_error(ask_http(chat_server, "completions", method="GET"), 405)
    assert complete_recall(prompt="0", max_tokens=2).choices[0].text == "12"


def test_a_request_that_is_too_large(chat_server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BODY", 100_000)
    body = json.dumps({"prompt": "a", "user": ""}).encode()
    fits = body.replace(b'""', b'"%b"' % (b"x" * (100_000 - len(body))))
    for content, status in ((fits, 200), (fits + b" ", 413)):
        pieces = iter([content[:50_000], content[50_000:]])
        assert ask_http(chat_server, "completions", content)[0] == status
        assert ask_http(chat_server, "completions", pieces)[0] == status
    check_error(ask_http(chat_server, "completions", content), 413, "100000 bytes")


def test_a_request_that_takes_too_long(chat_server, monkeypatch):
    """A client that stops sending gets an error after a while, and does not keep the server from ending."""
    monkeypatch.setattr(serve, "MAX_BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", chat_server.port), timeout=SECONDS) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        answer = read_until(connection, b"}}")
    assert answer.startswith(b"HTTP/1.1 408 ") and b"more than 0.1 s to arrive" in answer


def test_an_error_in_the_completer(complete, chat, chat_server, monkeypatch):
    """After an error in the completer, waiting requests get an error, and later ones are served."""

    def fail():
        raise RuntimeError("the logits are not finite")

    expected = complete(model="m", prompt="a", temperature=0).choices
    with monkeypatch.context() as m:
        m.setattr(chat_server.engine.scheduler, "step", fail)
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
    """Requests whose fields have these values."""
    prompts, options = ({name: st.sampled_from(v) for name, v in d.items()} for d in (PROMPTS, VALID))
    for name in (prompts | options) if values else ():
        (prompts if name in prompts else options)[name] |= st.one_of(*values)
    return st.fixed_dictionaries(prompts, optional=options)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(path=st.sampled_from(["completions", "chat/completions"]), body=objects() | objects(JSON) | JSON | st.binary())
def test_any_request_gets_an_answer(path, body, chat_server):
    status, content = ask_http(chat_server, path, body)
    if status != 200:
        assert 400 <= status < 500
        check_error((status, content), status)
    elif isinstance(body, dict) and body.get("stream"):
        assert content.endswith(b"data: [DONE]\n\n") and b'"error"' not in content
    else:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in json.loads(content)["choices"])
    assert not chat_server.engine.inboxes


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.binary())
def test_any_bytes_of_a_connection(data, chat_server):
    with socket.create_connection(("127.0.0.1", chat_server.port), timeout=SECONDS) as connection:
        connection.sendall(data)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: [\r\nContent-Length: 9\r\n\r\n{")
    assert ask_http(chat_server, "models", method="GET")[0] == 200


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
def test_mistakes_on_the_command_line(flags, message, chat_model, chat_server, monkeypatch, capsys):
    port = str(chat_server.port)
    path = f"--checkpoint_path={chat_model / 'model.pth'}"
    monkeypatch.setattr(sys, "argv", ["serve.py", path, "--port=0", *(flag.replace("PORT", port) for flag in flags)])
    with pytest.raises(SystemExit) as stopped:
        run_script(serve.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith("serve.py: ") and err.count("\n") == 1
    assert message.replace("PORT", port) in err

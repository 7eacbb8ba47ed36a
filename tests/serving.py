"""Two tiny models behind servers, and clients. The servers are threads, so that tests can look into the engine.

The tests of scripts/serve.py name this file in pytest_plugins.
"""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.scheduler import Scheduler
from loading import load
from scripts import serve

N_ROWS, KEY = 4, "a key"
USER = {"role": "user", "content": "Hello"}
SECONDS = 60  # a request that takes longer hangs


@pytest.fixture(scope="module")
def no_proxy():
    """Makes clients connect to the servers directly, without a proxy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("no_proxy", "*")
        yield


def start(folder: Path, api_key: str | None = None) -> SimpleNamespace:
    """Starts a server in a thread. Returns the port, the server, its engine and model, and a function that stops it."""
    model, tokenizer = load(folder / "model.pth", dtype=torch.float32)
    engine = AsyncEngine(Scheduler(model, N_ROWS, model.config.max_seq_len))
    server = serve.Server(engine, tokenizer, folder.name, api_key)
    listener = serve.listen("127.0.0.1", 0)
    # Connections inherit this small buffer, so a client that does not read soon blocks the server
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()

    def stop():
        server.should_exit = server.force_exit = True
        thread.join()

    port = listener.getsockname()[1]
    return SimpleNamespace(port=port, server=server, engine=engine, model=model, tokenizer=tokenizer, stop=stop)


@pytest.fixture(scope="module")
def chat_server(chat_model, no_proxy):
    server = start(chat_model)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def recall_server(recall_model, no_proxy):
    server = start(recall_model, api_key=KEY)
    yield server
    server.stop()


def client_of(server, api_key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=url_of(server), api_key=api_key, max_retries=0, timeout=SECONDS)


def url_of(server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture(scope="module")
def chat(chat_server):
    """client.chat.completions.create, for the server with a chat template"""
    with client_of(chat_server) as client:
        yield client.chat.completions.create


@pytest.fixture(scope="module")
def complete(chat_server):
    with client_of(chat_server) as client:
        yield client.completions.create


@pytest.fixture(scope="module")
def complete_recall(recall_server):
    with client_of(recall_server, KEY) as client:
        yield partial(client.completions.create, model="recall_model", temperature=0)


def joined(stream) -> tuple[list[str], list[str | None]]:
    """Returns (texts, finish reasons) of the choices in a stream, in the order of their indices."""
    texts, reasons = {}, {}
    for chunk in stream:
        for choice in chunk.choices:
            piece = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + piece
            assert reasons.get(choice.index) is None
            reasons[choice.index] = choice.finish_reason
    return [texts[i] for i in sorted(texts)], [reasons[i] for i in sorted(reasons)]


def ask_http(server, path: str, body=None, method: str = "POST") -> tuple[int, bytes]:
    """Sends a request and returns the status and content of the response. body: bytes, an iterator of bytes (which has
    no Content-Length), or an object, which is sent as JSON."""
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


def connect(server, body: dict, buffer: int | None = None) -> socket.socket:
    """Sends a request for completions, and reads nothing. buffer: how many received bytes may wait to be read."""
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

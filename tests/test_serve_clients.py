"""scripts/serve.py as a process: clients that hang up or do not read, curl, signals, and memory."""

import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.interrupts import EXIT_INTERRUPTED
from engine.scheduler import Scheduler
from tests.serving import KEY, N_ROWS, SECONDS, USER, ask_http, connect, read_until, url_of, wait_for
from utils.files import ROOT

pytest_plugins = ["tests.serving"]


class Gate:
    """Replaces the step of a scheduler by one that runs only when the test permits it."""

    def __init__(self, scheduler: Scheduler):
        self.step, self.permits, self.n_steps = scheduler.step, threading.Semaphore(0), 0

    def __call__(self) -> list:
        assert self.permits.acquire(timeout=SECONDS)
        self.n_steps += 1
        return self.step()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(stream, complete, chat_server, monkeypatch):
    """A client with a hundred steps for all rows hangs up, while more of its texts wait. The next client gets an answer
    after a few steps."""
    engine, n = chat_server.engine, N_ROWS + 2
    answer = partial(complete, model="m", prompt="b", max_tokens=3, temperature=0)
    expected, gate = answer().choices, Gate(engine.scheduler)
    monkeypatch.setattr(engine.scheduler, "step", gate)
    with ThreadPoolExecutor(1) as pool:
        gone = connect(chat_server, {"prompt": "a", "n": n, "max_tokens": 100, "seed": 1, "stream": stream})
        gate.permits.release(n)
        wait_for(lambda: gate.n_steps == n)
        if stream:
            read_until(gone, b"data: ")
        next_answer = pool.submit(answer)
        wait_for(lambda: len(engine.inboxes) == n + 1)
        gone.close()
        if stream:
            wait_for(lambda: len(engine.inboxes) == 1)  # without any further step
        wait_for(lambda: gate.permits.release() or next_answer.done())
    assert next_answer.result().choices == expected
    assert gate.n_steps < n + 10 and not engine.inboxes
    gate.permits.release(10)  # for a step that may have begun
    wait_for(lambda: engine.step_task.done())


# A response of 2 KB a token
UNREAD = {"prompt": "a", "n": 6, "max_tokens": 100, "logprobs": 20, "temperature": 2, "seed": 1, "stream": True}


def test_a_client_that_does_not_read(complete, chat_server):
    """A client that does not read fills the buffers of its connection. Meanwhile others are served. If it reads later,
    nothing is missing. If it hangs up, its rows are free."""
    engine, connections = chat_server.engine, chat_server.server.server_state.connections
    answer = partial(complete, model="m", prompt="b", max_tokens=3, temperature=0)
    expected, texts = answer().choices, [c.text for c in complete(model="m", **UNREAD | {"stream": False}).choices]
    for reads in (True, False):
        with connect(chat_server, UNREAD, buffer=4096) as connection:
            wait_for(lambda: any(c.flow.write_paused for c in connections))
            assert engine.inboxes
            if reads:
                assert answer().choices == expected
                found = [""] * len(texts)
                for line in read_until(connection, b"[DONE]").split(b"\n"):
                    if line.startswith(b"data: {"):
                        (choice,) = json.loads(line[6:])["choices"]
                        found[choice["index"]] += choice["text"]
                assert found == texts
        wait_for(lambda: not any(c.flow.write_paused for c in connections) and not engine.inboxes)
        assert answer().choices == expected


# ---- curl -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(chat_server, recall_server):
    def curl(server, path: str, *flags: str) -> str:
        command = ["curl", "--silent", "--max-time", str(SECONDS), *flags, f"{url_of(server)}/{path}"]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode()

    key = ["-H", f"Authorization: Bearer {KEY}"]
    body = {"prompt": "S", "max_tokens": 9, "temperature": 0}
    found = json.loads(curl(recall_server, "completions", *key, "-d", json.dumps(body)))
    assert found["choices"] == [{"index": 0, "text": "🙂E", "logprobs": None, "finish_reason": "stop"}]
    events = curl(recall_server, "completions", *key, "-N", "-d", json.dumps(body | {"stream": True})).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: {") for event in events[:-2])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "🙂E"
    assert '"error"' in curl(recall_server, "models") and "data" in json.loads(curl(recall_server, "models", *key))
    body = {"messages": [USER], "max_tokens": 3}
    headers = curl(chat_server, "chat/completions", "-i", "-H", "Origin: http://evil.example", "-d", json.dumps(body))
    assert headers.startswith("HTTP/1.1 200 ") and "access-control" not in headers.lower()


# ---- Processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(chat_model, library):
    """Two servers, which are ready when a line on stderr names their port. library: builds the kernels first, since a
    build would print a line."""
    command = [sys.executable, ROOT / "scripts/serve.py", f"--checkpoint_path={chat_model / 'model.pth'}", "--port=0"]
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
        body = {"prompt": "a" * (1 + i % 100), "max_tokens": 3, "logprobs": 3, "user": "x" * size, "stream": i % 2 == 1}
        return ask_http(server, "completions", body)[0]

    def resident_after(numbers: range) -> int:
        assert {*pool.map(request, numbers)} == {200}
        return int(statm.read_text().split()[1]) * resource.getpagesize()

    with ThreadPoolExecutor(8) as pool:
        before = resident_after(range(200))
        grown = resident_after(range(n)) - before
    assert grown < n * size / 8  # a server that kept the requests would grow eight times as much


def wait_until_closed(server):
    """Waits until server takes no more connections."""

    def is_closed() -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", server.port)) != 0

    wait_for(is_closed)


def test_kill_completes_requests_in_flight(processes):
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

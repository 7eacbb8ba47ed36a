"""benchmark.py --busy reports consistent numbers, and leaves no process behind. Speeds are not checked."""

import contextlib
import json
import multiprocessing
import threading
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch

from config import ModelConfig
from formats import Unquantized
from scripts import benchmark
from scripts.benchmarking import busy
from scripts.benchmarking.speed import save_random_checkpoint
from tests.tiny import call_main
from utils.errors import OutOfMemoryError, UsageError

TINY = ModelConfig(64, 2, 4, 2, 16, 96, 80, 512)


def test_report(tmp_path, capsys):
    """After one round, the medians in table and JSON are its numbers, with the right ratios and sums."""
    save_random_checkpoint(tmp_path / "model.pth", TINY, torch.float32)
    flags = "--json --device cpu --mode int4 --max_new_tokens 20 --busy 1".split()
    call_main(benchmark.main, "--config", tmp_path / "model.pth", *flags)
    head, _, row, line = capsys.readouterr().out.splitlines()
    r = json.loads(line)
    (of_round,) = r["rounds"]
    assert head.count("|") == row.count("|") and f"{r['two_tokens_per_sec']:.1f}" in row
    machine = {"cpu", "cores", "threads", "date", "torch"}
    assert r.keys() == {*benchmark.REPORTED_OPTIONS, *machine, *of_round, "rounds"}
    assert of_round == {name: r[name] for name in of_round} and r["threads"] == torch.get_num_threads()
    alone, busy, one_thread, first, second, two = (
        r[f"{name}_tokens_per_sec"]
        for name in ("alone", "beside_busy", "one_thread_beside_busy", "first_of_two", "second_of_two", "two")
    )
    assert min(alone, busy, one_thread, first) > 0 and second >= 0 and two == first + second
    assert r["beside_busy_over_one_thread"] == busy / one_thread and r["two_over_alone"] == two / alone
    assert not multiprocessing.active_children()


def test_rounds(monkeypatch):
    """The first round is a warm-up, and the result has the medians of all others."""
    speeds, args = iter([100.0, 1.0, 5.0, 3.0]), SimpleNamespace(busy=3)
    monkeypatch.setattr(busy, "second_process", lambda *arguments: contextlib.nullcontext())
    monkeypatch.setattr(busy, "TimedModel", lambda *arguments: None)
    monkeypatch.setattr(busy, "measure_round", lambda *arguments: {"speed": next(speeds)})
    r = busy.measure_busy(args, None, None)
    assert r["speed"] == 3 and [row["speed"] for row in r["rounds"]] == [1, 5, 3]


def test_busy_is_for_cpus(monkeypatch):
    monkeypatch.setattr(benchmark, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(UsageError, match="--busy is for CPUs: give --device cpu"):
        call_main(benchmark.main, "--config", "TinyLlama-1.1B", "--busy")


def test_other_processes_end_with_the_benchmark():
    """After Ctrl-C or an error all processes have ended, even if the second one was still importing modules."""
    with pytest.raises(KeyboardInterrupt), busy.busy_process() as process:
        raise KeyboardInterrupt
    assert process.returncode is not None
    with pytest.raises(UsageError), busy.second_process(1, None, None, None):
        assert len(multiprocessing.active_children()) == 1
        raise UsageError("wrong")
    assert not multiprocessing.active_children()


SECOND = SimpleNamespace(precision="float32", kernels="off", prompt_tokens=2, max_new_tokens=3)


def test_second_decode():
    """The second process decodes text after text until it gets "stop", and ends with the pipe."""
    words, sent = iter(["decode", "stop"]), []

    def recv() -> str:
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    # It asks before each text and after each token; here for two texts of three tokens, and one token
    polls = chain([False] * 9, repeat(True))
    connection = SimpleNamespace(recv=recv, poll=lambda: next(polls), send=sent.append)
    busy.serve_decode_requests(connection, 1, SECOND, TINY, Unquantized())
    started, times = sent
    assert started is None and len(times) == 7 and times == sorted(times)


@pytest.fixture
def second():
    """The connection to serve_decode_requests, which runs in a thread of this process."""
    connection, their_end = multiprocessing.Pipe()
    arguments = their_end, 1, SECOND, TINY, Unquantized()
    thread = threading.Thread(target=busy.serve_decode_requests, args=arguments)
    thread.start()
    yield connection
    connection.close()
    thread.join(60)
    assert not thread.is_alive()


def test_second_decode_ends_with_the_benchmark(second):
    """If the benchmark is killed while the second process decodes, the pipe ends, and so does that process."""
    assert busy.send_request(second, "decode") is None


@pytest.fixture
def too_large(monkeypatch):
    def raise_error(*arguments):
        raise OutOfMemoryError("the model takes 9 GB")

    monkeypatch.setattr(busy, "TimedModel", raise_error)


def test_second_decode_that_fails(too_large, second):
    """An error in the second process becomes one of the benchmark, so the user sees one line."""
    with pytest.raises(OutOfMemoryError, match="the model takes 9 GB"):
        busy.send_request(second, "decode")


def test_second_decode_that_is_killed():
    connection, their_end = multiprocessing.Pipe()
    their_end.close()
    with pytest.raises(OutOfMemoryError, match="the process of the second decode was killed"):
        busy.send_request(connection, "decode")

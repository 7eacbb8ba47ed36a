"""Measures how fast decoding is beside other work, for --busy of benchmark.py.

    python scripts/benchmark.py --config TinyLlama-1.1B --busy        # three rounds
    python scripts/benchmark.py --config TinyLlama-1.1B --busy 9      # nine

kernels/csrc/threads.h: ThreadCount takes fewer threads while another program needs a core. Every round decodes a text
in each of four ways, one after the other:

                              threads    beside                                expected speed
    alone                     all        nothing
    beside_busy               all        a process that keeps one core busy    at least one_thread_beside_busy
    one_thread_beside_busy    one        a process that keeps one core busy
    two                       all        a second process that decodes         both together at least 0.9 of alone

Before every text there is a pause, after which decoding begins with all threads: the time includes the search for
the best number of threads. The other processes read from a pipe of this process. When this process ends, for whatever
reason, the pipe is closed, and the other processes end.
"""

import argparse
import contextlib
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from statistics import median

import torch
from tqdm import tqdm

from cli.report import tokens_per_second
from config import ModelConfig
from engine.generation import DecodeLoop
from engine.runner import ModelRunner
from formats import WeightFormat
from layers.kv_cache import KVCache
from layers.packing import pack_model
from scripts.benchmarking.speed import SAMPLING, describe_machine, random_model, random_prompt, time_tokens
from utils.errors import OutOfMemoryError, UsageError

CPU = torch.device("cpu")
PAUSE = 1.1  # seconds, after which ThreadCount has forgotten how busy the machine was
# Prints a line, then keeps a core busy until stdin ends
BUSY_LOOP = "import select\nprint(flush=True)\nwhile not select.select([0], [], [], 0)[0]: pass"


def measure_busy(args: argparse.Namespace, config: ModelConfig, format: WeightFormat) -> dict:
    """Returns the rounds, medians over the rounds, and a description of the machine. args: the options of
    benchmark.py."""
    n_threads, machine = torch.get_num_threads(), describe_machine()
    with second_process(n_threads, args, config, format) as second:
        timed_model = TimedModel(args, config, format)
        rounds = [measure_round(timed_model, second, n_threads) for _ in range(1 + args.busy)]
    del rounds[0]  # the warm-up
    medians = {name: median(row[name] for row in rounds) for name in rounds[0]}
    return machine | medians | {"rounds": rounds}


def measure_round(timed_model: "TimedModel", second: Connection, n_threads: int) -> dict[str, float]:
    alone = tokens_per_second(timed_model.time_text(n_threads))
    with busy_process():
        beside_busy = tokens_per_second(timed_model.time_text(n_threads))
        one_thread = tokens_per_second(timed_model.time_text(1))
    send_request(second, "decode")
    times = timed_model.time_text(n_threads)
    their_times = send_request(second, "stop")
    first_of_two = tokens_per_second(times)
    n_theirs = sum(times[0] < t <= times[-1] for t in their_times)  # tokens of the second process while both decoded
    second_of_two = n_theirs / (times[-1] - times[0])
    return {
        "alone_tokens_per_sec": alone,
        "beside_busy_tokens_per_sec": beside_busy,
        "one_thread_beside_busy_tokens_per_sec": one_thread,
        "beside_busy_over_one_thread": beside_busy / one_thread,
        "first_of_two_tokens_per_sec": first_of_two,
        "second_of_two_tokens_per_sec": second_of_two,
        "two_tokens_per_sec": first_of_two + second_of_two,
        "two_over_alone": (first_of_two + second_of_two) / alone,
    }


class TimedModel:
    """A model with random weights that decodes one text after the other."""

    def __init__(self, args: argparse.Namespace, config: ModelConfig, format: WeightFormat):
        self.model = random_model(config, format, CPU, getattr(torch, args.precision))
        if args.kernels == "auto":
            pack_model(self.model)
        self.n_prompt, self.n_new = args.prompt_tokens, args.max_new_tokens
        self.kv_cache = KVCache(self.model, 1, self.n_prompt + self.n_new)

    def new_runner(self, n_threads: int) -> ModelRunner:
        """Returns a runner whose decode step has just been captured."""
        torch.set_num_threads(n_threads)
        runner = ModelRunner(self.model, self.kv_cache, SAMPLING)
        time_tokens(self.model, runner, 0, 1, 2)  # captures
        return runner

    def token_times(self, runner: ModelRunner) -> Iterator[float]:
        """Decodes a text. Yields the time after prefill and after every decode step, by a clock that all processes
        share."""
        for _ in DecodeLoop(runner).decode_tokens(random_prompt(self.model, self.n_prompt), self.n_new):
            yield time.monotonic()

    def time_text(self, n_threads: int) -> list[float]:
        time.sleep(PAUSE)
        return list(self.token_times(self.new_runner(n_threads)))


# ---- Other processes -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen]:
    """Keeps one core busy, with a process, within this context."""
    command, pipe = [sys.executable, "-I", "-c", BUSY_LOOP], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        yield process


@contextlib.contextmanager
def second_process(*arguments) -> Iterator[Connection]:
    """Runs serve_decode_requests(connection, *arguments) in a process within this context: see send_request."""
    spawn = multiprocessing.get_context("spawn")
    connection, their_end = spawn.Pipe()
    process = spawn.Process(target=serve_decode_requests, args=(their_end, *arguments), daemon=True)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits SIG_IGN: Ctrl-C prints nothing
    process.start()
    signal.signal(signal.SIGINT, on_interrupt)
    their_end.close()
    try:
        yield connection
    finally:
        process.kill()
        process.join()


def send_request(second: Connection, request: str) -> list[float] | None:
    """Sends a request to the second process and returns the answer. An exception in the process is raised here.

        "decode"    begins to decode; answer: None
        "stop"      stops decoding; answer: the times of all tokens"""
    try:
        second.send(request)
        answer = second.recv()
    except (EOFError, ConnectionError):
        raise OutOfMemoryError("the process of the second decode was killed") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def serve_decode_requests(connection: Connection, n_threads: int, *arguments):
    """Answers what send_request sends: the main loop of the second process."""
    tqdm.set_lock(threading.RLock())  # tqdm's default lock outlives a process that is killed
    try:
        timed_model = TimedModel(*arguments)
        while True:
            connection.recv()  # "decode"
            runner, times = timed_model.new_runner(n_threads), []
            connection.send(None)
            while not connection.poll():
                for now in timed_model.token_times(runner):
                    times.append(now)
                    if connection.poll():
                        break
            connection.recv()  # "stop"
            connection.send(times)
    except (EOFError, ConnectionError):
        pass  # the pipe has ended
    except (UsageError, MemoryError, RuntimeError) as e:
        connection.send(e)

"""kernels/csrc/threads.h: how the threads of the CPU kernels share work, and how many threads a step uses."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from formats.cpu_layouts import CPU_BLOCK_N

SOURCE = Path(__file__).with_name("threads_test.cpp")


@pytest.fixture(scope="module")
def simulate(tmp_path_factory):
    """Returns a function that runs threads_test.cpp and returns how many threads each repetition used."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    program = tmp_path_factory.mktemp("threads") / "threads_test"
    subprocess.run([compiler, "-std=c++20", "-O1", "-fopenmp", SOURCE, "-o", program], check=True)

    def run(n_cpus: int, n_repetitions: int, *busy: tuple[int, int, int]) -> list[int]:
        numbers = (n_cpus, n_repetitions, *(number for times in busy for number in times))
        output = subprocess.run([program, *map(str, numbers)], check=True, capture_output=True, text=True).stdout
        return [int(line) for line in output.split()]

    return run


@pytest.mark.parametrize("n_cpus", [1, 2, 3, 16])
def test_idle_machine(simulate, n_cpus):
    """On an idle machine no other number of threads is tried."""
    assert set(simulate(n_cpus, 2000)) == {n_cpus}


@pytest.mark.parametrize(("n_cpus", "busy"), [(2, 1), (4, 1), (8, 2), (16, 3), (64, 5)])
def test_busy_cpus(simulate, n_cpus, busy):
    """While other programs need some CPUs, most repetitions do without these, and later use them again."""
    chosen = simulate(n_cpus, 12000, (busy, 1000, 6000))
    assert set(chosen[:1000]) == {n_cpus}
    assert sum(0.75 * (n_cpus - busy) <= n <= n_cpus - busy for n in chosen[2000:6000]) > 0.9 * 4000
    assert chosen[-1] > 0.95 * n_cpus  # to gain less is not worth a trial


def test_too_few_idle_cpus(simulate):
    """If fewer threads are no faster, all threads are used."""
    chosen = simulate(4, 4000, (4, 0, 4000))
    assert sum(n == 4 for n in chosen) > 0.9 * len(chosen)


def test_two_decodes(simulate):
    """Two programs that start with all threads soon use one each, and mostly keep to it."""
    pairs = list(zip(*[iter(simulate(-2, 10000))] * 2, strict=True))[1000:]
    assert sum(pair == (1, 1) for pair in pairs) > 0.9 * len(pairs)


@pytest.mark.parametrize("n_outputs", [6144, 4096, 28672 // 2, 128256])
def test_shares_of_llama_8b(simulate, n_outputs):
    """With an 8B model, no thread gets more than 1.15 times the mean share of weights."""
    n_blocks = n_outputs // CPU_BLOCK_N
    most_of_a_thread = simulate(0, n_blocks)
    assert len(most_of_a_thread) == 64
    for n_threads, most in enumerate(most_of_a_thread[:32], start=1):
        assert most <= 1.15 * n_blocks / n_threads

"""Measures decoding and prefill of this project and of llama.cpp, for compare_llama_cpp.py.

    rounds = measure(files, Pair("int8", "Q8_0"), bytes_per_token(files), n_rounds, threads, bar)
    rounds = measure(..., tasks=[8, 16])     # tokens per second of 8 and of 16 sequences together

Each side of a pair has a process, and the two processes take turns. gguf and llama_cpp are imported only where they are
needed.
"""

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from tqdm import tqdm

from cli.interrupts import exit_on_interrupt
from config import ModelConfig
from engine.generation import DecodeLoop
from engine.memory_traffic import mean_attended_tokens, step_bytes
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from layers.kv_cache import KVCache, kv_bytes_per_token
from loading import load_model
from model import Transformer
from scripts.benchmarking.speed import seconds_of_steps
from utils.errors import UsageError
from utils.machine import read_bandwidth

OOM_HINT = "end other programs, or compare a smaller model"
PROMPT, STEPS, PREFILL = 5, 64, 512  # tokens: decoding takes STEPS after PROMPT; prefill takes PREFILL
TASKS = ("decode", "prefill")
PAUSE = 0.1  # seconds before each measurement, in which the threads of the other side stop spinning
CPU = torch.device("cpu")


class Pair(NamedTuple):
    """The names of two files that are compared."""

    ours: str
    theirs: str


def measure(
    files: dict[str, Path], pair: Pair, sizes: dict[str, int], n_rounds: int, threads: int, bar: tqdm,
    tasks: Sequence[str | int] = TASKS,
) -> list[dict]:
    """Measures the two files of a pair in turns. The task N, a number, means decoding N sequences together. Returns for
    each round:

        read_bytes_per_sec    memory's read bandwidth
        ours, theirs          tokens per second by task; with the task "decode" also share_of_read, the share of the
                              bandwidth that decoding uses"""
    names = pair._asdict()
    order, rounds = ["ours", "theirs"], []
    with new_process() as our_process, new_process() as their_process:
        processes = {"ours": our_process, "theirs": their_process}
        for _ in range(n_rounds + 1):
            result = {"read_bytes_per_sec": read_bandwidth(CPU), "ours": {}, "theirs": {}}
            for task in tasks:
                for side in order:
                    arguments = LOADERS[side], str(files[names[side]]), threads, task
                    result[side][task] = result_of(processes[side].submit(run_task, *arguments))
            for side, name in names.items() if "decode" in tasks else ():
                result[side]["share_of_read"] = result[side]["decode"] * sizes[name] / result["read_bytes_per_sec"]
            rounds.append(result)
            order.reverse()
            bar.update()
    return rounds[1:]  # round 0 loads the files and warms up


def summarize(pair: Pair, rounds: list[dict], sizes: dict[str, float]) -> dict:
    """Returns the medians of rounds, which measure has returned for a pair, and the median ratio of ours to theirs."""
    row = {"read_bytes_per_sec": median(r["read_bytes_per_sec"] for r in rounds)}
    for side, name in pair._asdict().items():
        row[side] = {key: median(r[side][key] for r in rounds) for key in rounds[0][side]}
        row[side] |= {"file": name, "bytes_per_token": sizes[name]}
    for task in rounds[0]["ours"].keys() - {"share_of_read"}:
        row[f"{task}_ratio"] = median(r["ours"][task] / r["theirs"][task] for r in rounds)
    return row


def new_process() -> ProcessPoolExecutor:
    """Returns a process that runs one task after the other. llama.cpp's process imports PyTorch without calling it, so
    PyTorch starts no threads there."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=exit_on_interrupt)


def result_of(future: Future):
    try:
        return future.result()
    except BrokenProcessPool:
        raise UsageError(f"a process was killed; {OOM_HINT}") from None


# ---- What a step reads ----------------------------------------------------------------------------------------------


def bytes_per_token(files: dict[str, Path]) -> dict[str, int]:
    """Returns the mean number of bytes that a decode step reads, for each file by name. Keys and values have 16 bits on
    both sides."""
    load = partial(load_model, device=CPU, dtype=torch.bfloat16, use_kernels=False)
    model = load(files["bf16"])
    n_attended = mean(mean_attended_tokens(model.config, PROMPT + i + 1) for i in range(STEPS))
    cache_bytes = round(n_attended * kv_bytes_per_token(model))
    sizes = {}
    for name, file in files.items():
        if file.suffix == ".pth":
            sizes[name] = step_bytes(load(file), n_attended)
        else:
            sizes[name] = gguf_active_weight_bytes(file, model.config) + cache_bytes
    return sizes


def gguf_active_weight_bytes(file: Path, config: ModelConfig) -> int:
    """Returns what engine/memory_traffic.py: active_weight_bytes does, for a GGUF."""
    from converters.gguf_file import read_gguf

    _, tensors = read_gguf(file)
    if "output.weight" in tensors:  # a step reads one row of an embedding that is not the head
        del tensors["token_embd.weight"]
    total = 0
    for name, tensor in tensors.items():
        total += tensor.data.nbytes * (config.moe.active_fraction if "_exps." in name else 1)
    return round(total)


# ---- In a process of its own ----------------------------------------------------------------------------------------

Generate = Callable[[list[list[int]], int], Iterator]  # (prompts, n) -> an iterator that decodes n tokens, step by step


def run_task(load: Callable[[str, int, int], Generate], file: str, threads: int, task: str | int) -> float:
    """Runs a task once and returns tokens per second. load: one of LOADERS. The tasks are

        "prefill"    prefill of PREFILL tokens
        "decode"     STEPS decode steps after a prompt of PROMPT tokens
        N            the same with N sequences together"""
    n_sequences = task if isinstance(task, int) else 1
    generate_greedily = load(file, threads, n_sequences)
    time.sleep(PAUSE)
    n_prompt, n_new = (PREFILL, 1) if task == "prefill" else (PROMPT, 1 + STEPS)
    prompts = [[(i + j) % 64 for i in range(n_prompt)] for j in range(n_sequences)]
    prefill, *steps = seconds_of_steps(generate_greedily(prompts, n_new))
    return PREFILL / prefill if task == "prefill" else n_sequences / mean(steps)


@cache
def our_model(file: str) -> Transformer:
    return load_model(Path(file), CPU, torch.bfloat16)


@cache
def load_ours(file: str, threads: int, n_sequences: int) -> Generate:
    torch.set_num_threads(threads)
    model = our_model(file)
    runner = ModelRunner(model, KVCache(model, n_sequences, PREFILL), SamplingParams())

    def generate_greedily(prompts: list[list[int]], n: int) -> Iterator:
        return DecodeLoop(runner).decode_tokens(torch.tensor(prompts), n)

    return generate_greedily


@cache
def their_model(file: str):
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0  # also if llama.cpp was built for a GPU
    model = llama_cpp.llama_model_load_from_file(file.encode(), model_params)
    if not model:
        raise UsageError(f"llama.cpp does not load {file}")
    return model


@cache
def load_theirs(file: str, threads: int, n_sequences: int) -> Generate:
    import llama_cpp
    import numpy as np

    model = their_model(file)
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max, params.n_ctx, params.n_batch = n_sequences, PREFILL * n_sequences, PREFILL
    params.n_threads = params.n_threads_batch = threads
    params.offload_kqv = params.op_offload = False
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    batch = llama_cpp.llama_batch_init(PREFILL, 0, 1)

    def fill_batch(sequences: list[list[int]], position: int):
        """Fills batch with the next tokens of each sequence, from position on, and requests the logits of each
        sequence's last token."""
        batch.n_tokens = 0
        for sequence, tokens in enumerate(sequences):
            for i, token in enumerate(tokens):
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, position + i, 1
                batch.seq_id[n][0], batch.logits[n] = sequence, i == len(tokens) - 1
                batch.n_tokens += 1

    def generate_greedily(prompts: list[list[int]], n: int) -> Iterator:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        sequences, position = prompts, 0
        for _ in range(n):
            fill_batch(sequences, position)
            if llama_cpp.llama_decode(context, batch) != 0:
                raise UsageError("llama.cpp cannot decode")
            wanted = [i for i in range(batch.n_tokens) if batch.logits[i]]
            logits = [llama_cpp.llama_get_logits_ith(context, i) for i in wanted]
            position += len(sequences[0])
            sequences = [[int(np.ctypeslib.as_array(row, (vocab_size,)).argmax())] for row in logits]
            yield sequences

    return generate_greedily


LOADERS = {"ours": load_ours, "theirs": load_theirs}

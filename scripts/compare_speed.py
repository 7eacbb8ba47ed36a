"""How fast this project and llama.cpp decode and read a prompt: what compare_llama_cpp.py measures.

    rounds = measure(files, ("int8", "Q8_0"), bytes_per_token(files), n_rounds, threads, progress_bar)

Each side of a pair is a process of its own, which waits for its turns. This file has no command line. It needs gguf and
llama_cpp only where it imports them.
"""

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

import cli
from checkpoint import read_checkpoint
from config import ModelConfig, UsageError
from generate import generate
from loading import load_model
from machine import read_bandwidth
from model import KVCache
from sampling import SamplingParams
from steps import build_steps

OOM_HINT = "end other programs, or compare a smaller model"
PROMPT, STEPS, PREFILL = 5, 64, 512  # tokens: decoding takes STEPS after PROMPT; prefill takes PREFILL
PAUSE = 0.1  # seconds until the other side's threads, which wait for more work, have given up
CPU = torch.device("cpu")


def measure(
    files: dict[str, Path], pair: tuple[str, str], sizes: dict[str, int], n_rounds: int, threads: int, bar: tqdm
) -> list[dict]:
    """Measures the two files of a pair in turns. Returns for each round memory's read bandwidth and, for each side,
    tokens per second of decode and prefill, and which share of the bandwidth its decode uses."""
    names = dict(zip(("ours", "theirs"), pair, strict=True))
    order, rounds = ["ours", "theirs"], []
    with new_process() as our_process, new_process() as their_process:
        processes = {"ours": our_process, "theirs": their_process}
        for _ in range(n_rounds + 1):
            result = {"read_bytes_per_sec": read_bandwidth(CPU), "ours": {}, "theirs": {}}
            for task in ("decode", "prefill"):
                for side in order:
                    arguments = LOADERS[side], str(files[names[side]]), threads, task
                    result[side][task] = answer(processes[side].submit(tokens_per_second, *arguments))
            for side, name in names.items():
                result[side]["share_of_read"] = result[side]["decode"] * sizes[name] / result["read_bytes_per_sec"]
            rounds.append(result)
            order.reverse()
            bar.update()
    return rounds[1:]  # the first loads the files and warms up


def summarize(pair: tuple[str, str], rounds: list[dict], sizes: dict[str, float]) -> dict:
    """The medians of what measure returns for a pair, and of the rounds' ratios of ours to theirs."""
    row = {"read_bytes_per_sec": median(r["read_bytes_per_sec"] for r in rounds)}
    for side, name in zip(("ours", "theirs"), pair, strict=True):
        row[side] = {key: median(r[side][key] for r in rounds) for key in rounds[0][side]}
        row[side] |= {"file": name, "bytes_per_token": sizes[name]}
    for key in ("decode", "prefill"):
        row[f"{key}_ratio"] = median(r["ours"][key] / r["theirs"][key] for r in rounds)
    return row


def new_process() -> ProcessPoolExecutor:
    """A process that does one task after the other. PyTorch starts no threads in llama.cpp's: it is imported there, but
    not called."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=cli.exit_on_interrupt)


def answer(future: Future):
    try:
        return future.result()
    except BrokenProcessPool:
        raise UsageError(f"a process was killed; {OOM_HINT}") from None


# ---- What a step reads ----------------------------------------------------------------------------------------------


def bytes_per_token(files: dict[str, Path]) -> dict[str, int]:
    """What a decode step reads on average, for each file by name. The cache holds 16-bit numbers on both sides."""
    config = read_checkpoint(files["bf16"])[0]
    n_attended = mean(config.mean_attended_tokens(PROMPT + i + 1) for i in range(STEPS))
    cache_bytes = round(4 * config.n_layers * config.n_kv_heads * config.head_dim * n_attended)
    sizes = {}
    for name, file in files.items():
        if file.suffix == ".pth":
            sizes[name] = cache_bytes + load_model(file, CPU, torch.bfloat16, use_kernels=False).active_weight_bytes()
        else:
            sizes[name] = cache_bytes + gguf_active_weight_bytes(file, config)
    return sizes


def gguf_active_weight_bytes(file: Path, config: ModelConfig) -> int:
    """Transformer.active_weight_bytes of a GGUF."""
    from converters.gguf_file import read_gguf

    _, tensors = read_gguf(file)
    if "output.weight" in tensors:  # then of the embedding a step reads one row
        del tensors["token_embd.weight"]
    total = 0
    for name, tensor in tensors.items():
        total += tensor.data.nbytes * (config.moe.fraction_read if "_exps." in name else 1)
    return round(total)


# ---- In a process of its own ----------------------------------------------------------------------------------------

Generate = Callable[[list[int], int], Iterator]  # (prompt, n) -> an iterator that takes a step for each of n new tokens


def tokens_per_second(load: Callable[[str, int], Generate], file: str, threads: int, task: str) -> float:
    """Of "prefill", which takes PREFILL tokens, or of "decode", which takes STEPS after PROMPT tokens. load is one of
    LOADERS, which reads the file when it is called first."""
    generate_greedily = load(file, threads)
    time.sleep(PAUSE)
    n_prompt, n_new = (PREFILL, 1) if task == "prefill" else (PROMPT, 1 + STEPS)
    times = [time.perf_counter()]
    for _ in generate_greedily([i % 64 for i in range(n_prompt)], n_new):
        times.append(time.perf_counter())
    return PREFILL / (times[1] - times[0]) if task == "prefill" else STEPS / (times[-1] - times[1])


@cache
def load_ours(file: str, threads: int) -> Generate:
    torch.set_num_threads(threads)
    model = load_model(Path(file), CPU, torch.bfloat16)
    steps = build_steps(model, KVCache(model, 1, PREFILL), SamplingParams())

    def generate_greedily(prompt: list[int], n: int) -> Iterator:
        return generate(steps, torch.tensor([prompt]), 0, n)

    return generate_greedily


@cache
def load_theirs(file: str, threads: int) -> Generate:
    import llama_cpp
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0  # a build for a GPU leaves it alone
    model = llama_cpp.llama_model_load_from_file(file.encode(), model_params)
    if not model:
        raise UsageError(f"llama.cpp does not load {file}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = PREFILL
    params.n_threads = params.n_threads_batch = threads
    params.offload_kqv = params.op_offload = False
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def generate_greedily(prompt: list[int], n: int) -> Iterator:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = prompt
        for _ in range(n):
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
                raise UsageError("llama.cpp cannot decode")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab_size,))
            tokens = [int(logits.argmax())]
            yield tokens

    return generate_greedily


LOADERS = {"ours": load_ours, "theirs": load_theirs}

"""What generate.py reports about a prompt: the object that --json prints, the summary on stderr, labels between texts,
and the trace of --profile."""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from cli.ranks import rank_path
from engine.memory_traffic import active_weight_bytes, mean_attended_tokens, step_bytes
from engine.sequence import Sequence
from layers import collectives
from model import KVCache, Transformer
from utils.errors import UsageError
from utils.machine import is_out_of_memory, peak_memory, read_bandwidth, read_bandwidth_of


def build_result(
    args: argparse.Namespace, model: Transformer, kv_cache: KVCache, samples: list[list[Sequence]],
    accept_counts: list[int] | None = None,
) -> dict:
    """Returns the fields of --json's object that differ between prompts. The bandwidth is the model's, without a draft.

    samples: each sample is a batch of sequences of the same prompt.
    accept_counts: how many steps accepted 0, 1 ... proposed tokens, or None without speculation."""
    longest = [max(batch, key=lambda sequence: len(sequence.new_ids)) for batch in samples]
    last_batch, last = samples[-1], longest[-1]
    # Token 0 comes from prefill, all others from decode steps.
    decoded = [sequence for sequence in longest if len(sequence.new_ids) > 1]
    tokens_per_second = median([(len(sequence.new_ids) - 1) / decode_seconds(sequence) for sequence in decoded])
    steps_per_second = tokens_per_second
    if accept_counts is not None:
        steps_per_second /= tokens_per_step(accept_counts) or 1
    n_prompt_tokens = len(last.prompt_ids)
    halfway = n_prompt_tokens + len(last.new_ids) // 2  # the mean number of tokens in the cache over all steps
    n_read = tokens_read(model, kv_cache, halfway, args.compile)
    bytes_per_step = step_bytes(model, n_read, kv_cache.batch_size)
    texts = [describe_batch(batch) for batch in samples]
    return texts[-1] | {
        "samples": texts,
        "prompt": last.prompt,
        "seed": args.seed,
        "prompt_tokens": n_prompt_tokens,
        "generated_tokens": sum(len(sequence.new_ids) for sequence in last_batch),
        "prefill_seconds": last.token_times[0] - last.start_time,
        "decode_tokens_per_sec": tokens_per_second,
        "total_tokens_per_sec": tokens_per_second * len(last_batch),
        "model_bytes": active_weight_bytes(model),
        "bandwidth_gb_per_sec": bytes_per_step * steps_per_second / 1e9,
        "peak_memory_bytes": peak_memory(model.device),
        "device": str(model.device),
        "precision": args.precision,
        "quantization": model.weight_format.name,
        "accept_counts": accept_counts,
    }


def describe_batch(batch: list[Sequence]) -> dict:
    return {
        "text": [sequence.text for sequence in batch],
        "tokens": [sequence.new_ids for sequence in batch],
        "finish_reason": [sequence.finish_reason for sequence in batch],
    }


def decode_seconds(sequence: Sequence) -> float:
    return sequence.token_times[-1] - sequence.token_times[0]


def median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def tokens_read(model: Transformer, kv_cache: KVCache, n_tokens: int, compile: bool) -> float:
    """Returns how many tokens' keys and values a decode step reads for a sequence of n_tokens."""
    if model.has_kernels_for(kv_cache.batch_size, 1):
        return mean_attended_tokens(model.config, n_tokens)
    return kv_cache.max_seq_len if compile else n_tokens  # a compiled step reads the whole cache


@lru_cache(maxsize=1)
def measured_bandwidth(model: Transformer) -> float | None:
    """Measures once at how many bytes per second the machine reads memory: a CPU with the weights that every step
    reads, which are all but experts. Returns None if its caches hold half of these weights, or if there is too little
    memory for the measurement."""
    device = model.device
    linears = (linear for _, linear in model.quantizable_linears() if linear.n_experts is None)
    try:
        if device.type == "cpu":
            return read_bandwidth_of(tensor for linear in linears for tensor in linear.tensors().values())
        return read_bandwidth(device)
    except (MemoryError, RuntimeError) as e:
        if is_out_of_memory(e):
            return None
        raise


def print_result(args: argparse.Namespace, result: dict, model: Transformer):
    """Prints result as JSON to stdout if --json is given, else a summary to stderr."""
    if collectives.world_size() > 1:
        result = result | {"rank_peak_memory_bytes": collectives.gather_objects(result["peak_memory_bytes"])}
    if args.json:
        print(json.dumps(result), flush=True)
    else:
        print_summary(result, model)


def tokens_per_step(accept_counts: list[int]) -> float:
    """Returns the mean number of tokens that a step gives. accept_counts[n]: how many steps accepted n proposed tokens,
    and so gave n + 1 tokens."""
    return sum(n * count for n, count in enumerate(accept_counts, start=1)) / max(sum(accept_counts), 1)


def print_summary(result: dict, model: Transformer):
    counts = result["accept_counts"]
    speculation = ""
    if counts is not None:
        speculation = f", {tokens_per_step(counts):.2f} tokens a step"
    used = result["bandwidth_gb_per_sec"]
    percentage = ""
    readable = measured_bandwidth(model)
    if readable is not None:
        percentage = f", {100 * used / (readable / 1e9):.0f} % of the {readable / 1e9:.1f} GB/s this machine reads"
    # decode_tokens_per_sec is of one sequence: all sequences of a batch take every step together.
    n = len(result["tokens"])
    sequences, each = (f" in {n} sequences,", " each") if n > 1 else ("", "")
    print(
        f"{result['prompt_tokens']} prompt tokens in {result['prefill_seconds']:.2f} s, "
        f"{result['generated_tokens']} generated{sequences} at {result['decode_tokens_per_sec']:.1f} tokens/s"
        f"{each}{speculation}: {used:.1f} GB/s{percentage} "
        f"(load {result['load_seconds']:.1f} s, compile {result['compile_seconds']:.1f} s)",
        file=sys.stderr,
    )


def print_label(numbers: list[tuple[str, int, int]]):
    """Prints which prompt, sample and sequence the next text belongs to. numbers: ("prompt", 2, 3) is prompt 2 of 3. A
    prompt, sample or sequence that is the only one is left out."""
    several = [f"{what} {number}" for what, number, n in numbers if n > 1]
    if several:
        print(f"--- {', '.join(several)}", flush=True)


@contextlib.contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Writes a Chrome trace of what runs within this context to path, or with several ranks to rank_path(path). Does
    nothing if path is None."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    path = rank_path(path)
    path.unlink(missing_ok=True)
    profile.export_chrome_trace(str(path))  # raises no error if path cannot be written
    if not path.is_file():
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise UsageError(f"cannot write --profile {path}")

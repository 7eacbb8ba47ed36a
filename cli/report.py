"""Reports of generate.py about a prompt: the object that --json prints, and the summary on stderr."""

import argparse
import json
import statistics
import sys
from functools import lru_cache

import collectives
from cli.prompts import Prompt
from engine.completion import Completion
from machine import is_out_of_memory, peak_memory, read_bandwidth, read_bandwidth_of
from model import KVCache, Transformer


def build_result(
    args: argparse.Namespace, model: Transformer, kv_cache: KVCache, prompt: Prompt, samples: list[list[Completion]]
) -> dict:
    """Returns the part of --json's object that differs from prompt to prompt. samples: each is a batch of completions.
    The bandwidth does not count what a draft model reads."""
    longest = [max(batch, key=lambda completion: len(completion.step_times)) for batch in samples]
    last_batch, last = samples[-1], longest[-1]
    decoded = [one for one in longest if len(one.step_times) > 1]  # with decode steps after prefill
    tokens_per_second = median([sum(one.step_sizes[1:]) / one.decode_seconds for one in decoded])
    steps_per_second = median([(len(one.step_times) - 1) / one.decode_seconds for one in decoded])
    halfway = len(prompt.ids) + len(last.tokens) // 2  # tokens in the cache, on average over the steps
    bytes_per_step = model.active_weight_bytes() + kv_bytes_per_step(model, kv_cache, halfway, args.compile)
    accept_counts = None
    if args.speculative:  # how many steps accepted 0, 1 ... k proposed tokens; each gave one token more
        accept_counts = [last.step_sizes[1:].count(n_accepted + 1) for n_accepted in range(args.speculate_k + 1)]
    texts = [describe_batch(batch) for batch in samples]
    return texts[-1] | {
        "samples": texts,
        "prompt": prompt.source,
        "seed": args.seed,
        "prompt_tokens": len(prompt.ids),
        "generated_tokens": sum(len(completion.tokens) for completion in last_batch),
        "prefill_seconds": last.step_times[0] - last.request.start_time,
        "decode_tokens_per_sec": tokens_per_second,
        "total_tokens_per_sec": tokens_per_second * len(last_batch),
        "model_bytes": model.active_weight_bytes(),
        "bandwidth_gb_per_sec": bytes_per_step * steps_per_second / 1e9,
        "peak_memory_bytes": peak_memory(model.device),
        "device": str(model.device),
        "precision": args.precision,
        "quantization": model.format.name,
        "accept_counts": accept_counts,
    }


def describe_batch(batch: list[Completion]) -> dict:
    return {
        "text": [completion.text for completion in batch],
        "tokens": [completion.tokens for completion in batch],
        "finish_reason": [completion.finish_reason for completion in batch],
    }


def median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def kv_bytes_per_step(model: Transformer, kv_cache: KVCache, n_tokens: int, compile: bool) -> int:
    """Returns how many bytes of keys and values a decode step reads when n_tokens tokens are in the cache."""
    if model.uses_kernels(kv_cache.batch_size, 1):
        n_read = model.config.mean_attended_tokens(n_tokens)
    else:  # a compiled step reads the whole cache, used or not
        n_read = kv_cache.max_seq_len if compile else n_tokens
    return round(n_read * kv_cache.bytes_per_position())


@lru_cache(maxsize=1)
def measured_bandwidth(model: Transformer) -> float | None:
    """Measures once at how many bytes per second the machine reads memory. On a CPU it reads those weights of model
    that every step reads. Returns None if the processor's caches hold these weights, or if memory is too small for the
    measurement."""
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
    """Returns the mean number of tokens that a step gives. accept_counts: how many steps accepted 0, 1, 2 ... proposed
    tokens. Such steps give 1, 2, 3 ... tokens."""
    return sum(n * count for n, count in enumerate(accept_counts, start=1)) / max(sum(accept_counts), 1)


def print_summary(result: dict, model: Transformer):
    counts, speculation = result["accept_counts"], ""
    if counts is not None:
        speculation = f", {tokens_per_step(counts):.2f} tokens a step"
    used, percentage, readable = result["bandwidth_gb_per_sec"], "", measured_bandwidth(model)
    if readable is not None:
        percentage = f", {100 * used / (readable / 1e9):.0f} % of the {readable / 1e9:.1f} GB/s this machine reads"
    # All sequences of a batch take every step together, so each sequence has this speed.
    n = len(result["tokens"])
    sequences, each = (f" in {n} sequences,", " each") if n > 1 else ("", "")
    print(
        f"{result['prompt_tokens']} prompt tokens in {result['prefill_seconds']:.2f} s, "
        f"{result['generated_tokens']} generated{sequences} at {result['decode_tokens_per_sec']:.1f} tokens/s"
        f"{each}{speculation}: {used:.1f} GB/s{percentage} "
        f"(load {result['load_seconds']:.1f} s, compile {result['compile_seconds']:.1f} s)",
        file=sys.stderr,
    )

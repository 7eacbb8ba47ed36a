"""The reports of generate.py about a prompt: the object of --json, the summary on stderr, labels between texts, and the
trace of --profile."""

import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch

from cli.ranks import rank_path
from engine.memory_traffic import active_weight_bytes, mean_attended_tokens, step_bytes
from engine.sequence import Sequence
from layers import collectives
from layers.kv_cache import KVCache
from layers.linear import quantizable_linears
from layers.packing import can_capture
from model import Transformer
from utils.errors import UsageError
from utils.machine import is_out_of_memory, measure_read_bandwidth, measure_read_bandwidth_on, peak_memory


@dataclass
class Result:
    """The object that --json prints about a prompt. Fields with their default value are left out."""

    text: list[str]  # of each sequence of the last sample
    tokens: list[list[int]]  # the new ones, including an end token
    finish_reason: list[str]
    samples: list[dict]  # the three fields above, for each sample
    prompt: str | list[dict]
    seed: int
    prompt_tokens: int
    generated_tokens: int  # of all sequences of the last sample together
    prefill_seconds: float  # from the start of the last sample to its first token
    decode_tokens_per_sec: float  # of one sequence; the median over the samples
    total_tokens_per_sec: float  # of all sequences together
    model_bytes: int  # the weights that a decode step reads
    bandwidth_gb_per_sec: float  # of decoding: weights, keys and values, without those of a draft
    peak_memory_bytes: int
    device: str
    precision: str
    quantization: str | None
    accept_counts: list[int] | None  # how many steps accepted 0, 1 ... proposed tokens; None without speculation
    compile_seconds: float
    load_seconds: float
    logprobs: list[list[dict]] | None = None  # with --logprobs: an entry for each token of each sequence
    world_size: int = 1
    communication_share: float | None = None  # the part of a decode step's time that this rank spends in collectives
    rank_peak_memory_bytes: list[int] | None = None  # peak_memory_bytes of each rank, if there are several

    def to_json(self) -> str:
        return json.dumps({f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default})


@dataclass
class Reporter:
    """Reports a prompt's texts: as a Result on stdout with --json, otherwise as a summary on stderr."""

    model: Transformer
    precision: str
    compile: bool
    as_json: bool  # whether --json is given
    load_seconds: float
    compile_seconds: float = 0.0
    communication_share: float | None = None  # unless measured

    def report(
        self, samples: list[list[Sequence]], kv_cache: KVCache, accept_counts: list[int] | None = None, **others
    ):
        """samples: each is a batch of sequences of the same prompt. others: more fields of Result."""
        result = self.build_result(samples, kv_cache, accept_counts, **others)
        if self.as_json:
            print(result.to_json(), flush=True)
        else:
            print_summary(result, measured_bandwidth(self.model))

    def build_result(
        self, samples: list[list[Sequence]], kv_cache: KVCache, accept_counts: list[int] | None, **others
    ) -> Result:
        model, world_size, n_peak_bytes = self.model, collectives.world_size(), peak_memory(self.model.device)
        longest = [max(batch, key=lambda sequence: len(sequence.new_ids)) for batch in samples]
        last_batch, last = samples[-1], longest[-1]
        # Token 0 comes from prefill, all others from decode steps.
        speeds = [tokens_per_second(sequence.token_times) for sequence in longest if len(sequence.new_ids) > 1]
        speed = statistics.median(speeds) if speeds else 0.0
        steps_per_second = speed if accept_counts is None else speed / (tokens_per_step(accept_counts) or 1)
        halfway = len(last.prompt_ids) + len(last.new_ids) // 2  # the mean number of tokens in the cache over all steps
        n_read = tokens_read(model, kv_cache, halfway, self.compile)
        texts = [describe_batch(batch) for batch in samples]
        return Result(
            samples=texts,
            prompt=last.prompt,
            prompt_tokens=len(last.prompt_ids),
            generated_tokens=sum(len(sequence.new_ids) for sequence in last_batch),
            prefill_seconds=last.token_times[0] - last.start_time,
            decode_tokens_per_sec=speed,
            total_tokens_per_sec=speed * len(last_batch),
            model_bytes=active_weight_bytes(model),
            bandwidth_gb_per_sec=step_bytes(model, n_read, kv_cache.batch_size) * steps_per_second / 1e9,
            peak_memory_bytes=n_peak_bytes,
            device=str(model.device),
            precision=self.precision,
            quantization=model.weight_format.name,
            accept_counts=accept_counts,
            compile_seconds=self.compile_seconds,
            load_seconds=self.load_seconds,
            world_size=world_size,
            communication_share=self.communication_share,
            rank_peak_memory_bytes=collectives.gather_objects(n_peak_bytes) if world_size > 1 else None,
            seed=last.seed,
            **texts[-1] | others,
        )


def describe_batch(batch: list[Sequence]) -> dict:
    return {
        "text": [sequence.text for sequence in batch],
        "tokens": [sequence.new_ids for sequence in batch],
        "finish_reason": [sequence.finish_reason for sequence in batch],
    }


def tokens_per_second(times: list[float]) -> float:
    """times: of several tokens. Those between the first and the last count."""
    return (len(times) - 1) / (times[-1] - times[0])


def tokens_read(model: Transformer, kv_cache: KVCache, n_tokens: int, compile: bool) -> float:
    """Returns how many tokens' keys and values a decode step reads for a sequence of n_tokens."""
    if can_capture(model, kv_cache.batch_size, 1):
        return mean_attended_tokens(model.config, n_tokens)
    return kv_cache.max_seq_len if compile else n_tokens  # a compiled step reads the whole cache


@lru_cache(maxsize=1)
def measured_bandwidth(model: Transformer) -> float | None:
    """Measures once at how many bytes per second the machine reads memory. A CPU reads the weights that every step
    reads: all weights except experts. Returns None if the caches hold half of these weights, or if there is too little
    memory for the measurement."""
    device = model.device
    linears = (linear for _, linear in quantizable_linears(model) if linear.n_experts is None)
    try:
        if device.type == "cpu":
            return measure_read_bandwidth_on(tensor for linear in linears for tensor in linear.tensors().values())
        return measure_read_bandwidth(device)
    except (MemoryError, RuntimeError) as e:
        if is_out_of_memory(e):
            return None
        raise


def tokens_per_step(accept_counts: list[int]) -> float:
    """Returns the mean number of new tokens in a step. accept_counts[n]: how many steps accepted n draft tokens. Such a
    step adds n + 1 tokens."""
    return sum(n * count for n, count in enumerate(accept_counts, start=1)) / max(sum(accept_counts), 1)


def print_summary(result: Result, bandwidth: float | None):
    """bandwidth: the bytes per second that the machine reads, if known."""
    speculation = percentage = ""
    if result.accept_counts is not None:
        speculation = f", {tokens_per_step(result.accept_counts):.2f} tokens a step"
    used = result.bandwidth_gb_per_sec
    if bandwidth is not None:
        percentage = f", {100 * used / (bandwidth / 1e9):.0f} % of the {bandwidth / 1e9:.1f} GB/s this machine reads"
    n = len(result.tokens)
    sequences, each = (f" in {n} sequences,", " each") if n > 1 else ("", "")
    print(
        f"{result.prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, "
        f"{result.generated_tokens} generated{sequences} at {result.decode_tokens_per_sec:.1f} tokens/s"
        f"{each}{speculation}: {used:.1f} GB/s{percentage} "
        f"(load {result.load_seconds:.1f} s, compile {result.compile_seconds:.1f} s)",
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

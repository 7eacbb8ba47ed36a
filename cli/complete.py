"""Completes the prompts of generate.py's command line and prints the results. generate.py calls complete_one_by_one, or
complete_in_parallel with --parallel."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from cli.prompts import Prompt
from cli.ranks import rank_path
from cli.report import build_result, print_result
from engine.completion import Completion, complete_all, stream_completions
from engine.generation import DecodeLoop
from engine.request import Request
from engine.scheduler import Scheduler, build_scheduler, longest_seq_len, max_slots
from model import KVCache, Transformer
from text.tokenizer import Tokenizer
from utils.errors import OutOfMemoryError, UsageError


def complete_one_by_one(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, decode_loop: DecodeLoop,
    kv_cache: KVCache, prompts: list[Prompt], stats: dict,
):
    """Completes each prompt --num_samples times, with --batch_size sequences each time, and prints the results. stats:
    more fields for --json."""
    for prompt_number, prompt in enumerate(prompts, start=1):
        samples = []
        for sample_number in range(1, args.num_samples + 1):
            numbers = [("prompt", prompt_number, len(prompts)), ("sample", sample_number, args.num_samples)]
            if not args.json:
                print_label([*numbers, ("sequence", 1, args.batch_size)])
            with profiled(args.profile if sample_number == args.num_samples else None):
                samples.append(complete_batch(args, model, tokenizer, decode_loop, prompt))
            if not args.json:
                print()
                for k, completion in enumerate(samples[-1][1:], start=2):
                    print_label([*numbers, ("sequence", k, args.batch_size)])
                    print(completion.text)
        print_result(args, build_result(args, model, kv_cache, prompt, samples) | stats, model)


def print_label(numbers: list[tuple[str, int, int]]):
    """Prints which prompt, sample and sequence the next text belongs to. numbers: ("prompt", 2, 3) is prompt 2 of 3.
    ("sample", 1, 1) is not printed, since there is only one sample."""
    several = [f"{what} {number}" for what, number, n in numbers if n > 1]
    if several:
        print(f"--- {', '.join(several)}", flush=True)


def complete_batch(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, decode_loop: DecodeLoop, prompt: Prompt
) -> list[Completion]:
    """Completes prompt in every sequence of a batch, until all sequences have ended. Without --json, prints the first
    sequence while it is generated."""
    request, eos_ids = replace(prompt.request, start_time=time.perf_counter()), choose_eos_ids(args, model)
    completions = [Completion(request, tokenizer, eos_ids) for _ in range(args.batch_size)]
    for texts in stream_completions(completions, decode_loop(request.prompt_ids, 0, args.max_new_tokens)):
        if not args.json:
            print(texts[0], end="", flush=True)
    return completions


def complete_in_parallel(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], stats: dict
):
    """Completes args.parallel prompts at a time, and prints the results in the order of prompts. If a prompt does not
    fit the model's context, the other prompts are completed, and UsageError is raised at the end."""
    requests = [prompt.request for prompt in prompts]
    scheduler = make_scheduler(args, model, requests)
    start, n_new_tokens, n_refused = time.perf_counter(), 0, 0
    hide_bar = True if sys.stdout.isatty() else None  # texts on a terminal show the progress already
    completions = complete_all(scheduler, tokenizer, requests)
    for completion in tqdm(completions, "prompts", len(prompts), disable=hide_bar, leave=False):
        if completion.error:
            n_refused += 1
            print(f"prompt {completion.index + 1}: {completion.error}", file=sys.stderr)
        n_new_tokens += len(completion.new_ids)
        if args.json:
            print_json(args, model, scheduler, prompts[completion.index], completion, stats)
        else:
            print(f"--- prompt {completion.index + 1}\n{completion.text}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{n_new_tokens} tokens in {seconds:.2f} s: {n_new_tokens / seconds:.1f} tokens/s in total", file=sys.stderr)
    if n_refused:
        raise UsageError(f"{n_refused} of {len(prompts)} prompts could not be completed")


def make_scheduler(args: argparse.Namespace, model: Transformer, requests: list[Request]) -> Scheduler:
    """Returns a Scheduler for requests. If memory is too small, the error says how many sequences fit at a time."""
    try:
        return build_scheduler(model, requests, args.parallel, choose_eos_ids(args, model), args.compile)
    except OutOfMemoryError as e:
        n_fitting = max_slots(model, longest_seq_len(model, requests))
        raise UsageError(f"{e}; --parallel {n_fitting} fits, or fewer --max_new_tokens") from None


def print_json(
    args: argparse.Namespace, model: Transformer, scheduler: Scheduler, prompt: Prompt, completion: Completion,
    stats: dict,
):
    if completion.error:
        print(json.dumps({"error": completion.error, "prompt": prompt.source}), flush=True)
        return
    result = build_result(args, model, scheduler.kv_cache, prompt, samples=[[completion]]) | stats
    if args.logprobs is not None:
        result["logprobs"] = [[logprobs._asdict() for logprobs in completion.logprobs]]
    print_result(args, result, model)


def choose_eos_ids(args: argparse.Namespace, model: Transformer) -> set[int]:
    """Returns the ids of the tokens that end a sequence: none with --ignore_eos."""
    return set() if args.ignore_eos else set(model.config.eos_ids)


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

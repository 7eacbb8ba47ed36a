"""Completes the prompts of generate.py's command line several at a time: --parallel."""

import argparse
import json
import sys
import time

from tqdm import tqdm

from cli.report import build_result, print_result
from engine.scheduler import Scheduler, build_scheduler, longest_seq_len, max_slots
from engine.sequence import Sequence
from model import Transformer
from utils.errors import OutOfMemoryError, UsageError


def complete_in_parallel(args: argparse.Namespace, model: Transformer, sequences: list[Sequence], stats: dict):
    """Completes args.parallel sequences at a time, and prints the results in the order of sequences. If a prompt does
    not fit the model's context, the other prompts are completed, and UsageError is raised at the end.

    stats: more fields for --json."""
    try:
        scheduler = build_scheduler(model, sequences, args.parallel, args.compile)
    except OutOfMemoryError as e:
        n_fitting = max_slots(model, longest_seq_len(model, sequences))
        raise UsageError(f"{e}; --parallel {n_fitting} fits, or fewer --max_new_tokens") from None
    start, n_new_tokens, n_failed = time.perf_counter(), 0, 0
    hide_bar = True if sys.stdout.isatty() else None  # texts on a terminal show the progress already
    bar = tqdm(scheduler.complete(sequences), "prompts", len(sequences), disable=hide_bar, leave=False)
    for i, sequence in bar:
        if sequence.error:
            n_failed += 1
            print(f"prompt {i + 1}: {sequence.error}", file=sys.stderr)
        n_new_tokens += len(sequence.new_ids)
        if args.json:
            print_json(args, model, scheduler, sequence, stats)
        else:
            print(f"--- prompt {i + 1}\n{sequence.text}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{n_new_tokens} tokens in {seconds:.2f} s: {n_new_tokens / seconds:.1f} tokens/s in total", file=sys.stderr)
    if n_failed:
        raise UsageError(f"{n_failed} of {len(sequences)} prompts could not be completed")


def print_json(args: argparse.Namespace, model: Transformer, scheduler: Scheduler, sequence: Sequence, stats: dict):
    if sequence.error:
        print(json.dumps({"error": sequence.error, "prompt": sequence.prompt}), flush=True)
        return
    result = build_result(args, model, scheduler.kv_cache, samples=[[sequence]]) | stats
    if args.logprobs is not None:
        result["logprobs"] = [[logprobs._asdict() for logprobs in sequence.logprobs]]
    print_result(args, result, model)

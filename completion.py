"""Completes the prompts of generate.py's command line, one after the other or in parallel, and prints what follows.

This file has no command line; see generate.py.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import tp
from chat import TokenGenerator
from config import UsageError
from model import Transformer
from prompts import Prompt
from report import Completion, end_tokens, print_result, result_of
from scheduler import Request, Scheduler, TextCompletion, complete_all, rows_that_fit
from tokenizer import IncrementalDetokenizer, Tokenizer


def complete_prompt(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, generate_tokens: TokenGenerator,
    prompt: Prompt,
) -> list[Completion]:  # fmt: skip
    """Completes prompt num_samples times, and prints the texts unless --json is given."""
    ends = end_tokens(args, model)
    completions = []
    for i in range(args.num_samples):
        is_last = i == args.num_samples - 1
        with profiled(args.profile if is_last else None):
            completion = complete_once(args, tokenizer, generate_tokens, prompt, ends)
        completions.append(completion)
        if not args.json:
            print()
            for k, text in enumerate(completion.texts[1:], start=1):
                print(f"--- row {k}\n{text}")
    return completions


def complete_once(
    args: argparse.Namespace, tokenizer: Tokenizer, generate_tokens: TokenGenerator, prompt: Prompt, ends: set[int]
) -> Completion:
    """Completes prompt until every sequence has an end token or a stop text. Prints the first sequence as it is
    generated, unless --json is given."""
    n = args.batch_size
    detokenizers = [IncrementalDetokenizer(tokenizer, prompt.prefix_ids, args.stop) for _ in range(n)]
    completion = Completion([[] for _ in range(n)], [""] * n, [None] * n, start_time=time.perf_counter())

    def add_text(b: int, piece: str):
        completion.texts[b] += piece
        if b == 0 and not args.json:
            print(piece, end="", flush=True)

    for step_tokens in generate_tokens(prompt.ids, 0, args.max_new_tokens):
        completion.step_times.append(time.perf_counter())
        completion.step_sizes.append(0)
        for ids in step_tokens:
            if all(completion.finish_reasons):
                break
            completion.step_sizes[-1] += 1
            for b, token in enumerate(ids):
                if completion.finish_reasons[b]:
                    continue
                completion.sequences[b].append(token)
                if token not in ends:
                    add_text(b, detokenizers[b].push(token))
                if token in ends or detokenizers[b].found_stop:
                    completion.finish_reasons[b] = "stop"
        if all(completion.finish_reasons):
            break
    for b, detokenizer in enumerate(detokenizers):
        add_text(b, detokenizer.end())
        completion.finish_reasons[b] = completion.finish_reasons[b] or "length"
    return completion


def complete_in_parallel(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], stats: dict
):
    """Completes prompts, args.parallel of them at a time, and prints the results in their order. A prompt that does not
    fit the model's context does not stop the others. Raises UsageError at the end if there was one."""
    scheduler = make_scheduler(args, model, prompts)
    requests = [
        Request(
            prompt.ids, args.max_new_tokens, args.sampling, args.seed + i, tuple(args.stop), prompt.is_chat,
            args.logprobs,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    start, n_new, n_refused = time.perf_counter(), 0, 0
    hide_bar = True if sys.stdout.isatty() else None  # there the texts show the progress
    completions = complete_all(scheduler, tokenizer, requests)
    for completion in tqdm(completions, "prompts", len(prompts), disable=hide_bar, leave=False):
        if completion.error:
            n_refused += 1
            print(f"prompt {completion.index + 1}: {completion.error}", file=sys.stderr)
        n_new += len(completion.tokens)
        if args.json:
            prompt = prompts[completion.index]
            print_json(args, model, scheduler, prompt, completion, stats)
        else:
            print(f"--- prompt {completion.index + 1}\n{completion.text}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{n_new} tokens in {seconds:.2f} s: {n_new / seconds:.1f} tokens/s in total", file=sys.stderr)
    if n_refused:
        raise UsageError(f"{n_refused} of {len(prompts)} prompts could not be completed")


def make_scheduler(args: argparse.Namespace, model: Transformer, prompts: list[Prompt]) -> Scheduler:
    """With room for the longest of prompts that fit the model's context. Raises UsageError if memory is too small."""
    longest = max(len(prompt.ids) for prompt in prompts) + args.max_new_tokens
    length, n_rows = min(longest, model.config.max_seq_len), min(args.parallel, len(prompts))
    hint = f"--parallel {rows_that_fit(model, length)} fits, or fewer --max_new_tokens"
    return Scheduler(model, n_rows, length, end_tokens(args, model), args.compile, hint)


def print_json(
    args: argparse.Namespace, model: Transformer, scheduler: Scheduler, prompt: Prompt, completion: TextCompletion,
    stats: dict,
):  # fmt: skip
    if completion.error:
        print(json.dumps({"error": completion.error, "prompt": prompt.source}), flush=True)
        return
    tokens = completion.tokens
    one_row = Completion([tokens], [completion.text], [completion.finish_reason], completion.request.start_time)
    one_row.step_times, one_row.step_sizes = completion.token_times, [1] * len(tokens)
    result = result_of(args, model, scheduler.kv_cache, prompt, [one_row]) | stats
    if args.logprobs is not None:
        result["logprobs"] = [[logprobs._asdict() for logprobs in completion.logprobs]]
    print_result(args, result, model)


@contextlib.contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Writes a Chrome trace of the context to path; several ranks write a file each. None: does nothing."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    path = tp.rank_path(path)
    path.unlink(missing_ok=True)
    profile.export_chrome_trace(str(path))  # does not raise if it cannot write
    if not path.is_file():
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise UsageError(f"cannot write --profile {path}")

"""--parallel: many prompts of generate.py's command line at a time."""

import json
import sys
import time

from tqdm import tqdm

from cli.report import Reporter
from engine.scheduler import Scheduler, build_scheduler, longest_seq_len, max_slots
from engine.sequence import Sequence
from model import Transformer
from utils.errors import OutOfMemoryError, UsageError


def generate_in_parallel(model: Transformer, sequences: list[Sequence], parallel: int, reporter: Reporter):
    """Runs parallel sequences at a time, and prints the results in their order. If one has or gets an error, all others
    run, and UsageError is raised at the end. After Ctrl-C, prints the sequences that have ended."""
    try:
        scheduler = build_scheduler(model, sequences, parallel, reporter.compile)
    except OutOfMemoryError as e:
        n_fitting = max_slots(model, longest_seq_len(model, sequences))
        if n_fitting == 0:
            raise
        raise UsageError(f"{e}; --parallel {n_fitting} fits, or fewer --max_new_tokens") from None
    start = time.perf_counter()
    not_printed = dict(enumerate(sequences))

    def print_sequence(i: int):
        sequence = not_printed[i]
        if sequence.error:
            print(f"prompt {i + 1}: {sequence.error}", file=sys.stderr)
        if reporter.as_json:
            print_json(sequence, scheduler, reporter)
        else:
            print(f"--- prompt {i + 1}\n{sequence.text}", flush=True)
        del not_printed[i]

    hide_bar = True if sys.stdout.isatty() else None  # texts on a terminal show the progress already
    bar = tqdm(scheduler.run(sequences), "prompts", len(sequences), disable=hide_bar, leave=False)
    try:
        for i, _ in bar:
            print_sequence(i)
    except KeyboardInterrupt:  # from Scheduler.run, after it has yielded all that have ended, or from this loop
        for i in [i for i, sequence in not_printed.items() if sequence.finish_reason]:
            print_sequence(i)
        raise
    seconds = time.perf_counter() - start
    n_new_tokens = sum(len(sequence.new_ids) for sequence in sequences)
    print(f"{n_new_tokens} tokens in {seconds:.2f} s: {n_new_tokens / seconds:.1f} tokens/s in total", file=sys.stderr)
    if n_failed := sum(sequence.error is not None for sequence in sequences):
        raise UsageError(f"{n_failed} of {len(sequences)} prompts could not be completed")


def print_json(sequence: Sequence, scheduler: Scheduler, reporter: Reporter):
    if sequence.error:
        print(json.dumps({"error": sequence.error, "prompt": sequence.prompt}), flush=True)
        return
    logprobs = None
    if sequence.n_logprobs is not None:
        logprobs = [[{"token": one.logprob, "top": one.top} for one in sequence.logprobs]]
    reporter.report([[sequence]], scheduler.kv_cache, logprobs=logprobs)

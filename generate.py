"""Generate text from a checkpoint: main loads the model and encodes the prompts, run_loop continues them.

    python generate.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --prompt "Hello" --compile

Text goes to stdout, a summary to stderr. With --json, stdout has one JSON object for each prompt and nothing else.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

import torch

from cli import common_args
from cli.generate_args import parse_args, read_prompts, to_sequences
from cli.parallel import generate_in_parallel
from cli.ranks import process_group
from cli.report import build_result, print_label, print_result, profiled
from cli.script import run_script
from cli.startup import compile_steps, describe_ranks, load_draft, required_seq_len, speculative_loop
from cli.terminal import converse
from converters.checkpoint_path import ensure_converted
from engine.chat import Conversation
from engine.generation import GenerationLoop, stream_texts
from engine.sequence import Sequence, to_64_bits
from engine.speculate import SpeculativeLoop
from llm import LLM
from model import Transformer

OOM_HINT = "take a quantized checkpoint, fewer --max_new_tokens or a smaller --batch_size"


def main():
    args = parse_args(__doc__)
    common_args.set_threads(args.threads)
    load_options = common_args.build_load_options(args)
    prompts = read_prompts(args)
    args.checkpoint_path = ensure_converted(args.checkpoint_path)  # last, since converting may take half an hour
    if args.draft_checkpoint_path:
        args.draft_checkpoint_path = ensure_converted(args.draft_checkpoint_path)
    start = time.perf_counter()
    llm = LLM(args.checkpoint_path, compile=args.compile, **load_options)
    stats = {"compile_seconds": 0.0, "load_seconds": time.perf_counter() - start}  # more fields for --json
    draft = load_draft(args, llm.tokenizer, **load_options) if args.draft_checkpoint_path else None
    sequences = to_sequences(prompts, args, llm.tokenizer, llm.model.config)
    if args.parallel:
        generate_in_parallel(args, llm.model, sequences, stats)
    else:
        run_loop(args, llm, draft, sequences, stats)


def run_loop(
    args: argparse.Namespace, llm: LLM, draft: Transformer | None, sequences: list[Sequence], stats: dict
):
    """Continues one prompt after another, or has a conversation. stats: more fields for --json."""
    max_seq_len = required_seq_len(args, sequences, llm.model, draft)
    loop: GenerationLoop = llm.build_loop(args.sampling_params, args.batch_size, max_seq_len, args.compile_prefill)
    if args.speculative:
        loop = speculative_loop(args, loop.runner, draft)
    stats |= compile_steps(args, loop, sequences)
    if args.json:
        stats |= describe_ranks(loop.runner)
    if args.conversation:
        torch.manual_seed(args.seed)
        options = {"system": args.system, "stop": tuple(args.stop)}
        chat = Conversation(llm.tokenizer, loop, max_seq_len, llm.model.config.eos_ids, **options)
        converse(chat, args.max_new_tokens)
    for i, sequence in enumerate(sequences, start=1):  # a conversation has none
        torch.manual_seed(to_64_bits(sequence.seed))  # as with --parallel: a text does not depend on the prompts before
        samples = []
        for j in range(1, args.num_samples + 1):
            labels = [("prompt", i, len(sequences)), ("sample", j, args.num_samples)]
            with profiled(args.profile if j == args.num_samples else None):
                samples.append(generate_text(args, sequence, loop, labels))
        accept_counts = loop.accept_counts() if isinstance(loop, SpeculativeLoop) else None
        result = build_result(args, llm.model, loop.runner.kv_cache, samples, accept_counts)
        print_result(args, result | stats, llm.model)


def generate_text(
    args: argparse.Namespace, prompt: Sequence, loop: GenerationLoop, labels: list
) -> list[Sequence]:
    """Continues prompt in a batch of args.batch_size sequences. Without --json, prints the first text while it is
    generated, and then all other texts. labels: the argument of print_label."""
    batch = [replace(prompt) for _ in range(args.batch_size)]
    if not args.json:
        print_label([*labels, ("sequence", 1, len(batch))])
    for texts in stream_texts(loop, batch, prompt.prompt_ids):
        if not args.json:
            print(texts[0], end="", flush=True)
    if not args.json:
        print()
        for k, sequence in enumerate(batch[1:], start=2):
            print_label([*labels, ("sequence", k, len(batch))])
            print(sequence.text)
    return batch


if __name__ == "__main__":
    with process_group():
        run_script(main, OOM_HINT)

"""Generate text from a checkpoint: main loads the model, builds the loop, and prints what the loop yields.

    python generate.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --prompt "Hello" --compile

Text goes to stdout, a summary to stderr. With --json, stdout has one JSON object for each prompt and nothing else.
"""

import collections
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

from dataclasses import replace

import torch

from cli import common_args
from cli.generate_args import parse_args, read_prompts, to_sequences
from cli.parallel import generate_in_parallel
from cli.ranks import communication_share, process_group
from cli.report import Reporter, print_label, profiled
from cli.script import run_script
from cli.speculation import load_draft, speculative_loop
from cli.terminal import converse
from converters.checkpoint_path import ensure_converted
from engine.chat import Conversation
from engine.generation import GenerationLoop, stream_texts
from engine.sequence import Sequence, check_length, to_64_bits
from engine.speculate import SpeculativeLoop
from kernels.schema import MAX_CPU_TOKENS
from llm import LLM
from model import Transformer

OOM_HINT = "take a quantized checkpoint, fewer --max_new_tokens or a smaller --batch_size"
CONVERSATION_LENGTH = 8192  # tokens in the KV cache of a conversation, unless the model's context is shorter


def main():
    args = parse_args(__doc__)
    common_args.set_threads(args.threads)
    load_options = common_args.build_load_options(args)
    prompts = read_prompts(args)
    checkpoint_path = ensure_converted(args.checkpoint_path)  # after all checks: converting may take half an hour
    draft_path = ensure_converted(args.draft_checkpoint_path) if args.draft_checkpoint_path else None
    start = time.perf_counter()
    llm = LLM(checkpoint_path, compile=args.compile, **load_options)
    load_seconds = time.perf_counter() - start
    reporter = Reporter(llm.model, args.precision, args.compile, args.json, load_seconds)
    sharded = args.draft_tp != "off"
    draft = load_draft(draft_path, llm.tokenizer, sharded=sharded, **load_options) if draft_path else None
    sequences = to_sequences(prompts, args, llm.tokenizer, llm.model.config)
    if args.parallel:
        generate_in_parallel(llm.model, sequences, args.parallel, reporter)
        return
    max_seq_len = required_seq_len(llm.model, draft, sequences, args.max_new_tokens)
    loop: GenerationLoop = llm.build_loop(args.sampling_params, args.batch_size, max_seq_len, args.compile_prefill)
    if args.speculative:
        loop = speculative_loop(loop.runner, draft, args.prompt_lookup, args.speculate_k)
    reporter.compile_seconds = compile_steps(loop, sequences, args.max_new_tokens)
    if args.json:
        reporter.communication_share = communication_share(loop.runner)
    if args.conversation:
        torch.manual_seed(args.seed)
        options = {"system": args.system, "stop": tuple(args.stop)}
        chat = Conversation(llm.tokenizer, loop, max_seq_len, llm.model.config.eos_ids, **options)
        converse(chat, args.max_new_tokens)
    else:
        generate_texts(loop, sequences, args.num_samples, args.batch_size, args.profile, reporter)


def required_seq_len(
    model: Transformer, draft: Transformer | None, sequences: list[Sequence], max_new_tokens: int
) -> int:
    """Returns how many tokens the KV caches must hold. Raises UsageError if a model's context is shorter."""
    name, context = "model", model.config.max_seq_len
    if draft is not None and draft.config.max_seq_len < context:
        name, context = "draft", draft.config.max_seq_len
    if not sequences:  # a conversation
        if name == "draft" and context <= CONVERSATION_LENGTH:
            print(f"The draft's context of {context} tokens is the conversation's.", file=sys.stderr)
        return min(context, CONVERSATION_LENGTH)
    longest = max(len(sequence.prompt_ids) for sequence in sequences)
    hint = f", the {name}'s; lower --max_new_tokens or shorten the prompt"
    check_length(longest, max_new_tokens, context, hint)
    return longest + max_new_tokens


def compile_steps(loop: GenerationLoop, sequences: list[Sequence], max_new_tokens: int) -> float:
    """Compiles or captures what --compile and --compile_prefill name. Returns the seconds that this takes. Without
    --compile, a CPU captures a step at its first use. The first prompt overwrites the contents of the KV caches."""
    start, runner = time.perf_counter(), loop.runner
    if runner.compiled_model is not None:
        # The length of a conversation's first prompt is unknown. Take a length that is too long for the kernels.
        n_prompt_tokens = len(sequences[0].prompt_ids) if sequences else MAX_CPU_TOKENS + 1
        shape = runner.kv_cache.batch_size, n_prompt_tokens
        prompt = torch.zeros(shape, dtype=torch.long, device=runner.device)
        # At position 0, T would equal S, and torch.compile would specialize on T = S. So start at position 1.
        runner.prefill(prompt, prompt[:, 0] + 1)
    if runner.compile:
        loop.warm_up(max_new_tokens)
    return time.perf_counter() - start


def generate_texts(
    loop: GenerationLoop, sequences: list[Sequence], n_samples: int, batch_size: int, trace_file: Path | None,
    reporter: Reporter,
):
    """Continues and reports one prompt after another, n_samples times each. trace_file: where --profile goes."""
    for i, sequence in enumerate(sequences, start=1):
        torch.manual_seed(to_64_bits(sequence.seed))  # as with --parallel: no text depends on earlier prompts
        samples = []
        for j in range(1, n_samples + 1):
            with profiled(trace_file if j == n_samples else None):
                batch = [replace(sequence) for _ in range(batch_size)]  # whose clock starts here
                texts = stream_texts(loop, batch, sequence.prompt_ids)
                if reporter.as_json:
                    collections.deque(texts, maxlen=0)  # runs the loop
                else:
                    print_texts(texts, batch, [("prompt", i, len(sequences)), ("sample", j, n_samples)])
            samples.append(batch)
        accept_counts = loop.accept_counts() if isinstance(loop, SpeculativeLoop) else None
        reporter.report(samples, loop.runner.kv_cache, accept_counts)


def print_texts(texts: Iterator[list[str]], batch: list[Sequence], labels: list[tuple[str, int, int]]):
    """Prints the first text of batch while it is generated, and then the other texts. labels: the argument of
    print_label, for the whole batch."""
    print_label([*labels, ("sequence", 1, len(batch))])
    for first, *_ in texts:
        print(first, end="", flush=True)
    print()
    for k, sequence in enumerate(batch[1:], start=2):
        print_label([*labels, ("sequence", k, len(batch))])
        print(sequence.text)


if __name__ == "__main__":
    with process_group():
        run_script(main, OOM_HINT)

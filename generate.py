"""Generate text from a checkpoint. This file is the command. The loop over tokens is engine/generation.py: generate.

    python generate.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --prompt "Hello" --compile

Text goes to stdout, a summary to stderr. With --json, stdout has one JSON object for each prompt and nothing else.
"""

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

import torch

import collectives
from cli import common_args
from cli.complete import complete_in_parallel, complete_one_by_one
from cli.generate_args import parse_args
from cli.prompts import Prompt, encode_prompts, read_sources
from cli.ranks import process_group
from cli.script import run_script
from cli.startup import build_decoder, load_draft, required_seq_len, tp_stats, warm_up
from cli.terminal import converse
from engine.chat import Conversation
from engine.generation import build_decode_loop
from engine.steps import build_steps, make_kv_cache
from llm import LLM  # noqa: F401  (earlier READMEs import LLM from here)
from loading import load
from model import Transformer
from text.tokenizer import Tokenizer

OOM_HINT = "take a quantized checkpoint, fewer --max_new_tokens or a smaller --batch_size"


def main():
    args = parse_args(__doc__)
    common_args.set_threads(args.threads)
    load_options = common_args.load_options(args)
    sources = [] if args.conversation else read_sources(args)
    start = time.perf_counter()
    model, tokenizer = load(args.checkpoint_path, **load_options)
    stats = {"compile_seconds": 0.0, "load_seconds": time.perf_counter() - start}
    draft = load_draft(args, tokenizer, **load_options) if args.draft_checkpoint_path else None
    prompts = [] if args.conversation else encode_prompts(sources, args, tokenizer, model.config)
    if args.parallel:
        complete_in_parallel(args, model, tokenizer, prompts, stats)
    else:
        generate_one_by_one(args, model, tokenizer, draft, prompts, stats)


def generate_one_by_one(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, draft: Transformer | None,
    prompts: list[Prompt], stats: dict,
):
    """Completes the prompts one after the other, or runs a conversation. stats: more fields for --json."""
    kv_cache = make_kv_cache(model, args.batch_size, required_seq_len(args, prompts, model, draft))
    steps = build_steps(model, kv_cache, args.sampling, args.compile, args.compile_prefill)
    decoder = build_decoder(args, model, draft, kv_cache, steps) if args.speculative else None
    start = time.perf_counter()
    warm_up(args, steps, decoder, prompts, model.device)
    stats["compile_seconds"] = time.perf_counter() - start
    if args.json and collectives.world_size() > 1:
        stats |= tp_stats(args, steps, model.device)

    torch.manual_seed(args.seed)
    decode_loop = decoder or build_decode_loop(steps, kv_cache)
    if args.conversation:
        eos_ids = model.config.eos_ids
        conversation = Conversation(tokenizer, decode_loop, kv_cache.max_seq_len, eos_ids, args.system)
        converse(conversation, args.max_new_tokens)
    else:
        complete_one_by_one(args, model, tokenizer, decode_loop, kv_cache, prompts, stats)


if __name__ == "__main__":
    with process_group():
        run_script(main, OOM_HINT)

"""Generate text from a checkpoint.

    python generate.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --prompt "Hello" --compile

Text goes to stdout, a summary to stderr; with --json stdout holds one JSON object for each prompt and nothing else.
From Python:

    model, tokenizer = load("checkpoints/SmolLM2-135M-Instruct/model.pth")
    prompt = torch.tensor([tokenizer.encode("Hello")])
    kv_cache = make_kv_cache(model, batch_size=1, length=prompt.shape[1] + 50)
    steps = build_steps(model, kv_cache, Sampling(temperature=0.8))
    for ids in generate(steps, prompt, start=0, max_new_tokens=50):
        print(tokenizer.decode(ids))
"""

import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import tp
from arguments import parse_args
from chat import Conversation, StreamTokens, converse
from checkpoint import read_text
from config import UsageError
from kernels import MAX_ROWS
from loading import load, load_model
from machine import pick_device
from model import KVCache, Transformer
from report import Sample, describe, end_tokens, print_report
from speculate import (
    PromptLookup,
    Proposer,
    Speculation,
    build_draft_model,
    build_speculation,
    proposal_sizes,
    speculate,
)
from steps import OOM_HINT, Steps, build_steps, check_finite, device_of, make_kv_cache
from tokenizer import TextStream, Tokenizer

# What a program that generates text needs
__all__ = ["load", "load_model", "make_kv_cache", "build_steps", "generate", "stream_tokens"]

CONVERSATION_LENGTH = 8192  # tokens that a conversation has room for, if the model's context is so long


@torch.inference_mode()
def generate(steps: Steps, prompt: Tensor, start: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Yields the next token of every row, max_new_tokens times. prompt [B, T] begins at position start. The KV cache
    must have room for start + T + max_new_tokens - 1 tokens. Raises UsageError if the logits are not finite."""
    positions = torch.full(prompt.shape[:1], start, device=prompt.device)
    tokens = steps.prefill(prompt, positions)
    positions = positions + prompt.shape[1]
    for n_left in reversed(range(max_new_tokens)):
        read_ids = copy_to_host_async(tokens)
        # A GPU gets its next step before the host waits for this step's tokens. A CPU does one thing after the other,
        # and whoever reads the tokens may not want any more.
        next_is_queued = tokens.is_cuda and n_left > 0
        if next_is_queued:
            tokens, positions = decode(steps, tokens, positions)
        ids = read_ids()
        check_finite(ids)
        yield ids
        if n_left > 0 and not next_is_queued:
            tokens, positions = decode(steps, tokens, positions)


def decode(steps: Steps, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [B] after tokens [B] at positions [B], and the positions after those."""
    fed = tokens[:, None].clamp(min=0)  # -1, of logits that are not finite, is found only when the host reads it
    return steps.decode(fed, positions), positions + 1


def copy_to_host_async(tokens: Tensor) -> Callable[[], list[int]]:
    """Begins to copy tokens [B] to the host. The function returned waits for the copy alone, not for what the GPU is
    given to do after it."""
    if not tokens.is_cuda:
        return tokens.tolist
    copy = tokens.to("cpu", non_blocking=True)
    is_done = torch.cuda.Event()
    is_done.record()

    def read() -> list[int]:
        is_done.synchronize()
        return copy.tolist()

    return read


def stream_tokens(
    steps: Steps, batch_size: int, device: torch.device, history: list[int], start: int, max_new_tokens: int
) -> Iterator[list[list[int]]]:
    """generate in the form of speculate: every row continues history, a text's ids, of which the cache holds the first
    start. Yields the tokens of each step: [1][B]."""
    prompt = torch.tensor([history[start:]] * batch_size, device=device)
    for ids in generate(steps, prompt, start, max_new_tokens):
        yield [ids]


# ---- The command line -----------------------------------------------------------------------------------------------


def main():
    args = parse_args(__doc__)
    device = pick_device(args.device)
    options = {"device": device, "dtype": getattr(torch, args.precision), "kernels": args.kernels == "auto"}
    start = time.perf_counter()
    model, tokenizer = load(args.checkpoint_path, **options)
    load_seconds = time.perf_counter() - start
    draft = None
    if args.draft_checkpoint_path:
        draft = load_draft(args.draft_checkpoint_path, tokenizer, sharded=args.draft_tp != "off", **options)
    prompts = [] if args.conversation else read_prompts(args, tokenizer, model.config.vocab_size)
    length = cache_length(args, prompts, model, draft)

    kv_cache = make_kv_cache(model, args.batch_size, length)
    steps = build_steps(model, kv_cache, args.sampling, args.compile, args.compile_prefill)
    if args.speculative:
        proposer = build_proposer(args, model, draft, length, device)
        speculation = build_speculation(
            model, kv_cache, steps, args.sampling, proposer, args.speculate_k, args.compile
        )
        stream = partial(speculate, speculation)
    else:
        speculation = None
        stream = partial(stream_tokens, steps, args.batch_size, device)
    start = time.perf_counter()
    warm_up(args, steps, speculation, len(prompts[0]) if prompts else MAX_ROWS + 1, device)
    stats = {"compile_seconds": time.perf_counter() - start, "load_seconds": load_seconds}
    if args.json and tp.world_size() > 1:
        stats |= parallel_stats(args, steps, device)

    torch.manual_seed(args.seed)
    if args.conversation:
        converse(Conversation(tokenizer, stream, length, model.config.eos_ids, args.system), args.max_new_tokens)
    else:
        complete_prompts(args, model, kv_cache, tokenizer, stream, prompts, stats)


# ---- Before the first token -----------------------------------------------------------------------------------------


def load_draft(path: Path, tokenizer: Tokenizer, **options) -> Transformer:
    """load_model for a draft. Raises UsageError if its tokens are not those of tokenizer, by a sample of a thousand."""
    draft, draft_tokenizer = load(path, **options)
    n_tokens = tokenizer.vocab_size
    if draft_tokenizer.vocab_size != n_tokens:
        raise UsageError(f"the draft's vocabulary has {draft_tokenizer.vocab_size} tokens, the model's {n_tokens}")
    for i in range(0, n_tokens, max(1, n_tokens // 1000)):
        ours, theirs = tokenizer.token_bytes(i), draft_tokenizer.token_bytes(i)
        if ours != theirs:
            raise UsageError(
                f"the draft's vocabulary is another: token {i} is {theirs!r} there, and in the model {ours!r}"
            )
    return draft


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts asked for, as token ids."""
    if args.prompt_tokens:
        generator = torch.Generator().manual_seed(args.seed)
        return [torch.randint(vocab_size, (args.prompt_tokens,), generator=generator).tolist()]
    texts = [args.prompt]
    if args.prompt_file:
        texts = [line for line in read_text(args.prompt_file).split("\n") if line.strip()]
    for text in [*texts, args.system or ""]:
        if any("\ud800" <= c <= "\udfff" for c in text):  # how an argument's bytes that are not text arrive
            raise UsageError("the prompt is not valid UTF-8")
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [tokenizer.encode_chat([*system, {"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    if not prompts or not all(texts) or not all(prompts):
        raise UsageError(f"{args.prompt_file or 'the prompt'} is empty; give some text")
    return prompts


def cache_length(
    args: argparse.Namespace, prompts: list[list[int]], model: Transformer, draft: Transformer | None
) -> int:
    """How many tokens the KV caches must hold. Raises UsageError for more than the models' contexts."""
    name, context = "model", model.config.max_seq_len
    if draft is not None and draft.config.max_seq_len < context:
        name, context = "draft", draft.config.max_seq_len
    if args.conversation:
        if name == "draft" and context <= CONVERSATION_LENGTH:
            print(f"The draft's context of {context} tokens is the conversation's.", file=sys.stderr)
        return min(context, CONVERSATION_LENGTH)
    longest = max(len(prompt) for prompt in prompts)
    if longest + args.max_new_tokens > context:
        raise UsageError(
            f"{longest} prompt tokens and {args.max_new_tokens} new ones exceed the {name}'s context of {context}; "
            "lower --max_new_tokens or shorten the prompt"
        )
    return longest + args.max_new_tokens


def build_proposer(
    args: argparse.Namespace, model: Transformer, draft: Transformer | None, length: int, device: torch.device
) -> Proposer:
    if draft is None:
        return PromptLookup(args.prompt_lookup, device)
    draft_cache = make_kv_cache(draft, 1, length)
    return build_draft_model(draft, draft_cache, model, args.sampling, args.compile)


@torch.inference_mode()
def warm_up(
    args: argparse.Namespace, steps: Steps, speculation: Speculation | None, n_prompt_tokens: int, device: torch.device
):
    """Has everything compiled that the options ask for. What this leaves in the caches, the prompt overwrites."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    if args.compile_prefill:
        # At position 0, T == S and dynamo would specialize on it; starting at 1 keeps them distinct symbols.
        steps.prefill(zeros(args.batch_size, n_prompt_tokens), zeros(args.batch_size) + 1)
    if not args.compile:
        return
    for _ in range(2):  # torch.compile's graphs of the device are made at the second call
        steps.decode(zeros(args.batch_size, 1), zeros(args.batch_size))
        if speculation is not None:
            for k in proposal_sizes(args.speculate_k):
                if k < args.max_new_tokens:
                    proposal = speculation.proposer.propose([0, 0, 0], k)
                    speculation.verify(zeros(1, 1), zeros(1), proposal)


def parallel_stats(args: argparse.Namespace, steps: Steps, device: torch.device) -> dict:
    tokens = torch.zeros(args.batch_size, 1, dtype=torch.long, device=device)
    share = tp.communication_share(partial(steps.decode, tokens, tokens[:, 0]))
    return {"world_size": tp.world_size(), "communication_share": share}


# ---- Prompts --------------------------------------------------------------------------------------------------------


def complete_prompts(
    args: argparse.Namespace,
    model: Transformer,
    kv_cache: KVCache,
    tokenizer: Tokenizer,
    stream: StreamTokens,
    prompts: list[list[int]],
    stats: dict,
):
    """Completes each prompt and prints the result. stats: what is the same for all."""
    for prompt in prompts:
        samples, texts = complete_prompt(args, model, tokenizer, stream, prompt)
        result = describe(args, model, kv_cache, prompt, samples, texts) | stats
        if tp.world_size() > 1:
            result["rank_peak_memory_bytes"] = tp.gather_objects(result["peak_memory_bytes"])
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            print_report(result, device_of(model))


def complete_prompt(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, stream: StreamTokens, prompt: list[int]
) -> tuple[list[Sample], list[str]]:
    """Completes prompt num_samples times, and prints that unless --json is given. Returns the samples, and the texts of
    the last one's rows."""
    ends = end_tokens(args, model)
    before = [] if args.chat else prompt  # a chat's answer begins a text
    samples = []
    for i in range(args.num_samples):
        is_last = i == args.num_samples - 1
        text = None if args.json else TextStream(tokenizer, before)
        with profiled(args.profile if is_last else None):
            sample = complete_once(args, stream, prompt, ends, text)
        samples.append(sample)
        texts = [tokenizer.decode([token for token in row if token not in ends], before) for row in sample.rows]
        if not args.json:
            print()
            for row, row_text in enumerate(texts[1:], start=1):
                print(f"--- row {row}\n{row_text}")
    return samples, texts


def complete_once(
    args: argparse.Namespace, stream: StreamTokens, prompt: list[int], ends: set[int], text: TextStream | None
) -> Sample:
    """Completes prompt, until every row has met an end token. text prints the first row as it comes."""
    sample = Sample([[] for _ in range(args.batch_size)], start_time=time.perf_counter())
    has_ended = [False] * args.batch_size
    for step_tokens in stream(prompt, 0, args.max_new_tokens):
        sample.step_times.append(time.perf_counter())
        n_used = 0
        for ids in step_tokens:
            if all(has_ended):
                break
            n_used += 1
            for row, token in enumerate(ids):
                if not has_ended[row]:
                    sample.rows[row].append(token)
                    has_ended[row] = token in ends
            if text is not None and not has_ended[0]:
                print(text.push(ids[0]), end="", flush=True)
        sample.step_sizes.append(n_used)
        if all(has_ended):
            break
    if text is not None:
        print(text.end(), end="", flush=True)
    return sample


@contextlib.contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Writes a Chrome trace of what happens inside to path, of several ranks to a file each. None: does nothing."""
    if path is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    path = tp.rank_path(path)
    path.unlink(missing_ok=True)
    profile.export_chrome_trace(str(path))  # says nothing when it fails
    if not path.is_file():
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        raise UsageError(f"cannot write --profile {path}")


if __name__ == "__main__":
    with tp.ranks():
        cli.run(main, OOM_HINT)

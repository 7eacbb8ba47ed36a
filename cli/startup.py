"""What generate.py does before the first token, besides loading the model: sizes the KV cache, loads the draft model,
builds the loop, and compiles or captures the steps.
"""

import argparse
import sys
import time
from functools import partial

import torch

from cli.ranks import communication_share
from engine.generation import GenerationLoop
from engine.runner import ModelRunner
from engine.sequence import Sequence, check_length
from engine.speculate import DraftModelProposer, NgramProposer, Proposer, SpeculativeLoop
from kernels.schema import MAX_CPU_TOKENS
from layers import collectives
from layers.backend import TRITON_BACKEND
from loading import load
from model import KVCache, Transformer
from text.tokenizer import Tokenizer
from utils.errors import UsageError

CONVERSATION_LENGTH = 8192  # tokens in the KV cache of a conversation, unless the model's context is shorter


def load_draft(args: argparse.Namespace, tokenizer: Tokenizer, **load_options) -> Transformer:
    """Loads the draft model. Raises UsageError if a sample of 1000 tokens differs between its tokenizer and tokenizer,
    the model's."""
    sharded = args.draft_tp != "off"
    draft, draft_tokenizer = load(args.draft_checkpoint_path, sharded=sharded, **load_options)
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


def required_seq_len(
    args: argparse.Namespace, sequences: list[Sequence], model: Transformer, draft: Transformer | None
) -> int:
    """Returns how many tokens the KV caches must hold. Raises UsageError if a model's context is shorter."""
    name, context = "model", model.config.max_seq_len
    if draft is not None and draft.config.max_seq_len < context:
        name, context = "draft", draft.config.max_seq_len
    if args.conversation:
        if name == "draft" and context <= CONVERSATION_LENGTH:
            print(f"The draft's context of {context} tokens is the conversation's.", file=sys.stderr)
        return min(context, CONVERSATION_LENGTH)
    longest = max(len(sequence.prompt_ids) for sequence in sequences)
    hint = f", the {name}'s; lower --max_new_tokens or shorten the prompt"
    check_length(longest, args.max_new_tokens, context, hint)
    return longest + args.max_new_tokens


def speculative_loop(args: argparse.Namespace, runner: ModelRunner, draft: Transformer | None) -> SpeculativeLoop:
    """Returns a loop in which the draft model proposes tokens, or prompt lookup if draft is None."""
    warn_without_kernels(args.speculate_k, runner.model)
    if draft is None:
        proposer: Proposer = NgramProposer(args.prompt_lookup, runner.device)
    else:
        draft_cache = KVCache(draft, 1, runner.kv_cache.max_seq_len)
        proposer = DraftModelProposer(ModelRunner(draft, draft_cache, args.sampling_params, args.compile), runner.model)
    return SpeculativeLoop(runner, proposer, args.speculate_k)


def warn_without_kernels(k: int, model: Transformer):
    """Prints a warning if a GPU would verify k proposed tokens without the kernels."""
    most = max((i for i in range(1, k + 1) if model.has_kernels_for(1, i + 1)), default=0)
    if model.lm_head.backend.name == TRITON_BACKEND.name and most < k:
        print(f"More than {most} tokens at a time are verified without the kernels.", file=sys.stderr)


@torch.inference_mode()
def compile_steps(args: argparse.Namespace, loop: GenerationLoop, sequences: list[Sequence]) -> dict:
    """Compiles or captures what --compile_prefill and --compile name, before the first prompt. Without --compile, a CPU
    captures a step at its first use. The first prompt overwrites what the KV caches then hold. Returns compile_seconds,
    a field of --json."""
    start = time.perf_counter()
    if args.compile_prefill:
        # The length of a conversation's first prompt is unknown. Take one that is too long for the kernels.
        n_prompt_tokens = len(sequences[0].prompt_ids) if sequences else MAX_CPU_TOKENS + 1
        runner = loop.runner
        prompt = torch.zeros(args.batch_size, n_prompt_tokens, dtype=torch.long, device=runner.device)
        # At position 0, T would equal S, and torch.compile would specialize on T = S. So start at position 1.
        runner.prefill(prompt, prompt[:, 0] + 1)
    if args.compile:
        loop.warm_up(args.max_new_tokens)
    return {"compile_seconds": time.perf_counter() - start}


def describe_ranks(runner: ModelRunner) -> dict:
    """Returns the fields that --json has with several ranks: world_size and communication_share. Measures the second by
    decode steps at position 0, which the first prompt overwrites."""
    if collectives.world_size() == 1:
        return {}
    tokens = torch.zeros(runner.kv_cache.batch_size, 1, dtype=torch.long, device=runner.device)
    share = communication_share(partial(runner.decode, tokens, tokens[:, 0]))
    return {"world_size": collectives.world_size(), "communication_share": share}

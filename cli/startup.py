"""What generate.py does before the first token: loads the draft model, sizes the KV cache, builds the speculative
decoder, and compiles or records the steps.
"""

import argparse
import sys
from functools import partial

import torch
from torch import Tensor

import collectives
from cli.prompts import Prompt
from cli.ranks import communication_share
from engine.request import check_length
from engine.speculate import (
    PromptLookup,
    Proposer,
    SpeculativeDecoder,
    build_draft_model,
    build_speculative_decoder,
    draft_lengths,
)
from engine.steps import GenerationSteps, make_kv_cache
from kernels import MAX_CPU_TOKENS, TRITON
from loading import load
from model import KVCache, Transformer
from text.tokenizer import Tokenizer
from utils.errors import UsageError

CONVERSATION_LENGTH = 8192  # tokens in the KV cache of a conversation, unless the model's context is shorter


def load_draft(args: argparse.Namespace, tokenizer: Tokenizer, **load_options) -> Transformer:
    """Loads the draft model. Raises UsageError if a sample of 1000 tokens differs between the draft's tokenizer and
    tokenizer, the model's."""
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
    args: argparse.Namespace, prompts: list[Prompt], model: Transformer, draft: Transformer | None
) -> int:
    """Returns how many tokens the KV caches must hold. Raises UsageError if a model's context is shorter."""
    name, context = "model", model.config.max_seq_len
    if draft is not None and draft.config.max_seq_len < context:
        name, context = "draft", draft.config.max_seq_len
    if args.conversation:
        if name == "draft" and context <= CONVERSATION_LENGTH:
            print(f"The draft's context of {context} tokens is the conversation's.", file=sys.stderr)
        return min(context, CONVERSATION_LENGTH)
    longest = max(len(prompt.request.prompt_ids) for prompt in prompts)
    try:
        check_length(longest, args.max_new_tokens, context, limit=f"the {name}'s context of ")
    except UsageError as e:
        raise UsageError(f"{e}; lower --max_new_tokens or shorten the prompt") from None
    return longest + args.max_new_tokens


def build_decoder(
    args: argparse.Namespace, model: Transformer, draft: Transformer | None, kv_cache: KVCache, steps: GenerationSteps
) -> SpeculativeDecoder:
    """Returns a SpeculativeDecoder, which proposes tokens by the draft model, or by prompt lookup if draft is None."""
    warn_without_kernels(args.speculate_k, model)
    if draft is None:
        proposer: Proposer = PromptLookup(args.prompt_lookup, kv_cache.device)
    else:
        draft_cache = make_kv_cache(draft, 1, kv_cache.max_seq_len)
        proposer = build_draft_model(draft, draft_cache, model, args.sampling, args.compile)
    return build_speculative_decoder(model, kv_cache, steps, args.sampling, proposer, args.speculate_k, args.compile)


def warn_without_kernels(k: int, model: Transformer):
    """Prints a warning if a GPU would verify k proposed tokens without the kernels."""
    most = max((i for i in range(1, k + 1) if model.can_record(1, i + 1)), default=0)
    if model.lm_head.backend == TRITON and most < k:
        print(f"More than {most} tokens at a time are verified without the kernels.", file=sys.stderr)


@torch.inference_mode()
def warm_up(
    args: argparse.Namespace, steps: GenerationSteps, decoder: SpeculativeDecoder | None, prompts: list[Prompt],
    device: torch.device,
):
    """Runs steps once, so that they are compiled or recorded before the first prompt:

        --compile_prefill    prefill
        --compile            decode, and each verification

    Without --compile, a CPU records a step at its first use. The prompt overwrites what this function writes to the KV
    caches."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=device)

    if args.compile_prefill:
        # The length of a conversation's first prompt is unknown. Take a length that the kernels do not compute.
        n_prompt_tokens = len(prompts[0].request.prompt_ids) if prompts else MAX_CPU_TOKENS + 1
        # At position 0, T would equal S, and torch.compile would specialize on T = S. So start at position 1.
        steps.prefill(zeros(args.batch_size, n_prompt_tokens), zeros(args.batch_size) + 1)
    if not args.compile:
        return
    steps.decode(zeros(args.batch_size, 1), zeros(args.batch_size))
    if decoder is not None:
        for k in draft_lengths(args.speculate_k):
            if k < args.max_new_tokens:
                proposal = decoder.proposer.propose([0, 0, 0], k)
                decoder.verify(zeros(1, 1), zeros(1), proposal)


def tp_stats(args: argparse.Namespace, steps: GenerationSteps, device: torch.device) -> dict:
    """Returns the fields of --json that only a run on several ranks has."""
    tokens = torch.zeros(args.batch_size, 1, dtype=torch.long, device=device)
    share = communication_share(partial(steps.decode, tokens, tokens[:, 0]))
    return {"world_size": collectives.world_size(), "communication_share": share}

"""Speculation of generate.py: loads the draft model, and builds the loop that verifies proposed tokens."""

import sys
from pathlib import Path

from engine.runner import ModelRunner
from engine.speculate import DraftModelProposer, NgramProposer, Proposer, SpeculativeLoop
from layers.backend import TRITON_BACKEND
from layers.kv_cache import KVCache
from layers.packing import can_capture
from loading import load
from model import Transformer
from text.tokenizer import Tokenizer
from utils.errors import UsageError


def load_draft(path: Path, tokenizer: Tokenizer, **load_options) -> Transformer:
    """Loads the draft model. Raises UsageError if a sample of 1000 tokens differs between its tokenizer and tokenizer,
    the model's."""
    draft, draft_tokenizer = load(path, **load_options)
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


def speculative_loop(
    runner: ModelRunner, draft: Transformer | None, prompt_lookup: int | None, speculate_k: int
) -> SpeculativeLoop:
    """Returns a loop in which draft proposes at most speculate_k tokens or, if draft is None, prompt lookup does, by
    the last prompt_lookup tokens."""
    warn_without_kernels(speculate_k, runner.model)
    if draft is None:
        proposer: Proposer = NgramProposer(prompt_lookup, runner.device)
    else:
        draft_cache = KVCache(draft, 1, runner.kv_cache.max_seq_len)
        draft_runner = ModelRunner(draft, draft_cache, runner.sampler.params, runner.compile)
        proposer = DraftModelProposer(draft_runner, runner.model)
    return SpeculativeLoop(runner, proposer, speculate_k)


def warn_without_kernels(k: int, model: Transformer):
    """Prints a warning if a GPU would verify k proposed tokens without the kernels."""
    most = max((i for i in range(1, k + 1) if can_capture(model, 1, i + 1)), default=0)
    if model.lm_head.backend.name == TRITON_BACKEND.name and most < k:
        print(f"More than {most} tokens at a time are verified without the kernels.", file=sys.stderr)

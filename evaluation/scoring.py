"""Computes how likely a model finds given tokens: scores of sequences, and the perplexity of a text.

    for score in compute_scores(model, [ScoredSequence(ids, n_scored=3)]): ...
    perplexity(model, tokenizer, text, length=1024)

eval.py is the command. lm_harness.py scores the answers of tasks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from engine.runner import NOT_FINITE, ModelRunner
from layers.kv_cache import KVCache
from model import Transformer
from text.tokenizer import Tokenizer
from utils.errors import UsageError

LOGITS_CHUNK_TOKENS = 256


def split_windows(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """Cuts text into windows of length token ids; the last window may be shorter. Each window begins with the
    tokenizer's bos_ids."""
    bos = tokenizer.bos_ids
    ids = tokenizer.encode(text)[len(bos) :]
    stride = length - len(bos)
    return [bos + ids[i : i + stride] for i in range(0, len(ids), stride)]


def perplexity(
    model: Transformer, tokenizer: Tokenizer, text: str, length: int, batch_size: int = 1, compile: bool = False
) -> dict:
    """Computes the perplexity of text: exp of the mean negative log-likelihood of its tokens. The text is cut into
    windows of length tokens, and all tokens of a window but the first are predicted."""
    windows = split_windows(tokenizer, text, length)
    sequences = [ScoredSequence(window, n_scored=len(window) - 1) for window in windows if len(window) > 1]
    if not sequences:
        raise UsageError("the text is too short: there must be a token to predict")
    scores = compute_scores(model, sequences, batch_size, compile)
    nll, n_tokens = 0.0, 0
    for score in tqdm(scores, "windows", len(sequences), disable=None, leave=False):
        nll -= score.logprobs.double().sum().item()
        n_tokens += len(score.logprobs)
    if not math.isfinite(nll):
        raise UsageError(NOT_FINITE)
    mean = nll / n_tokens
    result = math.exp(mean) if mean < 700 else math.inf  # exp of more overflows
    return {"perplexity": result, "tokens": n_tokens, "windows": len(sequences), "nll_per_token": mean}


class ScoredSequence(NamedTuple):
    """Token ids, of which the last n_scored are scored. At least one id must precede the scored ids. For example,
    ScoredSequence([5, 8, 2], 1) asks how likely 2 is after 5 and 8."""

    ids: list[int]
    n_scored: int


class Score(NamedTuple):
    """The scores of a sequence's last n tokens, each given the tokens before it."""

    index: int  # of the sequence
    logprobs: Tensor  # [n]
    is_greedy: Tensor  # [n], whether the token is the likeliest one


@torch.inference_mode()
def compute_scores(
    model: Transformer, sequences: list[ScoredSequence], batch_size: int = 1, compile: bool = False
) -> Iterator[Score]:
    """Yields the score of every sequence, the longest sequence first. In a batch, shorter sequences are padded on the
    right, which changes no score, since attention is causal."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    batch_size = min(batch_size, len(sequences))
    device = model.device
    kv_cache = KVCache(model, batch_size, len(sequences[order[0]].ids) - 1)
    runner = ModelRunner(model, kv_cache, compile_prefill=compile)
    start_pos = torch.zeros(batch_size, dtype=torch.long, device=device)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = [sequences[i].ids[:-1] for i in indices]
        inputs += inputs[:1] * (batch_size - len(inputs))  # a smaller last batch repeats a sequence
        tokens = pad(inputs).to(device)
        hidden = torch.cat(list(runner.prefill_chunks(tokens, start_pos)), dim=1)
        for i, x in zip(indices, hidden, strict=False):
            yield score_sequence(model, i, sequences[i], x)


def pad(id_lists: list[list[int]]) -> Tensor:
    """Pads id_lists with zeros on the right: [B, length of the longest list]."""
    return pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in id_lists], batch_first=True)


def score_sequence(model: Transformer, index: int, sequence: ScoredSequence, hidden: Tensor) -> Score:
    """Computes logits for LOGITS_CHUNK_TOKENS positions at a time, since those of a whole window may not fit in memory.

    hidden [T, dim]: the hidden states of all tokens of sequence but the last."""
    n, last = sequence.n_scored, len(sequence.ids) - 1
    targets = torch.tensor(sequence.ids[-n:], device=hidden.device)
    logprobs, is_greedy = [], []
    scored = hidden[last - n : last]  # [n, dim]
    for x, target in zip(scored.split(LOGITS_CHUNK_TOKENS), targets.split(LOGITS_CHUNK_TOKENS), strict=True):
        logits = model.compute_logits(x)
        logprobs.append(-F.cross_entropy(logits, target, reduction="none"))
        is_greedy.append(logits.argmax(-1) == target)
    return Score(index, torch.cat(logprobs), torch.cat(is_greedy))

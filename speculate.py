"""Speculative decoding: something cheap proposes a few tokens, and the model verifies all of them in one step.

    proposer = PromptLookup(max_ngram=3, device=device)
    speculation = build_speculation(model, kv_cache, steps, sampling, proposer, k=5)
    for tokens in speculate(speculation, history, start=0, max_new_tokens=100): ...

A step reads all weights, whether it takes one token or five; so it costs hardly more to verify than to decode. Of the
proposed tokens the model accepts those that it could have sampled itself, and adds one of its own. The output has
exactly the distribution of plain decoding (arXiv:2211.17192).

    PromptLookup    proposes what followed the last few tokens where they occurred before
    DraftModel      proposes what a smaller model samples

Shapes: k proposed tokens, V vocabulary. Everything is for one row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import tp
from model import KVCache, Transformer
from sampling import Sampling, multinomial, probabilities, sample
from steps import Step, Steps, build_step, build_steps, check_finite, device_of

MAX_PROPOSED = 32  # tokens to propose at a time, or to look up
# What one more token costs in a step, in steps
VERIFY_COST = 0.1  # 0.01 in 16 bits, 0.02 in 8, 0.15 in 4
MOE_VERIFY_COST = 0.65  # on a GPU, where every token reads its own experts: a step of five tokens costs 3.58
EMA_DECAY = 0.9  # what one step leaves of the counts of accepted and rejected tokens
IDLE_DECAY = 0.97  # the same for a step that verified nothing: after a while it is worth another try
PRIOR_ACCEPTED, PRIOR_REJECTED = 1.0, 0.5  # these counts before there are any


class Proposal(NamedTuple):
    tokens: Tensor  # [k]
    probs: Tensor | None  # [k, V]: the distributions they were drawn from; None if they are the proposer's only choice


class Proposer(Protocol):
    cost: float  # of one proposed token, in steps of the model

    def propose(self, history: list[int], k: int) -> Proposal | None:
        """k tokens that may follow history, or None if it knows nothing. From one call to the next history only grows,
        unless rewind says otherwise."""

    def rewind(self, n: int):
        """The text is another one from its token number n on."""


@dataclass(frozen=True)
class Speculation:
    """A model's steps and who proposes tokens to it; made by build_speculation."""

    steps: Steps
    verify_step: Callable[..., Tensor]  # (tokens [1, k + 1], positions [1], *proposal) -> as rejection_sample
    proposer: Proposer
    k: int  # tokens to propose at a time, at most
    device: torch.device
    verify_cost: float = VERIFY_COST  # of one proposed token, in steps

    def verify(self, last_token: Tensor, positions: Tensor, proposal: Proposal) -> tuple[int, list[int]]:
        """How many of the tokens proposed after last_token [1, 1] are accepted, and the tokens to go on with: these and
        one more."""
        tokens = torch.cat([last_token, proposal.tokens[None]], dim=1)  # [1, k + 1]
        given = [tensor for tensor in proposal if tensor is not None]
        n_accepted, *next_tokens = self.verify_step(tokens, positions, *given).tolist()
        return n_accepted, next_tokens[: n_accepted + 1]


def build_speculation(
    model: Transformer,
    kv_cache: KVCache,
    steps: Steps,
    sampling: Sampling,
    proposer: Proposer,
    k: int,
    compile: bool = False,
) -> Speculation:
    """What speculate needs for model. steps are its plain ones, for the same kv_cache and sampling."""

    def select_tokens(logits: Tensor, draft_tokens: Tensor, draft_probs: Tensor | None = None) -> Tensor:
        return tp.broadcast(rejection_sample(logits[0], draft_tokens, draft_probs, sampling))

    verify_step = build_step(model, kv_cache, select_tokens, compile)
    return Speculation(steps, verify_step, proposer, k, device_of(model), verify_cost(model))


@torch.inference_mode()
def speculate(
    speculation: Speculation, history: list[int], start: int, max_new_tokens: int
) -> Iterator[list[list[int]]]:
    """Continues history, of which the cache holds start tokens, by max_new_tokens. Yields the tokens of each step, one
    or several, each in a list as if it were one of several rows: [n][1]."""
    proposer, device = speculation.proposer, speculation.device
    history, n_left = list(history), max_new_tokens
    acceptance = AcceptanceRate()
    proposer.rewind(start)
    prompt = torch.tensor([history[start:]], device=device)
    tokens = speculation.steps.prefill(prompt, torch.tensor([start], device=device)).tolist()
    while True:
        check_finite(tokens)
        yield [[token] for token in tokens]
        history += tokens
        n_left -= len(tokens)
        if n_left == 0:
            return
        proposer.rewind(len(history) - 1)  # the last token is the model's own
        possible_sizes = [size for size in proposal_sizes(speculation.k) if size < n_left]
        k = best_size(possible_sizes, acceptance.rate, proposer.cost + speculation.verify_cost)
        proposal = proposer.propose(history, k) if k > 0 else None
        last_token = torch.tensor([history[-1:]], device=device)
        positions = torch.tensor([len(history) - 1], device=device)
        if proposal is None:
            tokens = speculation.steps.decode(last_token, positions).tolist()
            acceptance.decay(IDLE_DECAY)
        else:
            n_accepted, tokens = speculation.verify(last_token, positions, proposal)
            acceptance.update(n_accepted, is_rejected=n_accepted < k)


def rejection_sample(logits: Tensor, draft_tokens: Tensor, draft_probs: Tensor | None, sampling: Sampling) -> Tensor:
    """Returns [n_accepted, tokens ...]: [k + 2]; the first n_accepted + 1 tokens are valid.

    logits [k + 1, V]: the model's, after the last token and after each of the draft_tokens [k].
    draft_probs [k, V or less]: the distributions from which these were drawn."""
    if draft_probs is None:
        # The model samples a token at each position; the draft is right as long as it has proposed the same.
        tokens = sample(logits, sampling)
        n_accepted = (tokens[:-1] == draft_tokens).cumprod(0).sum()[None]
        return torch.cat([n_accepted, tokens])
    probs = probabilities(logits, sampling)  # [k + 1, V]
    draft_probs = F.pad(draft_probs, (0, probs.shape[1] - draft_probs.shape[1], 0, 1))  # [k + 1, V]
    # Accept a token with probability p / q, up to the first that is not accepted.
    p = probs[:-1].gather(1, draft_tokens[:, None])[:, 0]
    q = draft_probs[:-1].gather(1, draft_tokens[:, None])[:, 0]
    is_accepted = torch.rand(len(draft_tokens), device=logits.device) * q < p
    n_accepted = is_accepted.cumprod(0).sum()[None]
    # In its place comes a token that the draft proposes too seldom. After the last of the draft q is 0: any token.
    residual = (probs - draft_probs).clamp(min=0)[n_accepted]
    residual = torch.where(residual.sum() > 0, residual, probs[n_accepted])  # rounding may leave nothing
    tokens = torch.cat([draft_tokens, draft_tokens[:1]]).scatter(0, n_accepted, multinomial(residual))
    result = torch.cat([n_accepted, tokens])
    not_finite = F.pad(torch.full_like(tokens, -1), (1, 0))  # none accepted, and a token that check_finite finds
    return torch.where(logits.sum().isfinite(), result, not_finite)


# ---- How many tokens to propose -------------------------------------------------------------------------------------


@dataclass
class AcceptanceRate:
    """How often the model accepts a proposed token, in an exponential moving average: older steps count less. A step
    rejects one token at most, since those behind it are not judged."""

    n_accepted: float = PRIOR_ACCEPTED
    n_rejected: float = PRIOR_REJECTED

    @property
    def rate(self) -> float:
        return self.n_accepted / (self.n_accepted + self.n_rejected)

    def update(self, n_accepted: int, is_rejected: bool):
        """After a step that accepted n_accepted tokens and may have rejected the next."""
        self.n_accepted += n_accepted
        self.n_rejected += int(is_rejected)
        self.decay(EMA_DECAY)

    def decay(self, factor: float):
        """Both counts go back towards those of the beginning."""
        self.n_accepted = PRIOR_ACCEPTED + factor * (self.n_accepted - PRIOR_ACCEPTED)
        self.n_rejected = PRIOR_REJECTED + factor * (self.n_rejected - PRIOR_REJECTED)


def proposal_sizes(k: int) -> list[int]:
    """How many tokens may be proposed: k or a third of it. No other numbers, since a step is compiled for each."""
    return sorted({k, max(1, k // 3)})


def verify_cost(model: Transformer) -> float:
    """What it costs to verify one proposed token, in steps of model."""
    on_gpu = device_of(model).type != "cpu"
    return MOE_VERIFY_COST if model.config.moe is not None and on_gpu else VERIFY_COST


def best_size(sizes: list[int], acceptance_rate: float, cost: float) -> int:
    """Which of sizes, or 0, promises most tokens for the time. cost: of proposing and verifying a token, in steps."""

    def tokens_per_time(k: int) -> float:
        expected_tokens = sum(acceptance_rate**i for i in range(k + 1))  # token i comes if the i before are accepted
        return expected_tokens / (1 + k * cost)

    return max([0, *sizes], key=tokens_per_time)


# ---- Who proposes them ----------------------------------------------------------------------------------------------


class PromptLookup:
    """Looks for the last few tokens of the text earlier in the text and proposes what followed them there."""

    cost = 0.0

    def __init__(self, max_ngram: int, device: torch.device):
        """max_ngram: tokens to look for. If so many are not found, fewer are, but at least two."""
        self.max_ngram, self.device = max_ngram, device
        self.next_index: dict[tuple[int, ...], int] = {}  # n-gram -> index in the text of what followed it last
        self.n_known = 0  # tokens of the text whose n-grams are in next_index

    def propose(self, history: list[int], k: int) -> Proposal | None:
        self.learn(history)
        for n in range(self.max_ngram, 1, -1):
            index = self.next_index.get(tuple(history[-n:]))
            if index is not None:
                found = history[index:]
                tokens = [found[i % len(found)] for i in range(k)]  # at the text's end it begins again
                return Proposal(torch.tensor(tokens, device=self.device), None)
        return None

    def learn(self, history: list[int]):
        """Notes what followed each n-gram of the new tokens; not yet of the last, which nothing follows."""
        for index in range(max(self.n_known, 2), len(history)):
            for n in range(2, self.max_ngram + 1):
                self.next_index[tuple(history[max(0, index - n) : index])] = index
        self.n_known = len(history)

    def rewind(self, n: int):
        if n < self.n_known:
            self.next_index.clear()
            self.n_known = 0


class DraftModel:
    """Proposes what a smaller model samples, token by token, in a KV cache of its own."""

    def __init__(self, prefill: Step, step: Callable, vocab_size: int, device: torch.device, cost: float = 0.0):
        """step: (tokens [1, T], positions [1]) -> (token [1], its distribution [1, V] or None). The draft knows the
        tokens below vocab_size."""
        self.prefill, self.step, self.vocab_size, self.device, self.cost = prefill, step, vocab_size, device, cost
        self.n_cached = 0  # tokens of the text that are in the draft's cache

    def propose(self, history: list[int], k: int) -> Proposal:
        # The first step takes two tokens: if all of the last proposal was accepted, its last token is not in the cache
        # either. Always two, for a step is recorded or compiled for each number.
        n_before = len(history) - 2
        start = min(self.n_cached, n_before)
        tokens = torch.tensor([history[start:]], device=self.device).clamp(max=self.vocab_size - 1)
        positions = torch.tensor([start], device=self.device)
        if start < n_before:
            self.prefill(tokens[:, :-2], positions)
        tokens, positions = tokens[:, -2:], positions + (n_before - start)
        draft_tokens, draft_probs = [], []
        for _ in range(k):
            token, probs = self.step(tokens, positions)
            draft_tokens.append(token.clone())  # the next step may overwrite it
            if probs is not None:
                draft_probs.append(probs.clone())
            positions = positions + tokens.shape[1]
            tokens = draft_tokens[-1][None]
        self.n_cached = len(history) + k - 1  # all but the last proposed
        return Proposal(torch.cat(draft_tokens), torch.cat(draft_probs) if draft_probs else None)

    def rewind(self, n: int):
        self.n_cached = min(self.n_cached, n)


def build_draft_model(
    draft: Transformer, kv_cache: KVCache, model: Transformer, sampling: Sampling, compile: bool = False
) -> DraftModel:
    """draft, with kv_cache, as the proposer for model."""
    vocab_size = model.config.vocab_size

    def select_tokens(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits[:, -1, :vocab_size]  # models of one family fill their vocabularies up to different sizes
        if sampling.is_greedy:
            return tp.broadcast(logits.argmax(-1)), None
        probs = probabilities(logits, sampling)
        return tp.broadcast(multinomial(probs)), probs

    prefill = build_steps(draft, kv_cache, Sampling()).prefill
    step = build_step(draft, kv_cache, select_tokens, compile)
    cost = draft.step_bytes() / model.step_bytes()
    return DraftModel(prefill, step, draft.config.vocab_size, device_of(model), cost)

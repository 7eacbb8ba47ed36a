"""Speculative decoding: a cheap proposer guesses the next few tokens, and the model verifies all of them in one step.

    proposer = PromptLookup(max_ngram=3, device=device)
    decoder = build_speculative_decoder(model, kv_cache, steps, sampling, proposer, k=5)
    for (token,) in decoder(token_ids, n_cached=0, max_new_tokens=100): ...

A step reads all weights, whether it takes one token or five. So verifying five tokens costs hardly more than decoding
one. The model accepts a prefix of the proposed tokens and adds one token of its own. Rejection sampling makes the
distribution of the output exactly that of plain decoding (arXiv:2211.17192).

    PromptLookup    searches the text for its last few tokens, and proposes the tokens that followed them there
    DraftModel      proposes the tokens that a smaller model samples

Read SpeculativeDecoder first: a call is the loop, in place of generation.py: generate. rejection_sample decides which
tokens are accepted. Costs are times, as fractions of the time of a decode step of the model.

Shapes: k proposed tokens, V vocabulary. The batch size is always 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import collectives
from engine.sampling import SamplingParams, multinomial, probabilities, process_logits, sample
from engine.steps import Steps, build_model_step, check_sampled_ids, fill_kv_cache
from kernels.backend import TORCH, Backend
from model import KVCache, Transformer

MAX_DRAFT_TOKENS = 32  # the limit of --speculate_k and --prompt_lookup
# The cost to verify one proposed token. Measured: 0.01 with 16-bit, 0.02 with 8-bit and 0.15 with 4-bit weights.
VERIFY_COST = 0.1
# The factors by which AcceptanceRate's counts decay. A step without a proposal decays the counts, too, so that
# proposing is tried again later.
EMA_DECAY = 0.9  # a step that verifies tokens
IDLE_DECAY = 0.97  # a step without a proposal
PRIOR_ACCEPTED, PRIOR_REJECTED = 1.0, 0.5  # the counts before the first step


class Proposal(NamedTuple):
    tokens: Tensor  # [k]
    probs: Tensor | None  # [k, V]: the distribution from which each token was sampled; None: tokens were not sampled


class Proposer(Protocol):
    cost: float  # of proposing one token

    def propose(self, token_ids: list[int], k: int) -> Proposal | None:
        """Returns k tokens that may follow the text token_ids, or None if the proposer has no guess. token_ids must
        begin with the text of the previous call, unless rewind is called in between."""

    def rewind(self, n: int):
        """Tells the proposer that the next text may differ from the previous text after the first n tokens."""


@dataclass(frozen=True)
class SpeculativeDecoder:
    """A DecodeLoop (generation.py) that verifies what proposer proposes. Made by build_speculative_decoder."""

    steps: Steps
    # (tokens [1, k + 1], start_pos [1], draft_tokens [k], draft_probs [k, V]) -> the result of rejection_sample.
    # tokens are the last token of the text and draft_tokens. Without draft_probs, the proposer did not sample.
    verify_step: Callable[..., Tensor]
    proposer: Proposer
    k: int  # the most tokens to propose at a time
    device: torch.device
    verify_cost: float = VERIFY_COST  # of one proposed token
    # How many tokens each step of the last text gave, the first of them prefill. A step gives at least one token, and
    # the last step only as many as the caller took.
    step_sizes: list[int] = field(default_factory=list, init=False)

    @torch.inference_mode()
    def __call__(self, token_ids: list[int], n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
        """Continues the text token_ids by max_new_tokens tokens. Yields them one by one, each as [1]. The first
        n_cached of token_ids are in the KV cache."""
        self.step_sizes.clear()
        token_ids, n_left = list(token_ids), max_new_tokens
        acceptance = AcceptanceRate()
        self.proposer.rewind(n_cached)
        prompt = torch.tensor([token_ids[n_cached:]], device=self.device)
        new_ids = self.steps.prefill(prompt, torch.tensor([n_cached], device=self.device)).tolist()
        while True:
            self.step_sizes.append(0)
            for token in check_sampled_ids(new_ids):
                self.step_sizes[-1] += 1
                yield [token]
            token_ids += new_ids
            n_left -= len(new_ids)
            if n_left == 0:
                return
            # The draft's cache may hold the draft's own, rejected guess at the last position. Forget it.
            self.proposer.rewind(len(token_ids) - 1)
            # A step that accepts k tokens adds k + 1 tokens, so k must be less than n_left.
            lengths = [length for length in draft_lengths(self.k) if length < n_left]
            k = best_draft_length(lengths, acceptance.rate, self.proposer.cost + self.verify_cost)
            proposal = self.proposer.propose(token_ids, k) if k > 0 else None
            last_token = torch.tensor([token_ids[-1:]], device=self.device)
            start_pos = torch.tensor([len(token_ids) - 1], device=self.device)
            if proposal is None:
                new_ids = self.steps.decode(last_token, start_pos).tolist()
                acceptance.decay(IDLE_DECAY)
            else:
                n_accepted, new_ids = self.verify(last_token, start_pos, proposal)
                acceptance.update(n_accepted, is_rejected=n_accepted < k)

    def verify(self, last_token: Tensor, start_pos: Tensor, proposal: Proposal) -> tuple[int, list[int]]:
        """Verifies the proposed tokens after last_token [1, 1]. Returns n_accepted and the ids of n_accepted + 1
        tokens: the accepted tokens, then one token that the model sampled."""
        tokens = torch.cat([last_token, proposal.tokens[None]], dim=1)  # [1, k + 1]
        inputs = [tensor for tensor in proposal if tensor is not None]
        n_accepted, *next_ids = self.verify_step(tokens, start_pos, *inputs).tolist()
        return n_accepted, next_ids[: n_accepted + 1]

    def accept_counts(self) -> list[int]:
        """Returns how many steps of the last text accepted 0, 1 ... k tokens. A step gives one token more."""
        return [self.step_sizes[1:].count(n_accepted + 1) for n_accepted in range(self.k + 1)]


def build_speculative_decoder(
    model: Transformer,
    kv_cache: KVCache,
    steps: Steps,
    sampling: SamplingParams,
    proposer: Proposer,
    k: int,
    compile: bool = False,
) -> SpeculativeDecoder:
    """Builds the step that verifies proposals. steps: the result of build_steps for the same kv_cache and sampling."""

    def sampler(
        logits: Tensor, tokens: Tensor, start_pos: Tensor, draft_tokens: Tensor, draft_probs: Tensor | None = None
    ) -> Tensor:
        if sampling.needs_history:
            steps.history.store(tokens, start_pos)
        logits = process_logits(logits, tokens, start_pos, steps.history, [sampling])
        backend = model.lm_head.backend
        return collectives.broadcast(rejection_sample(logits[0], draft_tokens, draft_probs, sampling, backend))

    verify_step = build_model_step(model, kv_cache, steps.position_tables, sampler, compile)
    return SpeculativeDecoder(steps, verify_step, proposer, k, model.device, estimate_verify_cost(model))


def rejection_sample(
    logits: Tensor, draft_tokens: Tensor, draft_probs: Tensor | None, sampling: SamplingParams, backend: Backend = TORCH
) -> Tensor:
    """Returns a tensor [k + 2]: n_accepted, then k + 1 tokens, of which the first n_accepted + 1 are valid. One tensor
    needs only one copy to the host.

    logits [k + 1, V]: the model's logits after the last token of the text and after each of draft_tokens [k].
    draft_probs [k, V or fewer]: the distributions from which draft_tokens were sampled; None: they were not sampled.
    backend: as for sampling.py: sample."""
    if draft_probs is None:
        # The model samples a token at each position, and accepts a proposed token that equals the sampled token.
        tokens = sample(logits, sampling, backend)
        n_accepted = (tokens[:-1] == draft_tokens).cumprod(0).sum()[None]
        return torch.cat([n_accepted, tokens])
    probs = probabilities(logits, sampling)  # [k + 1, V]
    draft_probs = F.pad(draft_probs, (0, probs.shape[1] - draft_probs.shape[1], 0, 1))  # [k + 1, V]
    # Accept each token with probability min(1, p / q). The first rejected token ends the accepted prefix.
    p = probs[:-1].gather(1, draft_tokens[:, None])[:, 0]
    q = draft_probs[:-1].gather(1, draft_tokens[:, None])[:, 0]
    is_accepted = torch.rand(len(draft_tokens), device=logits.device) * q < p
    n_accepted = is_accepted.cumprod(0).sum()[None]
    # Sample the token after the accepted prefix from max(0, p - q). If all k tokens were accepted, q is the padding, 0.
    residual = (probs - draft_probs).clamp(min=0)[n_accepted]
    residual = torch.where(residual.sum() > 0, residual, probs[n_accepted])  # rounding may leave only zeros
    tokens = torch.cat([draft_tokens, draft_tokens[:1]]).scatter(0, n_accepted, multinomial(residual))
    result = torch.cat([n_accepted, tokens])
    not_finite = F.pad(torch.full_like(tokens, -1), (1, 0))  # n_accepted = 0 and token -1, so check_sampled_ids raises
    return torch.where(logits.sum().isfinite(), result, not_finite)


# ---- How many tokens to propose -------------------------------------------------------------------------------------


@dataclass
class AcceptanceRate:
    """The rate at which the model accepts proposed tokens, as an exponential moving average. A step rejects at most one
    token, since the tokens after the rejected token do not count."""

    n_accepted: float = PRIOR_ACCEPTED
    n_rejected: float = PRIOR_REJECTED

    @property
    def rate(self) -> float:
        return self.n_accepted / (self.n_accepted + self.n_rejected)

    def update(self, n_accepted: int, is_rejected: bool):
        """Counts a step that accepted n_accepted tokens. is_rejected: whether the step rejected the next token."""
        self.n_accepted += n_accepted
        self.n_rejected += int(is_rejected)
        self.decay(EMA_DECAY)

    def decay(self, factor: float):
        """Moves both counts towards the priors."""
        self.n_accepted = PRIOR_ACCEPTED + factor * (self.n_accepted - PRIOR_ACCEPTED)
        self.n_rejected = PRIOR_REJECTED + factor * (self.n_rejected - PRIOR_REJECTED)


def draft_lengths(k: int) -> list[int]:
    """Returns the numbers of tokens that may be proposed: k and a third of k. There are only two, since each number
    needs its own compiled or recorded step."""
    return sorted({k, max(1, k // 3)})


def estimate_verify_cost(model: Transformer) -> float:
    """Returns the cost to verify one proposed token. In a mixture of experts every token adds experts that must be
    read. For example, of Mixtral's 8 experts one token uses 2, and 5 tokens that choose independently use 6.1."""
    moe = model.config.moe
    if moe is None:
        return VERIFY_COST
    used_by_5 = moe.n_experts * (1 - (1 - moe.top_k / moe.n_experts) ** 5)
    return max(VERIFY_COST, (used_by_5 / moe.top_k - 1) / 4)


def best_draft_length(lengths: list[int], acceptance_rate: float, cost: float) -> int:
    """Returns how many tokens to propose: 0 or one of lengths, whichever gives the most tokens per time. cost: of
    proposing and verifying one token."""

    def tokens_per_time(k: int) -> float:
        # Token i of a step, counted from 0, needs i accepted tokens before it.
        expected_tokens = sum(acceptance_rate**i for i in range(k + 1))
        return expected_tokens / (1 + k * cost)

    return max([0, *lengths], key=tokens_per_time)


# ---- Proposers ------------------------------------------------------------------------------------------------------


class PromptLookup:
    """Finds the last earlier occurrence of the text's last few tokens, and proposes the tokens that followed."""

    cost = 0.0

    def __init__(self, max_ngram: int, device: torch.device):
        """max_ngram: how many of the last tokens to look for. Without a match propose looks for fewer, down to 2."""
        self.max_ngram, self.device = max_ngram, device
        self.ngram_index: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        self.n_indexed = 0  # how many tokens of the text are in ngram_index

    def propose(self, token_ids: list[int], k: int) -> Proposal | None:
        self.index_ngrams(token_ids)
        for n in range(self.max_ngram, 1, -1):
            index = self.ngram_index.get(tuple(token_ids[-n:]))
            if index is not None:
                found_ids = token_ids[index:]
                draft_ids = [found_ids[i % len(found_ids)] for i in range(k)]  # repeat found_ids if shorter than k
                return Proposal(torch.tensor(draft_ids, device=self.device), None)
        return None

    def index_ngrams(self, token_ids: list[int]):
        """Adds the n-grams of the new tokens to ngram_index, except those at the end, which no token follows yet."""
        for index in range(max(self.n_indexed, 2), len(token_ids)):
            for n in range(2, self.max_ngram + 1):
                self.ngram_index[tuple(token_ids[max(0, index - n) : index])] = index
        self.n_indexed = len(token_ids)

    def rewind(self, n: int):
        if n < self.n_indexed:
            self.ngram_index.clear()
            self.n_indexed = 0


class DraftModel:
    """Proposes the tokens that a smaller model, the draft, samples. The draft has its own KV cache."""

    def __init__(self, prefill: Callable, step: Callable, vocab_size: int, device: torch.device, cost: float = 0.0):
        """prefill: (tokens [1, T], start_pos [1]) -> None; fills the draft's KV cache.
        step: (tokens [1, T], start_pos [1]) -> (token [1], distribution [1, V] of the token, or None).
        vocab_size: the draft's, which may be smaller than the model's."""
        self.prefill, self.step, self.vocab_size, self.device, self.cost = prefill, step, vocab_size, device, cost
        self.n_cached = 0  # how many tokens of the text are in the draft's cache

    def propose(self, token_ids: list[int], k: int) -> Proposal:
        # The draft's cache lags by 1 token, or by 2 if all proposals were accepted. Always feed 2, so there is one
        # shape.
        n_before = len(token_ids) - 2
        n_cached = min(self.n_cached, n_before)
        tokens = torch.tensor([token_ids[n_cached:]], device=self.device).clamp(max=self.vocab_size - 1)
        start_pos = torch.tensor([n_cached], device=self.device)
        if n_cached < n_before:
            self.prefill(tokens[:, :-2], start_pos)
        tokens, start_pos = tokens[:, -2:], start_pos + (n_before - n_cached)
        draft_tokens, draft_probs = [], []
        for _ in range(k):
            token, probs = self.step(tokens, start_pos)
            draft_tokens.append(token.clone())  # the next step may overwrite token
            if probs is not None:
                draft_probs.append(probs.clone())
            start_pos = start_pos + tokens.shape[1]
            tokens = draft_tokens[-1][None]
        self.n_cached = len(token_ids) + k - 1  # all but the last proposed token
        return Proposal(torch.cat(draft_tokens), torch.cat(draft_probs) if draft_probs else None)

    def rewind(self, n: int):
        self.n_cached = min(self.n_cached, n)


def build_draft_model(
    draft: Transformer, kv_cache: KVCache, model: Transformer, sampling: SamplingParams, compile: bool = False
) -> DraftModel:
    """Returns a proposer for model that samples from draft. kv_cache: the draft's."""
    vocab_size, position_tables = model.config.vocab_size, draft.make_position_tables(kv_cache)

    def sampler(logits: Tensor, tokens: Tensor, start_pos: Tensor) -> tuple[Tensor, Tensor | None]:
        # No process_logits here. The output stays exact, since verification applies it. But with a repetition penalty
        # fewer of the draft's tokens are accepted.
        # The draft may pad the same vocabulary to a larger size. Drop the logits of tokens that only the draft has.
        logits = logits[:, -1, :vocab_size]
        if sampling.is_greedy:
            return collectives.broadcast(sample(logits, sampling, draft.lm_head.backend).clamp(min=0)), None
        probs = probabilities(logits, sampling)
        return collectives.broadcast(multinomial(probs)), probs

    def prefill(tokens: Tensor, start_pos: Tensor):
        fill_kv_cache(draft, tokens, start_pos, kv_cache, position_tables)

    step = build_model_step(draft, kv_cache, position_tables, sampler, compile)
    cost = draft.active_weight_bytes() / model.active_weight_bytes()
    return DraftModel(prefill, step, draft.config.vocab_size, model.device, cost)

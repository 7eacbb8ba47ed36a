"""Speculative decoding: a cheap proposer guesses the next few tokens, and the model verifies all of them in one step.

    proposer = NgramProposer(max_ngram=3, device=device)
    loop = SpeculativeLoop(runner, proposer, max_k=5)
    for (token,) in loop.decode_tokens(prompt, max_new_tokens=100): ...

A step reads all weights, whether it takes one token or five. So verifying five tokens costs hardly more than decoding
one. The model accepts a prefix of the draft tokens and adds one token of its own. Rejection sampling gives the output
exactly the distribution of plain decoding (arXiv:2211.17192).

    NgramProposer         finds an earlier occurrence of the last few tokens, and proposes the tokens that followed
    DraftModelProposer    proposes the tokens that a smaller model samples

Read SpeculativeLoop.decode_tokens first. rejection_sample decides which draft tokens are accepted. A cost is a time, in
decode steps of the model.

Shapes: k draft tokens, V vocabulary. The batch size is always 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.generation import GenerationLoop
from engine.memory_traffic import active_weight_bytes
from engine.runner import ModelRunner, check_sampled_ids
from engine.sampler import Sampler, adjust_logits
from engine.sampling_params import SamplingParams
from kernels.schema import INVALID_TOKEN
from layers import collectives
from layers.backend import Backend
from layers.sampling import compute_probs, multinomial, sample
from model import Transformer
from utils.errors import UsageError

MAX_SPECULATE_K = 32  # the limit of --speculate_k and --prompt_lookup
# The cost to verify one draft token. Measured: 16-bit weights 0.01, 8-bit 0.02, 4-bit 0.15. One value serves all: too
# high a value loses some speed-up, too low a value can make speculation slower than plain decoding.
VERIFY_COST = 0.1
# AcceptanceRate counts accepted and rejected tokens, beginning with the priors. Every step decays the counts towards
# the priors. Steps without a proposal do so, too: otherwise a few bad proposals would end speculation.
PRIOR_ACCEPTED, PRIOR_REJECTED = 1.0, 0.5
EMA_DECAY = 0.9  # the factor of a step that verifies tokens
IDLE_DECAY = 0.97  # the factor of a step without a proposal


class Proposal(NamedTuple):
    tokens: Tensor  # [k]
    probs: Tensor | None  # [k, V]: the distribution from which each token was sampled, None if they were not sampled


class Proposer(Protocol):
    cost: float  # the cost of proposing one token

    def propose(self, token_ids: list[int], k: int) -> Proposal | None:
        """Returns k tokens that may follow token_ids, or None for no guess. token_ids must begin with those of the
        previous call, unless rewind is called in between."""

    def rewind(self, n: int):
        """Tells the proposer that only the first n tokens of the previous call's token_ids are still valid."""


class SpeculativeLoop(GenerationLoop):
    """A loop whose steps also verify draft tokens. The batch size is 1.

    It draws from PyTorch's global generators, and refuses any other. Rejection sampling uses random numbers
    differently, so a seed would not draw a DecodeLoop's tokens anyway."""

    def __init__(self, runner: ModelRunner, proposer: Proposer, max_k: int):
        """max_k: propose up to max_k tokens at a time, --speculate_k."""
        super().__init__(runner)
        self.proposer, self.max_k, self.device = proposer, max_k, runner.device
        self.verify_step = runner.build_step(RejectionSampler(runner.sampler))
        self.verify_cost = estimate_verify_cost(runner.model)  # the cost to verify one draft token
        # How many tokens the caller took from each step of the last decode_tokens. Step 0 is prefill.
        self.n_tokens_per_step: list[int] = []

    @torch.inference_mode()
    def decode_tokens(
        self, token_ids: Tensor, max_new_tokens: int, n_cached: int = 0, generator: torch.Generator | None = None
    ) -> Iterator[list[int]]:
        if generator not in (None, torch.default_generator):
            raise UsageError("speculation draws from PyTorch's global generators: seed those, and leave generator out")
        self.n_tokens_per_step.clear()
        ids = token_ids[0].tolist()  # the sequence so far
        n_left = max_new_tokens
        acceptance = AcceptanceRate()
        self.proposer.rewind(n_cached)
        prompt = token_ids[:, n_cached:].to(self.device)
        new_ids = self.runner.prefill(prompt, torch.tensor([n_cached], device=self.device)).tolist()
        while True:
            self.n_tokens_per_step.append(0)
            for token in check_sampled_ids(new_ids):
                self.n_tokens_per_step[-1] += 1
                yield [token]
            ids += new_ids
            n_left -= len(new_ids)
            if n_left == 0:
                return
            # The draft computes again from the last position: from there its cache may hold rejected tokens.
            self.proposer.rewind(len(ids) - 1)
            # A step that accepts k tokens adds k + 1 tokens, so k must be less than n_left.
            choices = [k for k in k_choices(self.max_k) if k < n_left]
            k = best_k(choices, acceptance.rate, self.proposer.cost + self.verify_cost)
            proposal = self.proposer.propose(ids, k) if k > 0 else None
            last_token = torch.tensor([ids[-1:]], device=self.device)
            start_pos = torch.tensor([len(ids) - 1], device=self.device)
            if proposal is None:
                new_ids = self.runner.decode(last_token, start_pos).tolist()
                acceptance.decay(IDLE_DECAY)
            else:
                n_accepted, new_ids = self.verify(last_token, start_pos, proposal)
                acceptance.update(n_accepted, is_rejected=n_accepted < k)

    def verify(self, last_token: Tensor, start_pos: Tensor, proposal: Proposal) -> tuple[int, list[int]]:
        """Verifies the draft tokens after last_token [1, 1]. Returns n_accepted and the ids of n_accepted + 1 tokens:
        the accepted tokens, then one token that the model sampled."""
        tokens = torch.cat([last_token, proposal.tokens[None]], dim=1)  # [1, k + 1]
        n_accepted, *next_ids = self.verify_step(tokens, start_pos, proposal.probs).tolist()
        return n_accepted, next_ids[: n_accepted + 1]

    @torch.inference_mode()
    def warm_up(self, max_new_tokens: int):
        super().warm_up(max_new_tokens)
        zeros = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for k in k_choices(self.max_k):
            if k < max_new_tokens - 1:  # a step that accepts k tokens adds k + 1
                self.verify(zeros, zeros[0], self.proposer.propose([0, 0, 0], k))

    def accept_counts(self) -> list[int]:
        """Returns how many steps of the last decode_tokens accepted 0, 1 ... max_k draft tokens."""
        # A step that accepts n tokens adds n + 1.
        return [self.n_tokens_per_step[1:].count(n_accepted + 1) for n_accepted in range(self.max_k + 1)]


@dataclass(frozen=True)
class RejectionSampler:
    """The end of a verification. Its tokens [1, k + 1] are the last token of the sequence and the draft tokens."""

    sampler: Sampler  # of plain decoding

    def __call__(self, logits: Tensor, tokens: Tensor, start_pos: Tensor, draft_probs: Tensor | None = None) -> Tensor:
        """Returns a tensor [k + 2]: n_accepted, then k + 1 tokens, of which the first n_accepted + 1 are valid. One
        tensor needs only one copy to the host.

        logits [1, k + 1, V]: the logits after each of tokens.
        draft_probs [k, V or fewer]: the distributions from which the draft tokens were sampled, None if they were not
            sampled."""
        params, draft_tokens = self.sampler.params, tokens[0, 1:]
        logits = adjust_logits(logits, tokens, start_pos, self.sampler.token_ids, params)
        if draft_probs is None:
            result = accept_equal(self.sampler.sample(logits[0]), draft_tokens)
        else:
            result = rejection_sample(logits[0], draft_tokens, draft_probs, params)
        return collectives.broadcast(result)


def accept_equal(tokens: Tensor, draft_tokens: Tensor) -> Tensor:
    """Accepts each of draft_tokens [k] that equals the token that the model sampled at its position, up to the first
    that differs. tokens [k + 1]: the sampled tokens. Returns the result of RejectionSampler."""
    n_accepted = (tokens[:-1] == draft_tokens).cumprod(0).sum()[None]
    return torch.cat([n_accepted, tokens])


def rejection_sample(logits: Tensor, draft_tokens: Tensor, draft_probs: Tensor, params: SamplingParams) -> Tensor:
    """Returns the result of RejectionSampler for draft tokens that were sampled from draft_probs."""
    probs = compute_probs(logits, params.temperature, params.filters)  # [k + 1, V]
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
    invalid = F.pad(torch.full_like(tokens, INVALID_TOKEN), (1, 0))  # n_accepted is 0
    return torch.where(logits.isfinite().all(), result, invalid)


# ---- How many tokens to propose -------------------------------------------------------------------------------------


@dataclass
class AcceptanceRate:
    """The rate at which the model accepts draft tokens, as an exponential moving average. A step counts its accepted
    tokens and at most one rejected token, because verification stops there."""

    n_accepted: float = PRIOR_ACCEPTED
    n_rejected: float = PRIOR_REJECTED

    @property
    def rate(self) -> float:
        return self.n_accepted / (self.n_accepted + self.n_rejected)

    def update(self, n_accepted: int, is_rejected: bool):
        """Counts a step that verified tokens. is_rejected: whether it rejected the token after the n_accepted."""
        self.n_accepted += n_accepted
        self.n_rejected += int(is_rejected)
        self.decay(EMA_DECAY)

    def decay(self, factor: float):
        """Moves both counts towards the priors."""
        self.n_accepted = PRIOR_ACCEPTED + factor * (self.n_accepted - PRIOR_ACCEPTED)
        self.n_rejected = PRIOR_REJECTED + factor * (self.n_rejected - PRIOR_REJECTED)


def k_choices(max_k: int) -> list[int]:
    """Returns the numbers of tokens that may be proposed: max_k and a third of it. Only two, because each number needs
    its own compiled or captured step."""
    return sorted({max_k, max(1, max_k // 3)})


def estimate_verify_cost(model: Transformer) -> float:
    """Returns the cost to verify one draft token: VERIFY_COST, or in a mixture of experts the cost of reading the
    experts that the token adds, if that is more. Assumes that a step reads only experts, and that each token chooses
    its experts at random. For example, of Mixtral's 8 experts one token uses 2. The last token and 4 draft tokens use
    6.1. So that step takes 3.05 times as long, and the cost is 2.05 / 4."""
    moe = model.config.moe
    if moe is None:
        return VERIFY_COST
    used_by_5 = moe.n_experts * (1 - (1 - moe.top_k / moe.n_experts) ** 5)
    return max(VERIFY_COST, (used_by_5 / moe.top_k - 1) / 4)


def best_k(choices: list[int], acceptance_rate: float, cost: float) -> int:
    """Returns how many tokens to propose: 0 or one of choices, whichever generates the most tokens per time. cost: of
    proposing and verifying one token."""

    def tokens_per_time(k: int) -> float:
        # Token i of a step, counted from 0, needs i accepted tokens before it.
        expected_tokens = sum(acceptance_rate**i for i in range(k + 1))
        return expected_tokens / (1 + k * cost)

    return max([0, *choices], key=tokens_per_time)


# ---- Proposers ------------------------------------------------------------------------------------------------------


class NgramProposer:
    """Finds the last earlier occurrence of the last few tokens, and proposes the tokens that followed."""

    cost = 0.0

    def __init__(self, max_ngram: int, device: torch.device):
        """max_ngram: how many of the last tokens to look for. Without a match, propose looks for fewer, down to 2."""
        self.max_ngram, self.device = max_ngram, device
        self.ngram_index: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        self.n_indexed = 0  # how many tokens of the sequence are in ngram_index

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
        """Adds the n-grams of the new tokens to ngram_index. Skips those at the end: no token follows them yet."""
        for index in range(max(self.n_indexed, 2), len(token_ids)):
            for n in range(2, self.max_ngram + 1):
                self.ngram_index[tuple(token_ids[max(0, index - n) : index])] = index
        self.n_indexed = len(token_ids)

    def rewind(self, n: int):
        if n < self.n_indexed:
            self.ngram_index.clear()
            self.n_indexed = 0


class DraftModelProposer:
    """Proposes the tokens that a smaller model, the draft, samples. The draft has its own KV cache."""

    def __init__(self, draft: ModelRunner, model: Transformer):
        """draft: samples with the options of the model's runner."""
        sampler = DraftSampler(draft.sampler.params, draft.sampler.backend, model.config.vocab_size)
        self.draft, self.draft_step = draft, draft.build_step(sampler)
        self.last_id = draft.model.config.vocab_size - 1  # the model's vocabulary may be larger
        self.cost = active_weight_bytes(draft.model) / active_weight_bytes(model)
        self.n_cached = 0  # how many tokens of the sequence are in the draft's cache

    def propose(self, token_ids: list[int], k: int) -> Proposal:
        # The draft's cache lacks the last token, and the token before it if the model accepted all k draft tokens. The
        # first step always takes both tokens. So a GPU captures one step, with T = 2, for both cases.
        n_before = len(token_ids) - 2
        n_cached = min(self.n_cached, n_before)
        tokens = torch.tensor([token_ids[n_cached:]], device=self.draft.device).clamp(max=self.last_id)
        start_pos = torch.tensor([n_cached], device=self.draft.device)
        if n_cached < n_before:
            self.draft.fill_kv_cache(tokens[:, :-2], start_pos)
        tokens, start_pos = tokens[:, -2:], start_pos + (n_before - n_cached)
        draft_tokens, draft_probs = [], []
        for _ in range(k):
            token, probs = self.draft_step(tokens, start_pos)
            draft_tokens.append(token.clone())  # the next step may overwrite token
            if probs is not None:
                draft_probs.append(probs.clone())
            start_pos = start_pos + tokens.shape[1]
            tokens = draft_tokens[-1][None]
        self.n_cached = len(token_ids) + k - 1  # all but the last draft token
        return Proposal(torch.cat(draft_tokens), torch.cat(draft_probs) if draft_probs else None)

    def rewind(self, n: int):
        self.n_cached = min(self.n_cached, n)


@dataclass(frozen=True)
class DraftSampler:
    """The end of a draft's step. Leaves adjust_logits to verification: the output stays exact, but with a repetition
    penalty fewer draft tokens are accepted."""

    params: SamplingParams
    backend: Backend  # the backend of the draft's head
    vocab_size: int  # of the model; the draft may pad the same vocabulary to a larger size

    def __call__(self, logits: Tensor, tokens: Tensor, start_pos: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns a token [1], and its distribution [1, V] unless sampling is greedy."""
        logits = logits[:, -1, : self.vocab_size]
        if self.params.is_greedy:
            token = sample(logits, 0.0, self.params.filters, self.backend)
            token = token.clamp(min=0)  # the embedding has no INVALID_TOKEN
            return collectives.broadcast(token), None
        probs = compute_probs(logits, self.params.temperature, self.params.filters)
        return collectives.broadcast(multinomial(probs)), probs

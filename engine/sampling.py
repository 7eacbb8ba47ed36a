"""From logits to the next token: the likeliest token, or a token drawn with temperature, top_k, top_p and min_p.

    sample(logits, SamplingParams())                          # the likeliest token
    sample(logits, SamplingParams(temperature=0.8, top_k=50))

apply_repetition_penalty comes before sample. No function waits for the device, so that the next step can start before
the host has read the sampled token.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import ops
from ops.backend import TORCH_BACKEND, Backend
from utils.errors import UsageError

INTEGER_LIMIT = 2**63  # kernels take integers of 64 bits
SMALLEST_TEMPERATURE = 1e-30  # a smaller divisor could round to 0 in float32
# On a CPU sort_for_top_p searches for the likely tokens, so that it need not sort the whole vocabulary.
SMALL_VOCABULARY = 1000  # with this many tokens or fewer, sorting is faster than searching
FIRST_THRESHOLD = 2**-10  # a probability; fewer than 1024 tokens can exceed it
VOCAB_BLOCK = 64  # neighbouring token ids; the search skips a block if no token exceeds the threshold


def sampling_field(default: float | None, help: str, allowed: str, is_allowed: Callable[[float], bool], no_op=None):
    """A field of SamplingParams. The command line has an option of the same name, which help describes.

    allowed: is_allowed in words, for error messages.
    no_op: a value without an effect, such as top_p = 1. The field then gets its default instead of the value, so that
    a kernel samples."""
    return field(default=default, metadata=dict(help=help, allowed=allowed, is_allowed=is_allowed, no_op=no_op))


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen. The repetition penalty applies first, and then the other options in the order of the
    fields. Options with the default None exclude tokens, but never the likeliest token, which a temperature of 0 takes
    (greedy). The default temperature is 0 in Python, 0.8 in generate.py (as in gpt-fast) and 1 in the server
    (as in OpenAI's API)."""

    temperature: float = sampling_field(0.0, "0 takes the likeliest token", "0 or more", lambda t: 0 <= t < math.inf)
    _: KW_ONLY
    top_k: int | None = sampling_field(None, "sample among the k likeliest tokens only", "at least 1", lambda k: k >= 1)
    top_p: float | None = sampling_field(  # arXiv:1904.09751
        None, "sample among the likeliest tokens that make up p", "above 0 and at most 1", lambda p: 0 < p <= 1,
        no_op=1,
    )
    min_p: float | None = sampling_field(  # arXiv:2407.01082
        None, "sample among tokens at least p times as likely as the likeliest", "0 to 1", lambda p: 0 <= p <= 1,
        no_op=0,
    )
    repetition_penalty: float = sampling_field(  # arXiv:1909.05858
        # beyond these bounds the penalty could make a finite logit infinite
        1.0, "above 1: what the text has already becomes less likely", "0.01 to 100", lambda r: 0.01 <= r <= 100
    )

    def __post_init__(self):
        """Raises UsageError if a field has the wrong type or is out of range. The message begins with its name."""
        for option in fields(self):
            value, is_integer = getattr(self, option.name), option.type == int | None
            if value is option.default:
                continue
            if not isinstance(value, int if is_integer else int | float) or isinstance(value, bool):
                kind = "an integer" if is_integer else "a number"
                raise UsageError(f"{option.name} must be {kind}, not {value!r:.80}")
            if isinstance(value, int) and value >= INTEGER_LIMIT:
                raise UsageError(f"{option.name} is too large")
            if not option.metadata["is_allowed"](value):
                raise UsageError(f"{option.name} must be {option.metadata['allowed']}, not {value}")
            if value == option.metadata["no_op"]:
                object.__setattr__(self, option.name, option.default)

    @classmethod
    def from_options(cls, options: Mapping) -> "SamplingParams":
        """Reads the fields from options, such as the JSON of a request. Ignores options that are not fields. A value of
        None means the default."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if options.get(f.name) is not None})

    def override(self, options: Mapping) -> "SamplingParams":
        """Returns these parameters with other values for the fields in options."""
        names = [f.name for f in fields(self)]
        for name in options:
            if name not in names:
                raise UsageError(f"{name} is no sampling option; these are: {', '.join(names)}")
        return replace(self, **options)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> dict[str, float]:
        """The options that exclude tokens. A kernel draws only if it takes all of them."""
        names = [option.name for option in fields(self) if option.default is None]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def needs_token_ids(self) -> bool:
        """Whether an option needs the ids of the text so far."""
        return self.repetition_penalty != 1


GREEDY = SamplingParams()


def store_token_ids(token_ids: Tensor, tokens: Tensor, start_pos: Tensor):
    """Stores tokens [B, T] in token_ids [B, S] of a KVCache, the first of each sequence at start_pos [B]."""
    positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    token_ids.scatter_(1, positions, tokens)


def seen_token_mask(token_ids: Tensor, last_positions: Tensor, vocab_size: int) -> Tensor:
    """Whether each token of the vocabulary occurs in the text up to each of last_positions [B, n]: bool [B, n, V].
    token_ids [B, S] must hold the text up to there."""
    is_later = torch.arange(token_ids.shape[1], device=token_ids.device) > last_positions[..., None]  # [B, n, S]
    ids = token_ids[:, None].masked_fill(is_later, vocab_size)
    seen = torch.zeros(*last_positions.shape, vocab_size + 1, dtype=torch.bool, device=token_ids.device)
    return seen.scatter_(-1, ids, True)[..., :vocab_size]


def apply_repetition_penalty(
    logits: Tensor, tokens: Tensor, start_pos: Tensor, token_ids: Tensor, all_params: list[SamplingParams]
) -> Tensor:
    """Returns the logits [B, n, V] with the repetition penalty, the only option that depends on the text. The penalty
    is no part of sample, so one call of sample serves sequences with different penalties (scheduler.py: sample_batch).

    logits: of the positions of the last n of tokens [B, T], the first of which is at start_pos [B].
    token_ids [B, S]: of a KVCache; they hold the text and tokens, if an option depends on the text.
    all_params: one for each sequence, or one for all."""
    if not any(params.needs_token_ids for params in all_params):
        return logits
    n = logits.shape[1]
    last_positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)[-n:]  # [B, n]
    seen = seen_token_mask(token_ids, last_positions, logits.shape[-1])
    penalty: float | Tensor = all_params[0].repetition_penalty
    if len(all_params) > 1:  # only in the scheduler, since a CUDA graph cannot hold the copy to the GPU
        penalties = [params.repetition_penalty for params in all_params]
        penalty = torch.tensor(penalties, device=logits.device).view(-1, 1, 1)
    # A penalty above 1 lowers a logit, positive or negative.
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Tensor, params: SamplingParams, backend: Backend = TORCH_BACKEND, uniform: Tensor | None = None,
    temperatures: Tensor | None = None,
) -> Tensor:
    """float32 logits [B, V] -> token ids [B]. The id is -1 for a sequence whose logits are not finite.

    backend: the model's; one of its kernels samples if it can.
    uniform: random numbers [B, 1] in [0, 1), one for each sequence; None: PyTorch's generator makes them.
    temperatures: one for each sequence, float32 [B, 1] and positive, in place of params's; only with uniform."""
    filters = {} if params.is_greedy else params.filters
    if backend.supports_sampling(filters, uniform is not None):
        return ops.sample(logits, params.temperature, backend, uniform=uniform, temperatures=temperatures, **filters)
    if params.is_greedy:
        tokens = logits.argmax(-1)
    else:
        probs, ids = filtered_probs(logits, params, temperatures)
        drawn = multinomial(probs, uniform)
        tokens = drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
    is_finite = logits.sum(-1).isfinite()
    return torch.where(is_finite, tokens, -1)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Returns the distribution [B, V] from which sample draws. params must not be greedy."""
    probs, ids = filtered_probs(logits, params)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits).scatter_add(-1, ids, probs)


def filtered_probs(
    logits: Tensor, params: SamplingParams, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns probabilities and ids of the C tokens from which sample draws, both [B, C]. The probabilities of a
    sequence need not sum to one. If ids is None, C is V, and the tokens are in the order of their ids."""
    temperature: float | Tensor = max(params.temperature, SMALLEST_TEMPERATURE)
    if temperatures is not None:
        temperature = temperatures.clamp(min=SMALLEST_TEMPERATURE)
    # Subtracting the maximum makes the largest score 0 and all others negative. So with a small temperature no score
    # overflows to +inf, and the probabilities of the negative scores underflow to 0.
    scores = (logits - logits.amax(-1, keepdim=True)) / temperature
    has_top_k = params.top_k is not None and params.top_k < scores.shape[-1]
    ids = None
    if has_top_k:
        scores, ids = scores.topk(params.top_k)  # the likeliest first
    probs = scores.softmax(-1)
    if params.top_p is not None:
        if not has_top_k:
            probs, ids = sort_for_top_p(probs, params.top_p)
        before = F.pad(probs.cumsum(-1)[:, :-1], (1, 0))  # the summed probability of all likelier tokens
        probs = probs.masked_fill(before >= params.top_p, 0)
    if params.min_p is not None:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def sort_for_top_p(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Finds the likeliest tokens of each sequence, enough for their probabilities to sum to top_p. probs [B, V] ->
    probabilities and ids, both [B, C], the likeliest first. Equally likely tokens are in the order of their ids. Zeros
    pad a sequence that needs fewer than C tokens."""
    # On a GPU and when compiled, C must not depend on the probabilities. So all V tokens are sorted there.
    if probs.device.type != "cpu" or torch.compiler.is_compiling() or probs.shape[-1] <= SMALL_VOCABULARY:
        return probs.sort(dim=-1, descending=True, stable=True)
    values, ids = zip(*[search_for_top_p(row, top_p) for row in probs], strict=True)
    return pad_sequence(values, batch_first=True), pad_sequence(ids, batch_first=True)


def search_for_top_p(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """sort_for_top_p for one sequence [V]. Sorts only the tokens above a threshold. If their probabilities sum to less
    than top_p, divides the threshold by 8 and searches again. Usually the first threshold is low enough."""
    missing = -len(probs) % VOCAB_BLOCK
    blocks = (F.pad(probs, (0, missing)) if missing else probs).view(-1, VOCAB_BLOCK)
    largest = blocks.amax(-1)
    threshold = FIRST_THRESHOLD
    while threshold > (1 - top_p) / len(probs):  # a lower threshold leaves out few tokens: sort all
        block_ids = (largest > threshold).nonzero()[:, 0]
        values = blocks[block_ids].flatten()
        indices = (values > threshold).nonzero()[:, 0]  # into values
        values, order = values[indices].sort(descending=True, stable=True)
        if len(values) and values.cumsum(-1)[-1] >= top_p:
            indices = indices[order]
            return values, block_ids[indices // VOCAB_BLOCK] * VOCAB_BLOCK + indices % VOCAB_BLOCK
        threshold /= 8
    return probs.sort(descending=True, stable=True)


def multinomial(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draws a token for each sequence: probs [B, V] -> ids [B]. The probabilities of a sequence need not sum to one. A
    token of probability 0 is never drawn.

    uniform: the random numbers [B, 1], in [0, 1); None: PyTorch's generator makes them."""
    if probs.is_cuda and uniform is None:
        # An exponential race, like the Gumbel-max trick: with E[i] drawn from Exp(1), the argmax of p[i] / E[i] is i
        # with probability p[i]. On a GPU an elementwise kernel and an argmax are faster than a cumulative sum.
        exponential = torch.empty_like(probs, dtype=torch.float64).exponential_()
        return (probs / exponential).argmax(-1)
    # Inverse transform sampling: take the first token whose cumulative probability exceeds the random number. Not every
    # accelerator has float64.
    dtype = torch.float64 if probs.device.type == "cpu" else torch.float32
    cumulative = probs.cumsum(-1, dtype=dtype)
    if uniform is None:
        uniform = torch.rand(len(probs), 1, dtype=dtype, device=probs.device)
    uniform = uniform.to(dtype).clamp(max=1 - torch.finfo(dtype).eps)  # rounding could give 1
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)

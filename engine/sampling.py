"""From logits to the next token: the likeliest token, or a token drawn with temperature, top_k, top_p and min_p.

    sample(logits, SamplingParams())                          # the likeliest token
    sample(logits, SamplingParams(temperature=0.8, top_k=50))

apply_repetition_penalty comes before sample. sample is an operation: a kernel computes it, or ops/torch_ops.py. No
function waits for the device, so that the next step can start before the host has read the sampled token.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace

import torch
from torch import Tensor

import ops
from kernels.schema import Filters
from ops.backend import TORCH_BACKEND, Backend
from ops.torch_ops import filtered_probs
from utils.errors import UsageError

INTEGER_LIMIT = 2**63  # kernels take integers of 64 bits


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
        1.0, "above 1: what the text has already becomes less likely", "above 0", lambda factor: 0 < factor < math.inf
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
    def filters(self) -> Filters:
        """The options that exclude tokens. None of them excludes the likeliest token, which greedy sampling takes."""
        if self.is_greedy:
            return Filters()
        names = [option.name for option in fields(self) if option.default is None]
        return Filters(**{name: getattr(self, name) for name in names if getattr(self, name) is not None})

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
    """float32 logits [B, V] -> token ids [B]. backend: the model's. ops/dispatch.py: sample describes the rest."""
    return ops.sample(logits, params.temperature, params.filters, backend, uniform, temperatures)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Returns the distribution [B, V] from which sample draws. params must not be greedy."""
    probs, ids = filtered_probs(logits, params.temperature, params.filters)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits).scatter_add(-1, ids, probs)

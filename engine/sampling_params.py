"""SamplingParams: the options of sampling. The command line and the server's requests have the same options."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace

from kernels.schema import TokenFilters
from utils.errors import UsageError

INTEGER_LIMIT = 2**63  # kernels take integers of 64 bits


def sampling_field(
    type: type, default: float | None, help: str, allowed: str, is_allowed: Callable[[float], bool],
    no_op: float | None = None, is_filter: bool = False,
):
    """A field of SamplingParams. The command line has an option of the same name.

    type: int or float, the type of values other than None.
    allowed: is_allowed in words, for error messages.
    no_op: a value that turns the option off, such as top_p=1. It is stored as the default, so an option that is off
        never looks active, and the kernels can sample.
    is_filter: whether the option excludes tokens. Then kernels/schema.py: TokenFilters has a field of this name."""
    metadata = dict(type=type, help=help, allowed=allowed, is_allowed=is_allowed, no_op=no_op, is_filter=is_filter)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen. The repetition penalty applies first, then the other options in the order of the fields.
    Filters exclude tokens, but never the likeliest one. A temperature of 0 takes the likeliest token (greedy). The
    default temperature is 0 in Python, 0.8 in generate.py (as in gpt-fast) and 1 in the server (as in OpenAI's API)."""

    temperature: float = sampling_field(
        float, 0.0, "0 takes the likeliest token", "0 to 1000000", lambda t: 0 <= t <= 1e6
    )
    _: KW_ONLY
    top_k: int | None = sampling_field(
        int, None, "sample among the k likeliest tokens only", "at least 1", lambda k: k >= 1,
        is_filter=True,
    )
    top_p: float | None = sampling_field(  # arXiv:1904.09751
        float, None, "sample among the likeliest tokens that make up p", "above 0 and at most 1",
        lambda p: 0 < p <= 1, no_op=1, is_filter=True,
    )
    min_p: float | None = sampling_field(  # arXiv:2407.01082
        float, None, "sample among tokens at least p times as likely as the likeliest", "0 to 1",
        lambda p: 0 <= p <= 1, no_op=0, is_filter=True,
    )
    repetition_penalty: float = sampling_field(  # arXiv:1909.05858
        # beyond these bounds the penalty could make a finite logit infinite
        float, 1.0, "above 1: tokens that the text already has become less likely", "0.01 to 100",
        lambda factor: 0.01 <= factor <= 100,
    )

    def __post_init__(self):
        """Raises UsageError if a field has the wrong type or is out of range. The message begins with the name."""
        for option in fields(self):
            value, is_integer = getattr(self, option.name), option.metadata["type"] is int
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
                raise UsageError(f"{name} is not a sampling option; these are: {', '.join(names)}")
        return replace(self, **options)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> TokenFilters:
        """The options that exclude tokens. Greedy sampling needs none, because none excludes the likeliest token."""
        if self.is_greedy:
            return TokenFilters()
        values = {name: getattr(self, name) for name in TokenFilters._fields}
        return TokenFilters(**{name: value for name, value in values.items() if value is not None})

    @property
    def needs_token_ids(self) -> bool:
        """Whether an option needs the token ids of the sequence so far (engine/sampler.py: adjust_logits)."""
        return self.repetition_penalty != 1


assert {option.name for option in fields(SamplingParams) if option.metadata["is_filter"]} == {*TokenFilters._fields}
GREEDY = SamplingParams()

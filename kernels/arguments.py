"""Groups of arguments that several operations take, and the numbers of activations. A kernel gets the fields of a group
one by one (schema.py)."""

from typing import NamedTuple

from torch import Tensor

from config import ACTIVATIONS, is_gated

ACTIVATION_IDS = {None: 0} | {name: i for i, name in enumerate(ACTIVATIONS, 1)}  # csrc/activation.h: Activation
# clamped_swiglu has two parameters, by gpt-oss's names. csrc/activation.h and triton/epilogue.py have them, too
SWIGLU_ALPHA = 1.702  # sigmoid(alpha * gate)
SWIGLU_LIMIT = 7.0  # gate is at most the limit, up between -limit and limit
GATED_IDS = {ACTIVATION_IDS[name] for name in ACTIVATIONS if is_gated(name)}


class WeightArguments(NamedTuple):
    """A weight, as the arguments of a kernel."""

    weight: Tensor  # weight, scales and zeros are packed for the backend
    scales: Tensor | None
    zeros: Tensor | None
    format_id: int  # WeightFormat.format_id
    n: int  # N
    group_size: int  # inputs of an output that share a scale


class Epilogue(NamedTuple):
    """What fused_linear does to y = x W^T + bias, in this order. The default of a field means that fused_linear leaves
    the step out."""

    activation: int = 0  # a value of ACTIVATION_IDS
    out_scale: float = 1.0  # y * out_scale
    softcap: float = 0.0  # softcap * tanh(y / softcap)
    clip: float = 0.0  # y, clamped to [-clip, clip]


class AttentionParams(NamedTuple):
    """What attention does besides softmax(q k^T) v. The default of a field means that attention leaves the step out."""

    n_heads: int  # H, the heads of queries
    scale: float  # multiplies the scores
    window: int = 0  # how many tokens a token sees, including itself; 0 means all
    softcap: float = 0.0  # scores, after scale, become softcap * tanh(score / softcap)
    q_norm_weight: Tensor | None = None  # of norms before RoPE: [D] norms each head, [H D] all heads together
    k_norm_weight: Tensor | None = None  # [D] or [G D]
    eps: float = 0.0  # eps of both norms
    sinks: Tensor | None = None  # [H], the scores of an additional key, whose value is zero

    def is_sdpa_compatible(self, alibi_slopes: Tensor | None) -> bool:
        """Whether scale and the mask are all that attention does to the scores, so that PyTorch's SDPA can compute the
        attention. Norms and RoPE come before the scores. SDPA would ignore a new field silently. So the next line names
        every field, and raises ValueError if there is a new field: decide here whether SDPA can compute the field."""
        _n_heads, _scale, _window, softcap, _q_norm_weight, _k_norm_weight, _eps, sinks = self
        return not softcap and sinks is None and alibi_slopes is None


class Filters(NamedTuple):
    """Which tokens sample may draw, by the options of engine/sampling_params.py. The default of a field excludes none.
    A field need not be an argument of the kernels: Backend.filters has the fields that a kernel takes."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def active(self) -> set[str]:
        """The fields that may exclude tokens."""
        return {name for name, value in self._asdict().items() if value != self._field_defaults[name]}


class LayerCache(NamedTuple):
    """What a layer's attention knows about earlier tokens: their keys and values, and the tables that tell positions
    apart. rope.py makes the tables for all positions of the cache."""

    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]
    cos_sin: Tensor  # [S or more, D/2, 2] float32: cos and sin of RoPE's angles at every position
    alibi_slopes: Tensor | None = None  # [H] float32: slope * (position of key - position of query) is added to scores

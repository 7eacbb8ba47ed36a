"""Arguments of operations that belong together.

    WeightArguments    a weight, in the order of kernel arguments
    AttentionOptions   the options of attention, by the names of kernel arguments
    LayerCache         a layer's keys and values of earlier tokens
    PositionTables     a layer's tables of RoPE and ALiBi
"""

from typing import NamedTuple

from torch import Tensor


class WeightArguments(NamedTuple):
    """A weight as a kernel takes it, in the order of kernels/schema.py: WEIGHT, which describes each argument."""

    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    format_id: int
    n: int
    group_size: int


class AttentionOptions(NamedTuple):
    """The options of attention, by the names in kernels/schema.py: ATTENTION. The default of an option means that
    attention leaves it out."""

    n_heads: int  # H, the heads of queries
    scale: float  # multiplies the scores
    window: int = 0  # how many tokens a token sees, including itself; 0 means all
    softcap: float = 0.0  # scores, after scale, become softcap * tanh(score / softcap)
    q_norm_weight: Tensor | None = None  # of norms before RoPE: [D] norms each head, [H D] all heads together
    k_norm_weight: Tensor | None = None  # [D] or [G D]
    eps: float = 0.0  # of both norms
    sinks: Tensor | None = None  # [H], the scores of one more key, whose value is zero

    def only_scales(self, alibi_slopes: Tensor | None) -> bool:
        """Whether scale and the mask are all that attention does to the scores, so that PyTorch's SDPA can compute it.
        Norms and RoPE come before the scores. Unpacking all options makes a new one fail here until it is named, since
        SDPA would ignore it silently."""
        _n_heads, _scale, _window, softcap, _q_norm_weight, _k_norm_weight, _eps, sinks = self
        return not softcap and sinks is None and alibi_slopes is None


class LayerCache(NamedTuple):
    """The keys and values of earlier tokens, in a layer."""

    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]


class PositionTables(NamedTuple):
    """How a layer's attention tells positions apart. Made once for all positions of a KV cache (model.py:
    make_position_tables)."""

    rope: Tensor  # [S or more, D/2, 2] float32: cos and sin of the angles of every position
    alibi_slopes: Tensor | None = None  # [H] float32: slope * (position of key - position of query) is added to scores

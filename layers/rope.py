"""What a model knows about positions: the tables by which RoPE rotates queries and keys, and the slopes of ALiBi.

    rope_tables(config, length, device)    cos and sin of every position's angles: [length, D/2, 2] for each layer
    alibi_slopes(n_heads)                  how fast each head's scores fall with the distance: [n_heads]
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from config import ModelConfig, RopeScaling


def rope_tables(config: ModelConfig, length: int, device: torch.device) -> list[Tensor]:
    """Returns the table of each layer (see rope_table). Layers with the same angles share a table."""
    table = local_table = rope_table(config, length).to(device)  # local_table: for layers with a window
    if config.local_rope_theta is not None:
        local_config = replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
        local_table = rope_table(local_config, length).to(device)
    tables = [local_table if config.window(i) else table for i in range(config.n_layers)]
    if config.layer_has_rope is None:
        return tables
    no_rotation = torch.tensor([1.0, 0.0], device=device).expand_as(table).contiguous()  # cos 0 and sin 0
    return [t if has_rope else no_rotation for t, has_rope in zip(tables, config.layer_has_rope, strict=True)]


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """Returns cos and sin of every position's angles: [length, D/2, 2], float32.

    RoPE rotates the elements i and i + D/2 of a head by angle i. With rotary_dim, RoPE rotates only the first
    rotary_dim / 2 pairs, and the angles of the other pairs are zero."""
    frequencies = rope_frequencies(config, length)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    if config.rope_scaling is not None:
        table *= config.rope_scaling.attention_factor
    n_unrotated = config.head_dim // 2 - len(frequencies)
    unrotated = torch.tensor([1.0, 0.0]).expand(length, n_unrotated, 2)
    return torch.cat([table, unrotated], dim=1)


def depends_on_length(config: ModelConfig) -> bool:
    """Whether rope_frequencies depends on the KV cache's length."""
    return config.rope_scaling is not None and config.rope_scaling.rope_type in ("dynamic", "longrope")


def rope_frequencies(config: ModelConfig, length: int) -> Tensor:
    """Returns the radians per position of each pair of elements: [rotary_dim/2], float32.

    RoPE is arXiv:2104.09864. "llama3" was published with Llama 3.1. "dynamic" and "longrope" depend on the KV cache's
    length."""
    dim = config.rotary_dim or config.head_dim
    theta, scaling = config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    freqs = 1.0 / theta**exponents
    if scaling is None:
        return freqs
    original = scaling.original_max_seq_len
    match scaling.rope_type:
        case "linear":
            return freqs / scaling.factor
        case "dynamic":  # theta grows with the length
            stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
            return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents
        case "longrope":  # arXiv:2402.13753; the checkpoint has a factor for each pair
            factors = scaling.long_factor if length > original else scaling.short_factor
            return freqs / torch.tensor(factors)
        case "yarn":
            ramp = yarn_ramp(scaling, dim, theta)
        case "llama3":
            rotations = original * freqs / (2 * math.pi)  # how often each pair rotates within the trained context
            ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    # ramp 1: the pair rotates often within the trained context, and keeps its frequency.
    # ramp 0: the pair rotates less than about once, and its frequency is divided by factor.
    ramp = ramp.clamp(0, 1)
    return ramp * freqs + (1 - ramp) * freqs / scaling.factor


def yarn_ramp(scaling: RopeScaling, dim: int, theta: float) -> Tensor:
    """Returns YaRN's weight of the trained frequency for each pair: [dim/2] (arXiv:2309.00071).

    The weight falls linearly from 1 to 0. It is 1 at the pair with beta_fast rotations within the trained context, and
    0 at the pair with beta_slow rotations. The caller clamps the weights of the other pairs to 0 ... 1."""

    def pair_with_rotations(n: float) -> float:
        """Returns the index of the pair that rotates n times within the trained context, as a fraction."""
        return dim * math.log(scaling.original_max_seq_len / (n * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return 1 - (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)


def alibi_slopes(n_heads: int) -> Tensor:
    """Returns how much each head's scores fall with every position between query and key (ALiBi: arXiv:2108.12409):
    [n_heads], float32.

    If n_heads is a power of two, the slopes are a geometric series down to 1/256: for 8 heads 1/2, 1/4 ... 1/256.
    Otherwise the first heads have the slopes of the next lower power of two. The other heads have every second slope of
    the next higher power. For 12 heads: the slopes of 8 heads, then slopes 1, 3, 5 and 7 of 16 heads."""
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return torch.tensor(slopes + between[: n_heads - power], device="cpu")  # even where a model is made on meta

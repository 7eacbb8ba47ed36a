"""Positions: the tables by which RoPE rotates queries and keys, and the slopes of ALiBi.

    RopeTables(config, length, device).of_layer(i)    cos and sin of every position's angles, [length, D/2, 2]
    alibi_slopes(n_heads)                             how fast each head's scores fall with the distance
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from config import ModelConfig, RopeScaling


class RopeTables:
    """cos and sin of every position's angles, [length, D/2, 2] float32, for each layer. Layers share them."""

    def __init__(self, config: ModelConfig, length: int, device: torch.device):
        self.config = config
        self.default = rope_table(config, length).to(device)
        self.windowed = self.identity = self.default
        if config.local_rope_theta is not None:
            local_config = replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
            self.windowed = rope_table(local_config, length).to(device)
        if config.layer_has_rope is not None:
            cos, sin = torch.ones_like(self.default[..., 0]), torch.zeros_like(self.default[..., 1])
            self.identity = torch.stack([cos, sin], dim=-1)

    def of_layer(self, i: int) -> Tensor:
        if self.config.layer_has_rope is not None and not self.config.layer_has_rope[i]:
            return self.identity
        return self.windowed if self.config.window(i) else self.default


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """cos and sin of every position's angles: [length, D/2, 2], float32. RoPE rotates the elements i and i + D/2 of a
    head by angle i. If it rotates only some (rotary_dim), the last angles are zero."""
    frequencies = rope_frequencies(config, length)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    if config.rope_scaling is not None:
        table *= config.rope_scaling.attention_factor
    n_unrotated = config.head_dim // 2 - len(frequencies)
    unrotated = torch.tensor([1.0, 0.0]).expand(length, n_unrotated, 2)
    return torch.cat([table, unrotated], dim=1)


def rope_frequencies(config: ModelConfig, length: int) -> Tensor:
    """Radians per position of each pair of elements: [rotary_dim/2], float32 (RoPE: arXiv:2104.09864; "llama3" as
    published with Llama 3.1; "dynamic" and "longrope" depend on the length of the cache)."""
    dim, theta, scaling = config.rotary_dim or config.head_dim, config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    freqs = 1.0 / theta**exponents
    if scaling is None:
        return freqs
    original = scaling.original_max_seq_len
    match scaling.rope_type:
        case "linear":
            return freqs / scaling.factor
        case "dynamic":  # a larger theta, the longer the text is
            stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
            return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents
        case "longrope":  # arXiv:2402.13753: trained factors
            factors = scaling.long_factor if length > original else scaling.short_factor
            return freqs / torch.tensor(factors)
        case "yarn":
            ramp = yarn_ramp(scaling, dim, theta)
        case "llama3":
            rotations = original * freqs / (2 * math.pi)  # within the trained context
            ramp = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    # The result is a mean of the trained frequency and of the same divided by factor; ramp is the weight of the trained
    # one. It is 1 for a pair that rotates many times within the trained context: such a pair keeps its frequency. It is
    # 0 for a pair that does not rotate once.
    ramp = ramp.clamp(0, 1)
    return ramp * freqs + (1 - ramp) * freqs / scaling.factor


def yarn_ramp(scaling: RopeScaling, dim: int, theta: float) -> Tensor:
    """For each pair, YaRN's weight of the trained frequency, before it is clamped to 0 ... 1: [dim/2]
    (arXiv:2309.00071). The weight falls linearly from the pair that rotates beta_fast times in the trained context to
    the one that rotates beta_slow times."""

    def pair_with_rotations(n: float) -> float:
        return dim * math.log(scaling.original_max_seq_len / (n * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return 1 - (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)


def alibi_slopes(n_heads: int) -> list[float]:
    """For each head, how much its scores fall with every position between a query and a key (ALiBi: arXiv:2108.12409).

    If n_heads is a power of two, the slopes are a geometric series down to 1/256: for eight heads 1/2, 1/4 ... 1/256.
    Otherwise the first heads have the slopes of the next lower power of two. The other heads have every second slope of
    the next higher one."""
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
    return slopes + between[: n_heads - power]

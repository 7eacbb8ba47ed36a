"""What tests/test_triton.py compares with: data whose sums are exact, exact results, and how far a kernel may be from
them in Triton's interpreter. The bounds are derived from the arithmetic (tests/bounds.py), for sums in any order.

In exact data x is small integers, norms' weights are powers of two, and weights in 16 or 32 bits multiples of 1/16.
Then nothing is lost to int4's OFFSET either (triton_int4.nibble_pair), and the smallest error in a zero point shows.
"""

import torch

from kernels import reference
from kernels.formats import Dense, Int4
from model import LayerCache, RMSNorm
from tests import bounds
from tests.test_kernels import make

U32 = bounds.U[torch.float32]


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of products' factors: the interpreter has none of bfloat16."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def of_rounding(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of a result y in dtype. The interpreter does not round to bfloat16, it cuts bits off."""
    return bounds.of_rounding(y, dtype) * (2 if dtype == torch.bfloat16 else 1)


# ---- Exact data -----------------------------------------------------------------------------------------------------


def exact_linear(n: int, k: int, format, dtype: torch.dtype, **options):
    """A Linear whose sums with integers are exact in float32, up to int4's last step: scale times a group's sum."""
    w = make(n, k, format, dtype, **options)
    if isinstance(format, Dense):
        w.weight.data = (w.weight.data * 16).round() / 16
    return w


def exact_norm(k: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(k, eps=0.1)  # enough to matter
    norm.weight.data = (2.0 ** torch.randint(-1, 2, (k,))).to(dtype)
    return norm


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


def of_exact_sums(terms: torch.Tensor, k: int, format) -> torch.Tensor:
    """The error of an output in float32, from exact sums: int4 has one for each slice of 32 or more columns, which are
    added up; a few roundings (scale, 1 / rms, bias, residual) follow. terms: the sum of all magnitudes."""
    n_slices = k / 32 if isinstance(format, Int4) else 0
    return (n_slices + 12) * U32 * terms


def of_glu(gate_up: torch.Tensor, error: torch.Tensor, activation="silu") -> tuple[torch.Tensor, torch.Tensor]:
    """activation(gate) * up of a gate_up that is off by no more than error, and how far that may be off. The slope of
    every activation is at most 1.13, and what becomes of up has a slope of at most 1."""
    (gate, up), (gate_error, up_error) = gate_up.chunk(2, -1), error.chunk(2, -1)
    y = reference.glu(gate_up, activation)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
    bound = 1.13 * gate_error * (up.abs() + up_error) + gate.abs() * up_error
    # The exponential is good to 2^-21 or so. The sigmoid's argument is rounded; argument times slope is at most 1/4
    return y, bound + 2**-20 * y.abs() + 2 * U32 * (gate * up).abs()


def of_cap(softcap: float) -> float:
    """The error of softcap * tanh(x / softcap), by a sigmoid."""
    return 2**-20 * softcap


def of_pytorch(terms: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The error of a product by PyTorch's operations, which round the factors, the result, and what they make of it."""
    return ((k + 8) * U32 + 8 * bounds.U[dtype]) * terms


def exact_attention(
    qkv, cache: LayerCache, positions, n_heads: int, window: int, norms, sinks=None, scale=None, softcap=0.0
) -> tuple[torch.Tensor, ...]:
    """The output in float64 of the factors that the kernel multiplies, given the cache before; and its error."""
    (B, T, _), (_, G, S, D), factor = qkv.shape, cache.k.shape, factor_dtype(qkv.dtype)
    scale = D**-0.5 if scale is None else scale
    token_positions = positions[:, None] + torch.arange(T)
    q, k, v = qkv.float().view(B, T, -1, D).split([n_heads, G, G], dim=2)  # [B, T, H or G, D]
    if norms[0] is not None:
        q, k = (reference.norm_heads(t, norm) for t, norm in zip((q, k), norms, strict=True))
    q, k = (reference.apply_rope(t, cache.rope[token_positions]).to(factor) for t in (q, k))
    k_all, v_all = cache.k.double().nan_to_num(), cache.v.double().nan_to_num()  # NaN where no token looks
    rows = torch.arange(B)[:, None]
    k_all[rows, :, token_positions], v_all[rows, :, token_positions] = k.double(), v.double()
    q = q.double().unflatten(2, (G, -1))  # [B, T, G, H / G, D]

    keys = torch.arange(S)
    sees = keys <= token_positions[..., None]
    if window:
        sees &= keys > token_positions[..., None] - window
    scores = torch.einsum("btghd,bgsd->btghs", q, k_all) * scale
    if softcap:
        scores = reference.cap(scores, softcap)
    farthest = 0
    if cache.slopes is not None:
        distances = (token_positions[..., None] - keys).where(sees, 0)  # [B, T, S]
        bias = cache.slopes.double().view(G, -1, 1) * distances[:, :, None, None]
        scores, farthest = scores - bias, bias.max()
    scores = scores.masked_fill(~sees[:, :, None, None], -torch.inf)
    if sinks is not None:
        column = sinks.double().view(G, -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    p = scores.softmax(-1)[..., :S]
    y = torch.einsum("btghs,bgsd->btghd", p, v_all).flatten(2)

    largest_score = torch.einsum("btghd,bgsd->btghs", q.abs(), k_all.abs()).max() * scale
    # Where a rotated element lies next to the border between two roundings, the kernel may take the other: 2 in a score
    flips = 2 * 2 * bounds.U[factor] * q.abs().max() * k_all.abs().max() * scale
    longest_sum = max([D] + [norm.weight.numel() for norm in norms if norm is not None])
    score_error = (longest_sum + 8) * U32 * largest_score + flips + of_cap(softcap) + 4 * U32 * farthest
    # Sums of S numbers, over a sum of S numbers; of weights that are rounded as factors
    relative = torch.expm1(2 * score_error) + 2 * (S + 32) * U32 + bounds.U[factor]
    error = relative * torch.einsum("btghs,bgsd->btghd", p, v_all.abs()).flatten(2)
    return y, error + of_rounding(y.abs() + error, qkv.dtype)

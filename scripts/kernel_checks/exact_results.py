"""Shared by all checks of the kernels: random layers, data whose sums are exact, exact results, and how far a Triton
kernel may be from them, on a GPU or in Triton's interpreter. The bounds are derived from the arithmetic
(error_bounds.py), for sums in any order.

In exact data x is small integers, norms' weights are powers of two, and weights in 16 or 32 bits multiples of 1/16.
Then nothing is lost to int4's magic bias either (kernels/triton/elements.py: int4_pair), and the smallest error in a
zero point shows.

Everything is made on PyTorch's default device: `with torch.device("cuda"):` makes it there.
"""

from typing import NamedTuple

import torch

import kernels
from kernels import reference
from kernels.formats import GROUP_SIZES, MXFP4, Dense, Float8, GroupedInt8, Int4, Int8
from kernels.params import AttentionParams, LayerCache
from layers import Embedding, Linear, RMSNorm
from scripts.kernel_checks import error_bounds as bounds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [Dense(), Int8(), *map(Int4, GROUP_SIZES)]
QUANTIZED = FORMATS[1:]
CPU_FORMATS = [
    Dense(), Int8(), Int4(32), Int4(128, torch.float16), GroupedInt8(8), GroupedInt8(64, torch.float16),
    Float8(), Float8(32), MXFP4(),
]  # fmt: skip
TRITON_FORMATS = [
    *FORMATS, Int4(32, torch.float16), GroupedInt8(16), GroupedInt8(64, torch.float16), Float8(), Float8(32), MXFP4(),
]  # fmt: skip
U32 = bounds.U[torch.float32]
MAGIC_BIASES = {torch.float32: 0, torch.bfloat16: 128, torch.float16: 1024}  # kernels/triton/elements.py: magic_bias


class Comparison(NamedTuple):
    operation: str
    case: str
    ours: torch.Tensor
    exact: torch.Tensor
    bound: torch.Tensor  # how far ours may be from exact, for each element or for all


def is_interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter, which knows bfloat16 only as a type of memory."""
    return torch.get_default_device().type == "cpu"


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type of the factors of a product, for x in dtype."""
    return torch.float32 if dtype == torch.bfloat16 and is_interpreted() else dtype


def triton_rounding_error(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the rounding error of a result y in dtype. Triton's interpreter does not round to bfloat16, but cuts."""
    return bounds.rounding_error(y, dtype) * (2 if dtype == torch.bfloat16 and is_interpreted() else 1)


def format_label(value) -> str:
    """Returns the label of a format, or of any other parameter, in the name of a test."""
    return "dense" if isinstance(value, Dense) else getattr(value, "name", str(value))


# ---- Layers of random weights ---------------------------------------------------------------------------------------


def make_linear(
    n: int, k: int, format, dtype: torch.dtype, n_experts: int | None = None, bias: bool = False, kind=Linear, **options
):
    """Makes a random Linear as in a checkpoint."""
    w = kind(k, n, bias, n_experts, **options)
    torch.nn.init.normal_(w.weight)
    if bias:
        w.set_tensor("bias", torch.randn(w.bias.shape).to(dtype))
    return set_weight(w, w.weight.data.to(dtype), format)


def make_embedding(n: int, k: int, format, dtype: torch.dtype) -> Embedding:
    """Makes a random Embedding as in a checkpoint."""
    return set_weight(Embedding(k, n), torch.randn(n, k).to(dtype), format)


def set_weight(matrix, w: torch.Tensor, format):
    """Makes w the weight of matrix, a Linear or an Embedding, in format."""
    matrix.set_format(format)
    for name, tensor in format.quantize(w).items():
        matrix.set_tensor(name, tensor)
    return matrix


def use_triton(module: torch.nn.Module) -> torch.nn.Module:
    """Switches all linear layers of module to the Triton kernels."""
    linears = [m for m in module.modules() if isinstance(m, Linear)]
    kernels.pack_for_triton(linears)
    assert all(w.backend == "triton" for w in linears)
    return module


def matrix_and_bias(w: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns W [..., N, K] and the bias of a Linear, in float64."""
    bias = torch.zeros(()) if w.bias is None else w.bias
    return w.dequantized_weight(torch.float32).double(), bias.double()


def make_norm(dim: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(dim, 1e-5)
    norm.weight.data = torch.rand(dim).to(dtype)
    return norm


def attend(
    qkv, cache: LayerCache, start_pos, n_heads: int, backend: str, window: int = 0, q_norm=None, k_norm=None,
    sinks=None, scale: float | None = None, **options,
):  # fmt: skip
    """Calls kernels.attend with these options of AttentionParams."""
    scale = scale or cache.k.shape[-1] ** -0.5
    params = AttentionParams(n_heads, scale, window, q_norm=q_norm, k_norm=k_norm, sinks=sinks, **options)
    return kernels.attend(qkv, params, cache, start_pos, backend)


# ---- Exact data -----------------------------------------------------------------------------------------------------


def exact_linear(n: int, k: int, format, dtype: torch.dtype, **options):
    """Makes a Linear whose sums with integers are exact in float32, up to the last step: scale times a group's sum."""
    w = make_linear(n, k, format, dtype, **options)
    if isinstance(format, Dense):
        w.weight.data = (w.weight.data * 16).round() / 16
    return w


def exact_norm(k: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(k, eps=0.1)  # enough to matter
    norm.weight.data = (2.0 ** torch.randint(-1, 2, (k,))).to(dtype)
    return norm


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


def exact_sums_error(terms: torch.Tensor, k: int, format) -> torch.Tensor:
    """Returns the error of an output in float32, from sums that are exact within a slice of 16 or more columns. The
    sums of slices are scaled and added up; a few roundings (1 / rms, bias, residual) follow. float8 has a wider range
    than a sum of float32, so every term may be rounded. terms: the sum of all magnitudes."""
    weight = format.empty(torch.Size([1, k]), torch.float32, "meta")["weight"]
    n_sums = k if weight.dtype == torch.float8_e4m3fn else 0 if format.group_size is None else k / 16
    return (n_sums + 12) * U32 * terms


def exact_product(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | float, norm: RMSNorm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x [..., K], normed by norm, times matrix [..., N, K], plus bias, in float64; and the sum of
    magnitudes."""
    x = x.double() if norm is None else exact_rms_norm(x, norm)
    return x @ matrix.mT + bias, x.abs() @ matrix.abs().mT + abs(bias)


def exact_rms_norm(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """Applies norm to x, in float64."""
    rms = (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return x.double() / rms * norm.weight.double()


def with_residual(y: torch.Tensor, error: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y + residual, and the error of this sum in float32."""
    total = y + residual.double()
    return total, error + U32 * total.abs()


def stored_error(y: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the error of a result that is off by no more than error and then stored in dtype."""
    return error + triton_rounding_error(y.abs() + error, dtype)


def glu_with_error(
    gate_up: torch.Tensor, error: torch.Tensor, activation: str = "swiglu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns activation(gate) * up of a gate_up that is off by no more than error, and how far the product may be off.
    The slope of every activation is at most 1.13, and that of the factor made of up at most 1."""
    (gate, up), (gate_error, up_error) = gate_up.chunk(2, -1), error.chunk(2, -1)
    y, one = reference.glu(gate_up, activation), torch.ones_like(up)
    if activation == "clamped_swiglu":
        gate, up, one = gate.clamp(max=7), up.clamp(-7, 7) + 1, one - 1
    activated = reference.activate(gate, one, activation).abs()
    bound = 1.13 * gate_error * (up.abs() + up_error) + activated * up_error
    # The exponential is good to 2^-21 or so. Rounding the argument z of the sigmoid s changes it by z s (1 - s) < 1/4
    # times some 2^-22. The exact GELU's Phi has an error of 2 u: in C++ its formula's 7.5e-8, in Triton erf's. In C++
    # Phi's tail also has a relative error of up to 27 u: of the polynomial 7 u for its sums and products, 5 u for its
    # rounded coefficients and 7 u for t, and 8 u for the factors.
    relative = 2**-19 if activation == "geglu" else 2**-20
    return y, bound + relative * y.abs() + 2 * U32 * (gate * up).abs()


def exact_stored_glu(
    gate_up: torch.Tensor, error: torch.Tensor, activation: str, dtype: torch.dtype, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns activation(gate) * up stored in dtype, and how far it may be off. If the activation is not fused with the
    product, PyTorch computes it from a stored gate_up, and stores what it computes on the way."""
    if not fused:
        error = stored_error(gate_up, error, dtype)
    y, error = glu_with_error(gate_up, error, activation)
    return y, error + triton_rounding_error(y.abs() + error, dtype) * (1 if fused else 4)


def softcap_error(softcap: float) -> float:
    """Returns the error of softcap * tanh(x / softcap), computed by a sigmoid."""
    return 2**-20 * softcap


def pytorch_error(terms: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the error of a product by PyTorch's operations, which round factors, product, and every later result."""
    return ((k + 8) * U32 + 8 * bounds.U[dtype]) * terms


def attention_factors(
    qkv: torch.Tensor, cache: LayerCache, start_pos: torch.Tensor, n_heads: int, norms, factor: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what the kernel multiplies, in float64: q [B, T, G, H / G, D], and k and v [B, G, S, D] with the new
    tokens. q and k are normed, rotated, and rounded to factor."""
    (B, T, _), (_, G, _, D) = qkv.shape, cache.k.shape
    positions = start_pos[:, None] + torch.arange(T)
    q, k, v = qkv.float().view(B, T, -1, D).split([n_heads, G, G], dim=2)  # [B, T, H or G, D]
    if norms[0] is not None:
        q, k = (reference.norm_heads(t, norm) for t, norm in zip((q, k), norms, strict=True))
    q, k = (reference.apply_rope(t, cache.rope[positions]).to(factor) for t in (q, k))
    k_all, v_all = cache.k.double().nan_to_num(), cache.v.double().nan_to_num()  # NaN where no token looks
    sequences = torch.arange(B)[:, None]
    k_all[sequences, :, positions], v_all[sequences, :, positions] = k.double(), v.double()
    return q.double().unflatten(2, (G, -1)), k_all, v_all


def exact_attention(
    qkv, cache: LayerCache, start_pos, n_heads: int, window: int, norms, sinks=None, scale=None, softcap=0.0,
    factor: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns the output in float64, given the cache before, and how far a kernel may be off. factor: the type of the
    factors of the kernel's products (None: as in the Triton kernels)."""
    (_, T, _), (_, G, S, D), factor = qkv.shape, cache.k.shape, factor or factor_dtype(qkv.dtype)
    scale = D**-0.5 if scale is None else scale
    positions = start_pos[:, None] + torch.arange(T)
    q, k_all, v_all = attention_factors(qkv, cache, start_pos, n_heads, norms, factor)
    keys = torch.arange(S)
    sees = keys <= positions[..., None]
    if window:
        sees &= keys > positions[..., None] - window
    scores = torch.einsum("btghd,bgsd->btghs", q, k_all) * scale
    if softcap:
        scores = reference.apply_softcap(scores, softcap)
    farthest = 0
    if cache.alibi_slopes is not None:
        distances = (positions[..., None] - keys).where(sees, 0)  # [B, T, S]
        bias = cache.alibi_slopes.double().view(G, -1, 1) * distances[:, :, None, None]
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
    score_error = (longest_sum + 8) * U32 * largest_score + flips + softcap_error(softcap) + 4 * U32 * farthest
    # Sums of S numbers, over a sum of S numbers; of weights that are rounded as factors
    relative = torch.expm1(2 * score_error) + 2 * (S + 32) * U32 + bounds.U[factor]
    tiny = torch.finfo(torch.float32).tiny  # below it, a weight may become zero
    error = torch.einsum("btghs,bgsd->btghd", relative * p + tiny, v_all.abs()).flatten(2)
    return y, error + triton_rounding_error(y.abs() + error, qkv.dtype)


def exact_cache(
    qkv, before: LayerCache, start_pos, n_heads: int, norms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the keys and values in the cache afterwards, and how far the keys may be off. New keys may be off by the
    sum of a norm, roundings and a flip; old keys and all values not at all."""
    (B, T, _), (_, G, _, D) = qkv.shape, before.k.shape
    new = torch.arange(B)[:, None], slice(None), start_pos[:, None] + torch.arange(T)
    _, new_k, new_v = qkv.view(B, T, -1, D).split([n_heads, G, G], dim=2)  # [B, T, G, D]
    if norms[1] is not None:
        new_k = reference.norm_heads(new_k, norms[1])
    new_k = reference.apply_rope(new_k, before.rope[new[2]])
    k, v, k_error = before.k.clone(), before.v.clone(), torch.zeros(before.k.shape, dtype=torch.float64)
    k[new], v[new] = new_k, new_v
    relative = (G * D + 8) * U32 + 4 * bounds.U[qkv.dtype]
    k_error[new] = (relative * new_k.double().abs().amax((1, 2, 3), keepdim=True)).expand(new_k.shape)
    return k, v, k_error

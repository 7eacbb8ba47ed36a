"""Makes random layers, data whose sums are exact, and exact results, for all checks of the kernels. Also computes the
bounds of a Triton kernel's error, on a GPU or in Triton's interpreter. error_bounds.py says how bounds are derived.

Sums of exact data are not rounded, so even the smallest error in a zero point shows:

    x                           small integers
    weights of norms            powers of two
    weights of 16 or 32 bits    multiples of 1/16
    weights of Int4             any: sums are exact with the magic bias, too (kernels/triton/elements.py: int4_pair)

All tensors are made on PyTorch's default device. `with torch.device("cuda"):` changes the default device.
"""

import copy
from typing import NamedTuple

import torch

import formats
from formats import GROUP_SIZES, MXFP4, Float8, GroupedInt8, Int4, Int8, Unquantized, WeightFormat
from formats.integers import GroupwiseAffine
from kernels.schema import CLAMPED_SILU_LIMIT, AttentionParams
from layers import attention
from layers.attention import apply_rope, norm_heads
from layers.backend import Backend
from layers.kv_cache import LayerCache
from layers.linear import Linear, LinearBase, RMSNorm, activate_torch, apply_softcap
from layers.packing import pack_for_triton
from scripts.kernel_checks import error_bounds as bounds

CHECKED_FORMATS = [Unquantized(), Int8(), *map(Int4, GROUP_SIZES)]
QUANTIZED = CHECKED_FORMATS[1:]
# The formats that the checks try, for a class with options. Any other class has one format
EXAMPLES = {
    Int4: [Int4(32), Int4(128, torch.float16)],
    GroupedInt8: [GroupedInt8(16), GroupedInt8(64, torch.float16)],
    Float8: [Float8(), Float8(32)],
}
CPU_FORMATS = [format for format_class in formats.FORMATS for format in EXAMPLES.get(format_class) or [format_class()]]
TRITON_FORMATS = [*CHECKED_FORMATS, Int4(32, torch.float16)]
TRITON_FORMATS += [  # a class with a method to_triton_layout has kernels
    format for format in CPU_FORMATS
    if format not in CHECKED_FORMATS and type(format).to_triton_layout is not WeightFormat.to_triton_layout
]
U32 = bounds.U[torch.float32]


class Comparison(NamedTuple):
    operation: str
    case: str
    ours: torch.Tensor
    exact: torch.Tensor
    bound: torch.Tensor  # the largest allowed error, of each element or of all elements


def is_interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter. The interpreter computes bfloat16 in float32."""
    return torch.get_default_device().type == "cpu"


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which a kernel multiplies, for x in dtype."""
    return torch.float32 if dtype == torch.bfloat16 and is_interpreted() else dtype


def triton_rounding_error(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the error of storing a kernel's result y in dtype. Triton's interpreter truncates to bfloat16, and does
    not round."""
    return bounds.rounding_error(y, dtype) * (2 if dtype == torch.bfloat16 and is_interpreted() else 1)


def format_label(value) -> str:
    """Returns the name of a format, or of any other parameter, for the names of tests."""
    return "unquantized" if isinstance(value, Unquantized) else getattr(value, "name", str(value))


# ---- Layers of random weights ---------------------------------------------------------------------------------------


def make_linear(
    n: int, k: int, format, dtype: torch.dtype, bias: bool = False, kind: type[LinearBase] = Linear, **options
):
    """Makes a layer of class kind, not packed for the kernels. Quantizes random weights like quantize.py."""
    w = kind(k, n, bias, **options)
    torch.nn.init.normal_(w.weight)
    if bias:
        w.set_tensor("bias", torch.randn(w.bias.shape).to(dtype))
    return set_weight(w, w.weight.data.to(dtype), format)


def set_weight(matrix, w: torch.Tensor, format):
    """Makes w the weight of matrix, a Linear or an Embedding, in format."""
    matrix.set_format(format)
    for name, tensor in format.quantize(w).items():
        matrix.set_tensor(name, tensor)
    return matrix


def with_activation(w: LinearBase, activation: str, gated: bool) -> LinearBase:
    """Returns a layer of the same tensors, with another activation."""
    w = copy.copy(w)
    w.epilogue = w.epilogue._replace(activation=activation, gated=gated)
    return w


def use_triton(module: torch.nn.Module) -> torch.nn.Module:
    """Switches all linear layers of module to the Triton kernels."""
    linears = [m for m in module.modules() if isinstance(m, LinearBase)]
    pack_for_triton(linears)
    assert all(w.backend.name == "triton" for w in linears)
    return module


def matrix_and_bias(w: LinearBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns W [..., N, K] and the bias of a layer, in float64."""
    bias = torch.zeros(()) if w.bias is None else w.bias
    return w.dequantize(torch.float32).double(), bias.double()


def make_norm(dim: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(dim, 1e-5)
    norm.weight.data = torch.rand(dim).to(dtype)
    return norm


def attend(
    qkv, cache: LayerCache, start_pos, n_heads: int, backend: Backend, window: int = 0, q_norm=None,
    k_norm=None, sinks=None, scale: float | None = None, **options,
):
    """Calls layers/attention.py: attend with AttentionParams of the norms and options."""
    scale = scale or cache.k.shape[-1] ** -0.5
    if q_norm is not None:
        options |= {"q_norm_weight": q_norm.weight, "k_norm_weight": k_norm.weight, "eps": q_norm.eps}
    params = AttentionParams(n_heads, scale, window, sinks=sinks, **options)
    return attention.attend(qkv, params, cache, start_pos, backend)


# ---- Exact data -----------------------------------------------------------------------------------------------------


def exact_linear(n: int, k: int, format, dtype: torch.dtype, **options):
    """Makes a Linear whose products with integers have exact sums in float32. Only the last step is rounded: the
    product of a group's sum with the scale."""
    w = make_linear(n, k, format, dtype, **options)
    if isinstance(format, Unquantized):
        w.weight.data = (w.weight.data * 16).round() / 16
    return w


def exact_norm(k: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(k, eps=0.1)  # so large that a wrong eps shows
    norm.weight.data = (2.0 ** torch.randint(-1, 2, (k,))).to(dtype)
    return norm


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


def exact_sums_error(terms: torch.Tensor, k: int, format) -> torch.Tensor:
    """Returns the error of a float32 output of exact data.

    Sums are exact within a slice of 16 or more columns. The sums of slices are scaled and added up, and a few roundings
    (1 / rms, bias, residual) follow. But every term may be rounded if a format's numbers are not integers of a few
    bits: float8's range is wider than the 24 bits of a float32.

    terms: the sum of all magnitudes."""
    has_exact_sums = isinstance(format, Unquantized | Int8 | GroupwiseAffine | MXFP4)
    n_sums = (0 if format.group_size is None else k / 16) if has_exact_sums else k
    return (n_sums + 12) * U32 * terms


def exact_product(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | float, norm: RMSNorm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x W^T + bias in float64, and the sum of the terms' magnitudes. Norms x [..., K] first, if norm is given.
    matrix: W [..., N, K]."""
    x = x.double() if norm is None else exact_rms_norm(x, norm)
    return x @ matrix.mT + bias, x.abs() @ matrix.abs().mT + abs(bias)


def exact_rms_norm(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """Applies norm to x, in float64."""
    rms = (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return x.double() / rms * norm.weight.double()


def with_residual(y: torch.Tensor, error: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y + residual, and the error of the sum in float32. error: of y."""
    total = y + residual.double()
    return total, error + U32 * total.abs()


def stored_error(y: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the error of y after storing it in dtype. error: of y before."""
    return error + triton_rounding_error(y.abs() + error, dtype)


def activate_with_error(
    x: torch.Tensor, error: torch.Tensor, activation: str, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns layers/linear.py: activate of x, and the error of the result. error: of x. If gated, the product is
    rounded, too. The other factor is up, or clamped_silu's clamp of it: its slope is at most 1."""
    y = activate_torch(x, activation, gated)
    if not gated:
        return y, activation_error(x, error, activation)
    (gate, up), (gate_error, up_error) = x.chunk(2, -1), error.chunk(2, -1)
    if activation == "clamped_silu":
        up = up.clamp(-CLAMPED_SILU_LIMIT, CLAMPED_SILU_LIMIT) + 1
    activated = activate_torch(gate, activation, gated=False).abs()
    bound = activation_error(gate, gate_error, activation) * (up.abs() + up_error) + activated * up_error
    return y, bound + U32 * (y.abs() + bound)


def activation_error(x: torch.Tensor, error: torch.Tensor, activation: str) -> torch.Tensor:
    """Returns the error of an activation of x, without a gate. error: of x.

    An error e of x changes relu2(x) = x^2 by at most 2 x e + e^2. The slope of every other activation is at most
    1.13."""
    if activation == "relu2":
        x = x.clamp(min=0)
        return error * (2 * x + error) + U32 * (x + error) ** 2
    y = activate_torch(x, activation, gated=False)
    if activation == "clamped_silu":
        x = x.clamp(max=CLAMPED_SILU_LIMIT)
    # Relative errors of an activation, with u the unit roundoff of float32:
    #
    #     the exponential             about 2^-21
    #     the sigmoid s's argument z  rounding z changes s by z s (1 - s) < 1/4, times about 2^-22
    #     the exact GELU's Phi        2 u: in C++ 7.5e-8 by the formula, in Triton erf's error
    #     the tail of Phi in C++      up to 27 u: 7 u for the polynomial's sums and products, 5 u for the rounded
    #                                 coefficients, 7 u for t, 8 u for the factors
    relative = 2**-19 if activation == "gelu" else 2**-20
    return 1.13 * error + relative * y.abs() + 2 * U32 * x.abs()


def exact_stored_activation(
    x: torch.Tensor, error: torch.Tensor, activation: str, gated: bool, dtype: torch.dtype, fused: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns layers/linear.py: activate of x, and the error after storing in dtype. x is the result of a matmul. If
    the activation is not fused with it, PyTorch computes the activation of a stored x, and also stores intermediate
    results."""
    if not fused:
        error = stored_error(x, error, dtype)
    y, error = activate_with_error(x, error, activation, gated)
    return y, error + triton_rounding_error(y.abs() + error, dtype) * (1 if fused else 4)


def softcap_error(softcap: float) -> float:
    """Returns the error of softcap * tanh(x / softcap), if tanh is computed from a sigmoid."""
    return 2**-20 * softcap


def pytorch_error(terms: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the error of a matmul by PyTorch's operations. They round factors, product and every later result."""
    return ((k + 8) * U32 + 8 * bounds.U[dtype]) * terms


def attention_factors(
    qkv: torch.Tensor, cache: LayerCache, start_pos: torch.Tensor, n_heads: int, norms, factor: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the tensors that the kernel multiplies, in float64: q [B, T, G, H / G, D], and k and v [B, G, S, D] with
    the new tokens. q and k are normed, rotated, and rounded to the type factor."""
    (B, T, _), (_, G, _, D) = qkv.shape, cache.k.shape
    positions = start_pos[:, None] + torch.arange(T)
    q, k, v = qkv.float().view(B, T, -1, D).split([n_heads, G, G], dim=2)  # [B, T, H or G, D]
    if norms[0] is not None:
        q, k = (norm_heads(t, norm.weight, norm.eps) for t, norm in zip((q, k), norms, strict=True))
    q, k = (apply_rope(t, cache.cos_sin[positions]).to(factor) for t in (q, k))
    k_all, v_all = cache.k.double().nan_to_num(), cache.v.double().nan_to_num()  # NaN where nothing is written yet
    sequences = torch.arange(B)[:, None]
    k_all[sequences, :, positions], v_all[sequences, :, positions] = k.double(), v.double()
    return q.double().unflatten(2, (G, -1)), k_all, v_all


def exact_attention(
    qkv, cache: LayerCache, start_pos, n_heads: int, window: int, norms, sinks=None, scale=None, softcap=0.0,
    alibi_slopes=None, factor: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output of attention in float64, and the error of a kernel. cache: as before the call of the kernel.
    factor: the type in which the kernel multiplies (None: the Triton kernels' type)."""
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
        scores = apply_softcap(scores, softcap)
    farthest = 0
    if alibi_slopes is not None:
        distances = (positions[..., None] - keys).where(sees, 0)  # [B, T, S]
        bias = alibi_slopes.double().view(G, -1, 1) * distances[:, :, None, None]
        scores, farthest = scores - bias, bias.max()
    scores = scores.masked_fill(~sees[:, :, None, None], -torch.inf)
    if sinks is not None:
        column = sinks.double().view(G, -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    p = scores.softmax(-1)[..., :S]
    y = torch.einsum("btghs,bgsd->btghd", p, v_all).flatten(2)

    largest_score = torch.einsum("btghd,bgsd->btghs", q.abs(), k_all.abs()).max() * scale
    # A flip (error_bounds.py): the kernel may round a rotated element to another neighbour. A score has up to 2 flips.
    flips = 2 * 2 * bounds.U[factor] * q.abs().max() * k_all.abs().max() * scale
    longest_sum = max([D] + [norm.weight.numel() for norm in norms if norm is not None])
    score_error = (longest_sum + 8) * U32 * largest_score + flips + softcap_error(softcap) + 4 * U32 * farthest
    # The output is a sum of S products over a sum of S numbers. The softmax's weights are rounded to the type factor.
    relative = torch.expm1(2 * score_error) + 2 * (S + 32) * U32 + bounds.U[factor]
    tiny = torch.finfo(torch.float32).tiny  # a smaller weight may become zero
    error = torch.einsum("btghs,bgsd->btghd", relative * p + tiny, v_all.abs()).flatten(2)
    return y, error + triton_rounding_error(y.abs() + error, qkv.dtype)


def exact_cache(
    qkv, before: LayerCache, start_pos, n_heads: int, norms
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the keys and values in the cache after the step, and the error of the keys. New keys have errors of the
    norm, of rounding and of a flip. Old keys and all values are exact."""
    (B, T, _), (_, G, _, D) = qkv.shape, before.k.shape
    new = torch.arange(B)[:, None], slice(None), start_pos[:, None] + torch.arange(T)
    _, new_k, new_v = qkv.view(B, T, -1, D).split([n_heads, G, G], dim=2)  # [B, T, G, D]
    if norms[1] is not None:
        new_k = norm_heads(new_k, norms[1].weight, norms[1].eps)
    new_k = apply_rope(new_k, before.cos_sin[new[2]])
    k, v, k_error = before.k.clone(), before.v.clone(), torch.zeros(before.k.shape, dtype=torch.float64)
    k[new], v[new] = new_k, new_v
    relative = (G * D + 8) * U32 + 4 * bounds.U[qkv.dtype]
    k_error[new] = (relative * new_k.double().abs().amax((1, 2, 3), keepdim=True)).expand(new_k.shape)
    return k, v, k_error


# ---- Sampling --------------------------------------------------------------------------------------------------------


def kept_tokens(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Whether top_k, top_p and min_p keep each token: bool [B, V], found by sorting. Of tied tokens the first ones are
    kept."""
    scores, order = ((logits.double() - logits.amax(-1, keepdim=True)) / temperature).sort(descending=True, stable=True)
    weights, is_kept = scores.exp(), torch.ones_like(order, dtype=torch.bool)
    if top_k:
        is_kept[:, top_k:] = False
        weights[:, top_k:] = 0
    if top_p < 1:
        before = weights.cumsum(-1) - weights
        is_kept &= (before < top_p * weights.sum(-1, keepdim=True)) | (before == 0)
    is_kept &= weights >= min_p
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)

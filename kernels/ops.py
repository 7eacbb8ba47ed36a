"""The operations that a model is made of. Each calls the kernel of its backend, or does the same in plain PyTorch.

    fused_linear       a matrix product with what comes before and after it, of which each is optional:
                       1. RMSNorm of x   2. x W^T   3. bias   4. activation(gate) * up   5. out_scale   6. softcap
                       7. clip   8. residual
    rms_norm           a norm that no matrix product follows, and the residual after it
    gather_inputs      puts a product's inputs in the order of its weight's columns
    glu, add           an activation or a residual that fused_linear cannot fuse
    embed              looks tokens up in the embedding
    attend             q/k norm, RoPE or ALiBi, cache write, attention over the cache
    route              a router's choice of experts
    experts_gate_up, experts_down      the matrix products with the chosen experts' weights

They are called leaf operations, after the leaves of a call tree: a model calls them to compute anything, and they call
no module. So a step is a list of them, which can be recorded (record.py). Not among them are:

    rotate                  what comes before attention, where PyTorch computes attention itself
    sample                  from logits to token ids, after the model
    has_attention_kernel    whether attend calls a kernel

A backend is "cpu" (C++, kernels/csrc/), "triton" (NVIDIA and AMD GPUs) or "torch" (any device, kernels/reference.py).
Kernels are made for steps of few tokens, of all sequences together: up to MAX_CPU_TOKENS on a CPU, MAX_TRITON_TOKENS on
a GPU. A step with more tokens runs in plain PyTorch.
"""

import torch
from torch import Tensor

from kernels import reference
from kernels.params import AttentionParams, LayerCache, LinearParams, NormParams, WeightMatrix
from kernels.schema import ACTIVATION_IDS, ops_of_backend

MAX_CPU_TOKENS = 64  # that the CPU kernels take; also in csrc/weights.h
MAX_TRITON_TOKENS = 64  # that the Triton kernels take
MAX_TRITON_NEW_TOKENS = 16  # of a sequence, which one program of attention holds in registers
MAX_TRITON_QUERIES = 64  # of a key/value head, likewise
# Kernels compute 16 outputs at a time. To fuse an activation, the gate's and the up projection's outputs, each half of
# out_features, must both be a multiple of 16. Otherwise glu() is a call of its own.
FUSED_GLU_MULTIPLE = 32


def ops_for_tokens(backend: str, n_tokens: int):
    """ops_of_backend; None also if there are no tokens, or more than the kernels take. Then plain PyTorch computes."""
    max_tokens = MAX_CPU_TOKENS if backend == "cpu" else MAX_TRITON_TOKENS
    return ops_of_backend(backend) if 0 < n_tokens <= max_tokens else None


def ops_of_layer(layer: LinearParams, n_tokens: int):
    """ops_for_tokens of layer's backend; None also if PyTorch is faster with so many tokens."""
    return ops_for_tokens(layer.backend, n_tokens) if n_tokens <= layer.max_tokens else None


def fused_linear(
    x: Tensor, layer: LinearParams, norm: NormParams | None = None, residual: Tensor | None = None,
    activation: str | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] -> [..., N], by layer.

    norm: is applied to x first.
    activation: W holds a gate projection and, below it, an up projection; the result is activation(gate) * up,
    [..., N / 2].
    residual: added last, after layer.out_scale, layer.softcap and layer.clip.
    out_dtype: x.dtype (None) or torch.float32."""
    ops = ops_of_layer(layer, count_tokens(x))
    if activation and (ops is None or layer.out_features % FUSED_GLU_MULTIPLE):
        y = glu(fused_linear(x, layer, norm), activation, layer.backend)  # such a layer has no scale, softcap or clip
        return y if residual is None else add(y, residual, layer.backend)
    if ops is None:
        if norm is not None:
            x = rms_norm(x, norm, None, layer.backend)
        return reference.fused_linear(x, layer, residual=residual, out_dtype=out_dtype)
    norm_weight, eps = norm_arguments(norm)
    return ops.fused_linear(
        x.contiguous(), *layer.kernel_arguments(), layer.bias, norm_weight, eps,
        residual=None if residual is None else residual.contiguous(),
        activation=ACTIVATION_IDS[activation],
        out_scale=layer.out_scale,
        softcap=layer.softcap,
        clip=layer.clip,
        float32_out=out_dtype == torch.float32,
    )  # fmt: skip


def glu(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    """[..., 2 F] -> [..., F]: activation(gate) * up."""
    if backend == "cpu" and gate_up.numel():
        return torch.ops.gptfast.glu(gate_up, ACTIVATION_IDS[activation])
    return reference.glu(gate_up, activation)


def add(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """x + y, of the same shape."""
    if backend == "cpu" and x.numel():
        return torch.ops.gptfast.add(x.contiguous(), y.contiguous())
    return x + y


def rms_norm(x: Tensor, norm: NormParams, residual: Tensor | None, backend: str) -> Tensor:
    """[residual +] x / rms(x) * weight over the last dimension."""
    takes_many_tokens = backend == "cpu" and x.numel()
    ops = ops_of_backend("cpu") if takes_many_tokens else ops_for_tokens(backend, count_tokens(x))
    if ops is None:
        return reference.rms_norm(x, norm, residual)
    return ops.rms_norm(x.contiguous(), norm.weight, norm.eps, None if residual is None else residual.contiguous())


def gather_inputs(x: Tensor, input_order: Tensor, backend: str) -> Tensor:
    """x [..., K] -> [..., len(input_order)]: element i is element input_order[i] of x. input_order is int32."""
    ops = ops_for_tokens(backend, count_tokens(x))
    return (ops or reference).gather_inputs(x.contiguous(), input_order)


def embed(tokens: Tensor, table: WeightMatrix, scale: float, dtype: torch.dtype) -> Tensor:
    """tokens [B, T] -> their rows of table [V, dim], times scale: [B, T, dim] in dtype."""
    if table.format.is_quantized:  # only the kernels can read what is packed for them, for however many tokens
        ops = ops_of_backend(table.backend)
    elif table.backend == "cpu":
        ops = ops_for_tokens("cpu", tokens.numel())
    else:  # there is no other kernel for a dense table
        ops = None
    if ops is None:
        return reference.embed(tokens, table, scale, dtype)
    return ops.embed(tokens.contiguous(), *table.kernel_arguments(), table.in_features, dtype, scale)


def attend(qkv: Tensor, params: AttentionParams, cache: LayerCache, start_pos: Tensor, backend: str) -> Tensor:
    """Causal attention of each sequence's T new tokens: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. The new keys and values
    are written to cache, the first at start_pos [B]."""
    batch, n_tokens, _ = qkv.shape
    if not has_attention_kernel(backend, batch, n_tokens, params.n_heads // cache.k.shape[1]):
        q = rope_and_cache(qkv, params, cache, start_pos, backend)
        return reference.cached_attention(q, params, cache, start_pos)
    return ops_of_backend(backend).attend(qkv, start_pos, *cache, *params.kernel_arguments())


def rope_and_cache(qkv: Tensor, params: AttentionParams, cache: LayerCache, start_pos: Tensor, backend: str) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values into the cache. Returns the queries
    [B, T, H, D]."""
    if backend != "cpu" or not qkv.numel():
        return reference.rope_and_cache(qkv, params, cache, start_pos)
    arguments = params.kernel_arguments()
    return torch.ops.gptfast.rope_and_cache(
        qkv.contiguous(), start_pos, cache.k, cache.v, cache.rope, arguments.n_heads, arguments.q_norm_weight,
        arguments.k_norm_weight, arguments.eps,
    )  # fmt: skip


def has_attention_kernel(backend: str, batch: int, n_tokens: int, heads_per_kv_head: int) -> bool:
    """Whether backend has a kernel for n_tokens new tokens in each of batch sequences."""
    if ops_for_tokens(backend, batch * n_tokens) is None:
        return False
    if backend == "cpu":
        return True
    return n_tokens <= MAX_TRITON_NEW_TOKENS and n_tokens * heads_per_kv_head <= MAX_TRITON_QUERIES


def route(
    logits: Tensor, top_k: int, norm_topk_prob: bool, backend: str, n_shared_experts: int = 0
) -> tuple[Tensor, Tensor]:
    """router logits [..., E], float32 -> the top_k experts' (softmax weights, ids), both [..., top_k].
    norm_topk_prob: scale the weights so that they sum to one.

    n_shared_experts: so many more experts, E and following, are used by every token. Then logits are [..., E + 1]. The
    sigmoid of the last one is the weight of each of them, and the results are [..., top_k + n_shared_experts]."""
    ops = ops_for_tokens(backend, count_tokens(logits))
    return (ops or reference).route(logits, top_k, norm_topk_prob, n_shared_experts)


def experts_gate_up(
    x: Tensor, layer: LinearParams, topk_ids: Tensor, norm: NormParams | None = None, activation: str | None = None
) -> Tensor:
    """Every token times the gate and up projections of each of its experts: x [B, T, dim], topk_ids [B, T, top_k] ->
    [B, T, top_k, F]. norm and activation are as in fused_linear."""
    ops = ops_of_layer(layer, count_tokens(x))
    if ops is None:
        return reference.experts_gate_up(x, layer, topk_ids, norm, activation)
    if activation and layer.out_features % FUSED_GLU_MULTIPLE:
        return glu(experts_gate_up(x, layer, topk_ids, norm), activation, layer.backend)
    norm_weight, eps = norm_arguments(norm)
    return ops.experts_gate_up(
        x.contiguous(), *layer.kernel_arguments(), layer.bias, topk_ids, norm_weight, eps,
        activation=ACTIVATION_IDS[activation],
    )  # fmt: skip


def experts_down(
    hidden: Tensor, layer: LinearParams, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Each expert's hidden vector times its down projection, summed over a token's experts with topk_weights
    [B, T, top_k], plus residual: hidden [B, T, top_k, F] -> [B, T, dim]."""
    ops = ops_of_layer(layer, count_tokens(topk_ids))
    if ops is None:
        return reference.experts_down(hidden, layer, topk_ids, topk_weights, residual)
    return ops.experts_down(hidden, *layer.kernel_arguments(), layer.bias, topk_ids, topk_weights, residual)


def sample(logits: Tensor, temperature: float, backend: str) -> Tensor:
    """A token [B] for every row of float32 logits [B, V], drawn with probabilities softmax(logits / temperature), at
    temperature 0 the likeliest; -1 for a row that is not finite. Backend "cpu" has temperature 0 only; sampling.py does
    the same in PyTorch."""
    if backend == "cpu":
        return torch.ops.gptfast.sample(logits.contiguous(), None, temperature)
    noise = None
    if temperature > 0:
        noise = torch.empty_like(logits, dtype=torch.float64).exponential_()
    return torch.ops.gptfast_triton.sample(logits.contiguous(), noise, temperature)


def count_tokens(x: Tensor) -> int:
    """The number of tokens in x [..., width]."""
    return x.numel() // x.shape[-1]


def norm_arguments(norm: NormParams | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)

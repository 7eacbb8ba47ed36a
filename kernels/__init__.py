"""The operations that a model is made of. Each calls the kernel of its backend, or does the same in plain PyTorch.

    linear             [residual +] [clip] [cap] scale * [glu] ([rms_norm] x W^T [+ bias])
    rms_norm           [residual +] a norm that linear cannot fuse, since no matrix product follows it
    glu, add           an activation or a residual that linear cannot fuse
    embed              looks tokens up in the embedding
    attend             q/k norm, RoPE or ALiBi, cache write, attention over the cache
    route              a router's choice of experts
    experts_gate_up, experts_down      the matrix products with the chosen experts' weights

They are called leaf operations. A step that is recorded on a CPU (record.py) calls these and nothing else.

A backend is "cpu" (C++, kernels/csrc/), "triton" (NVIDIA and AMD GPUs) or "torch" (any device, kernels/reference.py).
Kernels are made for decode steps: they take up to MAX_ROWS rows of activations, one for each token. A step with more
tokens runs in plain PyTorch. pack_weights(model) chooses the backend for the model's device, and packs its weights.
"""

import math
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from kernels import cpu, reference
from kernels.formats import QUANTIZE_CHUNK, Dequantized, Format, Tensors
from kernels.schema import ACTIVATIONS
from machine import drop_pages, free_memory, use_huge_pages

MAX_ROWS = 8  # rows of activations that the kernels take; also in csrc/weights.h
MAX_TRITON_QUERIES = 64  # of a key/value head, which one program holds in registers
# Kernels compute 16 outputs at a time. To fuse an activation, gate and up must each have a multiple of 16.
FUSED_GLU_MULTIPLE = 32


def kernels_of(backend: str, n_rows: int):
    """The torch.ops namespace of backend's kernels; None if n_rows rows of activations run in plain PyTorch."""
    if backend == "torch" or not 0 < n_rows <= MAX_ROWS:
        return None
    return torch.ops.gptfast if backend == "cpu" else torch.ops.gptfast_triton


def linear(x: Tensor, w, norm=None, residual=None, activation: str | None = None, out_dtype=None) -> Tensor:
    """x [..., K] -> [..., N], by a model.Linear w.

    norm: a model.RMSNorm that is applied to x first.
    activation: W holds a gate projection and, below it, an up projection; the result is activation(gate) * up,
    [..., N / 2].
    residual: added last, after w.scale, w.softcap and w.clip.
    out_dtype: x.dtype (None) or torch.float32."""
    ops = kernels_of(w.backend, n_rows(x))
    if ops is None:
        return reference.linear(x, w, norm, residual, activation, out_dtype)
    if activation and w.out_features % FUSED_GLU_MULTIPLE:
        y = glu(linear(x, w, norm), activation, w.backend)
        return y if residual is None else add(y, residual, w.backend)
    weight, eps = norm_arguments(norm)
    return ops.linear(
        x.contiguous(), *weight_arguments(w), w.bias, weight, eps,
        residual=None if residual is None else residual.contiguous(),
        activation=ACTIVATIONS[activation],
        scale=w.scale,
        softcap=w.softcap,
        clip=w.clip,
        float32_out=out_dtype == torch.float32,
    )  # fmt: skip


def glu(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    """[..., 2 F] -> [..., F]: activation(gate) * up."""
    if backend == "cpu" and gate_up.numel():
        return torch.ops.gptfast.glu(gate_up, ACTIVATIONS[activation])
    return reference.glu(gate_up, activation)


def add(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """x + y, of the same shape."""
    if backend == "cpu" and x.numel():
        return torch.ops.gptfast.add(x.contiguous(), y.contiguous())
    return x + y


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, backend: str) -> Tensor:
    """[residual +] x / rms(x) * weight over the last dimension."""
    ops = kernels_of(backend, n_rows(x))
    if ops is None:
        return reference.rms_norm(x, weight, eps, residual)
    return ops.rms_norm(x.contiguous(), weight, eps, None if residual is None else residual.contiguous())


def embed(tokens: Tensor, weight: Tensor, scale: float, backend: str) -> Tensor:
    """tokens [B, T] -> their rows of weight [V, dim], times scale: [B, T, dim]."""
    if backend == "cpu" and kernels_of(backend, tokens.numel()):
        return torch.ops.gptfast.embed(tokens.contiguous(), weight, scale)
    return reference.embed(tokens, weight, scale)


def attend(
    qkv: Tensor, cache, positions: Tensor, n_heads: int, backend: str, window: int = 0, q_norm=None, k_norm=None,
    sinks: Tensor | None = None, scale: float | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention of each sequence's T new tokens: qkv [B, T, (H + 2 G) D] -> [B, T, H D].

    cache: a model.LayerCache. The new keys and values are written to it, the first at positions [B]. If it has slopes
    [H], slope * (position of the key - position of the query) is added to the scores, after softcap.
    window: how many tokens a token sees, itself included; 0: all.
    q_norm, k_norm: model.RMSNorms, applied before RoPE to every head, or to all heads together if they are so wide.
    sinks: [H], scores of a key whose value is zero.
    scale: of the scores; None: 1 / sqrt(D).
    softcap: if not 0, scores become softcap * tanh(score / softcap)."""
    batch, n_tokens, _ = qkv.shape
    if not has_attention_kernel(backend, batch, n_tokens, n_heads // cache.k.shape[1]):
        return reference.attend(qkv, cache, positions, n_heads, window, q_norm, k_norm, sinks, scale, softcap)
    q_weight, eps = norm_arguments(q_norm)
    k_weight, _ = norm_arguments(k_norm)
    ops = kernels_of(backend, batch * n_tokens)
    return ops.attend(
        qkv, cache.k, cache.v, positions, cache.rope, q_weight, k_weight, eps, sinks, cache.slopes, n_heads, window,
        scale=cache.k.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
    )  # fmt: skip


def has_attention_kernel(backend: str, batch: int, n_tokens: int, heads_per_kv_head: int) -> bool:
    """Whether backend has a kernel for n_tokens new tokens in each of batch sequences."""
    if kernels_of(backend, batch * n_tokens) is None:
        return False
    return backend == "cpu" or n_tokens * heads_per_kv_head <= MAX_TRITON_QUERIES


def route(logits: Tensor, top_k: int, normalize: bool, backend: str, n_shared: int = 0) -> tuple[Tensor, Tensor]:
    """router logits [..., E], float32 -> the top_k experts' (softmax weights, ids), both [..., top_k]. normalize: scale
    the weights so that they sum to one.

    n_shared: so many more experts, E and following, are used by every token. Then logits are [..., E + 1]. The sigmoid
    of the last one is the weight of each of them, and the results are [..., top_k + n_shared]."""
    ops = kernels_of(backend, n_rows(logits))
    return (ops or reference).route(logits, top_k, normalize, n_shared)


def experts_gate_up(x: Tensor, w, topk_ids: Tensor, norm=None, activation: str | None = None) -> Tensor:
    """Every token times the gate and up projections of each of its experts: x [B, T, dim], topk_ids [B, T, top_k] ->
    [B, T, top_k, F]. norm and activation are as in linear."""
    ops = kernels_of(w.backend, n_rows(x))
    if ops is None:
        return reference.experts_gate_up(x, w, topk_ids, norm, activation)
    if activation and w.out_features % FUSED_GLU_MULTIPLE:
        return glu(experts_gate_up(x, w, topk_ids, norm), activation, w.backend)
    weight, eps = norm_arguments(norm)
    return ops.experts_gate_up(
        x.contiguous(), *weight_arguments(w), w.bias, topk_ids, weight, eps, activation=ACTIVATIONS[activation]
    )


def experts_down(hidden: Tensor, w, topk_ids: Tensor, topk_weights: Tensor, residual=None) -> Tensor:
    """Each expert's hidden vector times its down projection, summed over a token's experts with topk_weights
    [B, T, top_k], plus residual: hidden [B, T, top_k, F] -> [B, T, dim]."""
    ops = kernels_of(w.backend, n_rows(topk_ids))
    if ops is None:
        return reference.experts_down(hidden, w, topk_ids, topk_weights, residual)
    return ops.experts_down(hidden, *weight_arguments(w), w.bias, topk_ids, topk_weights, residual)


def sample(logits: Tensor, temperature: float) -> Tensor:
    """A token [B] for every row of float32 logits [B, V], drawn with probabilities softmax(logits / temperature), at
    temperature 0 the likeliest; -1 for a row that is not finite. In Triton only."""
    noise = None
    if temperature > 0:
        noise = torch.empty_like(logits, dtype=torch.float64).exponential_()
    return torch.ops.gptfast_triton.sample(logits.contiguous(), noise, temperature)


def dequantize(w, dtype: torch.dtype, experts=slice(None)) -> Tensor:
    """The weight of a model.Linear w as a matrix [N, K] in dtype. For a layer of experts: the matrices that experts
    selects, an index, a slice or a tensor of indices."""
    tensors = w.tensors()
    if w.n_experts is not None:
        tensors = {name: t[experts] for name, t in tensors.items()}
    is_matrix = w.n_experts is None or isinstance(experts, int)
    if w.backend == "torch" or w.format.quantization is None:
        return w.format.dequantize(tensors, dtype)
    if is_matrix:
        ops = torch.ops.gptfast if w.backend == "cpu" else torch.ops.gptfast_triton
        weight, scales, zeros = (tensors.get(name) for name in ("weight", "scales", "zeros"))
        return ops.dequantize(weight, scales, zeros, *weight_arguments(w)[3:], w.in_features, dtype)
    return w.format.dequantize(w.format.unpack(tensors, w.backend, w.out_features, w.in_features), dtype)


def n_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def norm_arguments(norm) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)


def weight_arguments(w) -> tuple:
    """The arguments that describe a weight to a kernel; kernels/schema.py: WEIGHT names them."""
    return w.weight, w.scales, w.zeros, w.format.kind, w.out_features, getattr(w.format, "group_size", w.in_features)


# ---- Choosing a backend ---------------------------------------------------------------------------------------------


def pack_weights(model: torch.nn.Module, mapped: bool = False):
    """Switches the linear layers of model to the kernels for its device, if these work here. The weights move to packed
    copies, so an embedding that was tied to the head must be tied again (Transformer.tie_embeddings).

    On a CPU without kernels, quantized weights are dequantized to the dtype of the embedding.

    mapped: the weights lie in a memory-mapped file. Its pages are released as soon as a weight is packed, so that no
    weight is in memory twice."""
    first = next(iter(model.state_dict().values()))
    linears = [m for m in model.modules() if hasattr(m, "backend") and m.backend == "torch"]
    if first.device.type == "cpu" and cpu.build():
        pack_for_cpu(linears, mapped)
    elif first.device.type == "cpu" and first.is_floating_point():
        dequantize_weights([w for w in linears if w.format.quantization], first.dtype, mapped)
    elif first.device.type == "cuda" and triton_runs(first.device):
        pack_for_triton(linears)


def pack_for_cpu(linears: list, mapped: bool):
    """Packs the weights of linears into huge pages, one after the other."""
    memory = cpu.HugePages()
    for w in tqdm(linears, "load", disable=None, leave=False):
        if not w.format.fits_kernels(w.in_features):
            continue
        unpacked = w.tensors()
        for name, packed in w.format.pack(unpacked, "cpu").items():
            w.set_tensor(name, memory.copy(packed))
            if mapped:
                drop_pages(unpacked[name])
        w.backend = "cpu"


def dequantize_weights(linears: list, dtype: torch.dtype, mapped: bool):
    """Replaces the quantized weights of linears by dequantized ones. Otherwise PyTorch would dequantize every matrix
    again for every token, which takes some twenty times as long as to multiply it. If there is no memory for that, says
    so and leaves them as they are."""
    n_bytes = sum(w.out_features * w.in_features * (w.n_experts or 1) for w in linears) * dtype.itemsize
    free = free_memory()
    if n_bytes > free:
        lack = f"dequantized they take {n_bytes / 1e9:.2f} GB, of which {free / 1e9:.2f} are free"
        print(f"every token dequantizes all weights, since {lack}", file=sys.stderr)
        return
    for w in tqdm(linears, "load", disable=None, leave=False):
        quantized = w.tensors()
        w.set_tensor("weight", dequantize_rows(w.format, quantized, w.in_features, dtype))
        w.scales = w.zeros = None
        w.format = Dequantized(w.format.name)
        for tensor in quantized.values() if mapped else ():
            drop_pages(tensor)


def dequantize_rows(format: Format, tensors: Tensors, in_features: int, dtype: torch.dtype) -> Tensor:
    """format.dequantize, a few rows at a time, so that its float32 copies stay in the processor's cache."""
    *outputs, _ = tensors["weight"].shape
    rows = {name: t.flatten(0, len(outputs) - 1) for name, t in tensors.items()}
    w = torch.empty(math.prod(outputs), in_features, dtype=dtype)
    use_huge_pages(w)
    step = max(1, QUANTIZE_CHUNK // in_features)
    for i in range(0, len(w), step):
        w[i : i + step] = format.dequantize({name: t[i : i + step] for name, t in rows.items()}, dtype)
    return w.view(*outputs, in_features)


def pack_for_triton(linears: list):
    from kernels import triton_linear

    for w in linears:
        if triton_linear.supports(w):
            for name, packed in w.format.pack(w.tensors(), "triton").items():
                w.set_tensor(name, packed)
            w.backend = "triton"


def triton_runs(device: torch.device) -> bool:
    """Whether Triton works here. It needs a C compiler and Python.h. If it does not work, prints why."""
    try:
        from kernels import triton_attention, triton_linear, triton_moe, triton_sampling  # noqa: F401  (they register the operations)

        torch.ops.gptfast_triton.route(torch.zeros(1, 2, device=device), 1, True, 0)
        return True
    except Exception as e:  # the driver, the compiler and Triton each raise errors of their own
        why = str(e).partition("\n")[0]
        print(f"Triton does not run here ({why}): running on PyTorch's own, slower operations", file=sys.stderr)
        return False

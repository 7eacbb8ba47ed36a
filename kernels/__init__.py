"""The leaf operations that a model is made of. Each picks the kernel of the weights' backend, or plain PyTorch.

    linear             [residual +] [glu] ([rms_norm] x W^T [+ bias])
    glu, add           what linear fuses, alone
    embed              rows of the embedding
    attend             q/k norm, RoPE, cache write, attention over the cache
    route              a router's choice of experts
    experts_gate_up, experts_down      the products with the chosen experts' weights

A backend is "cpu" (C++, kernels/csrc/), "triton" (NVIDIA and AMD GPUs) or "torch" (anything, kernels/reference.py). The
kernels are for decode steps: they take up to MAX_ROWS rows, and more go to PyTorch's matrix products. enable(model)
chooses the backend for the model's device and packs the weights in the order that it reads.
"""

import sys

import torch
from torch import Tensor
from tqdm import tqdm

from kernels import cpu, reference
from kernels.schema import ACTIVATIONS
from machine import drop_pages

MAX_ROWS = 8  # of activations that the kernels take; csrc/weights.h has it too
GLU_ROWS = 32  # linear fuses an activation if gate and up each have a multiple of 16 rows, so if N % 32 == 0


def kernels_of(backend: str, n_rows: int):
    """The namespace of backend's operations for n_rows rows of activations, or None: PyTorch's."""
    if backend == "torch" or not 0 < n_rows <= MAX_ROWS:
        return None
    return torch.ops.gptfast if backend == "cpu" else torch.ops.gptfast_triton


def linear(x: Tensor, w, norm=None, residual=None, activation: str | None = None, out_dtype=None) -> Tensor:
    """x [..., K] -> [..., N] for a model.Linear w. norm (a model.RMSNorm) is applied to x first. activation: W is a
    gate and an up projection, one above the other, and the result is activation(gate) * up [..., N / 2]. residual is
    added last. out_dtype: x.dtype, or torch.float32."""
    ops = kernels_of(w.backend, n_rows(x))
    if ops is None:
        return reference.linear(x, w, norm, residual, activation, out_dtype)
    if activation and w.out_features % GLU_ROWS:
        y = glu(linear(x, w, norm), activation, w.backend)
        return y if residual is None else add(y, residual, w.backend)
    weight, eps = norm_arguments(norm)
    return ops.linear(
        x.contiguous(), *weight_arguments(w), w.bias, weight, eps,
        residual=None if residual is None else residual.contiguous(),
        activation=ACTIVATIONS[activation],
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


def embed(tokens: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Rows of weight [V, dim] for tokens [B, T]: [B, T, dim]."""
    if backend == "cpu" and kernels_of(backend, tokens.numel()):
        return torch.ops.gptfast.embed(tokens.contiguous(), weight)
    return reference.embed(tokens, weight)


def attend(
    qkv: Tensor, cache, positions: Tensor, n_heads: int, backend: str, window: int = 0, q_norm=None, k_norm=None
) -> Tensor:
    """Attention of T new tokens in each row: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. Their keys and values go into
    cache, a model.LayerCache, at positions [B] and after. Each token sees itself and what is before it; with a window,
    no more than so many tokens. q_norm, k_norm: a model.RMSNorm for every head."""
    batch, n_tokens, _ = qkv.shape
    if not attend_fits(backend, batch, n_tokens, n_heads // cache.k.shape[1]):
        return reference.attend(qkv, cache, positions, n_heads, window, q_norm, k_norm)
    q_weight, eps = norm_arguments(q_norm)
    k_weight, _ = norm_arguments(k_norm)
    ops = kernels_of(backend, batch * n_tokens)
    return ops.attend(qkv, cache.k, cache.v, positions, cache.rope, q_weight, k_weight, eps, n_heads, window)


def attend_fits(backend: str, batch: int, n_tokens: int, heads_per_kv_head: int) -> bool:
    """Whether backend's kernel takes so many tokens."""
    if kernels_of(backend, batch * n_tokens) is None:
        return False
    return backend == "cpu" or n_tokens * heads_per_kv_head <= 64  # Triton: one program holds all queries of a key head


def route(logits: Tensor, top_k: int, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The top_k likeliest experts of router logits [..., E] float32: their softmax weights, made to sum to one if
    normalize, and their ids, both [..., K]."""
    ops = kernels_of(backend, n_rows(logits))
    return (ops or reference).route(logits, top_k, normalize)


def experts_gate_up(x: Tensor, w, topk_ids: Tensor, norm=None, activation: str | None = None) -> Tensor:
    """The first product of every token with its experts: x [B, T, dim], topk_ids [B, T, K] -> [B, T, K, F], with norm
    and activation as in linear."""
    ops = kernels_of(w.backend, n_rows(x))
    if ops is None:
        return reference.experts_gate_up(x, w, topk_ids, norm, activation)
    if activation and w.out_features % GLU_ROWS:
        return glu(experts_gate_up(x, w, topk_ids, norm), activation, w.backend)
    weight, eps = norm_arguments(norm)
    return ops.experts_gate_up(
        x.contiguous(), *weight_arguments(w), topk_ids, weight, eps, activation=ACTIVATIONS[activation]
    )


def experts_down(hidden: Tensor, w, topk_ids: Tensor, topk_weights: Tensor, residual=None) -> Tensor:
    """The second: hidden [B, T, K, F] -> [B, T, dim], each token's sum over its experts, weighted by topk_weights
    [B, T, K], plus residual."""
    ops = kernels_of(w.backend, n_rows(topk_ids))
    if ops is None:
        return reference.experts_down(hidden, w, topk_ids, topk_weights, residual)
    return ops.experts_down(hidden, *weight_arguments(w), topk_ids, topk_weights, residual)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension. In plain PyTorch, so it is no leaf operation: a recorded CPU step
    has its norms in linear."""
    return reference.rms_norm(x, weight, eps)


def dequantize(w, dtype: torch.dtype, experts=slice(None)) -> Tensor:
    """The matrix of a model.Linear w in dtype: [N, K]. Of a stack of experts those in experts, an index or a tensor of
    indices."""
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
    """What the kernels are told of a weight: its tensors, its format, its outputs, how many inputs share a scale."""
    return w.weight, w.scales, w.zeros, w.format.kind, w.out_features, getattr(w.format, "group_size", w.in_features)


# ---- Choosing a backend ---------------------------------------------------------------------------------------------


def enable(model: torch.nn.Module, mapped: bool = False):
    """Puts the linears of model on the kernels for its device, if they can be had. mapped: the weights lie in a
    memory-mapped file, whose pages are let go one by one, so that no weight is in memory twice."""
    device = next(iter(model.state_dict().values())).device
    linears = [m for m in model.modules() if hasattr(m, "backend") and m.backend == "torch"]
    if device.type == "cpu" and cpu.build():
        pack_for_cpu(model, linears, mapped)
    elif device.type == "cuda" and triton_runs(device):
        pack_for_triton(linears)


def pack_for_cpu(model: torch.nn.Module, linears: list, mapped: bool):
    """Packs the linears' weights, one after the other, into huge pages."""
    memory = cpu.HugePages()
    moved = {}  # address of a weight before -> the weight after, for an embedding that is tied to the head
    for w in tqdm(linears, "load", disable=None, leave=False):
        if not w.format.fits_kernels(w.in_features):
            continue
        before = w.tensors()
        for name, packed in w.format.pack(before, "cpu").items():
            moved[before[name].data_ptr()] = w.set_tensor(name, memory.copy(packed))
            if mapped:
                drop_pages(before[name])
        w.backend = "cpu"
    embedding = getattr(model, "tok_embeddings", None)
    if embedding is not None and embedding.weight.data_ptr() in moved:
        embedding.weight = moved[embedding.weight.data_ptr()]


def pack_for_triton(linears: list):
    from kernels import triton_linear

    for w in linears:
        if triton_linear.supports(w):
            for name, packed in w.format.pack(w.tensors(), "triton").items():
                w.set_tensor(name, packed)
            w.backend = "triton"


def triton_runs(device: torch.device) -> bool:
    """Whether Triton works here, which needs a C compiler and Python.h. If not, says so."""
    try:
        from kernels import triton_attention, triton_linear, triton_moe  # noqa: F401  (they register the operations)

        torch.ops.gptfast_triton.route(torch.zeros(1, 2, device=device), 1, True)
        return True
    except Exception as e:  # whatever keeps it from running
        why = str(e).partition("\n")[0]
        print(f"Triton does not run here ({why}): running on PyTorch's own, slower operations", file=sys.stderr)
        return False

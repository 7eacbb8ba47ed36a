"""The operations that a model is made of. Each calls the kernel of its backend, or does the same in plain PyTorch.

    fused_linear       a matrix product with what comes before and after it, of which each is optional:
                       1. RMSNorm of x   2. x W^T   3. bias   4. activation(gate) * up   5. scale   6. softcap
                       7. clip   8. residual
    rms_norm           a norm that no matrix product follows, and the residual after it
    glu, add           an activation or a residual that fused_linear cannot fuse
    embed              looks tokens up in the embedding
    attend             q/k norm, RoPE or ALiBi, cache write, attention over the cache
    route              a router's choice of experts
    experts_gate_up, experts_down      the matrix products with the chosen experts' weights

They are called leaf operations. A step that is recorded on a CPU (record.py) calls these and nothing else.

A backend is "cpu" (C++, kernels/csrc/), "triton" (NVIDIA and AMD GPUs) or "torch" (any device, kernels/reference.py).
Kernels are made for steps of few tokens, of all sequences together: up to MAX_CPU_TOKENS on a CPU, MAX_TRITON_TOKENS on
a GPU. A step with more tokens runs in plain PyTorch. prepare_kernels(model) chooses the backend for the model's device,
and packs its weights.
"""

import math
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from kernels import cpu, reference
from kernels.formats import Dequantized, Tensors, WeightFormat
from kernels.formats.base import QUANTIZE_CHUNK
from kernels.layers import AttentionLayer, LayerCache, LinearLayer, MatrixLayer, NormLayer
from kernels.schema import ACTIVATION_IDS
from machine import drop_pages, free_memory, use_huge_pages

MAX_CPU_TOKENS = 64  # that the CPU kernels take; also in csrc/weights.h
MAX_TRITON_TOKENS = 64  # that the Triton kernels take
MAX_TRITON_NEW_TOKENS = 16  # of a sequence, which one program of attention holds in registers
MAX_TRITON_QUERIES = 64  # of a key/value head, likewise
# Kernels compute 16 outputs at a time. To fuse an activation, the gate's and the up projection's outputs, each half of
# out_features, must both be a multiple of 16. Otherwise glu() is a call of its own.
FUSED_GLU_MULTIPLE = 32


def ops_of_backend(backend: str, n_tokens: int):
    """The torch.ops namespace of backend's kernels; None if n_tokens tokens run in plain PyTorch."""
    if backend == "cpu" and 0 < n_tokens <= MAX_CPU_TOKENS:
        return torch.ops.gptfast
    if backend == "triton" and 0 < n_tokens <= MAX_TRITON_TOKENS:
        return torch.ops.gptfast_triton
    return None


def ops_of_layer(layer: LinearLayer, n_tokens: int, activation: str | None = None):
    """ops_of_backend of layer's backend. None also if PyTorch is faster with so many tokens, or if the kernels lack
    activation."""
    if n_tokens > layer.max_tokens or activation not in ACTIVATION_IDS:
        return None
    return ops_of_backend(layer.backend, n_tokens)


def fused_linear(
    x: Tensor, layer: LinearLayer, norm: NormLayer | None = None, residual: Tensor | None = None,
    activation: str | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] -> [..., N], by layer.

    norm: is applied to x first.
    activation: W holds a gate projection and, below it, an up projection; the result is activation(gate) * up,
    [..., N / 2].
    residual: added last, after layer.scale, layer.softcap and layer.clip.
    out_dtype: x.dtype (None) or torch.float32."""
    ops = ops_of_layer(layer, count_tokens(x), activation)
    if ops is None:
        return reference.fused_linear(x, layer, norm, residual, activation, out_dtype)
    if activation and layer.out_features % FUSED_GLU_MULTIPLE:  # such a layer has no scale, softcap or clip
        y = glu(fused_linear(x, layer, norm), activation, layer.backend)
        return y if residual is None else add(y, residual, layer.backend)
    norm_weight, eps = norm_arguments(norm)
    return ops.fused_linear(
        x.contiguous(), *weight_arguments(layer), layer.bias, norm_weight, eps,
        residual=None if residual is None else residual.contiguous(),
        activation=ACTIVATION_IDS[activation],
        scale=layer.scale,
        softcap=layer.softcap,
        clip=layer.clip,
        float32_out=out_dtype == torch.float32,
    )  # fmt: skip


def glu(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    """[..., 2 F] -> [..., F]: activation(gate) * up."""
    if backend == "cpu" and gate_up.numel() and activation in ACTIVATION_IDS:
        return torch.ops.gptfast.glu(gate_up, ACTIVATION_IDS[activation])
    return reference.glu(gate_up, activation)


def add(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """x + y, of the same shape."""
    if backend == "cpu" and x.numel():
        return torch.ops.gptfast.add(x.contiguous(), y.contiguous())
    return x + y


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, backend: str) -> Tensor:
    """[residual +] x / rms(x) * weight over the last dimension."""
    ops = ops_of_backend(backend, count_tokens(x))
    if ops is None:
        return reference.rms_norm(x, weight, eps, residual)
    return ops.rms_norm(x.contiguous(), weight, eps, None if residual is None else residual.contiguous())


def embed(tokens: Tensor, table: MatrixLayer, scale: float, dtype: torch.dtype) -> Tensor:
    """tokens [B, T] -> their rows of table [V, dim], times scale: [B, T, dim] in dtype."""
    if table.format.quantization:  # only the kernels can read what is packed for them, for however many tokens
        ops = ops_of_backend(table.backend, 1)
    else:
        ops = ops_of_backend(table.backend, tokens.numel()) if table.backend == "cpu" else None
    if ops is None:
        return reference.embed(tokens, table, scale, dtype)
    return ops.embed(tokens.contiguous(), *weight_arguments(table), table.in_features, dtype, scale)


def attend(qkv: Tensor, layer: AttentionLayer, cache: LayerCache, start_pos: Tensor) -> Tensor:
    """Causal attention of each sequence's T new tokens: qkv [B, T, (H + 2 G) D] -> [B, T, H D]. The new keys and values
    are written to cache, the first at start_pos [B]."""
    batch, n_tokens, _ = qkv.shape
    if not has_attention_kernel(layer.backend, batch, n_tokens, layer.n_heads // cache.k.shape[1]):
        return reference.attend(qkv, layer, cache, start_pos)
    q_norm_weight, eps = norm_arguments(layer.q_norm)
    k_norm_weight, _ = norm_arguments(layer.k_norm)
    ops = ops_of_backend(layer.backend, batch * n_tokens)
    return ops.attend(
        qkv, cache.k, cache.v, start_pos, cache.rope, q_norm_weight, k_norm_weight, eps, layer.sinks,
        cache.alibi_slopes, layer.n_heads, layer.window, layer.scale, layer.softcap,
    )  # fmt: skip


def has_attention_kernel(backend: str, batch: int, n_tokens: int, heads_per_kv_head: int) -> bool:
    """Whether backend has a kernel for n_tokens new tokens in each of batch sequences."""
    if ops_of_backend(backend, batch * n_tokens) is None:
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
    ops = ops_of_backend(backend, count_tokens(logits))
    return (ops or reference).route(logits, top_k, norm_topk_prob, n_shared_experts)


def experts_gate_up(
    x: Tensor, layer: LinearLayer, topk_ids: Tensor, norm: NormLayer | None = None, activation: str | None = None
) -> Tensor:
    """Every token times the gate and up projections of each of its experts: x [B, T, dim], topk_ids [B, T, top_k] ->
    [B, T, top_k, F]. norm and activation are as in fused_linear."""
    ops = ops_of_layer(layer, count_tokens(x), activation)
    if ops is None:
        return reference.experts_gate_up(x, layer, topk_ids, norm, activation)
    if activation and layer.out_features % FUSED_GLU_MULTIPLE:
        return glu(experts_gate_up(x, layer, topk_ids, norm), activation, layer.backend)
    norm_weight, eps = norm_arguments(norm)
    return ops.experts_gate_up(
        x.contiguous(), *weight_arguments(layer), layer.bias, topk_ids, norm_weight, eps,
        activation=ACTIVATION_IDS[activation],
    )  # fmt: skip


def experts_down(
    hidden: Tensor, layer: LinearLayer, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Each expert's hidden vector times its down projection, summed over a token's experts with topk_weights
    [B, T, top_k], plus residual: hidden [B, T, top_k, F] -> [B, T, dim]."""
    ops = ops_of_layer(layer, count_tokens(topk_ids))
    if ops is None:
        return reference.experts_down(hidden, layer, topk_ids, topk_weights, residual)
    return ops.experts_down(hidden, *weight_arguments(layer), layer.bias, topk_ids, topk_weights, residual)


def sample(logits: Tensor, temperature: float, backend: str = "triton") -> Tensor:
    """A token [B] for every row of float32 logits [B, V], drawn with probabilities softmax(logits / temperature), at
    temperature 0 the likeliest; -1 for a row that is not finite. Backend "cpu" has temperature 0 only; sampling.py does
    the same in PyTorch."""
    if backend == "cpu":
        return torch.ops.gptfast.sample(logits.contiguous(), None, temperature)
    noise = None
    if temperature > 0:
        noise = torch.empty_like(logits, dtype=torch.float64).exponential_()
    return torch.ops.gptfast_triton.sample(logits.contiguous(), noise, temperature)


def dequantize(layer: LinearLayer, dtype: torch.dtype, experts=slice(None)) -> Tensor:
    """The weight of layer as a matrix [N, K] in dtype. For experts: the matrices that experts
    selects, an index, a slice or a tensor of indices."""
    tensors = layer.tensors()
    if layer.n_experts is not None:
        tensors = {name: t[experts] for name, t in tensors.items()}
    is_matrix = layer.n_experts is None or isinstance(experts, int)
    if layer.backend == "torch" or layer.format.quantization is None:
        return layer.format.dequantize(tensors, dtype)
    if is_matrix:
        ops = torch.ops.gptfast if layer.backend == "cpu" else torch.ops.gptfast_triton
        group_size = layer.format.scale_group_size(layer.in_features)
        return ops.dequantize(
            tensors["weight"], tensors.get("scales"), tensors.get("zeros"), layer.format.format_id,
            layer.out_features, group_size, layer.in_features, dtype,
        )  # fmt: skip
    unpacked = layer.format.unpack(tensors, layer.backend, layer.out_features, layer.in_features)
    return layer.format.dequantize(unpacked, dtype)


def count_tokens(x: Tensor) -> int:
    """The number of tokens in x [..., width]."""
    return x.numel() // x.shape[-1]


def norm_arguments(norm: NormLayer | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)


def weight_arguments(layer: MatrixLayer) -> tuple:
    """The arguments that describe a weight to a kernel; kernels/schema.py: WEIGHT names them."""
    group_size = layer.format.scale_group_size(layer.in_features)
    return layer.weight, layer.scales, layer.zeros, layer.format.format_id, layer.out_features, group_size


# ---- Choosing a backend ---------------------------------------------------------------------------------------------


def prepare_kernels(model: torch.nn.Module, is_mmapped: bool = False):
    """Switches the linear layers of model to the kernels for its device, if these work here. The weights move to packed
    copies, so an embedding that was tied to the head must be tied again (Transformer.prepare_kernels).

    On a CPU, quantized weights for which there are no kernels are dequantized to the dtype of the others.

    is_mmapped: the weights lie in a memory-mapped file. The pages of a weight are released as soon as it is packed,
    so that no weight is in memory twice."""
    device = next(model.parameters()).device
    layers = [layer for layer in model.modules() if hasattr(layer, "in_features") and layer.backend == "torch"]
    layers = list({layer.weight: layer for layer in layers}.values())  # of a tied weight the head, which comes last
    if device.type == "cpu":
        has_kernels = cpu.library() is not None
        fitting = [layer for layer in layers if has_kernels and layer.format.fits_kernels("cpu", layer.in_features)]
        dtypes = [p.dtype for p in model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16)]
        if dtypes:
            without_kernels = [layer for layer in layers if layer.format.quantization and layer not in fitting]
            dequantize_weights(without_kernels, dtypes[0], is_mmapped)
        if has_kernels:
            pack_for_cpu(layers, is_mmapped)
    elif device.type == "cuda" and load_triton_kernels(device):
        pack_for_triton(layers, model.dtype)


def pack_for_cpu(linears: list[MatrixLayer], is_mmapped: bool):
    """Packs the weights of linears into huge pages, one after the other."""
    memory = cpu.HugePages()
    is_quantized = any(layer.format.quantization for layer in linears)
    for layer in tqdm(linears, "load", disable=None, leave=False):
        if not layer.format.fits_kernels("cpu", layer.in_features):
            continue
        layer.backend = "cpu"
        if layer.is_embedding and not layer.format.quantization:  # it may stay in the file: few of its pages are read
            continue
        unpacked = layer.tensors()
        for name, packed in layer.format.pack(unpacked, "cpu").items():
            layer.set_tensor(name, memory.copy(packed))
            if is_mmapped:
                drop_pages(unpacked[name])
        # In a quantized model dense layers, such as routers, take MAX_CPU_TOKENS, too, although PyTorch may be faster:
        # one operation outside the kernels would make the whole step impossible to record.
        layer.max_tokens = MAX_CPU_TOKENS if is_quantized else cpu.max_dense_tokens(layer.weight.dtype)


def dequantize_weights(linears: list[MatrixLayer], dtype: torch.dtype, is_mmapped: bool):
    """Replaces the quantized weights of linears by dequantized ones. Otherwise PyTorch would dequantize every matrix
    again for every token, which takes some twenty times as long as multiplying it. If memory is too small, prints that
    and changes nothing."""
    n_bytes = sum(layer.out_features * layer.in_features * (layer.n_experts or 1) for layer in linears) * dtype.itemsize
    free = free_memory()
    if n_bytes > free:
        lack = f"dequantized they take {n_bytes / 1e9:.2f} GB, of which {free / 1e9:.2f} are free"
        print(f"every token dequantizes all weights, since {lack}", file=sys.stderr)
        return
    for layer in tqdm(linears, "load", disable=None, leave=False):
        quantized = layer.tensors()
        layer.set_tensor("weight", dequantize_rows(layer.format, quantized, layer.in_features, dtype))
        layer.scales = layer.zeros = None
        layer.format = Dequantized(layer.format.name)
        for tensor in quantized.values() if is_mmapped else ():
            drop_pages(tensor)


def dequantize_rows(format: WeightFormat, tensors: Tensors, in_features: int, dtype: torch.dtype) -> Tensor:
    """format.dequantize, a few rows at a time, so that its float32 copies stay in the processor's cache."""
    *outputs, _ = tensors["weight"].shape
    rows = {name: t.flatten(0, len(outputs) - 1) for name, t in tensors.items()}
    weight = torch.empty(math.prod(outputs), in_features, dtype=dtype)
    use_huge_pages(weight)
    step = max(1, QUANTIZE_CHUNK // in_features)
    for i in range(0, len(weight), step):
        weight[i : i + step] = format.dequantize({name: t[i : i + step] for name, t in rows.items()}, dtype)
    return weight.view(*outputs, in_features)


def pack_for_triton(linears: list[MatrixLayer], dtype: torch.dtype = torch.bfloat16):
    """dtype: of the activations. Without matrix units PyTorch is faster with more than a few tokens."""
    from kernels.triton.formats import supports
    from kernels.triton.launch import FEW_TOKENS, min_block_m_of

    for layer in linears:
        if supports(layer):
            for name, packed in layer.format.pack(layer.tensors(), "triton").items():
                layer.set_tensor(name, packed)
            has_matrix_units = min_block_m_of(layer.weight.new_empty(0, dtype=dtype)) > 1
            layer.max_tokens = MAX_TRITON_TOKENS if has_matrix_units else FEW_TOKENS
            layer.backend = "triton"


def load_triton_kernels(device: torch.device) -> bool:
    """Whether Triton works here. It needs a C compiler and Python.h. If it does not work, prints why."""
    try:
        from kernels.triton import attention, linear, moe, sampling  # noqa: F401  (they register the operations)

        torch.ops.gptfast_triton.route(torch.zeros(1, 2, device=device), 1, True, 0)
        return True
    except Exception as e:  # the driver, the compiler and Triton each raise errors of their own
        why = str(e).partition("\n")[0]
        print(f"Triton does not run here ({why}): running on PyTorch's own, slower operations", file=sys.stderr)
        return False

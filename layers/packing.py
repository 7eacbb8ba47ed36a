"""Chooses the backend of a model by its device, and packs the weights for the kernels of the backend.

    pack_model     for all layers of a model. A layer without kernels keeps TORCH_BACKEND
    can_capture    whether all operations of a step have kernels
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from formats import Tensors, Unquantized, WeightFormat
from formats.base import CHUNK_ELEMENTS
from formats.cpu_layouts import ACT_GROUP_SIZE
from kernels import build
from layers import aten
from layers.backend import TORCH_BACKEND, cpu_backend, triton_backend
from layers.linear import LinearBase, RMSNorm
from layers.weight import WeightMatrix
from utils.machine import drop_pages, free_memory, use_huge_pages


def pack_model(model: nn.Module, is_mmapped: bool = False):
    """Switches a Transformer to the kernels of its device. is_mmapped: see pack_weights."""
    pack_weights([module for module in model.modules() if isinstance(module, WeightMatrix)], model.dtype, is_mmapped)
    for module in model.modules():
        if isinstance(module, RMSNorm):  # has nothing to pack: if the head has kernels, so do norms
            module.backend = model.lm_head.backend


def can_capture(model: nn.Module, batch_size: int, query_len: int) -> bool:
    """Whether a step of query_len new tokens in each of batch_size sequences of a Transformer can be captured: all
    operations have kernels, on one backend."""
    matrices = [module for module in model.modules() if isinstance(module, LinearBase)]
    if model.embed_tokens.format.is_quantized:  # an unquantized embedding can always be captured
        matrices.append(model.embed_tokens)
    backend = model.lm_head.backend
    attention = model.layers[0].attention  # all layers have the same numbers of heads
    heads_per_kv_head = attention.n_heads // attention.n_kv_heads
    all_on_one_backend = all(matrix.backend.name == backend.name for matrix in matrices)
    return all_on_one_backend and backend.supports_step(
        batch_size, query_len, heads_per_kv_head, model.config.activation
    )


def pack_weights(matrices: Sequence[WeightMatrix], dtype: torch.dtype, is_mmapped: bool = False):
    """Packs the weights of matrices for the kernels of the device, if kernels work here. Packed copies replace the
    weights, so no two matrices may share a weight. On a CPU without a C++ compiler, PyTorch's own kernels take some
    quantized weights (aten.py). Quantized weights without any kernel are dequantized to dtype.

    matrices: all matrices of a model.
    dtype: of the activations.
    is_mmapped: whether the weights are in a memory-mapped file. Then packing a weight releases its pages, because no
    weight should be in memory twice."""
    matrices = [matrix for matrix in matrices if matrix.backend.name == TORCH_BACKEND.name]
    device = matrices[0].weight.device if matrices else torch.device("cpu")
    if device.type == "cpu":
        if build.load_cpp_kernels() is None:
            with_kernel = pack_for_aten(matrices, dtype)
            dequantize_weights([m for m in matrices if m not in with_kernel], dtype, is_mmapped)
        else:
            dequantize_weights([m for m in matrices if not cpu_kernels_can_read(m)], dtype, is_mmapped)
            pack_for_cpu([m for m in matrices if cpu_kernels_can_read(m)], dtype, is_mmapped)
    elif device.type == "cuda" and load_triton_kernels(device):
        pack_for_triton(matrices, dtype)


def pack_for_cpu(matrices: list[WeightMatrix], dtype: torch.dtype, is_mmapped: bool):
    """Packs the weights of matrices into huge pages, one weight behind the other."""
    memory = HugePageArena()
    model_is_quantized = any(matrix.format.is_quantized for matrix in matrices)
    # Packing bf16 speeds up multi-token steps, but PyTorch cannot read packed weights. So pack only where prefill also
    # runs in our kernels: linear layers, not experts.
    packs_unquantized = dtype == torch.bfloat16 and build.load_cpp_kernels().has_prefill_linear(True)
    for matrix in tqdm(matrices, "load", disable=None, leave=False):
        matrix.backend = cpu_backend(dtype, matrix.format, model_is_quantized)
        if matrix.is_embedding and not matrix.format.is_quantized:  # stays in the file: a step reads few rows
            continue
        unpacked = matrix.tensors()
        is_even_linear = matrix.n_experts is None and matrix.in_features % 2 == 0
        matrix.is_packed = matrix.format.is_quantized or (packs_unquantized and is_even_linear)
        tensors = matrix.format.to_cpu_layout(unpacked) if matrix.is_packed else unpacked
        for name, packed in tensors.items():
            matrix.set_tensor(name, memory.copy_in(packed))
            if is_mmapped:
                drop_pages(unpacked[name])


def cpu_kernels_can_read(matrix: WeightMatrix) -> bool:
    """Whether the C++ kernels have a struct for the format of matrix, and the layout fits. If the kernels round
    activations to int8, no group of activations may span two groups of weights. That happens only in a shard whose
    width is an odd multiple of 8."""
    format, library = matrix.format, build.load_cpp_kernels()
    has_struct = type(format).__name__ in build.cpp_formats(library)
    has_whole_groups = format.group_size is None or format.group_size % ACT_GROUP_SIZE == 0
    fits = has_whole_groups or not build.quantizes_activations(library, format)
    return has_struct and fits and format.kernels_can_read(matrix.in_features)


class HugePageArena:
    """Memory in huge pages for weights. Small pages would cost time by TLB misses."""

    MIN_ALLOCATION = 2**26  # bytes of a chunk; a chunk for a larger tensor is larger
    PAGE_BYTES = 2**21
    ALIGNMENT = 64  # a cache line

    def __init__(self):
        self.memory, self.used = torch.empty(0, dtype=torch.uint8), 0  # the current chunk, and how many bytes are used

    def copy_in(self, t: Tensor) -> Tensor:
        """Copies t to the next free address, in a new chunk if the current one is full. Returns the copy."""
        if self.used + t.nbytes > self.memory.numel():
            self.memory = torch.empty(max(t.nbytes, self.MIN_ALLOCATION) + 2 * self.PAGE_BYTES, dtype=torch.uint8)
            self.used = -self.memory.data_ptr() % self.PAGE_BYTES  # begins at a page
            use_huge_pages(self.memory[self.used :])
        copy = self.memory[self.used : self.used + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        self.used += math.ceil(t.nbytes / self.ALIGNMENT) * self.ALIGNMENT
        return copy


def pack_for_aten(matrices: list[WeightMatrix], dtype: torch.dtype) -> list[WeightMatrix]:
    """Packs the weights of linear layers for PyTorch's own kernels. Returns the layers whose weights have a kernel."""
    linears = [m for m in matrices if not m.is_embedding and m.n_experts is None]
    for linear in tqdm(linears, "load", disable=None, leave=False):
        linear.aten_weight = aten.to_aten_weight(linear.format, linear.tensors(), dtype)
    return [linear for linear in linears if linear.aten_weight is not None]


def dequantize_weights(matrices: list[WeightMatrix], dtype: torch.dtype, is_mmapped: bool):
    """Dequantizes the quantized weights of matrices. Otherwise PyTorch would dequantize every matrix for every token,
    which takes twenty times as long as the matmul. If memory is too small, prints a line and changes nothing."""
    matrices = [matrix for matrix in matrices if matrix.format.is_quantized]
    n_bytes = sum(m.out_features * m.in_features * (m.n_experts or 1) for m in matrices) * dtype.itemsize
    free = free_memory()
    if n_bytes > free:
        lack = f"dequantized they take {n_bytes / 1e9:.2f} GB, of which {free / 1e9:.2f} are free"
        print(f"every token dequantizes all weights, since {lack}", file=sys.stderr)
        return
    for matrix in tqdm(matrices, "load", disable=None, leave=False):
        quantized = matrix.tensors()
        matrix.set_tensor("weight", dequantize_rows(matrix.format, quantized, matrix.in_features, dtype))
        matrix.scales = matrix.zeros = None
        matrix.format = Unquantized()
        for tensor in quantized.values() if is_mmapped else ():
            drop_pages(tensor)


def dequantize_rows(format: WeightFormat, tensors: Tensors, in_features: int, dtype: torch.dtype) -> Tensor:
    """format.dequantize, a few rows at a time, to keep the float32 copies in the CPU's cache."""
    *outputs, _ = tensors["weight"].shape
    rows = {name: t.flatten(0, len(outputs) - 1) for name, t in tensors.items()}
    weight = torch.empty(math.prod(outputs), in_features, dtype=dtype)
    use_huge_pages(weight)
    chunk = max(1, CHUNK_ELEMENTS // in_features)
    for i in range(0, len(weight), chunk):
        weight[i : i + chunk] = format.dequantize({name: t[i : i + chunk] for name, t in rows.items()}, dtype)
    return weight.view(*outputs, in_features)


def pack_for_triton(matrices: list[WeightMatrix], dtype: torch.dtype = torch.bfloat16):
    """dtype: of the activations."""
    from kernels.triton.formats import triton_kernels_can_read

    for matrix in matrices:
        is_experts = matrix.n_experts is not None
        if triton_kernels_can_read(matrix.format, matrix.out_features, matrix.in_features, is_experts):
            for name, packed in matrix.format.to_triton_layout(matrix.tensors()).items():
                matrix.set_tensor(name, packed)
            matrix.is_packed = matrix.format.is_quantized
            matrix.backend = triton_backend(dtype, matrix.weight.device)


def load_triton_kernels(device: torch.device) -> bool:
    """Whether Triton, which needs a C compiler and Python.h, works here. If Triton does not work, prints why."""
    try:
        from kernels.triton import attention, linear, moe, sampling  # noqa: F401  (they register the operations)

        torch.ops.gptfast_triton.route(
            torch.zeros(1, 2, device=device), top_k=1, norm_topk_prob=True, n_shared_experts=0
        )
        return True
    except Exception as e:  # the driver, the compiler and Triton each raise errors of their own
        why = str(e).partition("\n")[0]
        print(f"Triton does not run here ({why}): running on PyTorch's own, slower operations", file=sys.stderr)
        return False

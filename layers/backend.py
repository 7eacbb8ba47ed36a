"""The backends: which operations have kernels, and for how many tokens. A layer asks its backend at every step, since a
kernel for few tokens is slow for many tokens, or cannot take many tokens.

    CPU_BACKEND       C++, kernels/csrc/, for CPUs
    TRITON_BACKEND    Triton, kernels/triton/, for NVIDIA's and AMD's GPUs
    TORCH_BACKEND     no kernels: plain PyTorch, for any device. On a CPU without a C++ compiler, aten.py
                      multiplies some quantized weights by PyTorch's own kernels

Every layer holds a backend: TORCH_BACKEND, until packing.py packs the weights for another backend.

The backends compute the same functions, but round differently. With activations of 16 bits:

    TORCH_BACKEND     A quantized weight is rounded to 16 bits before the matmul (but see aten.py), and the result of
                      every step of an operation is rounded.
    kernels           Most steps of an operation stay float32, and only the last result is rounded. Exceptions:
    CPU_BACKEND       A matmul with Int8, Int4, GroupedInt8 or MXFP4 rounds x, after the norm, to int8, in groups of 16
                      with a scale each (kernels/csrc/prologue.h: quantize_token). AMX (kernels/csrc/amx.h) and,
                      in prefill, PyTorch do not round x, but weights to bfloat16. A norm rounds x / rms(x), and
                      then multiplies with the norm's weight, as PyTorch does.
    TRITON_BACKEND    A fused norm rounds x * weight to 16 bits, and divides by rms(x) after the matmul
                      (kernels/triton/linear.py: fused_linear_kernel). For many tokens the norm is a separate kernel.

With activations of 32 bits only the order of sums, the place of the division by rms(x), and the last bits of functions
such as exp differ. scripts/kernel_checks/ has the bounds of the errors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from config import ACTIVATIONS
from formats import WeightFormat
from kernels import build
from kernels.schema import (
    CAPTURABLE,
    CPU_FILTERS,
    CPU_NAMESPACE,
    MAX_CPU_TOKENS,
    MAX_TRITON_QUERIES,
    MAX_TRITON_QUERY_LEN,
    MAX_TRITON_TOKENS,
    TRITON_FILTERS,
    TRITON_NAMESPACE,
)
from kernels.triton import TRITON_ACTIVATIONS

MATMULS = ("fused_linear", "experts_gate_up", "experts_down")
TRITON_OPERATIONS = ("rms_norm", "permute_inputs", "attend", "route", *MATMULS)  # those with a limit of tokens


@dataclass(frozen=True, eq=False)
class Backend:
    """CPU_BACKEND, TRITON_BACKEND or TORCH_BACKEND, with the limits of a model. The limits depend on the weights and on
    the machine (cpu_backend, triton_backend).

    name: "cpu", "triton" or "torch", whatever the limits.
    namespace: torch.ops.NAMESPACE has the kernels; None: there are none.
    token_limits: operation -> the largest step that the kernel takes, in tokens of all sequences. Plain PyTorch
    computes larger steps, and operations without an entry.
    required_in_graph: the operations that need a kernel in a captured step. A CPU graph can hold nothing but kernels. A
    CUDA graph can also hold PyTorch's operations: activate, add, and embed of unquantized weights.
    max_query_len, max_queries: further limits of attend: new tokens of a sequence; new tokens times query heads of a
    key/value head.
    activations: the activations that the kernels compute. Plain PyTorch computes other activations, after the kernel
    of the matmul.
    filters: the fields of TokenFilters that the kernel of sample uses."""

    name: str
    namespace: str | None = None
    token_limits: dict[str, float] = field(default_factory=dict)
    required_in_graph: frozenset[str] = frozenset()
    max_query_len: float = math.inf
    max_queries: float = math.inf
    activations: frozenset[str] = frozenset()
    filters: frozenset[str] = frozenset()

    def kernel_for(self, name: str, n_tokens: int) -> Callable | None:
        """The kernel of the operation called name, for a step of n_tokens tokens of all sequences, or None if plain
        PyTorch computes the step.

        Kernels are called like their operation: "attend" is attend in kernels/csrc/ops.cpp and in
        kernels/triton/attention.py. kernels/schema.py declares it for both, as empty_attend."""
        return self.op(name) if 0 < n_tokens <= self.token_limits.get(name, 0) else None

    def supports_queries(self, query_len: int, heads_per_kv_head: int) -> bool:
        """The further limits of attend: query_len new tokens of each sequence, query heads of a key/value head."""
        return query_len <= self.max_query_len and query_len * heads_per_kv_head <= self.max_queries

    def op(self, name: str) -> Callable:
        """The kernel of an operation that has no limit of tokens, such as dequantize: only this kernel reads a packed
        weight. Raises RuntimeError if the backend has no kernels."""
        if self.namespace is None:
            raise RuntimeError(f"the backend {self.name!r} has no kernels, so none for {name}")
        return getattr(getattr(torch.ops, self.namespace), name)

    def supports_step(self, batch_size: int, query_len: int, heads_per_kv_head: int, activation: str) -> bool:
        """Whether a step of query_len tokens in each of batch_size sequences can be captured: every operation in
        required_in_graph has a kernel for it.

        heads_per_kv_head, activation: those of the model."""
        if self.namespace is None:
            return False
        n_tokens = batch_size * query_len
        has_kernels = all(self.kernel_for(name, n_tokens) is not None for name in self.required_in_graph)
        has_activation = activation in self.activations or "activate" not in self.required_in_graph
        return has_kernels and has_activation and self.supports_queries(query_len, heads_per_kv_head)

    def with_limits(self, **token_limits: float) -> "Backend":
        """This backend with other limits, by operation."""
        return replace(self, token_limits=self.token_limits | token_limits)


TORCH_BACKEND = Backend("torch")
CPU_BACKEND = Backend(
    "cpu",
    CPU_NAMESPACE,
    # The second group is elementwise or per token, so any number of tokens is fine
    dict.fromkeys(["embed", "attend", "route", *MATMULS], MAX_CPU_TOKENS)
    | dict.fromkeys(["rms_norm", "activate", "add", "rope_and_cache", "permute_inputs"], math.inf),
    required_in_graph=frozenset(CAPTURABLE),
    activations=frozenset(ACTIVATIONS),  # cpu_backend leaves out those without C++ code
    filters=frozenset(CPU_FILTERS),
)
TRITON_BACKEND = Backend(
    "triton",
    TRITON_NAMESPACE,
    dict.fromkeys(TRITON_OPERATIONS, MAX_TRITON_TOKENS),
    required_in_graph=frozenset(TRITON_OPERATIONS),
    max_query_len=MAX_TRITON_QUERY_LEN,
    max_queries=MAX_TRITON_QUERIES,
    activations=frozenset(TRITON_ACTIVATIONS),
    filters=frozenset(TRITON_FILTERS),
)


def cpu_backend(dtype: torch.dtype, format: WeightFormat, is_quantized: bool) -> Backend:
    """CPU_BACKEND with the limits of a weight on this machine.

    dtype: the dtype of the activations.
    format: the format of the weight.
    is_quantized: whether any weight of the model is quantized. If so, kernels also multiply with unquantized weights,
    such as those of routers, up to MAX_CPU_TOKENS. PyTorch would be faster, but would keep the step from being
    captured."""
    library, is_bf16, limits = build.load_cpp_kernels(), dtype == torch.bfloat16, {}
    if not is_quantized:  # with more tokens PyTorch multiplies faster
        limits |= dict.fromkeys(MATMULS, library.max_unquantized_tokens(is_bf16))
    # Prompts, where kernels are faster than PyTorch: those of decode, or kernels of their own (csrc/prefill_*.h)
    if build.quantizes_activations(library, format) and dtype.itemsize == 2 and library.has_quantized_prefill():
        limits |= dict.fromkeys(MATMULS, math.inf)
    elif library.has_prefill_linear(is_bf16):
        limits["fused_linear"] = math.inf
    if library.has_prefill_attention(is_bf16):
        limits["attend"] = math.inf
    return replace(CPU_BACKEND.with_limits(**limits), activations=frozenset(build.cpp_activations(library)))


def triton_backend(dtype: torch.dtype, device: torch.device) -> Backend:
    """TRITON_BACKEND with the limits of a model whose activations have this dtype, on this device. Without tensor cores
    the matmuls take up to MMA_N tokens, since PyTorch is faster with more."""
    from kernels.triton.launch import MMA_N, uses_tensor_cores  # here, since not every machine has Triton

    if uses_tensor_cores(device, dtype):
        return TRITON_BACKEND
    return TRITON_BACKEND.with_limits(**dict.fromkeys(MATMULS, MMA_N))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def count_tokens(x: Tensor) -> int:
    """The number of tokens in x [..., width], of all sequences together."""
    return x.numel() // x.shape[-1]

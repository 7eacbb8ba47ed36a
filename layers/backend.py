"""The backends: which code computes an operation. A layer asks its backend at every step, because a kernel for few
tokens is slow for many tokens, or cannot take them.

    CPU_BACKEND       C++, kernels/csrc/, for CPUs
    TRITON_BACKEND    Triton, kernels/triton/, for NVIDIA's and AMD's GPUs
    TORCH_BACKEND     plain PyTorch, for any device; aten.py on a CPU without a C++ compiler

Tables of what computes an operation. [n] means up to n tokens of all sequences, dot_quantized is a file of
kernels/csrc/, and of the lines for fused_linear the first that fits holds.

    fused_linear on a CPU
    CPU, activations              weights
    AMX, bf16                     Unquantized                    dot_unquantized [4]     amx [64]    PyTorch
                                  Float8                         dot_quantized [2]       amx [64]    PyTorch
                                  Int8 Int4 GroupedInt8 MXFP4    dot_quantized [8]       amx [64]    PyTorch
    AVX512_BF16, bf16             Unquantized                    dot_unquantized [64]    prefill_linear
                                  Float8                         dot_quantized [64]      prefill_linear
    AVX2, no AMX, bf16 or fp16    Int8 Int4 GroupedInt8 MXFP4    dot_quantized
    any                           Unquantized                    dot_unquantized [64]    PyTorch
                                  quantized                      dot_quantized [64]      PyTorch

In the line "any", an unquantized model has smaller limits: [32] in fp16 and fp32, and [8] without AVX-512. Experts use
only the two files dot_*, within the same limits. The other operations:

    CPU    attend                                     attention [64]    prefill_attention with AVX-512, but not for
                                                                        bf16 with AMX; otherwise PyTorch
           route, embed                               C++ [64]          PyTorch; C++ for a packed embedding
           rms_norm, activate, add, permute_inputs    C++
    GPU    matmuls                                    Triton [64]; [8] without tensor cores    PyTorch
           attend, route, rms_norm, permute_inputs    Triton [64]       PyTorch
           activate, add, embed                       PyTorch; Triton for a packed embedding

With activations of 16 bits, PyTorch rounds the result of every step, and the dequantized weights of a matmul (but see
aten.py). Kernels compute in float32 and round the last result, with these exceptions:

    dot_quantized             x becomes int8, in groups of 16 with a scale each; not for Float8
    amx, prefill_linear       dequantized weights become bf16
    a norm in C++             x / rms(x) is rounded before the multiplication with weight, as in PyTorch
    a fused norm in Triton    x * weight is rounded, and rms(x) divides the result of the matmul

With activations of 32 bits, only the order of sums and the last bits of functions such as exp differ.
scripts/kernel_checks/ has the bounds of all errors.
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
    """Says for a weight which operations have kernels, and for up to how many tokens. Every layer holds one. The three
    constants below are templates; cpu_backend and triton_backend fill in the limits of the weight and of the machine.

    name: "cpu", "triton" or "torch", whatever the limits.
    namespace: torch.ops.NAMESPACE has the kernels; None if there are none.
    token_limits: operation -> the largest num_tokens of its kernel. Without an entry, PyTorch computes the operation.
    required_in_graph: the operations that need a kernel in a captured step. A CPU graph can hold nothing but kernels. A
    CUDA graph can also hold PyTorch's operations.
    max_query_len, max_queries: limits of attend: query_len, and query_len times the query heads of a key/value head.
    activations: those of the kernels. PyTorch computes others, after the kernel of the matmul.
    filters: the fields of TokenFilters that the kernel of sample uses."""

    name: str
    namespace: str | None = None
    token_limits: dict[str, float] = field(default_factory=dict)
    required_in_graph: frozenset[str] = frozenset()
    max_query_len: float = math.inf
    max_queries: float = math.inf
    activations: frozenset[str] = frozenset()
    filters: frozenset[str] = frozenset()

    def kernel_for(self, name: str, num_tokens: int) -> Callable | None:
        """The kernel for a step of num_tokens tokens of all sequences, or None if PyTorch computes the step. The kernel
        "attend" is attend in kernels/csrc/ops.cpp and in kernels/triton/attention.py."""
        return self.op(name) if 0 < num_tokens <= self.token_limits.get(name, 0) else None

    def supports_queries(self, query_len: int, heads_per_kv_head: int) -> bool:
        """Whether attend has a kernel for query_len new tokens of each sequence."""
        return query_len <= self.max_query_len and query_len * heads_per_kv_head <= self.max_queries

    def op(self, name: str) -> Callable:
        """The kernel for any number of tokens, where PyTorch cannot replace it: it alone reads a packed weight. Raises
        RuntimeError if the backend has no kernels."""
        if self.namespace is None:
            raise RuntimeError(f"the backend {self.name!r} has no kernels, so none for {name}")
        return getattr(getattr(torch.ops, self.namespace), name)

    def supports_step(self, batch_size: int, query_len: int, heads_per_kv_head: int, activation: str) -> bool:
        """Whether a step of query_len new tokens in each of batch_size sequences can be captured.

        heads_per_kv_head, activation: those of the model."""
        if self.namespace is None:
            return False
        num_tokens = batch_size * query_len
        has_kernels = all(self.kernel_for(name, num_tokens) is not None for name in self.required_in_graph)
        has_activation = activation in self.activations or "activate" not in self.required_in_graph
        return has_kernels and has_activation and self.supports_queries(query_len, heads_per_kv_head)

    def with_limits(self, **token_limits: float) -> "Backend":
        return replace(self, token_limits=self.token_limits | token_limits)


TORCH_BACKEND = Backend("torch")
CPU_BACKEND = Backend(
    "cpu",
    CPU_NAMESPACE,
    dict(
        fused_linear=MAX_CPU_TOKENS, experts_gate_up=MAX_CPU_TOKENS, experts_down=MAX_CPU_TOKENS,
        attend=MAX_CPU_TOKENS, route=MAX_CPU_TOKENS, embed=MAX_CPU_TOKENS,
        rms_norm=math.inf, activate=math.inf, add=math.inf, rope_and_cache=math.inf, permute_inputs=math.inf,
    ),
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


def cpu_backend(dtype: torch.dtype, format: WeightFormat, model_is_quantized: bool) -> Backend:
    """CPU_BACKEND with the limits of a weight on this machine: the lines of the table for this CPU.

    dtype: of the activations.
    model_is_quantized: whether any weight of the model is quantized. If so, kernels also multiply with unquantized
    weights, such as those of routers, up to MAX_CPU_TOKENS. PyTorch would be faster, but no CPU graph can hold it."""
    library, is_bf16 = build.load_cpp_kernels(), dtype == torch.bfloat16
    experts = MAX_CPU_TOKENS if model_is_quantized else library.max_unquantized_tokens(is_bf16)
    linear, attend = experts, MAX_CPU_TOKENS
    if build.quantizes_activations(library, format) and dtype.itemsize == 2 and library.has_quantized_prefill():
        linear = experts = math.inf
    elif library.has_prefill_linear(is_bf16):
        linear = math.inf
    if library.has_prefill_attention(is_bf16):
        attend = math.inf
    limits = {"fused_linear": linear, "experts_gate_up": experts, "experts_down": experts, "attend": attend}
    return replace(CPU_BACKEND.with_limits(**limits), activations=frozenset(build.cpp_activations(library)))


def triton_backend(dtype: torch.dtype, device: torch.device) -> Backend:
    """TRITON_BACKEND with the limits of a matmul on this device. dtype: of the activations."""
    from kernels.triton.launch import MMA_N, uses_tensor_cores  # here, because not every machine has Triton

    if uses_tensor_cores(device, dtype):
        return TRITON_BACKEND
    return TRITON_BACKEND.with_limits(**dict.fromkeys(MATMULS, MMA_N))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def count_tokens(x: Tensor) -> int:
    """The number of tokens in x [..., width], of all sequences together."""
    return x.numel() // x.shape[-1]

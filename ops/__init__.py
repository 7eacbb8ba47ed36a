"""The operations of a model, each computed by a kernel of kernels/ or in plain PyTorch.

Callers write ops.attend(...). Each file imports only from kernels/ and from the files above it. (From layers.py, which
imports this package, there are types alone, for annotations.)

    aten.py        matmuls with quantized weights by PyTorch's own kernels, without a C++ compiler
    torch_ops.py   every operation in plain PyTorch, for prefill, other devices and --kernels off
    backend.py     the backends: which operations have kernels, and for how many tokens; how rounding differs
    dispatch.py    the operations: attend, fused_linear, ... Each calls a kernel of a backend, or torch_ops.py
    packing.py     chooses the backend of a model, and packs the weights for the backend
"""

# ruff: noqa: F401  (all names are for callers)

from ops.backend import (
    CPU_BACKEND,
    MAX_CPU_TOKENS,
    MAX_TRITON_NEW_TOKENS,
    MAX_TRITON_TOKENS,
    TORCH_BACKEND,
    TRITON_BACKEND,
)
from ops.dispatch import (
    activate,
    add,
    attend,
    embed,
    experts_down,
    experts_gate_up,
    fused_linear,
    permute_inputs,
    rms_norm,
    route,
    sample,
)
from ops.packing import load_triton_kernels, pack_for_triton, pack_weights

"""The operations of a model. Callers write ops.attend(...), and an operation is a kernel of kernels/ or plain PyTorch.

Layers compute with operations alone. So one forward serves every device, and a CPU can capture a step as lists of
operations (kernels/capture.py). An operation asks a backend for a kernel: the backend of the layer, or the argument
backend. Without a kernel, plain PyTorch computes the operation: in prefill, on other devices and with --kernels off.
The functions for this are in the second part of the same file; NAME_torch is all of the operation NAME. The tests
compare the kernels with plain PyTorch.

    backend.py     the backends: which operations have kernels, and for how many tokens; how rounding differs
    aten.py        matmuls with quantized weights by PyTorch's own kernels, without a C++ compiler
    linear.py      fused_linear, rms_norm, permute_inputs, activate, add, embed
    attention.py   attend, rope_and_cache
    experts.py     route, experts_gate_up, experts_down
    sampling.py    sample
    packing.py     chooses the backend of a model, and packs the weights for the backend

Within ops/ each file imports only from files above it in this list. (For annotations alone, some files name the classes
of layers.py, which imports ops/.)

Captured on a GPU: every operation, kernel or plain PyTorch. Captured on a CPU: every kernel but sample (it runs after
the graph), rope_and_cache and dequantize (prefill only).
"""

# ruff: noqa: F401  (all names are for callers)

from ops.attention import attend
from ops.backend import (
    CPU_BACKEND,
    MAX_CPU_TOKENS,
    MAX_TRITON_QUERY_LEN,
    MAX_TRITON_TOKENS,
    TORCH_BACKEND,
    TRITON_BACKEND,
)
from ops.experts import experts_down, experts_gate_up, route
from ops.linear import activate, add, embed, fused_linear, permute_inputs, rms_norm
from ops.packing import load_triton_kernels, pack_for_triton, pack_weights
from ops.sampling import sample

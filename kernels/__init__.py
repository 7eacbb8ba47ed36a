"""The operations of a model, on the kernels of a device or in plain PyTorch; weight formats; recording of steps.

Callers write kernels.attend(...). Each file imports only from the files above it. (Annotations name the classes of
layers.py, which imports this package.)

    formats/       how weights are stored: int8, int4, ...
    schema.py      the arguments of the kernels, one list for C++ and Triton; tuples of arguments that belong together
    aten.py        products with quantized weights by PyTorch's own kernels, without a C++ compiler
    torch_ops.py   every operation in plain PyTorch, for prefill, other devices and --kernels off
    build.py       compiles and loads the C++ kernels (csrc/)
    triton/        the Triton kernels; triton/__init__.py lists the files
    backend.py     the backends: which operations have kernels, and for how many tokens; how rounding differs
    ops.py         the operations: attend, fused_linear, ... Each calls a kernel of a backend, or torch_ops.py
    packing.py     chooses the backend of a model, and packs the weights for the backend
    record.py      records a decode step once, and replays the recording
"""

# ruff: noqa: F401  (all names are for callers)

from kernels.backend import CPU, MAX_CPU_TOKENS, MAX_TRITON_NEW_TOKENS, MAX_TRITON_TOKENS, TORCH, TRITON
from kernels.ops import (
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
from kernels.packing import load_triton_kernels, pack_for_triton, pack_weights

"""The operations of a model, on the kernels of a device or in plain PyTorch; weight formats; recording of steps.

Callers write kernels.attend(...). Each file imports only from the files above it. (From layers.py, which imports this
package, there are types alone, for annotations.)

    formats/       how weights are stored: int8, int4, ...
    schema.py      the arguments of the kernels, one list for C++ and Triton
    aten.py        products with quantized weights by PyTorch's own kernels, without a C++ compiler
    arguments.py   arguments that belong together: a weight, and those of attention
    torch_ops.py   every operation in plain PyTorch, for prefill, other devices and --kernels off
    build.py       compiles and loads the C++ kernels (csrc/)
    triton/        the Triton kernels; triton/__init__.py lists the files
    ops.py         the operations: attend, fused_linear, ... Each calls a kernel or torch_ops.py; rounding differs
    prepare.py     chooses the backend of a device, and packs the weights for the backend
    record.py      records a decode step once, and replays the recording
"""

from kernels.ops import (
    MAX_CPU_TOKENS,
    MAX_TRITON_NEW_TOKENS,
    MAX_TRITON_TOKENS,
    activate,
    add,
    attend,
    embed,
    experts_down,
    experts_gate_up,
    fused_linear,
    has_attention_kernel,
    has_sample_kernel,
    permute_inputs,
    rms_norm,
    route,
    sample,
)
from kernels.prepare import load_triton_kernels, pack_for_triton, prepare_kernels

__all__ = [
    "MAX_CPU_TOKENS", "MAX_TRITON_NEW_TOKENS", "MAX_TRITON_TOKENS", "activate", "add", "attend", "embed",
    "experts_down", "experts_gate_up", "fused_linear", "has_attention_kernel", "has_sample_kernel",
    "load_triton_kernels", "pack_for_triton", "prepare_kernels", "permute_inputs", "rms_norm", "route", "sample",
]

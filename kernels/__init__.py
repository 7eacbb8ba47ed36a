"""What a model computes: on the kernels of its device, or in plain PyTorch.

Each file imports from those above it alone.

    formats/       how weights are stored: int8, int4, ...
    schema.py      the arguments of the kernels, the same in C++ and in Triton
    params.py      what an operation takes besides its input: a weight, a norm, the options of attention, a KV cache
    reference.py   the maths: every operation in plain PyTorch, for any device
    cpu.py         compiles and loads the C++ kernels (csrc/)
    triton/        the kernels of GPUs; its __init__.py lists the files
    ops.py         the operations: attend, fused_linear, ... Each calls a kernel or its equal in reference.py
    prepare.py     chooses the backend of a device, and packs the weights for it
    record.py      records a decode step once, and replays it

Others call the operations as kernels.attend(...).
"""

from kernels.ops import (
    MAX_CPU_TOKENS,
    MAX_TRITON_NEW_TOKENS,
    MAX_TRITON_TOKENS,
    add,
    attend,
    embed,
    experts_down,
    experts_gate_up,
    fused_linear,
    glu,
    has_attention_kernel,
    has_sample_kernel,
    permute_inputs,
    rms_norm,
    route,
    sample,
)
from kernels.prepare import load_triton_kernels, pack_for_triton, prepare_kernels

__all__ = [
    "MAX_CPU_TOKENS", "MAX_TRITON_NEW_TOKENS", "MAX_TRITON_TOKENS", "add", "attend", "embed", "experts_down",
    "experts_gate_up", "fused_linear", "glu", "has_attention_kernel", "has_sample_kernel",
    "load_triton_kernels", "pack_for_triton", "prepare_kernels", "permute_inputs", "rms_norm", "route", "sample",
]  # fmt: skip

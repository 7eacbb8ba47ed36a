"""Compiles every Triton kernel to machine code, for GPUs that this machine need not have.

    python -m tests.compile_triton

Each must fit into the shared memory of the GPU, and use its tensor cores if Triton can.

A kernel takes a second or two. To save time, all of them are compiled for one GPU of each kind: without tensor cores
(Turing), with those of NVIDIA (Ampere), and with those of AMD (CDNA 3). For every other GPU, each function of a kernel
is compiled once.

On Hopper a matmul overlaps with the previous kernel, and prefetches W before its loop, in one way for tiled formats and
in another for the rest. One format of each kind is compiled.
"""

import itertools
import multiprocessing
import os
import re
from collections import Counter
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from config import ACTIVATIONS
from formats import MXFP4, Float8, GroupedInt8, Int4, Int8, Unquantized, WeightFormat
from kernels.schema import TokenFilters
from kernels.triton import attention, launch, linear, moe, sampling  # noqa: F401
from kernels.triton.formats import KERNEL_FORMATS, kernel_format
from layers.backend import TRITON_BACKEND
from layers.experts import ExpertsDown, ExpertsGateUp, route
from layers.kv_cache import LayerCache
from layers.linear import permute_inputs
from layers.packing import pack_for_triton
from layers.sampling import sample
from scripts.kernel_checks.exact_results import attend, make_linear, make_norm, with_activation

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float64: "fp64",
}
MATRIX_INSTRUCTIONS = {"ptx": "mma.sync|wgmma", "amdgcn": "v_mfma|v_wmma"}
COMPILED_FORMATS = [format.format_class.stored_formats()[0] for format in KERNEL_FORMATS]  # one of each class
OTHER_GROUP_SIZES = [Int4(64), GroupedInt8(64), Float8(128)]
# Only of these do the tile sizes depend on num_sms
TILED_FORMATS = [f for f in COMPILED_FORMATS + OTHER_GROUP_SIZES if kernel_format(type(f).__name__).is_tiled]
PREFETCHED_FORMATS = [Unquantized(), Int4(64)]  # not tiled, and tiled
MANY_TOKENS = [(16, Unquantized()), (32, Int8()), (64, Int4(64)), (64, MXFP4())]  # of launch_many: tokens, format
MANY = Counter(fused_linear_kernel=4, rms_norm_kernel=4)
OTHERS = Counter(fused_linear_kernel=3, rms_norm_kernel=1, route_kernel=2, moe_combine_kernel=1)
OTHERS.update(attend_kernel=2, sample_kernel=4, top_p_min_p_kernel=2, permute_inputs_kernel=1)
ALL_OTHERS = OTHERS + Counter(fused_linear_kernel=8, moe_combine_kernel=2)


@dataclass(frozen=True)
class Gpu:
    name: str
    target: GPUTarget
    dtype: torch.dtype
    shared_kb: int  # shared memory that a program may have
    has_tensor_cores: bool = True  # this and the next three: of launch.Gpu
    min_block_m: int = 8
    num_sms: int = 100
    has_pdl: bool = False
    compiles_all: bool = False

    @property
    def formats(self) -> list[WeightFormat]:
        """Formats whose matmuls are compiled for this GPU."""
        if self.has_larger_tiles:
            return TILED_FORMATS
        if self.has_pdl and self.uses_tensor_cores:
            return PREFETCHED_FORMATS
        return COMPILED_FORMATS + OTHER_GROUP_SIZES if self.compiles_all else COMPILED_FORMATS

    @property
    def has_larger_tiles(self) -> bool:
        """Whether this GPU differs from another in the list only by the tile sizes of matmuls."""
        return self.num_sms == 1

    @property
    def uses_tensor_cores(self) -> bool:
        return self.dtype != torch.float32 and self.has_tensor_cores


GPUS = [
    Gpu("Turing", GPUTarget("cuda", 75, 32), torch.float16, 64, has_tensor_cores=False, compiles_all=True),
    Gpu("Ampere", GPUTarget("cuda", 86, 32), torch.bfloat16, 99, compiles_all=True),
    Gpu("Ampere, larger tiles", GPUTarget("cuda", 86, 32), torch.bfloat16, 99, num_sms=1),
    Gpu("Hopper", GPUTarget("cuda", 90, 32), torch.bfloat16, 99, has_pdl=True),
    Gpu("Hopper, float32", GPUTarget("cuda", 90, 32), torch.float32, 64, has_pdl=True),
    Gpu("CDNA 3", GPUTarget("hip", "gfx942", 64), torch.bfloat16, 64, min_block_m=16, compiles_all=True),
    Gpu("RDNA 3", GPUTarget("hip", "gfx1100", 32), torch.float16, 64, min_block_m=16),
]


class Compiler:
    """Stands in for JITFunction.run: compiles a kernel for gpu instead of launching it."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.compiled = Counter()  # by the kernel's name

    def run(self, kernel: JITFunction, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        source = ASTSource(kernel, *specialize(kernel, values))
        code = triton.compile(source, target=self.gpu.target, options=options)
        self.check(kernel.__name__, code, values)
        self.compiled[kernel.__name__] += 1

    def check(self, name: str, code, values: dict):
        sizes = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        assert code.metadata.shared <= self.gpu.shared_kb * 2**10, (name, code.metadata.shared, sizes)
        has_products = "DTYPE" in values
        if has_products and self.gpu.uses_tensor_cores:
            ((kind, pattern),) = [item for item in MATRIX_INSTRUCTIONS.items() if item[0] in code.asm]
            assert re.search(pattern, code.asm[kind]), (name, sizes)


def specialize(kernel: JITFunction, values: dict) -> tuple[dict, dict, dict]:
    """Returns the types, constants and divisibility by 16 for which Triton would compile a launch with these values.
    Constants and divisibility are by path: (1,) is the second argument, (1, 0) the first field of a tuple there."""
    signature, constants, attributes = {}, {}, {}

    def type_of(value, path: tuple[int, ...]):
        if isinstance(value, tuple):
            return type(value)(*(type_of(field, (*path, i)) for i, field in enumerate(value)))
        if value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"

    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = type_of(value, (index,))
    return signature, constants, attributes


def launch_products(gpu: Gpu) -> Counter:
    """Launches the matmuls of decode steps with one token and with eight. Returns how often each kernel should have
    been launched."""
    dtype, launches = gpu.dtype, Counter()
    x, norm = torch.randn(1, 1, 2048).to(dtype), make_norm(2048, dtype)
    for format in gpu.formats:
        w = make_linear(256, 2048, format, dtype)
        pack_for_triton([w])
        with_activation(w, "silu", gated=True)(x.expand(1, 8, 2048), norm=norm)
        launches.update(fused_linear_kernel=1)
        if isinstance(format, Unquantized | Int8 | Int4):
            w(x, norm=norm, out_dtype=torch.float32)
            launches.update(fused_linear_kernel=1)
        if isinstance(format, Unquantized) or gpu.has_larger_tiles:
            continue
        w.dequantize(dtype)
        launches.update(dequantize_kernel=1)
        if gpu.compiles_all or isinstance(format, Int4):  # both kernels call the same function of the format
            w.embedding(torch.zeros(1, 2, dtype=torch.int64), 1.5, dtype)
            launches.update(embed_kernel=1)
    return launches


def launch_many(dtype: torch.dtype):
    """Launches the matmuls of decode steps with many sequences."""
    norm = make_norm(2048, dtype)
    for num_tokens, format in MANY_TOKENS:
        w, x = make_linear(256, 2048, format, dtype), torch.zeros(1, num_tokens, 2048, dtype=dtype)
        pack_for_triton([w])
        with_activation(w, "silu", gated=True)(x, norm=norm)


def launch_others(dtype: torch.dtype, compiles_all: bool):
    x, norm = torch.randn(1, 1, 2048).to(dtype), make_norm(2048, dtype)
    norm.backend = TRITON_BACKEND
    norm(x, x)
    permute_inputs(x, torch.arange(2048, dtype=torch.int32), TRITON_BACKEND)
    capped = make_linear(256, 2048, Unquantized(), dtype, bias=True, out_scale=0.5, softcap=30.0, clip=8.0)
    pack_for_triton([capped])
    alternately_gated = zip(ACTIVATIONS, itertools.cycle((False, True)))
    for activation, gated in alternately_gated if compiles_all else [("gelu", True)]:
        with_activation(capped, activation, gated)(x)
    route(torch.randn(1, 5, 5), 2, True, 1, TRITON_BACKEND)
    topk_weights, topk_ids = route(torch.randn(1, 5, 4), 2, True, 0, TRITON_BACKEND)
    for format in (Unquantized(), Int8(), Int4(64)) if compiles_all else (Int4(64),):
        gate_up = make_linear(
            128, 2048, format, dtype, n_experts=4, kind=ExpertsGateUp, activation="silu", gated=True
        )
        down = make_linear(2048, 64, format, dtype, n_experts=4, kind=ExpertsDown, bias=True)
        pack_for_triton([gate_up, down])
        hidden = gate_up(x.expand(1, 5, 2048), topk_ids=topk_ids, norm=norm)
        down(hidden, topk_ids=topk_ids, topk_weights=topk_weights)
    for temperature in (0, 1):
        sample(torch.randn(1, 5000), temperature, TokenFilters(), TRITON_BACKEND)
    for temperatures in (None, torch.ones(1, 1)):
        sample(torch.randn(1, 5000), 1, TokenFilters(top_p=0.9), TRITON_BACKEND, temperatures=temperatures)
    k, v = torch.zeros(2, 1, 2, 9000, 64, dtype=dtype).unbind()
    cache = LayerCache(k, v, torch.randn(9000, 32, 2))
    start_pos = torch.zeros(1, dtype=torch.int64)
    attend(torch.zeros(1, 2, (8 + 4) * 64, dtype=dtype), cache, start_pos, 8, TRITON_BACKEND)
    # A key/value head has at most 64 queries. All options are on, because none needs less shared memory.
    norms, sinks = [make_norm(n * 64, dtype) for n in (16, 2)], torch.zeros(16, dtype=dtype)
    qkv = torch.zeros(1, 8, (16 + 4) * 64, dtype=dtype)
    attend(
        qkv, cache, start_pos, 16, TRITON_BACKEND, 100, *norms, sinks, softcap=50.0, alibi_slopes=torch.zeros(16)
    )


def compile_for(gpu: Gpu):
    compiler = Compiler(gpu)
    JITFunction.run = lambda kernel, *args, **kwargs: compiler.run(kernel, *args, **kwargs)
    known = launch.Gpu(gpu.num_sms, gpu.has_tensor_cores, gpu.min_block_m, gpu.has_pdl, {})
    launch.gpu_info = attention.gpu_info = lambda device: known
    linear.dot_dtype = attention.dot_dtype = lambda x: getattr(tl, str(x.dtype).removeprefix("torch."))
    expected = launch_products(gpu)
    if not gpu.has_larger_tiles:
        launch_others(gpu.dtype, gpu.compiles_all)
        expected += ALL_OTHERS if gpu.compiles_all else OTHERS
    if gpu.uses_tensor_cores and gpu.name != "Ampere":  # "Ampere, larger tiles" compiles the same kernels
        launch_many(gpu.dtype)
        expected += MANY
    assert compiler.compiled == expected


def main():
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        pool.map(compile_for, GPUS, chunksize=1)


if __name__ == "__main__":
    main()

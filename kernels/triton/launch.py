"""How the Triton kernels are launched. Two things matter, because a kernel of a decode step takes microseconds: how
evenly its programs share the GPU (tile sizes), and how long the GPU idles between two kernels (kernels that overlap).

    gpu_info                    what the GPU can do
    uses_tensor_cores, min_block_m, dot_dtype    what a matmul needs to know, by device and by type of x
    pdl_options                 arguments for the launch of a kernel that may overlap with the previous kernel
    pdl_wait                    the first call in every kernel
    semaphores, is_last_program    how a program finds out that all other programs have finished
    choose_tiles                the tile sizes of y = x W^T: from tuned.json or by a rule

tuned.json, next to this file, has the fastest measured tile sizes by GPU and matmul. scripts/benchmark.py --tune writes
it.

Kernels that overlap. On NVIDIA's Hopper and later GPUs, a kernel may start while the previous kernel still runs. CUDA
calls this programmatic dependent launch (PDL). Two instructions control it:

    gdc_launch_dependents    when all programs of a kernel have executed it or ended, the next kernel may start
    gdc_wait                 waits until the previous kernel has ended and all its results can be read

Here kernel B follows kernel A:

    A    ... loop over K ...  gdc_launch_dependents  epilogue, stores  end
    B                                   starts, prefetches its weights    gdc_wait  reads what A wrote ...

Before gdc_wait a kernel reads only weights, because no kernel writes them. Every kernel executes gdc_wait, even if it
needs no result of the previous one. So kernels end in order, and a kernel that waits for B waits for A, too.

B should start early, but not take multiprocessors (SMs) that A still needs: B's programs occupy them while they wait.
So A executes gdc_launch_dependents

    at once (TRIGGER_EARLY)       if A has one wave: at most one program for each multiprocessor, and all run already
    after its loop over K         if A is a matmul of several waves: its last programs are nearly done
    never                         if A is any other kernel of several waves: B starts when A ends

Triggering a matmul of several waves early lets B take SMs from A's last wave: Llama-3.1-8B int8, 4.5 ms a step instead
of 3.3 ms (H100).
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.schema import MAX_TRITON_TOKENS
from kernels.triton.formats import KernelFormat, Scales

TUNED = Path(__file__).with_name("tuned.json")
# The n of mma.m16n8k16, an instruction of NVIDIA's tensor cores: 8 tokens cost as much as one. So the tile sizes that
# were tuned for one token hold for 8.
MMA_N = 8
N_SEMAPHORES = 256 * MAX_TRITON_TOKENS  # of attention, with at most 256 key/value heads


class Gpu(NamedTuple):
    num_sms: int  # multiprocessors (NVIDIA) or compute units (AMD)
    has_tensor_cores: bool  # that Triton uses. AMD calls them matrix cores
    min_block_m: int  # the fewest tokens that a tensor core multiplies
    has_pdl: bool  # whether the GPU has PDL
    tuned: dict[str, dict[str, int]]  # table_key -> fields of a TileConfig


@cache
def gpu_info(device: torch.device) -> Gpu:
    if device.type == "cpu":  # Triton's interpreter
        return Gpu(num_sms=16, has_tensor_cores=True, min_block_m=MMA_N, has_pdl=False, tuned={})
    properties = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    return Gpu(
        properties.multi_processor_count,
        has_tensor_cores=not is_nvidia or properties.major >= 8,  # Triton does not use Turing's
        min_block_m=MMA_N if is_nvidia else 16,
        has_pdl=is_nvidia and properties.major >= 9,
        tuned=tuned.get(properties.name, {}),
    )


def uses_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether matmuls with x in dtype use tensor cores. These would round float32 to fewer bits."""
    return dtype != torch.float32 and gpu_info(device).has_tensor_cores


def min_block_m(x: Tensor) -> int:
    """Returns the smallest BLOCK_M of a matmul with x."""
    return gpu_info(x.device).min_block_m if uses_tensor_cores(x.device, x.dtype) else 1


def dot_dtype(x: Tensor) -> tl.dtype:
    """Returns the type of both operands of tl.dot with x. Triton's interpreter runs on a CPU, and cannot compute in
    bfloat16."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def pdl_options(device: torch.device, grid: tuple[int, ...]) -> dict:
    """Returns arguments for the launch of a kernel. On a GPU with PDL the kernel may start before the previous kernel
    has ended, so it must call pdl_wait(USE_PDL, TRIGGER_EARLY)."""
    gpu = gpu_info(device)
    if not gpu.has_pdl:
        return {"USE_PDL": False, "TRIGGER_EARLY": False}
    return {"USE_PDL": True, "TRIGGER_EARLY": math.prod(grid) <= gpu.num_sms, "launch_pdl": True}


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr):
    """Waits until the previous kernel has ended. Until then a kernel may read only weights, and must not write."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGER_EARLY:
            tl.extra.cuda.gdc_launch_dependents()


def semaphores(device: torch.device, n: int) -> Tensor:
    """Returns at least n semaphores, all zero, for is_last_program.

    All kernels share this tensor. Two kernels that overlap do not disturb each other: the second kernel counts only
    after gdc_wait, and by then the first kernel has ended."""
    if n > N_SEMAPHORES:
        raise ValueError(f"a Triton kernel needs {n} semaphores, but there are {N_SEMAPHORES}")
    return all_semaphores(device)


@cache
def all_semaphores(device: torch.device) -> Tensor:
    return torch.zeros(N_SEMAPHORES, dtype=torch.int32, device=device)


@triton.jit
def is_last_program(semaphore_ptr, N_PROGRAMS: tl.constexpr):
    """Whether this program is the last of N_PROGRAMS that share a semaphore. A program calls this function once, after
    its stores. The last program can then load what all programs have stored. Its loads must bypass the L1 cache (.cg),
    which may have older values.

    Each program adds one to the semaphore. The last program finds all other programs counted, and resets the semaphore
    to zero."""
    tl.debug_barrier()  # all threads of the program have stored before the program counts
    is_last = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel") == N_PROGRAMS - 1
    if is_last:
        tl.store(semaphore_ptr, 0)
    return is_last


# ---- The tile sizes of a matmul -------------------------------------------------------------------------------------


class TileConfig(NamedTuple):
    """The tile sizes of y = x W^T, in CUTLASS's terms. tuned.json uses the names of these fields.

    In a step of the loop over K, a program reads this tile of W. Each warp multiplies a part of the tile (sliced-K):

                            BLOCK_K = num_warps * warp_k
                        warp_k      warp_k      warp_k
                     +-----------+-----------+-----------+
            block_n  |  warp 0   |  warp 1   |    ...    |
                     +-----------+-----------+-----------+
    """

    block_n: int  # rows of W of a program (BLOCK_N): a multiple of 16
    num_warps: int
    warp_k: int  # inputs that a warp takes in a step: 16, 32 or a multiple of 64
    num_stages: int  # stages of the loop's software pipeline, as in Triton


def table_key(format: KernelFormat, n: int, k: int, gated: bool, group_size: int) -> str:
    """Returns the name in tuned.json of a matmul with W [n, k]."""
    key = f"{format.name}, {n} x {k}"
    if group_size < min(64, k):  # small groups make narrow slices, with tile sizes of their own
        key += f", g{group_size}"
    return f"{key}, gated" if gated else key


def choose_tiles(
    x: Tensor, format: KernelFormat, n: int, gated: bool, group_size: int, num_tokens: int = 1
) -> TileConfig:
    """Returns the tile sizes for x [..., K] and W [n, K], from tuned.json or by default. By default a program takes at
    most 99 KB of shared memory, or 64 KB on AMD's MI300 and NVIDIA's Turing: they have no more.

    gated: W is a gate projection above an up projection. A program needs 16 rows of each.
    num_tokens: not x's rows, because x of experts_down has a vector for each pair of a token and an expert."""
    gpu, k, on_tensor_cores = gpu_info(x.device), x.shape[-1], uses_tensor_cores(x.device, x.dtype)
    if num_tokens > MMA_N and on_tensor_cores:
        block_m = triton.next_power_of_2(num_tokens)
        tiles = default_tiles_many_tokens(block_m, format, n, k, gated, group_size, gpu.num_sms)
        return tiles if gpu.min_block_m == MMA_N else tiles._replace(num_stages=2)
    key = table_key(format, n, k, gated, group_size)
    if key in gpu.tuned and on_tensor_cores:
        return TileConfig(**gpu.tuned[key])
    if min_block_m(x) != MMA_N:
        is_float32 = format.scales is Scales.NONE and x.dtype == torch.float32
        warp_k = 32 if is_float32 else 64
        return TileConfig(32 if gated else 16, num_warps=8 // x.element_size(), warp_k=warp_k, num_stages=2)
    if format.is_tiled:
        return default_tiles_tiled(format.bits, n / gpu.num_sms, gated, group_size)
    return default_tiles_rows(format.scales is not Scales.NONE, k, gated, group_size)


def default_tiles_rows(is_quantized: bool, k: int, gated: bool, group_size: int) -> TileConfig:
    """For weights that are stored in rows."""
    block_n = 32 if gated else 16
    has_narrow_slices = group_size <= 16  # each slice has sums of its own, and all sums must fit in registers
    if k <= 1024 and not gated and not has_narrow_slices:
        return TileConfig(block_n, num_warps=4, warp_k=256, num_stages=2)  # the loop has one step
    return TileConfig(block_n, num_warps=4, warp_k=64 if gated and is_quantized else 128, num_stages=3)


def default_tiles_tiled(bits: int, outputs_per_sm: float, gated: bool, group_size: int) -> TileConfig:
    """For weights that are stored in tiles.

    bits: of an element.
    outputs_per_sm: n divided by the number of multiprocessors."""
    many_slices = group_size == 32  # twice as many as with 64, and the sums of all slices must fit in registers
    block_n, num_warps, step_bytes = 16, 4, 8192  # step_bytes: of W, which a program reads in a step
    if outputs_per_sm >= 128 and not many_slices:
        block_n, step_bytes = 64, 16384  # the program loads x once for 64 rows
    elif gated or outputs_per_sm >= 32:
        block_n, num_warps = 32, 4 if many_slices else 2
    warp_k = 8 * step_bytes // (bits * block_n * num_warps)
    return TileConfig(block_n, num_warps, warp_k, num_stages=3)


def default_tiles_many_tokens(
    block_m: int, format: KernelFormat, n: int, k: int, gated: bool, group_size: int, num_sms: int
) -> TileConfig:
    """For more than MMA_N tokens.

    Chooses block_n so that the busiest multiprocessor reads the fewest bytes. All programs together read W once, but
    each program reads all of x. With 32 rows of int8 and 64 tokens, x has four times as many bytes as the rows.

    The registers of a warp bound the tile. A warp has block_n * block_m sums for each slice. With group scales it has
    twice as many, because the result of tl.dot is scaled before it is added to the sums. In a step a warp executes at
    most 64 instructions of the tensor cores, 128 with zero points."""
    has_group_scales = format.has_group_scales(group_size, k)
    slice_k, max_sums = (min(64, group_size), 2048) if has_group_scales else (64, 4096)

    def bits_of_column(block_n: int) -> float:
        scale_bits = 32 / slice_k if has_group_scales else 0
        return block_n * (format.bits + scale_bits) + block_m * 16

    def bits_of_busiest(block_n: int) -> float:
        return math.ceil(n / block_n / num_sms) * bits_of_column(block_n)

    candidates = [size for size in (16, 32, 64, 128) if size * block_m <= max_sums and size >= 32 * gated]
    block_n, num_warps = min(candidates, key=bits_of_busiest), 4
    warp_k = min(128, 2048 * slice_k // (block_n * block_m))
    step_bytes = num_warps * warp_k * bits_of_column(block_n) / 8
    if 2 * step_bytes > 99 * 1024:
        warp_k, step_bytes = warp_k // 2, step_bytes / 2
    return TileConfig(block_n, num_warps, warp_k, num_stages=min(4, 1 + int(99 * 1024 // step_bytes)))

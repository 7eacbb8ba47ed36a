"""How the Triton kernels are launched: what a GPU can do, the tile sizes of a product, kernels that overlap.

    choose_tiles(x, format_id, n, gated, group_size)  the tile sizes for y = x W^T
    overlap_options(device, grid)                     for a kernel that may start before the previous one has ended
    wait_for_previous_kernel(USE_PDL, TRIGGER_EARLY)  what a kernel that overlaps must begin with

tuned.json beside this file has the fastest tile sizes that were measured, by GPU and product;
scripts/benchmark.py --tune writes it. For other GPUs and products choose_tiles guesses.

Kernels that overlap. On NVIDIA's Hopper and later, a kernel may start while the previous one still runs. CUDA calls
this programmatic dependent launch (PDL). Two instructions control it:

    gdc_launch_dependents    when all programs of a kernel have executed it or ended, the next kernel may start
    gdc_wait                 waits until the previous kernel has ended and everything it wrote can be read

Here kernel B follows kernel A:

    A    ... loop over K ...  gdc_launch_dependents  epilogue, stores  end
    B                                   starts, prefetches its weights    gdc_wait  reads what A wrote ...

Before gdc_wait a kernel reads only weights, since no kernel writes weights. Every kernel executes gdc_wait, even if it
needs nothing from the previous kernel. So kernels end in order, and a kernel that waits for B waits for A, too.

When to execute gdc_launch_dependents. The first programs of B go to the multiprocessors that have room first. If a
product A executed it at once, most programs of B would pile up on the multiprocessors that finish A early, while others
had none: int8 steps of Llama-3.1-8B then took 4.5 ms instead of 3.3 (H100). So a product executes it after the loop
over K, when all programs are nearly done. Only a kernel with at most one program for each multiprocessor does so at
once (TRIGGER_EARLY).
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

from kernels.formats import Dense
from kernels.triton.formats import kernel_format

TUNED = Path(__file__).with_name("tuned.json")
# A matrix unit multiplies 8 tokens at a time, so up to 8 cost what one costs. What was measured is about these.
FEW_TOKENS = 8


class Gpu(NamedTuple):
    num_sms: int  # multiprocessors (NVIDIA) or compute units (AMD)
    min_block_m: int  # the fewest tokens that matrix units multiply at a time; 1: the kernels use no matrix units
    can_overlap: bool  # whether the GPU has programmatic dependent launch
    tuned: dict[str, dict[str, int]]  # table_key -> fields of a TileConfig


@cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type == "cpu":  # Triton's interpreter
        return Gpu(num_sms=16, min_block_m=8, can_overlap=False, tuned={})
    properties = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    if is_nvidia:
        min_block_m = 8 if properties.major >= 8 else 1  # Triton does not use Turing's
    else:
        min_block_m = 16
    tuned = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    return Gpu(
        properties.multi_processor_count,
        min_block_m,
        can_overlap=is_nvidia and properties.major >= 9,
        tuned=tuned.get(properties.name, {}),
    )


def min_block_m_of(x: Tensor) -> int:
    """Returns the fewest tokens in a product with x. Float32 takes no matrix units, which would round x to fewer
    bits."""
    return 1 if x.dtype == torch.float32 else gpu_of(x.device).min_block_m


def dot_dtype(x: Tensor) -> tl.dtype:
    """Returns the type of both factors of products with x. The interpreter has no arithmetic of bfloat16."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def overlap_options(device: torch.device, grid: tuple[int, ...]) -> dict:
    """Returns arguments for the launch of a kernel, which overlaps with others where the GPU can do that. The kernel
    must begin with wait_for_previous_kernel(USE_PDL, TRIGGER_EARLY). If USE_PDL and not TRIGGER_EARLY, it may execute
    gdc_launch_dependents after its loop."""
    gpu = gpu_of(device)
    if not gpu.can_overlap:
        return {"USE_PDL": False, "TRIGGER_EARLY": False}
    return {"USE_PDL": True, "TRIGGER_EARLY": math.prod(grid) <= gpu.num_sms, "launch_pdl": True}


@triton.jit
def wait_for_previous_kernel(USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr):
    """Waits until the kernel may read everything. Every kernel begins with this."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGER_EARLY:
            tl.extra.cuda.gdc_launch_dependents()


@cache
def done_counters(device: torch.device) -> Tensor:
    """Returns counters, zeros, in which the programs of a kernel count themselves when they are done. So a program
    learns that it is the last, combines what all programs have stored, and sets the counter back to zero.

    All kernels count in this one tensor. Two kernels that overlap do not disturb each other: the second kernel counts
    only after gdc_wait, and by then the first kernel has ended."""
    return torch.zeros(2**14, dtype=torch.int32, device=device)


# ---- The tile sizes of a product ------------------------------------------------------------------------------------


class TileConfig(NamedTuple):
    """The tile sizes of y = x W^T, in CUTLASS's terms. tuned.json has them by these names.

    In a step of its loop over K, a program reads this tile of W; each warp multiplies a part of it (sliced-K):

                            BLOCK_K = num_warps * warp_k
                        warp_k      warp_k      warp_k
                     +-----------+-----------+-----------+
            block_n  |  warp 0   |  warp 1   |    ...    |
                     +-----------+-----------+-----------+
    """

    block_n: int  # outputs of a program (BLOCK_N): a multiple of 16
    num_warps: int
    warp_k: int  # inputs that a warp takes in a step: a multiple of 64, or 32 or 16
    num_stages: int  # of the loop's software pipeline, as in Triton


def table_key(format_id: int, n: int, k: int, gated: bool, group_size: int) -> str:
    """Returns the name of a product with W [n, k] in tuned.json."""
    key = f"{kernel_format(format_id).name}, {n} x {k}"
    if group_size < min(64, k):  # then slices are narrower
        key += f", g{group_size}"
    return f"{key}, gated" if gated else key


def choose_tiles(x: Tensor, format_id: int, n: int, gated: bool, group_size: int, n_tokens: int = 1) -> TileConfig:
    """For x [..., K] and W [n, K]: what tuned.json says, or a guess. gated: W is a gate projection above an up
    projection, and a program needs 16 outputs of both. n_tokens: per product. With experts, x has a row for every pair
    of a token and one of its experts. The guess gives no program more than 99 KB of shared memory, or 64 KB on GPUs
    whose min_block_m is not 8."""
    gpu, min_block_m = gpu_of(x.device), min_block_m_of(x)
    k = x.shape[-1]
    if n_tokens > FEW_TOKENS and min_block_m > 1:
        tiles = guess_for_many(triton.next_power_of_2(n_tokens), format_id, n, k, gated, group_size, gpu.num_sms)
        return tiles if min_block_m == 8 else tiles._replace(num_stages=2)
    key = table_key(format_id, n, k, gated, group_size)
    if key in gpu.tuned and min_block_m > 1:
        return TileConfig(**gpu.tuned[key])
    block_n = 32 if gated else 16
    if min_block_m != 8:
        is_float32 = format_id == Dense.format_id and x.dtype == torch.float32
        warp_k = 32 if is_float32 else 64
        return TileConfig(block_n, num_warps=8 // x.element_size(), warp_k=warp_k, num_stages=2)
    if kernel_format(format_id).is_tiled:
        return guess_tiled(n / gpu.num_sms, gated, group_size)
    if group_size <= 16:  # a warp has so many slices that their sums must fit in registers
        return TileConfig(block_n, num_warps=4, warp_k=64 if gated else 128, num_stages=3)
    if k <= 1024 and not gated:  # one step
        return TileConfig(block_n, num_warps=4, warp_k=256, num_stages=2)
    warp_k = 64 if format_id != Dense.format_id and gated else 128
    return TileConfig(block_n, num_warps=4, warp_k=warp_k, num_stages=3)


def guess_tiled(outputs_per_sm: float, gated: bool, group_size: int) -> TileConfig:
    """For weights of 4 bits. outputs_per_sm: n divided by the number of multiprocessors. In a step a program reads 8 KB
    of W; 16 KB if there are enough outputs for programs of 64, which share what they load of x."""
    has_two_tiles = gated or outputs_per_sm >= 32
    if group_size == 32:  # twice as many slices, whose sums must fit in registers
        if has_two_tiles:
            return TileConfig(block_n=32, num_warps=4, warp_k=128, num_stages=3)
        return TileConfig(block_n=16, num_warps=4, warp_k=256, num_stages=3)
    if outputs_per_sm >= 128:
        return TileConfig(block_n=64, num_warps=4, warp_k=128, num_stages=3)
    if has_two_tiles:
        return TileConfig(block_n=32, num_warps=2, warp_k=256, num_stages=3)
    return TileConfig(block_n=16, num_warps=4, warp_k=256, num_stages=3)


def guess_for_many(
    block_m: int, format_id: int, n: int, k: int, gated: bool, group_size: int, num_sms: int
) -> TileConfig:
    """For more than FEW_TOKENS tokens. Together the programs read W once, but each of them reads all of x: with 32
    outputs of int8 and 64 tokens that is four times as much. So block_n is what gives the busiest multiprocessor the
    least to read.

    A warp has block_n * block_m sums for each slice. If a slice's product is multiplied with a scale before it is
    added, there are twice as many. In a step a warp executes 64 instructions of the matrix unit (128 with zero points)
    or fewer. So everything fits in its registers."""
    format = kernel_format(format_id)
    bits = 16 if format_id == Dense.format_id else 8 // format.format_class.elements_per_byte
    has_slice_scales = format.has_slice_scales(group_size, k)
    slice_k, max_sums = (min(64, group_size), 2048) if has_slice_scales else (64, 4096)

    def bits_of_column(block_n: int) -> float:
        scale_bits = 32 / slice_k if has_slice_scales else 0
        return block_n * (bits + scale_bits) + block_m * 16

    def bits_of_busiest(block_n: int) -> float:
        return math.ceil(n / block_n / num_sms) * bits_of_column(block_n)

    candidates = [size for size in (16, 32, 64, 128) if size * block_m <= max_sums and size >= 32 * gated]
    block_n, num_warps = min(candidates, key=bits_of_busiest), 4
    warp_k = min(128, 2048 * slice_k // (block_n * block_m))
    step_bytes = num_warps * warp_k * bits_of_column(block_n) / 8
    if 2 * step_bytes > 99 * 1024:
        warp_k, step_bytes = warp_k // 2, step_bytes / 2
    return TileConfig(block_n, num_warps, warp_k, num_stages=min(4, 1 + int(99 * 1024 // step_bytes)))

"""How the Triton kernels are launched: what a GPU can do, the shape of a product's programs, overlapping kernels.

    choose_tiles(x, bits, n, gated, group_size)       the shape of the programs of y = x W^T
    overlap_options(device, grid)                     for a kernel that may begin before the previous one has ended
    wait_for_previous_kernel(USE_PDL, TRIGGER_EARLY)  what such a kernel begins with

triton_tuned.json beside this file has the fastest shapes that were measured, by GPU and product; scripts/benchmark.py
--tune writes it. For other GPUs and products choose_tiles guesses.

Kernels that overlap. On NVIDIA's Hopper and later, a kernel may begin while the one before it is still running (CUDA
calls this programmatic dependent launch). Two instructions rule it:

    gdc_launch_dependents    when all programs of a kernel have called it, the next kernel's programs may begin
    gdc_wait                 returns when the kernel before has ended and all it has written can be read

Before gdc_wait a kernel may only read what no kernel writes, so only weights. Every overlapping kernel must call it:
then the end of a kernel means that all kernels before it have ended, too.

A program that begins early takes the place of one that ended early. So if a product let its successor begin at once,
the multiprocessors that are done first would get most of the successor's programs, and the others none: int8 steps of
Llama-3.1-8B then took 4.5 ms in place of 3.3 (H100). So a product lets it begin after its loop, when all its programs
are nearly done. Only kernels with at most one program for each multiprocessor let it begin at once.
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

TUNED = Path(__file__).with_name("triton_tuned.json")


class Gpu(NamedTuple):
    num_sms: int  # multiprocessors (NVIDIA) or compute units (AMD)
    min_block_m: int  # the fewest columns that its matrix units take; 1: they are not used
    can_overlap: bool  # whether it has programmatic dependent launch
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
    """The fewest columns of a product with x. Float32 does without matrix units, which would cut bits off."""
    return 1 if x.dtype == torch.float32 else gpu_of(x.device).min_block_m


def dot_dtype(x: Tensor) -> tl.dtype:
    """The type of the factors of products with x. The interpreter has no arithmetic of bfloat16."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return tl.float32
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def overlap_options(device: torch.device, grid: tuple[int, ...]) -> dict:
    """Arguments for the launch of a kernel that overlaps with others if it can. It must call wait_for_previous_kernel
    with USE_PDL and TRIGGER_EARLY. If USE_PDL and not TRIGGER_EARLY, it should call gdc_launch_dependents after its
    loop, or never."""
    gpu = gpu_of(device)
    if not gpu.can_overlap:
        return {"USE_PDL": False, "TRIGGER_EARLY": False}
    return {"USE_PDL": True, "TRIGGER_EARLY": math.prod(grid) <= gpu.num_sms, "launch_pdl": True}


@triton.jit
def wait_for_previous_kernel(USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr):
    """What a kernel begins with. Afterwards it may read everything."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
        if TRIGGER_EARLY:
            tl.extra.cuda.gdc_launch_dependents()


@cache
def done_counters(device: torch.device) -> Tensor:
    """Counters for kernels in which the last program to finish has more to do. They are zero before and after every
    kernel. All kernels share them, since only one is between its gdc_wait and its end at a time."""
    return torch.zeros(2**14, dtype=torch.int32, device=device)


# ---- The shape of a product's programs ------------------------------------------------------------------------------


class TileConfig(NamedTuple):
    """The shape of a product's programs: a value in triton_tuned.json."""

    tiles: int  # of 16 rows of W in a program
    num_warps: int
    depth: int  # blocks of 64 columns that a warp takes in a step of the loop over K
    num_stages: int  # steps whose loads are under way at a time


def table_key(bits: int, n: int, k: int, gated: bool, group_size: int) -> str:
    """What triton_tuned.json calls a product with W [n, k]."""
    key = f"{bits} bits, {n} x {k}"
    if bits == 4 and group_size == 32:
        key += ", g32"
    return f"{key}, gated" if gated else key


def choose_tiles(x: Tensor, bits: int, n: int, gated: bool, group_size: int) -> TileConfig:
    """For x [..., K] and W [n, K]: what triton_tuned.json says, or a guess. gated: W is a gate and an up projection,
    one above the other, and a program needs tiles of both. The guess gives no program more than 99 KB of shared memory
    (64 KB unless matrix units take 8 columns)."""
    gpu, min_block_m = gpu_of(x.device), min_block_m_of(x)
    k = x.shape[-1]
    key = table_key(bits, n, k, gated, group_size)
    if key in gpu.tuned and min_block_m > 1:
        return TileConfig(**gpu.tuned[key])
    if min_block_m != 8:
        return TileConfig(tiles=2 if gated else 1, num_warps=8 // x.element_size(), depth=1, num_stages=2)
    if bits == 4:
        return guess_int4(n / gpu.num_sms, gated, group_size)
    if k <= 1024 and not gated:  # one step
        return TileConfig(tiles=1, num_warps=4, depth=4, num_stages=2)
    return TileConfig(tiles=2 if gated else 1, num_warps=4, depth=1 if gated and bits == 8 else 2, num_stages=3)


def guess_int4(n_per_processor: float, gated: bool, group_size: int) -> TileConfig:
    """n_per_processor: rows of W for every multiprocessor. A step of a program reads 16 tiles, 8 KB, or 16 KB if there
    are programs enough to have four tiles each. Tiles side by side share what is loaded of x."""
    n_pairs = n_per_processor / 32  # pairs of tiles
    if group_size == 32:  # twice the sums, which must fit the registers
        return TileConfig(2, 4, 2, 3) if gated or n_pairs >= 1 else TileConfig(1, 4, 4, 3)
    if n_pairs >= 4:
        return TileConfig(tiles=4, num_warps=4, depth=2, num_stages=3)
    if gated or n_pairs >= 1:
        return TileConfig(tiles=2, num_warps=2, depth=4, num_stages=3)
    return TileConfig(tiles=1, num_warps=4, depth=4, num_stages=3)

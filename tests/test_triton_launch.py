"""The tile sizes of matmuls on a GPU, from the rule and from tuned.json, against measurements of an H100."""

import itertools
import json

import pytest
import torch
import triton

from formats import MXFP4, Float8, GroupedInt8, Int4, Int8, Unquantized
from kernels.triton import launch
from kernels.triton.formats import KernelFormat, kernel_format
from utils.files import ROOT

MEASURED = json.loads((ROOT / "benchmarks/gpu_H100_80GB_products.json").read_text())
PRODUCTS = MEASURED["products"]  # by "bits n k", then 2 for a gate and an up projection, else 1
N_PROCESSORS = 132
FORMATS = {4: kernel_format("Int4"), 8: kernel_format("Int8"), 16: kernel_format("Unquantized")}  # by bits


def choose(monkeypatch, gpu: launch.Gpu, format: KernelFormat, n: int, k: int, gated: bool, group_size: int = 64):
    monkeypatch.setattr(launch, "gpu_info", lambda device: gpu)
    x = torch.empty(1, k, dtype=torch.bfloat16)
    return launch.choose_tiles(x, format, n, gated, group_size)


def measured_name(tiles: launch.TileConfig) -> str:
    """Returns what the measurements call tiles: (block_n in units of 16, num_warps, warp_k in units of 64,
    num_stages)."""
    return str((tiles.block_n // 16, tiles.num_warps, tiles.warp_k // 64, tiles.num_stages))


def test_default_is_near_the_best(monkeypatch):
    """With the tile sizes of the rule, no matmul takes 10 % longer than with the best measured ones."""
    gpu = launch.Gpu(N_PROCESSORS, has_tensor_cores=True, min_block_m=8, has_pdl=True, tuned={})
    n_checked = 0
    for key, product in PRODUCTS.items():
        bits, n, k, gated = map(int, key.split())
        name, microseconds = measured_name(choose(monkeypatch, gpu, FORMATS[bits], n, k, gated == 2)), product["us"]
        if name in microseconds:
            assert microseconds[name] <= 1.1 * min(microseconds.values()), key
            n_checked += 1
    assert n_checked >= len(PRODUCTS) - 1  # bf16's gate_up_proj was not measured


def test_measured_tiles_are_used(monkeypatch):
    """tuned.json has the best tile sizes of each matmul, or some in less shared memory that take at most 1 % longer."""
    table = json.loads(launch.TUNED.read_text())[MEASURED["device"]]
    assert len(table) == len(PRODUCTS)
    gpu = launch.Gpu(N_PROCESSORS, has_tensor_cores=True, min_block_m=8, has_pdl=True, tuned=table)
    for key, product in PRODUCTS.items():
        bits, n, k, gated = map(int, key.split())
        assert launch.table_key(FORMATS[bits], n, k, gated == 2, 64) in table
        tiles = choose(monkeypatch, gpu, FORMATS[bits], n, k, gated == 2)
        assert product["us"][measured_name(tiles)] <= 1.01 * min(product["us"].values())


@pytest.mark.parametrize(
    "format, bits, group_size",
    [(Int4, 4, 32), (Int4, 4, 64), (Int4, 4, 128), (MXFP4, 4, 32), (Int8, 8, 576), (GroupedInt8, 8, 16),
     (GroupedInt8, 8, 32), (Float8, 8, 128), (Unquantized, 16, 576)],
)
@pytest.mark.parametrize("gated", [False, True])
def test_default_fits(format, bits, group_size, gated, monkeypatch):
    """For every size, loads in flight fit into 99 KB, and a warp has at most 8 sums of 16 rows by 8."""
    for n in (64, 576, 1536, 4096, 16384, 57344, 128256):
        for num_sms in (1, 16, 132, 300):
            gpu = launch.Gpu(num_sms, has_tensor_cores=True, min_block_m=8, has_pdl=True, tuned={})
            tiles = choose(monkeypatch, gpu, kernel_format(format.__name__), n, 576, gated, group_size)
            elements_in_step = tiles.block_n * tiles.num_warps * tiles.warp_k
            assert (tiles.num_stages - 1) * elements_in_step * bits // 8 <= 99 * 1024
            slices_of_a_warp = tiles.warp_k // min(64, group_size)
            assert tiles.block_n // 16 * slices_of_a_warp <= 8
            assert tiles.block_n % 32 == 0 or not gated


@pytest.mark.parametrize("num_tokens", [9, 16, 33, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_default_tiles_of_many_tokens_fit(num_tokens, gated):
    """Loads in flight fit into 99 KB. The sums of a warp and the products of one step fit into its registers."""
    formats = [(Unquantized, 16, 576), (Int8, 8, 576), (Float8, 8, 576), (Float8, 8, 128), (GroupedInt8, 8, 16)]
    formats += [(Int4, 4, 64), (Int4, 4, 128), (MXFP4, 4, 32)]
    block_m = triton.next_power_of_2(num_tokens)
    sizes = itertools.product(formats, (64, 1536, 4096, 57344, 128256), (1, 16, 132, 300))
    for (format, bits, group_size), n, num_sms in sizes:
        tiles = launch.default_tiles_many_tokens(
            block_m, kernel_format(format.__name__), n, 576, gated, group_size, num_sms
        )
        block_n, num_warps, warp_k, num_stages = tiles
        bits_of_step = num_warps * warp_k * (block_n * bits + block_m * 16)
        assert num_stages >= 2 and (num_stages - 1) * bits_of_step <= 99 * 1024 * 8
        slices = max(1, warp_k // min(64, group_size))
        assert slices * block_n * block_m <= (4096 if group_size == 576 else 2048)
        assert block_n * block_m * warp_k <= 64 * 16 * 8 * 16  # instructions [16, 16] times [16, 8]
        assert block_n % (32 if gated else 16) == 0


def test_programs_compute_many_outputs():
    """If there are enough outputs for all multiprocessors, a program computes many, since fewer programs read less of
    x."""
    for n, block_n in [(576, 16), (4096, 32), (57344, 64)]:
        tiles = launch.default_tiles_many_tokens(64, FORMATS[8], n, 4096, False, 4096, N_PROCESSORS)
        assert tiles.block_n == block_n


def test_pdl_options(monkeypatch):
    """A kernel lets the next one begin at once if no multiprocessor has more than one of its programs."""
    for has_pdl, grid, at_once in [(True, (66, 2), True), (True, (67, 2), False), (False, (1,), False)]:
        gpu = launch.Gpu(N_PROCESSORS, True, 8, has_pdl, tuned={})
        monkeypatch.setattr(launch, "gpu_info", lambda device, gpu=gpu: gpu)
        options = launch.pdl_options(torch.device("cpu"), grid)
        assert options["USE_PDL"] == options.get("launch_pdl", False) == has_pdl
        assert options["TRIGGER_EARLY"] == at_once


def test_semaphores():
    """Every kernel gets at least as many semaphores as it counts with."""
    device = torch.device("cpu")
    assert len(launch.semaphores(device, launch.N_SEMAPHORES)) == launch.N_SEMAPHORES
    with pytest.raises(ValueError, match="16385 semaphores"):
        launch.semaphores(device, launch.N_SEMAPHORES + 1)

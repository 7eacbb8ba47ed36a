"""The guess of how a product is launched on a GPU, against measurements of an H100."""

import json

import pytest
import torch

from kernels import triton_launch
from tests.tiny import ROOT

MEASURED = json.loads((ROOT / "benchmarks/gpu_H100_80GB_products.json").read_text())
PRODUCTS = MEASURED["products"]  # by "bits n k", then 2 for a gate and an up projection, else 1
N_PROCESSORS = 132


def guess(monkeypatch, bits: int, n: int, k: int, gated: bool, group_size: int = 64, num_sms: int = N_PROCESSORS):
    gpu = triton_launch.Gpu(num_sms, min_block_m=8, can_overlap=True, tuned={})
    monkeypatch.setattr(triton_launch, "gpu_of", lambda device: gpu)
    x = torch.empty(1, k, dtype=torch.bfloat16)
    return triton_launch.choose_tiles(x, bits, n, gated, group_size)


def test_guess_is_near_the_best(monkeypatch):
    """No product takes 10 % longer than with the best launch that was measured."""
    n_checked = 0
    for key, product in PRODUCTS.items():
        bits, n, k, gated = map(int, key.split())
        launch = str(tuple(guess(monkeypatch, bits, n, k, gated == 2)))
        microseconds = product["us"]
        if launch in microseconds:
            assert microseconds[launch] <= 1.1 * min(microseconds.values()), key
            n_checked += 1
    assert n_checked >= len(PRODUCTS) - 1  # that of bf16's gate and up was not measured


def test_measured_launches_are_used(monkeypatch):
    """triton_tuned.json has the best launch of each product, or one that takes less shared memory and 1 % more time."""
    table = json.loads(triton_launch.TUNED.read_text())[MEASURED["device"]]
    assert len(table) == len(PRODUCTS)
    gpu = triton_launch.Gpu(N_PROCESSORS, min_block_m=8, can_overlap=True, tuned=table)
    monkeypatch.setattr(triton_launch, "gpu_of", lambda device: gpu)
    for key, product in PRODUCTS.items():
        bits, n, k, gated = map(int, key.split())
        assert triton_launch.table_key(bits, n, k, gated == 2, 64) in table
        launch = triton_launch.choose_tiles(torch.empty(1, k, dtype=torch.bfloat16), bits, n, gated == 2, 64)
        assert product["us"][str(tuple(launch))] <= 1.01 * min(product["us"].values())


@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 64), (4, 128), (8, 64), (16, 64)])
@pytest.mark.parametrize("gated", [False, True])
def test_guess_fits(bits, group_size, gated, monkeypatch):
    """Whatever the size: the loads under way fit 99 KB, and a warp has no more than 8 sums of 16 rows by 8."""
    for n in (64, 576, 1536, 4096, 16384, 57344, 128256):
        for num_sms in (1, 16, 132, 300):
            launch = guess(monkeypatch, bits, n, 576, gated, group_size, num_sms)
            tiles_in_step = launch.tiles * launch.num_warps * launch.depth
            assert (launch.num_stages - 1) * tiles_in_step * 16 * 64 * bits // 8 <= 99 * 1024
            assert launch.tiles * launch.depth * (2 if group_size == 32 else 1) <= 8
            assert launch.tiles % 2 == 0 or not gated


def test_overlap_options(monkeypatch):
    """A kernel lets the next one begin at once if no multiprocessor has two of its programs."""
    for can_overlap, grid, at_once in [(True, (66, 2), True), (True, (67, 2), False), (False, (1,), False)]:
        gpu = triton_launch.Gpu(N_PROCESSORS, 8, can_overlap, tuned={})
        monkeypatch.setattr(triton_launch, "gpu_of", lambda device, gpu=gpu: gpu)
        options = triton_launch.overlap_options(torch.device("cpu"), grid)
        assert options["USE_PDL"] == options.get("launch_pdl", False) == can_overlap
        assert options["TRIGGER_EARLY"] == at_once

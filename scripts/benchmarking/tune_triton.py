"""Finds the fastest tile sizes for a model's matmuls on this GPU, for --tune of benchmark.py.

    python scripts/benchmark.py --config Llama-3.1-8B --mode int4 --compile --tune

The sizes are written to kernels/triton/tuned.json, where kernels/triton/launch.py: choose_tiles finds them.
"""

import json
import math
import sys

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from checkpoint import empty_model
from config import ModelConfig
from formats import WeightFormat
from kernels.triton.formats import kernel_format
from kernels.triton.launch import MMA_N, TUNED, TileConfig, choose_tiles, gpu_info, table_key
from layers.linear import Linear, RMSNorm, quantizable_linears
from layers.packing import pack_for_triton
from scripts.benchmarking.speed import fill_randomly, random_linear
from utils.files import replace_file

# Candidates, besides the guess of choose_tiles: block_n, num_warps, warp_k, num_stages
CANDIDATES = [
    (16, 4, 128, 3), (16, 4, 256, 3), (16, 4, 256, 4), (16, 2, 256, 4), (16, 4, 64, 4), (16, 4, 256, 2),
    (16, 8, 256, 3), (32, 4, 128, 3), (32, 2, 256, 3), (32, 4, 64, 4), (32, 4, 64, 3), (32, 4, 128, 4),
    (32, 4, 256, 3), (32, 8, 64, 3), (64, 4, 128, 3),
]


def tune(config: ModelConfig, format: WeightFormat, device: torch.device):
    """Tunes every matmul of a model whose linear layers have format. This takes some minutes."""
    linears = quantizable_linears(empty_model(config.with_layers(1)))
    for n, k, gated in {
        (w.out_features, w.in_features, config.gated and name.endswith("gate_up_proj")) for name, w in linears
    }:
        tune_product(n, k, gated, format, device)


def tune_product(n: int, k: int, gated: bool, format: WeightFormat, device: torch.device):
    """Writes the fastest tile sizes for W [n, k] into tuned.json. Only tile sizes that also run with MMA_N tokens
    count. gated: whether W stacks gate and up projection, and the matmul ends with the activation."""
    weights = make_weights(n, k, gated, format, device)
    x = torch.randn(1, MMA_N, k, device=device, dtype=torch.bfloat16)
    tuned = gpu_info(x.device).tuned  # where choose_tiles looks first
    group_size = format.effective_group_size(k)
    known = kernel_format(type(format).__name__)
    key = table_key(known, n, k, gated, group_size)
    tuned.pop(key, None)
    guess = choose_tiles(x, known, n, gated, group_size)

    def microseconds(tiles: TileConfig, num_tokens: int) -> float:
        tuned[key] = tiles._asdict()
        try:
            return time_products(x[:, :num_tokens], weights)
        except Exception as e:  # such as tiles that need more shared memory than the GPU has
            print(f"{key}: {tuple(tiles)} does not run: {e}", file=sys.stderr)
            return math.inf

    candidates = dict.fromkeys([guess, *(TileConfig(*sizes) for sizes in CANDIDATES)])
    if gated:  # a program needs 16 outputs of both projections
        candidates = [tiles for tiles in candidates if tiles.block_n % 32 == 0]
    times = {tiles: microseconds(tiles, num_tokens=1) for tiles in candidates}
    for tiles in sorted(times, key=times.get):
        if times[tiles] < math.inf and microseconds(tiles, MMA_N) < math.inf:
            print(f"{key}: {tuple(tiles)} takes {times[tiles]:.1f} us, the guess {times[guess]:.1f}", file=sys.stderr)
            write_tiles(key, tiles)
            return
    del tuned[key]


def make_weights(n: int, k: int, gated: bool, format: WeightFormat, device: torch.device) -> list[Linear]:
    """Makes packed weights [n, k] that do not fit into the L2 cache together. Used in turn, each comes from memory."""
    options = format, device, torch.bfloat16, "silu" if gated else None, gated
    weights = [random_linear((n, k), *options)]
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    for _ in range(1 + 4 * cache_bytes // weights[0].weight.nbytes):
        weights.append(random_linear((n, k), *options))
    pack_for_triton(weights)
    return weights


@torch.inference_mode()
def time_products(x: Tensor, weights: list[Linear]) -> float:
    """Returns how many microseconds the matmul of x with one of weights takes on the device."""
    norm = RMSNorm(x.shape[-1], eps=1e-5).to(x.device, x.dtype)
    fill_randomly(norm)

    def multiply():
        for w in weights:
            w(x, norm=norm)

    return do_bench_cudagraph(multiply, return_mode="median") * 1e3 / len(weights)


def write_tiles(key: str, tiles: TileConfig):
    table = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    table.setdefault(torch.cuda.get_device_name(), {})[key] = tiles._asdict()
    replace_file(TUNED, (json.dumps(table, indent=1) + "\n").encode())

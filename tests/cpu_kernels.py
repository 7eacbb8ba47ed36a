"""Helpers and fixtures for the tests of the C++ kernels, test_kernels*.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import kernels.build
from formats.cpu_layouts import ACT_GROUP_SIZE, CPU_BLOCK_N
from layers.backend import CPU_BACKEND
from layers.linear import LinearBase
from layers.packing import pack_weights
from layers.weight import Embedding, WeightMatrix
from scripts.kernel_checks.error_bounds import U
from scripts.kernel_checks.exact_results import set_weight

built = pytest.mark.skipif(kernels.build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def library():
    """The kernels, for tests that call an operation without a layer."""
    return kernels.build.load_cpp_kernels()


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request, library):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_embedding(n: int, k: int, format, dtype: torch.dtype) -> Embedding:
    """Returns a random Embedding that is not packed for the kernels."""
    return set_weight(Embedding(n, k), torch.randn(n, k).to(dtype), format)


def step_of(x: torch.Tensor, quantized: bool) -> float:
    """Returns the largest distance between two adjacent values that an element of x can have: in the dtype of x or, if
    quantized, in 8 bits with a scale for 16 elements."""
    largest = x.double().abs().max().item()
    return largest / 127 if quantized else 2 * U[x.dtype] * largest


def packed(module):
    """Returns module with the C++ kernels as its backend, for as many tokens as they can take."""
    layers = [layer for layer in module.modules() if isinstance(layer, WeightMatrix)]
    pack_weights(layers, next((w.weight.dtype for w in layers if not w.format.is_quantized), torch.float32))
    for layer in layers:
        if isinstance(layer, LinearBase):
            assert layer.backend.name == "cpu"
            assert layer.backend.token_limits["fused_linear"] >= 8
            layer.backend = CPU_BACKEND  # up to MAX_CPU_TOKENS
    return module


def stored_rows(n: int, dtype: torch.dtype) -> int:
    """Returns how many rows an unquantized matrix of n rows has in memory. Packing pads n to whole blocks."""
    library = kernels.build.load_cpp_kernels()
    is_packed = library is not None and dtype == torch.bfloat16 and library.has_prefill_linear(True)
    return math.ceil(n / CPU_BLOCK_N) * CPU_BLOCK_N if is_packed else n


def rounded_activations(x: torch.Tensor) -> torch.Tensor:
    """Rounds x [..., K] as kernels of 8- and 4-bit weights round 16-bit activations: to int8, with a scale for each
    group of ACT_GROUP_SIZE."""
    k = x.shape[-1]
    groups = F.pad(x.float(), (0, -k % ACT_GROUP_SIZE)).unflatten(-1, (-1, ACT_GROUP_SIZE))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.clamp(min=1e-30)).round() * scale).flatten(-2)[..., :k]


def quantizes_activations(format, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and kernels.build.quantizes_activations(kernels.build.load_cpp_kernels(), format)


def as_seen(x: torch.Tensor, format) -> torch.Tensor:
    """Returns what the kernels multiply with weights of format: x, or x rounded to int8."""
    return rounded_activations(x) if quantizes_activations(format, x.dtype) else x

"""Lists the checks of every Triton kernel, and the sizes for a GPU and for Triton's interpreter.

    python scripts/benchmark.py check --precision bfloat16      # on a GPU
    python -m pytest tests/test_triton.py                       # in the interpreter

A check is a generator of Comparisons. To check a new kernel, add a check to all_checks. exact_results.py makes the
data, the exact results and the bounds. All tensors are made on PyTorch's default device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from config import ACTIVATIONS
from formats import MXFP4, Float8, Int4, Int8, Unquantized, WeightFormat
from scripts.kernel_checks.check_attention import ATTENTION_OPTIONS, check_attention
from scripts.kernel_checks.check_experts import check_down, check_gate_up, check_route
from scripts.kernel_checks.check_linear import (
    check_activation,
    check_epilogue,
    check_linear,
    check_permute_inputs,
    check_random_linear,
    check_rms_norm,
    check_rows,
)
from scripts.kernel_checks.check_sampling import check_distribution, check_sample
from scripts.kernel_checks.exact_results import CHECKED_FORMATS, TRITON_FORMATS, Comparison

Check = partial[Iterator[Comparison]]

NORMS = [(1, 5), (3, 37), (8, 64), (3, 1032), (8, 5120)]  # tokens, dim
EPILOGUES = [(0.22, 0.0, 6.0), (1.0, 5.0, 0.0), (3.0, 30.0, 20.0)]  # scale, softcap, clip
ROUTERS = [(1, 8, 2, 0), (5, 128, 8, 0), (8, 6, 6, 0), (1, 7, 2, 1), (3, 8, 8, 3)]  # tokens, experts, top_k, shared


@dataclass(frozen=True)
class Sizes:
    """The sizes to check. Interpreter and GPU have sizes of their own: the interpreter is slow at large shapes, and the
    GPU's compiler at many shapes."""

    linears: list[tuple]  # N, K, whether there is a bias, numbers of tokens
    random_linears: list[tuple]  # N, K, tokens
    matrices: list[tuple]  # N, K
    few_linears: list[tuple]  # as linears, for formats that are not in CHECKED_FORMATS; K is a multiple of 32
    expert_formats: list[WeightFormat]
    experts: list[tuple]  # E, dim, ffn_dim, whether there are biases, numbers of tokens
    attention: list[tuple]  # (n_heads, n_kv_heads, head_dim), window, caches (see check_attention), options
    vocab_sizes: list[int]


def gpu_sizes(dtype: torch.dtype) -> Sizes:
    heads = [(32, 8, 128), (9, 3, 64), (8, 1, 40), (4, 4, 256)]
    caches = [(1, [0], 100), (1, [8000], 9000), (1, [255, 248, 241], 2000), (8, [1020], 2000)]
    attention = [(h, window, caches, ("head_norms",) if h[2] == 40 else ()) for h in heads for window in (0, 1000)]
    attention += [(h, 1000, caches[-2:], ATTENTION_OPTIONS) for h in heads[:2]]
    real_linears = [(4096, 4096, False, (1, 5))] if dtype == torch.bfloat16 else []  # in one type, to save time
    many = (9, 33, 64) if dtype != torch.float32 else ()  # float32 kernels take at most 8 tokens
    linears = [(1056, 1544, True, (1, 2, 5, 8, *many)), (6, 72, False, (1, 3)), *real_linears]
    return Sizes(
        linears,
        random_linears=[(1056, 1544, 5), (38, 72, 2)],
        matrices=[(n, k) for n, k, *_ in linears],
        few_linears=[(1056, 1568, True, (1, 5, 8, *many)), (38, 96, False, (2,))],
        expert_formats=TRITON_FORMATS,
        experts=[(8, 256, 512, False, (1,)), (8, 256, 512, True, (5, *many))],
        attention=attention,
        vocab_sizes=[5, 2048, 128_256],
    )


def interpreter_sizes(dtype: torch.dtype) -> Sizes:
    """Returns small sizes. With two multiprocessors, the largest product has more outputs than one program computes,
    and more columns than two steps of the program's loop."""
    caches = [(1, [0], 96), (4, [3, 150], 160), (8, [140], 160)]
    windows = {torch.float32: [0, 90], torch.bfloat16: [7], torch.float16: [0]}[dtype]
    heads = [(4, 4, 8), (6, 2, 64), (8, 1, 40)]
    attention = list(product(heads, windows, [caches], [()]))
    attention += product(heads if dtype == torch.bfloat16 else heads[-1:], windows, [caches], [("head_norms",)])
    if dtype == torch.float16:
        attention.append(((6, 2, 24), 7, [(16, [140], 160)], ()))  # the largest number of new tokens
    else:
        options = [*((name,) for name in ATTENTION_OPTIONS), ATTENTION_OPTIONS]
        attention += product([(4, 4, 8), (6, 2, 24), (8, 1, 64)], windows[:1], [caches[:2]], options)
    experts = [(4, 64, 48, True, (1, 7, 65 if dtype == torch.float32 else 9))]
    if dtype == torch.float16:
        experts = [(4, 64, 64, True, (12,))]
    if dtype == torch.float32:  # of these sizes, PyTorch computes what no kernel takes
        experts += [(4, 64, ffn_dim, False, (1, 7, 65)) for ffn_dim in (40, 44)]
    many_linears = [(38, 136, False, (33,))] if dtype == torch.float16 else []
    few_linears = [(70, 160, True, (3, 16) if dtype == torch.float16 else (3,))]
    if dtype == torch.bfloat16:  # the interpreter computes in float32
        few_linears = []
    large = (96, 264) if dtype == torch.float32 else (160, 1032)
    return Sizes(
        linears=[(6, 32, False, (1,)), (70, 72, True, (3,)), (*large, False, (2,)), *many_linears],
        random_linears=[(38, 72, 2)],
        matrices=[(5, 8), (33, 136)],
        few_linears=few_linears,
        expert_formats=[Float8(32), MXFP4()] if dtype == torch.float16 else [Unquantized(), Int8(), Int4(32)],
        experts=experts,
        attention=attention,
        vocab_sizes=[5, 2048, 5000],
    )


def all_checks(dtype: torch.dtype, sizes: Sizes) -> list[Check]:
    """Returns all checks. A check is a partial of a function at module level, so that pickle can send it to another
    process."""
    checks = [partial(check_linear, dtype, *case) for case in product(CHECKED_FORMATS, sizes.linears)]
    checks += [partial(check_random_linear, dtype, *case) for case in product(CHECKED_FORMATS, sizes.random_linears)]
    checks += [partial(check_rows, dtype, *case) for case in product(CHECKED_FORMATS, sizes.matrices)]
    for format, (n, k, has_bias, token_counts) in product(TRITON_FORMATS[len(CHECKED_FORMATS) :], sizes.few_linears):
        checks.append(partial(check_linear, dtype, format, (n, k, has_bias, token_counts)))
        checks.append(partial(check_random_linear, dtype, format, (n, k, token_counts[-1])))
        checks.append(partial(check_rows, dtype, format, (n, k)))
    checks += [partial(check_activation, dtype, *case) for case in product(ACTIVATIONS, (False, True))]
    checks += [partial(check_epilogue, dtype, *epilogue) for epilogue in EPILOGUES]
    checks += [partial(check_rms_norm, dtype, *norm) for norm in NORMS]
    checks.append(partial(check_permute_inputs, dtype))
    for format, size in product(sizes.expert_formats, sizes.experts):
        if size[2] % format.k_alignment == 0:
            checks += [partial(check_gate_up, dtype, format, size), partial(check_down, dtype, format, size)]
    checks += [partial(check_route, *router, norm_topk_prob) for router in ROUTERS for norm_topk_prob in (False, True)]
    checks += [partial(check_sample, vocab_size) for vocab_size in sizes.vocab_sizes]
    checks += [partial(check_distribution, operation) for operation in ("sample", "multinomial")]
    checks += [partial(check_attention, dtype, *case) for case in sizes.attention]
    return checks


def name_of(check: Check) -> str:
    return f"{check.func.__name__}({', '.join(str(argument) for argument in check.args)})"

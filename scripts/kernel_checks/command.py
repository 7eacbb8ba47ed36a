"""Runs the command "check" of benchmark.py: checks every Triton kernel on a GPU, where the tests do not run.

    python scripts/benchmark.py check --precision bfloat16

all_checks.py lists the checks. tests/test_triton.py runs the same checks in Triton's interpreter. This file also checks
captured steps of whole models, because only a GPU can capture Triton kernels.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from cli import common_args
from config import ModelConfig, MoEConfig
from engine.generation import DecodeLoop
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from formats import Int8
from layers.kv_cache import KVCache
from layers.packing import load_triton_kernels, pack_model
from scripts.benchmarking.speed import random_model
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.all_checks import Check, all_checks, gpu_sizes, interpreter_sizes, name_of
from scripts.kernel_checks.exact_results import Comparison
from utils.errors import UsageError

CAPTURED_MODELS = [  # options of a ModelConfig
    {},
    {"moe": MoEConfig(8, 2)},
    {
        "post_norm": True, "qk_norm": True, "qk_norm_across_heads": True, "activation": "gelu_tanh",
        "attention_scale": 0.1, "attention_softcap": 20.0, "embed_scale": 4.0, "residual_scale": 0.5,
        "logit_scale": 0.5, "logit_softcap": 9.0, "clip_qkv": 2.0, "alibi": True,
    },
]


class CheckResult:
    """The failed comparisons of some checks, and the largest error of each operation."""

    def __init__(self):
        self.failed: dict[str, str] = {}  # case -> why it failed
        self.largest_errors: dict[str, float] = {}  # operation -> error relative to the largest number of the result

    def add(self, comparison: Comparison):
        operation, case, ours, exact, bound = comparison
        size = exact.double().abs().max().clamp(min=1e-30)
        error = ((ours.double() - exact.double()).abs().max() / size).item()
        try:
            bounds.check(ours, exact, bound)
        except AssertionError:
            self.failed[f"{operation} {case}"] = f"error {error:.1e}"
        self.note_error(operation, error)

    def merge(self, other: "CheckResult"):
        self.failed |= other.failed
        for operation, error in other.largest_errors.items():
            self.note_error(operation, error)

    def note_error(self, operation: str, error: float):
        self.largest_errors[operation] = max(self.largest_errors.get(operation, 0.0), error)


def check(args: argparse.Namespace):
    """Every Triton kernel against plain PyTorch, over odd and real sizes, in one type."""
    device, dtype = common_args.device_and_dtype(args)
    if not load_triton_kernels(device):
        raise UsageError("Triton does not run here, so there is nothing to check")
    sizes = interpreter_sizes(dtype) if device.type == "cpu" else gpu_sizes(dtype)
    tasks = [partial(run_on_device, device, check) for check in all_checks(dtype, sizes)]
    if device.type == "cuda" and dtype == torch.float32:  # in float32, rounding changes no token
        tasks += [partial(run, partial(check_captured_steps, device, options)) for options in CAPTURED_MODELS]
    total = CheckResult()
    for outcome in run_all(tasks, in_parallel=device.type == "cuda"):
        total.merge(outcome)
    print(json.dumps({"failed": total.failed, "largest_errors": total.largest_errors}))
    if total.failed:
        sys.exit(1)


def run_all(tasks: list[Callable[[], CheckResult]], in_parallel: bool) -> list[CheckResult]:
    """Runs all tasks. in_parallel: in several processes, because Triton's compiler takes most of the time and uses one
    core."""
    if not in_parallel:
        return [task() for task in tasks]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(task) for task in tasks]
        return [future.result() for future in futures]


def run_on_device(device: torch.device, check: Check) -> CheckResult:
    """Runs a check with device as PyTorch's default device: the check makes its tensors there."""
    load_triton_kernels(device)  # registers the operations
    with device:
        return run(check)


def run(check: Check) -> CheckResult:
    """Makes all comparisons of a check. An exception counts as a failed case."""
    outcome = CheckResult()
    torch.manual_seed(0)
    try:
        for comparison in check():
            outcome.add(comparison)
    except Exception as e:  # the other checks continue
        outcome.failed[name_of(check)] = f"{type(e).__name__}: {str(e)[:400]}"
    return outcome


def check_captured_steps(device: torch.device, options: dict) -> Iterator[Comparison]:
    """Compares the greedy tokens of a float32 model with kernels and captured steps with those without both."""
    config = ModelConfig(512, 4, 8, 2, 64, 1024, 1000, 64, **options)
    tokens = []
    for use_kernels in (True, False):
        torch.manual_seed(0)
        model = random_model(config, Int8(), device, torch.float32)
        if use_kernels:
            pack_model(model)
        runner = ModelRunner(model, KVCache(model, 1, 64), SamplingParams(), compile=use_kernels)
        prompt = torch.arange(1, 12, device=device)[None]
        tokens.append(torch.tensor(list(DecodeLoop(runner).decode_tokens(prompt, 40))))
    yield Comparison("captured_steps", str(options), *tokens, torch.zeros(()))

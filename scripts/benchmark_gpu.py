"""What benchmark.py does on a GPU alone: the commands "check", "gpu" and "transformers", and --tune.

    python scripts/benchmark.py check --precision bfloat16   # every Triton kernel against plain PyTorch
    python scripts/benchmark.py gpu                          # checks, then as much of the table as there is time for
    python scripts/benchmark.py gpu --only check             # jobs whose name has "check" in it
    python scripts/benchmark.py gpu --tune --only 8B         # the kernels' launches are tuned first, for later use too

The table compares, by tokens per second and the share of the device's copy bandwidth, for several models and formats,

    ours           the Triton kernels, a step recorded as one graph
    plain          --kernels off: torch.compile of F.linear and PyTorch's attention, gpt-fast's technique
    transformers   Hugging Face's, static cache, compiled; if installed
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from benchmark_speed import copy_bandwidth, named_config, random_linear, random_model
from torch import Tensor

import kernels
from config import ModelConfig, MoEConfig, UsageError
from generate import generate
from kernels import reference
from kernels.formats import Dense, Format, Int4, Int8
from machine import pick_device
from model import (
    ExpertsDown,
    ExpertsGateUp,
    KVCache,
    LayerCache,
    Linear,
    RMSNorm,
    alibi_slopes,
    empty_model,
    rope_table,
)
from sampling import Sampling, multinomial
from steps import build_steps

ROOT = Path(__file__).resolve().parent.parent

# ---- The table -------------------------------------------------------------------------------------------------------

FORMATS = {"bf16": [], "int8": ["--mode", "int8"], "int4": ["--mode", "int4", "--groupsize", "64"]}
MODELS = [f"Llama-3.1-8B {format}" for format in FORMATS] + ["Mixtral-8x7B int8", "Llama-3-70B int4"]
MODELS += [f"{shape} {format}" for shape in ("Llama-3.2-1B", "Llama-2-7B") for format in FORMATS]
LEAST_SECONDS = 20  # with less time left, no job is started


def gpu(args: argparse.Namespace):
    """Checks of all kernels, then a table of models, formats and engines, on a GPU."""
    if not torch.cuda.is_available():
        raise UsageError("no CUDA or ROCm device here; the table is of GPUs")
    end = time.monotonic() + args.minutes * 60
    device, results = torch.cuda.get_device_name(), {}
    report = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "jobs": results}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{re.sub('[^A-Za-z0-9]+', '-', device)}-{time.strftime('%Y%m%d-%H%M')}.json"
    jobs = {job: arguments for job, arguments in all_jobs(args.tune).items() if args.only in job}
    checks = [job for job in jobs if job.startswith("check")]  # at the same time, for they mostly compile
    for batch in [checks, *([job] for job in jobs if job not in checks)]:
        with ThreadPoolExecutor() as pool:
            outcomes = pool.map(partial(start, end=end), [jobs[job] for job in batch])
        for job, outcome in zip(batch, outcomes, strict=True):
            results[job] = outcome
            print(f"[{end - time.monotonic():4.0f} s left] {job}: {json.dumps(outcome)[:1500]}", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{table(results)}")
    print(json.dumps(report))


def all_jobs(tune: bool) -> dict[str, list[str]]:
    """What benchmark.py is to be called with, by the jobs' names; what matters most comes first."""
    jobs = {f"check {dtype}": ["check", "--precision", dtype] for dtype in ("bfloat16", "float16", "float32")}
    engines = {"ours": ["--tune"] if tune else [], "plain": ["--kernels", "off", "--decode_only"]}
    for engine, flags in engines.items():
        for model in MODELS:
            shape, format = model.split()
            arguments = ["speed", "--config", shape, "--compile", "--json", *FORMATS[format], *flags]
            jobs[f"{engine} {model}"] = arguments
    for shape in ("Llama-3.1-8B", "Llama-3.2-1B"):
        jobs[f"transformers {shape} bf16"] = ["transformers", "--config", shape]
    return jobs


def start(arguments: list[str], end: float) -> dict:
    """What benchmark.py prints last, in a process of its own: one that fails takes nothing with it."""
    seconds = end - time.monotonic()
    if seconds < LEAST_SECONDS:
        return {"error": "no time left"}
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": "out of time"}
    except (IndexError, ValueError):  # it printed nothing, or something else
        return {"error": f"exit {done.returncode}: {done.stderr[-600:]}"}


def table(jobs: dict[str, dict]) -> str:
    """Tokens per second and share of the copy bandwidth, a line for each shape and format."""
    lines = [f"{'':22}{'ours':>16}{'plain':>16}{'transformers':>16}{'verify 5':>10}{'prefill 2048':>14}"]
    for job, ours in jobs.items():
        engine, _, model = job.partition(" ")
        if engine == "ours":
            cells = [speed_cell(jobs.get(f"{engine} {model}", {})) for engine in ("ours", "plain", "transformers")]
            verify, prefill = ours.get("verify_5_over_1", 0), ours.get("prefill_2048_tokens_per_sec", 0)
            lines.append(f"{model:22}{''.join(cells)}{verify:10.2f}{prefill:14.0f}")
    return "\n".join(lines)


def speed_cell(outcome: dict) -> str:
    if "decode_share_of_copy" not in outcome:
        return f"{'-':>16}"
    return f"{outcome['decode_tokens_per_sec']:10.1f} {outcome['decode_share_of_copy']:5.0%}"


def transformers(args: argparse.Namespace):
    """Decoding by Hugging Face transformers on a GPU, in bfloat16, with its static cache, which compiles the step."""
    import transformers as hf

    config = named_config(args.config)
    hf_config = hf.LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tie_embeddings,
        eos_token_id=None,
    )
    with torch.device("cuda"):
        model = hf.AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16).eval()
    prompt = torch.ones(1, 5, dtype=torch.long, device="cuda")

    def seconds(n: int) -> float:
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, cache_implementation="static")
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(2):  # compiles
        seconds(200)
    step = (median(seconds(200) for _ in range(3)) - seconds(1)) / 199
    active_weight_bytes = sum(p.nbytes for p in model.parameters())  # of a tied head and embedding one
    if not config.tie_embeddings:
        active_weight_bytes -= model.get_input_embeddings().weight.nbytes  # of which a step reads one row
    share = active_weight_bytes / step / copy_bandwidth()
    print(json.dumps({"decode_tokens_per_sec": 1 / step, "decode_share_of_copy": share, "version": hf.__version__}))


# ---- Checks ----------------------------------------------------------------------------------------------------------

# The largest error that rounding explains, relative to the largest number of a result
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
CHECKED_FORMATS = [Dense(), Int8(), Int4(32), Int4(64), Int4(128), Int4(256)]
LINEARS = [(1056, 1544, (1, 2, 5, 8)), (6, 72, (1, 3))]  # N, K, rows; only the first's activation is fused
REAL_LINEARS = [(4096, 4096, (1, 5))]  # in bfloat16 alone, which saves time
HEADS = [(32, 8, 128), (9, 3, 64), (8, 1, 40), (4, 4, 256)]  # n_heads, n_kv_heads, head_dim
WINDOWS = [0, 1000]
CACHES = [(1, 1, 0, 100), (1, 1, 8000, 9000), (3, 1, 255, 2000), (1, 8, 1020, 2000)]  # rows, tokens, position, length
MOE, EXPERTS_SIZES = MoEConfig(8, 2), (256, 512)  # dim, ffn_dim
NORMS = [(8, 5120), (3, 37)]  # rows, dim
ACTIVATIONS = ["gelu_tanh", "clamped_swiglu"]  # besides silu
MODELS_RECORDED = [
    {},
    {"moe": MOE},
    {
        "post_norm": True, "qk_norm": True, "qk_norm_all_heads": True, "activation": "gelu_tanh",
        "attention_scale": 0.1, "attention_softcap": 20.0, "embed_scale": 4.0, "residual_scale": 0.5,
        "logit_scale": 0.5, "logit_softcap": 9.0, "clip_qkv": 2.0, "alibi": True,
    },
]  # fmt: skip


def check(args: argparse.Namespace):
    """Every Triton kernel against plain PyTorch, over odd and real sizes, in one type."""
    device = pick_device(args.device)
    if not kernels.triton_runs(device):
        raise UsageError("Triton does not run here, so there is nothing to check")
    run = partial(run_check, device, getattr(torch, args.precision))
    checks = all_checks(getattr(torch, args.precision))
    if device.type == "cpu":
        outcomes = list(map(run, checks))
    else:  # most of the time is Triton's compiler's, which uses one core
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            outcomes = list(pool.map(run, checks))
    failed, largest_errors = {}, {}
    for checker_failed, errors in outcomes:
        failed |= checker_failed
        for operation, error in errors.items():
            largest_errors[operation] = max(largest_errors.get(operation, 0.0), error)
    print(json.dumps({"failed": failed, "largest_errors": largest_errors}))
    if failed:
        sys.exit(1)


def all_checks(dtype: torch.dtype) -> list[tuple]:
    """Names of methods of Checker, and their arguments."""
    linears = LINEARS + REAL_LINEARS if dtype == torch.bfloat16 else LINEARS
    checks = [("check_linear", format, *linear) for format, linear in product(CHECKED_FORMATS, linears)]
    checks += [("check_attend", *case) for case in product(HEADS, WINDOWS, CACHES)]
    checks += [("check_attend", *case, True) for case in product(HEADS[:2], WINDOWS[-1:], CACHES[-2:])]
    checks += [("check_epilogue", activation) for activation in ACTIVATIONS]
    checks += [("check_rms_norm", *size) for size in NORMS]
    checks += [("check_experts", format, n_tokens) for format, n_tokens in product(CHECKED_FORMATS, (1, 5))]
    checks += [("check_route",), ("check_multinomial",), ("check_sample",)]
    checks += [("check_recorded_steps", options) for options in MODELS_RECORDED]
    return checks


def run_check(device: torch.device, dtype: torch.dtype, check: tuple) -> tuple[dict[str, str], dict[str, float]]:
    """What failed, and the largest errors, of one of all_checks."""
    kernels.triton_runs(device)  # registers the operations
    checker = Checker(device, dtype)
    torch.manual_seed(0)
    name, *arguments = check
    try:
        getattr(checker, name)(*arguments)
    except Exception as e:  # the other checks go on
        checker.failed[f"{name}{tuple(arguments)}"] = f"{type(e).__name__}: {str(e)[:400]}"
    return checker.failed, checker.largest_errors


class Checker:
    """Compares the kernels with plain PyTorch on one device and in one type."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.limit = device, dtype, LIMITS[dtype]
        self.failed: dict[str, str] = {}  # what has an error above the limit, or raised an exception
        self.largest_errors: dict[str, float] = {}  # of each operation

    def compare(self, case: str, ours: Tensor, expected: Tensor, limit: float):
        """case begins with the operation's name."""
        error = (ours.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
        if not error <= limit:  # NaN is not
            self.failed[case] = f"error {error:.1e}"
        operation = case.split()[0]
        self.largest_errors[operation] = max(self.largest_errors.get(operation, 0.0), error.item())

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def check_linear(self, format: Format, out_features: int, in_features: int, row_counts: tuple[int, ...]):
        w = random_linear((out_features, in_features), format, self.device, self.dtype)
        matrix, expected = w.matrix(torch.float32).double(), w.matrix(self.dtype)
        kernels.pack_for_triton([w])
        size = f"{format.name or 'dense'} {out_features}x{in_features}"
        self.compare(f"dequantize {size}", w.matrix(self.dtype), expected, self.limit)
        # Into float32 nothing is rounded; but 16-bit kernels take int4's offset off the sum at the end
        exact_limit = 1e-4 if isinstance(format, Int4) and self.dtype != torch.float32 else 1e-5
        norm = random_norm(in_features, self.device, self.dtype)
        for n_rows in row_counts:
            details = f"{size} of {n_rows} rows"
            x, residual = self.randn(1, n_rows, in_features), self.randn(1, n_rows, out_features)
            y = F.linear(x.double(), matrix)
            self.compare(f"float32_linear {details}", kernels.linear(x, w, out_dtype=torch.float32), y, exact_limit)
            y = F.linear(reference.rms_norm(x.double(), norm.weight.double(), norm.eps), matrix)
            self.compare(f"linear {details}", kernels.linear(x, w, norm, residual), y + residual.double(), self.limit)
            y = reference.glu(y, "silu")
            self.compare(f"silu_linear {details}", kernels.linear(x, w, norm, activation="silu"), y, 2 * self.limit)

    def check_epilogue(self, activation: str):
        """What some models do after a product: an activation besides silu, a scale, and a cap."""
        w = random_linear((96, 520), Dense(), self.device, self.dtype)
        matrix = w.weight.double()
        kernels.pack_for_triton([w])
        for n_rows in (1, 5):
            x = self.randn(1, n_rows, 520) * 3
            products, details = F.linear(x.double(), matrix), f"96x520 of {n_rows} rows"
            w.scale, w.softcap = 1.0, 0.0
            y = reference.glu(products, activation)
            self.compare(f"{activation}_linear {details}", kernels.linear(x, w, activation=activation), y, self.limit)
            w.scale, w.softcap = 0.5, 2.0
            y = reference.cap(products * 0.5, 2.0)
            self.compare(f"capped_linear {details}", kernels.linear(x, w, out_dtype=torch.float32), y, 1e-5)
            w.clip = 1.0
            ours = kernels.linear(x, w, out_dtype=torch.float32)
            self.compare(f"clipped_linear {details}", ours, y.clamp(-1, 1), 1e-5)
            w.clip = 0.0

    def check_rms_norm(self, n_rows: int, dim: int):
        norm = random_norm(dim, self.device, self.dtype)
        x, residual = self.randn(1, n_rows, dim), self.randn(1, n_rows, dim)
        y = reference.rms_norm(x.double(), norm.weight.double(), norm.eps)
        self.compare(f"rms_norm {n_rows}x{dim}", norm(x, backend="triton"), y, self.limit)
        self.compare(f"rms_norm {n_rows}x{dim} added", norm(x, residual, "triton"), y + residual.double(), self.limit)

    def check_attend(
        self, heads: tuple[int, int, int], window: int, cache: tuple[int, int, int, int], has_options: bool = False
    ):
        """The output, and both caches whole, in which nothing may have changed but the new tokens' places. has_options:
        with norms over all heads, sinks, a scale, a softcap and ALiBi."""
        (n_heads, n_kv_heads, head_dim), (batch, n_tokens, position, length) = heads, cache
        rope = rope_table(ModelConfig(256, 1, n_heads, n_kv_heads, head_dim, 64, 64, length), length).to(self.device)
        qkv = self.randn(batch, n_tokens, (n_heads + 2 * n_kv_heads) * head_dim)
        k, v = self.randn(2, batch, n_kv_heads, length, head_dim)
        positions = position - 7 * torch.arange(batch, device=self.device)  # each row has its own
        norms = [None, None]
        if head_dim == 40:
            norms = [random_norm(head_dim, self.device, self.dtype) for _ in range(2)]
        sinks, scale, softcap, slopes = None, head_dim**-0.5, 0.0, None
        if has_options:
            slopes = torch.tensor(alibi_slopes(n_heads), device=self.device)
            norms = [random_norm(n * head_dim, self.device, self.dtype) for n in (n_heads, n_kv_heads)]
            sinks, scale, softcap = self.randn(n_heads), 0.1, 2.0
        options = dict(zip(("q_norm", "k_norm"), norms, strict=True))
        options |= {"n_heads": n_heads, "window": window, "sinks": sinks, "scale": scale, "softcap": softcap}

        def attend(backend: str, dtype: torch.dtype) -> Tensor:
            layer_cache = LayerCache(k.to(dtype, copy=True), v.to(dtype, copy=True), rope, slopes)
            layer = SimpleNamespace(backend=backend, **options)
            y = kernels.attend(qkv.to(dtype), layer, layer_cache, positions)
            return torch.cat([t.flatten() for t in (y, layer_cache.k, layer_cache.v)])

        case = f"attend {n_heads}/{n_kv_heads}/{head_dim} window {window}, {batch}x{n_tokens} tokens from {position} on"
        case += ", all options" if has_options else ""
        self.compare(case, attend("triton", self.dtype), attend("torch", torch.float64), 2 * self.limit)

    def check_experts(self, format: Format, n_tokens: int):
        E, (dim, ffn_dim) = MOE.n_experts, EXPERTS_SIZES
        gate_up = random_linear((E, 2 * ffn_dim, dim), format, self.device, self.dtype, ExpertsGateUp)
        down = random_linear((E, dim, ffn_dim), format, self.device, self.dtype, ExpertsDown)
        if n_tokens > 1:
            gate_up.set_tensor("bias", self.randn(E, 2 * ffn_dim)), down.set_tensor("bias", self.randn(E, dim))
        x, residual = self.randn(1, n_tokens, dim), self.randn(1, n_tokens, dim)
        norm = random_norm(dim, self.device, self.dtype)
        topk_weights, topk_ids = reference.route(torch.randn(1, n_tokens, E, device=self.device), MOE.top_k, True)
        hidden = gate_up(x, topk_ids, norm, "silu")
        y = down(hidden, topk_ids, topk_weights, residual)
        kernels.pack_for_triton([gate_up, down])
        name, limit = f"{format.name or 'dense'} of {n_tokens} tokens", 2 * self.limit
        self.compare(f"experts_gate_up {name}", gate_up(x, topk_ids, norm, "silu"), hidden, limit)
        self.compare(f"experts_down {name}", down(hidden, topk_ids, topk_weights, residual), y, limit)

    def check_route(self):
        for normalize, n_shared_experts in product((False, True), (0, 2)):
            logits = torch.randn(1, 3, MOE.n_experts + (n_shared_experts > 0), device=self.device)
            weights, ids = reference.route(logits, MOE.top_k, normalize, n_shared_experts)
            our_weights, our_ids = kernels.route(logits, MOE.top_k, normalize, "triton", n_shared_experts)
            case = f"normalized: {normalize}, shared experts: {n_shared_experts}"
            self.compare(f"topk_weights {case}", our_weights, weights, 1e-5)
            self.compare(f"topk_ids {case}", our_ids, ids, 0)

    def check_multinomial(self):
        """How often each token is drawn. Not one of our kernels, but on a GPU it takes a way of its own."""
        chances = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2], device=self.device)
        counts = multinomial(chances.expand(100_000, 5)).bincount(minlength=5)
        self.compare("multinomial", counts / 100_000, chances, 0.02)

    def check_sample(self):
        """The likeliest of many tokens; how often each of a few is drawn; rows that are not finite."""
        logits = torch.randn(3, 128_256, device=self.device)
        logits[2, 5] = math.nan
        expected = torch.cat([logits[:2].argmax(-1), torch.tensor([-1], device=self.device)])
        self.compare("sample greedy", kernels.sample(logits, 0.0), expected, limit=0)
        chances = torch.tensor([0.1, 0.5, 0.3, 0.1], device=self.device)
        counts = kernels.sample(chances.log().expand(4000, 4), 1.0).bincount(minlength=4)
        self.compare("sample", counts / 4000, chances, 0.1)

    def check_recorded_steps(self, options: dict):
        """A whole model's greedy tokens, with kernels and recorded steps, and without both. Only in float32, where
        rounding changes no token, and on a GPU, since elsewhere Triton's steps are not recorded."""
        if self.dtype != torch.float32 or self.device.type != "cuda":
            return
        config = ModelConfig(512, 4, 8, 2, 64, 1024, 1000, 64, **options)
        tokens = []
        for use_kernels in (True, False):
            torch.manual_seed(0)
            model = random_model(config, Int8(), self.device, self.dtype)
            if use_kernels:
                kernels.pack_weights(model)
            steps = build_steps(model, KVCache(model, 1, 64), Sampling(), compile=use_kernels)
            prompt = torch.arange(1, 12, device=self.device)[None]
            tokens.append(torch.tensor(list(generate(steps, prompt, 0, 40))))
        self.compare(f"recorded_steps {options}", *tokens, limit=0)


def random_norm(dim: int, device: torch.device, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(dim, eps=1e-5).to(device, dtype)
    norm.weight.uniform_()
    return norm


# ---- Tuning ----------------------------------------------------------------------------------------------------------

TILES = ("tiles", "num_warps", "depth", "num_stages")  # fields of a TileConfig
# What is tried besides the guess
LAUNCHES = [
    (1, 4, 2, 3), (1, 4, 4, 3), (1, 4, 4, 4), (1, 2, 4, 4), (1, 4, 1, 4), (1, 4, 4, 2), (1, 8, 4, 3),
    (2, 4, 2, 3), (2, 2, 4, 3), (2, 4, 1, 4), (2, 4, 1, 3), (2, 4, 2, 4), (2, 4, 4, 3), (2, 8, 1, 3), (4, 4, 2, 3),
]  # fmt: skip


def tune(config: ModelConfig, format: Format, device: torch.device):
    """Finds the fastest launches of the kernels' products for a model whose linears are in format, in some minutes.
    They go into kernels/triton_tuned.json, where the kernels find them from then on."""
    if device.type != "cuda" or not kernels.triton_runs(device):
        raise UsageError("--tune is for GPUs that Triton runs on: give --device cuda")
    tune_products(config, format, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def tune_products(config: ModelConfig, format: Format, device: torch.device):
    linears = empty_model(config.with_layers(1)).quantizable_linears()
    for n, k, gated in {(w.out_features, w.in_features, name.endswith("gate_up_proj")) for name, w in linears}:
        tune_product(n, k, gated, format, device)


def tune_product(n: int, k: int, gated: bool, format: Format, device: torch.device):
    """Of the guess and LAUNCHES, writes down the fastest for W [n, k] that also works with the most rows of x. gated: W
    is a gate and an up projection, with the activation."""
    from kernels.triton_launch import choose_tiles, gpu_of, table_key  # Triton is installed only where there is a GPU

    weights = [random_linear((n, k), format, device, torch.bfloat16)]
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    for _ in range(1 + 4 * cache_bytes // weights[0].weight.nbytes):  # so that none is in the cache when it is needed
        weights.append(random_linear((n, k), format, device, torch.bfloat16))
    kernels.pack_for_triton(weights)
    bits, group_size = 8 * weights[0].weight.element_size(), k
    if isinstance(format, Int4):
        bits, group_size = 4, format.group_size
    x = torch.randn(1, kernels.MAX_TRITON_TOKENS, k, device=device, dtype=torch.bfloat16)
    tuned = gpu_of(x.device).tuned  # choose_tiles looks into it
    key = table_key(bits, n, k, gated, group_size)
    tuned.pop(key, None)
    guess = tuple(choose_tiles(x, bits, n, gated, group_size))

    def microseconds(launch: tuple[int, ...], n_rows: int) -> float:
        tuned[key] = dict(zip(TILES, launch, strict=True))
        try:
            return time_products(x[:, :n_rows], weights, gated)
        except Exception as e:  # a GPU with less shared memory than it takes
            print(f"{key}: {launch} does not run: {e}", file=sys.stderr)
            return math.inf

    possible = [launch for launch in dict.fromkeys([guess, *LAUNCHES]) if launch[0] % 2 == 0 or not gated]
    times = {launch: microseconds(launch, n_rows=1) for launch in possible}
    for launch in sorted(times, key=times.get):
        if times[launch] < math.inf and microseconds(launch, n_rows=kernels.MAX_TRITON_TOKENS) < math.inf:
            print(f"{key}: {launch} takes {times[launch]:.1f} us, the guess {times[guess]:.1f}", file=sys.stderr)
            write_launch(key, dict(zip(TILES, launch, strict=True)))
            return
    del tuned[key]


@torch.inference_mode()
def time_products(x: Tensor, weights: list[Linear], gated: bool) -> float:
    """The device's microseconds for the product of x with one of the weights."""
    from triton.testing import do_bench_cudagraph

    norm = random_norm(x.shape[-1], x.device, x.dtype)

    def multiply():
        for w in weights:
            kernels.linear(x, w, norm, activation="silu" if gated else None)

    return do_bench_cudagraph(multiply, return_mode="median") * 1e3 / len(weights)


def write_launch(key: str, launch: dict[str, int]):
    """Puts one launch for this GPU into triton_tuned.json, which is whole at any time."""
    from kernels.triton_launch import TUNED

    table = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    table.setdefault(torch.cuda.get_device_name(), {})[key] = launch
    temporary = Path(f"{TUNED}.tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(temporary, TUNED)

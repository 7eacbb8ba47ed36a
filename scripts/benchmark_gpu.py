"""All about a GPU that is at hand, in one call of less than ten minutes: whether every Triton kernel computes what its
reference does, then tokens per second and the share of the copy bandwidth, for

    ours           kernels_triton.py, a step as one graph
    plain          --kernels off: torch.compile of F.linear and PyTorch's attention, gpt-fast's technique
    transformers   Hugging Face's, static cache, compiled; if installed

    python scripts/benchmark_gpu.py                 # checks, then as much of the table as fits
    python scripts/benchmark_gpu.py --only 8B       # jobs whose name has 8B in it
    python scripts/benchmark_gpu.py --tune --only 8B       # first, for four minutes, kernels_triton.json for this GPU

Weights are random and made on the GPU. Every job is a process of its own, so that one that fails takes nothing with it.
The result is written to benchmarks/ and printed, as JSON, last.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import CONFIGS, prefill_flops, visible

import kernels
import quantize
from checkpoint import run
from generate import build_step, build_steps, draw, generate
from model import Attention, Experts, Linear, ModelConfig, MoE, RMSNorm, Transformer, UsageError, rope_table

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"bf16": None, "int8": {"mode": "int8"}, "int4": {"mode": "int4", "groupsize": 64}}
PROMPT, NEW = 5, 200
TABLE = ROOT / "kernels_triton.json"
# For --tune, of kernels_triton.launch: tiles, warps, depth, stages
CHOICES = [(1, 4, 2, 3), (2, 4, 2, 3), (1, 8, 1, 3), (1, 8, 2, 3), (2, 8, 1, 3), (2, 2, 4, 3), (2, 4, 1, 4)]
# engine, shape, weights; what matters most comes first
JOBS = [
    "check bfloat16",
    "check float16",
    "check float32",
    *(f"ours Llama-3.1-8B {form}" for form in FORMS),
    "ours Mixtral-8x7B int8",
    "ours Llama-3-70B int4",
    "plain Llama-3.1-8B bf16",
    "plain Llama-3.1-8B int8",
    *(f"ours {shape} {form}" for shape in ("Llama-3.2-1B", "Llama-2-7B") for form in FORMS),
    "plain Llama-3.1-8B int4",
    "transformers Llama-3.1-8B bf16",
    "transformers Llama-3.2-1B bf16",
    *(f"plain Llama-3.2-1B {form}" for form in FORMS),
    "plain Mixtral-8x7B int8",
    *(f"plain Llama-2-7B {form}" for form in FORMS),
    "plain Llama-3-70B int4",
]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tune", action="store_true", help="time launch configurations first; write the best")
    p.add_argument("--only", default="", metavar="TEXT", help="only jobs whose name contains it")
    p.add_argument("--minutes", type=float, default=9, help="no job runs beyond these (default: %(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the JSON (default: %(default)s)")
    p.add_argument("--job", help=argparse.SUPPRESS)  # what the processes are started with
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise UsageError("no CUDA or ROCm device here")
    if args.job:
        name, *rest = args.job.split()
        print(json.dumps({"check": check, "tune": tune}.get(name, partial(measure, name))(*rest)))
        return
    began, jobs = time.monotonic(), [job for job in JOBS if args.only in job]
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    result |= {"cuda": torch.version.cuda or torch.version.hip, "driver": driver(), "jobs": {}}
    slug = re.sub(r"\W+", "-", result["device"])
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{slug}-{time.strftime('%Y%m%d-%H%M')}.json"
    checks = [job for job in jobs if job.startswith("check")]  # which mostly compile, so all at a time
    for batch in filter(None, [["tune"] if args.tune else [], checks, *([job] for job in jobs if job not in checks)]):
        left = args.minutes * 60 - (time.monotonic() - began)
        with ThreadPoolExecutor() as pool:
            limit = min(left, 200) if batch == checks else left
            timed_start = lambda job: start(job, limit) if limit > 20 else {"error": "no time left"}  # noqa: B023, E731
            ended = list(pool.map(timed_start, batch))
        for job, r in zip(batch, ended, strict=True):
            result["jobs"][job] = r
            print(f"[{time.monotonic() - began:4.0f} s] {job}: {json.dumps(r)[:1500]}", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    table(result["jobs"])
    print(json.dumps(result))


def start(job: str, seconds: float) -> dict:
    """What a job's process prints last, or how it failed."""
    command = [sys.executable, __file__, "--job", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": "out of time"}
    except (IndexError, ValueError):
        return {"error": f"exit {done.returncode}: {done.stderr[-600:]}"}


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def table(jobs: dict):
    """Tokens per second and share of the copy bandwidth, a line for each shape and weights."""
    print(f"\n{'':22}{'ours':>16}{'plain':>16}{'transformers':>16}{'at 8k':>12}{'verify 5':>10}{'prefill 2048':>14}")
    for job in [job for job in jobs if job.startswith("ours")]:
        _, shape, form = job.split()
        line = f"{shape + ' ' + form:22}"
        for engine in ("ours", "plain", "transformers"):
            r = jobs.get(f"{engine} {shape} {form}", {})
            line += f"{r['tokens_per_sec']:9.1f} {r['share']:5.0%} " if "share" in r else f"{'-':>15} "
        r = jobs[job]
        line += f"{r.get('share_8k', 0):12.0%}{r.get('verify_5', 0):10.2f}{r.get('prefill_2048', 0):14.0f}"
        print(line)


# ---- Right? ---------------------------------------------------------------------------------------------------------


def check(precision: str) -> dict:
    """The largest error of every kernel over odd and real sizes, relative to the largest value, and what failed: an
    error above what its type's rounding explains, or an exception."""
    errors, failed, dtype = {}, {}, getattr(torch, precision)
    limit = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]

    def compare(name: str, ours, expected, limit: float):
        """Both are functions; a failing one is written down."""
        try:
            a, b = ours().double(), expected().double()
            error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
            if not error <= limit:
                failed[name] = f"error {error:.1e}"
            kind = name.split(" ")[0]
            errors[kind] = max(errors.get(kind, 0.0), error)
        except Exception as e:
            failed[name] = f"{type(e).__name__}: {str(e)[:200]} {traceback.format_exc()[-300:]}"

    torch.manual_seed(0)
    sizes = [(1056, 1544, (1, 2, 5, 8)), (6, 72, (1, 3))]  # swiglu's kernel wants n in 32s
    sizes += [(4096, 4096, (1, 5))] if dtype == torch.bfloat16 else []
    for bits, (n, k, rows) in itertools.product((None, 8, 32, 64, 128, 256), sizes):
        w, norm = random_linear(n, k, bits, dtype), RMSNorm(k, 1e-5).to("cuda", dtype).requires_grad_(False)
        norm.weight.uniform_()
        name = f"{bits} {n}x{k}"
        wide = w.matrix(torch.float32 if bits else dtype).double()
        close = 1e-5 if bits in (None, 8) or dtype == torch.float32 else 1e-4  # int4's offset is subtracted at the end
        if bits:
            compare(f"dequantize {name}", lambda: enabled(w).matrix(dtype), lambda: wide.to(dtype), limit)  # noqa: B023
        for m in rows:
            x, residual = (torch.randn(1, m, i, device="cuda", dtype=dtype) for i in (k, n))
            plain = F.linear(x.double(), wide)
            exact = F.linear(kernels.rms_norm(x.double(), norm.weight.double(), 1e-5), wide)
            ours = lambda *a, **b: kernels.linear(x, enabled(w), *a, **b)  # noqa: B023, E731
            compare(f"wide {name} m{m}", lambda: ours(wide=True), lambda: plain, close)  # noqa: B023
            compare(f"linear {name} m{m}", lambda: ours(norm, residual), lambda: exact + residual.double(), limit)  # noqa: B023
            gate, up = exact.chunk(2, -1)
            compare(f"swiglu {name} m{m}", lambda: ours(norm, swiglu=True), lambda: F.silu(gate) * up, 2 * limit)  # noqa: B023
    for (heads, kv, d), window in itertools.product(((32, 8, 128), (9, 3, 64), (8, 1, 40), (4, 4, 256)), (None, 1000)):
        config = ModelConfig(256, 1, heads, kv, d, 64, 64, 9000, sliding_window=window, qk_norm=d == 40)
        a, norm = Attention(config).to("cuda", dtype).requires_grad_(False), RMSNorm(256, 1e-5).to("cuda", dtype)
        for t in a.parameters():
            t.normal_(std=t.shape[-1] ** -0.5)
        norm.weight.data.fill_(1)
        for batch, tokens, start, length in [(1, 1, 0, 100), (1, 1, 8000, 9000), (3, 1, 255, 2000), (1, 8, 1020, 2000)]:
            at = torch.arange(start, start + tokens, device="cuda")
            x, rope = torch.randn(batch, tokens, 256, device="cuda", dtype=dtype), rope_table(config, length).cuda()[at]
            keys = torch.arange(start + tokens, device="cuda")
            mask = (keys <= at[:, None]) & (keys > at[:, None] - (window or 10**9))

            def attend(mask, a=a, args=(x, norm, at, rope), size=(batch, length), end=start + tokens):
                a.setup_cache(*size, args[0])
                torch.manual_seed(1)
                for cache in (a.k_cache, a.v_cache):
                    cache.normal_()
                out = a(*args, mask, end)
                return torch.cat([t.flatten() for t in (out, a.k_cache[:, :, :end], a.v_cache[:, :, :end])])

            expected = attend(mask)
            enabled(a)
            name = f"attend {heads}/{kv}/{d} window {window} {batch}x{tokens} at {start}"
            compare(name, lambda: attend(None), lambda: expected, 2 * limit)  # noqa: B023
            a.wqkv.fast = a.wo.fast = None
            a.wqkv.gpu = a.wo.gpu = False
    for bits in (None, 8, 64):
        e = Experts(ModelConfig(256, 1, 4, 2, 64, 512, 64, 64, moe=MoE(8, 2))).cuda()
        e.w13, e.w2 = random_linear(1024, 256, bits, dtype, 8), random_linear(256, 512, bits, dtype, 8)
        norm, x = RMSNorm(256, 1e-5).to("cuda", dtype), torch.randn(1, 3, 256, device="cuda", dtype=dtype)
        norm.weight.data.fill_(1)
        scores = torch.randn(1, 3, 8, device="cuda")
        share, chosen = kernels.route(scores, 2, True, False)
        expected = e(x, norm, share, chosen)
        enabled(e)
        compare(f"experts {bits}", lambda: e(x, norm, share, chosen), lambda: expected, 2 * limit)  # noqa: B023
        compare(f"route {bits}", lambda: kernels.route(scores, 2, True, True)[0], lambda: share, 1e-5)  # noqa: B023
        compare(f"chosen {bits}", lambda: kernels.route(scores, 2, True, True)[1], lambda: chosen, 0)  # noqa: B023

    chances = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2], device="cuda")
    often = lambda: draw(chances.expand(100_000, 5)).bincount(minlength=5) / 100_000  # noqa: E731
    compare("draw", often, lambda: chances, 0.02)

    def tokens(fast: bool) -> Tensor:
        model = random_model(small, FORMS["int8"], fast, torch.float32)
        model.setup_caches(1, 64)
        steps = build_steps(model, {"temperature": 0}, fast, False)
        prompt = torch.arange(1, 12, device="cuda")[None]
        return torch.tensor(list(generate(*steps, prompt, 0, 40)))

    for moe in (None, MoE(8, 2)) if dtype == torch.float32 else ():
        small = ModelConfig(512, 4, 8, 2, 64, 1024, 1000, 64, moe=moe)
        compare(f"graph {moe}", lambda: tokens(True), lambda: tokens(False), 0)
    return {"failed": failed, "largest_errors": errors}


def enabled(module: torch.nn.Module) -> torch.nn.Module:
    kernels.enable(module)
    if not any(getattr(w, "gpu", False) for w in module.modules()):
        raise UsageError("Triton does not run here, so there is nothing to measure")
    return module


def random_linear(n: int, k: int, bits: int | None, dtype: torch.dtype, experts: int | None = None) -> Linear:
    """bits: None, 8, or the group of int4."""
    with torch.device("meta"):
        w = Linear(k, n, experts=experts)
    quantization = bits and ({"mode": "int8"} if bits == 8 else {"mode": "int4", "groupsize": bits})
    return fill(w, quantization, dtype)


def fill(w: Linear, quantization: dict | None, dtype: torch.dtype) -> Linear:
    """Random weights of variance 1 / inputs for w, which is on the meta device, made on the GPU as they are stored."""
    w.requires_grad_(False)
    shape, std = w.weight.shape, w.n_in**-0.5
    if quantization is None:
        w.weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda").normal_(std=std), False)
        return w
    parts = [torch.empty_like(t, device="cuda") for t in quantize.quantize_like(w.weight, **quantization)]
    del w.weight
    if quantization["mode"] == "int8":
        parts[0].random_(-127, 128)
        parts[1].fill_(std / 73)
    else:
        parts[0].random_(0, 256)
        parts[1].uniform_(std / 5, std / 4)
        parts[2].random_(100, 141)
    for name, t in zip(quantize.KINDS, parts, strict=False):
        w.register_buffer(name, t)
    w.group = quantization.get("groupsize", w.n_in)
    return w


def random_model(config: ModelConfig, quantization: dict | None, fast: bool, dtype=torch.bfloat16) -> Transformer:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config)
    quantized = {name for name, _ in quantize.linears(model)}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            fill(module, quantization if name in quantized else None, dtype)
        for kind, t in module.named_parameters(recurse=False):
            if t.is_meta:  # norms and biases, and the embedding
                new = torch.ones(t.shape, dtype=dtype, device="cuda") * (kind == "weight")
                setattr(module, kind, torch.nn.Parameter(new if t.dim() == 1 else new.normal_(), False))
    if config.tie_embeddings and quantization is None:
        model.output.weight = model.tok_embeddings.weight
        model.tok_embeddings.weight.mul_(config.dim**-0.5)
    return enabled(model.eval()) if fast else model.eval()


# ---- Fast? ----------------------------------------------------------------------------------------------------------


def measure(engine: str, shape: str, form: str) -> dict:
    config = CONFIGS[shape]
    if engine == "transformers":
        return measure_transformers(config)
    bus = copy_bandwidth()
    result = {"copy_gb_per_sec": bus / 1e9}
    began = time.perf_counter()
    model = random_model(config, FORMS[form], engine == "ours")
    torch.cuda.synchronize()
    result["make_seconds"] = time.perf_counter() - began
    token_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2

    def decode(start: int, new: int, room: int) -> tuple[float, float]:
        """(seconds a step, share of the copy bandwidth) of new tokens from position start on."""
        model.setup_caches(1, room)
        steps = build_steps(model, {"temperature": 0.8}, True, False)
        prompt, took = torch.ones(1, PROMPT, dtype=torch.long, device="cuda"), []
        for i in range(4):
            times = []
            for _ in generate(*steps, prompt[:, : 1 if start else PROMPT], start, 8 if i == 0 else new):
                times.append(time.perf_counter())
            if i:  # the first compiles
                took.append((times[-1] - times[0]) / (len(times) - 1))
        first = start + (1 if start else PROMPT)
        seen = statistics.mean(visible(config, p) for p in range(first, first + new - 1))
        step = statistics.median(took)
        return step, (model.step_bytes() + token_bytes * seen) / step / bus

    began = time.perf_counter()
    step, share = decode(0, NEW, PROMPT + NEW)
    result |= {"tokens_per_sec": 1 / step, "share": share, "model_bytes": model.step_bytes()}
    result["decode_and_compile_seconds"] = time.perf_counter() - began
    if engine != "ours":
        return result
    parts = {
        "profile_us": lambda: profile(model),
        "verify_5": lambda: seconds_of(model, 5) / seconds_of(model, 1),
        "prefill_2048": lambda: prefill(model, 2048),
        "share_8k": lambda: decode(8000, 100, 8192)[1],
    }
    for name, part in parts.items():
        try:
            if name != "share_8k" or config.max_seq_len >= 8192:
                result[name] = part()
        except Exception as e:
            result[f"{name}_error"] = f"{type(e).__name__}: {str(e)[:300]}"
    if "prefill_2048" in result:
        rate = result["prefill_2048"] * prefill_flops(config, 2048) / 2048
        result |= {"prefill_tflops": rate / 1e12, "matmul_tflops": matmul_rate() / 1e12}
    result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB: the best of ten."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a)) for _ in range(10))


def matmul_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / min(timed(lambda: a @ b) for _ in range(5))


def timed(call) -> float:
    """Seconds of the device's time."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@torch.inference_mode()
def seconds_of(model: Transformer, rows: int) -> float:
    """Seconds of a step with so many tokens: the median of 50."""
    model.setup_caches(1, 256)
    step = build_step(model, lambda x: model.logits(x).argmax(-1), True)
    tokens, at = torch.ones(1, rows, dtype=torch.long, device="cuda"), torch.arange(100, 100 + rows, device="cuda")
    return statistics.median([timed(lambda: step(tokens, at)) for _ in range(55)][5:])


@torch.inference_mode()
def prefill(model: Transformer, n: int) -> float:
    """Prompt tokens per second."""
    model.setup_caches(1, n)
    step, _ = build_steps(model, {"temperature": 0}, False, False)
    tokens, at = torch.ones(1, n, dtype=torch.long, device="cuda"), torch.arange(n, device="cuda")
    step(tokens, at)
    return n / statistics.median(timed(lambda: step(tokens, at)) for _ in range(3))


@torch.inference_mode()
def profile(model: Transformer) -> dict[str, float]:
    """Microseconds of a decode step's kernels, by name: what remains up to its time is between them."""
    model.setup_caches(1, 256)
    tokens, at = torch.ones(1, 1, dtype=torch.long, device="cuda"), torch.full((1,), 100, device="cuda")
    step, _ = build_steps(model, {"temperature": 0.8}, False, False)
    step(tokens, at)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(5):
            step(tokens, at)
        torch.cuda.synchronize()
    events = sorted(p.key_averages(), key=lambda e: -e.device_time_total)[:12]
    return {f"{e.key[:60]} x{e.count // 5}": round(e.device_time_total / 5, 1) for e in events}


def measure_transformers(config: ModelConfig) -> dict:
    import transformers

    bus = copy_bandwidth()
    hf = transformers.LlamaConfig(
        hidden_size=config.dim, intermediate_size=config.ffn_dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim,
        vocab_size=config.vocab_size, max_position_embeddings=config.max_seq_len, eos_token_id=None,
        tie_word_embeddings=config.tie_embeddings,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(hf).eval()
    prompt = torch.ones(1, PROMPT, dtype=torch.long, device="cuda")

    def seconds(n: int) -> float:
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, cache_implementation="static")
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(2):
        seconds(NEW)
    step = (statistics.median(seconds(NEW) for _ in range(3)) - seconds(1)) / (NEW - 1)
    step_bytes = sum(p.nbytes for p in model.parameters()) - (not config.tie_embeddings) * model.lm_head.weight.nbytes
    return {"tokens_per_sec": 1 / step, "share": step_bytes / step / bus, "transformers": transformers.__version__}


def tune(configs: Iterable[ModelConfig] | None = None, groupsize: int = 64) -> dict:
    """Fills kernels_triton.json's entry for this GPU: of launch()'s guess and a few other configurations for every
    product of the shapes in configs, or of four known ones, the fastest, on weights that are not in the cache. Takes
    about four minutes at most."""
    import kernels_triton

    device, best, began, sizes = torch.device("cuda", 0), {}, time.monotonic(), []
    table = kernels_triton.gpu(device)[2]  # which launch() looks into
    shapes = "Llama-3.1-8B", "Llama-3.2-1B", "Llama-2-7B", "Llama-3-70B"
    for config in configs or map(CONFIGS.get, shapes):
        width = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        sizes += [(width, config.dim, 1, True), (config.dim, config.n_heads * config.head_dim, 1, False)]
        sizes += [(2 * config.ffn_dim, config.dim, 2, True), (config.dim, config.ffn_dim, 1, False)]
        sizes += [(config.vocab_size, config.dim, 1, True)]
    for (n, k, halves, normed), bits in itertools.product(dict.fromkeys(sizes), (4, 8, 16)):
        if time.monotonic() - began > 240:
            break
        copies = max(2, 4 * torch.cuda.get_device_properties(device).L2_cache_size // (n * k * bits // 8) + 1)
        form = {4: groupsize, 8: 8, 16: None}[bits]
        ws = [enabled(random_linear(n, k, form, torch.bfloat16)) for _ in range(copies)]
        x, norm = torch.randn(1, 1, k, device="cuda", dtype=torch.bfloat16), RMSNorm(k, 1e-5).to("cuda", torch.bfloat16)
        norm.requires_grad_(False).weight.fill_(1)
        key = kernels_triton.product_key(bits, n, k, halves, groupsize)
        table.pop(key, None)
        guess = kernels_triton.launch(x, bits, n, 1, halves, groupsize)
        guess = guess["R"], guess["num_warps"], guess["B"] // guess["num_warps"], guess["STAGES"]

        def seconds(choice: tuple[int, ...], rows: int) -> float:
            table[key] = list(choice)  # noqa: B023
            before = norm if normed else None  # noqa: B023
            try:
                return products_seconds(x.expand(1, rows, k).contiguous(), ws, before, halves == 2)  # noqa: B023
            except Exception as e:  # a GPU with less shared memory
                print(key, choice, e, file=sys.stderr)  # noqa: B023
                return float("inf")

        times = {choice: seconds(choice, 1) for choice in {guess, *CHOICES} if choice[0] % halves == 0}
        fit = (c for c in sorted(times, key=times.get) if seconds(c, kernels.MAX_ROWS) < float("inf"))
        found = next(fit, None)
        if found is None:
            del table[key]
            continue
        best[key] = table[key] = found
        best_us, guess_us = (times[choice] / len(ws) * 1e6 for choice in (found, guess))
        print(f"{key}: {found} takes {best_us:.1f} us, {guess} {guess_us:.1f}", file=sys.stderr)
        whole = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        whole.setdefault(torch.cuda.get_device_name(), {})[key] = found
        TABLE.with_suffix(".tmp").write_text(json.dumps(whole, indent=1) + "\n")
        TABLE.with_suffix(".tmp").replace(TABLE)
    return {"best": best}


@torch.inference_mode()
def products_seconds(x: Tensor, ws: list[Linear], norm: RMSNorm | None, swiglu: bool) -> float:
    """The device's seconds for the products of x with all of ws, as a graph: the median of five."""
    for w in ws[:1] + ws:  # the first compiles
        kernels.linear(x, w, norm, swiglu=swiglu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in ws:
            kernels.linear(x, w, norm, swiglu=swiglu)
    return statistics.median(timed(graph.replay) for _ in range(5))


if __name__ == "__main__":
    run(main)

"""The commands gpu and hf_transformers of benchmark.py: a table of models, weight formats and engines on a GPU.

    python scripts/benchmark.py gpu                          # checks, then the table, as far as time allows
    python scripts/benchmark.py gpu --only check             # jobs whose name has "check" in it
    python scripts/benchmark.py gpu --tune --only 8B         # tunes the kernels' tiles first, for later use, too

The table has a row for each model and format, and a column for each engine. A cell has tokens per second, and the share
of the device's copy bandwidth. The engines are

    ours            the Triton kernels; a step is captured as one CUDA graph
    plain           --kernels off: torch.compile of F.linear and PyTorch's attention, as in gpt-fast
    transformers    Hugging Face's transformers, with a static cache, compiled; only if the package is installed

Every number comes from a job. A job is a process, so a failed job stops no other job.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import torch

from checkpoint import empty_model
from cli.common_args import PRECISIONS
from engine.memory_traffic import active_weight_bytes
from scripts.benchmarking.speed import copy_bandwidth, find_config
from utils.errors import UsageError
from utils.files import ROOT

FORMAT_FLAGS = {"bf16": [], "int8": ["--mode", "int8"], "int4": ["--mode", "int4", "--groupsize", "64"]}
MODELS = [f"Llama-3.1-8B {format}" for format in FORMAT_FLAGS] + ["Mixtral-8x7B int8", "Llama-3-70B int4"]
MODELS += [f"{shape} {format}" for shape in ("Llama-3.2-1B", "Llama-2-7B") for format in FORMAT_FLAGS]
LEAST_SECONDS = 20  # if less time is left, no job is started

# ---- The table -------------------------------------------------------------------------------------------------------


def gpu(args: argparse.Namespace):
    """Checks of all kernels, then a table of models, formats and engines, on a GPU."""
    if not torch.cuda.is_available():
        raise UsageError("no CUDA or ROCm device here; the table is of GPUs")
    if not 0 < args.minutes < math.inf:
        raise UsageError(f"--minutes must be above 0, not {args.minutes}")
    end = time.monotonic() + args.minutes * 60
    device, results = torch.cuda.get_device_name(), {}
    report = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "jobs": results}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{re.sub('[^A-Za-z0-9]+', '-', device)}-{time.strftime('%Y%m%d-%H%M')}.json"
    jobs = {job: arguments for job, arguments in all_jobs(args.tune).items() if args.only in job}
    for batch in in_batches(jobs):
        with ThreadPoolExecutor() as pool:
            outcomes = pool.map(partial(run_job, end=end), [jobs[job] for job in batch])
        for job, outcome in zip(batch, outcomes, strict=True):
            results[job] = outcome
            print(f"[{end - time.monotonic():4.0f} s left] {job}: {json.dumps(outcome)[:1500]}", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{engines_table(results)}")
    print(json.dumps(report))


def in_batches(jobs: dict[str, list[str]]) -> list[list[str]]:
    """Groups the names of jobs that run at the same time. All checks run together, because checks mostly compile. Every
    other job runs alone."""
    checks = [job for job in jobs if job.startswith("check")]
    return [checks, *([job] for job in jobs if job not in checks)]


def all_jobs(tune: bool) -> dict[str, list[str]]:
    """Returns the arguments of benchmark.py for each job, by the job's name. The most important jobs come first."""
    jobs = {f"check {dtype}": ["check", "--precision", dtype] for dtype in PRECISIONS}
    engines = {"ours": ["--tune"] if tune else [], "plain": ["--kernels", "off", "--decode_only"]}
    for engine, flags in engines.items():
        for model in MODELS:
            shape, format = model.split()
            arguments = ["speed", "--config", shape, "--compile", "--json", *FORMAT_FLAGS[format], *flags]
            jobs[f"{engine} {model}"] = arguments
    for shape in ("Llama-3.1-8B", "Llama-3.2-1B"):
        jobs[f"transformers {shape} bf16"] = ["hf_transformers", "--config", shape]
    return jobs


def run_job(arguments: list[str], end: float) -> dict:
    """Runs benchmark.py with arguments. Returns the JSON object in the last line of stdout, or {"error": reason}."""
    seconds = end - time.monotonic()
    if seconds < LEAST_SECONDS:
        return {"error": "no time left"}
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        return json.loads(process.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": "out of time"}
    except (IndexError, ValueError):  # the job printed nothing, or no JSON
        return {"error": f"exit {process.returncode}: {process.stderr[-600:]}"}


def engines_table(jobs: dict[str, dict]) -> str:
    """Returns the table of the module's docstring. jobs: the results by the job's name."""
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


# ---- An engine -------------------------------------------------------------------------------------------------------


def hf_transformers(args: argparse.Namespace):
    """Decoding with Hugging Face transformers on a GPU, in bfloat16. Its static cache compiles the step."""
    import transformers

    config = find_config(args.config)
    hf_config = transformers.LlamaConfig(
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
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16).eval()
    step_seconds = time_transformers_step(model)
    n_bytes = active_weight_bytes(empty_model(config).bfloat16())
    result = {
        "decode_tokens_per_sec": 1 / step_seconds,
        "decode_share_of_copy": n_bytes / step_seconds / copy_bandwidth(),
        "version": transformers.__version__,
    }
    print(json.dumps(result))


def time_transformers_step(model) -> float:
    prompt = torch.ones(1, 5, dtype=torch.long, device="cuda")

    def seconds(n: int) -> float:
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, cache_implementation="static")
        torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(2):  # compiles
        seconds(200)
    return (median(seconds(200) for _ in range(3)) - seconds(1)) / 199

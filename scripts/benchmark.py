"""Measures the speed and memory of any model's shape, with random weights and no download. Also checks the kernels.

    python scripts/benchmark.py --config TinyLlama-1.1B --compile
    python scripts/benchmark.py --config TinyLlama-1.1B --mode int4
    python scripts/benchmark.py --config checkpoints/M/model.pth            # or a config.json: the shape alone
    python scripts/benchmark.py --config TinyLlama-1.1B --parallel 1 8 64   # tokens/s of 1, 8 and 64 sequences at once
    python scripts/benchmark.py --config TinyLlama-1.1B --cold_start        # from a new process to the first token
    python scripts/benchmark.py --config TinyLlama-1.1B --busy              # beside other programs

The commands above are short for "benchmark.py speed". Two more are for GPUs:

    python scripts/benchmark.py check --precision bfloat16      # every kernel against PyTorch
    python scripts/benchmark.py gpu --minutes 9                 # checks, then a table of models, formats and engines

Two need a real model:

    python scripts/benchmark.py quantization --checkpoint_path M/model.pth --text_file A --calibration_text B
    python scripts/benchmark.py speculation --checkpoint_path M/model.pth [--draft_checkpoint_path D/model.pth]

Decoding is compared with the memory's read bandwidth, measured before and after it; the higher number counts. A decode
step reads the weights that it needs, and the keys and values of the tokens in the cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

import tokenizers
import torch

from cli import common_args
from cli.script import run_script
from config import ModelConfig
from engine.sequence import check_length
from formats import FORMAT_BY_MODE, GROUP_SIZES, Unquantized, WeightFormat
from layers.packing import load_triton_kernels
from scripts import tables
from scripts.benchmarking import busy, gpu_jobs, real_models
from scripts.benchmarking.speed import CONFIGS, find_config, measure_speed, save_random_checkpoint
from scripts.kernel_checks.command import check
from utils.errors import UsageError, check_integer
from utils.files import ROOT
from utils.machine import pick_device

OOM_HINT = "take a smaller shape, --mode int4 or fewer tokens"
REPORTED_OPTIONS = (  # which the result of the command "speed" repeats
    "config", "compile", "device", "precision", "mode", "groupsize", "prompt_tokens", "max_new_tokens", "kernels",
)


# ---- Command line ----------------------------------------------------------------------------------------------------


def main():
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--") and arguments[0] != "--help":
        arguments = ["speed", *arguments]
    args = build_parser().parse_args(arguments)
    common_args.set_threads(args.threads)
    args.command(args)


def build_parser() -> argparse.ArgumentParser:
    parser = common_args.build_parser(__doc__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    add_speed(subparsers)
    add_gpu_commands(subparsers)
    add_checkpoint_commands(subparsers)
    return parser


def add_command(subparsers, command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
    parser.set_defaults(command=command)
    common_args.add_threads(parser)
    return parser


def add_speed(subparsers):
    parser = add_command(subparsers, speed)
    add = parser.add_argument
    add("--config", required=True, help=f"a config.json, a model.pth, or one of {', '.join(CONFIGS)}")
    add("--mode", choices=FORMAT_BY_MODE, help="weights in this format (default: in --precision)")
    with_group_size = ", ".join(mode for mode, cls in FORMAT_BY_MODE.items() if cls.group_size_choices)
    add("--groupsize", type=int, choices=GROUP_SIZES, default=32, help=f"of {with_group_size} (default: %(default)s)")
    add("--compile", action="store_true", help="compile or capture the decode step; a cold start always does")
    common_args.add_device(parser)
    common_args.add_precision(parser)
    common_args.add_kernels(parser)
    add("--prompt_tokens", type=int, default=5, help="default: %(default)s")
    add("--max_new_tokens", type=int, default=200, help="default: %(default)s; a cold start's are 2")
    add("--decode_only", action="store_true", help="no prefill, no verification")
    help = "only time decoding of N sequences together (engine/scheduler.py), for each N"
    add("--parallel", type=int, nargs="+", metavar="N", help=help)
    help = "only time decoding beside a busy process, and two at once: medians of ROUNDS rounds (default: 3)"
    add("--busy", type=int, nargs="?", const=3, metavar="ROUNDS", help=help)
    add("--tune", action="store_true", help="first find the fastest launches of a GPU's kernels")
    add("--cold_start", action="store_true", help="time generate.py from its start to its first token only")
    add("--json", action="store_true", help="one JSON object too, as the last line")


def add_gpu_commands(subparsers):
    parser = add_command(subparsers, check)
    add = parser.add_argument
    add("--device", default="cuda", help="cpu: in Triton's interpreter (default: %(default)s)")
    common_args.add_precision(parser)

    parser = add_command(subparsers, gpu_jobs.gpu)
    add = parser.add_argument
    add("--tune", action="store_true", help="tune the launches of our kernels for each model first")
    add("--only", default="", metavar="TEXT", help="only jobs whose name contains TEXT")
    add("--minutes", type=float, default=9, help="stop all jobs after these minutes (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "benchmarks", help="folder of the JSON (default: %(default)s)")

    parser = add_command(subparsers, gpu_jobs.hf_transformers)
    add = parser.add_argument
    add("--config", required=True, help="as for the command speed, but only a Llama")


def add_checkpoint_commands(subparsers):
    parser = add_command(subparsers, real_models.quantization)
    add = parser.add_argument
    common_args.add_checkpoint_path(parser, help="a model.pth, not quantized")
    add("--text_file", type=Path, required=True, help="the text to predict")
    add("--calibration_text", type=Path, required=True, help="another text, for int4-gptq")
    add("--json_file", type=Path, help="where the result goes too")

    parser = add_command(subparsers, real_models.speculation)
    add = parser.add_argument
    common_args.add_checkpoint_path(parser, help="a chat model")
    add("--draft_checkpoint_path", type=Path, help="a smaller model with the same vocabulary")
    add("--speculate_k", type=int, metavar="K", help="tokens to propose at a time (default: generate.py's)")
    add("--compile", action="store_true", help="compile the steps")
    common_args.add_device(parser)
    common_args.add_precision(parser)
    add("--json_file", type=Path, help="where the result goes too")


def speed(args: argparse.Namespace):
    """Speed and memory of one shape: the default."""
    config = find_config(args.config)
    check_speed_options(args, config)
    if args.cold_start:
        args.compile, args.max_new_tokens = True, 2
    device = pick_device(args.device)
    args.device = str(device)
    format = FORMAT_BY_MODE[args.mode].from_options(args.groupsize) if args.mode else Unquantized()
    if args.tune:
        tune(config, format, device)
    torch.manual_seed(1234)
    result = {name: getattr(args, name) for name in REPORTED_OPTIONS}
    if args.cold_start:
        result |= measure_cold_start(args, config)
    elif args.busy:
        result |= busy.measure_busy(args, config, format)
    else:
        result |= measure_speed(args, config, format, device)
    if args.busy:
        print(tables.table("busy", result))
    else:
        for key, value in result.items():
            print(f"{key:32}{value:,.3f}" if isinstance(value, float) else f"{key:32}{value}")
    if args.json:
        print(json.dumps(result))


def check_speed_options(args: argparse.Namespace, config: ModelConfig):
    if args.cold_start and args.mode:
        raise UsageError("--cold_start is measured without --mode")
    for n in args.parallel or ():
        check_integer("--parallel", n, 1)
    if args.busy is not None:
        check_busy_options(args)
    max_new_tokens = 2 if args.cold_start else args.max_new_tokens
    if args.prompt_tokens < 1 or max_new_tokens < 2:
        raise UsageError("--prompt_tokens must be at least 1, and --max_new_tokens 2: the first is prefill's")
    check_length(args.prompt_tokens, max_new_tokens, config.max_seq_len)


def check_busy_options(args: argparse.Namespace):
    check_integer("--busy", args.busy, 1)
    if args.cold_start or args.parallel or args.compile or args.tune:
        raise UsageError("--busy is measured without --cold_start, --parallel, --compile and --tune")
    if pick_device(args.device).type != "cpu":
        raise UsageError("--busy is for CPUs: give --device cpu")


def tune(config: ModelConfig, format: WeightFormat, device: torch.device):
    """Finds the fastest tile sizes, for --tune: see benchmarking/tune_triton.py."""
    if device.type != "cuda" or not load_triton_kernels(device):
        raise UsageError("--tune is for GPUs that Triton runs on: give --device cuda")
    from scripts.benchmarking import tune_triton  # here, since Triton is installed only where there is a GPU

    tune_triton.tune(config, format, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# ---- Cold start ------------------------------------------------------------------------------------------------------


def measure_cold_start(args: argparse.Namespace, config: ModelConfig) -> dict:
    """Measures the seconds from the start of generate.py --compile to the first byte of text on stdout: once with empty
    caches of compiled code, and once with what the first run left there. The checkpoint was just written, so both runs
    find it in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder, "model.pth"), Path(folder, "cache")
        save_random_checkpoint(path, config, getattr(torch, args.precision))
        words = {f"w{i}": i for i in range(config.vocab_size)}  # every token can be printed
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
        tokenizer.decoder = tokenizers.decoders.Fuse()
        tokenizer.save(str(path.with_name("tokenizer.json")))
        command = [sys.executable, ROOT / "generate.py", "--checkpoint_path", path, "--compile", "--ignore_eos"]
        for name in ("device", "precision", "kernels", "prompt_tokens", "max_new_tokens"):
            command += [f"--{name}", str(getattr(args, name))]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache)}
        result = {"checkpoint": "in the page cache"}
        for state in ("empty", "warm"):
            result[f"cold_start_{state}_seconds"] = time_first_byte(command, environment)
        return result


def time_first_byte(command: list, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as process:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if not first or process.returncode:
        raise UsageError("generate.py failed; what it said is above")
    return seconds


if __name__ == "__main__":
    run_script(main, OOM_HINT)

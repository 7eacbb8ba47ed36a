"""Compares this project with llama.cpp on the same CPU, with the same weights: tokens per second, ratios, one table.

    pip install llama-cpp-python gguf matplotlib
    python scripts/compare_llama_cpp.py --config TinyLlama-1.1B     # or a config.json: random weights, no download
    python scripts/compare_llama_cpp.py --gguf model.gguf --json result.json --plot result.png
    python scripts/compare_llama_cpp.py --gguf model.gguf --parallel 1 8 16 32 64      # sequences at a time

--gguf takes files that both convert_gguf.py and llama.cpp read, and each side converts them to bfloat16. --config takes
Llama and models of the same architecture. From bfloat16, each side makes its other files with its own quantizer. All
files together take five times the space of the bfloat16 weights, in $TMPDIR. A row of the table is a pair "ours /
theirs":

    pair                 ours                                          theirs
    bf16 / BF16          bfloat16                                      bfloat16
    int8 / Q8_0          8 bits, a scale for a row                     8 bits, a scale for 32 elements
    int4.g32 / Q4_0      4 bits, scale and zero for 32 elements        4 bits, a scale for 32 elements
    int4.g32 / Q4_1      4 bits, scale and zero for 32 elements        4 bits, scale and minimum for 32 elements
    int4.g32 / Q4_K_M    4 bits, scale and zero for 32 elements        a mixture of types of 4 bits and more
    bf16, int8 or int4.g32 / file, with --gguf                         the GGUF file itself

In 4-bit files, llama.cpp stores the output head in 6 or 8 bits, and we store it in 4. So llama.cpp's files are larger
and closer to the original, above all if the model is small and the vocabulary large.

Each side of a pair runs in its own process, and the two processes take turns. A round measures the memory's read
bandwidth, decoding on both sides and prefill on both sides. There is no pause, because bandwidth may change from second
to second. In every second round llama.cpp goes first. Both sides decode greedily, and llama.cpp keeps its default
settings. Bytes per token are the weights that a decode step reads, and the keys and values of the tokens in the cache.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

import torch
from tqdm import tqdm

from cli import common_args
from cli.script import run_script
from kernels import build
from scripts import tables
from scripts.benchmarking.compare_files import files_in, make_model, make_ours, make_theirs, write_gguf
from scripts.benchmarking.compare_speed import (
    OOM_HINT,
    PREFILL,
    PROMPT,
    STEPS,
    TASKS,
    Pair,
    bytes_per_token,
    measure,
    new_process,
    result_of,
    summarize,
)
from scripts.benchmarking.speed import CONFIGS, describe_machine
from utils.errors import UsageError, check_integer

PAIRS = [
    Pair("bf16", "BF16"), Pair("int8", "Q8_0"), Pair("int4.g32", "Q4_0"), Pair("int4.g32", "Q4_1"),
    Pair("int4.g32", "Q4_K_M"),
]
MAX_SEQUENCES = PREFILL // PROMPT  # all prompts must fit one batch
PARALLEL_PAIRS = PAIRS[:3]
PAIRS_OF_FILE = [Pair("bf16", "file"), Pair("int8", "file"), Pair("int4.g32", "file")]  # with --gguf


def main():
    args = parse_args()
    result = compare(args)
    print(f"{args.threads} of {os.cpu_count()} cores of {result['cpu']}; medians of {args.rounds} rounds")
    print(tables.table("parallel" if args.parallel else "llama_cpp", result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot, draw_curves if args.parallel else draw_bars)


def compare(args: argparse.Namespace) -> dict:
    """Makes the files of both sides and measures both. Returns what --json writes."""
    torch.set_num_threads(args.threads)
    build.load_cpp_kernels()  # compiles before the first round, and prints a line if that fails
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(args.config, args.gguf, folder / "bf16.pth")
        make_ours(folder)
        pairs, files = PAIRS, files_in(folder)
        if args.gguf:
            pairs, files = PAIRS + PAIRS_OF_FILE, files | {"file": args.gguf}
        if args.parallel:
            pairs = PARALLEL_PAIRS
            needed = {"file", *(name for pair in pairs for name in pair)}
            files = {name: file for name, file in files.items() if name in needed}
        if not args.gguf:
            write_gguf(files["bf16"], files["BF16"])
        with new_process() as process:
            system_info = result_of(process.submit(make_theirs, files, args.threads))
        sizes = bytes_per_token(files)
        os.sync()  # otherwise writing the files to disk would take bandwidth during the measurement
        with tqdm(total=len(pairs) * (args.rounds + 1), desc="measure", disable=None, leave=False) as bar:
            tasks = args.parallel or TASKS
            rounds = [measure(files, pair, sizes, args.rounds, args.threads, bar, tasks) for pair in pairs]
    return {
        "model": args.config or args.gguf.name,
        **describe_machine(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "llama_cpp_system_info": system_info,
        "prompt_decode_prefill_tokens": (PROMPT, STEPS, PREFILL),
        "pairs": [summarize(pair, of_pair, sizes) for pair, of_pair in zip(pairs, rounds, strict=True)],
        "rounds": rounds,
    }


def parse_args() -> argparse.Namespace:
    parser = common_args.build_parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help=f"random weights of a config.json, or of one of {', '.join(CONFIGS)}")
    source.add_argument("--gguf", type=Path, metavar="FILE", help="the weights of a GGUF file")
    description = "how many sequences to decode at a time, instead of one sequence and a prompt"
    add("--parallel", type=int, nargs="+", metavar="N", help=description)
    add("--rounds", type=int, default=9, help="rounds of which the results are medians (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of both (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all measurements and the machine's description")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results")
    args = parser.parse_args()
    check_integer("--rounds", args.rounds, 1)
    check_integer("--threads", args.threads, 1, common_args.MAX_THREADS)
    if args.parallel and not 1 <= min(args.parallel) <= max(args.parallel) <= MAX_SEQUENCES:
        raise UsageError(f"--parallel takes numbers from 1 to {MAX_SEQUENCES}")
    for out in (args.json, args.plot):
        if out:
            common_args.check_output_file(out)
    for package in ("llama_cpp", "gguf", "matplotlib"):
        if package == "matplotlib" and not args.plot:
            continue
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is missing; pip install llama-cpp-python gguf matplotlib")
    return args


def plot(result: dict, path: Path, draw: Callable):
    """Draws result into the file at path. draw(axes, rows) draws one row for each pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    draw(axes, result["pairs"])
    axes.set_title(f"{result['model']}, {result['threads']} threads of {result['cpu']}, {result['date']}")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def draw_bars(axes, rows: list[dict]):
    for side, label, shift in (("ours", "this project", -0.2), ("theirs", "llama.cpp", 0.2)):
        x = [i + shift for i in range(len(rows))]
        bars = axes.bar(x, [row[side]["decode"] for row in rows], 0.38, label=label)
        axes.bar_label(bars, fmt="%.0f")
        limits = [row["read_bytes_per_sec"] / row[side]["bytes_per_token"] for row in rows]
        limit_bars = axes.bar(x, limits, 0.38, fill=False, edgecolor="gray", linestyle="--")
    limit_bars.set_label("bus limit: read bandwidth / bytes per token")
    axes.set_xticks(range(len(rows)), [f"{row['ours']['file']}\n{row['theirs']['file']}" for row in rows])
    axes.set_ylabel("decode, tokens/s")


def draw_curves(axes, rows: list[dict]):
    for i, row in enumerate(rows):
        for side, label, line in (("ours", "this project", "o-"), ("theirs", "llama.cpp", "o--")):
            sizes = [n for n in row[side] if isinstance(n, int)]
            axes.plot(sizes, [row[side][n] for n in sizes], line, color=f"C{i}", label=f"{label}, {row[side]['file']}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.set_xlabel("sequences at a time")
    axes.set_ylabel("decode, tokens/s of all together")


if __name__ == "__main__":
    run_script(main, OOM_HINT)

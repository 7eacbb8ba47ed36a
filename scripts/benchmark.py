"""How fast, how large and how right: of any model's shape, with random weights and nothing to download.

    python scripts/benchmark.py --config TinyLlama-1.1B --compile
    python scripts/benchmark.py --config TinyLlama-1.1B --mode int4
    python scripts/benchmark.py --config checkpoints/M/model.pth            # or a config.json: the shape alone
    python scripts/benchmark.py --config TinyLlama-1.1B --parallel 1 8 64   # tokens/s of so many sequences together
    python scripts/benchmark.py --config TinyLlama-1.1B --cold_start        # from a new process to its first token

Those are of the command "speed", which need not be named. Two commands are for GPUs (benchmark_gpu.py):

    python scripts/benchmark.py check --precision bfloat16      # every kernel against its reference
    python scripts/benchmark.py gpu --minutes 9                 # checks, then a table of models, formats and engines

Two need a real model:

    python scripts/benchmark.py quantization --checkpoint_path M/model.pth --text_file A --calibration_text B
    python scripts/benchmark.py speculation --checkpoint_path M/model.pth [--draft_checkpoint_path D/model.pth]

Decoding is held against the better of memory's read bandwidth before and after it, as that changes meanwhile. What a
decode step reads: the weights that it needs, and the keys and values of the tokens in the cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median

import benchmark_gpu
import tables
import tokenizers
import torch
from benchmark_speed import CONFIGS, measure_speed, named_config, save_random_checkpoint

from checkpoint import read_checkpoint
from cli.arguments import DEFAULT_K
from cli.report import tokens_per_step
from config import ModelConfig, UsageError
from kernels.formats import GROUP_SIZES, format_of
from machine import pick_device, read_bandwidth
from model import empty_model

ROOT = Path(__file__).resolve().parent.parent
OOM_HINT = "take a smaller shape, --mode int4 or fewer tokens"


# ---- Command line ----------------------------------------------------------------------------------------------------


def main():
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("--") and arguments[0] != "--help":
        arguments = ["speed", *arguments]
    args = make_parser().parse_args(arguments)
    cli.set_threads(args.threads)
    args.command(args)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    p = add_command(subparsers, speed)
    p.add_argument("--config", required=True, help=f"a config.json, a model.pth, or one of {', '.join(CONFIGS)}")
    p.add_argument("--mode", choices=["int8", "int4"], help="weights in this format (default: in --precision)")
    p.add_argument("--groupsize", type=int, choices=GROUP_SIZES, default=32, help="of int4 (default: %(default)s)")
    p.add_argument("--compile", action="store_true", help="compile or record the decode step; a cold start always does")
    cli.add_device(p)
    cli.add_precision(p)
    cli.add_kernels(p)
    p.add_argument("--prompt_tokens", type=int, default=5, help="default: %(default)s")
    p.add_argument("--max_new_tokens", type=int, default=200, help="default: %(default)s; a cold start's are 2")
    p.add_argument("--decode_only", action="store_true", help="no prefill, no verification")
    help = "only time decoding of so many sequences at a time, all together (scheduler.py)"
    p.add_argument("--parallel", type=int, nargs="+", metavar="N", help=help)
    p.add_argument("--tune", action="store_true", help="first find the fastest launches of a GPU's kernels")
    p.add_argument("--cold_start", action="store_true", help="time generate.py from its start to its first token only")
    p.add_argument("--json", action="store_true", help="one JSON object too, as the last line")

    p = add_command(subparsers, benchmark_gpu.check)
    p.add_argument("--device", default="cuda", help="cpu: in Triton's interpreter (default: %(default)s)")
    cli.add_precision(p)

    p = add_command(subparsers, benchmark_gpu.gpu)
    p.add_argument("--tune", action="store_true", help="tune the launches of our kernels for each model first")
    p.add_argument("--only", default="", metavar="TEXT", help="only jobs whose name contains it")
    p.add_argument("--minutes", type=float, default=9, help="no job goes on beyond these (default: %(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the JSON (default: %(default)s)")

    p = add_command(subparsers, benchmark_gpu.transformers)
    p.add_argument("--config", required=True, help="as of speed, of a Llama")

    p = add_command(subparsers, quantization)
    cli.add_checkpoint_path(p, help="a model.pth, not quantized")
    p.add_argument("--text_file", type=Path, required=True, help="the text to predict")
    p.add_argument("--calibration_text", type=Path, required=True, help="int4-gptq's, another text")
    p.add_argument("--json_file", type=Path, help="where the result goes too")

    p = add_command(subparsers, speculation)
    cli.add_checkpoint_path(p, help="a chat model")
    p.add_argument("--draft_checkpoint_path", type=Path, help="a smaller one of the same vocabulary")
    p.add_argument("--speculate_k", type=int, metavar="K", help="tokens to propose at a time (default: generate.py's)")
    p.add_argument("--compile", action="store_true", help="compile the steps")
    cli.add_device(p)
    cli.add_precision(p)
    p.add_argument("--json_file", type=Path, help="where the result goes too")
    return parser


def add_command(subparsers, command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    p = subparsers.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
    p.set_defaults(command=command)
    cli.add_threads(p)
    return p


def speed(args: argparse.Namespace):
    """Speed and memory of one shape: the default."""
    config = named_config(args.config)
    if args.cold_start:
        args.compile, args.max_new_tokens = True, 2
        if args.mode:
            raise UsageError("--cold_start is measured without --mode")
    if args.parallel and min(args.parallel) < 1:
        raise UsageError("--parallel must be at least 1")
    if args.prompt_tokens < 1 or args.max_new_tokens < 2:
        raise UsageError("--prompt_tokens must be at least 1, and --max_new_tokens 2: the first is prefill's")
    length = args.prompt_tokens + args.max_new_tokens
    if length > config.max_seq_len:
        raise UsageError(f"{length} prompt and new tokens exceed the model's context of {config.max_seq_len}")
    device = pick_device(args.device)
    args.device = str(device)
    format = format_of({"mode": args.mode, "groupsize": args.groupsize} if args.mode else None)
    if args.tune:
        benchmark_gpu.tune(config, format, device)
    torch.manual_seed(1234)
    given = "config compile device precision mode groupsize prompt_tokens max_new_tokens kernels"
    result = {name: getattr(args, name) for name in given.split()}
    result |= measure_cold_start(args, config) if args.cold_start else measure_speed(args, config, format, device)
    for key, value in result.items():
        print(f"{key:32}{value:,.3f}" if isinstance(value, float) else f"{key:32}{value}")
    if args.json:
        print(json.dumps(result))


# ---- Cold start ------------------------------------------------------------------------------------------------------


def measure_cold_start(args: argparse.Namespace, config: ModelConfig) -> dict:
    """Seconds from starting generate.py --compile to the first byte of text on stdout: with empty caches of compiled
    code, then with what that left in them. The checkpoint was just written, so both find it in the page cache."""
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


# ---- Quantization and speculation, by other scripts of ours ----------------------------------------------------------

# Every way that is compared has its turn in each round, in a process of its own, and medians over the rounds count.
# Perplexities are those of the stored weights, as prefill multiplies them; a decode step on a CPU also rounds
# activations to 8 bits.
ROUNDS = 5
UNQUANTIZED = "16 bits"
MODES = {UNQUANTIZED: [], "int8": ["--mode", "int8"]} | {  # a row's name -> flags of quantize.py
    f"{mode} g{size}": ["--mode", mode, "--groupsize", size]
    for mode in ("int4", "int4-hqq", "int4-gptq")
    for size in (32, 64, 128)
}
# An edit repeats most of what it was given; a story little, and drawn at temperature 1 less still
STORY = "Tell me a story about a clockmaker who finds a letter."
EDIT = (
    "Repeat this text word for word, but write 'sailors' instead of 'fishermen':\n\nThe harbour of the old town was "
    "built by fishermen who came from the northern islands. They carried stones from the hills on flat boats, and laid "
    "them in two long curved walls that still keep out the winter storms. On the eastern wall stands a lamp that was "
    "once lit with oil; today it runs on electricity, but the keeper still climbs the ninety steps each evening to "
    "look at the sea. Ships that pass at night count its flashes: two short ones, a pause, and a long one."
)
PROMPTS = {"edit": (EDIT, 0.0), "story": (STORY, 0.0), "story, drawn": (STORY, 1.0)}  # message, temperature


def quantization(args: argparse.Namespace):
    """Size, perplexity and speed of a checkpoint, quantized in each way."""
    if read_checkpoint(args.checkpoint_path)[1]:
        raise UsageError(f"{args.checkpoint_path} is quantized already; start from the model.pth it came from")
    texts = {}
    for name in ("text_file", "calibration_text"):
        file = getattr(args, name)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        texts[name] = {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256}
    rows, ways, reads = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        source = link_checkpoint(args.checkpoint_path, Path(folder))
        for mode in MODES:
            began = time.perf_counter()
            file = quantized_file(source, mode, args.calibration_text)
            rows[mode] = {
                "quantize_seconds": time.perf_counter() - began,
                "file_bytes": file.stat().st_size,
                "bits_per_weight": bits_per_weight(file),
            }
            ways[mode] = ["--checkpoint_path", file, "--prompt_tokens", 5, "--max_new_tokens", 128, "--ignore_eos"]
            flags = ["--checkpoint_path", file, "--text_file", args.text_file, "--json"]
            rows[mode] |= json.loads(call("eval.py", *flags))
            rows[mode]["perplexity_change"] = rows[mode]["perplexity"] / rows[UNQUANTIZED]["perplexity"] - 1
        rounds = []
        for results in by_turns(ways):
            rounds.append(results)
            reads.append(read_bandwidth(pick_device(None)) / 1e9)
    for mode in MODES:
        rows[mode]["decode_tokens_per_sec"] = median(results[mode]["decode_tokens_per_sec"] for results in rounds)
    result = {"checkpoint": args.checkpoint_path.parent.name, **texts, "read_gb_per_sec": reads, "modes": rows}
    write_result("quantization", result, args.json_file)


def link_checkpoint(path: Path, folder: Path) -> Path:
    """Makes folder one like path's, so that what is made of the checkpoint lies beside its tokenizer, but not there."""
    for file in path.absolute().parent.iterdir():
        if file.suffix != ".pth":
            (folder / file.name).symlink_to(file)
    (folder / "model.pth").symlink_to(path.absolute())
    return folder / "model.pth"


def quantized_file(source: Path, mode: str, calibration_text: Path) -> Path:
    """source quantized in one of MODES."""
    if mode == UNQUANTIZED:
        return source
    calibration = ["--calibration_text", calibration_text] if "gptq" in mode else []
    output = call("quantize.py", "--checkpoint_path", source, *MODES[mode], *calibration)
    return Path(output.removeprefix("wrote ").strip())


def bits_per_weight(file: Path) -> float:
    """Bits that file holds for a weight of its linears, scales and zero points included."""
    config, _, tensors = read_checkpoint(file)
    tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])  # a tied head that is not quantized
    linears = dict(empty_model(config).quantizable_linears())
    stored = [t.nbytes for name, t in tensors.items() if name.rpartition(".")[0] in linears and ".bias" not in name]
    return 8 * sum(stored) / sum(w.weight.numel() for w in linears.values())


def speculation(args: argparse.Namespace):
    """Tokens/s of a chat model with speculation over those without it."""
    draft, device = args.draft_checkpoint_path, pick_device(args.device)
    k = DEFAULT_K["draft" if draft else "lookup"] if args.speculate_k is None else args.speculate_k
    flags = ["--checkpoint_path", args.checkpoint_path, "--device", device, "--precision", args.precision]
    flags += ["--chat", "--max_new_tokens", 160, "--num_samples", 3]
    if args.compile:
        flags.append("--compile")
    proposer = ["--draft_checkpoint_path", draft] if draft else ["--prompt_lookup"]
    rows = {}
    for name, (message, temperature) in PROMPTS.items():
        plain = [*flags, "--prompt", message, "--temperature", temperature]
        rounds = list(by_turns({"plain": plain, "speculative": [*plain, *proposer, "--speculate_k", k]}))
        speeds = {way: [results[way]["decode_tokens_per_sec"] for results in rounds] for way in rounds[0]}
        rows[name] = {
            "plain": median(speeds["plain"]),
            "speculative": median(speeds["speculative"]),
            "ratio": median(b / a for a, b in zip(speeds["plain"], speeds["speculative"], strict=True)),
            "tokens_per_step": median(tokens_per_step(results["speculative"]["accept_counts"]) for results in rounds),
        }
    result = {"checkpoint": str(args.checkpoint_path), "draft": str(draft or "prompt lookup"), "k": k}
    result |= {"read_gb_per_sec": read_bandwidth(device) / 1e9, "prompts": rows}
    write_result("speculation", result, args.json_file)


def by_turns(ways: dict[str, list]) -> Iterator[dict[str, dict]]:
    """Of each round, what generate.py says of every way, whose flags these are."""
    for seed in range(ROUNDS):
        results = {}
        for way, flags in ways.items():
            results[way] = json.loads(call("generate.py", *flags, "--seed", seed, "--json"))
        yield results


def call(script: str, *arguments) -> str:
    """What a script of ours prints. Raises UsageError if it fails."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UsageError(f"{script} failed; what it said is above")
    return done.stdout


def write_result(table: str, result: dict, json_file: Path | None):
    """Prints the result as a table of tables.py; json_file gets it whole, with what it was measured with."""
    print(tables.table(table, result))
    software = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if json_file:
        json_file.write_text(json.dumps(result | software, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, OOM_HINT)

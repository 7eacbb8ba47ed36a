"""Measures gains and costs of quantization and of speculation, with a real model: two commands of benchmark.py.

    python scripts/benchmark.py quantization --checkpoint_path M/model.pth --text_file A --calibration_text B
    python scripts/benchmark.py speculation --checkpoint_path M/model.pth [--draft_checkpoint_path D/model.pth]

The commands run quantize.py, eval.py and generate.py. Each round runs every variant once, in a process of its own. The
results are medians over the rounds.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from checkpoint import empty_model, read_checkpoint, with_tied_head
from cli.generate_args import DEFAULT_SPECULATE_K
from cli.report import tokens_per_step
from converters.checkpoint_path import ensure_converted
from layers.linear import quantizable_linears
from quantize import GROUP_SIZE_MODES, MODES
from scripts import tables
from utils.errors import UsageError
from utils.files import ROOT
from utils.machine import pick_device, read_bandwidth

ROUNDS = 5

# ---- Quantization ----------------------------------------------------------------------------------------------------

# Perplexity is measured with prefill, which does not round activations. A decode step on a CPU rounds activations to 8
# bits, except with fp8.
UNQUANTIZED = "16 bits"
QUANTIZE_FLAGS = {UNQUANTIZED: []} | {mode: ["--mode", mode] for mode in MODES if mode not in GROUP_SIZE_MODES}
QUANTIZE_FLAGS |= {
    f"{mode} g{size}": ["--mode", mode, "--groupsize", size] for mode in GROUP_SIZE_MODES for size in (32, 64, 128)
}


def quantization(args: argparse.Namespace):
    """Size, perplexity and speed of a checkpoint, quantized in each mode."""
    path = ensure_converted(args.checkpoint_path)
    if read_checkpoint(path).quantization:
        raise UsageError(f"{path} is quantized already; start from the model.pth it came from")
    texts = {name: describe_text(getattr(args, name)) for name in ("text_file", "calibration_text")}
    rows, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        source = link_checkpoint(path, Path(folder))
        for mode in QUANTIZE_FLAGS:
            began = time.perf_counter()
            files[mode] = quantized_file(source, mode, args.calibration_text)
            quantize_seconds = time.perf_counter() - began
            rows[mode] = {"quantize_seconds": quantize_seconds} | measure_file(files[mode], args.text_file)
            rows[mode]["perplexity_change"] = rows[mode]["perplexity"] / rows[UNQUANTIZED]["perplexity"] - 1
        speeds, reads = measure_speeds(files)
    for mode in QUANTIZE_FLAGS:
        rows[mode]["decode_tokens_per_sec"] = speeds[mode]
    result = {"checkpoint": path.parent.name, **texts, "read_gb_per_sec": reads, "modes": rows}
    write_result("quantization", result, args.json_file)


def describe_text(file: Path) -> dict:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256}


def measure_file(file: Path, text_file: Path) -> dict:
    size = {"file_bytes": file.stat().st_size, "bits_per_weight": bits_per_weight(file)}
    return size | json.loads(script_output("eval.py", "--checkpoint_path", file, "--text_file", text_file, "--json"))


def measure_speeds(files: dict[str, Path]) -> tuple[dict[str, float], list[float]]:
    """Returns decoded tokens per second by mode, and the memory's bandwidth in GB/s after each round."""
    variants, rounds, reads = {}, [], []
    for mode, file in files.items():
        variants[mode] = ["--checkpoint_path", file, "--prompt_tokens", 5, "--max_new_tokens", 128, "--ignore_eos"]
    for results in run_rounds(variants):
        rounds.append(results)
        reads.append(read_bandwidth(pick_device(None)) / 1e9)
    return {mode: median(results[mode]["decode_tokens_per_sec"] for results in rounds) for mode in files}, reads


def link_checkpoint(path: Path, folder: Path) -> Path:
    """Links the checkpoint at path, and the tokenizer's files, into folder, where quantize.py then writes. Returns the
    link to the checkpoint."""
    for file in path.absolute().parent.iterdir():
        if file.suffix != ".pth":
            (folder / file.name).symlink_to(file)
    (folder / "model.pth").symlink_to(path.absolute())
    return folder / "model.pth"


def quantized_file(source: Path, mode: str, calibration_text: Path) -> Path:
    if mode == UNQUANTIZED:
        return source
    calibration = ["--calibration_text", calibration_text] if "gptq" in mode else []
    output = script_output("quantize.py", "--checkpoint_path", source, *QUANTIZE_FLAGS[mode], *calibration)
    return Path(output.removeprefix("wrote ").strip())


def bits_per_weight(file: Path) -> float:
    """Returns the bits of file for each weight of a linear layer, scales and zero points included."""
    config, _, tensors = read_checkpoint(file)
    tensors = with_tied_head(config, tensors)
    n_bytes = n_weights = 0
    for layer, linear in quantizable_linears(empty_model(config)):
        n_weights += linear.weight.numel()
        names = [f"{layer}.{name}" for name in ("weight", "scales", "zeros")]
        n_bytes += sum(tensors[name].nbytes for name in names if name in tensors)
    return 8 * n_bytes / n_weights


# ---- Speculation ----------------------------------------------------------------------------------------------------

# An edit repeats most of the prompt, a story repeats little, and a story sampled at temperature 1 repeats even less.
STORY = "Tell me a story about a clockmaker who finds a letter."
EDIT = (
    "Repeat this text word for word, but write 'sailors' instead of 'fishermen':\n\nThe harbour of the old town was "
    "built by fishermen who came from the northern islands. They carried stones from the hills on flat boats, and laid "
    "them in two long curved walls that still keep out the winter storms. On the eastern wall stands a lamp that was "
    "once lit with oil; today it runs on electricity, but the keeper still climbs the ninety steps each evening to "
    "look at the sea. Ships that pass at night count its flashes: two short ones, a pause, and a long one."
)
PROMPTS = {"edit": (EDIT, 0.0), "story": (STORY, 0.0), "story, drawn": (STORY, 1.0)}  # message, temperature


def speculation(args: argparse.Namespace):
    """Tokens/s of a chat model with speculation, divided by tokens/s without speculation."""
    draft, device = args.draft_checkpoint_path, pick_device(args.device)
    k = DEFAULT_SPECULATE_K["draft" if draft else "lookup"] if args.speculate_k is None else args.speculate_k
    flags = ["--checkpoint_path", args.checkpoint_path, "--device", device, "--precision", args.precision]
    flags += ["--chat", "--max_new_tokens", 160, "--num_samples", 3]
    if args.compile:
        flags.append("--compile")
    proposer = ["--draft_checkpoint_path", draft] if draft else ["--prompt_lookup"]
    rows = {}
    for name, (message, temperature) in PROMPTS.items():
        plain = [*flags, "--prompt", message, "--temperature", temperature]
        rows[name] = compare_speeds(plain, [*plain, *proposer, "--speculate_k", k])
    result = {"checkpoint": str(args.checkpoint_path), "draft": str(draft or "prompt lookup"), "k": k}
    result |= {"read_gb_per_sec": read_bandwidth(device) / 1e9, "prompts": rows}
    write_result("speculation", result, args.json_file)


def compare_speeds(plain_flags: list, speculative_flags: list) -> dict[str, float]:
    """Measures plain decoding and speculation. Returns a row of the table."""
    plain, speculative, steps = [], [], []
    for results in run_rounds({"plain": plain_flags, "speculative": speculative_flags}):
        plain.append(results["plain"]["decode_tokens_per_sec"])
        speculative.append(results["speculative"]["decode_tokens_per_sec"])
        steps.append(tokens_per_step(results["speculative"]["accept_counts"]))
    return {
        "plain": median(plain),
        "speculative": median(speculative),
        "ratio": median(b / a for a, b in zip(plain, speculative, strict=True)),
        "tokens_per_step": median(steps),
    }


# ---- Both ------------------------------------------------------------------------------------------------------------


def run_rounds(variants: dict[str, list]) -> Iterator[dict[str, dict]]:
    """Yields generate.py's --json results by variant, for each round. variants: name -> flags."""
    for seed in range(ROUNDS):
        results = {}
        for variant, flags in variants.items():
            results[variant] = json.loads(script_output("generate.py", *flags, "--seed", seed, "--json"))
        yield results


def script_output(script: str, *arguments) -> str:
    process = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise UsageError(f"{script} failed; what it said is above")
    return process.stdout


def write_result(table: str, result: dict, json_file: Path | None):
    print(tables.table(table, result))
    software = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if json_file:
        json_file.write_text(json.dumps(result | software, indent=1) + "\n")

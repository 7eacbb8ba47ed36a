"""What each way to quantize a checkpoint costs and brings: size, perplexity of a text, decoding speed.

    python scripts/measure_quantization.py --checkpoint_path checkpoints/M/model.pth \
        --text_file book.txt --calibration_text another.txt --json_file benchmarks/NAME.json

Every file is made by quantize.py in a temporary folder, judged by eval.py and timed by generate.py, in turns: each
round runs every file once, and a file's speed is the median of its rounds. Perplexities are those of the stored
weights, as prefill multiplies them; a decode step on a CPU also rounds activations to 8 bits.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import read_checkpoint, run
from generate import pick_device, read_bandwidth
from model import UsageError
from quantize import KINDS, linear_weights

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
MODES = [("int8", [])] + [
    (f"{mode} g{n}", ["--groupsize", n]) for mode in ("int4", "int4-hqq", "int4-gptq") for n in (32, 64, 128)
]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_path", type=Path, required=True, help="a model.pth, not quantized")
    p.add_argument("--text_file", type=Path, required=True, help="the text to predict")
    p.add_argument("--calibration_text", type=Path, required=True, help="int4-gptq's, another text")
    p.add_argument("--json_file", type=Path, help="where the result goes too")
    args = p.parse_args()
    config, quantization, tensors = read_checkpoint(args.checkpoint_path)
    if quantization:
        raise UsageError(f"{args.checkpoint_path} is quantized already; start from the model.pth it came from")
    weights = linear_weights(args.checkpoint_path, config, tensors)
    n_weights = sum(w.numel() for w in weights.values())
    with tempfile.TemporaryDirectory() as folder:
        for file in args.checkpoint_path.parent.iterdir():
            if file.suffix != ".pth":  # the tokenizer's
                Path(folder, file.name).symlink_to(file.absolute())
        Path(folder, "model.pth").symlink_to(args.checkpoint_path.absolute())
        files = {"16 bits": Path(folder, "model.pth")}
        rows = {}
        for mode, flags in [("16 bits", None), *MODES]:
            began = time.perf_counter()
            if flags is not None:
                name = mode.split()[0]
                flags = ["--mode", name, *flags]
                if name == "int4-gptq":
                    flags += ["--calibration_text", args.calibration_text]
                said = call("quantize.py", "--checkpoint_path", files["16 bits"], *flags)
                files[mode] = Path(said.removeprefix("wrote ").strip())
            took = time.perf_counter() - began
            flags = ["--checkpoint_path", files[mode], "--text_file", args.text_file, "--json"]
            result = json.loads(call("eval.py", *flags))
            rows[mode] = {
                "quantize_seconds": took,
                "file_bytes": files[mode].stat().st_size,
                "bits_per_weight": 8 * linear_bytes(files[mode], weights.keys()) / n_weights,
                **result,
                "perplexity_change": result["perplexity"] / rows["16 bits"]["perplexity"] - 1 if rows else 0.0,
            }
        rates, bus = {mode: [] for mode in files}, []
        flags = ["--prompt_tokens", "5", "--max_new_tokens", "128", "--ignore_eos", "--json"]
        for _ in range(ROUNDS):
            bus.append(read_bandwidth(pick_device(None)) / 1e9)
            for mode, file in files.items():
                result = json.loads(call("generate.py", "--checkpoint_path", file, *flags))
                rates[mode].append(result["decode_tokens_per_sec"])
    for mode, row in rows.items():
        row["decode_tokens_per_sec"] = statistics.median(rates[mode])
    texts = {name: describe(getattr(args, name)) for name in ("text_file", "calibration_text")}
    result = {
        "checkpoint": args.checkpoint_path.parent.name,
        **texts,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "read_gb_per_sec": bus,
        "modes": rows,
    }
    print(f"{'':16}{'MB':>8}{'bits/weight':>13}{'perplexity':>12}{'change':>9}{'tokens/s':>10}")
    for mode, row in rows.items():
        print(f"{mode:16}{row['file_bytes'] / 1e6:8.1f}{row['bits_per_weight']:13.2f}{row['perplexity']:12.3f}"
              f"{100 * row['perplexity_change']:+8.2f} %{row['decode_tokens_per_sec']:9.1f}")  # fmt: skip
    if args.json_file:
        args.json_file.write_text(json.dumps(result, indent=1) + "\n")


def call(script: str, *arguments) -> str:
    """What a script of ours prints."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UsageError(f"{script} failed; what it said is above")
    return done.stdout


def linear_bytes(path: Path, names) -> int:
    """Bytes that path stores for the linears called names (with their "weight"); a tied head's are the embedding's."""
    _, _, tensors = read_checkpoint(path)
    tensors = {"output.weight": tensors["tok_embeddings.weight"]} | tensors
    stored = (tensors.get(name.removesuffix("weight") + kind) for name in names for kind in KINDS)
    return sum(t.nbytes for t in stored if t is not None)


def describe(path: Path) -> dict:
    data = path.read_bytes()
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


if __name__ == "__main__":
    run(main)

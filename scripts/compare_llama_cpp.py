"""This project against llama.cpp on the same CPU, with the same weights: tokens per second, ratios, one table.

    pip install llama-cpp-python gguf matplotlib
    python scripts/compare_llama_cpp.py --config TinyLlama-1.1B     # or a config.json: random weights, no download
    python scripts/compare_llama_cpp.py --gguf model.gguf --json result.json --plot result.png

The weights become a bfloat16 model.pth and both sides' files are made from it: ours as quantize.py does, theirs by
llama.cpp's quantizer with its usual mixtures of types. All take five times the space of model.pth, in $TMPDIR. The two
sides of a pair are a process each, llama.cpp's without PyTorch, which load their files, warm up and then wait for their
turns: a round measures memory's read bandwidth, then how both decode and how both read a prompt, one right after the
other, since bandwidth may change from second to second; in every second round theirs come first. Both decode greedily;
llama.cpp's settings are its defaults. Bytes per token: the weights that a decode step reads, and the keys and values of
the tokens in the cache.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark import CONFIGS, ROOT, named_config, random_weights, shapes
from convert_hf_checkpoint import parts_of

import kernels
from checkpoint import read_checkpoint, run, save_checkpoint
from generate import load_model, read_bandwidth
from model import UsageError, rope_frequencies
from quantize import linear_weights, quantize_plain, write

OURS = {"int8": {"mode": "int8"}, "int4.g32": {"mode": "int4", "groupsize": 32}}  # besides bf16
THEIRS = {"Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15}  # besides BF16; llama.cpp's numbers of file types
PAIRS = [("bf16", "BF16"), ("int8", "Q8_0"), ("int4.g32", "Q4_0"), ("int4.g32", "Q4_1"), ("int4.g32", "Q4_K_M")]
PROMPT, STEPS, PREFILL = 5, 64, 512  # tokens: decoding takes STEPS after PROMPT; prefill takes PREFILL
CPU = torch.device("cpu")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help=f"random weights of a config.json, or of one of {', '.join(CONFIGS)}")
    source.add_argument("--gguf", type=Path, metavar="FILE", help="the weights of a llama-architecture GGUF file")
    p.add_argument("--rounds", type=int, default=9, help="medians are taken over them (default: %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements and the machine's description")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw decoding speeds against the limit of the bus")
    args = p.parse_args()
    if args.rounds < 1 or args.threads < 1:
        raise UsageError("--rounds and --threads must be at least 1")
    for out in filter(None, (args.json, args.plot)):
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise UsageError(f"{out} must be a file in a folder that exists")
    for package in ["llama_cpp", "gguf"] + ["matplotlib"] * bool(args.plot):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is missing; pip install llama-cpp-python gguf matplotlib")
    torch.set_num_threads(args.threads)
    kernels.build()  # now, or the first run would; says so if it cannot
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_model(args, folder / "bf16.pth")
        make_ours(folder)
        write_gguf(folder / "bf16.pth", folder / "BF16.gguf")
        with apart("quantize", str(folder), THEIRS, args.threads) as quantizer:
            system_info = answer(quantizer)
        sizes = bytes_per_token(folder)
        os.sync()  # or what is still on its way to the disk would take its share of the bandwidth
        bar = tqdm(total=len(PAIRS) * args.rounds, desc="measure", disable=None, leave=False)
        pairs = [measure(folder, names, sizes, args, bar) for names in PAIRS]
    result = {
        "model": args.config or args.gguf.name,
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads, "date": str(datetime.date.today()),
        "torch": torch.__version__, "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "llama_cpp_system_info": system_info, "prompt_decode_prefill_tokens": (PROMPT, STEPS, PREFILL),
        "pairs": [summarize(*both, sizes) for both in zip(PAIRS, pairs, strict=True)], "rounds": pairs,
    }  # fmt: skip
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


def make_model(args: argparse.Namespace, path: Path):
    """Writes the weights to compare with to path. Raises UsageError if llama.cpp could not do the same with them."""
    if args.gguf:
        from convert_gguf import convert_gguf

        convert_gguf(args.gguf, path.parent, torch.bfloat16)
        config = read_checkpoint(path.with_name("model.pth").rename(path))[0]
    else:
        config = named_config(args.config)
    widths = config.dim, config.ffn_dim, config.n_heads * config.head_dim
    if config.moe or config.qk_norm or any(n % 32 for n in widths):
        raise UsageError("only dense models without q/k norm, of widths that are multiples of 32, can be compared")
    if min(config.max_seq_len, config.sliding_window or PREFILL) < PREFILL:
        raise UsageError(f"the model's context, or its sliding window, is below the {PREFILL} tokens of a prefill")
    if args.config:
        torch.manual_seed(1234)
        table = {name: (shape, torch.bfloat16) for name, shape in shapes(config).items()}
        save_checkpoint(path, config, table, random_weights(config, CPU, torch.bfloat16))


def make_ours(folder: Path):
    config, _, tensors = read_checkpoint(folder / "bf16.pth")
    weights = linear_weights(folder / "bf16.pth", config, tensors)
    for name, kind in OURS.items():
        parts = ((n, quantize_plain(n, w, kind["mode"], kind.get("groupsize"))) for n, w in weights.items())
        write(folder / f"{name}.pth", config, tensors, weights, parts, kind)


def write_gguf(source: Path, target: Path):
    """A checkpoint of bfloat16 weights as a GGUF file without a tokenizer. As llama.cpp wants it, vectors are float32
    and the rows of q and k in Meta's RoPE order, pairs side by side; a tied head is the embedding."""
    import gguf
    from convert_gguf import NAMES

    config, _, tensors = read_checkpoint(source)
    theirs = {hf: name for name, hf in NAMES.items()}
    out = gguf.GGUFWriter(target, "llama")
    fields = {
        "tokenizer_model": "no_vocab", "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len, "embedding_length": config.dim, "block_count": config.n_layers,
        "feed_forward_length": config.ffn_dim, "head_count": config.n_heads, "head_count_kv": config.n_kv_heads,
        "key_length": config.head_dim, "value_length": config.head_dim, "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_theta, "layer_norm_rms_eps": config.norm_eps,
    }  # fmt: skip
    for field, value in fields.items():
        getattr(out, f"add_{field}")(value)
    if config.rope_scaling:  # as what each frequency is divided by
        divisors = rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)
        out.add_tensor("rope_freqs.weight", divisors.numpy())
    for ours, tensor in tensors.items():
        parts = list(parts_of(ours, tensor, config))
        for (name, _), t in zip(parts, tensor.split([rows for _, (rows, *_) in parts]), strict=True):
            layer, stem, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):
                t = t.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(t.shape)
            name = (f"blk.{layer}." if layer else "") + f"{theirs[stem]}.{kind}"
            if t.dim() == 1:
                out.add_tensor(name, t.float().numpy())
            else:
                out.add_tensor(name, t.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def bytes_per_token(folder: Path) -> dict[str, int]:
    """Of each file, what a decode step reads, on average. The cache holds 16-bit numbers on both sides."""
    from convert_gguf import read_gguf

    config, sizes = read_checkpoint(folder / "bf16.pth")[0], {}
    for name in ("bf16", *OURS):
        sizes[name] = load_model(folder / f"{name}.pth", CPU, torch.bfloat16, fast=False).step_bytes()
    for name in ("BF16", *THEIRS):
        tensors = {key: data.nbytes for key, (_, data) in read_gguf(folder / f"{name}.gguf")[1].items()}
        sizes[name] = sum(tensors.values()) - ("output.weight" in tensors) * tensors["token_embd.weight"]
    cache = 4 * config.n_layers * config.n_kv_heads * config.head_dim * (2 * PROMPT + STEPS + 1) // 2
    return {name: size + cache for name, size in sizes.items()}


def apart(function: str, *args) -> subprocess.Popen:
    """A new process that calls one of CHILD's functions, knowing nothing else of this file. Leaving it as a context
    closes its standard input and waits for its end."""
    command, log = [sys.executable, "-c", f"{CHILD}\n{function}(*{args!r})"], tempfile.TemporaryFile("w+")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
    process = subprocess.Popen(command, **pipes, text=True, bufsize=1, cwd=ROOT)
    process.stderr = log  # for answer, when something goes wrong
    return process


def answer(process: subprocess.Popen, question: str | None = None):
    """The next thing that process prints, after question if there is one."""
    with contextlib.suppress(BrokenPipeError):
        if question:
            print(question, file=process.stdin)
        if line := process.stdout.readline():
            return json.loads(line)
    status = process.wait()
    process.stderr.seek(0)
    print(*process.stderr.read().splitlines()[-10:], sep="\n", file=sys.stderr)
    raise UsageError(f"{process.args[-1].splitlines()[-1]} failed with status {status}; the last that it said is above")


def serve(file: str, threads: int, n_prompt: int, n_steps: int, n_prefill: int):
    """Says "ready", then for every "prefill" or "decode" on standard input tokens per second, of either side's file."""
    import json
    import sys
    import time

    generate = (our_generate if file.endswith(".pth") else llama_cpp_generate)(file, threads, n_prefill)

    def seconds(n_tokens: int, n_new: int) -> tuple[float, float]:  # of the prompt and of the steps after it
        times = [time.perf_counter()]
        for _ in generate([i % 64 for i in range(n_tokens)], n_new):
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1]

    seconds(n_prefill, 1), seconds(n_prompt, 9)  # warm-up
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        time.sleep(0.1)  # until the other side's threads, which wait for more work, have given up
        prefill = line.strip() == "prefill"
        rate = n_prefill / seconds(n_prefill, 1)[0] if prefill else n_steps / seconds(n_prompt, n_steps + 1)[1]
        print(json.dumps(rate), flush=True)


def our_generate(file: str, threads: int, room: int):
    from pathlib import Path

    import torch

    from generate import build_steps, generate, load_model

    torch.set_num_threads(threads)
    model = load_model(Path(file), torch.device("cpu"), torch.bfloat16)
    model.setup_caches(1, room)
    steps = build_steps(model, {"temperature": 0}, False, False)
    return lambda tokens, n: generate(*steps, torch.tensor([tokens]), 0, n)


def llama_cpp_generate(file: str, threads: int, room: int):
    import llama_cpp as lib
    import numpy as np

    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0  # a build for a GPU leaves it alone
    model = lib.llama_model_load_from_file(file.encode(), params)
    assert model
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = room
    params.n_threads = params.n_threads_batch = threads
    params.offload_kqv = params.op_offload = False
    context = lib.llama_init_from_model(model, params)
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def generate(tokens: list[int], n: int):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for _ in range(n):
            array = (lib.llama_token * len(tokens))(*tokens)
            assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))) == 0
            tokens = [int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (n_vocab,)).argmax())]
            yield tokens

    return generate


def quantize(folder: str, kinds: dict[str, int], threads: int):
    """Makes files of kinds from BF16.gguf; prints llama.cpp's description of its build."""
    import json

    import llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    params.nthread = threads
    for name, params.ftype in kinds.items():
        files = f"{folder}/BF16.gguf".encode(), f"{folder}/{name}.gguf".encode()
        assert lib.llama_model_quantize(*files, params) == 0
    print(json.dumps(lib.llama_print_system_info().decode()), flush=True)


CHILD = "\n".join(map(inspect.getsource, (serve, our_generate, llama_cpp_generate, quantize)))


def measure(folder: Path, names: tuple[str, str], sizes: dict[str, int], args: argparse.Namespace, bar: tqdm):
    """Of every round with the two files called names, memory's read bandwidth and what ours and theirs do."""
    files, rounds = {"ours": f"{names[0]}.pth", "theirs": f"{names[1]}.gguf"}, []
    settings = args.threads, PROMPT, STEPS, PREFILL
    with contextlib.ExitStack() as stack:
        sides = {side: stack.enter_context(apart("serve", str(folder / f), *settings)) for side, f in files.items()}
        for process in sides.values():
            answer(process)
        for i in range(args.rounds):
            result = {"read_bytes_per_sec": read_bandwidth(CPU), "ours": {}, "theirs": {}}
            for what in ("decode", "prefill"):
                for side in list(sides)[:: 1 if i % 2 == 0 else -1]:
                    result[side][what] = answer(sides[side], what)
            for side, name in zip(sides, names, strict=True):
                result[side]["share_of_read"] = result[side]["decode"] * sizes[name] / result["read_bytes_per_sec"]
            rounds.append(result)
            bar.update()
    return rounds


def summarize(names: tuple[str, str], rounds: list[dict], sizes: dict[str, int]) -> dict:
    """Of what measure() gave for the files called names, medians, and those of the rounds' ratios of ours to theirs."""
    row = {"read_bytes_per_sec": median(r["read_bytes_per_sec"] for r in rounds)}
    for side, name in zip(("ours", "theirs"), names, strict=True):
        row[side] = {what: median(r[side][what] for r in rounds) for what in rounds[0][side]}
        row[side] |= {"file": name, "bytes_per_token": sizes[name]}
    for what in ("decode", "prefill"):
        row[f"{what}_ratio"] = median(r["ours"][what] / r["theirs"][what] for r in rounds)
    return row


def table(result: dict) -> str:
    n_rounds = len(result["rounds"][0])
    reads = [r["read_bytes_per_sec"] / 1e9 for rounds in result["rounds"] for r in rounds]
    lines = [
        f"{result['model']}, {result['threads']} of {result['cores']} cores of {result['cpu']}, {result['date']}",
        f"torch {result['torch']}, llama-cpp-python {result['llama_cpp_python']}; medians of {n_rounds} "
        f"rounds; memory reads {min(reads):.1f} to {max(reads):.1f} GB/s",
        "                     decode, tokens/s   MB per token   share of read  prefill, tokens/s",
        "ours     theirs    ours  theirs  ratio   ours theirs   ours  theirs    ours  theirs  ratio",
    ]
    for row in result["pairs"]:
        a, b = row["ours"], row["theirs"]
        lines.append(
            f"{a['file']:9}{b['file']:7}{a['decode']:7.1f}{b['decode']:8.1f}{row['decode_ratio']:7.2f}"
            f"{a['bytes_per_token'] / 1e6:7.0f}{b['bytes_per_token'] / 1e6:7.0f}{a['share_of_read']:7.0%}"
            f"{b['share_of_read']:8.0%}{a['prefill']:8.0f}{b['prefill']:8.0f}{row['prefill_ratio']:7.2f}"
        )
    return "\n".join(lines)


def plot(result: dict, path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for side, label, shift in (("ours", "this project", -0.2), ("theirs", "llama.cpp", 0.2)):
        rows, at = result["pairs"], [i + shift for i in range(len(PAIRS))]
        axes.bar_label(axes.bar(at, [row[side]["decode"] for row in rows], 0.38, label=label), fmt="%.0f")
        limits = [row["read_bytes_per_sec"] / row[side]["bytes_per_token"] for row in rows]
        bus = axes.bar(at, limits, 0.38, fill=False, edgecolor="gray", linestyle="--")
    bus.set_label("bus limit: read bandwidth / bytes per token")
    axes.set_xticks(range(len(PAIRS)), ["\n".join(files) for files in PAIRS])
    axes.set_ylabel("decode, tokens/s")
    axes.set_title(f"{result['model']}, {result['threads']} threads of {result['cpu']}, {result['date']}")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def cpu_name() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    run(main)

"""This project against llama.cpp on the same CPU, with the same weights: tokens per second, ratios, one table.

    pip install llama-cpp-python gguf matplotlib
    python scripts/compare_llama_cpp.py --config TinyLlama-1.1B     # or a config.json: random weights, no download
    python scripts/compare_llama_cpp.py --gguf model.gguf --json result.json --plot result.png

--gguf takes what convert_gguf.py takes and llama.cpp knows, --config only Llama and its like. The weights become
bfloat16, and both sides' files are made from that: ours as quantize.py does, theirs by llama.cpp's quantizer with its
usual mixtures of types. All take five times the space of the bfloat16 weights, in $TMPDIR. Rows are "ours / theirs":

    bf16 / BF16          the same numbers; of a GGUF, convert_gguf.py's and llama.cpp's own
    int8 / Q8_0          8 bits and a scale, for a row / for 32 elements
    int4.g32 / Q4_0      4 bits and, for 32 elements, a scale and a zero point / a scale
    int4.g32 / Q4_1      4 bits and, for 32 elements, a scale and a zero point / a scale and a minimum
    int4.g32 / Q4_K_M    the same / a mixture of 4-bit types and wider ones
    bf16, int8 or int4.g32 / file    each of ours / --gguf's file as it is

Their 4-bit files have the output head in 6 or 8 bits, ours in 4. So theirs are larger, and closer to the original: much
so if the model is small and its vocabulary large.

The two sides of a pair are a process each, which waits for its turns. A round measures memory's read bandwidth, then
how both decode and how both read a prompt, one right after the other, since bandwidth may change from second to second;
in every second round theirs come first. Both decode greedily; llama.cpp's settings are its defaults. Bytes per token:
the weights that a decode step reads, and the keys and values of the tokens in the cache.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import MISSING, fields, replace
from functools import cache
from statistics import mean, median

import tables
import torch
from benchmark_speed import CONFIGS, named_config, save_random_checkpoint
from convert_hf_checkpoint import sources_of
from torch import Tensor
from tqdm import tqdm

from checkpoint import read_checkpoint
from config import ModelConfig, UsageError
from generate import generate
from kernels import cpu
from kernels.formats import Int4, Int8, Tensors
from loading import load_model
from machine import read_bandwidth
from model import KVCache, rope_frequencies
from quantize import linear_weights, quantize_each, write
from sampling import Sampling
from steps import build_steps

OOM_HINT = "end other programs, or compare a smaller model"
OF_LLAMA = (  # options of ModelConfig
    "norm_eps", "qkv_bias", "out_bias", "ffn_bias", "tie_embeddings", "sliding_window", "rope_theta", "rope_scaling",
    "bos_id", "eos_ids",
)  # fmt: skip
OURS = {"int8": Int8(), "int4.g32": Int4(32)}  # besides bf16
THEIRS = {"BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15}  # llama.cpp's numbers of file types
PAIRS = [("bf16", "BF16"), ("int8", "Q8_0"), ("int4.g32", "Q4_0"), ("int4.g32", "Q4_1"), ("int4.g32", "Q4_K_M")]
PAIRS_OF_FILE = [("bf16", "file"), ("int8", "file"), ("int4.g32", "file")]  # with --gguf
PROMPT, STEPS, PREFILL = 5, 64, 512  # tokens: decoding takes STEPS after PROMPT; prefill takes PREFILL
PAUSE = 0.1  # seconds until the other side's threads, which wait for more work, have given up
CPU = torch.device("cpu")


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    cpu.build()  # now, or the first round would; says so if it cannot
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(args.config, args.gguf, folder / "bf16.pth")
        make_ours(folder)
        pairs, files = PAIRS, files_in(folder)
        if args.gguf:
            pairs, files = PAIRS + PAIRS_OF_FILE, files | {"file": args.gguf}
        else:
            write_gguf(files["bf16"], files["BF16"])
        with new_process() as process:
            system_info = answer(process.submit(make_theirs, files, args.threads))
        sizes = bytes_per_token(files)
        os.sync()  # or what is still on its way to the disk would take its share of the bandwidth
        with tqdm(total=len(pairs) * (args.rounds + 1), desc="measure", disable=None, leave=False) as bar:
            rounds = [measure(files, pair, sizes, args.rounds, args.threads, bar) for pair in pairs]
    result = {
        "model": args.config or args.gguf.name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "llama_cpp_system_info": system_info,
        "prompt_decode_prefill_tokens": (PROMPT, STEPS, PREFILL),
        "pairs": [summarize(pair, of_pair, sizes) for pair, of_pair in zip(pairs, rounds, strict=True)],
        "rounds": rounds,
    }
    print(f"{args.threads} of {os.cpu_count()} cores of {result['cpu']}; medians of {args.rounds} rounds")
    print(tables.table("llama_cpp", result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


def parse_args() -> argparse.Namespace:
    p = cli.make_parser(__doc__)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help=f"random weights of a config.json, or of one of {', '.join(CONFIGS)}")
    source.add_argument("--gguf", type=Path, metavar="FILE", help="the weights of a GGUF file")
    p.add_argument("--rounds", type=int, default=9, help="medians are taken over them (default: %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all measurements and the machine's description")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw decoding speeds against the limit of the bus")
    args = p.parse_args()
    if args.rounds < 1 or args.threads < 1:
        raise UsageError("--rounds and --threads must be at least 1")
    for out in (args.json, args.plot):
        if out and (out.is_dir() or not out.absolute().parent.is_dir()):
            raise UsageError(f"{out} must be a file in a folder that exists")
    for package in ("llama_cpp", "gguf", "matplotlib"):
        if package == "matplotlib" and not args.plot:
            continue
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is missing; pip install llama-cpp-python gguf matplotlib")
    return args


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


# ---- Both sides' files -----------------------------------------------------------------------------------------------


def files_in(folder: Path) -> dict[str, Path]:
    """Both sides' files of the model, by the names of their formats."""
    ours = {name: folder / f"{name}.pth" for name in ("bf16", *OURS)}
    return ours | {name: folder / f"{name}.gguf" for name in THEIRS}


def make_model(config_name: str | None, gguf_file: Path | None, path: Path):
    """Writes the weights to compare with to path: random ones for config_name, or those of gguf_file. Raises UsageError
    if llama.cpp could not do the same with them."""
    if gguf_file:
        from convert_gguf import convert_gguf

        convert_gguf(gguf_file, path.parent, torch.bfloat16)
        config = read_checkpoint(path.with_name("model.pth").rename(path))[0]
        check_sizes(config)
    else:
        config = named_config(config_name)
        check_sizes(config)
        check_like_llama(config)
        save_random_checkpoint(path, config, torch.bfloat16)


def check_sizes(config: ModelConfig):
    widths = config.dim, config.ffn_dim, config.n_heads * config.head_dim
    if any(width % 32 for width in widths):
        raise UsageError("only models of widths that are multiples of 32 can be compared")
    if config.max_seq_len < PREFILL:
        raise UsageError(f"the model's context is below the {PREFILL} tokens of a prefill")


def check_like_llama(config: ModelConfig):
    """Raises UsageError for a model that write_gguf cannot write as one of llama.cpp's architecture "llama"."""
    defaults = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}
    other = [name for name in defaults if name not in OF_LLAMA and getattr(config, name) != defaults[name]]
    if config.rope_scaling is not None and config.rope_scaling.rope_type not in ("linear", "llama3"):
        other.append("rope_scaling")
    if other:
        why = f"this model has {', '.join(other)}"
        raise UsageError(f"without --gguf, only Llama and its like can be compared; {why}")
    if config.sliding_window and config.sliding_window < PREFILL:  # write_gguf leaves it out
        raise UsageError(f"the model's sliding window is below the {PREFILL} tokens of a prefill")


def make_ours(folder: Path):
    """bf16.pth in our other formats, as quantize.py makes them."""
    source = folder / "bf16.pth"
    config, _, tensors = read_checkpoint(source)
    weights = linear_weights(source, config, tensors)
    for name, format in OURS.items():
        quantized = quantize_each(weights, format.quantize)
        write(folder / f"{name}.pth", config, tensors, weights, quantized, format)


def write_gguf(source: Path, target: Path):
    """A checkpoint of bfloat16 weights as a GGUF file without a tokenizer. A tied head is the embedding there, too."""
    import gguf  # which parse_args has found

    config, _, tensors = read_checkpoint(source)
    out = gguf.GGUFWriter(target, "llama")
    out.add_tokenizer_model("no_vocab")
    out.add_vocab_size(config.vocab_size)
    out.add_context_length(config.max_seq_len)
    out.add_embedding_length(config.dim)
    out.add_block_count(config.n_layers)
    out.add_feed_forward_length(config.ffn_dim)
    out.add_head_count(config.n_heads)
    out.add_head_count_kv(config.n_kv_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_theta)
    out.add_layer_norm_rms_eps(config.norm_eps)
    if config.rope_scaling:  # as what each frequency is divided by
        plain = rope_frequencies(replace(config, rope_scaling=None), config.max_seq_len)
        divisors = plain / rope_frequencies(config, config.max_seq_len)
        out.add_tensor("rope_freqs.weight", divisors.numpy())
    for name, tensor in their_tensors(tensors, config):
        if tensor.dim() == 1:
            out.add_tensor(name, tensor.float().numpy())
        else:
            bfloat16 = tensor.contiguous().view(torch.uint8).numpy()
            out.add_tensor(name, bfloat16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def their_tensors(tensors: Tensors, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's tensors, of which ours are made. Their rows of q and k are in the order of Meta's RoPE: i and i + D/2
    side by side."""
    from convert_gguf import HF_NAMES

    gguf_names = {hf_name: gguf_name for gguf_name, hf_name in HF_NAMES.items()}
    for name, tensor in tensors.items():
        sources = sources_of(name, tensor.shape, config)
        pieces = tensor.split([shape[0] for shape in sources.values()])
        for source, piece in zip(sources, pieces, strict=True):
            layer, module, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", source).groups()
            if module in ("self_attn.q_proj", "self_attn.k_proj"):
                halves = piece.unflatten(0, (-1, 2, config.head_dim // 2))  # [heads, 2, D/2, ...]
                piece = halves.transpose(1, 2).reshape(piece.shape)
            prefix = f"blk.{layer}." if layer else ""
            yield f"{prefix}{gguf_names[module]}.{kind}", piece


def make_theirs(files: dict[str, Path], threads: int) -> str:
    """llama.cpp's formats: BF16 from the GGUF file, if there is one, and the others from BF16. Returns llama.cpp's
    description of its build."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.allow_requantize = True  # the file may be quantized
    for name, number in THEIRS.items():
        source = files.get("file") if name == "BF16" else files["BF16"]
        if source is None:  # write_gguf has made BF16
            continue
        params.ftype = number
        if llama_cpp.llama_model_quantize(str(source).encode(), str(files[name]).encode(), params) != 0:
            raise UsageError(f"llama.cpp cannot make {name} of {source}")
    return llama_cpp.llama_print_system_info().decode()


def bytes_per_token(files: dict[str, Path]) -> dict[str, int]:
    """What a decode step reads on average, for each file by name. The cache holds 16-bit numbers on both sides."""
    config = read_checkpoint(files["bf16"])[0]
    tokens_read = mean(config.mean_attended_tokens(PROMPT + i + 1) for i in range(STEPS))
    cache = round(4 * config.n_layers * config.n_kv_heads * config.head_dim * tokens_read)
    sizes = {}
    for name, file in files.items():
        if file.suffix == ".pth":
            sizes[name] = cache + load_model(file, CPU, torch.bfloat16, use_kernels=False).active_weight_bytes()
        else:
            sizes[name] = cache + their_step_bytes(file, config)
    return sizes


def their_step_bytes(file: Path, config: ModelConfig) -> int:
    """Transformer.active_weight_bytes of a GGUF."""
    from convert_gguf import read_parts

    _, tensors = read_parts(file)
    if "output.weight" in tensors:  # then of the embedding a step reads one row
        del tensors["token_embd.weight"]
    total = 0
    for name, tensor in tensors.items():
        total += tensor.data.nbytes * (config.moe.fraction_read if "_exps." in name else 1)
    return round(total)


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure(
    files: dict[str, Path], pair: tuple[str, str], sizes: dict[str, int], n_rounds: int, threads: int, bar: tqdm
) -> list[dict]:
    """Of every round with the two files of a pair, memory's read bandwidth and what ours and theirs do."""
    names = dict(zip(("ours", "theirs"), pair, strict=True))
    order, rounds = ["ours", "theirs"], []
    with new_process() as our_process, new_process() as their_process:
        processes = {"ours": our_process, "theirs": their_process}
        for _ in range(n_rounds + 1):
            result = {"read_bytes_per_sec": read_bandwidth(CPU), "ours": {}, "theirs": {}}
            for task in ("decode", "prefill"):
                for side in order:
                    arguments = LOADERS[side], str(files[names[side]]), threads, task
                    result[side][task] = answer(processes[side].submit(tokens_per_second, *arguments))
            for side, name in names.items():
                result[side]["share_of_read"] = result[side]["decode"] * sizes[name] / result["read_bytes_per_sec"]
            rounds.append(result)
            order.reverse()
            bar.update()
    return rounds[1:]  # the first loads the files and warms up


def new_process() -> ProcessPoolExecutor:
    """A process that does one thing after the other. It imports PyTorch; but llama.cpp's calls nothing of it, so that
    PyTorch starts no threads there."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=cli.exit_on_interrupt)


def answer(future: Future):
    try:
        return future.result()
    except BrokenProcessPool:
        raise UsageError(f"a process was killed; {OOM_HINT}") from None


def tokens_per_second(load: Callable, file: str, threads: int, task: str) -> float:
    """Of "prefill", which takes PREFILL tokens, or of "decode", which takes STEPS after PROMPT tokens. load is one of
    LOADERS, which reads the file when it is called first."""
    generate_greedily = load(file, threads)
    time.sleep(PAUSE)
    n_prompt, n_new = (PREFILL, 1) if task == "prefill" else (PROMPT, 1 + STEPS)
    times = [time.perf_counter()]
    for _ in generate_greedily([i % 64 for i in range(n_prompt)], n_new):
        times.append(time.perf_counter())
    return PREFILL / (times[1] - times[0]) if task == "prefill" else STEPS / (times[-1] - times[1])


@cache
def our_generate(file: str, threads: int) -> Callable[[list[int], int], Iterator]:
    """The function (prompt, n) -> an iterator that takes a step for each of n new tokens."""
    torch.set_num_threads(threads)
    model = load_model(Path(file), CPU, torch.bfloat16)
    steps = build_steps(model, KVCache(model, 1, PREFILL), Sampling())

    def generate_greedily(prompt: list[int], n: int) -> Iterator:
        return generate(steps, torch.tensor([prompt]), 0, n)

    return generate_greedily


@cache
def llama_cpp_generate(file: str, threads: int) -> Callable[[list[int], int], Iterator]:
    """The same by llama.cpp."""
    import llama_cpp
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0  # a build for a GPU leaves it alone
    model = llama_cpp.llama_model_load_from_file(file.encode(), model_params)
    if not model:
        raise UsageError(f"llama.cpp does not load {file}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = PREFILL
    params.n_threads = params.n_threads_batch = threads
    params.offload_kqv = params.op_offload = False
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def generate_greedily(prompt: list[int], n: int) -> Iterator:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = prompt
        for _ in range(n):
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) != 0:
                raise UsageError("llama.cpp cannot decode")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab_size,))
            tokens = [int(logits.argmax())]
            yield tokens

    return generate_greedily


LOADERS = {"ours": our_generate, "theirs": llama_cpp_generate}


def summarize(pair: tuple[str, str], rounds: list[dict], sizes: dict[str, float]) -> dict:
    """Of the rounds with the two files of a pair, medians, and those of the rounds' ratios of ours to theirs."""
    row = {"read_bytes_per_sec": median(r["read_bytes_per_sec"] for r in rounds)}
    for side, name in zip(("ours", "theirs"), pair, strict=True):
        row[side] = {key: median(r[side][key] for r in rounds) for key in rounds[0][side]}
        row[side] |= {"file": name, "bytes_per_token": sizes[name]}
    for key in ("decode", "prefill"):
        row[f"{key}_ratio"] = median(r["ours"][key] / r["theirs"][key] for r in rounds)
    return row


def plot(result: dict, path: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = result["pairs"]
    for side, label, shift in (("ours", "this project", -0.2), ("theirs", "llama.cpp", 0.2)):
        x = [i + shift for i in range(len(rows))]
        bars = axes.bar(x, [row[side]["decode"] for row in rows], 0.38, label=label)
        axes.bar_label(bars, fmt="%.0f")
        limits = [row["read_bytes_per_sec"] / row[side]["bytes_per_token"] for row in rows]
        limit_bars = axes.bar(x, limits, 0.38, fill=False, edgecolor="gray", linestyle="--")
    limit_bars.set_label("bus limit: read bandwidth / bytes per token")
    axes.set_xticks(range(len(rows)), [f"{row['ours']['file']}\n{row['theirs']['file']}" for row in rows])
    axes.set_ylabel("decode, tokens/s")
    axes.set_title(f"{result['model']}, {result['threads']} threads of {result['cpu']}, {result['date']}")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main, OOM_HINT)

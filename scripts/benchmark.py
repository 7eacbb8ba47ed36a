"""Speed, memory and cold start of a model's shape, with random weights: nothing is downloaded.

    python scripts/benchmark.py --config TinyLlama-1.1B --compile
    python scripts/benchmark.py --config SmolLM2-135M --prompt_tokens 8000 --max_new_tokens 20     # its memory
    python scripts/benchmark.py --config TinyLlama-1.1B --cold_start     # a new process until its first token

--config takes a name (--help lists them), or the path of a Hugging Face config.json or of a model.pth. Memory's read
bandwidth is measured before and after decoding; the better of both is what decoding is held against. Bytes of a step:
the weights it must read and the keys and values of the tokens in the cache.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is being loaded; run() sees to the rest
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import tokenizers
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels
import quantize
from checkpoint import read_checkpoint, read_json, run, save_checkpoint
from generate import build_step, build_steps, generate, peak_memory, pick_device, read_bandwidth
from model import ModelConfig, MoE, RopeScaling, Transformer, UsageError

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 3  # of every timing; their median counts
QWEN = {"rope_theta": 1e6, "norm_eps": 1e-6}
LLAMA31 = {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0)}
LLAMA32 = {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 32.0), "tie_embeddings": True}
CONFIGS = {  # as published: dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size, max_seq_len
    "SmolLM2-135M": ModelConfig(576, 30, 9, 3, 64, 1536, 49152, 8192, rope_theta=1e5, tie_embeddings=True),
    "Qwen2.5-0.5B": ModelConfig(896, 24, 14, 2, 64, 4864, 151936, 32768, qkv_bias=True, tie_embeddings=True, **QWEN),
    "TinyLlama-1.1B": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000, 2048),
    "Llama-3.2-1B": ModelConfig(2048, 16, 32, 8, 64, 8192, 128256, 131072, **LLAMA32),
    "Llama-2-7B": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "Mistral-7B": ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, 32768, sliding_window=4096),  # v0.1
    "Llama-3.1-8B": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 131072, **LLAMA31),
    "Qwen3-8B": ModelConfig(4096, 36, 32, 8, 128, 12288, 151936, 40960, qk_norm=True, **QWEN),
    "Qwen3-30B-A3B": ModelConfig(2048, 48, 32, 4, 128, 768, 151936, 40960, qk_norm=True, moe=MoE(128, 8), **QWEN),
    "Mixtral-8x7B": ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, 32768, rope_theta=1e6, moe=MoE(8, 2)),
    "Llama-3-70B": ModelConfig(8192, 80, 64, 8, 128, 28672, 128256, 8192, rope_theta=5e5),
    "Llama-3.1-405B": ModelConfig(16384, 126, 128, 8, 128, 53248, 128256, 131072, **LLAMA31),
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True, help=f"a config.json, a model.pth, or one of {', '.join(CONFIGS)}")
    p.add_argument("--compile", action="store_true", help="compile the decode step; a cold start always does")
    p.add_argument("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")
    p.add_argument("--precision", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    p.add_argument("--mode", choices=["int8", "int4"], help="quantize the weights")
    p.add_argument("--groupsize", type=int, choices=quantize.GROUPSIZES, default=32, help="default: %(default)s")
    p.add_argument("--prompt_tokens", type=int, default=5, help="default: %(default)s")
    p.add_argument("--max_new_tokens", type=int, default=200, help="default: %(default)s; a cold start's are 2")
    p.add_argument("--kernels", choices=["auto", "off"], default="auto", help="off: PyTorch alone")
    p.add_argument("--tune", action="store_true", help="first find the best launches of a GPU's kernels for the shape, "
        "for later runs too: writes kernels_triton.json, takes minutes")
    p.add_argument("--cold_start", action="store_true", help="time generate.py from its start to its first token only")
    p.add_argument("--json", action="store_true", help="one JSON object too, as the last line")
    args = p.parse_args()
    config = named_config(args.config)
    if args.cold_start and args.mode:
        raise UsageError("--cold_start is measured without --mode")
    if args.cold_start:
        args.compile, args.max_new_tokens = True, 2
    if args.prompt_tokens < 1 or args.max_new_tokens < 2:
        raise UsageError("--prompt_tokens must be at least 1, and --max_new_tokens 2: the first is prefill's")
    if (room := args.prompt_tokens + args.max_new_tokens) > config.max_seq_len:
        raise UsageError(f"{room} prompt and new tokens exceed the model's context of {config.max_seq_len}")
    args.device = str(pick_device(args.device))
    if args.tune:
        if torch.device(args.device).type != "cuda":
            raise UsageError("--tune is for GPUs that kernels_triton.py runs on")
        from benchmark_gpu import tune  # which imports this file

        tune([config], args.groupsize)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1234)
    result = {k: v for k, v in vars(args).items() if k not in ("json", "cold_start", "tune")}
    result |= cold_start(args, config) if args.cold_start else measure(args, config)
    for key, value in result.items():
        print(f"{key:32}{f'{value:,.3f}' if isinstance(value, float) else value}")
    if args.json:
        print(json.dumps(result))


def named_config(name: str) -> ModelConfig:
    """The shape that --config means: one of CONFIGS, or a config.json's."""
    if name in CONFIGS:
        return CONFIGS[name]
    if name.endswith(".json"):
        return ModelConfig.from_hf(read_json(Path(name)))
    if name.endswith(".pth"):
        return read_checkpoint(Path(name))[0]
    raise UsageError(f"--config {name!r} is neither a config.json, a model.pth nor one of {', '.join(CONFIGS)}")


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight in a checkpoint, one at a time: normal, scaled by 1 / sqrt(inputs) so that a layer
    neither grows nor shrinks what goes through it; norms are one and biases zero."""
    for name, shape in shapes(config).items():
        tensor = torch.empty(shape, device=device, dtype=dtype)
        if len(shape) > 1:
            yield name, tensor.normal_(std=shape[-1] ** -0.5)
        else:
            yield name, tensor.fill_(name.endswith("norm.weight"))


def quantized_weights(weights: Iterator[tuple[str, Tensor]], config: ModelConfig, quantization: dict | None):
    """weights as a checkpoint of that quantization holds them; what yields them has one in memory at a time."""
    with torch.device("meta"):
        linears = {f"{name}.weight" for name, _ in quantize.linears(Transformer(config))} if quantization else ()
    for name, w in weights:
        names = [name, "output.weight"] if config.tie_embeddings and name == "tok_embeddings.weight" else [name]
        for each in names:
            if each in linears:
                parts = quantize.quantize_plain(each, w, quantization["mode"], quantization.get("groupsize"))
                yield from quantize.named(each, parts)
            else:
                yield each, w


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint; a tied head is none of its own."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {n: tuple(t.shape) for n, t in state.items() if not (config.tie_embeddings and n == "output.weight")}


def measure(args: argparse.Namespace, config: ModelConfig) -> dict:
    """All but the cold start. The first run, compilation included, is the one whose peak memory is reported."""
    device, dtype = torch.device(args.device), getattr(torch, args.precision)
    before = peak_memory(device)
    began = time.perf_counter()
    quantization = {"mode": args.mode} | ({"groupsize": args.groupsize} if args.mode == "int4" else {})
    quantization = quantization if args.mode else None
    weights = dict(quantized_weights(random_weights(config, device, dtype), config, quantization))
    with torch.device("meta"):
        model = Transformer(config)
    quantize.prepare(model, quantization)
    model.load_state_dict(weights, assign=True)
    weights_bytes = sum({t.data_ptr(): t.nbytes for t in weights.values()}.values())  # a tied head counts once
    del weights  # the kernels keep them in an order of their own
    model.eval().requires_grad_(False)
    if args.kernels == "auto":
        kernels.enable(model)
    make_seconds = time.perf_counter() - began

    room = args.prompt_tokens + args.max_new_tokens
    began = time.perf_counter()
    model.setup_caches(1, room)
    prefill, decode = build_steps(model, {"temperature": 0.8}, args.compile, False)
    if args.compile:
        with torch.inference_mode():
            for _ in range(2):
                decode(torch.zeros(1, 1, dtype=torch.long, device=device), torch.tensor([0], device=device))
    compile_seconds = time.perf_counter() - began

    def seconds(prompt_tokens: int, new_tokens: int, start: int = 0) -> list[float]:
        """Of a run: prefill and first token, then every decode step. The cache holds the start tokens before it."""
        prompt = torch.randint(config.vocab_size, (1, prompt_tokens), device=device)
        times = [time.perf_counter()]
        for _ in generate(prefill, decode, prompt, start, new_tokens):
            times.append(time.perf_counter())
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    seconds(args.prompt_tokens, args.max_new_tokens)
    peak = peak_memory(device)
    token_bytes = 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
    bus = [read_bandwidth(device)]
    last = args.prompt_tokens - 1  # the rest of the prompt is still in the cache
    step = statistics.median(statistics.mean(seconds(1, args.max_new_tokens, last)[1:]) for _ in range(SAMPLES))
    bus.append(read_bandwidth(device))
    seen = [visible(config, position) for position in range(args.prompt_tokens, room - 1)]
    bytes_per_second = (model.step_bytes() + token_bytes * statistics.mean(seen)) / step
    result = {
        "make_weights_seconds": make_seconds,
        "compile_seconds": compile_seconds,
        "weights_bytes": weights_bytes,
        "kv_bytes": token_bytes * room,
        "peak_memory_bytes": peak,
        "peak_memory_before_model_bytes": before,  # Python and PyTorch; part of what is over weights and cache
        "peak_over_weights_and_kv_bytes": peak - weights_bytes - token_bytes * room,
        "model_bytes": model.step_bytes(),
        "decode_tokens_per_sec": 1 / step,
        "decode_gb_per_sec": bytes_per_second / 1e9,
        "read_gb_per_sec_before": bus[0] / 1e9,
        "read_gb_per_sec_after": bus[1] / 1e9,
        "decode_share_of_read": bytes_per_second / max(bus),
    }
    for n in (512, 2048):
        if n <= config.max_seq_len:
            model.setup_caches(1, n)
            took = statistics.median(seconds(n, 1)[0] for _ in range(SAMPLES))
            result[f"prefill_{n}_tokens_per_sec"] = n / took
            result[f"prefill_{n}_tflop_per_sec"] = prefill_flops(config, n) / took / 1e12
    model.setup_caches(1, 5)
    times = {1: [], 5: []}  # of steps of so many rows, in turns; the first of each does not count
    rows, step = torch.zeros(1, 5, dtype=torch.long, device=device), build_step(model, model.logits, args.compile)
    with torch.inference_mode():
        for _ in range(1 + 3 * SAMPLES):
            for n, took in times.items():
                began = time.perf_counter()
                step(rows[:, :n], torch.arange(n, device=device))[0, -1, 0].item()
                took.append(time.perf_counter() - began)
    result["verify_5_over_1"] = statistics.median(times[5][1:]) / statistics.median(times[1][1:])
    return result


def visible(config: ModelConfig, position: int) -> int:
    """Tokens that the one at position looks at."""
    return min(position + 1, config.sliding_window or position + 1)


def prefill_flops(config: ModelConfig, n: int) -> int:
    """Floating-point operations that n prompt tokens need: every layer's matrices (of a MoE, the active experts), both
    products of attention over what each token sees, and the head once."""
    width = config.n_heads * config.head_dim
    matrices = config.dim * (2 * width + 2 * config.n_kv_heads * config.head_dim)
    matrices += 3 * config.dim * config.ffn_dim * (config.moe.n_active if config.moe else 1)
    matrices += config.dim * config.moe.n_experts if config.moe else 0
    attention = 2 * width * sum(visible(config, position) for position in range(n))
    return 2 * (config.n_layers * (n * matrices + attention) + config.dim * config.vocab_size)


def cold_start(args: argparse.Namespace, config: ModelConfig) -> dict:
    """Seconds from starting generate.py --compile to the first byte of text on stdout: with empty caches of compiled
    code, then with what that left in them. The checkpoint was just written, so both find it in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder, "model.pth"), Path(folder, "cache")
        dtype = getattr(torch, args.precision)
        weights = random_weights(config, torch.device("cpu"), dtype)
        save_checkpoint(path, config, {name: (shape, dtype) for name, shape in shapes(config).items()}, weights)
        words = tokenizers.models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0")
        tokenizer = tokenizers.Tokenizer(words)
        tokenizer.decoder = tokenizers.decoders.Fuse()
        tokenizer.save(str(path.with_name("tokenizer.json")))
        flags = ["--checkpoint_path", path, "--precision", args.precision, "--kernels", args.kernels]
        flags += ["--prompt_tokens", str(args.prompt_tokens), "--max_new_tokens", str(args.max_new_tokens)]
        flags += ["--device", args.device, "--compile", "--ignore_eos"]
        command = [sys.executable, ROOT / "generate.py", *flags]
        result = {"checkpoint": "in the page cache"}
        for state in ("empty", "warm"):
            began = time.perf_counter()
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache)}
            with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=environment) as process:
                first = process.stdout.read(1)
                result[f"cold_start_{state}_seconds"] = time.perf_counter() - began
                process.stdout.read()
            if not first or process.returncode:
                raise UsageError("generate.py failed; what it said is above")
    return result


if __name__ == "__main__":
    run(main)

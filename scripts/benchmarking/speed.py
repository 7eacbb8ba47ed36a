"""Measures a shape's speed and memory with random weights, for the command "speed" of benchmark.py.

    config = find_config("Llama-3.1-8B")          # or the path of a config.json or of a model.pth
    model = random_model(config, Int4(64), torch.device("cuda"), torch.bfloat16)

Random weights have mean 0 and variance 1 / inputs, so that activations neither grow nor shrink from layer to layer. A
quantized model never exists in 16 bits: only some rows of each matrix are drawn and quantized, and then repeated.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from checkpoint import empty_model, read_checkpoint, save_checkpoint
from config import ModelConfig, MoEConfig, RopeScaling
from converters.hf_config import config_from_hf
from engine.generation import DecodeLoop
from engine.memory_traffic import active_weight_bytes, mean_attended_tokens, step_bytes
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from formats import Unquantized, WeightFormat
from layers.kv_cache import KVCache, kv_bytes_per_token
from layers.linear import Linear, LinearBase, RMSNorm, quantizable_linears
from layers.packing import pack_model
from layers.rope import alibi_slopes
from layers.weight import Embedding
from model import Attention, Transformer
from utils.errors import UsageError
from utils.files import read_json
from utils.machine import cpu_name, peak_memory, read_bandwidth, synchronize

SAMPLES = 3  # timings of each measurement; the result is the median
PREFILLS = (512, 2048)  # lengths of prompts
SAMPLING = SamplingParams(temperature=0.8)
RANDOM_ELEMENTS = 2**18  # of a matrix. A larger one repeats its rows, since drawing and quantizing all would take long

# ---- Shapes and random weights ---------------------------------------------------------------------------------------

QWEN = {"rope_theta": 1e6, "norm_eps": 1e-6}
LLAMA31 = {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0)}
LLAMA32 = {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 32.0), "tie_embeddings": True}
QWEN_MOE, MIXTRAL_MOE = MoEConfig(128, 8), MoEConfig(8, 2)
CONFIGS = {  # as published: dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size, max_seq_len
    "SmolLM2-135M": ModelConfig(576, 30, 9, 3, 64, 1536, 49152, 8192, rope_theta=1e5, tie_embeddings=True),
    "Qwen2.5-0.5B": ModelConfig(896, 24, 14, 2, 64, 4864, 151936, 32768, qkv_bias=True, tie_embeddings=True, **QWEN),
    "TinyLlama-1.1B": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000, 2048),
    "Llama-3.2-1B": ModelConfig(2048, 16, 32, 8, 64, 8192, 128256, 131072, **LLAMA32),
    "Llama-2-7B": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "Mistral-7B": ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, 32768, sliding_window=4096),  # v0.1
    "Llama-3.1-8B": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 131072, **LLAMA31),
    "Qwen3-8B": ModelConfig(4096, 36, 32, 8, 128, 12288, 151936, 40960, qk_norm=True, **QWEN),
    "Qwen3-30B-A3B": ModelConfig(2048, 48, 32, 4, 128, 768, 151936, 40960, qk_norm=True, moe=QWEN_MOE, **QWEN),
    "Mixtral-8x7B": ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, 32768, rope_theta=1e6, moe=MIXTRAL_MOE),
    "Llama-3-70B": ModelConfig(8192, 80, 64, 8, 128, 28672, 128256, 8192, rope_theta=5e5),
    "Llama-3.1-405B": ModelConfig(16384, 126, 128, 8, 128, 53248, 128256, 131072, **LLAMA31),
}


def find_config(name: str) -> ModelConfig:
    """Returns the config that --config names: one of CONFIGS, or the config of a file."""
    if name in CONFIGS:
        return CONFIGS[name]
    if name.endswith(".json"):
        return config_from_hf(read_json(Path(name)))
    if name.endswith(".pth"):
        return read_checkpoint(Path(name)).config
    raise UsageError(f"--config {name!r} is neither a config.json, a model.pth nor one of {', '.join(CONFIGS)}")


def random_model(config: ModelConfig, format: WeightFormat, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Makes a model whose linear layers have format, not packed for the kernels."""
    model = empty_model(config).to(dtype)
    for _, linear in quantizable_linears(model):
        linear.set_format(format)
    if config.tie_embeddings and format == Unquantized():  # quantize.py gives a quantized head its own weight
        model.tie_embedding()
    model.to_empty(device=device)
    for module in model.modules():
        fill_randomly(module)
    return model.eval().requires_grad_(False)


def random_linear(
    shape: tuple[int, int], format: WeightFormat, device: torch.device, dtype: torch.dtype,
    activation: str | None = None, gated: bool = False,
) -> Linear:
    """Makes a random linear layer, as random_model does. shape: of the weight, [N, K]."""
    out_features, in_features = shape
    with torch.device("meta"):
        linear = Linear(in_features, out_features, activation=activation, gated=gated).to(dtype)
    linear.set_format(format)
    linear.to_empty(device=device)
    fill_randomly(linear)
    return linear


@torch.no_grad()
def fill_randomly(module: nn.Module):
    """Fills the tensors of module, but not of its children. Norms become 1, and biases 0. ALiBi's slopes are not
    random: they become float32 again, whatever the model's dtype."""
    if isinstance(module, RMSNorm):
        module.weight.fill_(1)
    elif isinstance(module, Embedding):
        module.weight.normal_(std=module.weight.shape[-1] ** -0.5)
    elif isinstance(module, LinearBase):
        fill_weight_randomly(module)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, Attention):
        if module.sinks is not None:
            module.sinks.normal_()
        if module.alibi_slopes is not None:
            module.alibi_slopes = alibi_slopes(module.n_heads).to(module.alibi_slopes.device)


def fill_weight_randomly(w: LinearBase):
    """Quantizes some random rows, and repeats them until the matrices of all experts are full."""
    row_dims = w.weight.dim() - 1
    n_rows = math.prod(w.weight.shape[:-1])
    shape = min(n_rows, math.ceil(RANDOM_ELEMENTS / w.in_features)), w.in_features
    random = torch.randn(shape, device=w.weight.device) * w.in_features**-0.5
    for name, tensor in w.format.quantize(random).items():
        for rows in w.tensors()[name].flatten(0, row_dims - 1).split(len(tensor)):
            rows.copy_(tensor[: len(rows)])


def checkpoint_tensors(model: Transformer) -> dict[str, Tensor]:
    """Returns the tensors of model as a checkpoint holds them: a tied head has no tensors."""
    tensors = model.state_dict()
    if model.is_tied:
        del tensors["lm_head.weight"]
    return tensors


def save_random_checkpoint(path: Path, config: ModelConfig, dtype: torch.dtype):
    torch.manual_seed(1234)
    model = random_model(config, Unquantized(), torch.device("cpu"), dtype)
    save_checkpoint(path, config, checkpoint_tensors(model))


# ---- Speed and memory ------------------------------------------------------------------------------------------------


def measure_speed(args: argparse.Namespace, config: ModelConfig, format: WeightFormat, device: torch.device) -> dict:
    """Measures a random model. args: the options of the command speed."""
    memory_before = peak_memory(device)
    began = time.perf_counter()
    model = random_model(config, format, device, getattr(torch, args.precision))
    weights_bytes = sum(t.nbytes for t in checkpoint_tensors(model).values())
    if args.kernels == "auto":
        pack_model(model)
    synchronize(device)
    result = {
        "make_weights_seconds": time.perf_counter() - began,
        "weights_bytes": weights_bytes,
        "peak_memory_before_model_bytes": memory_before,  # of Python and PyTorch
    }
    if args.parallel:
        return result | measure_parallel(model, args.parallel, args.prompt_tokens, args.max_new_tokens, args.compile)
    result |= measure_decode(model, args.prompt_tokens, args.max_new_tokens, args.compile)
    result["peak_over_weights_and_kv_bytes"] = result["peak_memory_bytes"] - weights_bytes - result["kv_bytes"]
    if not args.decode_only:
        for n in PREFILLS:
            if n <= config.max_seq_len:
                result |= measure_prefill(model, n)
        result["verify_5_over_1"] = measure_verify(model, args.compile)
    if device.type == "cuda":
        copy = copy_bandwidth()
        result |= {"copy_gb_per_sec": copy / 1e9, "decode_share_of_copy": result["decode_gb_per_sec"] * 1e9 / copy}
    return result


def describe_machine() -> dict:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
    }


def measure_decode(model: Transformer, n_prompt: int, n_new: int, compile: bool) -> dict:
    """Measures decoding, and peak memory up to the end of the first text."""
    device, kv_cache = model.device, KVCache(model, 1, n_prompt + n_new)
    began = time.perf_counter()
    runner = ModelRunner(model, kv_cache, SAMPLING, compile)
    if compile:
        time_tokens(model, runner, 0, 1, 3)  # a GPU's graph is captured at the second step
    compile_seconds = time.perf_counter() - began
    time_tokens(model, runner, 0, n_prompt, n_new)
    peak = peak_memory(device)

    read_before = read_bandwidth(device)
    start = n_prompt - 1  # the prompt is still in the cache
    seconds = median(mean(time_tokens(model, runner, start, 1, n_new)[1:]) for _ in range(SAMPLES))
    read_after = read_bandwidth(device)
    positions = range(n_prompt, n_prompt + n_new - 1)  # prefill makes the first new token
    n_attended = mean(mean_attended_tokens(model.config, position + 1) for position in positions)
    bytes_per_second = step_bytes(model, n_attended) / seconds
    return {
        "compile_seconds": compile_seconds,
        "kv_bytes": kv_bytes_per_token(model) * kv_cache.max_seq_len,
        "peak_memory_bytes": peak,
        "model_bytes": active_weight_bytes(model),
        "decode_tokens_per_sec": 1 / seconds,
        "decode_gb_per_sec": bytes_per_second / 1e9,
        "read_gb_per_sec_before": read_before / 1e9,
        "read_gb_per_sec_after": read_after / 1e9,
        "decode_share_of_read": bytes_per_second / max(read_before, read_after),
    }


def time_tokens(model: Transformer, runner: ModelRunner, start: int, n_prompt: int, n_new: int) -> list[float]:
    """Returns the seconds of prefill, and of every decode step after it, for a random prompt at position start. Prefill
    makes the first of n_new tokens."""
    token_ids = random_prompt(model, start + n_prompt)
    return seconds_of_steps(DecodeLoop(runner).decode_tokens(token_ids, n_new, n_cached=start))


def random_prompt(model: Transformer, n: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, n), device=model.device)


def seconds_of_steps(generated: Iterator) -> list[float]:
    """Runs generated, which yields after every step, and returns the seconds of each step."""
    times = [time.perf_counter()]
    for _ in generated:
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


def measure_parallel(model: Transformer, sizes: list[int], n_prompt: int, n_new: int, compile: bool) -> dict:
    """Measures tokens per second of n sequences together, for each n in sizes. The measurements of all n take turns."""
    # The chunk holds all prompts, so that no sequence decodes before all do.
    schedulers = {n: Scheduler(model, n, n_prompt + n_new, compile, chunk_tokens=n * n_prompt) for n in sizes}
    speeds = {n: [] for n in sizes}
    for i in range(SAMPLES + 1):  # round 0 captures and compiles
        for n, scheduler in schedulers.items():
            for _ in range(n):
                scheduler.submit(Sequence(random_prompt(model, n_prompt)[0].tolist(), n_new))
            for _ in range(n):
                scheduler.step()  # a prefill
            began = time.perf_counter()
            for _ in range(n_new - 1):
                scheduler.step()
            if i > 0:
                speeds[n].append(n * (n_new - 1) / (time.perf_counter() - began))
    return {f"parallel_{n}_tokens_per_sec": median(speeds[n]) for n in sizes}


def measure_prefill(model: Transformer, n: int) -> dict:
    runner = ModelRunner(model, KVCache(model, 1, n), SAMPLING)
    seconds = median(time_tokens(model, runner, 0, n, 1)[0] for _ in range(SAMPLES))
    return {
        f"prefill_{n}_tokens_per_sec": n / seconds,
        f"prefill_{n}_tflop_per_sec": prefill_flops(model.config, n) / seconds / 1e12,
    }


@torch.inference_mode()
def measure_verify(model: Transformer, compile: bool) -> float:
    """Returns the time of a step of 5 tokens, as in a verification, over the time of a step of one token. The two kinds
    of steps take turns."""
    runner = ModelRunner(model, KVCache(model, 1, 5), compile=compile)
    step = runner.build_step(lambda logits, *inputs: logits.argmax(-1))
    tokens = torch.zeros(1, 5, dtype=torch.long, device=model.device)
    position = torch.zeros(1, dtype=torch.long, device=model.device)
    seconds = {1: [], 5: []}
    for _ in range(1 + 3 * SAMPLES):
        for n in seconds:
            began = time.perf_counter()
            step(tokens[:, :n], position)[0, -1].item()
            seconds[n].append(time.perf_counter() - began)
    return median(seconds[5][1:]) / median(seconds[1][1:])  # step 0 compiles or captures


def prefill_flops(config: ModelConfig, n: int) -> int:
    """Returns the floating-point operations of a prefill of n tokens: of all matrices in the layers (only active
    experts), of both matmuls of attention, and of the head for one token."""
    n_experts, top_k = (config.moe.n_experts, config.moe.top_k) if config.moe else (0, 1)
    ffn = (sum(config.gate_up_dims) + config.ffn_dim) * top_k
    matrices = config.dim * (2 * config.q_dim + 2 * config.kv_dim + n_experts + ffn)
    attention = 2 * config.q_dim * sum(mean_attended_tokens(config, position + 1) for position in range(n))
    return 2 * (config.n_layers * (n * matrices + attention) + config.dim * config.vocab_size)


# ---- On a GPU --------------------------------------------------------------------------------------------------------


def copy_bandwidth() -> float:
    """Returns the bytes per second that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    timer = Timer("target.copy_(source)", globals={"source": source, "target": torch.empty_like(source)})
    return 2 * source.nbytes / timer.blocked_autorange().median

"""ModelRunner: a model bound to a KV cache, from token ids to the next token ids.

    kv_cache = KVCache(model, batch_size=1, max_seq_len=300)
    runner = ModelRunner(model, kv_cache, SamplingParams(temperature=0.8))
    tokens = runner.prefill(prompt, start_pos)  # [B, T] -> [B]
    tokens = runner.decode(tokens[:, None], start_pos + prompt.shape[1])

There are three kinds of steps:

    prefill         takes a prompt of any length, in chunks, and is never captured
    decode          takes one token of every sequence
    verification    takes several proposed tokens; speculate.py makes it with build_step

A decode or verification step has one of four modes, which choose_mode chooses and build_in_mode builds:

    kernels    device    --compile    mode
    all        CPU       yes or no    cpu_graph     captures the model; then the sampler runs eagerly
    all        GPU       yes          cuda_graph    captures model and sampler
    all        GPU       no           eager
    not all    any       yes          compiled      by torch.compile; without experts, a GPU also captures the result
    not all    any       no           eager

"all" means that every operation has a kernel for B * T tokens (layers/backend.py: Backend.supports_step). An eager step
uses the kernels of the operations that are within their limit.

Shapes: B sequences, T new tokens per sequence, V vocabulary. start_pos [B] is the position of each sequence's first new
token.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from engine.sampler import Sampler
from engine.sampling_params import GREEDY, SamplingParams
from kernels.build import find_compiler
from kernels.capture import capture, graph_num_threads
from kernels.schema import INVALID_TOKEN
from layers.kv_cache import KVCache
from layers.packing import can_capture
from layers.sampling import draw_uniform
from model import Transformer
from utils.errors import UsageError

# The most tokens in a chunk of prefill, summed over all sequences. The limit bounds the memory of activations. Small
# chunks are slow: every chunk reads all weights again, and a matmul of PyTorch first dequantizes its weights.
CPU_PREFILL_CHUNK_TOKENS = 2048
GPU_PREFILL_CHUNK_TOKENS = 4096
MIN_COMPILED_TOKENS = 9  # compiling does not pay for a chunk of fewer tokens
ExecutionMode = Literal["cpu_graph", "cuda_graph", "compiled", "eager"]  # how a step runs: see the table above
NOT_FINITE = "the model's logits are not finite: NaN weights, or --precision too narrow"


def check_sampled_ids(ids: list[int]) -> list[int]:
    """Returns ids. Raises UsageError if one is INVALID_TOKEN."""
    if INVALID_TOKEN in ids:
        raise UsageError(NOT_FINITE)
    return ids


class ModelRunner:
    """The steps of a model with one KV cache. Prefill and decode end with the Sampler of params."""

    def __init__(
        self, model: Transformer, kv_cache: KVCache, params: SamplingParams = GREEDY, compile: bool = False,
        compile_prefill: bool = False,
    ):
        """compile, compile_prefill: the options of generate.py."""
        self.model = model
        self.kv_cache = kv_cache
        self.compile = compile
        self.device = model.device
        self.sampler = Sampler(params, kv_cache.token_ids, model.lm_head.backend)
        self.compiled_model = compile_blocks(model, dynamic=True) if compile_prefill else None
        self.decode_step = self.build_step(self.sampler)

    # ---- Prefill, of B sequences in neighbouring slots of the KV cache, from first_slot on ----

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, start_pos: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Returns the next tokens [B]. uniform [B, 1]: random numbers, by default of PyTorch's global generator."""
        if uniform is None:
            (uniform,) = self.uniform_per_step(1, len(tokens))
        return self.sampler(self.prefill_logits(tokens, start_pos), tokens, start_pos, uniform)

    def prefill_logits(self, tokens: Tensor, start_pos: Tensor, first_slot: int = 0) -> Tensor:
        """Returns the logits [B, 1, V] after the last of tokens."""
        for hidden in self.prefill_chunks(tokens, start_pos, first_slot):
            last_hidden = hidden[:, -1:]
        return self.model.compute_logits(last_hidden)

    def fill_kv_cache(self, tokens: Tensor, start_pos: Tensor, first_slot: int = 0):
        """Computes the keys and values of tokens, and no logits."""
        for _ in self.prefill_chunks(tokens, start_pos, first_slot):
            pass

    def prefill_chunks(self, tokens: Tensor, start_pos: Tensor, first_slot: int = 0) -> Iterator[Tensor]:
        """Runs the blocks on chunks of tokens, one after another. Yields the hidden states of each chunk:
        [B, chunk, dim]. With compile_prefill, a chunk that is too long for the kernels runs compiled blocks."""
        kv_cache = self.kv_cache.view_sequences(first_slot, len(tokens))
        chunk_tokens = CPU_PREFILL_CHUNK_TOKENS if self.device.type == "cpu" else GPU_PREFILL_CHUNK_TOKENS
        n_cached = int(start_pos.max())
        offset = 0
        for chunk in tokens.split(max(1, chunk_tokens // len(tokens)), dim=1):
            model = self.model
            is_long = chunk.numel() >= MIN_COMPILED_TOKENS
            if self.compiled_model and is_long and not can_capture(model, *chunk.shape):
                model = self.compiled_model
            used_cache = kv_cache.view_positions(n_cached + offset + chunk.shape[1])
            yield model.compute_hidden(chunk, start_pos + offset, used_cache)
            offset += chunk.shape[1]

    # ---- Decoding and verification ----

    def decode(self, tokens: Tensor, start_pos: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Takes the last tokens [B, 1] of the sequences. Returns the next tokens [B], which the next call may
        overwrite. uniform: as for prefill."""
        if uniform is None:
            (uniform,) = self.uniform_per_step(1, len(tokens))
        return self.decode_step(tokens, start_pos, uniform)

    def uniform_per_step(
        self, n_steps: int, batch_size: int, generator: torch.Generator | None = None
    ) -> Tensor | list[None]:
        """Returns the random numbers of n_steps steps: uniform [B, 1] for each, or None if sampling is greedy.
        generator: on the CPU, by default PyTorch's global one, also for a GPU."""
        if self.sampler.params.is_greedy:
            return [None] * n_steps
        uniform = draw_uniform(n_steps * batch_size, self.device, generator or torch.default_generator)
        return uniform.view(n_steps, batch_size, 1)

    def build_step(self, sampler: Callable) -> "Step":
        """Returns a step that ends with sampler."""
        return Step(self.model, self.kv_cache, sampler, self.compile)


# ---- Steps ----------------------------------------------------------------------------------------------------------


class Step:
    """A step, in the ExecutionMode that fits the shape of its tokens.

        step(tokens [B, T], start_pos [B], *inputs) -> sampler(logits [B, T, V], tokens, start_pos, *inputs)

    The step uses the first B sequences of the KV cache. The result, and the logits passed to the sampler, may be static
    buffers that the next call overwrites: clone what you keep."""

    def __init__(self, model: Transformer, kv_cache: KVCache, sampler: Callable, compile: bool):
        self.model, self.kv_cache, self.sampler, self.compile = model, kv_cache, sampler, compile
        self.can_capture = cache(partial(can_capture, model))  # slow: it goes through all modules

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        step = self.with_kernels if self.can_capture(*tokens.shape) else self.without_kernels
        return step(tokens, start_pos, *inputs)

    # Both are built at first use, since torch.compile imports Inductor, which takes a second and 150 MB. Neither refers
    # to self: in a reference cycle the KV cache would stay in memory until Python's next garbage collection.

    @cached_property
    def with_kernels(self) -> Callable:
        return build_in_mode(self.model, self.kv_cache, self.sampler, self.compile, has_kernels=True)

    @cached_property
    def without_kernels(self) -> Callable:
        return build_in_mode(self.model, self.kv_cache, self.sampler, self.compile, has_kernels=False)


def build_in_mode(
    model: Transformer, kv_cache: KVCache, sampler: Callable, compile: bool, has_kernels: bool
) -> Callable:
    """Builds a step. has_kernels: whether every operation has a kernel for the tokens that the step will get."""
    forward = build_forward(model, kv_cache, has_kernels)
    match choose_mode(has_kernels, model.device.type, compile):
        case "cpu_graph":
            return add_sampler(capture(forward), sampler)  # a CPU graph holds kernels alone, so not the sampler
        case "cuda_graph":
            return capture(add_sampler(forward, sampler))
        case "compiled":
            return build_compiled_step(model, kv_cache, sampler)
        case "eager":
            return add_sampler(forward, sampler)


def choose_mode(has_kernels: bool, device_type: str, compile: bool) -> ExecutionMode:
    """Returns the mode of a step, by the table at the top of this file."""
    if has_kernels and device_type == "cpu":
        return "cpu_graph"
    if has_kernels and compile:
        return "cuda_graph"
    return "compiled" if compile else "eager"


def build_forward(model: Transformer, kv_cache: KVCache, has_kernels: bool) -> Callable:
    def forward(tokens: Tensor, start_pos: Tensor) -> Tensor:
        used_cache = kv_cache.view_sequences(0, len(tokens))
        if not has_kernels:
            # PyTorch's attention computes a score for every position of the cache, so pass only the used positions.
            used_cache = used_cache.view_positions(int(start_pos.max()) + tokens.shape[1])
        return model(tokens, start_pos, used_cache)

    return forward


def add_sampler(forward: Callable, sampler: Callable) -> Callable:
    def step(tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        logits = forward(tokens, start_pos)
        with graph_num_threads():
            return sampler(logits, tokens, start_pos, *inputs)

    return step


def build_compiled_step(model: Transformer, kv_cache: KVCache, sampler: Callable) -> Callable:
    """Compiles a step in two pieces: the blocks, of which one compiled block serves all layers, and the head with the
    sampler. The pieces run as fast as one compiled step, and compile in a third of the time."""

    def sample_from_hidden(hidden: Tensor, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        return sampler(model.compute_logits(hidden), tokens, start_pos, *inputs)

    options = {"fullgraph": can_be_one_graph(model), "dynamic": False}
    head = torch.compile(sample_from_hidden, **options)
    blocks = compile_blocks(model, **options)

    def step(tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        hidden = blocks.compute_hidden(tokens, start_pos, kv_cache.view_sequences(0, len(tokens)))
        return head(hidden, tokens, start_pos, *inputs)

    return capture(step) if model.device.type == "cuda" and can_be_one_graph(model) else step


def compile_blocks(model: Transformer, **options) -> Transformer:
    """Returns a copy of model that shares all weights and whose blocks are compiled, with options for torch.compile.
    One compilation serves all blocks, since a block's weights are inputs of the compiled graph."""
    check_compiler()
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)  # copy.copy shares it, so setting layers would change model
    compiled.layers = nn.ModuleList(torch.compile(block, **options) for block in model.layers)
    return compiled


def check_compiler():
    """Raises UsageError if torch.compile cannot work here."""
    if find_compiler() is None:
        raise UsageError("--compile needs a C++ compiler ($CXX, g++ or clang++); install one or leave it out")


def can_be_one_graph(model: Transformer) -> bool:
    """Whether torch.compile can trace the model without a graph break. With many tokens a mixture of experts breaks the
    graph, since the host reads which experts they need."""
    return model.config.moe is None

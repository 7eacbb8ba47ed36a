"""ModelRunner: a model bound to a KV cache, from token ids to the next token ids.

    kv_cache = KVCache(model, batch_size=1, max_seq_len=300)
    runner = ModelRunner(model, kv_cache, SamplingParams(temperature=0.8))
    tokens = runner.prefill(prompt, start_pos)  # [B, T] -> [B]
    tokens = runner.decode(tokens[:, None], start_pos + prompt.shape[1])

There are three kinds of steps:

    prefill         takes a prompt of any length, in chunks, and is never captured
    decode          takes one token of every sequence
    verification    takes several proposed tokens; speculate.py makes it with build_step

A decode or verification step has one of four modes, by its number of tokens:

    kernels    device    --compile    mode
    all        CPU       yes or no    cpu_graph     captures the model; then the sampler runs eagerly
    all        GPU       yes          cuda_graph    captures model and sampler
    all        GPU       no           eager
    not all    any       yes          compiled      by torch.compile; without experts, a GPU also captures the result
    not all    any       no           eager

"all" means that every operation has a kernel for B * T tokens (layers/backend.py: Backend.supports_step). An eager step
uses the kernels that it has.

Shapes: B sequences, T new tokens per sequence, V vocabulary. start_pos [B] is the position of each sequence's first new
token.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
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
from layers.sampling import draw_rand
from model import Transformer
from utils.errors import UsageError

# The largest number of tokens in a chunk of prefill, of all sequences together. It limits the memory of activations.
# Small chunks are slow: every chunk reads all weights again, and PyTorch's matmuls first dequantize them.
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

    # ---- Prefill of B sequences, in slots first_slot to first_slot + B - 1 of the KV cache ----

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, start_pos: Tensor, rand: Tensor | None = None) -> Tensor:
        """Returns the next tokens [B]. rand [B, 1]: random numbers, by default of PyTorch's global generator."""
        if rand is None:
            (rand,) = self.rand_per_step(1, len(tokens))
        return self.sampler(self.prefill_logits(tokens, start_pos), tokens, start_pos, rand)

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
        """Runs the blocks on one chunk of tokens after another. Yields the hidden states of each chunk:
        [B, chunk, dim]. With compile_prefill, chunks that are too long for the kernels run compiled blocks."""
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

    def decode(self, tokens: Tensor, start_pos: Tensor, rand: Tensor | None = None) -> Tensor:
        """Takes the last tokens [B, 1] of the sequences. Returns the next tokens [B]. The next call may overwrite them.
        rand: see prefill."""
        if rand is None:
            (rand,) = self.rand_per_step(1, len(tokens))
        return self.decode_step(tokens, start_pos, rand)

    def rand_per_step(
        self, n_steps: int, batch_size: int, generator: torch.Generator | None = None
    ) -> Tensor | list[None]:
        """Returns the random numbers of n_steps steps: rand [B, 1] for each, or None if sampling is greedy.
        generator: a generator of the CPU, by default PyTorch's global one, also for a GPU."""
        if self.sampler.params.is_greedy:
            return [None] * n_steps
        rand = draw_rand(n_steps * batch_size, self.device, generator or torch.default_generator)
        return rand.view(n_steps, batch_size, 1)

    def build_step(self, sampler: Callable) -> Callable:
        """Returns a step that ends with sampler: build_step, below. It gets model and cache and not self, which stores
        the step: a reference cycle would keep the KV cache alive until the next garbage collection."""
        return build_step(self.model, self.kv_cache, sampler, self.compile)


# ---- Steps ----------------------------------------------------------------------------------------------------------


def build_step(model: Transformer, kv_cache: KVCache, sampler: Callable, compile: bool) -> Callable:
    """Returns a function that runs each step in the mode that fits the shape of its tokens:

        step(tokens [B, T], start_pos [B], *inputs) -> sampler(logits [B, T, V], tokens, start_pos, *inputs)

    The step uses the first B sequences of the KV cache. The result, and the logits passed to the sampler, may be static
    buffers that the next call overwrites: clone what you keep."""
    device_type = model.device.type
    has_kernels_for = cache(partial(can_capture, model))  # slow: it goes through all modules

    def forward(tokens: Tensor, start_pos: Tensor) -> Tensor:
        used_cache = kv_cache.view_sequences(0, len(tokens))
        if not has_kernels_for(*tokens.shape):
            # PyTorch's attention computes a score for every position of the cache, so pass only the used positions.
            used_cache = used_cache.view_positions(int(start_pos.max()) + tokens.shape[1])
        return model(tokens, start_pos, used_cache)

    def eager(tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        return sampler(forward(tokens, start_pos), tokens, start_pos, *inputs)

    cpu_graph, cuda_graph = capture(forward), capture(eager)  # each captures in its first call
    get_compiled = cache(partial(compile_step, model, kv_cache, sampler))

    @torch.inference_mode()
    def step(tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        match choose_mode(has_kernels_for(*tokens.shape), device_type, compile):
            case "cpu_graph":  # holds kernels alone, so the sampler runs after it
                logits = cpu_graph(tokens, start_pos)
                with graph_num_threads():
                    return sampler(logits, tokens, start_pos, *inputs)
            case "cuda_graph":
                return cuda_graph(tokens, start_pos, *inputs)
            case "compiled":
                return get_compiled()(tokens, start_pos, *inputs)
            case "eager":
                return eager(tokens, start_pos, *inputs)

    return step


def choose_mode(has_kernels: bool, device_type: str, compile: bool) -> ExecutionMode:
    """Returns the mode of a step, by the table at the top of this file. has_kernels: for all of its operations."""
    if has_kernels and device_type == "cpu":
        return "cpu_graph"
    if has_kernels and compile:
        return "cuda_graph"
    return "compiled" if compile else "eager"


def compile_step(model: Transformer, kv_cache: KVCache, sampler: Callable) -> Callable:
    """Compiles a step in two pieces: a block, which serves all layers, and the head with the sampler. The pieces run as
    fast as one compiled step, and compile in a third of the time. Importing Inductor costs 1 s and 150 MB, so call this
    only when a step needs it."""

    def sample_from_hidden(hidden: Tensor, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        return sampler(model.compute_logits(hidden), tokens, start_pos, *inputs)

    options = {"fullgraph": can_be_one_graph(model), "dynamic": False}
    head = torch.compile(sample_from_hidden, **options)
    blocks = compile_blocks(model, **options)

    def compiled(tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        hidden = blocks.compute_hidden(tokens, start_pos, kv_cache.view_sequences(0, len(tokens)))
        return head(hidden, tokens, start_pos, *inputs)

    return capture(compiled) if model.device.type == "cuda" and can_be_one_graph(model) else compiled


def compile_blocks(model: Transformer, **options) -> Transformer:
    """Returns a copy of model that shares all weights and whose blocks are compiled, with options for torch.compile.
    One compilation serves all blocks, because the compiled graph takes a block's weights as inputs."""
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
    """Whether torch.compile can trace the model without a graph break. A mixture of experts breaks the graph with many
    tokens: the host reads which experts they need."""
    return model.config.moe is None

"""ModelRunner: a model bound to a KV cache, from token ids to the next token ids.

    kv_cache = KVCache(model, batch_size=1, max_seq_len=300)
    runner = ModelRunner(model, kv_cache, SamplingParams(temperature=0.8))
    tokens = runner.prefill(prompt, start_pos)  # [B, T] -> [B]
    tokens = runner.decode(tokens[:, None], start_pos + prompt.shape[1])

There are three kinds of steps:

    prefill         takes a prompt of any length, in chunks, and is never captured
    decode          takes one token of every sequence
    verification    takes several proposed tokens; speculate.py makes it with build_step

A decode or verification step has one of three modes (choose_mode):

    kernels    device    --compile    mode
    all        CPU       yes or no    captured: a CPU graph of the model; then the sampler, eagerly
    all        GPU       yes          captured: a CUDA graph of model and sampler
    all        GPU       no           eager
    not all    any       yes          compiled by torch.compile; without experts, a GPU also captures the result
    not all    any       no           eager

"all": every operation has a kernel for B * T tokens (model.has_kernels_for). The limits are Backend.token_limits of
ops/backend.py. An eager step uses the kernels of the operations that are within their limit.

Shapes: B sequences, T new tokens per sequence, V vocabulary. start_pos [B] is the position of each sequence's first new
token.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor, nn

import collectives
from engine.sampling import apply_repetition_penalty, sample, store_token_ids
from engine.sampling_params import GREEDY, SamplingParams
from kernels.build import find_compiler
from kernels.capture import capture, graph_num_threads
from model import KVCache, Transformer
from ops.backend import Backend
from ops.sampling import uniform_dtype
from utils.errors import UsageError

# The most tokens in a chunk of prefill, summed over all sequences. The limit bounds the memory of activations. Small
# chunks are slow: every chunk reads all weights again, and a matmul of PyTorch first dequantizes its weights.
CPU_PREFILL_CHUNK_TOKENS = 2048
GPU_PREFILL_CHUNK_TOKENS = 4096
MIN_COMPILED_TOKENS = 9  # compiling does not pay for a chunk of fewer tokens
Mode = Literal["captured", "compiled", "eager"]  # the modes of a step: see the table above
NOT_FINITE = "the model's logits are not finite: NaN weights, or --precision too narrow"


def check_sampled_ids(ids: list[int]) -> list[int]:
    """Returns ids. Raises UsageError if one is -1, which sample returns for logits that are not finite."""
    if min(ids) < 0:
        raise UsageError(NOT_FINITE)
    return ids


@dataclass(frozen=True)
class Sampler:
    """The end of a prefill or decode step. Samples the next token of each sequence, the same token on all ranks.
    speculate.py has the samplers for verification and for a draft.

    logits [B, n, V]: the logits after the last n of tokens [B, T].
    uniform [B, 1]: random numbers from ModelRunner.draw_uniform; None: sampling is greedy."""

    params: SamplingParams
    token_ids: Tensor  # [B, S], KVCache.token_ids
    backend: Backend  # the backend of the model's head

    def __call__(self, logits: Tensor, tokens: Tensor, start_pos: Tensor, uniform: Tensor | None = None) -> Tensor:
        logits = self.penalize(logits, tokens, start_pos)
        return collectives.broadcast(sample(logits[:, -1], self.params, self.backend, uniform))

    def penalize(self, logits: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
        if self.params.needs_token_ids:
            store_token_ids(self.token_ids, tokens, start_pos)
        return apply_repetition_penalty(logits, tokens, start_pos, self.token_ids, [self.params])


def return_logits(logits: Tensor, *_) -> Tensor:
    """Takes the place of a sampler in a step whose result is the logits."""
    return logits


class ModelRunner:
    """The steps of a model with one KV cache."""

    def __init__(
        self, model: Transformer, kv_cache: KVCache, params: SamplingParams = GREEDY, compile: bool = False,
        compile_prefill: bool = False,
    ):
        """params: sampling parameters for prefill and decode. compile, compile_prefill: the options of generate.py."""
        self.model = model
        self.kv_cache = kv_cache
        self.compile = compile
        self.device = model.device
        self.sampler = Sampler(params, kv_cache.token_ids, model.lm_head.backend)
        self.compiled_model = compile_blocks(model, dynamic=True) if compile_prefill else None
        self.decode_step = self.build_step(self.sampler)

    # ---- Prefill. The B sequences are in neighbouring slots of the KV cache, from first_slot on ----

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, start_pos: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Returns the next tokens [B]. uniform [B, 1]: random numbers from draw_uniform, which prefill calls if uniform
        is None."""
        if uniform is None:
            uniform = next(self.draw_uniform(1, len(tokens)))
        return self.sampler(self.prefill_logits(tokens, start_pos), tokens, start_pos, uniform)

    def prefill_logits(self, tokens: Tensor, start_pos: Tensor, first_slot: int = 0) -> Tensor:
        """Returns the logits [B, 1, V] after the last of tokens."""
        return self.model.compute_logits(self.fill_kv_cache(tokens, start_pos, first_slot))

    def fill_kv_cache(self, tokens: Tensor, start_pos: Tensor, first_slot: int = 0) -> Tensor:
        """Computes keys and values. Returns the hidden states after the last of tokens: [B, 1, dim]."""
        for hidden in self.prefill_chunks(tokens, start_pos, first_slot):
            last_hidden = hidden[:, -1:]
        return last_hidden

    def prefill_chunks(self, tokens: Tensor, start_pos: Tensor, first_slot: int = 0) -> Iterator[Tensor]:
        """Runs the blocks on chunks of tokens, one after another. Yields the hidden states of each chunk:
        [B, chunk, dim]. With compile_prefill, a chunk that is too long for the kernels runs compiled blocks."""
        kv_cache = self.kv_cache.narrow_batch(first_slot, len(tokens))
        chunk_tokens = CPU_PREFILL_CHUNK_TOKENS if self.device.type == "cpu" else GPU_PREFILL_CHUNK_TOKENS
        n_cached = int(start_pos.max())
        offset = 0
        for chunk in tokens.split(max(1, chunk_tokens // len(tokens)), dim=1):
            model = self.model
            is_long = chunk.numel() >= MIN_COMPILED_TOKENS
            if self.compiled_model and is_long and not model.has_kernels_for(*chunk.shape):
                model = self.compiled_model
            used_cache = kv_cache.narrow_length(n_cached + offset + chunk.shape[1])
            yield model.compute_hidden(chunk, start_pos + offset, used_cache)
            offset += chunk.shape[1]

    # ---- Decoding and verification ----

    def decode(self, tokens: Tensor, start_pos: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Takes the last tokens [B, 1] of the sequences. Returns the next tokens [B]: see Step. uniform: as for
        prefill."""
        if uniform is None:
            uniform = next(self.draw_uniform(1, len(tokens)))
        return self.decode_step(tokens, start_pos, uniform)

    def draw_uniform(
        self, n_steps: int, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Tensor | None]:
        """Yields the random numbers in [0, 1) of each step: uniform [B, 1], or None if sampling is greedy.

        The host draws the numbers of all steps before the first step, and each step takes its numbers as an input. So
        one captured step serves every generator, and a GPU never waits for a draw.

        generator: a generator on the CPU; None: PyTorch's global one."""
        if self.sampler.params.is_greedy:
            yield from repeat(None, n_steps)
            return
        uniform = torch.rand(n_steps, batch_size, 1, dtype=torch.float64, generator=generator)
        uniform = uniform.to(self.device, uniform_dtype(self.device))
        for i in range(n_steps):
            yield uniform[i]

    def build_step(self, sampler: Callable = return_logits) -> "Step":
        """Returns a step that ends with sampler."""
        return Step(EagerStep(self.model, self.kv_cache, sampler), self.compile)


# ---- Steps: Step chooses the mode ------------------------------------------------------------------------------------


class Step:
    """A function of tensors: the model, then the sampler on the logits.

        step(tokens [B, T], start_pos [B], *inputs) -> sampler(logits [B, T, V], tokens, start_pos, *inputs)

    The step uses the first B sequences of the KV cache. The next call may overwrite the result, and also the logits
    that the sampler gets: both may be static buffers of a graph. Clone what must last."""

    def __init__(self, eager_step: "EagerStep", compile: bool):
        self.eager_step, self.compile = eager_step, compile
        self.steps: dict[Mode, Callable] = {}

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        eager_step = self.eager_step
        mode = choose_mode(eager_step.has_kernels_for(*tokens.shape), eager_step.model.device.type, self.compile)
        if mode not in self.steps:  # built at first use: importing Inductor takes a second and 150 MB
            self.steps[mode] = build_in_mode(mode, eager_step)
        return self.steps[mode](tokens, start_pos, *inputs)


def build_in_mode(mode: Mode, eager_step: "EagerStep") -> Callable:
    model = eager_step.model
    if mode == "captured":
        return CPUGraphStep(eager_step) if model.device.type == "cpu" else capture(eager_step)
    if mode == "compiled":
        step = CompiledStep(eager_step)
        return capture(step) if model.device.type == "cuda" and can_be_one_graph(model) else step
    return eager_step


def choose_mode(has_kernels: bool, device_type: str, compile: bool) -> Mode:
    """Returns the mode of a step, by the table at the top of this file."""
    if has_kernels and (compile or device_type == "cpu"):
        return "captured"
    return "compiled" if compile else "eager"


class EagerStep:
    """A step as plain calls, which the other modes capture or compile. Not a part of Step: a captured method of Step
    would be a reference cycle, which keeps the KV cache in memory until Python's next garbage collection."""

    def __init__(self, model: Transformer, kv_cache: KVCache, sampler: Callable):
        self.model, self.kv_cache, self.sampler = model, kv_cache, sampler
        self.has_kernels_for = cache(model.has_kernels_for)  # slow, since the method goes through all modules

    def __call__(self, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        return self.sampler(self.compute_logits(tokens, start_pos), tokens, start_pos, *inputs)

    def compute_logits(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        used_cache = self.kv_cache.narrow_batch(0, len(tokens))
        if not self.has_kernels_for(*tokens.shape):
            # PyTorch's attention computes a score for every position of the cache, so pass only the used positions.
            used_cache = used_cache.narrow_length(int(start_pos.max()) + tokens.shape[1])
        return self.model(tokens, start_pos, used_cache)


class CPUGraphStep:
    """A step on a CPU. A CPU graph holds only the operations of kernels/schema.py, and a sampler has others."""

    def __init__(self, eager_step: EagerStep):
        self.sampler = eager_step.sampler
        self.graph = capture(eager_step.compute_logits)

    def __call__(self, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        logits = self.graph(tokens, start_pos)
        with graph_num_threads():
            return self.sampler(logits, tokens, start_pos, *inputs)


class CompiledStep:
    """A step compiled by torch.compile in two pieces: the blocks, of which one compiled block serves all layers, and
    the head with the sampler. The pieces run as fast as one compiled step, and compile in a third of the time."""

    def __init__(self, eager_step: EagerStep):
        model, sampler = eager_step.model, eager_step.sampler

        def head(hidden: Tensor, *inputs: Tensor | None):
            return sampler(model.compute_logits(hidden), *inputs)

        options = {"fullgraph": can_be_one_graph(model), "dynamic": False}
        self.eager_step = eager_step
        self.head = torch.compile(head, **options)
        self.model = compile_blocks(model, **options)

    def __call__(self, tokens: Tensor, start_pos: Tensor, *inputs: Tensor | None):
        used_cache = self.eager_step.kv_cache.narrow_batch(0, len(tokens))
        hidden = self.model.compute_hidden(tokens, start_pos, used_cache)
        return self.head(hidden, tokens, start_pos, *inputs)


def compile_blocks(model: Transformer, **options) -> Transformer:
    """Returns a copy of model that shares all weights and whose blocks are compiled. options are torch.compile's. One
    compilation serves all blocks, since a block's weights are inputs of the compiled graph."""
    check_compiler()
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)  # copy.copy shares this dict, so setting layers would change model
    compiled.layers = nn.ModuleList(torch.compile(block, **options) for block in model.layers)
    return compiled


def check_compiler():
    """Raises UsageError if torch.compile cannot work here."""
    if find_compiler() is None:
        raise UsageError("--compile needs a C++ compiler ($CXX, g++ or clang++); install one or leave it out")


def can_be_one_graph(model: Transformer) -> bool:
    """Whether torch.compile can trace the model without a graph break. A mixture of experts breaks the graph if a step
    has many tokens, since the host reads which experts the tokens need."""
    return model.config.moe is None

"""The steps of generation: functions from token ids to the next token ids, through the model.

    kv_cache = make_kv_cache(model, batch_size=1, max_seq_len=300)
    steps = build_steps(model, kv_cache, SamplingParams(temperature=0.8))
    tokens = steps.prefill(prompt, start_pos)  # [B, T] -> [B]
    tokens = steps.decode(tokens[:, None], start_pos + prompt.shape[1])

There are three kinds of steps:

    prefill         takes a prompt of any length, in chunks (chunked_prefill)
    decode          takes one token of every sequence (ModelRunner)
    verification    takes several tokens of a draft (ModelRunner, which speculate.py calls)

llm.py, scheduler.py and speculate.py call the steps. Read build_steps first, then ModelRunner, whose table says when a
step is recorded, compiled or eager.

Shapes: B sequences, T new tokens per sequence, V vocabulary. start_pos [B] is the position of each sequence's first new
token.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

import collectives
from engine.sampling import SamplingParams, penalize, sample
from kernels.cpu import find_compiler
from kernels.record import record, with_tape_threads
from model import KVCache, Transformer
from utils.errors import UsageError
from utils.machine import check_memory

# The most tokens in a chunk of prefill, summed over all sequences. The limit bounds the memory of activations. Small
# chunks are slow: every chunk dequantizes all weights again, and all chunks but the first need an attention mask.
CPU_PREFILL_CHUNK_TOKENS = 2048
GPU_PREFILL_CHUNK_TOKENS = 4096
MIN_COMPILED_TOKENS = 9  # compiling does not pay for a chunk of fewer tokens
NOT_FINITE = "the model's logits are not finite: NaN weights, or --precision too narrow"

StepFunction = Callable[[Tensor, Tensor], Tensor]  # (tokens [B, T], start_pos [B]) -> next token ids [B]


class GenerationSteps(NamedTuple):
    """The two steps that llm.generate calls."""

    prefill: StepFunction  # any T
    decode: StepFunction  # T = 1


def make_kv_cache(model: Transformer, batch_size: int, max_seq_len: int) -> KVCache:
    """Returns a KVCache on model's device. Raises OutOfMemoryError if the device is a CPU with too little memory."""
    if model.device.type == "cpu":
        n_bytes = batch_size * max_seq_len * model.kv_bytes_per_token()
        check_memory(n_bytes, f"the KV cache of {batch_size} x {max_seq_len} tokens")
    return KVCache(model, batch_size, max_seq_len)


def build_steps(
    model: Transformer, kv_cache: KVCache, sampling: SamplingParams, compile: bool = False,
    compile_prefill: bool = False,
) -> GenerationSteps:  # fmt: skip
    """Returns the steps of plain generation with model and kv_cache. compile and compile_prefill are the options of
    generate.py."""
    compiled_model = compile_blocks(model, dynamic=True) if compile_prefill else None

    def sampler(logits: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
        """Logits [B, 1, V] after the last of tokens [B, T] -> next tokens [B], equal on all ranks."""
        if sampling.repetition_penalty != 1:
            kv_cache.store_token_ids(tokens, start_pos)  # only the penalty reads the ids
            logits = apply_repetition_penalty(logits, tokens, start_pos, kv_cache, sampling.repetition_penalty)
        return collectives.broadcast(sample(logits[:, -1], sampling, model.lm_head.backend))

    def prefill(tokens: Tensor, start_pos: Tensor) -> Tensor:
        logits = prefill_logits(model, tokens, start_pos, kv_cache, compiled_model)
        return sampler(logits, tokens, start_pos)

    return GenerationSteps(prefill, ModelRunner(model, kv_cache, sampler, compile))


def apply_repetition_penalty(
    logits: Tensor, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, penalty: float | Tensor
) -> Tensor:
    """Returns logits [B, n, V] with a penalty on every token that the text already contains.

    logits: of the positions of the last n of tokens [B, T].
    kv_cache: must hold the ids of the text, tokens included: see store_token_ids.
    penalty: a number, or [B, 1, 1] with a number for each sequence."""
    n = logits.shape[1]
    last_positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)[-n:]  # [B, n]
    seen = kv_cache.token_presence_mask(last_positions, logits.shape[-1])
    return torch.where(seen, penalize(logits, penalty), logits)


def check_sampled_ids(ids: list[int]):
    """Raises UsageError if sample returned -1, which stands for logits that are not finite."""
    if min(ids) < 0:
        raise UsageError(NOT_FINITE)


# ---- Prefill --------------------------------------------------------------------------------------------------------


def prefill_logits(
    model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, compiled_model: Transformer | None = None
) -> Tensor:
    """Returns the logits [B, 1, V] after the last of tokens [B, T]. The arguments are those of chunked_prefill."""
    for hidden in chunked_prefill(model, tokens, start_pos, kv_cache, compiled_model):
        last_hidden = hidden[:, -1:]
    return model.compute_logits(last_hidden)


def fill_kv_cache(model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache):
    """Writes the keys and values of tokens [B, T] to kv_cache. Computes no logits."""
    for _ in chunked_prefill(model, tokens, start_pos, kv_cache):
        pass


def chunked_prefill(
    model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, compiled_model: Transformer | None = None
) -> Iterator[Tensor]:
    """Runs the blocks on tokens [B, T], one chunk after the other. Yields the hidden states of each chunk:
    [B, chunk, dim]. Attention gets only the used part of the cache. No decode step runs between two chunks.

    compiled_model: the result of compile_blocks, for chunks with more tokens than the kernels take. With None, model
    computes all chunks."""
    batch_size, n_tokens = tokens.shape
    chunk_tokens = CPU_PREFILL_CHUNK_TOKENS if tokens.device.type == "cpu" else GPU_PREFILL_CHUNK_TOKENS
    chunk_size = max(1, chunk_tokens // batch_size)
    n_cached = int(start_pos.max())
    for offset in range(0, n_tokens, chunk_size):
        chunk = tokens[:, offset : offset + chunk_size]
        use_compiled = (
            compiled_model is not None and chunk.numel() >= MIN_COMPILED_TOKENS and not model.uses_kernels(*chunk.shape)
        )
        chunk_model = compiled_model if use_compiled else model
        used_length = n_cached + offset + chunk.shape[1]
        yield chunk_model.compute_hidden(chunk, start_pos + offset, kv_cache.narrow_length(used_length))


# ---- Decoding and verification --------------------------------------------------------------------------------------


class ModelRunner:
    """Runs decode and verification steps: the model, then sampler on the logits. A step has one of these modes:

        kernels fit    device    --compile    mode
        yes            CPU       yes or no    recorded: a tape of the model; then the sampler, eagerly
        yes            GPU       yes          recorded: a CUDA graph of model and sampler
        yes            GPU       no           eager
        no             any       yes          compiled by torch.compile; without experts, a GPU also records the result
        no             any       no           eager

    The kernels fit if they take all B * T tokens in every operation: model.uses_kernels(B, T). The limit of a linear
    layer is max_kernel_tokens. Eager operations use kernels, too, up to that limit:

        64 tokens          quantized weights, and all weights on a GPU with matrix units
        8 to 64 tokens     dense weights on a CPU, depending on the CPU's instructions
        8 tokens           a GPU without matrix units

    runner(tokens [B, T], start_pos [B], *sampler_inputs) returns sampler(logits [B, T, V], tokens, start_pos,
    *sampler_inputs). All arguments are tensors. The step uses the first B sequences of kv_cache.

    The next call may overwrite the result and the logits that sampler gets, since both may be static buffers of a
    recording. Clone what must last."""

    def __init__(self, model: Transformer, kv_cache: KVCache, sampler: Callable, compile: bool = False):
        self.device, self.compile = model.device, compile
        self.kernels_fit = cache(model.uses_kernels)  # uses_kernels goes through all modules
        self.step_by_mode = build_step_by_mode(model, kv_cache, sampler, self.kernels_fit)

    def __call__(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        mode = choose_mode(self.kernels_fit(*tokens.shape), self.device, self.compile)
        return self.step_by_mode[mode](tokens, start_pos, *sampler_inputs)


def choose_mode(kernels_fit: bool, device: torch.device, compile: bool) -> str:
    """Returns "recorded", "compiled" or "eager", by ModelRunner's table."""
    if kernels_fit and (compile or device.type == "cpu"):
        return "recorded"
    return "compiled" if compile else "eager"


def build_step_by_mode(
    model: Transformer, kv_cache: KVCache, sampler: Callable, kernels_fit: Callable[[int, int], bool]
) -> dict[str, Callable]:
    """Returns {mode: step}, for ModelRunner. Recording and compilation happen when a step is first called."""

    def compute_logits(tokens: Tensor, start_pos: Tensor) -> Tensor:
        step_cache = kv_cache.narrow_batch(0, len(tokens))
        if not kernels_fit(*tokens.shape):
            # PyTorch's attention computes a score for every position of the cache, so pass only the used positions.
            step_cache = step_cache.narrow_length(int(start_pos.max()) + tokens.shape[1])
        return model(tokens, start_pos, step_cache)

    def eager_step(tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        return sampler(compute_logits(tokens, start_pos), tokens, start_pos, *sampler_inputs)

    recorded_logits = record(compute_logits)

    def tape_step(tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        # A tape holds only leaf operations, and sampling is none.
        return with_tape_threads(sampler, recorded_logits(tokens, start_pos), tokens, start_pos, *sampler_inputs)

    compiled_step = CompiledStep(model, kv_cache, sampler)
    has_cuda_graphs = model.device.type == "cuda"
    return {
        "recorded": record(eager_step) if has_cuda_graphs else tape_step,
        "compiled": record(compiled_step) if has_cuda_graphs and can_be_one_graph(model) else compiled_step,
        "eager": eager_step,
    }


# ---- torch.compile --------------------------------------------------------------------------------------------------


class CompiledStep:
    """A step that torch.compile compiles in two pieces: a block, which serves all layers, and the output head with the
    sampler. The pieces run as fast as one compiled step, and compile in a third of the time."""

    def __init__(self, model: Transformer, kv_cache: KVCache, sampler: Callable):
        self.model, self.kv_cache, self.sampler = model, kv_cache, sampler

    def __call__(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        model, head = self.compiled_pieces
        hidden = model.compute_hidden(tokens, start_pos, self.kv_cache.narrow_batch(0, len(tokens)))
        return head(hidden, tokens, start_pos, *sampler_inputs)

    @cached_property
    def compiled_pieces(self) -> tuple[Transformer, Callable]:
        """Returns (model with compiled blocks, compiled head). The first step makes them, and not the constructor:
        importing the compiler takes a second and 150 MB."""
        model, sampler = self.model, self.sampler

        def head(hidden: Tensor, *inputs: Tensor):
            return sampler(model.compute_logits(hidden), *inputs)

        options = {"fullgraph": can_be_one_graph(model), "dynamic": False}
        return compile_blocks(model, **options), torch.compile(head, **options)


def compile_blocks(model: Transformer, **options) -> Transformer:
    """Returns a copy of model that shares all weights and whose blocks are compiled. options are torch.compile's. One
    compilation serves all blocks, since a block's weights are inputs of the compiled graph."""
    check_compiler()
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)  # copy.copy shares this dict, so setting layers would change model, too
    compiled.layers = nn.ModuleList(torch.compile(layer, **options) for layer in model.layers)
    return compiled


def check_compiler():
    """Raises UsageError if torch.compile cannot work here."""
    if find_compiler() is None:
        raise UsageError("--compile needs a C++ compiler ($CXX, g++ or clang++); install one or leave it out")


def can_be_one_graph(model: Transformer) -> bool:
    """Whether torch.compile can trace the model without a graph break. A mixture of experts breaks the graph if a step
    has many tokens, since the host reads which experts the tokens need."""
    return model.config.moe is None

"""The steps of generation: functions from token ids to the next token ids, through the model.

    kv_cache = make_kv_cache(model, batch_size=1, max_seq_len=300)
    steps = build_steps(model, kv_cache, SamplingParams(temperature=0.8))
    tokens = steps.prefill(prompt, start_pos)  # [B, T] -> [B]
    tokens = steps.decode(tokens[:, None], start_pos + prompt.shape[1])

prefill takes a prompt of any length, in chunks. decode takes one token of every sequence. A third kind of step verifies
several tokens of a draft (speculate.py). Decoding and verification run the model in one of three ways (ModelRunner):

    recorded    all operations as kernels, replayed in one go (kernels/record.py); on a GPU with compile only
    compiled    by torch.compile, with compile only; a GPU mostly records what it makes
    eager       one call for each operation

Prefill is never recorded. Its chunks are compiled with compile_prefill, or else eager (chunked_prefill).

An eager operation also runs on a kernel, if there is one for so many tokens. LinearParams.max_kernel_tokens is the most
that the kernels of a layer take (kernels/prepare.py):

    64 tokens          of quantized weights, and on a GPU with matrix units
    8 to 64            of dense weights on a CPU, depending on its instructions
    8                  on a GPU without matrix units

Shapes: B sequences, T new tokens of each, V vocabulary. start_pos [B] are those of each sequence's first new token.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

import collectives
from engine.sampling import SamplingParams, penalize, sample
from errors import UsageError
from kernels.cpu import find_compiler
from kernels.record import record, with_tape_threads
from machine import check_memory
from model import KVCache, Transformer

# How many tokens of all sequences together prefill takes at a time, which bounds the memory of its activations. Every
# chunk dequantizes all weights again, and attention of a later chunk needs a mask, so small ones are slow.
CPU_PREFILL_CHUNK_TOKENS = 2048
GPU_PREFILL_CHUNK_TOKENS = 4096
MIN_COMPILED_TOKENS = 9  # a chunk of fewer tokens is not worth a compilation
NOT_FINITE = "the model's logits are not finite: NaN weights, or --precision too narrow"

StepFunction = Callable[[Tensor, Tensor], Tensor]  # (tokens [B, T], start_pos [B]) -> next token ids [B]


class GenerationSteps(NamedTuple):
    """Prefill and decode, which llm.generate calls."""

    prefill: StepFunction  # any T
    decode: StepFunction  # T = 1


def make_kv_cache(model: Transformer, batch_size: int, max_seq_len: int) -> KVCache:
    """A KVCache for model. Raises OutOfMemoryError if a CPU's memory is too small for it."""
    if model.device.type == "cpu":
        n_bytes = batch_size * max_seq_len * kv_bytes_per_token(model)
        check_memory(n_bytes, f"the KV cache of {batch_size} x {max_seq_len} tokens")
    return KVCache(model, batch_size, max_seq_len)


def kv_bytes_per_token(model: Transformer) -> int:
    """Bytes of keys and values for one token of one sequence."""
    return KVCache(model, 1, 1).bytes_per_position()


def build_steps(
    model: Transformer, kv_cache: KVCache, sampling: SamplingParams, compile: bool = False,
    compile_prefill: bool = False,
) -> GenerationSteps:  # fmt: skip
    """The steps of plain generation with model, for the sequences of kv_cache. compile, compile_prefill: what the
    options of generate.py ask for."""
    compiled_model = compile_blocks(model, dynamic=True) if compile_prefill else None

    def sample_next(logits: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
        """The sampler: logits [B, 1, V] after the last of tokens [B, T] -> next tokens [B], equal on all ranks."""
        logits = apply_repetition_penalty(logits, tokens, start_pos, kv_cache, sampling.repetition_penalty)
        return collectives.broadcast(sample(logits[:, -1], sampling, model.lm_head.backend))

    def prefill(tokens: Tensor, start_pos: Tensor) -> Tensor:
        logits = prefill_logits(model, tokens, start_pos, kv_cache, compiled_model)
        return sample_next(logits, tokens, start_pos)

    return GenerationSteps(prefill, ModelRunner(model, kv_cache, sample_next, compile))


def apply_repetition_penalty(
    logits: Tensor, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, penalty: float | Tensor
) -> Tensor:
    """Penalizes the tokens that the text has up to each of the logits [B, n, V], which follow the last n of tokens
    [B, T]. The first token is at start_pos [B]. Also stores tokens in kv_cache, for the next steps. penalty: a number,
    or one for each sequence [B, 1, 1]. With the number 1 it does nothing."""
    if not isinstance(penalty, Tensor) and penalty == 1:
        return logits
    kv_cache.store_token_ids(tokens, start_pos)
    n = logits.shape[1]
    last_positions = start_pos[:, None] + torch.arange(tokens.shape[1], device=tokens.device)[-n:]  # [B, n]
    seen = kv_cache.token_presence_mask(last_positions, logits.shape[-1])
    return torch.where(seen, penalize(logits, penalty), logits)


# ---- Prefill --------------------------------------------------------------------------------------------------------


def prefill_logits(
    model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, compiled_model: Transformer | None = None
) -> Tensor:
    """The logits after the last of tokens [B, T]: [B, 1, V]. The arguments are chunked_prefill's."""
    for hidden in chunked_prefill(model, tokens, start_pos, kv_cache, compiled_model):
        last_hidden = hidden[:, -1:]
    return model.compute_logits(last_hidden)


def chunked_prefill(
    model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, compiled_model: Transformer | None = None
) -> Iterator[Tensor]:
    """model.compute_hidden of tokens [B, T], chunk by chunk: [B, chunk, dim]. Attention sees only the used part of the
    cache. Chunks bound the memory of activations; no decoding takes place between them.

    compiled_model: made by compile_blocks; computes the chunks that have too many tokens for the kernels. None: model
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
    """Executes steps: the model, then sampler on its logits. The shape of a step decides how:

        model.uses_kernels(B, T)    on a CPU recorded; on a GPU recorded with compile, else eager
        otherwise                   compiled with compile, else eager

    runner(tokens [B, T], start_pos [B], *sampler_inputs) returns sampler(logits [B, T, V], tokens, start_pos,
    *sampler_inputs). All arguments are tensors. The B sequences are the first of kv_cache.

    The result may lie in a static buffer, which the next call overwrites. So may the logits that sampler gets. Clone
    what must last."""

    def __init__(self, model: Transformer, kv_cache: KVCache, sampler: Callable, compile: bool = False):
        self.uses_kernels = cache(model.uses_kernels)  # it goes through all modules
        self.step_with_kernels = build_step_with_kernels(model, kv_cache, sampler, compile)
        self.step_without_kernels = build_step_without_kernels(model, kv_cache, sampler, compile)

    def __call__(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        step = self.step_with_kernels if self.uses_kernels(*tokens.shape) else self.step_without_kernels
        return step(tokens, start_pos, *sampler_inputs)


def build_step_with_kernels(model: Transformer, kv_cache: KVCache, sampler: Callable, compile: bool) -> Callable:
    """The first line of ModelRunner's table."""

    def compute_logits(tokens: Tensor, start_pos: Tensor) -> Tensor:
        return model(tokens, start_pos, kv_cache.narrow_batch(0, len(tokens)))

    def eager_step(tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        return sampler(compute_logits(tokens, start_pos), tokens, start_pos, *sampler_inputs)

    if model.device.type != "cpu":
        return record(eager_step) if compile and model.device.type == "cuda" else eager_step
    # A recording on a CPU holds leaf operations alone, and sampling is none.
    recorded_logits = record(compute_logits)

    def recorded_step(tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        return with_tape_threads(sampler, recorded_logits(tokens, start_pos), tokens, start_pos, *sampler_inputs)

    return recorded_step


def build_step_without_kernels(model: Transformer, kv_cache: KVCache, sampler: Callable, compile: bool) -> Callable:
    """The second line of ModelRunner's table."""

    def eager_step(tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        # Only the used part of the cache, since PyTorch's attention computes scores for every position.
        used_length = int(start_pos.max()) + tokens.shape[1]
        used_cache = kv_cache.narrow_batch(0, len(tokens)).narrow_length(used_length)
        return sampler(model(tokens, start_pos, used_cache), tokens, start_pos, *sampler_inputs)

    if not compile:
        return eager_step
    compiled_step = CompiledStep(model, kv_cache, sampler)
    # A GPU also records what torch.compile makes.
    return record(compiled_step) if model.device.type == "cuda" and can_be_one_graph(model) else compiled_step


class CompiledStep:
    """A step compiled by torch.compile, in two pieces: a block, which serves all layers, and the output head
    with the sampler. Compiling the pieces takes a third of the time that the whole step takes, and they run as fast."""

    def __init__(self, model: Transformer, kv_cache: KVCache, sampler: Callable):
        self.model, self.kv_cache, self.sampler = model, kv_cache, sampler

    def __call__(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        model, head = self.compiled_pieces
        hidden = model.compute_hidden(tokens, start_pos, self.kv_cache.narrow_batch(0, len(tokens)))
        return head(hidden, tokens, start_pos, *sampler_inputs)

    @cached_property
    def compiled_pieces(self) -> tuple[Transformer, Callable]:
        """Returns (model with compiled blocks, compiled head). They are made at first use: importing the compiler takes
        a second and 150 MB."""
        model, sampler = self.model, self.sampler

        def head(hidden: Tensor, *inputs: Tensor):
            return sampler(model.compute_logits(hidden), *inputs)

        options = {"fullgraph": can_be_one_graph(model), "dynamic": False}
        return compile_blocks(model, **options), torch.compile(head, **options)


# ---- torch.compile --------------------------------------------------------------------------------------------------


def compile_blocks(model: Transformer, **options) -> Transformer:
    """A copy of model, with the same weights, whose blocks are compiled with these options of torch.compile. One
    compilation serves all blocks, since the weights are inputs of its graph."""
    check_compiler()
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)  # or the copy would share its children with model
    compiled.layers = nn.ModuleList(torch.compile(layer, **options) for layer in model.layers)
    return compiled


def check_compiler():
    """Raises UsageError if torch.compile cannot work here."""
    if find_compiler() is None:
        raise UsageError("--compile needs a C++ compiler ($CXX, g++ or clang++); install one or leave it out")


def can_be_one_graph(model: Transformer) -> bool:
    """Whether torch.compile can trace the model without a graph break. It cannot trace a mixture of experts with many
    tokens, since the host reads which experts the tokens need."""
    return model.config.moe is None


def check_sampled_ids(ids: list[int]):
    """Raises UsageError if sampling found logits that are not finite."""
    if min(ids) < 0:
        raise UsageError(NOT_FINITE)

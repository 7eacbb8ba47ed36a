"""The steps of generation: functions from token ids to the next token ids, through the model.

    kv_cache = make_kv_cache(model, batch_size=1, max_seq_len=300)
    steps = build_steps(model, kv_cache, SamplingParams(temperature=0.8))
    tokens = steps.prefill(prompt, start_pos)  # [B, T] -> [B]
    tokens = steps.decode(tokens[:, None], start_pos + prompt.shape[1])

There are three kinds of steps:

    prefill         takes a prompt of any length, in chunks (chunked_prefill)
    decode          takes one token of every sequence (build_model_step)
    verification    takes several tokens of a draft (build_model_step, which speculate.py calls)

generation.py, scheduler.py and speculate.py call the steps. Read build_steps first, then build_model_step and
choose_mode, whose table says when a step is recorded, compiled or eager.

Shapes: B sequences, T new tokens per sequence, V vocabulary. start_pos [B] is the position of each sequence's first new
token.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

import collectives
from engine.sampling import SamplingParams, process_logits, sample
from engine.token_history import TokenHistory
from kernels.build import find_compiler
from kernels.record import call_with_tape_threads, record
from kernels.schema import PositionTables
from model import KVCache, Transformer
from utils.errors import UsageError
from utils.machine import check_memory

# The most tokens in a chunk of prefill, summed over all sequences. The limit bounds the memory of activations. Small
# chunks are slow: every chunk reads all weights again, and where PyTorch multiplies, it dequantizes them first.
CPU_PREFILL_CHUNK_TOKENS = 2048
GPU_PREFILL_CHUNK_TOKENS = 4096
MIN_COMPILED_TOKENS = 9  # compiling does not pay for a chunk of fewer tokens
NOT_FINITE = "the model's logits are not finite: NaN weights, or --precision too narrow"


class Steps(NamedTuple):
    """The two functions that generation.py: generate calls: tokens [B, T], start_pos [B] -> the next tokens [B]. And
    what further steps with the same KV cache share with them (speculate.py)."""

    prefill: Callable[[Tensor, Tensor], Tensor]  # any T
    decode: Callable[[Tensor, Tensor], Tensor]  # T = 1
    position_tables: list[PositionTables]
    history: TokenHistory


def make_kv_cache(model: Transformer, batch_size: int, max_seq_len: int) -> KVCache:
    """Returns a KVCache on model's device. Raises OutOfMemoryError if the device is a CPU with too little memory."""
    if model.device.type == "cpu":
        n_bytes = batch_size * max_seq_len * model.kv_bytes_per_token()
        check_memory(n_bytes, f"the KV cache of {batch_size} x {max_seq_len} tokens")
    return KVCache(model, batch_size, max_seq_len)


def build_steps(
    model: Transformer, kv_cache: KVCache, sampling: SamplingParams, compile: bool = False,
    compile_prefill: bool = False,
) -> Steps:
    """Returns the steps of plain generation with model and kv_cache. compile and compile_prefill are the options of
    generate.py."""
    compiled_model = compile_blocks(model, dynamic=True) if compile_prefill else None
    position_tables = model.make_position_tables(kv_cache)
    history = TokenHistory(kv_cache.batch_size, kv_cache.max_seq_len, kv_cache.device)

    def sampler(logits: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
        """Logits [B, 1, V] after the last of tokens [B, T] -> next tokens [B], equal on all ranks."""
        if sampling.needs_history:
            history.store(tokens, start_pos)
        logits = process_logits(logits, tokens, start_pos, history, [sampling])
        return collectives.broadcast(sample(logits[:, -1], sampling, model.lm_head.backend))

    @torch.inference_mode()
    def prefill(tokens: Tensor, start_pos: Tensor) -> Tensor:
        logits = prefill_logits(model, tokens, start_pos, kv_cache, position_tables, compiled_model)
        return sampler(logits, tokens, start_pos)

    decode = build_model_step(model, kv_cache, position_tables, sampler, compile)
    return Steps(prefill, decode, position_tables, history)


def check_sampled_ids(ids: list[int]) -> list[int]:
    """Returns ids. Raises UsageError if one is -1, which sample returns for logits that are not finite."""
    if min(ids) < 0:
        raise UsageError(NOT_FINITE)
    return ids


# ---- Prefill --------------------------------------------------------------------------------------------------------


def prefill_logits(
    model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, position_tables: list[PositionTables],
    compiled_model: Transformer | None = None,
) -> Tensor:
    """Returns the logits [B, 1, V] after the last of tokens [B, T]. The arguments are those of chunked_prefill."""
    for hidden in chunked_prefill(model, tokens, start_pos, kv_cache, position_tables, compiled_model):
        last_hidden = hidden[:, -1:]
    return model.compute_logits(last_hidden)


def fill_kv_cache(
    model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, position_tables: list[PositionTables]
):
    """Writes the keys and values of tokens [B, T] to kv_cache. Computes no logits."""
    for _ in chunked_prefill(model, tokens, start_pos, kv_cache, position_tables):
        pass


def chunked_prefill(
    model: Transformer, tokens: Tensor, start_pos: Tensor, kv_cache: KVCache, position_tables: list[PositionTables],
    compiled_model: Transformer | None = None,
) -> Iterator[Tensor]:
    """Runs the blocks on tokens [B, T], one chunk after the other. Yields the hidden states of each chunk:
    [B, chunk, dim]. Attention gets only the used part of the cache.

    compiled_model: the result of compile_blocks, for chunks with more tokens than the kernels take. With None, model
    computes all chunks."""
    batch_size, n_new_tokens = tokens.shape
    chunk_tokens = CPU_PREFILL_CHUNK_TOKENS if tokens.device.type == "cpu" else GPU_PREFILL_CHUNK_TOKENS
    chunk_size = max(1, chunk_tokens // batch_size)
    n_cached = int(start_pos.max())
    for offset in range(0, n_new_tokens, chunk_size):
        chunk = tokens[:, offset : offset + chunk_size]
        use_compiled = (
            compiled_model is not None and chunk.numel() >= MIN_COMPILED_TOKENS and not model.can_record(*chunk.shape)
        )
        chunk_model = compiled_model if use_compiled else model
        used_cache = kv_cache.narrow_length(n_cached + offset + chunk.shape[1])
        yield chunk_model.compute_hidden(chunk, start_pos + offset, used_cache, position_tables)


# ---- Decoding and verification --------------------------------------------------------------------------------------


def build_model_step(
    model: Transformer, kv_cache: KVCache, position_tables: list[PositionTables], sampler: Callable,
    compile: bool = False,
) -> Callable:
    """Returns the function of decode and verification steps: the model, then sampler on the logits.

        step(tokens [B, T], start_pos [B], *inputs) -> sampler(logits [B, T, V], tokens, start_pos, *inputs)

    All arguments are tensors. The step uses the first B sequences of kv_cache. The next call may overwrite the result
    and the logits that sampler gets, since both may be static buffers of a recording. Clone what must last."""
    can_record = cache(model.can_record)  # model.can_record goes through all modules
    device_type = model.device.type

    def compute_logits(tokens: Tensor, start_pos: Tensor) -> Tensor:
        used_cache = kv_cache.narrow_batch(0, len(tokens))
        if not can_record(*tokens.shape):
            # PyTorch's attention computes a score for every position of the cache, so pass only the used positions.
            used_cache = used_cache.narrow_length(int(start_pos.max()) + tokens.shape[1])
        return model(tokens, start_pos, used_cache, position_tables)

    def eager(tokens: Tensor, start_pos: Tensor, *inputs: Tensor):
        return sampler(compute_logits(tokens, start_pos), tokens, start_pos, *inputs)

    tape = record(compute_logits)

    def tape_and_sampler(tokens: Tensor, start_pos: Tensor, *inputs: Tensor):
        # A tape holds only the operations of kernels/schema.py, and a sampler has others.
        return call_with_tape_threads(sampler, tape(tokens, start_pos), tokens, start_pos, *inputs)

    compiled = compile_step(model, kv_cache, position_tables, sampler)
    modes = {"recorded": tape_and_sampler, "compiled": compiled, "eager": eager}
    if device_type == "cuda":
        modes["recorded"] = record(eager)
        if can_be_one_graph(model):
            modes["compiled"] = record(compiled)

    # No function refers to step, so there is no reference cycle. A cycle would keep an unused KV cache in memory until
    # Python's next garbage collection.
    @torch.inference_mode()
    def step(tokens: Tensor, start_pos: Tensor, *inputs: Tensor):
        mode = choose_mode(can_record(*tokens.shape), device_type, compile)
        return modes[mode](tokens, start_pos, *inputs)

    return step


def choose_mode(can_record: bool, device_type: str, compile: bool) -> str:
    """Returns how a step runs. A step has one of three modes:

        can_record    device    --compile    mode
        yes           CPU       yes or no    recorded: a tape of the model; then the sampler, eagerly
        yes           GPU       yes          recorded: a CUDA graph of model and sampler
        yes           GPU       no           eager
        no            any       yes          compiled by torch.compile; without experts, a GPU also records the result
        no            any       no           eager

    model.can_record(B, T) says whether every operation has a kernel for B * T tokens. An eager step uses the kernels of
    the operations that are within their limit (kernels/backend.py). The limits of matrix products:

        64 tokens          quantized weights, and all weights on a GPU with matrix units
        8 to 64 tokens     unquantized weights on a CPU, depending on the CPU's instructions
        8 tokens           a GPU without matrix units"""
    if can_record and (compile or device_type == "cpu"):
        return "recorded"
    return "compiled" if compile else "eager"


# ---- torch.compile --------------------------------------------------------------------------------------------------


def compile_step(
    model: Transformer, kv_cache: KVCache, position_tables: list[PositionTables], sampler: Callable
) -> Callable:
    """Returns the function of build_model_step, compiled by torch.compile in two pieces: the blocks, of which one
    compiled block serves all layers, and the output head with the sampler. The pieces run as fast as one compiled step,
    and compile in a third of the time."""

    def head(hidden: Tensor, *inputs: Tensor):
        return sampler(model.compute_logits(hidden), *inputs)

    @cache  # the first step makes the pieces, since importing the compiler takes a second and 150 MB
    def compiled_pieces() -> tuple[Transformer, Callable]:
        options = {"fullgraph": can_be_one_graph(model), "dynamic": False}
        return compile_blocks(model, **options), torch.compile(head, **options)

    def step(tokens: Tensor, start_pos: Tensor, *inputs: Tensor):
        compiled_model, compiled_head = compiled_pieces()
        used_cache = kv_cache.narrow_batch(0, len(tokens))
        hidden = compiled_model.compute_hidden(tokens, start_pos, used_cache, position_tables)
        return compiled_head(hidden, tokens, start_pos, *inputs)

    return step


def compile_blocks(model: Transformer, **options) -> Transformer:
    """Returns a copy of model that shares all weights and whose blocks are compiled. options are torch.compile's. One
    compilation serves all blocks, since a block's weights are inputs of the compiled graph."""
    check_compiler()
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)  # copy.copy shares this dict, so setting layers would change model, too
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

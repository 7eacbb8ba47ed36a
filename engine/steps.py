"""The steps of generation: functions from token ids to the next token ids, through the model.

    kv_cache = make_kv_cache(model, batch_size=1, max_seq_len=300)
    steps = build_steps(model, kv_cache, SamplingParams(temperature=0.8))
    tokens = steps.prefill(prompt, start_pos)  # [B, T] -> [B]
    tokens = steps.decode(tokens[:, None], start_pos + prompt.shape[1])

There are three kinds of steps:

    prefill         takes a prompt of any length, in chunks (chunked_prefill)
    decode          takes one token of every sequence (ModelRunner)
    verification    takes several tokens of a draft (ModelRunner, which speculate.py calls)

generation.py, scheduler.py and speculate.py call the steps. Read build_steps first, then ModelRunner, whose table says
when a step is recorded, compiled or eager.

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
from engine.sampling import SamplingParams, process_logits, sample
from engine.token_history import TokenHistory
from kernels.arguments import PositionTables
from kernels.build import find_compiler
from kernels.record import call_with_tape_threads, record
from model import KVCache, Transformer
from utils.errors import UsageError
from utils.machine import check_memory

# The most tokens in a chunk of prefill, summed over all sequences. The limit bounds the memory of activations. Small
# chunks are slow: every chunk dequantizes all weights again, and all chunks but the first need an attention mask.
CPU_PREFILL_CHUNK_TOKENS = 2048
GPU_PREFILL_CHUNK_TOKENS = 4096
MIN_COMPILED_TOKENS = 9  # compiling does not pay for a chunk of fewer tokens
NOT_FINITE = "the model's logits are not finite: NaN weights, or --precision too narrow"

NextTokenFunction = Callable[[Tensor, Tensor], Tensor]  # (tokens [B, T], start_pos [B]) -> next tokens [B]


class GenerationSteps(NamedTuple):
    """The two functions that generation.py: generate calls, and what further steps with the same KV cache share with
    them (speculate.py)."""

    prefill: NextTokenFunction  # any T
    decode: NextTokenFunction  # T = 1
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
) -> GenerationSteps:
    """Returns the steps of plain generation with model and kv_cache. compile and compile_prefill are the options of
    generate.py."""
    compiled_model = compile_blocks(model, dynamic=True) if compile_prefill else None
    position_tables = model.make_position_tables(kv_cache)
    history = TokenHistory(kv_cache.batch_size, kv_cache.max_seq_len, kv_cache.device)

    def sampler(logits: Tensor, tokens: Tensor, start_pos: Tensor) -> Tensor:
        """Logits [B, 1, V] after the last of tokens [B, T] -> next tokens [B], equal on all ranks."""
        if sampling.depends_on_text:
            history.store(tokens, start_pos)
        logits = process_logits(logits, tokens, start_pos, history, [sampling])
        return collectives.broadcast(sample(logits[:, -1], sampling, model.lm_head.backend))

    @torch.inference_mode()
    def prefill(tokens: Tensor, start_pos: Tensor) -> Tensor:
        logits = prefill_logits(model, tokens, start_pos, kv_cache, position_tables, compiled_model)
        return sampler(logits, tokens, start_pos)

    decode = ModelRunner(model, kv_cache, position_tables, sampler, compile)
    return GenerationSteps(prefill, decode, position_tables, history)


def check_sampled_ids(ids: list[int]):
    """Raises UsageError if sample returned -1, which stands for logits that are not finite."""
    if min(ids) < 0:
        raise UsageError(NOT_FINITE)


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
    [B, chunk, dim]. Attention gets only the used part of the cache. No decode step runs between two chunks.

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


class ModelRunner:
    """Runs decode and verification steps: the model, then sampler on the logits. A step has one of three modes:

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
        8 tokens           a GPU without matrix units

    runner(tokens [B, T], start_pos [B], *sampler_inputs) returns sampler(logits [B, T, V], tokens, start_pos,
    *sampler_inputs). All arguments are tensors. The step uses the first B sequences of kv_cache.

    The next call may overwrite the result and the logits that sampler gets, since both may be static buffers of a
    recording. Clone what must last."""

    def __init__(
        self, model: Transformer, kv_cache: KVCache, position_tables: list[PositionTables], sampler: Callable,
        compile: bool = False,
    ):
        self.step = step = ModelStep(model, kv_cache, position_tables, sampler)
        self.sampler, self.compile, self.device = sampler, compile, model.device
        self.can_record = step.can_record
        # The first call of each records. Of a runner's three, only one or two are ever called.
        self.tape_of_model = record(step.compute_logits)
        self.cuda_graph = record(step.eager)
        self.compiled_cuda_graph = record(step.compiled)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        run = self.choose_mode(*tokens.shape)
        return run(tokens, start_pos, *sampler_inputs)

    def choose_mode(self, batch_size: int, n_new_tokens: int) -> Callable:
        if self.can_record(batch_size, n_new_tokens) and (self.compile or self.device.type == "cpu"):
            return self.recorded
        return self.compiled if self.compile else self.step.eager

    def recorded(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        if self.device.type == "cuda":
            return self.cuda_graph(tokens, start_pos, *sampler_inputs)
        # A tape holds only the operations of kernels/schema.py, and a sampler has others.
        logits = self.tape_of_model(tokens, start_pos)
        return call_with_tape_threads(self.sampler, logits, tokens, start_pos, *sampler_inputs)

    def compiled(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        has_cuda_graph = self.device.type == "cuda" and can_be_one_graph(self.step.model)
        run = self.compiled_cuda_graph if has_cuda_graph else self.step.compiled
        return run(tokens, start_pos, *sampler_inputs)


class ModelStep:
    """What a ModelRunner calls or records. The recordings are in the other class: a recording refers to the function
    that it records, so both in one object would be a reference cycle. A cycle would keep an unused KV cache in memory
    until Python's next garbage collection."""

    def __init__(
        self, model: Transformer, kv_cache: KVCache, position_tables: list[PositionTables], sampler: Callable
    ):
        self.model, self.kv_cache, self.position_tables, self.sampler = model, kv_cache, position_tables, sampler
        self.can_record = cache(model.can_record)  # model.can_record goes through all modules

    def eager(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        return self.sampler(self.compute_logits(tokens, start_pos), tokens, start_pos, *sampler_inputs)

    def compute_logits(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        kv_cache = self.kv_cache.narrow_batch(0, len(tokens))
        if not self.can_record(*tokens.shape):
            # PyTorch's attention computes a score for every position of the cache, so pass only the used positions.
            kv_cache = kv_cache.narrow_length(int(start_pos.max()) + tokens.shape[1])
        return self.model(tokens, start_pos, kv_cache, self.position_tables)

    def compiled(self, tokens: Tensor, start_pos: Tensor, *sampler_inputs: Tensor):
        model, head = self.compiled_pieces
        kv_cache = self.kv_cache.narrow_batch(0, len(tokens))
        hidden = model.compute_hidden(tokens, start_pos, kv_cache, self.position_tables)
        return head(hidden, tokens, start_pos, *sampler_inputs)

    @cached_property
    def compiled_pieces(self) -> tuple[Transformer, Callable]:
        """Returns two pieces that torch.compile compiles: model, of which one compiled block serves all layers, and
        the output head with the sampler. The pieces run as fast as one compiled step, and compile in a third of the
        time. The first step makes the pieces, since importing the compiler takes a second and 150 MB."""
        model, sampler = self.model, self.sampler

        def head(hidden: Tensor, *inputs: Tensor):
            return sampler(model.compute_logits(hidden), *inputs)

        options = {"fullgraph": can_be_one_graph(model), "dynamic": False}
        return compile_blocks(model, **options), torch.compile(head, **options)


# ---- torch.compile --------------------------------------------------------------------------------------------------


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

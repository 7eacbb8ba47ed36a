"""Generation from Python: generate, which is the loop, and LLM, which takes and returns text.

    llm = LLM("checkpoints/SmolLM2-135M-Instruct/model.pth", temperature=0.8)
    for piece in llm.generate("Hello", max_new_tokens=50):
        print(piece, end="", flush=True)

LLM consists of these parts, which also take batches:

    from llm import SamplingParams, build_steps, generate, load, make_kv_cache

    model, tokenizer = load("checkpoints/SmolLM2-135M-Instruct/model.pth")
    prompt = torch.tensor([tokenizer.encode("Hello")])
    kv_cache = make_kv_cache(model, batch_size=1, max_seq_len=prompt.shape[1] + 50)
    steps = build_steps(model, kv_cache, SamplingParams(temperature=0.8))
    for ids in generate(steps, prompt, n_cached=0, max_new_tokens=50):
        print(tokenizer.decode(ids))
"""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from converters.resolve import resolve_checkpoint
from engine.chat import Conversation
from engine.completion import Completion, DecodeLoop, generate_many, stream_completions
from engine.request import build_request, check_length, check_max_new_tokens
from engine.sampling import SamplingParams
from engine.steps import GenerationSteps, build_steps, check_sampled_ids, make_kv_cache
from loading import load
from model import KVCache
from utils.errors import UsageError
from utils.machine import pick_device


def generate(steps: GenerationSteps, prompt: Tensor, n_cached: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Yields the next token of each sequence, max_new_tokens times. The KV cache already holds n_cached tokens before
    prompt [B, T]. The cache must have room for n_cached + T + max_new_tokens - 1 tokens. Raises UsageError if logits
    are not finite."""
    start_pos = torch.full(prompt.shape[:1], n_cached, device=prompt.device)
    tokens = steps.prefill(prompt, start_pos)
    start_pos = start_pos + prompt.shape[1]
    for n_left in reversed(range(max_new_tokens)):
        read_ids = copy_to_host_async(tokens)
        # On a GPU, queue the next step before the host waits for the tokens of this step. Then the GPU computes while
        # the host handles the tokens. The next step may overwrite tokens, since tokens may be a recording's static
        # buffer. But the copy to the host comes first in the stream.
        # A CPU would compute the next step at once, and in vain if the caller stops after this step.
        next_is_queued = tokens.is_cuda and n_left > 0
        if next_is_queued:
            tokens, start_pos = decode_next(steps, tokens, start_pos)
        ids = read_ids()
        check_sampled_ids(ids)
        yield ids
        if n_left > 0 and not next_is_queued:
            tokens, start_pos = decode_next(steps, tokens, start_pos)


def decode_next(steps: GenerationSteps, tokens: Tensor, start_pos: Tensor) -> tuple[Tensor, Tensor]:
    """Runs one decode step: tokens [B], start_pos [B] -> the next tokens [B] and their positions [B]."""
    # Token -1 stands for logits that are not finite. On a GPU this step starts before the host has checked the tokens,
    # and the embedding has no row -1, so clamp the tokens.
    inputs = tokens[:, None].clamp(min=0)
    return steps.decode(inputs, start_pos), start_pos + 1


def copy_to_host_async(tokens: Tensor) -> Callable[[], list[int]]:
    """Starts to copy tokens [B] to the host. Returns a function that waits for the copy and returns the tokens. The
    function does not wait for steps that are queued after the copy."""
    if not tokens.is_cuda:
        return tokens.tolist
    copy = tokens.to("cpu", non_blocking=True)
    is_done = torch.cuda.Event()
    is_done.record()

    def read() -> list[int]:
        is_done.synchronize()
        return copy.tolist()

    return read


def build_decode_loop(steps: GenerationSteps, kv_cache: KVCache) -> DecodeLoop:
    """Returns a DecodeLoop that adds one token per step to every sequence of kv_cache. The other DecodeLoop,
    engine/speculate.py: SpeculativeDecoder, adds several tokens per step."""

    def decode_loop(token_ids: list[int], n_cached: int, max_new_tokens: int) -> Iterator[list[list[int]]]:
        prompt = torch.tensor([token_ids[n_cached:]] * kv_cache.batch_size, device=kv_cache.device)
        for ids in generate(steps, prompt, n_cached, max_new_tokens):
            yield [[token] for token in ids]

    return decode_loop


class LLM:
    """A model with a tokenizer: text in, text out."""

    def __init__(
        self, checkpoint_path: Path | str, device: str | None = None, dtype: torch.dtype = torch.bfloat16,
        max_seq_len: int = 2048, compile: bool = False, **sampling,
    ):
        """checkpoint_path: model.pth; or a model's folder or .gguf, which is converted once (converters/resolve.py).
        device: by default the machine's accelerator, or the CPU if there is none.
        dtype: of the activations, and of all weights that are not quantized.
        max_seq_len: the most tokens of a text or a conversation; the model's context is a limit, too.
        compile: as --compile of generate.py.
        sampling: fields of SamplingParams, such as temperature."""
        names = [field.name for field in fields(SamplingParams)]
        for name in sampling:
            if name not in names:
                raise UsageError(f"{name} is no sampling option; these are: {', '.join(names)}")
        self.sampling, self.compile = SamplingParams(**sampling), compile
        path = resolve_checkpoint(checkpoint_path)
        self.model, self.tokenizer = load(path, device=pick_device(device), dtype=dtype)
        self.max_seq_len = min(max_seq_len, self.model.config.max_seq_len)
        self.free_decode_loops: list[DecodeLoop] = []  # the decode loops that no text uses

    def new_decode_loop(self) -> DecodeLoop:
        """Returns a DecodeLoop with a new KV cache."""
        kv_cache = make_kv_cache(self.model, batch_size=1, max_seq_len=self.max_seq_len)
        return build_decode_loop(build_steps(self.model, kv_cache, self.sampling, self.compile), kv_cache)

    def generate(self, prompt: str | list[dict], max_new_tokens: int, stop: tuple[str, ...] = ()) -> Iterator[str]:
        """Yields the text that follows prompt, piece by piece, up to an end token or one of the stop strings. A second
        call may start before the first text has ended: every call has its own KV cache.

        prompt: a text, or a chat's messages [{"role": ..., "content": ...}]."""
        check_max_new_tokens(max_new_tokens)
        context = self.model.config.max_seq_len
        request = build_request(prompt, self.tokenizer, context, max_new_tokens, sampling=self.sampling, stop=stop)
        check_length(len(request.prompt_ids), max_new_tokens, self.max_seq_len, limit="max_seq_len, ")
        completion = Completion(request, self.tokenizer, set(self.model.config.eos_ids))
        decode_loop = self.free_decode_loops.pop() if self.free_decode_loops else self.new_decode_loop()
        try:
            for (text,) in stream_completions([completion], decode_loop(request.prompt_ids, 0, max_new_tokens)):
                if text:
                    yield text
        finally:
            self.free_decode_loops.append(decode_loop)

    def generate_many(
        self, prompts: list[str | list[dict]], parallel: int = 16, max_new_tokens: int = 200,
        stop: tuple[str, ...] = (), seed: int = 0,
    ) -> Iterator[tuple[int, str]]:
        """Yields (number, continuation) for each prompt: see engine/completion.py: generate_many."""
        options = (parallel, max_new_tokens, self.sampling, stop, seed, self.compile)
        return generate_many(self.model, self.tokenizer, prompts, *options)

    def chat(self, system: str | None = None) -> Conversation:
        """Returns a new conversation: see Conversation.answer. system: the system message."""
        decode_loop, eos_ids = self.new_decode_loop(), self.model.config.eos_ids
        return Conversation(self.tokenizer, decode_loop, self.max_seq_len, eos_ids, system)

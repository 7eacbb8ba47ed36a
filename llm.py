"""Generation from Python: LLM, a model that takes and returns text.

    llm = LLM("checkpoints/SmolLM2-135M-Instruct/model.pth", temperature=0.8)
    for piece in llm.generate("Hello", max_new_tokens=50):
        print(piece, end="", flush=True)
    text = "".join(llm.generate("Hello", max_new_tokens=50, temperature=0))  # only this text is greedy

LLM consists of these parts, which also take batches:

    from llm import DecodeLoop, KVCache, ModelRunner, SamplingParams, load

    model, tokenizer = load("checkpoints/SmolLM2-135M-Instruct/model.pth")
    prompt = torch.tensor([tokenizer.encode("Hello")])
    kv_cache = KVCache(model, batch_size=1, max_seq_len=prompt.shape[1] + 50)
    loop = DecodeLoop(ModelRunner(model, kv_cache, SamplingParams(temperature=0.8)))
    for ids in loop.decode_tokens(prompt, max_new_tokens=50):
        print(tokenizer.decode(ids))
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from converters.checkpoint_path import ensure_converted
from engine.chat import Conversation
from engine.generation import DecodeLoop, stream_texts
from engine.runner import ModelRunner
from engine.sampling_params import GREEDY, SamplingParams
from engine.scheduler import Scheduler, build_scheduler
from engine.sequence import LogitsProcessor, Sequence, build_sequence, build_sequences, check_seed
from layers.kv_cache import KVCache
from layers.rope import depends_on_length
from loading import load
from utils.errors import UsageError, check_integer
from utils.machine import pick_device

__all__ = ["LLM", "DecodeLoop", "KVCache", "ModelRunner", "SamplingParams", "load"]


class LLM:
    """A model with a tokenizer: text in, text out. The methods raise UsageError when they are called, not only when the
    first text is taken.

    Sampling draws PyTorch's global random numbers (torch.manual_seed), unless seed is given: then a text has random
    numbers of its own, and one seed gives one text in generate and generate_many. (In 16 bits, prompts of generate_many
    that share a prefix may round differently.)"""

    def __init__(
        self, checkpoint_path: Path | str, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16, max_seq_len: int = 2048, compile: bool = False, use_kernels: bool = True,
        **sampling,
    ):
        """checkpoint_path: model.pth; or a model's folder or .gguf, which converters/checkpoint_path.py converts once.
        device: by default the machine's accelerator, or the CPU if there is none.
        dtype: the type of the activations, and of all weights that are not quantized.
        max_seq_len: the most tokens of generate's texts and of a conversation, at most the model's context.
        compile, use_kernels: as --compile and --kernels of generate.py.
        sampling: fields of SamplingParams, such as temperature. Fields that are given to a method override these."""
        if not isinstance(checkpoint_path, Path | str):
            raise UsageError(f"checkpoint_path must be a path, not {checkpoint_path!r:.80}")
        check_integer("max_seq_len", max_seq_len, 1)
        for name, value in (("compile", compile), ("use_kernels", use_kernels)):
            if not isinstance(value, bool):
                raise UsageError(f"{name} must be True or False, not {value!r:.80}")
        self.params = GREEDY.override(sampling)
        self.compile = compile
        self.checkpoint_path = ensure_converted(checkpoint_path)
        self.model, self.tokenizer = load(
            self.checkpoint_path, device=pick_device(device), dtype=dtype, use_kernels=use_kernels
        )
        self.max_seq_len = min(max_seq_len, self.model.config.max_seq_len)
        # The loop of the last text that has ended, whose KV cache and captured steps serve the next text. Only one is
        # kept, since a KV cache is large.
        self.idle_loop: DecodeLoop | None = None

    def generate(
        self, prompt: str | list[dict], max_new_tokens: int, stop: tuple[str, ...] = (), seed: int | None = None,
        logits_processor: LogitsProcessor | None = None, **sampling,
    ) -> Iterator[str]:
        """Returns an iterator of the text that follows prompt, piece by piece, up to an end token or one of the stop
        strings. A second call may start before the first text has ended: every call has its own KV cache.

        prompt: a text, or a chat's messages [{"role": ..., "content": ...}].
        seed: the seed of the text's own random numbers. Without it, the text draws PyTorch's global ones.
        logits_processor: a function (token ids so far, logits [V]) -> logits [V], called before each token is sampled.
            A Scheduler then runs the text, with a KV cache of its own, and a GPU waits for the host between tokens.
        sampling: fields of SamplingParams. With compile, a GPU captures the decode step anew when they change."""
        params, config = self.params.override(sampling), self.model.config
        hint = ""
        if self.max_seq_len < config.max_seq_len:
            hint = ", which is LLM's max_seq_len; raise it or lower max_new_tokens"
        sequence = build_sequence(
            prompt, self.tokenizer, config, max_new_tokens, self.max_seq_len, hint,
            params=params, stop=stop, seed=seed, logits_processor=logits_processor,
        )
        return self.stream_from_loop(sequence) if logits_processor is None else self.stream_from_scheduler(sequence)

    def generate_many(
        self, prompts: list[str | list[dict]], parallel: int = 16, max_new_tokens: int = 200,
        stop: tuple[str, ...] = (), seed: int | None = None, logits_processor: LogitsProcessor | None = None,
        **sampling,
    ) -> Iterator[tuple[int, str]]:
        """Returns an iterator of (number, continuation) for each prompt, in the order of prompts. Only the model's
        context limits the length of a prompt.

        prompts: each is a text, or a chat's messages [{"role": ..., "content": ...}].
        parallel: the most prompts that are computed at a time.
        seed: prompt i samples with seed + i.
        stop, logits_processor, sampling: as for generate."""
        if isinstance(prompts, str | dict) or not isinstance(prompts, Iterable):
            raise UsageError(f"generate_many takes a list of prompts, not {prompts!r:.80}")
        check_integer("parallel", parallel, 1)
        check_seed(seed)
        sequences = build_sequences(
            prompts, self.tokenizer, self.model.config, max_new_tokens, seed,
            params=self.params.override(sampling), stop=stop, logits_processor=logits_processor,
        )
        for i, sequence in enumerate(sequences):
            raise_error(i, sequence)
        return run_all(build_scheduler(self.model, sequences, parallel, self.compile), sequences)

    def chat(
        self, system: str | None = None, stop: tuple[str, ...] = (), seed: int | None = None, **sampling
    ) -> Conversation:
        """Returns a new conversation: see Conversation.answer. It keeps its KV cache until it is deleted.

        system: the system message.
        stop: strings that end an answer. The answer does not contain them.
        seed: answer i, or the i-th piece of an answer that continue_answer goes on with, samples with seed + i.
        sampling: as for generate."""
        params = self.params.override(sampling)
        eos_ids = self.model.config.eos_ids
        return Conversation(self.tokenizer, self.take_loop(params), self.max_seq_len, eos_ids, system, stop, seed)

    def build_loop(
        self, params: SamplingParams, batch_size: int = 1, max_seq_len: int | None = None, compile_prefill: bool = False
    ) -> DecodeLoop:
        """Returns a loop with a KV cache of its own, for token ids in and out. max_seq_len: the most tokens of a
        sequence, by default the LLM's."""
        max_seq_len = self.max_seq_len if max_seq_len is None else max_seq_len
        check_integer("batch_size", batch_size, 1)
        check_integer("max_seq_len", max_seq_len, 1)
        kv_cache = KVCache(self.model, batch_size, max_seq_len)
        return DecodeLoop(ModelRunner(self.model, kv_cache, params, self.compile, compile_prefill))

    # ---- What the methods above share ----

    def take_loop(self, params: SamplingParams) -> DecodeLoop:
        """Returns a loop whose KV cache no text uses."""
        loop = self.idle_loop
        self.idle_loop = None
        if loop is None:
            return self.build_loop(params)
        if loop.runner.sampler.params != params:  # a captured step contains them, while the KV cache serves any
            return DecodeLoop(ModelRunner(self.model, loop.runner.kv_cache, params, self.compile))
        return loop

    def stream_from_loop(self, sequence: Sequence) -> Iterator[str]:
        loop = self.take_loop(sequence.params)
        try:
            for (text,) in stream_texts(loop, [sequence], sequence.prompt_ids, generator=sequence.generator):
                if text:
                    yield text
        except UsageError:  # NaN may be left in the KV cache. A compiled step reads all of it, and 0 * NaN is NaN
            loop = None
            raise
        finally:
            self.idle_loop = loop

    def stream_from_scheduler(self, sequence: Sequence) -> Iterator[str]:
        length = len(sequence.prompt_ids) + sequence.max_new_tokens
        if depends_on_length(self.model.config):  # then only a cache of the loop's length gives the loop's text
            length = self.max_seq_len
        scheduler = Scheduler(self.model, 1, length, self.compile)
        scheduler.submit(sequence)
        while scheduler.has_unfinished_sequences():
            for update in scheduler.step():
                if sequence.error:
                    raise UsageError(sequence.error)
                if update.text:
                    yield update.text


def run_all(scheduler: Scheduler, sequences: list[Sequence]) -> Iterator[tuple[int, str]]:
    for i, sequence in scheduler.run(sequences):
        raise_error(i, sequence)
        yield i, sequence.text


def raise_error(i: int, sequence: Sequence):
    if sequence.error:
        raise UsageError(f"prompt {i}: {sequence.error}")

"""Completions: the text after each prompt, as it is generated, up to an end token or a stop string.

    completion = Completion(Request(prompt_ids, max_new_tokens=100), tokenizer, eos_ids)
    completion.add_step([token, ...])         # the tokens of each step; returns the new text
    completion.finish_reason                  # None until the text ends

    for i, text in generate_many(model, tokenizer, ["One", "Two"], parallel=16, max_new_tokens=20):
        print(i, text)

    completer = AsyncCompleter(scheduler)     # in asyncio, for any number of callers at once
    async for _ in completer.complete([completion]):
        print(completion.text)
"""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

from engine.sampling import SamplingParams
from engine.scheduler import GREEDY, Logprobs, Request, Scheduler, build_scheduler, check_length, find_finish_reason
from errors import UsageError
from machine import pick_device
from model import Transformer
from text.chat_template import check_unicode, read_message
from text.tokenizer import IncrementalDetokenizer, Tokenizer


class Completion:
    """Holds the text and the tokens that follow the prompt of a request."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, eos_ids: set[int], index: int = 0, resumable: bool = False
    ):  # fmt: skip
        """eos_ids: the tokens that end the text. index: a number by which the caller knows the request. resumable:
        max_new_tokens may cut the text within a character. Then the beginning of that character is held back until
        resume has completed it. If not resumable, U+FFFD takes the place of the character."""
        self.request, self.eos_ids, self.index, self.resumable = request, eos_ids, index, resumable
        prefix_ids = () if request.is_chat else request.prompt_ids
        self.detokenizer = IncrementalDetokenizer(tokenizer, prefix_ids, request.stop)
        self.text = ""
        self.tokens: list[int] = []  # all new tokens, an end token included
        self.logprobs: list[Logprobs] = []  # of each token, if the request asks for logprobs
        self.step_times: list[float] = []  # when the tokens of each step arrived; the first step is prefill
        self.step_sizes: list[int] = []  # how many tokens each step gave
        self.finish_reason: str | None = None  # "stop": end token or stop string; "length"; "error"
        self.error: str | None = None

    def add_step(self, tokens: Iterable[int], logprobs: Logprobs | None = None) -> str:
        """Adds the tokens of one step, up to the token that ends the text. Returns the new text."""
        n_before = len(self.text)
        self.step_times.append(time.perf_counter())
        self.step_sizes.append(0)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        for token in tokens:
            self.add_token(token)
            self.step_sizes[-1] += 1
            if self.finish_reason:
                break
        return self.text[n_before:]

    def add_token(self, token: int):
        self.tokens.append(token)
        self.finish_reason = find_finish_reason(token, len(self.tokens), self.request.max_new_tokens, self.eos_ids)
        if self.finish_reason != "stop":  # an end token has no text
            self.text += self.detokenizer.push(token)
        if self.detokenizer.found_stop:
            self.finish_reason = "stop"
        if self.finish_reason == "stop" or (self.finish_reason and not self.resumable):
            self.text += self.detokenizer.end()

    def resume(self, max_new_tokens: int):
        """Lets the text go on for max_new_tokens more tokens. The text must not have an end token. The times begin
        anew."""
        self.request = replace(self.request, max_new_tokens=len(self.tokens) + max_new_tokens)
        self.finish_reason, self.step_times, self.step_sizes = None, [], []

    def fail(self, error: str):
        self.finish_reason, self.error = "error", error

    @property
    def decode_seconds(self) -> float:
        return self.step_times[-1] - self.step_times[0]


class TokenGenerator(Protocol):
    """Continues a text, token by token. llm.py: build_token_generator makes a TokenGenerator; with speculation,
    partial(speculate, speculation) is one."""

    def __call__(self, token_ids: list[int], n_cached: int, max_new_tokens: int) -> Iterator[list[list[int]]]:
        """Continues the text token_ids in each of B sequences. Yields the new tokens of each step, [B][n]: n tokens of
        each sequence. The first n_cached of token_ids are in the KV cache."""


def add_steps(completions: list[Completion], steps: Iterable[list[list[int]]]) -> Iterator[list[str]]:
    """Adds the tokens of each step to completions, until all completions have ended. steps: what a TokenGenerator
    yields, with a completion for each sequence. Yields after each step the new texts, one for each completion. The text
    is "" for a completion that ended earlier."""
    for step_tokens in steps:
        pairs = zip(completions, step_tokens, strict=True)
        yield ["" if completion.finish_reason else completion.add_step(tokens) for completion, tokens in pairs]
        if all(completion.finish_reason for completion in completions):
            return


def complete_all(scheduler: Scheduler, tokenizer: Tokenizer, requests: Iterable[Request]) -> Iterator[Completion]:
    """Yields the completion of each of requests, in the order of requests. If scheduler refuses a request, the others
    are still completed. After Ctrl-C, yields the completions that are complete and raises KeyboardInterrupt again."""
    completions = {}
    for i, request in enumerate(requests):
        completions[request] = Completion(request, tokenizer, scheduler.eos_ids, i)
        try:
            scheduler.submit(request)
        except UsageError as e:
            completions[request].fail(str(e))
    in_order = deque(completions.values())
    try:
        while in_order:
            while in_order and in_order[0].finish_reason:
                yield in_order.popleft()
            for new in scheduler.step():
                completion = completions[new.request]
                completion.add_step([new.token], new.logprobs)
                if completion.detokenizer.found_stop:
                    scheduler.cancel(new.request)
    except KeyboardInterrupt:
        yield from (completion for completion in in_order if completion.finish_reason)
        raise


def check_max_new_tokens(max_new_tokens: int):
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")


def build_request(
    prompt: str | list[dict], tokenizer: Tokenizer, max_new_tokens: int, max_seq_len: int, limit_name: str,
    sampling: SamplingParams, seed: int = 0, stop: tuple[str, ...] = (),
) -> Request:  # fmt: skip
    """Makes a Request to continue prompt: a text, or a chat's messages. Refuses what encode_prompt and check_length
    refuse."""
    ids = encode_prompt(prompt, tokenizer, max_seq_len, limit_name)
    check_length(len(ids), max_new_tokens, max_seq_len, limit_name)
    return Request(ids, max_new_tokens, sampling, seed, stop, is_chat=not isinstance(prompt, str))


def encode_prompt(prompt: str | list[dict], tokenizer: Tokenizer, max_seq_len: int, limit_name: str) -> list[int]:
    """Encodes a text, or a chat's messages [{"role": ..., "content": ...}]. An empty prompt gives no ids. Refuses
    malformed messages, a text from bytes that are not UTF-8, and a text that certainly has more than max_seq_len
    tokens, which would take long to encode. limit_name: what the error calls max_seq_len."""
    is_chat = not isinstance(prompt, str)
    messages = [read_message(message) for message in prompt] if is_chat else []
    for text in [message["content"] for message in messages] if is_chat else [prompt]:
        try:
            check_unicode(text)
        except UnicodeEncodeError:
            raise UsageError("the prompt is not valid UTF-8") from None
        if tokenizer.exceeds(text, max_seq_len):
            raise UsageError(f"a prompt of {len(text)} characters exceeds {limit_name} tokens")
    if not prompt:
        return []
    return tokenizer.encode_chat(messages) if is_chat else tokenizer.encode(prompt)


class CompletionError(RuntimeError):
    """A step failed, and with the step all completions that were running."""


class AsyncCompleter:
    """Computes the completions of several callers together. Only a thread of the AsyncCompleter uses the scheduler; the
    event loop does the rest."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        device = str(scheduler.kv_cache.device)
        self.thread = ThreadPoolExecutor(1, initializer=pick_device, initargs=(device,))  # each has a current device
        self.completions: dict[Request, Completion] = {}  # of all callers
        self.step: asyncio.Task | None = None  # the last step

    async def complete(self, completions: list[Completion]) -> AsyncIterator[None]:
        """Yields after each step, in which completions may have grown, until all completions are complete. If a caller
        stops early, its slots become free. Raises CompletionError if a step fails; later calls are served."""
        for completion in completions:
            request = completion.request
            check_length(len(request.prompt_ids), request.max_new_tokens, self.scheduler.max_seq_len)
        try:
            for completion in completions:
                self.completions[completion.request] = completion
                self.thread.submit(self.scheduler.submit, completion.request)
            is_complete = False
            while not is_complete:
                if self.step is None or self.step.done():  # the first caller that waits begins the step
                    self.step = asyncio.create_task(self.run_step())
                await asyncio.shield(self.step)  # a caller that is cancelled must not cancel the step
                for completion in completions:
                    if completion.error is not None:
                        raise CompletionError(completion.error)
                is_complete = all(completion.finish_reason for completion in completions)  # before yield
                yield
        finally:
            for completion in completions:
                self.end(completion)

    async def run_step(self):
        try:
            new_tokens = await asyncio.wrap_future(self.thread.submit(self.scheduler.step))
            for new in new_tokens:
                if completion := self.completions.get(new.request):
                    completion.add_step([new.token], new.logprobs)
                    if completion.finish_reason:
                        self.end(completion)
        except Exception as e:  # such as logits that are NaN
            traceback.print_exc()
            for completion in list(self.completions.values()):
                completion.fail(str(e))
                self.end(completion)

    def end(self, completion: Completion):
        if self.completions.pop(completion.request, None):
            self.thread.submit(self.scheduler.cancel, completion.request)


def generate_many(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str | list[dict]], parallel: int = 16,
    max_new_tokens: int = 200, sampling: SamplingParams = GREEDY, stop: tuple[str, ...] = (), seed: int = 0,
    compile: bool = False,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Yields (number, continuation) for each of prompts, in order. parallel: how many prompts are computed at a time. A
    prompt is a text, or a chat's messages [{"role": ..., "content": ...}]. Prompt i samples with seed + i. stop: stop
    strings, which end a continuation and are not part of it. compile: record the steps on a GPU, too."""
    check_max_new_tokens(max_new_tokens)
    context, requests = model.config.max_seq_len, []
    limit_name = f"the model's context of {context}"
    for i, prompt in enumerate(prompts):
        try:
            request = build_request(prompt, tokenizer, max_new_tokens, context, limit_name, sampling, seed + i, stop)
        except UsageError as e:
            raise UsageError(f"prompt {i}: {e}") from None
        requests.append(request)
    scheduler = build_scheduler(model, requests, parallel, compile=compile)
    for completion in complete_all(scheduler, tokenizer, requests):
        yield completion.index, completion.text

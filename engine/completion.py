"""Completions: tokens become the text after a prompt, step by step, up to an end token or a stop string.

    completion = Completion(Request(prompt_ids, max_new_tokens=100), tokenizer, eos_ids)
    completion.add_step(new_ids)              # adds the tokens of a step, and returns the new text
    completion.finish_reason                  # None until the text ends

    for i, text in generate_many(model, tokenizer, ["One", "Two"], parallel=16, max_new_tokens=20):
        print(i, text)

What adds the tokens to Completions, and who calls it:

    stream_completions    one prompt, with a DecodeLoop         generate.py, chat.py, llm.py
    complete_all          many prompts, with a Scheduler        generate.py --parallel, eval.py
    generate_many         the same, from texts to texts         llm.py
    AsyncCompleter        many callers, with one Scheduler      scripts/serve.py (in async_completer.py)
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from engine.request import GREEDY, Request, build_request, check_length, check_max_new_tokens, find_finish_reason
from engine.sampling import SamplingParams
from engine.scheduler import Logprobs, Scheduler, build_scheduler
from model import Transformer
from text.tokenizer import IncrementalDetokenizer, Tokenizer
from utils.errors import UsageError


class Completion:
    """The text and the tokens that follow the prompt of a request."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, eos_ids: set[int], index: int = 0, resumable: bool = False
    ):
        """eos_ids: the tokens that end the text.
        index: the caller's number for the request.
        resumable: what happens if max_new_tokens cuts the text within a character. If True, the text does not have the
        character until more tokens follow: see resume. If False, the text ends with U+FFFD in place of the
        character."""
        self.request, self.eos_ids, self.index, self.resumable = request, eos_ids, index, resumable
        prefix_ids = () if request.is_chat else request.prompt_ids
        self.detokenizer = IncrementalDetokenizer(tokenizer, prefix_ids, request.stop)
        self.text = ""
        self.new_ids: list[int] = []  # all new tokens, including an end token
        self.logprobs: list[Logprobs] = []  # of each token, if the request asks for logprobs
        self.step_times: list[float] = []  # when the tokens of each step arrived; the first step is prefill
        self.step_sizes: list[int] = []  # how many tokens each step added
        self.finish_reason: str | None = None  # "stop": end token or stop string; "length"; "error"
        self.error: str | None = None

    def add_step(self, new_ids: list[int], logprobs: Logprobs | None = None) -> str:
        """Adds the tokens of one step, but none after the token that ends the text. Returns the new text."""
        n_before = len(self.text)
        self.step_times.append(time.perf_counter())
        self.step_sizes.append(0)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        for token in new_ids:
            self.add_token(token)
            self.step_sizes[-1] += 1
            if self.finish_reason:
                break
        return self.text[n_before:]

    def add_token(self, token: int):
        self.new_ids.append(token)
        self.finish_reason = find_finish_reason(token, len(self.new_ids), self.request.max_new_tokens, self.eos_ids)
        if self.finish_reason != "stop":  # an end token has no text
            self.text += self.detokenizer.push(token)
        if self.detokenizer.found_stop:
            self.finish_reason = "stop"
        if self.finish_reason == "stop" or (self.finish_reason and not self.resumable):
            self.text += self.detokenizer.end()

    def resume(self, max_new_tokens: int):
        """Allows max_new_tokens more tokens. The text must not have an end token. Clears step_times and step_sizes."""
        self.request = replace(self.request, max_new_tokens=len(self.new_ids) + max_new_tokens)
        self.finish_reason, self.step_times, self.step_sizes = None, [], []

    def fail(self, error: str):
        self.finish_reason, self.error = "error", error

    @property
    def decode_seconds(self) -> float:
        return self.step_times[-1] - self.step_times[0]


def stream_completions(
    completions: list[Completion], new_ids_by_step: Iterable[list[list[int]]]
) -> Iterator[list[str]]:
    """Adds the tokens of each step to completions, until all completions have ended. After each step, yields the new
    text of each completion. The new text is "" for a completion that has ended before.

    new_ids_by_step: the iterator of a DecodeLoop. Sequence i belongs to completions[i]."""
    for new_ids in new_ids_by_step:
        pairs = zip(completions, new_ids, strict=True)
        yield ["" if completion.finish_reason else completion.add_step(ids) for completion, ids in pairs]
        if all(completion.finish_reason for completion in completions):
            return


def complete_all(scheduler: Scheduler, tokenizer: Tokenizer, requests: Iterable[Request]) -> Iterator[Completion]:
    """Yields the completion of each request, in the order of requests. If scheduler refuses a request, the completion
    has an error, and the other requests are still completed. After Ctrl-C, yields the completions that have ended, and
    raises KeyboardInterrupt again."""
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


def generate_many(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str | list[dict]], parallel: int = 16,
    max_new_tokens: int = 200, sampling: SamplingParams = GREEDY, stop: tuple[str, ...] = (), seed: int = 0,
    compile: bool = False,
) -> Iterator[tuple[int, str]]:
    """Yields (number, continuation) for each prompt, in the order of prompts.

    prompts: each is a text, or a chat's messages [{"role": ..., "content": ...}].
    parallel: the most prompts that are computed at a time.
    stop: strings that end a continuation. The continuation does not contain them.
    seed: prompt i samples with seed + i.
    compile: record the steps on a GPU, too."""
    check_max_new_tokens(max_new_tokens)
    if isinstance(prompts, str):
        raise UsageError("generate_many takes a list of prompts, not one text")
    context, requests = model.config.max_seq_len, []
    for i, prompt in enumerate(prompts):
        options = {"sampling": sampling, "seed": seed + i, "stop": stop}
        try:
            request = build_request(prompt, tokenizer, context, max_new_tokens, **options)
            check_length(len(request.prompt_ids), max_new_tokens, context)  # before any prompt is computed
        except UsageError as e:
            raise UsageError(f"prompt {i}: {e}") from None
        requests.append(request)
    scheduler = build_scheduler(model, requests, parallel, compile=compile)
    for completion in complete_all(scheduler, tokenizer, requests):
        yield completion.index, completion.text

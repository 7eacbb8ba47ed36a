"""Completes the texts of several callers at once, in asyncio, with one Scheduler: those of the server's clients.

    completer = AsyncCompleter(scheduler)
    async for _ in completer.complete([completion]):
        print(completion.text)
"""

import asyncio
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from engine.completion import Completion
from engine.request import Request
from engine.scheduler import Scheduler
from utils.machine import pick_device


class CompletionError(RuntimeError):
    """A step failed, so all completions that were running failed, too."""


class AsyncCompleter:
    """Computes the completions of several callers together. Only self.thread uses the scheduler. Everything else runs
    in the event loop."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        device = str(scheduler.kv_cache.device)  # PyTorch has a current device per thread
        self.thread = ThreadPoolExecutor(1, initializer=pick_device, initargs=(device,))
        self.completions: dict[Request, Completion] = {}  # the running completions of all callers
        self.step: asyncio.Task | None = None  # the newest step; all callers wait for the same one

    async def complete(self, completions: list[Completion]) -> AsyncIterator[None]:
        """Yields after each step, until all completions have ended. A step may add tokens to any of completions. If the
        caller stops early, the caller's slots become free. Raises CompletionError if a step fails. Later calls still
        work."""
        try:
            for completion in completions:
                self.scheduler.check(completion.request)
                self.completions[completion.request] = completion
                self.thread.submit(self.scheduler.submit, completion.request)
            have_ended = False
            while not have_ended:
                if self.step is None or self.step.done():  # the first caller that waits starts the step
                    self.step = asyncio.create_task(self.run_step())
                await asyncio.shield(self.step)  # a caller that is cancelled must not cancel the step
                for completion in completions:
                    if completion.error is not None:
                        raise CompletionError(completion.error)
                # Not after yield: until the caller comes back, another caller's step may have added the last tokens.
                have_ended = all(completion.finish_reason for completion in completions)
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
        except Exception as e:  # for example the UsageError of check_sampled_ids
            traceback.print_exc()
            for completion in list(self.completions.values()):
                completion.fail(str(e))
                self.end(completion)

    def end(self, completion: Completion):
        if self.completions.pop(completion.request, None):
            self.thread.submit(self.scheduler.cancel, completion.request)

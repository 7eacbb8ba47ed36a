"""Completes the sequences of several callers at once, in asyncio, with one Scheduler: those of the server's clients.

    completer = AsyncCompleter(scheduler)
    async for new_tokens in completer.complete([sequence]):
        for new in new_tokens:
            print(new.text)
"""

import asyncio
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from engine.scheduler import NewToken, Scheduler
from engine.sequence import Sequence
from utils.machine import pick_device


class CompletionError(RuntimeError):
    """A sequence has failed: its logits are not finite, or a step failed, and so all sequences that were running."""


class AsyncCompleter:
    """Computes the sequences of several callers together. Only self.thread uses the scheduler, and it changes sequences
    in every step. So a caller reads a sequence only when it has ended, and until then the NewTokens."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        device = str(scheduler.kv_cache.device)  # PyTorch has a current device per thread
        self.thread = ThreadPoolExecutor(1, initializer=pick_device, initargs=(device,))
        # The sequences of all callers that have not ended, each with the list in which its caller receives new tokens
        self.inboxes: dict[Sequence, list[NewToken]] = {}
        self.step: asyncio.Task | None = None  # the newest step; all callers wait for the same one

    async def complete(self, sequences: list[Sequence]) -> AsyncIterator[list[NewToken]]:
        """Yields the new tokens after each step, until all sequences have ended. If the caller stops early, its slots
        become free. Raises CompletionError if one of sequences fails. Later calls still work."""
        inbox: list[NewToken] = []
        try:
            for sequence in sequences:
                self.scheduler.check(sequence)
                self.inboxes[sequence] = inbox
                self.thread.submit(self.scheduler.submit, sequence)
            n_left = len(sequences)
            while n_left:
                if not inbox:  # otherwise a step of another caller has added tokens
                    if self.step is None or self.step.done():  # the first caller that waits starts the step
                        self.step = asyncio.create_task(self.run_step())
                    await asyncio.shield(self.step)  # a caller that is cancelled must not cancel the step
                new_tokens = inbox.copy()
                inbox.clear()
                for new in new_tokens:
                    n_left -= new.finish_reason is not None
                    if new.finish_reason == "error":
                        raise CompletionError(new.sequence.error)
                yield new_tokens
        finally:
            for sequence in sequences:
                self.end(sequence)

    async def run_step(self):
        try:
            new_tokens = await asyncio.wrap_future(self.thread.submit(self.scheduler.step))
        except Exception as e:
            traceback.print_exc()
            for sequence in self.inboxes:
                sequence.fail(str(e))
            new_tokens = [NewToken(sequence, -1, "", None, "error") for sequence in self.inboxes]
        for new in new_tokens:
            if new.sequence in self.inboxes:
                self.inboxes[new.sequence].append(new)
                if new.finish_reason:
                    self.end(new.sequence)

    def end(self, sequence: Sequence):
        if sequence in self.inboxes:
            del self.inboxes[sequence]
            self.thread.submit(self.scheduler.cancel, sequence)

"""Runs the sequences of several callers at once, in asyncio, with one Scheduler. The server (scripts/serve.py) calls
AsyncEngine.generate for each client.

    engine = AsyncEngine(scheduler)
    async for updates in engine.generate([sequence]):
        for update in updates:
            print(update.text)
"""

import asyncio
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceUpdate
from utils.machine import pick_device


class GenerationError(RuntimeError):
    """A sequence has failed: its logits are not finite, or an error ended the step of all sequences."""


class AsyncEngine:
    """Computes the sequences of several callers together. Only self.thread uses the scheduler. Steps change sequences,
    so a caller reads updates until its sequence has ended."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        # A new thread begins on device 0, so the initializer sets the scheduler's device.
        self.thread = ThreadPoolExecutor(1, initializer=pick_device, initargs=(str(scheduler.kv_cache.device),))
        self.inboxes: dict[Sequence, list[SequenceUpdate]] = {}  # where the caller of a sequence receives updates
        self.step_task: asyncio.Task | None = None  # the newest step, for which all callers wait

    async def generate(self, sequences: list[Sequence]) -> AsyncIterator[list[SequenceUpdate]]:
        """Yields the updates after each step, until all sequences have ended. If the caller stops early, their slots
        become free. Raises GenerationError if a sequence fails."""
        inbox: list[SequenceUpdate] = []
        n_left = len(sequences)
        try:
            for sequence in sequences:
                self.scheduler.check(sequence)  # here: nobody would see an error that submit raises in the thread
                self.inboxes[sequence] = inbox
                self.thread.submit(self.scheduler.submit, sequence)
            while n_left:
                if not inbox:  # otherwise another caller's step has added updates
                    if self.step_task is None or self.step_task.done():  # the first caller that waits starts the step
                        self.step_task = asyncio.create_task(self.run_step())
                    await asyncio.shield(self.step_task)  # a caller that is cancelled must not cancel the step
                updates = inbox.copy()
                inbox.clear()
                if errors := [update.sequence.error for update in updates if update.sequence.error]:
                    raise GenerationError(errors[0])
                n_left -= sum(update.finish_reason is not None for update in updates)
                yield updates
        finally:
            for sequence in sequences:
                self.inboxes.pop(sequence, None)
                self.thread.submit(self.scheduler.cancel, sequence)

    async def run_step(self):
        try:
            updates = await asyncio.wrap_future(self.thread.submit(self.scheduler.step))
        except Exception as e:
            traceback.print_exc()
            updates = [sequence.fail(str(e)) for sequence in self.inboxes]
        for update in updates:
            if update.sequence in self.inboxes:  # its caller has not stopped
                self.inboxes[update.sequence].append(update)

"""One thread runs the texts of all requests; the thread of the HTTP connections talks to it through queues.

Protocol: requests reach the worker as commands in its inbox, which is emptied between two passes. Events of a
text go back through ``loop.call_soon_threadsafe``. The scheduler and the texts belong to the worker's thread alone,
except for the scheduler's counts.
"""

import asyncio
import contextlib
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from subspec.decoding.result import GenerationResult
from subspec.decoding.scheduler import Scheduler, Text
from subspec.errors import SubspecError

Event = None | str | GenerationResult | Exception
"""Of a text: accepted (None); a block of tokens emitted (the text that became final, or ""); ended; failed."""


class Job:
    """A text, and the queue of its events. Made in the event loop's thread."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.text: Text | None = None
        self.cancelled = False

    def post(self, event: Event) -> None:
        """Pass an event to the event loop; dropped if that has ended. Called by the worker."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """Runs a scheduler. ``end``: why :meth:`run` has ended; None: it has not."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.end: Exception | None = None
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: dict[Text, Job] = {}

    def run(self) -> None:
        """Run texts until :meth:`stop`; call it in the thread that loaded the engine.

        Texts that are still running then fail. Raises the scheduler's own failure, which is no text's.
        """
        end: Exception = SubspecError("the server has ended")
        try:
            while self._obey():
                for text in self.scheduler.step():
                    if job := self._jobs.pop(text, None):
                        job.post(text.error or text.result)
        except Exception as error:
            end = error
            raise
        finally:
            self.end = end
            for job in self._jobs.values():
                job.post(end)
            self._refuse_rest()

    def submit(self, job: Job, **arguments: Any) -> None:
        """Begin a job; ``arguments`` are those of ``Scheduler.add``."""
        self._inbox.put(lambda: self._begin(job, arguments))
        if self.end is not None:
            self._refuse_rest()

    def cancel(self, job: Job) -> None:
        """Free the place of a job; harmless if it has ended."""
        job.cancelled = True
        self._inbox.put(lambda: self._remove(job))

    def stop(self) -> None:
        """End :meth:`run` after the pass that it is in."""
        self._inbox.put(None)

    def _obey(self) -> bool:
        """Empty the inbox, waiting while there is nothing to run; returns whether to go on."""
        while True:
            try:
                command = self._inbox.get(block=self.scheduler.idle)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _refuse_rest(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                if command := self._inbox.get_nowait():
                    command()

    def _begin(self, job: Job, arguments: dict[str, Any]) -> None:
        if self.end is not None:
            job.post(self.end)
        if job.cancelled or self.end is not None:
            return
        try:
            job.text = self.scheduler.add(**arguments, on_tokens=lambda _, text: job.post(text))
        except Exception as error:  # the request's own, whatever it is
            job.post(error)
            return
        self._jobs[job.text] = job
        job.post(None)

    def _remove(self, job: Job) -> None:
        if self.end is None and job.text is not None and self._jobs.pop(job.text, None):
            self.scheduler.remove(job.text)

"""Between the engine's thread and an asyncio event loop: one wake-up per dispatch, not one per request."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import numpy as np

from offramp_server.engine import Engine
from offramp_server.messages import Progress, RequestOptions, Result
from offramp_server.served import ServedModel
from offramp_server.submission import Submission


class LoopBridge:
    """Lets coroutines of one event loop wait for the engine.

    A coroutine that is cancelled (its client has gone) cancels its submission, whose work is freed at the next stage
    boundary.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._takers: dict[Submission, Callable[[Progress | Result], None]] = {}

    def deliver(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        """Take a dispatch's events; called on the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left who waits
            self._loop.call_soon_threadsafe(self._hand_out, events)

    def ask(
        self,
        engine: Engine,
        served: ServedModel,
        inputs: dict[str, np.ndarray],
        options: RequestOptions,
        arrival_s: float | None = None,
        *,
        take: Callable[[Progress | Result], None],
    ) -> Submission:
        """Submit a request whose events are taken by a function, on the event loop; see `Engine.submit`.

        Call it on the event loop's thread, and `forget` once the result is there or nobody waits for it any more.
        """
        submission = engine.submit(served, inputs, options, self, arrival_s)
        self._takers[submission] = take
        return submission

    def forget(self, submission: Submission) -> None:
        """Take no more events of a submission; one that has no result yet is cancelled."""
        del self._takers[submission]
        submission.cancel()

    async def answer(
        self,
        engine: Engine,
        served: ServedModel,
        inputs: dict[str, np.ndarray],
        options: RequestOptions,
        arrival_s: float | None = None,
    ) -> Result:
        """Submit a request and wait for its result; see `Engine.submit` for what it raises."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def take(event: Progress | Result) -> None:
            if isinstance(event, Result) and not future.done():
                future.set_result(event)

        submission = self.ask(engine, served, inputs, options, arrival_s, take=take)
        try:
            return await future
        finally:
            self.forget(submission)

    async def stream(
        self,
        engine: Engine,
        served: ServedModel,
        inputs: dict[str, np.ndarray],
        options: RequestOptions,
        arrival_s: float | None = None,
    ) -> AsyncIterator[Progress | Result]:
        """Submit a request and give its progress as it comes, then its result; see `Engine.submit`."""
        events: asyncio.Queue[Progress | Result] = asyncio.Queue()
        submission = self.ask(engine, served, inputs, options, arrival_s, take=events.put_nowait)
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Result):
                    return
        finally:
            self.forget(submission)

    def _hand_out(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        for submission, event in events:
            taker = self._takers.get(submission)
            if taker is not None:
                taker(event)

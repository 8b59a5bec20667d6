"""Between the engine's threads and an asyncio event loop: one wake-up per dispatch, not one per request.

The other way too: requests that one turn of the event loop has brought start together, and one that came alone may run
there and then.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from offramp_server.asking import Asking, Event
from offramp_server.engine import Engine
from offramp_server.messages import Inputs, Progress, RequestOptions, Result
from offramp_server.served import ServedModel
from offramp_server.submission import Submission


class LoopBridge(Asking[Engine, ServedModel, Submission]):
    """Waits for an engine of this process. Made and used on the event loop's thread, but for `deliver`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._asked: dict[Engine, list[Submission]] = {}
        self._takers: dict[Submission, Callable[[Event], None]] = {}

    def deliver(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        """Take a dispatch's events; called on the thread that ran it."""
        if threading.get_ident() == self._thread:
            self._loop.call_soon(self._hand_out, events)
            return
        with suppress(RuntimeError):  # the loop is closed: nobody is left who waits
            self._loop.call_soon_threadsafe(self._hand_out, events)

    def ask(
        self,
        engine: Engine,
        served: ServedModel,
        inputs: Inputs,
        options: RequestOptions,
        arrival_s: float | None = None,
        *,
        take: Callable[[Event], None],
    ) -> Submission:
        """Submit a request whose events are taken by a function, on the event loop; see `Asking.ask`."""
        submission = engine.submit(served, inputs, options, self, arrival_s, wake=False)
        self._takers[submission] = take
        asked = self._asked.get(engine)
        if asked is None:
            asked = self._asked[engine] = []
            self._loop.call_soon(self._start, engine)
        asked.append(submission)
        return submission

    def forget(self, submission: Submission) -> None:
        """Take no more events of a submission; see `Asking.forget`."""
        del self._takers[submission]
        submission.cancel()

    def _start(self, engine: Engine) -> None:
        engine.start(self._asked.pop(engine))

    def _hand_out(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        for submission, event in events:
            taker = self._takers.get(submission)
            if taker is not None:
                taker(event)

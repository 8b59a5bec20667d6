"""Waiting for answers on an event loop, whether the engine is in this process or in another."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeAlias, TypeVar

from offramp_contract.errors import OfframpError

from offramp_server.messages import Inputs, Progress, RequestOptions, Result

Event: TypeAlias = Progress | Result | OfframpError
"""What a request gets: any number of `Progress`, and at last its `Result` or the error for which it was refused."""

EngineT = TypeVar("EngineT")
ModelT = TypeVar("ModelT")
SubmissionT = TypeVar("SubmissionT")


class Asking(ABC, Generic[EngineT, ModelT, SubmissionT]):
    """Lets coroutines of one event loop wait for an engine's answers.

    A coroutine that is cancelled (its client has gone) cancels its submission, whose work is freed at the next stage
    boundary.
    """

    @abstractmethod
    def ask(
        self,
        engine: EngineT,
        served: ModelT,
        inputs: Inputs,
        options: RequestOptions,
        arrival_s: float | None = None,
        *,
        take: Callable[[Event], None],
    ) -> SubmissionT:
        """Submit a request whose events are taken by a function, on the event loop; see `Engine.submit`.

        Call it on the event loop's thread, and `forget` once the result is there or nobody waits for it any more.
        """

    @abstractmethod
    def forget(self, submission: SubmissionT) -> None:
        """Take no more events of a submission; one that has no result yet is cancelled."""

    async def answer(
        self,
        engine: EngineT,
        served: ModelT,
        inputs: Inputs,
        options: RequestOptions,
        arrival_s: float | None = None,
    ) -> Result:
        """Submit a request and wait for its result; see `Engine.submit` for what it raises."""
        answered: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def take(event: Event) -> None:
            if answered.done():
                return
            if isinstance(event, OfframpError):
                answered.set_exception(event)
            elif isinstance(event, Result):
                answered.set_result(event)

        submission = self.ask(engine, served, inputs, options, arrival_s, take=take)
        try:
            return await answered
        finally:
            self.forget(submission)

    async def stream(
        self,
        engine: EngineT,
        served: ModelT,
        inputs: Inputs,
        options: RequestOptions,
        arrival_s: float | None = None,
    ) -> AsyncIterator[Progress | Result]:
        """Submit a request and give its progress as it comes, then its result; see `Engine.submit`."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        submission = self.ask(engine, served, inputs, options, arrival_s, take=events.put_nowait)
        try:
            while True:
                event = await events.get()
                if isinstance(event, OfframpError):
                    raise event
                yield event
                if isinstance(event, Result):
                    return
        finally:
            self.forget(submission)

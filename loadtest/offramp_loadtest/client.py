"""The open-loop client: sends each request when it is due, whatever became of those before it."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import aiohttp

from offramp_loadtest.payloads import Payload
from offramp_loadtest.summary import Outcome, Record
from offramp_loadtest.targets import Answer, Request, Target

REFUSALS: dict[int, Outcome] = {429: "rejected", 503: "rejected", 504: "deadline"}
OK = 200


@dataclass(frozen=True, slots=True)
class Prepared:
    """A payload and its encoded request."""

    payload: Payload
    request: Request


class OpenLoopClient:
    """Sends requests over a pool of keep-alive connections.

    Args:
        session: The pool; its connection limit bounds the requests in flight. One that is due while the pool is
            exhausted waits here, and that wait counts as its latency.
        target: Reads the answers.
        on_record: Called with each record as it is made.
        clock: Gives seconds.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        on_record: Callable[[Record], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._session = session
        self._target = target
        self._on_record = on_record
        self._clock = clock

    async def send_all(self, due_times_s: Iterable[float], prepared: Sequence[Prepared], order: Sequence[int]) -> None:
        """Send one request per due time; returns when every one has its record.

        Args:
            due_times_s: Seconds from now, rising.
            prepared: The encoded payloads.
            order: Which of them to send, in turn, over and over.
        """
        started = self._clock()
        async with asyncio.TaskGroup() as group:
            for number, due_s in enumerate(due_times_s):
                delay_s = due_s - (self._clock() - started)
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                group.create_task(self._send(prepared[order[number % len(order)]], due_s, started))

    async def ask(self, prepared: Prepared) -> tuple[Outcome, Answer | None]:
        """Send one request and name what became of it."""
        request = prepared.request
        try:
            async with self._session.post(request.path, data=request.body, headers=request.headers) as response:
                if response.status != OK:
                    return REFUSALS.get(response.status, "error"), None
                headers = {name.lower(): value for name, value in response.headers.items()}
                return "ok", self._target.decode(headers, await response.read())
        except TimeoutError:
            return "timeout", None
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return "error", None

    async def _send(self, prepared: Prepared, due_s: float, started: float) -> None:
        sent_s = self._clock() - started
        outcome, answer = await self.ask(prepared)
        done_s = self._clock() - started
        self._on_record(Record(due_s, sent_s, done_s, outcome, prepared.payload.label, answer))

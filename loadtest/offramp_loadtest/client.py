"""The open-loop client: sends each request when it is due, whatever became of those before it."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import aiohttp

from offramp_loadtest.payloads import Payload
from offramp_loadtest.summary import Outcome, Record
from offramp_loadtest.targets import Answer, Request, Target

OK = 200
REFUSALS: dict[int, Outcome] = {429: "rejected", 504: "deadline"}
MAX_SAID = 300


@dataclass(frozen=True, slots=True)
class Prepared:
    """A payload and its encoded request."""

    payload: Payload
    request: Request


@dataclass(frozen=True, slots=True)
class Exchange:
    """What became of one request.

    Attributes:
        outcome: Its outcome.
        answer: What the server answered, if the outcome is `ok`.
        said: The beginning of what it said instead.
    """

    outcome: Outcome
    answer: Answer | None = None
    said: str = ""


class OpenLoopClient:
    """Sends requests over a pool of keep-alive connections.

    Args:
        session: The pool, without a limit of its own.
        url: The server.
        target: Reads the answers.
        max_inflight: Most requests in flight. One that is due beyond that waits, and the wait counts as its latency
            and as the client's own lag.
        timeout_s: A request without an answer so long after it was due has timed out.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, target: Target, *, max_inflight: int, timeout_s: float
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._target = target
        self._slots = asyncio.Semaphore(max_inflight)
        self._timeout_s = timeout_s

    async def send_all(
        self,
        due_times_s: Iterable[float],
        prepared: Sequence[Prepared],
        order: Sequence[int],
        on_record: Callable[[Record], None],
    ) -> None:
        """Send one request per due time; returns when every one has its record.

        Args:
            due_times_s: Seconds from now, rising.
            prepared: The encoded payloads.
            order: Which of them to send, in turn, over and over.
            on_record: Called with each record as it is made.
        """
        started = time.perf_counter()

        async def send(one: Prepared, due_s: float) -> None:
            on_record(await self._send(one, due_s, started))

        async with asyncio.TaskGroup() as group:
            for number, due_s in enumerate(due_times_s):
                delay_s = due_s - (time.perf_counter() - started)
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                group.create_task(send(prepared[order[number % len(order)]], due_s))

    async def ask(self, request: Request) -> Exchange:
        """Send one request and name what became of it."""
        try:
            async with self._session.post(
                self._url + request.path, data=request.body, headers=request.headers
            ) as response:
                body = await response.read()
                if response.status != OK:
                    said = body[:MAX_SAID].decode(errors="replace")
                    return Exchange(REFUSALS.get(response.status, "error"), said=f"{response.status} {said}")
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Exchange("ok", self._target.decode(headers, body))
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
            return Exchange("error", said=f"{type(error).__name__}: {error}"[:MAX_SAID])

    async def _send(self, prepared: Prepared, due_s: float, started: float) -> Record:
        sent_s: float | None = None
        exchange = Exchange("timeout")
        left_s = due_s + self._timeout_s - (time.perf_counter() - started)
        try:
            async with asyncio.timeout(max(left_s, 0.0)), self._slots:
                sent_s = time.perf_counter() - started
                exchange = await self.ask(prepared.request)
        except TimeoutError:
            exchange = Exchange("timeout")
        done_s = time.perf_counter() - started
        label = prepared.payload.label
        return Record(due_s, done_s if sent_s is None else sent_s, done_s, exchange.outcome, label, exchange.answer)

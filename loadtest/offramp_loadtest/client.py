"""The open-loop client: sends each request when it is due, whatever became of those before it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from offramp_loadtest.connections import Pool, Response, Ticket
from offramp_loadtest.pace import Pace
from offramp_loadtest.summary import Intent, Outcome, Record
from offramp_loadtest.targets import Target

OK: Final = 200
REFUSALS: Final[dict[int, Outcome]] = {429: "rejected", 504: "deadline"}
MAX_SAID: Final = 300

Bytes = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that will be due.

    Attributes:
        due_s: When, in seconds from the start.
        payload: Which payload, by its place.
        label: Its true class, if it is known.
        written: The request's bytes.
        intent: `ask`, `leave` before the answer, or `bad`, which no server should accept.
        leave_after_s: Of `leave`: so long after it was written.
    """

    due_s: float
    payload: int
    label: int | None
    written: Bytes
    intent: Intent = "ask"
    leave_after_s: float = 0.0


class OpenLoopClient:
    """Sends arrivals over a pool of connections and makes one record of each.

    Args:
        pool: The connections.
        target: Reads the answers.
        timeout_s: A request without an answer so long after it was due has timed out.
        on_record: Called with each record as it is made.
    """

    def __init__(self, pool: Pool, target: Target, timeout_s: float, on_record: Callable[[Record], None]) -> None:
        self._pool = pool
        self._target = target
        self._timeout_s = timeout_s
        self._on_record = on_record
        self._started = 0.0
        self._num_unanswered = 0
        self._all_answered = asyncio.Event()

    async def send_all(self, arrivals: Sequence[Arrival]) -> None:
        """Send every arrival when it is due; returns when every one has its record."""
        self._num_unanswered = len(arrivals)
        self._started = time.perf_counter()
        with Pace(self._started) as pace:
            for arrival in arrivals:
                await pace.until(arrival.due_s)
                _Flight(self, arrival).begin()
        if arrivals:
            await self._all_answered.wait()

    def now_s(self) -> float:
        """Give the seconds since the start."""
        return time.perf_counter() - self._started

    def submit(self, flight: "_Flight") -> Ticket:
        """Send a request of a flight."""
        return self._pool.submit(flight.arrival.written, flight.on_done)

    def abandon(self, ticket: Ticket) -> None:
        """Give a request up."""
        self._pool.abandon(ticket)

    def record(self, arrival: Arrival, ticket: Ticket, outcome: Outcome, what: Response | OSError | None) -> None:
        """Write down what became of an arrival."""
        done_s = self.now_s()
        sent_s = None if ticket.sent_at is None else ticket.sent_at - self._started
        answer, said = None, ""
        if isinstance(what, Response):
            if what.status == OK and arrival.intent != "bad":
                try:
                    answer = self._target.decode(what.headers, what.body)
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    outcome, said = "error", f"{type(error).__name__}: {error}"
            else:
                said = f"{what.status} {what.body[:MAX_SAID].decode(errors='replace')}"
        elif what is not None:
            said = f"{type(what).__name__}: {what}"
        self._on_record(
            Record(
                arrival.due_s, done_s if sent_s is None else sent_s, done_s, outcome, arrival.label, answer,
                arrival.intent, arrival.payload, said[:MAX_SAID], ticket.submitted_at - self._started,
            )
        )  # fmt: skip
        self._num_unanswered -= 1
        if not self._num_unanswered:
            self._all_answered.set()

    def deadline_at(self, arrival: Arrival) -> float:
        """Give the seconds from now at which an arrival times out."""
        return max(arrival.due_s + self._timeout_s - self.now_s(), 0.0)


class _Flight:
    """One request between its due time and its record."""

    __slots__ = ("_client", "_ticket", "_timer", "arrival")

    def __init__(self, client: OpenLoopClient, arrival: Arrival) -> None:
        self._client = client
        self.arrival = arrival

    def begin(self) -> None:
        loop, arrival = asyncio.get_running_loop(), self.arrival
        self._timer = loop.call_later(self._client.deadline_at(arrival), self._give_up, "timeout")
        self._ticket = self._client.submit(self)
        if arrival.intent == "leave":
            self._timer.cancel()
            self._timer = loop.call_later(arrival.leave_after_s, self._give_up, "left")

    def on_done(self, what: Response | OSError) -> None:
        self._timer.cancel()
        self._client.record(self.arrival, self._ticket, outcome_of(self.arrival.intent, what), what)

    def _give_up(self, outcome: Outcome) -> None:
        self._client.abandon(self._ticket)
        self._client.record(self.arrival, self._ticket, outcome, None)


def outcome_of(intent: Intent, what: Response | OSError) -> Outcome:
    """Name what became of a request that was answered or lost its connection."""
    if isinstance(what, OSError):
        return "error"
    if intent == "bad":
        is_refusal = 400 <= what.status < 500 and what.status not in REFUSALS
        return "invalid" if is_refusal else REFUSALS.get(what.status, "error")
    return "ok" if what.status == OK else REFUSALS.get(what.status, "error")

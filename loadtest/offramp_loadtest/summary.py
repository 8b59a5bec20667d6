"""The numbers of a load test, from one record per request that was due."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from offramp_loadtest.metrics import ServerSide
from offramp_loadtest.targets import Answer

Intent = Literal["ask", "leave", "bad"]
Outcome = Literal["ok", "rejected", "deadline", "invalid", "left", "error", "timeout"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "rejected", "deadline", "invalid", "left", "error", "timeout")
MAX_FAILURES = 5
MAX_KIND = 60
"""What is said after so many characters differs from request to request."""
MAX_LAG_MS = 5.0
"""A client may be so far behind without a note, or a tenth of what counts as on time, if that is more."""
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Every arrival makes exactly one.

    Attributes:
        due_s: When it was due, in seconds from the start.
        sent_s: When it was written, or given up if it never was.
        done_s: When its outcome was known.
        outcome: What became of it.
        label: The true class, if it is known.
        answer: The server's answer, if the outcome is `ok`.
        intent: `ask`; `leave` before the answer; or `bad`, which no server should accept.
        payload: Which payload was sent, by its place; -1 if that does not matter.
        said: The beginning of what the server said instead of an answer, or of why there is none.
        handed_s: When the client got to it; None if it was then written at once.
    """

    due_s: float
    sent_s: float
    done_s: float
    outcome: Outcome
    label: int | None = None
    answer: Answer | None = None
    intent: Intent = "ask"
    payload: int = -1
    said: str = ""
    handed_s: float | None = None

    @property
    def latency_ms(self) -> float:
        """From when it was *due*: a client that falls behind hides nothing (no coordinated omission)."""
        return (self.done_s - self.due_s) * 1e3

    @property
    def is_right(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.answer is not None and self.label is not None and self.answer.class_id == self.label


@dataclass(frozen=True, slots=True)
class Summary:
    """What a load test found. What a server does not tell is None or empty, never 0.

    Attributes:
        arrivals: Requests that were due.
        asked: Those of them that wanted an answer: all but clients that leave and bad requests, where a scenario mixes
            such in. Attainment, goodput, accuracy and latency are theirs.
        seconds: From the start to the last outcome.
        offered_rate: Requests that were due per second.
        answered_rate: Requests that were answered per second.
        outcomes: Requests by outcome; they add up to the arrivals.
        latency_ms: Percentiles and maximum over answered requests, counted from when each was due.
        client_lag_ms: Percentiles of the time until the client got to a request: how far it was behind.
        connection_wait_ms: Percentiles of the time that requests waited for a free connection, the limit of what is in
            flight.
        queue_ms: Percentiles of what the server says its requests waited; empty if it does not tell.
        compute_ms: The same for what its stages ran.
        slo_ms: The time within which an answer counts as on time; None if none was set.
        attainment: Share of the asked that were answered on time; rejects and failures are misses.
        goodput: Answers on time per second in which requests were due.
        correct_goodput: The same, counting right answers only; None without labels.
        accuracy: Share of right ones among the answered; None without labels.
        mean_depth: Average share of the full path's FLOPs; None if the server does not tell.
        forced: Share of answers that the deadline forced; None if the server does not tell.
        exits: Answers by exit.
        reasons: Answers by exit reason.
        gears: Answers by gear.
        failures: What was said instead of an answer, most frequent first, for a few kinds.
        server: The server's own count; None if it has none.
        notes: What a reader of these numbers must know, in sentences.
        capacity: Requests per second at full depth that the loads were shares of, if any were.
        seed: Of arrivals and order of payloads.
    """

    arrivals: int
    asked: int
    seconds: float
    offered_rate: float
    answered_rate: float
    outcomes: dict[str, int]
    latency_ms: dict[str, float]
    client_lag_ms: dict[str, float]
    connection_wait_ms: dict[str, float]
    queue_ms: dict[str, float]
    compute_ms: dict[str, float]
    slo_ms: float | None
    attainment: float | None
    goodput: float | None
    correct_goodput: float | None
    accuracy: float | None
    mean_depth: float | None
    forced: float | None
    exits: dict[str, int]
    reasons: dict[str, int]
    gears: dict[str, int]
    failures: dict[str, int]
    server: ServerSide | None
    notes: tuple[str, ...]
    capacity: float | None
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Give every number as plain JSON types."""
        return asdict(self)


def summarise(
    records: Sequence[Record],
    planned_s: float,
    slo_ms: float | None,
    seed: int,
    *,
    server: ServerSide | None = None,
    capacity: float | None = None,
) -> Summary:
    """Reduce the records of a run.

    Args:
        records: One per arrival.
        planned_s: How long requests were due; goodput is per second of it.
        slo_ms: The time within which an answer counts as on time.
        seed: Of the run.
        server: The server's own count.
        capacity: What loads were shares of.
    """
    asked = [record for record in records if record.intent == "ask"]
    answered = [record for record in asked if record.answer is not None]
    answers = [record.answer for record in records if record.answer is not None]
    seconds = max([planned_s, *(record.done_s for record in records)])
    on_time = [r for r in answered if slo_ms is None or r.latency_ms <= slo_ms]
    has_labels = bool(asked) and all(record.label is not None for record in asked)
    depths = [answer.depth for answer in answers if answer.depth is not None]
    forced = [answer.forced for answer in answers if answer.forced is not None]
    outcomes = Counter(record.outcome for record in records)
    handed_s = [record.sent_s if record.handed_s is None else record.handed_s for record in records]
    lag_ms = _percentiles([(at_s - record.due_s) * 1e3 for at_s, record in zip(handed_s, records, strict=True)])
    wait_ms = _percentiles([(record.sent_s - at_s) * 1e3 for at_s, record in zip(handed_s, records, strict=True)])
    return Summary(
        arrivals=len(records),
        asked=len(asked),
        seconds=seconds,
        offered_rate=len(records) / planned_s,
        answered_rate=len(answered) / seconds,
        outcomes={outcome: outcomes[outcome] for outcome in OUTCOMES},
        latency_ms=_percentiles([record.latency_ms for record in answered]),
        client_lag_ms=lag_ms,
        connection_wait_ms=wait_ms,
        queue_ms=_percentiles([answer.queue_ms for answer in answers if answer.queue_ms is not None]),
        compute_ms=_percentiles([answer.compute_ms for answer in answers if answer.compute_ms is not None]),
        slo_ms=slo_ms,
        attainment=len(on_time) / len(asked) if asked and slo_ms is not None else None,
        goodput=len(on_time) / planned_s if slo_ms is not None else None,
        correct_goodput=sum(r.is_right for r in on_time) / planned_s if has_labels and slo_ms is not None else None,
        accuracy=sum(r.is_right for r in answered) / len(answered) if has_labels and answered else None,
        mean_depth=float(np.mean(depths)) if depths else None,
        forced=sum(forced) / len(forced) if forced else None,
        exits=_counted([answer.exit for answer in answers]),
        reasons=_counted([answer.reason for answer in answers]),
        gears=_counted([answer.gear for answer in answers]),
        failures=dict(Counter(r.said[:MAX_KIND] for r in asked if r.said).most_common(MAX_FAILURES)),
        server=server,
        notes=tuple(notes_on(outcomes, lag_ms, wait_ms, slo_ms, server)),
        capacity=capacity,
        seed=seed,
    )


def notes_on(
    outcomes: Mapping[Outcome, int],
    lag_ms: Mapping[str, float],
    wait_ms: Mapping[str, float],
    slo_ms: float | None,
    server: ServerSide | None,
) -> Iterator[str]:
    """Say what a reader of the numbers must know: a client that was behind, counts that do not add up."""
    bearable_ms = MAX_LAG_MS if slo_ms is None else max(MAX_LAG_MS, slo_ms / 10)
    if lag_ms and lag_ms["p99"] > bearable_ms:
        yield (
            f"The client was behind: it got to 1 % of the requests {lag_ms['p99']:.1f} ms or more after they were due, "
            "for want of CPU time. These latencies are the client's too, not the server's alone."
        )
    if wait_ms and wait_ms["p99"] > bearable_ms:
        yield (
            f"All connections were in use: 1 % of the requests waited {wait_ms['p99']:.1f} ms or more for one. "
            "The wait counts as latency, and the server saw no more requests at a time than there are connections."
        )
    if server is None:
        return
    num_counted, arrivals = sum(server.requests.values()), sum(outcomes.values())
    unsure = outcomes["left"] + outcomes["timeout"] + outcomes["error"] + outcomes["invalid"]
    if not arrivals - unsure <= num_counted <= arrivals:
        yield (
            f"The server counts {num_counted} requests, the client {arrivals}: others were asking too, "
            "or an answer was lost."
        )


def _counted(values: Sequence[str | int | None]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(v for v in values if v is not None).items())}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = np.percentile(values, list(PERCENTILES.values()))
    return dict(zip(PERCENTILES, map(float, found), strict=True)) | {"max": float(max(values))}

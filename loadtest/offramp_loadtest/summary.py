"""The numbers of a load test, from one record per request that was due."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from offramp_loadtest.targets import Answer

Outcome = Literal["ok", "rejected", "deadline", "error", "timeout"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "rejected", "deadline", "error", "timeout")
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Every arrival makes exactly one.

    Attributes:
        due_s: When it was due, in seconds from the start.
        sent_s: When it was written.
        done_s: When its outcome was known.
        outcome: What became of it.
        label: The true class, if it is known.
        answer: The server's answer, if the outcome is `ok`.
    """

    due_s: float
    sent_s: float
    done_s: float
    outcome: Outcome
    label: int | None = None
    answer: Answer | None = None

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
    """What a load test found.

    Attributes:
        arrivals: Requests that were due.
        seconds: From the start to the last outcome.
        offered_rate: Requests that were due per second.
        answered_rate: Requests that were answered per second.
        outcomes: Requests by outcome; they add up to the arrivals.
        latency_ms: Percentiles and maximum over answered requests, counted from when each was due.
        client_lag_ms: Percentiles of the time between due and sent: how far the client itself was behind.
        queue_ms: Percentiles of what the server says its requests waited; empty if it does not tell.
        compute_ms: The same for what its stages ran.
        slo_ms: The time within which an answer counts as on time; None if none was set.
        attainment: Share of all arrivals that were answered on time; rejects and failures are misses.
        goodput: Answers on time per second in which requests were due: attainment times offered rate.
        correct_goodput: The same, counting right answers only; None without labels.
        accuracy: Share of right ones among the answered; None without labels.
        mean_depth: Average share of the full path's FLOPs; None if the server does not tell.
        forced: Share of answers that the deadline forced.
        exits: Answers by exit.
        reasons: Answers by exit reason.
        seed: Of arrivals and order of payloads.
    """

    arrivals: int
    seconds: float
    offered_rate: float
    answered_rate: float
    outcomes: dict[str, int]
    latency_ms: dict[str, float]
    client_lag_ms: dict[str, float]
    queue_ms: dict[str, float]
    compute_ms: dict[str, float]
    slo_ms: float | None
    attainment: float | None
    goodput: float | None
    correct_goodput: float | None
    accuracy: float | None
    mean_depth: float | None
    forced: float
    exits: dict[str, int]
    reasons: dict[str, int]
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Give every number as plain JSON types."""
        return asdict(self)


def summarise(records: Sequence[Record], planned_s: float, slo_ms: float | None, seed: int) -> Summary:
    """Reduce the records of a run.

    Args:
        records: One per arrival.
        planned_s: How long requests were due; goodput is per second of it.
        slo_ms: The time within which an answer counts as on time.
        seed: Of the run.
    """
    answered = [record for record in records if record.answer is not None]
    answers = [record.answer for record in records if record.answer is not None]
    seconds = max([planned_s, *(record.done_s for record in records)])
    on_time = [r for r in answered if slo_ms is None or r.latency_ms <= slo_ms]
    has_labels = bool(records) and all(record.label is not None for record in records)
    depths = [answer.depth for answer in answers if answer.depth is not None]
    return Summary(
        arrivals=len(records),
        seconds=seconds,
        offered_rate=len(records) / planned_s,
        answered_rate=len(answered) / seconds,
        outcomes={outcome: sum(record.outcome == outcome for record in records) for outcome in OUTCOMES},
        latency_ms=_percentiles([record.latency_ms for record in answered]),
        client_lag_ms=_percentiles([(record.sent_s - record.due_s) * 1e3 for record in records]),
        queue_ms=_percentiles([answer.queue_ms for answer in answers if answer.queue_ms is not None]),
        compute_ms=_percentiles([answer.compute_ms for answer in answers if answer.compute_ms is not None]),
        slo_ms=slo_ms,
        attainment=len(on_time) / len(records) if records and slo_ms is not None else None,
        goodput=len(on_time) / planned_s if slo_ms is not None else None,
        correct_goodput=sum(r.is_right for r in on_time) / planned_s if has_labels and slo_ms is not None else None,
        accuracy=sum(r.is_right for r in answered) / len(answered) if has_labels and answered else None,
        mean_depth=float(np.mean(depths)) if depths else None,
        forced=sum(answer.forced for answer in answers) / len(answers) if answers else 0.0,
        exits=dict(sorted(Counter(answer.exit for answer in answers if answer.exit is not None).items())),
        reasons=dict(sorted(Counter(answer.reason for answer in answers if answer.reason is not None).items())),
        seed=seed,
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {name: float(np.percentile(values, share)) for name, share in PERCENTILES.items()}
    return found | {"max": float(max(values))}

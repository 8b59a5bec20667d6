"""A run's records along its time: what each stretch of arrivals came to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from offramp_loadtest.summary import Record
from offramp_loadtest.targets import Answer

MAX_BINS: Final = 80
MIN_BIN_S: Final = 0.25
MIN_PER_BIN: Final = 10

RIGHT, WRONG, ON_TIME, LATE = "on time and right", "on time, wrong", "on time", "late"
REJECTED, DEADLINE, FAILED = "rejected", "deadline passed", "failed"


@dataclass(frozen=True, slots=True)
class Timeline:
    """Series over stretches of equal length, by when requests were due. Requests that wanted no answer are left out.

    Attributes:
        at_s: The middle of each stretch, (T,).
        bin_s: Length of a stretch.
        offered: Requests per second, (T,).
        became: Requests per second by what became of them, in the order of stacking; each (T,).
        latency_ms: Percentiles of the answered by name; each (T,), NaN where nothing was answered.
        exits: Share of the answers by exit; each (T,). Empty if the server does not tell.
        forced: Share of the answers that the deadline forced; None if the server does not tell.
        gear: Average gear; None if the server does not tell.
    """

    at_s: np.ndarray
    bin_s: float
    offered: np.ndarray
    became: dict[str, np.ndarray]
    latency_ms: dict[str, np.ndarray]
    exits: dict[str, np.ndarray]
    forced: np.ndarray | None
    gear: np.ndarray | None


def timeline_of(records: Sequence[Record], planned_s: float, slo_ms: float | None) -> Timeline:
    """Sort records into stretches."""
    asked = [record for record in records if record.intent == "ask"]
    num_bins = int(min(MAX_BINS, max(planned_s / MIN_BIN_S, 1), max(len(asked) / MIN_PER_BIN, 1)))
    bin_s = planned_s / num_bins
    bins: list[list[Record]] = [[] for _ in range(num_bins)]
    for record in asked:
        bins[min(int(record.due_s / bin_s), num_bins - 1)].append(record)
    answered = [[record for record in records if record.answer is not None] for records in bins]
    has_labels = bool(asked) and all(record.label is not None for record in asked)
    kinds = [[_became(record, slo_ms, has_labels) for record in records] for records in bins]
    wanted = (RIGHT, WRONG) if has_labels else (ON_TIME,)
    return Timeline(
        at_s=(np.arange(num_bins) + 0.5) * bin_s,
        bin_s=bin_s,
        offered=np.array([len(records) for records in bins]) / bin_s,
        became={
            kind: np.array([kinds_.count(kind) for kinds_ in kinds]) / bin_s
            for kind in (*wanted, LATE, REJECTED, DEADLINE, FAILED)
            if any(kind in kinds_ for kinds_ in kinds)
        },
        latency_ms={
            f"p{share:g}": np.array([_percentile([r.latency_ms for r in records], share) for records in answered])
            for share in (50, 95, 99)
        },
        exits=_exit_shares(answered),
        forced=_mean(answered, lambda answer: answer.forced),
        gear=_mean(answered, lambda answer: answer.gear),
    )


def _became(record: Record, slo_ms: float | None, has_labels: bool) -> str:
    if record.outcome != "ok":
        return {"rejected": REJECTED, "deadline": DEADLINE}.get(record.outcome, FAILED)
    if slo_ms is not None and record.latency_ms > slo_ms:
        return LATE
    if not has_labels:
        return ON_TIME
    return RIGHT if record.is_right else WRONG


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, share)) if values else float("nan")


def _exit_shares(answered: Sequence[Sequence[Record]]) -> dict[str, np.ndarray]:
    exits = [[r.answer.exit for r in records if r.answer and r.answer.exit is not None] for records in answered]
    names = sorted({name for names in exits for name in names}, key=lambda name: (len(name), name))
    return {name: np.array([names.count(name) / len(names) if names else 0.0 for names in exits]) for name in names}


def _mean(answered: Sequence[Sequence[Record]], value_of: Callable[[Answer], float | None]) -> np.ndarray | None:
    answers = [[record.answer for record in records if record.answer is not None] for records in answered]
    values = [[value for one in some if (value := value_of(one)) is not None] for some in answers]
    if not any(values):
        return None
    return np.array([float(np.mean(known)) if known else float("nan") for known in values])

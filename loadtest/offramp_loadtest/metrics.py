"""What Offramp's `/metrics` says happened between two moments. For other servers nothing is made up."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

REQUESTS: Final = "offramp_requests_total"
BATCH: Final = "offramp_stage_batch_size"
INFLIGHT: Final = "offramp_inflight_samples"
_SERIES = re.compile(r"^(offramp_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Counts = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True, slots=True)
class StageBatches:
    """The dispatches of one stage.

    Attributes:
        num_dispatches: How many there were.
        mean_rows: Rows in one, on average.
        at_most: Dispatches by the histogram bucket they fall into, keyed by its upper bound.
    """

    num_dispatches: int
    mean_rows: float
    at_most: dict[str, int]


@dataclass(frozen=True, slots=True)
class ServerSide:
    """The server's own count of a run.

    Attributes:
        requests: Requests by outcome.
        stages: Dispatches by stage.
    """

    requests: dict[str, int] = field(default_factory=dict)
    stages: dict[str, StageBatches] = field(default_factory=dict)


def parse(text: str) -> Counts:
    """Read an exposition's series of interest, by name and labels."""
    return {
        (name, frozenset(_LABEL.findall(labels))): float(value)
        for name, labels, value in _SERIES.findall(text)
        if name.startswith((REQUESTS, BATCH, INFLIGHT))
    }


def num_inflight(counts: Counts) -> float:
    """Give how many rows are admitted and unanswered."""
    return sum(value for (name, _), value in counts.items() if name == INFLIGHT)


def between(before: Counts, after: Counts | None, model: str | None) -> ServerSide | None:
    """Give what was counted between two scrapes, of one model or of all; None if the server counts nothing of ours."""
    if after is None or not any(name == REQUESTS for name, _ in after):
        return None
    requests: dict[str, int] = {}
    for labels, count in _grown(REQUESTS, before, after, model):
        requests[labels["outcome"]] = requests.get(labels["outcome"], 0) + round(count)
    return ServerSide(dict(sorted(requests.items())), _stages(before, after, model))


def _stages(before: Counts, after: Counts, model: str | None) -> dict[str, StageBatches]:
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    for labels, rows in _grown(f"{BATCH}_sum", before, after, model):
        sums[labels["stage"]] = sums.get(labels["stage"], 0.0) + rows
    for labels, count in _grown(f"{BATCH}_count", before, after, model):
        counts[labels["stage"]] = counts.get(labels["stage"], 0.0) + count
    for labels, count in _grown(f"{BATCH}_bucket", before, after, model):
        bounds = buckets.setdefault(labels["stage"], {})
        bounds[float(labels["le"])] = bounds.get(float(labels["le"]), 0.0) + count
    return {
        stage: StageBatches(round(count), sums[stage] / count, _apart(buckets.get(stage, {})))
        for stage, count in sorted(counts.items())
        if count
    }


def _apart(cumulative: Mapping[float, float]) -> dict[str, int]:
    """Turn a histogram's cumulative buckets into those that hold something."""
    apart, below = {}, 0.0
    for bound, count in sorted(cumulative.items()):
        if count > below:
            apart[f"{bound:g}"] = round(count - below)
        below = count
    return apart


def _grown(name: str, before: Counts, after: Counts, model: str | None) -> Iterator[tuple[dict[str, str], float]]:
    for key, value in after.items():
        if key[0] != name:
            continue
        labels = dict(key[1])
        if model is None or labels.get("model") == model:
            yield labels, max(value - before.get(key, 0.0), 0.0)

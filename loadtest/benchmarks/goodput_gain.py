"""Does leaving early gain what the stages' milliseconds promise?

A server is kept busy by as many clients as always find work waiting, in turns at full depth and at an operating point.
The gain that milliseconds predict is the time of a row's stages at full depth over the time of those that rows ran: the
rows that each stage saw, times what a row takes there. What is lost on the way (dispatches, smaller batches, gathering
survivors, HTTP) is the difference to the throughput that was gained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from goodput_data import TestSet
from offramp_loadtest import Scenario, measure_capacity
from scraped import Scraped, grown

CLIENTS = 32
STAGE_SECONDS = "offramp_stage_duration_seconds_sum"
STAGE_ROWS = "offramp_stage_batch_size_sum"


@dataclass(frozen=True, slots=True)
class Work:
    """What a server did in one turn.

    Attributes:
        rate: Rows answered per second.
        rows_answered: Rows that reached the first stage.
        rows: Rows that each stage ran.
        seconds: Time in which each stage ran.
    """

    rate: float
    rows_answered: float
    rows: dict[str, float]
    seconds: dict[str, float]

    @property
    def row_ms(self) -> dict[str, float]:
        """What a row takes in each stage, in its batches."""
        return {stage: 1e3 * self.seconds[stage] / rows for stage, rows in self.rows.items() if rows}


@dataclass(frozen=True, slots=True)
class Gain:
    """One pair of turns.

    Attributes:
        full_rate, early_rate: Rows per second at full depth and at the operating point.
        realised: The second over the first.
        predicted: By the milliseconds of the stages at full depth and the rows that each stage saw.
        row_ms: Milliseconds of a row in each stage at full depth.
        reached: Share of the rows that each stage saw at the operating point.
    """

    full_rate: float
    early_rate: float
    realised: float
    predicted: float
    row_ms: dict[str, float]
    reached: dict[str, float]

    @property
    def share(self) -> float:
        """How much of what was predicted was realised."""
        return self.realised / self.predicted


def measure_gain(
    url: str,
    scenario: Scenario,
    inputs: TestSet,
    full: Mapping[str, Any],
    early: Mapping[str, Any],
    *,
    seconds: float,
    rounds: int,
) -> list[Gain]:
    """Measure pairs of turns at full depth and at an operating point, on one server."""
    gains = []
    for _ in range(rounds):
        at_full = _turn(url, scenario, inputs, full, seconds)
        gains.append(gain_of(at_full, _turn(url, scenario, inputs, early, seconds)))
    return gains


def gain_of(full: Work, early: Work) -> Gain:
    """Compare two turns."""
    row_ms = full.row_ms
    reached = {stage: early.rows.get(stage, 0.0) / early.rows_answered for stage in row_ms}
    predicted = sum(row_ms.values()) / sum(share * row_ms[stage] for stage, share in reached.items())
    return Gain(full.rate, early.rate, early.rate / full.rate, predicted, row_ms, reached)


def _turn(url: str, scenario: Scenario, inputs: TestSet, fields: Mapping[str, Any], seconds: float) -> Work:
    # Every turn asks the same inputs in the same random order: their difficulty decides how far rows go.
    order = np.random.default_rng(scenario.seed).permutation(len(inputs.payloads))
    payloads = [inputs.payloads[index] for index in order.tolist()]
    before = Scraped.of(url)
    rate = measure_capacity(url, scenario, payloads, fields=fields, seconds=seconds, clients=CLIENTS)
    after = Scraped.of(url)
    rows, took = (grown(before.by("stage", name), after.by("stage", name)) for name in (STAGE_ROWS, STAGE_SECONDS))
    return Work(rate, max(rows.values()), rows, took)

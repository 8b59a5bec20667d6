"""Policies on a data set: what each setting costs and gets there, and what is read off their curves.

Shapes: N = samples, E = exits, P = points of a front.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from offramp_contract.budgets import within_compute
from offramp_contract.calibration import OperatingPoint
from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import PolicySpec
from offramp_contract.statistics import BoolArray

from offramp_calibration.about import GateThreshold
from offramp_calibration.curves import Curve, gap_closed
from offramp_calibration.front import pareto_front
from offramp_calibration.reliability import Interval, wilson
from offramp_calibration.replay import Replayed

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES_OF_FULL_COST = (0.25, 0.5, 0.75, 1.0)
ACCURACY_LOSSES = (0.0, 0.005, 0.01)
MAX_WRITTEN = 512
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of samples and its Wilson interval at 95 %."""

    value: float
    interval: Interval
    num_samples: int

    @classmethod
    def of(cls, mask_N: BoolArray) -> Self:
        """Count where a mask holds; 0 of no samples."""
        num_true, num_samples = int(mask_N.sum()), len(mask_N)
        return cls(num_true / max(num_samples, 1), wilson(num_true, num_samples), num_samples)


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """A setting of a policy as this data shows it.

    Attributes:
        family: How its setting was found: the policy's kind, or that and more.
        expected_compute: What calibration said; None if the setting comes from no calibration.
        expected_accuracy: Likewise.
        compute: Average share of the full path's FLOPs.
        milliseconds: Average time at batch 1, if the exits' times are known.
        differs: Share of answers that differ from full depth's.
        lost: Share of answers that are wrong where full depth's is right.
        exit_rates: Share of samples that left at each exit.
        gate_threshold: What opened the gates; None: the network's own thresholds, or it has no gates.
    """

    name: str
    family: str
    policy: PolicySpec | None
    expected_compute: float | None
    expected_accuracy: float | None
    compute: float
    milliseconds: float | None
    accuracy: Proportion
    differs: Proportion
    lost: Proportion
    exit_rates: tuple[float, ...]
    gate_threshold: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        family: str,
        replayed: Replayed,
        milliseconds_E: Sequence[float] | None,
        *,
        policy: PolicySpec | None = None,
        expected: OperatingPoint | None = None,
        gate_threshold: GateThreshold = None,
    ) -> Self:
        """Measure what a replay came to.

        Args:
            name: Of the setting.
            family: Of its policy.
            replayed: Where every sample left.
            milliseconds_E: Time until each exit's answer at batch 1, if known.
            policy: The setting, if a policy has made the choice.
            expected: The operating point, if it is one.
            gate_threshold: What opened the gates for the replay.
        """
        rates_E = replayed.exit_rates_E
        return cls(
            name=name,
            family=family,
            policy=policy,
            expected_compute=None if expected is None else expected.compute,
            expected_accuracy=None if expected is None else expected.accuracy,
            compute=replayed.compute,
            milliseconds=None if milliseconds_E is None else float(rates_E @ np.asarray(milliseconds_E)),
            accuracy=Proportion.of(replayed.right_N),
            differs=Proportion.of(replayed.differs_N),
            lost=Proportion.of(replayed.lost_N),
            exit_rates=tuple(rates_E.tolist()),
            gate_threshold=gate_threshold,
        )


@dataclass(frozen=True, slots=True)
class BudgetResult:
    """What asking for an average compute comes to on this data.

    Attributes:
        asked: The `compute` of a request.
        point: The operating point that the server would choose; None if it would refuse.
        refusal: Why it would.
    """

    asked: float
    point: MeasuredPoint | None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class CurveSummary:
    """One way of choosing exits, read off its Pareto front on this data.

    Attributes:
        costs: The front's costs, rising.
        accuracies: The front's accuracies, rising; of a very long front some points only.
        accuracy_at: For each of `SHARES_OF_FULL_COST` the accuracy that it buys; None below the cheapest point.
        cost_at: For each of `ACCURACY_LOSSES` below full depth the least cost; None if the front never gets there.
        gap_closed: For the same losses the share of the label oracle's saving that it saves.
        area: Accuracy averaged over the budgets from where all fronts have begun to full cost.
    """

    name: str
    costs: tuple[float, ...]
    accuracies: tuple[float, ...]
    accuracy_at: tuple[float | None, ...]
    cost_at: tuple[float | None, ...]
    gap_closed: tuple[float | None, ...]
    area: float | None


def budget_results(points: Sequence[OperatingPoint], measured: Sequence[MeasuredPoint]) -> tuple[BudgetResult, ...]:
    """Choose an operating point for each of `BUDGETS` as the server does."""
    by_name = {point.name: point for point in measured}
    results = []
    for asked in BUDGETS if points else ():
        try:
            results.append(BudgetResult(asked, by_name[within_compute(points, asked).name]))
        except InvalidValue as error:
            results.append(BudgetResult(asked, None, error.message))
    return tuple(results)


def chosen_by_budgets(points: Sequence[OperatingPoint]) -> list[str]:
    """Name the points that some compute budget chooses, the cheapest first: nothing cheaper should be as right."""
    return [point.name for point in pareto_front(points)]


def summarise(
    name: str, curve: Curve, oracle: Curve | None, *, full_cost: float, full_accuracy: float, start: float
) -> CurveSummary:
    """Read a curve.

    Args:
        name: What it is a curve of.
        curve: Its front.
        oracle: The label oracle's, in the same cost; None where there is none to compare with.
        full_cost: Cost of full depth.
        full_accuracy: Accuracy of full depth.
        start: Budget from which on areas are compared.
    """
    wanted = [full_accuracy - loss - _ROUNDING for loss in ACCURACY_LOSSES]
    cost_at = tuple(curve.cost_for(accuracy) for accuracy in wanted)
    oracle_at = [None if oracle is None else oracle.cost_for(accuracy) for accuracy in wanted]
    num_points = len(curve.cost_P)
    written_P = np.unique(np.linspace(0, num_points - 1, min(num_points, MAX_WRITTEN)).round().astype(int))
    return CurveSummary(
        name=name,
        costs=tuple(curve.cost_P[written_P].tolist()),
        accuracies=tuple(curve.accuracy_P[written_P].tolist()),
        accuracy_at=tuple(curve.accuracy_within(share * full_cost * (1 + _ROUNDING)) for share in SHARES_OF_FULL_COST),
        cost_at=cost_at,
        gap_closed=tuple(gap_closed(full_cost, mine, best) for mine, best in zip(cost_at, oracle_at, strict=True)),
        area=curve.area(start, full_cost),
    )


def curve_of(points: Iterable[MeasuredPoint], cost: str) -> Curve:
    """Give the front of some settings in `compute` or in `milliseconds`."""
    return Curve.of((getattr(point, cost), point.accuracy.value) for point in points)

"""Accuracy against compute: fronts, what is read off them, and anytime prediction.

A curve says what can be had within a budget: the best of its points that cost no more. It is a step, not a line: what
lies between two points was not measured.

Shapes: P = points, E = exits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
from offramp_contract.statistics import FloatArray

from offramp_calibration.front import pareto_front


class _Point(NamedTuple):
    compute: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A Pareto front of cost and accuracy.

    Attributes:
        cost_P: Average cost of an answer, rising: a share of the full path's FLOPs, or milliseconds.
        accuracy_P: Share of right answers, rising.
    """

    cost_P: FloatArray
    accuracy_P: FloatArray

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Self:
        """Keep the points that no other point beats: at least as right and at most as dear.

        Args:
            points: Pairs of cost and accuracy, at least one.
        """
        front = pareto_front(_Point(*point) for point in points)
        cost_P, accuracy_P = np.array(front, dtype=np.float64).T
        return cls(cost_P, accuracy_P)

    def accuracy_within(self, budget: float) -> float | None:
        """Give the best accuracy that a budget buys; None below the cheapest point."""
        num_affordable = np.searchsorted(self.cost_P, budget, side="right")
        return float(self.accuracy_P[num_affordable - 1]) if num_affordable else None

    def cost_for(self, accuracy: float) -> float | None:
        """Give the least cost that reaches an accuracy; None above the best point."""
        first = np.searchsorted(self.accuracy_P, accuracy, side="left")
        return float(self.cost_P[first]) if first < len(self.cost_P) else None

    def area(self, low: float, high: float) -> float | None:
        """Average the accuracy over the budgets from `low` to `high`; None where `low` buys nothing."""
        num_affordable = int(np.searchsorted(self.cost_P, low, side="right"))
        if not num_affordable or low > high:
            return None
        inside = slice(num_affordable, int(np.searchsorted(self.cost_P, high, side="left")))
        edges = [low, *self.cost_P[inside], high]
        return _mean_of_step(edges, self.accuracy_P[num_affordable - 1 : max(inside.stop, num_affordable)])


def common_start(curves: Iterable[Curve]) -> float:
    """Give the least budget that every curve has an answer for; a curve of one point does not count."""
    return max((float(curve.cost_P[0]) for curve in curves if len(curve.cost_P) > 1), default=0.0)


def anytime_auc(depth_E: FloatArray, accuracy_E: FloatArray) -> float:
    """Average the accuracy of the deepest exit within a budget over all budgets, from the first exit's cost to full.

    Args:
        depth_E: Share of the full path's FLOPs (or any cost) at each exit, rising.
        accuracy_E: Accuracy of each exit. The deepest counts, not the best: who stops the network at any time cannot
            know which would have been right.
    """
    if len(depth_E) < 2 or depth_E[-1] <= depth_E[0]:
        return float(accuracy_E[-1])
    return _mean_of_step(depth_E, accuracy_E[:-1])


def gap_closed(full: float, policy: float | None, oracle: float | None) -> float | None:
    """Say which share of what an oracle saves a policy saves too, at equal accuracy.

    Args:
        full: Cost of full depth.
        policy: Cost at which the policy reaches an accuracy, if it does.
        oracle: Cost at which the oracle reaches the same accuracy, if it does.

    Returns:
        (full - policy) / (full - oracle); None where either never gets there or there is nothing to save.
    """
    if policy is None or oracle is None or oracle >= full:
        return None
    return (full - policy) / (full - oracle)


def _mean_of_step(edges: Sequence[float] | FloatArray, heights: Sequence[float] | FloatArray) -> float:
    widths = [after - before for before, after in pairwise(edges)]
    if (total := sum(widths)) <= 0:
        return float(heights[-1])
    return float(sum(width * height for width, height in zip(widths, heights, strict=True)) / total)

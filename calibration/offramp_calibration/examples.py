"""Samples worth a look: the easy ones that left early, the hard ones that went deep, and where leaving early cost.

Shapes: N = samples, M = some of the samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from offramp_contract.statistics import BoolArray, FloatArray, IntArray
from scipy.special import expit

from offramp_calibration.replay import Replayed

MAX_EXAMPLES = 8
EXTREME_SHARE = 0.1
"""Of a gated network, so many samples count as those that ran least, and as many as those that ran most."""
Group: TypeAlias = Literal["early", "late", "cost"]


@dataclass(frozen=True, slots=True)
class Example:
    """One sample under the report's operating point.

    Attributes:
        group: `early`: left soonest, the surest first. `late`: went deepest, the least sure first. `cost`: answered
            wrong early, and full depth would have been right; the surest first.
        index: Its place in the data, 0-based.
        label: Name of its right class.
        prediction: What it was answered.
        full_depth: What full depth says.
        exit_index: Where it left.
        confidence: Probability that the answer was given there.
        log_odds: The same, which does not saturate; None if infinite.
    """

    group: Group
    index: int
    label: str
    prediction: str
    full_depth: str
    exit_index: int
    confidence: float
    log_odds: float | None


def pick_examples(replayed: Replayed, labels: Sequence[str] | None) -> tuple[Example, ...]:
    """Pick at most `MAX_EXAMPLES` of each group, of as many different right classes as there are."""
    outcomes, exit_N, is_gated = replayed.outcomes, replayed.exit_N, replayed.outcomes.depth_NE is not None
    log_odds_NE = np.stack([decision.log_odds_B for decision in outcomes.decision_E], axis=1)
    log_odds_N = np.take_along_axis(log_odds_NE, exit_N[:, None], axis=1)[:, 0]
    soonest_N, latest_N = exit_N == exit_N.min(), exit_N == exit_N.max()
    if is_gated:
        low, high = np.quantile(replayed.depth_N, (EXTREME_SHARE, 1 - EXTREME_SHARE))
        soonest_N, latest_N = replayed.depth_N <= low, replayed.depth_N >= high
    groups: dict[Group, tuple[BoolArray, FloatArray]] = {
        "early": (soonest_N & replayed.right_N, -log_odds_N),
        "late": (~soonest_N & latest_N, log_odds_N),
        "cost": (replayed.lost_N, -log_odds_N),
    }
    return tuple(
        _example(group, index, replayed, float(log_odds_N[index]), labels)
        for group, (of_N, order_by_N) in groups.items()
        for index in _varied(of_N, order_by_N, outcomes.label_N)
    )


def _varied(of_N: BoolArray, order_by_N: FloatArray, label_N: IntArray) -> list[int]:
    """Give samples of a group, the first in order of each class before a second of any."""
    rows_M = np.flatnonzero(of_N)
    sorted_M = rows_M[np.argsort(order_by_N[rows_M], kind="stable")]
    _, first_of_class = np.unique(label_N[sorted_M], return_index=True)
    is_first_M = np.zeros(len(sorted_M), dtype=bool)
    is_first_M[first_of_class] = True
    chosen: list[int] = [*sorted_M[is_first_M].tolist(), *sorted_M[~is_first_M].tolist()]
    return chosen[:MAX_EXAMPLES]


def _example(group: Group, index: int, replayed: Replayed, log_odds: float, labels: Sequence[str] | None) -> Example:
    outcomes = replayed.outcomes
    name = str if labels is None else labels.__getitem__
    return Example(
        group=group,
        index=index,
        label=name(int(outcomes.label_N[index])),
        prediction=name(int(replayed.class_N[index])),
        full_depth=name(int(outcomes.full_N[index])),
        exit_index=int(replayed.exit_N[index]),
        confidence=float(expit(np.float64(log_odds))),
        log_odds=log_odds if np.isfinite(log_odds) else None,
    )

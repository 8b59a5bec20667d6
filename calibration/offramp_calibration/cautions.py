"""What a reader must know before believing a report's numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from offramp_contract.calibration import Calibration
from offramp_contract.manifest import Manifest

from offramp_calibration.measured import BudgetResult, Proportion
from offramp_calibration.outcomes import Outcomes

FEW_SAMPLES = 1000
BUDGET_SLACK = 0.03
"""By how much the average compute may exceed what was asked before it is worth a word."""


@dataclass(frozen=True, slots=True)
class Caution:
    """One thing to know.

    Attributes:
        kind: `same_data` makes the numbers optimistic; the others say what is missing or how sure they are.
        sentence: For a person.
    """

    kind: Literal["same_data", "not_calibrated", "few_samples", "missing_classes", "over_budget"]
    sentence: str


def cautions_of(
    outcomes: Outcomes,
    manifest: Manifest,
    calibration: Calibration,
    *,
    data_digest: str,
    full_accuracy: Proportion,
    budgets: Sequence[BudgetResult],
) -> tuple[Caution, ...]:
    """Look for all that applies.

    Args:
        outcomes: What was evaluated.
        manifest: The bundle's.
        calibration: The bundle's.
        data_digest: Of the data that was evaluated.
        full_accuracy: Of full depth.
        budgets: What they came to.
    """
    return (
        *_of_calibration(calibration, data_digest, "gate" if manifest.gates else "confidence"),
        *_of_size(outcomes, manifest.exits[-1].num_classes, full_accuracy),
        *_of_budgets(budgets),
    )


def _of_calibration(calibration: Calibration, data_digest: str, swept: str) -> Iterator[Caution]:
    if not calibration.operating_points:
        yield Caution(
            "not_calibrated",
            "This bundle is not calibrated: temperatures are 1 and nothing answers a compute, accuracy or risk budget. "
            f"The curve below sweeps {swept} thresholds instead. To calibrate: offramp calibrate BUNDLE --data "
            "HELD_OUT, with data that is neither the training data nor this.",
        )
    if calibration.data_digest == data_digest:
        yield Caution(
            "same_data",
            "This is the data that the bundle was calibrated on. Thresholds and temperatures were chosen to look good "
            "on it, so every number here is optimistic, and a certificate that holds here proves nothing. Evaluate on "
            "data of its own.",
        )


def _of_size(outcomes: Outcomes, num_classes: int, full_accuracy: Proportion) -> Iterator[Caution]:
    num_samples = len(outcomes)
    if num_samples < FEW_SAMPLES:
        low, high = full_accuracy.interval
        yield Caution(
            "few_samples",
            f"These are {num_samples:,} samples only: full depth's accuracy is known no better than "
            f"{low:.1%} to {high:.1%}, and a difference smaller than that may be chance.",
        )
    num_missing = num_classes - len(np.unique(outcomes.label_N))
    if num_missing:
        yield Caution(
            "missing_classes",
            f"{num_missing:,} of the model's {num_classes:,} classes have no sample in this data; "
            "nothing here is about them.",
        )


def _of_budgets(budgets: Sequence[BudgetResult]) -> Iterator[Caution]:
    over = [
        f"{result.asked:.0%} came to {result.point.compute:.1%}"
        for result in budgets
        if result.point is not None and result.point.compute > result.asked + BUDGET_SLACK
    ]
    if over:
        yield Caution(
            "over_budget",
            f"On this data some budgets are exceeded by more than {100 * BUDGET_SLACK:.0f} percentage points: "
            f"{'; '.join(over)}. It is harder than the data that the bundle was calibrated on.",
        )

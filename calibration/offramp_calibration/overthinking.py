"""What running on costs: answers that were right before the network had finished.

Shallow-Deep Networks, https://arxiv.org/abs/1810.07052

Shapes: N = samples, E = exits.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from offramp_calibration.oracles import first_true_or_last
from offramp_calibration.outcomes import Outcomes


@dataclass(frozen=True, slots=True)
class Overthinking:
    """Shares of all samples.

    Attributes:
        wasteful: Right at the end, and right at an earlier exit already.
        destructive: Right at an earlier exit, wrong at the end.
        never_right: Wrong at every exit.
        lasting: Per exit, first right there, and right at the end.
        lost: Per exit, first right there, and wrong at the end.
    """

    wasteful: float
    destructive: float
    never_right: float
    lasting: tuple[float, ...]
    lost: tuple[float, ...]

    @classmethod
    def of(cls, outcomes: Outcomes) -> Self:
        """Count it."""
        right_NE = outcomes.right_NE
        first_N, ends_right_N = first_true_or_last(right_NE), right_NE[:, -1]
        lost_N = right_NE.any(axis=1) & ~ends_right_N

        def share_E(of_N: np.ndarray) -> tuple[float, ...]:
            counts_E = np.bincount(first_N[of_N], minlength=outcomes.num_exits)
            return tuple((counts_E / len(outcomes)).tolist())

        return cls(
            wasteful=float((ends_right_N & (first_N < outcomes.num_exits - 1)).mean()),
            destructive=float(lost_N.mean()),
            never_right=float((~right_NE.any(axis=1)).mean()),
            lasting=share_E(ends_right_N),
            lost=share_E(lost_N),
        )

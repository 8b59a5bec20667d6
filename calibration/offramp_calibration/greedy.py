"""A threshold of its own for every exit, found by a greedy walk from full depth to the first exit.

Every step lowers one exit's threshold a little: the one that saves the most compute for the accuracy it costs. So the
settings form a one-dimensional family in which samples only ever leave earlier: the walk that certificates are made
along.

Shapes: N = samples, E = exits, K = E - 1 exits that decide, J = cuts of one exit.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec, PolicySpec
from offramp_contract.statistics import FloatArray

from offramp_calibration.outcomes import Outcomes
from offramp_calibration.thresholds import NEVER, as_certain, confidence_of, cuts_between

LEAST_CUTS_PER_EXIT: Final = 4


def greedy_family(outcomes: Outcomes, num_steps: int) -> tuple[PolicySpec, ...]:
    """Walk from full depth to the first exit, each step the best Δaccuracy / Δcompute.

    Args:
        outcomes: The samples to walk on; none of them may serve to certify the family.
        num_steps: At most how many settings to give.

    Returns:
        The final exit always, then confidence thresholds, falling: no sample leaves later at the next than at one.
    """
    full_depth = FixedSpec(exit=outcomes.num_exits - 1)
    if outcomes.num_exits == 1:
        return (full_depth,)
    walk = _Walk(outcomes, max(LEAST_CUTS_PER_EXIT, num_steps // (outcomes.num_exits - 1)))
    specs = [ConfidenceSpec(threshold=thresholds) for thresholds in walk]
    # Part of a walk, in its order, is a walk.
    kept = np.unique(np.linspace(0, len(specs) - 1, min(len(specs), num_steps - 1)).round().astype(int))
    return (full_depth, *(specs[index] for index in kept))


class _Walk:
    """The state of the walk: where each threshold stands, and where each sample leaves."""

    def __init__(self, outcomes: Outcomes, cuts_per_exit: int) -> None:
        self._right_NE = outcomes.right_NE.astype(np.int64)
        self._depth_NE = outcomes.sample_depth_NE
        self._exit_N = np.full(len(outcomes), outcomes.num_exits - 1)
        self._cut_KJ: list[FloatArray] = []
        reached_NK = []
        for decision in outcomes.decision_E[:-1]:
            score_N = as_certain(decision.log_odds_B)
            rising_J = cuts_between(score_N, np.linspace(0, 1, cuts_per_exit + 1)[1:-1])
            cut_J = np.concatenate([rising_J[::-1], [-np.inf]])
            self._cut_KJ.append(cut_J)
            reached_NK.append(np.searchsorted(-cut_J, -score_N))
        self._reached_NK = np.stack(reached_NK, axis=1)
        """The first, so the highest, cut of each exit that a sample reaches."""
        self._num_open_K = np.zeros(len(self._cut_KJ), dtype=np.int64)
        """How many cuts of each exit are passed: a sample leaves that reaches one of them."""

    def __iter__(self) -> Iterator[tuple[float, ...]]:
        """Give the thresholds after every step, until all samples leave at the first exit."""
        while (best := self._best_step()) is not None:
            exit_index, end = best
            while self._num_open_K[exit_index] < end:
                if self._open_next_cut(exit_index):
                    yield self._thresholds()

    def _best_step(self) -> tuple[int, int] | None:
        """Look as far ahead as pays best at every exit; give an exit and the number of cuts to have open there."""
        best_value, best = -np.inf, None
        for exit_index, cut_J in enumerate(self._cut_KJ):
            opened = self._num_open_K[exit_index]
            later_N = self._exit_N > exit_index
            reached_M, exit_M = self._reached_NK[later_N, exit_index], self._exit_N[later_N]
            if not len(reached_M):
                continue
            saved_M = self._depth_NE[later_N, exit_M] - self._depth_NE[later_N, exit_index]
            gained_M = self._right_NE[later_N, exit_index] - self._right_NE[later_N, exit_M]
            saved_J = np.cumsum(np.bincount(reached_M, saved_M, len(cut_J))[opened:])
            gained_J = np.cumsum(np.bincount(reached_M, gained_M, len(cut_J))[opened:])
            # Exits that cost the same save nothing between them; one that gains nothing either is worth a step all the
            # same, since the walk has to end.
            value_J = np.where(saved_J > 0, gained_J / np.maximum(saved_J, 1e-12), -np.inf)
            ahead = int(value_J.argmax())
            if best is None or value_J[ahead] > best_value:
                best_value, best = value_J[ahead], (exit_index, int(opened) + ahead + 1)
        return best

    def _open_next_cut(self, exit_index: int) -> bool:
        """Pass one more cut; give whether any sample leaves earlier for it."""
        reaches_N = self._reached_NK[:, exit_index] == self._num_open_K[exit_index]
        leaves_N = reaches_N & (self._exit_N > exit_index)
        self._exit_N[leaves_N] = exit_index
        self._num_open_K[exit_index] += 1
        return bool(leaves_N.any())

    def _thresholds(self) -> tuple[float, ...]:
        return tuple(
            NEVER if opened == 0 else confidence_of(cut_J[opened - 1])
            for cut_J, opened in zip(self._cut_KJ, self._num_open_K.tolist(), strict=True)
        )

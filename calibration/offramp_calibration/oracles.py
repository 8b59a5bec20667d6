"""What the best possible rule would do: no policy of this network can be better, and the gap says how much is left.

Shapes: N = samples, E = exits.
"""

import numpy as np
from offramp_contract.policy import Reason
from offramp_contract.statistics import BoolArray, IntArray

from offramp_calibration.curves import Curve
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import Replayed


def label_oracle(outcomes: Outcomes) -> Replayed:
    """Let every sample leave at the first exit that is right, and at the last if none is (survey eq. 9)."""
    return _leaving_at(first_true_or_last(outcomes.right_NE), outcomes)


def agreement_oracle(outcomes: Outcomes) -> Replayed:
    """Let every sample leave at the first exit that says what the final one says: full depth's answers, for less."""
    return _leaving_at(first_true_or_last(outcomes.agrees_NE), outcomes)


def label_oracle_curve(outcomes: Outcomes) -> Curve:
    """Give the least cost that any choice of exits needs for an accuracy, one point per number of right answers.

    Who knows the labels answers the samples that are right soonest at that exit and all others at the first. Every
    replay of every policy lies on or below this curve. Unlike the label oracle of eq. 9 it wastes nothing on samples
    that no exit gets right, and it can be read at any accuracy.
    """
    ever_right_N = outcomes.right_NE.any(axis=1)
    first_right_N = first_true_or_last(outcomes.right_NE)[ever_right_N]
    extra_R = np.sort(outcomes.depth_E[first_right_N] - outcomes.depth_E[0])
    num_samples, num_free = len(outcomes), int((extra_R <= 0).sum())
    num_right_P = np.arange(num_free, len(extra_R) + 1)
    spent_P = np.concatenate([[0.0], np.cumsum(extra_R[num_free:])])
    return Curve(outcomes.depth_E[0] + spent_P / num_samples, num_right_P / num_samples)


def first_true_or_last(mask_NE: BoolArray) -> IntArray:
    """Give the first exit where a mask holds, the last exit where it holds nowhere."""
    first_N: IntArray = np.where(mask_NE.any(axis=1), mask_NE.argmax(axis=1), mask_NE.shape[1] - 1)
    return first_N


def _leaving_at(exit_N: IntArray, outcomes: Outcomes) -> Replayed:
    is_final_N = exit_N == outcomes.num_exits - 1
    return Replayed(outcomes, exit_N, np.where(is_final_N, np.int8(Reason.FINAL), np.int8(Reason.DEPTH_CAP)))

"""The budgeted-batch solver of MSDNet: thresholds that spend a given compute on average (https://arxiv.org/abs/1703.09844).

Of n samples, a share q_k proportional to r^k is to leave at exit k. For k = 1 .. E-1 in order, the threshold of exit k
is the floor(n q_k)-th largest score among the samples that have not left, and every sample that reaches it leaves. The
greater r, the later samples leave: the r for a budget is found by bisection.

Shapes: N = samples, E = exits, K = E - 1 exits that decide.
"""

import math
from dataclasses import dataclass

import numpy as np
from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import ConfidenceSpec
from offramp_contract.statistics import FloatArray

from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_calibration.thresholds import ALWAYS, NEVER, as_certain, confidence_of

# Beyond, the shares of all exits but one are 0 in float64 for any number of samples a trace may have.
_MAX_LOG_RATIO = 50.0
_NUM_HALVINGS = 26


@dataclass(frozen=True, slots=True)
class Solution:
    """Thresholds for a budget.

    Attributes:
        policy: A confidence threshold per exit that decides.
        ratio: The r that it came from.
        target: The compute that the shares q_k aim at.
        realised: The compute on the samples it was solved on, at most the budget. It differs from the target, as the
            compute on other samples will: shares are rounded down to whole samples, and samples of equal score leave
            together.
    """

    policy: ConfidenceSpec
    ratio: float
    target: float
    realised: float


def solve(outcomes: Outcomes, budget: float) -> Solution:
    """Find the thresholds of the greatest r whose compute on these samples is within a budget.

    Args:
        outcomes: What the exits decided.
        budget: Average share of the full path's FLOPs, at most 1.

    Raises:
        InvalidValue: If the budget does not pay for the first exit, or is above 1.
    """
    least = float(outcomes.mean_depth_E[0])
    if not least <= budget <= 1:
        raise InvalidValue(f"compute: must be {least:g}, the cost of the first exit, to 1; got {budget:g}", "compute")
    score_NK = np.stack([as_certain(decision.log_odds_B) for decision in outcomes.decision_E], axis=1)[:, :-1]
    low, high = -_MAX_LOG_RATIO, _MAX_LOG_RATIO
    best = _at_ratio(outcomes, score_NK, low)
    if (dearest := _at_ratio(outcomes, score_NK, high)).realised <= budget:
        return dearest
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        solution = _at_ratio(outcomes, score_NK, middle)
        if solution.realised <= budget:
            low, best = middle, solution
        else:
            high = middle
    return best


def exit_shares(log_ratio: float, num_exits: int) -> FloatArray:
    """Give the shares q_k proportional to r^k, shape (E,); they add up to 1."""
    exponent_E = log_ratio * np.arange(num_exits)
    weight_E = np.exp(exponent_E - exponent_E.max())
    shares_E: FloatArray = weight_E / weight_E.sum()
    return shares_E


def thresholds_for(score_NK: FloatArray, share_E: FloatArray) -> tuple[float, ...]:
    """Choose thresholds that let given shares of the samples leave, exit by exit.

    A share of less than one sample shuts its exit. Where ties let more samples leave before than they should, fewer may
    be left than an exit's share: then all of them leave there.

    Args:
        score_NK: Log-odds at each exit that decides.
        share_E: Share of all samples that is to leave at each exit.

    Returns:
        Probabilities, one per exit that decides, each between the last score that leaves and the first that stays.
    """
    waiting_N = np.arange(len(score_NK))
    thresholds = []
    for score_N, share in zip(score_NK.T, share_E, strict=False):
        num_leaving = min(math.floor(len(score_NK) * share), len(waiting_N))
        if num_leaving == 0:
            thresholds.append(NEVER)
            continue
        score_W = score_N[waiting_N]
        last = np.partition(score_W, -num_leaving)[-num_leaving]
        stays_W = score_W < last
        thresholds.append(confidence_of((last + score_W[stays_W].max()) / 2) if stays_W.any() else ALWAYS)
        waiting_N = waiting_N[stays_W]
    return tuple(thresholds)


def _at_ratio(outcomes: Outcomes, score_NK: FloatArray, log_ratio: float) -> Solution:
    share_E = exit_shares(log_ratio, outcomes.num_exits)
    policy = ConfidenceSpec(threshold=thresholds_for(score_NK, share_E))
    realised = replay(policy, outcomes).compute
    return Solution(policy, math.exp(log_ratio), float(share_E @ outcomes.mean_depth_E), realised)

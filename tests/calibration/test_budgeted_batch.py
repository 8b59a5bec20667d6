"""The budgeted-batch solver equals a slow one written from its description, traps included."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from offramp_calibration.budgeted_batch import exit_shares, solve, thresholds_for
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import ConfidenceSpec

MakeOutcomes = Callable[..., Outcomes]


def leave_slowly(scores: Sequence[Sequence[float]], shares: Sequence[float]) -> list[int]:
    """Give the exit of every sample, as the description says it.

    For k = 1 .. E-1 in order: among samples that have not left, tau_k is the floor(n q_k)-th largest score; every
    sample with s_k >= tau_k leaves; the rest leave at the last exit. There is no 0th largest: nobody leaves then.
    """
    num_samples, last = len(scores), len(shares) - 1
    left_at: list[int | None] = [None] * num_samples
    for k in range(last):
        waiting = [i for i in range(num_samples) if left_at[i] is None]
        rank = math.floor(num_samples * shares[k])
        falling = sorted((scores[i][k] for i in waiting), reverse=True)
        if rank == 0 or not falling:
            continue
        tau = falling[min(rank, len(falling)) - 1]
        for i in waiting:
            if scores[i][k] >= tau:
                left_at[i] = k
    return [last if exit_index is None else exit_index for exit_index in left_at]


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    """Scores with many ties, and shares of which some come to less than one sample."""
    num_samples, num_exits = draw(st.integers(1, 30)), draw(st.integers(2, 5))
    score = st.integers(-4, 8).map(float) | st.integers(-256, 1280).map(lambda value: value / 64)
    scores = draw(st.lists(st.lists(score, min_size=num_exits, max_size=num_exits), min_size=num_samples, max_size=30))
    return scores, exit_shares(draw(st.floats(-4, 4)), num_exits).tolist()


@given(scored())
@example(([[1.0, 1.0, 0.0]] * 5, [0.2, 0.3, 0.5]))
def test_the_samples_leave_where_the_description_says(
    make_outcomes: MakeOutcomes, drawn: tuple[list[list[float]], list[float]]
) -> None:
    scores, shares = drawn
    outcomes = make_outcomes(scores)
    score_NK = np.array(scores, dtype=np.float32).astype(float)[:, :-1]
    policy = ConfidenceSpec(threshold=thresholds_for(score_NK, np.array(shares)))
    assert replay(policy, outcomes).exit_N.tolist() == leave_slowly(score_NK.tolist(), shares)


@given(drawn=scored(), budget=st.floats(0.0, 1.0))
def test_the_ratio_is_the_greatest_that_keeps_the_budget(
    make_outcomes: MakeOutcomes, drawn: tuple[list[list[float]], list[float]], budget: float
) -> None:
    outcomes = make_outcomes(drawn[0])
    least = float(outcomes.depth_E[0])
    budget = least + budget * (1 - least)
    solution = solve(outcomes, budget)
    assert solution.realised <= budget + 1e-12
    assert replay(solution.policy, outcomes).compute == solution.realised
    dearer = solution.ratio * (1 + 1e-4)
    if dearer < math.exp(49):
        shares = exit_shares(math.log(dearer), outcomes.num_exits).tolist()
        scores = np.stack([decision.log_odds_B for decision in outcomes.decision_E], axis=1).astype(float)[:, :-1]
        exits = leave_slowly(scores.tolist(), shares)
        # Whole samples: a slightly greater r moves a sample or none.
        one_sample = 1.0 / len(outcomes)
        assert np.mean(outcomes.depth_E[exits]) > budget - one_sample or exits == replay_exits(
            solution.policy, outcomes
        )


def replay_exits(policy: ConfidenceSpec, outcomes: Outcomes) -> list[int]:
    exits: list[int] = replay(policy, outcomes).exit_N.tolist()
    return exits


def test_a_share_below_one_sample_shuts_its_exit(make_outcomes: MakeOutcomes) -> None:
    score_NK = np.array([[9.0], [8.0], [7.0]])
    assert thresholds_for(score_NK, np.array([0.33, 0.67])) == (1.0,)
    opened = thresholds_for(score_NK, np.array([0.34, 0.66]))
    assert replay_exits(ConfidenceSpec(threshold=opened), make_outcomes([[9, 0], [8, 0], [7, 0]])) == [0, 1, 1]


def test_equal_scores_leave_together(make_outcomes: MakeOutcomes) -> None:
    outcomes = make_outcomes([[5, 0, 0], [5, 0, 0], [5, 9, 0], [1, 8, 0]])
    thresholds = thresholds_for(np.array([[5.0, 0], [5, 0], [5, 9], [1, 8]]), np.array([0.25, 0.5, 0.25]))
    # One should leave first and three do; two should leave next and only one is there to.
    assert replay_exits(ConfidenceSpec(threshold=thresholds), outcomes) == [0, 0, 0, 1]


def test_scores_that_float64_cannot_tell_apart_count_as_equal(make_outcomes: MakeOutcomes) -> None:
    outcomes = make_outcomes([[40, 0], [35, 0], [31, 0], [2, 0]])
    solution = solve(outcomes, 0.7)
    assert solution.realised == pytest.approx((3 * 0.5 + 1) / 4)


def test_no_threshold_stands_on_a_score(outcomes: Outcomes) -> None:
    thresholds = solve(outcomes, 0.5).policy.threshold
    assert isinstance(thresholds, tuple)
    for threshold, decision in zip(thresholds, outcomes.decision_E, strict=False):
        cut = math.log(threshold / (1 - threshold))
        assert np.abs(decision.log_odds_B - cut).min() > 1e-7


def test_ratios_above_one_spend_the_upper_half_of_the_budgets(outcomes: Outcomes) -> None:
    assert solve(outcomes, 0.3).ratio < 1 < solve(outcomes, 0.8).ratio


def test_more_budget_means_a_greater_ratio_and_more_compute(outcomes: Outcomes) -> None:
    solutions = [solve(outcomes, budget) for budget in np.linspace(outcomes.depth_E[0], 1, 12).tolist()]
    ratios, computes = [s.ratio for s in solutions], [s.realised for s in solutions]
    assert ratios == sorted(ratios)
    assert computes == sorted(computes)
    assert computes[0] == pytest.approx(outcomes.depth_E[0])
    assert computes[-1] == 1


def test_target_and_realised_compute_are_both_told(outcomes: Outcomes) -> None:
    solution = solve(outcomes, 0.6)
    assert solution.realised == pytest.approx(0.6, abs=2e-3)
    assert solution.target == pytest.approx(solution.realised, abs=5e-3)


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.01, math.nan])
def test_a_budget_that_does_not_pay_for_the_first_exit_or_is_above_all_is_refused(
    outcomes: Outcomes, budget: float
) -> None:
    with pytest.raises(InvalidValue, match="the cost of the first exit") as refused:
        solve(outcomes, budget)
    assert refused.value.field == "compute"

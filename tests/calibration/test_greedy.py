"""The greedy walk: from full depth to the first exit, samples only ever leave earlier, the best savings first."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from offramp_calibration.greedy import greedy_family
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_calibration.sweep import confidence_thresholds
from offramp_calibration.trace import Trace
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec, PolicySpec

MakeTrace = Callable[..., Trace]


def thresholds_of(spec: PolicySpec) -> np.ndarray:
    assert isinstance(spec, ConfidenceSpec)
    return np.array(spec.threshold)


@pytest.mark.parametrize(("num_exits", "num_steps"), [(2, 40), (5, 200), (5, 8), (12, 50), (40, 30)])
def test_samples_only_ever_leave_earlier(make_trace: MakeTrace, num_exits: int, num_steps: int) -> None:
    chosen_on, others = Outcomes.of(make_trace(600, num_exits)), Outcomes.of(make_trace(600, num_exits, seed=1))
    walk = greedy_family(chosen_on, num_steps)
    assert walk[0] == FixedSpec(exit=num_exits - 1)
    assert 2 <= len(walk) <= num_steps
    for before, after in pairwise(walk[1:]):
        assert (thresholds_of(after) <= thresholds_of(before)).all()
    for outcomes in (chosen_on, others):
        exit_LN = np.stack([replay(spec, outcomes).exit_N for spec in walk])
        assert (np.diff(exit_LN, axis=0) <= 0).all()
    assert (replay(walk[-1], others).exit_N == 0).all()


def test_every_step_moves_somebody(outcomes: Outcomes) -> None:
    walk = greedy_family(outcomes, 200)
    computes = [replay(spec, outcomes).compute for spec in walk]
    assert (np.diff(computes) < 0).all()
    assert len(walk) > 100


def test_a_step_lowers_one_threshold_unless_another_moves_nobody(outcomes: Outcomes) -> None:
    walk = greedy_family(outcomes, 400)
    changed = [(thresholds_of(before) != thresholds_of(after)).sum() for before, after in pairwise(walk[1:])]
    assert np.mean(np.array(changed) == 1) > 0.95


def test_the_exit_that_costs_no_accuracy_opens_first(make_outcomes: Callable[..., Outcomes]) -> None:
    scores = [[level, level, 0.0] for level in range(20)]
    # The first exit is always wrong, the second as good as the last.
    outcomes = make_outcomes(scores, [[False, True, True]] * 20)
    walk = greedy_family(outcomes, 40)
    replays = [replay(spec, outcomes) for spec in walk]
    cheapest_right = min(replayed.compute for replayed in replays if replayed.accuracy == 1)
    assert cheapest_right == pytest.approx(2 / 3)


def test_it_looks_past_a_poor_step_to_a_good_one(make_outcomes: Callable[..., Outcomes]) -> None:
    # The surest sample is wrong at both early exits; of the others all are right at the first, half at the second.
    scores = [[20.0 - row, 20.0 - row, 0.0] for row in range(20)]
    right = [[row > 0, row % 2 == 1, True] for row in range(20)]
    outcomes = make_outcomes(scores, right)
    best = max(replay(spec, outcomes).accuracy for spec in greedy_family(outcomes, 60)[-1:])
    assert best == pytest.approx(0.95)
    for spec in greedy_family(outcomes, 60):
        assert replay(spec, outcomes).exit_rates_E[1] == 0


def test_on_new_samples_it_is_no_worse_than_one_threshold_for_all_exits(make_trace: MakeTrace) -> None:
    chosen_on, others = Outcomes.of(make_trace(8000)), Outcomes.of(make_trace(8000, seed=1))
    vectors = [replay(spec, others) for spec in greedy_family(chosen_on, 200)]
    scalars = [replay(ConfidenceSpec(threshold=t), others) for t in confidence_thresholds(chosen_on, 200)]
    for budget in (0.3, 0.4, 0.5, 0.6):
        best_vector = max(replayed.accuracy for replayed in vectors if replayed.compute <= budget)
        best_scalar = max(replayed.accuracy for replayed in scalars if replayed.compute <= budget)
        assert best_vector > best_scalar - 0.002


def test_one_exit_is_a_walk_of_its_own(make_trace: MakeTrace) -> None:
    assert greedy_family(Outcomes.of(make_trace(20, 1, depth_E=[1.0])), 50) == (FixedSpec(exit=0),)


def test_exits_of_equal_cost_still_come_to_an_end(make_trace: MakeTrace) -> None:
    outcomes = Outcomes.of(make_trace(200, 3, depth_E=[1.0, 1.0, 1.0]))
    assert (replay(greedy_family(outcomes, 50)[-1], outcomes).exit_N == 0).all()

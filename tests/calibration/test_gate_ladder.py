"""Which gate thresholds are tried: all that make a difference, no more than asked for, chosen where none certifies."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_calibration.calibrate import CalibrationSettings, split
from offramp_calibration.gate_ladder import LEAST_STEPS, MAX_STEPS, in_order, ladder, ladder_rows
from offramp_contract.errors import InvalidValue

SCORED = SimpleNamespace(priority=None)


def network(*gates):
    return SimpleNamespace(gates=gates)


def choice(*priorities):
    return network(*(SimpleNamespace(priority=priority) for priority in priorities))


def scores(rows, columns, seed=0):
    return np.random.default_rng(seed).uniform(0.01, 0.99, (rows, columns)).astype(np.float32)


@settings(deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 4), st.integers(LEAST_STEPS, 20), st.sampled_from([0, 1, 2]), st.integers(0, 9)
)
def test_rungs_rise_are_bounded_and_lie_on_no_score(num_rows, num_gates, num_steps, decimals, seed):
    score_MG = scores(num_rows, num_gates, seed)
    if decimals:
        score_MG = np.round(score_MG, decimals)

    full, own, *rising = ladder(network(*[SCORED] * num_gates), score_MG, num_steps)

    assert (full, own) == (0.0, None)
    assert 2 + len(rising) <= num_steps
    assert rising == sorted(set(rising))
    assert all(0 < threshold <= 1 for threshold in rising)
    assert not set(rising[:-1]) & set(score_MG.ravel().astype(float).tolist())
    if score_MG.max() < 1:
        assert rising[-1] == 1.0


@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.9, 1.0]), min_size=1, max_size=8), st.integers(10, 20))
def test_where_depth_is_the_callers_choice_there_is_a_rung_for_every_priority(priorities, num_steps):
    rungs = ladder(choice(*priorities), np.full((5, len(priorities)), np.nan, np.float32), num_steps)

    num_open = [sum(priority >= rung for priority in priorities) for rung in rungs if rung is not None]
    assert num_open == sorted(set(num_open), reverse=True), "every rung shuts one priority more"
    can_shut = [priority for priority in set(priorities) if priority < 1]
    assert len(num_open) == 1 + len(can_shut)


def test_a_few_distinct_scores_have_a_rung_between_every_two():
    hard = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    assert ladder(network(SCORED, SCORED), hard) == (0.0, None, 0.5)


def test_many_priorities_are_thinned_to_the_steps_asked_for():
    rungs = ladder(choice(*np.linspace(0.1, 0.9, 50).tolist()), np.full((3, 50), np.nan, np.float32), 8)
    assert len(rungs) == 8
    assert rungs[-1] == 1.0


def test_scores_and_priorities_share_a_ladder():
    mixed = network(SCORED, SimpleNamespace(priority=0.95))
    rungs = ladder(mixed, np.array([[0.1, np.nan], [0.3, np.nan]], np.float32), 12)
    assert rungs == (0.0, None, pytest.approx(0.2), pytest.approx(0.625), 1.0)


@pytest.mark.parametrize("num_steps", [LEAST_STEPS - 1, MAX_STEPS + 1])
def test_so_few_or_many_steps_are_refused(num_steps):
    with pytest.raises(InvalidValue, match=f"gate_steps must be 3 to 64; got {num_steps}"):
        ladder(network(SCORED), scores(5, 1), num_steps)


def test_thresholds_that_are_named_are_recorded_once_each_beside_all_open_and_the_networks_own():
    assert in_order([0.7, None, 0.2, 0.7]) == (0.0, None, 0.2, 0.7)
    assert in_order([]) == (0.0, None)


@given(st.integers(2, 400), st.integers(0, 20), st.floats(0.05, 0.95))
def test_the_samples_that_choose_the_ladder_never_certify(num_samples, seed, fitting_share):
    chosen_on = ladder_rows(num_samples)
    rows_a, rows_b = split(num_samples, CalibrationSettings(seed=seed, fitting_share=fitting_share), chosen_on)

    assert not set(chosen_on) & set(rows_b.tolist())
    assert sorted([*rows_a, *rows_b]) == list(range(num_samples))
    assert len(rows_b) >= 1

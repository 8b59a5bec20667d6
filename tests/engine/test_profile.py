"""The profile's laws: what it predicts from what it has seen."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_server.profile import DISPATCHES_AHEAD, Profile
from offramp_server.stage_profile import OUTLIER, TRIAL_EVERY, StageProfile

SIZES = (1, 2, 4, 8, 16)
seconds = st.floats(1e-5, 1.0)
observations = st.lists(st.tuples(st.integers(1, 20), seconds), max_size=60)


def profile_of(cost, max_batch=16):
    profile = StageProfile(max_batch)
    for size in (s for s in SIZES if s <= max_batch):
        profile.calibrate(size, [cost(size)] * 5)
    return profile


def calibrated(timings, max_batch=16):
    profile = StageProfile(max_batch)
    for size, timing in zip(SIZES, timings, strict=True):
        profile.calibrate(size, timing)
    return profile


timings = st.lists(st.lists(seconds, min_size=1, max_size=5), min_size=5, max_size=5)


@given(timings, observations, st.integers(1, 40))
def test_the_bound_is_above_the_mean_and_both_are_positive(timed, observed, batch):
    profile = calibrated(timed)
    for size, took in observed:
        profile.observe(size, took)
    assert 0.0 < profile.mean_s(batch) < profile.bound_s(batch)


@given(timings, observations)
def test_a_larger_batch_is_never_predicted_to_be_faster(timed, observed):
    profile = calibrated(timed)
    for size, took in observed:
        profile.observe(size, took)
    means = [profile.mean_s(batch) for batch in range(1, 40)]
    assert all(smaller <= larger * (1 + 1e-9) for smaller, larger in pairwise(means))


@given(timings, observations)
def test_the_knee_is_a_batch_size(timed, observed):
    profile = calibrated(timed)
    for size, took in observed:
        profile.observe(size, took)
    assert 1 <= profile.knee <= 16


def test_between_profiled_sizes_and_beyond_the_last_the_mean_is_linear():
    profile = profile_of(lambda size: 1.0 + size)
    assert profile.mean_s(3) == pytest.approx(4.0)
    assert profile.mean_s(12) == pytest.approx(13.0)
    assert profile.mean_s(32) == pytest.approx(33.0)


def test_one_profiled_size_predicts_in_proportion():
    profile = StageProfile(16)
    profile.calibrate(1, [0.5])
    assert profile.mean_s(1) == 0.5
    assert profile.mean_s(8) == pytest.approx(4.0)


def test_the_median_run_counts_so_that_one_slow_run_does_not_spoil_the_calibration():
    profile = StageProfile(16)
    profile.calibrate(1, [0.1, 0.1, 9.0, 0.1, 0.1])
    assert profile.mean_s(1) == 0.1


def test_timings_that_scatter_widen_the_bound():
    steady, scattered = StageProfile(1), StageProfile(1)
    steady.calibrate(1, [1.0, 1.0, 1.0])
    scattered.calibrate(1, [0.5, 1.0, 1.5])
    assert steady.mean_s(1) == scattered.mean_s(1)
    assert steady.bound_s(1) < scattered.bound_s(1)


@pytest.mark.parametrize("batch", [1, 3, 8, 16])
@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 10.0, 1000.0])
def test_a_lasting_change_is_learnt(batch, factor):
    profile = profile_of(lambda size: 0.01 * size)
    after = 0.01 * batch * factor
    for _ in range(400):
        profile.observe(batch, after)
    assert profile.mean_s(batch) == pytest.approx(after, rel=0.05)
    assert profile.bound_s(batch) == pytest.approx(after, rel=0.3)


def test_a_single_blip_moves_the_mean_by_no_more_than_an_outlier_may():
    slow, slower = profile_of(lambda size: 0.01), profile_of(lambda size: 0.01)
    slow.observe(1, 0.01 * OUTLIER)
    slower.observe(1, 60.0)
    assert slower.mean_s(1) == slow.mean_s(1) < 0.0125


def test_after_a_blip_the_prediction_comes_back():
    profile = profile_of(lambda size: 0.01)
    profile.observe(1, 60.0)
    for _ in range(200):
        profile.observe(1, 0.01)
    assert profile.mean_s(1) == pytest.approx(0.01, rel=0.01)
    assert profile.bound_s(1) < 0.012


def test_an_observation_leaves_distant_batch_sizes_alone():
    profile = profile_of(lambda size: 0.01 * size)
    profile.observe(3, 0.05)
    assert profile.mean_s(1) == pytest.approx(0.01)
    assert profile.mean_s(16) == pytest.approx(0.16)
    assert profile.mean_s(2) > 0.02
    assert profile.mean_s(4) > 0.04


def test_a_size_seen_often_never_wears_down_its_neighbour():
    """Size 2 is as fast as size 1: however often both are seen, what lies between 2 and 4 stays predicted."""
    profile = profile_of(lambda size: 0.01 * size)
    for _ in range(2000):
        profile.observe(1, 0.03)
        profile.observe(2, 0.025)
    assert profile.mean_s(2) == pytest.approx(0.03, rel=0.25)
    assert profile.mean_s(3) >= profile.mean_s(2)


def test_the_knee_of_a_cost_linear_in_the_batch_is_one_row():
    assert profile_of(lambda size: 0.01 * size).knee == 1


def test_the_knee_of_a_cost_that_does_not_grow_is_the_largest_batch_that_counts():
    assert profile_of(lambda size: 0.01).knee == 16  # 95 % of 16 is not reached by 15


def test_the_knee_of_a_saturating_cost_is_the_least_size_at_95_percent_of_the_peak():
    cost = {size: 0.01 if size <= 4 else 0.01 * size / 4 for size in SIZES}
    assert profile_of(cost.__getitem__).knee == 4


def test_the_knee_never_passes_the_models_largest_batch():
    assert profile_of(lambda size: 0.01, max_batch=4).knee == 4


def test_the_knee_follows_what_is_observed():
    profile = profile_of(lambda size: 0.01)
    for _ in range(256):
        for size in SIZES:
            profile.observe(size, 0.01 * size)
    assert profile.knee <= 2


def test_the_next_answer_is_as_far_as_the_next_exit(scripted):
    profile = scripted(lambda stage, rows: 0.01 * (stage + 1), num_stages=4, exit_stages=(1, 3))
    bound = [profile.bound_s(stage, 1) for stage in range(4)]
    assert profile.to_next_answer_s(0, 1) == pytest.approx(bound[0] + bound[1])
    assert profile.to_next_answer_s(1, 1) == pytest.approx(bound[1])
    assert profile.to_next_answer_s(2, 1) == pytest.approx(bound[2] + bound[3])
    assert profile.first_answer_stage() == 1


def gated_profile(cost=lambda stage, rows: 0.01 * (stage + 1)):
    """Profile trunk 0, bodies 1 and 2, trunk 3 with an exit, body 4, trunk 5 and trunk 6 with the last exit."""
    profile = Profile([3, 6], 7, 8, gated_stages=(1, 2, 4))
    for index, stage in enumerate(profile.stages):
        for batch in (1, 8):
            stage.calibrate(batch, [cost(index, batch)])
    return profile


def test_the_least_that_a_row_must_run_to_its_next_exit_is_the_trunk():
    profile = gated_profile()
    bound = [profile.bound_s(stage, 8) for stage in range(7)]
    expected = [(0, 3), (1, 3), (2, 3), (3,), (4, 5, 6), (5, 6), (6,)]
    for stage, path in enumerate(expected):
        assert profile.to_next_answer_s(stage, 8) == pytest.approx(sum(bound[s] for s in path)), stage
    assert [profile.trunk_from(stage) for stage in range(7)] == [0, 3, 3, 3, 5, 5, 6]
    assert [profile.is_gated(stage) for stage in range(7)] == [False, True, True, False, True, False, False]


def test_the_way_to_the_next_exit_follows_what_is_observed():
    profile = gated_profile()
    before = profile.to_next_answer_s(4, 1)
    for _ in range(256):
        profile.stages[5].observe(1, 0.6)
    assert profile.to_next_answer_s(4, 1) > before + 0.5
    assert profile.to_next_answer_s(5, 1) == pytest.approx(profile.bound_s(5, 1) + profile.bound_s(6, 1))


def test_the_open_rate_is_that_of_the_last_rows():
    profile = gated_profile()
    assert [profile.open_rate(stage) for stage in range(7)] == [1.0] * 7
    for _ in range(500):
        profile.observe_gates(range(1, 2), 2, 3)
        profile.observe_gates(range(1, 3), 3, 1)
    assert profile.open_rate(1) == pytest.approx(0.0, abs=0.001)
    assert profile.open_rate(2) == pytest.approx(0.75, abs=0.02)
    assert profile.open_rate(4) == 1.0


def test_a_profile_needs_no_exit_at_every_stage():
    profile = Profile([2], 3, 4)
    assert profile.first_answer_stage() == 2


def padded_profile(cost, sizes=(1, 4, 8)):
    profile = StageProfile(sizes[-1], sizes)
    for size in sizes:
        profile.calibrate(size, [cost(size)] * 3)
    return profile


def test_a_batch_that_is_padded_takes_as_long_as_the_size_it_is_padded_to():
    profile = padded_profile(lambda size: 0.01 * size)
    assert [profile.padded(batch) for batch in range(1, 10)] == [1, 4, 4, 4, 8, 8, 8, 8, 9]
    assert [profile.mean_s(batch) for batch in (1, 2, 4, 5, 8)] == pytest.approx([0.01, 0.04, 0.04, 0.08, 0.08])
    profile.observe(3, 0.08)
    assert profile.mean_s(2) == profile.mean_s(4) > 0.04
    assert profile.mean_s(8) == pytest.approx(0.08)


def test_rows_that_would_only_pay_for_padding_are_left_for_the_next_batch():
    steep, shallow = padded_profile(lambda size: 0.01 * (2 + size)), padded_profile(lambda size: 0.01)
    assert [steep.fill(waiting) for waiting in range(1, 9)] == [1, 2, 3, 4, 4, 4, 7, 8]
    assert [shallow.fill(waiting) for waiting in range(1, 9)] == list(range(1, 9))


@given(timings, observations, st.integers(1, 16))
def test_a_trial_is_a_profiled_size_beyond_the_knee_that_the_waiting_rows_fill(timed, observed, num_waiting):
    profile = calibrated(timed)
    for size, took in observed:
        profile.observe(size, took)
    size = profile.trial(num_waiting)
    assert size is None or (size in SIZES and profile.knee < size <= num_waiting)


def test_one_dispatch_in_so_many_is_a_trial_and_each_size_has_its_turn():
    profile, tried = profile_of(lambda size: 0.01 * size), []
    for _ in range(8 * TRIAL_EVERY):
        size = profile.trial(16)
        tried += [size] if size else []
        profile.observe(size or profile.fill(16), 0.01 * (size or profile.fill(16)))
    assert tried == [2, 4, 8, 16] * 2
    assert profile.knee == 1


def test_a_batch_beyond_the_knee_does_not_count_against_its_stage():
    profile = profile_of(lambda size: 0.01 * size**2)
    assert profile.efficiency(8) == profile.efficiency(1) == 1.0


@given(timings, observations, st.sampled_from([None, (1, 2, 8, 16), (4, 16)]))
def test_the_knee_is_the_least_size_near_the_best_throughput(timed, observed, batch_sizes):
    profile = StageProfile(16, batch_sizes)
    for size, timing in zip(batch_sizes or SIZES, timed, strict=False):
        profile.calibrate(size, timing)
    rates = {size: profile.rate(size) for size in range(1, 17)}
    near = [size for size, rate in rates.items() if rate >= 0.95 * max(rates.values())]
    assert profile.knee == near[0]


def test_of_the_rows_in_a_body_all_come_to_the_trunk_behind_it_and_some_to_the_next_body():
    profile = gated_profile()
    profile.observe_gates(range(2, 3), 3, 64)
    assert profile.joining_share(1, 3) == profile.joining_share(2, 3) == 1.0
    assert profile.joining_share(1, 2) == profile.open_rate(2) < 0.5
    assert profile.joining_share(1, 5) == profile.joining_share(2, 1) == profile.joining_share(3, 5) == 0.0


def test_a_backlog_in_small_batches_strains_and_one_at_the_knee_does_not(scripted):
    profile = scripted(lambda stage, rows: 8e-3 + 1e-3 * rows)
    assert profile.strain == 1.0
    knee = profile.knee(0)
    for _ in range(200):
        profile.observe_round(0, knee, profile.stages[0].mean_s(knee), others_wait=True)
    assert profile.strain == pytest.approx(1.0)
    for _ in range(400):
        profile.observe_round(0, 1, profile.stages[0].mean_s(1) + 1e-3, others_wait=True)
    expected = (profile.stages[0].mean_s(1) + 1e-3) * profile.stages[0].rate(knee)
    assert profile.strain == pytest.approx(expected, rel=0.02)


HOPS = (0, 2, 2, 0, 3, 0, 0)
"""Stages up to its next exit before which a row at each stage of `gated_profile` keeps time: only bodies can wait."""


def test_a_row_before_a_body_keeps_time_for_others_at_every_stage_of_its_way_once_others_have_waited():
    profile = gated_profile()
    stages = range(len(profile.stages))
    alone = [profile.to_next_answer_s(stage, 2) for stage in stages]
    for _ in range(1000):
        profile.observe_round(0, 1, 0.5, others_wait=False)
    assert [profile.to_next_answer_s(stage, 2) for stage in stages] == alone
    for _ in range(1000):
        profile.observe_round(0, 4, 0.5, others_wait=True)
    kept = [profile.to_next_answer_s(stage, 2) - alone_s for stage, alone_s in zip(stages, alone, strict=True)]
    assert kept == pytest.approx([DISPATCHES_AHEAD * 0.5 * hops for hops in HOPS], rel=1e-3)
    for _ in range(1000):
        profile.observe_round(0, 1, 0.5, others_wait=False)
    assert [profile.to_next_answer_s(stage, 2) for stage in stages] == pytest.approx(alone, rel=1e-3)

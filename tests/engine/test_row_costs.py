"""What a row is expected to cost in each gear, before and after rows have been seen."""

from types import SimpleNamespace

import pytest
from offramp_contract.calibration import OperatingPoint
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec
from offramp_server.ladder import Gear
from offramp_server.row_costs import ROW_GAIN, RowCosts

POINT = OperatingPoint(
    name="early", policy=ConfidenceSpec(threshold=0.5), compute=0.25, accuracy=0.8, exit_rates=(0.5, 0.25, 0.25)
)


def gear(policy, point=None):
    return Gear(policy, None, point)


@pytest.fixture
def costs(scripted):
    """Three stages of 1, 2 and 3 ms a row, each of which ends in an exit."""
    profile = scripted(lambda stage, rows: 1e-3 * (stage + 1) * rows)
    manifest = SimpleNamespace(exits=[SimpleNamespace(stage=stage) for stage in range(3)], gates=())
    ladder = (gear(ConfidenceSpec(threshold=0.9)), gear(FixedSpec(exit=1)), gear(POINT.policy, POINT))
    return RowCosts(manifest, profile, ladder)


def test_before_any_row_calibration_and_the_profile_say_what_to_expect(costs):
    assert costs.of(None).first_s == pytest.approx(1e-3)
    assert costs.asked_s(None) == costs.asked_s(0) == pytest.approx(6e-3)  # of which nothing is known
    assert costs.asked_s(1) == pytest.approx(3e-3)
    assert costs.asked_s(2) == costs.of(2).taken_s == pytest.approx(0.5 * 1e-3 + 0.25 * 3e-3 + 0.25 * 6e-3)


def test_rows_of_a_gear_teach_what_that_gear_costs(costs):
    for _ in range(int(8 / ROW_GAIN)):
        costs.observe(0, 0, 0.1, is_forced=False)
    assert costs.asked_s(0) == costs.of(0).taken_s == pytest.approx(1e-3, rel=0.01)
    assert costs.asked_s(None) == pytest.approx(6e-3)


def test_a_row_that_its_deadline_cut_short_asked_for_more_than_it_took(costs):
    for _ in range(int(8 / ROW_GAIN)):
        costs.observe(None, 0, 0.1, is_forced=True)
    assert costs.asked_s(None) == pytest.approx(6e-3)
    assert costs.of(None).taken_s == pytest.approx(1e-3, rel=0.01)


def test_costs_are_those_of_a_full_batch(scripted):
    """A device that takes as long for one row as for eight: a backlog of rows does not cost eight times as much."""
    manifest = SimpleNamespace(exits=[SimpleNamespace(stage=2)], gates=())
    costs = RowCosts(manifest, scripted(lambda stage, rows: 8e-3, exit_stages=[2]), ())
    assert costs.asked_s(None) == costs.of(None).first_s == pytest.approx(3e-3)


def test_a_device_that_slows_down_is_believed_in_every_gear(scripted, costs):
    before_s = costs.asked_s(2)
    for stage in costs._profile.stages:
        for _ in range(500):
            stage.observe(1, 2 * stage.mean_s(1) if stage.mean_s(1) < 2e-3 else stage.mean_s(1))
    for _ in range(256):
        costs.observe(0, 2, 1.0, is_forced=False)
    assert costs.asked_s(2) > before_s


def test_rows_that_skip_stages_cost_the_share_that_they_run(scripted):
    manifest = SimpleNamespace(exits=[SimpleNamespace(stage=2)], gates=("gate",))
    costs = RowCosts(manifest, scripted(lambda stage, rows: 2e-3 * rows, exit_stages=[2]), (gear(POINT.policy, POINT),))
    assert costs.asked_s(0) == pytest.approx(0.25 * 6e-3)
    for _ in range(int(8 / ROW_GAIN)):
        costs.observe(0, 0, 0.5, is_forced=False)
    assert costs.asked_s(0) == pytest.approx(0.5 * 6e-3, rel=0.01)


def test_with_gates_a_first_answer_costs_what_is_asked_for_and_not_what_the_trunk_alone_would(scripted):
    manifest = SimpleNamespace(exits=[SimpleNamespace(stage=1), SimpleNamespace(stage=2)], gates=("gate",))
    profile = scripted(lambda stage, rows: 2e-3 * rows, exit_stages=[1, 2])
    costs = RowCosts(manifest, profile, (gear(POINT.policy, POINT),))
    assert costs.of(0).first_s == pytest.approx(0.25 * 4e-3)
    for _ in range(int(8 / ROW_GAIN)):
        costs.observe(0, 0, 0.1, is_forced=True)
    assert costs.of(0).first_s == pytest.approx(4e-3, rel=0.01), "whoever was cut short asked for everything"


def test_rows_cost_more_where_a_backlog_was_seen_to_be_worked_off_more_slowly(scripted):
    profile = scripted(lambda stage, rows: 1e-3 * (stage + 1) * rows)
    manifest = SimpleNamespace(exits=[SimpleNamespace(stage=stage) for stage in range(3)], gates=())
    for _ in range(10):
        profile.observe_round(0, 1, 2 / profile.stages[0].rate(profile.knee(0)), others_wait=True)
    costs = RowCosts(manifest, profile, ())
    assert costs.asked_s(None) == pytest.approx(12e-3)
    assert costs.of(None).first_s == pytest.approx(2e-3)

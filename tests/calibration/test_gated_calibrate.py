"""Calibration of gated networks: points over policies and gate thresholds, and certificates along one walk of them."""

from dataclasses import replace

import numpy as np
import pytest
from gated_bundles import CLASSES
from offramp_calibration.calibrate import CalibrationSettings, calibrate, split
from offramp_calibration.gate_ladder import ladder_rows
from offramp_calibration.gated import walk_down
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.record import record
from offramp_calibration.replay import replay
from offramp_calibration.temperatures import fit_temperatures
from offramp_calibration.write import write_bundle
from offramp_contract.budgets import certified_accuracy, certified_risk, within_compute
from offramp_contract.calibration import MAX_OPERATING_POINTS
from offramp_contract.policy_spec import FixedSpec
from offramp_runtime import StageExecutor, open_bundle, open_device
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings

SETTINGS = CalibrationSettings(seed=3, num_settings=40, num_budgets=12, num_steps=48)
NUM_SAMPLES = 1000


@pytest.fixture(scope="module")
def traced(gated_folder, gated_samples, tmp_path_factory):
    """Give the trace of a kind of network, recorded once."""
    traces = {}

    def give(kind):
        if kind not in traces:
            folder = gated_folder(kind)
            executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
            data = gated_samples(folder, NUM_SAMPLES)
            traces[kind] = record(executor, data, tmp_path_factory.mktemp("t") / "t.npz", gates=8)
        return traces[kind]

    return give


@pytest.fixture(scope="module")
def calibrated(traced):
    made = {}

    def give(kind):
        if kind not in made:
            made[kind] = calibrate(traced(kind), SETTINGS)
        return made[kind]

    return give


@pytest.mark.parametrize("kind", ["one exit", "central", "choice"])
def test_every_expectation_is_what_a_replay_at_the_points_gate_threshold_shows(traced, calibrated, kind):
    calibration = calibrated(kind)
    by_threshold = Outcomes.by_threshold(traced(kind), calibration.temperatures)
    for point in calibration.operating_points:
        replayed = replay(point.policy, by_threshold[point.gate_threshold])
        assert (point.compute, point.accuracy) == (replayed.compute, replayed.accuracy)
        assert point.exit_rates == tuple(replayed.exit_rates_E.tolist())


def test_a_network_of_one_exit_has_a_point_for_every_gate_threshold(traced, calibrated):
    points = calibrated("one exit").operating_points
    assert [point.gate_threshold for point in points if point.gate_threshold is not None] == sorted(
        threshold for threshold in traced("one exit").about.threshold_P if threshold is not None
    )
    (own,) = (point for point in points if point.gate_threshold is None)
    assert own.name == f"gates-own-{100 * own.compute:.1f}"
    assert points[0].name == "gates-100.0"
    assert all(point.name == f"gates-{100 * point.compute:.1f}" for point in points if point != own)
    assert all(point.certificates for point in points)


def test_the_walk_begins_at_full_depth_and_shuts_gates_step_by_step(traced):
    by_threshold = Outcomes.by_threshold(traced("one exit"))
    walk = walk_down(by_threshold, 10)
    assert walk[0] == (FixedSpec(exit=0), 0.0)
    rising = [threshold for _, threshold in walk if threshold is not None]
    assert rising == sorted(rising)
    computes = [replay(policy, by_threshold[threshold]).compute for policy, threshold in walk]
    assert computes == sorted(computes, reverse=True), "the network's own thresholds stand where they cost as much"


def test_where_there_are_exits_the_walk_goes_down_the_best_settings_of_both(traced):
    by_threshold = Outcomes.by_threshold(traced("central"))
    walk = walk_down(by_threshold, 48)
    assert walk[0] == (FixedSpec(exit=1), 0.0)
    assert len({threshold for _, threshold in walk}) > 3
    replays = [replay(policy, by_threshold[threshold]) for policy, threshold in walk[1:]]
    for get in (lambda one: one.compute, lambda one: one.accuracy):
        falling = [get(one) for one in replays]
        assert falling == sorted(set(falling), reverse=True)


@pytest.mark.parametrize("kind", ["one exit", "central"])
def test_bounds_never_shrink_along_the_walk_and_full_depth_differs_from_itself_in_nothing(traced, calibrated, kind):
    trace, calibration = traced(kind), calibrated(kind)
    rows_a, rows_b = split(len(trace), SETTINGS, ladder_rows(len(trace)))
    by_threshold = Outcomes.by_threshold(trace, calibration.temperatures)
    walk = walk_down({threshold: one.take(rows_a) for threshold, one in by_threshold.items()}, SETTINGS.num_steps)
    certified = {(p.policy, p.gate_threshold): p for p in calibration.operating_points if p.certificates}
    assert set(certified) <= set(walk)
    along = [certified[setting] for setting in walk if setting in certified]
    for risk in ("consistency", "accuracy_loss"):
        for delta in (0.05, None):
            bounds = [point.certificate(risk, delta).bound for point in along]
            assert bounds[0] == 0
            assert bounds == sorted(bounds)
    for point in along[1:]:
        held_out = replay(point.policy, by_threshold[point.gate_threshold].take(rows_b))
        assert point.certificate("consistency", 0.05).bound > held_out.differs_N.mean()
        assert {held.num_samples for held in point.certificates} == {len(rows_b)}


def test_accuracy_is_certified_from_the_most_accurate_setting_down_though_full_depth_is_worse(calibrated):
    calibration = calibrated("one exit")
    by_name = {point.name: point for point in calibration.operating_points}
    full, points = by_name["gates-100.0"], calibration.operating_points
    best = max(points, key=lambda point: point.accuracy)
    assert full.accuracy < best.accuracy - 0.05
    assert full.certificate("accuracy", 0.05) is None
    bounds = [held.bound for point in points if (held := point.certificate("accuracy", 0.05))]
    assert bounds == sorted(bounds, reverse=True)
    assert certified_accuracy(points, full.accuracy).point.compute < 0.9


def test_wrong_labels_of_the_samples_that_certify_change_what_is_certified_and_not_what_is_chosen(traced):
    trace = traced("central")
    rows_a, rows_b = split(len(trace), SETTINGS, ladder_rows(len(trace)))
    label_N = np.array(trace.label_N)
    label_N[rows_b] = (label_N[rows_b] + 1) % CLASSES
    spoilt = replace(trace, label_N=label_N)
    honest_walk, spoilt_walk = (
        walk_down({t: one.take(rows_a) for t, one in Outcomes.by_threshold(each).items()}, 30)
        for each in (trace, spoilt)
    )
    assert honest_walk == spoilt_walk
    honest, other = calibrate(trace, SETTINGS), calibrate(spoilt, SETTINGS)
    assert honest.temperatures == other.temperatures
    promised = [
        max(held.bound for point in one.operating_points for held in point.certificates if held.kind == "accuracy")
        for one in (honest, other)
    ]
    assert promised[0] > 0.7
    assert promised[1] < 0.4


def test_temperatures_are_those_of_the_network_with_its_own_gates(traced, calibrated):
    trace = traced("one exit")
    rows_a, _ = split(len(trace), SETTINGS, ladder_rows(len(trace)))
    assert calibrated("one exit").temperatures == fit_temperatures(trace.at(None), rows_a)
    assert calibrated("one exit").temperatures != fit_temperatures(trace, rows_a)


def test_where_there_are_exits_policies_are_swept_at_every_gate_threshold_and_the_best_are_kept(traced, calibrated):
    points = calibrated("central").operating_points
    assert len(points) <= MAX_OPERATING_POINTS
    families = {}
    for point in points:
        families.setdefault(point.name.rstrip("0123456789.-"), []).append(point)
    assert {"gates", "gates-own", "confidence", "margin", "entropy", "fixed", "budgeted"} <= set(families)
    for family in ("confidence", "entropy", "margin", "fixed", "budgeted"):
        kept = sorted(families[family], key=lambda point: point.compute)
        accuracies = [point.accuracy for point in kept]
        assert accuracies == sorted(set(accuracies)), family
    assert len({point.gate_threshold for point in families["confidence"]}) > 2
    assert len(families["gates"]) + 1 == len(traced("central").passes)
    best = max(point.accuracy for point in families["gates"] if point.compute <= 0.6)
    assert within_compute(points, 0.6).accuracy >= best


def test_a_network_whose_depth_is_the_callers_choice_keeps_its_most_important_blocks(calibrated):
    points = calibrated("choice").operating_points
    by_gates = {point.gate_threshold: point for point in points if point.policy == FixedSpec(exit=1)}
    # Blocks of priorities 0.9, 0.5 and 0.7 cost 200, 400 and 800 of 1,600.
    assert {point.compute for point in by_gates.values()} == {1.0, 0.75, 0.25, 0.125}
    assert by_gates[1.0].compute == 0.125
    assert certified_risk(points, 0.05, 0.05).point.compute < 1


@pytest.mark.parametrize("kind", ["one exit", "central"])
def test_a_request_that_names_a_budget_is_served_as_the_point_says(
    calibrated, gated_folder, gated_samples, tmp_path, kind
):
    folder = tmp_path / "calibrated"
    write_bundle(open_bundle(gated_folder(kind)), calibrated(kind), folder)
    bundle = open_bundle(folder)
    data = gated_samples(gated_folder(kind), NUM_SAMPLES)
    settings = EngineSettings(default_latency_ms=None, max_wait_ms=1e6, warm_up_s=0.05)
    with Engine.open(folder, "cpu", settings) as engine:
        for asked in ({"compute": 0.6}, {"accuracy": 0.75}, {"risk": {"epsilon": 0.15, "delta": 0.1}}):
            points = bundle.calibration.operating_points
            chosen = {
                "compute": lambda points=points: within_compute(points, 0.6),
                "accuracy": lambda points=points: certified_accuracy(points, 0.75).point,
                "risk": lambda points=points: certified_risk(points, 0.15, 0.1).point,
            }[next(iter(asked))]()
            rows = engine.classify(data.inputs["x"], **asked).rows
            assert np.mean([row.depth for row in rows]) == pytest.approx(chosen.compute, abs=0.002)
            right = [row.answer.top_class_K[0] == label for row, label in zip(rows, data.label_N, strict=True)]
            assert np.mean(right) == pytest.approx(chosen.accuracy, abs=0.002)

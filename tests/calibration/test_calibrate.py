"""Calibration as a whole: what it states is measured, what it certifies was not chosen on the same samples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from offramp_calibration.calibrate import MAX_SETTINGS, CalibrationSettings, calibrate, split
from offramp_calibration.greedy import greedy_family
from offramp_calibration.labelled import Arrays
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.record import record
from offramp_calibration.replay import replay
from offramp_calibration.trace import Trace
from offramp_calibration.write import write_calibration
from offramp_contract.budgets import certified_accuracy, certified_risk, within_compute
from offramp_contract.calibration import MAX_OPERATING_POINTS, Calibration, Certificate, OperatingPoint
from offramp_contract.errors import InvalidValue, UnfitData
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec, NativeSpec
from offramp_runtime import StageExecutor, open_bundle, open_device, run_all_exits

MakeTrace = Callable[..., Trace]
SETTINGS = CalibrationSettings(num_settings=60, num_budgets=20, num_steps=60)


@pytest.fixture(scope="module")
def calibration(trace: Trace) -> Calibration:
    return calibrate(trace, SETTINGS)


def families(calibration: Calibration) -> dict[str, list[OperatingPoint]]:
    """Sort the points by the first part of their names."""
    found: dict[str, list[OperatingPoint]] = {}
    for point in calibration.operating_points:
        found.setdefault(point.name.rstrip("0123456789.-"), []).append(point)
    return found


def certificates_of(calibration: Calibration) -> list[Certificate]:
    return [held for point in calibration.operating_points for held in point.certificates]


def test_every_expectation_is_what_a_replay_of_all_samples_shows(trace: Trace, calibration: Calibration) -> None:
    outcomes = Outcomes.of(trace, calibration.temperatures)
    for point in calibration.operating_points:
        replayed = replay(point.policy, outcomes)
        assert point.compute == replayed.compute
        assert point.accuracy == replayed.accuracy
        assert point.exit_rates == tuple(replayed.exit_rates_E.tolist())


def test_every_policy_has_points_and_full_depth_one(calibration: Calibration) -> None:
    found = families(calibration)
    assert set(found) == {
        "fixed",
        "confidence",
        "entropy",
        "margin",
        "agreement",
        "patience",
        "window",
        "patience-and-confidence",
        "patience-or-confidence",
        "budgeted",
        "certified",
    }
    assert {point.policy for point in found["fixed"]} == {FixedSpec(exit=index) for index in range(5)}
    assert [point.name for point in calibration.operating_points if point.policy == FixedSpec(exit=4)] == [
        "fixed-100.0"
    ]
    assert all(len(points) <= SETTINGS.num_kept for points in found.values())


def test_the_networks_own_setting_is_a_point_that_says_so(returning: Path, tmp_path: Path) -> None:
    executor = StageExecutor(open_bundle(returning), open_device("cpu", 1))
    x = np.random.default_rng(0).normal(size=(400, 12)).astype(np.float32)
    final_NC, _ = run_all_exits(executor, {"x": x})[-1]
    data = Arrays("drawn", {"x": x}, final_NC.argmax(axis=1), executor.manifest)
    trace = record(executor, data, tmp_path / "t.npz")

    points = calibrate(trace, SETTINGS).operating_points

    (own,) = (point for point in points if point.name.startswith("native-own-"))
    assert own.policy == NativeSpec()
    replayed = replay(NativeSpec(), Outcomes.of(trace))
    assert own.exit_rates == tuple(replayed.exit_rates_E.tolist())
    assert any(isinstance(point.policy, NativeSpec) and point.policy.threshold is not None for point in points)


def test_of_each_swept_policy_no_point_beats_another(calibration: Calibration) -> None:
    found = families(calibration)
    for family in ("confidence", "entropy", "margin", "patience", "agreement", "patience-or-confidence"):
        points = sorted(found[family], key=lambda point: point.compute)
        accuracies = [point.accuracy for point in points]
        assert accuracies == sorted(set(accuracies)), family


def test_it_says_what_it_was_made_from(trace: Trace, calibration: Calibration) -> None:
    assert calibration.model_digest == trace.about.model_digest
    assert calibration.data_digest == trace.about.data_digest
    assert calibration.num_samples == len(trace)
    certificates = certificates_of(calibration)
    assert {held.num_samples for held in certificates} == {len(trace) - round(len(trace) * SETTINGS.fitting_share)}
    assert {held.data_digest for held in certificates} == {trace.about.data_digest}


def test_what_is_chosen_by_labels_is_chosen_on_a_alone(trace: Trace) -> None:
    """Wrong labels in B change what is certified, not what is chosen."""
    _, rows_b = split(len(trace), SETTINGS)
    label_N = trace.label_N.copy()
    label_N[rows_b] = (label_N[rows_b] + 1) % 10
    honest, spoilt = calibrate(trace, SETTINGS), calibrate(replace(trace, label_N=label_N), SETTINGS)
    assert spoilt.temperatures == honest.temperatures
    rows_a, _ = split(len(trace), SETTINGS)
    walk = set(greedy_family(Outcomes.of(trace, honest.temperatures).take(rows_a), SETTINGS.num_steps))
    best = []
    for calibration in (honest, spoilt):
        assert {point.policy for point in calibration.operating_points if point.certificates} <= walk
        best.append(max(held.bound for held in certificates_of(calibration) if held.kind == "accuracy"))
    assert best[0] > 0.8
    assert best[1] < 0.2


def test_what_certifies_was_certified_on_b_alone(trace: Trace) -> None:
    calibration = calibrate(trace, SETTINGS)
    _, rows_b = split(len(trace), SETTINGS)
    held_out = Outcomes.of(trace, calibration.temperatures).take(rows_b)
    for point in calibration.operating_points:
        risk = point.certificate("consistency", 0.05)
        if risk is not None and point.name != "fixed-100.0":
            assert risk.bound > replay(point.policy, held_out).differs_N.mean()


def test_another_seed_splits_otherwise_and_the_same_seed_alike(trace: Trace, calibration: Calibration) -> None:
    assert calibrate(trace, SETTINGS) == calibration
    assert calibrate(trace, replace(SETTINGS, seed=1)).temperatures != calibration.temperatures
    rows_a, rows_b = split(101, SETTINGS)
    assert sorted([*rows_a, *rows_b]) == list(range(101))


def test_requests_find_points_for_their_budgets(calibration: Calibration) -> None:
    points = calibration.operating_points
    for compute in (0.3, 0.5, 0.9):
        assert compute - 0.1 < within_compute(points, compute).compute <= compute or compute == 0.9
    accuracies = [within_compute(points, compute).accuracy for compute in np.linspace(0.2, 1, 30).tolist()]
    assert accuracies == sorted(accuracies)
    assert certified_risk(points, 0.05, 0.1).point.compute < 0.8
    assert certified_accuracy(points, 0.85).point.compute < 0.8
    with pytest.raises(InvalidValue, match=r"^compute: .* best reachable is 0\.14"):
        within_compute(points, 0.1)


@pytest.mark.parametrize(("num_samples", "num_exits", "num_classes"), [(2, 2, 2), (3, 6, 4), (50, 1, 3), (60, 30, 5)])
def test_small_data_and_networks_of_any_depth_are_calibrated(
    make_trace: MakeTrace, num_samples: int, num_exits: int, num_classes: int
) -> None:
    depth_E = [1.0] if num_exits == 1 else None
    trace = make_trace(num_samples, num_exits, num_classes, depth_E=depth_E)
    calibration = calibrate(trace, CalibrationSettings(num_settings=20, num_budgets=5, num_steps=20))
    assert len(calibration.temperatures) == num_exits
    names = [point.name for point in calibration.operating_points]
    assert "fixed-100.0" in names
    assert Calibration.model_validate_json(calibration.to_bytes()) == calibration


def test_exits_that_are_always_sure_and_right_are_left_at_once(make_trace: MakeTrace) -> None:
    trace = make_trace(400, 3, 4)
    logits_NC = np.where(np.arange(4) == trace.label_N[:, None], 200.0, 0.0).astype(np.float32)
    calibration = calibrate(replace(trace, logits_ENC=(logits_NC,) * 3), SETTINGS)
    cheapest = certified_risk(calibration.operating_points, 0.05, 0.05)
    assert cheapest.point.compute == pytest.approx(trace.about.depth_E[0])
    assert all(0.05 <= temperature <= 20 for temperature in calibration.temperatures)


def test_too_few_samples_and_scores_that_are_no_numbers_are_refused(make_trace: MakeTrace) -> None:
    with pytest.raises(UnfitData, match="at least 2 samples"):
        calibrate(make_trace(1))
    broken = make_trace(50)
    broken.logits_ENC[3][7, 2] = np.nan
    with pytest.raises(UnfitData, match=r"exit 3: .* sample 7 are not numbers"):
        calibrate(broken)


@pytest.mark.parametrize(
    "wrong", [{"fitting_share": 0.0}, {"fitting_share": 1.0}, {"num_steps": 1}, {"num_settings": MAX_SETTINGS + 1}]
)
def test_settings_are_bounded(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidValue, match=name):
        CalibrationSettings(**wrong)  # type: ignore[arg-type]


def test_all_that_settings_allow_fits_into_a_calibration() -> None:
    swept_families, early_exits, own = 8, 256, 1
    assert MAX_SETTINGS * (swept_families + 2) + early_exits + own <= MAX_OPERATING_POINTS


def test_progress_is_told_stage_by_stage(make_trace: MakeTrace) -> None:
    heard: list[tuple[str, int, int]] = []
    calibrate(make_trace(100, 3), SETTINGS, lambda stage, done, total: heard.append((stage, done, total)))
    stages = list(dict.fromkeys(stage for stage, _, _ in heard))
    assert stages == ["temperatures", "certificates", "operating points", "budgets"]
    for stage in stages:
        done = [(so_far, total) for name, so_far, total in heard if name == stage]
        assert done[-1][0] == done[-1][1]
        assert done == sorted(done)


def test_a_bundle_reads_it_back(make_bundle: Callable[..., Path], make_trace: MakeTrace) -> None:
    folder = make_bundle()
    manifest = open_bundle(folder).manifest
    drawn = make_trace(300, 3, 4)
    about = replace(drawn.about, model_digest=manifest.model_digest)
    calibration = calibrate(replace(drawn, about=about), SETTINGS)
    write_calibration(calibration, folder)
    bundle = open_bundle(folder)
    assert bundle.calibration == calibration
    assert any(isinstance(point.policy, ConfidenceSpec) for point in bundle.calibration.operating_points)

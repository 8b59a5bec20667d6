"""The report of a gated network: accuracy against compute over gate thresholds, open rates, and what does not apply."""

import re
from dataclasses import replace

import numpy as np
import pytest
from offramp_calibration.calibrate import CalibrationSettings, calibrate
from offramp_calibration.evaluate import LABEL_ORACLE, evaluate
from offramp_calibration.evaluation import Evaluation, Provenance
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.record import record
from offramp_calibration.replay import replay
from offramp_calibration.report import write_report
from offramp_contract.budgets import within_compute
from offramp_contract.calibration import Calibration
from offramp_contract.errors import BrokenTrace
from offramp_contract.gates import gate_thresholds
from offramp_contract.policy_spec import FixedSpec
from offramp_runtime import StageExecutor, open_bundle, open_device, run_gated

SETTINGS = CalibrationSettings(num_settings=20, num_budgets=6, num_steps=30)
KINDS = ("one exit", "central", "nested", "choice")


@pytest.fixture(scope="module")
def setting(gated_folder, gated_samples, tmp_path_factory):
    """Give the executor, the calibration, test data and its trace, of a kind of network."""
    made = {}

    def make(kind):
        folder = tmp_path_factory.mktemp("t")
        executor = StageExecutor(open_bundle(gated_folder(kind)), open_device("cpu", 1))
        held_out = gated_samples(gated_folder(kind), 600)
        calibration = calibrate(record(executor, held_out, folder / "a.npz", gates=6), SETTINGS)
        data = gated_samples(gated_folder(kind), 1200, 1)
        thresholds = {point.gate_threshold for point in calibration.operating_points}
        return executor, calibration, data, record(executor, data, folder / "b.npz", gates=thresholds)

    def give(kind):
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return give


def measured(executor, calibration, trace, **options):
    provenance = Provenance(
        calibration.model_digest, None, calibration.data_digest, 0, "drawn", trace.about.data_digest
    )
    return evaluate(trace, executor.manifest, calibration, provenance, **options)


@pytest.fixture(scope="module")
def evaluation(setting):
    made = {}

    def give(kind):
        if kind not in made:
            executor, calibration, _, trace = setting(kind)
            made[kind] = measured(executor, calibration, trace)
        return made[kind]

    return give


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_measured_at_their_gate_threshold_beside_what_was_expected(setting, evaluation, kind):
    _, calibration, _, trace = setting(kind)
    by_threshold = Outcomes.by_threshold(trace, calibration.temperatures)
    for point, expected in zip(evaluation(kind).points, calibration.operating_points, strict=True):
        replayed = replay(expected.policy, by_threshold[expected.gate_threshold])
        assert (point.name, point.gate_threshold) == (expected.name, expected.gate_threshold)
        assert (point.compute, point.accuracy.value) == (replayed.compute, replayed.accuracy)
        assert (point.expected_compute, point.expected_accuracy) == (expected.compute, expected.accuracy)
        assert point.differs.value == replayed.differs_N.mean()
        assert abs(point.compute - point.expected_compute) < 0.08
    for result in evaluation(kind).budgets:
        if result.point is not None:
            assert result.point.name == within_compute(calibration.operating_points, result.asked).name


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_open_as_often_as_the_network_opens_them(setting, evaluation, kind):
    executor, _, data, trace = setting(kind)
    gates = evaluation(kind).gates
    assert gates.names == tuple(gate.name for gate in executor.manifest.gates)
    assert {rung.threshold for rung in gates.rungs} == set(trace.about.threshold_P)
    computes = [rung.point.compute for rung in gates.rungs]
    assert computes == sorted(computes, reverse=True)
    for rung in gates.rungs:
        threshold_G = gate_thresholds(executor.manifest, threshold=rung.threshold)
        outcome = run_gated(executor, data.inputs, threshold_G)
        assert rung.open_rates == pytest.approx(tuple(outcome.is_open_BG.mean(axis=0)))
        assert rung.point.accuracy.value == (outcome.exits[-1][0].argmax(axis=1) == data.label_N).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_full_depth_is_every_gate_open_and_no_oracle_over_exits_is_drawn(evaluation, kind):
    result = evaluation(kind)
    assert result.full.compute == 1.0
    assert result.full.accuracy == result.gates.rungs[0].point.accuracy
    assert result.label_oracle is None
    assert result.agreement_oracle is None
    assert LABEL_ORACLE not in {curve.name for curve in result.compute.curves}
    assert all(gap is None for curve in result.compute.curves for gap in curve.gap_closed)


def test_an_evaluation_reads_back_as_it_was_written(evaluation):
    result = evaluation("central")
    assert Evaluation.from_json(result.to_json()) == result


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_shows_the_gates_and_says_what_does_not_apply(evaluation, kind, tmp_path):
    page = write_report(evaluation(kind), tmp_path).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", page)
    assert "<h2>Gates</h2>" in text
    assert {"gates.png", "gates-dark.png"} <= {path.name for path in (tmp_path / "figures").iterdir()}
    rows = text.partition("<h2>Gates</h2>")[2].partition("</table>")[0].count('<th scope="row">')
    assert rows == len(evaluation(kind).gates.rungs)
    if len(evaluation(kind).exits) == 1:
        assert "This network has one exit, so an oracle over exits does not apply" in text
    else:
        assert "Gates change what the exits see, so the best choice of exits with every gate open is no bound" in text
    assert "if one knew them" not in text
    assert "Ran least: the surest" in text


def test_an_uncalibrated_network_is_shown_over_its_gate_thresholds(setting):
    executor, _, _, trace = setting("one exit")
    result = measured(executor, Calibration.bare(executor.manifest), trace)
    assert {point.gate_threshold for point in result.points} == set(trace.about.threshold_P)
    assert {point.family for point in result.points} == {"gates"}
    assert result.reference.gate_threshold is None
    assert result.reference.compute < 1
    (caution,) = (caution for caution in result.cautions if caution.kind == "not_calibrated")
    assert "sweeps gate thresholds" in caution.sentence


def test_examples_are_those_that_ran_least_and_most(setting, evaluation):
    trace, result = setting("one exit")[-1], evaluation("one exit")
    depth_N = trace.pass_at(result.reference.gate_threshold).depth_NE[:, -1]
    early = [depth_N[example.index] for example in result.examples if example.group == "early"]
    late = [depth_N[example.index] for example in result.examples if example.group == "late"]
    assert early
    assert late
    assert max(early) <= np.quantile(depth_N, 0.1) < np.quantile(depth_N, 0.9) <= min(late)


def test_a_point_whose_gate_threshold_the_trace_lacks_is_refused(setting):
    executor, calibration, _, trace = setting("one exit")
    stranger = calibration.operating_points[1].model_copy(update={"gate_threshold": 0.123, "name": "stranger"})
    other = calibration.model_copy(update={"operating_points": (*calibration.operating_points, stranger)})
    with pytest.raises(BrokenTrace, match=r"no pass at gate threshold 0\.123"):
        measured(executor, other, replace(trace))


def test_a_named_point_is_the_reference_at_its_gate_threshold(setting, evaluation):
    executor, calibration, _, trace = setting("central")
    point = next(p for p in calibration.operating_points if p.policy == FixedSpec(exit=1) and p.gate_threshold == 1.0)
    result = measured(executor, calibration, trace, reference=point.name)
    assert result.reference.gate_threshold == 1.0
    assert result.exits[-1].depth == pytest.approx(result.reference.compute)
    assert result.exits[-1].calibrated.accuracy == result.reference.accuracy

"""`offramp calibrate` and `offramp evaluate` on networks with gates."""

import re

import numpy as np
import pytest
from gated_bundles import CENTRAL, ONE_EXIT, write_gated
from gated_samples import draw_gated
from offramp_calibration.evaluation import Evaluation
from offramp_calibration.trace import Trace
from offramp_cli.__main__ import app
from offramp_contract.budgets import within_compute
from offramp_runtime import open_bundle
from typer.testing import CliRunner

CPU = ("--device", "cpu", "--threads", "1")


@pytest.fixture
def offramp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(tmp_path):
    """A gated bundle of one exit, with data to calibrate it on and other data to test it on."""
    folder = write_gated(tmp_path / "b", ONE_EXIT)
    for seed, name in enumerate(("held-out", "test")):
        x, label_N = draw_gated(folder, 800, seed)
        np.savez(tmp_path / f"{name}.npz", x=x, y=label_N)
    return folder


def test_a_gated_bundle_is_calibrated_over_its_gate_thresholds(offramp, bundle):
    done = offramp("calibrate", "b", "--data", "held-out.npz", "--gate-steps", 6, *CPU)
    assert done.exit_code == 0, done.output
    points = open_bundle(bundle).calibration.operating_points
    assert len(points) == 6
    assert "6 operating points from 800 samples" in done.output
    table = done.output.partition("\ngate threshold ")[2].partition("\n\n")[0].splitlines()[1:]
    shown_first, *shown_after = (line.split()[0] for line in table)
    assert shown_first == "0"
    assert "own" in shown_after
    assert len(shown_after) == 5
    for point in points:
        shown = f"{point.compute:.1%} +{point.accuracy:.1%} +differs in ≤ "
        assert re.search(rf"{point.name} +{shown}", done.output)
    chosen = within_compute(points, 0.6)
    assert re.search(rf"^0\.6 +{chosen.name} ", done.output, re.MULTILINE)


def test_a_kept_trace_holds_every_pass_in_one_file_and_calibrates_alike(offramp, bundle, tmp_path):
    assert offramp("calibrate", "b", "--data", "held-out.npz", "--trace", "t.npz", *CPU).exit_code == 0
    first = open_bundle(bundle).calibration
    assert len(Trace.read(tmp_path / "t.npz").passes) == 12
    done = offramp("calibrate", "b", "--trace", "t.npz")
    assert done.exit_code == 0, done.output
    assert "using the trace in t.npz, 800 samples at 12 gate thresholds" in done.output
    assert open_bundle(bundle).calibration == first


def test_evaluate_runs_the_points_gate_thresholds_on_test_data(offramp, bundle, tmp_path):
    assert offramp("calibrate", "b", "--data", "held-out.npz", "--gate-steps", 5, *CPU).exit_code == 0
    done = offramp("evaluate", "b", "--data", "test.npz", "--out", "r", "--trace", "t.npz", *CPU)
    assert done.exit_code == 0, done.output
    assert "without times and without advice on exits" in done.output
    evaluation = Evaluation.from_json((tmp_path / "r" / "report.json").read_bytes())
    assert evaluation.milliseconds is None
    assert evaluation.advice is None
    expected = {point.gate_threshold for point in open_bundle(bundle).calibration.operating_points}
    assert {rung.threshold for rung in evaluation.gates.rungs} == expected
    for point in evaluation.points:
        assert point.compute == pytest.approx(point.expected_compute, abs=0.06)
    assert offramp("calibrate", "b", "--data", "held-out.npz", "--gate-steps", 9, *CPU).exit_code == 0
    stale = offramp("evaluate", "b", "--trace", "t.npz", "--out", "r")
    assert stale.exit_code == 1
    assert "the trace holds no pass at gate threshold" in stale.output
    assert "remove it to record it anew" in stale.output


def test_a_gated_bundle_that_is_not_calibrated_is_evaluated_over_a_ladder(offramp, bundle, tmp_path):
    done = offramp("evaluate", "b", "--data", "test.npz", "--out", "r", *CPU)
    assert done.exit_code == 0, done.output
    assert "The curve below sweeps gate thresholds instead" in done.output
    evaluation = Evaluation.from_json((tmp_path / "r" / "report.json").read_bytes())
    assert len(evaluation.gates.rungs) == 12


def test_gates_and_exits_together_are_calibrated_and_evaluated(offramp, bundle, tmp_path):
    folder = write_gated(tmp_path / "c", CENTRAL)
    x, label_N = draw_gated(folder, 400)
    np.savez(tmp_path / "c.npz", x=x, y=label_N)
    assert offramp("calibrate", "c", "--data", "c.npz", "--gate-steps", 4, *CPU).exit_code == 0
    names = [point.name for point in open_bundle(folder).calibration.operating_points]
    assert any(name.startswith("confidence-") for name in names)
    assert sum(name.startswith("gates-") for name in names) == 4
    done = offramp("evaluate", "c", "--data", "c.npz", "--out", "r", *CPU)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("calibrate", "b", "--data", "held-out.npz", "--gate-steps", 2), "--gate-steps"),
        (("evaluate", "b", "--data", "test.npz", "--merge", "m"), "--merge is for networks without gates"),
    ],
)
def test_what_gates_do_not_allow_is_refused_in_one_sentence(offramp, bundle, arguments, sentence):
    done = offramp(*arguments)
    assert done.exit_code != 0
    assert sentence in done.output
    assert "Traceback" not in done.output

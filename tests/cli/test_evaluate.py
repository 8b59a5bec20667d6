import json
from dataclasses import replace

import numpy as np
import pytest
from offramp_calibration.evaluation import Evaluation
from offramp_cli import exit_advice
from offramp_cli.__main__ import app
from offramp_runtime import open_bundle
from typer.testing import CliRunner

NUM_SAMPLES = 600


@pytest.fixture
def offramp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def write_samples(path, seed=0):
    """Write images of which a pixel is the class and the others are noise that sometimes drowns it."""
    rng = np.random.default_rng(seed)
    label_N = np.arange(NUM_SAMPLES) % 10
    pixels_NHW = rng.uniform(0, 0.6, size=(NUM_SAMPLES, 8, 8)).astype(np.float32)
    pixels_NHW.reshape(NUM_SAMPLES, 64)[np.arange(NUM_SAMPLES), label_N] += rng.uniform(0, 0.8, NUM_SAMPLES)
    np.savez(path, x=pixels_NHW[:, None].clip(0, 1), y=label_N)
    return path


@pytest.fixture
def samples(tmp_path):
    return write_samples(tmp_path / "test.npz")


def numbers(folder):
    return Evaluation.from_json((folder / "report.json").read_bytes())


def test_evaluate_writes_a_page_its_figures_and_its_numbers(offramp, digits_like_bundle, samples, tmp_path):
    done = offramp("evaluate", digits_like_bundle, "--data", samples, "--out", "r", "--threads", 1)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"index.html", "report.json", "figures"}
    evaluation = numbers(tmp_path / "r")
    assert evaluation.num_samples == NUM_SAMPLES
    assert evaluation.provenance.model_digest == open_bundle(digits_like_bundle).manifest.model_digest
    assert evaluation.provenance.command == f"offramp evaluate {digits_like_bundle} --data {samples}"
    assert len(evaluation.advice.exits) == 2
    assert evaluation.milliseconds.full > evaluation.exits[0].milliseconds > 0
    assert "This bundle is not calibrated" in done.output
    assert f"{100 * evaluation.full.accuracy.value:.1f} % of the answers are right" in done.output
    page = (tmp_path / "r" / "index.html").read_text(encoding="utf-8")
    assert page.count('alt="sample ') == len(evaluation.examples)


def test_a_trace_that_was_kept_gives_the_same_numbers_without_the_data(offramp, digits_like_bundle, samples, tmp_path):
    quick = ("--no-timing", "--threads", 1)
    assert offramp("evaluate", digits_like_bundle, "--data", samples, "--trace", "t.npz", *quick).exit_code == 0
    done = offramp("evaluate", digits_like_bundle, "--trace", "t.npz", "--out", "again", *quick)
    assert done.exit_code == 0, done.output
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("report", "again"))
    assert first.pop("provenance")["data_digest"] == again.pop("provenance")["data_digest"]
    assert first == again
    assert first["milliseconds"] is None
    assert first["advice"] is None


def test_a_report_that_is_there_is_replaced(offramp, digits_like_bundle, samples, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("old")
    done = offramp("evaluate", digits_like_bundle, "--data", samples, "--no-timing")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "report" / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_merge_writes_the_bundle_without_the_exits_that_do_not_pay(
    offramp, digits_like_bundle, samples, tmp_path, monkeypatch
):
    judge = exit_advice.advise_exits

    def first_exit_does_not_pay(*arguments):
        advice = judge(*arguments)
        return replace(advice, merge=(0,), merged=advice.now)

    monkeypatch.setattr(exit_advice, "advise_exits", first_exit_does_not_pay)
    done = offramp("evaluate", digits_like_bundle, "--data", samples, "--merge", "merged", "--threads", 1)
    assert done.exit_code == 0, done.output
    assert [exit_.name for exit_ in open_bundle(tmp_path / "merged").manifest.exits] == ["exit_1", "exit_2"]
    assert "exit_0 costs more than it saves" in done.output


def test_merge_writes_nothing_where_every_exit_pays(offramp, digits_like_bundle, samples, tmp_path, monkeypatch):
    judge = exit_advice.advise_exits
    monkeypatch.setattr(
        exit_advice, "advise_exits", lambda *arguments: replace(judge(*arguments), merge=(), merged=None)
    )
    done = offramp("evaluate", digits_like_bundle, "--data", samples, "--merge", "merged", "--threads", 1)
    assert done.exit_code == 0, done.output
    assert "nothing to merge" in done.output
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name labelled data with --data, or a trace that is there with --trace"),
        (("--data", "nowhere.npz"), "data: 'nowhere.npz' does not exist"),
        (("--data", "test.npz", "--point", "x"), "point: this bundle has no operating point 'x'; it has none"),
        (("--data", "test.npz", "--out", "test.npz"), "--out test.npz is a file; name a folder"),
        (("--data", "test.npz", "--merge", "."), "--merge . exists; name a new folder"),
        (("--data", "test.npz", "--merge", "m", "--no-timing"), "--merge needs times"),
        (("--data", "test.npz", "--device", "tpu"), "device: 'tpu' is none of auto, cpu"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(offramp, digits_like_bundle, samples, arguments, sentence):
    done = offramp("evaluate", digits_like_bundle, *arguments)
    assert done.exit_code == 1
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert {path.name for path in samples.parent.iterdir()} == {"test.npz"}


def test_a_bundle_is_not_taken_for_a_reports_folder(offramp, digits_like_bundle, samples):
    done = offramp("evaluate", digits_like_bundle, "--data", samples, "--out", digits_like_bundle)
    assert done.exit_code == 1
    assert "is a bundle; name another folder for the report" in done.output
    assert not (digits_like_bundle / "index.html").exists()

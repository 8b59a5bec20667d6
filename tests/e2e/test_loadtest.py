"""`offramp loadtest` against a real server."""

import json

import numpy as np
import pytest
from offramp_cli.__main__ import app
from typer.testing import CliRunner


@pytest.fixture
def loadtest():
    runner = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, ["loadtest", *(str(argument) for argument in arguments)])


@pytest.fixture
def data(trained, tmp_path):
    file = tmp_path / "digits.npz"
    np.savez(file, x=trained.data.inputs(trained.data.test), y=trained.data.test.labels_N)
    return file


@pytest.mark.parametrize("api", ["v1", "v2"])
def test_a_run_is_reported_to_the_person_and_in_full_to_a_file(loadtest, served, data, tmp_path, api):
    out = tmp_path / "summary.json"
    done = loadtest(
        served.url, "--data", data, "--rate", 100, "--seconds", 1, "--api", api, "--model", "digits",
        "--field", "policy=confidence", "--field", "threshold=0.9", "--slo-ms", 5000, "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for heading in ("latency, from due", "accuracy", "average depth", "correct goodput", "exit_2"):
        assert heading in done.output
    summary = json.loads(out.read_text())
    assert summary["outcomes"]["ok"] == summary["arrivals"] > 50
    assert summary["accuracy"] > 0.7
    assert sum(summary["exits"].values()) == summary["arrivals"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["http://127.0.0.1:9", "--data", "{data}"], "http://127.0.0.1:9"),
        (["localhost:8000", "--data", "{data}"], "url: "),
        (["http://127.0.0.1:9", "--data", "none.npz"], "none.npz"),
        (["http://127.0.0.1:9", "--data", "{data}", "--rate", "0"], "rate"),
        (["http://127.0.0.1:9", "--data", "{data}", "--field", "policy"], "--field 'policy': write NAME=VALUE"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(loadtest, data, arguments, sentence):
    done = loadtest(*(argument.replace("{data}", str(data)) for argument in arguments))
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert sentence in done.output

"""`offramp loadtest` against a real server."""

import json
from functools import partial

import numpy as np
import pytest
from offramp_cli.__main__ import app
from offramp_loadtest import measure_capacity
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
    out = tmp_path / "out"
    done = loadtest(
        served.url, "--data", data, "--rate", 100, "--seconds", 1, "--api", api, "--model", "digits",
        "--field", "policy=confidence", "--field", "threshold=0.9", "--slo-ms", 5000, "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for heading in ("latency, from due", "accuracy", "average depth", "correct goodput", "exit_2"):
        assert heading in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["outcomes"]["ok"] == summary["arrivals"] > 50
    assert summary["accuracy"] > 0.7
    assert sum(summary["exits"].values()) == summary["arrivals"]
    assert summary["server"]["requests"]["ok"] == summary["arrivals"]
    assert set(summary["server"]["stages"]) >= {"stage_0", "stage_1"}
    assert "<svg" in (out / "report.html").read_text()
    assert len((out / "raw.jsonl").read_text().splitlines()) == summary["arrivals"]


def test_a_scenario_with_loads_measures_the_capacity_and_mixes_in_who_leaves_and_what_is_broken(
    loadtest, served, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("offramp_loadtest.measure_capacity", partial(measure_capacity, seconds=0.3))
    scenario = tmp_path / "soak.toml"
    scenario.write_text("""
        data = "digits.npz"
        model = "digits"
        slo_ms = 5000
        [disturbance]
        disconnect_share = 0.2
        disconnect_within_ms = 5
        bad_share = 0.2
        [[phases]]
        seconds = 60
        load = 0.2
    """)
    done = loadtest(served.url, "--scenario", scenario, "--seconds", 1.5, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    outcomes = summary["outcomes"]
    assert summary["capacity"] > 1
    assert sum(outcomes.values()) == summary["arrivals"]
    records = [json.loads(line) for line in (tmp_path / "out" / "raw.jsonl").read_text().splitlines()]
    assert {record["outcome"] for record in records if record["intent"] == "ask"} == {"ok"}
    assert {record["outcome"] for record in records if record["intent"] == "leave"} <= {"ok", "left"}
    assert {record["outcome"] for record in records if record["intent"] == "bad"} == {"invalid"}
    assert not summary["notes"] or "behind" in summary["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["http://127.0.0.1:9", "--data", "{data}"], "http://127.0.0.1:9"),
        (["localhost:8000", "--data", "{data}"], "url: "),
        (["http://127.0.0.1:9", "--data", "none.npz"], "none.npz"),
        (["http://127.0.0.1:9", "--data", "{data}", "--rate", "0"], "rate"),
        (["http://127.0.0.1:9", "--data", "{data}", "--rate", "1", "--load", "1"], "--rate, --load: give one of them"),
        (["http://127.0.0.1:9", "--scenario", "none.toml"], "none.toml"),
        (["http://127.0.0.1:9"], "data: name the labelled inputs"),
        (["http://127.0.0.1:9", "--data", "{data}", "--field", "policy"], "--field 'policy': write NAME=VALUE"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(loadtest, data, arguments, sentence):
    done = loadtest(*(argument.replace("{data}", str(data)) for argument in arguments))
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert sentence in done.output

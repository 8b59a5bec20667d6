from pathlib import Path

import pytest
from offramp_loadtest import LoadTestError, read_scenario, scenario_of

SHIPPED = sorted((Path(__file__).parents[2] / "loadtest" / "scenarios").glob("*.toml"))
PHASE = {"seconds": 1.0, "rate": 10.0}


def test_the_shipped_scenarios_are_those_that_the_documentation_names():
    assert [file.stem for file in SHIPPED] == [
        "bursty", "drift", "overload", "soak", "static-v2", "steady", "trace"
    ]  # fmt: skip


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_scenario_can_be_read_and_says_what_it_is(file):
    scenario = read_scenario(file)
    assert scenario.name == file.stem
    assert scenario.description
    assert scenario.deadline_ms is not None
    assert scenario.needs_capacity or scenario.arrivals.file.is_file()


def test_files_that_a_scenario_names_are_found_beside_it(tmp_path):
    (tmp_path / "s.toml").write_text(
        'data = "d.npz"\n[difficulty]\nscores = "sub/t.npz"\n[[phases]]\nseconds = 1\nrate = 5\n'
    )
    scenario = read_scenario(tmp_path / "s.toml")
    assert scenario.data == tmp_path / "d.npz"
    assert scenario.difficulty.scores == tmp_path / "sub" / "t.npz"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"phases": []}, "phases: needed, unless arrivals are a trace"),
        ({"phases": [{"seconds": 1.0}]}, "phases.0: needs one of rate and load"),
        ({"phases": [PHASE | {"load": 1.0}]}, "phases.0: needs one of rate and load"),
        ({"phases": [PHASE | {"rate": 0.0}]}, "phases.0.rate: Input should be greater than 0"),
        ({"phases": [PHASE | {"seconds": 86_000.0}] * 2}, "must last at most 86400 s together"),
        ({"arrivals": {"kind": "trace"}}, "arrivals: file: belongs to the kind trace"),
        ({"arrivals": {"kind": "lognormal"}}, "arrivals.kind: Input should be 'poisson', 'gamma', 'fixed' or 'trace'"),
        ({"disturbance": {"disconnect_share": 0.6, "bad_share": 0.6}}, "must be at most 1 together"),
        ({"fields": {"latency_ms": "soon"}}, "latency_ms: must be a number above 0; got 'soon'"),
        ({"slo_ms": -1.0}, "slo_ms: Input should be greater than 0"),
        ({"timeout_s": 0.0}, "timeout_s: Input should be greater than 0"),
        ({"connections": 0}, "connections: Input should be greater than or equal to 1"),
        ({"rps": 10}, "rps: Extra inputs are not permitted"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused_with_its_place(change, sentence):
    with pytest.raises(LoadTestError) as refused:
        scenario_of({"phases": [PHASE]} | change)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("seed = ", "is not TOML"), ("seed = 1\n", "scenario 's.toml': phases"), (None, "No such file")],
)
def test_a_file_that_is_no_scenario_is_refused_in_a_sentence(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "s.toml").write_text(text)
    with pytest.raises(LoadTestError, match=sentence):
        read_scenario(tmp_path / "s.toml")


def test_a_changed_scenario_is_checked_again_and_keeps_the_rest():
    scenario = scenario_of({"phases": [PHASE], "model": "m"})
    assert scenario.changed(seed=7).model == "m"
    with pytest.raises(LoadTestError, match="seed"):
        scenario.changed(seed=-1)

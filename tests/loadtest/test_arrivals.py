import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_loadtest import LoadTestError, scenario_of
from offramp_loadtest.arrivals import due_times_s, planned_seconds

KINDS = st.sampled_from(["poisson", "gamma", "fixed"])
PHASES = st.lists(
    st.tuples(st.floats(0.1, 3.0), st.floats(1.0, 300.0), st.none() | st.floats(1.0, 300.0)).map(
        lambda drawn: {"seconds": drawn[0], "rate": drawn[1]} | ({} if drawn[2] is None else {"to": drawn[2]})
    ),
    min_size=1,
    max_size=4,
)


def scenario(kind="poisson", phases=({"seconds": 1.0, "rate": 100.0},), seed=0, **changes):
    return scenario_of({"arrivals": {"kind": kind}, "phases": phases, "seed": seed} | changes)


@given(KINDS, PHASES, st.integers(0, 2**32 - 1))
def test_due_times_rise_end_before_the_phases_do_and_come_again_from_the_same_seed(kind, phases, seed):
    plan = scenario(kind, [{"seconds": 1.0, "rate": 200.0}, *phases], seed)
    times = due_times_s(plan)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < plan.seconds)).all()
    np.testing.assert_array_equal(times, due_times_s(plan))


@given(PHASES)
def test_every_phase_gets_the_requests_of_its_rates(phases):
    times = due_times_s(scenario("fixed", [{"seconds": 0.5, "rate": 100.0}, *phases]))
    begin = 0.5
    for phase in phases:
        end = begin + phase["seconds"]
        expected = phase["seconds"] * (phase["rate"] + phase.get("to", phase["rate"])) / 2
        assert ((times >= begin) & (times < end)).sum() == pytest.approx(expected, abs=2)
        begin = end


def test_poisson_gaps_are_exponential():
    gaps = np.diff(due_times_s(scenario(phases=[{"seconds": 200.0, "rate": 100.0}], seed=1)))
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > 0.01).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_gamma_gaps_have_the_variation_that_is_asked_for():
    plan = scenario_of(
        {"arrivals": {"kind": "gamma", "cv2": 4.0}, "phases": [{"seconds": 500.0, "rate": 100.0}], "seed": 1}
    )
    gaps = np.diff(due_times_s(plan))
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(4.0, rel=0.1)


def test_fixed_arrivals_are_evenly_spaced_and_a_ramp_tightens_them():
    times = due_times_s(scenario("fixed", [{"seconds": 1.0, "rate": 10.0}]))
    np.testing.assert_allclose(np.diff(times), 0.1)
    assert len(times) == 9
    climbing = np.diff(due_times_s(scenario("fixed", [{"seconds": 10.0, "rate": 10.0, "to": 100.0}])))
    assert (np.diff(climbing) < 0).all()
    assert climbing[-1] == pytest.approx(0.01, rel=0.02)


def test_a_load_is_a_share_of_the_capacity():
    phases = [{"seconds": 10.0, "load": 0.5}]
    assert len(due_times_s(scenario("fixed", phases, capacity=200.0))) == 999
    with pytest.raises(LoadTestError, match="capacity: needed for phases with a load"):
        due_times_s(scenario("fixed", phases))


def test_a_run_is_bounded_in_count_and_its_length_then_ends_with_the_last_request():
    plan = scenario("fixed", [{"seconds": 100.0, "rate": 10.0}], max_requests=5)
    times = due_times_s(plan)
    assert len(times) == 5
    assert planned_seconds(plan, times) == pytest.approx(0.5)
    with pytest.raises(LoadTestError, match="at most 1000000 requests together; these are 60000000"):
        due_times_s(scenario(phases=[{"seconds": 60.0, "rate": 1e6}]))
    with pytest.raises(LoadTestError, match="no request is due"):
        due_times_s(scenario("fixed", [{"seconds": 1.0, "rate": 0.5}]))


@pytest.mark.parametrize(
    ("text", "holds", "expected"),
    [
        ("# a comment\n10.0\n10.5 # the second\n\n11.5\n", "times", [0.0, 0.25, 0.75]),
        ("0.5\n0\n1.5\n", "gaps", [0.25, 0.25, 1.0]),
    ],
)
def test_a_trace_is_replayed_from_its_first_moment_at_the_speed_that_is_asked_for(tmp_path, text, holds, expected):
    (tmp_path / "t.txt").write_text(text)
    arrivals = {"kind": "trace", "file": tmp_path / "t.txt", "holds": holds, "speed": 2.0}
    np.testing.assert_allclose(due_times_s(scenario_of({"arrivals": arrivals})), expected)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1\ntwo\n", "must hold a number per line"),
        ("2\n1\n", "must hold rising times"),
        ("", "must hold rising times"),
        ("nan\n", "must hold rising times"),
        ("0\n1e9\n", "at most 1000000 requests in 86400 s"),
        (None, "No such file"),
    ],
)
def test_a_broken_trace_is_refused_in_a_sentence(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "t.txt").write_text(text)
    with pytest.raises(LoadTestError, match=sentence):
        due_times_s(scenario_of({"arrivals": {"kind": "trace", "file": tmp_path / "t.txt"}}))

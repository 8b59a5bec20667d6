"""Who may come in, and when a refused one should try again."""

import pytest
from offramp_contract.errors import DeadlineExceeded, InvalidValue, Overloaded, TooLarge
from offramp_server.admission import LEAST_RETRY_AFTER_S, Admission
from offramp_server.engine_settings import EngineSettings

FAR = float("inf")


@pytest.fixture
def served(simulate, chain):
    """A model whose rows take 10 ms a stage, 30 ms in all."""
    return simulate().add(chain, lambda stage, rows: 0.01 * rows)


def test_rows_are_counted_in_and_out(served, options):
    admission = Admission(EngineSettings())
    assert admission.admit(served, 3, options(), FAR) == 3
    assert admission.admit(served, 2, options(), FAR) == 5
    assert admission.num_inflight() == admission.num_inflight(served) == 5
    assert admission.release(served, 5) == 0
    assert admission.num_inflight() == 0


def test_rows_over_the_limit_are_refused_and_not_counted(served, options):
    admission = Admission(EngineSettings(max_inflight_samples=4))
    admission.admit(served, 3, options(), FAR)
    with pytest.raises(Overloaded) as refusal:
        admission.admit(served, 2, options(), FAR)
    assert LEAST_RETRY_AFTER_S <= refusal.value.retry_after_s <= 3 * 0.03
    assert admission.num_inflight() == 3
    assert admission.admit(served, 1, options(), FAR) == 4


def test_more_rows_than_may_ever_be_in_flight_are_too_large_whatever_the_load(served, options):
    with pytest.raises(TooLarge, match="at most 4 rows"):
        Admission(EngineSettings(max_inflight_samples=4)).admit(served, 5, options(), FAR)


def test_a_predicted_wait_over_the_limit_refuses_until_it_has_shrunk(served, options):
    admission = Admission(EngineSettings(max_wait_ms=100.0))
    admission.admit(served, 10, options(), FAR)  # nobody waits before the first
    with pytest.raises(Overloaded) as refusal:
        admission.admit(served, 1, options(), FAR)
    assert refusal.value.retry_after_s == pytest.approx(0.2)  # 10 rows of 30 ms, and 100 ms are allowed
    admission.release(served, 7)
    assert admission.admit(served, 1, options(), FAR) == 4


def test_early_exits_make_room(served, options):
    """The wait is predicted from what rows really take."""
    admission = Admission(EngineSettings(max_wait_ms=150.0))
    admission.admit(served, 10, options(), FAR)
    for _ in range(1000):
        served.profile.observe_row(0.01)
    assert admission.admit(served, 1, options(), FAR) == 11


def test_rows_of_every_model_count_for_the_wait(served, simulate, make_net, options):
    other = simulate().add(make_net(name="other"), lambda stage, rows: 0.01 * rows)
    admission = Admission(EngineSettings(max_wait_ms=100.0))
    admission.admit(other, 10, options(), FAR)
    with pytest.raises(Overloaded):
        admission.admit(served, 1, options(), FAR)


@pytest.mark.parametrize(("remaining_s", "is_refused"), [(0.005, True), (0.02, False)])
def test_only_who_would_rather_be_refused_is_refused_for_a_deadline_out_of_reach(
    served, options, remaining_s, is_refused
):
    admission = Admission(EngineSettings(margin_ms=1.0))
    admission.admit(served, 1, options(), remaining_s)
    if is_refused:
        with pytest.raises(DeadlineExceeded):
            admission.admit(served, 1, options(on_miss="reject"), remaining_s)
    else:
        admission.admit(served, 1, options(on_miss="reject"), remaining_s)
    assert admission.num_inflight() == 2 - is_refused


def test_waiting_for_an_empty_house_gives_up_at_the_timeout(served, options):
    admission = Admission(EngineSettings())
    assert admission.wait_until_empty(None, 0.0)
    admission.admit(served, 1, options(), FAR)
    assert not admission.wait_until_empty(None, 0.0)
    assert not admission.wait_until_empty(served, 0.0)
    admission.release(served, 1)
    assert admission.wait_until_empty(served, 0.0)


@pytest.mark.parametrize(
    "knob",
    [
        {"max_batch": 0},
        {"max_inflight_samples": 0},
        {"max_wait_ms": 0.0},
        {"default_latency_ms": 0.0},
        {"default_latency_ms": -1.0},
        {"margin_ms": -0.1},
        {"margin_ms": float("nan")},
        {"warm_up_s": float("nan")},
        {"fair_share_ms": 0.0},
    ],
)
def test_a_knob_that_makes_no_sense_is_refused_by_name(knob):
    (name,) = knob
    with pytest.raises(InvalidValue, match=name):
        EngineSettings(**knob)


def test_no_default_deadline_is_a_choice():
    assert EngineSettings(default_latency_ms=None).default_latency_ms is None

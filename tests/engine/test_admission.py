"""Who may come in, and when a refused one should try again."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.errors import DeadlineExceeded, InvalidValue, Overloaded, TooLarge
from offramp_server.admission import LEAST_RETRY_AFTER_S, MAX_RETRY_AFTER_S, Admission
from offramp_server.engine_settings import EngineSettings

FAR = float("inf")


@pytest.fixture
def served(simulate, chain):
    """A model whose rows take 10 ms a stage, 30 ms in all."""
    return simulate().add(chain, lambda stage, rows: 0.01 * rows)


@pytest.fixture(scope="module")
def a_model(simulate, chain):
    """The same, for tests that leave it as it is."""
    return simulate().add(chain, lambda stage, rows: 0.01 * rows)


@pytest.fixture
def admission_of():
    """Open the house under some settings; no time is kept free before deadlines."""

    def make(num_unseen=None, **settings):
        return Admission(EngineSettings(**{"margin_ms": 0.0} | settings), num_unseen)

    return make


@pytest.fixture
def admit(options):
    """Ask for some rows to be let in; by default they have all the time in the world."""

    def ask(admission, served, num_rows=1, remaining_s=FAR, *, gear=None, now=0.0, **given_):
        return admission.admit(served, num_rows, options(**given_), remaining_s, now=now, gear=gear)

    return ask


class Told:
    """Gears that only listen."""

    def __init__(self):
        self.heard = []

    def observe(self, wait_s, budget_s, load, now):
        self.heard.append((wait_s, budget_s, load, now))


def test_rows_are_counted_in_and_out(served, admission_of, admit):
    admission = admission_of()
    assert admit(admission, served, 3).num_inflight == 3
    lot, num_inflight = admit(admission, served, 2)
    assert num_inflight == admission.num_inflight() == admission.num_inflight(served) == 5
    assert admission.release(lot, 5) == 0
    assert admission.num_inflight() == 0


def test_rows_over_the_limit_are_refused_and_not_counted(served, admission_of, admit):
    admission = admission_of(max_inflight_samples=4)
    admit(admission, served, 3)
    with pytest.raises(Overloaded) as refusal:
        admit(admission, served, 2)
    assert refusal.value.retry_after_s == LEAST_RETRY_AFTER_S  # one row of 30 ms has to leave
    assert admission.num_inflight() == 3
    assert admit(admission, served).num_inflight == 4


def test_more_rows_than_may_ever_be_in_flight_are_too_large_whatever_the_load(served, admission_of, admit):
    with pytest.raises(TooLarge, match="at most 4 rows"):
        admit(admission_of(max_inflight_samples=4), served, 5)


def test_a_predicted_wait_over_the_limit_refuses_until_it_has_shrunk(served, admission_of, admit):
    admission = admission_of(max_wait_ms=100.0)
    lot, _ = admit(admission, served, 10)  # nobody waits before the first
    with pytest.raises(Overloaded) as refusal:
        admit(admission, served)
    assert refusal.value.retry_after_s == pytest.approx(0.2)  # 10 rows of 30 ms, and 100 ms are allowed
    admission.release(lot, 7)
    assert admit(admission, served).num_inflight == 4


def test_early_exits_make_room(served, admission_of, admit):
    """The wait is predicted from what rows really take, those that a deadline cut short included."""
    for is_forced in (False, True):
        admission = admission_of(max_wait_ms=150.0)
        admit(admission, served, 10)
        for _ in range(2000):
            served.costs.observe(None, 0, 0.3, is_forced=is_forced)
        assert admit(admission, served).num_inflight == 11


def test_rows_of_every_model_count_for_the_wait(served, simulate, make_net, admission_of, admit):
    other = simulate().add(make_net(name="other"), lambda stage, rows: 0.01 * rows)
    admission = admission_of(max_wait_ms=100.0)
    admit(admission, other, 10)
    with pytest.raises(Overloaded):
        admit(admission, served)


def test_several_runners_share_the_wait(served, admission_of, admit):
    admission = admission_of(max_wait_ms=200.0, runners=2)
    admit(admission, served, 10)
    assert admit(admission, served).num_inflight == 11


@pytest.mark.parametrize(("remaining_s", "is_refused"), [(0.005, True), (0.02, False)])
def test_only_who_would_rather_be_refused_is_refused_for_a_deadline_out_of_reach(
    served, admission_of, admit, remaining_s, is_refused
):
    admission = admission_of(margin_ms=1.0)
    admit(admission, served, remaining_s=remaining_s)
    if is_refused:
        with pytest.raises(DeadlineExceeded):
            admit(admission, served, remaining_s=remaining_s, on_miss="reject")
    else:
        admit(admission, served, remaining_s=1.0, on_miss="reject")
    assert admission.num_inflight() == 2 - is_refused


@pytest.mark.parametrize(("on_miss", "num_answered"), [("answer", 12), ("reject", 9)])
def test_without_overload_a_burst_is_answered_late_unless_it_would_rather_be_refused(
    served, admission_of, admit, on_miss, num_answered
):
    """Twelve rows at once in four quiet seconds: 0.36 s of work, and the last three come too late."""
    admission = admission_of()
    lot, _ = admit(admission, served, now=0.0)
    admission.release(lot, 1)
    for _ in range(12):
        with suppress(Overloaded):
            admit(admission, served, remaining_s=0.1, now=4.0, on_miss=on_miss)
    assert admission.num_inflight() == num_answered


def test_who_cannot_reach_the_first_exit_for_all_that_come_first_is_refused_at_once(served, admission_of, admit):
    """The first exit takes 10 ms a row; rows ahead may leave there, so that only their first stage counts."""
    admission = admission_of()
    for _ in range(9):
        admit(admission, served, remaining_s=0.1)
    with pytest.raises(Overloaded, match="so many rows come first") as refusal:
        admit(admission, served, remaining_s=0.1)
    assert refusal.value.retry_after_s == LEAST_RETRY_AFTER_S
    admit(admission, served, 20, remaining_s=0.04)
    with pytest.raises(Overloaded) as refusal:
        admit(admission, served, remaining_s=0.04)
    assert refusal.value.retry_after_s == pytest.approx(0.2 - 0.03, abs=0.001)  # its own row takes at most 10.8 ms


def test_rows_with_more_time_are_not_in_the_way_of_one_with_less(served, admission_of, admit):
    admission = admission_of(max_wait_ms=60_000.0)
    admit(admission, served, 200, remaining_s=10.0)
    assert admit(admission, served, remaining_s=0.05).num_inflight == 201


@pytest.mark.parametrize("remaining_s", [0.0321, 0.0643, 0.1, 0.128, 1.001, 5.0])
@pytest.mark.parametrize(("share", "is_in_the_way"), [(0.99, True), (0.9, True), (0.6, False), (0.5, False)])
def test_rows_with_about_as_much_time_are_in_the_way(  # noqa: PLR0917  # fixtures and parameters
    served, admission_of, admit, remaining_s, share, is_in_the_way
):
    """Whatever the time is: requests that ask for the same have been on the way for different times."""
    served.gears = told = Told()
    admission = admission_of(max_wait_ms=60_000.0)
    admit(admission, served, remaining_s=remaining_s)
    admit(admission, served, remaining_s=share * remaining_s)
    assert told.heard[-1][0] == pytest.approx(0.03 * is_in_the_way)


def test_rows_that_have_seen_an_exit_are_not_in_the_way(served, admission_of, admit):
    waiting = {"unseen": 20}
    admission = admission_of(num_unseen=lambda model: waiting["unseen"])
    admit(admission, served, 20, remaining_s=0.1)
    with pytest.raises(Overloaded):
        admit(admission, served, remaining_s=0.1)
    waiting["unseen"] = 5
    assert admit(admission, served, remaining_s=0.1).num_inflight == 21


def test_gears_are_told_what_each_request_meets(served, admission_of, admit):
    served.gears = told = Told()
    admission = admission_of(max_wait_ms=500.0)
    admit(admission, served, 2, remaining_s=0.1, now=5.0)
    admit(admission, served, 3, remaining_s=0.1, now=5.0)
    admit(admission, served, 1, remaining_s=0.02, now=6.0)  # it comes before the others
    admit(admission, served, 1, remaining_s=FAR, now=7.0)
    waits, budgets, _, times = zip(*told.heard, strict=True)
    assert waits == pytest.approx([0.0, 2 * 0.03, 0.0, 6 * 0.03])
    assert budgets == (0.1, 0.1, 0.02, 0.5)
    assert times == (5.0, 5.0, 6.0, 7.0)


def test_gears_are_told_what_rows_ask_for_however_little_their_deadlines_let_them_take(served, admission_of, admit):
    served.gears = told = Told()
    for _ in range(2000):
        served.costs.observe(None, 0, 0.3, is_forced=True)
    admission = admission_of()
    admit(admission, served, 10)
    admit(admission, served)
    assert told.heard[-1][0] == pytest.approx(10 * 0.03, rel=0.01)


def test_the_load_is_the_share_of_the_device_that_is_asked_for(served, admission_of, admit):
    """Half a row of 30 ms each 10 ms: one and a half devices."""
    served.gears = told = Told()
    admission = admission_of(max_inflight_samples=10**6)
    for index in range(1000):
        lot, _ = admit(admission, served, now=index * 0.02)
        admission.release(lot, 1)
    loads = [heard[2] for heard in told.heard]
    assert loads[-1] == pytest.approx(1.5, rel=0.01)
    assert loads[100] == pytest.approx(1.5, rel=0.05)  # known long before the window is full


def test_who_is_refused_counts_for_the_gears_too(served, admission_of, admit):
    served.gears = told = Told()
    admission = admission_of(max_wait_ms=100.0)
    admit(admission, served, 10)
    with pytest.raises(Overloaded):
        admit(admission, served)
    assert len(told.heard) == 2


def test_rows_are_counted_by_the_gear_they_were_admitted_in(served, admission_of, admit):
    first, _ = admit(admission := admission_of(), served, 2, remaining_s=0.1, gear=None)
    second, _ = admit(admission, served, 3, remaining_s=0.1, gear=None)
    assert first is second
    longer, _ = admit(admission, served, 4, remaining_s=9.0)
    assert longer is not first
    assert (first.num_rows, longer.num_rows) == (5, 4)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(-1.0, 1e4) | st.just(FAR), st.booleans()), max_size=40),
    st.floats(0.0, 10.0),
)
def test_whatever_comes_a_refusal_says_within_bounds_when_to_return_and_all_is_empty_in_the_end(
    a_model, options, requests, gap_s
):
    admission = Admission(EngineSettings(max_inflight_samples=64, max_wait_ms=500.0))
    inside, returns, now = [], [], 0.0
    for num_rows, remaining_s, leaves in requests:
        now += gap_s
        try:
            lot, num_inflight = admission.admit(a_model, num_rows, options(), remaining_s, now=now)
        except Overloaded as refusal:
            returns.append(refusal.retry_after_s)
        else:
            inside.append((lot, num_rows))
            assert num_inflight == sum(rows for _, rows in inside) <= 64
        if leaves and inside:
            admission.release(*inside.pop())
    assert all(LEAST_RETRY_AFTER_S <= seconds <= MAX_RETRY_AFTER_S for seconds in returns)
    for lot, num_rows in inside:
        admission.release(lot, num_rows)
    assert admission.num_inflight() == admission.num_inflight(a_model) == 0
    assert admission.admit(a_model, 64, options(), FAR, now=now).num_inflight == 64


def test_waiting_for_an_empty_house_gives_up_at_the_timeout(served, admission_of, admit):
    admission = admission_of()
    assert admission.wait_until_empty(None, 0.0)
    lot, _ = admit(admission, served)
    assert not admission.wait_until_empty(None, 0.0)
    assert not admission.wait_until_empty(served, 0.0)
    admission.release(lot, 1)
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
        {"inline_ms": -1.0},
        {"warm_up_s": float("nan")},
        {"fair_share_ms": 0.0},
        {"batch_timeout_ms": 0.0},
        {"gear_floor_accuracy": 1.0},
        {"gear_floor_risk": 0.0},
    ],
)
def test_a_knob_that_makes_no_sense_is_refused_by_name(knob):
    (name,) = knob
    with pytest.raises(InvalidValue, match=name):
        EngineSettings(**knob)


def test_no_default_deadline_is_a_choice():
    assert EngineSettings(default_latency_ms=None).default_latency_ms is None

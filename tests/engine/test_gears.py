"""The law that shifts gears, on a clock of the test's own."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_server.gears import CALM, MAX_PATIENCE_S, PATIENCE_S, PRESSED, SETTLE_SHARE, Gears

COSTS = (1.0, 0.8, 0.6, 0.45, 0.3)
LAST = len(COSTS) - 1
BUDGET_S = 0.05


def gears_of(costs=COSTS):
    return Gears(len(costs), costs.__getitem__)


def meet(gears, pressure, now, load=9.0):
    """Let a request arrive that will wait this share of its budget."""
    return gears.observe(pressure * BUDGET_S, BUDGET_S, load, now)


def pressed(gears):
    """Shift to the last gear; gives the time when the backlog that did is gone."""
    assert meet(gears, 1.0, 0.0) == LAST
    return BUDGET_S


def constant(gears, load, seconds, gap_s=0.005, now=0.0):
    """Let requests of so much work come evenly at a device that does one unit a second; gives each one's gear.

    Args:
        gears: The law.
        load: The work that comes per second, in gear 0.
        seconds: How long.
        gap_s: The time between two requests.
        now: When the first comes.
    """
    backlog_s, served = 0.0, []
    for _ in range(round(seconds / gap_s)):
        gear = gears.at(now)
        gears.observe(backlog_s, BUDGET_S, load * COSTS[gear], now)
        # What has waited for its whole budget leaves with what it has.
        backlog_s = min(max(0.0, backlog_s + (load * COSTS[gear] - 1.0) * gap_s), BUDGET_S)
        served.append(gear)
        now += gap_s
    return served


def test_without_a_backlog_requests_get_what_they_get_now():
    gears = gears_of()
    assert gears.at(0.0) == 0
    assert [meet(gears, pressure, now) for now, pressure in enumerate((0.0, CALM, PRESSED - 0.01))] == [0, 0, 0]


def test_pressure_shifts_up_at_once_and_then_no_faster_than_a_shift_can_show():
    gears, settle_s = gears_of(), SETTLE_SHARE * BUDGET_S
    assert meet(gears, 1.0, 10.0, load=1.1) == 1
    assert meet(gears, 1.0, 10.0 + 0.9 * settle_s, load=1.1) == 1
    assert meet(gears, 1.0, 10.0 + 1.1 * settle_s, load=1.0) == 2


@pytest.mark.parametrize(("load", "gear"), [(1.2, 1), (1.3, 2), (2.0, 3), (3.0, 4), (99.0, 4)])
def test_a_shift_up_goes_as_far_as_the_load_needs(load, gear):
    assert meet(gears_of(), 1.0, 0.0, load) == gear


def test_the_gear_falls_by_one_a_second_where_the_load_fits():
    gears = gears_of()
    now = pressed(gears)
    fallen = [meet(gears, 0.0, now + tenth / 10, load=0.1) for tenth in range(45)]
    assert fallen == sorted(fallen, reverse=True)
    assert all(before - after in (0, 1) for before, after in pairwise(fallen))
    assert fallen[8] == LAST
    assert fallen[-1] == 0


@pytest.mark.parametrize(("pressure", "load"), [(CALM + 0.01, 0.1), (0.0, 0.64)])
def test_it_does_not_fall_under_some_pressure_nor_to_a_gear_that_the_load_would_fill(pressure, load):
    """In the last gear, which costs 0.3, a load of 0.64 is one of 0.96 in the gear below."""
    gears = gears_of()
    now = pressed(gears)
    assert {meet(gears, pressure, now + half * 0.5, load) for half in range(50)} == {LAST}


def test_without_requests_it_falls_by_itself():
    gears = gears_of()
    now = pressed(gears)
    seen = [gears.at(now + second * PATIENCE_S + 1e-6) for second in range(LAST + 2)]
    assert seen == [4, 3, 2, 1, 0, 0]
    assert meet(gears, 0.0, now + 99.0) == 0


def test_it_does_not_fall_while_a_backlog_of_slow_rows_is_left():
    gears = gears_of()
    assert gears.observe(25.0, 30.0, 9.0, 0.0) == LAST
    assert gears.at(25.0 + 0.9 * PATIENCE_S) == LAST
    assert gears.at(25.0 + 1.1 * PATIENCE_S) == LAST - 1


def test_a_shift_down_that_has_to_be_taken_back_makes_the_next_wait_twice_as_long():
    gears, now = gears_of(), 0.0
    waits = []
    for _ in range(7):
        meet(gears, 1.0, now, load=1.1)
        shifted = now
        while gears.at(now) == 1:
            now += 0.01
            meet(gears, 0.0, now, load=0.1)
        waits.append(now - shifted)
        now += 0.1
    assert waits == pytest.approx([min(2.0**n, MAX_PATIENCE_S) for n in range(7)], abs=0.02)


def test_a_gear_that_turns_out_dearer_than_what_requests_get_now_is_passed_over():
    """Nobody has calibrated the default policy, which rows in gear 0 show to cost 0.5."""
    gears = gears_of((0.5, 0.8, 0.6, 0.4, 0.3))
    assert meet(gears, 1.0, 0.0, load=1.01) == 3
    assert meet(gears, 0.0, 0.0 + PATIENCE_S, load=0.1) == 0


def test_where_no_gear_is_cheaper_there_is_nothing_to_shift_to():
    assert meet(gears_of((0.2, 0.8, 0.6)), 1.0, 0.0) == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 0.3), st.floats(0.0, 5.0)), max_size=60))
def test_whatever_arrives_the_gear_is_on_the_ladder_and_ends_at_0_once_nothing_does(events):
    gears, now = gears_of(), 0.0
    for pressure, gap_s, load in events:
        now += gap_s
        before = gears.at(now)
        after = meet(gears, pressure, now, load)
        assert 0 <= after <= LAST
        assert after == gears.at(now)
        assert after >= before - 1
        assert after <= before or pressure >= PRESSED
    falling = [gears.at(now + second) for second in range(int(LAST * MAX_PATIENCE_S) + 2)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 1.0), st.floats(0.0, 0.2)), max_size=40))
def test_more_pressure_never_means_a_lower_gear(events):
    """Of two that meet the same requests under the same load, one of them always with more pressure."""
    low, high, now = gears_of(), gears_of(), 0.0
    for pressure, more, gap_s in events:
        now += gap_s
        assert meet(low, pressure, now) <= meet(high, pressure + more, now)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 4.0))
def test_a_constant_load_finds_its_gear_and_stays_there(load):
    served = constant(gears_of(), load, seconds=20, gap_s=0.01)
    settled = served[len(served) // 2 :]
    fits = next((gear for gear, cost in enumerate(COSTS) if load * cost <= 1.0), LAST)
    # A backlog that grows by a few per cent a second may press nobody before the end.
    nearly = next((gear for gear, cost in enumerate(COSTS) if load * cost <= 1.05), LAST)
    assert set(settled) <= {nearly, fits, min(fits + 1, LAST)}
    assert sum(before != after for before, after in pairwise(settled)) <= 2


def test_more_load_settles_in_a_higher_gear():
    settled = [constant(gears_of(), load, seconds=8)[-1] for load in (0.5, 0.9, 1.2, 1.6, 2.1, 3.2, 9.0)]
    assert settled == sorted(settled)
    assert settled[0] == 0
    assert settled[-1] == LAST


def test_after_a_burst_it_returns_to_what_requests_got_before():
    gears = gears_of()
    assert constant(gears, 2.5, seconds=5)[-1] > 2
    after = constant(gears, 0.5, seconds=20, now=5.0)
    assert after == sorted(after, reverse=True)
    assert after[-1] == 0

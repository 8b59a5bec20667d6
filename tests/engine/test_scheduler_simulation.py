"""The scheduler against simulated devices: discrete events, a clock of the test's own, the real scheduler and profile.

Rows arrive over time, each with its own depth, gates and deadline; one or several runners take what the scheduler
gives them. Laws that hold for any load come first, then what each of its rules is worth.
"""

import heapq
import math
import random
from dataclasses import dataclass, field
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_server.profile import Profile
from offramp_server.rules import Rules
from offramp_server.scheduler import QueueKey, Scheduler
from offramp_server.stage_profile import StageProfile
from offramp_server.widths import Width

EPSILON = 1e-9
MAX_BATCH = 8


@dataclass(eq=False)
class Row:
    """A row on its way: it leaves voluntarily at `leaves_at`, and its gates open for the stages in `opens`."""

    arrival_s: float
    leaves_at: int
    deadline_s: float = math.inf
    opens: frozenset[int] = frozenset()
    may_be_dropped: bool = False
    is_cancelled: bool = False
    enqueued_s: float = 0.0
    cohort: int = 0
    stages: list[int] = field(default_factory=list)
    answered_s: float | None = None
    is_forced: bool = False

    @property
    def budget_s(self):
        return self.deadline_s - self.arrival_s


@dataclass(frozen=True)
class Net:
    """A network: what a stage costs, and which stages are gated; trunk stages end in exits, the last or all of them."""

    cost: object
    num_stages: int = 3
    gated: frozenset[int] = frozenset()

    def profile(self, max_batch=MAX_BATCH, batch_sizes=None):
        exits = [self.num_stages - 1] if self.gated else range(self.num_stages)
        profile = Profile(exits, self.num_stages, max_batch, self.gated, batch_sizes)
        for index, stage in enumerate(profile.stages):
            for batch in batch_sizes or range(1, max_batch + 1):
                stage.calibrate(batch, [self.cost(index, batch)])
        return profile


class Device:
    """Runs rows through one network; every event happens at its time, in order.

    `measured` is the network as a warm-up has seen it, if that was not what it is. `shared` says how many times as long
    a stage takes with one of the threads that runners share out, as many as there are of them; without it each runner
    has its own.
    """

    def __init__(
        self,
        net,
        rules=None,
        *,
        runners=1,
        margin_s=0.0,
        batch_sizes=None,
        max_batch=MAX_BATCH,
        measured=None,
        shared=None,
    ):
        self.net = net
        self.profile = (measured or net).profile(max_batch, batch_sizes)
        wide, narrow, self.cost = Width(self.profile, 0, runners), None, {0: net.cost}
        if shared is not None:
            wide, self.cost[runners] = Width(self.profile, runners), net.cost
            self.cost[1] = lambda stage, rows: shared * net.cost(stage, rows)
            narrow = Width(self.profile.beside(), 1, runners)
            for index, stage in enumerate(narrow.profile.stages):
                for batch in batch_sizes or range(1, max_batch + 1):
                    stage.calibrate(batch, [self.cost[1](index, batch)])
        self.scheduler = Scheduler(max_batch, margin_s, 0.05, rules, 0 if shared is None else runners)
        self.scheduler.add_model([QueueKey("m", stage) for stage in range(net.num_stages)], wide, narrow)
        self.runners = runners
        self.now = 0.0
        self.dispatches = []
        self.busy_s = 0.0
        self.idle_with_work_s = 0.0

    def run(self, rows):
        """Let rows arrive and run until all are answered."""
        arrivals = sorted(rows, key=lambda row: row.arrival_s, reverse=True)
        running, number = [], 0
        while arrivals or running or len(self.scheduler):
            while arrivals and arrivals[-1].arrival_s <= self.now:
                row = arrivals.pop()
                self._put(0, [row])
            while running and running[0][0] <= self.now:
                self._finish(heapq.heappop(running)[2])
            while len(running) < self.runners and (dispatch := self._next()) is not None:
                took_s = self.took_s(dispatch)
                self.busy_s += took_s
                number += 1
                heapq.heappush(running, (self.now + took_s, number, dispatch))
            events = [running[0][0]] if running else []
            events += [arrivals[-1].arrival_s] if arrivals else []
            if self.scheduler.may_start and len(running) < self.runners:
                events.append(self.now + max(self.scheduler.wait_s(self.now), 1e-6))
                self.idle_with_work_s += min(events) - self.now
            self.now = min(events, default=self.now)
        return self

    def _next(self):
        for row in self.scheduler.take_hurried(self.now):
            self._put(self.profile.trunk_from(row.stages[-1] + 1), [row])
        for row in self.scheduler.take_expired(self.now):
            row.answered_s, row.is_forced = self.now, True
        dispatch = self.scheduler.next(self.now)
        if dispatch is not None:
            self.dispatches.append((self.now, dispatch))
            for row in dispatch.overtaken:
                row.answered_s, row.is_forced = self.now, True
        return dispatch

    def _finish(self, dispatch):
        following = {}
        stage = dispatch.key.stage
        for row in dispatch.samples:
            row.stages.append(stage)
            if stage == self.net.num_stages - 1 or (not self.net.gated and stage >= row.leaves_at):
                row.answered_s = self.now
                continue
            ahead = (s for s in range(stage + 1, self.net.num_stages) if s not in self.net.gated or s in row.opens)
            following.setdefault(next(ahead), []).append(row)
        took_s = self.took_s(dispatch)
        dispatch.width.profile.stages[stage].observe(len(dispatch.samples), took_s)
        for at, rows in following.items():
            self.profile.observe_gates(range(stage + 1, at), at, len(rows))
            self._put(at, rows)
        self.scheduler.finish(dispatch, took_s)

    def took_s(self, dispatch):
        return self.cost[dispatch.width.num_threads](dispatch.key.stage, dispatch.num_padded)

    def _put(self, stage, rows):
        for row in rows:
            row.enqueued_s = self.now
        self.scheduler.put(QueueKey("m", stage), rows)

    @property
    def mean_batch(self):
        return fmean(len(dispatch.samples) for _, dispatch in self.dispatches)

    def mean_batch_behind(self, stage):
        return fmean(len(dispatch.samples) for _, dispatch in self.dispatches if dispatch.key.stage > stage)


def flat(stage, rows):
    return 1.0


def linear(stage, rows):
    return 1.0 * rows


def part_flat(stage, rows):
    """A fixed part and one per row: 8 rows together cost less than half of 8 alone."""
    return 0.6 + 0.4 * rows


def uneven(stage, rows):
    """A long first stage and short ones behind it."""
    return 4.0 + rows if stage == 0 else 0.5


def traffic(seed, count, rate, *, num_stages=3, budget_s=math.inf, gated=(), open_rate=0.5):
    """Draw rows that come at random, leave at random exits and open gates at random."""
    rng, now, rows = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        opens = frozenset(stage for stage in gated if rng.random() < open_rate)
        rows.append(Row(now, rng.randrange(num_stages), now + budget_s * rng.uniform(0.3, 1.7), opens))
    return rows


nets = st.builds(
    Net,
    st.sampled_from([flat, linear, part_flat, uneven]),
    st.just(5),
    st.sampled_from([frozenset(), frozenset({1, 3}), frozenset({1, 2})]),
)
rules = st.builds(Rules, rebatch=st.booleans(), hold=st.booleans(), forced_exits=st.booleans())
loads = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "count": st.integers(1, 60),
        "rate": st.sampled_from([0.05, 0.3, 1.0, 5.0]),
        "budget_s": st.sampled_from([4.0, 12.0, 40.0, math.inf]),
    }
)

runners = st.one_of(
    st.fixed_dictionaries({"runners": st.integers(1, 3)}),
    st.fixed_dictionaries({"runners": st.integers(2, 3), "shared": st.sampled_from([1.0, 1.8])}),
)


def rows_for(net, load):
    return traffic(**load, num_stages=net.num_stages, gated=net.gated)


@settings(max_examples=60, deadline=None)
@given(nets, rules, loads, runners, st.sampled_from([None, (1, 4, 8)]))
def test_every_row_runs_its_stages_in_order_until_it_leaves(net, rules, load, runners, batch_sizes):
    rows = rows_for(net, load)
    Device(net, rules, **runners, batch_sizes=batch_sizes).run(rows)
    for row in rows:
        assert row.answered_s is not None
        assert row.stages == sorted(set(row.stages))
        if not net.gated and not row.is_forced:
            assert row.stages == list(range(row.leaves_at + 1))
        elif net.gated and load["budget_s"] == math.inf:
            trunk = set(range(net.num_stages)) - net.gated
            assert set(row.stages) == trunk | row.opens


@settings(max_examples=60, deadline=None)
@given(nets, rules, loads, st.integers(1, 3))
def test_no_runner_is_idle_while_a_row_waits(net, rules, load, runners):
    device = Device(net, rules, runners=runners).run(rows_for(net, load))
    assert device.idle_with_work_s == 0.0


@settings(max_examples=60, deadline=None)
@given(nets, loads, runners, st.booleans())
def test_a_row_with_an_answer_in_hand_is_never_late(net, load, runners, hold):
    rows = rows_for(net, load)
    device = Device(net, Rules(hold=hold), **runners).run(rows)
    first_exit = device.profile.first_answer_stage()
    ends = {}
    for started_s, dispatch in device.dispatches:
        if dispatch.key.stage == first_exit:
            for row in dispatch.samples:
                ends[row] = started_s + device.took_s(dispatch)
    for row in rows:
        if ends.get(row, math.inf) <= row.deadline_s:
            assert row.answered_s <= row.deadline_s + EPSILON


@settings(max_examples=30, deadline=None)
@given(nets, st.integers(0, 1000), runners)
def test_nothing_starves_below_capacity(net, seed, runners):
    """At less than half the load that single rows alone could bear, nobody waits for longer than 30 full passes."""
    full_s = sum(net.cost(stage, 1) for stage in range(net.num_stages))
    rows = traffic(seed, 150, 0.45 / full_s, num_stages=net.num_stages, gated=net.gated, budget_s=1e6)
    Device(net, **runners).run(rows)
    assert max(row.answered_s - row.arrival_s for row in rows) <= 30 * full_s


# --- what each rule is worth -----------------------------------------------------------------------------------------

GATED = Net(part_flat, 25, frozenset(range(1, 24, 2)))


def gated_traffic(seed):
    return traffic(seed, 300, 0.06, num_stages=25, gated=GATED.gated)


def seconds_in_system(rows):
    return fmean(row.answered_s - row.arrival_s for row in rows)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_different_batches_together_make_larger_batches_behind_an_exit(seed):
    net, load = Net(part_flat, 4), {"count": 400, "rate": 1.2, "num_stages": 4}
    together, apart = traffic(seed, **load), traffic(seed, **load)
    on, off = Device(net).run(together), Device(net, Rules(rebatch=False)).run(apart)
    assert on.mean_batch_behind(0) > 1.5 * off.mean_batch_behind(0)
    assert on.busy_s < 0.93 * off.busy_s
    assert seconds_in_system(together) < seconds_in_system(apart)


@settings(max_examples=40, deadline=None)
@given(nets, loads)
def test_without_rebatching_a_batch_gains_no_rows(net, load):
    device = Device(net, Rules(rebatch=False)).run(rows_for(net, load))
    members = {}
    for _, dispatch in device.dispatches:
        (cohort,) = {row.cohort for row in dispatch.samples}
        rows = set(dispatch.samples)
        if dispatch.key.stage == 0:
            assert cohort not in members
        assert rows <= members.setdefault(cohort, rows)


@pytest.mark.parametrize("seed", range(3))
def test_holding_brings_rows_whose_gates_disagreed_together_again(seed):
    held, not_held = gated_traffic(seed), gated_traffic(seed)
    on, off = Device(GATED).run(held), Device(GATED, Rules(hold=False)).run(not_held)
    assert on.mean_batch > 1.04 * off.mean_batch
    assert on.busy_s < 0.97 * off.busy_s
    assert seconds_in_system(held) < 0.95 * seconds_in_system(not_held)


@pytest.mark.parametrize("cost", [flat, linear, part_flat])
def test_holding_changes_nothing_where_it_cannot_pay(cost):
    """Without gates, or where a stage's time is linear in its batch."""
    net = Net(cost, 5, frozenset({1, 3}) if cost is linear else frozenset())
    runs = []
    for hold in (True, False):
        rows = traffic(1, 200, 0.3, num_stages=5, gated=net.gated)
        runs.append([(at, len(it.samples)) for at, it in Device(net, Rules(hold=hold)).run(rows).dispatches])
    assert runs[0] == runs[1]


def test_a_batch_timeout_makes_a_quiet_server_wait():
    net = Net(part_flat)
    at_once, timed = traffic(0, 100, 0.05), traffic(0, 100, 0.05)
    Device(net).run(at_once)
    device = Device(net, Rules(batch_timeout_s=5.0)).run(timed)
    assert device.idle_with_work_s > 0.0
    assert seconds_in_system(timed) > seconds_in_system(at_once) + 5.0


def test_a_full_batch_does_not_wait_for_its_timeout():
    rows = [Row(0.0, 0) for _ in range(MAX_BATCH)]
    device = Device(Net(flat), Rules(batch_timeout_s=5.0)).run(rows)
    assert device.dispatches[0][0] == 0.0
    assert len(device.dispatches[0][1].samples) == MAX_BATCH


def test_a_part_full_batch_starts_when_its_oldest_row_has_waited_for_the_timeout():
    rows = [Row(0.0, 0), Row(3.0, 0)]
    device = Device(Net(flat), Rules(batch_timeout_s=5.0)).run(rows)
    ((started_s, dispatch),) = device.dispatches
    assert started_s == pytest.approx(5.0, abs=1e-5)
    assert dispatch.samples == rows


@pytest.mark.parametrize("gated", [frozenset(), frozenset({1, 3})])
def test_without_forced_exits_rows_are_late_and_run_to_where_their_policy_lets_them_leave(gated):
    net = Net(linear, 5, gated)
    load = {"count": 200, "rate": 0.5, "num_stages": 5, "budget_s": 8.0, "gated": gated}
    forced, unforced = traffic(0, **load), traffic(0, **load)
    Device(net).run(forced)
    Device(net, Rules(forced_exits=False)).run(unforced)

    def num_in_time(rows):
        return sum(row.answered_s <= row.deadline_s for row in rows)

    assert not any(row.is_forced for row in unforced)
    assert all(row.stages[-1] == (4 if gated else row.leaves_at) for row in unforced)
    assert all(row.opens <= set(row.stages) for row in unforced)
    assert sum(len(row.stages) for row in forced) < sum(len(row.stages) for row in unforced)
    assert num_in_time(forced) > 1.3 * num_in_time(unforced)


# --- threads that dispatches share out --------------------------------------------------------------------------------

FOUR_MS = Net(lambda stage, rows: 0.004 * rows)
LEAVES_LAST = FOUR_MS.num_stages - 1


def closed(clients, num, budget_s=math.inf):
    """Let so many rows come at first and one more whenever the device could have answered one."""
    return [Row(max(n - clients, 0) * 0.001, LEAVES_LAST, max(n - clients, 0) * 0.001 + budget_s) for n in range(num)]


@settings(max_examples=60, deadline=None)
@given(nets, rules, loads, st.integers(2, 4), st.sampled_from([1.0, 1.8]))
def test_no_thread_is_given_out_twice(net, rules, load, runners, shared):
    device = Device(net, rules, runners=runners, shared=shared).run(rows_for(net, load))
    changes = []
    for started_s, dispatch in device.dispatches:
        num_threads = dispatch.width.num_threads
        changes += [(started_s, num_threads), (started_s + device.took_s(dispatch), -num_threads)]
    taken = 0
    for _, num_threads in sorted(changes):
        taken += num_threads
        assert 0 <= taken <= runners
    assert taken == 0


def test_a_lone_row_gets_every_thread_at_every_stage():
    rows = [Row(0.1 * n, LEAVES_LAST) for n in range(20)]
    device = Device(FOUR_MS, runners=2, shared=1.8).run(rows)
    assert {dispatch.width.num_threads for _, dispatch in device.dispatches} == {2}
    assert seconds_in_system(rows) == pytest.approx(3 * 0.004)


def test_many_rows_are_done_sooner_side_by_side():
    """A stage takes 1.8 times as long with half of the threads: nine tenths of the time for all of them."""
    beside, one_by_one = closed(32, 400), closed(32, 400)
    Device(FOUR_MS, runners=2, shared=1.8).run(beside)
    Device(FOUR_MS).run(one_by_one)
    assert max(row.answered_s for row in beside) < 0.92 * max(row.answered_s for row in one_by_one)


def test_as_long_as_a_row_in_a_hurry_may_wait_every_dispatch_gets_every_thread():
    rows, hurried = closed(8, 40), Row(0.02, LEAVES_LAST, 0.06)
    device = Device(FOUR_MS, runners=2, shared=1.8).run([*rows, hurried])
    began = min(at for at, dispatch in device.dispatches if hurried in dispatch.samples)
    assert {d.width.num_threads for at, d in device.dispatches if began <= at < 0.06} == {2}
    assert {d.width.num_threads for at, d in device.dispatches if at < 0.02} == {1}
    assert hurried.answered_s <= 0.06
    later = [d.width.num_threads for at, d in device.dispatches if at >= 0.06]
    assert later[0] == 1


# --- padding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(nets, loads, st.sampled_from([(1, 4, 8), (2, 8), (3,)]))
def test_a_dispatch_is_run_at_a_size_that_the_device_has(net, load, sizes):
    device = Device(net, batch_sizes=sizes, max_batch=sizes[-1]).run(rows_for(net, load))
    for _, dispatch in device.dispatches:
        assert dispatch.num_padded == min(size for size in sizes if size >= len(dispatch.samples))


def test_a_few_rows_beyond_a_size_wait_where_the_rest_does_better_without_them():
    """At 5 rows out of sizes 4 and 8, a linear cost makes the 8 cost twice the 4; a flat one makes it free."""
    for cost, first in ((linear, 4), (flat, 5)):
        rows = [Row(0.0, 0) for _ in range(5)]
        device = Device(Net(lambda stage, n, cost=cost: 1.0 + cost(stage, n), 1), batch_sizes=(1, 4, 8)).run(rows)
        assert len(device.dispatches[0][1].samples) == first


def slow_when_large(stage, rows):
    """What `part_flat` looks like to a warm-up during which another process took a core while large batches ran."""
    return part_flat(stage, rows) if rows == 1 else rows * part_flat(stage, 1)


@pytest.mark.parametrize("batch_sizes", [None, (1, 2, 4, 8)])
def test_batches_that_the_warm_up_found_too_slow_are_tried_again_while_many_rows_wait(batch_sizes, monkeypatch):
    def serve():
        net, measured = Net(part_flat, 2), Net(slow_when_large, 2)
        device = Device(net, measured=measured, batch_sizes=batch_sizes)
        device.run([Row(0.0, 1) for _ in range(2000)])
        return device

    tried = serve()
    assert tried.profile.knee(0) >= 5  # 6 without the disturbance
    monkeypatch.setattr(StageProfile, "trial", lambda self, num_waiting: None)
    untried = serve()
    assert untried.profile.knee(0) == 1
    assert tried.busy_s < 0.75 * untried.busy_s

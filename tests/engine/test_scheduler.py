"""The scheduler on a clock of the test's own: what runs next, with which rows."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from offramp_server.profile import Profile
from offramp_server.rules import Rules
from offramp_server.scheduler import QueueKey, Scheduler
from offramp_server.widths import Width

MAX_BATCH = 8
EPSILON = 1e-9


@dataclass(eq=False)
class Row:
    deadline_s: float = math.inf
    may_be_dropped: bool = False
    is_cancelled: bool = False
    enqueued_s: float = 0.0
    cohort: int = 0
    budget_s: float = math.inf


def profile_of(cost, num_stages=3, exit_stages=None, max_batch=MAX_BATCH):
    """Build a profile in which a stage over some rows takes `cost(stage, rows)` seconds."""
    profile = Profile(exit_stages or range(num_stages), num_stages, max_batch)
    for index, stage in enumerate(profile.stages):
        for batch in range(1, max_batch + 1):
            stage.calibrate(batch, [cost(index, batch)])
    return profile


def flat(stage, rows):
    """Cost the same whatever the batch: the knee is the largest batch."""
    return 1.0


def linear(stage, rows):
    """Cost in proportion to the batch: the knee is one row."""
    return 1.0 * rows


def keys_of(model, num_stages=3):
    return [QueueKey(model, stage) for stage in range(num_stages)]


def scheduler_of(profile=None, margin_s=0.0, *, fair_share_s=0.05, max_batch=MAX_BATCH, num_stages=3, rules=None):
    """Open one model's queues."""
    scheduler = Scheduler(max_batch, margin_s, fair_share_s, rules)
    scheduler.add_model(keys_of("m", num_stages), Width(profile or profile_of(flat, num_stages)))
    return scheduler


def key(stage, model="m"):
    return QueueKey(model, stage)


def rows(count, **given_):
    return [Row(**given_) for _ in range(count)]


def test_nothing_waits_so_nothing_runs():
    assert scheduler_of().next(0.0) is None


def test_survivors_of_different_batches_run_together():
    scheduler = scheduler_of()
    first, second = rows(2), rows(3)
    scheduler.put(key(1), first)
    scheduler.put(key(1), second)
    dispatch = scheduler.next(0.0)
    assert dispatch.key == key(1)
    assert dispatch.samples == first + second


def test_a_full_pipeline_is_simulated_to_the_end_and_every_row_runs_every_stage_once():
    """Batches arrive while others run: nobody runs a stage twice, skips one or is lost."""
    scheduler, now, ran = scheduler_of(), 0.0, Counter()
    arrivals = {float(t): rows(3, deadline_s=50.0 + t) for t in range(6)}
    everyone = [row for batch in arrivals.values() for row in batch]
    batches = []
    while arrivals or len(scheduler):
        for time in [t for t in arrivals if t <= now]:
            scheduler.put(key(0), arrivals.pop(time))
        dispatch = scheduler.next(now)
        now += 1.0
        if dispatch is None:
            continue
        batches.append(len(dispatch.samples))
        ran.update((row, dispatch.key.stage) for row in dispatch.samples)
        if dispatch.key.stage < 2:
            scheduler.put(key(dispatch.key.stage + 1), dispatch.samples)
    assert ran == {(row, stage): 1 for row in everyone for stage in range(3)}
    assert max(batches) > 3  # rows of different arrivals ran together


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
def test_rows_run_in_the_order_of_their_deadlines_and_equals_in_the_order_they_came(deadlines):
    scheduler = scheduler_of(profile_of(linear))
    waiting = [Row(deadline_s=1000.0 + deadline) for deadline in deadlines]
    for row in waiting:
        scheduler.put(key(0), [row])
    ran = []
    while (dispatch := scheduler.next(0.0)) is not None:
        ran += dispatch.samples
    assert ran == sorted(waiting, key=lambda row: row.deadline_s)  # a stable sort


@pytest.mark.parametrize(("cost", "knee"), [(flat, 8), (linear, 1), (lambda stage, n: max(1.0, n / 4), 4)])
def test_a_batch_grows_to_the_knee_and_no_further(cost, knee):
    scheduler = scheduler_of(profile_of(cost))
    scheduler.put(key(0), rows(20))
    assert len(scheduler.next(0.0).samples) == knee


def test_a_batch_never_passes_the_operators_limit():
    scheduler = scheduler_of(max_batch=3)
    scheduler.put(key(0), rows(20))
    assert len(scheduler.next(0.0).samples) == 3


def slow_batches(stage, n):
    """A second for one row, and half of one for every row more: worth batching, but long."""
    return 0.5 + 0.5 * n


def test_a_batch_is_no_longer_than_its_own_tightest_row_allows():
    profile = profile_of(slow_batches)
    scheduler = scheduler_of(profile)
    scheduler.put(key(0), [*rows(7), Row(deadline_s=profile.bound_s(0, 3))])
    assert len(scheduler.next(0.0).samples) == 3


def test_the_margin_is_kept_free_before_the_deadline():
    profile = profile_of(slow_batches)
    scheduler = scheduler_of(profile, margin_s=0.1)
    scheduler.put(key(0), [*rows(7), Row(deadline_s=profile.bound_s(0, 3))])
    assert len(scheduler.next(0.0).samples) == 2


def test_a_batch_is_no_longer_than_the_tightest_row_of_any_other_queue_allows():
    profile = profile_of(slow_batches)
    scheduler = scheduler_of(profile)
    scheduler.put(key(2), rows(8))
    scheduler.put(key(0), [Row(deadline_s=profile.bound_s(0, 1) + profile.bound_s(2, 4))])
    dispatch = scheduler.next(0.0)
    assert (dispatch.key, len(dispatch.samples)) == (key(2), 4)


def test_a_row_with_an_answer_in_hand_only_asks_to_be_answered_in_time():
    """There is no time for its next exit behind the other batch, but its promise holds all the same."""
    profile = profile_of(slow_batches)
    scheduler = scheduler_of(profile)
    scheduler.put(key(1), [Row(deadline_s=profile.bound_s(0, 4) + 0.1)])
    scheduler.put(key(0), [Row(deadline_s=profile.bound_s(0, 4)), *rows(7)])
    dispatch = scheduler.next(0.0)
    assert (dispatch.key, len(dispatch.samples)) == (key(0), 4)


def test_one_row_goes_however_late_it_is():
    scheduler = scheduler_of(profile_of(slow_batches))
    late = Row(deadline_s=-5.0)
    scheduler.put(key(0), [late])
    assert scheduler.next(0.0).samples == [late]


def test_rows_that_are_late_anyway_press_nobody():
    scheduler = scheduler_of()
    scheduler.put(key(0), rows(8, deadline_s=-5.0))
    assert len(scheduler.next(0.0).samples) == 8


def test_a_row_that_can_be_on_time_is_not_made_late_by_one_that_cannot():
    """By deadline alone the late row went first, then the next was late too, and so on: the domino effect."""
    profile = profile_of(linear)
    scheduler = scheduler_of(profile)
    late, on_time = Row(deadline_s=0.0), Row(deadline_s=profile.bound_s(0, 1) * 1.5)
    scheduler.put(key(0), [late, on_time])
    assert scheduler.next(0.0).samples == [on_time]
    assert scheduler.next(1.0).samples == [late]


def test_late_rows_do_not_take_the_places_of_those_that_can_be_on_time():
    profile = profile_of(flat)
    scheduler = scheduler_of(profile, max_batch=4)
    late = rows(3, deadline_s=0.0)
    on_time = rows(3, deadline_s=profile.bound_s(0, 1) * 1.5)
    scheduler.put(key(0), [*late, *on_time])
    assert scheduler.next(0.0).samples == [*on_time, late[0]]


def test_late_rows_go_first_as_long_as_everyone_else_can_wait():
    scheduler = scheduler_of(profile_of(linear))
    late, on_time = Row(deadline_s=0.0), Row(deadline_s=100.0)
    scheduler.put(key(0), [late, on_time])
    assert scheduler.next(0.0).samples == [late]


def test_the_least_laxity_goes_first_when_waiting_would_cost_an_exit():
    profile = profile_of(linear)
    scheduler = scheduler_of(profile)
    tight, tighter = Row(deadline_s=1.9), Row(deadline_s=1.5)
    scheduler.put(key(2), [tight])
    scheduler.put(key(1), [tighter])
    assert scheduler.next(0.0).samples == [tighter]


def test_an_urgent_row_goes_before_a_full_batch():
    profile = profile_of(flat)
    scheduler = scheduler_of(profile)
    scheduler.put(key(2), rows(8))
    urgent = Row(deadline_s=profile.bound_s(0, 1) * 1.5)
    scheduler.put(key(0), [urgent])
    assert scheduler.next(0.0).samples == [urgent]


def test_without_urgency_the_queue_nearest_to_its_best_throughput_goes():
    scheduler = scheduler_of()
    scheduler.put(key(2), rows(3, deadline_s=100.0))
    scheduler.put(key(0), rows(6, deadline_s=100.0))
    assert scheduler.next(0.0).key == key(0)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_of_equals_the_deepest_stage_goes(count):
    scheduler = scheduler_of(num_stages=3)
    for stage in (1, 0, 2):
        scheduler.put(key(stage), rows(count, deadline_s=100.0))
    assert [scheduler.next(0.0).key.stage for _ in range(3)] == [2, 1, 0]


def test_a_choice_that_keeps_every_promise_goes_before_a_more_urgent_one_that_breaks_one():
    """A row with an answer in hand wants its next exit at once; that long stage would make a new row late."""
    profile = profile_of(lambda stage, n: (1.0, 5.0, 1.0)[stage] * n)
    scheduler = scheduler_of(profile)
    in_hand = Row(deadline_s=profile.bound_s(1, 1) + 0.5)
    new = Row(deadline_s=profile.bound_s(0, 1) + 2.0)
    scheduler.put(key(1), [in_hand])
    scheduler.put(key(0), [new])
    assert scheduler.next(0.0).samples == [new]


# --- any state ---------------------------------------------------------------------------------------------------

# Small whole numbers: deadlines, costs and slacks must meet for anything interesting to happen.
costs = st.tuples(st.integers(1, 6), st.integers(0, 3))
states = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.just(math.inf), st.integers(-2, 24))), min_size=2, max_size=10
)
exits = st.sampled_from([(0, 1, 2, 3), (1, 3), (0, 3), (3,), (2, 3)])


def filled(per_stage, exit_stages, state, margin_s):
    """Build a scheduler in any state the loop may ask it in: those who can leave have left."""
    profile = profile_of(lambda stage, n: per_stage[stage][0] + per_stage[stage][1] * n, 4, exit_stages)
    scheduler = scheduler_of(profile, margin_s, num_stages=4)
    waiting = {Row(deadline_s): stage for stage, deadline_s in state}
    for row, stage in waiting.items():
        scheduler.put(key(stage), [row])
    for row in scheduler.take_expired(0.0):
        del waiting[row]
    assume(waiting)
    return scheduler, profile, waiting


def slack(profile, row, stage, margin_s):
    """Seconds the device may do something else before this row's promise is broken; negative if it is already."""
    if stage > profile.first_answer_stage():
        return row.deadline_s - margin_s
    return row.deadline_s - margin_s - profile.to_next_answer_s(stage, 1)


one_queue = st.lists(st.tuples(st.just(2), st.one_of(st.just(math.inf), st.integers(-2, 12))), min_size=2, max_size=10)
any_state = given(st.lists(costs, min_size=4, max_size=4), exits, states, st.sampled_from([0.0, 1.0]))


@settings(max_examples=300, deadline=None)
@any_state
def test_a_batch_of_several_is_never_longer_than_any_slack_in_play(per_stage, exit_stages, state, margin_s):
    scheduler, profile, waiting = filled(per_stage, exit_stages, state, margin_s)
    dispatch = scheduler.next(0.0)
    stage, size = dispatch.key.stage, len(dispatch.samples)
    assert 1 <= size <= max(1, profile.knee(stage))
    takes_s = profile.bound_s(stage, size)
    slacks = {row: slack(profile, row, at, margin_s) for row, at in waiting.items()}
    elsewhere = [left for row, left in slacks.items() if waiting[row] != stage and left >= 0.0]
    has_answer = stage > profile.first_answer_stage()
    own_s = 0.0 if has_answer else profile.bound_s(stage, 1)  # its own run is part of what a new row needs
    members = [slacks[row] + own_s for row in dispatch.samples if slacks[row] >= 0.0]
    if size > 1:
        assert takes_s <= min([*elsewhere, *members], default=math.inf) + EPSILON


@settings(max_examples=300, deadline=None)
@any_state
def test_no_promise_is_broken_if_any_other_choice_would_break_none(per_stage, exit_stages, state, margin_s):
    scheduler, profile, waiting = filled(per_stage, exit_stages, state, margin_s)

    def breaks_one(stage, takes_s):
        lefts = (slack(profile, row, at, margin_s) for row, at in waiting.items() if at != stage)
        return any(0.0 <= left < takes_s - EPSILON for left in lefts)

    could_break_none = any(not breaks_one(stage, profile.bound_s(stage, 1)) for stage in set(waiting.values()))
    dispatch = scheduler.next(0.0)
    if could_break_none:
        assert not breaks_one(dispatch.key.stage, profile.bound_s(dispatch.key.stage, len(dispatch.samples)))


@settings(max_examples=300, deadline=None)
@given(st.lists(costs, min_size=4, max_size=4), st.sampled_from([(2, 3), (3,)]), one_queue, st.sampled_from([0.0, 1.0]))
def test_in_its_own_queue_no_late_row_makes_another_late(per_stage, exit_stages, state, margin_s):
    scheduler, profile, waiting = filled(per_stage, exit_stages, state, margin_s)
    dispatch = scheduler.next(0.0)
    stage = dispatch.key.stage
    takes_s = profile.bound_s(stage, len(dispatch.samples))
    needed_s = margin_s + profile.to_next_answer_s(stage, 1)
    laxity = {row: row.deadline_s - needed_s for row, at in waiting.items() if at == stage}
    left_behind = [row for row in laxity if row not in dispatch.samples]
    if any(0.0 <= laxity[row] < takes_s - EPSILON for row in left_behind):
        assert all(laxity[row] >= 0.0 for row in dispatch.samples)
    on_time = [row for row in dispatch.samples if laxity[row] >= 0.0]
    left_on_time = [row for row in left_behind if laxity[row] >= 0.0]
    assert all(row.deadline_s <= other.deadline_s for row in on_time for other in left_on_time)


# --- shares of the device ------------------------------------------------------------------------------------------


def simulate_shares(costs_s, seconds, arrive, fair_share_s=0.05, num_stages=3):
    """Run models side by side; `arrive(scheduler, now)` keeps rows coming. Gives each model's device seconds."""
    scheduler = Scheduler(MAX_BATCH, 0.0, fair_share_s)
    for model, cost in costs_s.items():
        scheduler.add_model(keys_of(model, num_stages), Width(profile_of(cost, num_stages)))
    used, now = Counter(), 0.0
    while now < seconds:
        arrive(scheduler, now)
        dispatch = scheduler.next(now)
        model, stage = dispatch.key.model, dispatch.key.stage
        took = costs_s[model](stage, len(dispatch.samples))
        now += took
        used[model] += took
        if stage + 1 < num_stages:
            scheduler.put(key(stage + 1, model), dispatch.samples)
        scheduler.finish(dispatch, took)
    return used


def keep_waiting(**depths):
    """Let that many rows of each model wait or run at any time."""

    def arrive(scheduler, now):
        for model, depth in depths.items():
            missing = depth - sum(scheduler.num_waiting(key(stage, model)) for stage in range(3))
            scheduler.put(key(0, model), rows(missing))

    return arrive


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (lambda stage, n: 0.001, lambda stage, n: 0.01),
        (lambda stage, n: 0.001 * n, lambda stage, n: 0.02),
        (lambda stage, n: 0.002, lambda stage, n: 0.002),
    ],
)
@pytest.mark.parametrize("depths", [(20, 20), (1, 20), (20, 1), (1, 1)])
def test_models_that_always_have_work_get_equal_shares_however_much_waits(a, b, depths):
    used = simulate_shares({"a": a, "b": b}, 5.0, keep_waiting(a=depths[0], b=depths[1]))
    assert abs(used["a"] - used["b"]) <= 0.05 + 0.02 + EPSILON


def test_three_models_share_evenly():
    costs_s = {model: lambda stage, n: 0.005 for model in "abc"}
    used = simulate_shares(costs_s, 6.0, keep_waiting(a=30, b=3, c=1))
    assert max(used.values()) - min(used.values()) <= 0.06


def test_a_model_that_was_idle_gets_no_credit_for_it():
    def arrive(scheduler, now):
        keep_waiting(a=20)(scheduler, now)
        if now >= 3.0:
            keep_waiting(b=20)(scheduler, now)

    used = simulate_shares({"a": flat_ms, "b": flat_ms}, 7.0, arrive)
    assert used["b"] == pytest.approx(2.0, abs=0.06)


def flat_ms(stage, rows_):
    return 0.005


def test_a_model_that_joins_an_idle_device_gets_no_credit_for_the_time_before():
    scheduler = Scheduler(MAX_BATCH, 0.0, 0.05)
    scheduler.add_model(keys_of("old"), Width(profile_of(flat_ms)))
    for _ in range(1000):
        scheduler.put(key(2, "old"), rows(1))
        scheduler.finish(scheduler.next(0.0), 0.005)
    scheduler.add_model(keys_of("new"), Width(profile_of(flat_ms)))
    used = Counter()
    for model in ("new", "old"):
        scheduler.put(key(2, model), rows(400))
    for _ in range(60):
        dispatch = scheduler.next(0.0)
        scheduler.finish(dispatch, 0.005)
        used[dispatch.key.model] += 0.005
    assert abs(used["new"] - used["old"]) <= 0.06 + EPSILON


def test_a_model_that_comes_and_goes_is_no_worse_off_than_one_that_stays():
    """Its rows are few, so that its queues run empty with every dispatch: that is not idling."""
    scheduler = Scheduler(MAX_BATCH, 0.0, 0.05)
    for model in ("few", "many"):
        scheduler.add_model(keys_of(model), Width(profile_of(flat_ms)))
    scheduler.put(key(0, "many"), rows(10_000))
    (row,) = rows(1)
    scheduler.put(key(0, "few"), [row])
    used = Counter()
    for _ in range(400):
        dispatch = scheduler.next(0.0)
        model, stage = dispatch.key.model, dispatch.key.stage
        if model == "few":
            scheduler.put(key((stage + 1) % 3, "few"), [row])
        scheduler.finish(dispatch, 0.005)
        used[model] += 0.005
    assert abs(used["few"] - used["many"]) <= 0.06


def test_a_dispatch_of_a_model_that_was_removed_may_end_and_nothing_of_it_waits_any_more():
    scheduler = scheduler_of()
    scheduler.put(key(0), rows(1))
    dispatch = scheduler.next(0.0)
    scheduler.put(key(1), rows(2))
    assert len(scheduler.remove_model("m")) == 2
    assert len(scheduler) == 0
    assert not scheduler.may_start
    scheduler.finish(dispatch, 1.0)
    assert scheduler.next(0.0) is None


# --- giving up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "may_be_dropped", "lateness_s", "is_taken"),
    [
        (0, False, 0.1, False),  # no answer yet: it is answered late
        (0, True, 0.1, True),
        (0, True, -0.1, False),
        (1, False, 0.1, False),  # the first exit is stage 1's: still no answer
        (1, True, 0.1, True),
        (2, False, 0.1, True),  # it has an answer: it leaves with it
        (2, True, 0.1, True),
        (2, False, -0.1, False),
        (3, False, 0.1, True),
    ],
)
def test_a_row_is_given_up_when_its_next_exit_is_out_of_reach_and_it_can_leave(
    stage, may_be_dropped, lateness_s, is_taken
):
    profile = profile_of(lambda stage, n: 0.25, 4, (1, 3))
    scheduler = scheduler_of(profile, margin_s=0.5, num_stages=4)
    reachable_s = 10.0 + 0.5 + profile.to_next_answer_s(stage, 1)
    row, other = Row(reachable_s - lateness_s, may_be_dropped), Row()
    scheduler.put(key(stage), [row, other])
    assert scheduler.take_expired(10.0) == ([row] if is_taken else [])
    assert scheduler.num_waiting(key(stage)) == 2 - is_taken


def test_exactly_the_cancelled_rows_are_taken():
    scheduler = scheduler_of()
    waiting = {stage: rows(3) for stage in range(3)}
    for stage, batch in waiting.items():
        scheduler.put(key(stage), batch)
    gone = [waiting[0][1], waiting[2][0], waiting[2][2]]
    for row in gone:
        row.is_cancelled = True
    assert scheduler.take_cancelled() == gone
    assert [scheduler.num_waiting(key(stage)) for stage in range(3)] == [2, 3, 1]
    assert scheduler.take_cancelled() == []


class Bookkeeping(RuleBasedStateMachine):
    """Whatever is done with it, every row is waiting at exactly one place or was given back exactly once."""

    @initialize(
        models=st.integers(1, 3), rebatch=st.booleans(), hold=st.booleans(), num_threads=st.sampled_from([0, 2])
    )
    def open_models(self, models, rebatch, hold, num_threads):
        self.num_threads = num_threads
        self.scheduler = Scheduler(4, 0.01, 0.05, Rules(rebatch=rebatch, hold=hold), num_threads)
        self.waiting = {}
        self.models = []
        for index in range(models):
            self.add(f"m{index}")

    def add(self, model):
        self.models.append(model)
        profile = profile_of(lambda stage, n: 0.05 + 0.01 * n)
        narrow = Width(profile.beside(), 1, 2) if self.num_threads and model != "m1" else None
        for stage in narrow.profile.stages if narrow else ():
            stage.calibrate(1, [0.1])
        self.scheduler.add_model(keys_of(model), Width(profile, self.num_threads), narrow)

    def gave(self, given_back):
        for row in given_back:
            del self.waiting[row]  # a row given back twice, or never put, is a KeyError

    @precondition(lambda self: self.models)
    @rule(
        data=st.data(),
        stage=st.integers(0, 2),
        count=st.integers(0, 5),
        deadline_s=st.floats(-1, 2),
        drop=st.booleans(),
    )
    def put(self, data, stage, count, deadline_s, drop):
        at = key(stage, data.draw(st.sampled_from(self.models)))
        new = rows(count, deadline_s=deadline_s, budget_s=deadline_s + 1, may_be_dropped=drop)
        self.scheduler.put(at, new)
        self.waiting |= dict.fromkeys(new, at)

    @rule(now=st.floats(-1, 2))
    def dispatch(self, now):
        dispatch = self.scheduler.next(now)
        if dispatch is None:
            assert not self.waiting
            return
        assert 1 <= len(dispatch.samples) <= 4
        assert {self.waiting[row] for row in dispatch.samples} == {dispatch.key}
        self.gave([*dispatch.samples, *dispatch.overtaken])
        self.scheduler.finish(dispatch, 0.05)

    @rule(data=st.data())
    def cancel(self, data):
        if self.waiting:
            for row in data.draw(st.lists(st.sampled_from(list(self.waiting)), unique=True)):
                row.is_cancelled = True
        due = {row for row in self.waiting if row.is_cancelled}
        taken = self.scheduler.take_cancelled()
        assert set(taken) == due
        self.gave(taken)

    @rule(now=st.floats(-1, 2))
    def expire(self, now):
        taken = self.scheduler.take_expired(now)
        assert all(row.may_be_dropped or self.waiting[row].stage > 0 for row in taken)
        self.gave(taken)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def remove(self, data):
        model = data.draw(st.sampled_from(self.models))
        self.models.remove(model)
        due = {row for row, at in self.waiting.items() if at.model == model}
        left = self.scheduler.remove_model(model)
        assert set(left) == due
        self.gave(left)

    @precondition(lambda self: len(self.models) < 3)
    @rule(index=st.integers(0, 2))
    def add_again(self, index):
        if f"m{index}" not in self.models:
            self.add(f"m{index}")

    @invariant()
    def counts_agree(self):
        if not hasattr(self, "waiting"):
            return
        assert len(self.scheduler) == len(self.waiting)
        places = Counter(self.waiting.values())
        for model in self.models:
            for at in keys_of(model):
                assert self.scheduler.num_waiting(at) == places[at]


Bookkeeping.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBookkeeping = Bookkeeping.TestCase


# --- threads that dispatches share out --------------------------------------------------------------------------------

WIDE, NARROW = (Width(profile_of(flat), 2), Width(profile_of(flat), 1, 2))


def sharing_scheduler(**models):
    """Open the queues of models on a device with two threads; those that are said to be can run side by side."""
    scheduler = Scheduler(MAX_BATCH, 0.0, 100.0, num_threads=2)
    for model, runs_side_by_side in (models or {"m": True}).items():
        scheduler.add_model(keys_of(model), WIDE, NARROW if runs_side_by_side else None)
    return scheduler


def test_a_row_alone_on_an_idle_device_gets_every_thread_and_nothing_starts_beside_it():
    scheduler = sharing_scheduler()
    scheduler.put(key(0), rows(1))
    alone = scheduler.next(0.0)
    assert alone.width is WIDE
    scheduler.put(key(0), rows(3))
    assert (scheduler.has_room, scheduler.may_start, scheduler.wait_s(0.0)) == (False, False, math.inf)
    assert scheduler.next(0.0) is None
    scheduler.finish(alone, 1.0)
    assert scheduler.may_start
    assert scheduler.next(1.0).width is NARROW


def test_many_rows_are_parted_among_dispatches_side_by_side():
    scheduler = sharing_scheduler()
    scheduler.put(key(0), rows(6))
    started = [scheduler.next(0.0), scheduler.next(0.0)]
    assert [(dispatch.width, len(dispatch.samples)) for dispatch in started] == [(NARROW, 3)] * 2
    assert not scheduler.has_room
    scheduler.finish(started[0], 1.0)
    scheduler.put(key(1), started[0].samples[:1])
    assert scheduler.next(1.0).width is NARROW  # beside the other


def test_a_row_in_a_hurry_waits_for_every_thread_and_what_comes_later_for_it():
    scheduler = sharing_scheduler()
    scheduler.put(key(0), rows(2))
    first, second = scheduler.next(0.0), scheduler.next(0.0)
    short_s = NARROW.short_budget_s
    (hurried,) = rows(1, budget_s=0.9 * short_s, deadline_s=0.9 * short_s)
    scheduler.put(key(0), [hurried, *rows(2)])
    scheduler.finish(first, 1.0)
    assert scheduler.next(1.0) is None
    assert (scheduler.has_room, scheduler.wait_s(1.0)) == (False, math.inf)
    scheduler.finish(second, 1.0)
    dispatch = scheduler.next(1.0)
    assert (dispatch.width, hurried in dispatch.samples) == (WIDE, True)
    scheduler.finish(dispatch, 1.0)
    scheduler.put(key(1), rows(2))
    assert scheduler.next(0.9 * short_s).width is NARROW


def test_rows_with_enough_time_are_in_no_hurry():
    scheduler = sharing_scheduler()
    scheduler.put(key(0), rows(2, budget_s=NARROW.short_budget_s, deadline_s=NARROW.short_budget_s))
    assert scheduler.next(0.0).width is NARROW


def test_a_model_that_gains_nothing_side_by_side_waits_for_every_thread():
    scheduler = sharing_scheduler(pays=True, never=False)
    scheduler.put(key(0, "pays"), rows(2))
    running = [scheduler.next(0.0), scheduler.next(0.0)]
    scheduler.finish(running.pop(), 1.0)
    scheduler.put(key(2, "never"), rows(8))  # fuller, and deeper
    scheduler.put(key(0, "pays"), rows(1))
    assert scheduler.next(1.0) is None
    scheduler.finish(running.pop(), 1.0)
    dispatch = scheduler.next(1.0)
    assert (dispatch.key.model, dispatch.width) == ("never", WIDE)


def test_the_threads_of_a_model_that_is_removed_meanwhile_come_back():
    scheduler = sharing_scheduler(old=True, new=False)
    scheduler.put(key(0, "old"), rows(2))
    running = [scheduler.next(0.0), scheduler.next(0.0)]
    scheduler.remove_model("old")
    scheduler.put(key(0, "new"), rows(1))
    for dispatch in running:
        assert scheduler.next(0.0) is None
        scheduler.finish(dispatch, 1.0)
    assert scheduler.next(0.0).width is WIDE


def test_a_dispatch_counts_for_its_models_share_by_the_threads_it_takes():
    """Two models take turns; one second with one of two threads is half a second of the device."""
    scheduler = Scheduler(1, 0.0, 0.0, num_threads=2)
    for model, narrow in (("beside", NARROW), ("alone", None)):
        scheduler.add_model(keys_of(model), WIDE, narrow)
        scheduler.put(key(0, model), rows(40))
    used = Counter()
    for _ in range(30):
        running = []
        while (dispatch := scheduler.next(0.0)) is not None:
            running.append(dispatch)
        for dispatch in running:
            scheduler.finish(dispatch, 1.0)
            used[dispatch.key.model] += dispatch.width.num_threads / 2
    assert used["beside"] == pytest.approx(used["alone"], abs=1.5)


# --- gated stages ----------------------------------------------------------------------------------------------------


def gated_scheduler(cost=flat, rules=None):
    """Open the queues of trunk 0, body 1, body 2, trunk 3, body 4 and trunk 5 with the only exit."""
    profile = Profile([5], 6, MAX_BATCH, gated_stages=(1, 2, 4))
    for index, stage in enumerate(profile.stages):
        for batch in range(1, MAX_BATCH + 1):
            stage.calibrate(batch, [cost(index, batch)])
    return scheduler_of(profile, num_stages=6, rules=rules)


@pytest.mark.parametrize(
    ("waiting", "stage"),
    [
        ({1: 2, 3: 6}, 1),  # they join at the trunk
        ({1: 2, 2: 6}, 1),  # or in the next body
        ({1: 2, 2: 2, 3: 6}, 1),
        ({2: 1, 3: 7}, 2),
        ({1: 2, 5: 6}, 5),  # too far behind to join
        ({0: 2, 3: 6}, 3),  # trunk is never waited for
        ({1: 2, 3: 8}, 3),  # a full batch gains nothing
        ({1: 7, 4: 6}, 1),  # fuller, and not joined
    ],
)
def test_a_batch_waits_for_those_in_bodies_that_may_join_it_if_it_gains_by_them(waiting, stage):
    scheduler = gated_scheduler()
    for at, count in waiting.items():
        scheduler.put(key(at), rows(count))
    assert scheduler.next(0.0).key == key(stage)


def test_a_batch_that_gains_nothing_by_more_rows_waits_for_none():
    scheduler = gated_scheduler(linear)
    for stage in (1, 3):
        scheduler.put(key(stage), rows(1))
    assert scheduler.next(0.0).key == key(3)


def test_a_row_that_cannot_wait_does_not_wait_for_those_in_bodies():
    scheduler = gated_scheduler()
    scheduler.put(key(1), rows(2))
    bound = profile_of(flat).bound_s(0, 1)
    scheduler.put(key(3), rows(1, deadline_s=2.5 * bound))
    assert scheduler.next(0.0).key == key(3)


def test_a_row_before_a_body_that_has_no_time_for_it_is_given_back():
    scheduler = gated_scheduler()
    bound = profile_of(flat).bound_s(0, 1)
    in_time, late = Row(deadline_s=10.0 + 3 * bound + EPSILON), Row(deadline_s=10.0 + 3 * bound - EPSILON)
    scheduler.put(key(1), [in_time, late])
    scheduler.put(key(3), rows(1, deadline_s=10.0))
    assert scheduler.take_expired(10.0) == []
    assert scheduler.take_hurried(10.0) == [late]
    assert len(scheduler) == 2


def test_rows_that_run_in_a_body_on_another_runner_are_waited_for_while_there_is_other_work():
    scheduler = gated_scheduler()
    scheduler.put(key(1), rows(2))
    body = scheduler.next(0.0)
    scheduler.put(key(3), rows(4))
    scheduler.put(key(5), rows(3))
    assert scheduler.next(0.0).key == key(5)  # less full than the batch that is held
    scheduler.put(key(5), rows(3))
    scheduler.finish(body, 1.0)  # they have gone elsewhere: nobody is expected any more
    assert scheduler.next(0.0).key == key(3)


def test_nothing_is_held_where_nothing_else_could_run():
    scheduler = gated_scheduler()
    scheduler.put(key(1), rows(2))
    scheduler.next(0.0)
    scheduler.put(key(3), rows(4))
    assert scheduler.next(0.0).key == key(3)


def test_a_batch_is_not_held_for_longer_than_its_members_can_wait():
    """Behind the body the batch would be larger, and so take longer than one row's way to the exit allows."""
    bound = partial(profile_of(slow_batches).bound_s, 0)  # the same at every stage
    for spare_s, stage in ((bound(2) + bound(6) - bound(1), 1), (bound(2) + bound(1), 3)):
        scheduler = gated_scheduler(slow_batches)
        scheduler.put(key(1), rows(2))
        scheduler.put(key(3), rows(4, deadline_s=2 * bound(1) + spare_s + EPSILON))
        assert scheduler.next(0.0).key == key(stage)


def test_with_the_rule_turned_off_nothing_is_held():
    scheduler = gated_scheduler(rules=Rules(hold=False))
    scheduler.put(key(1), rows(2))
    scheduler.put(key(3), rows(6))
    assert scheduler.next(0.0).key == key(3)


def test_rows_that_come_more_seldom_are_worth_less_waiting():
    """Six rows in one body whose next is nearly always shut: none of them is expected there."""
    scheduler = gated_scheduler()
    profile = scheduler._queues[key(1)].profile
    profile.observe_gates(range(2, 3), 3, 1000)
    scheduler.put(key(1), rows(2))
    scheduler.put(key(2), rows(6))
    assert scheduler.next(0.0).key == key(2)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_a_row_that_can_only_keep_its_promise_by_leaving_before_a_dispatch_is_given_back_with_it():
    """A new row cannot wait, and its long stage would make the answer that another one has in hand late."""
    profile = profile_of(lambda stage, n: (5.0, 1.0, 1.0)[stage])
    scheduler = scheduler_of(profile)
    in_hand, patient = Row(deadline_s=2.0), Row(deadline_s=20.0)
    new = Row(deadline_s=profile.bound_s(0, 1) + 0.5)
    scheduler.put(key(1), [in_hand, patient])
    scheduler.put(key(0), [new])
    dispatch = scheduler.next(0.0)
    assert (dispatch.samples, dispatch.overtaken) == ([new], [in_hand])
    assert scheduler.num_waiting(key(1)) == 1


def test_there_is_a_wait_only_where_a_timeout_holds_all_back():
    assert scheduler_of().wait_s(0.0) == math.inf
    timed = scheduler_of(rules=Rules(batch_timeout_s=5.0))
    timed.put(key(0), [Row(enqueued_s=1.0), Row(enqueued_s=0.5)])
    assert timed.next(2.0) is None
    assert timed.wait_s(2.0) == 3.5
    timed.put(key(0), rows(6, enqueued_s=2.0))
    assert timed.wait_s(2.0) == 0.0  # full
    at_once = scheduler_of()
    at_once.put(key(0), rows(1))
    assert at_once.wait_s(0.0) == 0.0


def test_without_rebatching_survivors_run_with_their_own_batch_only():
    scheduler = scheduler_of(rules=Rules(rebatch=False))
    first, second = rows(2), rows(3)
    for batch in (first, second):
        scheduler.put(key(0), batch)
        dispatch = scheduler.next(0.0)
        assert dispatch.samples == batch
        scheduler.put(key(1), batch[1:])
    assert scheduler.num_waiting(key(1)) == 3
    assert sorted((scheduler.next(0.0).samples for _ in range(2)), key=len) == [first[1:], second[1:]]


def test_without_forced_exits_no_row_is_given_up_for_its_deadline_but_those_that_would_rather_be_refused():
    scheduler = scheduler_of(rules=Rules(forced_exits=False))
    late, refused = Row(deadline_s=-1.0), Row(deadline_s=-1.0, may_be_dropped=True)
    scheduler.put(key(0), [late, refused])
    scheduler.put(key(2), rows(2, deadline_s=-1.0, may_be_dropped=True))
    assert scheduler.take_expired(0.0) == [refused]
    assert len(scheduler) == 3


def test_before_a_gated_stage_no_gate_is_shut_by_force_without_forced_exits():
    scheduler = gated_scheduler(rules=Rules(forced_exits=False))
    scheduler.put(key(1), rows(2, deadline_s=-1.0))
    assert scheduler.take_hurried(0.0) == []

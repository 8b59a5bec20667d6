"""The engine with its thread: what it promises whatever happens to it."""

import queue
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidValue,
    ManifestError,
    NotReady,
    OfframpError,
    Overloaded,
    StageFailed,
    TooLarge,
    UnknownModel,
)
from offramp_contract.policy import Reason
from offramp_runtime import open_device
from offramp_runtime.device import OrtValueDevice
from offramp_runtime.providers import on_cpu
from offramp_server import warm_up
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.messages import RowAnswer
from offramp_server.served import ServedModel

SURE = (9.0, 0.0, 0.0, 0.0)
FLAT = (0.0, 0.0, 0.0, 0.0)
WAIT_S = 30.0
"""How long a test waits for what must happen before it fails."""


class Killed(BaseException):
    """Ends a thread: nothing that answers rows may catch it."""


@dataclass
class Gate:
    """Holds the engine's thread inside a stage until it is opened."""

    stage: int = 0
    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    then: BaseException | None = None

    def __call__(self, stage, feeds):
        if stage == self.stage and not self.opened.is_set():
            self.entered.set()
            assert self.opened.wait(WAIT_S)
            if self.then is not None:
                raise self.then

    def open(self, then=None):
        self.then = then
        self.opened.set()


class Waiter:
    """A listener that a test can wait on; one per request."""

    def __init__(self):
        self.events = []
        self.is_done = threading.Event()

    def deliver(self, events):
        self.events += [event for _, event in events]
        self.is_done.set()

    @property
    def rows(self):
        assert self.is_done.wait(WAIT_S)
        (result,) = self.events
        return result.rows


@dataclass
class Held:
    """An engine whose thread will stand in a stage of its first model from the first request on."""

    engine: Engine
    served: ServedModel
    stages: Any
    gate: Gate
    log: Any
    options: Any

    def send(self, rows, **options):
        """Submit rows, with a policy that goes on to the end; gives the submission and who waits for it."""
        waiter = Waiter()
        x = np.atleast_2d(np.array(rows, dtype=np.float32))
        return self.engine.submit(self.served, {"x": x}, self.options(**options), waiter), waiter


@pytest.fixture
def held(open_engine, chain, instrument, options, log):
    gates = []

    def hold(*others, **settings_):
        engine = open_engine(chain, *others, observer=log, **settings_)
        served = engine.models[0]
        stages, gate = instrument(served), Gate()
        stages.before = gate
        gates.append(gate)
        return Held(engine, served, stages, gate, log, options)

    yield hold
    for gate in gates:
        gate.open()


# --- in process ------------------------------------------------------------------------------------------------------


def test_classify_answers_what_the_network_says(open_engine, chain):
    engine = open_engine(chain)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    result = engine.classify(x, policy={"kind": "fixed", "exit": 1})
    expected = chain.decisions({"x": x})[1]
    for row, decision in zip(result.rows, expected, strict=True):
        assert (row.answer.exit_index, row.reason) == (1, Reason.DEPTH_CAP)
        assert row.answer.top_probability_K == pytest.approx(decision[3:7], abs=1e-5)
    assert result.budget_ms is None


def test_classify_takes_one_row_without_a_batch_axis_and_several_inputs_by_name(open_engine, chain, late):
    engine = open_engine(chain, late)
    one = np.array(SURE, dtype=np.float32)
    assert len(engine.classify(one, model="chain").rows) == 1
    assert len(engine.classify({"x": one, "y": one}, model="late").rows) == 1


@pytest.mark.parametrize(
    ("inputs", "fields", "named"),
    [
        (np.zeros((1, 3), np.float32), {}, "inputs"),
        (np.full((1, 4), np.nan, np.float32), {}, "inputs"),
        (np.zeros((1, 4), np.float32), {"threshold": 2.0}, "threshold"),
        (np.zeros((1, 4), np.float32), {"policy": "telepathy"}, "policy"),
        (np.zeros((1, 4), np.float32), {"latency_ms": -1.0}, "latency_ms"),
        (np.zeros((1, 4), np.float32), {"max_exit": 9}, "max_exit"),
    ],
)
def test_classify_names_the_field_it_cannot_honour(open_engine, chain, inputs, fields, named):
    engine = open_engine(chain)
    with pytest.raises(InvalidValue, match=named):
        engine.classify(inputs, **fields)
    assert engine.num_inflight == 0


def test_of_several_models_one_must_be_named(open_engine, chain, late):
    engine = open_engine(chain, late)
    with pytest.raises(InvalidValue, match="model"):
        engine.classify(np.zeros((1, 4), np.float32))
    with pytest.raises(UnknownModel, match="nobody"):
        engine.classify(np.zeros((1, 4), np.float32), model="nobody")


def test_open_loads_a_bundle_and_leaving_the_block_closes_the_engine(chain, tmp_path, make_net):
    folder = make_net(name="opened").bundle
    assert folder is not None
    before = set(threading.enumerate())
    with pytest.raises(ManifestError):
        Engine.open(tmp_path)
    assert set(threading.enumerate()) <= before
    with Engine(open_device("cpu", 1), EngineSettings(warm_up_s=0.02)) as engine:
        engine.add_model(chain.bundle)
        assert engine.is_ready
        assert engine.classify(np.array(SURE, np.float32)).rows[0].reason is Reason.CONFIDENT
    assert not engine.is_ready
    with pytest.raises(NotReady, match="closed"):
        engine.classify(np.array(SURE, np.float32))


def test_many_threads_each_get_their_own_answer(open_engine, chain, instrument):
    engine = open_engine(chain)
    counted = instrument(engine.models[0])

    def ask(label):
        x = np.zeros((2, 4), np.float32)
        x[:, label % 4] = 9.0
        return [int(row.answer.top_class_K[0]) for row in engine.classify(x, threshold=0.9).rows]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(100)))
    assert answers == [[label % 4] * 2 for label in range(100)]
    assert counted.rows_at(0) == 200
    assert counted.rows_at(1) == 0
    assert engine.drain(WAIT_S)
    assert engine.num_inflight == 0


def test_requests_that_wait_together_run_together(held):
    held = held()
    waiters = [held.send([FLAT])[1]]
    assert held.gate.entered.wait(WAIT_S)
    waiters += [held.send([FLAT])[1] for _ in range(3)]
    knee = held.served.profile.knee(0)
    held.gate.open()
    assert {waiter.rows[0].reason for waiter in waiters} == {Reason.FINAL}
    assert held.stages.rows_at(0) == 4
    assert max(rows for stage, rows in held.stages.batches if stage == 0) == min(3, knee)


@pytest.mark.parametrize("captures", [False, True])
def test_the_path_that_serves_accelerators_answers_the_same(late, captures):
    """Tensors in `OrtValue`, bound in and out, gathered by a graph, through fixed buffers or not: here on the CPU."""
    clock = accumulate(cycle((2.0, 1.0, 0.0)), initial=0.0)  # by which the second way, captured, takes half as long
    device = OrtValueDevice(on_cpu(captures=captures), 1, lambda: next(clock))
    rng = np.random.default_rng(3)
    inputs = {name: rng.standard_normal((6, 4)).astype(np.float32) for name in ("x", "y")}
    with Engine(device, EngineSettings(warm_up_s=0.02)) as engine:
        engine.add_model(late.bundle)
        result = engine.classify(inputs, threshold=0.8, explain=True)
    assert (device.batch_sizes is not None) == captures
    expected = late.decisions(inputs)
    assert len({row.answer.exit_index for row in result.rows}) > 1
    for i, row in enumerate(result.rows):
        for seen in row.seen:
            assert seen.top_probability_K == pytest.approx(expected[seen.exit_index][i][3:7], abs=1e-5)


# --- admission -------------------------------------------------------------------------------------------------------


def test_rows_over_the_limit_are_refused_with_when_to_come_back_and_those_inside_go_on(held):
    held = held(max_inflight_samples=4)
    _, inside = held.send([FLAT] * 3)
    with pytest.raises(Overloaded) as refusal:
        held.send([FLAT] * 2)
    assert 0.0 < refusal.value.retry_after_s < 1.0
    with pytest.raises(TooLarge):
        held.send([FLAT] * 5)
    assert held.log.refusals == ["overloaded", "too_large"]
    assert held.engine.num_inflight == 3
    held.gate.open()
    assert len(inside.rows) == 3
    assert held.engine.drain(WAIT_S)
    assert held.log.inflight == {"chain": 0}


def test_a_deadline_out_of_reach_is_refused_before_it_is_admitted(held):
    held = held()
    with pytest.raises(DeadlineExceeded):
        held.send([FLAT], latency_ms=0.0, on_miss="reject")
    assert held.engine.num_inflight == 0


def test_the_default_deadline_holds_for_who_names_none(open_engine, chain):
    engine = open_engine(chain, default_latency_ms=0.001)
    x = np.array(FLAT, np.float32)
    result = engine.classify(x, policy={"kind": "fixed", "exit": 2})
    assert (result.rows[0].answer.exit_index, result.rows[0].reason) == (0, Reason.DEADLINE)
    assert result.budget_ms == 0.001
    result = engine.classify(x, policy={"kind": "fixed", "exit": 2}, latency_ms=60_000.0)
    assert (result.rows[0].reason, result.budget_ms) == (Reason.FINAL, 60_000.0)


# --- leaving, draining, closing --------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_work_at_the_next_boundary(held):
    held = held()
    running, waiter = held.send([FLAT])
    assert held.gate.entered.wait(WAIT_S)
    queued, queued_waiter = held.send([FLAT])
    running.cancel()
    queued.cancel()
    held.gate.open()
    assert isinstance(waiter.rows[0], Cancelled)
    assert isinstance(queued_waiter.rows[0], Cancelled)
    assert held.stages.batches == [(0, 1)]


def test_draining_refuses_the_new_and_answers_the_old(held):
    held = held()
    _, waiter = held.send([FLAT])
    assert not held.engine.drain(0.0)
    assert held.engine.why_not_ready == "the engine is draining"
    with pytest.raises(NotReady, match="draining"):
        held.send([FLAT])
    held.gate.open()
    assert held.engine.drain(WAIT_S)
    assert waiter.rows[0].reason is Reason.FINAL
    assert held.engine.is_alive


def test_closing_answers_who_is_left_and_may_be_done_again(held):
    held = held()
    engine = held.engine
    _, running = held.send([FLAT])
    assert held.gate.entered.wait(WAIT_S)
    _, queued = held.send([FLAT] * 2)
    with ThreadPoolExecutor(2) as pool:
        closing = [pool.submit(engine.close) for _ in range(2)]
        held.gate.open()
        for one in closing:
            one.result(WAIT_S)
    engine.close()
    assert all(isinstance(row, NotReady | RowAnswer) for row in running.rows)
    assert [type(row) for row in queued.rows] in ([NotReady] * 2, [RowAnswer] * 2)
    assert (engine.num_inflight, engine.is_ready, engine.why_not_ready) == (0, False, "the engine is closed")


def test_a_model_that_is_removed_ends_what_it_was_asked_and_takes_nothing_new(held, make_net):
    held = held(make_net(name="other"))
    engine, served = held.engine, held.served
    _, waiter = held.send([FLAT])
    assert held.gate.entered.wait(WAIT_S)
    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(engine.remove_model, served)
        held.gate.open()
        removing.result(WAIT_S)
    assert waiter.rows[0].reason is Reason.FINAL
    with pytest.raises(NotReady, match="not loaded"):
        held.send([FLAT])
    assert [model.name for model in engine.models] == ["other"]
    assert engine.classify(np.array(SURE, np.float32)).rows[0].reason is Reason.CONFIDENT


def test_what_a_removed_model_does_not_end_in_time_is_answered_all_the_same(held):
    held = held()
    _, waiter = held.send([FLAT])
    assert held.gate.entered.wait(WAIT_S)
    held.engine.remove_model(held.served, timeout_s=0.0)
    held.gate.open()
    assert isinstance(waiter.rows[0], NotReady)
    assert held.engine.drain(WAIT_S)


# --- several runners -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runners", [2, 3])
def test_as_many_stages_run_side_by_side_as_there_are_runners(held, runners):
    held = held(runners=runners, max_batch=1)
    everybody = threading.Barrier(runners)
    held.stages.before = lambda stage, feeds: everybody.wait(WAIT_S) if stage == 0 else None
    held.gate.open()
    waiters = [held.send([FLAT])[1] for _ in range(runners)]
    assert [waiter.rows[0].reason for waiter in waiters] == [Reason.FINAL] * runners


def test_a_row_whose_model_is_removed_while_its_stage_runs_beside_others_is_answered(held, make_net):
    held = held(make_net(name="other"), runners=2)
    _, waiter = held.send([FLAT])
    assert held.gate.entered.wait(WAIT_S)
    held.engine.remove_model(held.served, timeout_s=0.0)
    assert held.engine.classify(np.array(SURE, np.float32)).rows[0].reason is Reason.CONFIDENT
    held.gate.open()
    (row,) = waiter.rows
    assert isinstance(row, NotReady)
    assert "unloaded" in row.message
    assert held.engine.is_ready


def test_a_runner_that_dies_takes_the_others_with_it_once_their_stages_have_run(held):
    held = held(runners=2, max_batch=1)
    _, held_up = held.send([FLAT])
    assert held.gate.entered.wait(WAIT_S)
    break_next(held.engine, ZeroDivisionError("a bug"))
    _, broken = held.send([SURE])
    held.gate.open()
    assert all(isinstance(waiter.rows[0], NotReady | RowAnswer) for waiter in (held_up, broken))
    held.engine.close()
    assert (held.engine.is_alive, held.engine.num_inflight) == (False, 0)
    assert "ZeroDivisionError" in held.engine.why_not_ready


@pytest.fixture
def sharing(chain, options, monkeypatch):
    """An engine whose two threads the stages of its model share out, whatever the warm-up finds that to be worth."""
    monkeypatch.setattr(warm_up, "SHORTEST_S", 0.0)
    monkeypatch.setattr(warm_up, "LEAST_GAIN", 0.0)
    settings_ = EngineSettings(runners=None, max_batch=4, warm_up_s=0.02, default_latency_ms=None, inline_ms=0.0)
    with Engine(open_device("cpu", 2), settings_) as engine:
        yield Held(engine, engine.add_model(chain.bundle), None, Gate(), None, options)


def count_widths(served, before=lambda num_threads: None):
    """Count dispatches by the threads they run on; `before` is called with these when one starts."""
    counts, executor_of = Counter(), served.executor_of

    def counting(width):
        executor = executor_of(width)
        counts[executor.device.threads] += 1
        before(executor.device.threads)
        return executor

    served.executor_of = counting
    return counts


def test_a_lone_row_runs_with_every_thread(sharing):
    counts = count_widths(sharing.served)
    for _ in range(3):
        assert sharing.send([FLAT])[1].rows[0].reason is Reason.FINAL
    assert counts == {2: 9}


def test_many_rows_run_side_by_side_and_their_answers_are_the_networks(sharing, chain):
    both, have_met = threading.Barrier(2), threading.Event()

    def meet(num_threads):
        if num_threads == 1 and not have_met.is_set():  # nobody passes alone
            both.wait(WAIT_S)
            have_met.set()

    count_widths(sharing.served, meet)
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    rows = sharing.engine.classify(x, policy={"kind": "fixed", "exit": 2}).rows
    assert have_met.is_set()
    probabilities = np.array([row.answer.top_probability_K for row in rows])
    np.testing.assert_allclose(probabilities, chain.decisions({"x": x})[2][:, 3:7], atol=1e-5)


def test_what_comes_while_a_row_has_every_thread_starts_when_that_has_run(sharing):
    counts = count_widths(sharing.served, lambda num_threads: sharing.gate(0, None))
    waiters = [sharing.send([FLAT])[1]]
    assert sharing.gate.entered.wait(WAIT_S)
    waiters += [sharing.send([FLAT])[1] for _ in range(4)]
    assert counts == {2: 1}
    sharing.gate.open()
    assert [waiter.rows[0].reason for waiter in waiters] == [Reason.FINAL] * 5
    assert counts[1] > 0


# --- several models --------------------------------------------------------------------------------------------------


def test_a_model_is_added_while_another_serves(open_engine, chain, make_net):
    engine = open_engine(chain)
    stop, reasons = threading.Event(), []

    def keep_asking():
        while not stop.is_set():
            reasons.append(engine.classify(np.array(SURE, np.float32), model="chain").rows[0].reason)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        added = engine.add_model(make_net(name="added").bundle)
        assert engine.classify(np.array(SURE, np.float32), model="added").rows[0].reason is Reason.CONFIDENT
        stop.set()
        asking.result(WAIT_S)
    assert set(reasons) == {Reason.CONFIDENT}
    assert all(stage.measured for stage in added.profile.stages)


def test_one_bundle_serves_under_several_names_at_once(open_engine, chain):
    engine = open_engine(chain)
    engine.add_model(chain.bundle, "twin")
    engine.add_model(chain.bundle, "chain")
    x = np.array(SURE, np.float32)
    assert {engine.classify(x, model=name).rows[0].reason for name in ("chain", "twin")} == {Reason.CONFIDENT}
    for served in engine.models[:2]:
        engine.remove_model(served)
    assert engine.classify(x, model="chain").rows[0].reason is Reason.CONFIDENT


def test_a_model_that_cannot_be_warmed_up_is_its_loaders_problem(open_engine, chain, late, monkeypatch):
    engine = open_engine(chain)

    def broken(self, clock, budget_s):
        yield 0.0
        raise RuntimeError("a shape that the graph does not take")

    with monkeypatch.context() as patch:
        patch.setattr(ServedModel, "warm_up", broken)
        with pytest.raises(RuntimeError, match="shape"):
            engine.add_model(late.bundle)
    assert [served.name for served in engine.models] == ["chain"]
    assert engine.classify(np.array(SURE, np.float32)).rows[0].reason is Reason.CONFIDENT
    assert engine.add_model(late.bundle) in engine.models


def test_profiling_a_new_model_breaks_no_promise_of_those_that_wait(held, late, monkeypatch):
    house = held(max_batch=1, default_latency_ms=60_000.0)
    waiting_at_each_step = []
    is_loading = threading.Event()

    def slow_steps():
        for _ in range(3):
            yield 3600.0  # an hour a step, says the profile; rows are due within a minute
            waiting_at_each_step.append(house.engine.num_inflight)

    def warm_up(self, clock, budget_s):
        is_loading.set()
        return slow_steps()

    monkeypatch.setattr(ServedModel, "warm_up", warm_up)
    _, waiter = house.send([SURE] * 40)
    loader = threading.Thread(target=house.engine.add_model, args=(late.bundle,), daemon=True)
    loader.start()
    assert is_loading.wait(WAIT_S)
    house.gate.open()
    assert len(waiter.rows) == 40
    loader.join(WAIT_S)
    assert waiting_at_each_step == [0, 0, 0]


def test_warming_up_measures_every_stage_up_to_the_largest_batch_and_never_below_the_least(make_net, instrument):
    bundle = make_net(name="wide", min_batch=3).bundle
    served = ServedModel("wide", bundle, open_device("cpu", 1), 8)
    counted = instrument(served)
    for _ in served.warm_up(lambda: 0.0, 1.0):
        pass
    assert [sorted(stage.measured) for stage in served.profile.stages] == [[1, 2, 4, 8]] * 3
    assert min(rows for _, rows in counted.batches) == 3
    assert max(rows for _, rows in counted.batches) == 8


def test_warming_up_ends_when_its_time_is_spent(simulate, chain, instrument):
    sim = simulate()
    served = ServedModel("slow", chain.bundle, open_device("cpu", 1), 32)
    counted = instrument(served, sim.clock)
    counted.seconds = lambda stage, rows: 0.01 * rows
    started = sim.clock.now
    for _ in served.warm_up(sim.clock, 2.0):
        pass
    assert sim.clock.now - started <= 2.0
    assert sorted(served.profile.stages[0].measured) == [1, 2, 4]
    assert served.profile.stages[0].mean_s(32) == pytest.approx(0.32)


def test_a_slow_moment_of_the_warm_up_is_one_for_all_batch_sizes(simulate, chain, instrument):
    sim = simulate()
    served = ServedModel("disturbed", chain.bundle, open_device("cpu", 1), 8)
    counted = instrument(served, sim.clock)
    steps = served.warm_up(sim.clock, 60.0)
    # As if another process took a core for half of the time that the warm-up takes.
    counted.seconds = lambda stage, rows: 0.01 * (4 + rows) * (3 if sim.clock.now > began + 1.2 else 1)
    began = sim.clock.now
    for _ in steps:
        pass
    assert sim.clock.now - began > 2.0
    measured = served.profile.stages[0].measured
    assert {size: seconds / measured[1] for size, seconds in measured.items()} == pytest.approx(
        {size: (4 + size) / 5 for size in (1, 2, 4, 8)}, rel=0.01
    )


class Scripted:
    """A part of a network on some threads, whose every stage takes as long on the test's clock as the test says."""

    def __init__(self, executor, clock, seconds):
        self._executor, self._clock, self._seconds = executor, clock, seconds
        self._lock = threading.Lock()

    def run(self, stage, feeds):
        with self._lock:
            self._clock.now += self._seconds(len(next(iter(feeds.values()))))
        return self._executor.run(stage, feeds)


@pytest.mark.parametrize(
    ("beside_s", "found"),
    [
        ({1: 1.2, 2: 1.2}, None),  # side by side takes longer, however many there are
        ({1: 0.9, 2: 0.95}, (4, 1)),
        ({1: 0.9, 2: 0.8}, (2, 2)),  # two threads each do most
        ({1: 1.2, 2: 0.8}, None),  # not looked for: the fewest gain nothing already
    ],
)
def test_the_warm_up_finds_how_many_stages_do_most_side_by_side(simulate, chain, instrument, beside_s, found):
    """`beside_s`: by threads for each, what a row takes of the device's time side by side, of what it takes alone.

    `found`: how many that is, and threads for each.
    """
    sim = simulate()
    served = ServedModel("found", chain.bundle, open_device("cpu", 4), 4, runners=None)
    instrument(served, sim.clock).seconds = lambda stage, rows: 0.01 * rows
    real = warm_up.StageExecutor

    def loaded(bundle, device):
        return Scripted(real(bundle, device), sim.clock, lambda rows: 0.01 * rows * beside_s[device.threads])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_up, "StageExecutor", loaded)
        for _ in served.warm_up(sim.clock, 60.0):
            pass
    if found is None:
        assert served.narrow is None
        return
    assert (served.narrow.num_abreast, served.narrow.num_threads) == found
    measured, (num_abreast, num_threads) = served.narrow.profile.stages[0].measured, found
    assert measured == pytest.approx({size: num_abreast * 0.01 * size * beside_s[num_threads] for size in (1, 2, 4)})


def test_a_model_that_can_only_be_loaded_once_is_served_with_every_thread(sharing, late, monkeypatch, caplog):
    def full(bundle, device):
        raise ManifestError("ONNX Runtime refuses the graph of 'stage0' (BadAlloc)")

    monkeypatch.setattr(warm_up, "StageExecutor", full)
    served = sharing.engine.add_model(late.bundle)
    assert served.narrow is None
    assert "BadAlloc" in caplog.text
    one = np.array(FLAT, np.float32)
    assert len(sharing.engine.classify({"x": one, "y": one}, model="late").rows) == 1


def test_rows_of_a_short_network_are_not_tried_side_by_side(simulate, chain, instrument, monkeypatch):
    sim = simulate()
    served = ServedModel("short", chain.bundle, open_device("cpu", 4), 4, runners=None)
    instrument(served, sim.clock).seconds = lambda stage, rows: 1e-4
    monkeypatch.setattr(warm_up, "StageExecutor", None)
    for _ in served.warm_up(sim.clock, 60.0):
        pass
    assert served.narrow is None


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_stage_that_raises_answers_its_own_rows_and_the_engine_goes_on(held):
    held = held()
    _, failing = held.send([FLAT])
    assert held.gate.entered.wait(WAIT_S)
    _, other = held.send([FLAT])
    held.gate.open(RuntimeError("broken"))
    assert isinstance(failing.rows[0], StageFailed)
    assert other.rows[0].reason is Reason.FINAL
    assert held.engine.is_ready
    assert held.engine.drain(WAIT_S)
    assert held.engine.num_inflight == 0


def break_next(engine, error):
    def broken(now):
        raise error

    engine._loop._scheduler.next = broken


def break_put(engine, error):
    def broken(key, samples):
        raise error

    engine._loop._scheduler.put = broken


@pytest.mark.parametrize("broken", [break_next, break_put, None])
def test_a_thread_that_dies_answers_everyone_it_owed_and_readiness_says_so(held, chain, broken):
    held = held()
    engine = held.engine
    waiters = [held.send([FLAT, FLAT])[1]]
    assert held.gate.entered.wait(WAIT_S)
    waiters += [held.send([FLAT])[1] for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(engine.add_model, chain.bundle, "another")
        if broken is not None:
            broken(engine, ZeroDivisionError("a bug"))
        held.gate.open(None if broken is not None else Killed())
        for waiter in waiters:
            assert all(isinstance(row, NotReady) for row in waiter.rows)
        with pytest.raises(NotReady):
            loading.result(WAIT_S)
    assert engine.drain(WAIT_S)
    assert not engine.is_ready
    assert not engine.is_alive
    assert ("ZeroDivisionError" if broken is not None else "Killed") in engine.why_not_ready
    with pytest.raises(NotReady, match="died"):
        held.send([FLAT])
    with pytest.raises(NotReady, match="died"):
        engine.add_model(chain.bundle)
    assert engine.num_inflight == 0
    assert held.log.inflight["chain"] == 0
    engine.close()
    assert [len(waiter.events) for waiter in waiters] == [1] * 4


def test_a_loader_whose_warm_up_the_thread_dies_in_is_told(open_engine, chain, monkeypatch):
    engine = open_engine(chain)

    def deadly(self, clock, budget_s):
        yield 0.0
        raise Killed

    refusals = queue.SimpleQueue()

    def load():
        with pytest.raises(NotReady) as refusal:
            engine.add_model(chain.bundle, "another")
        refusals.put(refusal.value.message)

    monkeypatch.setattr(ServedModel, "warm_up", deadly)
    threading.Thread(target=load, daemon=True).start()  # a loader that is not told would hold up more than this test
    assert "died" in refusals.get(timeout=WAIT_S)
    assert not engine.is_alive


def test_an_observer_that_raises_costs_nobody_an_answer(open_engine, chain, options):
    class Broken:
        def __getattr__(self, name):
            def broken(*_):
                raise RuntimeError("no such label")

            return broken

    engine = open_engine(chain, observer=Broken())
    for _ in range(3):
        assert engine.classify(np.array(SURE, np.float32)).rows[0].reason is Reason.CONFIDENT
    engine.remove_model(engine.models[0])
    assert engine.is_ready
    assert engine.num_inflight == 0


# --- whatever happens ------------------------------------------------------------------------------------------------

FAILING, DEADLY = 7.0, 8.0
POLICIES = [
    ("confidence", 0.9),
    ("entropy", 0.5),
    ("margin", (0.9, 0.1)),
    ({"kind": "patience", "patience": 1}, None),
    ({"kind": "fixed", "exit": 1}, None),
    ({"kind": "any_of", "of": [{"kind": "margin", "threshold": 0.8}, {"kind": "agreement"}]}, None),
]
a_row = st.one_of(st.sampled_from([SURE, FLAT, (0.2, 0.0, 0.0, 0.0)]), st.sampled_from([(FAILING,) * 4, (np.nan,) * 4]))
submits = st.tuples(
    st.just("submit"),
    st.integers(0, 3),
    st.lists(a_row, min_size=1, max_size=5),
    st.sampled_from(POLICIES),
    st.fixed_dictionaries(
        {
            "latency_ms": st.sampled_from([None, 0.0, 0.05, 0.3, 5.0, 1000.0]),
            "on_miss": st.sampled_from(["answer", "reject"]),
            "combine": st.sampled_from(["last", "mean", "geometric"]),
            "explain": st.booleans(),
            "wants_progress": st.booleans(),
        }
    ),
)
cancels = st.tuples(st.just("cancel"), st.integers(0, 30))
rarely = st.sampled_from([("load",), ("unload",), ("drain",), ("close",), ("kill",)])
endings = st.sampled_from(["drain", "close", "kill", "break"])


class Everyone:
    """Listens to every request of a run."""

    def __init__(self):
        self.events = {}

    def deliver(self, events):
        for submission, event in events:
            self.events.setdefault(submission, []).append(event)


class Run:
    """One engine under one sequence of events; what it was asked and what became of it."""

    def __init__(self, bundle, instrument, options, runners):
        self.bundle, self.instrument, self.options = bundle, instrument, options
        self.everyone = Everyone()
        self.asked = []
        self.refused = []
        bounds = {"max_batch": 3, "max_inflight_samples": 24, "max_wait_ms": 1000.0}
        settings_ = EngineSettings(runners=runners, warm_up_s=0.005, **bounds)
        self.engine = Engine(open_device("cpu", 1), settings_)
        self.models = []
        self.load()

    def load(self):
        served = self.engine.add_model(self.bundle, f"m{len(self.models)}")
        self.instrument(served).before = self.strike
        self.models.append(served)

    @staticmethod
    def strike(stage, feeds):
        for tensor in feeds.values():
            if stage == 1 and (tensor == FAILING).any():
                raise RuntimeError("broken")
            if (tensor == DEADLY).any():
                raise Killed

    def submit(self, model, rows, policy, given_):
        served = self.models[model % len(self.models)]
        options = self.options(policy[0], threshold=policy[1], **given_)
        x = np.array(rows, dtype=np.float32)
        self.asked.append(self.engine.submit(served, {"x": x}, options, self.everyone))

    def cancel(self, index):
        if self.asked:
            self.asked[index % len(self.asked)].cancel()

    def unload(self):
        self.engine.remove_model(self.models[-1], timeout_s=0.0)

    def drain(self):
        self.engine.drain(0.0)

    def close(self):
        self.engine.close()

    def kill(self):
        self.submit(0, [(DEADLY,) * 4], POLICIES[0], {})

    def do(self, name, *args):
        try:
            getattr(self, name)(*args)
        except OfframpError as error:
            self.refused.append(error)

    def end(self, how):
        if how == "drain":
            assert self.engine.drain(WAIT_S)
        elif how == "break":
            break_next(self.engine, ZeroDivisionError("a bug"))
            self.do("submit", 0, [FLAT], POLICIES[0], {})
        elif how == "kill":
            self.do("kill")
        self.engine.close()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(submits, submits, submits, submits, cancels, rarely), max_size=25),
    st.tuples(endings, st.integers(1, 3)),
)
def test_every_admitted_request_gets_exactly_one_answer_whatever_happens(chain, instrument, options, events, way):
    ending, runners = way
    run = Run(chain.bundle, instrument, options, runners)
    try:
        for event in events:
            run.do(*event)
    finally:
        run.end(ending)
    for submission in run.asked:
        *progress, result = run.everyone.events[submission]
        assert len(result.rows) == submission.num_rows
        assert all(isinstance(row, RowAnswer | OfframpError) for row in result.rows)
        assert all(hasattr(news, "row") for news in progress)
    assert len(run.everyone.events) == len(run.asked)
    assert run.engine.num_inflight == 0
    assert all(isinstance(error, NotReady | Overloaded | DeadlineExceeded) for error in run.refused)
    assert not run.engine.is_ready
    assert run.engine.why_not_ready


@pytest.mark.parametrize(
    "switch", [{"rebatch": False}, {"hold": False}, {"batch_timeout_ms": 5.0}, {"forced_exits": False}]
)
def test_with_a_rule_turned_off_the_answers_stay_the_same(open_engine, chain, switch):
    x_BD = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    answers = []
    for knobs in ({}, switch):
        result = open_engine(chain, **knobs).classify(x_BD, policy="confidence", threshold=0.6)
        answers.append([(row.answer.exit_index, int(row.answer.top_class_K[0])) for row in result.rows])
    assert answers[0] == answers[1]

"""Coroutines that wait for the engine's thread."""

import asyncio
import threading
import time

import numpy as np
import pytest
from offramp_contract.errors import NotReady
from offramp_contract.policy import Reason
from offramp_server.bridge import LoopBridge
from offramp_server.messages import Progress, Result
from offramp_server.served import ServedModel

WAIT_S = 30.0
FLAT = {"x": np.zeros((1, 4), dtype=np.float32)}


class Gate:
    """Holds the engine's thread inside a stage; an event loop can wait until it is there."""

    def __init__(self, stage=0):
        self.stage = stage
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, stage, feeds):
        if stage == self.stage:
            self.entered.set()
            assert self.opened.wait(WAIT_S)

    async def is_entered(self):
        assert await asyncio.to_thread(self.entered.wait, WAIT_S)


class Done:
    """An observer's part that remembers how requests ended."""

    def __init__(self):
        self.outcomes = []
        self.one = threading.Event()

    def __getattr__(self, name):
        return lambda *_: None

    def request_done(self, done):
        self.outcomes.append(done.outcome)
        self.one.set()


def test_an_answer_is_awaited(open_engine, chain, options):
    engine = open_engine(chain)

    async def ask():
        bridge = LoopBridge(asyncio.get_running_loop())
        return await asyncio.gather(*(bridge.answer(engine, engine.models[0], FLAT, options()) for _ in range(50)))

    results = asyncio.run(ask())
    assert len(results) == 50
    assert {result.rows[0].reason for result in results} == {Reason.FINAL}


def test_what_is_refused_is_raised(open_engine, chain, options):
    engine = open_engine(chain)
    engine.drain(0.0)

    async def ask():
        await LoopBridge(asyncio.get_running_loop()).answer(engine, engine.models[0], FLAT, options())

    async def follow():
        bridge = LoopBridge(asyncio.get_running_loop())
        return [event async for event in bridge.stream(engine, engine.models[0], FLAT, options())]

    for coroutine in (ask, follow):
        with pytest.raises(NotReady):
            asyncio.run(coroutine())


def test_an_answer_that_nobody_awaits_any_more_is_cancelled(open_engine, chain, instrument, options):
    done, gate = Done(), Gate()
    engine = open_engine(chain, observer=done)
    counted = instrument(engine.models[0])
    counted.before = gate

    async def leave():
        bridge = LoopBridge(asyncio.get_running_loop())
        task = asyncio.create_task(bridge.answer(engine, engine.models[0], FLAT, options()))
        await gate.is_entered()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        assert await asyncio.to_thread(done.one.wait, WAIT_S)
        return bridge._takers

    assert asyncio.run(leave()) == {}
    assert done.outcomes == ["cancelled"]
    assert counted.batches == [(0, 1)]
    assert engine.drain(WAIT_S)


def test_a_stream_gives_every_exit_passed_and_then_the_result(open_engine, chain, options):
    engine = open_engine(chain)

    async def follow():
        bridge = LoopBridge(asyncio.get_running_loop())
        events = bridge.stream(engine, engine.models[0], FLAT, options(wants_progress=True))
        return [event async for event in events]

    *progress, result = asyncio.run(follow())
    assert [event.answer.exit_index for event in progress] == [0, 1]
    assert all(isinstance(event, Progress) for event in progress)
    assert isinstance(result, Result)


def test_a_stream_that_is_left_early_is_cancelled(open_engine, chain, instrument, options):
    done, gate = Done(), Gate(stage=1)
    engine = open_engine(chain, observer=done)
    counted = instrument(engine.models[0])
    counted.before = gate

    async def leave():
        bridge = LoopBridge(asyncio.get_running_loop())
        events = bridge.stream(engine, engine.models[0], FLAT, options(wants_progress=True))
        first = await anext(events)
        await events.aclose()
        gate.opened.set()
        assert await asyncio.to_thread(done.one.wait, WAIT_S)
        return first

    assert asyncio.run(leave()).answer.exit_index == 0
    assert done.outcomes == ["cancelled"]
    assert counted.rows_at(2) == 0


def test_an_event_loop_that_is_gone_does_not_hurt_the_engine(open_engine, chain, instrument, options, caplog):
    gate = Gate()
    engine = open_engine(chain)
    instrument(engine.models[0]).before = gate
    loop = asyncio.new_event_loop()
    bridge = LoopBridge(loop)
    engine.submit(engine.models[0], FLAT, options(), bridge)
    assert gate.entered.wait(WAIT_S)
    loop.close()
    gate.opened.set()
    assert engine.drain(WAIT_S)
    assert engine.is_alive
    assert caplog.records == []


def test_a_closing_engine_answers_who_awaits(open_engine, chain, instrument, options):
    gate = Gate()
    engine = open_engine(chain)
    instrument(engine.models[0]).before = gate

    async def ask():
        bridge = LoopBridge(asyncio.get_running_loop())
        task = asyncio.create_task(bridge.answer(engine, engine.models[0], FLAT, options()))
        await gate.is_entered()
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        gate.opened.set()
        await closing
        return await task

    (row,) = asyncio.run(ask()).rows
    assert isinstance(row, NotReady) or row.reason is Reason.FINAL


# --- where rows run -------------------------------------------------------------------------------------------------

ALWAYS_MS = 60_000.0
"""Longer than any stage here: whether a row runs inline is then not a matter of how fast the machine is."""
TWO_ROWS = {"x": np.zeros((2, 4), dtype=np.float32)}


class Threads:
    """Remembers on which threads stages run."""

    def __init__(self):
        self.seen = []

    def __call__(self, stage, feeds):
        self.seen.append(threading.get_ident())


def ask_for(engine, options, *inputs):
    """Ask an idle engine for several answers in one turn of an event loop; gives them and the loop's thread."""
    give_up_s = time.monotonic() + WAIT_S
    while engine._runners._num_idle == 0:  # its runner is still busy with having loaded the model
        assert time.monotonic() < give_up_s

    async def ask():
        bridge = LoopBridge(asyncio.get_running_loop())
        return await asyncio.gather(*(bridge.answer(engine, engine.models[0], rows, options()) for rows in inputs))

    return asyncio.run(ask()), threading.get_ident()


def test_a_short_row_that_comes_alone_runs_on_the_thread_that_brings_it(open_engine, chain, instrument, options):
    engine = open_engine(chain, inline_ms=ALWAYS_MS)
    instrument(engine.models[0]).before = threads = Threads()
    (result,), here = ask_for(engine, options, FLAT)
    assert result.rows[0].reason is Reason.FINAL
    assert threads.seen == [here] * 3
    assert engine.num_inflight == 0


@pytest.mark.parametrize("case", [(TWO_ROWS, ALWAYS_MS), (FLAT, 0.0), (FLAT, 1e-9)])
def test_other_rows_are_left_to_a_runner(open_engine, chain, instrument, options, case):
    inputs, inline_ms = case
    engine = open_engine(chain, inline_ms=inline_ms)
    instrument(engine.models[0]).before = threads = Threads()
    _, here = ask_for(engine, options, inputs)
    assert len(threads.seen) == 3
    assert here not in threads.seen


def measure_flat(served, clock, budget_s):
    """Stand in for a warm-up: a batch takes as long as one row, so that rows that wait run together."""
    for stage in served.profile.stages:
        for size in (1, served.max_batch):
            stage.calibrate(size, [1e-4])
    yield 0.0


def test_requests_of_one_turn_start_together(open_engine, chain, instrument, options, monkeypatch):
    monkeypatch.setattr(ServedModel, "warm_up", measure_flat)
    engine = open_engine(chain, inline_ms=ALWAYS_MS)
    counted = instrument(engine.models[0])
    counted.before = threads = Threads()
    _, here = ask_for(engine, options, FLAT, FLAT, FLAT)
    assert counted.batches == [(0, 3), (1, 3), (2, 3)]
    assert here not in threads.seen


def test_a_row_is_left_to_a_runner_that_is_at_work(open_engine, chain, instrument, options):
    engine = open_engine(chain, inline_ms=ALWAYS_MS)
    counted = instrument(engine.models[0])
    gate, threads = Gate(), Threads()

    def before(stage, feeds):
        threads(stage, feeds)
        gate(stage, feeds)

    counted.before = before

    async def ask():
        bridge = LoopBridge(asyncio.get_running_loop())
        both = [asyncio.create_task(bridge.answer(engine, engine.models[0], TWO_ROWS, options()))]
        await gate.is_entered()
        both.append(asyncio.create_task(bridge.answer(engine, engine.models[0], FLAT, options())))
        await asyncio.sleep(0)  # it is asked for, and started by a call that is due before the next
        gate.opened.set()
        return await asyncio.gather(*both)

    results = asyncio.run(ask())
    assert [len(result.rows) for result in results] == [2, 1]
    assert threading.get_ident() not in threads.seen


def test_an_engine_that_closes_meanwhile_leaves_the_row_one_answer(open_engine, chain, instrument, options):
    engine = open_engine(chain, inline_ms=ALWAYS_MS)
    gate = Gate(stage=1)
    instrument(engine.models[0]).before = gate
    answered = []
    asking = threading.Thread(target=lambda: answered.extend(ask_for(engine, options, FLAT)[0]))
    asking.start()
    assert gate.entered.wait(WAIT_S)
    engine.close()  # its runner has gone when this returns, and is not the last to go
    assert answered == []
    gate.opened.set()
    asking.join(WAIT_S)
    ((row,),) = [result.rows for result in answered]
    assert row.reason is Reason.FINAL
    assert engine.num_inflight == 0


def test_an_engine_that_dies_inline_answers_and_says_so(open_engine, chain, options, caplog, monkeypatch):
    engine = open_engine(chain, inline_ms=ALWAYS_MS)

    def fail(dispatch, ran):
        raise ZeroDivisionError

    monkeypatch.setattr(engine._loop, "finish", fail)
    (result,), _ = ask_for(engine, options, FLAT)
    assert isinstance(result.rows[0], NotReady)
    assert engine.why_not_ready == "the engine has died: ZeroDivisionError"
    assert not engine.is_alive
    assert [record.message for record in caplog.records] == ["a thread of the engine has died"]

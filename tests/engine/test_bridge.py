"""Coroutines that wait for the engine's thread."""

import asyncio
import threading

import numpy as np
import pytest
from offramp_contract.errors import NotReady
from offramp_contract.policy import Reason
from offramp_server.bridge import LoopBridge
from offramp_server.messages import Progress, Result

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

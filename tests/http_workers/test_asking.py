"""A worker's side and the engine's of one channel, in one process: the same answers, and every byte comes back."""

import asyncio
import mmap
import random
import socket
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from offramp_contract.errors import NotReady, Overloaded, TooLarge
from offramp_contract.policy_spec import FixedSpec, compile_policy
from offramp_runtime import open_bundle, open_device
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.http_workers.arena import ALIGNMENT, Span
from offramp_server.http_workers.channel import Channel
from offramp_server.http_workers.hub import Hub
from offramp_server.http_workers.messages import Submit, decode_for_worker, encode
from offramp_server.http_workers.port import Port
from offramp_server.http_workers.remote import RemoteEngine
from offramp_server.http_workers.writing import written_options
from offramp_server.messages import NoObserver, Progress, RequestOptions, Result
from offramp_server.repository import Repository
from offramp_server.settings import ServerSettings

PAGE = mmap.PAGESIZE
SIDE = 32
"""Rows of 32 x 32 floats take a page."""


@pytest.fixture(scope="module")
def wide_bundle(make_bundle):
    return make_bundle(row_shape=(SIDE * SIDE,), num_classes=4)


class Hold(NoObserver):
    """Holds the engine's thread after a stage until it may go on."""

    __slots__ = ("go_on", "is_held")

    def __init__(self):
        object.__setattr__(self, "is_held", threading.Event())
        object.__setattr__(self, "go_on", threading.Event())

    def stage_ran(self, run):
        self.is_held.set()
        self.go_on.wait(30)


class Pair:
    """Both sides."""

    def __init__(self, engine, num_bytes, **given):
        self.memory = mmap.mmap(-1, num_bytes)
        self.hub = Hub(engine, Repository(engine), self.no_app)
        self.port = Port(
            engine, self.hub.models, NoObserver(), self.memory, relay=self.hub.answer, on_synced=self.hub.notice
        )
        self.channel = Channel(self.take, self.end)
        self.remote = RemoteEngine(self.channel, ServerSettings(**given), self.memory)
        self.is_lost = self.port.lost

    def take(self, message):
        self.remote.take(decode_for_worker(message))

    def end(self):
        self.remote.end()

    @staticmethod
    async def no_app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def connect(self):
        loop = asyncio.get_running_loop()
        for channel, side in zip((self.port.channel, self.channel), socket.socketpair(), strict=True):
            side.setblocking(False)
            await loop.create_connection(lambda channel=channel: channel, sock=side)
        self.hub.join(self.port)
        while self.port.synced < 1:
            await asyncio.sleep(0)
        (self.served,) = self.remote.catalogue.served()

    def answer(self, inputs, options):
        return self.remote.answer(self.remote, self.served, inputs, options)

    @property
    def is_all_free(self):
        return self.remote.arena.free == (Span(0, len(self.memory)),)


@asynccontextmanager
async def pair(bundle, num_bytes=4 * PAGE, observer=None, **given):
    """Connect both sides over an engine of their own."""
    settings = EngineSettings(warm_up_s=0.05, max_inflight_samples=given.pop("max_inflight_samples", 4096))
    with Engine(open_device("cpu", 1), settings, observer) as engine:
        engine.add_model(open_bundle(bundle))
        both = Pair(engine, num_bytes, **given)
        await both.connect()
        yield both
        both.channel.abort()
        await both.is_lost.wait()
        if isinstance(observer, Hold):
            observer.go_on.set()


def options(**fields):
    spec = fields.pop("spec", FixedSpec(exit=2))
    return RequestOptions(compile_policy(spec, 3), spec, **fields)


def rows(seed, num_rows):
    return {"x": np.random.default_rng(seed).standard_normal((num_rows, SIDE * SIDE)).astype(np.float32)}


def test_answers_are_the_engines_own_whatever_memory_there_is_and_whoever_leaves(wide_bundle):
    chance = random.Random(0)
    inputs = [rows(seed, chance.randint(1, 3)) for seed in range(60)]
    with Engine.open(wide_bundle, "cpu", EngineSettings(warm_up_s=0.05)) as engine:
        name = engine.models[0].manifest.inputs[0].name
        expected = [engine.classify({name: x["x"]}, policy={"kind": "fixed", "exit": 2}).rows for x in inputs]

    async def ask():
        async with pair(wide_bundle) as both:
            tasks = [asyncio.create_task(both.answer({name: x["x"]}, options(wants_logits=True))) for x in inputs]
            await asyncio.sleep(0)
            for task in chance.sample(tasks, 15):
                task.cancel()
            answered = await asyncio.gather(*tasks, return_exceptions=True)
            while not both.is_all_free:  # those that were cancelled are answered too, only to nobody
                await asyncio.sleep(0)
            return answered

    answered = asyncio.run(ask())
    assert sum(isinstance(one, asyncio.CancelledError) for one in answered) == 15
    for result, row_answers in zip(answered, expected, strict=True):
        if isinstance(result, Result):
            for row, wanted in zip(result.rows, row_answers, strict=True):
                np.testing.assert_array_equal(row.answer.logits_C, wanted.answer.logits_C)
                assert (row.reason, row.stages, row.score) == (wanted.reason, wanted.stages, wanted.score)


def test_progress_comes_before_the_result_and_one_that_is_left_cancels(wide_bundle):
    async def ask():
        async with pair(wide_bundle) as both:
            name = both.served.manifest.inputs[0].name
            asked = options(wants_progress=True)
            events = [
                event async for event in both.remote.stream(both.remote, both.served, {name: rows(0, 1)["x"]}, asked)
            ]
            left = both.remote.stream(both.remote, both.served, {name: rows(0, 1)["x"]}, asked)
            await anext(left)
            await left.aclose()
            while not both.is_all_free:
                await asyncio.sleep(0)
            return events

    *progress, result = asyncio.run(ask())
    assert [event.answer.exit_index for event in progress] == [0, 1]
    assert all(isinstance(event, Progress) for event in progress)
    assert isinstance(result, Result)


def test_without_memory_a_request_waits_its_time_and_is_then_refused(wide_bundle):
    hold = Hold()

    async def ask():
        async with pair(wide_bundle, 2 * PAGE, hold, max_wait_ms=20.0) as both:
            name = both.served.manifest.inputs[0].name
            first = asyncio.create_task(both.answer({name: rows(0, 2)["x"]}, options()))
            await asyncio.to_thread(hold.is_held.wait, 30)
            with pytest.raises(Overloaded, match="memory"):
                await both.answer({name: rows(1, 1)["x"]}, options())
            with pytest.raises(TooLarge, match="http_worker_memory_bytes"):
                await both.answer({name: rows(1, 3)["x"]}, options())
            hold.go_on.set()
            await first
            assert both.is_all_free

    asyncio.run(ask())


def test_the_engines_refusal_is_the_requests_answer_and_frees_its_memory(wide_bundle):
    async def ask():
        async with pair(wide_bundle, max_inflight_samples=2) as both:
            name = both.served.manifest.inputs[0].name
            with pytest.raises(TooLarge, match="at most 2 rows"):
                await both.answer({name: rows(0, 3)["x"]}, options())
            assert both.is_all_free

    asyncio.run(ask())


def test_when_the_engines_process_goes_everyone_who_waits_is_told_and_nobody_is_let_in(wide_bundle):
    hold = Hold()

    async def ask():
        async with pair(wide_bundle, 2 * PAGE, hold) as both:
            name = both.served.manifest.inputs[0].name
            admitted = asyncio.create_task(both.answer({name: rows(0, 2)["x"]}, options()))
            waiting = asyncio.create_task(both.answer({name: rows(1, 1)["x"]}, options()))
            await asyncio.to_thread(hold.is_held.wait, 30)
            both.port.channel.abort()
            for task in (admitted, waiting):
                with pytest.raises(NotReady, match="process has ended"):
                    await task
            with pytest.raises(NotReady):
                await both.answer({name: rows(1, 1)["x"]}, options())
            assert both.is_all_free

    asyncio.run(ask())


def test_when_a_worker_goes_its_requests_are_cancelled(wide_bundle):
    outcomes = []

    class Told(Hold):
        __slots__ = ()

        def request_done(self, done):
            outcomes.append(done.outcome)

    hold = Told()

    async def ask():
        async with pair(wide_bundle, observer=hold) as both:
            name = both.served.manifest.inputs[0].name
            tasks = [asyncio.create_task(both.answer({name: rows(0, 1)["x"]}, options())) for _ in range(3)]
            await asyncio.to_thread(hold.is_held.wait, 30)
            both.channel.abort()
            await both.port.lost.wait()
            hold.go_on.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            while len(outcomes) < 3:
                await asyncio.sleep(0)

    asyncio.run(ask())
    assert outcomes == ["cancelled"] * 3


@pytest.mark.parametrize(("start", "num_rows"), [(-ALIGNMENT, 1), (1, 1), (0, 0), (0, 5), (2 * PAGE, 3), (2**62, 1)])
def test_a_place_that_is_not_in_the_memory_is_refused(wide_bundle, start, num_rows):
    async def ask():
        async with pair(wide_bundle) as both:
            refused = asyncio.get_running_loop().create_future()
            both.remote.take = refused.set_result
            both.channel.send(encode(Submit(9, both.served.number, start, num_rows, None, written_options(options()))))
            return await refused

    refusal = asyncio.run(ask())
    assert (refusal.request, refusal.error.code) == (9, "malformed")


def test_a_model_that_is_not_there_any_more_is_refused(wide_bundle):
    async def ask():
        async with pair(wide_bundle) as both:
            name = both.served.manifest.inputs[0].name
            both.hub.models.clear()
            with pytest.raises(NotReady, match="unloaded"):
                await both.answer({name: rows(0, 1)["x"]}, options())

    asyncio.run(ask())

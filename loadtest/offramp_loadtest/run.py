"""A load test, from scenario to summary. Bounded in time and count: it stops by itself."""

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote

import numpy as np
import orjson

from offramp_loadtest.address import Address
from offramp_loadtest.arrivals import due_times_s, planned_seconds
from offramp_loadtest.client import OK, Arrival, OpenLoopClient, outcome_of
from offramp_loadtest.connections import Pool
from offramp_loadtest.difficulty import choose, with_scores
from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.metrics import Counts, between, num_inflight, parse
from offramp_loadtest.payloads import Payload, read_payloads
from offramp_loadtest.scenario import Scenario
from offramp_loadtest.summary import Intent, Record, Summary, summarise
from offramp_loadtest.targets import ClassifyTarget, OpenInferenceTarget, Request, Target, broken

PROGRESS_EVERY_S: Final = 0.2
SCRAPES: Final = 20
SCRAPE_EVERY_S: Final = 0.1
SCRAPE_TIMEOUT_S: Final = 5.0
RECENT: Final = 500

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadTest:
    """A load test that has run.

    Attributes:
        url: The server, without user names or passwords.
        scenario: What was done; its capacity is filled in where loads needed one.
        summary: The numbers.
        records: One per arrival, in the order of their outcomes.
        began_at: Seconds since the epoch.
        planned_s: How long requests were due.
    """

    url: str
    scenario: Scenario
    summary: Summary
    records: tuple[Record, ...]
    began_at: float
    planned_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        elapsed_s: Since the first request could be due.
        arrivals: Requests that will be due.
        num_done: Those whose outcome is known.
        num_ok: Those that were answered.
        p99_ms: Latency of the last few hundred answers; None before the first.
    """

    elapsed_s: float
    arrivals: int
    num_done: int
    num_ok: int
    p99_ms: float | None


def run(
    url: str,
    scenario: Scenario,
    payloads: Sequence[Payload] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> LoadTest:
    """Run a scenario against a server, open loop.

    Every arrival makes exactly one record, and latency counts from when a request was due. Where phases are written as
    loads, `scenario.capacity` must be known: see `measure_capacity`.

    Args:
        url: The server, such as `http://localhost:8000`.
        scenario: What to do.
        payloads: What to ask; None reads `scenario.data`.
        headers: Sent with each request, an API key for instance; they are in no record.
        on_progress: Called a few times a second.

    Returns:
        The records, and their summary. `write_report` makes a page of it.

    Raises:
        LoadTestError: If the scenario or the payloads cannot be used, or the server does not answer before the run
            begins.
    """
    asked = payloads_of(scenario, payloads)
    address = Address.of(url, headers or {})
    return in_loop(_run(address, _without_secrets(url), scenario, asked, on_progress))


def payloads_of(scenario: Scenario, payloads: Sequence[Payload] | None = None) -> Sequence[Payload]:
    """Give a scenario's payloads with their difficulties, or these with them.

    Raises:
        LoadTestError: If there are none, or a file cannot be read.
    """
    if payloads is None:
        if scenario.data is None:
            raise LoadTestError("data: name the labelled inputs to send")
        payloads = read_payloads(scenario.data)
    if not payloads:
        raise LoadTestError("data: holds no row")
    scores = scenario.difficulty.scores
    return payloads if scores is None else with_scores(payloads, scores)


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run in an event loop of its own: uvloop's where there is one, which leaves the server more of the cores."""
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        return runner.run(work)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _run(
    address: Address,
    url: str,
    scenario: Scenario,
    payloads: Sequence[Payload],
    on_progress: Callable[[Progress], None] | None,
) -> LoadTest:
    due_s = due_times_s(scenario)
    planned_s = planned_seconds(scenario, due_s)
    pool = Pool(address, scenario.connections)
    try:
        target = await find_target(pool, url, scenario)
        arrivals = plan_arrivals(scenario, payloads, target=target, address=address, due_s=due_s, planned_s=planned_s)
        await warm_up(pool, url, scenario, [target.encode(payload) for payload in payloads[: scenario.warm_up]])
        before, began_at = await _scrape(pool), time.time()
        records: list[Record] = []
        client = OpenLoopClient(pool, target, scenario.timeout_s, records.append)
        watching = asyncio.create_task(_watch(records, len(arrivals), on_progress))
        try:
            await client.send_all(arrivals)
        finally:
            watching.cancel()
        server = None if before is None else between(before, await _settled(pool), scenario.model)
    finally:
        await pool.close()
    summary = summarise(
        records, planned_s, scenario.deadline_ms, scenario.seed, server=server, capacity=scenario.capacity
    )
    return LoadTest(url, scenario, summary, tuple(records), began_at, planned_s)


def plan_arrivals(
    scenario: Scenario,
    payloads: Sequence[Payload],
    *,
    target: Target,
    address: Address,
    due_s: np.ndarray,
    planned_s: float,
) -> list[Arrival]:
    """Decide everything about every request before the first is due; encode each payload once."""
    chosen = choose(payloads, due_s, planned_s, scenario.difficulty, scenario.seed)
    encoded = {index: target.encode(payloads[index]) for index in set(chosen)}
    written = {index: address.written(request) for index, request in encoded.items()}
    bad = [address.written(request) for request in broken(encoded[chosen[0]])]
    rng = np.random.default_rng([scenario.seed, 2])
    disturbance, draws = scenario.disturbance, rng.random((2, len(due_s)))
    arrivals = []
    for number, (due, index) in enumerate(zip(due_s.tolist(), chosen, strict=True)):
        intent: Intent = "ask"
        if draws[0, number] < disturbance.disconnect_share:
            intent = "leave"
        elif draws[0, number] < disturbance.disconnect_share + disturbance.bad_share:
            intent = "bad"
        sent = bad[number % len(bad)] if intent == "bad" else written[index]
        leave_after_s = float(draws[1, number]) * disturbance.disconnect_within_ms / 1e3
        arrivals.append(Arrival(due, index, payloads[index].label, sent, intent, leave_after_s))
    return arrivals


async def find_target(pool: Pool, url: str, scenario: Scenario) -> Target:
    """Learn what is needed to ask a server.

    Raises:
        LoadTestError: If it does not describe the model.
    """
    if scenario.api == "v1":
        return ClassifyTarget(scenario.model, scenario.fields, scenario.body)
    if scenario.model is None:
        raise LoadTestError("model: name the model to ask over /v2")
    try:
        described = await pool.ask(Request(f"/v2/models/{quote(scenario.model)}", {}, b"", "GET"), scenario.timeout_s)
        (first, *_) = orjson.loads(described.body)["inputs"]
        name, datatype = str(first["name"]), str(first["datatype"])
    except (OSError, TimeoutError, ValueError, LookupError, TypeError):
        raise LoadTestError(f"url: {url} does not describe a model {scenario.model!r} under /v2/models") from None
    return OpenInferenceTarget(scenario.model, name, datatype, scenario.fields, scenario.body)


async def warm_up(pool: Pool, url: str, scenario: Scenario, requests: Sequence[Request]) -> None:
    """Send a few requests that do not count, and find out early that a server cannot be asked at all.

    Raises:
        LoadTestError: If it cannot.
    """
    for request in itertools.islice(itertools.cycle(requests), scenario.warm_up):
        try:
            response = await pool.ask(request, scenario.timeout_s)
        except TimeoutError:
            raise LoadTestError(f"url: {url} gives no answer within {scenario.timeout_s:g} s") from None
        except OSError as error:
            raise LoadTestError(f"url: {url} does not answer: {error}") from None
        if outcome_of("ask", response) == "error":
            said = f"{response.status} {response.body[:300].decode(errors='replace')}"
            raise LoadTestError(f"url: {url} does not answer what it is asked: {said}")


async def _scrape(pool: Pool) -> Counts | None:
    """Read `/metrics` if the server has it."""
    try:
        response = await pool.ask(Request("/metrics", {}, b"", "GET"), SCRAPE_TIMEOUT_S)
    except (OSError, TimeoutError):
        return None
    return parse(response.body.decode(errors="replace")) if response.status == OK else None


async def _settled(pool: Pool) -> Counts | None:
    """Read `/metrics` once the server has noticed every client that left, or a little later."""
    counts = await _scrape(pool)
    for _ in range(SCRAPES):
        if counts is None or not num_inflight(counts):
            break
        await asyncio.sleep(SCRAPE_EVERY_S)
        counts = await _scrape(pool)
    return counts


async def _watch(records: Sequence[Record], arrivals: int, on_progress: Callable[[Progress], None] | None) -> None:
    if on_progress is None:
        return
    started, num_seen, num_ok = time.perf_counter(), 0, 0
    while True:
        num_done = len(records)
        num_ok += sum(record.outcome == "ok" for record in records[num_seen:num_done])
        num_seen = num_done
        recent_ms = [record.latency_ms for record in records[-RECENT:] if record.outcome == "ok"]
        p99_ms = float(np.percentile(recent_ms, 99)) if recent_ms else None
        on_progress(Progress(time.perf_counter() - started, arrivals, num_done, num_ok, p99_ms))
        await asyncio.sleep(PROGRESS_EVERY_S)


def _without_secrets(url: str) -> str:
    scheme, found, rest = url.rstrip("/").partition("://")
    return f"{scheme}{found}{rest.rpartition('@')[2]}"

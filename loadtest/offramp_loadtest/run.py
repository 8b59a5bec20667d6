"""A load test, from plan to summary. Bounded in time and count: it stops by itself."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

import aiohttp
import numpy as np

from offramp_loadtest.arrivals import ArrivalKind, due_times_s
from offramp_loadtest.client import OpenLoopClient, Prepared
from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.payloads import Payload
from offramp_loadtest.summary import Record, Summary, summarise
from offramp_loadtest.targets import Api, ClassifyTarget, OpenInferenceTarget, Target

MAX_ARRIVALS = 1_000_000
MAX_SECONDS = 24 * 3600.0
PROGRESS_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything that a load test does.

    Attributes:
        url: The server, such as `http://localhost:8000`.
        rate: Requests per second, on average.
        seconds: How long requests are due.
        model: The model's name; None asks the server's default (`v1`) or only model (`v2`).
        api: `v1` is Offramp's classification, `v2` the Open Inference Protocol.
        fields: Routing fields of each request, such as `policy`, `threshold`, `latency_ms`.
        arrivals: `poisson` or `fixed`.
        slo_ms: The time within which an answer counts as on time; None takes `latency_ms` from the fields, if given.
        warm_up: Requests sent one after another before the run; not counted.
        max_inflight: Most requests in flight; what is due beyond that waits, and the wait counts.
        timeout_s: After this long without an answer a request counts as timed out.
        headers: Sent with each request, an API key for instance.
        seed: Of arrivals and order of payloads.
    """

    url: str
    rate: float
    seconds: float
    model: str | None = None
    api: Api = "v1"
    fields: Mapping[str, str] = field(default_factory=dict)
    arrivals: ArrivalKind = "poisson"
    slo_ms: float | None = None
    warm_up: int = 5
    max_inflight: int = 256
    timeout_s: float = 30.0
    headers: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not 0 < self.rate * self.seconds <= MAX_ARRIVALS or not 0 < self.seconds <= MAX_SECONDS:
            raise LoadTestError(
                f"rate, seconds: must be above 0, at most {MAX_ARRIVALS} requests in {MAX_SECONDS:g} s together"
            )
        if not 0 < self.timeout_s <= MAX_SECONDS or self.max_inflight < 1 or self.warm_up < 0:
            raise LoadTestError("timeout_s must be above 0, max_inflight at least 1, warm_up not negative")
        if self.deadline_ms is not None and not self.deadline_ms > 0:
            raise LoadTestError("slo_ms, latency_ms: must be above 0")
        if any(character in text for pair in self.headers.items() for text in pair for character in "\r\n\0"):
            raise LoadTestError("headers: must be of one line each")

    @property
    def deadline_ms(self) -> float | None:
        """The time within which an answer counts as on time."""
        if self.slo_ms is not None:
            return self.slo_ms
        try:
            return float(self.fields["latency_ms"]) if "latency_ms" in self.fields else None
        except ValueError:
            raise LoadTestError(f"latency_ms: must be a number; got {self.fields['latency_ms']!r}") from None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no port
        is_usable = False
    if not is_usable:
        raise LoadTestError(f"url: must be http://host:port or https://host:port; got {url!r}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    elapsed_s: float
    num_done: int
    num_ok: int


def run(plan: LoadPlan, payloads: Sequence[Payload], on_progress: Callable[[Progress], None] | None = None) -> Summary:
    """Run a load test.

    Args:
        plan: What to do.
        payloads: What to ask; at least one.
        on_progress: Called a few times a second.

    Raises:
        LoadTestError: If the payloads cannot be sent, or the server does not answer before the run begins.
    """
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        return runner.run(_run(plan, payloads, on_progress))


async def _run(plan: LoadPlan, payloads: Sequence[Payload], on_progress: Callable[[Progress], None] | None) -> Summary:
    if not payloads:
        raise LoadTestError("data: holds no row")
    async with _session(plan) as session:
        target = await _target(plan, session)
        prepared = [Prepared(payload, target.encode(payload)) for payload in payloads]
        client = OpenLoopClient(session, plan.url, target, max_inflight=plan.max_inflight, timeout_s=plan.timeout_s)
        await _warm_up(client, prepared, plan)
        records: list[Record] = []
        order = np.random.default_rng(plan.seed).permutation(len(prepared)).tolist()
        due = due_times_s(plan.arrivals, plan.rate, plan.seconds, plan.seed)
        watching = asyncio.create_task(_watch(records, on_progress))
        try:
            await client.send_all(due, prepared, order, records.append)
        finally:
            watching.cancel()
    return summarise(records, plan.seconds, plan.deadline_ms, plan.seed)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """Give uvloop's loop where there is one: its timers are finer, and its work costs the server's cores less."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _session(plan: LoadPlan) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=dict(plan.headers),
    )


async def _target(plan: LoadPlan, session: aiohttp.ClientSession) -> Target:
    if plan.api == "v1":
        return ClassifyTarget(plan.model, plan.fields)
    if plan.model is None:
        raise LoadTestError("model: name the model to ask over /v2")
    try:
        async with asyncio.timeout(plan.timeout_s):
            async with session.get(f"{plan.url.rstrip('/')}/v2/models/{quote(plan.model)}") as response:
                metadata = await response.json(content_type=None)
        (first, *_) = metadata["inputs"]
        return OpenInferenceTarget(plan.model, str(first["name"]), str(first["datatype"]), plan.fields)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError):
        raise LoadTestError(f"url: {plan.url} does not describe a model {plan.model!r} under /v2/models") from None


async def _warm_up(client: OpenLoopClient, prepared: Sequence[Prepared], plan: LoadPlan) -> None:
    """Send a few requests that do not count, and find out early that a server cannot be asked at all."""
    try:
        for number in range(plan.warm_up):
            async with asyncio.timeout(plan.timeout_s):
                exchange = await client.ask(prepared[number % len(prepared)].request)
            if exchange.outcome != "error":
                continue
            raise LoadTestError(f"url: {plan.url} does not answer what it is asked: {exchange.said}")
    except TimeoutError:
        raise LoadTestError(f"url: {plan.url} gives no answer within {plan.timeout_s:g} s") from None


async def _watch(records: Sequence[Record], on_progress: Callable[[Progress], None] | None) -> None:
    if on_progress is None:
        return
    started = asyncio.get_running_loop().time()
    while True:
        elapsed_s = asyncio.get_running_loop().time() - started
        on_progress(Progress(elapsed_s, len(records), sum(record.outcome == "ok" for record in records)))
        await asyncio.sleep(PROGRESS_EVERY_S)

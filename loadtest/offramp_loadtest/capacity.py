"""What a server can do at full depth: the unit that loads are shares of."""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import orjson

from offramp_loadtest.address import Address
from offramp_loadtest.client import OK
from offramp_loadtest.connections import Pool
from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.payloads import Payload
from offramp_loadtest.run import find_target, in_loop, payloads_of, warm_up
from offramp_loadtest.scenario import Scenario
from offramp_loadtest.targets import Request

MAX_PAYLOADS: Final = 1000
ROUTING: Final = (
    "policy",
    "threshold",
    "patience",
    "latency_ms",
    "compute",
    "accuracy",
    "risk",
    "max_exit",
    "min_exit",
)


def measure_capacity(
    url: str,
    scenario: Scenario,
    payloads: Sequence[Payload] | None = None,
    *,
    fields: Mapping[str, Any] | None = None,
    seconds: float = 5.0,
    clients: int = 32,
    headers: Mapping[str, str] | None = None,
) -> float:
    """Measure the requests per second that a server answers when so many clients always want one: its capacity μ.

    The same path as the scenario's: API, body and inputs. A fifth of the time passes before counting begins.

    Args:
        url: The server.
        scenario: Says what to ask and how.
        payloads: What to ask; None reads `scenario.data`.
        fields: Routing fields that make the server run at full depth; None finds them out: the deepest exit of a model
            that `/v1` describes, and none for other servers.
        seconds: How long to count.
        clients: Requests always in flight.
        headers: Sent with each request.

    Raises:
        LoadTestError: If the server does not answer all of them.
    """
    asked = payloads_of(scenario, payloads)[:MAX_PAYLOADS]
    return in_loop(
        _measure(Address.of(url, headers or {}), url, scenario, asked, fields=fields, seconds=seconds, clients=clients)
    )


async def _measure(
    address: Address,
    url: str,
    scenario: Scenario,
    payloads: Sequence[Payload],
    *,
    fields: Mapping[str, Any] | None,
    seconds: float,
    clients: int,
) -> float:
    pool = Pool(address, clients)
    try:
        deepest = await _full_depth(pool, scenario) if fields is None else fields
        others = {name: value for name, value in scenario.fields.items() if name not in ROUTING}
        asking = scenario.model_copy(update={"fields": {**others, **deepest}})
        target = await find_target(pool, url, asking)
        requests = [target.encode(payload) for payload in payloads]
        await warm_up(pool, url, asking, requests[: asking.warm_up])
        return await _count(pool, requests, seconds, clients, asking.timeout_s)
    finally:
        await pool.close()


async def _count(pool: Pool, requests: Sequence[Request], seconds: float, clients: int, timeout_s: float) -> float:
    turn = itertools.cycle(requests)
    counts_from = time.perf_counter() + seconds / 5
    ends_at = counts_from + seconds
    num_counted = 0

    async def ask_on() -> None:
        nonlocal num_counted
        while time.perf_counter() < ends_at:
            response = await pool.ask(next(turn), timeout_s)
            if response.status != OK:
                raise LoadTestError(f"capacity: the server answers {response.status} with {clients} requests in flight")
            num_counted += counts_from <= time.perf_counter() < ends_at

    try:
        await asyncio.gather(*(ask_on() for _ in range(clients)))
    except (OSError, TimeoutError) as error:
        raise LoadTestError(f"capacity: no answer with {clients} requests in flight: {error}") from None
    if not num_counted:
        raise LoadTestError(f"capacity: the server answers nothing within {seconds:g} s")
    return num_counted / seconds


async def _full_depth(pool: Pool, scenario: Scenario) -> Mapping[str, Any]:
    """Give the fields that send every row to the last exit, for a server that has exits to choose from."""
    path = "/v1/models" if scenario.model is None else f"/v1/models/{quote(scenario.model)}"
    try:
        response = await pool.ask(Request(path, {}, b"", "GET"), scenario.timeout_s)
        exits = orjson.loads(response.body)["exits"] if response.status == OK else None
    except (OSError, TimeoutError, ValueError, LookupError, TypeError):
        return {}
    return {"policy": {"kind": "fixed", "exit": len(exits) - 1}} if exits else {}

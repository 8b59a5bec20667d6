"""`offramp loadtest`: open-loop load on a server, and what came of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from offramp_cli.console import progress, stdout
from offramp_cli.errors import CommandError

if TYPE_CHECKING:
    from offramp_loadtest import LoadTest, Payload, Scenario

DEFAULT_RATE, DEFAULT_SECONDS = 100.0, 10.0


def loadtest(
    url: Annotated[str, typer.Argument(help="The server, such as http://localhost:8000.")],
    *,
    scenario: Annotated[
        Path | None, typer.Option(help="A TOML file that says what to do; the flags below change it.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="An .npz with inputs and labels, an .npy, or a folder of images, a folder per class."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second, on average; unset: 100.")] = None,
    load: Annotated[
        float | None, typer.Option(help="Instead of a rate: a share of the capacity at full depth; 2 is twice it.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="How long requests are due; unset: 10.")] = None,
    capacity: Annotated[
        float | None, typer.Option(help="Requests per second at full depth; unset: measured first if loads need it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name; unset: the server's default.")] = None,
    api: Annotated[
        Literal["v1", "v2"] | None, typer.Option(help="v1: Offramp's; v2: the Open Inference Protocol; unset: v1.")
    ] = None,
    body: Annotated[Literal["binary", "json"] | None, typer.Option(help="How inputs are sent; unset: binary.")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="A routing field of every request, such as policy=confidence or latency_ms=20; repeatable."),
    ] = None,
    arrivals: Annotated[
        Literal["poisson", "gamma", "fixed"] | None,
        typer.Option(help="How requests are spaced; gamma comes in bursts; unset: poisson."),
    ] = None,
    slo_ms: Annotated[
        float | None, typer.Option(help="An answer within this time is on time; unset: the latency_ms field.")
    ] = None,
    warm_up: Annotated[int | None, typer.Option(help="Requests sent before the run; not counted; unset: 5.")] = None,
    connections: Annotated[
        int | None, typer.Option(help="What is due beyond so many in flight waits, and the wait counts; unset: 256.")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option(help="A request without an answer after this has timed out; unset: 30.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="Sent with every request: 'authorization: Bearer KEY'; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of arrivals and order of the data; unset: 0.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for report.html, summary.json and raw.jsonl, a line per request.")
    ] = None,
) -> None:
    """Send requests when they are due, whether or not earlier ones have been answered, and report what came of them.

    Latency counts from when a request was due. Rejects and failures count as misses.
    """
    from offramp_loadtest import LoadTestError, read_scenario, render, scenario_of

    if out is not None:
        from offramp_loadtest.write import write_report  # a missing library is better known before the run
    flags = {
        "data": data, "capacity": capacity, "model": model, "api": api, "body": body, "slo_ms": slo_ms,
        "warm_up": warm_up, "connections": connections, "timeout_s": timeout_s, "seed": seed,
    }  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if arrivals is not None:
        changes["arrivals"] = {"kind": arrivals}
    try:
        base = None if scenario is None else read_scenario(scenario)
        fields = {name: _value(text) for name, text in _pairs(field or [], "=", "--field").items()}
        changes["fields"] = fields if base is None else {**base.fields, **fields}
        phases = _phases(base, rate, load, seconds)
        changes |= {} if phases is None else {"phases": phases}
        plan = scenario_of(changes) if base is None else base.changed(**changes)
        test = _run(url, plan, _pairs(header or [], ":", "--header"))
    except LoadTestError as error:
        raise CommandError(str(error)) from None
    stdout.print(render(test.summary))
    if out is not None:
        stdout.print(f"report: {write_report(test, out)}", soft_wrap=True, highlight=False)


def _phases(
    base: "Scenario | None", rate: float | None, load: float | None, seconds: float | None
) -> list[dict[str, Any]] | None:
    """Give the one phase that flags describe; None leaves the scenario its own."""
    if rate is not None and load is not None:
        raise CommandError("--rate, --load: give one of them")
    if base is not None and rate is load is seconds is None:
        return None
    if base is not None and len(base.phases) != 1:
        raise CommandError("--rate, --load, --seconds: change scenarios of one phase only")
    first: dict[str, Any] = {} if base is None else base.phases[0].model_dump(exclude_none=True)
    if rate is not None or load is not None:
        level = {"rate": rate} if rate is not None else {"load": load}
        first = {"seconds": first.get("seconds", DEFAULT_SECONDS)} | level
    elif base is None:
        first = {"seconds": DEFAULT_SECONDS, "rate": DEFAULT_RATE}
    return [first if seconds is None else first | {"seconds": seconds}]


def _run(url: str, plan: "Scenario", headers: Mapping[str, str]) -> "LoadTest":
    from offramp_loadtest import Progress, run
    from offramp_loadtest.run import payloads_of

    payloads = payloads_of(plan)
    with progress() as display:
        if plan.needs_capacity:
            plan = _with_capacity(url, plan, payloads, headers, display)
        task = display.add_task("sending", total=None, note="")

        def show(done: Progress) -> None:
            tail = "" if done.p99_ms is None else f", 99 % of the last within {done.p99_ms:.1f} ms"
            note = f"{done.num_ok} answered{tail}"
            display.update(task, completed=done.num_done, total=done.arrivals, note=note)

        test = run(url, plan, payloads, headers=headers, on_progress=show)
        arrivals, num_ok = test.summary.arrivals, test.summary.outcomes["ok"]
        display.update(task, completed=arrivals, total=arrivals, note=f"{num_ok} answered")
    return test


def _with_capacity(
    url: str, plan: "Scenario", payloads: "Sequence[Payload]", headers: Mapping[str, str], display: Any
) -> "Scenario":
    from offramp_loadtest import measure_capacity

    task = display.add_task("capacity at full depth", total=1, note="")
    capacity = measure_capacity(url, plan, payloads, headers=headers)
    display.update(task, completed=1, note=f"{capacity:.1f}/s")
    return plan.changed(capacity=capacity)


def _value(text: str) -> Any:
    """Read a field's value: a number, a truth or an object where it is one, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _pairs(written: Sequence[str], separator: str, flag: str) -> dict[str, str]:
    pairs = {}
    for text in written:
        name, found, value = text.partition(separator)
        if not found or not name.strip():
            raise CommandError(f"{flag} {text!r}: write NAME{separator}VALUE")
        pairs[name.strip()] = value.strip()
    return pairs

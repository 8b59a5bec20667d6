"""`offramp loadtest`: open-loop load on a server, and what came of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from offramp_cli.console import progress, stdout
from offramp_cli.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offramp_loadtest import LoadPlan, Payload, Summary


def loadtest(
    url: Annotated[str, typer.Argument(help="The server, such as http://localhost:8000.")],
    *,
    data: Annotated[
        Path, typer.Option(help="An .npz with inputs and labels, an .npy, or a folder of images, a folder per class.")
    ],
    rate: Annotated[float, typer.Option(help="Requests per second, on average.")] = 100.0,
    seconds: Annotated[float, typer.Option(help="How long requests are due.")] = 10.0,
    model: Annotated[str | None, typer.Option(help="The model's name; unset: the server's default.")] = None,
    api: Annotated[Literal["v1", "v2"], typer.Option(help="v1: Offramp's; v2: the Open Inference Protocol.")] = "v1",
    field: Annotated[
        list[str] | None,
        typer.Option(help="A routing field of every request, such as policy=confidence or latency_ms=20; repeatable."),
    ] = None,
    arrivals: Annotated[Literal["poisson", "fixed"], typer.Option(help="How requests are spaced.")] = "poisson",
    slo_ms: Annotated[
        float | None, typer.Option(help="An answer within this time is on time; unset: the latency_ms field.")
    ] = None,
    warm_up: Annotated[int, typer.Option(help="Requests sent before the run; not counted.")] = 5,
    max_inflight: Annotated[int, typer.Option(help="What is due beyond this waits, and the wait counts.")] = 256,
    timeout_s: Annotated[float, typer.Option(help="A request without an answer after this has timed out.")] = 30.0,
    header: Annotated[
        list[str] | None, typer.Option(help="Sent with every request: 'authorization: Bearer KEY'; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and order of the data.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write every number here, as JSON.")] = None,
) -> None:
    """Send requests when they are due, whether or not earlier ones have been answered, and report what came of them.

    Latency counts from when a request was due. Rejects and failures count as misses.
    """
    from offramp_loadtest import LoadPlan, LoadTestError, read_payloads, render

    try:
        plan = LoadPlan(
            url, rate, seconds, model, api, _pairs(field or [], "=", "--field"), arrivals, slo_ms, warm_up,
            max_inflight, timeout_s, _pairs(header or [], ":", "--header"), seed,
        )  # fmt: skip
        summary = _run(plan, read_payloads(data))
    except LoadTestError as error:
        raise CommandError(str(error)) from None
    stdout.print(render(summary))
    if out is not None:
        out.write_text(json.dumps(summary.to_json(), indent=1) + "\n")


def _run(plan: "LoadPlan", payloads: "Sequence[Payload]") -> "Summary":
    from offramp_loadtest import Progress, run

    with progress() as display:
        task = display.add_task("sending", total=round(plan.rate * plan.seconds), note="")

        def show(done: Progress) -> None:
            display.update(task, completed=done.num_done, note=f"{done.num_ok} answered")

        summary = run(plan, payloads, show)
        num_ok = summary.outcomes.get("ok", 0)
        display.update(task, completed=summary.arrivals, total=summary.arrivals, note=f"{num_ok} answered")
    return summary


def _pairs(written: "Sequence[str]", separator: str, flag: str) -> dict[str, str]:
    pairs = {}
    for text in written:
        name, found, value = text.partition(separator)
        if not found or not name.strip():
            raise CommandError(f"{flag} {text!r}: write NAME{separator}VALUE")
        pairs[name.strip()] = value.strip()
    return pairs

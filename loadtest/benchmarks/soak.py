"""Does a server that runs for long stay as it was? Memory, one answer each, and counts that add up.

    python loadtest/benchmarks/soak.py bundles/digits --data digits --minutes 30 --out soak.json

Serves a bundle with `offramp serve` and sends it requests, open loop, at 0.9 of what full depth can do; some clients
leave before they have their answer, and some requests no server should accept. The load comes in stretches of a minute
or less: after each, nothing may be in flight, and the server's `/metrics` must have counted what the client has seen.
The server's resident memory is sampled all the while. Prints a table of verdicts and ends with status 1 if one is bad.
"""

import json
import math
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from goodput_configurations import EARLY_EXIT, configurations_of, decide, full_depth_fields
from offramp_cli.figure import machine
from offramp_cli.labelled_data import open_data
from offramp_cli.server_process import server_process
from offramp_loadtest import Disturbance, Payload, Phase, Scenario, measure_capacity, payloads_of_arrays, run
from offramp_runtime import Bundle, open_bundle
from rich.console import Console
from rich.table import Table
from scraped import Scraped, grown
from soak_verdicts import Counted, Memory, Verdict, verdicts_of

STRETCH_S = 60.0
SAMPLE_EVERY_S = 1.0
SETTLE_S = 5.0
CAPACITY_S = 2.0
LATENCY_IN_ROWS = 20
MAX_INPUTS = 2000

console = Console(width=140)


class MemoryWatch(threading.Thread):
    """Samples a server's resident memory until it is told to stop."""

    def __init__(self, url: str) -> None:
        super().__init__(name="memory", daemon=True)
        self._url = url
        self._stopped = threading.Event()
        self._started_s = time.monotonic()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        """Take a sample a second: seconds since the start, and bytes."""
        while not self._stopped.wait(SAMPLE_EVERY_S):
            with suppress(httpx.HTTPError):  # a busy machine may be late with one of many
                self._look()

    def stop(self) -> None:
        """Take one more sample, the last: what is said of memory holds to the end."""
        self._stopped.set()
        self.join()
        self._look()

    def _look(self) -> None:
        resident_bytes = Scraped.of(self._url).total("process_resident_memory_bytes")
        self.samples.append((time.monotonic() - self._started_s, resident_bytes))


def soak(url: str, scenario: Scenario, payloads: list[Payload], seconds: float) -> tuple[Counted, Memory]:
    """Load a server in stretches; gives both sides' counts and the server's memory."""
    before = Scraped.of(url)
    client: Counter[str] = Counter()
    watch = MemoryWatch(url)
    watch.start()
    stretches = math.ceil(seconds / STRETCH_S)
    for seed in range(stretches):
        (phase,) = scenario.phases
        stretch = scenario.model_copy(
            update={"seed": seed, "phases": (phase.model_copy(update={"seconds": seconds / stretches}),)}
        )
        client.update(run(url, stretch, payloads).summary.outcomes)
        console.print(f"{seed + 1}/{stretches}: {client.total():,} requests", highlight=False)
    watch.stop()
    after = _settled(url)
    outcomes = grown(before.by("outcome", "offramp_requests_total"), after.by("outcome", "offramp_requests_total"))
    rows = after.total("offramp_samples_total") - before.total("offramp_samples_total")
    warm_up = stretches * scenario.warm_up
    counted = Counted(
        dict(client), {name: round(count) for name, count in outcomes.items()}, round(rows), warm_up,
        round(after.total("offramp_inflight_samples")),
    )  # fmt: skip
    return counted, Memory(tuple(watch.samples))


def _settled(url: str) -> Scraped:
    """Wait, but not long, until nothing is in flight."""
    give_up = time.monotonic() + SETTLE_S
    scraped = Scraped.of(url)
    while scraped.total("offramp_inflight_samples") and time.monotonic() < give_up:
        time.sleep(0.1)
        scraped = Scraped.of(url)
    return scraped


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder; calibrated, it is served with gears.")],
    *,
    data: Annotated[str, typer.Option(help="Labelled test data, as for `offramp evaluate`.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where named data sets lie.")] = None,
    minutes: Annotated[float, typer.Option(min=0.05, help="How long.")] = 30.0,
    rho: Annotated[float, typer.Option(min=0.01, help="Load, as a share of full depth's capacity.")] = 0.9,
    leave_share: Annotated[float, typer.Option(min=0, max=1, help="Share of clients that leave early.")] = 0.05,
    bad_share: Annotated[float, typer.Option(min=0, max=1, help="Share of bad requests.")] = 0.05,
    threads: Annotated[int, typer.Option(min=1, help="Threads behind a stage.")] = 1,
    serve: Annotated[str, typer.Option(help="More flags of the server.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write counts, memory and verdicts to this JSON file.")] = None,
) -> None:
    """Soak a server."""
    opened = open_bundle(bundle)
    inputs = _inputs(opened, data, data_dir)
    flags = ("--device", "cpu", "--threads", str(threads), *_flags(opened), *serve.split())
    with tempfile.TemporaryDirectory() as scratch, server_process(bundle, Path(scratch) / "log", flags) as url:
        asking = Scenario(model=opened.manifest.name, phases=(Phase(seconds=1, rate=1),))
        full = full_depth_fields(opened)
        capacity = measure_capacity(url, asking, inputs, fields=full, seconds=CAPACITY_S)
        scenario = Scenario(
            name="soak",
            model=opened.manifest.name,
            fields={"latency_ms": max(round(LATENCY_IN_ROWS * 1e3 / capacity, 1), 20.0)},
            phases=(Phase(seconds=1, rate=rho * capacity),),
            disturbance=Disturbance(disconnect_share=leave_share, bad_share=bad_share),
        )
        counted, memory = soak(url, scenario, inputs, minutes * 60)
    verdicts = verdicts_of(counted, memory)
    console.print(_table(verdicts))
    if out is not None:
        asked = {"minutes": minutes, "rho": rho, "leave_share": leave_share, "bad_share": bad_share, "flags": flags}
        out.write_text(json.dumps(_written(opened, asked, capacity, counted, memory, verdicts), indent=1) + "\n")
    sys.exit(0 if all(verdict.is_good for verdict in verdicts) else 1)


def _flags(bundle: Bundle) -> tuple[str, ...]:
    """Give the flags of early exit with everything on, if the bundle is calibrated."""
    if not bundle.calibration.operating_points:
        return ()
    compared = configurations_of(bundle, decide(bundle, None, None))
    return next(one.flags for one in compared if one.name == EARLY_EXIT)


def _inputs(bundle: Bundle, data: str, data_dir: Path | None) -> list[Payload]:
    labelled = open_data(data, bundle, "test", data_dir).data
    (array,) = next(iter(labelled.batches(MAX_INPUTS))).values()
    return list(payloads_of_arrays(array, labelled.label_N[: len(array)]))


def _table(verdicts: list[Verdict]) -> Table:
    table = Table("", "what must hold", "what was found", box=None, pad_edge=False)
    for verdict in verdicts:
        table.add_row("[green]✓[/]" if verdict.is_good else "[red]✗[/]", verdict.claim, verdict.found)
    return table


def _written(
    bundle: Bundle,
    asked: dict[str, Any],
    capacity: float,
    *what: Any,
) -> dict[str, Any]:
    counted, memory, verdicts = what
    return {
        "model": bundle.manifest.name,
        "model_digest": bundle.manifest.model_digest,
        "machine": f"{machine()} ({platform.machine()})",
        "settings": asked,
        "capacity": capacity,
        "counted": asdict(counted),
        "memory_bytes": memory.samples,
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }


if __name__ == "__main__":
    typer.run(main)

"""Correct goodput under load: how many answers a second are on time and right, against the load that is offered.

    python loadtest/benchmarks/goodput.py bundles/msdnet-cifar100 --data cifar100 --out docs/benchmarks/goodput

Takes a calibrated bundle and its labelled test data. Every configuration (full depth, the same exit for all, early exit
with everything on, the same less one thing at a time, the deepest exit that fits, the oracle) is served by an
`offramp serve` of its own and gets the same requests, open loop, at loads that are shares of the rows per second which
full depth can do through the same path. The inputs' difficulty drifts while a run lasts. Writes one JSON with every
run; `goodput_report.py` makes the page of it. Nothing is asserted.

How long it takes: about (seconds + 1) for each of configurations x loads x passes, and six seconds a configuration to
start: 15 minutes for a multi-exit network at 3 passes of 3 seconds, 10 for a gated one.
"""

import json
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from goodput_configurations import (
    EARLY_EXIT,
    FULL_DEPTH,
    Configuration,
    Operation,
    configurations_of,
    decide,
    full_depth_fields,
    only,
)
from goodput_data import open_test_set
from goodput_gain import Gain, measure_gain
from goodput_runs import Load, Point, measure, served, written
from offramp_cli.figure import machine
from offramp_loadtest import measure_capacity, scenario_of
from offramp_runtime import Bundle, open_bundle
from rich.console import Console
from rich.table import Table

RHOS = "0.4,0.8,0.95,1.3,2"
SLO_IN_ROWS = 20
"""A latency budget of so many times what full depth takes a row under load."""
PACKAGES = ("offramp", "onnxruntime", "numpy", "uvicorn")

console = Console(width=160)


def main(
    bundle: Annotated[Path, typer.Argument(help="A calibrated bundle's folder.")],
    *,
    data: Annotated[str, typer.Option(help="Labelled test data, as for `offramp evaluate`.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where named data sets lie.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Keep the recorded test set here, and use it if it is.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the JSON, named after the bundle.")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of load in each run.")] = 3.0,
    passes: Annotated[int, typer.Option(min=1, help="How often everything is run.")] = 3,
    rhos: Annotated[str, typer.Option(help="Loads, as shares of full depth's capacity.")] = RHOS,
    slo_ms: Annotated[float | None, typer.Option(help="Latency budget; unset: twenty rows at full depth.")] = None,
    point: Annotated[str | None, typer.Option(help="Default operating point; unset: half a point below full.")] = None,
    floor: Annotated[float | None, typer.Option(help="Gear floor; unset: five points below the best.")] = None,
    only_names: Annotated[list[str] | None, typer.Option("--only", help="Only configurations named so.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads behind a stage.")] = 1,
    runners: Annotated[int, typer.Option(min=1, help="Stages side by side.")] = 1,
    logs: Annotated[Path | None, typer.Option(help="Keep the servers' logs in this folder.")] = None,
    api: Annotated[str, typer.Option(help="v2, the Open Inference Protocol with binary tensors, or v1.")] = "v2",
    serve: Annotated[str, typer.Option(help="More flags of every server, such as '--http-workers 1'.")] = "",
    gain_rounds: Annotated[int, typer.Option(min=0, help="Pairs of turns that measure the realised gain.")] = 3,
) -> None:
    """Measure correct goodput against load."""
    opened = open_bundle(bundle)
    operation = decide(opened, point, floor)
    configurations = only(configurations_of(opened, operation), only_names or [])
    inputs = open_test_set(opened, data, data_dir, trace, threads)
    flags = (*_flags(threads, runners), *shlex.split(serve))
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as scratch, served(bundle, configurations, flags, logs or Path(scratch)) as urls:
        asking = scenario_of({"model": opened.manifest.name, "api": api, "phases": ({"seconds": 1, "rate": 1},)})
        full = full_depth_fields(opened)
        url = urls.get(FULL_DEPTH) or next(iter(urls.values()))
        rates = [measure_capacity(url, asking, inputs.payloads, fields=full, seconds=seconds) for _ in range(passes)]
        capacity = float(np.median(rates))
        budget_ms = slo_ms or round(SLO_IN_ROWS * 1e3 / capacity, 1)
        console.print(_heading(opened, operation, capacity, budget_ms), highlight=False)
        load = Load(asking, capacity, budget_ms, seconds)
        loads = [float(rho) for rho in rhos.split(",")]
        points = measure(urls, configurations, load, inputs, rhos=loads, passes=passes)
        early = {"operating_point": operation.point.name}
        gains = measure_gain(url, asking, inputs, full, early, seconds=seconds, rounds=gain_rounds)
    console.print(_table(points, configurations))
    console.print(_told(gains), highlight=False)
    if out is not None:
        settings = {"seconds": seconds, "passes": passes, "threads": threads, "runners": runners, "api": api}
        about = _about(opened, operation, configurations, flags) | {
            "data": inputs.remark,
            "data_digest": inputs.digest,
            "capacity": capacity,
            "slo_ms": budget_ms,
            "began": began.isoformat(timespec="seconds"),
            "minutes": round((datetime.now(UTC) - began).total_seconds() / 60, 1),
        }
        document = about | {"settings": settings, "points": [written(p) for p in points]}
        document["gains"] = [asdict(gain) | {"share": gain.share} for gain in gains]
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{opened.manifest.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"every run: {path}", highlight=False)


def _flags(threads: int, runners: int) -> tuple[str, ...]:
    """Give what all servers are started with."""
    return ("--device", "cpu", "--threads", str(threads), "--runners", str(runners), "--repository-poll-s", "0")


def _heading(bundle: Bundle, operation: Operation, capacity: float, slo_ms: float) -> str:
    point = operation.point
    return (
        f"{bundle.manifest.name}: full depth does {capacity:.1f} rows/s; budget {slo_ms:g} ms; operating point "
        f"{point.name} ({point.compute:.0%} of the compute, accuracy {point.accuracy:.1%} against "
        f"{operation.full_accuracy:.1%}); floor {operation.floor:g}"
    )


def _table(points: list[Point], configurations: list[Configuration]) -> Table:
    rhos = sorted({point.rho for point in points})
    table = Table("correct goodput, 1/s; attainment", *(f"ρ = {rho:g}" for rho in rhos), box=None, pad_edge=False)
    for configuration in configurations:
        cells = []
        for rho in rhos:
            runs = [p for p in points if (p.configuration, p.rho) == (configuration.name, rho)]
            goodput, kept = (np.median([getattr(p, of) for p in runs]) for of in ("correct_goodput", "attainment"))
            cells.append(f"{goodput:6.1f}  {kept:4.0%}")
        table.add_row(configuration.name, *cells)
    return table


def _told(gains: list[Gain]) -> str:
    if not gains:
        return ""
    realised, predicted, share = (
        float(np.median([getattr(gain, of) for gain in gains])) for of in ("realised", "predicted", "share")
    )
    return f"gain in throughput: {realised:.2f}, of {predicted:.2f} that milliseconds predict ({share:.0%})"


def _about(
    bundle: Bundle, operation: Operation, configurations: list[Configuration], flags: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "model": bundle.manifest.name,
        "model_digest": bundle.manifest.model_digest,
        "calibration_digest": bundle.calibration.calibration_digest,
        "training": bundle.manifest.provenance.training,
        "is_gated": bool(bundle.manifest.gates),
        "point": {
            "name": operation.point.name,
            "compute": operation.point.compute,
            "accuracy": operation.point.accuracy,
        },
        "floor": operation.floor,
        "full_accuracy": operation.full_accuracy,
        "configurations": [
            {"name": one.name, "kind": one.kind, "flags": " ".join(one.flags), "fields": dict(one.fields)}
            for one in configurations
        ],
        "early": EARLY_EXIT,
        "full": FULL_DEPTH,
        "flags": " ".join(flags),
        "command": " ".join(["python", "loadtest/benchmarks/goodput.py", *sys.argv[1:]]),
        "machine": f"{machine()} ({platform.machine()})",
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    typer.run(main)

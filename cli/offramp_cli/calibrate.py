"""`offramp calibrate`: held-out data in, temperatures, operating points and certificates into the bundle."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Table

from offramp_cli.console import progress, stderr, stdout
from offramp_cli.data_flags import DATA_KINDS, AllowMissingClasses, BatchSize, DataDir, Device, Threads, TraceFile
from offramp_cli.errors import CommandError

if TYPE_CHECKING:
    from offramp_calibration.trace import Trace
    from offramp_contract.calibration import Calibration, OperatingPoint
    from offramp_contract.manifest import Manifest

Chosen = TypeVar("Chosen")

RISKS = (0.01, 0.02, 0.05)
DELTA = 0.05
"""The probability at which certificates are shown."""


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder; with --out also a .zip of one.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Labelled data that the network has not learnt from: {DATA_KINDS}, of which the calibration split is "
            "taken."
        ),
    ] = None,
    data_dir: DataDir = None,
    trace: TraceFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the calibrated bundle to this new folder; unset: into the bundle's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which samples fit and which certify.")] = 0,
    gate_steps: Annotated[
        int,
        typer.Option(
            min=3,
            max=64,
            help="For a network with gates: how many gate thresholds to run the data at, each in a pass of its own.",
        ),
    ] = 12,
    batch_size: BatchSize = 256,
    threads: Threads = None,
    device: Device = "auto",
    allow_missing_classes: AllowMissingClasses = False,
) -> None:
    """Run a bundle on held-out data and write into it what serves which budget, and with which guarantee.

    A server that watches the bundle takes its calibration up by itself.
    """
    from offramp_calibration.write import write_bundle, write_calibration
    from offramp_runtime import open_bundle

    from offramp_cli.labelled_data import open_data
    from offramp_cli.recording import Recording, traced

    _check_target(bundle, out)
    opened = open_bundle(bundle)
    labelled = None if data is None else open_data(data, opened, "calibration", data_dir)
    if labelled is not None and labelled.remark:
        stderr.print(labelled.remark, highlight=False, markup=False, soft_wrap=True)
    recording = Recording(trace, batch_size, device, threads, allow_missing_classes, gate_steps)
    with traced(opened, None if labelled is None else labelled.data, recording) as recorded:
        calibration = _calibrated(recorded, seed)
        path = write_calibration(calibration, bundle) if out is None else write_bundle(opened, calibration, out)
        report(calibration, recorded, opened.manifest)
    stdout.print(f"\ncalibration: {path}", highlight=False, markup=False, soft_wrap=True)


def _calibrated(trace: "Trace", seed: int) -> "Calibration":
    """Calibrate with a progress bar that names what is under way."""
    from offramp_calibration.calibrate import CalibrationSettings
    from offramp_calibration.calibrate import calibrate as calibrate_trace

    with progress() as display:
        task = display.add_task("calibrating", total=None, note="")

        def show(stage: str, done: int, total: int) -> None:
            display.update(task, completed=done, total=total, note=stage)

        calibration = calibrate_trace(trace, CalibrationSettings(seed=seed), show)
        display.update(task, note="")
    return calibration


def report(calibration: "Calibration", trace: "Trace", manifest: "Manifest") -> None:
    """Print what a calibration says: of the exits, of compute budgets, and what is certified."""
    stdout.print(_exits(calibration, trace, manifest))
    stdout.print()
    if trace.passes:
        stdout.print(_gates(calibration.operating_points, trace))
        stdout.print()
    stdout.print(_budgets(calibration.operating_points))
    stdout.print()
    stdout.print(_certified(calibration.operating_points))
    stdout.print(
        f"\n{len(calibration.operating_points)} operating points from {calibration.num_samples:,} samples, for model "
        f"{manifest.name} {manifest.model_digest[:12]}",
        highlight=False,
        soft_wrap=True,
    )


def _check_target(bundle: Path, out: Path | None) -> None:
    if out is None and not bundle.is_dir() and bundle.exists():
        raise CommandError(
            f"{bundle} is not a folder, and only a folder is calibrated in place; name a new one with --out"
        )
    if out is not None and out.exists():
        raise CommandError(f"{out} exists; name a new folder with --out")


def _exits(calibration: "Calibration", trace: "Trace", manifest: "Manifest") -> Table:
    table = _table("exit" if not manifest.gates else "exit, all gates open", "depth", "accuracy", "temperature")
    rows = zip(manifest.exits, manifest.exit_depths, trace.logits_ENC, calibration.temperatures, strict=True)
    for exit_, depth, logits_NC, temperature in rows:
        accuracy = float((logits_NC.argmax(axis=1) == trace.label_N).mean())
        table.add_row(exit_.name, f"{depth:.1%}", f"{accuracy:.1%}", f"{temperature:.3f}")
    return table


def _gates(points: Sequence["OperatingPoint"], trace: "Trace") -> Table:
    """Say what each gate threshold comes to at the final exit."""
    from offramp_contract.policy_spec import FixedSpec

    final = FixedSpec(exit=len(trace.logits_ENC) - 1)
    table = _table("gate threshold", "is served by", "average compute", "accuracy", "promised")
    for point in sorted(points, key=lambda point: -point.compute):
        if point.policy != final:
            continue
        shown = "own" if point.gate_threshold is None else f"{point.gate_threshold:.4g}"
        risk = point.certificate("consistency", DELTA)
        promised = "-" if risk is None else f"differs in ≤ {risk.bound:.1%}"
        table.add_row(shown, point.name, *_shares(point), promised)
    return table


def _budgets(points: Sequence["OperatingPoint"]) -> Table:
    """Say what serves each compute budget."""
    from offramp_calibration.measured import BUDGETS
    from offramp_contract.budgets import within_compute

    table = _table("compute", "is served by", "average compute", "accuracy", "exits, %")
    for budget in BUDGETS:
        point = _chosen(partial(within_compute, points, budget))
        if point is None:
            table.add_row(f"{budget:g}", "-", "-", "-", "-")
            continue
        rates = "/".join(f"{100 * rate:.0f}" for rate in point.exit_rates)
        table.add_row(f"{budget:g}", point.name, *_shares(point), rates)
    return table


def _certified(points: Sequence["OperatingPoint"]) -> Table:
    """Say what the certified budgets that people ask for most cost, and how far the certificates go."""
    from offramp_contract.budgets import certified_accuracy, certified_risk

    table = _table(f"certified at delta {DELTA:g}", "is served by", "average compute", "accuracy", "promised")
    for risk in RISKS:
        promise = _chosen(partial(certified_risk, points, risk, DELTA))
        asked = f"risk {risk:g}"
        if promise is None:
            table.add_row(asked, "- (more data certifies more)", "-", "-", "-")
        else:
            promised = f"differs in ≤ {promise.certificate.bound:.1%}"
            table.add_row(asked, promise.point.name, *_shares(promise.point), promised)
    bounds = [point.certificate("accuracy", DELTA) for point in points]
    reachable = math.floor(1000 * max((bound.bound for bound in bounds if bound is not None), default=0.0)) / 1000
    promise = _chosen(partial(certified_accuracy, points, reachable))
    if promise is not None:
        promised = f"right in ≥ {promise.certificate.bound:.1%}"
        table.add_row(f"accuracy {reachable:g} (most)", promise.point.name, *_shares(promise.point), promised)
    return table


def _shares(point: "OperatingPoint") -> tuple[str, str]:
    return f"{point.compute:.1%}", f"{point.accuracy:.1%}"


def _chosen(choose: Callable[[], Chosen]) -> Chosen | None:
    """Give what a budget chooses, or None if nothing reaches it."""
    from offramp_contract.errors import InvalidValue

    try:
        return choose()
    except InvalidValue:
        return None


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for heading in others:
        table.add_column(heading, justify="left" if heading in ("is served by", "promised") else "right")
    return table

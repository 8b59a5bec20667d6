"""`offramp evaluate`: labelled data in, a page that people look at and every number as JSON out."""

import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp_cli.console import progress, stderr, stdout
from offramp_cli.data_flags import DATA_KINDS, AllowMissingClasses, BatchSize, DataDir, Device, Threads, TraceFile
from offramp_cli.errors import CommandError
from offramp_cli.figure import machine

if TYPE_CHECKING:
    import numpy as np
    from offramp_calibration import Outcomes
    from offramp_calibration.advice import Advice
    from offramp_calibration.evaluation import Evaluation, Provenance
    from offramp_calibration.labelled import LabelledData
    from offramp_calibration.trace import Trace
    from offramp_contract.policy_spec import PolicySpec
    from offramp_runtime import Bundle
    from offramp_runtime import Device as RuntimeDevice

PACKAGES = ("offramp", "numpy", "onnxruntime", "onnxruntime-gpu")


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, or a .zip of one.")],
    *,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Labelled data that neither training nor calibration has seen: {DATA_KINDS}, of which the test split "
            "is taken."
        ),
    ] = None,
    data_dir: DataDir = None,
    trace: TraceFile = None,
    out: Annotated[Path, typer.Option(help="The report's folder; a report that is there is replaced.")] = Path(
        "report"
    ),
    point: Annotated[
        str | None,
        typer.Option(
            help="The operating point that exits, advice and examples are shown under; unset: what compute=0.5 "
            "chooses, or the bundle's default policy if it is not calibrated."
        ),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Also write the bundle without the exits that cost more than they save to this new folder."),
    ] = None,
    timing: Annotated[bool, typer.Option(help="Measure milliseconds and give advice on exits.")] = True,
    batch_size: BatchSize = 256,
    threads: Threads = None,
    device: Device = "auto",
    allow_missing_classes: AllowMissingClasses = False,
) -> None:
    """Measure a bundle on labelled data, and write a report: accuracy against compute, exits, budgets, certificates."""
    from offramp_calibration.evaluate import named_point
    from offramp_calibration.gate_ladder import DEFAULT_STEPS
    from offramp_calibration.report import write_report
    from offramp_runtime import open_bundle, open_device

    from offramp_cli.labelled_data import open_data
    from offramp_cli.recording import Recording, traced

    _check_targets(out, merge, timing=timing)
    opened = open_bundle(bundle)
    points = opened.calibration.operating_points
    if point is not None:
        named_point(point, points)
    if opened.manifest.gates:
        timing = _without_times(merge)
    labelled = None if data is None else open_data(data, opened, "test", data_dir)
    if labelled is not None and labelled.remark:
        stderr.print(labelled.remark, highlight=False, markup=False, soft_wrap=True)
    samples = None if labelled is None else labelled.data
    command = shlex.join(
        [
            "offramp",
            "evaluate",
            str(bundle),
            *_given("--data", data),
            *_given("--trace", trace),
            *_given("--point", point),
        ]
    )
    inputs = _rows_to_time(opened, samples)
    thresholds = {one.gate_threshold for one in points} or DEFAULT_STEPS
    recording = Recording(trace, batch_size, device, threads, allow_missing_classes, thresholds)
    with traced(opened, samples, recording) as recorded:
        provenance = _provenance(opened, recorded, samples.name if samples else str(trace), command)
        run_on = open_device(device, threads) if timing else None
        evaluation = _evaluate(opened, recorded, provenance, point=point, device=run_on, inputs=inputs)
        shown = {example.index: samples.example(example.index) if samples else None for example in evaluation.examples}
        page = write_report(evaluation, out, shown)
    _summarise(evaluation)
    if merge is not None:
        _merge(opened, evaluation, merge, inputs)
    stdout.print(f"\nreport: {page}", highlight=False, markup=False, soft_wrap=True)


def _check_targets(out: Path, merge: Path | None, *, timing: bool) -> None:
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file; name a folder")
    if (out / "manifest.json").exists():
        raise CommandError(f"--out {out} is a bundle; name another folder for the report")
    if merge is not None and merge.exists():
        raise CommandError(f"--merge {merge} exists; name a new folder")
    if merge is not None and not timing:
        raise CommandError("--merge needs times to tell which exits cost more than they save; leave out --no-timing")


def _without_times(merge: Path | None) -> bool:
    """Say that a gated network's stages are not timed: a row's time depends on which of them it runs."""
    if merge is not None:
        raise CommandError("--merge is for networks without gates")
    stderr.print("this network has gates; it is evaluated without times and without advice on exits", highlight=False)
    return False


def _given(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _rows_to_time(bundle: "Bundle", data: "LabelledData | None") -> "Mapping[str, np.ndarray]":
    """Give as many rows as the smallest batch that serves, of the data if there is any."""
    import numpy as np

    num_rows = bundle.manifest.min_batch
    if data is not None:
        first = next(data.batches(num_rows), {})
        if first and all(len(rows) == num_rows for rows in first.values()):
            return first
    return {tensor.name: np.zeros((num_rows, *tensor.shape), tensor.dtype) for tensor in bundle.manifest.inputs}


def _provenance(bundle: "Bundle", trace: "Trace", data: str, command: str) -> "Provenance":
    from offramp_calibration.evaluation import Provenance

    calibration = bundle.calibration
    return Provenance(
        model_digest=bundle.manifest.model_digest,
        calibration_digest=calibration.calibration_digest if calibration.operating_points else None,
        calibration_data_digest=calibration.data_digest,
        calibration_num_samples=calibration.num_samples,
        data=data,
        data_digest=trace.about.data_digest,
        command=command,
        machine=machine(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # onnxruntime is installed under one of two names
            continue
    return found


def _evaluate(
    bundle: "Bundle",
    trace: "Trace",
    provenance: "Provenance",
    *,
    point: str | None,
    device: "RuntimeDevice | None",
    inputs: "Mapping[str, np.ndarray]",
) -> "Evaluation":
    """Replay everything; where there is a device, time the exits on it and judge them."""
    from offramp_calibration.evaluate import evaluate as measure
    from offramp_calibration.timing import time_stages

    from offramp_cli.exit_advice import advise_exits

    with progress() as display:
        task = display.add_task("replaying", total=None, note="")

        def judge(outcomes: "Outcomes", policy: "PolicySpec") -> "Advice | None":
            if device is None:
                return None
            display.update(task, description="timing with and without each exit")
            return advise_exits(bundle, outcomes, policy, device, inputs)

        return measure(
            trace,
            bundle.manifest,
            bundle.calibration,
            provenance,
            milliseconds=None if device is None else time_stages([bundle], device, inputs)[0].ms_to_exit_E.tolist(),
            reference=point,
            progress=lambda done, total: display.update(task, completed=done, total=total),
            judge=judge,
        )


def _summarise(evaluation: "Evaluation") -> None:
    from offramp_calibration.captions import advice_sentence, headline

    for caution in evaluation.cautions:
        stderr.print(f"[yellow]note:[/] {caution.sentence}", highlight=False, soft_wrap=True)
    stdout.print(headline(evaluation), highlight=False, markup=False, soft_wrap=True)
    if evaluation.advice is not None:
        stdout.print(advice_sentence(evaluation.advice), highlight=False, markup=False, soft_wrap=True)
        if evaluation.advice.note:
            stderr.print(evaluation.advice.note, highlight=False, markup=False, soft_wrap=True)


def _merge(bundle: "Bundle", evaluation: "Evaluation", out: Path, inputs: "Mapping[str, np.ndarray]") -> None:
    from offramp_cli.exit_advice import merge_exits

    if evaluation.advice is None or not evaluation.advice.merge:
        stdout.print("merge: nothing to merge, and nothing written", highlight=False)
        return
    with stderr.status("merging"):
        merge_exits(bundle, evaluation.advice.merge, out, examples=inputs)
    stdout.print(
        f"merge: {out}   calibrate it:  offramp calibrate {out} --data …", highlight=False, markup=False, soft_wrap=True
    )

"""The trace that a command works on: recorded now, with a progress bar, or read from where it was kept."""

import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offramp_calibration.about import GateThreshold
from offramp_calibration.checks import check_labels
from offramp_calibration.gate_ladder import DEFAULT_STEPS
from offramp_calibration.labelled import LabelledData
from offramp_calibration.record import BATCH_SIZE, digest_of, record
from offramp_calibration.trace import Trace
from offramp_contract.errors import BrokenTrace
from offramp_runtime import Bundle, StageExecutor, open_device

from offramp_cli.console import progress, stderr
from offramp_cli.errors import CommandError


@dataclass(frozen=True, slots=True)
class Recording:
    """How a trace is recorded.

    Attributes:
        kept: Where the trace is kept, and read from if it is there; None: it goes when the command ends.
        batch_size: Samples at a time.
        device: auto, cpu, cuda, cuda:1.
        threads: CPU threads; None: one per core.
        allow_missing_classes: Record data that lacks some of the bundle's classes.
        gates: For a gated bundle, at how many gate thresholds to record it at most, or at which.
    """

    kept: Path | None = None
    batch_size: int = BATCH_SIZE
    device: str = "auto"
    threads: int | None = None
    allow_missing_classes: bool = False
    gates: int | Collection[GateThreshold] = DEFAULT_STEPS


@contextmanager
def traced(bundle: Bundle, data: LabelledData | None, recording: Recording) -> Iterator[Trace]:
    """Give what every exit of a bundle says about some data.

    Args:
        bundle: What to run.
        data: What to run it on; None: the trace must be there.
        recording: How.

    Raises:
        UnfitData: If the data is not what the bundle can be calibrated or evaluated on.
        BrokenTrace: If the trace that is there was not recorded with this bundle, or not on this data.
    """
    kept = recording.kept
    if kept is not None and kept.exists():
        yield _kept_trace(kept, bundle, data, recording)
    elif data is None:
        raise CommandError("name labelled data with --data, or a trace that is there with --trace")
    elif kept is not None:
        yield _recorded(bundle, data, recording, kept)
    else:
        with tempfile.TemporaryDirectory(prefix="offramp-") as folder:
            yield _recorded(bundle, data, recording, Path(folder) / "trace.npz")


def _kept_trace(path: Path, bundle: Bundle, data: LabelledData | None, recording: Recording) -> Trace:
    trace = Trace.read(path)
    trace.check_made_for(bundle.manifest)
    check_labels(trace.label_N, bundle.manifest, allow_missing_classes=recording.allow_missing_classes)
    if data is not None and digest_of(data, bundle.manifest) != trace.about.data_digest:
        raise BrokenTrace(f"{path.name!r} was recorded on other data than {data.name}; remove it to record it anew")
    if bundle.manifest.gates and not isinstance(recording.gates, int):
        for threshold in recording.gates:
            trace.pass_at(threshold)
    passes = f" at {len(trace.passes)} gate thresholds" if trace.passes else ""
    stderr.print(f"[green]✓[/] using the trace in {path}, {len(trace):,} samples{passes}", highlight=False)
    return trace


def _recorded(bundle: Bundle, data: LabelledData, recording: Recording, path: Path) -> Trace:
    executor = StageExecutor(bundle, open_device(recording.device, recording.threads))
    exits = "1 exit" if len(bundle.manifest.exits) == 1 else f"{len(bundle.manifest.exits)} exits"
    title = f"recording {exits} at each gate threshold" if bundle.manifest.gates else f"recording {exits}"
    with progress() as display:
        task = display.add_task(title, total=None, note="")
        return record(
            executor,
            data,
            path,
            batch_size=recording.batch_size,
            allow_missing_classes=recording.allow_missing_classes,
            gates=recording.gates,
            progress=lambda done, total: display.update(task, completed=done, total=total),
        )

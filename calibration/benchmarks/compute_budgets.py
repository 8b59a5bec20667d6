"""Are compute budgets, accuracies and risks kept over HTTP, on data that neither training nor calibration has seen?

    python calibration/benchmarks/compute_budgets.py bundles/resnet-cifar100 --data cifar100 --out budgets.json

Serves a calibrated bundle with `offramp serve` and asks it to classify a whole test set once for every way of asking.
What is reported is what the answers say: the depth they took, the class they name. Beside each compute budget stands
the best of all cheaper calibrated points, replayed over the same samples, with the standard error of the difference (a
paired one, sample by sample); and how many of the replayed exits are the server's own.
"""

import io
import json
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from offramp_calibration import Outcomes, Replayed, Trace, replay
from offramp_calibration.labelled import LabelledData
from offramp_calibration.measured import BUDGETS
from offramp_cli.figure import machine
from offramp_cli.labelled_data import open_data
from offramp_cli.recording import Recording, traced
from offramp_cli.server_process import server_process
from offramp_contract.calibration import OperatingPoint
from offramp_runtime import Bundle, open_bundle
from rich.console import Console
from rich.progress import track
from rich.table import Table

RISKS = (0.01, 0.02, 0.05)
DELTA = 0.05
ROWS = 100
NPY = {"content-type": "application/x-npy"}


@dataclass(frozen=True)
class Answered:
    """What a whole test set got from the server for one way of asking.

    Attributes:
        asked: The request's fields.
        status: 200, or 422 with the problem's sentence in `refused`.
        point: The operating point that the answers name.
        promised: What the answers' certificate promises, if they name one.
        expected_compute, expected_accuracy: What the calibration expects of the point.
        compute, accuracy, differs: What the answers came to; `differs` is the share that is not full depth's answer.
        best_cheaper: The most accurate of all cheaper calibrated points on the same samples.
        gain, gain_error: How much more accurate that one is, and the standard error of this paired difference.
        same_exits: Share of samples that the replay lets leave where the server did.
    """

    asked: dict[str, Any]
    status: int
    refused: str = ""
    point: str = ""
    promised: dict[str, Any] | None = None
    expected_compute: float = 0.0
    expected_accuracy: float = 0.0
    compute: float = 0.0
    accuracy: float = 0.0
    differs: float = 0.0
    best_cheaper: str = ""
    gain: float = 0.0
    gain_error: float = 0.0
    same_exits: float = 0.0


class Asker:
    """Asks a server to classify a whole test set, and compares with replay."""

    def __init__(self, client: httpx.Client, model: str, bundle: Bundle, data: LabelledData, trace: Trace) -> None:
        self._client, self._path = client, f"/v1/models/{model}/classify"
        self._bodies = list(_bodies(data))
        self._points = {point.name: point for point in bundle.calibration.operating_points}
        outcomes = Outcomes.of(trace, bundle.calibration.temperatures)
        self._full_N = outcomes.class_NE[:, -1]
        self._label_N = outcomes.label_N
        self._replayed = {name: replay(point.policy, outcomes) for name, point in self._points.items()}

    def ask(self, asked: dict[str, Any]) -> Answered:
        """Send every sample once."""
        query = {name: json.dumps(value) for name, value in asked.items()}
        depth_N, class_N, exit_N, policy = [], [], [], {}
        for body in self._bodies:
            answer = self._client.post(self._path, params=query | {"top_k": 1}, content=body, headers=NPY)
            if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
                return Answered(asked, answer.status_code, answer.json()["detail"])
            answer.raise_for_status()
            document = answer.json()
            policy = document["policy"]
            for prediction in document["predictions"]:
                depth_N.append(prediction["depth"])
                class_N.append(prediction["class_id"])
                exit_N.append(prediction["exit"]["index"])
        right_N = np.array(class_N) == self._label_N
        point = self._points[policy["operating_point"]]
        cheaper = self._best_cheaper(point)
        difference_N = cheaper[1].right_N.astype(float) - right_N
        return Answered(
            asked,
            200,
            point=point.name,
            promised=policy["certified"],
            expected_compute=point.compute,
            expected_accuracy=point.accuracy,
            compute=float(np.mean(depth_N)),
            accuracy=float(right_N.mean()),
            differs=float((np.array(class_N) != self._full_N).mean()),
            best_cheaper=cheaper[0],
            gain=float(difference_N.mean()),
            gain_error=float(difference_N.std() / np.sqrt(len(difference_N))),
            same_exits=float((self._replayed[point.name].exit_N == np.array(exit_N)).mean()),
        )

    def _best_cheaper(self, chosen: OperatingPoint) -> tuple[str, Replayed]:
        """Give the calibrated point, no dearer than the chosen one, that these samples like best."""
        within = [name for name, point in self._points.items() if point.compute <= chosen.compute]
        best = max(within, key=lambda name: self._replayed[name].accuracy)
        return best, self._replayed[best]


def main(
    bundle: Annotated[Path, typer.Argument(help="A calibrated bundle.")],
    data: Annotated[str, typer.Option(help="Labelled test data, as for `offramp evaluate`.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where named data sets lie.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every number to this JSON file.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the server.")] = 1,
) -> None:
    """Ask a served bundle for budgets, accuracies and risks over a whole test set."""
    opened = open_bundle(bundle)
    labelled = open_data(data, opened, "test", data_dir)
    flags = ("--threads", str(threads), "--device", "cpu", "--default-latency-ms", "60000")
    with (
        tempfile.TemporaryDirectory() as scratch,
        traced(opened, labelled.data, Recording(device="cpu", threads=threads)) as trace,
        server_process(bundle, Path(scratch) / "server.log", flags) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=120) as client,
    ):
        asker = Asker(client, opened.manifest.name, opened, labelled.data, trace)
        answered = [asker.ask(asked) for asked in track(_ways(opened), "asking")]
    console = Console(width=180)
    console.print(_table(answered))
    console.print(f"{labelled.remark}; {len(labelled.data.label_N):,} samples a row; {machine()}", highlight=False)
    if out is not None:
        _write(out, opened, trace, answered)


def _ways(bundle: Bundle) -> list[dict[str, Any]]:
    """Give the ways of asking: below the first exit's cost, the budgets, the risks, and accuracies within reach."""
    points = bundle.calibration.operating_points
    least, full = bundle.manifest.exit_depths[0], max(point.accuracy for point in points)
    accuracies = [round(full - loss, 3) for loss in (0.1, 0.05, 0.03, 0.02)]
    return [
        {"compute": round(least * 0.9, 4)},
        *({"compute": budget} for budget in BUDGETS),
        *({"accuracy": accuracy} for accuracy in accuracies),
        *({"risk": {"epsilon": risk, "delta": DELTA}} for risk in RISKS),
        *({"risk": {"epsilon": risk}} for risk in RISKS),
    ]


def _table(answered: list[Answered]) -> Table:
    table = Table("asked", "served by", box=None, pad_edge=False)
    for heading in ("compute", "expected", "accuracy", "expected", "differs", "best cheaper", "replay agrees"):
        table.add_column(heading, justify="right")
    for one in answered:
        asked = " ".join(f"{name}={json.dumps(value)}" for name, value in one.asked.items())
        if one.status != httpx.codes.OK:
            table.add_row(asked, f"{one.status}: {one.refused}")
            continue
        table.add_row(
            asked,
            one.point,
            f"{one.compute:.2%}",
            f"{one.expected_compute:.2%}",
            f"{one.accuracy:.2%}",
            f"{one.expected_accuracy:.2%}",
            f"{one.differs:.2%}",
            f"{100 * one.gain:+.2f} ± {100 * one.gain_error:.2f} pp",
            f"{one.same_exits:.3%}",
        )
    return table


def _write(out: Path, bundle: Bundle, trace: Trace, answered: list[Answered]) -> None:
    written = {
        "model": bundle.manifest.name,
        "model_digest": bundle.manifest.model_digest,
        "calibration_digest": bundle.calibration.calibration_digest,
        "calibration_samples": bundle.calibration.num_samples,
        "test_samples": len(trace),
        "test_digest": trace.about.data_digest,
        "exit_depths": bundle.manifest.exit_depths,
        "training": bundle.manifest.provenance.training,
        "versions": bundle.manifest.provenance.versions,
        "machine": f"{machine()} ({platform.machine()})",
        "answered": [asdict(one) for one in answered],
    }
    out.write_text(json.dumps(written, indent=1) + "\n")


def _bodies(data: LabelledData) -> Iterator[bytes]:
    for inputs in data.batches(ROWS):
        file = io.BytesIO()
        (array,) = inputs.values()
        np.save(file, array)
        yield file.getvalue()


if __name__ == "__main__":
    typer.run(main)

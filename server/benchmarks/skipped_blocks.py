"""Is the time of a skipped block really saved? A deep gated network in the engine, without HTTP.

    python server/benchmarks/skipped_blocks.py

Exports a SkipNet for 32x32 images with random weights (unless a bundle is given) and keeps a number of rows in flight,
each a request of its own: whoever is answered is followed by the next at once. Three kinds of rounds take turns, so
that a noisy minute of the machine falls on all: every gate open; a random half of the blocks shut, the same for all
rows of the round; and each gate of each row shut with probability one half, so that rows part at every block and join
again.
Prints one table per number of threads. Nothing is asserted.
"""

import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

import numpy as np
import onnxruntime
import typer
from offramp_runtime import Bundle, DeviceTensor, StageExecutor, StageOutput, open_bundle, open_device
from offramp_server import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.fields import NoLimits, read_routing
from offramp_server.messages import Progress, RequestOptions, Result, RowAnswer
from offramp_server.served import Clock, ServedModel
from offramp_server.submission import Submission

Kind: TypeAlias = Literal["all open", "half of the blocks shut", "half shut, row by row"]
INPUT_SHAPE, NUM_CLASSES = (3, 32, 32), 10
WARM_UP_S = 4.0


@dataclass(frozen=True)
class Round:
    """What one round took.

    Attributes:
        rows: Rows that were answered.
        seconds: From the first row to the last answer.
        graph_s: Of these, those in which a stage's graph ran.
        dispatches: How often one ran.
        dispatched_rows: Over how many rows in all.
        depth: Share of the network's FLOPs that a row ran, on average.
    """

    rows: int
    seconds: float
    graph_s: float
    dispatches: float
    dispatched_rows: float
    depth: float

    @property
    def rows_per_s(self) -> float:
        """Throughput."""
        return self.rows / self.seconds


class Stopwatch:
    """A model's stages, timed while they run; stands in for its executor.

    Attributes:
        seconds: In which one ran.
        dispatches: How often one did.
        rows: Over how many rows.
    """

    def __init__(self, executor: StageExecutor, clock: Clock) -> None:
        self._executor, self._clock = executor, clock
        self.device = executor.device
        self.seconds, self.dispatches, self.rows = 0.0, 0, 0

    @property
    def reading(self) -> tuple[float, int, int]:
        """Seconds, dispatches and rows so far."""
        return self.seconds, self.dispatches, self.rows

    def run(self, stage_index: int, carries: Mapping[str, DeviceTensor]) -> StageOutput:
        """Run a stage."""
        started = self._clock()
        output = self._executor.run(stage_index, carries)
        self.seconds += self._clock() - started
        self.dispatches += 1
        self.rows += len(next(iter(carries.values())))
        return output


class Feeder:
    """Keeps rows in flight until all are answered: each answer is followed by the next request at once."""

    def __init__(
        self, engine: Engine, served: ServedModel, inputs: np.ndarray, asked: Sequence[RequestOptions]
    ) -> None:
        self._engine, self._served, self._inputs = engine, served, inputs
        self._left, self._owed = list(asked), len(asked)
        self.depths: list[float] = []
        self.is_done = threading.Event()

    def start(self, num_rows: int) -> None:
        """Send the first."""
        for _ in range(num_rows):
            self._send()

    def deliver(self, events: list[tuple[Submission, Progress | Result]]) -> None:
        """Take answers, on the engine's thread, and send as many requests."""
        for _, event in events:
            if not isinstance(event, Result):
                continue
            (answer,) = event.rows
            self.depths.append(answer.depth if isinstance(answer, RowAnswer) else math.nan)
            if self._left:
                self._send()
        if len(self.depths) == self._owed:
            self.is_done.set()

    def _send(self) -> None:
        options, row = self._left.pop(), len(self._left) % len(self._inputs)
        inputs = {self._served.manifest.inputs[0].name: self._inputs[row : row + 1]}
        self._engine.submit(self._served, inputs, options, self)


class Bench:
    """An engine with one gated model."""

    def __init__(self, bundle: Bundle, threads: int, num_inflight: int, seed: int, clock: Clock) -> None:
        self.num_inflight = num_inflight
        self._clock = clock
        self._random = np.random.default_rng(seed)
        settings = EngineSettings(max_batch=num_inflight, default_latency_ms=None, warm_up_s=WARM_UP_S, runners=1)
        self.engine = Engine(open_device("cpu", threads), settings, clock=clock)
        self.served = self.engine.add_model(bundle)
        self._stopwatch = Stopwatch(self.served.executor, clock)
        self.served.executor = self._stopwatch  # type: ignore[assignment]
        row_shape = self.served.manifest.inputs[0].shape
        self._inputs = self._random.normal(size=(num_inflight, *row_shape)).astype(np.float32)

    def ask(self, kind: Kind, num_rows: int) -> list[RequestOptions]:
        """Draw what rows ask for: a threshold of 0 opens a gate, one of 1 shuts it (no sigmoid reaches 1)."""
        num_gates = len(self.served.manifest.gates)
        is_shut_NG = np.zeros((num_rows, num_gates), dtype=bool)
        if kind == "half of the blocks shut":
            is_shut_NG[:, self._random.permutation(num_gates)[: num_gates // 2]] = True
        elif kind == "half shut, row by row":
            is_shut_NG = self._random.uniform(size=is_shut_NG.shape) < 0.5
        return [self._options(is_shut_G.astype(float).tolist()) for is_shut_G in is_shut_NG]

    def _options(self, gate_threshold: list[float]) -> RequestOptions:
        fields = {"gate_threshold": gate_threshold}
        return read_routing(fields, self.served.manifest, self.served.calibration, NoLimits()).options

    def run(self, kind: Kind, num_rows: int) -> Round:
        """Answer so many rows."""
        feeder = Feeder(self.engine, self.served, self._inputs, self.ask(kind, num_rows))
        before = self._stopwatch.reading
        started = self._clock()
        feeder.start(self.num_inflight)
        feeder.is_done.wait()
        seconds = self._clock() - started
        graph_s, dispatches, rows = np.subtract(self._stopwatch.reading, before).tolist()
        return Round(num_rows, seconds, graph_s, dispatches, rows, float(np.mean(feeder.depths)))


def export_skipnet(out: Path, blocks: int, gates: str, seed: int) -> None:
    """Export a SkipNet with random weights: only its cost matters here."""
    import torch
    from offramp_exporter import export
    from offramp_models.networks import create_network

    torch.manual_seed(seed)
    network = create_network(
        "skipnet", seed, input_shape=INPUT_SHAPE, num_classes=NUM_CLASSES, gates=gates, knobs={"blocks": blocks}
    )
    export(network.eval(), torch.randn(8, *INPUT_SHAPE), out, name="skipnet")


def measure(it: Bench, threads: int, rows: int, rounds: int) -> list[str]:
    """Run the rounds; gives the lines of a table."""
    kinds = get_args(Kind)
    runs = [[it.run(kind, rows) for kind in kinds] for _ in range(rounds + 1)][1:]  # the first is for warming up
    lines = [
        f"\n{threads} thread{'s' if threads > 1 else ''}:\n",
        "| gates | rows/s | over all open | of rounds | by FLOPs | rows a dispatch | graphs, ms a row "
        "| beyond them, ms a row | beyond them, µs a dispatch |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return lines + [
        _line(kind, [round_[index] for round_ in runs], [round_[0] for round_ in runs])
        for index, kind in enumerate(kinds)
    ]


def _line(name: str, runs: Sequence[Round], full: Sequence[Round]) -> str:
    def middle(value: Callable[[Round], float]) -> float:
        return float(np.median([value(run) for run in runs]))

    ratios = [run.rows_per_s / beside.rows_per_s for run, beside in zip(runs, full, strict=True)]
    by_flops = np.median([beside.depth / run.depth for run, beside in zip(runs, full, strict=True)])
    return (
        f"| {name} | {middle(lambda r: r.rows_per_s):.1f} | {np.median(ratios):.2f} "
        f"| {min(ratios):.2f} to {max(ratios):.2f} | {by_flops:.2f} "
        f"| {middle(lambda r: r.dispatched_rows / r.dispatches):.1f} "
        f"| {middle(lambda r: 1e3 * r.graph_s / r.rows):.2f} "
        f"| {middle(lambda r: 1e3 * (r.seconds - r.graph_s) / r.rows):.3f} "
        f"| {middle(lambda r: 1e6 * (r.seconds - r.graph_s) / r.dispatches):.0f} |"
    )


def main(
    *,
    bundle: Annotated[Path | None, typer.Option(help="A gated bundle; unset: a SkipNet is exported.")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks in each of three groups; 6 are ResNet-38.")] = 6,
    gates: Annotated[str, typer.Option(help="What scores them: recurrent or feed_forward.")] = "recurrent",
    inflight: Annotated[int, typer.Option(min=1, help="Rows in flight.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Rows a round.")] = 320,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each kind.")] = 9,
    threads: Annotated[str, typer.Option(help="Threads behind a dispatch, with commas between.")] = "1,2",
    seed: Annotated[int, typer.Option(help="Of weights, inputs and gates.")] = 0,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count CPU seconds of this process: for one thread.")
    ] = False,
) -> None:
    """Measure, and print tables."""
    with tempfile.TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / "skipnet"
            export_skipnet(bundle, blocks, gates, seed)
        opened = open_bundle(bundle)
        gated = sum(bool(stage.gates) for stage in opened.manifest.stages)
        typer.echo(
            f"{opened.manifest.name}: {len(opened.manifest.stages)} stages, {gated} of them gated; {inflight} rows in "
            f"flight, {rows} a round, {rounds} rounds of each kind, seed {seed}"
        )
        for number in threads.split(","):
            bench = Bench(opened, int(number), inflight, seed, time.process_time if cpu_time else time.monotonic)
            with bench.engine:
                typer.echo("\n".join(measure(bench, int(number), rows, rounds)))
    typer.echo(
        f"\n{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, ONNX Runtime {onnxruntime.__version__}"
    )


if __name__ == "__main__":
    typer.run(main)

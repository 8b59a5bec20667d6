"""What do stages cost, and what does the engine? A network in four stages against the same network as one graph.

    python server/benchmarks/stages_and_graph.py

Exports a convolutional network with four exits and random weights twice: with all its exits, which makes four stages,
and with its last one alone, which makes one graph. Both run to full depth in the engine, without HTTP, with so many
rows in flight, each a request of its own; the one graph also runs in a bare loop. The three take turns, so that a noisy
minute of the machine falls on all. Prints, for each size of network and batch, the medians of the turns' ratios, and
the time that the engine takes beyond the graph: for a dispatch, admission and answer of its rows included, and for one
dispatch more. Nothing is asserted.
"""

import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import typer
from offramp_runtime import Bundle, StageExecutor, open_bundle, open_device
from offramp_server import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.fields import NoLimits, read_routing
from offramp_server.serve import exempt_start_up
from rich.console import Console
from rich.table import Table
from skipped_blocks import Feeder, Stopwatch

NUM_EXITS, NUM_CLASSES, SIZE = 4, 10, 32
WARM_UP_S = 2.0

console = Console(width=140)


@dataclass(frozen=True)
class Size:
    """A network to measure.

    Attributes:
        name: What the table calls it.
        channels: Of every convolution.
        convolutions: In each stage.
        batches: Rows in flight, each a line of the table.
    """

    name: str
    channels: int
    convolutions: int
    batches: tuple[int, ...]


SIZES = (Size("small", 16, 1, (1, 16)), Size("large", 64, 8, (1, 16)))


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        seconds: From the first row to the last answer.
        graph_s: Of these, those in which a graph ran.
        dispatches: How often one did.
    """

    seconds: float
    graph_s: float = 0.0
    dispatches: float = 0.0

    @property
    def beyond_s(self) -> float:
        """Time of the engine, beside the graphs."""
        return self.seconds - self.graph_s

    @property
    def beyond_us(self) -> float:
        """The same, for each dispatch."""
        return 1e6 * self.beyond_s / self.dispatches


def further_us(four: Turn, one: Turn) -> float:
    """Give the time of the engine for one dispatch more of rows that are there already, beside its graph."""
    return 1e6 * (four.beyond_s - one.beyond_s) / (four.dispatches - one.dispatches)


class InEngine:
    """An engine with one model that answers at full depth."""

    def __init__(self, bundle: Bundle, threads: int, num_inflight: int) -> None:
        settings = EngineSettings(max_batch=num_inflight, default_latency_ms=None, warm_up_s=WARM_UP_S, runners=1)
        self.engine = Engine(open_device("cpu", threads), settings)
        self._served = self.engine.add_model(bundle)
        self._stopwatch = Stopwatch(self._served.executor, time.perf_counter)
        self._served.executor = self._stopwatch  # type: ignore[assignment]
        self._num_inflight = num_inflight
        self._inputs = _inputs(num_inflight)
        fields = {"policy": {"kind": "fixed", "exit": len(bundle.manifest.exits) - 1}}
        self._options = read_routing(fields, bundle.manifest, self._served.calibration, NoLimits()).options

    def run(self, rows: int) -> Turn:
        """Answer so many rows."""
        feeder = Feeder(self.engine, self._served, self._inputs, [self._options] * rows)
        before = self._stopwatch.reading
        started = time.perf_counter()
        feeder.start(self._num_inflight)
        feeder.is_done.wait()
        seconds = time.perf_counter() - started
        graph_s, dispatches, _ = np.subtract(self._stopwatch.reading, before).tolist()
        return Turn(seconds, graph_s, dispatches)


class BareLoop:
    """The one graph in a tight loop: nothing runs it faster."""

    def __init__(self, bundle: Bundle, threads: int, batch: int) -> None:
        device = open_device("cpu", threads)
        self._executor = StageExecutor(bundle, device)
        self._carries = {bundle.manifest.inputs[0].name: device.upload(_inputs(batch))}
        self._batch = batch

    def run(self, rows: int) -> Turn:
        """Run the graph over so many rows."""
        started = time.perf_counter()
        for _ in range(rows // self._batch):
            self._executor.run(0, self._carries)
        return Turn(time.perf_counter() - started)


def _inputs(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 3, SIZE, SIZE)).astype(np.float32)


def export_both(size: Size, folder: Path) -> tuple[Bundle, Bundle]:
    """Export a network as four stages and as one graph."""
    import torch
    from offramp_exporter import export
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, size.channels, 3, padding=1)
            self.stages = nn.ModuleList(nn.Sequential(*self._block()) for _ in range(NUM_EXITS))
            self.heads = nn.ModuleList(nn.Linear(size.channels, NUM_CLASSES) for _ in range(NUM_EXITS))

        def _block(self) -> list[nn.Module]:
            pairs = [
                (nn.Conv2d(size.channels, size.channels, 3, padding=1), nn.ReLU()) for _ in range(size.convolutions)
            ]
            return [module for pair in pairs for module in pair]

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            features, exits = self.stem(image), []
            for stage, head in zip(self.stages, self.heads, strict=True):
                features = stage(features)
                exits.append(head(features.mean((2, 3))))
            return exits

    torch.manual_seed(0)
    network, example = Network().eval(), torch.randn(8, 3, SIZE, SIZE)
    export(network, example, folder / "stages", name="stages")
    export(network, example, folder / "graph", name="graph", exits=[f"out[{NUM_EXITS - 1}]"])
    return open_bundle(folder / "stages"), open_bundle(folder / "graph")


def measure(size: Size, batch: int, threads: int, rounds: int, seconds: float) -> list[str]:
    """Run the turns; gives a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        stages, graph = export_both(size, Path(folder))
        bare = BareLoop(graph, threads, batch)
        staged, single = InEngine(stages, threads, batch), InEngine(graph, threads, batch)
    row_s = min(bare.run(8 * batch).seconds for _ in range(3)) / (8 * batch)
    rows = max(round(seconds / row_s / batch), 4) * batch
    exempt_start_up()
    with staged.engine, single.engine:
        turns = [(bare.run(rows), single.run(rows), staged.run(rows)) for _ in range(rounds + 1)][1:]
    return [
        size.name,
        str(batch),
        f"{1e3 * row_s:.2f}",
        _ratio([(four.seconds, one.seconds) for _, one, four in turns]),
        _ratio([(four.seconds, loop.seconds) for loop, _, four in turns]),
        f"{np.median([four.beyond_us for _, _, four in turns]):.0f}",
        f"{np.median([further_us(four, one) for _, one, four in turns]):.0f}",
    ]


def _ratio(pairs: Sequence[tuple[float, float]]) -> str:
    ratios = [of / to for of, to in pairs]
    return f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 15,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of a turn, about.")] = 0.5,
    threads: Annotated[int, typer.Option(min=1, help="Threads behind a dispatch.")] = 1,
) -> None:
    """Measure, and print a table."""
    columns = (
        "network", "rows in flight", "one graph, ms a row", "four stages over one graph, in the engine",
        "four stages over the bare loop", "beyond the graphs, µs a dispatch", "µs a further dispatch",
    )  # fmt: skip
    table = Table(*columns, box=None, pad_edge=False)
    for size in SIZES:
        for batch in size.batches:
            table.add_row(*measure(size, batch, threads, rounds, seconds))
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s), load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, ONNX Runtime {onnxruntime.__version__}; {rounds} turns of {seconds:g} s",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)

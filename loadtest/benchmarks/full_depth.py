"""How near does a server come to ONNX Runtime alone, at full depth? Over HTTP against a bare loop.

    python loadtest/benchmarks/full_depth.py

Exports a convolutional network with random weights twice, as one graph and in four stages, and serves both with
`offramp serve`. Clients that always find work waiting ask for full depth over `/v2` with binary tensors, 1, 8 and 32 of
them. The one graph also runs in loops in this process: in one with every thread or in several with one each, whichever
does most rows per second, at the batch size at which it does. Nothing serves faster than that. A third server runs one
stage at a time. All take turns, so that a noisy minute of the machine falls on all. Prints the medians of the turns and
of their ratios to the loop. Client and server share the machine. Nothing is asserted.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import typer
from latency_budget import NUM_EXITS, build_network
from offramp_cli.server_process import server_process
from offramp_loadtest import measure_capacity, payloads_of_arrays, scenario_of
from offramp_runtime import Bundle, StageExecutor, open_bundle, open_device
from rich.console import Console
from rich.table import Table

IMAGE_SIZE = 32
BATCHES = (1, 2, 4, 8, 16, 32)
CLIENTS = (1, 8, 32)
ONE_AT_A_TIME = ("--runners", "1")
SIZES = {"small": (16, 1), "large": (64, 4)}
"""Channels of every convolution of a network, and convolutions in each of its four stages."""

console = Console(width=140)


class BareLoop:
    """The one graph in tight loops, as many at a time as share the threads."""

    def __init__(self, bundle: Bundle, threads: int, abreast: int, batch: int, images: np.ndarray) -> None:
        device = open_device("cpu", threads // abreast)
        self._executor = StageExecutor(bundle, device)
        self._carries = {bundle.manifest.inputs[0].name: device.upload(images[:batch])}
        self._abreast = abreast
        self._batch = batch
        self.name = f"{abreast} loop{'s' if abreast > 1 else ''}, {batch} rows a run"

    def rows_per_s(self, seconds: float) -> float:
        """Run them for so long."""
        with ThreadPoolExecutor(self._abreast) as pool:
            loops = [pool.submit(self._loop, seconds) for _ in range(self._abreast)]
            return sum(loop.result() for loop in loops)

    def _loop(self, seconds: float) -> float:
        self._executor.run(0, self._carries)
        started = now = time.perf_counter()
        num_runs = 0
        while now < started + seconds:
            self._executor.run(0, self._carries)
            num_runs += 1
            now = time.perf_counter()
        return num_runs * self._batch / (now - started)


def export_both(channels: int, convolutions: int, folder: Path) -> tuple[Path, Path]:
    """Export a network as one graph and in four stages."""
    from offramp_exporter import export

    network, example = build_network(channels, IMAGE_SIZE, convolutions)
    export(network.eval(), example, folder / "graph", name="graph", exits=[f"out[{NUM_EXITS - 1}]"])
    export(network.eval(), example, folder / "stages", name="stages")
    return folder / "graph", folder / "stages"


def asking(url: str, bundle: Path, images: np.ndarray, clients: int) -> Callable[[float], float]:
    """Give what lets so many clients ask for a number of seconds, and gives the rows answered per second."""
    manifest = open_bundle(bundle).manifest
    scenario = scenario_of({"model": manifest.name, "api": "v2", "phases": ({"seconds": 1, "rate": 1},)})
    fields = {"policy": {"kind": "fixed", "exit": len(manifest.exits) - 1}}
    payloads = payloads_of_arrays(images)

    def ask(seconds: float) -> float:
        return measure_capacity(url, scenario, payloads, fields=fields, seconds=seconds, clients=clients)

    return ask


def measure(size: str, threads: int, rounds: int, seconds: float) -> list[list[str]]:
    """Run the turns; gives rows of the table."""
    images = np.random.default_rng(0).normal(size=(max(BATCHES), 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        graph, stages = export_both(*SIZES[size], folder)
        loops = [
            BareLoop(open_bundle(graph), threads, abreast, batch, images)
            for abreast in sorted({1, threads})
            for batch in BATCHES
        ]
        best = max(loops, key=lambda loop: loop.rows_per_s(seconds / 2))
        ways: dict[str, Callable[[float], float]] = {best.name: best.rows_per_s}
        flags = ("--device", "cpu", "--threads", str(threads))
        servers = {
            "one graph": (graph, ()),
            "four stages": (stages, ()),
            "one graph, one at a time": (graph, ONE_AT_A_TIME),
        }
        for name, (bundle, more) in servers.items():
            url = stack.enter_context(server_process(bundle, folder / f"{name}.log", (*flags, *more)))
            ways |= {f"{name}, {number} clients": asking(url, bundle, images, number) for number in CLIENTS}
        turns = [[way(seconds) for way in ways.values()] for _ in range(rounds)]
    return [
        [size if not place else "", name, *_told([turn[place] for turn in turns], [turn[0] for turn in turns])]
        for place, name in enumerate(ways)
    ]


def _told(rates: Sequence[float], loop: Sequence[float]) -> tuple[str, str]:
    ratios = [rate / of for rate, of in zip(rates, loop, strict=True)]
    return f"{np.median(rates):.0f}", f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of a turn.")] = 2.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads behind a dispatch.")] = os.cpu_count() or 1,
) -> None:
    """Measure, and print a table."""
    table = Table("network", "full depth", "rows/s", "over the loop", box=None, pad_edge=False)
    for size in SIZES:
        for row in measure(size, threads, rounds, seconds):
            table.add_row(*row)
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s), load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, ONNX Runtime {onnxruntime.__version__}; {rounds} turns of {seconds:g} s",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)

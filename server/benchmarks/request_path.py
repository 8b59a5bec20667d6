"""Where does the time of one request go, from its bytes to the bytes of its answer?

    python server/benchmarks/request_path.py

Serves a small convolutional network with random weights, once as one graph and once in four stages, from a process in
which a clock is read wherever a request passes from one part of the server to the next. One client asks for full depth
over `/v2` with binary tensors, one request after the other. Prints each part's median, with short rows inline and with
every row left to a runner. Client and server share the machine. Nothing is asserted.
"""

import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
from offramp_loadtest import measure_capacity, payloads_of_arrays, scenario_of
from offramp_runtime import open_bundle, open_device
from offramp_server import Engine
from offramp_server.app import create_app
from offramp_server.bridge import LoopBridge
from offramp_server.loop import DeviceLoop
from offramp_server.metrics import Metrics
from offramp_server.quick_protocol import QuickProtocol
from offramp_server.repository import Repository
from offramp_server.serve import bind, run_server, url_of
from offramp_server.settings import ServerSettings
from rich.console import Console
from rich.table import Table
from stages_and_graph import SIZES, export_both

PARTS = {
    "reading HTTP": "until the engine is asked",
    "admission": "limits, gears, budget",
    "to the runner": "until the thread that runs the stage begins",
    "choice": "which rows, which stage",
    "graph": "gathering, ONNX Runtime",
    "routing": "decision, answer, metrics",
    "back": "until the event loop has the answer",
    "writing HTTP": "until the answer is sent",
    "outside": "client, kernel, event loop",
}
WAYS = {"inline": 2.0, "a runner": 0.0}
"""`--inline-ms`."""


class Stopwatch:
    """Adds up, for one request at a time, how long each part had it."""

    def __init__(self) -> None:
        self.requests: list[dict[str, float]] = []
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since_s = "outside", time.perf_counter()

    def pass_to(self, part: str) -> None:
        """Let another part have it; `reading HTTP` after the answer begins the next request."""
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since_s
        if part == "reading HTTP" and self._part == "outside":
            self.requests.append(self._seconds)
            self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since_s = part, now

    def watch(self, owner: type, name: str, *, at_start: str | None = None, at_end: str | None = None) -> None:
        """Pass the request on when a method is called, or returns."""
        method: Callable[..., Any] = getattr(owner, name)

        @wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if at_start is not None:
                self.pass_to(at_start)
            result = method(*args, **kwargs)
            if at_end is not None:
                self.pass_to(at_end)
            return result

        setattr(owner, name, watched)


def serve(bundle: Path, threads: int, inline_ms: float, told: Connection) -> None:
    """Serve until SIGTERM; sends the URL at the start, and every request's parts at the end."""
    settings = ServerSettings.load(port=0, device="cpu", threads=threads, inline_ms=inline_ms)
    metrics = Metrics()
    engine = Engine(open_device("cpu", threads), settings.engine_settings(), metrics)
    engine.add_model(open_bundle(bundle))
    app = create_app(settings, Repository(engine), engine, metrics)
    stopwatch = Stopwatch()
    stopwatch.watch(QuickProtocol, "data_received", at_start="reading HTTP")
    stopwatch.watch(Engine, "submit", at_start="admission", at_end="to the runner")
    stopwatch.watch(DeviceLoop, "choose", at_start="choice")
    stopwatch.watch(DeviceLoop, "execute", at_start="graph", at_end="routing")
    stopwatch.watch(LoopBridge, "deliver", at_start="back")
    stopwatch.watch(LoopBridge, "_hand_out", at_start="writing HTTP")
    stopwatch.watch(QuickProtocol, "_reply", at_end="outside")
    listener = bind(settings)
    told.send(url_of(listener))
    run_server(app, settings, engine, listener)
    engine.close()
    told.send(stopwatch.requests)


def parts_of(bundle: Path, threads: int, inline_ms: float, seconds: float) -> dict[str, float]:
    """Measure; gives the median microseconds of each part, and of all together."""
    ours, theirs = multiprocessing.Pipe()
    spawned = multiprocessing.get_context("spawn")
    process = spawned.Process(target=serve, args=(bundle, threads, inline_ms, theirs))
    process.start()
    theirs.close()  # its own is the only one: a server that ends early is seen to
    try:
        url = ours.recv()
        manifest = open_bundle(bundle).manifest
        scenario = scenario_of({"model": manifest.name, "api": "v2", "phases": ({"seconds": 1, "rate": 1},)})
        fields = {"policy": {"kind": "fixed", "exit": len(manifest.exits) - 1}}
        shape = manifest.tensors[manifest.inputs[0].name].shape
        payloads = payloads_of_arrays(np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32))
        measure_capacity(url, scenario, payloads, fields=fields, seconds=seconds, clients=1)
        process.terminate()
        requests = ours.recv()
    finally:
        process.terminate()
        process.join()
    seen = requests[len(requests) // 5 :]  # the first find caches cold
    medians = {part: 1e6 * float(np.median([request[part] for request in seen])) for part in PARTS}
    return medians | {"all": 1e6 * float(np.median([sum(request.values()) for request in seen]))}


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of a turn.")] = 3.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads behind a dispatch.")] = os.cpu_count() or 1,
) -> None:
    """Measure, and print a table."""
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        export_both(SIZES[0], Path(folder))
        cases = {
            f"{network}, {way}": (Path(folder) / network, inline_ms)
            for network in ("graph", "stages")
            for way, inline_ms in WAYS.items()
        }
        turns = [
            {case: parts_of(bundle, threads, inline_ms, seconds) for case, (bundle, inline_ms) in cases.items()}
            for _ in range(rounds)
        ]
    table = Table("µs of a request", "", *cases, box=None, pad_edge=False)
    for part in (*PARTS, "all"):
        medians = [float(np.median([turn[case][part] for turn in turns])) for case in cases]
        table.add_row(part, PARTS.get(part, ""), *(f"{median:.0f}" for median in medians))
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s), load {os.getloadavg()[0]:.1f}; Python "
        f"{platform.python_version()}, ONNX Runtime {onnxruntime.__version__}; {rounds} turns of {seconds:g} s",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)

"""Are latency budgets kept? An idle server, one client, budgets between the cost of exit 0 and of full depth.

    python loadtest/benchmarks/latency_budget.py --out docs/benchmarks/latency_budget.json

Exports a network whose stages cost 5 ms or more, serves it with `offramp serve`, and sends requests that would never
leave by themselves, one after another over one connection, each with a budget. Latency is what the client sees, from
before the request is written to after the answer is read. The budgets are interleaved, so that a noisy minute of the
machine falls on all of them. Everything is in one run on one machine; nothing is asserted.
"""

import http.client
import io
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
IDLE_BETWEEN_S = 0.01
NUM_EXITS = 4


@dataclass(frozen=True)
class Budget:
    """What came of one budget.

    Attributes:
        within: Share of answers within the budget, as the client saw it.
        reachable: Share of control requests within it: exit 0 and no budget, one a round. What the machine's own noise
            makes late, no server can answer in time.
    """

    budget_ms: float
    within: float
    reachable: float
    p50_ms: float
    p99_ms: float
    mean_depth: float
    exits: dict[str, int]
    reasons: dict[str, int]


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int, body: bytes) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._body = body

    def classify(self, query: str) -> tuple[float, dict[str, Any]]:
        """Give the seconds a request took and its one prediction."""
        headers = {"content-type": "application/x-npy"}
        started = time.perf_counter()
        self._connection.request("POST", f"/v1/classify?{query}", self._body, headers)
        answer = self._connection.getresponse().read()
        seconds = time.perf_counter() - started
        return seconds, json.loads(answer)["predictions"][0]


def build_network(channels: int, size: int, convolutions: int) -> Any:
    """Build a four-stage convolutional network with random weights: only its cost matters here."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, channels, 3, padding=1)
            block = [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
            self.stages = nn.ModuleList(nn.Sequential(*block * convolutions) for _ in range(NUM_EXITS))
            self.heads = nn.ModuleList(nn.Linear(channels, 10) for _ in range(NUM_EXITS))

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            features, exits = self.stem(image), []
            for stage, head in zip(self.stages, self.heads, strict=True):
                features = stage(features)
                exits.append(head(features.mean((2, 3))))
            return exits

    torch.manual_seed(0)
    return Network(), (torch.randn(1, 3, size, size),)


@contextmanager
def served(bundle: Path, threads: int) -> Iterator[int]:
    """Serve a bundle in a process of its own; gives the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "offramp_cli", "serve", str(bundle), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.DEVNULL)
    try:
        _wait_until_ready(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


def exit_costs_ms(client: Client, rounds: int) -> list[float]:
    """Measure what each exit costs the client without a budget, median, at the same pace as the budgets later."""
    seconds: dict[int, list[float]] = {exit_index: [] for exit_index in range(NUM_EXITS)}
    for _ in track(range(rounds), "costs"):
        for exit_index, taken in seconds.items():
            time.sleep(IDLE_BETWEEN_S)
            taken.append(client.classify(_fixed(exit_index))[0])
    return [float(np.median(taken) * 1e3) for taken in seconds.values()]


def measure(client: Client, budgets_ms: list[float], rounds: int) -> list[Budget]:
    """Send `rounds` requests per budget, interleaved."""
    seen: dict[float, list[tuple[float, dict[str, Any]]]] = {budget: [] for budget in budgets_ms}
    control_s = []
    for _ in track(range(rounds), "budgets"):
        time.sleep(IDLE_BETWEEN_S)
        control_s.append(client.classify(_fixed(0))[0])
        for budget in budgets_ms:
            time.sleep(IDLE_BETWEEN_S)
            query = f"policy=confidence&threshold=1.0&latency_ms={budget:.3f}"
            seen[budget].append(client.classify(query))
    control_ms = np.array(control_s) * 1e3
    return [_summarise(budget, answers, control_ms) for budget, answers in seen.items()]


def _fixed(exit_index: int) -> str:
    return f"policy={quote(json.dumps({'kind': 'fixed', 'exit': exit_index}))}"


def _summarise(budget_ms: float, answers: list[tuple[float, dict[str, Any]]], control_ms: np.ndarray) -> Budget:
    latency_ms = np.array([seconds for seconds, _ in answers]) * 1e3
    return Budget(
        budget_ms=round(budget_ms, 3),
        within=float((latency_ms <= budget_ms).mean()),
        reachable=float((control_ms <= budget_ms).mean()),
        p50_ms=float(np.percentile(latency_ms, 50)),
        p99_ms=float(np.percentile(latency_ms, 99)),
        mean_depth=float(np.mean([prediction["depth"] for _, prediction in answers])),
        exits=dict(sorted(Counter(prediction["exit"]["name"] for _, prediction in answers).items())),
        reasons=dict(Counter(prediction["exit"]["reason"] for _, prediction in answers)),
    )


def show(costs_ms: list[float], budgets: list[Budget]) -> None:
    """Print the table."""
    console = Console(width=140)
    console.print("client-seen latency of each exit, median ms: " + ", ".join(f"{cost:.1f}" for cost in costs_ms))
    table = Table("budget ms", "within budget", "reachable", "p50 ms", "p99 ms", "mean depth", "exits", "reasons")
    for budget in budgets:
        exits = " ".join(f"{name}:{count}" for name, count in budget.exits.items())
        reasons = " ".join(f"{name}:{count}" for name, count in budget.reasons.items())
        row = (budget.budget_ms, budget.p50_ms, budget.p99_ms, budget.mean_depth)
        numbers = [f"{number:.2f}" for number in row]
        table.add_row(numbers[0], f"{budget.within:.1%}", f"{budget.reachable:.1%}", *numbers[1:], exits, reasons)
    console.print(table)


def main(
    *,
    out: Annotated[Path | None, typer.Option(help="Write every number here as JSON.")] = None,
    rounds: Annotated[int, typer.Option(help="Requests per budget.")] = 300,
    threads: Annotated[int, typer.Option(help="CPU threads behind a dispatch.")] = 1,
    channels: int = 64,
    size: int = 48,
    convolutions: Annotated[int, typer.Option(help="3x3 convolutions per stage.")] = 10,
) -> None:
    """Measure how well latency budgets are kept on an idle server."""
    from offramp_exporter import export

    network, example = build_network(channels, size, convolutions)
    body = io.BytesIO()
    np.save(body, example[0].numpy())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "budgets"
        export(network, example, bundle)
        with served(bundle, threads) as port:
            client = Client(port, body.getvalue())
            costs_ms = exit_costs_ms(client, rounds=100)
            spread_ms = costs_ms[-1] - costs_ms[0]
            budgets = measure(client, [costs_ms[0] + share * spread_ms for share in SHARES], rounds)
    show(costs_ms, budgets)
    if out is not None:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        settings = {"rounds": rounds, "threads": threads, "channels": channels, "size": size, "seed": 0}
        written = {"machine": machine, "settings": settings | {"convolutions": convolutions}, "exit_costs_ms": costs_ms}
        out.write_text(json.dumps(written | {"budgets": [asdict(budget) for budget in budgets]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

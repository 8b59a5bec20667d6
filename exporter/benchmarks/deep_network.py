"""How long does a deep network take to export, and how large is what comes out?

    python exporter/benchmarks/deep_network.py

Builds a residual network of the size of ResNet-110 (54 blocks, 32x32 images) with random weights and an exit behind
every block, explains it, exports it, and compares the stage files with one graph that computes the same exits. Prints
the seconds of each step, those of the whole `offramp export --explain` among them, and the bytes. Nothing is asserted.
"""

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import onnx
import torch
import typer
from offramp_exporter import explain, export
from offramp_exporter.quiet import overhearing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = 1 if width_in == width else 2
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Give the features of the next block, (B, width, H, W)."""
        hidden = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(hidden)) + self.shortcut(x))


class DeepNetwork(nn.Module):
    """A residual network for small images with an exit behind every block.

    Args:
        blocks_per_width: Three times as many blocks in all; 18 are ResNet-110.
        is_tied: Whether the exits of one width share their head.
        num_classes: Width of the exits.
    """

    def __init__(self, blocks_per_width: int = 18, *, is_tied: bool = False, num_classes: int = 10) -> None:
        super().__init__()
        widths = [width for width in WIDTHS for _ in range(blocks_per_width)]
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(width_in, width) for width_in, width in zip([WIDTHS[0], *widths], widths, strict=False)
        )
        own = [nn.Linear(width, num_classes) for width in widths]
        tied = {width: nn.Linear(width, num_classes) for width in WIDTHS}
        self.heads = nn.ModuleList(tied[width] for width in widths) if is_tied else nn.ModuleList(own)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Give every exit's logits, (B, classes) each."""
        hidden, exits = torch.relu(self.stem(image)), []
        for block, head in zip(self.blocks, self.heads, strict=True):
            hidden = block(hidden)
            exits.append(head(hidden.mean((2, 3))))
        return exits


def single_graph_bytes(network: nn.Module, image: Tensor) -> tuple[int, int]:
    """Export all exits as one graph, as torch writes it; gives its bytes, and those left without metadata."""
    with overhearing():
        written = torch.onnx.export(
            network.eval(), (image,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    if written is None:
        raise RuntimeError("torch wrote no graph")
    model = written.model_proto
    as_written = model.ByteSize()
    strip(model)
    return as_written, model.ByteSize()


def strip(model: onnx.ModelProto) -> None:
    """Take away what only people and debuggers read: metadata, documentation, shapes in between."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("value_info")


def stage_bytes(bundle: Path) -> int:
    """Count the bytes of a bundle's stage graphs and shared weights."""
    return sum(file.stat().st_size for file in (bundle / "stages").iterdir())


def main(
    blocks_per_width: Annotated[int, typer.Option(help="18 are ResNet-110: 54 blocks, an exit behind each.")] = 18,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the weights and the example.")] = 0,
    tied: Annotated[bool, typer.Option(help="The exits of one width share their head.")] = False,
) -> None:
    """Measure, and print a table."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    network, image = DeepNetwork(blocks_per_width, is_tied=tied).eval(), torch.randn(2, 3, 32, 32)
    console = Console(soft_wrap=True)
    table = Table("step", "seconds", "of CPU time", box=None)
    table.add_row("offramp export --explain, 54 exits, the whole command", *timed_command(threads))
    started = time.perf_counter(), time.process_time()
    explained = explain(network, image)
    explained_s = time.perf_counter() - started[0], time.process_time() - started[1]
    table.add_row(f"explain, {len(explained.exits)} exits", *(f"{seconds:.1f}" for seconds in explained_s))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "deep"
        for step, seconds, cpu_seconds in timed_export(network, image, out):
            table.add_row(step, f"{seconds:.1f}", f"{cpu_seconds:.1f}")
        staged = stage_bytes(out)
    as_written, stripped = single_graph_bytes(network, image)
    console.print(table)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"\nstage files together  {staged:>12,} bytes, {staged / stripped - 1:+.1%} of the single graph")
    console.print(f"single graph          {as_written:>12,} bytes as torch writes it, {stripped:,} without metadata")
    console.print(f"peak memory           {memory:,.0f} MiB")
    console.print(
        f"machine               {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; seed {seed}, {threads} threads"
    )


def timed_command(threads: int) -> tuple[str, str]:
    """Explain the network of 54 blocks from a shell, in a process of its own; gives its seconds and CPU seconds."""
    target = "deep_network:DeepNetwork"
    command = [sys.executable, "-m", "offramp_cli", "export", target, "--example", "3x32x32", "--explain"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, cwd=Path(__file__).parent, env=environment, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{seconds:.1f}", f"{cpu_s:.1f}"


def timed_export(network: nn.Module, image: Tensor, out: Path) -> Iterator[tuple[str, float, float]]:
    """Export, and give for each step that is reported its seconds and its CPU seconds; the sum comes last."""
    marks: list[tuple[str, float, float]] = []
    export(network, image, out, progress=lambda step: marks.append((step, time.perf_counter(), time.process_time())))
    marks.append(("", time.perf_counter(), time.process_time()))
    for (step, wall, cpu), (_, next_wall, next_cpu) in pairwise(marks):
        yield step.partition(":")[0], next_wall - wall, next_cpu - cpu
    yield "export, all of it", marks[-1][1] - marks[0][1], marks[-1][2] - marks[0][2]


if __name__ == "__main__":
    typer.run(main)

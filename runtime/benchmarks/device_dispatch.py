"""What a dispatch costs beyond its graph, on each way to a device: no server, no scheduler, one stage at a time.

    python runtime/benchmarks/device_dispatch.py
    python runtime/benchmarks/device_dispatch.py --device cuda:0 --batch 32

Takes a bundle (or makes a stage of a few small operators) and times, for each of its stages: the graph alone, in a loop
with inputs and outputs bound once; the same through the runtime; and putting together the rows of two batches that it
reads, once per tensor. Without `--device` that is done on the CPU three times: as CPUs are reached (numpy), as
accelerators are (IO binding), and with the fixed buffers of captured graphs. With a GPU the graph alone is the raw CUDA
provider with IO binding. The fastest of short, interleaved rounds, microseconds, which a busy machine
disturbs least. Nothing is asserted.
"""

import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import accumulate, cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer
from offramp_runtime import Bundle, Device, DeviceTensor, StageExecutor, open_bundle, open_device
from offramp_runtime.device import CpuDevice, OrtValueDevice
from offramp_runtime.providers import on_cpu

ROUNDS = 60


def main(
    bundle: Annotated[Path | None, typer.Option(help="A bundle; unset: a network of a few small operators.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda:0, tensorrt:0, cpu; unset: three ways on the CPU.")] = None,
    batch: Annotated[int, typer.Option(help="Rows in a dispatch.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of a session.")] = 1,
    runs: Annotated[int, typer.Option(help="Dispatches in a round.")] = 50,
) -> None:
    """Time every stage on every way to the device."""
    opened = open_bundle(bundle) if bundle is not None else small_bundle()
    typer.echo(f"ONNX Runtime {ort.__version__}, {platform.machine()}, batch {batch}, {threads} threads")
    typer.echo(
        "| way | stage | graph alone, µs | through the runtime | beyond the graph | rows of two batches, a tensor |"
    )
    typer.echo("| --- | --- | --- | --- | --- | --- |")
    for way, on in ways(device, threads).items():
        time_stages(way, StageExecutor(opened, on), batch, runs)


def ways(device: str | None, threads: int) -> dict[str, Device]:
    """Open the ways to compare."""
    if device is not None:
        return {device: open_device(device, threads)}
    ticks = accumulate(cycle((2.0, 1.0, 0.0)), initial=0.0)  # a clock by which capturing always pays
    return {
        "numpy": CpuDevice(threads),
        "IO binding": OrtValueDevice(on_cpu(), threads),
        "fixed buffers": OrtValueDevice(on_cpu(captures=True), threads, lambda: next(ticks)),
    }


def small_bundle() -> Bundle:
    """Export a network whose operators take next to nothing."""
    import torch
    from offramp_exporter import export
    from torch import nn

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            scores = []
            for layer, head in zip(self.layers, self.heads, strict=True):
                x = torch.relu(layer(x))
                scores.append(head(x))
            return scores

    torch.manual_seed(0)
    return export(Small().eval(), torch.randn(2, 16), Path(tempfile.mkdtemp()) / "small")


def time_stages(way: str, executor: StageExecutor, batch: int, runs: int) -> None:
    """Time the stages of a bundle, each fed by those before it."""
    device, manifest = executor.device, executor.manifest
    generator = np.random.default_rng(0)
    carries: dict[str, DeviceTensor] = {}
    for tensor in manifest.inputs:
        drawn = generator.standard_normal((batch, *tensor.shape)).astype(tensor.dtype)
        carries[tensor.name] = device.upload(drawn if np.issubdtype(drawn.dtype, np.floating) else np.zeros_like(drawn))
    for index, stage in enumerate(manifest.stages):
        executor.tune(index, carries)
        name = stage.inputs[0]
        halves = [carries[name]] * (batch // 2) + [device.upload(device.download(carries[name]))] * (batch - batch // 2)
        timed = {
            "alone": alone(executor, index, carries),
            "run": lambda index=index, fed=carries: executor.run(index, fed),
            "gather": lambda halves=halves: device.gather(halves, list(range(batch))),
        }
        spans = interleaved(timed, runs)
        beyond = spans["run"] - spans["alone"]
        gathered = f"{spans['gather']:.1f}" if batch > 1 else ""
        typer.echo(f"| {way} | {stage.name} | {spans['alone']:.1f} | {spans['run']:.1f} | {beyond:.1f} | {gathered} |")
        carries = carries | executor.run(index, carries).carries


def alone(executor: StageExecutor, index: int, carries: Mapping[str, DeviceTensor]) -> Callable[[], object]:
    """Bind a stage's inputs and outputs once; what is left is the graph."""
    stage, session = executor.manifest.stages[index], executor.session(index)
    feeds = {name: carries[name] for name in stage.inputs}
    if stage.exit is not None:
        feeds[executor.manifest.exits[stage.exit].temperature] = np.array(1.0, dtype=np.float32)
    accelerator = OrtValueDevice(on_cpu(), 1) if isinstance(executor.device, CpuDevice) else executor.device
    placed = {name: accelerator.upload(v) if isinstance(v, np.ndarray) else v for name, v in feeds.items()}
    names = [output.name for output in session.get_outputs()]
    binding = session.io_binding()
    for name, value in placed.items():
        binding.bind_ortvalue_input(name, value)
    for name, made in zip(names, accelerator.run(session, placed, names, [])[0], strict=True):
        binding.bind_ortvalue_output(name, made)
    return lambda: session.run_with_iobinding(binding)


def interleaved(timed: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Give the fastest round of each, microseconds a call; the rounds of all take turns."""
    spans: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(ROUNDS):
        for name, call in timed.items():
            started = time.perf_counter()
            for _ in range(runs):
                call()
            spans[name].append((time.perf_counter() - started) / runs * 1e6)
    return {name: min(rounds) for name, rounds in spans.items()}


if __name__ == "__main__":
    typer.run(main)

"""`offramp train`: fits one of the networks to one of the data sets and writes its weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from offramp_cli.console import progress, stdout
from offramp_cli.errors import CommandError

if TYPE_CHECKING:
    from offramp_models.data import ImageDataSet
    from offramp_models.training import TrainingRecord, TrainingSettings
    from torch import nn


def train(
    *,
    out: Annotated[Path, typer.Option(help="Where to write the weights; a record of the training goes beside them.")],
    network: Annotated[str, typer.Option(help="One of `offramp models`.")] = "multi_exit_cnn",
    data: Annotated[str, typer.Option(help="The data set to learn from; see `offramp models`.")] = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 6,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="At the first step; falls to 0 along a cosine.")] = 0.05,
    exit_weights: Annotated[str, typer.Option(help="What each exit's loss counts: `0.5,1,1,2`. Empty: all 1.")] = "",
    seed: Annotated[int, typer.Option(help="Decides weights, split and order: one seed, one result.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to train with; unset: one per core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Train a network with all its exits jointly, and measure every exit on the test images."""
    from offramp_models import create_network, load_data
    from offramp_models.training import TrainingSettings

    settings = TrainingSettings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        exit_weights=_numbers(exit_weights), seed=seed, device=device,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is better known before the training
    try:
        trained, images = create_network(network, seed), load_data(data, seed)
        record = fit(trained, images, settings, threads)
    except ValueError as error:
        raise CommandError(str(error)) from None
    save(trained, record, network, out)
    _report(record)
    stdout.print(f"\nweights: {out}   record: {record_path(out)}", soft_wrap=True, highlight=False)


def fit(
    network: "nn.Module", data: "ImageDataSet", settings: "TrainingSettings", threads: int | None
) -> "TrainingRecord":
    """Train with a progress bar; the process's number of threads is put back afterwards."""
    import torch
    from offramp_models.training import Step
    from offramp_models.training import train as train_network

    _check_device(settings.device)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with progress() as display:
            task = display.add_task(f"training on {data.name}", total=None, note="")

            def show(step: Step) -> None:
                display.update(task, completed=step.index, total=step.total, note=f"loss {step.loss:.3f}")

            return train_network(network, data, settings, show)
    finally:
        torch.set_num_threads(before)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts that it has it
        raise CommandError(f"device {device!r} cannot be used on this machine; cpu always can") from None


def save(network: "nn.Module", record: "TrainingRecord", name: str, out: Path) -> None:
    """Write weights (loadable with `weights_only=True`) and, beside them, the record as JSON."""
    import torch

    torch.save(network.state_dict(), out)
    written = {"network": name} | record.to_json()
    record_path(out).write_text(json.dumps(written, indent=1) + "\n")


def record_path(weights: Path) -> Path:
    """Give where the record of some weights is kept."""
    return weights.with_suffix(".json")


def _report(record: "TrainingRecord") -> None:
    table = Table("exit", "test accuracy", box=None, pad_edge=False)
    for index, accuracy in enumerate(record.test_accuracy_E):
        table.add_row(f"exit_{index}", f"{accuracy:.1%}")
    stdout.print(table)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise CommandError(f"--exit-weights {text!r}: write numbers with commas between, such as 0.5,1,1,2") from None

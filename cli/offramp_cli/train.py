"""`offramp train`: fits one of the networks to one of the data sets and writes its weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from offramp_cli.console import progress, stderr, stdout
from offramp_cli.errors import CommandError

if TYPE_CHECKING:
    from offramp_models.data import ImageDataSet
    from offramp_models.networks import NetworkPlan
    from offramp_models.training import Checkpoint, Epoch, GateUse, TrainingRecord, TrainingSettings
    from torch import nn


def train(
    *,
    out: Annotated[Path, typer.Option(help="Where to write the weights; a record of the training goes beside them.")],
    network: Annotated[str, typer.Option(help="One of `offramp models`.")] = "multi_exit_cnn",
    exits: Annotated[
        str | None, typer.Option(help="What its exits are made of; unset: the network's own kind.")
    ] = None,
    gates: Annotated[
        str | None, typer.Option(help="What scores its gates, if it has gates; unset: the network's own kind.")
    ] = None,
    knob: Annotated[
        list[str] | None, typer.Option(help="A size of the network: blocks=2, widths=8,16,32. As often as needed.")
    ] = None,
    data: Annotated[str, typer.Option(help="The data set to learn from; see `offramp models`.")] = "digits",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data set's files; unset: that of OFFRAMP_DATA, else they are downloaded once."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="How exits and gates learn; see `offramp models`.")] = "weighted",
    exit_weights: Annotated[str, typer.Option(help="What each exit's loss counts: `0.5,1,1,2`. Empty: all 1.")] = "",
    gate_relaxation: Annotated[
        str, typer.Option(help="How gates decide while they learn; empty: as the network's paper has it.")
    ] = "",
    gate_target: Annotated[
        float, typer.Option(help="Share of the images a gate is to open for, or of the FLOPs to run: from 0 to 1.")
    ] = 0.6,
    gate_weight: Annotated[
        float, typer.Option(help="What the gates' target, or the cost of open ones, counts beside the loss.")
    ] = 1.0,
    policy: Annotated[
        str | None, typer.Option(help="Policy to export with, unless told otherwise then: a kind, or a policy's JSON.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 6,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="At the first step; falls to 0 along a cosine.")] = 0.05,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Compute in 16 bits: twice as fast where the processor can.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights, split and order: one seed, one result.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to train with; unset: one per core.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    checkpoint: Annotated[Path | None, typer.Option(help="Keep the training in this file after every epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, if there is one.")] = False,
) -> None:
    """Train a network with all its exits and gates jointly, and measure them on the test images."""
    settings = _settings(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, method=method,
        exit_weights=_numbers(exit_weights), seed=seed, device=device, bfloat16=bfloat16,
        gate_relaxation=gate_relaxation, gate_target=gate_target, gate_weight=gate_weight,
    )  # fmt: skip
    chosen = None if policy is None else read_policy(policy)
    kept = _checkpoint(checkpoint, resume)
    out.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is better known before the training
    try:
        plan, images = _plan(
            network=network, exits=exits, gates=gates, knobs=_knobs(knob or []), data=data, seed=seed, data_dir=data_dir
        )
        trained = plan.build(seed)
        record = fit(trained, images, settings, threads, kept)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        _say_how_to_go_on(checkpoint)
        raise
    save(trained, training_record(plan, record, chosen), out)
    _report(record)
    stdout.print(f"\nweights: {out}   record: {record_path(out)}", soft_wrap=True, highlight=False)


def _settings(**chosen: Any) -> "TrainingSettings":
    from offramp_models.training import TrainingSettings

    try:
        return TrainingSettings(**chosen)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _plan(
    *,
    network: str,
    exits: str | None,
    gates: str | None,
    knobs: Mapping[str, object],
    data: str,
    seed: int,
    data_dir: Path | None,
) -> "tuple[NetworkPlan, ImageDataSet]":
    from offramp_models import load_data
    from offramp_models.networks import plan_network

    plan_network(
        network, exits=exits, knobs=knobs, gates=gates
    )  # a mistake is better known before the data is downloaded
    images = load_data(data, seed, data_dir)
    shape, num_classes = images.input_shape, len(images.label_names)
    plan = plan_network(network, exits=exits, input_shape=shape, num_classes=num_classes, knobs=knobs, gates=gates)
    return plan, images


def fit(
    network: "nn.Module",
    data: "ImageDataSet",
    settings: "TrainingSettings",
    threads: int | None,
    checkpoint: "Checkpoint | None" = None,
) -> "TrainingRecord":
    """Train with a progress bar and a line for every epoch; the process's number of threads is put back afterwards."""
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

            return train_network(network, data, settings, show, on_epoch=_show_epoch, checkpoint=checkpoint)
    finally:
        torch.set_num_threads(before)


def _show_epoch(epoch: "Epoch") -> None:
    use = "" if epoch.gates is None else f"{_use(epoch.gates)}, "
    stderr.print(
        f"epoch {epoch.index} of {epoch.total}: loss {epoch.loss:.3f}, {use}{epoch.seconds:.0f} s, "
        f"{epoch.seconds_left:.0f} s left",
        highlight=False,
    )


def _use(gates: "GateUse") -> str:
    return f"gates open {gates.open_share:.1%}, depth {gates.depth:.1%}"


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts that it has it
        raise CommandError(f"device {device!r} cannot be used on this machine; cpu always can") from None


def _checkpoint(path: Path | None, resume: bool) -> "Checkpoint | None":
    from offramp_models.training import Checkpoint

    if path is None:
        if resume:
            raise CommandError("--resume needs --checkpoint, the file to go on from")
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    return Checkpoint(path, resume and path.exists())


def _say_how_to_go_on(checkpoint: Path | None) -> None:
    if checkpoint is not None and checkpoint.exists():
        stderr.print(f"interrupted; {checkpoint} is whole: go on with --resume", soft_wrap=True, highlight=False)


def training_record(
    plan: "NetworkPlan", record: "TrainingRecord", policy: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Give what is remembered of a training as plain JSON values; `offramp export` rebuilds the network from it.

    Args:
        plan: What decided the network.
        record: What was done and what came of it.
        policy: The policy to export with.
    """
    return plan.to_json() | record.to_json() | {"policy": None if policy is None else dict(policy)}


def save(network: "nn.Module", record: Mapping[str, Any], out: Path) -> None:
    """Write weights (loadable with `weights_only=True`) and, beside them, the record as JSON."""
    from offramp_models.training import write_whole

    write_whole(network.state_dict(), out)
    record_path(out).write_text(json.dumps(record, indent=1) + "\n")


def record_path(weights: Path) -> Path:
    """Give where the record of some weights is kept."""
    return weights.with_suffix(".json")


def read_policy(text: str) -> dict[str, Any]:
    """Read a policy as a person writes it: a kind, or the JSON of a policy; gives its JSON."""
    from offramp_contract.policy_spec import parse_policy

    try:
        written = json.loads(text) if text.lstrip().startswith("{") else text
    except json.JSONDecodeError:
        raise CommandError(f"--policy {text!r} is not valid JSON") from None
    spec: dict[str, Any] = parse_policy(written).model_dump(mode="json")
    return spec


def _report(record: "TrainingRecord") -> None:
    table = Table("exit", "test accuracy", box=None, pad_edge=False)
    for index, accuracy in enumerate(record.test_accuracy_E):
        table.add_row(f"exit_{index}", f"{accuracy:.1%}")
    stdout.print(table)
    if record.test_gates is not None:
        table = Table("gate", "open on test images", box=None, pad_edge=False)
        for index, share in enumerate(record.test_gates.open_share_G):
            table.add_row(f"gate_{index}", f"{share:.1%}")
        stdout.print("", table, f"\n{_use(record.test_gates)}", highlight=False)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise CommandError(f"--exit-weights {text!r}: write numbers with commas between, such as 0.5,1,1,2") from None


def _knobs(written: Sequence[str]) -> dict[str, object]:
    return dict(_knob(text) for text in written)


def _knob(text: str) -> tuple[str, int | list[int]]:
    name, equals, value = text.partition("=")
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not equals or not numbers:
        raise CommandError(f"--knob {text!r}: write its name and whole numbers, such as blocks=2 or widths=8,16,32")
    return name.strip(), numbers if "," in value else numbers[0]

"""`offramp export`: a trained network, or a multi-exit ONNX file, becomes a proved bundle."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from offramp_cli.console import stderr, stdout
from offramp_cli.errors import CommandError
from offramp_cli.train import read_policy

if TYPE_CHECKING:
    from offramp_contract.manifest import Manifest
    from offramp_exporter.examples import ExampleInputs
    from offramp_exporter.exits import ExitNames
    from offramp_models.data import ImageDataSet
    from offramp_models.networks import NetworkPlan
    from torch import nn

NUM_EXAMPLES = 16


def export(
    target: Annotated[
        str, typer.Argument(help="package.module:factory, one of `offramp models`, or a multi-exit model.onnx.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="The bundle's folder; it must not exist yet.")],
    weights: Annotated[Path | None, typer.Option(help="A state_dict that torch.save wrote.")] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(help="Shape of one row: 3x32x32, or by input ids=128:int64. Once for every input."),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            help="Which returned tensors (or tensors of the ONNX file) are exits, in order of depth: a,b,c; "
            "early=a,late=b also names them. Unset: every float tensor of shape (batch, classes)."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the server; unset: after the class.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file with a class name on each line.")] = None,
    preprocessing: Annotated[
        Path | None, typer.Option(help="How images or texts become inputs: the manifest's JSON object.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The tokenizer.json of a text preprocessing.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Take example, labels and preprocessing from this data set of `offramp models`.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data set's files; unset: that of OFFRAMP_DATA, else they are downloaded once."
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy of requests that name none: a kind, or the JSON of a policy.")
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file to keep in the manifest's provenance; the one that `offramp train` writes also says how "
            "the network was built and with which policy it is to serve."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a bundle that is there.")] = False,
) -> None:
    """Cut a network into stages, prove that they equal it, and write the bundle; or write nothing and say why."""
    from offramp_exporter import export as export_module
    from offramp_exporter import export_onnx

    described = _description(data, data_dir, labels, preprocessing, training)
    inputs = _inputs(example or [], described.data)
    options: dict[str, Any] = {
        "name": name,
        "labels": described.labels,
        "preprocessing": described.preprocessing,
        "tokenizer": tokenizer,
        "default_policy": _default_policy(policy, described.training),
        "training": described.training,
        "overwrite": overwrite,
    }
    wanted = None if exits is None else _exit_names(exits)
    with step_by_step() as step:
        if target.endswith(".onnx"):
            if wanted is None:
                raise CommandError("an ONNX file needs --exits: the names of the tensors that hold the exits' logits")
            arrays = _arrays(inputs)
            bundle = export_onnx(target, wanted, out, example_inputs=arrays, progress=step, **options)
        else:
            if inputs is None:
                raise CommandError("a network needs --example, the shape of one row such as 3x32x32, or --data")
            module = _module(target, weights, described)
            bundle = export_module(module, inputs, out, exits=wanted, progress=step, **options)
    print_stages(bundle.manifest)
    stdout.print(f"\nbundle: {out}   serve it:  offramp serve {out}", soft_wrap=True, highlight=False)


@contextmanager
def step_by_step() -> Iterator[Any]:
    """Give a function that shows the step that is under way and ticks off the one before."""
    under_way: list[str] = []
    with stderr.status("starting") as status:

        def step(sentence: str) -> None:
            if under_way:
                stderr.print(f"[green]✓[/] {under_way.pop()}", highlight=False)
            under_way.append(sentence)
            status.update(sentence)

        yield step
        if under_way:
            stderr.print(f"[green]✓[/] {under_way.pop()}", highlight=False)


def print_stages(manifest: "Manifest") -> None:
    """Print what the bundle's stages cost and what crosses their boundaries."""
    table = Table("stage", "exit", box=None, pad_edge=False)
    table.add_column("FLOPs", justify="right")
    table.add_column("depth", justify="right")
    table.add_column("emits")
    table.add_column("carried per row", justify="right")
    depths = manifest.exit_depths
    for stage in manifest.stages:
        exit_name = "" if stage.exit is None else manifest.exits[stage.exit].name
        depth = "" if stage.exit is None else f"{depths[stage.exit]:.1%}"
        carried = f"{stage.carry_bytes:,} bytes" if stage.carry_bytes else ""
        table.add_row(stage.name, exit_name, f"{stage.flops:,}", depth, ", ".join(stage.outputs), carried)
    stdout.print(table)
    stdout.print(
        f"\n{manifest.name} {manifest.model_digest[:12]}: {len(manifest.exits)} exits equal the network's on every "
        "batch size tried, within 1e-4 + 1e-4·|logit|",
        soft_wrap=True,
        highlight=False,
    )


@dataclass(frozen=True, slots=True)
class _Described:
    data: "ImageDataSet | None"
    labels: Sequence[str] | None
    preprocessing: Any
    training: Mapping[str, Any] | None


def _description(
    data: str | None, data_dir: Path | None, labels: Path | None, preprocessing: Path | None, training: Path | None
) -> _Described:
    record = None if training is None else _json_object(training)
    images = None if data is None else _data_set(data, data_dir, record or {})
    return _Described(
        images,
        _lines(labels) if labels is not None else images.label_names if images is not None else None,
        _preprocessing(preprocessing) if preprocessing is not None else images.preprocessing if images else None,
        record,
    )


def _data_set(name: str, data_dir: Path | None, record: Mapping[str, Any]) -> "ImageDataSet":
    """Load a data set, in the splits of the training if there was one."""
    from offramp_models import load_data

    if record.get("data", name) != name:
        raise CommandError(f"--data is {name}, but the network was trained on {record['data']}")
    settings = record.get("settings")
    seed = settings.get("seed", 0) if isinstance(settings, dict) else 0
    try:
        return load_data(name, seed if isinstance(seed, int) and seed >= 0 else 0, data_dir)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _module(target: str, weights: Path | None, described: _Described) -> "nn.Module":
    """Give the network to export: one of ours, as its record and data say it was built, or one of the user's."""
    from offramp_exporter import load_module, load_weights
    from offramp_models.networks import NETWORKS

    if target not in NETWORKS:
        return load_module(target, weights)
    try:
        module = _plan(target, described).build()
    except ValueError as error:
        raise CommandError(str(error)) from None
    if weights is not None:
        load_weights(module, weights)
    return module.eval()


def _plan(network: str, described: _Described) -> "NetworkPlan":
    from offramp_models.networks import NetworkPlan, plan_network

    plan = NetworkPlan.from_record(described.training or {})
    if plan is not None and plan.network != network:
        raise CommandError(f"the record is that of a {plan.network}; export that, not {network}")
    if plan is not None:
        return plan
    if described.data is None:
        return plan_network(network)
    shape, num_classes = described.data.input_shape, len(described.data.label_names)
    return plan_network(network, input_shape=shape, num_classes=num_classes)


def _inputs(examples: Sequence[str], data: "ImageDataSet | None") -> "ExampleInputs | None":
    import torch
    from offramp_exporter import parse_example

    if examples:
        return parse_example(",".join(examples))
    return None if data is None else torch.from_numpy(data.inputs(data.calibration)[:NUM_EXAMPLES])


def _arrays(inputs: "ExampleInputs | None") -> dict[str, Any] | None:
    if inputs is None:
        return None
    if not isinstance(inputs, Mapping):
        raise CommandError("an ONNX file's inputs have names: write --example NAME=3x32x32")
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _exit_names(text: str) -> "ExitNames":
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise CommandError("--exits names nothing; write the exits with commas between")
    named = [part.partition("=") for part in parts]
    if all(equals for _, equals, _ in named):
        return {name: path for name, _, path in named}
    return parts


def _default_policy(asked: str | None, record: Mapping[str, Any] | None) -> Any:
    """Give the policy that is asked for, else the one that the training's record holds, else None."""
    from offramp_contract.policy_spec import parse_policy

    if asked is not None:
        return parse_policy(read_policy(asked))
    recorded = (record or {}).get("policy")
    return None if recorded is None else parse_policy(recorded)


def _preprocessing(path: Path) -> Any:
    from offramp_contract.manifest import Preprocessing
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Preprocessing).validate_python(_json_object(path))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise CommandError(f"{path}, {where or 'preprocessing'}: {problem['msg']}") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text())
    except ValueError:
        raise CommandError(f"{path} is not JSON") from None
    if not isinstance(written, dict):
        raise CommandError(f"{path} is not a JSON object")
    return written


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise CommandError(f"{path} holds no labels")
    return lines

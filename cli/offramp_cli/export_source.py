"""What `offramp export` is given: the network, its example inputs, and what else its flags and record say of it."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp_cli.errors import CommandError
from offramp_cli.train import read_policy

if TYPE_CHECKING:
    from offramp_exporter.examples import ExampleInputs
    from offramp_models.data import ImageDataSet
    from offramp_models.networks import NetworkPlan
    from torch import nn

NUM_EXAMPLES = 16


@dataclass(frozen=True, slots=True)
class Described:
    """What is known of a network beside its code.

    Attributes:
        data: The data set that `--data` names.
        labels: A name per class.
        preprocessing: How images or texts become inputs.
        training: The record of the training.
    """

    data: "ImageDataSet | None"
    labels: Sequence[str] | None
    preprocessing: Any
    training: Mapping[str, Any] | None


def describe(
    data: str | None, data_dir: Path | None, labels: Path | None, preprocessing: Path | None, training: Path | None
) -> Described:
    """Read what the flags name; a data set says what no flag does."""
    record = None if training is None else _json_object(training)
    images = None if data is None else _data_set(data, data_dir, record or {})
    return Described(
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


def read_module(target: str, weights: Path | None, described: Described) -> "nn.Module":
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


def _plan(network: str, described: Described) -> "NetworkPlan":
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


def read_inputs(examples: Sequence[str], data: "ImageDataSet | None") -> "ExampleInputs | None":
    """Make the example inputs: of the shapes that are given, else the first images of the data set, else None."""
    import torch
    from offramp_exporter import parse_example

    if examples:
        return parse_example(",".join(examples))
    return None if data is None else torch.from_numpy(data.inputs(data.calibration)[:NUM_EXAMPLES])


def read_proof_inputs(path: Path | None, data: "ImageDataSet | None") -> "ExampleInputs | None":
    """Read the real inputs to prove a bundle on: those of a file, else the data set's calibration images, else None."""
    import numpy as np
    import torch

    if path is None:
        return None if data is None else torch.from_numpy(data.inputs(data.calibration))
    try:
        with path.open("rb") as file:
            held = np.load(file, allow_pickle=False)
            if isinstance(held, np.ndarray):
                return torch.from_numpy(held)
            return {name: torch.from_numpy(held[name]) for name in held.files}
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, EOFError, OSError, MemoryError, zipfile.BadZipFile):
        raise CommandError(f"--proof-inputs: {path} holds no arrays of numbers; save it with numpy.save") from None


def arrays_of(inputs: "ExampleInputs | None") -> dict[str, Any] | None:
    """Give inputs as numpy arrays by name, as an ONNX file takes them."""
    if inputs is None:
        return None
    if not isinstance(inputs, Mapping):
        raise CommandError("an ONNX file's inputs have names: write --example NAME=3x32x32")
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def read_default_policy(asked: str | None, record: Mapping[str, Any] | None) -> Any:
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

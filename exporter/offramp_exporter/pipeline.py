"""export(): a trained network becomes a proved bundle, or nothing is written."""

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from offramp_contract.manifest import Preprocessing, Provenance
from offramp_contract.policy_spec import ConfidenceSpec, PolicySpec
from offramp_contract.statistics import FloatArray
from offramp_runtime import Bundle, Device, open_bundle, open_device
from torch import nn

from offramp_exporter.batch_range import Reference, find_batch_range
from offramp_exporter.examples import ExampleInputs, Examples
from offramp_exporter.exits import ExitNames
from offramp_exporter.onnx_door import program_of_file, read_onnx, whole_graph_reference
from offramp_exporter.program import Program
from offramp_exporter.publish import published
from offramp_exporter.split import split
from offramp_exporter.trace import evaluating, trace
from offramp_exporter.verify import prove_parity, prove_structure
from offramp_exporter.write import Description, write_bundle

Progress = Callable[[str], None]


def export(
    module: nn.Module,
    example_inputs: ExampleInputs,
    out: str | Path,
    *,
    exits: ExitNames | None = None,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tokenizer: str | Path | None = None,
    default_policy: PolicySpec | None = None,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Turn a multi-exit network into a bundle that is proved to equal it.

    Args:
        module: A network whose `forward` returns its exits' logits (list, tuple, dict, dataclass, nested), a
            `StagedModule`, or a module with `stages` and `exit_heads`.
        example_inputs: What it takes, the batch on axis 0: a tensor, tensors in order, or tensors by parameter name.
        out: The bundle's folder, which must not exist yet.
        exits: Which returned tensors are exits, by path (`[0]`, `['early']`, `.logits[:]`), in order of depth; a
            mapping also names them. None takes every float tensor of shape (batch, classes).
        name: The model's name in the server; None makes one of the class.
        labels: A name per class.
        preprocessing: How images or texts become inputs.
        tokenizer: The `tokenizer.json` that a text preprocessing uses; it is copied in.
        default_policy: The policy of requests that name none.
        training: What to remember of the training; JSON values.
        overwrite: Replace a bundle that is there.
        progress: Called with a sentence per step.

    Returns:
        The bundle, opened.

    Raises:
        TraceError: If the network cannot be traced, with the line and what to do.
        SplitError: If it cannot be cut into stages, naming the node or tensor.
        ParityError: If staged execution does not equal the network, naming the tensor.
        ExportError: If `out` exists, or the description does not fit the network.
    """
    report = progress or _silent
    with evaluating(module), published(Path(out), overwrite) as folder:
        report(f"tracing {type(module).__name__}")
        traced = trace(module, example_inputs, exits, None if labels is None else len(labels))
        found = ", ".join(f"{exit_} = out{path}" for exit_, path in traced.paths.items())
        report(
            f"found {len(traced.paths)} exit{'s' if len(traced.paths) > 1 else ', so no row can leave early'}: {found}"
        )
        provenance = Provenance(
            source=f"{type(module).__module__}.{type(module).__qualname__}",
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            opset=traced.program.opset,
            versions=_versions("torch", "onnx", "onnxscript", "onnxruntime"),
            training=dict(training or {}),
        )
        description = Description(
            name or _model_name(type(module).__name__),
            provenance,
            labels,
            preprocessing,
            None if tokenizer is None else Path(tokenizer),
            default_policy or ConfidenceSpec(),
        )

        def network(inputs: Examples) -> list[FloatArray]:
            return [scores_BC.detach().cpu().numpy() for scores_BC in inputs.call(traced.network)]

        device = open_device("cpu")
        _write_and_prove(
            folder, traced.program, network, traced.examples, device=device, description=description, report=report
        )
    return open_bundle(Path(out))


def export_onnx(
    path: str | Path,
    exits: ExitNames,
    out: str | Path,
    *,
    example_inputs: Mapping[str, np.ndarray] | None = None,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tokenizer: str | Path | None = None,
    default_policy: PolicySpec | None = None,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Turn a multi-exit ONNX file, from any framework, into a bundle that is proved to equal it.

    Args:
        path: The file; every input has a symbolic batch on axis 0.
        exits: Names of the tensors that hold the exits' logits, in order of depth, intermediate ones too; a mapping
            also names the exits.
        out: See `export`, as for the other arguments.
        example_inputs: Arrays by input name; they fix further dynamic dimensions. None proves on random inputs only.
        name: The model's name in the server; None makes one of the file's.
        labels: A name per class.
        preprocessing: How images or texts become inputs.
        tokenizer: The `tokenizer.json` that a text preprocessing uses.
        default_policy: The policy of requests that name none.
        training: What to remember of the training; JSON values.
        overwrite: Replace a bundle that is there.
        progress: Called with a sentence per step.

    Returns:
        The bundle, opened.

    Raises:
        TraceError: If the file or an exit's name is no good, with what to do.
        SplitError: If it cannot be cut into stages, naming the node or tensor.
        ParityError: If staged execution does not equal the whole graph, naming the tensor.
        ExportError: If `out` exists, or the description does not fit the network.
    """
    path, report = Path(path), progress or _silent
    with published(Path(out), overwrite) as folder:
        report(f"reading {path.name}")
        program, whole, examples = program_of_file(read_onnx(path), exits, example_inputs)
        provenance = Provenance(
            source=path.name,
            parameters=sum(int(np.prod(tensor.dims)) for tensor in whole.graph.initializer),
            opset=program.opset,
            versions=_versions("onnx", "onnxruntime"),
            training=dict(training or {}),
        )
        description = Description(
            name or _model_name(path.stem),
            provenance,
            labels,
            preprocessing,
            None if tokenizer is None else Path(tokenizer),
            default_policy or ConfidenceSpec(),
        )
        device = open_device("cpu")
        network = whole_graph_reference(whole, list(program.exits.values()), device)
        _write_and_prove(folder, program, network, examples, device=device, description=description, report=report)
    return open_bundle(Path(out))


def _write_and_prove(
    folder: Path,
    program: Program,
    network: Reference,
    examples: Examples,
    *,
    device: Device,
    description: Description,
    report: Progress,
) -> None:
    report(f"cutting {len(program.nodes)} nodes into {len(program.exits)} stages")
    plans = split(program)
    prove_structure(program, plans)
    batches = find_batch_range(network, examples)
    write_bundle(folder, program, plans, description, batches)
    report(f"proving parity at batch {', '.join(map(str, batches.proved))}")
    prove_parity(open_bundle(folder), device, network, examples, batches.proved)


def _model_name(text: str) -> str:
    """Make a model's name of a class or file name: `ResNetEE` -> `res-net-ee`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text)
    return re.sub(r"[^a-z0-9._-]+", "-", words.lower()).strip("-._")[:128] or "model"


def _versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("offramp", *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _silent(_: str) -> None:
    """Report nothing."""

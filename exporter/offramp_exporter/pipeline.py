"""export(): a trained network becomes a proved bundle, or nothing is written."""

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from offramp_contract.errors import ParityError
from offramp_contract.manifest import Preprocessing, Provenance
from offramp_contract.policy_spec import ConfidenceSpec, NativeSpec, PolicySpec
from offramp_contract.statistics import FloatArray
from offramp_runtime import Bundle, Device, StageExecutor, open_bundle, open_device
from torch import nn

from offramp_exporter.batch_range import BatchRange, Reference, find_batch_range
from offramp_exporter.early_returns.native_proof import Own
from offramp_exporter.examples import ExampleInputs, Examples, read_examples
from offramp_exporter.exits import ExitNames
from offramp_exporter.gating.interpret import Interpreter
from offramp_exporter.gating.proof import prove_gates, prove_spared
from offramp_exporter.gating.specialize import specialize
from offramp_exporter.given import read_given
from offramp_exporter.half import Precision, half_program
from offramp_exporter.onnx_door import program_of_file, read_onnx, whole_graph_reference
from offramp_exporter.program import Program
from offramp_exporter.publish import published
from offramp_exporter.row_independence import prove_rows_independent
from offramp_exporter.split import split
from offramp_exporter.trace import Trace, evaluating, trace
from offramp_exporter.varied import prove_varied
from offramp_exporter.verify import load, prove_parity, prove_structure
from offramp_exporter.write import Description, record_proof, write_bundle

Progress = Callable[[str], None]


def export(
    module: nn.Module,
    example_inputs: ExampleInputs,
    out: str | Path,
    *,
    exits: ExitNames | None = None,
    gates: ExitNames | None = None,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tokenizer: str | Path | None = None,
    default_policy: PolicySpec | None = None,
    training: Mapping[str, Any] | None = None,
    proof_inputs: ExampleInputs | None = None,
    precision: Precision = "fp32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Turn a multi-exit network into a bundle that is proved to equal it.

    Args:
        module: A network whose `forward` returns its exits' logits (list, tuple, dict, dataclass, nested), a
            `StagedModule`, or a module with `stages` and `exit_heads`.
        example_inputs: What it takes, the batch on axis 0: a tensor, tensors in order, or tensors by parameter name.
        out: The bundle's folder, which must not exist yet.
        exits: Which returned tensors are exits, in order of depth, by path: `out[0]`, `out['early']`, `out.logits[:]`,
            `out[:][1]`, `self.early.scores`, `stack(out, dim=1)`, `log(out[1])`; a mapping also names them; and
            `final-first` says that the deepest comes first. None takes every float tensor of shape (batch, classes).
        gates: Which returned tensors are decisions of gates, 0 or 1 for each row, written as exits are; those that
            `offramp_models.gates.gate` makes are found without a word.
        name: The model's name in the server; None makes one of the class.
        labels: A name per class.
        preprocessing: How images or texts become inputs.
        tokenizer: The `tokenizer.json` that a text preprocessing uses; it is copied in.
        default_policy: The policy of requests that name none.
        training: What to remember of the training; JSON values.
        proof_inputs: Real inputs, as many as there are, to prove the bundle on; calibration data for one.
        precision: `fp16` writes weights and values in float16, proved against the network as it is at a tolerance of
            2e-2 + 2e-2·|logit|; inputs, logits and all decisions stay float32.
        overwrite: Replace a bundle that is there.
        progress: Called with a sentence per step.

    Returns:
        The bundle, opened.

    Raises:
        TraceError: If the network cannot be traced, with the line and what to do.
        SplitError: If it cannot be cut into stages, naming the node or tensor.
        ParityError: If staged execution does not equal the network, naming the tensor.
        ExportError: If `out` exists, or the description or the proof inputs do not fit the network.
    """
    report = progress or _silent
    given = None if proof_inputs is None else read_given(proof_inputs, read_examples(module, example_inputs))
    with evaluating(module), published(Path(out), overwrite) as folder:
        report(f"tracing {type(module).__name__}")
        traced = trace(module, example_inputs, exits, None if labels is None else len(labels), gates)
        _report_found(traced, report)
        description = Description(
            name or _model_name(type(module).__name__),
            _provenance(module, traced, training),
            labels,
            preprocessing,
            None if tokenizer is None else Path(tokenizer),
            default_policy or (ConfidenceSpec() if traced.returns is None else NativeSpec()),
            rules={} if traced.returns is None else traced.returns.rules,
            predicates=traced.predicates,
        )

        def network(inputs: Examples) -> list[FloatArray]:
            return [scores_BC.detach().cpu().numpy() for scores_BC in inputs.call(traced.network)]

        _write_and_prove(
            folder,
            traced.program,
            network,
            traced.examples,
            given=given,
            own=traced.returns,
            device=open_device("cpu"),
            description=description,
            report=report,
            precision=precision,
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
    proof_inputs: ExampleInputs | None = None,
    precision: Precision = "fp32",
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
        proof_inputs: Real inputs, by name or in order, as many as there are, to prove the bundle on.
        precision: See `export`.
        overwrite: Replace a bundle that is there.
        progress: Called with a sentence per step.

    Returns:
        The bundle, opened.

    Raises:
        TraceError: If the file or an exit's name is no good, with what to do.
        SplitError: If it cannot be cut into stages, naming the node or tensor.
        ParityError: If staged execution does not equal the whole graph, naming the tensor.
        ExportError: If `out` exists, or the description or the proof inputs do not fit the network.
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
        given = None if proof_inputs is None else read_given(proof_inputs, examples)
        _write_and_prove(
            folder,
            program,
            network,
            examples,
            given=given,
            device=device,
            description=description,
            report=report,
            precision=precision,
        )
    return open_bundle(Path(out))


def _report_found(traced: Trace, report: Progress) -> None:
    found = ", ".join(f"{exit_} = {path}" for exit_, path in traced.paths.items())
    report(f"found {len(traced.paths)} exit{'s' if len(traced.paths) > 1 else ', so no row can leave early'}: {found}")
    for note in traced.notes:
        report(note)


def _provenance(module: nn.Module, traced: Trace, training: Mapping[str, Any] | None) -> Provenance:
    return Provenance(
        source=f"{type(module).__module__}.{type(module).__qualname__}",
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        opset=traced.program.opset,
        versions=_versions("torch", "onnx", "onnxscript", "onnxruntime"),
        training=dict(training or {}),
    )


def _write_and_prove(
    folder: Path,
    program: Program,
    network: Reference,
    examples: Examples,
    *,
    device: Device,
    description: Description,
    report: Progress,
    precision: Precision,
    given: Examples | None = None,
    own: Own | None = None,
) -> None:
    if precision == "fp16":
        report("writing weights and values in float16")
        program = half_program(program)
    specialized = specialize(program)
    if specialized.gating is not None:
        names = [gate.name for gate in specialized.gating.gates]
        report(f"found {len(names)} gate{'s' if len(names) != 1 else ''}: {', '.join(names)}")
    plans = split(specialized)
    report(f"cutting {len(specialized.nodes)} nodes into {len(plans)} stages")
    prove_structure(specialized, plans)
    prove_spared(program, specialized, plans)
    batches = find_batch_range(network, examples)
    prove_rows_independent(network, program, examples, batches)
    manifest = write_bundle(folder, specialized, plans, description, batches)
    executor = load(open_bundle(folder), device)
    try:
        _prove_as_called(executor, program, network, examples, batches=batches, report=report)
        proof = prove_varied(executor, network, examples, given=given, own=own, batch=batches.proved[-1], report=report)
    except ParityError as error:
        if precision == "fp16":
            raise ParityError(f"{error.message}; float16 may be too coarse for it: export it in fp32") from error
        raise
    record_proof(folder, manifest, proof)


def _prove_as_called(
    executor: StageExecutor,
    program: Program,
    network: Reference,
    examples: Examples,
    *,
    batches: BatchRange,
    report: Progress,
) -> None:
    """Prove parity on the example and on random inputs like it."""
    report(f"proving parity at batch {', '.join(map(str, batches.proved))}")
    if not program.marks:
        prove_parity(executor, network, examples, batches.proved)
        return
    num_flips = prove_gates(executor, Interpreter(program, executor.device), network, examples, batches.proved)
    if num_flips:
        report(f"{num_flips} rows lie within rounding of a gate's threshold and are decided otherwise")


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

"""Writes a bundle's files and its manifest into a folder; reads nothing back."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from offramp_contract.errors import ExportError, InvalidValue
from offramp_contract.manifest import (
    MANIFEST_FILE,
    Exit,
    File,
    Gate,
    ImagePreprocessing,
    Manifest,
    Merge,
    NativeRule,
    Predicate,
    Preprocessing,
    Proof,
    Provenance,
    SharedWeights,
    Stage,
    Tensor,
    TextPreprocessing,
)
from offramp_contract.policy_spec import ConfidenceSpec, PolicySpec
from pydantic import ValidationError

from offramp_exporter.batch_range import BatchRange
from offramp_exporter.boundary import Crossing, crossings
from offramp_exporter.cost import carry_bytes, stage_flops
from offramp_exporter.decide import add_decision
from offramp_exporter.emit import stage_graph
from offramp_exporter.half import is_half
from offramp_exporter.program import Program
from offramp_exporter.shared import WEIGHTS_FILE, Sharing, share
from offramp_exporter.split import StagePlan

TOKENIZER_FILE: Final = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Description:
    """What a bundle says of itself beside its graphs.

    Attributes:
        name: The model's name in the server.
        provenance: Where it comes from.
        labels: A name per class.
        preprocessing: How images or texts become inputs.
        tokenizer: The `tokenizer.json` to copy into the bundle, for texts.
        default_policy: The policy of requests that name none.
        rules: How the network itself leaves at an exit, by the exit's name.
        predicates: What its code asks of its tensors.
    """

    name: str
    provenance: Provenance
    labels: Sequence[str] | None = None
    preprocessing: Preprocessing | None = None
    tokenizer: Path | None = None
    default_policy: PolicySpec = field(default_factory=ConfidenceSpec)
    rules: Mapping[str, NativeRule] = field(default_factory=dict)
    predicates: Sequence[Predicate] = ()


def write_bundle(
    folder: Path, program: Program, plans: Sequence[StagePlan], description: Description, batches: BatchRange
) -> Manifest:
    """Write stage graphs, shared weights, tokenizer and manifest into an empty folder.

    Raises:
        ExportError: If the description does not fit the network.
    """
    crossing = crossings(program, plans)
    exits = exits_of(program, plans, description.rules)
    sharing = share(program, plans)
    (folder / "stages").mkdir()
    if sharing.content:
        (folder / WEIGHTS_FILE).write_bytes(sharing.content)
    stages = []
    for stage, graph in write_stages(program, plans, crossing, exits, sharing):
        (folder / stage.graph.path).write_bytes(graph)
        stages.append(stage)
    manifest = _manifest(
        program,
        plans,
        crossing=crossing,
        stages=stages,
        exits=exits,
        shared_weights=sharing.described(),
        description=_with_tokenizer(folder, description),
        batches=batches,
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest


def record_proof(folder: Path, manifest: Manifest, proof: Proof) -> Manifest:
    """Write into a bundle's manifest what it was proved on."""
    provenance = manifest.provenance.model_copy(update={"proof": proof})
    proved = manifest.model_copy(update={"provenance": provenance})
    (folder / MANIFEST_FILE).write_bytes(proved.to_bytes())
    return proved


def write_stages(
    program: Program,
    plans: Sequence[StagePlan],
    crossing: Mapping[str, Crossing],
    exits: Sequence[Exit],
    sharing: Sharing,
) -> Iterator[tuple[Stage, bytes]]:
    """Write every stage's graph, in order, and what the manifest says of it.

    Args:
        program: What the plans index.
        plans: One a stage.
        crossing: How each model input and carry crosses, by the program's name.
        exits: In the order of the stages that end in them.
        sharing: The weights that lie in a file beside the graphs.
    """
    ends = {exit_.name: (position, exit_) for position, exit_ in enumerate(exits)}
    for index, plan in enumerate(plans):
        position, exit_ = (None, None) if plan.exit is None else ends[plan.exit]
        gate_scores = f"stage_{index}.gate_scores" if plan.scored else None
        model = stage_graph(program, plan, crossing, exit_, gate_scores)
        if exit_ is not None:
            add_decision(model, exit_, plan.native)
        sharing.refer(model)
        graph = model.SerializeToString(deterministic=True)
        stage = Stage(
            name=f"stage_{index}",
            graph=File(path=f"stages/{index:02}.onnx", sha256=hashlib.sha256(graph).hexdigest()),
            inputs=tuple(crossing[name].tensor.name for name in plan.reads),
            outputs=tuple(crossing[name].tensor.name for name in plan.emits),
            exit=position,
            scores=gate_scores,
            gates=plan.gates,
            merges=tuple(
                Merge(run=crossing[one.run].tensor.name, skip=crossing[one.skip].tensor.name) for one in plan.merges
            ),
            flops=stage_flops(program, plan),
            carry_bytes=carry_bytes(plans, crossing, index),
        )
        yield stage, graph


def exits_of(program: Program, plans: Sequence[StagePlan], rules: Mapping[str, NativeRule]) -> list[Exit]:
    """Describe the exits, in order.

    Raises:
        ExportError: If the network has tensors of the names that the graphs need.
    """
    return [
        _exit(program, plan.exit, plan.scores, index, rules)
        for index, plan in enumerate(plans)
        if plan.exit is not None and plan.scores is not None
    ]


def _exit(program: Program, name: str, scores: str, index: int, rules: Mapping[str, NativeRule]) -> Exit:
    width = program.shapes[scores][1]
    exit_ = Exit(
        name=name,
        stage=index,
        logits=f"{name}.logits",
        decision=f"{name}.decision",
        temperature=f"{name}.temperature",
        num_classes=width if isinstance(width, int) else 0,
        native=rules.get(name),
    )
    taken = {exit_.logits, exit_.decision, exit_.temperature} - {scores}
    if taken & {*program.producer, *program.inputs, *program.initializers}:
        raise ExportError(f"exit {name!r}: the network has tensors of that name; name its exits otherwise")
    return exit_


def _manifest(
    program: Program,
    plans: Sequence[StagePlan],
    *,
    crossing: Mapping[str, Crossing],
    stages: Sequence[Stage],
    exits: Sequence[Exit],
    shared_weights: SharedWeights | None,
    description: Description,
    batches: BatchRange,
) -> Manifest:
    inputs = tuple(crossing[name].tensor for name in program.inputs)
    if description.preprocessing is not None:
        _check_preprocessing(description.preprocessing, inputs)
    stages_scoring = {gate: index for index, plan in enumerate(plans) for gate in plan.scored}
    try:
        return Manifest(
            name=description.name,
            precision="fp16" if is_half(program) else "fp32",
            inputs=inputs,
            carries=tuple(one.tensor for name, one in crossing.items() if name not in program.inputs),
            stages=tuple(stages),
            exits=tuple(exits),
            gates=_gates(program, stages_scoring),
            predicates=tuple(description.predicates),
            shared_weights=shared_weights,
            labels=None if description.labels is None else tuple(description.labels),
            preprocessing=description.preprocessing,
            default_policy=description.default_policy,
            min_batch=batches.smallest,
            max_batch=batches.largest,
            provenance=description.provenance,
        )
    except (ValidationError, InvalidValue) as error:
        problem = error.message if isinstance(error, InvalidValue) else _first_problem(error)
        raise ExportError(f"the bundle's description does not fit the network: {problem}") from None


def _gates(program: Program, stage_of: Mapping[int, int]) -> tuple[Gate, ...]:
    planned = () if program.gating is None else program.gating.gates
    return tuple(
        Gate(name=gate.name, stage=stage_of.get(index), priority=gate.priority, threshold=gate.threshold)
        for index, gate in enumerate(planned)
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"].removeprefix("Value error, ")


def _with_tokenizer(folder: Path, description: Description) -> Description:
    """Copy the tokenizer in and name the copy in the preprocessing."""
    preprocessing = description.preprocessing
    if not isinstance(preprocessing, TextPreprocessing):
        return description
    source = description.tokenizer or Path(preprocessing.tokenizer.path)
    if not source.is_file():
        raise ExportError(f"tokenizer: {str(source)!r} is no file; name the tokenizer.json of the network's texts")
    copied = preprocessing.model_copy(update={"tokenizer": _write(folder, TOKENIZER_FILE, source.read_bytes())})
    return replace(description, preprocessing=copied)


def _check_preprocessing(preprocessing: Preprocessing, inputs: Sequence[Tensor]) -> None:
    by_name = {tensor.name: tensor for tensor in inputs}
    if isinstance(preprocessing, ImagePreprocessing):
        image = (len(preprocessing.mode), preprocessing.height, preprocessing.width)
        if len(inputs) != 1 or math.prod(inputs[0].shape) != math.prod(image) or inputs[0].dtype != "float32":
            raise ExportError(
                f"preprocessing: images become one float32 input of shape {image}; the network takes {_spell(inputs)}"
            )
        return
    for name in filter(None, (preprocessing.ids, preprocessing.mask)):
        if name not in by_name or by_name[name].shape != (preprocessing.length,):
            raise ExportError(
                f"preprocessing: texts become the input {name!r} of shape ({preprocessing.length},); "
                f"the network takes {_spell(inputs)}"
            )


def _spell(inputs: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.name} {tensor.dtype} {tensor.shape}" for tensor in inputs)


def _write(folder: Path, path: str, content: bytes) -> File:
    (folder / path).write_bytes(content)
    return File(path=path, sha256=hashlib.sha256(content).hexdigest())

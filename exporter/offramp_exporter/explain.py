"""What was understood of a network, before anything is written: facts of the program and its plans, for people."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from offramp_contract.manifest import NativeRule, Predicate, Tensor
from offramp_contract.policy_spec import ConfidenceSpec, NativeSpec, PolicySpec
from offramp_contract.statistics import FloatArray
from offramp_runtime import open_device
from torch import nn

from offramp_exporter.batch_range import BatchRange, Reference, find_batch_range
from offramp_exporter.boundary import Crossing, crossings
from offramp_exporter.cost import carried, carry_bytes, stage_flops
from offramp_exporter.early_returns.early_return import raising_note
from offramp_exporter.examples import ExampleInputs, Examples
from offramp_exporter.exits import ExitNames
from offramp_exporter.gating.proof import prove_spared
from offramp_exporter.gating.specialize import specialize
from offramp_exporter.half import is_half
from offramp_exporter.onnx_door import program_of_file, read_onnx, whole_graph_reference
from offramp_exporter.program import Program
from offramp_exporter.shared import share
from offramp_exporter.split import StagePlan, split
from offramp_exporter.trace import Trace, evaluating, trace
from offramp_exporter.verify import prove_structure

MAX_NAMED: Final = 3
"""Of many exits that an answer leads to, those that are named; the rest is counted."""


@dataclass(frozen=True, slots=True)
class ExplainedExit:
    """An exit and the stage that ends in it.

    Attributes:
        name: Its name.
        path: Where it is in what `forward` returned; the tensor's name for an ONNX file.
        num_classes: Its width.
        flops: Floating-point operations for one row of the stages behind the exit before it, all gates open.
        share: The same as a share of the full path's.
        depth: Share of the full path's operations that a row has run when it stands here.
        carries: What one row keeps alive across the boundary behind it.
        carry_bytes: Bytes of that.
        native: The network's own rule for leaving here, with its source lines; None if it has none.
    """

    name: str
    path: str
    num_classes: int
    flops: int
    share: float
    depth: float
    carries: tuple[Tensor, ...]
    carry_bytes: int
    native: str | None


@dataclass(frozen=True, slots=True)
class ExplainedGate:
    """A gate and what it decides about.

    Attributes:
        name: Its name.
        threshold: The network's own.
        stage: The stage that scores it; None where the score depends on no input.
        priority: That score.
        bodies: The stages that only run if it is open.
        flops: Floating-point operations of those for one row.
        share: The same as a share of the full path's.
        merges: What bodies make, with what stands for it where they do not run: `add_3, else relu_2`.
    """

    name: str
    threshold: float
    stage: int | None
    priority: float | None
    bodies: tuple[int, ...]
    flops: int
    share: float
    merges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was understood of a network.

    Attributes:
        source: The class or file.
        inputs: What it takes.
        exits: In order of depth.
        answers: What was answered to each data-dependent branch, with its line, a sentence each.
        notes: What else a person should know of how the network was read.
        batches: The batch sizes that it takes.
        precision: `fp32` or `fp16`.
        default_policy: The policy of requests that name none.
        num_nodes: Nodes of the whole program.
        shared_bytes: Bytes of the weights that several stages read and that are stored once.
        gates: In the order in which they decide.
        trunk_flops: Floating-point operations of one row whose gates are all shut.
    """

    source: str
    inputs: tuple[Tensor, ...]
    exits: tuple[ExplainedExit, ...]
    answers: tuple[str, ...]
    notes: tuple[str, ...]
    batches: BatchRange
    precision: str
    default_policy: PolicySpec
    num_nodes: int
    shared_bytes: int
    gates: tuple[ExplainedGate, ...] = ()
    trunk_flops: int = 0

    @property
    def full_flops(self) -> int:
        """Floating-point operations of one row that runs every stage."""
        return sum(exit_.flops for exit_ in self.exits)


@dataclass(frozen=True, slots=True)
class Read:
    """How a network was read, beside its program.

    Attributes:
        source: The class or file.
        paths: Where each exit was found, by its name.
        default_policy: The policy of requests that name none.
        native: The network's own rule for leaving at an exit, by the exit's name.
        answers: What was answered to its branches.
        notes: What else is to be known.
    """

    source: str
    paths: Mapping[str, str]
    default_policy: PolicySpec
    native: Mapping[str, str] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def explain(
    module: nn.Module,
    example_inputs: ExampleInputs,
    *,
    exits: ExitNames | None = None,
    gates: ExitNames | None = None,
    labels: Sequence[str] | None = None,
    default_policy: PolicySpec | None = None,
) -> Explanation:
    """Say what `export` would make of a network, without writing anything.

    Args:
        module: See `offramp_exporter.export`, as for the other arguments.
        example_inputs: What it takes.
        exits: Which returned tensors are exits.
        gates: Which returned tensors are decisions of gates.
        labels: A name per class.
        default_policy: The policy of requests that name none.

    Raises:
        TraceError: If the network cannot be traced, with the line and what to do.
        SplitError: If it cannot be cut into stages, naming the node or tensor.
    """
    with evaluating(module):
        traced = trace(module, example_inputs, exits, None if labels is None else len(labels), gates)
        read = _read(module, traced, default_policy)

        def network(inputs: Examples) -> list[FloatArray]:
            return [scores_BC.detach().cpu().numpy() for scores_BC in inputs.call(traced.network)]

        return explain_program(traced.program, network, traced.examples, read)


def explain_onnx(
    path: str | Path,
    exits: ExitNames,
    *,
    example_inputs: Mapping[str, np.ndarray] | None = None,
    default_policy: PolicySpec | None = None,
) -> Explanation:
    """Say what `export_onnx` would make of a file, without writing anything; see there and `explain`."""
    path = Path(path)
    program, whole, examples = program_of_file(read_onnx(path), exits, example_inputs)
    network = whole_graph_reference(whole, list(program.exits.values()), open_device("cpu"))
    read = Read(path.name, program.exits, default_policy or ConfidenceSpec())
    return explain_program(program, network, examples, read)


def explain_program(program: Program, network: Reference, examples: Examples, read: Read) -> Explanation:
    """Say what would be made of a program."""
    traced, program = program, specialize(program)
    plans = split(program)
    prove_structure(program, plans)
    prove_spared(traced, program, plans)
    crossing = crossings(program, plans)
    return Explanation(
        source=read.source,
        inputs=tuple(crossing[name].tensor for name in program.inputs),
        exits=tuple(_explained(program, plans, crossing, read)),
        answers=read.answers,
        notes=read.notes,
        batches=find_batch_range(network, examples),
        precision="fp16" if is_half(program) else "fp32",
        default_policy=read.default_policy,
        num_nodes=len(traced.nodes),
        shared_bytes=len(share(program, plans).content),
        gates=tuple(_explained_gates(program, plans)),
        trunk_flops=sum(stage_flops(program, plan) for plan in plans if not plan.gates),
    )


def _read(module: nn.Module, traced: Trace, default_policy: PolicySpec | None) -> Read:
    """Put into words how a network was read; what its own rules and branches say needs no note besides."""
    returns = traced.returns
    said = {*(() if returns is None else returns.notes()), *map(raising_note, traced.predicates)}
    return Read(
        source=f"{type(module).__module__}.{type(module).__qualname__}",
        paths=traced.paths,
        default_policy=default_policy or (ConfidenceSpec() if returns is None else NativeSpec()),
        native={} if returns is None else {name: f"{rule} at {_lines(rule)}" for name, rule in returns.rules.items()},
        answers=tuple(map(_answered, traced.predicates)),
        notes=tuple(note for note in traced.notes if note not in said),
    )


def _lines(rule: NativeRule) -> str:
    return "; ".join(rule.sources)


def _answered(predicate: Predicate) -> str:
    """Say where each answer to a question leads."""
    answers = []
    for word, answer in (("yes", True), ("no", False)):
        exits = [name for name, given in predicate.answers.items() if given is answer]
        if exits:
            more = f" and {len(exits) - MAX_NAMED} more" if len(exits) > MAX_NAMED else ""
            answers.append(f"{word} on the way to {', '.join(exits[:MAX_NAMED])}{more}")
        elif predicate.raises_on is not None:
            raises = predicate.raises_on is answer
            answers.append(f"{word} raises, where a bundle answers" if raises else f"{word} goes on")
    asked = f"{predicate.source}, {predicate.comparison}" if predicate.comparison else predicate.source
    return f"{asked}: {'; '.join(answers) or 'either answer leads to every exit'}"


def _explained(
    program: Program, plans: Sequence[StagePlan], crossing: Mapping[str, Crossing], read: Read
) -> list[ExplainedExit]:
    flops = [stage_flops(program, plan) for plan in plans]
    total, exits, start = max(sum(flops), 1), [], 0
    for index, plan in enumerate(plans):
        if plan.exit is None or plan.scores is None:
            continue
        width = program.shapes[plan.scores][1]
        own, start = sum(flops[start : index + 1]), index + 1
        exits.append(
            ExplainedExit(
                name=plan.exit,
                path=read.paths.get(plan.exit, plan.scores),
                num_classes=width if isinstance(width, int) else 0,
                flops=own,
                share=own / total,
                depth=sum(flops[: index + 1]) / total,
                carries=tuple(crossing[name].tensor for name in carried(plans, crossing, index)),
                carry_bytes=carry_bytes(plans, crossing, index),
                native=read.native.get(plan.exit),
            )
        )
    return exits


def _explained_gates(program: Program, plans: Sequence[StagePlan]) -> Iterator[ExplainedGate]:
    gates = () if program.gating is None else program.gating.gates
    flops = [stage_flops(program, plan) for plan in plans]
    for number, gate in enumerate(gates):
        bodies = tuple(index for index, plan in enumerate(plans) if number in plan.gates)
        own = sum(flops[index] for index in bodies)
        yield ExplainedGate(
            name=gate.name,
            threshold=gate.threshold,
            stage=next((index for index, plan in enumerate(plans) if number in plan.scored), None),
            priority=gate.priority,
            bodies=bodies,
            flops=own,
            share=own / max(sum(flops), 1),
            merges=tuple(f"{one.run}, else {one.skip}" for index in bodies for one in plans[index].merges),
        )

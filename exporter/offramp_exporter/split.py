"""Program -> stages, by dependency.

In the order of the exits, stage k is the nodes that exit k needs and no earlier stage holds; what it makes and later
stages read crosses the boundary. Program order plays no part: heads may come last, layers may keep outputs for later,
exits may read earlier exits' scores. Where there are gates, these nodes fall into several stages
(`offramp_exporter.gating.stages`): each body is one of its own.

Two kinds of values never cross. *Constants* depend on no input, and *sizes* only on the batch size, which changes at
every boundary: each stage that reads one computes it for itself.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Final

from offramp_contract.errors import SplitError
from onnx import AttributeProto, NodeProto

from offramp_exporter.gating.marks import MergedValue
from offramp_exporter.gating.stages import depends_on, stages_of
from offramp_exporter.program import Program
from offramp_exporter.refusal import line_of_node
from offramp_exporter.sizes import BATCH_SIZE

_RANDOM_OPERATORS: Final = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}


_SIZED_BY_DATA: Final = {"NonZero", "Unique", "Compress"}


class Kind(IntEnum):
    """What a value depends on; of several, the largest holds."""

    CONSTANT = 0
    SIZES = 1
    DATA = 2


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage, as indices into the program's nodes, each tuple in topological order.

    Attributes:
        exit: Name of the exit it ends in, if any.
        scores: The program's value that holds the exit's scores.
        native: The value that holds the score of the network's own rule for leaving here, if it has one.
        nodes: The nodes that are this stage's alone.
        support: Nodes of constants and sizes that it computes for itself.
        reads: Model inputs and values of earlier stages.
        emits: Its values that later stages read.
        gates: The gates that must all be open for it to run, the outermost first.
        scored: The gates whose scores it computes.
        merges: What stands for its values where it does not run.
    """

    exit: str | None
    scores: str | None
    nodes: tuple[int, ...]
    support: tuple[int, ...]
    reads: tuple[str, ...]
    emits: tuple[str, ...]
    native: str | None = None
    gates: tuple[int, ...] = ()
    scored: tuple[int, ...] = ()
    merges: tuple[MergedValue, ...] = ()


def split(program: Program) -> tuple[StagePlan, ...]:
    """Cut a program into one stage per exit, and at its gates.

    Raises:
        SplitError: If an exit needs nothing that an earlier one does not, does not depend on the input, or the program
            branches or draws random numbers, naming the node.
    """
    kinds = classify(program)
    cuts = [cut for exit_, nodes in _assign_nodes(program, kinds).items() for cut in stages_of(program, exit_, nodes)]
    made_in = {name: stage for stage, cut in enumerate(cuts) for i in cut.nodes for name in program.nodes[i].output}
    read_in = [_data_read(program, kinds, cut.nodes) for cut in cuts]
    kept_for = [dict.fromkeys((*read_in[stage], *(one.skip for one in cut.merges))) for stage, cut in enumerate(cuts)]
    last_read = {name: stage for stage, names in enumerate(kept_for) for name in names}
    return tuple(
        StagePlan(
            exit=cut.exit,
            scores=None if cut.exit is None else program.exits[cut.exit],
            nodes=cut.nodes,
            support=_support(program, kinds, cut.nodes),
            reads=tuple(name for name in read_in[stage] if made_in.get(name, -1) < stage),
            emits=tuple(
                name for i in cut.nodes for name in program.nodes[i].output if name and last_read.get(name, -1) > stage
            ),
            native=None if cut.exit is None else program.natives.get(cut.exit),
            gates=cut.gates,
            scored=cut.scored,
            merges=tuple(one for one in cut.merges if last_read.get(one.run, -1) > stage),
        )
        for stage, cut in enumerate(cuts)
    )


def classify(program: Program) -> dict[str, Kind]:
    """Tell for every value of a program what it depends on.

    Raises:
        SplitError: If a node's result is not decided by its inputs alone, naming it.
    """
    kinds = dict.fromkeys(program.initializers, Kind.CONSTANT)
    kinds |= dict.fromkeys(program.inputs, Kind.DATA) | {BATCH_SIZE: Kind.SIZES}
    for node in program.nodes:
        _refuse_control_flow(node)
        kind = max((kinds[name] for name in node.input if name), default=Kind.CONSTANT)
        kinds.update((name, kind) for name in node.output if name)
    return kinds


def _refuse_control_flow(node: NodeProto) -> None:
    if any(held.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for held in node.attribute):
        raise SplitError(
            f"node {label(node)} branches or loops inside the graph, which cannot be cut into stages; "
            "let the network compute and return every exit, without a condition"
        )
    if node.op_type in _SIZED_BY_DATA:
        raise SplitError(
            f"node {label(node)} picks elements by their value (x[mask], nonzero, unique), so that sizes depend on "
            "data; keep every element and write torch.where(mask, a, b)"
        )
    if node.op_type in _RANDOM_OPERATORS:
        raise SplitError(
            f"node {label(node)} draws random numbers at inference, so no two answers would agree; "
            "make the network deterministic in eval()"
        )


def _assign_nodes(program: Program, kinds: Mapping[str, Kind]) -> dict[str, tuple[int, ...]]:
    """Give each exit in turn the nodes that it needs and no earlier one holds."""
    placed: set[int] = set()
    owned = {}
    for exit_, scores in program.exits.items():
        if kinds[scores] is not Kind.DATA:
            raise SplitError(f"exit {exit_!r} ({scores!r}) does not depend on the network's input")
        wanted = [scores, *filter(None, [program.natives.get(exit_)])]
        needed = _upstream(program, wanted, partial(_is_new_data, kinds, placed))
        if not program.natives and all(program.nodes[i].op_type == "Identity" for i in needed):
            raise SplitError(
                f"exit {exit_!r} ({scores!r}) needs nothing that the exits before it do not compute; "
                "name each exit once, in the order of depth"
            )
        placed |= needed
        owned[exit_] = tuple(sorted(needed))
    return owned


def _is_new_data(kinds: Mapping[str, Kind], placed: set[int], node: NodeProto, i: int) -> bool:
    return i not in placed and _kind(node, kinds) is Kind.DATA


def _data_read(program: Program, kinds: Mapping[str, Kind], nodes: Iterable[int]) -> tuple[str, ...]:
    """Name the values with data in them that some nodes read, in the order of reading."""
    read = dict.fromkeys(name for i in nodes for name in program.nodes[i].input if name)
    return tuple(name for name in read if kinds[name] is Kind.DATA)


def _support(program: Program, kinds: Mapping[str, Kind], nodes: Iterable[int]) -> tuple[int, ...]:
    """Find the nodes that make the constants and sizes which some nodes read."""
    read = [name for i in nodes for name in program.nodes[i].input]
    return tuple(sorted(_upstream(program, read, lambda node, _: _kind(node, kinds) is not Kind.DATA)))


def _upstream(program: Program, wanted: Iterable[str], enters: Callable[[NodeProto, int], bool]) -> set[int]:
    """Walk from values to the nodes that make them, as far as `enters` allows."""
    found: set[int] = set()
    open_values = list(wanted)
    while open_values:
        i = program.producer.get(open_values.pop())
        if i is not None and i not in found and enters(program.nodes[i], i):
            found.add(i)
            open_values.extend(depends_on(program, program.nodes[i]))
    return found


def _kind(node: NodeProto, kinds: Mapping[str, Kind]) -> Kind:
    return next(kinds[name] for name in node.output if name)


def label(node: NodeProto) -> str:
    """Name a node for a person: its operator, and the line of the network's code that it comes from."""
    line = line_of_node(node)
    return f"{node.name or node.output[0]!r} ({node.op_type}){f' at {line}' if line else ''}"

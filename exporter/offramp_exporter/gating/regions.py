"""A program with merges as nodes -> the same without, each node with the gates that must all be open for it.

The region of a node is what the regions of its readers have in common; what stands on the open side of a merge is
behind the merge's gates too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from offramp_contract.errors import SplitError
from onnx import NodeProto, helper

from offramp_exporter.cost import node_flops
from offramp_exporter.gating.fold import PHI
from offramp_exporter.gating.marks import DOMAIN, Gating, MergedValue, PlannedGate, numbered
from offramp_exporter.program import Program
from offramp_exporter.values import Shape

Region: TypeAlias = frozenset[int]

_TRUNK: Final[Region] = frozenset()
_CHEAP: Final = 4
"""Work this many times smaller than a body costs less than a stage of its own."""


def in_regions(program: Program, planned: Sequence[PlannedGate], origins: Mapping[str, str]) -> Program:
    """Take the merges out of a program's nodes and tell every node's region.

    Args:
        program: No gate's mark is left in it.
        planned: Its gates.
        origins: Names of before.

    Returns:
        The program with its `gating`, in which gates that nothing depends on are gone.

    Raises:
        SplitError: If a gate's score is not one value.
    """
    joined = _joined(_with_ends(program))
    needs = _cheapest(joined, planned)
    flat = _Flat(joined, needs, planned, dict(joined.shapes), dict(joined.dtypes), dict(origins))
    used = sorted(needs.scores)
    number = {gate: position for position, gate in enumerate(used)}
    gates = tuple(flat.scored(gate) for gate in used)
    nodes = in_order(flat.flattened())
    regions = {
        node.output[0]: tuple(number[gate] for gate in needs.ordered(region))
        for node in nodes
        if (region := flat.regions.get(node.output[0], _TRUNK))
    }
    return replace(
        joined,
        nodes=nodes,
        shapes=flat.shapes,
        dtypes=flat.dtypes,
        marks=(),
        gating=Gating(gates, regions, flat.merges, flat.origins),
    )


def _with_ends(program: Program) -> Program:
    """Put a node that every row runs behind each exit that is a merge: a gated stage ends in no exit."""
    merges = {node.output[0] for node in program.nodes if node.op_type == PHI}
    shapes, dtypes, nodes = dict(program.shapes), dict(program.dtypes), list(program.nodes)
    ends = {}
    for value in (*program.exits.values(), *program.natives.values()):
        if value in merges:
            end = next(one for one in numbered(f"{value}.end") if one not in shapes)
            shapes[end], dtypes[end] = shapes[value], dtypes[value]
            nodes.append(helper.make_node("Identity", [value], [end]))
            ends[value] = end
    return replace(
        program,
        nodes=tuple(nodes),
        shapes=shapes,
        dtypes=dtypes,
        exits={name: ends.get(value, value) for name, value in program.exits.items()},
        natives={name: ends.get(value, value) for name, value in program.natives.items()},
    )


def _joined(program: Program) -> Program:
    """Make one merge of a merge and the one on its open side, where both are skipped with the same value."""
    readers = Counter(name for node in program.nodes for name in node.input)
    merges: dict[str, NodeProto] = {}
    for node in program.nodes:  # inner ones come first
        if node.op_type != PHI:
            continue
        (run, skip, *scores), inner = node.input, merges.get(node.input[0])
        merges[node.output[0]] = node
        if inner is not None and inner.input[1] == skip and readers[run] == 1:
            inputs = [inner.input[0], skip, *scores, *inner.input[2:]]
            gates = [*_gates(node), *_gates(inner)]
            merges[node.output[0]] = helper.make_node(PHI, inputs, list(node.output), domain=DOMAIN, gates=gates)
            del merges[run]
    kept = [node for node in program.nodes if node.op_type != PHI or node.output[0] in merges]
    return replace(program, nodes=tuple(merges.get(node.output[0], node) for node in kept))


def _gates(node: NodeProto) -> list[int]:
    return [int(gate) for held in node.attribute if held.name == "gates" for gate in held.ints]


@dataclass(slots=True)
class _Needs:
    """Who needs what.

    Attributes:
        values: The gates that must all be open for anybody to need a value.
        scores: The same for the decision of each gate.
    """

    values: dict[str, Region] = field(default_factory=dict)
    scores: dict[int, Region] = field(default_factory=dict)

    def add(self, value: str, region: Region) -> None:
        """Note that a value is needed."""
        self.values[value] = self.values.get(value, region) & region

    def of(self, node: NodeProto) -> Region | None:
        """Give the region of a node; None if nobody needs it."""
        known = [self.values[name] for name in node.output if name in self.values]
        return frozenset.intersection(*known) if known else None

    def ordered(self, region: Region) -> list[int]:
        """Put the gates of a region in order, the outermost first."""
        return sorted(region, key=lambda gate: (len(self.scores[gate]), gate))


def _cheapest(program: Program, planned: Sequence[PlannedGate]) -> _Needs:
    """Score gates that decide together one behind the other; all at once where that adds next to nothing.

    A score behind a gate takes a stage of its own.
    """
    nested, at_once = (_needs(program, planned, is_nested=is_nested) for is_nested in (True, False))
    added = gated = 0
    for node in program.nodes:
        before, after = nested.of(node), at_once.of(node)
        if node.op_type != PHI and before and after is not None:
            flops = node_flops(program, node)
            added += flops if after != before else 0
            gated += flops if after else 0
    return at_once if added * _CHEAP <= gated else nested


def _needs(program: Program, planned: Sequence[PlannedGate], *, is_nested: bool) -> _Needs:
    needs = _Needs()
    for value in (*program.exits.values(), *program.natives.values()):
        needs.add(value, _TRUNK)
    for node in reversed(program.nodes):
        region = needs.of(node)
        if region is None:
            continue
        if node.op_type != PHI:
            for name in filter(None, node.input):
                needs.add(name, region)
            continue
        run, skip, *scores = node.input
        gates = _gates(node)
        needs.add(run, region.union(gates))
        needs.add(skip, region)
        for place, (gate, score) in enumerate(zip(gates, scores, strict=True)):
            before = region.union(gates[:place] if is_nested else ())
            needs.scores[gate] = needs.scores.get(gate, before) & before
            if planned[gate].score is not None:
                needs.add(score, before)
    return needs


@dataclass(slots=True)
class _Flat:
    """A program while its merges are taken out.

    Attributes:
        program: With them.
        needs: Who needs what in it.
        planned: Its gates.
        shapes: Of the values that there will be.
        dtypes: Likewise.
        origins: Names of before any gate was settled, extended.
        merges: What has been taken out.
        regions: By the first output of a node.
    """

    program: Program
    needs: _Needs
    planned: Sequence[PlannedGate]
    shapes: dict[str, Shape]
    dtypes: dict[str, int]
    origins: dict[str, str]
    merges: dict[str, MergedValue] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)
    _made: list[NodeProto] = field(default_factory=list)

    def scored(self, gate: int) -> PlannedGate:
        """Give a gate, its score a value of its own."""
        plan = self.planned[gate]
        if plan.score is None:
            return plan
        values = {
            node.input[2 + _gates(node).index(gate)]
            for node in self.program.nodes
            if node.op_type == PHI and gate in _gates(node) and self.needs.of(node) is not None
        }
        if len(values) != 1:
            raise SplitError(
                f"gate {plan.name!r} has a score that is another where another gate is shut; let it depend on that "
                "gate's score, not on its decision"
            )
        score = self._fresh(f"{plan.name}.score", next(iter(values)))
        self._add(helper.make_node("Identity", list(values), [score]), self.needs.scores[gate])
        return replace(plan, score=score)

    def flattened(self) -> list[NodeProto]:
        """Give the nodes without merges, in no order."""
        for node in self.program.nodes:
            region = self.needs.of(node)
            if node.op_type == PHI and region is not None:
                self._flatten(node, region)
        for node in self.program.nodes:
            region = self.needs.of(node)
            if node.op_type != PHI and region is not None:
                self._add(node, region)
        names = self._names
        self.merges = {value: MergedValue(value, names.get(one.skip, one.skip)) for value, one in self.merges.items()}
        self.regions = {names.get(value, value): region for value, region in self.regions.items()}
        return [self._renamed(node) for node in self._made]

    def _flatten(self, node: NodeProto, region: Region) -> None:
        """Let whoever makes the open side make the merged value, if it does so for this merge alone."""
        (value,), (run, skip, *_) = node.output, node.input
        inside = region.union(_gates(node))
        maker = self.program.producer.get(run)
        is_its_own = (
            maker is not None
            and self.program.nodes[maker].op_type != PHI
            and self.needs.of(self.program.nodes[maker]) == inside
            and run not in self._names
        )
        if is_its_own:
            self._names[run] = value
            self.origins[value] = self.origins.get(run, run)
        else:
            self._add(helper.make_node("Identity", [run], [value]), inside)
        self.merges[value] = MergedValue(value, skip)

    def _add(self, node: NodeProto, region: Region) -> None:
        self._made.append(node)
        self.regions[node.output[0]] = region

    def _renamed(self, node: NodeProto) -> NodeProto:
        copy: NodeProto = NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [self._names.get(name, name) for name in node.input]
        copy.output[:] = [self._names.get(name, name) for name in node.output]
        return copy

    def _fresh(self, name: str, like: str) -> str:
        free = next(one for one in numbered(name) if one not in self.shapes)
        self.shapes[free] = self.shapes.get(like, ())
        if like in self.dtypes:
            self.dtypes[free] = self.dtypes[like]
        return free


def in_order(nodes: Sequence[NodeProto]) -> tuple[NodeProto, ...]:
    """Sort nodes topologically; those that need not move stay in their order."""
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    placed: dict[int, None] = {}
    for i in range(len(nodes)):
        waiting = [i]
        while waiting:
            read = (producer.get(name) for name in nodes[waiting[-1]].input)
            missing = [one for one in read if one is not None and one not in placed]
            if missing:
                waiting.append(missing[0])
            else:
                placed[waiting.pop()] = None
    return tuple(nodes[i] for i in placed)

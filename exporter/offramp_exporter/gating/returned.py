"""Networks that return their decisions instead of marking them: a mark is put behind each one.

The decision, 0 or 1, is its own score.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from offramp_contract.errors import TraceError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from offramp_exporter.exit_paths import ExitPath, find_all
from offramp_exporter.exits import ExitNames
from offramp_exporter.gating.marks import DOMAIN, OPERATOR, marks_of, numbered, register_operator
from offramp_exporter.program import Program
from offramp_exporter.rows.one_row import deduplicated
from offramp_exporter.sizes import attribute, int64_constant

THRESHOLD: Final = 0.5
_ROUNDING: Final = 1e-4

_VIEWS: Final = {"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Round"}
"""Operators that leave 0 and 1 as they are."""


def choose_gates(returned: object, batch: int, wanted: ExitNames, network: object) -> dict[str, ExitPath]:
    """Find the decisions in what `forward` returned.

    Args:
        returned: The value itself.
        batch: Number of rows it was called with.
        wanted: Paths, a path to a list means all in it; or the gates' names, each with its path.
        network: Where paths from `self` start.

    Returns:
        Where each lies, by the gate's name.

    Raises:
        TraceError: If a path leads nowhere, or to what are no decisions.
    """
    if isinstance(wanted, Mapping):
        found = [(name, path) for name, text in wanted.items() for path in find_all(text, returned, network)]
    else:
        paths = [path for text in wanted for path in find_all(text, returned, network)]
        found = [(f"gate_{index}", path) for index, path in enumerate(paths)]
    if not found:
        raise TraceError("gates: name at least one, as exits are named")
    named: dict[str, ExitPath] = {}
    for name, path in found:
        _check(path, path.find(returned, network), batch)
        named[next(one for one in numbered(name) if one not in named)] = path
    return named


def _check(path: ExitPath, decisions: torch.Tensor, batch: int) -> None:
    shape = tuple(decisions.shape)
    is_per_row = shape[:1] == (batch,) and sum(size != 1 for size in shape[1:]) <= 1
    if not is_per_row:
        raise TraceError(
            f"gates: {str(path)!r} has shape {shape}; decisions are (batch,), (batch, 1) or (batch, gates)"
        )
    values = decisions.double()
    if not torch.minimum(values.abs(), (values - 1).abs()).le(_ROUNDING).all():
        raise TraceError(
            f"gates: {str(path)!r} holds other numbers than 0 and 1; name what the blocks are multiplied with"
        )


def prove_used(program: Program, model: ModelProto) -> None:
    """Check that every marked decision is one that an exit depends on.

    Raises:
        TraceError: Naming those that are not.
    """
    used = {mark.name for mark in program.marks}
    unused = [mark.name for mark in marks_of(model.graph.node) if mark.name not in used]
    if unused:
        raise TraceError(
            f"gates: no exit depends on {', '.join(unused)}; return the very tensor that the blocks are multiplied with"
        )


def mark_decisions(model: ModelProto, returned: Mapping[str, str]) -> ModelProto:
    """Put a gate's mark behind each decision that a network returns.

    Args:
        model: Its graph, some of whose outputs are decisions. Not changed.
        returned: The outputs that are decisions, by the gate's name. One of shape (batch, G) stands for G gates.

    Returns:
        The graph, made shorter by what it computes twice.

    Raises:
        TraceError: If what is returned is not computed by the network.
    """
    register_operator()
    marked: ModelProto = ModelProto.FromString(model.SerializeToString())
    same = deduplicated(marked)
    marking = _Marking(marked)
    for name, output in returned.items():
        marking.mark(name, same[output])
    graph = marked.graph
    kept = [value for value in graph.output if value.name not in set(returned.values())]
    ends = [
        helper.make_node("Identity", [same[value.name]], [value.name])
        for value in kept
        if same[value.name] != value.name
    ]
    del graph.node[:], graph.output[:]
    graph.node.extend([*marking.nodes, *ends])
    graph.output.extend(kept)
    graph.initializer.extend(marking.constants)
    marked.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return marked


class _Marking:
    """A graph while marks are put into it.

    Attributes:
        nodes: In topological order.
        constants: What the new nodes read beyond the graph's initializers.
    """

    def __init__(self, model: ModelProto) -> None:
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants: list[TensorProto] = []
        self._numbers = {tensor.name: tensor for tensor in model.graph.initializer}
        kinds = (*model.graph.value_info, *model.graph.output)
        self._types = {value.name: value.type.tensor_type for value in kinds}
        self._done: set[str] = set()

    def mark(self, name: str, value: str) -> None:
        """Mark the decision, or the decisions, that a value holds."""
        root = self._root(value)
        producer = self._producer(root)
        if producer is None:
            raise TraceError(f"gates: {name!r} is nothing that the network computes from its input")
        sizes = self._sizes(root)
        if len(sizes) == 2 and sizes[1] is not None and sizes[1] > 1:
            pieces = list(producer.input) if producer.op_type == "Concat" else []
            if len(pieces) == sizes[1]:
                for index, piece in enumerate(pieces):
                    self.mark(f"{name}_{index}", piece)
            else:
                self._mark_columns(name, root, sizes[1])
            return
        self._mark_one(name, root)

    def _root(self, value: str) -> str:
        """Go back to the value that the network itself goes on with: past casts, and axes of size 1."""
        node = self._producer(value)
        while node is not None and node.op_type in _VIEWS and len(self._sizes(node.input[0])) > 0:
            if self._width(node.input[0]) != self._width(value):
                break
            value, node = node.input[0], self._producer(node.input[0])
        return value

    def _mark_one(self, name: str, root: str) -> None:
        if root in self._done:
            raise TraceError(f"gates: {name!r} is the decision of another gate too; name each once")
        self._done.add(root)
        decided = f"{root}.decision"
        self._insert(root, decided, self._gate(name, root, decided))

    def _mark_columns(self, name: str, root: str, width: int) -> None:
        """Mark every column of a value and hand those to whoever reads it, one by one where it reads one."""
        made: list[NodeProto] = []
        columns = []
        for index in range(width):
            start, stop, axis = (self._constant(f"{root}.{index}", [number]) for number in (index, index + 1, 1))
            column, decided = f"{root}.column_{index}", f"{root}.decision_{index}"
            made.append(helper.make_node("Slice", [root, start, stop, axis], [column]))
            self._types[column] = self._types[root]
            made += self._gate(f"{name}_{index}", column, decided)
            columns.append(decided)
        whole = f"{root}.decision"
        made.append(helper.make_node("Concat", columns, [whole], axis=1))
        self._insert(root, whole, made)
        self.nodes = [one for node in self.nodes for one in self._picked(node, whole, columns)]

    def _picked(self, node: NodeProto, whole: str, columns: Sequence[str]) -> list[NodeProto]:
        """Read one column from where it is decided, instead of picking it from all of them."""
        index = self._index(node, len(columns)) if node.op_type in ("Gather", "Slice") else None
        casts: list[NodeProto] = []
        source = node.input[0] if node.input else ""
        while index is not None and source != whole:
            cast = self._producer(source)
            if cast is None or cast.op_type != "Cast":
                return [node]
            source = cast.input[0]
            casts.insert(0, cast)
        if index is None:
            return [node]
        made, column = [], columns[index]
        for step, cast in enumerate(casts):
            copy = NodeProto.FromString(cast.SerializeToString())
            copy.name, copy.input[:], copy.output[:] = "", [column], [f"{node.output[0]}.cast_{step}"]
            made.append(copy)
            column = copy.output[0]
        axes = [] if self._keeps_axis(node) else [self._constant(f"{node.output[0]}.axes", [1])]
        made.append(_like(node, "Squeeze" if axes else "Identity", [column, *axes]))
        return made

    def _index(self, node: NodeProto, width: int) -> int | None:
        """Give the one column that a node picks; None if it is not one, or not known."""
        numbers = [
            numpy_helper.to_array(self._numbers[name]).ravel().tolist() if name in self._numbers else []
            for name in node.input[1:]
        ]
        if node.op_type == "Gather":
            is_column = attribute(node, "axis", 0) in (1, -1) and len(numbers[0]) == 1
            return int(numbers[0][0]) % width if is_column else None
        if len(numbers) < 3 or numbers[2] not in ([1], [-1]) or not numbers[0] or not numbers[1]:
            return None
        picked = list(range(width))[numbers[0][0] : numbers[1][0]]
        return picked[0] if len(picked) == 1 else None

    def _keeps_axis(self, node: NodeProto) -> bool:
        return bool(node.op_type == "Slice" or self._numbers[node.input[1]].dims)

    def _gate(self, name: str, score: str, decision: str) -> list[NodeProto]:
        """Write a gate's mark; one whose score is no float works on its cast."""
        kind = self._types[score].elem_type
        is_float = kind == TensorProto.FLOAT
        read, made = (score, decision) if is_float else (f"{decision}.score", f"{decision}.float")
        gate = NodeProto(op_type=OPERATOR, domain=DOMAIN, input=[read], output=[made])
        gate.attribute.append(helper.make_attribute("threshold", THRESHOLD))
        gate.attribute.append(helper.make_attribute("name", name))
        if is_float:
            return [gate]
        return [
            helper.make_node("Cast", [score], [f"{decision}.score"], to=TensorProto.FLOAT),
            gate,
            helper.make_node("Cast", [f"{decision}.float"], [decision], to=kind),
        ]

    def _insert(self, value: str, decided: str, made: list[NodeProto]) -> None:
        """Put nodes behind the one that makes a value; whoever read the value reads what they make of it."""
        place = next(i for i, node in enumerate(self.nodes) if value in node.output)
        for node in self.nodes[place + 1 :]:
            node.input[:] = [decided if name == value else name for name in node.input]
        self.nodes[place + 1 : place + 1] = made

    def _producer(self, value: str) -> NodeProto | None:
        return next((node for node in self.nodes if value in node.output), None)

    def _sizes(self, value: str) -> list[int | None]:
        kind = self._types.get(value)
        dims = [] if kind is None else kind.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]

    def _width(self, value: str) -> int:
        return int(np.prod([size for size in self._sizes(value)[1:] if size is not None]))

    def _constant(self, name: str, numbers: Sequence[int]) -> str:
        free = next(one for one in numbered(name) if one not in self._numbers)
        tensor = int64_constant(free, numbers)
        self._numbers[free] = tensor
        self.constants.append(tensor)
        return free


def _like(node: NodeProto, operator: str, inputs: Sequence[str]) -> NodeProto:
    made = helper.make_node(operator, inputs, [node.output[0]], name=node.name)
    made.metadata_props.extend(node.metadata_props)
    return made

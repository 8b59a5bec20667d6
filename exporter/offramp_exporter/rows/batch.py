"""A graph of one row -> the graph of a batch in which every row is computed as if it were alone.

What `forward` does with one row is the network's meaning where its code is written for one: `logits.squeeze()`,
`probs[0]`, `conf.max()` over all there is. So it is traced with one row, and the batch is put in here, node by node.
A value's batch lies on one of its axes that has size 1, or, where the code has given that axis up, on a new axis 0.
The rules for the operators are in `offramp_exporter.rows.rules`; each is exact, and one that is missing is a refusal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from offramp_contract.errors import TraceError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from offramp_exporter.exits import ADAPTER
from offramp_exporter.gating.marks import is_gate
from offramp_exporter.refusal import line_of_node
from offramp_exporter.rows.one_row import OneRow, fresh_names
from offramp_exporter.sizes import int64_constant

BATCH: Final = "batch"


@dataclass(frozen=True, slots=True)
class Held:
    """How a value of the one-row graph is held in the batched one.

    Attributes:
        name: The value there.
        axis: The axis, of size 1 for one row, that is the batch; None where the batch is a new axis 0.
    """

    name: str
    axis: int | None


class Batch:
    """The graph of a batch as it is written, node by node.

    Attributes:
        one: The graph of one row.
    """

    def __init__(self, one: OneRow) -> None:
        self.one = one
        self._held: dict[str, Held] = {}
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        graph = one.model.graph
        taken = {*one.shapes, *one.producer, *(value.name for value in graph.input)}
        self._names = fresh_names(taken, "rows.")
        self._forms: dict[tuple[str, int | None], str] = {}
        self._any_input = graph.input[0].name
        for value in graph.input:
            self._held[value.name] = Held(value.name, 0)

    def is_data(self, value: str) -> bool:
        """Tell whether a value depends on the input."""
        return value in self._held

    def shape(self, value: str) -> tuple[int, ...]:
        """Give a value's shape for one row."""
        return self.one.shapes[value]

    def held(self, value: str) -> Held:
        """Give how a value is held."""
        return self._held[value]

    def constant(self, value: str) -> list[int]:
        """Read a constant of whole numbers.

        Raises:
            KeyError: If it is none.
        """
        return [int(number) for number in numpy_helper.to_array(self.one.constants[value]).flat]

    def numbers(self, values: Sequence[int]) -> str:
        """Write a constant of whole numbers."""
        name = self.fresh()
        self._constants.append(int64_constant(name, values))
        return name

    def fresh(self) -> str:
        """Give a name that nothing has."""
        return next(self._names)

    def add(self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Write a node of one output."""
        name = output or self.fresh()
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def copy(
        self, node: NodeProto, inputs: Sequence[str], outputs: Sequence[str] | None = None, **changed: Any
    ) -> None:
        """Write a node as it is, with other inputs and some attributes changed."""
        copy = NodeProto.FromString(node.SerializeToString())
        copy.input[:] = inputs
        copy.output[:] = node.output if outputs is None else outputs
        kept = [held for held in copy.attribute if held.name not in changed]
        del copy.attribute[:]
        copy.attribute.extend(kept)
        copy.attribute.extend(helper.make_attribute(name, value) for name, value in changed.items())
        self._nodes.append(copy)

    def hold(self, value: str, axis: int | None, name: str | None = None) -> None:
        """Say how a value is held."""
        if axis is not None and self.shape(value)[axis] != 1:
            raise ValueError(f"axis {axis} of {value} is not the batch")
        self._held[value] = Held(name or value, axis)

    def lifted(self, value: str, rank: int | None = None) -> str:
        """Give a value with the batch on a new axis 0, and axes of size 1 behind it up to a rank."""
        name = self._form(value, None)
        missing = (rank or 0) - len(self.shape(value))
        return self.add("Unsqueeze", [name, self.numbers(range(1, 1 + missing))]) if missing > 0 else name

    def at(self, value: str, axis: int) -> str:
        """Give a value with the batch on one of its axes that has size 1."""
        return self._form(value, axis)

    def spread(self, value: str, axis: int | None) -> str:
        """Give a constant repeated for every row, the batch on an axis of size 1 or on a new axis 0."""
        shape = list(self.shape(value))
        if axis is None:
            value, shape, axis = self.add("Unsqueeze", [value, self.numbers([0])]), [1, *shape], 0
        batch = self._count()
        before, after = ([self.numbers(sizes)] if sizes else [] for sizes in (shape[:axis], shape[axis + 1 :]))
        return self.add("Expand", [value, self.add("Concat", [*before, batch, *after], axis=0)])

    def row_numbers(self) -> str:
        """Give the rows' numbers, (B,)."""
        start, step = (self.add("Squeeze", [self.numbers([value])]) for value in (0, 1))
        return self.add("Range", [start, self.add("Squeeze", [self._count()]), step])

    def _count(self) -> str:
        return self.add("Shape", [self._any_input], start=0, end=1)

    def reshaped(self, name: str, sizes: Sequence[int], output: str | None = None) -> str:
        """Reshape, the batch with whatever is left for it on axis 0."""
        return self.add("Reshape", [name, self.numbers([-1, *sizes])], output)

    def folded(self, value: str) -> str:
        """Give a value with the batch folded into its axis 0, whatever that holds."""
        held, shape = self.held(value), self.shape(value)
        if held.axis == 0 or (shape and shape[0] == 1):
            return self.at(value, 0)
        return self.reshaped(self.lifted(value), shape[1:])

    def copy_folded(self, node: NodeProto, inputs: Sequence[str]) -> None:
        """Write a node of one output that computes every element of axis 0 alone."""
        output = node.output[0]
        shape = self.shape(output)
        if shape[0] == 1:
            self.copy(node, inputs)
            self.hold(output, 0)
            return
        folded = self.fresh()
        self.copy(node, inputs, [folded])
        self.hold(output, None, self.reshaped(folded, shape))

    def _form(self, value: str, axis: int | None) -> str:
        held = self._held[value]
        if held.axis == axis:
            return held.name
        known = self._forms.get((value, axis))
        if known is not None:
            return known
        rank = len(self.shape(value))
        if axis is None:
            name = self._to_front(held, rank)
            made = self.add("Unsqueeze", [name, self.numbers([(held.axis or 0) + 1])])
        else:
            name = self.add("Squeeze", [self._form(value, None), self.numbers([axis + 1])])
            made = self._moved(name, axis, rank)
        self._forms[value, axis] = made
        return made

    def _to_front(self, held: Held, rank: int) -> str:
        if not held.axis:
            return held.name
        order = [held.axis, *(axis for axis in range(rank) if axis != held.axis)]
        return self.add("Transpose", [held.name], perm=order)

    def _moved(self, name: str, axis: int, rank: int) -> str:
        """Move the batch from axis 0 to where it belongs."""
        if not axis:
            return name
        others = list(range(1, rank))
        return self.add("Transpose", [name], perm=[*others[:axis], 0, *others[axis:]])

    def _give(self, output: str) -> None:
        """Put the batch of one of the graph's outputs in front."""
        held = self.at(output, 0)
        if held == output:
            return
        other = self.fresh()  # for what has had the name so far
        for node in self._nodes:
            node.input[:] = [other if name == output else name for name in node.input]
            node.output[:] = [other if name == output else name for name in node.output]
        self.add("Identity", [held], output)

    def model(self) -> ModelProto:
        """Give the finished graph; its outputs have the batch on axis 0."""
        model: ModelProto = ModelProto.FromString(self.one.model.SerializeToString())
        graph = model.graph
        for value in graph.output:
            self._give(value.name)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._constants)
        for value in (*graph.input, *graph.output):
            dim = value.type.tensor_type.shape.dim[0]
            dim.Clear()
            dim.dim_param = BATCH
        return model


Rule: TypeAlias = Callable[[Batch, NodeProto], None]
"""Writes into a batch what a node of the one-row graph does; raises `NoRule` where it cannot."""


class NoRule(Exception):
    """An operator is used in a way that no rule computes for every row as if it were alone."""


def per_row(one: OneRow, rules: Callable[[str], Rule | None]) -> ModelProto:
    """Put the batch into a graph of one row.

    Args:
        one: Every input and output has the batch, of size 1, on axis 0.
        rules: Gives the rule of an operator.

    Raises:
        TraceError: If an operator has no rule for what it is used for, naming its line.
    """
    batch = Batch(one)
    for node in one.model.graph.node:
        if not any(batch.is_data(name) for name in node.input):
            batch.copy(node, node.input)
            continue
        rule = rules(node.op_type) if not node.domain or is_gate(node) else None
        try:
            if rule is None:
                raise NoRule
            rule(batch, node)
        except (NoRule, KeyError, ValueError, IndexError) as error:  # a shape or constant that is not known, too
            raise TraceError(_sentence(node)) from error
    return batch.model()


def _sentence(node: NodeProto) -> str:
    line = line_of_node(node)
    return (
        f"{node.op_type}{f' at {line}' if line else ''} cannot be computed for many rows at once, as it is used there; "
        f"write that part with other operations, or let forward take a batch and return every exit. {ADAPTER}"
    )

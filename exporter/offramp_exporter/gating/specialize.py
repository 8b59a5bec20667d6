"""A program with gates -> the same program without their marks, each node with the gates that must be open for it.

Gate by gate, the decision is fixed to 0 and to 1. Nodes that only an open gate needs are its body; a value that then is
one thing where the gate is open and another where it is shut, and that a node needed either way reads, is a merge. What
only a shut gate needs stays with the trunk. All merges known, a node is gated by the gates that all its readers share.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from offramp_contract.errors import SplitError
from onnx import NodeProto, TensorProto, helper, numpy_helper

from offramp_exporter.gating.fold import PHI, Constants, Folding, Known, Resolved
from offramp_exporter.gating.marks import DOMAIN, GateMark, PlannedGate, numbered
from offramp_exporter.gating.regions import in_order, in_regions
from offramp_exporter.program import Program
from offramp_exporter.sizes import BATCH_SIZE, int64_constant
from offramp_exporter.split import Kind, label
from offramp_exporter.values import Rows, Shape, spell

_BROADCASTING: Final = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "And", "Or", "Xor", "Mod", "PRelu"),
    *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"),
}


def specialize(program: Program) -> Program:
    """Settle every gate of a program.

    Returns:
        The program with its `gating`: no mark is left in it. One without gates is given as it is.

    Raises:
        SplitError: If what a gate decides cannot be told apart from the rest, naming the node and what to write.
    """
    if not program.marks:
        return program
    planned = []
    origins: dict[str, str] = {}
    settled = program
    for index, mark in enumerate(program.marks):
        planned.append(_planned(program, mark))
        settled = _Settling(settled, index, mark, origins).settled()
    return in_regions(settled, planned, origins)


def _planned(program: Program, mark: GateMark) -> PlannedGate:
    shape = program.shapes.get(mark.score, ())
    is_one_a_row = shape[:1] in ((Rows(),), (1,) if program.is_one_row else ()) and set(shape[1:]) <= {1}
    if not is_one_a_row:
        raise SplitError(
            f"gate {mark.name!r} has a score of shape {spell(shape)}; it must be one number per row, shape (batch,), "
            "(batch, 1) or (batch, 1, 1, 1)"
        )
    known = Constants(program).of(mark.score)
    if known is None:
        return PlannedGate(mark.name, mark.threshold, score=mark.score)
    priority = float(str(np.float32(known.row.flat[0])))
    if not known.has_equal_rows or not 0 <= priority <= 1:
        raise SplitError(
            f"gate {mark.name!r} has the constant score {priority:g}; a priority is one number from 0 to 1"
        )
    return PlannedGate(mark.name, mark.threshold, priority=priority)


@dataclass(slots=True)
class _Settling:
    """One gate, while it is taken out of a program.

    Attributes:
        program: Before.
        index: The gate's number.
        mark: The gate.
        origins: Names of before any gate was settled, extended.
        shapes: Of the values that there will be.
        dtypes: Likewise.
        constants: Initializers that there will be besides the program's.
        made: Nodes that there will be, in no order.
    """

    program: Program
    index: int
    mark: GateMark
    origins: dict[str, str]
    shapes: dict[str, Shape] = field(init=False)
    dtypes: dict[str, int] = field(init=False)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    made: list[NodeProto] = field(default_factory=list)
    _kinds: dict[str, Kind] = field(init=False)
    _run: Folding = field(init=False)
    _skip: Folding = field(init=False)
    _merged: dict[str, tuple[Resolved, Resolved]] = field(default_factory=dict)
    _own: dict[str, str] = field(default_factory=dict)
    _written: dict[tuple[str, tuple[str, int] | None], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        constants, decision = Constants(self.program), self.mark.decision
        self._kinds = constants.kinds
        open_, shut = constants.filled(decision, 1), constants.filled(decision, 0)
        if open_ is None or shut is None:
            raise SplitError(f"gate {self.mark.name!r}: the shape of its decision is not known")
        self._run = Folding(self.program, constants, {decision: open_})
        self._skip = Folding(self.program, constants, {decision: shut})
        self.shapes, self.dtypes = dict(self.program.shapes), dict(self.program.dtypes)

    def settled(self) -> Program:
        """Give the program without the gate's mark, its merges written as nodes `PHI`."""
        wanted = [*self.program.exits.values(), *self.program.natives.values()]
        run, skip = (folding.live([*wanted, self.mark.score]) for folding in (self._run, self._skip))
        self._find_merges(wanted, sorted(run & skip))
        for value in self._merged:
            if self._run.of(value) == value or self._skip.of(value) == value:
                self._own[value] = self._fresh(f"{value}.{'run' if self._run.of(value) == value else 'skip'}", value)
        for i in sorted(run | skip):
            node = self.program.nodes[i]
            if i in run and i in skip:
                self._write(node, self._either)
            else:
                self._write(node, self._under(self._run if i in run else self._skip))
        for value, (open_, shut) in self._merged.items():
            self._write_merge(value, open_, shut)
        ends = {value: self._either(value, None) for value in wanted}
        return replace(
            self.program,
            nodes=in_order(self.made),
            initializers={**self.program.initializers, **self.constants},
            exits={name: ends[value] for name, value in self.program.exits.items()},
            natives={name: ends[value] for name, value in self.program.natives.items()},
            shapes=self.shapes,
            dtypes=self.dtypes,
        )

    def _find_merges(self, wanted: Iterable[str], shared: Iterable[int]) -> None:
        """Note the values that differ and that an exit, or a node needed either way, reads."""
        for value in wanted:
            self._note(value, None)
        for i in shared:
            for value in self.program.nodes[i].input:
                self._note(value, self.program.nodes[i])

    def _note(self, value: str, reader: NodeProto | None) -> None:
        open_, shut = self._run.of(value), self._skip.of(value)
        if isinstance(open_, Known) and isinstance(shut, Known):
            if not open_.equals(shut):
                raise SplitError(self._unseen(value, reader))
        elif open_ != shut:
            self._merged[value] = open_, shut

    def _unseen(self, value: str, reader: NodeProto | None) -> str:
        name = self.mark.name
        if reader is None:
            return f"an exit is nothing but the decision of gate {name!r}; return the network's scores"
        return (
            f"node {label(reader)} reads the decision of gate {name!r} ({value!r}) "
            "in a way that cannot be seen through, so that the block behind it would always run; write the block as "
            "x + decision * body(x) or torch.where(decision > 0.5, body(x), x), and use the gate's score where "
            "something else depends on it"
        )

    def _write(self, node: NodeProto, read: Callable[[str, NodeProto], str]) -> None:
        copy = NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [read(name, node) if name else "" for name in node.input]
        copy.output[:] = [self._own.get(name, name) for name in node.output]
        self.made.append(copy)

    def _either(self, value: str, reader: NodeProto | None) -> str:
        """Name what a node reads that is needed either way."""
        if value in self._merged:
            return value
        found = self._run.of(value)
        return found if isinstance(found, str) else self._constant(value, found, reader)

    def _under(self, folding: Folding) -> Callable[[str, NodeProto | None], str]:
        """Give what names the values that a node reads which is needed one way only."""

        def read(value: str, reader: NodeProto | None) -> str:
            found = folding.of(value)
            return self._own.get(found, found) if isinstance(found, str) else self._constant(value, found, reader)

        return read

    def _write_merge(self, value: str, open_: Resolved, shut: Resolved) -> None:
        if isinstance(open_, Known):
            run = self._filled(value, open_, like=self._under(self._skip)(value, None))
        else:
            run = self._own.get(open_, open_)
        skip = self._filled(value, shut, like=None) if isinstance(shut, Known) else self._own.get(shut, shut)
        node = helper.make_node(PHI, [run, skip, self.mark.score], [value], domain=DOMAIN, gates=[self.index])
        self.made.append(node)

    def _constant(self, value: str, known: Known, reader: NodeProto | None) -> str:
        """Write a known value for a node to read: short if the node stretches what it reads."""
        is_stretched = reader is not None and reader.op_type in _BROADCASTING and self._is_stretched(value, reader)
        if not known.has_equal_rows:
            raise SplitError(f"{value!r} is another constant for every row of a batch")
        if is_stretched:
            return self._number(value, _shortened(known.row))
        if known.axis is None:
            return self._number(value, known.row)
        return self._expanded(value, known, of=None)

    def _is_stretched(self, value: str, reader: NodeProto) -> bool:
        made = self.program.shapes.get(reader.output[0])
        others = [name for name in reader.input if name != value and name not in self.program.initializers]
        shapes = [self.program.shapes.get(name) for name in others]
        return made is not None and None not in made and made in shapes

    def _filled(self, value: str, known: Known, like: str | None) -> str:
        """Write a known value as one that has data in it, so that it can cross a boundary."""
        if not known.has_equal_rows or known.axis is None:
            raise SplitError(f"what stands for {value!r} where gate {self.mark.name!r} is shut is no value of a row")
        return self._expanded(value, known, of=(self._anchor, 0) if like is None else (like, known.axis))

    def _expanded(self, value: str, known: Known, of: tuple[str, int] | None) -> str:
        """Repeat a constant for every row of a batch, read off an axis of another value or the batch size."""
        row = self._number(value, _shortened(known.row))
        if (row, of) not in self._written:
            name = self._written[row, of] = self._fresh(f"{value}.filled_{self.index}", value)
            sizes = self._sizes(name, self.program.shapes[value], of)
            self.made.append(helper.make_node("Expand", [row, sizes], [name]))
        return self._written[row, of]

    @property
    def _anchor(self) -> str:
        """What has as many rows as the batch, and is made as late as can be."""
        return self.mark.score if self._kinds[self.mark.score] is Kind.DATA else self.program.inputs[0]

    def _sizes(self, name: str, shape: Shape, of: tuple[str, int] | None) -> str:
        """Write a shape of a batch."""
        if any(dim is None or (isinstance(dim, Rows) and dim.multiple != 1) for dim in shape):
            raise SplitError(f"{name!r} would have to be filled with a constant, and its shape is {spell(shape)}")
        batch = BATCH_SIZE
        if of is not None:
            batch = f"{name}.batch"
            source, axis = of
            self.made.append(helper.make_node("Shape", [source], [batch], start=axis, end=axis + 1))
        pieces = []
        for axis, dim in enumerate(shape):
            if isinstance(dim, int):
                constant = int64_constant(f"{name}.size_{axis}", [dim])
                self.constants[constant.name] = constant
            pieces.append(batch if isinstance(dim, Rows) else f"{name}.size_{axis}")
        self.made.append(helper.make_node("Concat", pieces, [f"{name}.shape"], axis=0))
        return f"{name}.shape"

    def _number(self, value: str, row: np.ndarray) -> str:
        """Write a constant that stands for a value; gives its name."""
        for free in numbered(f"{value}.of_gate_{self.index}"):
            tensor = numpy_helper.from_array(np.array(row), free)
            if self.constants.setdefault(free, tensor) == tensor:
                break
        return free

    def _fresh(self, name: str, like: str) -> str:
        taken = {*self.shapes, *self.program.producer}
        free = next(one for one in numbered(name) if one not in taken)
        self.origins[free] = self.origins.get(like, like)
        self.shapes[free] = self.program.shapes.get(like, ())
        if like in self.program.dtypes:
            self.dtypes[free] = self.program.dtypes[like]
        return free


def _shortened(row: np.ndarray) -> np.ndarray:
    """Cut the axes along which nothing changes to 1."""
    for axis in range(row.ndim):
        first = row.take([0], axis) if row.shape[axis] else row
        if np.array_equal(np.broadcast_to(first, row.shape), row):
            row = first
    return row

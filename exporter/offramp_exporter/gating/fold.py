"""What a program becomes when some of its values are fixed: constants are propagated as far as that is exact.

A value that then is the same number whatever the input is *known*; one that equals an earlier value is that value
(`0*f + x` is `x`), wherever the two have provably the same shape. What is known is found by running the operator
itself, at two batch sizes, so that no operator needs a rule of its own for constants.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from offramp_runtime import open_device
from onnx import NodeProto, helper, numpy_helper

from offramp_exporter.program import PROBE_BATCHES, Program
from offramp_exporter.sizes import BATCH_SIZE
from offramp_exporter.split import Kind, classify
from offramp_exporter.values import Rows, Shape

PHI: Final = "Phi"
"""Operator of a merge: of (run, skip, score) it is `run` where the gate is open, else `skip`."""

_ABSORBING: Final = {"Mul": 0, "MatMul": 0, "And": False, "Or": True}
"""One input of this makes the output the same."""
_NEUTRAL: Final = {"Add": 0, "Sum": 0, "Mul": 1, "And": True, "Or": False}
"""Inputs of this leave the other as it is."""
_NEUTRAL_SECOND: Final = {"Sub": 0, "Div": 1, "Pow": 1}
"""A second input of this leaves the first as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A value that depends on the batch size alone.

    Attributes:
        arrays: It at each of `PROBE_BATCHES`.
        axis: Its axis that is the batch, if it has one.
    """

    arrays: tuple[np.ndarray, ...]
    axis: int | None

    def is_all(self, number: float) -> bool:
        """Tell whether every element is a number."""
        return all(bool((array == number).all()) for array in self.arrays)

    def equals(self, other: "Known") -> bool:
        """Tell whether two are the same."""
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(self.arrays, other.arrays, strict=True))

    @property
    def row(self) -> np.ndarray:
        """The value with one row on its batch axis."""
        first = self.arrays[0]
        return first if self.axis is None else first.take([0], self.axis)

    @property
    def has_equal_rows(self) -> bool:
        """Whether every row holds the same numbers."""
        return all(bool((array == np.broadcast_to(self.row, array.shape)).all()) for array in self.arrays)


Resolved: TypeAlias = str | Known
"""What a value is: an unfolded value, by name, or a constant."""


class Constants:
    """Runs operators whose inputs are known.

    Attributes:
        kinds: What each of the program's values depends on.
    """

    def __init__(self, program: Program) -> None:
        self._program, self.kinds = program, classify(program)
        self._device = open_device("cpu")
        self._batches = (1,) if program.is_one_row else PROBE_BATCHES
        self._found: dict[str, Known | None] = {}

    def filled(self, value: str, number: float) -> Known | None:
        """Give a constant of a value's shape and type; None where those are not known."""
        shape, kind = self._program.shapes.get(value), self._program.dtypes.get(value)
        if shape is None or None in shape or not kind:
            return None
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        arrays = tuple(np.full(_sizes_at(shape, batch), number, dtype) for batch in self._batches)
        return Known(arrays, _batch_axis(shape))

    def of(self, value: str) -> Known | None:
        """Give a value that depends on constants and the batch size alone; None if it does not."""
        if value not in self._found:
            self._found[value] = self._of(value)
        return self._found[value]

    def _of(self, value: str) -> Known | None:
        tensor = self._program.initializers.get(value)
        if tensor is not None:
            return Known((numpy_helper.to_array(tensor),) * len(self._batches), None)
        if value == BATCH_SIZE:
            return Known(tuple(np.array([batch], dtype=np.int64) for batch in self._batches), None)
        if self.kinds.get(value, Kind.DATA) is Kind.DATA:
            return None
        node = self._program.nodes[self._program.producer[value]]
        inputs = [self.of(name) if name else None for name in node.input]
        made = self.run(node, inputs)
        return None if made is None else made[list(node.output).index(value)]

    def run(self, node: NodeProto, inputs: Sequence[Known | None]) -> list[Known] | None:
        """Run a node on what is known; None where it cannot be run, or would need something that is not known."""
        if any(name and known is None for name, known in zip(node.input, inputs, strict=True)):
            return None
        names = [f"in_{i}" if name else "" for i, name in enumerate(node.input)]
        outputs = [f"out_{i}" if name else "" for i, name in enumerate(node.output)]
        copy = NodeProto(op_type=node.op_type, domain=node.domain, input=names, output=outputs)
        copy.attribute.extend(node.attribute)
        found = []
        try:
            for index in range(len(self._batches)):
                feeds = {name: known.arrays[index] for name, known in zip(names, inputs, strict=True) if known}
                found.append(self._run_once(copy, feeds))
        except Exception:  # ONNX Runtime's errors have no public base; what it does not run stays unfolded
            return None
        axes = [_batch_axis(self._program.shapes.get(name, ())) for name in node.output]
        return [Known(arrays, axis) for arrays, axis in zip(zip(*found, strict=True), axes, strict=True)]

    def _run_once(self, node: NodeProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        told = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feeds.items()
        ]
        made = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        model = helper.make_model(
            helper.make_graph([node], "constants", told, made),
            opset_imports=list(self._program.opset_imports),
            ir_version=self._program.ir_version,
        )
        session = self._device.load(model.SerializeToString(), node.op_type)
        values = iter(self._device.run(session, feeds, [], [one.name for one in made])[1])
        return [next(values) if name else np.zeros(0) for name in node.output]


class Folding:
    """A program with some values fixed.

    Args:
        program: It; merges in it are nodes `PHI`.
        constants: Of the same program.
        fixed: What some of its values are taken to be.
    """

    def __init__(self, program: Program, constants: Constants, fixed: Mapping[str, Known]) -> None:
        self._program, self._constants = program, constants
        self.resolved: dict[str, Resolved] = dict(fixed)
        for node in program.nodes:
            inputs = [self.of(name) for name in node.input]
            is_changed = any(one != name for one, name in zip(inputs, node.input, strict=True))
            if is_changed and node.output[0] not in fixed:
                self.resolved.update(self._simplified(node, inputs))

    def of(self, value: str) -> Resolved:
        """Give what a value is."""
        return self.resolved.get(value, value)

    def live(self, wanted: Iterable[str]) -> set[int]:
        """Find the nodes that some values still need."""
        found: set[int] = set()
        open_values = [one for one in map(self.of, wanted) if isinstance(one, str)]
        while open_values:
            i = self._program.producer.get(open_values.pop())
            if i is not None and i not in found:
                found.add(i)
                read = map(self.of, self._program.nodes[i].input)
                open_values.extend(one for one in read if isinstance(one, str) and one)
        return found

    def _simplified(self, node: NodeProto, inputs: Sequence[Resolved]) -> dict[str, Resolved]:
        simple = None
        if node.op_type != PHI:
            known = [one if isinstance(one, Known) else self._constants.of(one) if one else None for one in inputs]
            made = self._constants.run(node, known)
            if made is not None:
                return {name: one for name, one in zip(node.output, made, strict=True) if name}
            simple = self._rewritten(node, inputs, known)
        elif _are_the_same(inputs[0], inputs[1]):
            simple = inputs[0]
        return {} if simple is None else {node.output[0]: simple}

    def _rewritten(self, node: NodeProto, inputs: Sequence[Resolved], known: Sequence[Known | None]) -> Resolved | None:
        """Give what a node with some known inputs comes to, if that is no longer the node's work."""
        output, operator = node.output[0], node.op_type
        if operator in ("Identity", "Dropout"):
            return inputs[0]
        if operator == "Relu" and isinstance(inputs[0], str) and self._is_above_zero(inputs[0]):
            return inputs[0]
        if operator == "Where":
            return self._chosen(inputs, known, output)
        if any(one is not None and one.is_all(_ABSORBING[operator]) for one in known if operator in _ABSORBING):
            return self._constants.filled(output, _ABSORBING[operator])
        if operator == "Div" and known[0] is not None and known[0].is_all(0):
            return self._constants.filled(output, 0)
        if operator in _NEUTRAL:
            left = [i for i, one in enumerate(known) if one is None or not one.is_all(_NEUTRAL[operator])]
            return self._shaped(inputs[left[0]], output) if len(left) == 1 else None
        if operator in _NEUTRAL_SECOND and known[1] is not None and known[1].is_all(_NEUTRAL_SECOND[operator]):
            return self._shaped(inputs[0], output)
        return None

    def _is_above_zero(self, value: str) -> bool:
        """Tell whether a value went through a ReLU: a block's does nothing to the shortcut from the block before."""
        i = self._program.producer.get(value)
        if i is None:
            return False
        node = self._program.nodes[i]
        if node.op_type == PHI:
            sides = (self.of(name) for name in node.input[:2])
            return all(isinstance(side, str) and self._is_above_zero(side) for side in sides)
        return bool(node.op_type == "Relu")

    def _chosen(self, inputs: Sequence[Resolved], known: Sequence[Known | None], output: str) -> Resolved | None:
        condition, *choices = known
        for place, number in enumerate((True, False)):
            if condition is not None and condition.is_all(number):
                return self._shaped(choices[place] or inputs[1 + place], output)
        return self._shaped(inputs[1], output) if _are_the_same(inputs[1], inputs[2]) else None

    def _shaped(self, value: Resolved, output: str) -> Resolved | None:
        """Give a value in the place of another, if it is the same after broadcasting."""
        shape = self._program.shapes.get(output)
        if shape is None or None in shape:
            return None
        if isinstance(value, str):
            return value if self._program.shapes.get(value) == shape else None
        model = self._constants.filled(output, 0)
        if model is None:
            return None
        arrays = tuple(np.broadcast_to(a, b.shape) for a, b in zip(value.arrays, model.arrays, strict=True))
        return replace(model, arrays=arrays)


def _are_the_same(a: Resolved, b: Resolved) -> bool:
    if isinstance(a, Known) and isinstance(b, Known):
        return a.equals(b)
    return isinstance(a, str) and a == b


def _sizes_at(shape: Shape, batch: int) -> tuple[int, ...]:
    return tuple(dim.multiple * batch if isinstance(dim, Rows) else dim or 0 for dim in shape)


def _batch_axis(shape: Shape) -> int | None:
    return next((axis for axis, dim in enumerate(shape) if isinstance(dim, Rows)), None)

"""An exit's rule -> its native score in the graph of one row, and what the manifest says of it.

Where the rule is one comparison of a float with a constant, the score is that float and the constant becomes a knob.
Everything else gives a score of 1 where a row leaves and 0 where it goes on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from offramp_contract.native import NativeRule, Precision
from onnx import NodeProto, TensorProto, helper, numpy_helper

from offramp_exporter.early_returns.exit_rules import Choice, Rule
from offramp_exporter.rows.one_row import OneRow
from offramp_exporter.sizes import int64_constant

_FLOATS: Final[dict[int, Precision]] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.FLOAT: "float32",
    TensorProto.DOUBLE: "float64",
}
_SIGNS: Final = {"Greater": (">", "<"), "GreaterOrEqual": (">=", "<="), "Less": ("<", ">"), "LessOrEqual": ("<=", ">=")}
"""A comparison read from left to right, and from right to left."""

_OPPOSITE: Final = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}
_SAME_ELEMENT: Final = {
    *("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Cast"),
    *("ReduceMin", "ReduceMax", "ReduceSum", "ReduceProd", "ReduceMean"),
}
"""What leaves the one element of a tensor as it is, true or false."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """`score > threshold`, as the network computes it.

    Attributes:
        score: The value on its data side, a float of one element.
        sign: `>`, `>=`, `<` or `<=`.
        threshold: The constant.
        precision: In what it compares.
        is_negated: Whether the network takes the opposite of its answer.
    """

    score: str
    sign: str
    threshold: float
    precision: Precision
    is_negated: bool = False

    @property
    def leaves(self) -> str:
        """The sign where yes leaves."""
        return _OPPOSITE[self.sign] if self.is_negated else self.sign

    def __str__(self) -> str:
        return f"score {self.leaves} {self.threshold:g}"


def comparison_behind(graph: OneRow, value: str) -> Comparison | None:
    """Find the comparison with a constant that decides a question, if it is one."""
    is_negated = False
    while (node := graph.producer.get(value)) is not None:
        if node.op_type == "Not":
            is_negated, value = not is_negated, node.input[0]
        elif node.op_type in _SAME_ELEMENT and _size(graph, node.input[0]) == 1:
            value = node.input[0]
        elif node.op_type in _SIGNS:
            return _comparison(graph, node, is_negated)
        else:
            return None
    return None


def _comparison(graph: OneRow, node: NodeProto, is_negated: bool) -> Comparison | None:
    for side, (data, other) in enumerate((tuple(node.input), tuple(reversed(node.input)))):
        constant = graph.constants.get(other)
        precision = _FLOATS.get(graph.dtypes.get(data, 0))
        if constant is None or data in graph.constants or precision is None or _size(graph, data) != 1:
            continue
        values = numpy_helper.to_array(constant)
        if values.size != 1 or not math.isfinite(values.item()):
            continue
        score = _as_float32(graph, data)
        if score is not None:
            threshold = _shortest(values, precision)
            return Comparison(score, _SIGNS[node.op_type][side], threshold, precision, is_negated)
    return None


def _as_float32(graph: OneRow, value: str) -> str | None:
    """Give a value that float32 holds exactly: a float64 only where it was made of a narrower float."""
    while graph.dtypes.get(value) == TensorProto.DOUBLE:
        node = graph.producer.get(value)
        if node is None or node.op_type not in _SAME_ELEMENT or _size(graph, node.input[0]) != 1:
            return None
        value = node.input[0]
    return value if graph.dtypes.get(value) in _FLOATS else None


def _shortest(values: np.ndarray, precision: Precision) -> float:
    """Write a constant as a person did: of float32 0.8, not 0.800000011920929; rounding gives it back."""
    return float(np.format_float_positional(np.dtype(precision).type(values.item()), unique=True))


def _size(graph: OneRow, value: str) -> int | None:
    shape = graph.shapes.get(value)
    return None if shape is None else math.prod(shape)


class ScoreWriter:
    """Writes native scores into a graph of one row, in place.

    Args:
        graph: It.
    """

    def __init__(self, graph: OneRow) -> None:
        self._graph = graph
        self._written: dict[object, str] = {}
        rows = [int64_constant("offramp.native.row", [1, 1])]
        scalars = {"low": -np.inf, "high": np.inf, "zero": 0.0, "one": 1.0}
        numbers = [numpy_helper.from_array(np.float32(v).reshape(1, 1), _own(name)) for name, v in scalars.items()]
        graph.model.graph.initializer.extend(rows + numbers)

    def write(self, rule: Rule, output: str, sources: tuple[str, ...]) -> NativeRule:
        """Write the score of a rule as the value `output`, float32 (1, 1), and describe the rule."""
        comparison = None
        if isinstance(rule, Choice) and isinstance(rule.yes, bool) and isinstance(rule.no, bool):
            comparison = comparison_behind(self._graph, rule.question)
        if comparison is None:
            self._add(helper.make_node("Identity", [self._truth(rule)], [output]))
            return NativeRule(
                threshold=0.5, above=True, is_strict=False, precision="float32", is_knob=False, sources=sources
            )
        leaves_on_yes = isinstance(rule, Choice) and rule.yes is True
        sign = comparison.leaves if leaves_on_yes else _OPPOSITE[comparison.leaves]
        self._number(comparison.score, sign, is_turned=sign != comparison.sign, output=output)
        return NativeRule(
            threshold=comparison.threshold,
            above=sign[0] == ">",
            is_strict=len(sign) == 1,
            precision=comparison.precision,
            is_knob=True,
            sources=sources,
        )

    def _number(self, score: str, sign: str, is_turned: bool, output: str) -> None:
        """Write a score; NaN, of which every comparison is false, leaves only where "false" leaves."""
        names = [f"{output}.{part}" for part in ("row", "float", "is_nan")]
        leaves = sign[0] == ">"
        stand_in = _own("high" if leaves == is_turned else "low")
        self._add(
            helper.make_node("Reshape", [score, _own("row")], [names[0]]),
            helper.make_node("Cast", [names[0]], [names[1]], to=TensorProto.FLOAT),
            helper.make_node("IsNaN", [names[1]], [names[2]]),
            helper.make_node("Where", [names[2], stand_in, names[1]], [output]),
        )

    def _truth(self, rule: Rule) -> str:
        """Write 1 where a rule leaves and 0 where not; shared parts once."""
        if not isinstance(rule, Choice):
            return _own("one" if rule else "zero")
        if rule not in self._written:
            yes, no = self._truth(rule.yes), self._truth(rule.no)
            name = f"offramp.native.{len(self._written)}"
            self._add(
                helper.make_node("Reshape", [rule.question, _own("row")], [f"{name}.asked"]),
                helper.make_node("Where", [f"{name}.asked", yes, no], [name]),
            )
            self._written[rule] = name
        return self._written[rule]

    def _add(self, *nodes: NodeProto) -> None:
        self._graph.model.graph.node.extend(nodes)


def _own(name: str) -> str:
    return f"offramp.native.{name}"


def comparisons_in(graph: OneRow, values: Iterator[str]) -> dict[str, str]:
    """Write for people what questions compare, where they compare with a constant."""
    found = {value: comparison_behind(graph, value) for value in values}
    return {value: str(comparison) for value, comparison in found.items() if comparison is not None}

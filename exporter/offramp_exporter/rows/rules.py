"""How each operator computes many rows at once, given how it computes one.

A rule reads the shapes of one row and writes nodes for the batch. Where the batch lies on an axis that the operator
treats like any other, the operator stays as it is; elsewhere its inputs get a new axis 0.
"""

from collections.abc import Mapping
from typing import Final

from onnx import NodeProto

from offramp_exporter.gating.marks import OPERATOR
from offramp_exporter.rows.batch import Batch, NoRule, Rule
from offramp_exporter.rows.rules_linear import LINEAR_RULES
from offramp_exporter.rows.rules_shape import SHAPE_RULES
from offramp_exporter.sizes import attribute

_ELEMENTWISE: Final = (
    *("Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Sign", "Floor", "Ceil", "Round", "Erf", "Sin", "Cos", "Tan"),
    *("Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Softplus"),
    *("Softsign", "Mish", "ThresholdedRelu", "PRelu", "Clip", "Cast", "CastLike", "Identity", "Not", "IsNaN", "IsInf"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Min", "Max", "Sum", "Mean", "And", "Or", "Xor", "Where", "Swish"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BitwiseAnd", "BitwiseOr", "BitwiseNot", "Atan"),
)
_BY_ROW: Final = (
    *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "BatchNormalization"),
    *("InstanceNormalization", "GroupNormalization", "LRN", "DepthToSpace", "SpaceToDepth", "Conv", "ConvTranspose"),
)
_IDLE_ON_ONE: Final = {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp"}
"""Reductions that give back the one element of an axis of size 1."""


def rule_of(operator: str) -> Rule | None:
    """Give an operator's rule, or None where there is none."""
    return _RULES.get(operator)


def _elementwise(batch: Batch, node: NodeProto) -> None:
    output = node.output[0]
    rank = len(batch.shape(output))
    data = [name for name in node.input if name and batch.is_data(name)]
    from_right = {_from_right(batch, name) for name in data}
    axis = rank - distance if len(from_right) == 1 and (distance := from_right.pop()) is not None else None
    if axis is not None and batch.shape(output)[axis] == 1:
        batch.copy(node, [batch.held(name).name if name in data else name for name in node.input])
        batch.hold(output, axis)
        return
    batch.copy(node, [batch.lifted(name, rank) if name in data else name for name in node.input])
    batch.hold(output, None)


def _from_right(batch: Batch, value: str) -> int | None:
    axis = batch.held(value).axis
    return None if axis is None else len(batch.shape(value)) - axis


def _by_row(batch: Batch, node: NodeProto) -> None:
    """Rows are axis 0, and each is computed alone."""
    if any(batch.is_data(name) for name in node.input[1:]) or len(node.output) > 1:
        raise NoRule
    batch.copy_folded(node, [batch.folded(node.input[0]), *node.input[1:]])


def _along_axis(default: int, first_is_all: bool = True) -> Rule:
    """Of an operator with one `axis` that its outputs keep."""

    def rule(batch: Batch, node: NodeProto) -> None:
        value = node.input[0]
        rank = len(batch.shape(value))
        along = attribute(node, "axis", default) % rank
        held = batch.held(value)
        is_kept = held.axis is not None and (held.axis < along if not first_is_all else held.axis != along)
        name, axis = (held.name, held.axis) if is_kept else (batch.lifted(value), None)
        batch.copy(node, [name, *node.input[1:]], axis=along if is_kept else along + 1)
        for output in filter(None, node.output):
            batch.hold(output, axis)

    return rule


def _arg_extreme(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    along = attribute(node, "axis", 0) % len(batch.shape(value))
    is_dropped = not attribute(node, "keepdims", 1)
    axis = batch.held(value).axis
    if axis is None or axis == along:
        batch.copy(node, [batch.lifted(value)], axis=along + 1)
        batch.hold(output, None)
        return
    batch.copy(node, [batch.held(value).name], axis=along)
    batch.hold(output, axis - (is_dropped and along < axis))


def _cumulated(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    along = batch.constant(node.input[1])[0] % len(batch.shape(value))
    batch.copy(node, [batch.lifted(value), batch.numbers([along + 1])])
    batch.hold(output, None)


def _reduced(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    rank = len(batch.shape(value))
    axes = _axes(batch, node, rank)
    is_kept, axis = bool(attribute(node, "keepdims", 1)), batch.held(value).axis
    if axis is not None and axis not in axes:
        batch.copy(_with_axes(node), [batch.held(value).name, batch.numbers(axes)], noop_with_empty_axes=1)
        batch.hold(output, axis if is_kept else axis - sum(other < axis for other in axes))
    elif axis is not None and is_kept and node.op_type in _IDLE_ON_ONE:
        others = [other for other in axes if other != axis]
        batch.copy(_with_axes(node), [batch.held(value).name, batch.numbers(others)], noop_with_empty_axes=1)
        batch.hold(output, axis)
    else:
        moved = batch.numbers([other + 1 for other in axes])
        batch.copy(_with_axes(node), [batch.lifted(value), moved], noop_with_empty_axes=1)
        batch.hold(output, None)


def _axes(batch: Batch, node: NodeProto, rank: int) -> list[int]:
    written = next((list(held.ints) for held in node.attribute if held.name == "axes"), None)
    if written is None and len(node.input) > 1 and node.input[1]:
        written = batch.constant(node.input[1])
    if not written:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in written)


def _with_axes(node: NodeProto) -> NodeProto:
    """Copy a reduction without the `axes` that older operator sets write as an attribute."""
    copy: NodeProto = NodeProto.FromString(node.SerializeToString())
    kept = [held for held in copy.attribute if held.name != "axes"]
    del copy.attribute[:]
    copy.attribute.extend(kept)
    return copy


_RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys((*_ELEMENTWISE, OPERATOR), _elementwise),
    **dict.fromkeys(_BY_ROW, _by_row),
    **dict.fromkeys((*_IDLE_ON_ONE, "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum"), _reduced),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "TopK"), _along_axis(-1)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _along_axis(-1, first_is_all=False)),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg_extreme),
    "CumSum": _cumulated,
    **SHAPE_RULES,
    **LINEAR_RULES,
}

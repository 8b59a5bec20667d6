"""Rules for the operators that move, cut and join: see `offramp_exporter.rows.rules`."""

from collections.abc import Mapping
from typing import Final

from onnx import NodeProto

from offramp_exporter.rows.batch import Batch, NoRule, Rule
from offramp_exporter.sizes import attribute


def _reshape(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    target, held = batch.shape(output), batch.held(value)
    name = held.name if held.axis == 0 else batch.lifted(value)
    if target and target[0] == 1:
        batch.hold(output, 0, batch.reshaped(name, target[1:], output))
    else:
        batch.hold(output, None, batch.reshaped(name, target, output))


def _transpose(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    rank = len(batch.shape(value))
    order = next((list(held.ints) for held in node.attribute if held.name == "perm"), list(range(rank))[::-1])
    held = batch.held(value)
    if held.axis is None:
        batch.copy(node, [held.name], perm=[0, *(axis + 1 for axis in order)])
        batch.hold(output, None)
    else:
        batch.copy(node, [held.name], perm=order)
        batch.hold(output, order.index(held.axis))


def _squeeze(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    shape, held = batch.shape(value), batch.held(value)
    if len(node.input) > 1 and node.input[1]:
        axes = sorted(axis % len(shape) for axis in batch.constant(node.input[1]))
    else:
        axes = [axis for axis, size in enumerate(shape) if size == 1]
    axes = [axis for axis in axes if shape[axis] == 1]  # torch leaves the others alone
    if held.axis is not None and held.axis not in axes:
        _squeezed(batch, held.name, axes, output)
        batch.hold(output, held.axis - sum(axis < held.axis for axis in axes))
    elif held.axis == 0:
        _squeezed(batch, held.name, axes[1:], output)
        batch.hold(output, None)
    else:
        _squeezed(batch, batch.lifted(value), [axis + 1 for axis in axes], output)
        batch.hold(output, None)


def _squeezed(batch: Batch, name: str, axes: list[int], output: str) -> None:
    if axes:
        batch.add("Squeeze", [name, batch.numbers(axes)], output)
    else:
        batch.add("Identity", [name], output)


def _unsqueeze(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    rank = len(batch.shape(output))
    axes = sorted(axis % rank for axis in batch.constant(node.input[1]))
    held = batch.held(value)
    if held.axis is None:
        batch.add("Unsqueeze", [held.name, batch.numbers([axis + 1 for axis in axes])], output)
        batch.hold(output, None)
    else:
        batch.add("Unsqueeze", [held.name, batch.numbers(axes)], output)
        batch.hold(output, [axis for axis in range(rank) if axis not in axes][held.axis])


def _concat(batch: Batch, node: NodeProto) -> None:
    output = node.output[0]
    along = attribute(node, "axis", 0) % len(batch.shape(output))
    axes = {batch.held(name).axis for name in node.input if batch.is_data(name)}
    axis = axes.pop() if len(axes) == 1 else None
    if axis == along:
        axis = None
    batch.copy(node, [_spread(batch, name, axis) for name in node.input], axis=along + (axis is None))
    batch.hold(output, axis)


def _spread(batch: Batch, value: str, axis: int | None) -> str:
    """Give a value with the batch on an axis, or on a new axis 0; a constant is repeated."""
    if not batch.is_data(value):
        return batch.spread(value, axis)
    return batch.lifted(value) if axis is None else batch.at(value, axis)


def _split(batch: Batch, node: NodeProto) -> None:
    value = node.input[0]
    along = attribute(node, "axis", 0) % len(batch.shape(value))
    held = batch.held(value)
    is_kept = held.axis not in (None, along)
    name = held.name if is_kept else batch.lifted(value)
    batch.copy(node, [name, *node.input[1:]], axis=along if is_kept else along + 1)
    for output in node.output:
        batch.hold(output, held.axis if is_kept else None)


def _slice(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    rank, held = len(batch.shape(value)), batch.held(value)
    starts = batch.constant(node.input[1])
    axes = batch.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else list(range(len(starts)))
    axes = [axis % rank for axis in axes]
    is_kept = held.axis is not None and held.axis not in axes
    moved = axes if is_kept else [axis + 1 for axis in axes]
    name = held.name if is_kept else batch.lifted(value)
    batch.copy(node, [name, node.input[1], node.input[2], batch.numbers(moved), *node.input[4:]])
    batch.hold(output, held.axis if is_kept else None)


def _gather(batch: Batch, node: NodeProto) -> None:
    table, indices = node.input[:2]
    if batch.is_data(table) and batch.is_data(indices):
        _gather_each(batch, node)
    elif batch.is_data(table):
        _gather_fixed(batch, node)
    else:
        _look_up(batch, node)


def _gather_fixed(batch: Batch, node: NodeProto) -> None:
    """Pick the same elements of every row."""
    value, output = node.input[0], node.output[0]
    along = attribute(node, "axis", 0) % len(batch.shape(value))
    held = batch.held(value)
    if held.axis is None or held.axis == along:
        batch.copy(node, [batch.lifted(value), node.input[1]], axis=along + 1)
        batch.hold(output, None)
        return
    batch.copy(node, [held.name, node.input[1]], axis=along)
    moved = len(batch.shape(node.input[1])) - 1 if along < held.axis else 0
    batch.hold(output, held.axis + moved)


def _look_up(batch: Batch, node: NodeProto) -> None:
    """Pick rows of a table by each row's numbers: an embedding."""
    table, indices = node.input[:2]
    along = attribute(node, "axis", 0) % len(batch.shape(table))
    held = batch.held(indices)
    if held.axis is None and along:
        raise NoRule
    batch.copy(node, [table, held.name])
    batch.hold(node.output[0], None if held.axis is None else along + held.axis)


def _gather_each(batch: Batch, node: NodeProto) -> None:
    """Pick from each row by its own numbers."""
    table, indices = node.input[:2]
    if attribute(node, "axis", 0) % len(batch.shape(table)):
        raise NoRule
    rank = len(batch.shape(indices))
    numbers = batch.add("Unsqueeze", [batch.lifted(indices), batch.numbers([rank + 1])])
    batch.add("GatherND", [batch.lifted(table), numbers], node.output[0], batch_dims=1)
    batch.hold(node.output[0], None)


def _gather_nd(batch: Batch, node: NodeProto) -> None:
    inputs = [_spread(batch, name, None) for name in node.input[:2]]
    batch.copy(node, inputs, batch_dims=attribute(node, "batch_dims", 0) + 1)
    batch.hold(node.output[0], None)


def _elements(batch: Batch, node: NodeProto) -> None:
    """`GatherElements` and `ScatterElements`: all inputs of one rank, along one axis."""
    along = attribute(node, "axis", 0) % len(batch.shape(node.input[0]))
    batch.copy(node, [_spread(batch, name, None) for name in node.input], axis=along + 1)
    batch.hold(node.output[0], None)


def _scatter_nd(batch: Batch, node: NodeProto) -> None:
    """Write into each row: a place is the row's number and the place in it."""
    data, indices, updates = (_spread(batch, name, None) for name in node.input)
    *sizes, _ = batch.shape(node.input[1])
    rows = batch.add("Unsqueeze", [batch.row_numbers(), batch.numbers(range(1, len(sizes) + 2))])
    rows = batch.add("Expand", [rows, batch.numbers([1, *sizes, 1])])
    places = batch.add("Concat", [rows, indices], axis=len(sizes) + 1)
    batch.copy(node, [data, places, updates])
    batch.hold(node.output[0], None)


def _expand(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    target, held = batch.shape(output), batch.held(value)
    axis = None if held.axis is None else len(target) - len(batch.shape(value)) + held.axis
    if axis is not None and target[axis] == 1:
        batch.add("Expand", [held.name, batch.numbers(target)], output)
        batch.hold(output, axis)
    else:
        batch.add("Expand", [batch.lifted(value, len(target)), batch.numbers([1, *target])], output)
        batch.hold(output, None)


def _tile(batch: Batch, node: NodeProto) -> None:
    value, output, held = node.input[0], node.output[0], batch.held(node.input[0])
    repeats = batch.constant(node.input[1])
    if held.axis is not None and repeats[held.axis] == 1:
        batch.copy(node, [held.name, node.input[1]])
        batch.hold(output, held.axis)
    else:
        batch.copy(node, [batch.lifted(value), batch.numbers([1, *repeats])])
        batch.hold(output, None)


def _pad(batch: Batch, node: NodeProto) -> None:
    value, output, held = node.input[0], node.output[0], batch.held(node.input[0])
    rank = len(batch.shape(value))
    written = batch.constant(node.input[1])
    axes = batch.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else list(range(rank))
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis % rank], after[axis % rank] = written[place], written[place + len(axes)]
    fill = node.input[2] if len(node.input) > 2 else ""
    if held.axis is not None and not before[held.axis] and not after[held.axis]:
        batch.copy(node, [held.name, batch.numbers([*before, *after]), fill])
        batch.hold(output, held.axis)
    else:
        batch.copy(node, [batch.lifted(value), batch.numbers([0, *before, 0, *after]), fill])
        batch.hold(output, None)


def _shape(batch: Batch, node: NodeProto) -> None:
    """Read the size of one row, which is a constant."""
    shape = batch.shape(node.input[0])
    start, end = attribute(node, "start", 0), attribute(node, "end", len(shape))
    batch.add("Identity", [batch.numbers(shape[start:end])], node.output[0])


def _one_hot(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    along = attribute(node, "axis", -1) % len(batch.shape(output))
    batch.copy(node, [batch.lifted(value), *node.input[1:]], axis=along + 1)
    batch.hold(output, None)


def _triangle(batch: Batch, node: NodeProto) -> None:
    value, output, held = node.input[0], node.output[0], batch.held(node.input[0])
    is_kept = held.axis is not None and held.axis < len(batch.shape(value)) - 2
    batch.copy(node, [held.name if is_kept else batch.lifted(value), *node.input[1:]])
    batch.hold(output, held.axis if is_kept else None)


def _resize(batch: Batch, node: NodeProto) -> None:
    value, output = node.input[0], node.output[0]
    rank = len(batch.shape(value))
    if any(held.name == "axes" for held in node.attribute) or batch.shape(value)[0] != 1:
        raise NoRule
    inputs = [batch.at(value, 0), *node.input[1:]]
    if len(inputs) > 3 and inputs[3]:  # sizes, the batch's among them
        inputs[3] = batch.numbers(batch.constant(inputs[3])[1:])
        batch.copy(node, inputs, axes=list(range(1, rank)))
    else:
        batch.copy(node, inputs)
    batch.hold(output, 0)


def _dropout(batch: Batch, node: NodeProto) -> None:
    held = batch.held(node.input[0])
    batch.add("Identity", [held.name], node.output[0])
    batch.hold(node.output[0], held.axis)


SHAPE_RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    **dict.fromkeys(("GatherElements", "ScatterElements"), _elements),
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Shape": _shape,
    "OneHot": _one_hot,
    "Trilu": _triangle,
    "Resize": _resize,
    "Dropout": _dropout,
}

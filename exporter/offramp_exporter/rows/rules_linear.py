"""Rules for products, recurrences and attention: see `offramp_exporter.rows.rules`."""

from collections.abc import Mapping
from string import ascii_letters
from typing import Final

from onnx import NodeProto

from offramp_exporter.rows.batch import Batch, NoRule, Rule
from offramp_exporter.sizes import attribute


def _gemm(batch: Batch, node: NodeProto) -> None:
    rows, *weights = node.input
    added = weights[1] if len(weights) > 1 and weights[1] else None
    is_plain = batch.is_data(rows) and not attribute(node, "transA", 0) and not batch.is_data(weights[0])
    if not is_plain or (added is not None and (batch.is_data(added) or _has_rows(batch.shape(added)))):
        raise NoRule
    batch.copy_folded(node, [batch.folded(rows), *weights])


def _has_rows(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] != 1


def _matmul(batch: Batch, node: NodeProto) -> None:
    output = node.output[0]
    left, right = node.input
    axis = _shared_axis(batch, node)
    if axis is not None:
        batch.copy(node, [batch.held(name).name if batch.is_data(name) else name for name in node.input])
        batch.hold(output, axis)
        return
    ranks = len(batch.shape(left)), len(batch.shape(right))
    vector, other = (left, right) if ranks[0] == 1 else (right, left)
    if min(ranks) == 1 < max(ranks) and not batch.is_data(vector):
        batch.copy(node, [batch.lifted(name) if name == other else name for name in node.input])
        batch.hold(output, None)
        return
    if min(ranks) < 2 and not (ranks == (1, 2) and not batch.is_data(right)):
        _vectors(batch, node)
        return
    rank = 0 if ranks == (1, 2) else max(ranks)  # rows of vectors are a matrix
    batch.copy(node, [batch.lifted(name, rank) if batch.is_data(name) else name for name in node.input])
    batch.hold(output, None)


def _shared_axis(batch: Batch, node: NodeProto) -> int | None:
    """Give the output's axis of the batch, if the product may stay as it is."""
    left, right = node.input
    if len(batch.shape(left)) < 2 or len(batch.shape(right)) < 2:
        return None
    rank = len(batch.shape(node.output[0]))
    places = set()
    for name in filter(batch.is_data, node.input):
        axis = batch.held(name).axis
        places.add(None if axis is None else len(batch.shape(name)) - axis)
    place = places.pop() if len(places) == 1 else None
    if place is None or batch.shape(node.output[0])[rank - place] != 1:
        return None
    is_row_of_left = place == 2 and batch.is_data(left) and not batch.is_data(right)
    return rank - place if place > 2 or is_row_of_left else None


def _vectors(batch: Batch, node: NodeProto) -> None:
    """Multiply with a vector: a matrix of one row or column, taken away afterwards."""
    left, right = node.input
    names, gone = [], []
    for place, name in enumerate((left, right)):
        shape = batch.shape(name)
        held = batch.lifted(name) if batch.is_data(name) else name
        if len(shape) == 1:
            axis = (1 if place == 0 else 2) - (not batch.is_data(name))
            held = batch.add("Unsqueeze", [held, batch.numbers([axis])])
            gone.append(-2 if place == 0 else -1)
        elif len(shape) > 2:
            raise NoRule
        names.append(held)
    product = batch.add("MatMul", names)
    batch.add("Squeeze", [product, batch.numbers(gone)], node.output[0])
    batch.hold(node.output[0], None)


def _einsum(batch: Batch, node: NodeProto) -> None:
    equation = next(held.s.decode() for held in node.attribute if held.name == "equation").replace(" ", "")
    if "..." in equation or "->" not in equation:
        raise NoRule
    terms, result = equation.split("->")
    letter = next(one for one in ascii_letters if one not in equation)
    marked = [
        (letter if batch.is_data(name) else "") + term for name, term in zip(node.input, terms.split(","), strict=True)
    ]
    names = [batch.lifted(name) if batch.is_data(name) else name for name in node.input]
    batch.copy(node, names, equation=f"{','.join(marked)}->{letter}{result}")
    batch.hold(node.output[0], None)


def _recurrent(batch: Batch, node: NodeProto) -> None:
    if attribute(node, "layout", 0) or (len(node.input) > 4 and node.input[4]):
        raise NoRule
    inputs = [batch.at(node.input[0], 1), *node.input[1:]]
    for place in range(5, min(len(inputs), 7)):  # the states at the start
        name = inputs[place]
        if name:
            inputs[place] = batch.at(name, 1) if batch.is_data(name) else batch.spread(name, 1)
    batch.copy(node, inputs)
    for output, axis in zip(node.output, (2, 1, 1), strict=False):
        if output:
            batch.hold(output, axis)


def _attention(batch: Batch, node: NodeProto) -> None:
    if len([output for output in node.output if output]) > 1 or len(node.input) > 4:
        raise NoRule
    if not all(batch.is_data(name) for name in node.input[:3]):
        raise NoRule
    inputs = [batch.at(name, 0) if name and batch.is_data(name) else name for name in node.input]
    batch.copy(node, inputs)
    batch.hold(node.output[0], 0)


LINEAR_RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Attention": _attention,
}

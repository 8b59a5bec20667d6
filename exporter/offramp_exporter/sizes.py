"""The batch size enters a program at one place.

Exported networks read it off whatever tensor is at hand (`x.size(0)` after every block), so a value of stage 3 may
depend on the shape of one in stage 0. Batches are re-formed between stages: such a number must never be carried. Here
every read of a shape becomes constants and the one value `BATCH_SIZE`, which each stage takes from a tensor it has.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from offramp_exporter.values import Rows, Shape, elements_of_row

BATCH_SIZE: Final = "offramp.batch_size"
"""Name of the value that holds the batch size, int64 (1,)."""


def attribute(node: NodeProto, name: str, default: int) -> int:
    """Read an integer attribute of a node."""
    return next((int(held.i) for held in node.attribute if held.name == name), default)


def int64_constant(name: str, values: Iterable[int]) -> TensorProto:
    """Make a one-dimensional int64 initializer."""
    return numpy_helper.from_array(np.array(list(values), dtype=np.int64), name)


def replace_shape_reads(
    nodes: Iterable[NodeProto], shapes: Mapping[str, Shape]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Write every `Shape` and `Size` of a value whose shape is known in terms of `BATCH_SIZE`.

    Args:
        nodes: In topological order.
        shapes: What is known of each value. A shape with unknown dimensions depends on data, and its read stays.

    Returns:
        The nodes, in topological order, and the initializers they read beyond those of the graph.
    """
    kept: list[NodeProto] = []
    constants: list[TensorProto] = []
    for node in nodes:
        dims = _dims_read(node, shapes)
        if dims is None:
            kept.append(node)
        elif BATCH_SIZE in node.output:
            continue  # a stage graph of ours, which has it under that name already
        elif node.op_type == "Size":
            constants.append(_scalar(f"{node.output[0]}.row", elements_of_row(dims) or 0))
            kept.extend(_element_count(node.output[0], dims))
        else:
            constants.extend(_sizes(node.output[0], dims))
            kept.extend(_shape_vector(node.output[0], dims))
    return kept, constants


def _dims_read(node: NodeProto, shapes: Mapping[str, Shape]) -> Shape | None:
    """Give the dimensions that a node reads, or None if it reads none or they are not known."""
    shape = shapes.get(node.input[0]) if node.op_type in ("Shape", "Size") else None
    if shape is None:
        return None
    end = attribute(node, "end", len(shape))
    dims = shape[attribute(node, "start", 0) : end] if node.op_type == "Shape" else shape
    is_written = None not in dims and (node.op_type == "Shape" or sum(isinstance(d, Rows) for d in dims) <= 1)
    return dims if is_written else None


def _sizes(output: str, dims: Shape) -> Iterator[TensorProto]:
    if not any(isinstance(dim, Rows) for dim in dims):
        yield int64_constant(output, [dim for dim in dims if isinstance(dim, int)])
        return
    for axis, dim in enumerate(dims):
        if dim != Rows():
            yield int64_constant(f"{output}.{axis}", [dim.multiple if isinstance(dim, Rows) else dim or 0])


def _shape_vector(output: str, dims: Shape) -> Iterator[NodeProto]:
    if not any(isinstance(dim, Rows) for dim in dims):
        return
    pieces = []
    for axis, dim in enumerate(dims):
        piece = BATCH_SIZE if dim == Rows() else f"{output}.{axis}"
        if isinstance(dim, Rows) and dim.multiple != 1:
            yield helper.make_node("Mul", [BATCH_SIZE, piece], [f"{piece}.rows"])
            piece = f"{piece}.rows"
        pieces.append(piece)
    yield helper.make_node("Concat", pieces, [output], axis=0)


def _element_count(output: str, dims: Shape) -> Iterator[NodeProto]:
    if not any(isinstance(dim, Rows) for dim in dims):
        yield helper.make_node("Identity", [f"{output}.row"], [output])
        return
    yield helper.make_node("ReduceSum", [BATCH_SIZE], [f"{output}.batch"], keepdims=0)
    yield helper.make_node("Mul", [f"{output}.batch", f"{output}.row"], [output])


def _scalar(name: str, value: int) -> TensorProto:
    return numpy_helper.from_array(np.array(value, dtype=np.int64), name)

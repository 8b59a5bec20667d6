"""Nodes that torch's exporter writes and ONNX Runtime refuses, written as what they mean."""

from collections.abc import Iterable, Mapping

from onnx import NodeProto, TensorProto, helper, numpy_helper

from offramp_exporter.sizes import int64_constant
from offramp_exporter.values import Shape


def without_idle_squeezes(
    nodes: Iterable[NodeProto], shapes: Mapping[str, Shape], initializers: Mapping[str, TensorProto]
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Keep a `Squeeze` to the axes that have size 1: torch's `squeeze(dim)` leaves other axes alone, ONNX's fails.

    Returns:
        The nodes, and the initializers they read beyond those of the graph.
    """
    kept: list[NodeProto] = []
    constants: list[TensorProto] = []
    for node in nodes:
        shape = shapes.get(node.input[0]) if node.op_type == "Squeeze" else None
        axes = initializers.get(node.input[1]) if shape is not None and len(node.input) == 2 else None
        if shape is None or axes is None:
            kept.append(node)
            continue
        wanted = [int(axis) for axis in numpy_helper.to_array(axes).flat]
        of_size_one = [axis for axis in wanted if shape[axis] in (1, None)]
        if of_size_one == wanted:
            kept.append(node)
        elif of_size_one:
            constants.append(int64_constant(f"{node.output[0]}.axes", of_size_one))
            kept.append(helper.make_node("Squeeze", [node.input[0], constants[-1].name], node.output, name=node.name))
        else:
            kept.append(helper.make_node("Identity", [node.input[0]], node.output, name=node.name))
    return kept, constants

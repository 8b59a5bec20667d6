"""A slice of stacked tensors is the tensor that was stacked.

Networks return their exits stacked in one tensor. As a graph, each exit is then a slice of something that needs all
exits, and every stage but the first would be empty. Here a slice is followed back through what works on each stacked
tensor alone (softmax over the classes, a change of axes) to the one it comes from.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from offramp_exporter.sizes import attribute, int64_constant
from offramp_exporter.values import Shape

_ELEMENTWISE: Final = {"Identity", "Cast", "Relu", "Sigmoid", "Tanh", "Exp", "Log", "Neg", "Clip", "Sqrt", "Abs"}
_WITH_A_NUMBER: Final = {"Add", "Sub", "Mul", "Div"}
_ALONG_AN_AXIS: Final = {"Softmax", "LogSoftmax"}


@dataclass(slots=True)
class Unstacking:
    """Rewrites slices; what it adds to a graph is collected here.

    Attributes:
        shapes: What is known of each value; extended.
        dtypes: Each value's element type; extended.
        initializers: The graph's constants.
        constants: Those that the new nodes read beyond them.
    """

    shapes: MutableMapping[str, Shape]
    dtypes: MutableMapping[str, int]
    initializers: Mapping[str, TensorProto]
    constants: list[TensorProto] = field(default_factory=list)
    _producer: dict[str, NodeProto] = field(default_factory=dict)
    _made: list[NodeProto] = field(default_factory=list)

    def rewrite(self, nodes: Iterable[NodeProto]) -> list[NodeProto]:
        """Give the nodes with every slice of stacked tensors replaced by the tensor."""
        kept: list[NodeProto] = []
        for node in nodes:
            self._producer.update(dict.fromkeys(node.output, node))
            piece = self._slice(node)
            if piece is None:
                kept.append(node)
            else:
                kept.extend([*self._made, helper.make_node("Identity", [piece], [node.output[0]], name=node.name)])
            self._made = []
        return kept

    def _slice(self, node: NodeProto) -> str | None:
        index = self.initializers.get(node.input[1]) if node.op_type == "Gather" else None
        shape = self.shapes.get(node.input[0]) if index is not None and not index.dims else None
        if index is None or shape is None:
            return None
        axis = range(len(shape))[attribute(node, "axis", 0)]
        size = shape[axis]
        position = int(numpy_helper.to_array(index))
        if not isinstance(size, int) or not -size <= position < size:
            return None
        return self._piece(node.input[0], axis, position % size, node.output[0])

    def _piece(self, value: str, axis: int, position: int, name: str) -> str | None:
        """Give the value that `value` holds at a position of an axis, or None if it is not known to be one."""
        node, shape = self._producer.get(value), self.shapes.get(value)
        if node is None or shape is None:
            return None
        if node.op_type == "Concat":
            return self._part(node, axis, position, name) if _axis(node, "axis", shape) == axis else None
        return self._through(node, axis, position, name)

    def _through(self, node: NodeProto, axis: int, position: int, name: str) -> str | None:
        """Slice what a node reads, and let the node work on that."""
        shape = self.shapes[node.output[0]]
        attributes = {held.name: helper.get_attribute_value(held) for held in node.attribute}
        source, source_axis = 0, axis
        if node.op_type == "Transpose":
            perm = [int(a) for a in attributes["perm"]]
            source_axis = perm[axis]
            attributes = {"perm": [a - (a > source_axis) for a in perm if a != source_axis]}
        elif node.op_type in _ALONG_AN_AXIS:
            along = _axis(node, "axis", shape, -1)
            if along == axis:
                return None
            attributes["axis"] = along - (along > axis)
        elif node.op_type in _WITH_A_NUMBER:
            numbers = [i for i, read in enumerate(node.input) if self._is_number(read)]
            if len(numbers) != 1:
                return None
            source = 1 - numbers[0]
        elif node.op_type not in _ELEMENTWISE:
            return None
        piece = self._piece(node.input[source], source_axis, position, f"{name}.of")
        if piece is None:
            return None
        reads = [piece if i == source else read for i, read in enumerate(node.input)]
        made = helper.make_node(node.op_type, reads, [f"{name}.slice"], **attributes)
        made.metadata_props.extend(node.metadata_props)
        return self._add(made, node.output[0], axis)

    def _part(self, node: NodeProto, axis: int, position: int, name: str) -> str | None:
        for part in node.input:
            size = (self.shapes.get(part) or (None,) * (axis + 1))[axis]
            if not isinstance(size, int):
                return None
            if position < size:
                return self._whole(part, axis, name) if size == 1 else self._piece(part, axis, position, name)
            position -= size
        return None

    def _whole(self, part: str, axis: int, name: str) -> str:
        """Take away the axis of size 1 along which a tensor was stacked."""
        node, shape = self._producer.get(part), self.shapes[part]
        if node is not None and node.op_type == "Unsqueeze" and self._axes(node, len(shape)) == [axis]:
            return str(node.input[0])
        axes = int64_constant(f"{name}.axis", [axis])
        self.constants.append(axes)
        return self._add(helper.make_node("Squeeze", [part, axes.name], [f"{name}.slice"]), part, axis)

    def _add(self, node: NodeProto, sliced: str, axis: int) -> str:
        """Keep a new node, whose result is `sliced` without an axis."""
        shape, made = self.shapes[sliced], str(node.output[0])
        self.shapes[made] = (*shape[:axis], *shape[axis + 1 :])
        if sliced in self.dtypes:
            self.dtypes[made] = self.dtypes[sliced]
        self._made.append(node)
        return made

    def _axes(self, node: NodeProto, ndim: int) -> Sequence[int] | None:
        axes = self.initializers.get(node.input[1]) if len(node.input) > 1 else None
        return None if axes is None else [int(axis) % ndim for axis in numpy_helper.to_array(axes).flat]

    def _is_number(self, name: str) -> bool:
        tensor = self.initializers.get(name)
        return tensor is not None and int(np.prod(tensor.dims)) == 1 and len(tensor.dims) <= 1


def _axis(node: NodeProto, name: str, shape: Shape, default: int = 0) -> int:
    return range(len(shape))[attribute(node, name, default)]

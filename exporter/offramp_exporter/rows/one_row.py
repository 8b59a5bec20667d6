"""A graph of one row: who makes which value, of which shape, and how the same value made twice becomes one."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from offramp_contract.errors import SplitError
from onnx import ModelProto, NodeProto, TensorProto, shape_inference

from offramp_exporter.cost import node_flops
from offramp_exporter.program import values_read

_SMALL: Final = 1024
"""Bytes up to which initializers are compared by content; larger ones are weights, of which there is one each."""


class OneRow:
    """An ONNX graph whose shapes are all known.

    Attributes:
        model: It.
        constants: Its initializers, by name.
        shapes: Each value's shape.
        dtypes: Each value's element type.
        producer: The node that makes each value.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Look at the graph again after it has been changed."""
        model = self.model
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, int] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            self.dtypes[value.name] = kind.elem_type
            if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
                self.shapes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
        for tensor in model.graph.initializer:
            self.shapes[tensor.name], self.dtypes[tensor.name] = tuple(tensor.dims), tensor.data_type
        self.producer: dict[str, NodeProto] = {name: node for node in model.graph.node for name in node.output}

    def cost(self, values: Iterable[str]) -> int:
        """Count the operations that some values take, and one for every node."""
        open_values, found, total = list(values), set[str](), 0
        while open_values:
            node = self.producer.get(open_values.pop())
            if node is not None and node.output[0] not in found:
                found.add(node.output[0])
                open_values.extend(values_read(node))
                total += 1 + self._operations(node)
        return total

    def _operations(self, node: NodeProto) -> int:
        try:
            return node_flops(self, node)
        except SplitError:  # of no size that is known
            return 0


def deduplicated(model: ModelProto) -> dict[str, str]:
    """Make one of every value that a graph makes twice, in place.

    Returns:
        For each of the graph's outputs the value that stands for it; equal outputs have the same.
    """
    graph = model.graph
    same = _same_constants(graph.initializer)
    seen: dict[bytes, NodeProto] = {}
    kept = []
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Identity" and not node.domain:
            same[node.output[0]] = node.input[0]
            continue
        first = seen.setdefault(_content(node), node)
        if first is node:
            kept.append(node)
        else:
            same.update(zip(node.output, first.output, strict=True))
    del graph.node[:]
    graph.node.extend(kept)
    return {value.name: same.get(value.name, value.name) for value in graph.output}


def _same_constants(constants: Iterable[TensorProto]) -> dict[str, str]:
    seen: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for tensor in constants:
        if tensor.ByteSize() <= _SMALL:
            copy = TensorProto.FromString(tensor.SerializeToString())
            copy.ClearField("name")
            copy.ClearField("doc_string")
            same[tensor.name] = seen.setdefault(copy.SerializeToString(deterministic=True), tensor.name)
    return same


def _content(node: NodeProto) -> bytes:
    """Give all that decides what a node computes; of optional outputs, which are there."""
    copy = NodeProto(op_type=node.op_type, domain=node.domain, input=node.input, overload=node.overload)
    copy.output.extend("made" if name else "" for name in node.output)
    copy.attribute.extend(sorted(node.attribute, key=lambda held: held.name))
    content: bytes = copy.SerializeToString(deterministic=True)
    return content


def fresh_names(taken: Iterable[str], prefix: str) -> Iterator[str]:
    """Give names that are not taken, one after the other."""
    counts = Counter(taken)
    number = 0
    while True:
        name = f"{prefix}{number}"
        number += 1
        if name not in counts:
            yield name

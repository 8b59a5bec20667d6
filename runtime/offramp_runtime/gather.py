"""Rows of several batches, put together: on the host with numpy, in device memory with one small graph.

`gather_graph` is what survivors of different batches go through. `copy_graph` takes the same rows of several tensors:
how a batch gets into the fixed buffers of a captured graph, padded on the way, and out of them.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

FLOAT32 = int(TensorProto.FLOAT)


def gather_arrays(arrays: Sequence[np.ndarray], rows: Sequence[int]) -> np.ndarray:
    """Put row `rows[i]` of `arrays[i]` together: a view where they lie together, one copy where they do not."""
    first, start, count = arrays[0], rows[0], len(rows)
    if all(array is first for array in arrays):
        if all(row == start + i for i, row in enumerate(rows)):
            return first if count == len(first) else first[start : start + count]
        return first[list(rows)]
    return np.concatenate([array[begin:end] for array, begin, end in _runs(arrays, rows)])


def _runs(arrays: Sequence[np.ndarray], rows: Sequence[int]) -> Iterator[tuple[np.ndarray, int, int]]:
    """Give what lies side by side as one piece: copying few large pieces is twice as fast as row by row."""
    array, begin = arrays[0], rows[0]
    end = begin
    for following, row in zip(arrays, rows, strict=True):
        if following is not array or row != end:
            yield array, begin, end
            array, begin = following, row
        end = row + 1
    yield array, begin, end


def gather_graph(element_type: int, num_sources: int, *, is_ordered: bool = False) -> bytes:
    """Build a graph that gathers rows of several tensors of any one shape.

    Inputs: `source_i` of any rank with the batch first; `rows` int64, the rows taken from each source, one source's
    behind the other's; `sizes` int64, how many of them are of which source, at least one, where there are several; and
    `order` int64, which picks from all taken rows. Output: `gathered`. Two index tensors go to the device, however many
    sources there are.

    Args:
        element_type: ONNX element type of the sources.
        num_sources: How many there are.
        is_ordered: Whether the rows are wanted as they were taken; the graph then has no `order`.
    """
    nodes: list[NodeProto] = []
    inputs = [_tensor(f"source_{i}", element_type) for i in range(num_sources)]
    inputs.append(_indices("rows", "taken"))
    rows, picked = ["rows"], ["picked"]
    if num_sources > 1:
        rows, picked = ([f"{name}_{i}" for i in range(num_sources)] for name in ("rows", "picked"))
        inputs.append(_indices("sizes", num_sources))
        nodes.append(helper.make_node("Split", ["rows", "sizes"], rows, axis=0))
    nodes += [helper.make_node("Gather", [f"source_{i}", rows[i]], [picked[i]], axis=0) for i in range(num_sources)]
    if num_sources > 1:
        nodes.append(helper.make_node("Concat", picked, ["together"], axis=0))
    if not is_ordered:
        inputs.append(_indices("order", "wanted"))
        nodes.append(helper.make_node("Gather", [nodes[-1].output[0], "order"], ["gathered"], axis=0))
    nodes[-1].output[0] = "gathered"
    return _model("gather", nodes, inputs, [_tensor("gathered", element_type)])


def copy_graph(element_types: Sequence[int]) -> bytes:
    """Build a graph that takes the same rows of several tensors.

    Inputs: `source_i` of any rank with the batch first, and `rows` int64. Outputs: `copy_i`.

    Args:
        element_types: ONNX element type of each source.
    """
    count = range(len(element_types))
    nodes = [helper.make_node("Gather", [f"source_{i}", "rows"], [f"copy_{i}"], axis=0) for i in count]
    inputs = [*(_tensor(f"source_{i}", element_types[i]) for i in count), _indices("rows", "taken")]
    return _model("copy", nodes, inputs, [_tensor(f"copy_{i}", element_types[i]) for i in count])


def _tensor(name: str, element_type: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, None)


def _indices(name: str, size: str | int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, [size])


def _model(
    name: str, nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
) -> bytes:
    graph = helper.make_graph(nodes, name, inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())

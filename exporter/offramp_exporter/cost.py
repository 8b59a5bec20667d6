"""What a stage costs one row: floating-point operations, and bytes kept alive behind it.

Operations follow the field's convention: a multiply-add counts two. They are exact for the operators that carry a
network's cost and one per output element for the rest; moving data costs nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from offramp_contract.errors import SplitError
from onnx import NodeProto

from offramp_exporter.boundary import Crossing
from offramp_exporter.program import Program
from offramp_exporter.sizes import attribute
from offramp_exporter.split import StagePlan
from offramp_exporter.values import Shape, sizes_of_row

Sizes = tuple[int, ...] | None
FlopRule = Callable[[NodeProto, Sequence[Sizes], Sequence[Sizes]], int]

_FREE: Final = frozenset(
    (
        *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "DepthToSpace", "SpaceToDepth"),
        *("Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile", "Pad", "Where"),
        *("Cast", "Shape", "Size", "Constant", "ConstantOfShape", "Dropout"),
    )
)
_PER_ELEMENT: Final = {"Softmax": 5, "LogSoftmax": 5, "Gelu": 8, "HardSwish": 4, "Sigmoid": 4, "Swish": 5}
"""Operations per output element of functions made of several; exp counts one."""
_PER_INPUT_ELEMENT: Final = {
    "LayerNormalization": 8,
    "RMSNormalization": 5,
    "InstanceNormalization": 8,
    "GroupNormalization": 8,
    "BatchNormalization": 2,  # folded into one multiply-add at inference
    "GlobalAveragePool": 1,
    "GlobalMaxPool": 1,
    "ReduceMean": 1,
    "ReduceSum": 1,
    "ReduceMax": 1,
    "ReduceMin": 1,
    "ReduceL2": 2,
    "ReduceSumSquare": 2,
    "ArgMax": 1,
    "TopK": 1,
}


class Shaped(Protocol):
    """What knows the shapes of its values; `Program` is one."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Each value's shape, where it is known."""


def stage_flops(program: Program, plan: StagePlan) -> int:
    """Count a stage's floating-point operations for one row, the decision statistics excepted."""
    return sum(node_flops(program, program.nodes[i]) for i in plan.nodes)


def node_flops(program: Shaped, node: NodeProto) -> int:
    """Count one node's floating-point operations for one row.

    Raises:
        SplitError: If a shape that the count needs is not known.
    """
    if node.op_type in _FREE:
        return 0
    inputs = [_sizes(program, name) for name in node.input]
    outputs = [_sizes(program, name) for name in node.output]
    try:
        return _RULES.get(node.op_type, _elementwise)(node, inputs, outputs)
    except (TypeError, IndexError):
        raise SplitError(
            f"the cost of node {node.name or node.output[0]!r} ({node.op_type}) cannot be counted: "
            "a shape it works on is not known, or depends on the data"
        ) from None


def carry_bytes(plans: Sequence[StagePlan], crossing: Mapping[str, Crossing], stage: int) -> int:
    """Count the bytes that one row keeps alive across the boundary behind a stage."""
    return sum(crossing[name].tensor.row_bytes for name in carried(plans, crossing, stage))


def carried(plans: Sequence[StagePlan], crossing: Mapping[str, Crossing], stage: int) -> list[str]:
    """Name what one row keeps alive across the boundary behind a stage, in the order in which it is next read."""
    not_yet = {name for plan in plans[stage + 1 :] for name in plan.emits}
    later = dict.fromkeys(
        name for plan in plans[stage + 1 :] for name in (*plan.reads, *(one.skip for one in plan.merges))
    )
    return [name for name in later if name not in not_yet and name in crossing]


def _sizes(program: Shaped, name: str) -> Sizes:
    shape = program.shapes.get(name)
    return None if shape is None else sizes_of_row(shape)


def _count(sizes: Sizes) -> int:
    if sizes is None:
        raise TypeError("unknown shape")
    return math.prod(sizes)


def _elementwise(node: NodeProto, inputs: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
    if node.op_type in _PER_INPUT_ELEMENT:
        return _PER_INPUT_ELEMENT[node.op_type] * _count(inputs[0])
    return _PER_ELEMENT.get(node.op_type, 1) * _count(outputs[0])


def _conv(node: NodeProto, inputs: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
    # The weight is (out, in / groups, *kernel): what lies behind its first axis is one output element's sum.
    return _count(outputs[0]) * (2 * _count(_known(inputs[1])[1:]) + _has(node, 2))


def _conv_transpose(node: NodeProto, inputs: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
    # The weight is (in, out / groups, *kernel): each input element is spread over what lies behind its first axis.
    return 2 * _count(inputs[0]) * _count(_known(inputs[1])[1:]) + _has(node, 2) * _count(outputs[0])


def _gemm(node: NodeProto, inputs: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
    depth = _known(inputs[0])[0 if attribute(node, "transA", 0) else 1]
    return _count(outputs[0]) * (2 * depth + _has(node, 2))


def _matmul(_: NodeProto, inputs: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
    return 2 * _known(inputs[0])[-1] * _count(outputs[0])


def _recurrent(gates: int, pointwise: int) -> FlopRule:
    def rule(node: NodeProto, inputs: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
        del outputs
        length, batch = _known(inputs[0])[:2]
        if attribute(node, "layout", 0):
            length, batch = batch, length
        directions, rows, width = _known(inputs[1])
        hidden = rows // gates
        biases = 2 * rows if _has(node, 3) else 0
        step = 2 * rows * (width + hidden) + biases + pointwise * hidden
        return length * batch * directions * step

    return rule


def _pool(node: NodeProto, _: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
    kernel = next(list(map(int, held.ints)) for held in node.attribute if held.name == "kernel_shape")
    return math.prod(kernel) * _count(outputs[0])


def _attention(node: NodeProto, inputs: Sequence[Sizes], outputs: Sequence[Sizes]) -> int:
    # Query, key, value are (batch, heads, length, width), or (batch, length, heads * width).
    query, key = _known(inputs[0]), _known(inputs[1])
    if len(query) == 4:
        heads, length, width = query[1:]
    else:
        heads, length = attribute(node, "q_num_heads", 1), query[1]
        width = query[2] // heads
    scores = heads * length * key[-2]
    return scores * (2 * width + 5) + 2 * key[-2] * _count(outputs[0])


def _known(sizes: Sizes) -> tuple[int, ...]:
    if sizes is None:
        raise TypeError("unknown shape")
    return sizes


def _has(node: NodeProto, position: int) -> int:
    return int(len(node.input) > position and bool(node.input[position]))


_RULES: Final[Mapping[str, FlopRule]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "LSTM": _recurrent(4, 14),
    "GRU": _recurrent(3, 13),
    "RNN": _recurrent(1, 1),
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "Attention": _attention,
}

"""One ONNX program with named exits, and what is known of every value in it.

A program is made once, from a traced module or an ONNX file, and never changed. Making it settles two things for all
that follow: which axes of a value grow with the batch, and that the batch size is read at one place only (`sizes`).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import onnx
from offramp_contract.errors import TraceError
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    inliner,
    shape_inference,
    version_converter,
)

from offramp_exporter.gating.marks import DOMAIN, GateMark, Gating, marks_of
from offramp_exporter.repair import without_idle_squeezes
from offramp_exporter.sizes import replace_shape_reads
from offramp_exporter.stacks import Unstacking
from offramp_exporter.values import DTYPE_NAMES, TYPES, Dim, Rows, Shape, spell

MIN_OPSET: Final = 18
MAX_PROTO_BYTES: Final = 2**31 - 2**20
_MIN_IR_VERSION: Final = 8
"""Before version 4 of the format, weights had to be listed among the inputs."""

PROBE_BATCHES: Final = (5, 7)
"""Two batch sizes at which shapes are inferred: what differs between them grows with the batch."""

_MAX_SHAPE_CONSTANT: Final = 256
"""Elements of a constant that shape inference may have to read."""


@dataclass(frozen=True, slots=True)
class Program:
    """A network as one ONNX graph.

    Attributes:
        nodes: In topological order, each needed by an exit. `BATCH_SIZE` is read, but produced by none of them.
        initializers: The constants, by name.
        inputs: Names of the model's inputs.
        exits: The tensor that holds each exit's scores, by the exit's name, in order.
        shapes: Each value's shape, where it is known.
        dtypes: Each value's ONNX element type, where it is known.
        opset: Version of the standard operator set.
        opset_imports: All operator sets that the nodes use.
        ir_version: Of the ONNX format.
        is_one_row: Whether it is written for batches of one row only; what starts with an axis of 1 then starts with
            the batch.
        natives: The value that holds the score of the network's own rule for leaving at an exit, float32 (batch, 1), by
            the exit's name, where it has such rules.
        marks: The gates whose decisions an exit depends on, before specialisation.
        gating: What the nodes have to do with the gates, after it; None in a program without gates.
        producer: Index of the node that makes each value.
    """

    nodes: tuple[NodeProto, ...]
    initializers: Mapping[str, TensorProto]
    inputs: tuple[str, ...]
    exits: Mapping[str, str]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, int]
    opset: int
    opset_imports: tuple[onnx.OperatorSetIdProto, ...]
    ir_version: int
    is_one_row: bool = False
    natives: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[GateMark, ...] = ()
    gating: Gating | None = None
    producer: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        object.__setattr__(self, "producer", producer)

    def info(self, name: str) -> ValueInfoProto:
        """Describe a model input for a graph of its own."""
        sizes = ["batch" if isinstance(dim, Rows) else dim for dim in self.shapes[name]]
        return helper.make_tensor_value_info(name, self.dtypes[name], sizes)


def program_of_model(
    model: ModelProto,
    exits: Mapping[str, str],
    *,
    is_one_row: bool = False,
    natives: Mapping[str, str] = MappingProxyType({}),
) -> Program:
    """Make a program of an ONNX model.

    Args:
        model: Its inputs have a symbolic batch on axis 0 and no other symbolic dimension. Not changed.
        exits: The tensor that holds each exit's scores, by the exit's name, in order.
        is_one_row: Whether its batch is 1 throughout, instead of symbolic.
        natives: The tensor that holds the native score, where the network has exit rules of its own.

    Raises:
        TraceError: If an input has no symbolic batch, or an exit names no tensor.
    """
    model = _plain(model)
    inputs = inputs_of(model)
    symbols = set() if is_one_row else {_batch_symbol(value) for value in inputs}
    shapes, dtypes = _infer(model, symbols, (1,) if is_one_row else PROBE_BATCHES)
    _check_exits(exits, shapes, model.graph.node)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, axes = without_idle_squeezes(model.graph.node, shapes, initializers)
    unstacking = Unstacking(shapes, dtypes, initializers)
    nodes, sizes = replace_shape_reads(unstacking.rewrite(nodes), shapes)
    initializers |= {tensor.name: tensor for tensor in (*axes, *unstacking.constants, *sizes)}
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    live = live_nodes(nodes, (*exits.values(), *natives.values()))
    return Program(
        nodes=tuple(live),
        initializers=initializers,
        inputs=tuple(value.name for value in inputs),
        exits=dict(exits),
        shapes=shapes,
        dtypes=dtypes,
        opset=opset,
        opset_imports=tuple(entry for entry in model.opset_import if entry.domain != DOMAIN),
        ir_version=max(model.ir_version, _MIN_IR_VERSION),
        is_one_row=is_one_row,
        natives=dict(natives),
        marks=marks_of(live),
    )


def inputs_of(model: ModelProto) -> list[ValueInfoProto]:
    """Give a model's inputs; old files list their weights among them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _plain(model: ModelProto) -> ModelProto:
    """Bring a model into the form the rest reads: no functions, a recent opset."""
    if model.ByteSize() > MAX_PROTO_BYTES:
        raise TraceError("the network's weights take over 2 GiB, more than one ONNX graph can hold")
    plain = inliner.inline_local_functions(model) if model.functions else model
    opset = next((entry.version for entry in plain.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset >= MIN_OPSET:
        return plain
    try:
        return version_converter.convert_version(plain, MIN_OPSET)
    except Exception as error:  # the converter raises its own unnamed types
        raise TraceError(
            f"the ONNX file uses opset {opset} and cannot be brought to {MIN_OPSET}; export it again with a newer one"
        ) from error


def _batch_symbol(value: ValueInfoProto) -> str:
    name, dims = value.name, value.type.tensor_type.shape.dim
    if value.type.tensor_type.elem_type not in DTYPE_NAMES:
        raise TraceError(f"input {name!r} is of a type that a bundle does not hold; it holds {TYPES}")
    if not dims or dims[0].HasField("dim_value"):
        raise TraceError(
            f"input {name!r} has no symbolic batch on axis 0; export the network with a dynamic first axis"
        )
    if any(not dim.HasField("dim_value") for dim in dims[1:]):
        raise TraceError(
            f"input {name!r} has dynamic dimensions beside the batch; give example inputs, which fix their sizes"
        )
    symbol: str = dims[0].dim_param
    return symbol


def _infer(model: ModelProto, symbols: set[str], batches: Sequence[int]) -> tuple[dict[str, Shape], dict[str, int]]:
    """Infer every value's shape at two batch sizes and read off what grows with the batch."""
    light = _without_weights(model)
    probes = [_types_at(light, symbols, batch) for batch in batches]
    shapes = {
        name: join_shapes(_sizes(kind), _sizes(probes[-1][name])) if len(probes) > 1 else _one_row(_sizes(kind))
        for name, kind in probes[0].items()
        if kind.tensor_type.HasField("shape") and name in probes[-1] and probes[-1][name].tensor_type.HasField("shape")
    }
    dtypes = {name: kind.tensor_type.elem_type for name, kind in probes[0].items()}
    for tensor in model.graph.initializer:
        shapes[tensor.name], dtypes[tensor.name] = tuple(tensor.dims), tensor.data_type
    return {name: shape for name, shape in shapes.items() if shape is not None}, dtypes


def _without_weights(model: ModelProto) -> ModelProto:
    """Copy a model for shape inference: its large weights are declared, not held, and sizes pass through reshapes."""
    weights = [tensor for tensor in model.graph.initializer if math.prod(tensor.dims) > _MAX_SHAPE_CONSTANT]
    declared = [helper.make_tensor_value_info(held.name, held.data_type, held.dims) for held in weights]
    names = {tensor.name for tensor in weights}
    graph = helper.make_graph(
        _without_idle_reshapes(model),
        "shapes",
        [*inputs_of(model), *declared],
        model.graph.output,
        [tensor for tensor in model.graph.initializer if tensor.name not in names],
        value_info=model.graph.value_info,
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _without_idle_reshapes(model: ModelProto) -> list[NodeProto]:
    """Read a vector where a `Reshape` makes the same vector of it: ONNX follows no size through that."""
    vectors = {value.name for value in model.graph.value_info if len(value.type.tensor_type.shape.dim) == 1}
    to_vector = {tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [1]}
    same: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[0] in vectors and node.input[1] in to_vector:
            same[node.output[0]] = node.input[0]
        nodes.append(NodeProto.FromString(node.SerializeToString()))
        nodes[-1].input[:] = [same.get(name, name) for name in node.input]
    return nodes


def _types_at(model: ModelProto, symbols: set[str], batch: int) -> dict[str, TypeProto]:
    concrete = ModelProto.FromString(model.SerializeToString())
    graph = concrete.graph
    for value in graph.input:
        if not value.type.tensor_type.shape.dim[0].HasField("dim_value"):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in (*graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            size = _size_at(dim.dim_param, symbols, batch) if dim.HasField("dim_param") else dim.dim_value
            # A written 0 is an exporter's word for "unknown".
            dim.Clear() if not size else setattr(dim, "dim_value", size)
    inferred = shape_inference.infer_shapes(concrete, data_prop=True).graph
    return {value.name: value.type for value in (*inferred.output, *inferred.value_info, *inferred.input)}


def _size_at(expression: str, symbols: set[str], batch: int) -> int | None:
    """Evaluate `s0`, `8*s0`: the forms in which exporters write a multiple of the batch."""
    match = re.fullmatch(r"(?:(\d+)\s*\*\s*)?(\w+)", expression)
    if match is None or match[2] not in symbols:
        return None
    return int(match[1] or 1) * batch


def _sizes(kind: TypeProto) -> tuple[int | None, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim)


def _one_row(sizes: tuple[int | None, ...]) -> Shape:
    return (Rows(), *sizes[1:]) if sizes[:1] == (1,) else sizes


def join_shapes(few: Sequence[int | None], many: Sequence[int | None]) -> Shape | None:
    """Read a value's shape off its sizes at the two `PROBE_BATCHES`; None if its rank differs."""
    if len(few) != len(many):
        return None
    return tuple(_join_dim(a, b) for a, b in zip(few, many, strict=True))


def _join_dim(few: int | None, many: int | None) -> Dim:
    if few is None or many is None or few == many:
        return None if few is None or many is None else few
    multiple, rest = divmod(few, PROBE_BATCHES[0])
    return Rows(multiple) if not rest and many == multiple * PROBE_BATCHES[1] else None


def _check_exits(exits: Mapping[str, str], shapes: Mapping[str, Shape], nodes: Iterable[NodeProto]) -> None:
    produced = {name for node in nodes for name in node.output}
    for tensor in exits.values():
        if tensor not in produced:
            found = ", ".join(n for n, s in shapes.items() if n in produced and len(s) == 2 and s[0] == Rows())
            raise TraceError(f"exit {tensor!r} is no tensor of the graph; tensors of shape (batch, n) are: {found}")
        shape = shapes.get(tensor, ())
        if len(shape) != 2 or shape[0] != Rows() or not isinstance(shape[1], int) or shape[1] < 2:
            raise TraceError(f"exit {tensor!r} has shape {spell(shape)}; an exit's scores are (batch, classes >= 2)")


def live_nodes(nodes: Sequence[NodeProto], wanted: Iterable[str]) -> list[NodeProto]:
    """Keep the nodes that some values need."""
    needed, kept = set(wanted), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(values_read(node))
            kept.append(node)
    return kept[::-1]


def values_read(node: NodeProto) -> set[str]:
    """Name the values that a node reads, its subgraphs' included."""
    names = {name for name in node.input if name}
    for held in node.attribute:
        for graph in (held.g, *held.graphs):
            names.update(name for inner in graph.node for name in values_read(inner))
    return names

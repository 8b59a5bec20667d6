"""The whole program in one session, its gates decided from outside: what `forward` alone cannot be asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from offramp_contract.errors import ManifestError, SplitError
from offramp_contract.statistics import BoolArray, FloatArray
from offramp_runtime import Device
from onnx import NodeProto, TensorProto, helper

from offramp_exporter.examples import Examples
from offramp_exporter.gating.marks import is_gate
from offramp_exporter.program import Program
from offramp_exporter.sizes import BATCH_SIZE

_FORCED = "offramp.forced"
_FORCED_OPEN = "offramp.forced_open"


@dataclass(frozen=True, slots=True)
class Interpreted:
    """What the whole program gives.

    Attributes:
        exits: Each exit's scores (B, C).
        scores_BG: What each gate scored.
        is_open_BG: Which gates were open.
    """

    exits: list[FloatArray]
    scores_BG: FloatArray
    is_open_BG: BoolArray


class Interpreter:
    """A program before specialisation, run as it was traced.

    Args:
        program: With the marks of its gates.
        device: Where to run it.

    Attributes:
        marks: Its gates.

    Raises:
        SplitError: If ONNX Runtime refuses it.
    """

    def __init__(self, program: Program, device: Device) -> None:
        self.marks = program.marks
        self._program, self._device = program, device
        try:
            self._session = device.load(_model(program), "the whole network")
        except ManifestError as error:
            raise SplitError(f"the network's graph cannot be run: {error.message}") from error

    def run(self, inputs: Examples, is_open_BG: BoolArray | None = None) -> Interpreted:
        """Run a batch.

        Args:
            inputs: The batch.
            is_open_BG: Which gates are open for each row; None lets them decide.
        """
        marks = self._program.marks
        shape = (inputs.num_rows, len(marks))
        forced_BG = np.zeros(shape, dtype=bool) if is_open_BG is None else is_open_BG
        feeds = {
            **{name: inputs.arrays[name] for name in self._program.inputs},
            _FORCED: np.array(is_open_BG is not None),
            _FORCED_OPEN: forced_BG,
        }
        exits = list(self._program.exits.values())
        scores = [f"{mark.decision}.scored" for mark in marks]
        open_ = [f"{mark.decision}.is_open" for mark in marks]
        _, told = self._device.run(self._session, feeds, [], [*exits, *scores, *open_])
        columns = [np.reshape(column, (inputs.num_rows,)) for column in told[len(exits) :]]
        return Interpreted(
            told[: len(exits)],
            np.stack(columns[: len(marks)], axis=1).astype(np.float32),
            np.stack(columns[len(marks) :], axis=1),
        )


def _model(program: Program) -> bytes:
    nodes: list[NodeProto] = []
    if any(BATCH_SIZE in node.input for node in program.nodes):
        nodes.append(helper.make_node("Shape", [program.inputs[0]], [BATCH_SIZE], start=0, end=1))
    gates = iter(range(len(program.marks)))
    for node in program.nodes:
        nodes.extend(_decided(program, node, next(gates)) if is_gate(node) else [node])
    flags = [
        helper.make_tensor_value_info(_FORCED, TensorProto.BOOL, []),
        helper.make_tensor_value_info(_FORCED_OPEN, TensorProto.BOOL, ["batch", len(program.marks)]),
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in program.exits.values()]
    for mark in program.marks:
        outputs.append(helper.make_empty_tensor_value_info(f"{mark.decision}.scored"))
        outputs.append(helper.make_empty_tensor_value_info(f"{mark.decision}.is_open"))
    graph = helper.make_graph(
        nodes,
        "whole",
        [*(program.info(name) for name in program.inputs), *flags],
        list({one.name: one for one in outputs}.values()),
        list(program.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=list(program.opset_imports), ir_version=program.ir_version)
    return bytes(model.SerializeToString())


def _decided(program: Program, node: NodeProto, index: int) -> Iterator[NodeProto]:
    """Write a gate as what it does, unless it is told from outside."""
    mark = program.marks[index]
    kind = program.dtypes[mark.score]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    name = mark.decision
    rank = len(program.shapes[mark.score])
    for constant, value in (
        ("threshold", np.array(mark.threshold, dtype=np.float32).astype(dtype)),
        ("column", np.array([index])),
        ("shape", np.array([-1, *[1] * (rank - 1)])),
    ):
        tensor = helper.make_tensor(f"{name}.{constant}", *_described(value))
        yield helper.make_node("Constant", [], [f"{name}.{constant}"], value=tensor)
    yield helper.make_node("Identity", [node.input[0]], [f"{name}.scored"])
    yield helper.make_node("GreaterOrEqual", [node.input[0], f"{name}.threshold"], [f"{name}.own"])
    yield helper.make_node("Gather", [_FORCED_OPEN, f"{name}.column"], [f"{name}.told_B1"], axis=1)
    yield helper.make_node("Reshape", [f"{name}.told_B1", f"{name}.shape"], [f"{name}.told"])
    yield helper.make_node("Not", [_FORCED], [f"{name}.is_free"])
    yield helper.make_node("And", [f"{name}.own", f"{name}.is_free"], [f"{name}.own_open"])
    yield helper.make_node("And", [f"{name}.told", _FORCED], [f"{name}.told_open"])
    yield helper.make_node("Or", [f"{name}.own_open", f"{name}.told_open"], [f"{name}.is_open"])
    yield helper.make_node("Cast", [f"{name}.is_open"], [name], to=kind)


def _described(value: np.ndarray) -> tuple[int, tuple[int, ...], list[float]]:
    return helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value.ravel().tolist()

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from offramp_contract.errors import ManifestError
from offramp_runtime.gather import FLOAT32, gather_graph
from offramp_runtime.sessions import create_session
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

WIDTH = 64


def load(graph: bytes) -> None:
    create_session(graph, "stage_0", ["CPUExecutionProvider"], threads=1)


def outside(location: str) -> TensorProto:
    """A weight that lies in another file."""
    tensor = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", str(4 * WIDTH * WIDTH))):
        tensor.external_data.add(key=key, value=text)
    return tensor


def inside(_: str) -> TensorProto:
    return numpy_helper.from_array(np.ones((WIDTH, WIDTH), dtype=np.float32), "W")


def product(weight: TensorProto) -> ModelProto:
    return model([helper.make_node("MatMul", ["x", "W"], ["y"])], [weight])


def constant_node(weight: TensorProto) -> ModelProto:
    made = helper.make_node("Constant", [], ["W"], value=weight)
    return model([made, helper.make_node("MatMul", ["x", "W"], ["y"])], [])


def branch(weight: TensorProto) -> ModelProto:
    out = helper.make_tensor_value_info("out", FLOAT32, ["batch", WIDTH])
    body = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["out"])], "body", [], [out], [weight])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["yes"], to=TensorProto.BOOL),
        helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body),
    ]
    return model(nodes, [])


def model(nodes: list[NodeProto], weights: list[TensorProto]) -> ModelProto:
    x, y = (helper.make_tensor_value_info(name, FLOAT32, ["batch", WIDTH]) for name in "xy")
    graph = helper.make_graph(nodes, "graph", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("build", [product, constant_node, branch])
@pytest.mark.parametrize("location", ["weights.bin", "./weights.bin", "../up/weights.bin", "/etc/passwd"])
def test_a_graph_whose_weights_lie_in_another_file_is_refused(
    build: Callable[[TensorProto], ModelProto], location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "up").mkdir()
    monkeypatch.chdir(tmp_path / "up")
    np.ones((WIDTH, WIDTH), dtype=np.float32).tofile("weights.bin")
    load(build(inside(location)).SerializeToString())
    with pytest.raises(ManifestError, match="graph of 'stage_0' keeps weights in other files"):
        load(build(outside(location)).SerializeToString())


@pytest.mark.parametrize("graph", [b"\xff" * 40, b"not an onnx model", b"ORTM" * 8])
def test_bytes_that_are_no_model_are_refused(graph: bytes) -> None:
    with pytest.raises(ManifestError, match="'stage_0'"):
        load(graph)


def test_an_empty_graph_is_refused() -> None:
    with pytest.raises(ManifestError, match="'stage_0'"):
        load(b"")


def test_a_graph_with_an_operator_nobody_knows_is_refused_without_quoting_onnx_runtime() -> None:
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"])]
    with pytest.raises(ManifestError) as refused:
        load(model(nodes, []).SerializeToString())
    assert "ONNX Runtime refuses the graph of 'stage_0'" in refused.value.message
    assert "Frobnicate" not in refused.value.message


def test_a_session_has_the_threads_it_was_given_and_they_do_not_spin() -> None:
    session = create_session(gather_graph(FLOAT32, 1), "gather", ["CPUExecutionProvider"], threads=3)
    options = session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"

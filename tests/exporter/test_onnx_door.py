"""An existing multi-exit ONNX file, from any framework."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from offramp_contract.errors import ExportError, TraceError
from offramp_exporter import export_onnx
from offramp_runtime import StageExecutor, open_device, run_all_exits
from onnx import TensorProto, helper, numpy_helper, parser

CHAIN = """<ir_version: 9, opset_import: ["" : {opset}]>
chain (float[{batch}, {width}] image) => (float[{batch}, 3] out) {{
  hidden = MatMul(image, w0)  map = Relu(hidden)  scores = MatMul(map, w1)
  n = Shape(map)  again = Reshape(map, n)  deep = MatMul(again, w2)  out = MatMul(deep, w1)
}}"""


def write(path: Path, opset: int = 18, batch: str = "N", width: str = "4") -> Path:
    model = parser.parse_model(CHAIN.format(opset=opset, batch=batch, width=width))
    generator = np.random.default_rng(0)
    for name, shape in {"w0": (4, 8), "w1": (8, 3), "w2": (8, 8)}.items():
        weight = generator.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("opset", [12, 18, 21])
def test_a_file_is_cut_at_its_exits_intermediate_tensors_included(tmp_path: Path, opset: int) -> None:
    path = write(tmp_path / "Two_Exits.onnx", opset)

    bundle = export_onnx(path, ["scores", "out"], tmp_path / "bundle")

    manifest = bundle.manifest
    assert manifest.name == "two_exits"
    assert [exit_.name for exit_ in manifest.exits] == ["exit_0", "exit_1"]
    assert [stage.inputs for stage in manifest.stages] == [("image",), ("map",)]
    assert manifest.provenance.source == "Two_Exits.onnx"
    assert manifest.provenance.parameters == 4 * 8 + 8 * 3 + 8 * 8
    image = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    map_ = np.maximum(image @ weights["w0"], 0)
    expected = [map_ @ weights["w1"], map_ @ weights["w2"] @ weights["w1"]]
    answers = run_all_exits(StageExecutor(bundle, open_device("cpu", threads=1)), {"image": image})
    for (logits, _), wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_exits_may_get_names_of_their_own(tmp_path: Path) -> None:
    bundle = export_onnx(write(tmp_path / "m.onnx"), {"early": "scores", "late": "out"}, tmp_path / "bundle")

    assert [exit_.name for exit_ in bundle.manifest.exits] == ["early", "late"]


def test_examples_fix_dynamic_dimensions_beside_the_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", width="W")

    with pytest.raises(TraceError, match="'image' has dynamic dimensions beside the batch; give example inputs"):
        export_onnx(path, ["scores", "out"], tmp_path / "bundle")
    bundle = export_onnx(
        path, ["scores", "out"], tmp_path / "bundle", example_inputs={"image": np.ones((2, 4), np.float32)}
    )
    assert bundle.manifest.inputs[0].shape == (4,)


@pytest.mark.parametrize(
    ("exits", "example", "sentence"),
    [
        (["score", "out"], None, "'score' is no tensor of the graph; .*scores"),
        ([], None, "name the tensors"),
        (["n", "out"], None, r"'n' has shape \(2,\)"),
        (["scores", "out"], {"picture": np.ones((2, 4), np.float32)}, "must be named as the graph's: image"),
        (["scores", "out"], {"image": np.ones((2, 5), np.float32)}, r"has shape \(2, 5\)"),
        (["scores", "out"], {"image": np.ones((2, 4, 1), np.float32)}, "has 3 axes"),
    ],
)
def test_names_and_examples_that_do_not_fit_are_refused(
    tmp_path: Path, exits: list[str], example: dict[str, np.ndarray] | None, sentence: str
) -> None:
    path = write(tmp_path / "m.onnx")

    with pytest.raises(TraceError, match=sentence):
        export_onnx(path, exits, tmp_path / "bundle", example_inputs=example)
    assert not (tmp_path / "bundle").exists()


def test_an_unnamed_dimension_counts_as_the_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    onnx.save(model, path)

    assert len(export_onnx(path, ["scores", "out"], tmp_path / "bundle").manifest.stages) == 2


def test_a_static_batch_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="'image' has no symbolic batch on axis 0; export the network with a dynamic"):
        export_onnx(write(tmp_path / "m.onnx", batch="1"), ["scores", "out"], tmp_path / "bundle")


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 100)
    invalid = helper.make_model(helper.make_graph([helper.make_node("Relu", ["nowhere"], ["y"])], "g", [], []))
    onnx.save(invalid, tmp_path / "invalid.onnx")

    for name in ("broken.onnx", "invalid.onnx"):
        with pytest.raises(TraceError, match=f"'{name}' is no valid ONNX file"):
            export_onnx(tmp_path / name, ["y"], tmp_path / "bundle")
    with pytest.raises(TraceError, match="is no file"):
        export_onnx(tmp_path / "absent.onnx", ["y"], tmp_path / "bundle")


def test_local_functions_and_weights_that_are_also_inputs_are_understood(tmp_path: Path) -> None:
    function = helper.make_function(
        "mine", "Block", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 18)]
    )
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Block", ["x"], ["h"], domain="mine"),
            helper.make_node("MatMul", ["h", "w"], ["a"]),
            helper.make_node("Block", ["a"], ["deep"], domain="mine"),
            helper.make_node("MatMul", ["deep", "w"], ["b"]),
        ],
        "g",
        [_info("x", ["batch", 4]), _info("w", [4, 4])],
        [_info("a", ["batch", 4]), _info("b", ["batch", 4])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9), tmp_path / "f.onnx")

    manifest = export_onnx(tmp_path / "f.onnx", ["a", "b"], tmp_path / "bundle").manifest

    assert [tensor.name for tensor in manifest.inputs] == ["x"]
    assert [stage.inputs for stage in manifest.stages] == [("x",), ("a",)]


def test_an_exit_name_that_a_tensor_of_the_network_has_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["early.decision"]), helper.make_node("Tanh", ["early.decision"], ["a"])],
        "g",
        [_info("x", ["batch", 4])],
        [_info("a", ["batch", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")

    with pytest.raises(ExportError, match="'early': the network has tensors of that name"):
        export_onnx(tmp_path / "m.onnx", {"early": "a"}, tmp_path / "bundle")


def stored_outside(path: Path, location: str, offset: int = 0, length: int = 128) -> Path:
    """Let a weight of a file say that it lies elsewhere."""
    model = onnx.load(write(path))
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "w0"]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        weight.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_the_file_are_read_and_travel_with_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "w0.bin").write_bytes(np.ones((4, 8), np.float32).tobytes())
    path = stored_outside(tmp_path / "m.onnx", "w0.bin")

    bundle = export_onnx(path, ["scores", "out"], tmp_path / "bundle")
    (tmp_path / "w0.bin").unlink()

    answers = run_all_exits(
        StageExecutor(bundle, open_device("cpu", threads=1)), {"image": np.ones((1, 4), np.float32)}
    )
    assert len(answers) == 2


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("../secret.bin", 0, 128),
        ("/etc/hostname", 0, 128),
        ("link.bin", 0, 128),
        ("absent.bin", 0, 128),
        (".", 0, 128),
        ("w0.bin", 64, 128),
        ("w0.bin", -1, 128),
        ("w0.bin", 0, 2**60),
    ],
)
def test_weights_are_read_from_nowhere_but_beside_the_file(
    tmp_path: Path, location: str, offset: int, length: int
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    for file in (tmp_path / "secret.bin", beside / "w0.bin"):
        file.write_bytes(np.ones((4, 8), np.float32).tobytes())
    (beside / "link.bin").symlink_to(tmp_path / "secret.bin")

    with pytest.raises(TraceError, match=r"'m.onnx' is no valid ONNX file"):
        export_onnx(stored_outside(beside / "m.onnx", location, offset, length), ["scores", "out"], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_sizes_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.initializer[0].dims[0] = 2**40
    onnx.save(model, tmp_path / "weight.onnx")
    sizes = numpy_helper.from_array(np.array([2**20, 2**20]), "sizes")
    computed = onnx.load(path)
    computed.graph.initializer.append(sizes)
    computed.graph.node.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["zeros"]))
    computed.graph.node.insert(1, helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0))
    computed.graph.node.append(helper.make_node("Add", ["out", "zero"], ["more"]))
    onnx.save(computed, tmp_path / "computed.onnx")

    with pytest.raises(TraceError, match="'image': a row of 1099511627776 numbers is too large; at most"):
        export_onnx(write(tmp_path / "input.onnx", width=str(2**40)), ["scores", "out"], tmp_path / "bundle")
    with pytest.raises(TraceError, match=r"'weight.onnx' is no valid ONNX file: .* is too small"):
        export_onnx(tmp_path / "weight.onnx", ["scores", "out"], tmp_path / "bundle")
    with pytest.raises(TraceError, match="the network fails at batch 1"):
        export_onnx(tmp_path / "computed.onnx", ["scores", "more"], tmp_path / "bundle")


def test_branches_in_the_graph_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "m.onnx"))
    branches = {
        f"{name}_branch": helper.make_graph([helper.make_node(op, ["map"], [op])], op, [], [_info(op, ["N", 8])])
        for name, op in (("then", "Neg"), ("else", "Identity"))
    }
    nodes = [
        helper.make_node("ReduceMax", ["map"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["is_so"], to=TensorProto.BOOL),
        helper.make_node("If", ["is_so"], ["chosen"], name="ask", **branches),
        helper.make_node("MatMul", ["chosen", "w1"], ["answer"]),
    ]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "m.onnx")

    with pytest.raises(ExportError, match=r"node 'ask' \(If\) branches or loops inside the graph.*without a condition"):
        export_onnx(tmp_path / "m.onnx", ["scores", "answer"], tmp_path / "bundle")


def test_functions_that_call_themselves_and_unknown_operators_are_refused(tmp_path: Path) -> None:
    model = onnx.load(write(tmp_path / "m.onnx"))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node.append(helper.make_node("Again", ["out"], ["more"], domain="mine"))
    onnx.save(model, tmp_path / "unknown.onnx")
    inside = [helper.make_node("Again", ["x"], ["y"], domain="mine")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    model.functions.append(helper.make_function("mine", "Again", ["x"], ["y"], inside, opsets))
    onnx.save(model, tmp_path / "recursive.onnx")

    with pytest.raises(TraceError, match="ONNX Runtime refuses the ONNX file"):
        export_onnx(tmp_path / "unknown.onnx", ["scores", "out"], tmp_path / "bundle")
    with pytest.raises(TraceError, match=r"'recursive.onnx' is no valid ONNX file: .* must not be recursive"):
        export_onnx(tmp_path / "recursive.onnx", ["scores", "out"], tmp_path / "bundle")


def _info(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

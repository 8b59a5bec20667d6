import json
import textwrap

import numpy as np
import onnx
import pytest
import torch
from offramp_cli.__main__ import app
from offramp_models import load_data
from offramp_models.networks import create_network
from offramp_runtime import StageExecutor, open_bundle, open_device, run_all_exits
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

NETWORK = """
    import torch
    from torch import nn

    class TwoExits(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 8)
            self.early = nn.Linear(6, 3)
            self.late = nn.Linear(8, 3)

        def forward(self, x, gain=None):
            h = torch.relu(self.body(x))
            return {"late": self.late(h), "early": self.early(x), "features": h}

    class TwoInputs(TwoExits):
        def forward(self, x, mask):
            return [self.early(x * mask), self.late(torch.relu(self.body(x)))]

    class SameLogits(TwoExits):
        def forward(self, x):
            return [self.early(x), self.late(torch.relu(self.body(x)))]

    class Flattening(SameLogits):
        def forward(self, x):
            return super().forward(x.flatten(1))

    def not_a_network():
        return 3
"""


@pytest.fixture
def offramp(monkeypatch, tmp_path):
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def networks(tmp_path, request):
    """Put a network where people put theirs: in a package of their own, under a name no other test uses."""
    package = f"models_{abs(hash(request.node.name))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "nets.py").write_text(textwrap.dedent(NETWORK))
    return f"{package}.nets"


def test_a_users_own_network_becomes_a_bundle(offramp, networks, tmp_path):
    (tmp_path / "names.txt").write_text("red\ngreen\n\nblue\n")
    (tmp_path / "training.json").write_text('{"epochs": 3}')
    done = offramp(
        "export", f"{networks}:SameLogits", "--example", "6", "--out", "b", "--name", "colours", "--labels",
        "names.txt", "--training", "training.json", "--policy", '{"kind": "entropy", "threshold": 0.3}',
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.name == "colours"
    assert manifest.labels == ("red", "green", "blue")
    assert manifest.provenance.training == {"epochs": 3}
    assert manifest.default_policy.kind == "entropy"
    assert [exit_.name for exit_ in manifest.exits] == ["exit_0", "exit_1"]
    for stage in manifest.stages:
        assert stage.name in done.output
    assert "100.0%" in done.output
    assert "tracing SameLogits" in done.output


def test_weights_are_the_ones_that_were_saved(offramp, tmp_path):
    network, data = create_network("multi_exit_cnn", seed=5).eval(), load_data("digits")
    torch.save(network.state_dict(), "w.pt")
    done = offramp("export", "multi_exit_cnn", "--weights", "w.pt", "--data", "digits", "--out", "b")
    assert done.exit_code == 0, done.output
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.labels == data.label_names
    assert bundle.manifest.preprocessing == data.preprocessing
    images = data.inputs(data.test)[:3]
    executor = StageExecutor(bundle, open_device("cpu", 1))
    staged = run_all_exits(executor, {bundle.manifest.inputs[0].name: images})
    with torch.inference_mode():
        eager = network(torch.from_numpy(images))
    for (logits, _), expected in zip(staged, eager, strict=True):
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_exits_are_taken_and_named_as_they_were_asked_for(offramp, networks, tmp_path):
    done = offramp(
        "export", f"{networks}:TwoExits", "--example", "6", "--exits", "quick=['early'],full=['late']", "--out", "b"
    )
    assert done.exit_code == 0, done.output
    assert [exit_.name for exit_ in open_bundle(tmp_path / "b").manifest.exits] == ["quick", "full"]


def test_several_inputs_are_named_each(offramp, networks, tmp_path):
    done = offramp("export", f"{networks}:TwoInputs", "--example", "x=6", "--example", "mask=6", "--out", "b")
    assert done.exit_code == 0, done.output
    assert {tensor.name for tensor in open_bundle(tmp_path / "b").manifest.inputs} == {"x", "mask"}


def test_an_onnx_file_becomes_a_bundle(offramp, tmp_path):
    _write_onnx(tmp_path / "two.onnx")
    done = offramp("export", "two.onnx", "--exits", "early,late", "--out", "b")
    assert done.exit_code == 0, done.output
    assert len(open_bundle(tmp_path / "b").manifest.exits) == 2


def test_preprocessing_comes_from_a_file(offramp, networks, tmp_path):
    wanted = {"kind": "image", "mode": "L", "height": 2, "width": 3, "mean": [0.5], "std": [0.25]}
    (tmp_path / "image.json").write_text(json.dumps(wanted))
    done = offramp(
        "export", f"{networks}:Flattening", "--example", "1x2x3", "--preprocessing", "image.json", "--out", "b"
    )
    assert done.exit_code == 0, done.output
    preprocessing = open_bundle(tmp_path / "b").manifest.preprocessing
    assert preprocessing is not None
    assert preprocessing.model_dump(mode="json", exclude_defaults=True) == {k: wanted[k] for k in wanted if k != "kind"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{networks}:Missing", "--example", "6"], "has no 'Missing'"),
        (["nowhere.nets:Net", "--example", "6"], "there is no module 'nowhere'"),
        (["{networks}:not_a_network", "--example", "6"], "gives a int, no torch.nn.Module"),
        (["{networks}:SameLogits"], "needs --example"),
        (["{networks}:SameLogits", "--example", "6 by 6"], "cannot be read"),
        (["{networks}:SameLogits", "--example", "7"], ""),
        (["{networks}:SameLogits", "--example", "6", "--weights", "none.pt"], "'none.pt' is no file"),
        (["{networks}:SameLogits", "--example", "6", "--labels", "none.txt"], "none.txt: No such file"),
        (["{networks}:SameLogits", "--example", "6", "--labels", "empty.txt"], "empty.txt holds no labels"),
        (["{networks}:SameLogits", "--example", "6", "--policy", "luck"], "policy: the kind must be one of"),
        (["{networks}:SameLogits", "--example", "6", "--policy", "{broken"], "is not valid JSON"),
        (["{networks}:SameLogits", "--example", "6", "--training", "empty.txt"], "empty.txt is not JSON"),
        (["{networks}:SameLogits", "--example", "6", "--preprocessing", "bad.json"], "bad.json, image.height"),
        (["{networks}:SameLogits", "--example", "6", "--exits", " , "], "exits: nothing is named"),
        (["{networks}:TwoExits", "--example", "6"], "['late']"),
        (["multi_exit_cnn", "--data", "imagenet"], "data set 'imagenet' is not one of"),
        (["two.onnx"], "needs --exits"),
        (["none.onnx", "--exits", "a,b"], "none.onnx"),
        (["two.onnx", "--exits", "early,lost"], "lost"),
        (["two.onnx", "--exits", "early,late", "--example", "6"], "--example NAME="),
    ],
)
def test_what_cannot_be_exported_is_refused_in_words_and_nothing_is_written(
    offramp, networks, tmp_path, arguments, sentence
):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.json").write_text(
        '{"kind": "image", "mode": "L", "height": 0, "width": 1, "mean": [0], "std": [1]}'
    )
    _write_onnx(tmp_path / "two.onnx")
    done = offramp("export", *(argument.replace("{networks}", networks) for argument in arguments), "--out", "b")
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "b").exists()


def test_a_bundle_that_is_there_is_replaced_only_on_request(offramp, networks, tmp_path):
    arguments = ["export", f"{networks}:SameLogits", "--example", "6", "--out", "b"]
    assert offramp(*arguments).exit_code == 0
    written = (tmp_path / "b" / "manifest.json").read_bytes()
    refused = offramp(*arguments, "--name", "other")
    assert refused.exit_code == 1
    assert "exists" in refused.output
    assert (tmp_path / "b" / "manifest.json").read_bytes() == written
    assert offramp(*arguments, "--name", "other", "--overwrite").exit_code == 0
    assert open_bundle(tmp_path / "b").manifest.name == "other"


def _write_onnx(path):
    """Write a two-exit network, as another framework would."""
    generator = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(generator.normal(size=shape).astype(np.float32), name)
        for name, shape in (("w_early", (6, 3)), ("w_body", (6, 8)), ("w_late", (8, 3)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w_early"], ["early"]),
        helper.make_node("MatMul", ["x", "w_body"], ["body"]),
        helper.make_node("Relu", ["body"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w_late"], ["late"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("early", "late")]
    graph = helper.make_graph(nodes, "two", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_a_bundle_in_float16_says_how_close_it_is_to_the_network(offramp, networks, tmp_path):
    done = offramp("export", f"{networks}:SameLogits", "--example", "6", "--out", "b", "--precision", "fp16")
    assert done.exit_code == 0, done.output
    assert "within 2e-2 + 2e-2·|logit|" in done.output
    assert open_bundle(tmp_path / "b").manifest.precision == "fp16"


def test_a_precision_of_no_known_name_is_refused_before_anything_is_read(offramp):
    done = offramp("export", "nobody.nets:Net", "--example", "6", "--out", "b", "--precision", "int8")
    assert done.exit_code != 0
    assert "--precision: 'int8' is neither fp32 nor fp16" in done.output

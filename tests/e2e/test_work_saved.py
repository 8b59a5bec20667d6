"""A stage behind a sample's exit does not run for it: counted by the server, and proved by a stage that cannot run."""

import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import onnx
import pytest
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import log_softmax
from onnx import TensorProto, helper, numpy_helper

STAGES = ("stage_0", "stage_1", "stage_2")


def at_exit(index):
    return json.dumps({"kind": "fixed", "exit": index})


def test_each_stage_runs_for_the_rows_that_had_not_left_and_for_no_other(served, trained):
    images = trained.data.inputs(trained.data.test)[:200]
    confidences = [np.exp(log_softmax(logits)).max(axis=1) for logits in trained.eager(images)[:-1]]
    thresholds = [float(np.quantile(confidence, 0.6)) for confidence in confidences]
    before = served.counters()
    answer = served.classify(images, policy="confidence", threshold=",".join(map(str, thresholds)))
    after = served.counters()
    predictions = answer.json()["predictions"]
    exits = Counter(prediction["exit"]["index"] for prediction in predictions)
    assert min(exits[index] for index in range(3)) > 0, f"every exit should be taken for this test to say much: {exits}"
    for index, stage in enumerate(STAGES):
        still_running = sum(count for exit_index, count in exits.items() if exit_index >= index)
        assert after["rows", stage] - before["rows", stage] == still_running
    for prediction in predictions:
        assert prediction["stages"] == list(STAGES[: prediction["exit"]["index"] + 1])


def test_no_later_stage_is_run_at_all_when_everyone_leaves_at_the_first_exit(served, trained):
    images = trained.data.inputs(trained.data.test)[:50]
    before = served.counters()
    served.classify(images, policy=at_exit(0)).raise_for_status()
    after = served.counters()
    assert after["runs", "stage_0"] > before["runs", "stage_0"]
    for stage in STAGES[1:]:
        assert after["runs", stage] == before["runs", stage]


@pytest.fixture(scope="module")
def mined(trained, serve, tmp_path_factory):
    """Serve the network with a stage 1 that ONNX Runtime cannot run for a row whose carry holds anything above 1e6."""
    bundle = tmp_path_factory.mktemp("mined") / "digits"
    shutil.copytree(trained.bundle, bundle)
    manifest = Manifest.from_bytes((bundle / "manifest.json").read_bytes())
    stage = manifest.stages[1]
    logits = manifest.exits[1].logits
    model = onnx.load(bundle / stage.graph.path)
    _mine(model.graph, carry=stage.inputs[0], logits=logits)
    content = model.SerializeToString()
    (bundle / stage.graph.path).write_bytes(content)
    graph = stage.graph.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    stages = (manifest.stages[0], stage.model_copy(update={"graph": graph}), *manifest.stages[2:])
    (bundle / "manifest.json").write_bytes(manifest.model_copy(update={"stages": stages}).to_bytes())
    return serve(bundle)


def _mine(graph, carry, logits):
    """Add a zero to the logits, gathered from a list of one at index `max(carry) > 1e6`: out of range if that is 1."""
    for node in graph.node:
        node.output[:] = ["unmined" if name == logits else name for name in node.output]
        node.input[:] = ["unmined" if name == logits else name for name in node.input]
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, dtype=dtype), name)
        for name, value, dtype in (("limit", 1e6, np.float32), ("one_zero", [0.0], np.float32))
    )
    graph.node.extend(
        [
            helper.make_node("ReduceMax", [carry], ["largest"], keepdims=0),
            helper.make_node("Greater", ["largest", "limit"], ["is_mine"]),
            helper.make_node("Cast", ["is_mine"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["one_zero", "index"], ["nothing"]),
            helper.make_node("Add", ["unmined", "nothing"], [logits]),
        ]
    )


def test_a_stage_that_cannot_run_for_a_row_is_never_run_for_it_if_it_leaves_before(mined, trained):
    harmless = trained.data.inputs(trained.data.test)[:1]
    deadly = harmless * np.float32(1e9)
    assert mined.classify(harmless, policy=at_exit(2)).status_code == 200
    assert mined.classify(deadly, policy=at_exit(1)).status_code == 500, "the stage runs, so the mine does not work"
    left_before = mined.classify(deadly, policy=at_exit(0))
    assert left_before.status_code == 200
    assert left_before.json()["predictions"][0]["stages"] == ["stage_0"]
    assert mined.classify(harmless, policy=at_exit(2)).status_code == 200

"""Networks that other people wrote, exported as they are and asked over HTTP, by both protocols."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from early_networks import MaxSoftmax
from habit_table import HABITS, Habit, Rows
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import FixedSpec
from offramp_exporter import export

NUM_ROWS = 3
ASKED = ["ids and mask", "one task of several", "a batch of two at least", "one row at a time"]
WIDE = "exits of different width"
DATATYPES = {"float32": "FP32", "int64": "INT64"}


class Served:
    """A network that is exported and served, and what it is asked about."""

    def __init__(self, folder: Path, manifest: Manifest, rows: Rows, serve: Any) -> None:
        self.manifest, self.client = manifest, serve(folder).client
        self.arrays = {name or self.manifest.inputs[0].name: tensor.numpy() for name, tensor in rows.items()}

    def classify(self, **fields: Any) -> Any:
        """Ask /v1."""
        inputs = {name: array.tolist() for name, array in self.arrays.items()}
        return self.client.post("/v1/classify", json={"inputs": inputs, **fields})

    def infer(self, *outputs: dict[str, Any], **parameters: Any) -> Any:
        """Ask /v2."""
        inputs = [
            {"name": name, "shape": array.shape, "datatype": DATATYPES[str(array.dtype)], "data": array.tolist()}
            for name, array in self.arrays.items()
        ]
        body = {"inputs": inputs, "parameters": parameters} | ({"outputs": outputs} if outputs else {})
        return self.client.post(f"/v2/models/{self.manifest.name}/infer", content=json.dumps(body))


class Asked(Served):
    """A habit's network, and what its exits are when it is simply called."""

    def __init__(self, habit: Habit, out: Path, serve: Any) -> None:
        torch.manual_seed(0)
        network, rows = habit.make(), habit.rows(NUM_ROWS)
        super().__init__(out, export(network, habit.example(), out, exits=habit.exits).manifest, rows, serve)
        self.expected = [scores_BC.numpy() for scores_BC in habit.simply_called(network, rows)]


def outputs_of(response: Any) -> dict[str, dict[str, Any]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def problem_of(response: Any) -> str:
    assert response.status_code == 422, response.text
    sentence: str = response.json()["detail"]
    return sentence


@pytest.mark.parametrize("name", ASKED)
def test_every_exit_is_answered_as_the_network_answers(name: str, tmp_path: Path, serve: Any) -> None:
    asked = Asked(HABITS[name], tmp_path / "bundle", serve)

    for index, scores_BC in enumerate(asked.expected):
        policy = FixedSpec(exit=index).model_dump()
        predictions = asked.classify(policy=policy).json()["predictions"]
        outputs = outputs_of(asked.infer(policy=json.dumps(policy)))

        assert [one["exit"]["index"] for one in predictions] == outputs["exit_index"]["data"] == [index] * NUM_ROWS
        classes = scores_BC.argmax(axis=1).tolist()
        assert [one["class_id"] for one in predictions] == outputs["class_id"]["data"] == classes
        logits_BC = np.reshape(outputs["logits"]["data"], outputs["logits"]["shape"])
        np.testing.assert_allclose(logits_BC, scores_BC, rtol=1e-4, atol=1e-4)


def test_a_network_that_returns_early_leaves_where_it_returns(tmp_path: Path, serve: Any) -> None:
    torch.manual_seed(0)
    network = MaxSoftmax().eval()
    contrast, brightness = torch.linspace(0.1, 5, 60).view(-1, 1, 1, 1), torch.randn(60, 1, 1, 1)
    images = torch.randn(60, 1, 6, 6) * contrast + brightness
    manifest = export(network, images[:2], tmp_path / "bundle").manifest
    served = Served(tmp_path / "bundle", manifest, {"": images}, serve)
    own = [network(image[None])[1] for image in images]

    answer = served.classify().json()
    outputs = outputs_of(served.infer())

    assert set(own) == {0, 1, 2}
    assert answer["policy"]["kind"] == "native"
    assert [one["exit"]["index"] for one in answer["predictions"]] == outputs["exit_index"]["data"] == own
    reasons = ["final" if exit_index == 2 else "native" for exit_index in own]
    assert [one["exit"]["reason"] for one in answer["predictions"]] == outputs["exit_reason"]["data"] == reasons


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, serve: Any) -> Asked:
    """A network whose first exit has two classes, and whose others have four."""
    return Asked(HABITS[WIDE], tmp_path_factory.mktemp("wide") / "bundle", serve)


def test_an_exit_lists_no_more_classes_than_it_has(wide: Asked) -> None:
    for index, num_classes in enumerate((2, 4, 4)):
        answer = wide.classify(policy={"kind": "fixed", "exit": index}, top_k=3, explain=True).json()
        for prediction, scores_C in zip(answer["predictions"], wide.expected[index], strict=True):
            assert [len(exit_["top"]) for exit_ in prediction["exits"]] == [2, 3, 3][: index + 1]
            assert prediction["label"] == str(scores_C.argmax())
            assert [one["class_id"] for one in prediction["top"]] == np.argsort(-scores_C)[:3].tolist()
            assert sum(one["probability"] for one in prediction["top"]) <= 1 + 1e-5
            assert len(prediction["top"]) == min(3, num_classes)


def test_exits_of_different_width_can_be_neither_combined_nor_compared(wide: Asked) -> None:
    combined = problem_of(wide.classify(combine="mean"))
    assert combined.startswith("combine: the exits of this model have different numbers of classes")
    for policy in ("patience", {"kind": "all_of", "of": [{"kind": "margin"}, {"kind": "agreement"}]}):
        assert problem_of(wide.classify(policy=policy)).startswith("policy: patience and agreement compare labels")
    refused = wide.infer(combine="geometric")
    assert (refused.status_code, "different numbers of classes" in refused.json()["error"]) == (422, True)


def test_what_may_be_asked_of_exits_of_different_width_is_described(wide: Asked) -> None:
    described = wide.client.get(f"/v1/models/{wide.manifest.name}").json()
    outputs = wide.client.get(f"/v2/models/{wide.manifest.name}").json()["outputs"]

    assert [exit_["num_classes"] for exit_ in described["exits"]] == [2, 4, 4]
    assert described["combine"] == ["last"]
    assert not {"patience", "agreement"} & set(described["policies"])
    assert all(wide.classify(policy=kind).status_code == 200 for kind in ("confidence", "entropy", "margin"))
    shapes = {output["name"]: output["shape"] for output in outputs}
    assert shapes["logits"] == shapes["probabilities"] == [-1, -1]
    assert shapes["class_id"] == [-1, 1]


def test_a_tensor_of_scores_is_as_wide_as_the_exit_where_all_rows_leave(wide: Asked) -> None:
    for index, num_classes in enumerate((2, 4, 4)):
        policy = json.dumps({"kind": "fixed", "exit": index})
        assert set(outputs_of(wide.infer(policy=policy))) == {"class_id", "exit_index", "exit_reason", "depth"}
        asked = {"name": "logits"}, {"name": "probabilities", "parameters": {"classification": 3}}
        outputs = outputs_of(wide.infer(*asked, policy=policy))
        assert outputs["logits"]["shape"] == [NUM_ROWS, num_classes]
        assert outputs["probabilities"]["shape"] == [NUM_ROWS, min(3, num_classes)]


def test_rows_that_leave_at_exits_of_different_width_share_no_tensor(wide: Asked) -> None:
    confidences = [np.exp(scores_BC).max(1) / np.exp(scores_BC).sum(1) for scores_BC in wide.expected]
    between = float(np.sort(confidences[0])[:2].mean())
    policy = json.dumps({"kind": "confidence", "threshold": between})

    assert len(set(outputs_of(wide.infer(policy=policy))["exit_index"]["data"])) > 1
    refused = wide.infer({"name": "logits"}, policy=policy)
    assert refused.status_code == 422
    assert "exits of 2 and 4 classes, which one tensor cannot hold; ask for class_id" in refused.json()["error"]

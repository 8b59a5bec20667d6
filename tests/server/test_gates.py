"""Gates as a client sees them: knobs, refusals, descriptions and metrics, through both front doors."""

import io
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest
from gated_bundles import CHOICE, NESTED, PRIORITIES, TWO, gated_rows, write_gated
from offramp_contract.calibration import OperatingPoint
from offramp_contract.manifest import ImagePreprocessing
from offramp_contract.policy_spec import FixedSpec
from offramp_server.api.model_schemas import ModelDescription
from offramp_server.api.schemas import ClassifyAnswer
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

ROWS = gated_rows((0.9, 0.1), (0.1, 0.9), (0.4, 0.6))
FULL, TRUNK = (0, 1, 2, 3, 4), (0, 2, 4)
TO_THE_END = FixedSpec(exit=1)


@pytest.fixture(scope="module")
def gated(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of a network with two gates, one of nested gates, and one whose depth is the caller's choice."""
    folder = tmp_path_factory.mktemp("gated")
    picture = ImagePreprocessing(mode="L", height=2, width=4, mean=(0.0,), std=(1.0,))
    return serve(
        write_gated(folder / "two", TWO, "two", default_policy=TO_THE_END, preprocessing=picture),
        write_gated(folder / "nested", NESTED, "nested"),
        write_gated(folder / "choice", CHOICE, "choice", PRIORITIES, default_policy=TO_THE_END),
    )


def classify(gated: Any, model: str = "two", x: np.ndarray = ROWS, **fields: Any) -> list[dict[str, Any]]:
    """Send rows as JSON; gives the predictions."""
    answer = gated.client.post(f"/v1/models/{model}/classify", json={"inputs": x.tolist(), **fields})
    assert answer.status_code == 200, answer.text
    ClassifyAnswer.model_validate(answer.json())
    predictions: list[dict[str, Any]] = answer.json()["predictions"]
    return predictions


def stages(predictions: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(int(name.removeprefix("stage_")) for name in prediction["stages"]) for prediction in predictions]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [(0, 1, 2, 4), (0, 2, 3, 4), (0, 2, 3, 4)]),
        ({"gates": "own"}, [(0, 1, 2, 4), (0, 2, 3, 4), (0, 2, 3, 4)]),
        ({"gates": "open"}, [FULL] * 3),
        ({"gates": "shut"}, [TRUNK] * 3),
        ({"gate_threshold": 0}, [FULL] * 3),
        ({"gate_threshold": 1.0}, [TRUNK] * 3),
        ({"gate_threshold": 0.3}, [(0, 1, 2, 4), (0, 2, 3, 4), FULL]),
        ({"gate_threshold": [0.3, 0.7], "gates": "own"}, [(0, 1, 2, 4), (0, 2, 3, 4), (0, 1, 2, 4)]),
    ],
)
def test_a_request_says_how_its_gates_decide(gated: Any, fields: dict[str, Any], expected: list[Any]) -> None:
    predictions = classify(gated, **fields)
    assert stages(predictions) == expected
    flops = (100, 200, 100, 400, 100)
    depths = [sum(flops[stage] for stage in ran) / sum(flops) for ran in expected]
    assert [prediction["depth"] for prediction in predictions] == pytest.approx(depths, abs=1e-6)
    assert [prediction["gates"]["open"] for prediction in predictions] == [(1 in ran) + (3 in ran) for ran in expected]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, (2, 4)), (1, (0, 2, 4)), (2, (0, 2, 3, 4)), (3, FULL), ("open", FULL), ("own", FULL)]
)
def test_a_count_keeps_the_gates_of_highest_priority_open(gated: Any, count: Any, expected: tuple[int, ...]) -> None:
    assert stages(classify(gated, "choice", gates=count)) == [expected] * 3
    npy = gated.client.post(f"/v1/models/choice/classify?gates={count}", content=npy_of(ROWS), headers=NPY)
    assert stages(npy.json()["predictions"]) == [expected] * 3


NPY = {"content-type": "application/x-npy"}


def npy_of(x: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, x)
    return stream.getvalue()


def picture_of(x_D: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.round(x_D.reshape(2, 4) * 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"gates": "shut"}, TRUNK),
        ({"gates": "open"}, FULL),
        ({"gate_threshold": "0.3"}, FULL),
        ({"gate_threshold": "0.3,0.7"}, (0, 1, 2, 4)),
        ({"gate_threshold": "[0.7, 0.3]"}, (0, 2, 3, 4)),
    ],
)
def test_query_and_form_say_it_in_text(gated: Any, query: dict[str, str], expected: tuple[int, ...]) -> None:
    path, picture = "/v1/models/two/classify", picture_of(ROWS[2])
    answers = [
        gated.client.post(path, params=query, content=npy_of(ROWS[2:]), headers=NPY),
        gated.client.post(path, params=query, content=picture, headers={"content-type": "image/png"}),
        gated.client.post(path, data=query, files={"image": ("x.png", picture, "image/png")}),
        gated.client.post(path, params=query, json={"inputs": ROWS[2:].tolist()}),
    ]
    assert [stages(answer.json()["predictions"]) for answer in answers] == [[expected]] * 4


def infer(gated: Any, model: str, **parameters: Any) -> httpx.Response:
    tensor = {"name": "x", "shape": list(ROWS.shape), "datatype": "FP32", "data": ROWS.ravel().tolist()}
    answer: httpx.Response = gated.client.post(
        f"/v2/models/{model}/infer", json={"inputs": [tensor], "parameters": parameters}
    )
    return answer


@pytest.mark.parametrize(
    ("model", "parameters", "depths"),
    [
        ("two", {"gate_threshold": 0.3}, [5 / 9, 7 / 9, 1]),
        ("two", {"gate_threshold": "0.3,0.7"}, [5 / 9, 7 / 9, 5 / 9]),
        ("two", {"gates": "shut"}, [3 / 9] * 3),
        ("choice", {"gates": 2}, [12 / 16] * 3),
        ("choice", {"gates": "2"}, [12 / 16] * 3),
    ],
)
def test_parameters_of_v2_say_it_too(gated: Any, model: str, parameters: dict[str, Any], depths: list[float]) -> None:
    outputs = {output["name"]: output["data"] for output in infer(gated, model, **parameters).json()["outputs"]}
    assert outputs["depth"] == pytest.approx(depths)
    assert outputs["exit_reason"] == ["final"] * 3


REFUSED = [
    ("two", {"gates": "half"}, "gates: must be own, open or shut, or a count"),
    ("two", {"gates": 1.5}, "gates: must be own, open or shut, or a count"),
    ("two", {"gates": True}, "gates: must be own, open or shut, or a count"),
    ("two", {"gates": [1]}, "gates: must be own, open or shut, or a count"),
    ("two", {"gates": 1}, "gates: a count is for networks whose depth is the caller's choice"),
    ("choice", {"gates": 4}, "gates: a count must be 0 to 3"),
    ("choice", {"gates": -1}, "gates: a count must be 0 to 3"),
    ("two", {"gate_threshold": 1.5}, "gate_threshold: one number from 0 to 1, or 2 of them"),
    ("two", {"gate_threshold": -0.1}, "gate_threshold: one number from 0 to 1, or 2 of them"),
    ("two", {"gate_threshold": [0.5, 0.5, 0.5]}, "gate_threshold: one number from 0 to 1, or 2 of them"),
    ("two", {"gate_threshold": []}, "gate_threshold: one number from 0 to 1, or 2 of them"),
    ("two", {"gate_threshold": [[0.5], [0.5]]}, "gate_threshold: must be a number from 0 to 1, or a list"),
    ("two", {"gate_threshold": [0.5, None]}, "gate_threshold: must be a number from 0 to 1, or a list"),
    ("two", {"gate_threshold": True}, "gate_threshold: must be a number from 0 to 1, or a list"),
    ("two", {"gate_threshold": {"tau": 0.5}}, "gate_threshold: must be a number from 0 to 1, or a list"),
    ("two", {"gates": "open", "gate_threshold": 0.5}, "gates: 'open' leaves nothing for gate_threshold to decide"),
    ("choice", {"gates": 2, "gate_threshold": 0.5}, "gates: 2 leaves nothing for gate_threshold to decide"),
]


@pytest.mark.parametrize(("model", "fields", "sentence"), REFUSED)
def test_what_gates_cannot_do_is_refused_by_name(gated: Any, model: str, fields: dict[str, Any], sentence: str) -> None:
    answer = gated.client.post(f"/v1/models/{model}/classify", json={"inputs": ROWS.tolist(), **fields})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(sentence)
    assert answer.json()["field"] == sentence.partition(":")[0]
    second = infer(gated, model, **fields)
    assert second.status_code == 422
    assert second.json()["error"].startswith(f"parameters.{sentence}")


def test_text_that_is_no_number_is_refused_too(gated: Any) -> None:
    for query, field in (("gate_threshold=high", "gate_threshold"), ("gates=many", "gates"), ("gates=null", None)):
        answer = gated.client.post(f"/v1/models/two/classify?{query}", content=npy_of(ROWS), headers=NPY)
        assert answer.json().get("field") == field


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"operating_point": "eager"}, FULL),
        ({"compute": 0.9}, FULL),
        ({"operating_point": "eager", "gate_threshold": 0.5}, (0, 2, 3, 4)),
        ({"operating_point": "eager", "gates": "shut"}, TRUNK),
        ({"operating_point": "eager", "gates": "own"}, FULL),
        ({}, (0, 2, 3, 4)),
    ],
)
def test_an_operating_points_gate_threshold_holds_unless_the_request_has_its_own(
    calibrated: Any, fields: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert stages(classify(calibrated, x=ROWS[2:], **fields)) == [expected]
    (point,) = calibrated.client.get("/v1/models/two/operating-points").json()["operating_points"]
    assert point["gate_threshold"] == 0.3


@pytest.fixture(scope="module")
def calibrated(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of a network with one operating point that opens gates early."""
    rates = {"compute": 0.9, "accuracy": 0.9, "exit_rates": (0.0, 1.0)}
    point = OperatingPoint(name="eager", policy=TO_THE_END, gate_threshold=0.3, **rates)
    folder = tmp_path_factory.mktemp("calibrated") / "two"
    return serve(write_gated(folder, TWO, "two", default_policy=TO_THE_END, operating_points=(point,)))


def test_explain_shows_each_gates_score_threshold_and_decision(gated: Any) -> None:
    x_BD = gated_rows((0.75, 0.25), (0.25, 0.75))
    first, second = classify(gated, "nested", x_BD, explain=True)
    assert first["gates"] == {
        "open": 1,
        "forced": 0,
        "of": 2,
        "decisions": [
            {"name": "gate_0", "score": 0.75, "threshold": 0.5, "decision": "open"},
            {"name": "gate_1", "score": 0.25, "threshold": 0.5, "decision": "shut"},
        ],
    }
    assert second["gates"]["decisions"][1] == {"name": "gate_1", "score": None, "threshold": 0.5, "decision": "shut"}
    (forced,) = classify(gated, "two", x_BD[:1], explain=True, gates="open", max_exit=0)
    assert [(gate["threshold"], gate["decision"]) for gate in forced["gates"]["decisions"]] == [
        (None, "open"),
        (None, None),
    ]


def test_a_budget_that_leaves_no_time_gets_the_trunk_and_is_called_forced(gated: Any) -> None:
    (prediction,) = classify(gated, "nested", gated_rows((0.9, 0.9)), latency_ms=0.001)
    assert stages([prediction]) == [(0, 4)]
    assert prediction["exit"] == {"index": 0, "name": "exit_0", "of": 1, "reason": "deadline", "forced": True}
    assert prediction["gates"] == {"open": 0, "forced": 1, "of": 2}


def test_a_model_says_which_gates_it_has(gated: Any) -> None:
    described = gated.client.get("/v1/models/nested").json()
    ModelDescription.model_validate(described)
    assert described["gates"] == [
        {"name": "gate_0", "stage": "stage_0", "priority": None, "threshold": 0.5, "stages": NESTED_BODIES},
        {"name": "gate_1", "stage": "stage_1", "priority": None, "threshold": 0.5, "stages": ["stage_2"]},
    ]
    assert [stage["gates"] for stage in described["stages"]] == [[], ["gate_0"], ["gate_0", "gate_1"], ["gate_0"], []]
    choice = gated.client.get("/v1/models/choice").json()["gates"]
    assert [(gate["stage"], gate["priority"]) for gate in choice] == [(None, priority) for priority in PRIORITIES]
    config = gated.client.get("/v2/models/nested/config").json()
    assert config["parameters"] == {"gates": {"string_value": "gate_0,gate_1"}}


NESTED_BODIES = ["stage_1", "stage_2", "stage_3"]


def test_a_model_without_gates_has_none_to_speak_of(toy: Any) -> None:
    assert toy.client.get("/v1/models/toy").json()["gates"] == []
    prediction = toy.client.post("/v1/classify", json={"inputs": [0, 9, 0, 0], "explain": True}).json()["predictions"][
        0
    ]
    assert "gates" not in prediction
    assert toy.client.get("/v2/models/toy/config").json()["parameters"] == {}


def counted(gated: Any, model: str) -> dict[tuple[str, ...], float]:
    """Give the counters of one model by their name and the values of the labels that matter here."""
    families = text_string_to_metric_families(gated.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.labels.get("model") == model]
    labels = ("gate", "decision", "exit", "reason", "stage")
    return {
        (sample.name, *(sample.labels[label] for label in labels if label in sample.labels)): sample.value
        for sample in samples
        if "le" not in sample.labels
    }


def test_metrics_add_up_to_the_answers(gated: Any) -> None:
    before = counted(gated, "nested")
    x_BD = gated_rows((0.9, 0.9), (0.9, 0.1), (0.1, 0.9), (0.1, 0.1), (0.8, 0.7))
    predictions = classify(gated, "nested", x_BD, explain=True)
    predictions += classify(gated, "nested", x_BD, explain=True, gate_threshold=[0.85, 0.5])
    predictions += classify(gated, "nested", x_BD, explain=True, latency_ms=0.001)
    after = counted(gated, "nested")
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    decided = Counter((gate["name"], gate["decision"]) for one in predictions for gate in one["gates"]["decisions"])
    for gate in ("gate_0", "gate_1"):
        for decision in ("open", "shut", "forced"):
            assert grown["offramp_gate_decisions_total", gate, decision] == decided[gate, decision], (gate, decision)
    assert decided["gate_0", "forced"] == 3
    ran = Counter(name for one in predictions for name in one["stages"])
    for stage in (f"stage_{index}" for index in range(5)):
        assert grown["offramp_stage_batch_size_sum", stage] == ran[stage]
    assert grown["offramp_depth_ratio_sum",] == pytest.approx(sum(one["depth"] for one in predictions), abs=1e-4)
    forced = sum(one["exit"]["forced"] for one in predictions)
    assert grown["offramp_forced_exits_total",] == forced == 3
    assert grown["offramp_samples_total", "exit_0", "deadline"] == forced
    assert grown["offramp_samples_total", "exit_0", "final"] == len(predictions) - forced

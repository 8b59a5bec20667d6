"""What a client gets over HTTP is what the network says."""

import asyncio
import json

import httpx
import numpy as np
import pytest

POLICIES = (
    {"policy": "confidence", "threshold": "0.6"},
    {"policy": "confidence", "threshold": "0.999"},
    {"policy": "entropy", "threshold": "0.3"},
    {"policy": "margin", "threshold": "0.4,0.9"},
    {"policy": "patience", "patience": "1"},
    {"policy": json.dumps({"kind": "fixed", "exit": 0})},
    {"policy": json.dumps({"kind": "fixed", "exit": 1})},
    {"policy": json.dumps({"kind": "fixed", "exit": 2})},
    {"policy": "agreement", "threshold": "0.9"},
    {"policy": json.dumps({"kind": "window", "low": 0.4, "high": 0.8})},
    {"policy": "confidence", "threshold": "0.5", "min_exit": "1"},
    {"policy": "confidence", "threshold": "1", "max_exit": "1"},
)
PNG = {"content-type": "image/png"}


def what_matters(answer):
    (prediction,) = answer["predictions"]
    exit_ = prediction["exit"]
    return prediction["class_id"], exit_["index"], exit_["reason"], prediction["stages"], prediction["depth"]


@pytest.mark.parametrize("exit_index", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_staged_logits_equal_the_eager_networks(served, trained, batch, exit_index):
    images = trained.data.inputs(trained.data.test)[10 : 10 + batch]
    name = served.client.get("/v2/models/digits").json()["inputs"][0]["name"]
    tensor = {"name": name, "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    document = {
        "inputs": [tensor],
        "parameters": {"policy": json.dumps({"kind": "fixed", "exit": exit_index})},
        "outputs": [{"name": "logits"}, {"name": "exit_index"}],
    }
    answer = served.client.post("/v2/models/digits/infer", json=document)
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: np.reshape(output["data"], output["shape"]) for output in answer.json()["outputs"]}
    assert (outputs["exit_index"] == exit_index).all()
    expected = trained.eager(images)[exit_index]
    np.testing.assert_allclose(outputs["logits"].reshape(batch, -1), expected, rtol=1e-4, atol=1e-4)


def test_an_image_file_gets_the_answer_of_its_pixels(served, trained, png_files):
    inputs = trained.data.inputs(trained.data.test)
    expected = trained.eager(inputs[:20])[-1].argmax(axis=1)
    query = {"policy": json.dumps({"kind": "fixed", "exit": 2})}
    answers = [served.client.post("/v1/classify", params=query, content=file, headers=PNG) for file in png_files[:20]]
    assert [answer.json()["predictions"][0]["class_id"] for answer in answers] == expected.tolist()
    assert [answer.json()["predictions"][0]["label"] for answer in answers] == [str(digit) for digit in expected]


def test_requests_with_different_policies_answered_together_get_what_each_gets_alone(served, png_files):
    cases = [(png_files[index], POLICIES[index % len(POLICIES)]) for index in range(10 * len(POLICIES))]

    def alone(file, query):
        answer = served.client.post("/v1/classify", params=query, content=file, headers=PNG)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def together():
        limits = httpx.Limits(max_connections=len(cases))
        async with httpx.AsyncClient(base_url=served.url, trust_env=False, timeout=60, limits=limits) as client:
            posts = [client.post("/v1/classify", params=query, content=file, headers=PNG) for file, query in cases]
            return [answer.json() for answer in await asyncio.gather(*posts)]

    expected = [alone(file, query) for file, query in cases]
    before = served.counters()
    actual = asyncio.run(together())
    after = served.counters()

    assert [what_matters(answer) for answer in actual] == [what_matters(answer) for answer in expected]
    probabilities = [[a["predictions"][0]["probability"] for a in answers] for answers in (actual, expected)]
    np.testing.assert_allclose(*probabilities, atol=1e-4)
    exits = [answer["predictions"][0]["exit"]["index"] for answer in actual]
    assert set(exits) == {0, 1, 2}
    rows, runs = (after[kind, "stage_0"] - before[kind, "stage_0"] for kind in ("rows", "runs"))
    assert rows == len(cases)
    assert runs < rows, "no two requests shared a batch, so nothing was tested"


def test_a_budget_that_the_next_stage_cannot_keep_forces_the_exit(served, png_files):
    query = {"policy": json.dumps({"kind": "fixed", "exit": 2}), "latency_ms": "0.01"}
    answer = served.client.post("/v1/classify", params=query, content=png_files[0], headers=PNG)
    (prediction,) = answer.json()["predictions"]
    assert prediction["exit"]["reason"] == "deadline"
    assert prediction["exit"]["forced"] is True
    assert prediction["exit"]["index"] == 0
    assert prediction["stages"] == ["stage_0"]
    assert answer.json()["timing"]["budget_ms"] == 0.01


def test_a_budget_with_room_to_spare_forces_nothing(served, png_files):
    query = {"policy": json.dumps({"kind": "fixed", "exit": 2}), "latency_ms": "60000"}
    answer = served.client.post("/v1/classify", params=query, content=png_files[0], headers=PNG)
    (prediction,) = answer.json()["predictions"]
    assert (prediction["exit"]["index"], prediction["exit"]["forced"]) == (2, False)


def test_a_request_that_wants_no_late_answer_is_refused_with_504(served, png_files):
    query = {"latency_ms": "0.01", "on_miss": "reject"}
    answer = served.client.post("/v1/classify", params=query, content=png_files[0], headers=PNG)
    assert answer.status_code == 504
    assert answer.headers["content-type"] == "application/problem+json"

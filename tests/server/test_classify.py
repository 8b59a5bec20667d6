import base64
import io
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from PIL import Image

SURE = [0.0, 9.0, 0.0, 0.0]
"""Confident at exit 0."""
UNSURE = [1.0, 0.0, 0.0, 0.0]
"""Confident only at exit 1, where its logits are ten times as large."""


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def picture(class_id: int, kind: str = "PNG") -> bytes:
    """An 8 x 8 picture whose pixel of that class is white: its logits are the first ten pixels."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels.reshape(-1)[class_id] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, lossless=True)
    return stream.getvalue()


def classes(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return [prediction["class_id"] for prediction in response.json()["predictions"]]


def test_the_answer_says_what_and_where_and_why(toy: Any) -> None:
    response = toy.client.post("/v1/models/toy/classify", json={"inputs": [SURE, UNSURE], "latency_ms": 500})
    answer = response.json()
    sure, unsure = answer["predictions"]
    assert (sure["label"], sure["class_id"]) == ("east", 1)
    assert sure["probability"] == pytest.approx(np.exp(9) / (np.exp(9) + 3), abs=1e-5)
    assert sure["top"][0] == {name: sure[name] for name in ("label", "class_id", "probability")}
    assert sure["exit"] == {"index": 0, "name": "exit_0", "of": 3, "reason": "confident", "forced": False}
    assert (sure["stages"], sure["depth"]) == (["stage_0"], pytest.approx(1 / 3, abs=1e-5))
    assert (sure["score"], sure["threshold"]) == (sure["probability"], 0.9)
    assert (unsure["exit"]["index"], unsure["stages"]) == (1, ["stage_0", "stage_1"])
    assert answer["policy"] == {"kind": "confidence", "operating_point": None, "certified": None, "gear": None}
    assert answer["timing"]["budget_ms"] == 500
    assert answer["timing"]["total_ms"] >= answer["timing"]["compute_ms"] > 0
    assert answer["model"] == "toy"
    assert answer["version"] == toy.engine.models[0].version == response.headers["x-model-version"]
    assert float(response.headers["x-queue-time-ms"]) >= 0
    assert float(response.headers["x-compute-time-ms"]) == pytest.approx(answer["timing"]["compute_ms"], abs=1e-3)


def test_the_only_model_needs_no_name(toy: Any) -> None:
    assert classes(toy.client.post("/v1/classify", json={"inputs": SURE})) == [1]


def test_one_row_and_a_batch_are_told_apart_by_their_shape(toy: Any) -> None:
    assert classes(toy.client.post("/v1/classify", json={"inputs": SURE})) == [1]
    assert classes(toy.client.post("/v1/classify", json={"inputs": [SURE]})) == [1]
    assert classes(toy.client.post("/v1/classify", json={"inputs": {"x": [SURE, UNSURE]}})) == [1, 0]


@pytest.mark.parametrize(("rows", "expected"), [(np.eye(4)[2], [2]), (np.eye(4)[[2, 3]], [2, 3])])
def test_an_npy_body_comes_with_or_without_the_batch_axis(toy: Any, rows: np.ndarray, expected: list[int]) -> None:
    response = toy.client.post(
        "/v1/classify?policy=fixed&policy=x", content=npy(rows), headers={"content-type": "application/x-npy"}
    )
    assert response.status_code == 422
    response = toy.client.post("/v1/classify", content=npy(rows), headers={"content-type": "application/x-npy"})
    assert classes(response) == expected


def test_query_parameters_route_bodies_that_are_not_json(toy: Any) -> None:
    def exit_index(query: dict[str, str]) -> int:
        headers = {"content-type": "application/x-npy"}
        response = toy.client.post("/v1/classify", params=query, content=npy(np.array(UNSURE)), headers=headers)
        assert response.status_code == 200, response.text
        index: int = response.json()["predictions"][0]["exit"]["index"]
        return index

    assert exit_index({}) == 1
    assert exit_index({"policy": "confidence", "threshold": "0.2"}) == 0
    assert exit_index({"policy": "confidence", "threshold": "0.9,1"}) == 2
    assert exit_index({"policy": '{"kind": "fixed", "exit": 2}'}) == 2
    assert exit_index({"max_exit": "0"}) == 0


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_raw_image_is_preprocessed_as_the_bundle_says(digits: Any, kind: str) -> None:
    headers = {"content-type": f"image/{kind}"}
    response = digits.client.post("/v1/classify?explain=true", content=picture(7, kind), headers=headers)
    assert classes(response) == [7]
    assert response.json()["predictions"][0]["label"] == "7"
    assert len(response.json()["predictions"][0]["exits"]) == 2


def test_several_multipart_images_are_one_batch_with_fields_beside_them(digits: Any) -> None:
    files = [("image", ("a.png", picture(3), "image/png")), ("image", ("b.png", picture(5), "image/png"))]
    response = digits.client.post("/v1/classify", files=files, data={"policy": "fixed", "explain": "false"})
    assert response.status_code == 422  # `fixed` needs its exit
    response = digits.client.post("/v1/classify", files=files, data={"max_exit": "0", "top_k": "1"})
    assert classes(response) == [3, 5]
    for prediction in response.json()["predictions"]:
        assert (prediction["exit"]["index"], prediction["exit"]["reason"]) == (0, "depth_cap")
        assert len(prediction["top"]) == 1


def test_json_carries_images_as_base64_or_as_a_data_url(digits: Any) -> None:
    plain = base64.b64encode(picture(2)).decode()
    assert classes(digits.client.post("/v1/classify", json={"image": plain})) == [2]
    assert classes(digits.client.post("/v1/classify", json={"image": [plain, f"data:image/png;base64,{plain}"]})) == [
        2,
        2,
    ]


def test_explain_adds_the_answer_of_every_exit_seen(toy: Any) -> None:
    prediction = toy.client.post("/v1/classify", json={"inputs": UNSURE, "explain": True}).json()["predictions"][0]
    assert [seen["exit"]["index"] for seen in prediction["exits"]] == [0, 1]
    first = prediction["exits"][0]
    assert first["probability"] == pytest.approx(np.e / (np.e + 3), abs=1e-5)
    assert first["margin"] == pytest.approx((np.e - 1) / (np.e + 3), abs=1e-5)
    assert 0 < first["entropy"] < 1


def test_a_row_that_fails_among_others_has_the_problem_in_its_place_and_alone_is_the_answer(toy: Any) -> None:
    overflowing, policy = [1e37, 0.0, 0.0, 0.0], {"kind": "fixed", "exit": 2}
    mixed = toy.client.post("/v1/classify", json={"inputs": [overflowing, SURE], "policy": policy})
    assert mixed.status_code == 200
    failed, answered = mixed.json()["predictions"]
    assert failed["error"]["type"] == "/problems/not-finite"
    assert "exit_2" in failed["error"]["detail"]
    assert answered["class_id"] == 1
    alone = toy.client.post("/v1/classify", json={"inputs": overflowing, "policy": policy})
    assert (alone.status_code, alone.json()["type"]) == (422, "/problems/not-finite")


def test_a_deadline_that_no_exit_can_meet_is_rejected_on_request_and_answered_late_otherwise(toy: Any) -> None:
    rejected = toy.client.post("/v1/classify", json={"inputs": SURE, "latency_ms": 1e-3, "on_miss": "reject"})
    assert (rejected.status_code, rejected.json()["type"]) == (504, "/problems/deadline-exceeded")
    late = toy.client.post("/v1/classify", json={"inputs": [0.01, 0, 0, 0], "latency_ms": 1e-3})
    assert late.status_code == 200
    assert late.json()["predictions"][0]["exit"] == {
        "index": 0, "name": "exit_0", "of": 3, "reason": "deadline", "forced": True,
    }  # fmt: skip


def test_the_body_may_be_compressed(toy: Any) -> None:
    import gzip
    import zlib

    body = orjson.dumps({"inputs": SURE})
    raw = zlib.compressobj(wbits=-15)
    for encoding, content in (
        ("gzip", gzip.compress(body)),
        ("gzip", gzip.compress(body[:9]) + gzip.compress(body[9:])),
        ("deflate", zlib.compress(body)),
        ("deflate", raw.compress(body) + raw.flush()),
    ):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        assert classes(toy.client.post("/v1/classify", content=content, headers=headers)) == [1]


def test_a_body_large_enough_to_be_read_on_a_worker_thread_is_answered_the_same(toy: Any) -> None:
    body = b" " * 100_000 + orjson.dumps({"inputs": [SURE, UNSURE]})
    assert classes(toy.client.post("/v1/classify", content=body, headers={"content-type": "application/json"})) == [
        1,
        0,
    ]


def test_a_request_id_and_a_traceparent_are_echoed_if_sane_and_replaced_if_not(toy: Any) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    response = toy.client.get("/v1/models", headers={"x-request-id": "order-17", "traceparent": trace})
    assert (response.headers["x-request-id"], response.headers["traceparent"]) == ("order-17", trace)
    for strange in ("a" * 200, "semi;colon", "-leading"):
        response = toy.client.get("/v1/models", headers={"x-request-id": strange, "traceparent": "junk"})
        assert len(response.headers["x-request-id"]) == 32
        assert "traceparent" not in response.headers


def test_models_say_what_may_be_asked_of_them(toy: Any) -> None:
    served = toy.engine.models[0]
    summary = {"name": "toy", "version": served.version, "task": "classification", "num_stages": 3, "num_exits": 3,
               "num_classes": 4}  # fmt: skip
    assert toy.client.get("/v1/models").json() == {"models": [summary]}
    described = toy.client.get("/v1/models/toy").json()
    assert described.items() >= summary.items()
    assert described["labels"] == ["north", "east", "south", "west"]
    assert described["inputs"] == [{"name": "x", "dtype": "float32", "shape": [4]}]
    assert [exit_["depth"] for exit_ in described["exits"]] == pytest.approx([1 / 3, 2 / 3, 1], abs=1e-5)
    assert all(stage["measured_ms"]["1"] > 0 for stage in described["stages"])
    assert described["default_policy"] == {"kind": "confidence", "threshold": 0.9}
    assert described["default_operating_point"] is None
    points = toy.client.get("/v1/models/toy/operating-points").json()
    assert points == {
        "model": "toy", "version": served.version, "data_digest": None, "num_samples": 0,
        "temperatures": [1.0, 1.0, 1.0], "operating_points": [],
    }  # fmt: skip


def test_the_documentation_calls_no_third_party(toy: Any) -> None:
    page = toy.client.get("/docs")
    assert page.status_code == 200
    assert "://" not in page.text.replace("http://www.w3.org", "")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/docs/assets/{asset}" in page.text
        assert toy.client.get(f"/docs/assets/{asset}").status_code == 200
    assert toy.client.get("/openapi.json").json()["openapi"] == "3.1.0"
    assert toy.client.get("/metrics").headers["content-type"].startswith("text/plain")

import gzip
import shutil
import zlib
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from offramp_contract.errors import InvalidValue
from offramp_contract.policy import Reason
from offramp_contract.statistics import decision_of_logits, log_softmax
from offramp_server.api.open_inference.outputs import OUTPUTS, output_tensors, requested_outputs
from offramp_server.api.open_inference.request import RequestedOutput
from offramp_server.exits import exit_answers
from offramp_server.messages import RowAnswer

SURE, UNSURE = [0.0, 9.0, 0.0, 0.0], [0.01, 0.0, 0.0, 0.0]
INFER = "/v2/models/toy/infer"


def body_of(*rows: list[float], **more: Any) -> dict[str, Any]:
    data = [number for row in rows for number in row]
    return {"inputs": [{"name": "x", "shape": [len(rows), 4], "datatype": "FP32", "data": data}], **more}


def infer(toy: Any, body: dict[str, Any]) -> dict[str, Any]:
    answer = toy.client.post(INFER, json=body)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def values(document: dict[str, Any]) -> dict[str, list[Any]]:
    return {output["name"]: output["data"] for output in document["outputs"]}


def error_of(answer: httpx.Response) -> str:
    """The one form that errors have under /v2."""
    assert set(answer.json()) == {"error"}
    message: str = answer.json()["error"]
    assert message
    assert len(message) < 600
    return message


def test_json_tensors_are_answered_with_all_but_the_probabilities(toy: Any) -> None:
    document = infer(toy, body_of(SURE, UNSURE, id="a1"))
    version = toy.client.get("/v2/models/toy").json()["versions"][0]
    assert (document["model_name"], document["model_version"], document["id"]) == ("toy", version, "a1")
    assert [(output["name"], output["datatype"], output["shape"]) for output in document["outputs"]] == [
        ("logits", "FP32", [2, 4]),
        ("class_id", "INT32", [2, 1]),
        ("exit_index", "INT32", [2, 1]),
        ("exit_reason", "BYTES", [2, 1]),
        ("depth", "FP32", [2, 1]),
    ]
    answered = values(document)
    assert answered["logits"] == [0, 9, 0, 0, 1, 0, 0, 0]  # exit 0 gives x, the final exit 100 x
    assert answered["class_id"] == [1, 0]
    assert answered["exit_index"] == [0, 2]
    assert answered["exit_reason"] == ["confident", "final"]
    assert answered["depth"] == pytest.approx([1 / 3, 1.0])


def test_nested_json_data_is_the_same_as_flat(toy: Any) -> None:
    nested = {"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [SURE, UNSURE]}]}
    assert infer(toy, nested)["outputs"] == infer(toy, body_of(SURE, UNSURE))["outputs"]


def test_an_answer_has_no_id_where_the_request_has_none(toy: Any) -> None:
    assert "id" not in infer(toy, body_of(SURE))


def test_probabilities_and_leading_classes_come_with_the_models_labels(toy: Any) -> None:
    outputs = [{"name": "probabilities"}, {"name": "logits", "parameters": {"classification": 2}}]
    document = infer(toy, body_of(SURE, outputs=outputs))
    probability_C = np.exp(log_softmax(np.array([SURE])))[0]
    assert values(document)["probabilities"] == pytest.approx(probability_C.tolist(), abs=1e-6)
    assert document["outputs"][1] == {
        "name": "logits", "datatype": "BYTES", "shape": [1, 2], "data": ["9.000000:1:east", "0.000000:0:north"]
    }  # fmt: skip


def test_more_leading_classes_than_there_are_is_all_of_them(toy: Any) -> None:
    outputs = [{"name": "probabilities", "parameters": {"classification": 99}}]
    assert infer(toy, body_of(SURE, SURE, outputs=outputs))["outputs"][0]["shape"] == [2, 4]


def binary_body(document: dict[str, Any], *tensors: bytes, pad: int = 0) -> tuple[bytes, dict[str, str]]:
    text = orjson.dumps(document) + b" " * pad
    return text + b"".join(tensors), {"inference-header-content-length": str(len(text))}


@pytest.mark.parametrize("pad", range(4))
def test_binary_tensors_go_both_ways(toy: Any, pad: int) -> None:
    data = np.array([SURE, UNSURE], np.float32).tobytes()
    entry = {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    outputs = [
        {"name": "logits", "parameters": {"binary_data": True}},
        {"name": "depth", "parameters": {"binary_data": False}},
        {"name": "exit_reason", "parameters": {"binary_data": True}},
    ]
    content, headers = binary_body({"inputs": [entry], "outputs": outputs}, data, pad=pad)
    answer = toy.client.post(INFER, content=content, headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    document, rest = orjson.loads(answer.content[:length]), answer.content[length:]
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 32}
    assert document["outputs"][1]["data"] == pytest.approx([1 / 3, 1.0])
    assert np.frombuffer(rest[:32], np.float32).tolist() == [0, 9, 0, 0, 1, 0, 0, 0]
    assert rest[32:] == b"\x09\0\0\0confident\x05\0\0\0final"


def test_the_header_length_is_sent_only_with_binary_outputs(toy: Any) -> None:
    plain = toy.client.post(INFER, json=body_of(SURE))
    assert "inference-header-content-length" not in plain.headers
    assert plain.headers["content-type"] == "application/json"
    binary = toy.client.post(INFER, json=body_of(SURE, parameters={"binary_data_output": True}))
    assert "inference-header-content-length" in binary.headers


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_read(toy: Any, encoding: str, compress: Any) -> None:
    content = compress(orjson.dumps(body_of(SURE)))
    answer = toy.client.post(INFER, content=content, headers={"content-encoding": encoding})
    assert answer.status_code == 200


@pytest.mark.parametrize(("encoding", "decompress"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_a_long_answer_is_compressed_where_the_client_asks_for_it(toy: Any, encoding: str, decompress: Any) -> None:
    request = toy.client.build_request("POST", INFER, json=body_of(*[SURE] * 16), headers={"accept-encoding": encoding})
    answer = toy.client.send(request, stream=True)
    content = b"".join(answer.iter_raw())
    answer.close()
    assert answer.headers["content-encoding"] == encoding
    assert len(orjson.loads(decompress(content))["outputs"]) == 5


def test_an_answer_is_not_compressed_unasked(toy: Any) -> None:
    headers = {"accept-encoding": "identity"}
    assert "content-encoding" not in toy.client.post(INFER, json=body_of(*[SURE] * 16), headers=headers).headers


@pytest.mark.parametrize(
    ("parameters", "exits"),
    [
        ({}, [0, 2]),
        ({"policy": "confidence", "threshold": 0.2}, [0, 0]),
        ({"policy": "confidence", "threshold": "0.2"}, [0, 0]),
        ({"policy": '{"kind": "fixed", "exit": 1}'}, [1, 1]),
        ({"policy": "patience", "patience": "1"}, [1, 1]),
        ({"max_exit": 1}, [0, 1]),
        ({"max_exit": "1", "min_exit": "1"}, [1, 1]),
        ({"combine": "mean", "min_exit": 2}, [2, 2]),
        ({"latency_ms": 5000, "priority": 1, "sequence_id": 0}, [0, 2]),
        ({"timeout": 5_000_000}, [0, 2]),
    ],
)
def test_parameters_route_as_the_fields_of_v1_do(toy: Any, parameters: dict[str, Any], exits: list[int]) -> None:
    assert values(infer(toy, body_of(SURE, UNSURE, parameters=parameters)))["exit_index"] == exits


@pytest.mark.parametrize(
    "parameters", [{"timeout": 1}, {"timeout": 1, "latency_ms": 9000}, {"timeout": 9_000_000, "latency_ms": 0.001}]
)
def test_the_tighter_of_timeout_and_latency_is_a_deadline(toy: Any, parameters: dict[str, Any]) -> None:
    answered = values(infer(toy, body_of(UNSURE, parameters=parameters)))
    assert answered["exit_reason"] == ["deadline"]
    assert answered["exit_index"] == [0]


def test_a_deadline_that_no_exit_can_keep_is_504_where_the_request_says_so(toy: Any) -> None:
    answer = toy.client.post(INFER, json=body_of(UNSURE, parameters={"timeout": 1, "on_miss": "reject"}))
    assert answer.status_code == 504
    assert "deadline" in error_of(answer)


def test_combined_exits_give_probabilities_that_are_their_mean(toy: Any) -> None:
    parameters = {"combine": "mean", "min_exit": 1, "max_exit": 1}
    outputs = [{"name": "probabilities"}]
    answered = values(infer(toy, body_of(UNSURE, parameters=parameters, outputs=outputs)))["probabilities"]
    each = [np.exp(log_softmax(np.array([UNSURE]) * gain))[0] for gain in (1, 10)]
    assert answered == pytest.approx(np.mean(each, axis=0).tolist(), abs=1e-6)


def test_one_failed_row_fails_the_request_and_is_named(toy: Any) -> None:
    # 100 x is beyond float32 in the second row, so the final exit's statistics are not numbers.
    parameters = {"policy": '{"kind": "fixed", "exit": 2}'}
    answer = toy.client.post(INFER, json=body_of(SURE, [3e38, 3e38, 0.0, 0.0], parameters=parameters))
    assert answer.status_code == 422
    assert error_of(answer).startswith("row 1: ")


def one(**changes: Any) -> dict[str, Any]:
    """A good request with its input changed; None takes a part away."""
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": SURE} | changes
    return {"inputs": [{name: value for name, value in entry.items() if value is not None}]}


REFUSED: list[tuple[dict[str, Any] | list[Any], int, str]] = [
    ({}, 400, "inputs: must be a list"),
    ([], 400, "body: must be a JSON object"),
    ({"inputs": []}, 422, "inputs: must be exactly x"),
    ({"inputs": [1]}, 400, "inputs: must be a list of objects"),
    (one(name="y"), 422, "inputs: this model reads x; got 'y'"),
    (one(name=None), 422, "inputs: this model reads x; got no name"),
    (one(datatype="FP64"), 422, "inputs.x.datatype: must be FP32"),
    (one(datatype="BYTES"), 422, "inputs.x.datatype: must be FP32"),
    (one(datatype=None), 422, "inputs.x.datatype: must be FP32"),
    (one(shape=[4]), 422, "inputs.x.shape: must be [rows, 4] with at least one row; got [4]"),
    (one(shape=[0, 4]), 422, "inputs.x.shape: "),
    (one(shape=[-1, 4]), 422, "inputs.x.shape: "),
    (one(shape=[True, 4]), 422, "inputs.x.shape: "),
    (one(shape=[1.0, 4]), 422, "inputs.x.shape: "),
    (one(shape=None), 422, "inputs.x.shape: "),
    (one(shape=[10**18, 4]), 413, "inputs.x.shape: 1000000000000000000 rows are over the operator's limit of 16"),
    (one(shape=[17, 4]), 413, "inputs.x.shape: 17 rows"),
    (one(shape=[1, 10**18]), 422, "inputs.x.shape: "),
    (one(shape=[2, 4]), 422, "inputs.x.data: shape [2, 4] needs 8 values; got 4"),
    (one(data=[1, 2, 3]), 422, "inputs.x.data: shape [1, 4] needs 4 values; got 3"),
    (one(data=[1, 2, 3, "4"]), 422, "inputs.x.data: FP32 data must be numbers"),
    (one(data=[1, 2, 3, 1e300]), 422, "inputs: must hold finite numbers"),
    (one(data=None), 422, "inputs.x: give either data or parameters.binary_data_size"),
    (one(parameters={"binary_data_size": 16}), 422, "inputs.x: give either data or"),
    (one(data=None, parameters={"binary_data_size": 16}), 400, "inputs.x.parameters.binary_data_size: 16 bytes are"),
    (one(data=None, parameters={"binary_data_size": -16}), 422, "inputs.x.parameters.binary_data_size: must be an"),
    (one(data=None, parameters={"binary_data_size": "16"}), 422, "inputs.x.parameters.binary_data_size: must be an"),
    (one(parameters={"shared_memory_region": "r"}), 422, "inputs.x: shared memory is not offered"),
    (one(parameters=[]), 400, "inputs.x.parameters: must be an object"),
    ({"inputs": one()["inputs"] * 2}, 422, "inputs: 'x' is given twice"),
    (one() | {"id": 7}, 400, "id: must be a string"),
    (one() | {"outputs": [{"name": "softmax"}]}, 422, "outputs: must be of logits, probabilities"),
    (one() | {"outputs": [{}]}, 400, "outputs: each must have a name"),
    (one() | {"outputs": [{"name": "depth"}] * 2}, 422, "outputs: 'depth' is asked for twice"),
    (one() | {"outputs": [{"name": "depth", "parameters": {"classification": 1}}]}, 422, "outputs.depth.parameters.cl"),
    (one() | {"outputs": [{"name": "logits", "parameters": {"classification": -1}}]}, 422, "outputs.logits.parameters"),
    (one() | {"outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]}, 422, "outputs.logits.parameters.bi"),
    (one() | {"parameters": 1}, 400, "parameters: must be an object"),
    (one() | {"parameters": {"treshold": 0.9}}, 422, "parameters.treshold: there is no such parameter"),
    (one() | {"parameters": {"top_k": 3}}, 422, "parameters.top_k: there is no such parameter"),
    (one() | {"parameters": {"threshold": "high"}}, 422, "parameters.threshold: "),
    (one() | {"parameters": {"policy": "{"}}, 400, "policy: it is not valid JSON"),
    (one() | {"parameters": {"timeout": "5"}}, 422, "parameters.timeout: must be an integer"),
    (one() | {"parameters": {"timeout": -5}}, 422, "parameters.timeout: must be an integer"),
    (one() | {"parameters": {"timeout": 10**15}}, 422, "parameters.timeout: must be at most 6e+08 microseconds"),
    (one() | {"parameters": {"latency_ms": 0}}, 422, "parameters.latency_ms: must be a number above 0"),
    (one() | {"parameters": {"sequence_id": 3}}, 422, "parameters.sequence_id: "),
    (one() | {"parameters": {"binary_data_output": "yes"}}, 422, "parameters.binary_data_output: must be true or"),
]


@pytest.mark.parametrize(("body", "status", "sentence"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(toy: Any, body: Any, status: int, sentence: str) -> None:
    answer = toy.client.post(INFER, content=orjson.dumps(body))
    assert error_of(answer).startswith(sentence)
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("content", "headers", "sentence"),
    [
        (b"", {}, "body: it is not valid JSON"),
        (b"{", {}, "body: it is not valid JSON"),
        (b"[" * 100_000, {}, "body: it is not valid JSON"),
        (b"\xff\xfe", {}, "body: it is not valid JSON"),
        (b"{}", {"inference-header-content-length": "3"}, "inference-header-content-length: "),
        (b"{}", {"inference-header-content-length": "0"}, "inference-header-content-length: "),
        (b"{}", {"inference-header-content-length": "-1"}, "inference-header-content-length: "),
        (b"{}", {"inference-header-content-length": "1e1"}, "inference-header-content-length: "),
        (b"{}", {"inference-header-content-length": "9" * 5000}, "inference-header-content-length: "),
        (b"{}", {"content-encoding": "gzip"}, "body: it is not valid gzip"),
    ],
)
def test_a_malformed_body_is_a_client_error(toy: Any, content: bytes, headers: dict[str, str], sentence: str) -> None:
    answer = toy.client.post(INFER, content=content, headers=headers)
    assert error_of(answer).startswith(sentence)
    assert answer.status_code == 400


def test_bytes_behind_the_last_tensor_are_refused(toy: Any) -> None:
    data = np.array([SURE], np.float32).tobytes()
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    content, headers = binary_body({"inputs": [entry]}, data, b"!")
    answer = toy.client.post(INFER, content=content, headers=headers)
    assert (answer.status_code, error_of(answer)) == (400, "body: 1 bytes follow the last input's binary data")


def test_a_tensor_of_another_size_than_its_shape_says_is_refused(toy: Any) -> None:
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
    content, headers = binary_body({"inputs": [entry]}, bytes(12))
    answer = toy.client.post(INFER, content=content, headers=headers)
    assert error_of(answer).endswith("FP32 of shape [1, 4] takes 16 bytes; got 12")
    assert answer.status_code == 422


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models/none", 404),
        ("/v2/models/none/ready", 404),
        ("/v2/models/none/config", 404),
        ("/v2/models/none/stats", 404),
        ("/v2/models/toy/versions/1", 404),
        ("/v2/models/toy/versions/1/ready", 404),
        ("/v2/models/toy/nothing", 404),
        ("/v2/", 404),
        ("/v2/models/toy/infer", 405),
        ("/v2/repository/index", 405),
    ],
)
def test_what_is_not_there_is_said_in_the_protocols_form(toy: Any, path: str, status: int) -> None:
    answer = toy.client.get(path)
    assert answer.status_code == status
    error_of(answer)


def test_a_body_over_the_limit_is_413(toy: Any) -> None:
    answer = toy.client.post(INFER, content=bytes(200_001))
    assert answer.status_code == 413
    error_of(answer)


def test_the_metadata_lists_every_output_that_can_be_asked_for(toy: Any) -> None:
    metadata = toy.client.get("/v2/models/toy").json()
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    document = infer(toy, body_of(SURE, outputs=[{"name": output["name"]} for output in metadata["outputs"]]))
    for described, given in zip(metadata["outputs"], document["outputs"], strict=True):
        assert (described["name"], described["datatype"]) == (given["name"], given["datatype"])
        assert described["shape"] == [-1, *given["shape"][1:]]


def test_the_statistics_count_requests_rows_and_dispatches(toy: Any) -> None:
    before = toy.client.get("/v2/models/toy/stats").json()["model_stats"][0]
    infer(toy, body_of(SURE, UNSURE, SURE))
    parameters = {"policy": '{"kind": "fixed", "exit": 2}'}
    toy.client.post(INFER, json=body_of([3e38, 3e38, 0.0, 0.0], parameters=parameters))
    after = toy.client.get("/v2/models/stats").json()["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 2
    counts = {
        kind: after["inference_stats"][kind]["count"] - timed["count"]
        for kind, timed in before["inference_stats"].items()
    }
    assert (counts["success"], counts["queue"], counts["compute_infer"], counts["fail"]) == (1, 1, 1, 1)
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    assert after["last_inference"] >= before["last_inference"]


def test_repository_control_is_refused_unless_it_is_switched_on(toy: Any) -> None:
    for verb in ("load", "unload"):
        answer = toy.client.post(f"/v2/repository/models/toy/{verb}", json={})
        assert answer.status_code == 403
        assert "switched off" in error_of(answer)
    assert toy.client.get("/v2/models/toy/ready").status_code == 200


def test_health_is_the_engines_own_word(serve: Callable[..., Any], toy_bundle: Path) -> None:
    running = serve(toy_bundle)

    def health() -> list[int]:
        return [
            running.client.get(f"/v2/{path}").status_code
            for path in ("health/live", "health/ready", "models/toy/ready")
        ]

    assert health() == [200, 200, 200]
    running.engine.drain(0)
    assert health() == [200, 503, 503]
    assert running.client.get("/v2/health/ready").json() == {"ready": False, "error": "the engine is draining"}
    running.engine.close()
    assert health() == [503, 503, 503]


def test_no_request_fails_while_a_new_version_is_put_into_the_repository(
    serve: Callable[..., Any], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    def put(gain: float) -> None:
        archive = shutil.make_archive(str(tmp_path / f"staged-{gain}"), "zip", make_bundle(gains=(gain, gain)))
        Path(archive).rename(tmp_path / "repository" / "toy.zip")

    (tmp_path / "repository").mkdir()
    put(1.0)
    running = serve(folder=tmp_path / "repository", repository_poll_s=0.01)
    seen: list[tuple[str, float]] = []

    def ask() -> str:
        document = infer(running, body_of(SURE))
        seen.append((document["model_version"], values(document)["logits"][1]))
        return seen[-1][0]

    old = ask()
    put(2.0)
    while ask() == old:
        pass
    assert {logit for version, logit in seen if version == old} == {9.0}
    assert {logit for version, logit in seen if version != old} == {18.0}


def row_of(exit_index: int, num_classes: int) -> RowAnswer:
    logits_C = np.arange(num_classes, dtype=np.float32)
    answer = exit_answers(exit_index, decision_of_logits(logits_C[None]), [logits_C])[0]
    return RowAnswer(answer, Reason.CONFIDENT, 0.5, (0,), 0.9, 0.9)


def test_exits_of_different_numbers_of_classes_do_not_share_a_tensor(toy: Any) -> None:
    served = toy.engine.model("toy")
    rows = [row_of(0, 3), row_of(1, 4)]
    with pytest.raises(InvalidValue, match="exits of 3 and 4 classes, which one tensor cannot hold"):
        output_tensors([RequestedOutput("logits", is_binary=False)], rows, served, "last")
    exits = tuple(
        exit_.model_copy(update={"num_classes": 3 + index}) for index, exit_ in enumerate(served.manifest.exits)
    )
    uneven = served.manifest.model_copy(update={"exits": exits})
    names = {output.name for output in requested_outputs((), False, uneven)}
    assert names == set(OUTPUTS) - {"logits", "probabilities"}


def test_probabilities_are_calibrated_unless_they_were_already_when_exits_were_combined(toy: Any) -> None:
    served = copy(toy.engine.model("toy"))
    served.calibration = served.calibration.model_copy(update={"temperatures": (2.0, 2.0, 2.0)})
    outputs = [RequestedOutput("probabilities", is_binary=False)]
    row = row_of(1, 4)
    combined = row._replace(stages=(0, 1))

    def probabilities(row: RowAnswer, combine: Any) -> list[float]:
        (tensor,) = output_tensors(outputs, [row], served, combine)
        return [float(value) for value in np.asarray(tensor.values).ravel()]

    logits_C = np.arange(4, dtype=np.float32)
    calibrated, as_they_are = (np.exp(log_softmax(logits_C / temperature)).tolist() for temperature in (2.0, 1.0))
    assert probabilities(combined, "last") == pytest.approx(calibrated)
    assert probabilities(row, "mean") == pytest.approx(calibrated)  # it has seen one exit alone
    assert probabilities(combined, "mean") == pytest.approx(as_they_are)

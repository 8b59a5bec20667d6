import gzip
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from offramp_contract.errors import CalibrationError, DataSetError, ExportError, OfframpError
from offramp_server.api.problems import STATUS
from prometheus_client.parser import text_string_to_metric_families

SURE = [0.0, 9.0, 0.0, 0.0]
JSON = {"content-type": "application/json"}
NPY = {"content-type": "application/x-npy"}
MEBIBYTE = 2**20


def assert_problem(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"].startswith("/problems/")
    assert "Traceback" not in response.text
    for word in words:
        assert word in problem["detail"]
    return problem


def assert_goes_on(running: Any) -> None:
    response = running.client.post("/v1/classify", json={"inputs": SURE})
    assert response.json()["predictions"][0]["class_id"] == 1


def npy_claiming_terabytes() -> bytes:
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }"
    header += " " * (117 - len(header)) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"", 400, "body: it is empty"),
        (b"{", 400, "body: it is not valid JSON"),
        (b"[1, 2]", 400, "body: must be a JSON object"),
        (b'"text"', 400, "body: must be a JSON object"),
        (b"\xff\xfe", 400, "body: it is not valid JSON"),
        (b'{"inputs": [0, NaN, 0, 0]}', 400, "body: it is not valid JSON"),
        (b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "nested too deeply"),
        (b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", 422, "inputs: must be nested lists of shape (4,)"),
        (
            b'{"policy": ' + b'{"kind": "all_of", "of": [' * 300 + b"]}" * 300 + b', "inputs": [0, 0, 0, 0]}',
            422,
            "policy",
        ),
        (b"{}", 422, "give exactly one of inputs, image, text"),
        (b'{"inputs": [0, 0, 0, 0], "text": "x"}', 422, "give exactly one"),
        (b'{"inputs": [0, 0, 0]}', 422, "inputs: each row must be nested lists of shape (4,)"),
        (b'{"inputs": [0, 0, 0, 1e39]}', 422, "inputs: must hold finite numbers"),
        (b'{"inputs": [0, 0, 0, "1"]}', 422, "inputs: must hold numbers"),
        (b'{"inputs": []}', 422, "inputs"),
        (b'{"inputs": "x"}', 422, "inputs"),
        (b'{"image": "aGk="}', 422, "image: this model declares no image preprocessing"),
        (b'{"text": "hi"}', 422, "text: this model declares no text preprocessing"),
        (b'{"inputs": [0, 0, 0, 0], "policy": "psychic"}', 422, "policy: the kind must be one of"),
        (b'{"inputs": [0, 0, 0, 0], "threshold": 7}', 422, "threshold: input should be less than or equal to 1"),
        (b'{"inputs": [0, 0, 0, 0], "latency_ms": -1}', 422, "latency_ms: must be a number above 0"),
        (b'{"inputs": [0, 0, 0, 0], "latency_ms": "1"}', 422, "latency_ms: must be a number"),
        (b'{"inputs": [0, 0, 0, 0], "gates": "open"}', 422, "gates: this model has no gates"),
        (b'{"inputs": [0, 0, 0, 0], "compute": 0.5}', 422, "compute: this model has no operating point"),
        (b'{"inputs": [0, 0, 0, 0], "thresold": 0.5}', 422, "thresold: there is no such field"),
        (orjson.dumps({"inputs": [SURE] * 17}), 413, "inputs: 17 rows are over the operator's limit of 16"),
    ],
)
def test_a_json_body_that_cannot_be_honoured_gets_a_sentence_that_names_the_field(
    toy: Any, body: bytes, status: int, word: str
) -> None:
    assert_problem(toy.client.post("/v1/classify", content=body, headers=JSON), status, word)
    assert_goes_on(toy)


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"", 400, "body: it is empty"),
        (b"junk", 400, "inputs: the body is not an .npy file"),
        (npy_claiming_terabytes(), 400, "inputs: the .npy header claims 16000000000000 bytes"),
    ],
)
def test_an_npy_body_that_lies_is_malformed(toy: Any, body: bytes, status: int, word: str) -> None:
    assert_problem(toy.client.post("/v1/classify", content=body, headers=NPY), status, word)
    assert_goes_on(toy)


FORM = "multipart/form-data; boundary=x"


def part(name: str, content: bytes = b"ab", headers: bytes = b"") -> bytes:
    disposition = f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n'.encode()
    return disposition + headers + b"\r\n" + content + b"\r\n"


@pytest.mark.parametrize(
    ("content_type", "body", "status", "word"),
    [
        ("image/png", b"\x89PNG\r\n\x1a\n cut off", 400, "image: "),
        ("image/jpeg", b"", 400, "body: it is empty"),
        ("image/svg+xml", b"<svg/>", 400, "image: it is not a readable"),
        ("multipart/form-data", b"--x", 400, "content-type: multipart/form-data needs a boundary"),
        (FORM, b"junk", 400, "body: it is not valid multipart/form-data"),
        (FORM, part("image"), 400, "last multipart boundary is missing"),
        (FORM, b"--x--\r\n", 422, "image: the form holds no part of this name"),
        (FORM, part("file") + b"--x--\r\n", 422, "file: a part must be named"),
        (FORM, b"--x\r\n\r\nab\r\n--x--\r\n", 422, "a part must be named image"),
        (FORM, part("top_k", b"1") * 2 + b"--x--\r\n", 422, "top_k: it is given twice"),
        (FORM, part("image") * 17 + b"--x--\r\n", 413, "limit of 16"),
        (FORM, part("policy", b"a" * 5000) + b"--x--\r\n", 413, "policy"),
        (FORM, part("image", headers=b"a: b\r\n" * 100) + b"--x--\r\n", 400, "multipart"),
        ("application/json", b'{"image": "not base64!"}', 400, "image: it is not valid base64"),
        ("application/json", b'{"image": 5}', 422, "image: must be a string or a list"),
        ("application/json", b'{"image": []}', 422, "image: must be a string or a list"),
    ],
)
def test_an_image_body_that_cannot_be_read_gets_a_sentence_that_names_the_field(
    digits: Any, content_type: str, body: bytes, status: int, word: str
) -> None:
    response = digits.client.post("/v1/classify", content=body, headers={"content-type": content_type})
    assert_problem(response, status, word)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/xml"])
def test_other_content_types_are_refused_with_the_ones_that_are_read(toy: Any, content_type: str) -> None:
    response = toy.client.post("/v1/classify", content=b"x", headers={"content-type": content_type})
    assert_problem(response, 415, "content-type: must be application/json, image/*, multipart/form-data")


def test_paths_methods_and_models_that_do_not_exist_are_problems_too(toy: Any) -> None:
    assert_problem(toy.client.get("/v1/nothing"), 404, "/docs")
    assert_problem(toy.client.get("/v1/classify"), 405, "POST")
    problem = assert_problem(toy.client.post("/v1/models/nobody/classify", json={"inputs": SURE}), 404, "model")
    assert problem["type"] == "/problems/unknown-model"
    assert_problem(toy.client.get("/v1/models/nobody"), 404, "model")


def test_a_field_given_twice_is_refused(toy: Any) -> None:
    response = toy.client.post("/v1/classify?top_k=1", json={"inputs": SURE, "top_k": 2})
    assert_problem(response, 422, "top_k: it is given twice")
    assert_problem(
        toy.client.post("/v1/classify?top_k=1&top_k=2", json={"inputs": SURE}), 422, "top_k: it is given twice"
    )


def test_a_gzip_that_expands_a_thousandfold_is_refused_within_bounded_memory(toy: Any) -> None:
    bomb = gzip.compress(b"[" * (150 * MEBIBYTE), compresslevel=9)
    assert len(bomb) < 200_000
    tracemalloc.start()
    try:
        for encoding, body in (("gzip", bomb), ("deflate", zlib.compress(zlib.decompress(bomb, 31)[: 100 * MEBIBYTE]))):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            response = toy.client.post("/v1/classify", content=body, headers=JSON | {"content-encoding": encoding})
            assert_problem(response, 413, "body: decoded it is over the operator's limit of 300000 bytes")
            assert tracemalloc.get_traced_memory()[1] - before < 4 * MEBIBYTE
    finally:
        tracemalloc.stop()
    assert_goes_on(toy)


@pytest.mark.parametrize(
    ("encoding", "body", "status", "word"),
    [
        ("br", b"x", 415, "content-encoding: 'br' is not read here; send identity, gzip or deflate"),
        ("gzip, gzip", b"x", 415, "content-encoding"),
        ("gzip", b"not gzip", 400, "body: it is not valid gzip"),
        ("gzip", gzip.compress(b"{}")[:-9], 400, "body: its gzip stream is cut off"),
        ("gzip", gzip.compress(b"") * 1000, 400, "body: bytes follow its gzip stream"),
        ("deflate", b"\x00junk", 400, "body: it is not valid deflate"),
        ("deflate", zlib.compress(b"{}") + b"more", 400, "body: bytes follow its deflate stream"),
    ],
)
def test_a_content_encoding_that_does_not_hold_is_refused(
    toy: Any, encoding: str, body: bytes, status: int, word: str
) -> None:
    response = toy.client.post("/v1/classify", content=body, headers=JSON | {"content-encoding": encoding})
    assert_problem(response, status, word)


def test_the_operator_caps_the_depth_of_every_request(serve: Any, toy_bundle: Any) -> None:
    running = serve(toy_bundle, depth_cap=0)
    response = running.client.post("/v1/classify", json={"inputs": [1.0, 0.0, 0.0, 0.0]})
    assert response.json()["predictions"][0]["exit"]["reason"] == "depth_cap"
    response = running.client.post("/v1/classify", json={"inputs": SURE, "max_exit": 2})
    assert_problem(response, 422, "max_exit: must be an integer from 0 to 0")


def test_every_error_that_a_server_can_meet_has_a_status_of_its_own() -> None:
    def kinds(kind: type[OfframpError]) -> Iterator[type[OfframpError]]:
        for child in kind.__subclasses__():
            yield child
            yield from kinds(child)

    at_the_server = (kind for kind in kinds(OfframpError) if not kind.__module__.startswith("offramp_cli"))
    met = [kind for kind in at_the_server if not issubclass(kind, ExportError | CalibrationError | DataSetError)]
    assert [kind for kind in met if not any(base in STATUS for base in kind.__mro__)] == []


def test_what_is_refused_before_it_reaches_the_engine_is_counted_by_its_reason(serve: Any, toy_bundle: Any) -> None:
    running = serve(toy_bundle)
    for body in (b"{", b'{"inputs": [0]}', b'{"inputs": "x"}'):
        running.client.post("/v1/classify", content=body, headers=JSON)
    for body in (b"{", b'{"inputs": []}'):
        running.client.post("/v2/models/toy/infer", content=body)
    families = text_string_to_metric_families(running.client.get("/metrics").text)
    refused = {
        sample.labels["reason"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "offramp_rejected_total" and sample.value
    }
    assert refused == {"malformed": 2.0, "invalid_value": 3.0}

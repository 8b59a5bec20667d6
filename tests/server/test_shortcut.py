"""Requests that go the short way are answered as those that go the ordinary way, or go there after all."""

import gc
import gzip
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import numpy as np
import orjson
import pytest
from offramp_server.api.open_inference import shortcut
from offramp_server.messages import NoObserver, RequestDone, StageRun
from offramp_server.submission import Sample, Submission

PATH = "/v2/models/toy/infer"
SURE, UNSURE = [0.0, 9.0, 0.0, 0.0], [0.01, 0.0, 0.0, 0.0]


def body_of(*rows: list[float], **more: Any) -> tuple[bytes, bytes]:
    """The JSON and the binary data of a request that wants binary outputs."""
    data = np.array(rows, np.float32).tobytes()
    entry = {"name": "x", "shape": [len(rows), 4], "datatype": "FP32", "parameters": {"binary_data_size": len(data)}}
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in ("logits", "exit_index")]
    return orjson.dumps({"inputs": [entry], "outputs": outputs, **more}), data


def request_of(text: bytes, data: bytes, *lines: str, path: str = PATH) -> bytes:
    """A whole request, as bytes on the wire."""
    head = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(text + data)}"]
    head += [f"Inference-Header-Content-Length: {len(text)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + text + data


def receive(stream: BinaryIO) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: status, headers, body."""
    status = int(stream.readline().split(b" ")[1])
    headers = {}
    while line := stream.readline().decode().strip():
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, stream.read(int(headers.get("content-length", 0)))


def ask(running: Any, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    with running.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(sent)
        return receive(stream)


def tensors_of(headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], bytes]:
    length = int(headers["inference-header-content-length"])
    return orjson.loads(body[:length]), body[length:]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each request that was taken was answered, or given back."""
    outcomes: list[bool] = []
    begin = shortcut.InferVisit.begin

    def watched(visit: shortcut.InferVisit, *args: Any) -> bool:
        outcomes.append(begin(visit, *args))
        return outcomes[-1]

    monkeypatch.setattr(shortcut.InferVisit, "begin", watched)
    return outcomes


def test_the_answer_is_the_ordinary_ones_to_the_byte_and_header(toy: Any, begun: list[bool]) -> None:
    text, data = body_of(SURE, UNSURE)
    # A query is enough to go the ordinary way.
    ordinary = ask(toy, request_of(text, data, "x-request-id: a-1", path=f"{PATH}?"))
    assert begun == []
    for _ in range(2):  # with words that are new, and with the same again
        status, headers, body = ask(toy, request_of(text, data, "x-request-id: a-1"))
        assert (status, body) == (ordinary[0], ordinary[2]) == (200, body)
        times = {name for name in headers if name.endswith("-time-ms")} | {"date"}
        assert {name: headers[name] for name in headers.keys() - times} == {
            name: ordinary[1][name] for name in ordinary[1].keys() - times
        }
        assert headers.keys() == ordinary[1].keys()
    assert begun == [True, True]


def test_the_same_words_with_other_numbers_get_another_answer(toy: Any, begun: list[bool]) -> None:
    for hot in range(4):
        row = [0.0] * 4
        row[hot] = 9.0
        _, headers, body = ask(toy, request_of(*body_of(row)))
        _, binary = tensors_of(headers, body)
        assert np.frombuffer(binary[:16], np.float32).tolist() == row
    assert begun == [True] * 4


@pytest.mark.parametrize("request_id", ["i-7", None])
def test_routing_and_the_requests_own_id_are_read_from_the_words(
    toy: Any, begun: list[bool], request_id: str | None
) -> None:
    for deepest in (1, 2):
        text, data = body_of(UNSURE, id=request_id, parameters={"max_exit": deepest})
        _, headers, body = ask(toy, request_of(text, data))
        document, binary = tensors_of(headers, body)
        assert document.get("id") == request_id
        assert np.frombuffer(binary[16:], np.int32).tolist() == [deepest]
    assert begun == [True, True]


def test_a_body_may_come_in_pieces_and_requests_one_behind_the_other(toy: Any, begun: list[bool]) -> None:
    rows = [SURE, UNSURE, [0.0, 0.0, 9.0, 0.0]]
    sent = b"".join(request_of(*body_of(row)) for row in rows)
    for size in (50, len(sent)):
        with toy.connect() as connection, connection.makefile("rb") as stream:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(sent), size):
                connection.sendall(sent[start : start + size])
            for row in rows:
                status, headers, body = receive(stream)
                logits_C = np.frombuffer(tensors_of(headers, body)[1][:16], np.float32)
                assert (status, logits_C.argmax()) == (200, np.argmax(row))
    assert all(begun)
    assert len(begun) >= 2  # the first of each; those behind may have to wait for it, and go the ordinary way


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"inputs": []}, 400, "body: "),
        ({"outputs": [{"name": "nothing"}]}, 422, "outputs: "),
        ({"parameters": {"threshold": 7}}, 422, "threshold"),
    ],
)
def test_what_is_wrong_is_refused_by_the_ordinary_route(
    toy: Any, begun: list[bool], change: dict[str, Any], status: int, said: str
) -> None:
    text, data = body_of(SURE)
    text = orjson.dumps(orjson.loads(text) | change)
    answered, headers, body = ask(toy, request_of(text, data, "x-request-id: b-1"))
    assert answered == status
    assert said in orjson.loads(body)["error"]
    assert headers["x-request-id"] == "b-1"
    assert begun == [False]


def test_numbers_that_are_not_finite_and_models_that_are_not_there_are_refused(toy: Any) -> None:
    status, _, body = ask(toy, request_of(*body_of([np.nan, 0.0, 0.0, 0.0])))
    assert (status, "finite" in orjson.loads(body)["error"]) == (422, True)
    status, _, body = ask(toy, request_of(*body_of(SURE), path="/v2/models/nobody/infer"))
    assert (status, "nobody" in orjson.loads(body)["error"]) == (404, True)


@pytest.mark.parametrize("line", ["content-encoding: gzip", "x-twice: 1\r\nx-twice: 2", "expect: 100-continue"])
def test_an_unusual_request_goes_the_ordinary_way(toy: Any, begun: list[bool], line: str) -> None:
    text, data = body_of(SURE)
    sent = request_of(text, data, line)
    if "gzip" in line:
        packed = gzip.compress(text + data)
        head = sent[: sent.index(b"\r\n\r\n") + 4].replace(
            b"content-length: %d" % len(text + data), b"content-length: %d" % len(packed)
        )
        sent = head + packed
    with toy.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(sent)
        status = receive(stream)[0]
        if status == 100:
            status = receive(stream)[0]
    assert status == 200
    assert begun == []


def test_a_long_answer_is_compressed_where_the_client_likes_that(toy: Any, begun: list[bool]) -> None:
    rows = [UNSURE] * 16
    text, data = body_of(*rows, outputs=[{"name": "logits"}, {"name": "probabilities"}])
    status, headers, body = ask(toy, request_of(text, data, "accept-encoding: gzip"))
    assert (status, headers["content-encoding"], headers["vary"]) == (200, "gzip", "accept-encoding")
    assert len(orjson.loads(gzip.decompress(body))["outputs"][0]["data"]) == 64
    assert begun == [True]


def test_a_connection_is_kept_or_closed_as_the_client_says(toy: Any) -> None:
    sent = request_of(*body_of(SURE))
    with toy.connect() as connection, connection.makefile("rb") as stream:
        for _ in range(3):
            connection.sendall(sent)
            status, headers, _ = receive(stream)
            assert (status, "connection" in headers) == (200, False)
        connection.sendall(request_of(*body_of(SURE), "connection: close"))
        assert receive(stream)[1]["connection"] == "close"
        assert stream.read() == b""


def test_the_api_key_is_asked_for(serve: Any, toy_bundle: Path, begun: list[bool]) -> None:
    running = serve(toy_bundle, api_key="opensesame")
    text, data = body_of(SURE)
    assert ask(running, request_of(text, data))[0] == 401
    assert ask(running, request_of(text, data, "x-api-key: opensesam"))[0] == 401
    assert begun == []
    assert ask(running, request_of(text, data, "x-api-key: opensesame"))[0] == 200
    assert ask(running, request_of(text, data, "authorization: Bearer opensesame"))[0] == 200
    assert begun == [True, True]


def test_a_body_that_does_not_arrive_in_time_gets_408(serve: Any, toy_bundle: Path) -> None:
    running = serve(toy_bundle, body_timeout_s=0.2)
    sent = request_of(*body_of(SURE))
    with running.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(sent[:-8])
        status, _, body = receive(stream)
    assert status == 408
    assert "did not arrive whole within 0.2 s" in orjson.loads(body)["error"]
    assert ask(running, sent)[0] == 200


def test_the_access_log_sees_every_request(
    serve: Any, toy_bundle: Path, begun: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(toy_bundle, access_log=True)
    with caplog.at_level("INFO", logger="uvicorn.access"):
        assert ask(running, request_of(*body_of(SURE)))[0] == 200
    assert begun == []
    assert any(PATH in record.getMessage() for record in caplog.records)


class Hold(NoObserver):
    """Holds the engine's thread behind the first stage, and remembers what became of requests."""

    __slots__ = ("go_on", "is_held", "outcomes", "seen")

    def __init__(self) -> None:
        for name in ("go_on", "is_held", "seen"):
            object.__setattr__(self, name, threading.Event())
        object.__setattr__(self, "outcomes", [])

    def stage_ran(self, run: StageRun) -> None:
        self.is_held.set()
        self.go_on.wait(30)

    def request_done(self, done: RequestDone) -> None:
        self.outcomes.append(done.outcome)
        self.seen.set()


async def num_connections(running: Any) -> int:
    return len(running.server.server_state.connections)


def test_work_whose_client_has_gone_is_cancelled(serve: Any, toy_bundle: Path, begun: list[bool]) -> None:
    hold = Hold()
    running = serve(toy_bundle, observer=hold)
    with running.connect() as connection:
        connection.sendall(request_of(*body_of(UNSURE)))
        assert hold.is_held.wait(30)
    while running.run(num_connections(running)):
        pass
    hold.go_on.set()
    assert hold.seen.wait(30)
    assert (hold.outcomes, begun) == (["cancelled"], [True])


def test_an_engine_that_drains_refuses_and_says_when_to_come_back(
    serve: Any, toy_bundle: Path, begun: list[bool]
) -> None:
    running = serve(toy_bundle)
    running.engine.drain(0.0)
    status, headers, body = ask(running, request_of(*body_of(SURE), "x-request-id: c-1"))
    assert (status, headers["retry-after"], headers["x-request-id"]) == (503, "1", "c-1")
    assert "draining" in orjson.loads(body)["error"]
    assert begun == [True]


@pytest.mark.parametrize(("owner", "name"), [(shortcut.Plans, "find"), (shortcut, "answer_of")])
def test_a_bug_on_the_way_in_or_out_is_an_internal_error_and_hurts_nobody_else(
    toy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, owner: Any, name: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        status, headers, body = ask(toy, request_of(*body_of(SURE), "x-request-id: d-1"))
    assert (status, headers["x-request-id"]) == (500, "d-1")
    assert b"secret" not in body
    assert any("d-1" in record.getMessage() for record in caplog.records)
    assert ask(toy, request_of(*body_of(SURE)))[0] == 200


def test_clients_of_every_kind_share_a_connection_with_the_ordinary_routes(toy: Any, begun: list[bool]) -> None:
    text, data = body_of(SURE)
    with httpx.Client(base_url=toy.url, trust_env=False) as client:
        for _ in range(2):
            headers = {"inference-header-content-length": str(len(text))}
            assert client.post(PATH, content=text + data, headers=headers).status_code == 200
            assert client.get("/v2/models/toy").status_code == 200
            assert client.post("/v1/classify", json={"inputs": SURE}).status_code == 200
    assert begun == [True, True]


def test_answered_requests_are_freed_without_the_garbage_collector(toy, begun):
    gc.collect()
    gc.disable()
    try:
        with toy.connect() as connection, connection.makefile("rb") as stream:
            for _ in range(40):
                connection.sendall(request_of(*body_of(SURE, UNSURE)))
                assert receive(stream)[0] == 200
            kinds = (shortcut.InferVisit, Submission, Sample)
            left = Counter(kind.__name__ for thing in gc.get_objects() for kind in kinds if type(thing) is kind)
    finally:
        gc.enable()
    assert begun == [True] * 40
    assert all(number < 6 for number in left.values()), left  # the last requests' threads may not be done with them

import socket
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

JSON = {"content-type": "application/json"}
MEBIBYTE = 2**20


def assert_goes_on(running: Any) -> None:
    response = running.client.post("/v1/classify", json={"inputs": [0.0, 9.0, 0.0, 0.0]})
    assert response.json()["predictions"][0]["class_id"] == 1


def assert_too_large(response: httpx.Response) -> None:
    assert response.status_code == 413
    assert response.json()["detail"] == "body: it is over the operator's limit of 200000 bytes"


def read_response(connection: socket.socket) -> tuple[int, bytes]:
    """Read until the server closes; gives the status and all bytes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return int(received.split(b" ", 2)[1]), received


def test_a_body_declared_too_large_is_refused_before_any_of_it_is_sent(toy: Any) -> None:
    with toy.connect() as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        connection.sendall(b"content-length: 104857600\r\n\r\n")
        first = connection.recv(65536)  # the server lingers for the body that never comes, then closes
        assert first.startswith(b"HTTP/1.1 413 ")
        assert b"over the operator's limit of 200000 bytes" in first
        assert connection.recv(1) == b""


def test_a_body_of_a_hundred_megabytes_is_refused_whichever_way_it_is_sent_within_bounded_memory(toy: Any) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(MEBIBYTE)

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert_too_large(toy.client.post("/v1/classify", content=body(), headers=JSON))
        with httpx.Client(base_url=toy.url, trust_env=False) as client:
            declared = JSON | {"content-length": str(100 * MEBIBYTE)}
            assert_too_large(client.post("/v1/classify", content=body(), headers=declared))
        assert tracemalloc.get_traced_memory()[1] - before < 16 * MEBIBYTE
    finally:
        tracemalloc.stop()
    assert_goes_on(toy)


@pytest.fixture(scope="module")
def hasty(serve: Any, toy_bundle: Any) -> Any:
    """A server that waits for nobody."""
    return serve(toy_bundle, header_timeout_s=0.2, body_timeout_s=0.2, max_header_bytes=4096, keep_alive_timeout_s=60)


def test_a_body_that_does_not_arrive_in_time_gets_408(hasty: Any) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        connection.sendall(b'content-length: 100\r\n\r\n{"inp')
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 408 ")
        assert b"body: it did not arrive whole within 0.2 s" in received
    assert_goes_on(hasty)


@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: "])
def test_headers_that_do_not_arrive_in_time_get_408_and_the_connection_is_closed(hasty: Any, sent: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        status, received = read_response(connection)
    assert status == 408
    assert b"/problems/header-timeout" in received


def test_a_second_request_of_a_connection_has_to_hurry_too(hasty: Any) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /v1/mod")
        status, _ = read_response(connection)
    assert status == 408


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: %s\r\n" % (i, b"a" * 100) for i in range(60)) + b"\r\n",
        b"GET /?" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx-endless: " + b"a" * 500_000,
    ],
)
def test_headers_over_the_limit_get_431(hasty: Any, sent: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 431 ")
    assert_goes_on(hasty)


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00", b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"]
)
def test_bytes_that_are_not_http_get_400(hasty: Any, sent: bytes) -> None:
    with hasty.connect() as connection:
        connection.sendall(sent)
        status, received = read_response(connection)
    assert status == 400
    assert b"application/problem+json" in received


def test_connections_beyond_the_operators_number_get_503(serve: Any, toy_bundle: Any) -> None:
    running = serve(toy_bundle, max_connections=1)
    with running.connect() as first:
        first.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 200 ")
        with running.connect() as second:
            second.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            status, received = read_response(second)
    assert status == 503
    assert b"retry-after: 1" in received

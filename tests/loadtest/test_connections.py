"""The client's own HTTP, against servers that are awkward on purpose."""

import asyncio

import pytest
from offramp_loadtest.address import Address
from offramp_loadtest.connections import Pool
from offramp_loadtest.pace import Pace
from offramp_loadtest.targets import Request

GET = Request("/x", {}, b"", "GET")


def ask(replies, num_requests=1, max_connections=4):
    """Send requests one after another to a server that writes these pieces to each; gives answers and connections."""
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        while await reader.readuntil(b"\r\n\r\n"):
            for piece in replies:
                if piece is None:
                    writer.transport.abort()
                    return
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)

    async def handled(reader, writer):
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    async def scenario():
        server = await asyncio.start_server(handled, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = Pool(Address.of(f"http://127.0.0.1:{port}", {}), max_connections)
        try:
            return [await pool.ask(GET, 5.0) for _ in range(num_requests)], len(connections)
        finally:
            await pool.close()
            server.close()
            await server.wait_closed()

    return asyncio.run(scenario())


def test_a_connection_is_used_again_and_an_answer_may_come_in_pieces():
    (first, second), num_connections = ask([b"HTTP/1.1 200 OK\r\nConte", b"nt-Length: 4\r\n\r\nab", b"cd"], 2)
    assert (first.status, first.body, first.headers) == (200, b"abcd", {"content-length": "4"})
    assert second == first
    assert num_connections == 1


def test_chunks_and_interim_answers_are_understood():
    pieces = [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"2\r\nde\r\n0\r\n\r\n",
    ]
    (first, second), num_connections = ask(pieces, 2)
    assert first.body == second.body == b"abcde"
    assert num_connections == 1


def test_a_connection_that_the_server_closes_is_not_used_again():
    replies = [b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: close\r\n\r\na"]
    answers, num_connections = ask(replies, 3)
    assert [answer.body for answer in answers] == [b"a"] * 3
    assert num_connections == 3


@pytest.mark.parametrize(
    "replies", [[b"SSH-2.0-x\r\n\r\n"], [None], [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\na", None]]
)
def test_what_is_no_answer_is_an_error_and_never_a_wait(replies):
    with pytest.raises(OSError):  # noqa: PT011  # each has words of its own
        ask(replies)


def test_an_answer_without_end_is_cut(monkeypatch):
    monkeypatch.setattr("offramp_loadtest.connections.MAX_ANSWER_BYTES", 100)
    with pytest.raises(OSError, match="an answer of over 100 bytes"):
        ask([b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b"x" * 200])


def test_an_ipv6_address_and_a_path_go_where_they_belong():
    address = Address.of("http://[::1]:8000/behind/", {"x-key": "1"})
    head, body = address.written(Request("/v1/classify", {"content-type": "a/b"}, b"abc"))
    assert head.splitlines()[:2] == [b"POST /behind/v1/classify HTTP/1.1", b"host: [::1]:8000"]
    assert set(head.splitlines()[2:-1]) == {b"x-key: 1", b"content-type: a/b", b"content-length: 3"}
    assert body == b"abc"


@pytest.mark.parametrize("has_timer", [True, False])
def test_nothing_is_sent_before_it_is_due(monkeypatch, has_timer):
    import time

    if not has_timer:
        monkeypatch.setattr("sys.platform", "elsewhere")

    async def wait():
        started = time.perf_counter()
        seen = []
        with Pace(started) as pace:
            for due_s in (0.004, 0.0125, 0.001, 0.02):
                await pace.until(due_s)
                seen.append((time.perf_counter() - started) - due_s)
        return seen

    assert min(asyncio.run(wait())) >= -2e-4

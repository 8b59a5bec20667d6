"""HTTP requests that only the engine's process can answer: a worker passes them on whole, and the answer back.

That is everything but classifying and inferring: descriptions, statistics, health, loading, metrics. The engine's
process answers with the very application that serves alone when there are no workers.
"""

import asyncio
import logging
from typing import Any, Final

from offramp_contract.errors import OfframpError, TooLarge
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp_server.api.bodies import read_body
from offramp_server.api.problems import error_response, internal_error
from offramp_server.http_workers.messages import RelayAnswer, Relayed
from offramp_server.http_workers.remote import RemoteEngine

logger = logging.getLogger("offramp.server")

MAX_RELAYED_BYTES: Final = 4 * 2**20
"""Nothing that is passed on is long: its bodies name models."""

_OWN: Final = frozenset({b"content-encoding", b"content-length", b"transfer-encoding", b"x-request-id"})
"""Headers of a body as it was sent, where what is passed on has been read; and one that the worker has chosen."""
_ENVELOPE: Final = frozenset({b"x-request-id", b"traceparent"})
"""Headers that the worker's own envelope puts on every answer."""


class Relay:
    """An ASGI application that has the engine's process answer."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            body = await self._body_of(request)
            headers = [(name, value) for name, value in scope["headers"] if name not in _OWN]
            headers.append((b"x-request-id", scope["offramp.request_id"].encode()))  # one id in both logs
            method, path, query = scope["method"], scope["path"], scope["query_string"]
            answer = await self._engine.relay(lambda number: Relayed(number, method, path, query, tuple(headers), body))
        except OfframpError as error:
            await error_response(scope["path"], error)(scope, receive, send)
            return
        kept = [(name, value) for name, value in answer.headers if name not in _ENVELOPE]
        await send({"type": "http.response.start", "status": answer.status, "headers": kept})
        await send({"type": "http.response.body", "body": answer.body})

    async def _body_of(self, request: Request) -> bytes:
        if request.method != "POST":
            return b""
        body = await read_body(request, self._engine.settings)
        if len(body) > MAX_RELAYED_BYTES:
            raise TooLarge(f"body: it is over {MAX_RELAYED_BYTES} bytes", "body")
        return body


async def answer_relayed(app: ASGIApp, relayed: Relayed) -> RelayAnswer:
    """Answer, in the engine's process, a request that a worker has passed on."""
    status, headers, parts = 500, (), []
    has_been_read = False

    async def receive() -> Message:
        nonlocal has_been_read
        if has_been_read:
            await asyncio.Event().wait()  # the client does not leave: the worker waits for whatever is answered
        has_been_read = True
        return {"type": "http.request", "body": relayed.body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], tuple(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    scope = _scope_of(relayed)
    try:
        await app(scope, receive, send)
    except Exception:
        logger.exception("a relayed request to %s failed", relayed.path)
        parts.clear()
        await internal_error(relayed.path)(scope, receive, send)
    return RelayAnswer(relayed.request, status, headers, b"".join(parts))


def _scope_of(relayed: Relayed) -> dict[str, Any]:
    length = (b"content-length", str(len(relayed.body)).encode())
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": relayed.method,
        "scheme": "http",
        "path": relayed.path,
        "raw_path": relayed.path.encode(),
        "query_string": relayed.query,
        "root_path": "",
        "headers": [*relayed.headers, length],
        "client": None,
        "server": None,
    }

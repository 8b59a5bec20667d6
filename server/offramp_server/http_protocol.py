"""Uvicorn's HTTP protocol with the manners that a port open to strangers needs.

Headers must arrive within a time and a size; a connection beyond the operator's number is answered 503; a client that
goes on sending a body after its answer is heard out for a moment, because closing at once would destroy the answer
under way, and then cut off. Refusals made here, before there is a request, are problem documents too.
"""

import asyncio
from typing import Any, ClassVar

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from offramp_server.settings import ServerSettings

LINGER_S = 2.0
_REASONS = {
    400: ("malformed", "The request cannot be read", "The bytes are not an HTTP request."),
    408: ("header_timeout", "The headers took too long", "The request's headers did not arrive in time."),
    431: ("headers_too_large", "The headers are too large", "The request line and headers are over the limit."),
    503: ("too_many_connections", "Too many connections", "The server has as many connections as it may; try again."),
}


class _ForgivingTransport:
    """A transport that drops what is written after the connection has closed, as asyncio's own do.

    Uvloop's raise instead, in the moment between the loss of a connection and the protocol's being told of it, and a
    client that leaves would look like a bug of the server.
    """

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class OfframpProtocol(HttpToolsProtocol):
    """One connection. `bounded_by` gives the class for an operator's limits."""

    max_header_bytes: ClassVar[int]
    header_timeout_s: ClassVar[float]
    max_connections: ClassVar[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._num_header_bytes = 0
        self._is_in_headers = False

    @classmethod
    def bounded_by(cls, settings: ServerSettings) -> type["OfframpProtocol"]:
        """Give the protocol class for these settings; uvicorn takes a class and makes the connections itself."""
        limits = {
            "max_header_bytes": settings.max_header_bytes,
            "header_timeout_s": settings.header_timeout_s,
            "max_connections": settings.max_connections,
        }
        return type("BoundedOfframpProtocol", (cls,), limits)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        """Take a connection; from now on its first headers are awaited."""
        super().connection_made(_ForgivingTransport(transport))  # type: ignore[arg-type]  # it has all that one has
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._headers_came()
        self._stop_lingering()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has come, and count it while it belongs to headers that are not complete."""
        was_in_headers = self._is_in_headers
        super().data_received(data)
        if not self._is_in_headers:
            return
        if self._header_timer is None:  # most headers come whole, and need no timer
            self._await_headers()
        # Headers that end within a chunk are counted one by one in on_header. This catches one header without end,
        # which the parser would collect for ever.
        if was_in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > self.max_header_bytes:
                self._refuse(431)

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._num_header_bytes = 0
        self._is_in_headers = True

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        self._num_header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._num_header_bytes += len(name) + len(value)
        if self._num_header_bytes <= self.max_header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, or refuse it."""
        self._end_headers()
        app = self.app
        if self._num_header_bytes > self.max_header_bytes:
            self.app = _refusal(431)
        elif len(self.connections) > self.max_connections:
            self.app = _refusal(503)
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def on_message_complete(self) -> None:
        """End a request's body."""
        self._stop_lingering()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the connection after an answer, listening for a moment if the body is still coming."""
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP."""
        self._refuse(400)

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._headers_are_late)

    def _end_headers(self) -> None:
        self._headers_came()
        self._is_in_headers = False

    def _headers_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_are_late(self) -> None:
        self._header_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_headers()  # an earlier request of the connection is still being answered
        else:
            self._refuse(408)

    def _stop_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _refuse(self, status: int) -> None:
        if self.transport.is_closing():
            return
        body = _problem(status)
        head = [
            STATUS_LINE[status],
            b"content-type: application/problem+json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body),
        ]
        self.transport.write(b"".join([*head, body]))
        self.transport.close()


def _problem(status: int) -> bytes:
    code, title, detail = _REASONS[status]
    return orjson.dumps(
        {"type": f"/problems/{code.replace('_', '-')}", "title": title, "status": status, "detail": detail}
    )


def _refusal(status: int) -> Any:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        body = _problem(status)
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return refuse

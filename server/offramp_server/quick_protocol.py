"""A connection's short way to an answer: no task, no scope, no framework, for the requests that a `Shortcut` takes.

What the shortcut does not take, or gives back once it has seen the body, goes the ordinary way, through the
application, which answers it just as well and more slowly. So the shortcut only has to know the requests that come by
the thousand.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from offramp_server.http_protocol import OfframpProtocol
from offramp_server.settings import ServerSettings

Headers = list[tuple[bytes, bytes]]
"""As uvicorn has them: names in lower case, in the order they came in."""
Reply = Callable[[int, bytes, bytes], None]
"""Sends an answer: its status, its header lines, each with its line end, and its body."""


class Visit(Protocol):
    """One request on the short way. Everything is called on the event loop's thread, and must be quick."""

    def begin(self, body: bytes, arrival_s: float, reply: Reply) -> bool:
        """Begin to answer, now or later, by one call of `reply`; false gives the request back."""

    def leave(self) -> None:
        """Stop: the client has gone. `reply` is not called any more."""


class Shortcut(Protocol):
    """Knows which requests may go the short way."""

    def visit(self, url: bytes, headers: Headers) -> Visit | None:
        """Take a POST request by its first lines, all of whose body is yet to come; None does not take it.

        A request that is taken has a Content-Length within the operator's limits.
        """


class _Exchange:
    """A request on the short way and its answer; it stands where uvicorn keeps its own `RequestResponseCycle`."""

    __slots__ = ("arrival_s", "chunks", "keep_alive", "more_body", "response_complete")

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.arrival_s = time.monotonic()
        self.chunks: list[bytes] = []
        self.more_body = True
        self.response_complete = False


class QuickProtocol(OfframpProtocol):
    """One connection. `quick` gives the class for an operator's limits and a shortcut."""

    body_timeout_s: ClassVar[float]
    shortcut: ClassVar[Shortcut]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchange: _Exchange | None = None  # under way; its body may still be coming
        # Beside the exchange, not in it: a visit knows how to reply and so its exchange, and a circle of objects would
        # wait for the garbage collector.
        self._visit: Visit | None = None
        self._body_timer: Any = None
        self._dated: tuple[Any, bytes] = (None, b"")

    @classmethod
    def quick(cls, settings: ServerSettings, shortcut: Shortcut) -> type["QuickProtocol"]:
        """Give the protocol class for these settings and a shortcut."""
        bounded = cls.bounded_by(settings)
        members = {"body_timeout_s": settings.body_timeout_s, "shortcut": shortcut}
        return type("BoundedQuickProtocol", (bounded,), members)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection, and stop the work for it."""
        self._body_came()
        if self._visit is not None:
            self._visit.leave()
        self._exchange = self._visit = None
        if isinstance(self.cycle, _Exchange):
            self.cycle = None  # type: ignore[assignment]  # as uvicorn does before the first request
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has come; from now on the rest of a body is awaited."""
        super().data_received(data)
        if self._exchange is not None and self._exchange.more_body and self._body_timer is None:
            self._body_timer = self.loop.call_later(self.body_timeout_s, self._body_is_late)

    def on_headers_complete(self) -> None:
        """Start the request, one way or the other."""
        visit = self.shortcut.visit(self.url, self.headers) if self._may_be_quick() else None
        if visit is None:
            super().on_headers_complete()
            return
        self._end_headers()
        self._visit = visit
        self._exchange = _Exchange(keep_alive=self.parser.should_keep_alive())
        self.cycle = self._exchange  # type: ignore[assignment]  # it has what uvicorn asks of one

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        if self._exchange is not None and self._exchange.more_body:
            self._exchange.chunks.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Answer a request whose body is whole."""
        exchange, visit = self._exchange, self._visit
        if exchange is None or visit is None or not exchange.more_body:
            super().on_message_complete()
            return
        exchange.more_body = False
        self._body_came()
        chunks = exchange.chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if not visit.begin(body, exchange.arrival_s, partial(self._reply, exchange)):
            self._give_back(exchange)
            super().on_message_complete()

    def _may_be_quick(self) -> bool:
        """Tell whether nothing about the connection or the request's manner asks for the ordinary way."""
        return (
            (self.cycle is None or self.cycle.response_complete)
            and not self.pipeline
            and not self.flow.write_paused
            and not self.expect_100_continue
            and self._num_header_bytes <= self.max_header_bytes
            and len(self.connections) <= self.max_connections
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and not self.parser.should_upgrade()
        )

    def _give_back(self, exchange: _Exchange) -> None:
        """Let the application answer, with as much of the body as is there."""
        self._exchange = self._visit = None
        self.cycle = None  # type: ignore[assignment]  # as above
        self.scope["offramp.arrival_s"] = exchange.arrival_s  # type: ignore[typeddict-unknown-key]  # our own
        super().on_headers_complete()
        self.cycle.keep_alive = self.cycle.keep_alive and exchange.keep_alive
        for chunk in exchange.chunks:
            super().on_body(chunk)

    def _body_came(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _body_is_late(self) -> None:
        """Leave it to the application, whose time for the body is over too, to say so."""
        self._body_timer = None
        if self._exchange is not None:
            self._give_back(self._exchange)

    def _reply(self, exchange: _Exchange, status: int, head: bytes, body: bytes) -> None:
        if exchange is not self._exchange:
            return
        self._exchange = self._visit = None
        exchange.response_complete = True
        closing = b"" if exchange.keep_alive else b"connection: close\r\n"
        self.transport.write(b"".join((STATUS_LINE[status], self._default_lines(), head, closing, b"\r\n", body)))
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _default_lines(self) -> bytes:
        """Give uvicorn's own headers, of which it makes a new list every second for the date."""
        headers = self.server_state.default_headers
        if headers is not self._dated[0]:
            self._dated = headers, b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._dated[1]

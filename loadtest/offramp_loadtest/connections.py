"""A pool of keep-alive HTTP/1.1 connections that costs the machine little: a request is bytes, an answer a callback.

Client and server often share a machine's few cores, so what the client spends the server lacks. Parsing is llhttp's
(httptools), and no task is made for a request.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import httptools

from offramp_loadtest.address import Address
from offramp_loadtest.targets import Request

MAX_ANSWER_BYTES: Final = 64 * 2**20
MAX_IDLE_S: Final = 2.0
"""Servers close idle connections after 5 s or so; one that is about to be closed must not get a request."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer as it came: status, headers by lower-case name, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


OnDone = Callable[[Response | OSError], None]


@dataclass(eq=False, slots=True)
class Ticket:
    """A request on its way.

    Attributes:
        pieces: Its bytes.
        on_done: Called once, with the answer or with why there is none; never after `abandon`.
        submitted_at: When it was handed to the pool, by `time.perf_counter`.
        sent_at: When it was written; None before.
    """

    pieces: tuple[bytes, bytes]
    on_done: OnDone
    submitted_at: float
    sent_at: float | None = None
    connection: "Connection | None" = None
    is_abandoned: bool = False


class Connection(asyncio.Protocol):
    """One connection with at most one request on it."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._num_bytes = 0
        self._transport: asyncio.Transport | None = None
        self.ticket: Ticket | None = None
        self.idle_since = 0.0

    @property
    def is_open(self) -> bool:
        """Whether a request can be written."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, ticket: Ticket) -> None:
        """Write a request."""
        if self._transport is None:
            raise RuntimeError("a connection that is not open was handed a request; this is a bug")
        self.ticket, ticket.connection = ticket, self
        ticket.sent_at = time.perf_counter()
        self._transport.writelines(ticket.pieces)

    def abort(self) -> None:
        """Close at once, without a word to whoever waits."""
        self.ticket = None
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = transport  # type: ignore[assignment]  # create_connection makes an asyncio.Transport

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, UnicodeDecodeError) as error:
            self._fail(f"{type(error).__name__}: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever waits that no answer will come."""
        self._pool.lost(self)
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.on_done(ConnectionResetError(str(error or "closed before an answer")))

    # What httptools calls.

    def on_message_begin(self) -> None:
        """Begin an answer."""
        self._headers, self._body, self._num_bytes = {}, [], 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._num_bytes += len(body)
        if self._num_bytes > MAX_ANSWER_BYTES:
            self._fail(f"an answer of over {MAX_ANSWER_BYTES} bytes")
            return
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Hand the answer over; the connection is free again."""
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer
            return
        ticket, self.ticket = self.ticket, None
        response = Response(status, self._headers, b"".join(self._body))
        if ticket is None:
            self.abort()
            return
        # First the answer, so that its time is not spent on the next request.
        ticket.on_done(response)
        self._pool.freed(self, is_reusable=self._parser.should_keep_alive())

    def _fail(self, why: str) -> None:
        ticket = self.ticket
        self.abort()
        if ticket is not None:
            ticket.on_done(OSError(why))


class Pool:
    """Connections to one server, opened as they are needed, up to a limit; requests beyond it wait in turn.

    Args:
        address: The server.
        max_connections: Most connections, and so most requests in flight.
    """

    def __init__(self, address: Address, max_connections: int) -> None:
        self._address = address
        self._max = max_connections
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._num_opening = 0
        self._waiting: deque[Ticket] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, request: tuple[bytes, bytes], on_done: OnDone) -> Ticket:
        """Send a request as soon as there is a connection for it."""
        ticket = Ticket(request, on_done, time.perf_counter())
        connection = self._take_idle()
        if connection is not None:
            connection.send(ticket)
            return ticket
        self._waiting.append(ticket)
        self._open_if_needed()
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """Give a request up: close its connection, or take it from those that wait."""
        ticket.is_abandoned = True
        if ticket.connection is not None and ticket.connection.ticket is ticket:
            ticket.connection.abort()

    async def ask(self, request: Request, timeout_s: float) -> Response:
        """Send a request and wait for its answer.

        Raises:
            OSError: If there is none.
            TimeoutError: If it does not come in time.
        """
        answered: asyncio.Future[Response | OSError] = asyncio.get_running_loop().create_future()

        def on_done(what: Response | OSError) -> None:
            if not answered.done():
                answered.set_result(what)

        ticket = self.submit(self._address.written(request), on_done)
        try:
            what = await asyncio.wait_for(answered, timeout_s)
        except BaseException:
            self.abandon(ticket)
            raise
        if isinstance(what, OSError):
            raise what
        return what

    async def close(self) -> None:
        """Close every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._waiting.clear()
        for connection in list(self._open):
            connection.abort()
        while self._open:
            await asyncio.sleep(0)

    def lost(self, connection: Connection) -> None:
        """Forget a connection that is closed; open another if requests wait."""
        self._open.discard(connection)
        self._open_if_needed()

    def freed(self, connection: Connection, *, is_reusable: bool) -> None:
        """Take a connection back whose answer is complete."""
        if not is_reusable or not connection.is_open:
            connection.abort()
            return
        ticket = self._next_waiting()
        if ticket is not None:
            connection.send(ticket)
            return
        connection.idle_since = time.perf_counter()
        self._idle.append(connection)

    def _take_idle(self) -> Connection | None:
        """Take the connection that was used last, and close those that have idled too long."""
        oldest = time.perf_counter() - MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    def _next_waiting(self) -> Ticket | None:
        while self._waiting:
            ticket = self._waiting.popleft()
            if not ticket.is_abandoned:
                return ticket
        return None

    def _open_if_needed(self) -> None:
        if self._num_opening >= len(self._waiting) or len(self._open) + self._num_opening >= self._max:
            return
        self._num_opening += 1
        task = asyncio.get_running_loop().create_task(self._connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        at = self._address
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), at.host, at.port, ssl=at.context)
        except OSError as error:
            self._num_opening -= 1
            ticket = self._next_waiting()
            if ticket is not None:
                ticket.on_done(error)
            self._open_if_needed()
            return
        self._num_opening -= 1
        self._open.add(connection)
        self.freed(connection, is_reusable=True)

"""One worker process: HTTP on one side, the channel to the engine on the other."""

import asyncio
import contextlib
import logging
import mmap
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import orjson
import uvicorn
import uvloop
from offramp_contract.errors import OfframpError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from offramp_server.api import classify
from offramp_server.api.open_inference import InferShortcut, infer
from offramp_server.api.problems import on_http_exception, on_offramp_error
from offramp_server.catalogue import Catalogue
from offramp_server.http_workers.channel import Channel
from offramp_server.http_workers.messages import Ready, Stop, Welcome, decode_for_worker, encode
from offramp_server.http_workers.models import RemoteModel
from offramp_server.http_workers.relay import Relay
from offramp_server.http_workers.remote import RemoteEngine
from offramp_server.middleware import RequestEnvelope
from offramp_server.serve import exempt_start_up, uvicorn_config
from offramp_server.settings import ServerSettings

logger = logging.getLogger("offramp.server")

WELCOME_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What handlers may use in a worker, under the names that `ServerContext` gives it.

    Attributes:
        settings: The operator's settings.
        repository: Which models answer to which names.
        engine: Asks the engine's process.
        bridge: Awaits its answers.
        metrics: Has refusals counted.
        workers: Threads for decoding.
    """

    settings: ServerSettings
    repository: Catalogue[RemoteModel]
    engine: RemoteEngine
    bridge: RemoteEngine
    metrics: RemoteEngine
    workers: ThreadPoolExecutor


def worker_app(settings: ServerSettings, engine: RemoteEngine) -> Starlette:
    """Give the application of a worker: it classifies and infers itself, and passes everything else on."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="offramp-decode") as threads:
            app.state.context = WorkerContext(settings, engine.catalogue, engine, engine, engine, threads)
            app.state.shortcut.open(app.state.context)
            yield

    app = Starlette(
        routes=[*classify.routes(), *infer.routes()],
        middleware=[Middleware(RequestEnvelope, settings=settings)],
        exception_handlers={OfframpError: on_offramp_error, HTTPException: on_http_exception},
        lifespan=lifespan,
    )
    app.state.shortcut = InferShortcut(settings)
    app.router.redirect_slashes = False
    app.router.default = Relay(engine)
    return app


class WorkerServer(uvicorn.Server):
    """Serves until the engine says stop, or has gone. Signals are the engine's business."""

    def __init__(self, config: uvicorn.Config, channel: Channel) -> None:
        super().__init__(config)
        self._channel = channel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and say so."""
        await super().startup(sockets)
        self._channel.send(encode(Ready()))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


class Worker:
    """What one process does.

    Args:
        memory: The arena, shared with the engine's process.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._channel = Channel(self._receive, self._end)
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._engine: RemoteEngine | None = None
        self._server: WorkerServer | None = None
        self._is_stopped = False

    async def serve(self, channel: socket.socket, listener: socket.socket) -> int:
        """Serve until the engine says stop; gives the process's exit status, which is 0 only then."""
        await asyncio.get_running_loop().create_connection(lambda: self._channel, sock=channel)
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            await self._welcome
        if self._server is not None:
            await self._server.serve(sockets=[listener])
        return 0 if self._is_stopped else 1

    def _receive(self, message: bytes) -> None:
        decoded = decode_for_worker(message)
        if isinstance(decoded, Welcome):
            self._begin(decoded)
        elif isinstance(decoded, Stop):
            self._is_stopped = True
            self._leave()
        elif self._engine is not None:
            self._engine.take(decoded)

    def _begin(self, welcome: Welcome) -> None:
        settings = ServerSettings.load(**orjson.loads(welcome.settings))
        logging.basicConfig(level=settings.log_level.upper(), format=welcome.log_format)
        self._engine = RemoteEngine(self._channel, settings, self._memory)
        config = uvicorn_config(worker_app(settings, self._engine), settings)
        self._server = WorkerServer(config, self._channel)
        exempt_start_up()
        self._welcome.set_result(welcome)

    def _end(self) -> None:
        """The channel is lost: with it, the engine."""
        if not self._welcome.done():
            self._welcome.set_exception(ConnectionError("the engine's process ended before it said anything"))
        if self._engine is not None:
            self._engine.end()
        self._leave()

    def _leave(self) -> None:
        if self._server is not None:
            self._server.should_exit = True


def work(channel_fd: int, listener_fd: int, memory_fd: int) -> int:
    """Be a worker over inherited file descriptors; gives the process's exit status.

    Args:
        channel_fd: A connected Unix socket whose other end the engine's process has.
        listener_fd: A listening socket.
        memory_fd: A file in memory, which becomes the arena.
    """
    # Ctrl-C reaches every process of the terminal, and the engine's drains for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel, listener = socket.socket(fileno=channel_fd), socket.socket(fileno=listener_fd)
    memory = mmap.mmap(memory_fd, 0)

    async def serve() -> int:
        return await Worker(memory).serve(channel, listener)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve())

"""Runs the application: binds the port, serves, and on SIGTERM or SIGINT drains before it stops."""

import asyncio
import gc
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette

from offramp_server.engine import Engine
from offramp_server.http_protocol import OfframpProtocol
from offramp_server.quick_protocol import QuickProtocol
from offramp_server.settings import ServerSettings

logger = logging.getLogger("offramp.server")

BACKLOG = 2048


class DrainingServer(uvicorn.Server):
    """A server that, told to stop, lets the engine finish what it admitted while new requests get 503.

    Attributes:
        loop: The event loop it runs on, once it has started.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self.loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain on the first signal; stop at once on the second."""
        self.stop(signal.Signals(sig).name)

    def stop(self, why: str) -> None:
        """Stop admitting, answer what was admitted, then stop. Called from any thread; a second call does not wait."""
        if self.loop is None:
            self.should_exit = True
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._begin_drain, why)

    def _begin_drain(self, why: str) -> None:
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: draining for at most %g s", why, self._drain_timeout_s)
        self._engine.drain(0.0)  # admits nothing from here on, and does not wait
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if not await asyncio.to_thread(self._engine.drain, self._drain_timeout_s):
            logger.warning("requests are left after %g s; they are answered with 503", self._drain_timeout_s)
            await asyncio.to_thread(self._engine.close)
        self.should_exit = True


def bind(settings: ServerSettings) -> socket.socket:
    """Bind the listening port.

    Raises:
        OSError: If the address is taken or cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Give the URL that a bound port is reached under."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: FastAPI, settings: ServerSettings, engine: Engine, listener: socket.socket | None = None) -> None:
    """Serve until a signal says stop; returns once every admitted request has been answered.

    Args:
        app: What `create_app` gave.
        settings: The operator's settings.
        engine: The engine to drain.
        listener: A port from `bind`; None binds the settings' own.

    Raises:
        OSError: If the address is taken or cannot be used.
    """
    listener = listener if listener is not None else bind(settings)
    url = url_of(listener)
    names = ", ".join(sorted({served.name for served in engine.models})) or "no model yet"
    logger.info("Offramp serves %s at %s (docs: %s/docs, metrics: %s/metrics)", names, url, url, url)
    server = DrainingServer(uvicorn_config(app, settings), engine, settings.drain_timeout_s)
    exempt_start_up()
    server.run(sockets=[listener])


def exempt_start_up() -> None:
    """Take what start-up has made out of the garbage collector's sight, for a process that goes on to serve.

    Modules, schemas and the first models stay until it ends. A search through all of them stops every thread for
    tens of milliseconds.
    """
    gc.collect()
    gc.freeze()


def uvicorn_config(app: Starlette, settings: ServerSettings) -> uvicorn.Config:
    """Give uvicorn's configuration for these settings."""
    # The access log is written on the ordinary way, so with one every request goes there.
    is_quick = not settings.access_log
    protocol = QuickProtocol.quick(settings, app.state.shortcut) if is_quick else OfframpProtocol.bounded_by(settings)
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="info" if settings.access_log else "warning",
        access_log=settings.access_log,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        # Admitted requests have been answered by the drain; what is left are slow readers and half-sent bodies.
        timeout_graceful_shutdown=5,
    )

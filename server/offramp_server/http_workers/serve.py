"""Puts the engine's process together: the engine, the application that answers for all, and the workers in front."""

import asyncio
import logging
import mmap
import signal
import socket
from contextlib import ExitStack
from typing import Final

import orjson
import uvloop
from fastapi import FastAPI

from offramp_server.engine import Engine
from offramp_server.http_workers.hub import Hub
from offramp_server.http_workers.messages import Welcome
from offramp_server.http_workers.port import Port
from offramp_server.http_workers.processes import Plan, Processes, first_of
from offramp_server.metrics import Metrics
from offramp_server.repository import Repository
from offramp_server.serve import BACKLOG, bind, exempt_start_up, url_of
from offramp_server.settings import ServerSettings

logger = logging.getLogger("offramp.server")

FAILED: Final = 1


def bind_for_workers(settings: ServerSettings) -> list[socket.socket]:
    """Bind the port once for each worker; the kernel spreads connections over the sockets.

    Raises:
        OSError: If the address is taken or cannot be used.
    """
    # A socket that shares its port would join another server's of the same user without a word; this one would not.
    with bind(settings) as probe:
        family, address = probe.family, probe.getsockname()
    with ExitStack() as opened:
        listeners = []
        for _ in range(settings.http_workers):
            listener = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            listeners.append(listener)
        opened.pop_all()
    return listeners


class _Front:
    """The engine's process, once its loop runs."""

    def __init__(self, app: FastAPI, settings: ServerSettings, repository: Repository, engine: Engine) -> None:
        self._settings = settings
        self._engine = engine
        self._repository = repository
        self._metrics: Metrics = app.state.context.metrics
        self._hub = Hub(engine, repository, app)
        self._stop = asyncio.Event()

    async def serve(self, listeners: list[socket.socket], log_format: str) -> int:
        """Serve until a signal says stop; gives the exit status."""
        processes = Processes(self._plan(log_format), listeners)
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._on_signal, sig, processes)
        exempt_start_up()
        await processes.start()
        if not processes.has_failed.is_set():
            url = url_of(listeners[0])
            names = ", ".join(sorted({served.name for served in self._engine.models})) or "no model yet"
            logger.info(
                "Offramp serves %s at %s (docs: %s/docs, metrics: %s/metrics) from %d HTTP workers",
                names, url, url, url, len(listeners),
            )  # fmt: skip
            await first_of(self._stop, processes.has_failed)
        await self._drain()
        for listener in listeners:  # who comes now is told so by the kernel, and does not wait for nobody
            listener.close()
        await processes.stop()
        return FAILED if processes.has_failed.is_set() else 0

    def _plan(self, log_format: str) -> Plan:
        return Plan(
            welcome=Welcome(_written_settings(self._settings), log_format),
            memory_bytes=self._settings.http_worker_memory_bytes,
            open_port=self._open_port,
            join=self._hub.join,
            leave=self._hub.leave,
            on_count=self._metrics.http_workers_changed,
            on_crash=self._metrics.http_worker_crashed,
        )

    def _open_port(self, memory: mmap.mmap) -> Port:
        hub = self._hub
        return Port(self._engine, hub.models, self._metrics, memory, relay=hub.answer, on_synced=hub.notice)

    def _on_signal(self, sig: signal.Signals, processes: Processes) -> None:
        if self._stop.is_set():
            processes.kill()
            self._engine.close()
            return
        logger.info("%s: draining for at most %g s", sig.name, self._settings.drain_timeout_s)
        self._engine.drain(0.0)  # admits nothing from here on, and does not wait
        self._stop.set()

    async def _drain(self) -> None:
        timeout_s = self._settings.drain_timeout_s
        if not await asyncio.to_thread(self._engine.drain, timeout_s):
            logger.warning("requests are left after %g s; they are answered with 503", timeout_s)
            await asyncio.to_thread(self._engine.close)


def run_with_workers(
    app: FastAPI,
    settings: ServerSettings,
    repository: Repository,
    engine: Engine,
    *,
    listeners: list[socket.socket],
    log_format: str,
) -> int:
    """Serve from several processes until a signal says stop; gives the exit status.

    Args:
        app: What `create_app` gave; it answers what only the engine's process can.
        settings: The operator's settings.
        repository: Which models are served.
        engine: The engine to drain.
        listeners: What `bind_for_workers` gave.
        log_format: How lines of the workers' logs look.
    """

    async def serve() -> int:
        async with app.router.lifespan_context(app):
            return await _Front(app, settings, repository, engine).serve(listeners, log_format)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve())


def _written_settings(settings: ServerSettings) -> bytes:
    """Write the settings that a worker goes by, the API key in the clear."""
    share = -(-settings.max_connections // settings.http_workers)
    given = settings.model_dump(mode="json", exclude_unset=True, exclude={"config"}) | {"max_connections": share}
    if settings.api_key is not None:
        given["api_key"] = settings.api_key.get_secret_value()
    return orjson.dumps(given)

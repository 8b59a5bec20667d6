"""A real server on a real port, in a thread of the test's process."""

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import pytest
from fastapi import FastAPI
from offramp_runtime import open_bundle, open_device
from offramp_server.app import create_app
from offramp_server.engine import Engine
from offramp_server.messages import Observer
from offramp_server.metrics import Metrics
from offramp_server.repository import Repository
from offramp_server.serve import DrainingServer, bind, url_of, uvicorn_config
from offramp_server.settings import ServerSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Running:
    """A server that runs."""

    url: str
    client: httpx.Client
    app: FastAPI
    engine: Engine
    server: DrainingServer
    thread: threading.Thread

    def connect(self) -> socket.socket:
        """Open a bare connection, for what no decent client does."""
        url = httpx.URL(self.url)
        return socket.create_connection((url.host, url.port or 80), timeout=30)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop()).result(30)

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self.server.loop is None:
            raise RuntimeError("the server has not started")
        return self.server.loop

    async def requests_end(self) -> None:
        """Wait until the handlers of all requests under way have ended."""
        tasks = set(self.server.server_state.tasks)
        if tasks:
            await asyncio.wait(tasks)


class Serve(Protocol):
    def __call__(
        self,
        *bundles: Path,
        folder: Path | None = None,
        observer: Observer | None = None,
        engine_type: type[Engine] = Engine,
        **settings: Any,
    ) -> Running: ...


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """Serve bundles, or a repository's folder, under settings; everything stops at the end of the session."""
    started: list[Running] = []

    def start(
        *bundles: Path,
        folder: Path | None = None,
        observer: Observer | None = None,
        engine_type: type[Engine] = Engine,
        **given: Any,
    ) -> Running:
        if observer is not None:  # some hold the thread that tells them, which must not be the server's own
            given.setdefault("inline_ms", 0.0)
        settings = ServerSettings.load(port=0, threads=1, warm_up_s=0.1, **given)
        running = _start(bundles, folder, settings, observer, engine_type)
        started.append(running)
        return running

    yield start
    for running in started:
        running.client.close()
        running.server.stop("end of the tests")
        running.thread.join()
        running.engine.close()


@pytest.fixture(scope="session")
def toy(serve: Serve, toy_bundle: Path) -> Running:
    """A server of the toy bundle under the default settings but small limits."""
    return serve(toy_bundle, max_body_bytes=200_000, max_decoded_bytes=300_000, max_rows=16)


@pytest.fixture(scope="session")
def digits(serve: Serve, digits_like_bundle: Path) -> Running:
    """A server of the digits-like bundle: images go in."""
    return serve(digits_like_bundle, max_image_pixels=10_000, max_rows=16)


def _start(
    bundles: tuple[Path, ...],
    folder: Path | None,
    settings: ServerSettings,
    observer: Observer | None,
    engine_type: type[Engine],
) -> Running:
    metrics = Metrics()
    engine = engine_type(open_device("cpu", settings.threads), settings.engine_settings(), observer or metrics)
    for bundle in bundles:
        engine.add_model(open_bundle(bundle))
    repository = Repository(engine, folder, linger_s=settings.body_timeout_s, defaults_of=settings.defaults_of)
    repository.load_all()
    app = create_app(settings, repository, engine, metrics)
    listener = bind(settings)
    server = DrainingServer(uvicorn_config(app, settings), engine, settings.drain_timeout_s)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name="server")
    thread.start()
    url = url_of(listener)
    return Running(url, httpx.Client(base_url=url, timeout=30, trust_env=False), app, engine, server, thread)

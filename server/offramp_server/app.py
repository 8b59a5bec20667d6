"""Puts the server's parts together into one ASGI application."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from offramp_contract.errors import OfframpError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_server.api import classify, docs, models, open_inference
from offramp_server.api.openapi import openapi_document
from offramp_server.api.problems import on_http_exception, on_offramp_error
from offramp_server.bridge import LoopBridge
from offramp_server.context import ServerContext, context_of
from offramp_server.engine import Engine
from offramp_server.metrics import Metrics
from offramp_server.middleware import RequestEnvelope
from offramp_server.repository import Repository
from offramp_server.settings import ServerSettings


def create_app(settings: ServerSettings, repository: Repository, engine: Engine, metrics: Metrics) -> FastAPI:
    """Give the application that serves a repository's models.

    The engine outlives the application: whoever opened it closes it. Routes are Starlette's own, since a tensor gains
    nothing from a validation framework; what they accept is described in `api.openapi`.

    Args:
        settings: The operator's settings.
        repository: Which models are served.
        engine: What answers; the repository's models are loaded in it.
        metrics: What observes the engine.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="offramp-decode") as workers:
            bridge = LoopBridge(asyncio.get_running_loop())
            app.state.context = ServerContext(settings, repository, engine, bridge, metrics, workers)
            app.state.shortcut.open(app.state.context)
            watching = asyncio.create_task(repository.watch(settings.repository_poll_s))
            try:
                yield
            finally:
                watching.cancel()

    app = FastAPI(
        title="Offramp",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers={OfframpError: on_offramp_error, HTTPException: on_http_exception},
    )
    app.state.shortcut = open_inference.InferShortcut(settings)
    app.router.routes.extend([*classify.routes(), *models.routes(), *open_inference.routes(), *docs.routes()])
    app.router.routes.append(Route("/metrics", _exposition, methods=["GET"]))
    app.router.redirect_slashes = False
    document: dict[str, Any] = openapi_document()
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's documented way to replace its document
    app.add_middleware(RequestEnvelope, settings=settings)
    return app


async def _exposition(request: Request) -> Response:
    context = context_of(request)
    context.engine.report_gears()
    body, content_type = context.metrics.exposition()
    return Response(body, headers={"content-type": content_type})

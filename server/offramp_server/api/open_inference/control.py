"""The model repository extension: what there is, and loading and unloading it where the operator allows that."""

import asyncio

from offramp_contract.errors import InvalidValue, NotPermitted
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_server.api.bodies import read_body
from offramp_server.api.open_inference.metadata import json_response
from offramp_server.api.open_inference.request import read_document
from offramp_server.context import ServerContext, context_of

_LOAD_PARAMETERS: frozenset[str] = frozenset()
_UNLOAD_PARAMETERS = frozenset({"unload_dependents"})


def routes() -> list[Route]:
    """Give the routes of the repository extension."""
    return [
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{model}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", unload, methods=["POST"]),
    ]


async def index(request: Request) -> Response:
    """List the repository's models with their state, or with `{"ready": true}` those that are served."""
    context = context_of(request)
    body = await read_body(request, context.settings)
    only_ready = read_document(body).get("ready", False) if body else False
    if not isinstance(only_ready, bool):
        raise InvalidValue("ready: must be true or false", "ready")
    entries = [entry for entry in context.repository.index() if entry.state == "READY" or not only_ready]
    return json_response(
        [
            {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
            for entry in entries
        ]
    )


async def load(request: Request) -> Response:
    """Load a model, or its newest version, from the repository; answers once it is served."""
    context = await _permitted(request, _LOAD_PARAMETERS)
    await asyncio.to_thread(context.repository.load, request.path_params["model"])
    return json_response({})


async def unload(request: Request) -> Response:
    """Stop serving a model; what it was asked before is still answered."""
    context = await _permitted(request, _UNLOAD_PARAMETERS)
    await asyncio.to_thread(context.repository.unload, request.path_params["model"])
    return json_response({})


async def _permitted(request: Request, known: frozenset[str]) -> ServerContext:
    """Refuse what the operator has not allowed, and parameters that would be ignored."""
    context = context_of(request)
    if not context.settings.repository_control:
        raise NotPermitted("model: loading and unloading by request is switched off here (repository_control)", "model")
    body = await read_body(request, context.settings)
    parameters = read_document(body).get("parameters", {}) if body else {}
    if not isinstance(parameters, dict) or set(parameters) - known:
        raise InvalidValue(
            f"parameters: must be an object with no more than {', '.join(sorted(known)) or 'nothing'} in it; models "
            "are configured by their bundles",
            "parameters",
        )
    return context

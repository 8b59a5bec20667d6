"""`/v1`: classification for people. One handler for every kind of body, and what may be asked for."""

import asyncio

from offramp_contract.errors import OfframpError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_server.api.answers import answer_response, failure_of
from offramp_server.api.disconnect import unless_disconnected
from offramp_server.api.events import EVENT_STREAM, stream_response
from offramp_server.api.payload import Payload, read_payload
from offramp_server.context import ServerContext, context_of
from offramp_server.fields import Routing, read_routing
from offramp_server.messages import Inputs, Result
from offramp_server.middleware import arrival_of
from offramp_server.served import ServedModel


def routes() -> list[Route]:
    """Give the routes that classify."""
    return [
        Route("/v1/classify", classify, methods=["POST"]),
        Route("/v1/models/{model}/classify", classify, methods=["POST"]),
    ]


async def classify(request: Request) -> Response:
    """Answer a classify request, whole or as a stream of events."""
    context = context_of(request)
    served = context.repository.find(request.path_params.get("model"))
    is_stream = EVENT_STREAM in request.headers.get("accept", "")
    try:
        payload = await read_payload(request, context, served)
        routing = read_routing(
            payload.fields,
            served.manifest,
            served.calibration,
            context.settings,
            otherwise=context.settings.defaults_of(served.name),
            wants_progress=is_stream,
        )
        inputs = await _prepared(payload, context)
    except OfframpError as error:
        context.metrics.rejected(served.name, served.version, error.code)
        raise
    if is_stream:
        return await _streamed(request, context, served, inputs, routing)
    result = await unless_disconnected(
        request, context.bridge.answer(context.engine, served, inputs, routing.options, arrival_of(request.scope))
    )
    failure = failure_of(result)
    if failure is not None:
        raise failure
    return answer_response(result, served, routing)


async def _prepared(payload: Payload, context: ServerContext) -> Inputs:
    if not payload.is_slow:
        return payload.prepare()
    return await asyncio.get_running_loop().run_in_executor(context.workers, payload.prepare)


async def _streamed(
    request: Request, context: ServerContext, served: ServedModel, inputs: Inputs, routing: Routing
) -> Response:
    events = context.bridge.stream(context.engine, served, inputs, routing.options, arrival_of(request.scope))
    first = await unless_disconnected(request, anext(events))
    failure = failure_of(first) if isinstance(first, Result) else None
    if failure is not None:
        raise failure
    return stream_response(first, events, served, routing)

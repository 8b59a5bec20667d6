"""`POST /v2/models/{model}[/versions/{version}]/infer`: answers tensors with tensors."""

import asyncio
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Final

from offramp_contract.errors import InvalidValue, OfframpError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_server.api.answers import answer_headers
from offramp_server.api.bodies import read_body
from offramp_server.api.disconnect import unless_disconnected
from offramp_server.api.open_inference.asked import asked_model
from offramp_server.api.open_inference.outputs import needs_logits, output_tensors, requested_outputs
from offramp_server.api.open_inference.request import InferRequest, RequestedOutput, read_request
from offramp_server.api.open_inference.response import MAX_INLINE_BYTES, answer_parts, infer_response
from offramp_server.context import ServerContext, context_of
from offramp_server.fields import Routing, read_routing
from offramp_server.inputs import conform
from offramp_server.messages import Inputs, Result, RowAnswer
from offramp_server.middleware import arrival_of
from offramp_server.served import ServedModel
from offramp_server.settings import ServerSettings

MICROSECONDS_PER_MS: Final = 1000.0


def routes() -> list[Route]:
    """Give the routes that infer."""
    return [
        Route("/v2/models/{model}/infer", infer, methods=["POST"]),
        Route("/v2/models/{model}/versions/{version}/infer", infer, methods=["POST"]),
    ]


async def infer(request: Request) -> Response:
    """Answer an inference request."""
    context = context_of(request)
    served = asked_model(request)
    try:
        body = await read_body(request, context.settings)
        header_length = request.headers.get("inference-header-content-length")
        asked, inputs = await _read(body, header_length, served, context)
        outputs = requested_outputs(asked.outputs, asked.is_binary, served.manifest)
        routing = _routing(asked, served, context.settings, outputs)
    except OfframpError as error:
        context.metrics.rejected(served.name, served.version, error.code)
        raise
    result = await unless_disconnected(
        request, context.bridge.answer(context.engine, served, inputs, routing.options, arrival_of(request.scope))
    )
    head: dict[str, Any] = {"model_name": served.name, "model_version": served.version}
    if asked.id is not None:
        head["id"] = asked.id
    if (parameters := _point_parameters(routing)) is not None:
        head["parameters"] = parameters
    tensors = output_tensors(outputs, _rows(result), served, routing.options.combine)
    answer, json_length = answer_parts(head, outputs, tensors)
    headers = answer_headers(result, served)
    return await infer_response(answer, json_length, headers, request.headers.get("accept-encoding", ""))


async def _read(
    body: bytes, header_length: str | None, served: ServedModel, context: ServerContext
) -> tuple[InferRequest, Inputs]:
    """Read the body, on a worker thread if it is large."""
    read = partial(_read_now, body, header_length, served, context.settings.max_rows)
    if len(body) <= MAX_INLINE_BYTES:
        return read()
    return await asyncio.get_running_loop().run_in_executor(context.workers, read)


def _read_now(
    body: bytes, header_length: str | None, served: ServedModel, max_rows: int
) -> tuple[InferRequest, Inputs]:
    asked = read_request(body, header_length, served.manifest, max_rows)
    return asked, conform(asked.arrays, served.manifest, max_rows)


def _point_parameters(routing: Routing) -> dict[str, Any] | None:
    """Name the operating point that served a request, and the certificate it was chosen for."""
    if routing.options.operating_point is None:
        return None
    certificate = {} if routing.certificate is None else routing.certificate.model_dump(exclude={"data_digest"})
    stated = {f"certified_{name}": value for name, value in certificate.items() if value is not None}
    return {"operating_point": routing.options.operating_point} | stated


def _routing(
    asked: InferRequest, served: ServedModel, settings: ServerSettings, outputs: tuple[RequestedOutput, ...]
) -> Routing:
    """Check the parameters that route; of a `timeout` and a `latency_ms` the tighter one holds."""
    wants_logits = needs_logits(outputs)
    try:
        routing = read_routing(
            asked.fields,
            served.manifest,
            served.calibration,
            settings,
            otherwise=settings.defaults_of(served.name),
            wants_logits=wants_logits,
        )
    except InvalidValue as error:
        raise InvalidValue(f"parameters.{error.message}", error.field) from None
    options = routing.options
    if asked.timeout_us is None:
        return routing
    timeout_ms = asked.timeout_us / MICROSECONDS_PER_MS
    if timeout_ms > settings.max_latency_ms:
        limit_us = settings.max_latency_ms * MICROSECONDS_PER_MS
        raise InvalidValue(f"parameters.timeout: must be at most {limit_us:g} microseconds", "timeout")
    latency_ms = timeout_ms if options.latency_ms is None else min(timeout_ms, options.latency_ms)
    return replace(routing, options=replace(options, latency_ms=latency_ms))


def _rows(result: Result) -> list[RowAnswer]:
    """Give the rows' answers; a tensor has no place for an error, so one failed row fails the request.

    Raises:
        OfframpError: The first failed row's error, naming the row.
    """
    rows = []
    for index, row in enumerate(result.rows):
        if isinstance(row, OfframpError):
            failure = copy(row)
            failure.message = f"row {index}: {row.message}"
            raise failure
        rows.append(row)
    return rows

"""`POST /v2/models/{model}[/versions/{version}]/infer`: answers tensors with tensors."""

import asyncio
from copy import copy
from functools import partial
from typing import Any, NamedTuple

from offramp_contract.errors import OfframpError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_server.api.answers import answer_headers, served_by
from offramp_server.api.bodies import read_body
from offramp_server.api.disconnect import unless_disconnected
from offramp_server.api.open_inference.asked import asked_model
from offramp_server.api.open_inference.outputs import output_tensors
from offramp_server.api.open_inference.plan import Plan, read_plan
from offramp_server.api.open_inference.request import json_length_of
from offramp_server.api.open_inference.response import MAX_INLINE_BYTES, answer_parts, infer_response
from offramp_server.context import ServerContext, context_of
from offramp_server.fields import Routing
from offramp_server.messages import Inputs, Result, RowAnswer
from offramp_server.middleware import arrival_of
from offramp_server.served import ServedModel
from offramp_server.settings import ServerSettings


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
        plan, inputs = await _read(body, header_length, served, context)
    except OfframpError as error:
        context.metrics.rejected(served.name, served.version, error.code)
        raise
    options = plan.routing.options
    result = await unless_disconnected(
        request, context.bridge.answer(context.engine, served, inputs, options, arrival_of(request.scope))
    )
    answer = answer_of(result, served, plan)
    accepted = request.headers.get("accept-encoding", "")
    return await infer_response(answer.body, answer.json_length, answer.headers, accepted)


class Answer(NamedTuple):
    """An answer as it is sent, but for compression.

    Attributes:
        body: JSON, and binary data behind it.
        json_length: Where the binary data begins; None if there is none.
        headers: Who answered, and what the time went to.
    """

    body: bytes
    json_length: int | None
    headers: dict[str, str]


def answer_of(result: Result, served: ServedModel, plan: Plan) -> Answer:
    """Write down a result.

    Raises:
        OfframpError: If a row failed, or the outputs cannot be made of the rows' answers.
    """
    head: dict[str, Any] = {"model_name": served.name, "model_version": served.version}
    if plan.wording.id is not None:
        head["id"] = plan.wording.id
    if (parameters := _point_parameters(result, served, plan.routing)) is not None:
        head["parameters"] = parameters
    tensors = output_tensors(plan.outputs, _rows(result), served, plan.routing.options.combine)
    body, json_length = answer_parts(head, plan.outputs, tensors)
    return Answer(body, json_length, answer_headers(result, served))


async def _read(
    body: bytes, header_length: str | None, served: ServedModel, context: ServerContext
) -> tuple[Plan, Inputs]:
    """Read the body, on a worker thread if it is large."""
    read = partial(_read_now, body, header_length, served, context.settings)
    if len(body) <= MAX_INLINE_BYTES:
        return read()
    return await asyncio.get_running_loop().run_in_executor(context.workers, read)


def _read_now(
    body: bytes, header_length: str | None, served: ServedModel, settings: ServerSettings
) -> tuple[Plan, Inputs]:
    json_length = json_length_of(header_length, len(body))
    text = body if json_length == len(body) else body[:json_length]
    plan = read_plan(text, len(body), served, settings)
    return plan, plan.inputs(body, served, settings.max_rows)


def _point_parameters(result: Result, served: ServedModel, routing: Routing) -> dict[str, Any] | None:
    """Name the gear and the operating point that served a request, and the certificate it was chosen for."""
    used = served_by(result, served, routing)
    stated: dict[str, Any] = {} if result.gear is None else {"gear": result.gear}
    if used.operating_point is not None:
        stated["operating_point"] = used.operating_point
    if used.certificate is not None:
        certificate = used.certificate.model_dump(exclude={"data_digest"})
        stated |= {f"certified_{name}": value for name, value in certificate.items() if value is not None}
    return stated or None


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

"""Server-sent events: an answer at every exit reached, and a last one."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import orjson
from offramp_contract.errors import OfframpError
from starlette.responses import StreamingResponse

from offramp_server.api.answers import answer_document, failure_of, progress_document
from offramp_server.api.problems import internal_problem, problem_of
from offramp_server.fields import Routing
from offramp_server.messages import Progress, Result
from offramp_server.served import ServedModel

logger = logging.getLogger("offramp.server")

EVENT_STREAM = "text/event-stream"


def stream_response(
    first: Progress | Result, rest: AsyncIterator[Progress | Result], served: ServedModel, routing: Routing
) -> StreamingResponse:
    """Answer with one `exit` event per exit reached and row, then one `answer` or `error` event.

    Args:
        first: The first event, awaited already so that a refusal is an HTTP status and not a stream.
        rest: The others. It is closed when the client leaves, which cancels the request.
        served: The model.
        routing: What was asked for.
    """
    headers = {"x-model-version": served.version, "cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_events(first, rest, served, routing), 200, headers, EVENT_STREAM)


async def _events(
    first: Progress | Result, rest: AsyncIterator[Progress | Result], served: ServedModel, routing: Routing
) -> AsyncIterator[bytes]:
    yield _event_of(first, served, routing)
    try:
        async for event in rest:
            yield _event_of(event, served, routing)
    except OfframpError as error:
        yield _event("error", problem_of(error))
    except Exception:  # the status line is out, so the middleware can no longer answer for it
        logger.exception("a stream of %s broke", served.name)
        yield _event("error", internal_problem())


def _event_of(event: Progress | Result, served: ServedModel, routing: Routing) -> bytes:
    if isinstance(event, Progress):
        return _event("exit", progress_document(event, served, routing))
    failure = failure_of(event)
    if failure is not None:
        return _event("error", problem_of(failure))
    return _event("answer", answer_document(event, served, routing))


def _event(kind: str, document: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps(document))

"""Errors to HTTP: the one table from the contract's errors to status codes, and RFC 9457 problem documents.

Answers under /v2 are `{"error": message}` as the Open Inference Protocol has it; all others are
`application/problem+json` with a stable relative `type`. Neither carries a stack trace or a third party's text.
"""

import logging
import math
from http import HTTPStatus
from typing import Any, Final

import orjson
from offramp_contract import errors
from offramp_contract.errors import OfframpError, RequestError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

logger = logging.getLogger("offramp.server")

PROBLEM_JSON: Final = "application/problem+json"
CLIENT_CLOSED_REQUEST: Final = 499
"""Never seen by anyone but logs: the client has gone."""


STATUS: Final[dict[type[OfframpError], int]] = {
    errors.MalformedRequest: 400,
    errors.Unauthorized: 401,
    errors.NotPermitted: 403,
    errors.UnknownModel: 404,
    errors.BodyTimeout: 408,
    errors.TooLarge: 413,
    errors.UnsupportedBody: 415,
    errors.InvalidValue: 422,
    errors.NotFinite: 422,
    errors.BundleError: 422,
    errors.RequestError: 400,
    errors.Overloaded: 429,
    errors.Cancelled: CLIENT_CLOSED_REQUEST,
    errors.StageFailed: 500,
    errors.DeviceUnavailable: 503,
    errors.NotReady: 503,
    errors.DeadlineExceeded: 504,
}
TITLES: Final[dict[str, str]] = {
    "malformed": "The request cannot be read",
    "unauthorized": "An API key is needed",
    "not_permitted": "The operator has switched this off",
    "unknown_model": "No such model",
    "body_timeout": "The body took too long",
    "too_large": "The request is too large",
    "unsupported_body": "This kind of body is not read here",
    "invalid_value": "A value cannot be honoured",
    "not_finite": "The network's answer is not a number",
    "overloaded": "The server has more work than it can promise to do",
    "cancelled": "The client went away",
    "stage_failed": "A stage of the model failed",
    "not_ready": "The server is not ready",
    "deadline_exceeded": "The deadline passed before any exit",
    "not_found": "No such path",
    "method_not_allowed": "This path does not answer that method",
    "internal": "Internal error",
}


def status_of(error: OfframpError) -> int:
    """Give the HTTP status of an error, by its nearest class in the table; 500 for what is not in it."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def headers_of(error: OfframpError) -> dict[str, str]:
    """Give the headers that belong to an error: when to come back, how to authenticate."""
    if isinstance(error, errors.Overloaded):
        return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, errors.NotReady):
        return {"retry-after": "1"}
    if isinstance(error, errors.Unauthorized):
        return {"www-authenticate": "Bearer"}
    return {}


def problem_of(error: OfframpError) -> dict[str, Any]:
    """Describe an error as an RFC 9457 problem."""
    problem = _problem(error.code, status_of(error), error.message)
    if isinstance(error, RequestError) and error.field is not None:
        problem["field"] = error.field
    if isinstance(error, errors.Overloaded):
        problem["retry_after_s"] = error.retry_after_s
    return problem


def error_response(path: str, error: OfframpError) -> Response:
    """Answer with an error, in the manner of the API that `path` belongs to."""
    status, headers = status_of(error), headers_of(error)
    logger.debug("refused %s with %d: %s", path, status, error.message)
    if _is_open_inference(path):
        return _open_inference(status, error.message, headers)
    return Response(orjson.dumps(problem_of(error)), status, headers, PROBLEM_JSON)


def internal_problem() -> dict[str, Any]:
    """Describe an unexpected exception; its text stays in the log."""
    detail = "Something went wrong inside the server; its log has the details under this request id."
    return _problem("internal", 500, detail)


def internal_error(path: str) -> Response:
    """Answer an unexpected exception, in the manner of the API that `path` belongs to."""
    problem = internal_problem()
    if _is_open_inference(path):
        return _open_inference(500, problem["detail"], {})
    return Response(orjson.dumps(problem), 500, media_type=PROBLEM_JSON)


async def on_offramp_error(request: Request, error: Exception) -> Response:
    """Answer an error that a handler raised on purpose."""
    if not isinstance(error, OfframpError):
        raise error
    return error_response(request.url.path, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the framework itself refuses: unknown paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    status, path = error.status_code, request.url.path
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "malformed")
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    detail = {
        404: "There is nothing under this path; /docs lists what there is.",
        405: f"{request.method} is not answered here; allowed: {headers.get('allow', 'none')}.",
    }.get(status, HTTPStatus(status).phrase)
    if _is_open_inference(path):
        return _open_inference(status, detail, headers)
    body = orjson.dumps(_problem(code, status, detail))
    return Response(body, status, headers, PROBLEM_JSON)


def _problem(code: str, status: int, detail: str) -> dict[str, Any]:
    title = TITLES.get(code, HTTPStatus(status).phrase if status != CLIENT_CLOSED_REQUEST else "The client went away")
    return {"type": f"/problems/{code.replace('_', '-')}", "title": title, "status": status, "detail": detail}


def _is_open_inference(path: str) -> bool:
    return path == "/v2" or path.startswith("/v2/")


def _open_inference(status: int, message: str, headers: dict[str, str]) -> Response:
    return Response(orjson.dumps({"error": message}), status, headers, "application/json")

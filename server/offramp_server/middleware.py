"""What happens around every request: its id, its arrival time, the API key, and the net under unexpected exceptions."""

import logging
import re
import time
import uuid
from hmac import compare_digest
from typing import Any

from offramp_contract.errors import Unauthorized
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp_server.api.problems import error_response, internal_error
from offramp_server.settings import ServerSettings

logger = logging.getLogger("offramp.server")

OPEN_PATHS = frozenset({"/metrics", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
"""Answered without the API key: probes and scrapers carry none, and the documentation describes no particular model."""

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+/=-]{0,127}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def arrival_of(scope: Scope) -> float:
    """Give when a request's headers had arrived, in `time.monotonic()` seconds."""
    arrival_s: float = scope["offramp.arrival_s"]
    return arrival_s


class RequestEnvelope:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        key = settings.api_key
        self._api_key = None if key is None else key.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope["offramp.arrival_s"] = time.monotonic()
        request_id = _request_id(headers)
        echoed = [(b"x-request-id", request_id.encode())]
        traceparent = headers.get("traceparent")
        if traceparent is not None and _TRACEPARENT.fullmatch(traceparent):
            echoed.append((b"traceparent", traceparent.encode()))
        has_started = False

        async def send_with_ids(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), *echoed]
            await send(message)

        try:
            if self._is_refused(scope, headers):
                error = Unauthorized("api key: send it as `Authorization: Bearer` or `x-api-key`", "x-api-key")
                await error_response(scope["path"], error)(scope, receive, send_with_ids)
            else:
                await self._app(scope, receive, send_with_ids)
        except ClientDisconnect:
            logger.debug("request %s: the client left", request_id)
        except Exception:
            logger.exception("request %s to %s failed", request_id, scope["path"])
            if not has_started:
                await internal_error(scope["path"])(scope, receive, send_with_ids)

    def _is_refused(self, scope: dict[str, Any] | Scope, headers: Headers) -> bool:
        if self._api_key is None or scope["path"] in OPEN_PATHS or scope["path"].startswith("/docs/"):
            return False
        given = headers.get("x-api-key")
        if given is None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                return True
        # Headers are latin-1 text; comparing bytes keeps the comparison constant-time for any of them.
        return not compare_digest(given.strip().encode("latin-1"), self._api_key)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id")
    return given if given is not None and _SANE_ID.fullmatch(given) else uuid.uuid4().hex

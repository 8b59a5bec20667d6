"""What happens around every request: its id, its arrival time, the API key, and the net under unexpected exceptions."""

import logging
import random
import re
import time
from collections.abc import Mapping
from hmac import compare_digest

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


class Gate:
    """Lets in those who show the operator's API key, or everyone if there is none.

    Attributes:
        is_open: Whether there is none.
    """

    def __init__(self, settings: ServerSettings) -> None:
        key = settings.api_key
        self._api_key = b"" if key is None else key.get_secret_value().encode()
        self.is_open = key is None

    def lets_in(self, path: str, headers: Mapping[str, str]) -> bool:
        """Tell whether a request may pass."""
        if self.is_open or path in OPEN_PATHS or path.startswith("/docs/"):
            return True
        given = headers.get("x-api-key")
        if given is None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                return False
        # Headers are latin-1 text; comparing bytes keeps the comparison constant-time for any of them.
        return compare_digest(given.strip().encode("latin-1"), self._api_key)


class RequestEnvelope:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._gate = Gate(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope.setdefault("offramp.arrival_s", time.monotonic())
        request_id = scope["offramp.request_id"] = request_id_of(headers.get("x-request-id"))
        echoed = echoed_headers(request_id, headers.get("traceparent"))
        has_started = False

        async def send_with_ids(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), *echoed]
            await send(message)

        try:
            if not self._gate.lets_in(scope["path"], headers):
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


def request_id_of(given: str | None) -> str:
    """Give the id by which a request goes: its own if that is sane, else a new one."""
    return given if given is not None and _SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def echoed_headers(request_id: str, traceparent: str | None) -> list[tuple[bytes, bytes]]:
    """Give the headers by which an answer is told to belong to a request."""
    echoed = [(b"x-request-id", request_id.encode())]
    if traceparent is not None and _TRACEPARENT.fullmatch(traceparent):
        echoed.append((b"traceparent", traceparent.encode()))
    return echoed

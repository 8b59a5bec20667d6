"""The short way of `POST /v2/models/{model}/infer` for requests whose tensors come as binary data.

Only what is asked for by the thousand goes this way: one model by name, no query, a body that is not compressed and
small enough to be read at once. All else, and whatever is wrong with a request, is left to the ordinary route, so that
every refusal is written in one place; but the engine's own, which come by the thousand under overload.
"""

import logging
import re
from collections.abc import Mapping
from typing import Final

from offramp_contract.errors import OfframpError
from starlette.responses import Response

from offramp_server.api.open_inference.infer import answer_of
from offramp_server.api.open_inference.plan import Plan, Plans
from offramp_server.api.open_inference.response import MAX_INLINE_BYTES, chosen_encoding, coded
from offramp_server.api.problems import error_response, internal_error
from offramp_server.context import ServerContext
from offramp_server.messages import Progress, Result
from offramp_server.middleware import Gate, echoed_headers, request_id_of
from offramp_server.quick_protocol import Headers, Reply, Visit
from offramp_server.served import ServedModel
from offramp_server.settings import ServerSettings
from offramp_server.submission import Submission

logger = logging.getLogger("offramp.server")

_PATH: Final = re.compile(rb"/v2/models/([A-Za-z0-9][A-Za-z0-9._-]{0,127})/infer")
MOST_BYTES_OF_A_NUMBER: Final = 32
"""As JSON."""
_WORDS_LENGTH: Final = b"inference-header-content-length"
_OTHERWISE: Final = frozenset({b"content-encoding", b"transfer-encoding"})


class InferShortcut:
    """Takes the requests of one server, once it is open."""

    def __init__(self, settings: ServerSettings) -> None:
        self._max_bytes = min(MAX_INLINE_BYTES, settings.max_body_bytes)
        self._gate = Gate(settings)
        self._plans = Plans(settings)
        self._context: ServerContext | None = None

    def open(self, context: ServerContext) -> None:
        """Take requests from now on."""
        self._context = context

    def visit(self, url: bytes, headers: Headers) -> Visit | None:
        """Take a request, or leave it to the ordinary route; see `Shortcut`."""
        path = _PATH.fullmatch(url)
        if path is None or self._context is None:
            return None
        given = dict(headers)
        if len(given) < len(headers) or not _OTHERWISE.isdisjoint(given):  # a header that is sent twice is for others
            return None
        words_length, length = given.get(_WORDS_LENGTH), given.get(b"content-length")
        if words_length is None or length is None or not words_length.isdigit() or len(words_length) > 8:
            return None
        if not 0 < int(words_length) <= int(length) <= self._max_bytes:
            return None
        if not self._gate.is_open:
            texts = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
            if not self._gate.lets_in(url.decode("ascii"), texts):
                return None
        return InferVisit(self._context, self._plans, path[1].decode("ascii"), int(words_length), given)


class InferVisit:
    """One request on the short way."""

    __slots__ = ("_context", "_headers", "_name", "_num_words", "_plan", "_plans", "_reply", "_served", "_submission")

    def __init__(
        self, context: ServerContext, plans: Plans, name: str, num_words: int, headers: Mapping[bytes, bytes]
    ) -> None:
        self._context = context
        self._plans = plans
        self._name = name
        self._num_words = num_words
        self._headers = headers
        self._submission: Submission | None = None

    def begin(self, body: bytes, arrival_s: float, reply: Reply) -> bool:
        """Submit the request to the engine; false gives back what is no request that this model can answer."""
        self._reply = reply
        try:
            return self._begin(body, arrival_s)
        except Exception:
            self._fail()
            return True

    def _begin(self, body: bytes, arrival_s: float) -> bool:
        context = self._context
        try:
            self._served = served = context.repository.find(self._name)
            self._plan = plan = self._plans.find(body[: self._num_words], len(body), served)
            inputs = plan.inputs(body, served, context.settings.max_rows)
            if self._may_be_large(plan, served):
                return False
        except OfframpError:  # the ordinary route meets it again, and says so
            return False
        options = plan.routing.options
        try:
            self._submission = context.bridge.ask(context.engine, served, inputs, options, arrival_s, take=self._take)
        except OfframpError as error:
            self._refuse(error)
        return True

    def leave(self) -> None:
        """Cancel the request: the client has gone."""
        if self._submission is not None:
            self._context.bridge.forget(self._submission)

    def _may_be_large(self, plan: Plan, served: ServedModel) -> bool:
        """Tell whether the answer could take long to compress and the client would like that."""
        accepted = self._header(b"accept-encoding")
        if accepted is None or chosen_encoding(accepted) is None:
            return False
        widest = max(exit_.num_classes for exit_ in served.manifest.exits)
        num_bytes = MOST_BYTES_OF_A_NUMBER * plan.wording.num_rows * widest * len(plan.outputs)
        return num_bytes > MAX_INLINE_BYTES

    def _take(self, event: Progress | Result | OfframpError) -> None:
        """Answer with the engine's result; nothing that goes wrong here may reach the others that it answers."""
        if isinstance(event, Progress) or self._submission is None:
            return
        self._context.bridge.forget(self._submission)
        self._submission = None
        if isinstance(event, OfframpError):  # of an engine in another process, which refuses when it is asked for long
            self._refuse(event)
            return
        try:
            answer = answer_of(event, self._served, self._plan)
            body, stated = coded(answer.body, answer.json_length, self._header(b"accept-encoding") or "")
        except OfframpError as error:
            self._refuse(error)
        except Exception:
            self._fail()
        else:
            self._answer(answer.headers | stated, body)

    @property
    def _path(self) -> str:
        return f"/v2/models/{self._name}/infer"

    def _header(self, name: bytes) -> str | None:
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    def _refuse(self, error: OfframpError) -> None:
        self._respond(error_response(self._path, error), request_id_of(self._header(b"x-request-id")))

    def _fail(self) -> None:
        request_id = request_id_of(self._header(b"x-request-id"))
        logger.exception("request %s to %s failed", request_id, self._path)
        self._respond(internal_error(self._path), request_id)

    def _respond(self, response: Response, request_id: str) -> None:
        lines = [b"%b: %b\r\n" % header for header in response.raw_headers]
        self._send(response.status_code, lines, bytes(response.body), request_id)

    def _answer(self, headers: Mapping[str, str], body: bytes) -> None:
        lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
        lines.append(b"content-length: %d\r\n" % len(body))
        self._send(200, lines, body, request_id_of(self._header(b"x-request-id")))

    def _send(self, status: int, lines: list[bytes], body: bytes, request_id: str) -> None:
        echoed = echoed_headers(request_id, self._header(b"traceparent"))
        self._reply(status, b"".join([*lines, *(b"%b: %b\r\n" % header for header in echoed)]), body)

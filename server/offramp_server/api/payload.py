"""What a classify request holds, whichever way it was sent: its routing fields, and how its rows become inputs."""

import asyncio
import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson
from offramp_contract.errors import InvalidValue, MalformedRequest, TooLarge, UnsupportedBody
from offramp_contract.manifest import Manifest
from starlette.requests import Request

from offramp_server.api.bodies import read_body
from offramp_server.api.multipart import read_form
from offramp_server.context import ServerContext
from offramp_server.fields import fields_of_text
from offramp_server.inputs import inputs_of_lists, inputs_of_npy
from offramp_server.messages import Inputs
from offramp_server.preprocess import image_preprocessing, inputs_of_images, inputs_of_texts, text_preprocessing
from offramp_server.served import ServedModel

BODIES: Final = "application/json, image/*, multipart/form-data or application/x-npy"
KINDS: Final = ("inputs", "image", "text")
MAX_INLINE_BYTES: Final = 64 * 1024
"""Bodies up to this size are parsed on the event loop: a thread's hand-over costs more."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One request, read.

    Attributes:
        fields: The routing fields as they were written, typed.
        prepare: Makes the model's inputs; may be slow.
        is_slow: Whether `prepare` belongs on a worker thread.
    """

    fields: dict[str, Any]
    prepare: Callable[[], Inputs]
    is_slow: bool


async def read_payload(request: Request, context: ServerContext, served: ServedModel) -> Payload:
    """Read a classify request's body and fields.

    Raises:
        RequestError: One of its kinds, with a sentence that names the field.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    read = _reader(media_type, served.manifest)
    fields = _query_fields(request)
    body = await read_body(request, context.settings)
    if not body:
        raise MalformedRequest("body: it is empty", "body")
    call = _Call(body, content_type, fields, context, served)
    if len(body) <= MAX_INLINE_BYTES:
        return read(call)
    return await asyncio.get_running_loop().run_in_executor(context.workers, read, call)


@dataclass(frozen=True, slots=True)
class _Call:
    """A body that has been read whole, with what is needed to make sense of it."""

    body: bytes
    content_type: str
    fields: dict[str, Any]
    context: ServerContext
    served: ServedModel


def _reader(media_type: str, manifest: Manifest) -> Callable[[_Call], Payload]:
    if media_type == "application/json":
        return _read_json
    if media_type == "application/x-npy":
        return _read_npy
    if media_type.startswith("image/"):
        image_preprocessing(manifest)
        return _read_image
    if media_type == "multipart/form-data":
        image_preprocessing(manifest)
        return _read_multipart
    got = f"{media_type[:80]!r}" if media_type else "none"
    raise UnsupportedBody(f"content-type: must be {BODIES}; got {got}", "content-type")


def _query_fields(request: Request) -> dict[str, Any]:
    if not request.url.query:
        return {}
    written: dict[str, str] = {}
    for name, text in request.query_params.multi_items():
        if name in written:
            raise InvalidValue(f"{name[:80]}: it is given twice", name[:80])
        written[name] = text
    return fields_of_text(written)


def _read_json(call: _Call) -> Payload:
    try:
        document = orjson.loads(call.body)
    except orjson.JSONDecodeError:
        raise MalformedRequest("body: it is not valid JSON, or nested too deeply", "body") from None
    if not isinstance(document, dict):
        raise MalformedRequest("body: must be a JSON object", "body")
    given = [kind for kind in KINDS if document.get(kind) is not None]
    if len(given) != 1:
        field = given[1] if given else "inputs"
        raise InvalidValue(f"{field}: give exactly one of {', '.join(KINDS)}", field)
    written = document[given[0]]
    fields = _joined(call.fields, {name: value for name, value in document.items() if name not in KINDS})
    manifest, max_rows = call.served.manifest, call.context.settings.max_rows
    if given[0] == "inputs":
        return Payload(fields, lambda: inputs_of_lists(written, manifest, max_rows), len(call.body) > MAX_INLINE_BYTES)
    if given[0] == "image":
        image_preprocessing(manifest)
        return _image_payload(fields, [_of_base64(text) for text in _texts("image", written, max_rows)], call)
    text_preprocessing(manifest)
    texts = _texts("text", written, max_rows)
    return Payload(fields, lambda: inputs_of_texts(texts, call.served.bundle), is_slow=True)


def _read_npy(call: _Call) -> Payload:
    manifest, max_rows = call.served.manifest, call.context.settings.max_rows
    is_slow = len(call.body) > 16 * MAX_INLINE_BYTES
    return Payload(call.fields, lambda: inputs_of_npy(call.body, manifest, max_rows), is_slow)


def _read_image(call: _Call) -> Payload:
    return _image_payload(call.fields, [call.body], call)


def _read_multipart(call: _Call) -> Payload:
    form = read_form(call.body, call.content_type, call.context.settings.max_rows)
    if not form.images:
        raise InvalidValue("image: the form holds no part of this name", "image")
    return _image_payload(_joined(call.fields, fields_of_text(form.fields)), form.images, call)


def _image_payload(fields: dict[str, Any], images: list[bytes], call: _Call) -> Payload:
    manifest, max_pixels = call.served.manifest, call.context.settings.max_image_pixels
    return Payload(fields, lambda: inputs_of_images(images, manifest, max_pixels), is_slow=True)


def _joined(query: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    twice = next((name for name in body if name in query), None)
    if twice is not None:
        raise InvalidValue(f"{twice}: it is given twice, in the query and in the body", twice)
    return query | body


def _texts(field: str, written: object, max_rows: int) -> list[str]:
    texts = [written] if isinstance(written, str) else written
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidValue(f"{field}: must be a string or a list of at least one string", field)
    if len(texts) > max_rows:
        raise TooLarge(f"{field}: {len(texts)} rows are over the operator's limit of {max_rows} in one request", field)
    return texts


def _of_base64(text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedRequest("image: it is not valid base64", "image") from None

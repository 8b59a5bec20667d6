"""Reads request bodies within bounds: of size as sent, of size decoded, and of time."""

import asyncio
import time
import zlib
from typing import Final

from offramp_contract.errors import BodyTimeout, MalformedRequest, TooLarge, UnsupportedBody
from starlette.requests import ClientDisconnect, Request

from offramp_server.middleware import arrival_of
from offramp_server.settings import ServerSettings

# zlib's window bits: 16 more reads the gzip format. Clients send `deflate` both with zlib's header, as RFC 9110 says,
# and without.
_GZIP, _ZLIB, _RAW_DEFLATE = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
ENCODINGS: Final = ("gzip", "deflate")
MAX_GZIP_MEMBERS: Final = 16
"""A gzip file may be many files in a row; a body made of a million empty ones is an attack."""


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """Read a whole body and undo its Content-Encoding.

    Raises:
        TooLarge: If it is over `max_body_bytes` as sent or `max_decoded_bytes` decoded; the rest is not kept.
        BodyTimeout: If it has not arrived within `body_timeout_s`.
        UnsupportedBody: If its Content-Encoding is not one of `ENCODINGS`.
        MalformedRequest: If it is not what its Content-Encoding says.
        ClientDisconnect: If the client left.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", *ENCODINGS):
        raise UnsupportedBody(
            f"content-encoding: {encoding[:40]!r} is not read here; send identity, gzip or deflate", "content-encoding"
        )
    try:
        late_s = arrival_of(request.scope) + settings.body_timeout_s - time.monotonic()
        async with asyncio.timeout(late_s):
            body = await _read_bounded(request, settings.max_body_bytes)
    except TimeoutError:
        raise BodyTimeout(f"body: it did not arrive whole within {settings.body_timeout_s:g} s", "body") from None
    if encoding not in ENCODINGS:
        return body
    return await asyncio.to_thread(_decoded, body, encoding, settings.max_decoded_bytes)


async def _read_bounded(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise _over(limit)
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > limit:
            raise _over(limit)
        if chunk:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _over(limit: int) -> TooLarge:
    return TooLarge(f"body: it is over the operator's limit of {limit} bytes", "body")


def _decoded(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding == "gzip":
        window = _GZIP
    else:
        # A zlib header is a multiple of 31 whose low nibble names the method deflate.
        has_header = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
        window = _ZLIB if has_header else _RAW_DEFLATE
    parts: list[bytes] = []
    num_bytes, rest = 0, body
    for _ in range(MAX_GZIP_MEMBERS if encoding == "gzip" else 1):
        decoder = zlib.decompressobj(window)
        try:
            part = decoder.decompress(rest, limit + 1 - num_bytes)
        except zlib.error:
            raise MalformedRequest(f"body: it is not valid {encoding}", "body") from None
        num_bytes += len(part)
        parts.append(part)
        if num_bytes > limit:
            raise TooLarge(f"body: decoded it is over the operator's limit of {limit} bytes", "body")
        if not decoder.eof:
            raise MalformedRequest(f"body: its {encoding} stream is cut off", "body")
        rest = decoder.unused_data
        if not rest:
            return parts[0] if len(parts) == 1 else b"".join(parts)
    raise MalformedRequest(f"body: bytes follow its {encoding} stream", "body")

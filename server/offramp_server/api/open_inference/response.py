"""Writes an inference answer: JSON, the binary tensors behind it, and compression where the client asks for it."""

import asyncio
import gzip
import zlib
from collections.abc import Sequence
from typing import Any, Final

import orjson
from starlette.responses import Response

from offramp_server.api.open_inference.request import RequestedOutput
from offramp_server.api.open_inference.tensors import OutputTensor

LEAST_COMPRESSED_BYTES: Final = 1024
"""Shorter answers fit a packet or two as they are."""
MAX_INLINE_BYTES: Final = 64 * 1024
COMPRESSION_LEVEL: Final = 1


def answer_parts(
    head: dict[str, Any], requested: Sequence[RequestedOutput], tensors: Sequence[OutputTensor]
) -> tuple[bytes, int | None]:
    """Give an answer's body and, if it holds binary data, where that begins.

    Args:
        head: The document, which gets its outputs here.
        requested: How each tensor is to come.
        tensors: One per requested output.
    """
    outputs, data = [], []
    for output, tensor in zip(requested, tensors, strict=True):
        written: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if output.is_binary:
            data.append(tensor.to_binary())
            written["parameters"] = {"binary_data_size": len(data[-1])}
        else:
            written["data"] = tensor.to_json()
        outputs.append(written)
    head["outputs"] = outputs
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([text, *data]), len(text)) if data else (text, None)


async def infer_response(
    body: bytes, json_length: int | None, headers: dict[str, str], accept_encoding: str
) -> Response:
    """Answer with a body, compressed if the client would rather have it so and it is long enough to gain by it."""
    if len(body) > MAX_INLINE_BYTES and chosen_encoding(accept_encoding) is not None:
        body, stated = await asyncio.to_thread(coded, body, json_length, accept_encoding)
    else:
        body, stated = coded(body, json_length, accept_encoding)
    return Response(body, 200, headers | stated)


def coded(body: bytes, json_length: int | None, accept_encoding: str) -> tuple[bytes, dict[str, str]]:
    """Give a body as it is sent, and the headers that say how to read it."""
    if json_length is None:
        headers = {"content-type": "application/json"}
    else:
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(json_length)}
    encoding = chosen_encoding(accept_encoding) if len(body) >= LEAST_COMPRESSED_BYTES else None
    if encoding is None:
        return body, headers
    return _compressed(body, encoding), headers | {"content-encoding": encoding, "vary": "accept-encoding"}


def chosen_encoding(accept_encoding: str) -> str | None:
    """Choose of gzip and deflate the one that an Accept-Encoding prefers; None if it names neither."""
    weights = {"gzip": 0.0, "deflate": 0.0}
    for offer in accept_encoding.lower().split(","):
        name, _, weight = offer.partition(";")
        if name.strip() in weights:
            weights[name.strip()] = _weight(weight)
    best = max(weights, key=lambda name: weights[name])
    return best if weights[best] > 0 else None


def _weight(written: str) -> float:
    name, _, value = written.strip().partition("=")
    if not name:
        return 1.0
    try:
        return float(value) if name.strip() == "q" else 0.0
    except ValueError:
        return 0.0


def _compressed(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.compress(body, COMPRESSION_LEVEL, mtime=0)
    return zlib.compress(body, COMPRESSION_LEVEL)

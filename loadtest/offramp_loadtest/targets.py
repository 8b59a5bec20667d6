"""How a payload is asked and its answer read: over Offramp's own API, or over the Open Inference Protocol."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlencode

import numpy as np
import orjson

from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.payloads import Payload

Api = Literal["v1", "v2"]
Body = Literal["binary", "json"]
DTYPES = {
    "FP32": "float32",
    "FP16": "float16",
    "FP64": "float64",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
JSON_TYPE = "application/json"


@dataclass(frozen=True, slots=True)
class Request:
    """One encoded request."""

    path: str
    headers: dict[str, str]
    body: bytes
    method: Literal["GET", "POST"] = "POST"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered about one row; None where it does not tell.

    Attributes:
        class_id: The predicted class.
        exit: Name of the exit that answered.
        reason: Why there.
        forced: Whether the deadline forced it.
        depth: Share of the full path's FLOPs.
        queue_ms: Time it waited in the server.
        compute_ms: Time its stages ran.
        gear: How far the load had moved the server down its operating points.
    """

    class_id: int | None
    exit: str | None = None
    reason: str | None = None
    forced: bool | None = None
    depth: float | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None
    gear: int | None = None


class Target(Protocol):
    """One way to ask a server."""

    def encode(self, payload: Payload) -> Request:
        """Write the request for a payload."""

    def decode(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Read a successful answer.

        Raises:
            ValueError, KeyError, TypeError, LookupError: If it is not what the API promises.
        """


@dataclass(frozen=True, slots=True)
class ClassifyTarget:
    """Offramp's `/v1` classification.

    Attributes:
        model: The model's name; None asks the default one.
        fields: Routing fields of each request, such as `policy` and `latency_ms`.
        body: `binary` sends an image as it is and an array as `.npy`, with the routing in the query.
    """

    model: str | None
    fields: Mapping[str, Any]
    body: Body = "binary"

    def encode(self, payload: Payload) -> Request:
        """Write the request for a payload."""
        path = "/v1/classify" if self.model is None else f"/v1/models/{quote(self.model)}/classify"
        fields = {**self.fields, **payload.fields}
        if self.body == "json":
            return Request(path, {"content-type": JSON_TYPE}, orjson.dumps({**_inputs(payload), **fields}))
        query = f"?{urlencode({name: _text(value) for name, value in fields.items()})}" if fields else ""
        if payload.image is not None:
            return Request(path + query, {"content-type": payload.content_type}, payload.image)
        return Request(path + query, {"content-type": "application/x-npy"}, payload.npy())

    def decode(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Read the one prediction."""
        written = orjson.loads(body)
        prediction, timing = written["predictions"][0], written["timing"]
        at, gear = prediction["exit"], written.get("policy", {}).get("gear")
        return Answer(
            class_id=int(prediction["class_id"]),
            exit=str(at["name"]),
            reason=str(at["reason"]),
            forced=bool(at["forced"]),
            depth=float(prediction["depth"]),
            queue_ms=float(timing["queue_ms"]),
            compute_ms=float(timing["compute_ms"]),
            gear=None if gear is None else int(gear),
        )


@dataclass(frozen=True, slots=True)
class OpenInferenceTarget:
    """Any server of the Open Inference Protocol.

    Attributes:
        model: The model's name.
        input: Name of its one input.
        datatype: What that input takes, such as `FP32`; arrays are converted to it.
        fields: Routing fields, sent as request parameters; a server without routing ignores or refuses them.
        body: `binary` uses the binary tensor extension, both ways.
    """

    model: str
    input: str
    datatype: str
    fields: Mapping[str, Any]
    body: Body = "binary"

    def encode(self, payload: Payload) -> Request:
        """Write one tensor: behind its JSON header, or inside it."""
        if payload.array is None:
            raise LoadTestError("data: /v2 takes arrays, not encoded images; give an .npz")
        dtype = DTYPES.get(self.datatype)
        if dtype is None:
            raise LoadTestError(f"model: its input takes {self.datatype}, and only {', '.join(DTYPES)} can be sent")
        array = np.ascontiguousarray(payload.array[None], dtype=dtype)
        tensor: dict[str, Any] = {"name": self.input, "shape": list(array.shape), "datatype": self.datatype}
        parameters = {name: _flat(value) for name, value in {**self.fields, **payload.fields}.items()}
        path = f"/v2/models/{quote(self.model)}/infer"
        if self.body == "json":
            tensor["data"] = array.ravel().tolist()
            document = {"inputs": [tensor]} | ({"parameters": parameters} if parameters else {})
            return Request(path, {"content-type": JSON_TYPE}, orjson.dumps(document))
        tensor["parameters"] = {"binary_data_size": array.nbytes}
        header = orjson.dumps({"inputs": [tensor], "parameters": {**parameters, "binary_data_output": True}})
        headers = {"inference-header-content-length": str(len(header)), "content-type": "application/octet-stream"}
        return Request(path, headers, header + array.tobytes())

    def decode(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Read the class and, where the server offers them, exit and depth."""
        outputs = _tensors(headers, body)
        logits = next((outputs[name] for name in ("logits", "output", "probabilities") if name in outputs), None)
        if "class_id" in outputs:
            class_id = int(outputs["class_id"].ravel()[0])
        else:
            scores = logits if logits is not None else next(iter(outputs.values()))
            class_id = int(np.asarray(scores).ravel().argmax())
        exit_index, depth = outputs.get("exit_index"), outputs.get("depth")
        reason = outputs.get("exit_reason")
        named = None if reason is None else str(reason.ravel()[0])
        gear = headers.get("x-gear")
        return Answer(
            class_id=class_id,
            exit=None if exit_index is None else f"exit_{int(exit_index.ravel()[0])}",
            reason=named,
            forced=None if named is None else named == "deadline",
            depth=None if depth is None else float(depth.ravel()[0]),
            queue_ms=_number(headers.get("x-queue-time-ms")),
            compute_ms=_number(headers.get("x-compute-time-ms")),
            gear=None if gear is None else int(gear),
        )


def broken(request: Request) -> tuple[Request, ...]:
    """Give requests like this one that no server should accept: a cut body, a strange type, an empty body."""
    cut = request.body[: len(request.body) // 2]
    strange = {**request.headers, "content-type": "application/x-strange"}
    strange.pop("inference-header-content-length", None)
    return (
        replace(request, body=cut),
        replace(request, body=b"\x00" * 16, headers=strange),
        replace(request, body=b""),
    )


def _inputs(payload: Payload) -> dict[str, Any]:
    if payload.image is not None:
        return {"image": base64.b64encode(payload.image).decode()}
    return {"inputs": np.asarray(payload.array)[None].tolist()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(value: Any) -> Any:
    """Give a parameter as the protocol has it: a string, a number or a truth."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _tensors(headers: Mapping[str, str], body: bytes) -> dict[str, np.ndarray]:
    length = headers.get("inference-header-content-length")
    header = orjson.loads(body if length is None else body[: int(length)])
    place = len(body) if length is None else int(length)
    tensors: dict[str, np.ndarray] = {}
    for output in header["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        raw = None if size is None else body[place : place + size]
        place += size or 0
        tensors[output["name"]] = _tensor(output, raw)
    return tensors


def _tensor(output: Mapping[str, Any], raw: bytes | None) -> np.ndarray:
    if raw is None:
        return np.asarray(output["data"])
    if output["datatype"] == "BYTES":
        return np.array(_strings(raw))
    return np.frombuffer(raw, dtype=DTYPES[output["datatype"]]).reshape(output["shape"])


def _strings(raw: bytes) -> list[str]:
    strings, place = [], 0
    while place < len(raw):
        length = int.from_bytes(raw[place : place + 4], "little")
        strings.append(raw[place + 4 : place + 4 + length].decode())
        place += 4 + length
    return strings

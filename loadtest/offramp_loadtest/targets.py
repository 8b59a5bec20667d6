"""How a payload is asked and its answer read: over Offramp's own API, or over the Open Inference Protocol."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlencode

import numpy as np

from offramp_loadtest.errors import LoadTestError
from offramp_loadtest.payloads import Payload

Api = Literal["v1", "v2"]
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


@dataclass(frozen=True, slots=True)
class Request:
    """One encoded request."""

    path: str
    headers: dict[str, str]
    body: bytes


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
    """

    class_id: int | None
    exit: str | None = None
    reason: str | None = None
    forced: bool = False
    depth: float | None = None
    queue_ms: float | None = None
    compute_ms: float | None = None


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
    """

    model: str | None
    fields: Mapping[str, str]

    def encode(self, payload: Payload) -> Request:
        """Write an image as it is and an array as `.npy`; the routing goes into the query."""
        path = "/v1/classify" if self.model is None else f"/v1/models/{quote(self.model)}/classify"
        query = f"?{urlencode(self.fields)}" if self.fields else ""
        if payload.image is not None:
            return Request(path + query, {"content-type": payload.content_type}, payload.image)
        return Request(path + query, {"content-type": "application/x-npy"}, payload.npy())

    def decode(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Read the one prediction."""
        written = json.loads(body)
        prediction, timing = written["predictions"][0], written["timing"]
        at = prediction["exit"]
        return Answer(
            class_id=int(prediction["class_id"]),
            exit=str(at["name"]),
            reason=str(at["reason"]),
            forced=bool(at["forced"]),
            depth=float(prediction["depth"]),
            queue_ms=float(timing["queue_ms"]),
            compute_ms=float(timing["compute_ms"]),
        )


@dataclass(frozen=True, slots=True)
class OpenInferenceTarget:
    """Any server of the Open Inference Protocol, through the binary tensor extension.

    Attributes:
        model: The model's name.
        input: Name of its one input.
        datatype: What that input takes, such as `FP32`; arrays are converted to it.
        fields: Routing fields, sent as request parameters; a server without routing ignores or refuses them.
    """

    model: str
    input: str
    datatype: str
    fields: Mapping[str, str]

    def encode(self, payload: Payload) -> Request:
        """Write one binary tensor behind its JSON header."""
        if payload.array is None:
            raise LoadTestError("data: /v2 takes arrays, not encoded images; give an .npz")
        dtype = DTYPES.get(self.datatype)
        if dtype is None:
            raise LoadTestError(f"model: its input takes {self.datatype}, and only {', '.join(DTYPES)} can be sent")
        array = np.ascontiguousarray(payload.array[None], dtype=dtype)
        tensor = {
            "name": self.input,
            "shape": list(array.shape),
            "datatype": self.datatype,
            "parameters": {"binary_data_size": array.nbytes},
        }
        parameters = {**self.fields, "binary_data_output": True}
        header = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
        headers = {"inference-header-content-length": str(len(header)), "content-type": "application/octet-stream"}
        return Request(f"/v2/models/{quote(self.model)}/infer", headers, header + array.tobytes())

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
        return Answer(
            class_id=class_id,
            exit=None if exit_index is None else f"exit_{int(exit_index.ravel()[0])}",
            reason=named,
            forced=named == "deadline",
            depth=None if depth is None else float(depth.ravel()[0]),
        )


def _tensors(headers: Mapping[str, str], body: bytes) -> dict[str, np.ndarray]:
    length = headers.get("inference-header-content-length")
    header = json.loads(body if length is None else body[: int(length)])
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

"""Reads an inference request: its JSON, the binary data behind it, and the routing among its parameters.

What the JSON says is one thing, its `Wording`, and the bytes of the tensors another: clients send the same words again
and again with other bytes behind them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson
from offramp_contract.errors import InvalidValue, MalformedRequest, TooLarge
from offramp_contract.manifest import Manifest, Tensor

from offramp_server.api.open_inference.tensors import DATATYPES, tensor_of_binary, tensor_of_json
from offramp_server.fields import FIELDS, fields_of_text

ROUTING_PARAMETERS: Final = tuple(name for name in FIELDS if name not in ("top_k", "explain"))
"""The fields of `/v1` but those that shape its JSON answer."""


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a request asks for.

    Attributes:
        num_classes: How many leading classes to give instead of the tensor (classification extension); 0 gives it.
    """

    name: str
    is_binary: bool
    num_classes: int = 0


@dataclass(frozen=True, slots=True)
class BinaryInput:
    """Where in the body an input's binary data is.

    Attributes:
        tensor: The input.
        shape: With the batch axis.
        start: Its first byte.
        end: The byte behind its last.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: int
    end: int

    def array(self, body: bytes) -> np.ndarray:
        """Give its values; see `tensor_of_binary`."""
        data = memoryview(body)[self.start : self.end]
        return tensor_of_binary(data, self.tensor.dtype, self.shape, f"inputs.{self.tensor.name}")


@dataclass(frozen=True, slots=True)
class JsonInput:
    """An input whose values are in the JSON itself."""

    tensor: Tensor
    values: np.ndarray

    def array(self, body: bytes) -> np.ndarray:
        """Give its values."""
        return self.values


@dataclass(frozen=True, slots=True)
class Wording:
    """What the JSON of an inference request says, read but not yet checked against what the model can honour.

    Attributes:
        inputs: The inputs, each once.
        outputs: What is asked for; empty if nothing is named.
        is_binary: How outputs come that do not say.
        fields: The routing fields, typed.
        timeout_us: The protocol's own deadline, in microseconds; None if there is none.
    """

    id: str | None
    inputs: tuple[BinaryInput | JsonInput, ...]
    outputs: tuple[RequestedOutput, ...]
    is_binary: bool
    fields: dict[str, Any]
    timeout_us: int | None

    @property
    def num_rows(self) -> int:
        """The rows that the first input says it has; checked against the others once the arrays are read."""
        first = self.inputs[0]
        return first.shape[0] if isinstance(first, BinaryInput) else len(first.values)

    @property
    def is_repeatable(self) -> bool:
        """Whether other requests may well have the same words: nothing in them is one request's own."""
        return self.id is None and all(isinstance(one, BinaryInput) for one in self.inputs)

    def arrays(self, body: bytes) -> dict[str, np.ndarray]:
        """Give the tensors by input name, from a body as long as that which these words were read from."""
        return {one.tensor.name: one.array(body) for one in self.inputs}


def read_wording(text: bytes, num_bytes: int, manifest: Manifest, max_rows: int) -> Wording:
    """Read the JSON of an inference request.

    Args:
        text: The JSON.
        num_bytes: Length of the whole body, its Content-Encoding undone.
        manifest: The model that is asked.
        max_rows: The operator's limit.

    Raises:
        MalformedRequest: If it is not what the protocol says a request is.
        InvalidValue: Naming the field, if a value is not one that can be honoured.
        TooLarge: If there are more than `max_rows` rows.
    """
    document = read_document(text)
    request_id = document.get("id")
    if not isinstance(request_id, str | None):
        raise MalformedRequest("id: must be a string", "id")
    parameters = _parameters(document, "parameters")
    is_binary = _boolean(parameters, "binary_data_output", "parameters")
    inputs = _read_inputs(document.get("inputs"), len(text), num_bytes, manifest, max_rows)
    outputs = _read_outputs(document.get("outputs"), is_binary)
    return Wording(request_id, inputs, outputs, is_binary, _routing_fields(parameters), _timeout(parameters))


def read_document(text: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MalformedRequest: If it is not one.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise MalformedRequest("body: it is not valid JSON, or nested too deeply", "body") from None
    if not isinstance(document, dict):
        raise MalformedRequest("body: must be a JSON object", "body")
    return document


def json_length_of(header: str | None, num_bytes: int) -> int:
    """Read the header `Inference-Header-Content-Length`: where in a body the JSON ends and binary data begins.

    Raises:
        MalformedRequest: If it is no length within the body.
    """
    if header is None:
        return num_bytes
    field = "inference-header-content-length"
    if not (header.isascii() and header.isdecimal() and len(header) < 20 and 0 < int(header) <= num_bytes):
        raise MalformedRequest(f"{field}: must be an integer from 1 to the body's {num_bytes} bytes", field)
    return int(header)


def _read_inputs(
    written: object, offset: int, num_bytes: int, manifest: Manifest, max_rows: int
) -> tuple[BinaryInput | JsonInput, ...]:
    tensors = {tensor.name: tensor for tensor in manifest.inputs}
    inputs: dict[str, BinaryInput | JsonInput] = {}
    for entry in _objects(written, "inputs"):
        name = entry.get("name")
        tensor = tensors.get(name) if isinstance(name, str) else None
        if tensor is None:
            got = f"{name[:80]!r}" if isinstance(name, str) else "no name"
            raise InvalidValue(f"inputs: this model reads {', '.join(tensors)}; got {got}", "inputs")
        if tensor.name in inputs:
            raise InvalidValue(f"inputs: {tensor.name!r} is given twice", "inputs")
        one = inputs[tensor.name] = _read_input(entry, tensor, offset, num_bytes, max_rows)
        if isinstance(one, BinaryInput):
            offset = one.end
    if offset != num_bytes:
        raise MalformedRequest(f"body: {num_bytes - offset} bytes follow the last input's binary data", "body")
    return tuple(inputs.values())


def _read_input(
    entry: Mapping[str, Any], tensor: Tensor, offset: int, num_bytes: int, max_rows: int
) -> BinaryInput | JsonInput:
    """Read one input, whose binary data would begin at an offset."""
    field = f"inputs.{tensor.name}"
    expected = DATATYPES[tensor.dtype]
    if entry.get("datatype") != expected:
        raise InvalidValue(f"{field}.datatype: must be {expected}", f"{field}.datatype")
    shape = _shape(entry.get("shape"), tensor, field, max_rows)
    parameters = _parameters(entry, field)
    _refuse_shared_memory(parameters, field)
    size = parameters.get("binary_data_size")
    if (size is None) == ("data" not in entry):
        raise InvalidValue(f"{field}: give either data or parameters.binary_data_size", field)
    if size is None:
        return JsonInput(tensor, tensor_of_json(entry["data"], tensor.dtype, shape, field))
    return BinaryInput(tensor, shape, offset, offset + _size(size, offset, num_bytes, field))


def _size(written: object, offset: int, num_bytes: int, field: str) -> int:
    field = f"{field}.parameters.binary_data_size"
    if not isinstance(written, int) or isinstance(written, bool) or written < 0:
        raise InvalidValue(f"{field}: must be an integer of at least 0", field)
    if written > num_bytes - offset:
        raise MalformedRequest(
            f"{field}: {written} bytes are claimed, and {num_bytes - offset} are left in the body behind the JSON "
            "(whose length inference-header-content-length gives) and the inputs before",
            field,
        )
    return written


def _shape(written: object, tensor: Tensor, field: str, max_rows: int) -> tuple[int, ...]:
    field = f"{field}.shape"
    row = list(tensor.shape)
    is_shape = isinstance(written, list) and all(type(size) is int for size in written)
    if not isinstance(written, list) or not is_shape or written[1:] != row or not written or written[0] < 1:
        wanted = ", ".join(["rows", *map(str, row)])
        got = f"; got {written}" if isinstance(written, list) and is_shape and len(written) <= 16 else ""
        raise InvalidValue(f"{field}: must be [{wanted}] with at least one row{got}", field)
    if written[0] > max_rows:
        raise TooLarge(f"{field}: {written[0]} rows are over the operator's limit of {max_rows} in one request", field)
    return tuple(written)


def _read_outputs(written: object, is_binary: bool) -> tuple[RequestedOutput, ...]:
    outputs: dict[str, RequestedOutput] = {}
    for entry in [] if written is None else _objects(written, "outputs"):
        name = entry.get("name")
        if not isinstance(name, str):
            raise MalformedRequest("outputs: each must have a name", "outputs")
        if name in outputs:
            raise InvalidValue(f"outputs: {name[:80]!r} is asked for twice", "outputs")
        field = f"outputs.{name[:80]}"
        parameters = _parameters(entry, field)
        _refuse_shared_memory(parameters, field)
        num_classes = parameters.get("classification", 0)
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise InvalidValue(f"{field}.parameters.classification: must be an integer of at least 0", field)
        outputs[name] = RequestedOutput(
            name, _boolean(parameters, "binary_data", f"{field}.parameters", is_binary), num_classes
        )
    return tuple(outputs.values())


def _routing_fields(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the routing fields; text stands for what it says, as in a query."""
    if parameters.get("sequence_id") not in (None, 0, ""):
        raise InvalidValue("parameters.sequence_id: the models here keep nothing between requests", "sequence_id")
    given = {name: value for name, value in parameters.items() if name not in _PROTOCOL_PARAMETERS}
    unknown = next((name for name in given if name not in ROUTING_PARAMETERS), None)
    if unknown is not None:
        raise InvalidValue(
            f"parameters.{unknown[:80]}: there is no such parameter; those that route are "
            f"{', '.join(ROUTING_PARAMETERS)}",
            unknown[:80],
        )
    texts = {name: value for name, value in given.items() if isinstance(value, str)}
    return given | fields_of_text(texts)


def _timeout(parameters: Mapping[str, Any]) -> int | None:
    timeout = parameters.get("timeout", 0)
    if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
        raise InvalidValue("parameters.timeout: must be an integer of at least 0, in microseconds", "timeout")
    return timeout or None


_PROTOCOL_PARAMETERS: Final = frozenset(
    {"timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"}
)
"""Parameters that are the protocol's own. Rows are ordered by deadline, so `priority` changes nothing."""


def _objects(written: object, field: str) -> list[dict[str, Any]]:
    if not isinstance(written, list) or not all(isinstance(entry, dict) for entry in written):
        raise MalformedRequest(f"{field}: must be a list of objects", field)
    return written


def _parameters(entry: Mapping[str, Any], field: str) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        name = field if field == "parameters" else f"{field}.parameters"
        raise MalformedRequest(f"{name}: must be an object", name)
    return parameters


def _boolean(parameters: Mapping[str, Any], name: str, field: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidValue(f"{field}.{name}: must be true or false", f"{field}.{name}")
    return value


def _refuse_shared_memory(parameters: Mapping[str, Any], field: str) -> None:
    if "shared_memory_region" in parameters:
        raise InvalidValue(f"{field}: shared memory is not offered; send the data itself", field)

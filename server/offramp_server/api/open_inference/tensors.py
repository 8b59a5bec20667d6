"""The tensors of the Open Inference Protocol: numpy's types by their names there, as JSON and as binary data.

Binary tensors are little-endian, row after row, without padding; an element of BYTES is its length in 4 bytes and then
itself. Nothing here allocates what a request merely claims: sizes are compared before arrays are made.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
from offramp_contract.errors import InvalidValue

DATATYPES: Final = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
"""The protocol's name of each type that a model's inputs and outputs can have; text is BYTES."""

BYTES: Final = "BYTES"

# Looked up by the type itself: numpy spells a type's name anew, in Python, whenever it is asked for.
_NAME_OF: Final = {np.dtype(dtype): name for dtype, name in DATATYPES.items()}
_LITTLE_ENDIAN: Final = {dtype: np.dtype(dtype).newbyteorder("<") for dtype in DATATYPES}

_JSON_TYPES: Final[dict[str, set[type]]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}}
_JSON_NAMES: Final = {"f": "numbers", "i": "integers", "u": "integers", "b": "true and false"}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of an answer.

    Attributes:
        values: An array of a type in `DATATYPES`; for BYTES the elements, row after row.
    """

    name: str
    shape: tuple[int, ...]
    values: np.ndarray | Sequence[bytes]

    @property
    def datatype(self) -> str:
        """The protocol's name of its type."""
        return _NAME_OF[self.values.dtype] if isinstance(self.values, np.ndarray) else BYTES

    def to_json(self) -> Any:
        """Give its values flat, as orjson writes them."""
        if isinstance(self.values, np.ndarray):
            return np.ascontiguousarray(self.values).reshape(-1)
        return [value.decode() for value in self.values]

    def to_binary(self) -> bytes:
        """Give its values as binary data."""
        if isinstance(self.values, np.ndarray):
            return self.values.tobytes()
        return b"".join(struct.pack("<I", len(value)) + value for value in self.values)


def tensor_of_json(data: object, dtype: str, shape: tuple[int, ...], field: str) -> np.ndarray:
    """Read a tensor from JSON, flat or nested as its shape says.

    Raises:
        InvalidValue: If there are more or fewer numbers than the shape says, or of another type.
    """
    if not isinstance(data, list):
        raise InvalidValue(f"{field}.data: must be a list", f"{field}.data")
    flat = _flattened(data, shape, field) if data and isinstance(data[0], list) else data
    if len(flat) != math.prod(shape):
        raise InvalidValue(
            f"{field}.data: shape {list(shape)} needs {math.prod(shape)} values; got {len(flat)}", f"{field}.data"
        )
    kind = np.dtype(dtype).kind
    if not set(map(type, flat)) <= _JSON_TYPES[kind]:
        raise InvalidValue(f"{field}.data: {DATATYPES[dtype]} data must be {_JSON_NAMES[kind]}", f"{field}.data")
    try:
        with np.errstate(over="ignore"):  # what overflows becomes infinite, which is refused with the other values
            return np.array(flat, dtype=dtype).reshape(shape)
    except OverflowError:
        raise InvalidValue(f"{field}.data: a number does not fit {DATATYPES[dtype]}", f"{field}.data") from None


def tensor_of_binary(data: memoryview, dtype: str, shape: tuple[int, ...], field: str) -> np.ndarray:
    """Read a tensor from binary data, as a view of it wherever its alignment allows.

    Args:
        data: Its bytes and no others.
        dtype: numpy's name of its type.
        shape: With the batch axis.
        field: For messages.

    Raises:
        InvalidValue: If the shape needs more or fewer bytes, or BOOL data holds something else than 0 and 1.
    """
    kind = _LITTLE_ENDIAN[dtype]
    num_bytes = math.prod(shape) * kind.itemsize
    if num_bytes != len(data):
        name = f"{field}.parameters.binary_data_size"
        raise InvalidValue(
            f"{name}: {DATATYPES[dtype]} of shape {list(shape)} takes {num_bytes} bytes; got {len(data)}", name
        )
    if kind.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise InvalidValue(f"{field}: BOOL data must be the bytes 0 and 1", field)
    view = np.frombuffer(data, kind).reshape(shape)
    # Where the JSON before it ends is chance; vector instructions want numbers at multiples of their size.
    return view if view.flags.aligned else view.copy()


def _flattened(data: list[Any], shape: tuple[int, ...], field: str) -> list[Any]:
    """Undo the nesting, level by level, each list as long as the shape says."""
    parts: list[Any] = [data]
    for size in shape:
        if not all(isinstance(part, list) and len(part) == size for part in parts):
            raise InvalidValue(f"{field}.data: must be nested as its shape {list(shape)} says", f"{field}.data")
        parts = list(chain.from_iterable(parts))
    return parts

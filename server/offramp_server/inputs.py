"""Turns what a request holds into the model's inputs: nested lists, arrays and .npy files against the manifest.

What may become what: integers become any number type wide enough for their values, floating-point numbers become
floating-point numbers (rounded to the model's precision), and booleans become booleans only. Nothing else is converted.

Shapes: R = rows of the request; a tensor is (R, *shape), where `shape` is the manifest's shape of one row.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from offramp_contract.errors import InvalidValue, MalformedRequest, TooLarge
from offramp_contract.manifest import Manifest, Tensor

from offramp_server.messages import Inputs

MAX_NPY_HEADER_BYTES = 4096
_LEAF_TYPES: dict[str, set[type]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}}


def inputs_of_lists(written: object, manifest: Manifest, max_rows: int) -> Inputs:
    """Read the `inputs` of a JSON body: nested lists, or a dict of them for a model with several inputs.

    Args:
        written: One row or a batch of rows, as JSON gives them.
        manifest: What the model reads.
        max_rows: The operator's limit.

    Raises:
        InvalidValue: Naming the input, what it must be and what it is.
        TooLarge: If there are more than `max_rows` rows.
    """
    by_name = _by_name(written, manifest)
    arrays = {tensor.name: _array_of_lists(by_name[tensor.name], tensor, max_rows) for tensor in manifest.inputs}
    return conform(arrays, manifest, max_rows)


def inputs_of_npy(body: bytes, manifest: Manifest, max_rows: int) -> Inputs:
    """Read an .npy file as the model's one input, with or without the batch axis.

    Raises:
        MalformedRequest: If it is not an .npy file, or its header claims another size than it has.
        InvalidValue: If the model reads several inputs, or the array is not what it reads.
        TooLarge: If there are more than `max_rows` rows.
    """
    if len(manifest.inputs) != 1:
        names = ", ".join(tensor.name for tensor in manifest.inputs)
        raise InvalidValue(f"inputs: this model reads {names}; an .npy body holds one array, so send JSON", "inputs")
    return conform({manifest.inputs[0].name: array_of_npy(body)}, manifest, max_rows, allow_single=True)


def conform(
    arrays: Mapping[str, np.ndarray], manifest: Manifest, max_rows: int, *, allow_single: bool = False
) -> Inputs:
    """Check arrays against the manifest and convert them, without a copy where they already fit.

    Args:
        arrays: By input name; exactly the manifest's inputs.
        manifest: What the model reads.
        max_rows: The operator's limit.
        allow_single: Take an array without the batch axis for one row.

    Raises:
        InvalidValue: Naming the input, what it must be and what it is.
        TooLarge: If there are more than `max_rows` rows.
    """
    if set(arrays) != {tensor.name for tensor in manifest.inputs}:
        names = ", ".join(tensor.name for tensor in manifest.inputs)
        raise InvalidValue(f"inputs: must be exactly {names}; got {', '.join(arrays) or 'none'}", "inputs")
    inputs = {
        tensor.name: _conform_one(arrays[tensor.name], tensor, _field(tensor, manifest), max_rows, allow_single)
        for tensor in manifest.inputs
    }
    counts = {len(array) for array in inputs.values()}
    if len(counts) > 1:
        raise InvalidValue(f"inputs: all inputs need the same number of rows; got {sorted(counts)}", "inputs")
    return inputs


def array_of_npy(body: bytes) -> np.ndarray:
    """Read an .npy file without copying its data and without trusting its header.

    Nothing is unpickled, and nothing is allocated before the claimed size has been compared with the body's.

    Returns:
        A read-only array over the body, in the file's own shape, dtype and byte order.

    Raises:
        MalformedRequest: If it is not an .npy file of numbers, or its header claims another size than it has.
    """
    stream = io.BytesIO(body)
    try:
        version = npy_format.read_magic(stream)
        read_header = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read_header(stream, max_header_size=MAX_NPY_HEADER_BYTES)
    except Exception:  # numpy parses the header as Python source: what its parts raise on garbage is unbounded
        raise MalformedRequest("inputs: the body is not an .npy file of version 1.0 or 2.0", "inputs") from None
    if dtype.kind not in "biuf":
        raise MalformedRequest("inputs: an .npy array must hold numbers or booleans; objects are never read", "inputs")
    offset = stream.tell()
    claimed, held = math.prod(shape) * dtype.itemsize, len(body) - offset
    if any(side < 0 for side in shape) or claimed != held:
        raise MalformedRequest(
            f"inputs: the .npy header claims {claimed} bytes of data and the body holds {held}", "inputs"
        )
    flat = np.frombuffer(body, dtype=dtype, offset=offset)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _field(tensor: Tensor, manifest: Manifest) -> str:
    return "inputs" if len(manifest.inputs) == 1 else f"inputs.{tensor.name}"


def _by_name(written: object, manifest: Manifest) -> Mapping[str, Any]:
    names = [tensor.name for tensor in manifest.inputs]
    if isinstance(written, dict):
        if set(written) != set(names):
            raise InvalidValue(f"inputs: must name exactly {', '.join(names)}", "inputs")
        return written
    if len(names) > 1:
        raise InvalidValue(f"inputs: this model reads {', '.join(names)}; give an object with these names", "inputs")
    return {names[0]: written}


def _array_of_lists(written: object, tensor: Tensor, max_rows: int) -> np.ndarray:
    field, depth = "inputs", _nesting(written)
    if depth == len(tensor.shape):
        written = [written]
    elif depth != len(tensor.shape) + 1:
        raise InvalidValue(
            f"{field}: must be nested lists of shape {_shape(tensor)} for one row or (rows, …) for several; "
            f"got {depth} levels of lists",
            field,
        )
    if not isinstance(written, list) or not written:
        raise InvalidValue(f"{field}: must hold at least one row", field)
    if len(written) > max_rows:
        raise _too_many_rows(field, len(written), max_rows)
    leaves: list[Any] = []
    allowed = _LEAF_TYPES[np.dtype(tensor.dtype).kind]
    _flatten(written, (len(written), *tensor.shape), leaves, allowed, tensor)
    dtype = np.float64 if np.dtype(tensor.dtype).kind == "f" else np.dtype(tensor.dtype)
    try:
        flat = np.array(leaves, dtype=dtype)
    except (OverflowError, ValueError):
        raise InvalidValue(f"{field}: a number does not fit {tensor.dtype}", field) from None
    return flat.reshape(len(written), *tensor.shape)


def _nesting(written: object) -> int:
    depth = 0
    while isinstance(written, list):
        depth += 1
        written = written[0] if written else None
    return depth


def _flatten(written: object, shape: tuple[int, ...], leaves: list[Any], allowed: set[type], tensor: Tensor) -> None:
    if not isinstance(written, list) or len(written) != shape[0]:
        got = f"a list of {len(written)}" if isinstance(written, list) else _json_type(written)
        raise InvalidValue(
            f"inputs: each row must be nested lists of shape {_shape(tensor)}; got {got} where a list of "
            f"{shape[0]} belongs",
            "inputs",
        )
    if len(shape) > 1:
        for part in written:
            _flatten(part, shape[1:], leaves, allowed, tensor)
        return
    wrong = set(map(type, written)) - allowed
    if wrong:
        got = " and ".join(sorted(_json_type(kind()) for kind in wrong))
        raise InvalidValue(f"inputs: must hold numbers that fit {tensor.dtype}; got {got}", "inputs")
    leaves.extend(written)


def _json_type(value: object) -> str:
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a fraction",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))}{',' if len(tensor.shape) == 1 else ''})"


def _too_many_rows(field: str, num_rows: int, max_rows: int) -> TooLarge:
    return TooLarge(f"{field}: {num_rows} rows are over the operator's limit of {max_rows} in one request", field)


def _conform_one(array: np.ndarray, tensor: Tensor, field: str, max_rows: int, allow_single: bool) -> np.ndarray:
    if allow_single and array.shape == tensor.shape:
        array = array[None]
    if array.shape[1:] != tensor.shape or array.ndim == 0:
        raise InvalidValue(
            f"{field}: each row must have shape {_shape(tensor)}, so all of it (rows, …); got {tuple(array.shape)}",
            field,
        )
    if len(array) == 0:
        raise InvalidValue(f"{field}: must hold at least one row", field)
    if len(array) > max_rows:
        raise _too_many_rows(field, len(array), max_rows)
    return _converted(array, np.dtype(tensor.dtype), field)


def _converted(array: np.ndarray, dtype: np.dtype, field: str) -> np.ndarray:
    source = array.dtype
    allowed = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    if source.kind not in allowed:
        raise InvalidValue(f"{field}: must be {dtype.name} or convertible to it without loss; got {source.name}", field)
    if dtype.kind in "iu" and source != dtype and array.size:
        low, high = int(array.min()), int(array.max())
        if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
            raise InvalidValue(f"{field}: values {low} to {high} do not fit {dtype.name}", field)
    if source == dtype:
        converted = np.ascontiguousarray(array)
    else:
        with np.errstate(over="ignore"):  # what overflows becomes infinite, which is refused below
            converted = np.ascontiguousarray(array, dtype=dtype)
    if dtype.kind == "f" and not np.isfinite(converted).all():
        raise InvalidValue(f"{field}: must hold finite numbers that fit {dtype.name}; got NaN or infinity", field)
    return converted

"""Weights that several graphs read: one copy of their bytes, verified, handed to every session.

ONNX Runtime reads external data from any path that a graph names, so no graph with such a reference ever reaches it:
here the reference is checked against the manifest and the data put in its place.
"""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import TypeAlias

import numpy as np
from google.protobuf.message import DecodeError, EncodeError, Message
from offramp_contract.errors import ManifestError
from offramp_contract.manifest import SharedWeights
from onnx import ModelProto, TensorProto, helper

Weights: TypeAlias = Mapping[str, np.ndarray]
"""Arrays by the name of the initializer, read-only."""


class SharedArrays:
    """The shared weights of a bundle, in memory once.

    Args:
        described: What the manifest says of them.
        content: The bytes of their file, verified.

    Raises:
        ManifestError: If a weight ends beyond the file.
    """

    def __init__(self, described: SharedWeights | None, content: bytes) -> None:
        self.arrays: Weights = {} if described is None else dict(_read(described, content))
        self._places = {} if described is None else dict(_places(described))

    def fill(self, graph: bytes, name: str) -> tuple[bytes, Weights]:
        """Put the data where a graph refers to it.

        Args:
            graph: A serialised ONNX model.
            name: For messages.

        Returns:
            The graph with the data inside, and the arrays that were put in.

        Raises:
            ManifestError: If it is no model, or refers to data that is not the manifest's, or not as it says.
        """
        if not self.arrays:
            return graph, {}
        model = _parse(graph, name)
        filled = [tensor for tensor in model.graph.initializer if _is_external(tensor)]
        for tensor in filled:
            self._fill(tensor, name)
        try:
            return model.SerializeToString(), {tensor.name: self.arrays[tensor.name] for tensor in filled}
        except (EncodeError, ValueError):
            raise ManifestError(f"graph of {name!r} takes over 2 GiB with its weights") from None

    def _fill(self, tensor: TensorProto, name: str) -> None:
        array = self.arrays.get(tensor.name)
        if array is None:
            raise ManifestError(
                f"graph of {name!r} keeps weight {tensor.name!r} in another file, and the manifest does not"
            )
        is_same_kind = tensor.data_type == helper.np_dtype_to_tensor_dtype(array.dtype)
        if not is_same_kind or tuple(tensor.dims) != array.shape:
            raise ManifestError(
                f"graph of {name!r}: weight {tensor.name!r} has another shape or dtype than the manifest says"
            )
        if {entry.key: entry.value for entry in tensor.external_data} != self._places[tensor.name]:
            raise ManifestError(f"graph of {name!r}: weight {tensor.name!r} lies elsewhere than the manifest says")
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = array.tobytes()


def _read(described: SharedWeights, content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in described.tensors:
        end = tensor.offset + tensor.num_bytes
        if end > len(content):
            raise ManifestError(f"shared weight {tensor.name!r} ends at byte {end} of {len(content)}")
        # A copy, because a view would lie where its offset puts it, unaligned for some dtypes.
        yield tensor.name, np.frombuffer(content[tensor.offset : end], tensor.dtype).reshape(tensor.shape)


def _places(described: SharedWeights) -> Iterator[tuple[str, dict[str, str]]]:
    location = PurePosixPath(described.file.path).name
    for tensor in described.tensors:
        place = {"location": location, "offset": str(tensor.offset), "length": str(tensor.num_bytes)}
        yield tensor.name, place


def parse_closed(graph: bytes, name: str) -> ModelProto:
    """Parse a graph that holds all its data.

    Raises:
        ManifestError: If it is no model, or refers to other files: no digest covers them there, and ONNX Runtime reads
            them from any relative path.
    """
    model = _parse(graph, name)
    if _has_external_data(model):
        raise ManifestError(f"graph of {name!r} keeps weights in other files; a bundle's graphs hold their own")
    return model


def _parse(graph: bytes, name: str) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(graph)
    except DecodeError:
        raise ManifestError(f"graph of {name!r} is not an ONNX model") from None
    return model


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _has_external_data(message: Message) -> bool:
    if isinstance(message, TensorProto):
        return _is_external(message)
    return any(
        _has_external_data(part)
        for field, value in message.ListFields()
        if field.message_type is not None
        for part in ([value] if isinstance(value, Message) else value)
    )

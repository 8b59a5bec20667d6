"""What is known of a value: how its axes grow with the batch, and what its elements are called."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from onnx import TensorProto, helper


@dataclass(frozen=True, slots=True)
class Rows:
    """A dimension that is `multiple` times the batch size."""

    multiple: int = 1


Dim: TypeAlias = int | Rows | None
"""A size, a multiple of the batch size, or None where nothing is known."""

Shape: TypeAlias = tuple[Dim, ...]
DtypeName: TypeAlias = Literal["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool"]

DTYPE_NAMES: Final[Mapping[int, DtypeName]] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.DOUBLE: "float64",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
    TensorProto.BOOL: "bool",
}
"""The element types that may enter a network or cross a stage boundary, by their ONNX number."""

TYPES: Final = ", ".join(DTYPE_NAMES.values())
"""The same, spelled for a person."""


def onnx_dtype(name: str) -> int:
    """Give the ONNX number of an element type that the manifest can name."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(name))


def sizes_of_row(shape: Shape) -> tuple[int, ...] | None:
    """Give a value's sizes at batch 1, or None if one of them is unknown."""
    sizes = [dim.multiple if isinstance(dim, Rows) else dim for dim in shape]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


def elements_of_row(shape: Shape) -> int | None:
    """Count a value's elements at batch 1, or None if one of its dimensions is unknown."""
    sizes = sizes_of_row(shape)
    return None if sizes is None else math.prod(sizes)


def spell(shape: Shape) -> str:
    """Write a shape for a person: `(batch, 3, 2*batch, ?)`."""
    return f"({', '.join(map(_spell_dim, shape))}{',' if len(shape) == 1 else ''})"


def _spell_dim(dim: Dim) -> str:
    if isinstance(dim, Rows):
        return "batch" if dim.multiple == 1 else f"{dim.multiple}*batch"
    return "?" if dim is None else str(dim)

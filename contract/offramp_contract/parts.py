"""The parts that a manifest is made of: named tensors, verified files, what was proved."""

import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

DTYPES = {"float32": 4, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "bool": 1}

Dtype: TypeAlias = Literal["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=512)]


class Part(BaseModel):
    """Immutable, and refuses what it does not know, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tensor(Part):
    """A value that enters the network or crosses a stage boundary; `shape` is one row's, behind the batch axis 0."""

    name: Name
    dtype: Dtype
    shape: tuple[Annotated[int, Field(ge=0)], ...]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        return DTYPES[self.dtype] * math.prod(self.shape)


class File(Part):
    """A file of the bundle, relative to its folder."""

    path: Name
    sha256: Sha256

    @model_validator(mode="after")
    def _stays_inside(self) -> Self:
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or "\\" in self.path or ".." in parts or "\0" in self.path:
            raise ValueError(f"file path {self.path!r} leaves the bundle's folder")
        return self


class SharedTensor(Part):
    """A weight that several stage graphs read: `offset` is where its little-endian bytes start in the weights' file."""

    name: Name
    dtype: Dtype
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    offset: int = Field(ge=0)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return DTYPES[self.dtype] * math.prod(self.shape)


class SharedWeights(Part):
    """The weights that several stage graphs read, stored once.

    A graph declares such a weight as an initializer of this name whose data is external, at this place in this file,
    as ONNX has it. A reader takes the data from the file it has verified and lets nothing else read it.
    """

    file: File
    tensors: tuple[SharedTensor, ...] = Field(min_length=1)


class Proof(Part):
    """What the bundle was proved on beside its example.

    Attributes:
        num_inputs: How many inputs were varied from the example and from the data that was given.
        unreached: What none of them did, a sentence each: an exit that was not taken, an answer that was not given.
        tolerance: How far scores may lie from the network's, absolute and relative to them; None in a bundle that does
            not say, where it is 1e-4 in float32.
    """

    num_inputs: int = Field(ge=0)
    unreached: tuple[str, ...] = ()
    tolerance: float | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a tolerance that is not said: the digests of bundles that do not say it stay what they are."""
        written: dict[str, Any] = serialize(self)
        return {name: value for name, value in written.items() if name != "tolerance" or value is not None}

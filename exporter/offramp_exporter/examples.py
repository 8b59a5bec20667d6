"""The network's example inputs: named, repeated to a batch, and random ones like them."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from offramp_contract.errors import TraceError
from torch import nn

from offramp_exporter.forward_mode import home_of
from offramp_exporter.values import DTYPE_NAMES, TYPES

ExampleInputs: TypeAlias = torch.Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor, tensors in the order of forward's parameters, or tensors by parameter name; the batch on axis 0.

What is no tensor among them (a number, a word, None) is handed to `forward` as it is, in every call."""

MAX_ROW_SIZE: Final = 2**28
"""Numbers in one row of an input, 1 GiB of float32: above that a size is a slip."""

CONSTANTS: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs that a network takes.

    Attributes:
        arrays: By the input's name, the batch on axis 0, all with the same number of rows.
        by_name: Whether the network is called with keyword arguments.
        constants: What is no tensor, by parameter name; part of the network from then on.
    """

    arrays: dict[str, np.ndarray]
    by_name: bool = False
    constants: Mapping[str, object] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Count the rows."""
        return len(next(iter(self.arrays.values())))

    def with_rows(self, num_rows: int) -> "Examples":
        """Repeat or cut the examples to `num_rows` rows."""
        return self.rows(np.arange(num_rows) % self.num_rows)

    def rows(self, index: Sequence[int] | np.ndarray) -> "Examples":
        """Pick rows by their number."""
        return replace(self, arrays={name: array[index] for name, array in self.arrays.items()})

    def random(self, num_rows: int, seed: int) -> "Examples":
        """Draw inputs like the examples: floats of their mean and spread, integers within their range."""
        generator = np.random.default_rng(seed)
        drawn = {name: _random(array, num_rows, generator) for name, array in self.arrays.items()}
        return replace(self, arrays=drawn)

    def call(self, module: nn.Module) -> Any:
        """Call a network with the inputs, on the device that holds its parameters."""
        home = home_of(module)
        tensors = {name: torch.tensor(array, device=home) for name, array in self.arrays.items()}
        with torch.no_grad():
            return module(**tensors, **self.constants) if self.by_name else module(*tensors.values())


def read_examples(module: nn.Module, inputs: ExampleInputs) -> Examples:
    """Name a network's example inputs by its forward's parameters.

    Raises:
        TraceError: If they are no tensors with a common batch axis, or forward does not take them.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else _named(module, inputs)
    tensors = {name: value for name, value in given.items() if not isinstance(value, CONSTANTS)}
    constants = {name: value for name, value in given.items() if name not in tensors}
    by_name = isinstance(inputs, Mapping) or bool(constants)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or not tensor.shape[0]:
            raise TraceError(f"example input {name!r} must be a tensor with the batch on axis 0 and at least one row")
        if str(tensor.dtype).removeprefix("torch.") not in DTYPE_NAMES.values():
            raise TraceError(f"example input {name!r}: a bundle takes {TYPES}")
    if len({tensor.shape[0] for tensor in tensors.values()}) != 1:
        raise TraceError("the example inputs must be at least one, with the same number of rows on axis 0")
    return Examples({name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}, by_name, constants)


def _named(module: nn.Module, inputs: torch.Tensor | Sequence[Any]) -> dict[str, Any]:
    tensors = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*tensors).arguments
    except TypeError as error:
        raise TraceError(f"forward does not take {len(tensors)} example inputs: {error}") from None
    names: list[str] = []
    for name, value in bound.items():
        is_variadic = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names.extend([f"input_{i}" for i in range(len(value))] if is_variadic else [name])
    return dict(zip(names, tensors, strict=True))


def _random(array: np.ndarray, num_rows: int, generator: np.random.Generator) -> np.ndarray:
    shape = (num_rows, *array.shape[1:])
    if not array.size:
        return np.zeros(shape, array.dtype)
    if np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float64)
        return generator.normal(values.mean(), values.std() or 1.0, shape).astype(array.dtype)
    return generator.integers(int(array.min()), int(array.max()), shape, endpoint=True).astype(array.dtype)


def require_row_size(name: str, row: Sequence[int]) -> None:
    """Check that a row of an input can be made.

    Raises:
        TraceError: If it is too large.
    """
    if math.prod(row) > MAX_ROW_SIZE:
        raise TraceError(f"{name}: a row of {'x'.join(map(str, row))} numbers is too large; at most {MAX_ROW_SIZE}")


_SPEC: Final = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d{1,18}(?:x\d{1,18}){0,7})(?::(?P<dtype>[a-z]+\d*))?$"
)
"""Eight axes and eighteen digits are more than any network takes."""


def parse_example(spec: str) -> torch.Tensor | dict[str, torch.Tensor]:
    """Make example inputs of a description.

    Args:
        spec: The shape of one row, `3x32x32`; with a type, `16:int64`; several inputs by name,
            `ids=16:int64,mask=16:int64`.

    Returns:
        One row of random floats or of ones for other types; a dict if the inputs are named.

    Raises:
        TraceError: If the description cannot be read, or a row of that shape is too large.
    """
    inputs: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for part in spec.split(","):
        match = _SPEC.match(part.strip())
        dtype = (match["dtype"] or "float32") if match else ""
        if match is None or dtype not in DTYPE_NAMES.values() or (match["name"] or "") in inputs:
            raise TraceError(
                f"example {part.strip()[:80]!r} cannot be read; write the shape of one row, such as 3x32x32, or "
                "several inputs by name, such as ids=16:int64,mask=16:int64"
            )
        shape = (1, *map(int, match["sizes"].split("x")))
        require_row_size(f"example {part.strip()!r}", shape)
        kind: torch.dtype = getattr(torch, dtype)
        drawn = torch.randn(shape, generator=generator) if kind.is_floating_point else torch.ones(shape)
        inputs[match["name"] or ""] = drawn.to(kind)
    if "" in inputs and len(inputs) > 1:
        raise TraceError("example: of several inputs each needs its name, such as ids=16:int64,mask=16:int64")
    return inputs.get("", inputs)

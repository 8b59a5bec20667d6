"""Real inputs to prove a bundle on, checked against the example: a bad file ends in words, not in the network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from offramp_contract.errors import ExportError

from offramp_exporter.examples import CONSTANTS, ExampleInputs, Examples
from offramp_exporter.values import DTYPE_NAMES, TYPES


def read_given(given: ExampleInputs, examples: Examples) -> Examples:
    """Name real inputs by the example's and check that they are like it.

    Args:
        given: A tensor or array per input of the network, by name or in order; the batch on axis 0.
        examples: What the network takes.

    Raises:
        ExportError: Naming the input and what is wrong with it.
    """
    arrays = {name: _array(name, value) for name, value in _by_name(given, examples).items()}
    for name, array in arrays.items():
        _check(name, array, examples.arrays[name])
    if len({len(array) for array in arrays.values()}) != 1:
        counts = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise ExportError(f"proof inputs: every input has as many rows as the others, not {counts}")
    return replace(examples, arrays=arrays)


def _by_name(given: Any, examples: Examples) -> dict[str, Any]:
    """Put the inputs in the order of the example's."""
    names = list(examples.arrays)
    if isinstance(given, Mapping):
        tensors = {name: value for name, value in given.items() if name not in examples.constants}
    else:
        values = (
            [value for value in given if not isinstance(value, CONSTANTS)] if isinstance(given, Sequence) else [given]
        )
        tensors = dict(zip(names, values, strict=False)) if len(values) == len(names) else {}
    if set(tensors) != set(names):
        got = f"got {', '.join(map(str, tensors))}" if isinstance(given, Mapping) else "in this order, or by name"
        raise ExportError(f"proof inputs: the network takes {', '.join(names)}; {got}")
    return {name: tensors[name] for name in names}


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor) and str(value.dtype).removeprefix("torch.") in DTYPE_NAMES.values():
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        raise ExportError(f"proof inputs, {name}: give numbers, {TYPES}, with the batch on axis 0")
    return value


def _check(name: str, array: np.ndarray, example: np.ndarray) -> None:
    if array.shape[1:] != example.shape[1:]:
        raise ExportError(
            f"proof inputs, {name}: a row has the shape {_spell(example.shape[1:])}, not {_spell(array.shape[1:])}"
        )
    if array.dtype != example.dtype:
        raise ExportError(
            f"proof inputs, {name}: the network takes {example.dtype}, not {array.dtype}; save array.astype"
            f"({str(example.dtype)!r})"
        )
    if not len(array):
        raise ExportError(f"proof inputs, {name}: there is no row")
    if np.issubdtype(array.dtype, np.floating):
        finite_B = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite_B.all():
            raise ExportError(
                f"proof inputs, {name}: row {int(finite_B.argmin())} holds NaN or infinity; leave such rows out"
            )


def _spell(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"

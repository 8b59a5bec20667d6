"""What crosses a stage boundary, in the form the bundle promises: axis 0 is the batch.

A recurrent state keeps its batch on axis 1, a video network folds its frames into it: such a value is brought into the
promised form where it leaves a stage, and back where one reads it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offramp_contract.errors import SplitError
from offramp_contract.manifest import Tensor
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from offramp_exporter.program import Program
from offramp_exporter.sizes import int64_constant
from offramp_exporter.split import StagePlan
from offramp_exporter.values import DTYPE_NAMES, TYPES, Rows, Shape, onnx_dtype, spell


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that crosses a boundary.

    Attributes:
        value: Its name in the program.
        tensor: The form in which it crosses.
        shape: Its shape in the program, with exactly one axis that grows with the batch; or none in a network that
            takes one row at a time.
    """

    value: str
    tensor: Tensor
    shape: Shape

    @property
    def is_as_promised(self) -> bool:
        """Whether the value crosses as it is."""
        return self.shape[:1] == (Rows(),)

    @property
    def info(self) -> ValueInfoProto:
        """The graph input or output that it crosses through."""
        return helper.make_tensor_value_info(
            self.tensor.name, onnx_dtype(self.tensor.dtype), ["batch", *self.tensor.shape]
        )

    def store(self) -> list[NodeProto]:
        """Make the nodes that bring the value into the promised form."""
        if not self._has_rows:
            return [helper.make_node("Reshape", [self.value, f"{self.value}.unfolded_shape"], [self.tensor.name])]
        unfolded, front = f"{self.value}.unfolded", self.tensor.name
        to_front = [self._batch_axis, *(axis for axis in range(len(self._unfolded)) if axis != self._batch_axis)]
        return [
            helper.make_node("Reshape", [self.value, f"{self.value}.unfolded_shape"], [unfolded]),
            helper.make_node("Transpose", [unfolded], [front], perm=to_front),
        ]

    def restore(self) -> list[NodeProto]:
        """Make the nodes that bring it back."""
        if not self._has_rows:
            return [helper.make_node("Reshape", [self.tensor.name, f"{self.value}.folded_shape"], [self.value])]
        unfolded, front = f"{self.value}.unfolded", self.tensor.name
        others = list(range(1, len(self._unfolded)))
        to_place = [*others[: self._batch_axis], 0, *others[self._batch_axis :]]
        return [
            helper.make_node("Transpose", [front], [unfolded], perm=to_place),
            helper.make_node("Reshape", [unfolded, f"{self.value}.folded_shape"], [self.value]),
        ]

    def constants(self) -> list[TensorProto]:
        """Make the shapes that `store` and `restore` read."""
        folded = [-1 if isinstance(dim, Rows) else dim or 0 for dim in self.shape]
        return [
            int64_constant(f"{self.value}.unfolded_shape", self._unfolded if self._has_rows else [1, *folded]),
            int64_constant(f"{self.value}.folded_shape", folded),
        ]

    @property
    def _has_rows(self) -> bool:
        """Whether the value has an axis for the batch; where it has none, its network takes one row at a time."""
        return any(isinstance(dim, Rows) for dim in self.shape)

    @property
    def _batch_axis(self) -> int:
        return next(axis for axis, dim in enumerate(self.shape) if isinstance(dim, Rows))

    @property
    def _unfolded(self) -> list[int]:
        """The shape with the batch on an axis of its own, written -1."""
        sizes: list[int] = []
        for dim in self.shape:
            sizes.extend(([-1] if dim.multiple == 1 else [-1, dim.multiple]) if isinstance(dim, Rows) else [dim or 0])
        return sizes


def crossings(program: Program, plans: Iterable[StagePlan]) -> dict[str, Crossing]:
    """Find what enters the network and what crosses a boundary, model inputs first.

    Raises:
        SplitError: If a value that crosses has no axis for the batch, or is of a type that cannot cross.
    """
    emitted = [name for plan in plans for name in plan.emits]
    taken = {*program.initializers, *program.producer, *program.inputs}
    found = {name: _crossing(program, name, name) for name in program.inputs}
    for value in emitted:
        shape = program.shapes.get(value) or ()
        name = safe_name(value, taken - {value}) if shape[:1] == (Rows(),) else safe_name(f"{value}.rows", taken)
        taken.add(name)
        found[value] = _crossing(program, value, name)
    return found


def safe_name(value: str, taken: Iterable[str]) -> str:
    """Write a value's name with letters, digits, dots and underscores only, unlike all names taken."""
    name = re.sub(r"[^A-Za-z0-9._]+", "_", value).strip("_.")[:200] or "carry"
    numbered = (f"{name}_{i}" for i in range(2, 2**31))
    while name in taken:
        name = next(numbered)
    return name


def _crossing(program: Program, value: str, name: str) -> Crossing:
    shape = program.shapes.get(value)
    if shape is None or None in shape:
        known = "cannot be inferred" if shape is None else f"is only known as {spell(shape)}"
        raise SplitError(
            f"tensor {value!r} crosses a stage boundary, but its shape {known}; sizes must not depend on data"
        )
    batch_axes = [axis for axis, dim in enumerate(shape) if isinstance(dim, Rows)]
    if not batch_axes and program.is_one_row and (dtype := DTYPE_NAMES.get(program.dtypes.get(value, 0))):
        return Crossing(value, Tensor(name=name, dtype=dtype, shape=_ints(shape)), shape)
    if len(batch_axes) != 1:
        raise SplitError(
            f"tensor {value!r} of shape {spell(shape)} crosses a stage boundary, but "
            f"{'no' if not batch_axes else 'more than one'} axis of it is the batch; "
            "what one row computes must not depend on the rows beside it"
        )
    dtype = DTYPE_NAMES.get(program.dtypes.get(value, 0))
    if dtype is None:
        raise SplitError(f"tensor {value!r} crosses a stage boundary, but a bundle holds {TYPES} only")
    batch = shape[batch_axes[0]]
    folded = (batch.multiple,) if isinstance(batch, Rows) and batch.multiple != 1 else ()
    row = (*_ints(shape[: batch_axes[0]]), *folded, *_ints(shape[batch_axes[0] + 1 :]))
    return Crossing(value, Tensor(name=name, dtype=dtype, shape=row), shape)


def _ints(dims: Sequence[object]) -> tuple[int, ...]:
    return tuple(dim for dim in dims if isinstance(dim, int))

"""An `.npz` of inputs and labels, read a batch at a time: inputs as the model reads them, or raw pixels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from offramp_calibration.array_file import ArrayFile
from offramp_calibration.checks import check_finite
from offramp_calibration.labelled import HumanForm, Inputs, picture_of
from offramp_calibration.labels import check_label_shape, class_ids
from offramp_calibration.npz import Member
from offramp_contract.errors import InvalidValue, UnfitData
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import IntArray
from offramp_server.inputs import conform

from offramp_cli.labelled_data.images import inputs_of_pixels, takes_pixels

INPUT_NAMES = ("x", "inputs", "images", "data")
LABEL_NAMES = ("y", "labels", "label", "targets")
MAX_LABEL_BYTES = 2**30
MAX_BATCH_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class ArrayData:
    """Labelled arrays in an `.npz`.

    Attributes:
        name: The file's.
        label_N: The right class of each sample.
        file: The arrays.
        array_names: Name of the array of each model input, in the manifest's order.
        manifest: Of the bundle that reads them.
        is_pixels: Whether the one array holds pictures, to be prepared as the server prepares them.
    """

    name: str
    label_N: IntArray
    file: ArrayFile
    array_names: tuple[str, ...]
    manifest: Manifest
    is_pixels: bool

    @classmethod
    def open(cls, path: Path, manifest: Manifest) -> Self:
        """Look into a file and read its labels.

        Raises:
            UnfitData: If it does not hold the model's inputs and a label for each sample.
        """
        file = ArrayFile(path)
        inputs = [tensor.name for tensor in manifest.inputs]
        names = tuple(_input_name(file.arrays, name, len(inputs)) for name in inputs)
        labels = next((name for name in LABEL_NAMES if name in file.arrays and name not in names), None)
        if labels is None:
            raise UnfitData(f"data: {path.name!r} needs an array of labels, named y")
        num_samples = _num_samples([file.arrays[name] for name in names], names)
        label_N = _labels(file, labels, num_samples, manifest)
        is_pixels = takes_pixels(manifest, file.arrays[names[0]].dtype, file.arrays[names[0]].shape)
        if not is_pixels:
            _check_shapes(file, names, manifest)
        return cls(path.name, label_N, file, names, manifest, is_pixels)

    def batches(self, size: int) -> Iterator[Inputs]:
        """Give the inputs; see `LabelledData.batches`."""
        row_bytes = sum(self.file.arrays[name].row_bytes for name in self.array_names)
        fitting = max(1, min(size, MAX_BATCH_BYTES // max(row_bytes, 1)))
        start = 0
        for arrays in zip(*(self.file.rows(name, fitting) for name in self.array_names), strict=True):
            yield self._prepared(arrays, start)
            start += len(arrays[0])

    def example(self, index: int) -> HumanForm | None:
        """Give a sample as a picture, if it is one."""
        arrays = [self.file.row(name, index)[None] for name in self.array_names]
        inputs = self._prepared(arrays, index)
        return picture_of({name: array[0] for name, array in inputs.items()}, self.manifest)

    def _prepared(self, arrays: Sequence[np.ndarray], start: int) -> Inputs:
        if self.is_pixels:
            return inputs_of_pixels(arrays[0], self.manifest)
        for name, array in zip(self.array_names, arrays, strict=True):
            check_finite(array, name, start)
        written = {tensor.name: array for tensor, array in zip(self.manifest.inputs, arrays, strict=True)}
        try:
            return conform(written, self.manifest, len(arrays[0]))
        except InvalidValue as error:
            raise UnfitData(f"data: {error.message}") from None


def _input_name(arrays: Mapping[str, Member], name: str, num_inputs: int) -> str:
    names = (name, *INPUT_NAMES) if num_inputs == 1 else (name,)
    found = next((candidate for candidate in names if candidate in arrays), None)
    if found is None:
        raise UnfitData(
            f"data: the .npz needs an array named {name}{' or x' if num_inputs == 1 and name != 'x' else ''}"
        )
    return found


def _num_samples(members: Sequence[Member], names: Sequence[str]) -> int:
    for member, name in zip(members, names, strict=True):
        if not member.shape:
            raise UnfitData(f"data: {name} is a single number; it must hold a row for each sample")
    counts = {name: member.shape[0] for name, member in zip(names, members, strict=True)}
    if len(set(counts.values())) > 1:
        raise UnfitData(f"data: the inputs need the same number of samples; got {counts}")
    return members[0].shape[0]


def _labels(file: ArrayFile, name: str, num_samples: int, manifest: Manifest) -> IntArray:
    member = file.arrays[name]
    check_label_shape(member.shape, num_samples)
    if num_samples * member.row_bytes > MAX_LABEL_BYTES:
        raise UnfitData(f"labels: they take over {MAX_LABEL_BYTES:,} bytes")
    written = np.concatenate([np.empty(0, member.dtype), *file.rows(name, num_samples or 1)])
    return class_ids(written, num_samples, manifest)


def _check_shapes(file: ArrayFile, names: Sequence[str], manifest: Manifest) -> None:
    for tensor, name in zip(manifest.inputs, names, strict=True):
        member = file.arrays[name]
        if member.shape[1:] != tensor.shape:
            expected = ", ".join(map(str, ("samples", *tensor.shape)))
            raise UnfitData(
                f"{name}: must be {tensor.dtype} of shape ({expected}); got {member.dtype.name} {member.shape}"
            )

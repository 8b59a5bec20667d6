"""Labels as people write them, numbers or names, and the classes of a bundle that they stand for.

Shapes: N = samples.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import IntArray

NAMED_AT_MOST = 5


def num_classes_of(manifest: Manifest) -> int:
    """Count the classes that every exit of a bundle tells apart."""
    return min(exit_.num_classes for exit_ in manifest.exits)


def ids_of_names(names: Iterable[str], manifest: Manifest) -> Mapping[str, int]:
    """Find the class that each name stands for: one of the bundle's labels, or else a class number.

    Raises:
        UnfitData: If a name is neither.
    """
    ids = {label: index for index, label in reversed(list(enumerate(manifest.labels or ())))}
    numbers = {str(index): index for index in range(num_classes_of(manifest))}
    known = numbers | ids
    for name in names:
        if name not in known:
            raise UnfitData(f"labels: {name[:64]!r} is not one of the bundle's classes: {_listed(manifest)}")
    return known


def class_ids(written: np.ndarray, num_samples: int, manifest: Manifest) -> IntArray:
    """Read an array of labels.

    Args:
        written: Class numbers or names, one a sample.
        num_samples: How many samples there are.
        manifest: The bundle that tells the classes apart.

    Returns:
        int64, shape (N,).

    Raises:
        UnfitData: If they are not one class of the bundle for each sample.
    """
    check_label_shape(written.shape, num_samples)
    if written.dtype.kind == "U":
        names, place_N = np.unique(written, return_inverse=True)
        ids = ids_of_names(names.tolist(), manifest)
        return np.array([ids[name] for name in names.tolist()], dtype=np.int64)[place_N]
    if written.dtype.kind not in "iu":
        raise UnfitData(f"labels: must be class numbers (integers) or names; got {written.dtype.name}")
    check_range(written, num_classes_of(manifest))
    return written.astype(np.int64)


def check_label_shape(shape: tuple[int, ...], num_samples: int) -> None:
    """Check that an array can hold one class a sample.

    Raises:
        UnfitData: If it cannot.
    """
    if len(shape) != 1:
        hint = "; one-hot rows become class numbers with argmax(axis=1)" if len(shape) == 2 else ""
        raise UnfitData(f"labels: must be one class a sample, shape ({num_samples},); got {shape}{hint}")
    if shape[0] != num_samples:
        raise UnfitData(f"labels: there are {shape[0]:,} for {num_samples:,} samples")


def check_range(label_N: IntArray, num_classes: int) -> None:
    """Check that labels are classes.

    Raises:
        UnfitData: Naming the first sample whose label is none.
    """
    outside_N = (label_N < 0) | (label_N >= num_classes)
    if outside_N.any():
        first = int(outside_N.argmax())
        raise UnfitData(
            f"labels: sample {first} has the label {label_N[first]}; the bundle's classes are 0 to {num_classes - 1}"
        )


def named(classes: Iterable[int], manifest: Manifest) -> str:
    """Name some classes, the first few of many."""
    every = list(classes)
    shown = [f"{index} ({manifest.labels[index]})" if manifest.labels else str(index) for index in every]
    more = len(every) - NAMED_AT_MOST
    return ", ".join(shown[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _listed(manifest: Manifest) -> str:
    if not manifest.labels:
        return f"0 to {num_classes_of(manifest) - 1}"
    more = len(manifest.labels) - NAMED_AT_MOST
    return ", ".join(manifest.labels[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")

"""Real data sets, one a file, each split for training, calibration and test by a seed."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from offramp_models.data.digits import load_digits
from offramp_models.data.images import ImageDataSet, LabelledImages

DATA_SETS: Mapping[str, Callable[[int], ImageDataSet]] = MappingProxyType({"digits": load_digits})


def load_data(name: str, seed: int = 0) -> ImageDataSet:
    """Load a data set.

    Args:
        name: A key of `DATA_SETS`.
        seed: Decides which image falls into which split.

    Raises:
        ValueError: If there is no data set of that name; the message lists those there are.
    """
    if name not in DATA_SETS:
        raise ValueError(f"data set {name!r} is not one of {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name](seed)


__all__ = ["DATA_SETS", "ImageDataSet", "LabelledImages", "load_data"]

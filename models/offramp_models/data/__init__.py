"""Real data sets, one a file, each split for training, calibration and test by a seed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from offramp_models.data.augmentation import Augmentation
from offramp_models.data.cifar100 import load_cifar100
from offramp_models.data.digits import load_digits
from offramp_models.data.fashion_mnist import load_fashion_mnist
from offramp_models.data.images import ImageDataSet, LabelledImages
from offramp_models.lookup import look_up

LoadDataSet: TypeAlias = Callable[[int, Path | None], ImageDataSet]
"""Loads a data set, given the split's seed and the folder that the user keeps data sets in."""

DATA_SETS: Mapping[str, LoadDataSet] = MappingProxyType(
    {"cifar100": load_cifar100, "digits": load_digits, "fashion_mnist": load_fashion_mnist}
)


def load_data(name: str, seed: int = 0, data_dir: Path | None = None) -> ImageDataSet:
    """Load a data set.

    Args:
        name: A key of `DATA_SETS`.
        seed: Decides which image falls into which split: the seed of a training gives the splits of that training.
        data_dir: Where its files are; None: the folder of OFFRAMP_DATA, else they are downloaded once.

    Raises:
        ValueError: If there is no data set of that name; the message lists those there are.
        DataSetError: If its files are not there, cannot be downloaded, or are not what was published.
    """
    return look_up(DATA_SETS, "data set", name)(seed, data_dir)


__all__ = ["DATA_SETS", "Augmentation", "ImageDataSet", "LabelledImages", "load_data"]

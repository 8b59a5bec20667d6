"""A data set of `offramp models`, split as it was for the bundle's training, so that held out means held out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from offramp_calibration.labelled import Arrays, LabelledData
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import ImagePreprocessing, Manifest
from offramp_contract.statistics import IntArray

from offramp_cli.labelled_data.images import Pixels

if TYPE_CHECKING:
    from offramp_models.data import ImageDataSet, LabelledImages

Split: TypeAlias = Literal["calibration", "test"]


def named_data(name: str, manifest: Manifest, split: Split, data_dir: Path | None) -> tuple[LabelledData, str]:
    """Load one split of a data set.

    Args:
        name: One of `offramp models`.
        manifest: Its training record says how the data was split; its preprocessing makes inputs of pictures.
        split: Which part.
        data_dir: Where data sets lie.

    Returns:
        The data, and a sentence on how it was split.

    Raises:
        UnfitData: If there is no such data set.
    """
    from offramp_models import load_data

    seed, remark = _split_of(name, manifest.provenance.training)
    try:
        data = load_data(name, seed, data_dir)
    except ValueError as error:
        raise UnfitData(f"data: {error}") from None
    images: LabelledImages = getattr(data, split)
    label_N, title = _labels(images.labels_N, data, manifest), f"{name} ({split})"
    prepared = f"{title}, {len(label_N):,} images: {remark}"
    if isinstance(manifest.preprocessing, ImagePreprocessing):
        return Pixels(title, label_N, images.pixels_NHW, manifest), prepared
    inputs = {manifest.inputs[0].name: data.inputs(images)}
    return Arrays(title, inputs, label_N, manifest), prepared


def _split_of(name: str, training: Mapping[str, Any]) -> tuple[int, str]:
    settings = training.get("settings")
    seed = settings.get("seed") if isinstance(settings, dict) else None
    if training.get("data") != name:
        other = training.get("data")
        known = f"names {other}, not {name}" if isinstance(other, str) else "names no data set"
        return 0, f"split with seed 0; the bundle's training record {known}, so see to it that this was held out"
    if not isinstance(seed, int):
        return 0, "split with seed 0; the bundle's training record names no seed, so see to it that this was held out"
    return seed, f"split with seed {seed}, as for the bundle's training"


def _labels(label_N: IntArray, data: "ImageDataSet", manifest: Manifest) -> IntArray:
    """Give the classes of the bundle, which may stand in another order than the data set's."""
    if manifest.labels is None or set(manifest.labels) != set(data.label_names):
        return label_N
    place_C = np.array([manifest.labels.index(label) for label in data.label_names], dtype=np.int64)
    return np.asarray(place_C[label_N])

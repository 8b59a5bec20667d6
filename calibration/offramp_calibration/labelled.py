"""Labelled data as calibration and evaluation see it: labels, inputs batch by batch, and a sample as people see it.

Where the samples come from is the sources' business: `Arrays` holds them in memory, and the command line reads files
of arrays, folders of images, tables of text and data sets by name.

Shapes: N = samples, B = batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from offramp_contract.manifest import ImagePreprocessing, Manifest
from offramp_contract.statistics import FloatArray, IntArray

Inputs: TypeAlias = Mapping[str, np.ndarray]
HumanForm: TypeAlias = npt.NDArray[np.uint8] | str
"""A picture, uint8 (H, W) or (H, W, 3), or a text."""


class LabelledData(Protocol):
    """Samples with their right classes, in an order that never changes."""

    @property
    def name(self) -> str:
        """What messages and reports call it."""

    @property
    def label_N(self) -> IntArray:
        """The right class of each sample, int64."""

    def batches(self, size: int) -> Iterator[Inputs]:
        """Give the model's inputs of all samples in order, at most `size` at a time; may be called again.

        Raises:
            UnfitData: If a sample cannot be read.
        """

    def example(self, index: int) -> HumanForm | None:
        """Give a sample as a person sees it, or None where there is no such thing."""


@dataclass(frozen=True, slots=True)
class Arrays:
    """Labelled data in memory.

    Attributes:
        name: What messages and reports call it.
        inputs: An array (N, ...) per model input.
        label_N: The right class of each sample, int64.
        manifest: Of the bundle that reads the inputs.
    """

    name: str
    inputs: Inputs
    label_N: IntArray
    manifest: Manifest

    def batches(self, size: int) -> Iterator[Inputs]:
        """Give the inputs; see `LabelledData.batches`."""
        for start in range(0, len(self.label_N), size):
            yield {name: array[start : start + size] for name, array in self.inputs.items()}

    def example(self, index: int) -> HumanForm | None:
        """Give a sample as a picture, if it is one."""
        return picture_of({name: array[index] for name, array in self.inputs.items()}, self.manifest)


def picture_of(inputs: Inputs, manifest: Manifest) -> npt.NDArray[np.uint8] | None:
    """Undo the normalisation of one sample, so that people see what the network saw.

    Args:
        inputs: One row per model input, without the batch axis.
        manifest: What declares the preprocessing.

    Returns:
        uint8, (H, W) or (H, W, 3); None if the model takes no images.
    """
    spec = manifest.preprocessing
    if not isinstance(spec, ImagePreprocessing):
        return None
    row: FloatArray = inputs[manifest.inputs[0].name].astype(np.float64)
    channels_CHW = row.reshape(len(spec.mode), spec.height, spec.width)
    pixels_HWC = channels_CHW.transpose(1, 2, 0) * np.array(spec.std) + np.array(spec.mean)
    if spec.invert:
        pixels_HWC = 1 - pixels_HWC
    picture_HWC: npt.NDArray[np.uint8] = (pixels_HWC * 255).round().clip(0, 255).astype(np.uint8)
    return picture_HWC[:, :, 0] if spec.mode == "L" else picture_HWC

"""Labelled images and the one way they become a network's input.

Pixels are kept as 8-bit numbers, as an image file holds them, so that a network learns from exactly what a client can
send: `ImageDataSet.inputs` is what the server's preprocessing makes of the same picture.

Shapes: N = images, H, W = height and width, D = channels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from offramp_contract.manifest import ImagePreprocessing

from offramp_models.data.augmentation import UNVARIED, Augmentation
from offramp_models.shapes import ImageShape


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Images of one split.

    Attributes:
        pixels_NHW: uint8, shape (N, H, W), or (N, H, W, 3) for colour.
        labels_N: Class of each image, int64, shape (N,).
    """

    pixels_NHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels_N)

    def rows(self, rows_B: "npt.NDArray[np.intp] | slice") -> "LabelledImages":
        """Give some of the images; a slice copies nothing."""
        return LabelledImages(self.pixels_NHW[rows_B], self.labels_N[rows_B])


@dataclass(frozen=True, slots=True)
class ImageDataSet:
    """A data set, split three ways.

    Attributes:
        name: What the command line calls it.
        train: For fitting weights.
        calibration: For fitting temperatures and thresholds; never seen in training.
        test: For measuring; never seen in training or calibration.
        label_names: Name of each class.
        preprocessing: How an image file becomes the network's input; goes into the bundle's manifest.
        augmentation: How training images are varied.
    """

    name: str
    train: LabelledImages
    calibration: LabelledImages
    test: LabelledImages
    label_names: tuple[str, ...]
    preprocessing: ImagePreprocessing
    augmentation: Augmentation = UNVARIED

    @property
    def input_shape(self) -> ImageShape:
        """Channels, height and width of the network's input."""
        return len(self.preprocessing.mode), self.preprocessing.height, self.preprocessing.width

    def inputs(self, images: LabelledImages) -> npt.NDArray[np.float32]:
        """Give the network's input for images of this data set, float32, shape (N, D, H, W).

        That takes four times the memory of the images: for a large set, ask for some `rows` of a split at a time.
        """
        num_channels = len(self.preprocessing.mode)
        pixels_NHWD = images.pixels_NHW.reshape(*images.pixels_NHW.shape[:3], num_channels)
        mean_D = np.asarray(self.preprocessing.mean, dtype=np.float32)
        std_D = np.asarray(self.preprocessing.std, dtype=np.float32)
        scaled_NHWD = (pixels_NHWD.astype(np.float32) / np.float32(255) - mean_D) / std_D
        return np.ascontiguousarray(scaled_NHWD.transpose(0, 3, 1, 2))

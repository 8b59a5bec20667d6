"""Handwritten digits: 1,797 grey images of 8x8 pixels, light on dark, which scikit-learn ships.

They are the test part of the Optical Recognition of Handwritten Digits data set (E. Alpaydin, C. Kaynak, 1998,
https://doi.org/10.24432/C50P49). Its pixels count 0 to 16; here they are spread over an image file's 0 to 255.
"""

from pathlib import Path

import numpy as np
from offramp_contract.manifest import ImagePreprocessing

from offramp_models.data.images import ImageDataSet, LabelledImages

NUM_TRAIN, NUM_CALIBRATION = 897, 400
"""The remaining 500 are for the test."""
BRIGHTEST = 16
PREPROCESSING = ImagePreprocessing(mode="L", height=8, width=8, mean=(0.305,), std=(0.376,))
"""Mean and standard deviation over all pixels: the network's inputs are centred."""


def load_digits(seed: int = 0, data_dir: Path | None = None) -> ImageDataSet:
    """Load the digits, split 897 / 400 / 500.

    Args:
        seed: Decides which image falls into which split.
        data_dir: Not looked into: the images come with scikit-learn.
    """
    pixels_NHW, labels_N = _read()
    order_N = np.random.default_rng(seed).permutation(len(labels_N))
    splits = np.split(order_N, [NUM_TRAIN, NUM_TRAIN + NUM_CALIBRATION])
    train, calibration, test = (LabelledImages(pixels_NHW[rows], labels_N[rows]) for rows in splits)
    return ImageDataSet("digits", train, calibration, test, tuple("0123456789"), PREPROCESSING)


def _read() -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets  # not where a bundle is calibrated on other data

    bunch = datasets.load_digits()
    pixels_NHW = np.rint(bunch.images * (255 / BRIGHTEST)).astype(np.uint8)
    return pixels_NHW, bunch.target.astype(np.int64)

"""CIFAR-100: 60,000 colour pictures of 32x32 pixels in a hundred fine classes.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html

Shapes: N = images, H, W = height and width.
"""

from pathlib import Path
from typing import Final

import numpy as np
from offramp_contract.errors import DataSetError
from offramp_contract.manifest import ImagePreprocessing

from offramp_models.data.archive import Member, unpack
from offramp_models.data.augmentation import Augmentation
from offramp_models.data.images import ImageDataSet, LabelledImages
from offramp_models.data.origin import Published, cache_folder, download, find, folder_of_user
from offramp_models.data.split import hold_out

NAME: Final = "cifar100"
NUM_CALIBRATION: Final = 5000
"""Of the 50,000 published for training; the 10,000 for the test are the published ones."""
SIDE: Final = 32
NUM_CLASSES: Final = 100
PREPROCESSING: Final = ImagePreprocessing(
    mode="RGB", height=SIDE, width=SIDE, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
)
"""Mean and standard deviation of each channel over the published training images."""
AUGMENTATION: Final = Augmentation(padding=4, flips=True)
"""As in ResNet's experiments on CIFAR, https://arxiv.org/abs/1512.03385, section 4.2."""

FOLDER: Final = "cifar-100-binary"
ARCHIVE: Final = Published(
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8", 168_513_733
)
ROW_BYTES: Final = 2 + 3 * SIDE * SIDE
"""A coarse label (not read), a fine label, then the red, green and blue planes, row by row."""
MAX_IMAGES: Final = 50_000
TRAIN, TEST, LABEL_NAMES = "train.bin", "test.bin", "fine_label_names.txt"
MEMBERS: Final = (
    Member(f"{FOLDER}/{TRAIN}", MAX_IMAGES * ROW_BYTES),
    Member(f"{FOLDER}/{TEST}", MAX_IMAGES * ROW_BYTES),
    Member(f"{FOLDER}/{LABEL_NAMES}", 1 << 16),
)


def load_cifar100(seed: int = 0, data_dir: Path | None = None) -> ImageDataSet:
    """Load CIFAR-100 with its fine labels, split 45,000 / 5,000 / 10,000.

    Args:
        seed: Decides which of the training images are held out for calibration.
        data_dir: A folder with the published files of the binary version, or with their folder `cifar-100-binary`;
            None: the folder of OFFRAMP_DATA, else they are downloaded once.

    Raises:
        DataSetError: If the files are not there, cannot be downloaded, or are not what was published.
    """
    folder = folder_of_user(data_dir)
    if folder is None:
        folder = cache_folder(NAME)
        if not all((folder / member.path).is_file() for member in MEMBERS):
            unpack(download(ARCHIVE, folder), MEMBERS, folder)
    place = find(folder, FOLDER, (TRAIN, TEST, LABEL_NAMES))
    names = _label_names(place / LABEL_NAMES)
    train, calibration = hold_out(read_images(place / TRAIN), NUM_CALIBRATION, seed)
    test = read_images(place / TEST)
    return ImageDataSet(NAME, train, calibration, test, names, PREPROCESSING, AUGMENTATION)


def read_images(path: Path) -> LabelledImages:
    """Read one part of the set.

    Args:
        path: A file of 3,074 bytes an image.

    Raises:
        DataSetError: If the file is truncated or too large, or a label is none of the hundred.
    """
    num_bytes = path.stat().st_size
    if not num_bytes or num_bytes % ROW_BYTES or num_bytes > MAX_IMAGES * ROW_BYTES:
        raise DataSetError(f"{path} has {num_bytes} bytes; it must be {ROW_BYTES} for each of 1 to {MAX_IMAGES} images")
    rows_NR = np.fromfile(path, dtype=np.uint8).reshape(-1, ROW_BYTES)
    labels_N = rows_NR[:, 1].astype(np.int64)
    if labels_N.max() >= NUM_CLASSES:
        raise DataSetError(f"{path}: a label is {labels_N.max()}; labels are 0 to {NUM_CLASSES - 1}")
    planes_NDHW = rows_NR[:, 2:].reshape(-1, 3, SIDE, SIDE)
    return LabelledImages(np.ascontiguousarray(planes_NDHW.transpose(0, 2, 3, 1)), labels_N)


def _label_names(path: Path) -> tuple[str, ...]:
    with path.open("rb") as file:
        content = file.read(1 << 16)
    try:
        names = tuple(line.strip() for line in content.decode().splitlines() if line.strip())
    except UnicodeDecodeError:
        names = ()
    if len(set(names)) != NUM_CLASSES:
        raise DataSetError(f"{path} must name {NUM_CLASSES} classes, one a line; it names {len(set(names))}")
    return names

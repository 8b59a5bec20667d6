"""Fashion-MNIST: 70,000 grey pictures of clothes, 28x28 pixels, light on dark, ten classes.

H. Xiao, K. Rasul, R. Vollgraf, 2017, https://arxiv.org/abs/1708.07747; published under the MIT licence.

Shapes: N = images, H, W = height and width.
"""

import gzip
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from offramp_contract.errors import DataSetError
from offramp_contract.manifest import ImagePreprocessing

from offramp_models.data.augmentation import Augmentation
from offramp_models.data.images import ImageDataSet, LabelledImages
from offramp_models.data.origin import Published, cache_folder, download, find, folder_of_user
from offramp_models.data.split import hold_out

NAME: Final = "fashion_mnist"
NUM_CALIBRATION: Final = 5000
"""Of the 60,000 published for training; the 10,000 for the test are the published ones."""
SIDE: Final = 28
LABEL_NAMES: Final = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
PREPROCESSING: Final = ImagePreprocessing(mode="L", height=SIDE, width=SIDE, mean=(0.286,), std=(0.353,))
"""Mean and standard deviation over all pixels of the published training images."""
AUGMENTATION: Final = Augmentation(padding=2, flips=True)

_ORIGIN: Final = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FILES: Final = (
    Published(
        f"{_ORIGIN}/train-images-idx3-ubyte.gz",
        "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        26_421_880,
    ),
    Published(
        f"{_ORIGIN}/train-labels-idx1-ubyte.gz",
        "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        29_515,
    ),
    Published(
        f"{_ORIGIN}/t10k-images-idx3-ubyte.gz",
        "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        4_422_102,
    ),
    Published(
        f"{_ORIGIN}/t10k-labels-idx1-ubyte.gz",
        "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        5_148,
    ),
)
MAX_IMAGES: Final = 60_000


def load_fashion_mnist(seed: int = 0, data_dir: Path | None = None) -> ImageDataSet:
    """Load Fashion-MNIST, split 55,000 / 5,000 / 10,000.

    Args:
        seed: Decides which of the training images are held out for calibration.
        data_dir: A folder with the four published files, or with a folder `fashion-mnist` of them; None: the folder of
            OFFRAMP_DATA, else they are downloaded once.

    Raises:
        DataSetError: If the files are not there, cannot be downloaded, or are not what was published.
    """
    folder = folder_of_user(data_dir)
    if folder is None:
        paths = [download(file, cache_folder(NAME)) for file in FILES]
    else:
        place = find(folder, "fashion-mnist", [file.name for file in FILES])
        paths = [place / file.name for file in FILES]
    train, test = read_images(paths[0], paths[1]), read_images(paths[2], paths[3])
    train, calibration = hold_out(train, NUM_CALIBRATION, seed)
    return ImageDataSet(NAME, train, calibration, test, LABEL_NAMES, PREPROCESSING, AUGMENTATION)


def read_images(images: Path, labels: Path) -> LabelledImages:
    """Read one part of the set.

    Args:
        images: A gzipped IDX file of (N, 28, 28) bytes.
        labels: A gzipped IDX file of N bytes.

    Raises:
        DataSetError: If a file is broken, truncated, of another shape, or a label is none of the ten.
    """
    pixels_NHW = _read_idx(images, (SIDE, SIDE))
    labels_N = _read_idx(labels, ()).astype(np.int64)
    if len(pixels_NHW) != len(labels_N):
        raise DataSetError(f"{images} holds {len(pixels_NHW)} images, but {labels} {len(labels_N)} labels")
    if labels_N.max(initial=0) >= len(LABEL_NAMES):
        raise DataSetError(f"{labels}: a label is {labels_N.max()}; labels are 0 to {len(LABEL_NAMES) - 1}")
    return LabelledImages(pixels_NHW, labels_N)


def _read_idx(path: Path, shape_of_one: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Read bytes behind a header: 0, 0, 8 for bytes, the number of dimensions, and each of them in four bytes."""
    header_bytes = 4 + 4 * (1 + len(shape_of_one))
    bytes_of_one = int(np.prod(shape_of_one, dtype=int))
    try:
        with gzip.open(path) as file:
            content = file.read(header_bytes + MAX_IMAGES * bytes_of_one + 1)
    except (OSError, EOFError, zlib.error):
        raise DataSetError(f"{path} is no whole gzip file; download it again") from None
    magic = bytes((0, 0, 8, 1 + len(shape_of_one)))
    header = np.frombuffer(content[:header_bytes].ljust(header_bytes, b"\0"), dtype=">u4")
    dimensions = header[1:].tolist()
    if content[:4] != magic or tuple(dimensions[1:]) != shape_of_one:
        raise DataSetError(f"{path} is no IDX file of {'x'.join(map(str, ('N', *shape_of_one)))} bytes")
    if not dimensions[0] or len(content) != header_bytes + dimensions[0] * bytes_of_one:
        raise DataSetError(f"{path} says it holds {dimensions[0]} rows, and does not; download it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(-1, *shape_of_one)

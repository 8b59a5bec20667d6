"""Pictures as labelled data: a folder with a sub-folder for each class, or raw pixels.

They are decoded, scaled and normalised by the server's preprocessing, one at a time.

Shapes: N = samples, B = batch, H, W = height and width, D = channels.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from offramp_calibration.labelled import HumanForm, Inputs, picture_of
from offramp_calibration.labels import ids_of_names
from offramp_contract.errors import RequestError, UnfitData
from offramp_contract.manifest import ImagePreprocessing, Manifest
from offramp_contract.statistics import IntArray
from offramp_server.preprocess import inputs_of_images
from offramp_server.settings import ServerSettings
from PIL import Image

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_FILE_BYTES: Final = 2**26
MAX_PIXELS: Final[int] = ServerSettings.model_fields["max_image_pixels"].default


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Image files; the name of a file's folder is its class.

    Attributes:
        name: The folder's.
        label_N: The right class of each image.
        folder: Where it lies.
        files: Paths of the images in it, sorted.
        manifest: Of the bundle that reads them.
    """

    name: str
    label_N: IntArray
    folder: Path
    files: tuple[str, ...]
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> Self:
        """Look through a folder; no image is read yet.

        Raises:
            UnfitData: If the model takes no images, a sub-folder is no class, or a link leads out of the folder.
        """
        if not isinstance(manifest.preprocessing, ImagePreprocessing):
            raise UnfitData(
                "data: the bundle declares no image preprocessing, so a folder of images says nothing to it"
            )
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        found = [(name, file) for name in classes for file in _images(folder, name)]
        if not found:
            raise UnfitData(f"data: {str(folder)!r} holds no sub-folder of {', '.join(SUFFIXES)} images")
        ids = ids_of_names(dict.fromkeys(name for name, _ in found), manifest)
        label_N = np.array([ids[name] for name, _ in found], dtype=np.int64)
        return cls(folder.resolve().name, label_N, folder, tuple(file for _, file in found), manifest)

    def batches(self, size: int) -> Iterator[Inputs]:
        """Give the inputs; see `LabelledData.batches`."""
        for start in range(0, len(self.files), size):
            yield _joined(map(self._prepared, self.files[start : start + size]))

    def example(self, index: int) -> HumanForm | None:
        """Give an image as the network sees it."""
        return picture_of({name: rows[0] for name, rows in self._prepared(self.files[index]).items()}, self.manifest)

    def _prepared(self, file: str) -> Inputs:
        path = self.folder / file
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnfitData(f"data: {file!r} is over {MAX_FILE_BYTES:,} bytes")
        return _inputs_of_image(path.read_bytes(), self.manifest, repr(file))


@dataclass(frozen=True, slots=True)
class Pixels:
    """Pictures in memory.

    Attributes:
        name: What messages call them.
        label_N: The right class of each picture.
        pixels_NHWD: uint8, shape (N, H, W), or (N, H, W, 3) for colour.
        manifest: Of the bundle that reads them.
    """

    name: str
    label_N: IntArray
    pixels_NHWD: npt.NDArray[np.uint8]
    manifest: Manifest

    def batches(self, size: int) -> Iterator[Inputs]:
        """Give the inputs; see `LabelledData.batches`."""
        for start in range(0, len(self.label_N), size):
            yield inputs_of_pixels(self.pixels_NHWD[start : start + size], self.manifest)

    def example(self, index: int) -> HumanForm | None:
        """Give a picture."""
        inputs = inputs_of_pixels(self.pixels_NHWD[index : index + 1], self.manifest)
        return picture_of({name: rows[0] for name, rows in inputs.items()}, self.manifest)


def takes_pixels(manifest: Manifest, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> bool:
    """Say whether an array can only be raw pixels: 8-bit numbers, channels last, for a model that takes images."""
    spec = manifest.preprocessing
    if not isinstance(spec, ImagePreprocessing) or dtype != np.uint8 or manifest.inputs[0].dtype == "uint8":
        return False
    channels = {"L": ((), (1,)), "RGB": ((3,),)}[spec.mode]
    return len(shape) >= 3 and shape[3:] in channels and 0 < shape[1] * shape[2] <= MAX_PIXELS


def inputs_of_pixels(pixels_BHWD: npt.NDArray[np.uint8], manifest: Manifest) -> Inputs:
    """Prepare pictures exactly as the server prepares a file that holds them.

    Args:
        pixels_BHWD: uint8, shape (B, H, W), (B, H, W, 1) or (B, H, W, 3).
        manifest: What declares the preprocessing.
    """
    channels = (3,) if pixels_BHWD.shape[3:] == (3,) else ()
    pictures = pixels_BHWD.reshape(*pixels_BHWD.shape[:3], *channels)
    return _joined(_inputs_of_image(_bitmap(picture), manifest, "a picture") for picture in pictures)


def _bitmap(picture_HWD: npt.NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture_HWD).save(stream, "BMP")
    return stream.getvalue()


def _inputs_of_image(encoded: bytes, manifest: Manifest, what: str) -> Inputs:
    try:
        return inputs_of_images([encoded], manifest, MAX_PIXELS)
    except RequestError as error:
        raise UnfitData(f"data: {what} cannot be used: {error.message.removeprefix('image: ')}") from None


def _joined(rows: Iterable[Inputs]) -> Inputs:
    every = list(rows)
    return {name: np.concatenate([one[name] for one in every]) for name in every[0]}


def _images(folder: Path, name: str) -> list[str]:
    root, found = folder.resolve(), []
    for file in sorted((folder / name).iterdir()):
        if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
            continue
        if not file.resolve().is_relative_to(root):
            raise UnfitData(f"data: {name}/{file.name} is a link that leads out of {str(folder)!r}")
        found.append(f"{name}/{file.name}")
    return found

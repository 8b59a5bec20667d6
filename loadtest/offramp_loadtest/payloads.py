"""Labelled inputs, encoded before the first request is due, so that the client's time goes into sending."""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from offramp_loadtest.errors import LoadTestError

MAX_FILE_BYTES = 2 * 2**30
MAX_PAYLOADS = 100_000
INPUT_NAMES = ("x", "inputs", "images", "data")
LABEL_NAMES = ("y", "labels", "label", "targets")
IMAGE_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
}


@dataclass(frozen=True, slots=True)
class Payload:
    """One row to be classified.

    Attributes:
        label: Its true class, if it is known.
        array: The row without a batch axis, or None for an encoded image.
        image: An image file's bytes, or None for an array.
        content_type: Of the image.
        difficulty: How hard the row is, in any unit, if that is known; only the order counts.
        fields: Routing fields of this row's request, beside the scenario's; they win.
    """

    label: int | None
    array: np.ndarray | None = None
    image: bytes | None = None
    content_type: str = ""
    difficulty: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def npy(self) -> bytes:
        """Encode the array as an `.npy` file with a batch axis of 1."""
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(self.array)[None], allow_pickle=False)
        return buffer.getvalue()


def payloads_of_arrays(
    inputs: np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    difficulty: Sequence[float] | np.ndarray | None = None,
) -> tuple[Payload, ...]:
    """Make one payload per row.

    Raises:
        LoadTestError: If there is no row, or the labels or difficulties are not one per row.
    """
    if inputs.ndim < 1 or not len(inputs):
        raise LoadTestError("data: holds no row")
    if labels is not None and len(labels) != len(inputs):
        raise LoadTestError(f"data: {len(inputs)} inputs, but {len(labels)} labels")
    if difficulty is not None and np.shape(difficulty) != (len(inputs),):
        raise LoadTestError(f"data: 'difficulty' must hold one number for each of {len(inputs)} inputs")
    step = -(-len(inputs) // MAX_PAYLOADS)  # data sorted by class must not lose its last classes
    rows = inputs[::step]
    try:
        known = [None] * len(rows) if labels is None else [int(label) for label in labels[::step]]
    except (TypeError, ValueError):
        raise LoadTestError("data: labels must be class numbers") from None
    hard = [None] * len(rows) if difficulty is None else np.asarray(difficulty[::step], dtype=np.float64).tolist()
    return tuple(
        Payload(label, np.ascontiguousarray(row), difficulty=score)
        for row, label, score in zip(rows, known, hard, strict=True)
    )


def read_payloads(path: Path) -> tuple[Payload, ...]:
    """Read payloads from an `.npz` (inputs, labels), an `.npy` (inputs), or a folder of images, a folder per class.

    An `.npz` may hold a third array, `difficulty`.

    Nothing is ever unpickled. An image folder's classes are its folders' names where all are
    numbers, else their places in alphabetical order.

    Raises:
        LoadTestError: If the path holds none of these.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise LoadTestError(f"data: {str(path)!r} does not exist")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise LoadTestError(f"data: {path.name!r} is over {MAX_FILE_BYTES} bytes")
    refuse_expansion(path)
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return payloads_of_arrays(loaded)
            inputs = next((loaded[name] for name in INPUT_NAMES if name in loaded.files), None)
            labels = next((loaded[name] for name in LABEL_NAMES if name in loaded.files), None)
            difficulty = loaded["difficulty"] if "difficulty" in loaded.files else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise LoadTestError(f"data: {path.name!r} is not an .npz or .npy file of plain arrays") from None
    if inputs is None:
        raise LoadTestError(f"data: {path.name!r} needs an array named one of {', '.join(INPUT_NAMES)}")
    return payloads_of_arrays(inputs, labels, difficulty)


def refuse_expansion(path: Path) -> None:
    """Refuse a small archive that would grow to more than may be read.

    Raises:
        LoadTestError: If it would.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_FILE_BYTES:
            raise LoadTestError(f"data: {path.name!r} holds over {MAX_FILE_BYTES} bytes")


def _of_folder(folder: Path) -> tuple[Payload, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    are_numbers = all(name.isdecimal() for name in names)
    labelled = [
        (int(name) if are_numbers else place, file)
        for place, name in enumerate(names)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in IMAGE_TYPES
    ]
    chosen = labelled[:: -(-len(labelled) // MAX_PAYLOADS) or 1]
    if not chosen:
        raise LoadTestError(f"data: {str(folder)!r} holds no folder of {', '.join(sorted(IMAGE_TYPES))} images")
    if sum(file.stat().st_size for _, file in chosen) > MAX_FILE_BYTES:
        raise LoadTestError(f"data: the images in {str(folder)!r} take over {MAX_FILE_BYTES} bytes")
    return tuple(
        Payload(label, image=file.read_bytes(), content_type=IMAGE_TYPES[file.suffix.lower()]) for label, file in chosen
    )

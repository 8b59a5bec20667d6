"""A trace: what every exit of a bundle said about every sample of a data set, recorded in one pass at full depth.

A trace is all that calibration and evaluation need: any policy can be replayed over it without running the network
again. Its file is a plain `.npz` that numpy reads anywhere; ours are stored without compression, so that the arrays are
mapped into memory instead of being read, and neither writing nor reading one needs room for it.

Shapes: N = samples, E = exits, C = classes.
"""

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

import numpy as np
from offramp_contract.errors import BrokenTrace
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray, IntArray

from offramp_calibration.npz import BROKEN_ZIP, members_of, read_member

TRACE_FORMAT_VERSION: Final = 1
MAX_ABOUT_BYTES = 2**20
MAX_SAMPLES = 2**31
_LOCAL_HEADER_BYTES = 30
_ROWS_AT_ONCE = 8192
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class About:
    """Where a trace comes from.

    Attributes:
        model: Name of the bundle.
        model_digest: Its model digest.
        data_digest: Sha256 over all inputs and labels, in order (see `record`).
        depth_E: Share of the full path's FLOPs that a row has run when it stands at each exit, rising to 1.
    """

    model: str
    model_digest: str
    data_digest: str
    depth_E: tuple[float, ...]

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Read it.

        Raises:
            BrokenTrace: If it is not what `record` writes, or of a format this version does not know.
        """
        try:
            written = json.loads(text)
            if (version := written.pop("format_version")) != TRACE_FORMAT_VERSION:
                raise BrokenTrace(f"trace format {version!r} is not known here; this Offramp reads 1")
            about = cls(**written | {"depth_E": tuple(float(depth) for depth in written["depth_E"])})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise BrokenTrace("the trace does not say which bundle and data it comes from") from None
        texts = (about.model, about.model_digest, about.data_digest)
        if not all(isinstance(text, str) for text in texts) or not all(map(_SHA256.fullmatch, texts[1:])):
            raise BrokenTrace("the trace does not say which bundle and data it comes from")
        rising = all(a <= b for a, b in zip((0.0, *about.depth_E), (*about.depth_E, 1.0), strict=True))
        if not about.depth_E or not rising:
            raise BrokenTrace("the trace's depths do not rise from 0 to 1")
        return about

    def to_json(self) -> bytes:
        """Write it."""
        return json.dumps({"format_version": TRACE_FORMAT_VERSION} | asdict(self)).encode()


@dataclass(frozen=True, slots=True)
class Trace:
    """What every exit said about every sample.

    Attributes:
        about: Where it comes from.
        label_N: The right class of each sample, int64.
        logits_ENC: Per exit the raw scores, float32, shape (N, C); mapped from the file where one was read.
    """

    about: About
    label_N: IntArray
    logits_ENC: tuple[FloatArray, ...]

    def __len__(self) -> int:
        return len(self.label_N)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open a trace's file.

        Raises:
            BrokenTrace: If it is not a trace, or a part of it is missing or of the wrong shape.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                members = members_of(archive)
                if "about" not in members or members["about"].file_size > MAX_ABOUT_BYTES:
                    raise BrokenTrace(f"{path.name!r} is not a trace: it does not say which bundle it comes from")
                about = About.from_json(_map_member(path, archive, members["about"]).tobytes())
                names = ("label", *(f"logits_{index}" for index in range(len(about.depth_E))))
                label_N, *logits_ENC = (_map_member(path, archive, members[name]) for name in names)
        except KeyError as missing:
            raise BrokenTrace(f"{path.name!r} holds no {missing.args[0]}") from None
        except BROKEN_ZIP:
            raise BrokenTrace(f"{path.name!r} is not a trace that `record` wrote") from None
        _check_shapes(label_N, logits_ENC)
        return cls(about, label_N, tuple(logits_ENC))

    def check_made_for(self, manifest: Manifest) -> None:
        """Check that it can have been recorded with a bundle.

        Raises:
            BrokenTrace: If it was made for another model, or holds what `record` would never have written for this one.
        """
        if self.about.model_digest != manifest.model_digest:
            raise BrokenTrace(
                f"the trace was recorded with another model than this bundle's, {self.about.model[:64]!r}"
            )
        widths = [exit_.num_classes for exit_ in manifest.exits]
        if [
            logits_NC.shape[1] for logits_NC in self.logits_ENC
        ] != widths or self.about.depth_E != manifest.exit_depths:
            raise BrokenTrace("the trace's exits are not this bundle's")
        for index, logits_NC in enumerate(self.logits_ENC):
            starts = range(0, len(self), _ROWS_AT_ONCE)
            if not all(np.isfinite(logits_NC[start : start + _ROWS_AT_ONCE]).all() for start in starts):
                raise BrokenTrace(f"the trace's logits_{index} are not all finite")


class TraceWriter:
    """Appends batches to a trace on disk; made by `writing`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._num_samples = 0
        self._parts: dict[str, tuple[IO[bytes], np.dtype[Any], tuple[int, ...]]] = {}

    def append(self, label_B: IntArray, logits_EBC: Sequence[FloatArray]) -> None:
        """Add a batch: labels (B,) and per exit logits (B, C)."""
        self._append("label", label_B.astype(np.int64))
        for index, logits_BC in enumerate(logits_EBC):
            self._append(f"logits_{index}", logits_BC.astype(np.float32))
        self._num_samples += len(label_B)

    def finish(self, about: About) -> None:
        """Join what was appended into the file and put it in its place."""
        self._append("about", np.frombuffer(about.to_json(), np.uint8))
        joined = self._folder / "joined"
        with zipfile.ZipFile(joined, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (file, dtype, row_shape) in self._parts.items():
                length = len(about.to_json()) if name == "about" else self._num_samples
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header | {"shape": (length, *row_shape)})
                    file.seek(0)
                    shutil.copyfileobj(file, member, 2**20)
        os.replace(joined, self._path)

    def close(self) -> None:
        """Let go of the parts."""
        for file, _, _ in self._parts.values():
            file.close()

    def _append(self, name: str, rows: np.ndarray) -> None:
        if name not in self._parts:
            self._parts[name] = ((self._folder / name).open("w+b"), rows.dtype, rows.shape[1:])
        file, _, row_shape = self._parts[name]
        if rows.shape[1:] != row_shape:
            raise BrokenTrace(f"{name}: rows of shape {rows.shape[1:]} follow rows of shape {row_shape}")
        file.write(np.ascontiguousarray(rows).data)


@contextmanager
def writing(path: Path) -> Iterator[TraceWriter]:
    """Write a trace batch by batch; nothing is left behind if it does not come to `finish`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        writer = TraceWriter(path, Path(folder))
        try:
            yield writer
        finally:
            writer.close()


def _map_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Map one array of an `.npz` into memory."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise BrokenTrace(f"{path.name!r} is compressed; a trace is written as `record` writes it, without compression")
    member = read_member(archive, info, BrokenTrace)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER_BYTES)
        name_length, extra_length = np.frombuffer(local[26:30], "<u2").tolist()
    offset = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length + member.header_bytes
    return np.memmap(path, member.dtype, "r", offset, member.shape)


def _check_shapes(label_N: np.ndarray, logits_ENC: Sequence[np.ndarray]) -> None:
    if label_N.ndim != 1 or label_N.dtype != np.int64 or not 1 <= len(label_N) <= MAX_SAMPLES:
        raise BrokenTrace("the trace's labels must be int64, one a sample")
    for index, logits_NC in enumerate(logits_ENC):
        if logits_NC.ndim != 2 or logits_NC.dtype != np.float32 or len(logits_NC) != len(label_N):
            raise BrokenTrace(f"the trace's logits_{index} must be float32, one row a sample")
    num_classes = min(logits_NC.shape[1] for logits_NC in logits_ENC)
    if num_classes < 2 or label_N.min() < 0 or label_N.max() >= num_classes:
        raise BrokenTrace(f"the trace's labels are not all among the {num_classes} classes that its exits tell apart")

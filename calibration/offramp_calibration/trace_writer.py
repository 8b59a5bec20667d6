"""Writes a trace batch by batch and pass by pass; see `offramp_calibration.trace` for what is in its file.

Shapes: B = batch, E = exits, C = classes, K = exits with a rule of the network's own, G = gates.
"""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from offramp_contract.errors import BrokenTrace
from offramp_contract.statistics import FloatArray, IntArray

from offramp_calibration.about import About
from offramp_calibration.trace import named


class TraceWriter:
    """Appends batches to a trace on disk; made by `writing`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._num_samples = 0
        self._pass_index = 0
        self._parts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._files: dict[str, IO[bytes]] = {}

    def append(self, label_B: IntArray, logits_EBC: Sequence[FloatArray], native_KB: Sequence[FloatArray] = ()) -> None:
        """Add a batch: labels (B,), per exit logits (B, C), and what its own rule compares (B,) if it has one.

        Labels are the same in every pass and are taken from the first.
        """
        if self._pass_index == 0:
            self._append("label", label_B.astype(np.int64))
            self._num_samples += len(label_B)
        for index, logits_BC in enumerate(logits_EBC):
            self._append(named(f"logits_{index}", self._pass_index), logits_BC.astype(np.float32))
        for index, native_B in enumerate(native_KB):
            self._append(named(f"native_{index}", self._pass_index), native_B.astype(np.float32))

    def append_gates(self, depth_BE: FloatArray, score_BG: FloatArray) -> None:
        """Add what a gated network's rows ran, as shares of full depth (B, E), and its gates' scores (B, G)."""
        self._append(named("depth", self._pass_index), depth_BE.astype(np.float32))
        self._append(named("scores", self._pass_index), score_BG.astype(np.float32))

    def begin_pass(self) -> None:
        """Let what follows belong to another pass over the same samples."""
        self._pass_index += 1
        self.close()

    def finish(self, about: About) -> None:
        """Join what was appended into the file and put it in its place."""
        self._append("about", np.frombuffer(about.to_json(), np.uint8))
        self.close()
        joined = self._folder / "joined"
        with zipfile.ZipFile(joined, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (dtype, row_shape) in self._parts.items():
                length = len(about.to_json()) if name == "about" else self._num_samples
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header | {"shape": (length, *row_shape)})
                    with (self._folder / name).open("rb") as file:
                        shutil.copyfileobj(file, member, 2**20)
        os.replace(joined, self._path)

    def close(self) -> None:
        """Let go of the parts that are open."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append(self, name: str, rows: np.ndarray) -> None:
        _, row_shape = self._parts.setdefault(name, (rows.dtype, rows.shape[1:]))
        if rows.shape[1:] != row_shape:
            raise BrokenTrace(f"{name}: rows of shape {rows.shape[1:]} follow rows of shape {row_shape}")
        if name not in self._files:
            self._files[name] = (self._folder / name).open("ab")
        self._files[name].write(np.ascontiguousarray(rows).data)


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

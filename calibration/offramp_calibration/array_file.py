"""Reads the arrays of an `.npz` sample by sample: compressed or not, larger than memory or not, a batch at a time."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from offramp_contract.errors import UnfitData

from offramp_calibration.npz import BROKEN_ZIP, Member, members_of, read_member

MAX_ARRAYS = 64


class ArrayFile:
    """An `.npz` whose arrays hold one row a sample.

    Attributes:
        path: Where it lies.
        arrays: What each array is, by name.
    """

    def __init__(self, path: Path) -> None:
        """Look through its headers.

        Raises:
            UnfitData: If it is not an `.npz` of plain arrays.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = members_of(archive)
                if len(members) > MAX_ARRAYS:
                    raise UnfitData(f"data: {path.name!r} holds {len(members)} arrays, more than {MAX_ARRAYS}")
                self.arrays = {name: read_member(archive, info, UnfitData) for name, info in members.items()}
        except FileNotFoundError:
            raise UnfitData(f"data: {str(path)!r} does not exist") from None
        except BROKEN_ZIP:
            raise self._unreadable() from None

    def rows(self, name: str, size: int) -> Iterator[np.ndarray]:
        """Give an array's rows in order, at most `size` at a time.

        Raises:
            UnfitData: If its bytes are broken.
        """
        member = self.arrays[name]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member.info) as file:
                file.seek(member.header_bytes)
                for start in range(0, member.shape[0], size):
                    yield _read(file, member, min(size, member.shape[0] - start))
        except BROKEN_ZIP:
            raise self._unreadable() from None

    def row(self, name: str, index: int) -> np.ndarray:
        """Give one row of an array.

        Raises:
            UnfitData: If its bytes are broken.
        """
        member = self.arrays[name]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member.info) as file:
                file.seek(member.header_bytes + index * member.row_bytes)
                row: np.ndarray = _read(file, member, 1)[0]
                return row
        except BROKEN_ZIP:
            raise self._unreadable() from None

    def _unreadable(self) -> UnfitData:
        return UnfitData(f"data: {self.path.name!r} is not a readable .npz")


def _read(file: IO[bytes], member: Member, num_rows: int) -> np.ndarray:
    num_bytes = num_rows * member.row_bytes
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise EOFError
    return np.frombuffer(content, member.dtype).reshape(num_rows, *member.shape[1:])

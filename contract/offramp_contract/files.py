"""Where a bundle's bytes come from: a folder, or the same folder zipped. Nothing is extracted or followed outside."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from offramp_contract.errors import ManifestError

MAX_FILE_BYTES = 2 * 2**30
"""A stage graph is one protobuf message, which ends at 2 GiB."""

_PLAIN_ZIP = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile and zlib raise on bytes that are not what the archive's directory promises.
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


class BundleFiles(Protocol):
    """Reads the files of one bundle."""

    name: str

    def read(self, path: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Read a file.

        Raises:
            ManifestError: If it is missing, too large, or leads out of the bundle.
        """

    def has(self, path: str) -> bool:
        """Tell whether a file is there."""


class FolderFiles:
    """The files of a bundle folder."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self._folder = folder.resolve()

    def has(self, path: str) -> bool:
        """Tell whether a file is there."""
        return os.path.isfile(self._inside(path))  # unlike Path.is_file, False for a name that is too long

    def read(self, path: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Read a file; see `BundleFiles.read`."""
        if not self.has(path):
            raise ManifestError(f"file {path!r} is missing from the bundle {self.name!r}")
        file = self._inside(path)
        try:
            if file.stat().st_size > max_bytes:
                raise ManifestError(f"file {path!r} is over {max_bytes} bytes")
            return file.read_bytes()
        except OSError:
            raise ManifestError(f"file {path!r} of the bundle {self.name!r} cannot be read") from None

    def _inside(self, path: str) -> Path:
        try:
            file = (self._folder / path).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links; a NUL or what no file name can hold
            raise ManifestError(f"file path {path!r} is not one that a bundle can hold") from None
        if not file.is_relative_to(self._folder):
            raise ManifestError(f"file path {path!r} leaves the bundle's folder")
        return file


class ZipFiles:
    """The files of a zipped bundle, with the manifest at the top or inside one single folder."""

    def __init__(self, archive: Path) -> None:
        self.name = archive.stem
        self._archive = archive
        try:
            with zipfile.ZipFile(archive) as opened:
                self._members = {info.filename: info for info in opened.infolist() if not info.is_dir()}
        except _BROKEN_ZIP:
            raise ManifestError(f"{archive.name!r} is not a readable zip file") from None
        folders = {name.split("/")[0] for name in self._members if "/" in name}
        self._prefix = f"{folders.pop()}/" if len(folders) == 1 and not self._tops() else ""

    def has(self, path: str) -> bool:
        """Tell whether a file is there."""
        return self._prefix + path in self._members

    def read(self, path: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Read a file; see `BundleFiles.read`."""
        member = self._prefix + path
        if member not in self._members:
            raise ManifestError(f"file {path!r} is missing from the bundle {self.name!r}")
        if self._members[member].compress_type not in _PLAIN_ZIP:
            raise ManifestError(f"file {path!r} is compressed in a way other than zip's usual one")
        if self._members[member].file_size > max_bytes:
            raise ManifestError(f"file {path!r} is over {max_bytes} bytes")
        try:
            with zipfile.ZipFile(self._archive) as opened:
                return opened.read(member)
        except _BROKEN_ZIP:
            raise ManifestError(f"file {path!r} cannot be read from the zipped bundle {self.name!r}") from None

    def _tops(self) -> list[str]:
        return [name for name in self._members if "/" not in name]


def open_files(path: Path) -> BundleFiles:
    """Open a bundle folder or a `.zip` of one.

    Raises:
        ManifestError: If there is neither.
    """
    if path.is_dir():
        return FolderFiles(path)
    if path.is_file() and path.suffix == ".zip":
        return ZipFiles(path)
    raise ManifestError(f"{path.name!r} is neither a bundle folder nor a .zip of one")

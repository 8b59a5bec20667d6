"""Finds bundles in a folder and notices when they change. A model's name is looked up, never made into a path."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from offramp_contract.errors import ManifestError
from offramp_contract.files import open_files
from offramp_contract.manifest import MANIFEST_FILE, read_manifest

Fingerprint: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""Path, size, time of change and inode of each file of a bundle."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's bundle lies."""

    name: str
    path: Path


def scan(path: Path) -> dict[str, Source]:
    """Find the bundles at a path: the one that it is, or those in the folder that it is.

    Raises:
        BundleError: If it is neither, or is a bundle without a readable manifest.
    """
    if path.suffix == ".zip" or (path / MANIFEST_FILE).exists():
        name = read_manifest(open_files(path)).name
        return {name: Source(name, path)}
    try:
        children = sorted(path.iterdir())
    except OSError:
        raise ManifestError(f"{str(path)!r} is neither a bundle nor a folder of bundles that can be read") from None
    sources: dict[str, Source] = {}
    for child in children:
        name = child.name.removesuffix(".zip")
        if _NAME.fullmatch(name) and (child.is_dir() or child.suffix == ".zip"):
            sources.setdefault(name, Source(name, _newest_version(child)))
    return sources


def fingerprint_of(bundle: Path) -> Fingerprint:
    """Describe a bundle's files so that any change shows, without reading them."""
    found = []
    try:
        for file in [bundle, *sorted(bundle.rglob("*"))]:
            status = file.stat()
            found.append((str(file), status.st_size, status.st_mtime_ns, status.st_ino))
    except OSError:  # it changes right now: what was found so far differs from what will be found next time
        found.append((str(bundle), -1, 0, 0))
    return tuple(found)


def _newest_version(child: Path) -> Path:
    """Give the highest of a model's numbered versions, or the entry itself if it has none."""
    if not child.is_dir() or (child / MANIFEST_FILE).exists():
        return child
    try:
        numbered = [version for version in child.iterdir() if version.name.removesuffix(".zip").isdecimal()]
    except OSError:  # opening it says what is wrong
        return child
    return max(numbered, key=lambda version: int(version.name.removesuffix(".zip")), default=child)

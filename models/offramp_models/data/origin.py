"""Where a data set's files are: in a folder of the user's, or downloaded once, with a checksum, into the cache.

Nothing is taken from the network when a folder is named (`--data-dir`, or the environment variable OFFRAMP_DATA).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import httpx
from offramp_contract.errors import DataSetError

FOLDER_VARIABLE: Final = "OFFRAMP_DATA"
SILENCE_S: Final = 60.0
"""A server that sends nothing for this long is given up."""


@dataclass(frozen=True, slots=True)
class Published:
    """A file as its publisher offers it.

    Attributes:
        url: Where it is.
        checksum: Algorithm and hexadecimal digest: `sha256:...`.
        num_bytes: Its size; a download is broken off beyond it.
    """

    url: str
    checksum: str
    num_bytes: int

    @property
    def name(self) -> str:
        """The last part of its address, by which it is kept."""
        return self.url.rpartition("/")[2]


def folder_of_user(data_dir: Path | None) -> Path | None:
    """Give the folder that the user keeps data sets in: the one named, else that of OFFRAMP_DATA, else None."""
    if data_dir is not None:
        return data_dir
    named = os.environ.get(FOLDER_VARIABLE, "")
    return Path(named) if named else None


def find(folder: Path, inside: str, names: Sequence[str]) -> Path:
    """Find the folder that holds a data set's files: the one given, or one of a known name in it.

    Args:
        folder: The user's.
        inside: Name that the data set's own folder has, if it has one.
        names: The files that must be there.

    Raises:
        DataSetError: If neither holds them all; the message says which are looked for.
    """
    for place in (folder, folder / inside):
        if all((place / name).is_file() for name in names):
            return place
    raise DataSetError(f"{folder} holds no {inside}: it needs {', '.join(names)}, there or in a folder {inside}")


def cache_folder(name: str) -> Path:
    """Give the folder that a data set is downloaded into."""
    import pooch

    return Path(pooch.os_cache("offramp")) / name


def download(file: Published, folder: Path) -> Path:
    """Give the path of a published file in the cache; it is downloaded if it is not there, or not whole.

    Args:
        file: What to download.
        folder: Where it is kept.

    Raises:
        DataSetError: If the server cannot be reached or refuses, or sends anything but the published bytes.
    """
    import pooch

    def fetch(url: str, output: str | IO[bytes], _: object) -> None:
        _stream(url, Path(str(output)), file.num_bytes)

    try:
        return Path(pooch.retrieve(file.url, file.checksum, file.name, folder, downloader=fetch))
    except httpx.HTTPStatusError as error:
        raise DataSetError(f"{file.url} answers {error.response.status_code}: {_AWAY}") from None
    except httpx.HTTPError:
        raise DataSetError(f"{file.url} cannot be reached: {_AWAY}") from None
    except ValueError:  # what pooch raises for a checksum that differs; it has removed the file
        raise DataSetError(f"{file.url} is not the published file, its checksum differs: {_AWAY}") from None


_AWAY: Final = f"download it yourself and name its folder with --data-dir or {FOLDER_VARIABLE}"


def _stream(url: str, output: Path, num_bytes: int) -> None:
    received = 0
    with (
        httpx.stream("GET", url, follow_redirects=True, timeout=SILENCE_S) as response,
        output.open("wb") as file,
    ):
        response.raise_for_status()
        for piece in response.iter_raw():
            received += len(piece)
            if received > num_bytes:
                raise DataSetError(f"{url} is not the published file, it is larger: {_AWAY}")
            file.write(piece)

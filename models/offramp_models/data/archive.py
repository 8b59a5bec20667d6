"""Takes the files that are needed out of an archive, and nothing else."""

import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from offramp_contract.errors import DataSetError

MAX_MEMBERS = 1000
"""An archive is not searched further."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file that is wanted.

    Attributes:
        path: Where it is in the archive, and where it goes in the folder.
        max_bytes: It may be no larger.
    """

    path: str
    max_bytes: int


def unpack(archive: Path, members: Sequence[Member], folder: Path) -> None:
    """Take files out of a .tar.gz; each appears in the folder whole or not at all.

    Paths are those that are asked for, never those that the archive names.

    Raises:
        DataSetError: If the archive is broken, or a file is not in it, is no plain file, or is too large.
    """
    wanted = {member.path: member for member in members}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for _, info in zip(range(MAX_MEMBERS), tar, strict=False):
                member = wanted.pop(info.name, None)
                if member is None:
                    continue
                content = tar.extractfile(info) if info.isreg() else None
                if content is None or info.size > member.max_bytes:
                    raise DataSetError(f"{archive}: {member.path} must be a file of at most {member.max_bytes:,} bytes")
                with content, _appearing(folder / member.path) as file:
                    shutil.copyfileobj(content, file)
                if not wanted:
                    return
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the folder cannot be written: not the archive's fault
        raise DataSetError(f"{archive} is no whole .tar.gz; remove it and try again") from None
    raise DataSetError(f"{archive} lacks {', '.join(sorted(wanted))}")


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        unfinished = Path(file.name)
        try:
            yield file
            file.close()
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

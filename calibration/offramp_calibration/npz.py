"""The arrays of an `.npz`: where they lie and what they are, without reading them and without trusting their headers.

Nothing is ever unpickled, and nothing is allocated before what a header claims has been compared with what is there.
"""

import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from offramp_contract.errors import CalibrationError

BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)
"""What zipfile and zlib raise on bytes that are not what the archive's directory promises."""
MAX_HEADER_BYTES = 4096
_PLAIN_KINDS = "biufU"


@dataclass(frozen=True, slots=True)
class Member:
    """One array of an `.npz`.

    Attributes:
        info: Where it lies in the archive.
        shape: Its shape, the samples first.
        dtype: Numbers, booleans or plain text; never objects.
        header_bytes: Length of the header in front of its first number.
    """

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes that one sample takes."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, error: type[CalibrationError]) -> Member:
    """Read the header of one array.

    Args:
        archive: The open `.npz`.
        info: One of its members.
        error: What to raise if it is not a plain array of the size that its header claims.
    """
    what = f"{Path(archive.filename or '').name!r}: array {info.filename.removesuffix('.npy')[:64]!r}"
    with archive.open(info) as member:
        try:
            version = npy_format.read_magic(member)
            if version != (1, 0):  # later versions are for headers of any length
                raise ValueError
            header = npy_format.read_array_header_1_0(member, max_header_size=MAX_HEADER_BYTES)
        except Exception:  # numpy parses the header as Python source: what its parts raise on garbage is unbounded
            raise error(f"{what} is not one that numpy writes") from None
        shape, fortran_order, dtype = header
        header_bytes = member.tell()
    if dtype.kind not in _PLAIN_KINDS:
        raise error(f"{what} must hold numbers; objects are never read")
    if fortran_order and len(shape) > 1:
        raise error(f"{what} lies in Fortran order; write it with numpy.ascontiguousarray")
    claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - header_bytes
    if any(side < 0 for side in shape) or claimed != held:
        raise error(f"{what} claims {claimed} bytes in its header and holds {held}")
    return Member(info, shape, dtype, header_bytes)


def members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Give an archive's members by the names of their arrays."""
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

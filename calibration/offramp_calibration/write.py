"""Puts a calibration into its bundle in one step, so that a server that watches the folder never sees half of one."""

import os
import tempfile
from pathlib import Path

from offramp_contract.calibration import CALIBRATION_FILE, MAX_CALIBRATION_BYTES, Calibration
from offramp_contract.errors import CalibrationError
from offramp_contract.manifest import MANIFEST_FILE
from offramp_runtime import Bundle


def write_calibration(calibration: Calibration, folder: Path) -> Path:
    """Write a bundle's calibration, in place of the one that was there.

    Args:
        calibration: What to write.
        folder: The bundle's.

    Returns:
        The file.

    Raises:
        CalibrationError: If it is larger than a reader accepts.
        OSError: If the folder cannot be written to; the old calibration is still there then.
    """
    content, path = _content(calibration), folder / CALIBRATION_FILE
    with tempfile.TemporaryDirectory(prefix=f".{CALIBRATION_FILE}-", dir=folder) as beside:
        written = Path(beside) / CALIBRATION_FILE
        with written.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    return path


def write_bundle(bundle: Bundle, calibration: Calibration, folder: Path) -> Path:
    """Write a copy of a bundle with another calibration, all at once or not at all.

    Args:
        bundle: The open bundle.
        calibration: What to write beside its graphs.
        folder: Where; it must not exist yet.

    Returns:
        The calibration's file.

    Raises:
        CalibrationError: If the calibration is larger than a reader accepts.
        OSError: If it cannot be written.
    """
    content = _content(calibration)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        copy = Path(beside) / folder.name
        copy.mkdir()
        for file in bundle.manifest.files:
            (copy / file.path).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.path).write_bytes(bundle.read(file))
        (copy / MANIFEST_FILE).write_bytes(bundle.manifest.to_bytes())
        (copy / CALIBRATION_FILE).write_bytes(content)
        os.rename(copy, folder)
    return folder / CALIBRATION_FILE


def _content(calibration: Calibration) -> bytes:
    content = calibration.to_bytes()
    if len(content) > MAX_CALIBRATION_BYTES:
        raise CalibrationError(f"{CALIBRATION_FILE} would be {len(content):,} bytes, over {MAX_CALIBRATION_BYTES:,}")
    return content

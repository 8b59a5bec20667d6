"""A bundle's folder appears at once and whole, or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offramp_contract.errors import ExportError
from offramp_contract.manifest import MANIFEST_FILE


@contextmanager
def published(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder beside `out` that becomes it if all goes well, and leaves nothing behind if not.

    Raises:
        ExportError: If something is at `out` already: a bundle is replaced when asked, anything else never.
    """
    out = out.absolute()
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and not overwrite:
        raise ExportError(f"{str(out)!r} exists; choose another folder or ask to overwrite it")
    if not is_free and not (out / MANIFEST_FILE).is_file():
        raise ExportError(f"{str(out)!r} is no bundle and is not overwritten; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise

"""The two consoles that commands write to: answers go to stdout, progress and errors to stderr."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

WIDTH_OF_A_FILE = 100
"""Columns of output that is not shown on a terminal: the demo's table fits in it."""

stdout = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_A_FILE)
stderr = Console(stderr=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Give a progress display with a bar, counts and the time taken for each task; it stays when it is done."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr) as display:
        yield display

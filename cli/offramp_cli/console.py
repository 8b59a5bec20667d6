"""The two consoles that commands write to: answers go to stdout, progress and errors to stderr."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

stdout = Console()
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

"""The flags of the commands that run a bundle over labelled data."""

from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer

DATA_KINDS: Final = (
    "an .npz with x and y; a folder with a sub-folder of images for each class; a .csv with the columns text and "
    "label; or a data set of `offramp models`"
)
DataDir: TypeAlias = Annotated[Path | None, typer.Option(help="Where data sets lie; see `offramp models`.")]
TraceFile: TypeAlias = Annotated[
    Path | None, typer.Option(help="Keep what every exit said in this .npz, and use it instead if it is there.")
]
BatchSize: TypeAlias = Annotated[int, typer.Option(min=1, help="Samples that run together.")]
Threads: TypeAlias = Annotated[int | None, typer.Option(min=1, help="CPU threads; unset: one per core.")]
Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
AllowMissingClasses: TypeAlias = Annotated[
    bool, typer.Option("--allow-missing-classes", help="Accept data that lacks some of the classes.")
]

"""A `.csv` of texts and labels, read row by row and tokenised as the server tokenises."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Self, TextIO

import numpy as np
from offramp_calibration.labelled import HumanForm, Inputs
from offramp_calibration.labels import ids_of_names
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import TextPreprocessing
from offramp_contract.statistics import IntArray
from offramp_runtime import Bundle
from offramp_server.preprocess import inputs_of_texts

MAX_LINE: Final = 2**20
COLUMNS: Final = ("text", "label")


@dataclass(frozen=True, slots=True)
class TextTable:
    """Labelled texts in a `.csv`.

    Attributes:
        name: The file's.
        label_N: The right class of each text.
        path: Where it lies.
        bundle: Tokenises.
    """

    name: str
    label_N: IntArray
    path: Path
    bundle: Bundle

    @classmethod
    def open(cls, path: Path, bundle: Bundle) -> Self:
        """Read a file's labels.

        Raises:
            UnfitData: If the model takes no texts, or the file has not these columns, or a label is no class.
        """
        if not isinstance(bundle.manifest.preprocessing, TextPreprocessing):
            raise UnfitData("data: the bundle declares no text preprocessing, so a .csv of texts says nothing to it")
        if not path.is_file():
            raise UnfitData(f"data: {str(path)!r} does not exist")
        known: dict[str, int] = {}
        labels = []
        for _, label in _rows(path):
            if label not in known:
                known[label] = ids_of_names([label], bundle.manifest)[label]
            labels.append(known[label])
        return cls(path.name, np.array(labels, dtype=np.int64), path, bundle)

    def batches(self, size: int) -> Iterator[Inputs]:
        """Give token ids and masks; see `LabelledData.batches`."""
        texts = (text for text, _ in _rows(self.path))
        while batch := list(islice(texts, size)):
            yield inputs_of_texts(batch, self.bundle)

    def example(self, index: int) -> HumanForm | None:
        """Give a text."""
        return next((text for text, _ in islice(_rows(self.path), index, None)), None)


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """Give text and label of each row; the header says which column is which, and other columns are passed over."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(file, path.name), strict=True)
        try:
            header = [column.strip() for column in next(reader, [])]
            if not set(COLUMNS) <= set(header):
                raise UnfitData(f"data: the first line of {path.name!r} must name the columns text and label")
            text, label = (header.index(column) for column in COLUMNS)
            for row in reader:
                if row and len(row) != len(header):
                    raise UnfitData(
                        f"data: line {reader.line_num} of {path.name!r} has {len(row)} columns and the header "
                        f"{len(header)}; a text with commas stands in quotes"
                    )
                if row:
                    yield row[text], row[label].strip()
        except csv.Error as error:
            raise UnfitData(f"data: line {reader.line_num} of {path.name!r} is not CSV: {error}") from None
        except UnicodeDecodeError:
            raise UnfitData(f"data: {path.name!r} is not UTF-8 text") from None


def _lines(file: TextIO, name: str) -> Iterator[str]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise UnfitData(f"data: {name!r} has a line of over {MAX_LINE:,} characters")
        yield line

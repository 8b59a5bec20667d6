"""What `--data` names, as labelled data: an `.npz`, a folder of images, a `.csv` of texts, or a data set by its name.

Everything is prepared by the server's own code, so that a bundle is calibrated on what it will be asked.
"""

from dataclasses import dataclass
from pathlib import Path

from offramp_calibration.labelled import LabelledData
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import MANIFEST_FILE
from offramp_runtime import Bundle

from offramp_cli.labelled_data.arrays import ArrayData
from offramp_cli.labelled_data.images import ImageFolder
from offramp_cli.labelled_data.named import Split, named_data
from offramp_cli.labelled_data.texts import TextTable


@dataclass(frozen=True, slots=True)
class Opened:
    """Labelled data, and what a person should know about it.

    Attributes:
        data: The data.
        remark: A sentence, or nothing.
    """

    data: LabelledData
    remark: str = ""


def open_data(text: str, bundle: Bundle, split: Split, data_dir: Path | None = None) -> Opened:
    """Open what a person wrote behind `--data`.

    Args:
        text: A path, or the name of a data set.
        bundle: Decides what the model's inputs are and which classes there are.
        split: Which part of a named data set; other sources are taken whole.
        data_dir: Where named data sets lie.

    Raises:
        UnfitData: If it is none of these, or its labels do not fit the bundle.
    """
    path = Path(text)
    if path.is_dir() and not (path / MANIFEST_FILE).exists():  # a bundle often lies beside, named after its data set
        return Opened(ImageFolder.open(path, bundle.manifest))
    match path.suffix.lower():
        case ".npz":
            return Opened(ArrayData.open(path, bundle.manifest))
        case ".csv":
            return Opened(TextTable.open(path, bundle))
    if path.is_file() or path.name != text:
        reason = "is neither an .npz, a .csv nor a folder of images" if path.exists() else "does not exist"
        raise UnfitData(f"data: {text!r} {reason}")
    data, remark = named_data(text, bundle.manifest, split, data_dir)
    return Opened(data, remark)


__all__ = ["Opened", "Split", "open_data"]

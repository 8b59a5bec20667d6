"""A bundle, opened: its manifest and calibration, and its graphs once their digests have been checked."""

from dataclasses import dataclass
from pathlib import Path

from offramp_contract.calibration import Calibration, read_calibration
from offramp_contract.files import BundleFiles, open_files
from offramp_contract.manifest import File, Manifest, read_manifest, read_verified

from offramp_runtime.weights import SharedArrays


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every file has been checked against the manifest.

    Attributes:
        manifest: What it holds.
        calibration: What held-out data says about it; the bare one if it was never calibrated.
        files: Where its bytes come from.
    """

    manifest: Manifest
    calibration: Calibration
    files: BundleFiles

    def graph(self, stage_index: int) -> bytes:
        """Read one stage's ONNX graph, its digest checked again: nothing unverified is ever run."""
        return self.read(self.manifest.stages[stage_index].graph)

    def read(self, file: File) -> bytes:
        """Read a file that the manifest names, its digest checked."""
        return read_verified(self.files, file)

    def shared_arrays(self) -> SharedArrays:
        """Read the weights that several graphs read, their digest checked again."""
        described = self.manifest.shared_weights
        return SharedArrays(described, b"" if described is None else self.read(described.file))

    @property
    def graphs(self) -> tuple[bytes, ...]:
        """Every stage's ONNX graph, in order."""
        return tuple(self.graph(index) for index in range(len(self.manifest.stages)))


def open_bundle(path: Path) -> Bundle:
    """Open a bundle folder, or a `.zip` of one, and check all of it.

    Raises:
        ManifestError: If the manifest or calibration is missing, invalid, or names a file that is not there.
        UnsupportedFormat: If a newer Offramp wrote it.
        DigestMismatch: If a file's content is not what the manifest or calibration was made for.
    """
    files = open_files(path)
    manifest = read_manifest(files)
    for file in manifest.files:
        content = read_verified(files, file)
        if manifest.shared_weights is not None and file == manifest.shared_weights.file:
            SharedArrays(manifest.shared_weights, content)
    return Bundle(manifest, read_calibration(files, manifest), files)

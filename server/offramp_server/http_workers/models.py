"""Models as a worker holds them: what requests are checked and prepared by, and nothing that runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from offramp_contract.calibration import CALIBRATION_FILE, Calibration, read_calibration
from offramp_contract.errors import ManifestError
from offramp_contract.files import MAX_FILE_BYTES
from offramp_contract.manifest import MANIFEST_FILE, Manifest, read_manifest
from offramp_runtime import Bundle

from offramp_server.choice import choose
from offramp_server.http_workers.messages import ModelAdded
from offramp_server.http_workers.tensors import InputLayout
from offramp_server.ladder import Floor, Gear, ladder_of
from offramp_server.preprocess import prepare
from offramp_server.settings import ServerSettings


class HeldFiles:
    """Files of a bundle that a worker holds in memory."""

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        self.name = name
        self._files = files

    def has(self, path: str) -> bool:
        """Tell whether a file is there."""
        return path in self._files

    def read(self, path: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Read a file; see `BundleFiles.read`."""
        content = self._files.get(path)
        if content is None or len(content) > max_bytes:
            raise ManifestError(f"file {path!r} of the bundle {self.name!r} is not held here")
        return content


def files_for_workers(bundle: Bundle) -> dict[str, bytes]:
    """Give the files by which a worker checks and prepares requests: all of the bundle but what runs."""
    files = {MANIFEST_FILE: bundle.manifest.to_bytes(), CALIBRATION_FILE: bundle.calibration.to_bytes()}
    tokenizer = getattr(bundle.manifest.preprocessing, "tokenizer", None)
    return files if tokenizer is None else files | {tokenizer.path: bundle.read(tokenizer)}


@dataclass(frozen=True, slots=True, eq=False)
class RemoteModel:
    """A model that the engine serves, as far as requests are checked against it.

    Attributes:
        number: What the engine calls it.
        name: The name clients use.
        version: The version that is served.
        bundle: Its manifest, calibration and tokenizer; it holds no graph.
        manifest: Its manifest.
        calibration: Its calibration.
        ladder: Its gears, as in the engine.
        layout: Where its inputs lie in shared memory.
    """

    number: int
    name: str
    version: str
    bundle: Bundle
    manifest: Manifest
    calibration: Calibration
    ladder: tuple[Gear, ...]
    layout: InputLayout

    @property
    def key(self) -> str:
        """What no other model goes by, nor another load of this one."""
        return f"{self.name}@{self.version}#{self.number}"


def remote_model(added: ModelAdded, settings: ServerSettings) -> RemoteModel:
    """Read what the engine says about a model."""
    files = HeldFiles(added.name, added.files)
    manifest = read_manifest(files)
    bundle = Bundle(manifest, read_calibration(files, manifest), files)
    prepare(bundle)
    default = choose({}, manifest, bundle.calibration, settings.defaults_of(added.name))
    floor = Floor(settings.gear_floor_accuracy, settings.gear_floor_risk)
    ladder = ladder_of(manifest, bundle.calibration, default, floor) if settings.gears else ()
    layout = InputLayout(manifest.inputs)
    return RemoteModel(added.model, added.name, added.version, bundle, manifest, bundle.calibration, ladder, layout)

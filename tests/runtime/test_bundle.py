import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offramp_contract.errors import BundleError, DigestMismatch, ManifestError, UnsupportedFormat
from offramp_runtime import open_bundle


@pytest.fixture
def folder(bundle_folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to break."""
    return shutil.copytree(bundle_folder, tmp_path / "dense")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return folder.with_suffix(".zip")


def test_a_sound_bundle_opens_with_everything_it_holds(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.manifest.name == "dense"
    assert bundle.calibration.temperatures == (0.5, 2.0, 4.0)
    assert bundle.graphs == tuple((folder / f"stages/{i:02d}.onnx").read_bytes() for i in range(4))
    assert bundle.graph(2) == bundle.graphs[2]


def test_a_zipped_bundle_is_the_same_bundle(folder: Path) -> None:
    opened, unzipped = open_bundle(zipped(folder)), open_bundle(folder)
    assert opened.manifest == unzipped.manifest
    assert opened.calibration == unzipped.calibration
    assert opened.graphs == unzipped.graphs


def test_a_bundle_that_was_never_calibrated_opens_bare(folder: Path) -> None:
    (folder / "calibration.json").unlink()
    assert open_bundle(folder).calibration.temperatures == (1.0, 1.0, 1.0)


def lose_a_graph(folder: Path) -> None:
    (folder / "stages/01.onnx").unlink()


def alter_a_graph(folder: Path) -> None:
    graph = folder / "stages/01.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")


def empty_a_graph(folder: Path) -> None:
    (folder / "stages/03.onnx").write_bytes(b"")


def swap_two_graphs(folder: Path) -> None:
    (folder / "stages/00.onnx").rename(folder / "kept")
    (folder / "stages/01.onnx").rename(folder / "stages/00.onnx")
    (folder / "kept").rename(folder / "stages/01.onnx")


def come_from_the_future(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest.update(format_version=3))


def escape(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["stages"][0]["graph"].update(path="../dense/stages/00.onnx"))


def escape_absolutely(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["stages"][0]["graph"].update(path=str(folder / "stages/00.onnx")))


def escape_through_a_link(folder: Path) -> None:
    shutil.move(folder / "stages/00.onnx", folder.parent / "outside.onnx")
    (folder / "stages/00.onnx").symlink_to(folder.parent / "outside.onnx")


def escape_through_a_linked_folder(folder: Path) -> None:
    shutil.move(folder / "stages", folder.parent / "stages")
    (folder / "stages").symlink_to(folder.parent / "stages")


def add_a_gate(folder: Path) -> None:
    gate = {"name": "gate_0", "stage": 0}
    rewrite(folder, lambda manifest: manifest.update(gates=[gate]))


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def rename_the_model(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest.update(name="other"))


def break_the_calibration(folder: Path) -> None:
    (folder / "calibration.json").write_text("{}")


FLAWS: list[tuple[Callable[[Path], None], type[BundleError], str]] = [
    (lose_a_graph, ManifestError, r"'stages/01\.onnx' is missing"),
    (alter_a_graph, DigestMismatch, r"'stages/01\.onnx' does not have the sha256"),
    (empty_a_graph, DigestMismatch, r"'stages/03\.onnx' does not have the sha256"),
    (swap_two_graphs, DigestMismatch, r"'stages/00\.onnx' does not have the sha256"),
    (come_from_the_future, UnsupportedFormat, "bundle format 3 is not known here"),
    (escape, ManifestError, "leaves the bundle's folder"),
    (escape_absolutely, ManifestError, "leaves the bundle's folder"),
    (escape_through_a_link, ManifestError, "leaves the bundle's folder"),
    (escape_through_a_linked_folder, ManifestError, "leaves the bundle's folder"),
    (add_a_gate, ManifestError, "do not agree on whether it scores any"),
    (lose_the_manifest, ManifestError, r"holds no manifest\.json"),
    (break_the_manifest, ManifestError, r"manifest\.json is not JSON"),
    (rename_the_model, DigestMismatch, r"calibration\.json was made for another model"),
    (break_the_calibration, UnsupportedFormat, "calibration format None"),
]


@pytest.mark.parametrize(("flaw", "kind", "says"), FLAWS, ids=lambda part: getattr(part, "__name__", None))
def test_a_broken_bundle_is_refused_by_name(
    folder: Path, flaw: Callable[[Path], None], kind: type[BundleError], says: str
) -> None:
    open_bundle(folder)
    flaw(folder)
    with pytest.raises(BundleError, match=says) as refused:
        open_bundle(folder)
    assert type(refused.value) is kind


ZIPPABLE = [row for row in FLAWS if "link" not in row[0].__name__]


@pytest.mark.parametrize(("flaw", "kind", "says"), ZIPPABLE, ids=lambda part: getattr(part, "__name__", None))
def test_a_broken_zip_is_refused_as_its_folder_is(
    folder: Path, flaw: Callable[[Path], None], kind: type[BundleError], says: str
) -> None:
    flaw(folder)
    with pytest.raises(kind, match=says):
        open_bundle(zipped(folder))


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="'absent' is neither a bundle folder nor"):
        open_bundle(tmp_path / "absent")


def test_a_graph_that_changes_after_opening_is_not_run(folder: Path) -> None:
    bundle = open_bundle(folder)
    alter_a_graph(folder)
    with pytest.raises(DigestMismatch):
        bundle.graph(1)

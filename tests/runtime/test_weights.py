"""Weights that several graphs read: stored once, verified, shared in memory, and never read from anywhere else."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offramp_contract.errors import BundleError, DigestMismatch, ManifestError
from offramp_contract.manifest import Manifest
from offramp_runtime import Device, StageExecutor, open_bundle, run_all_exits
from onnx import ModelProto, TensorProto, numpy_helper

SHARED = ("W0", "V0", "V1")
"""Weights of the hand-written network that here lie in a file of their own; V1 is read by two stages."""


@pytest.fixture(scope="module")
def shared_folder(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-written bundle with three weights taken out of its graphs."""
    folder = shutil.copytree(bundle_folder, tmp_path_factory.mktemp("shared") / "dense")
    (folder / "calibration.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    content, tensors = bytearray(), {}
    for stage in manifest["stages"]:
        path = folder / stage["graph"]["path"]
        model = ModelProto.FromString(path.read_bytes())
        for weight in model.graph.initializer:
            if weight.name in SHARED:
                content.extend(bytes(-len(content) % 64))
                tensors.setdefault(weight.name, entry(weight, len(content)))
                content.extend(numpy_helper.to_array(weight).tobytes())
                weight.CopyFrom(reference(tensors[weight.name]))
        path.write_bytes(model.SerializeToString())
    (folder / "stages/weights.bin").write_bytes(bytes(content))
    manifest["shared_weights"] = {
        "file": {"path": "stages/weights.bin", "sha256": ""},
        "tensors": list(tensors.values()),
    }
    return sealed(folder, manifest)


def entry(weight: TensorProto, offset: int) -> dict[str, Any]:
    return {"name": weight.name, "dtype": "float32", "shape": list(weight.dims), "offset": offset}


def reference(tensor: dict[str, Any]) -> TensorProto:
    made = TensorProto(name=tensor["name"], data_type=TensorProto.FLOAT, dims=tensor["shape"])
    made.data_location = TensorProto.EXTERNAL
    length = 4 * int(np.prod(tensor["shape"]))
    for key, text in {"location": "weights.bin", "offset": tensor["offset"], "length": length}.items():
        made.external_data.add(key=key, value=str(text))
    return made


def sealed(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write a manifest with the digests that its files have."""
    for file in (*(stage["graph"] for stage in manifest["stages"]), manifest["shared_weights"]["file"]):
        file["sha256"] = hashlib.sha256((folder / file["path"]).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(shared_folder: Path, tmp_path: Path) -> Path:
    """A copy, to break."""
    return shutil.copytree(shared_folder, tmp_path / "dense")


def answers(folder: Path, device: Device, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [logits for logits, _ in run_all_exits(StageExecutor(open_bundle(folder), device), inputs)]


def test_a_bundle_with_shared_weights_answers_as_one_that_holds_them_in_its_graphs(
    shared_folder: Path, bundle_folder: Path, device: Device, draw_inputs: Callable[..., dict[str, np.ndarray]]
) -> None:
    inputs = draw_inputs(5)
    for shared, own in zip(answers(shared_folder, device, inputs), answers(bundle_folder, device, inputs), strict=True):
        np.testing.assert_array_equal(shared, own)


def test_a_zipped_bundle_with_shared_weights_is_the_same_bundle(
    folder: Path, device: Device, draw_inputs: Callable[..., dict[str, np.ndarray]]
) -> None:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    inputs = draw_inputs(3)
    for zipped, plain in zip(
        answers(folder.with_suffix(".zip"), device, inputs), answers(folder, device, inputs), strict=True
    ):
        np.testing.assert_array_equal(zipped, plain)


def test_a_file_of_that_name_where_the_process_happens_to_run_is_not_read(
    shared_folder: Path,
    device: Device,
    draw_inputs: Callable[..., dict[str, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = draw_inputs(3)
    expected = answers(shared_folder, device, inputs)
    np.full(2**16, 7.0, dtype=np.float32).tofile(tmp_path / "weights.bin")
    monkeypatch.chdir(tmp_path)
    for actual, wanted in zip(answers(shared_folder, device, inputs), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def test_the_cpu_keeps_one_copy_of_a_shared_weight_for_all_sessions(
    shared_folder: Path, devices: dict[str, Device]
) -> None:
    executor = StageExecutor(open_bundle(shared_folder), devices["arrays"])
    sessions = [executor.session(stage) for stage in range(len(executor.manifest.stages))]
    places = [value.data_ptr() for session in sessions for name, value in session.lent.items() if name == "V1"]
    assert len(places) == 1 + sum("V1" in graph_weights(shared_folder, stage) for stage in (0, 1, 3))
    assert len(set(places)) == 1


def graph_weights(folder: Path, stage: int) -> set[str]:
    model = ModelProto.FromString((folder / f"stages/{stage:02d}.onnx").read_bytes())
    return {weight.name for weight in model.graph.initializer}


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["shared_weights"])
    sealed(folder, manifest)


def cut_the_file(folder: Path) -> None:
    path = folder / "stages/weights.bin"
    path.write_bytes(path.read_bytes()[:-4])
    edit(folder, lambda shared: None)


def point_beyond_the_file(folder: Path) -> None:
    edit(folder, lambda shared: shared["tensors"][-1].update(offset=2**40))


def overlap(folder: Path) -> None:
    edit(folder, lambda shared: shared["tensors"][1].update(offset=shared["tensors"][0]["offset"] + 4))


def overlap_in_disorder(folder: Path) -> None:
    def swap(shared: dict[str, Any]) -> None:
        shared["tensors"].reverse()
        shared["tensors"][0]["offset"] = shared["tensors"][1]["offset"]

    edit(folder, swap)


def name_one_twice(folder: Path) -> None:
    edit(folder, lambda shared: shared["tensors"][1].update(name=shared["tensors"][0]["name"]))


def go_back(folder: Path) -> None:
    edit(folder, lambda shared: shared["tensors"][0].update(offset=-4))


def name_no_weight(folder: Path) -> None:
    edit(folder, lambda shared: shared["tensors"].clear())


def invent_a_dtype(folder: Path) -> None:
    edit(folder, lambda shared: shared["tensors"][0].update(dtype="bfloat16"))


def know_more(folder: Path) -> None:
    edit(folder, lambda shared: shared.update(compression="none"))


def lose_the_file(folder: Path) -> None:
    (folder / "stages/weights.bin").unlink()


def alter_the_file(folder: Path) -> None:
    path = folder / "stages/weights.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def lead_out(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shared_weights"]["file"]["path"] = "../weights.bin"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def link_out(folder: Path) -> None:
    shutil.move(folder / "stages/weights.bin", folder.parent / "outside.bin")
    (folder / "stages/weights.bin").symlink_to(folder.parent / "outside.bin")


FLAWS: list[tuple[Callable[[Path], None], type[BundleError], str]] = [
    (cut_the_file, ManifestError, r"shared weight 'V1' ends at byte \d+ of \d+"),
    (point_beyond_the_file, ManifestError, r"shared weight 'V1' ends at byte 1099511627872 of"),
    (overlap, ManifestError, "shared weights 'W0' and 'V0' overlap"),
    (overlap_in_disorder, ManifestError, "overlap"),
    (name_one_twice, ManifestError, "two shared weights have the same name"),
    (go_back, ManifestError, "greater than or equal to 0"),
    (name_no_weight, ManifestError, "at least 1"),
    (invent_a_dtype, ManifestError, "dtype"),
    (know_more, ManifestError, r"shared_weights\.compression"),
    (lose_the_file, ManifestError, r"'stages/weights\.bin' is missing"),
    (alter_the_file, DigestMismatch, r"'stages/weights\.bin' does not have the sha256"),
    (lead_out, ManifestError, "leaves the bundle's folder"),
    (link_out, ManifestError, "leaves the bundle's folder"),
]


@pytest.mark.parametrize(("flaw", "kind", "says"), FLAWS, ids=lambda part: getattr(part, "__name__", None))
def test_shared_weights_that_do_not_fit_are_refused_by_name(
    folder: Path, flaw: Callable[[Path], None], kind: type[BundleError], says: str
) -> None:
    open_bundle(folder)
    flaw(folder)
    with pytest.raises(kind, match=says):
        open_bundle(folder)


def forget(shared: dict[str, Any]) -> None:
    shared["tensors"] = [tensor for tensor in shared["tensors"] if tensor["name"] != "V1"]


def turn(shared: dict[str, Any]) -> None:
    shared["tensors"][-1]["shape"].reverse()


def retype(shared: dict[str, Any]) -> None:
    shared["tensors"][-1]["dtype"] = "int32"


def move(shared: dict[str, Any]) -> None:
    shared["tensors"][0]["offset"], shared["tensors"][1]["offset"] = 0, 192


def swap(shared: dict[str, Any]) -> None:
    first, second = shared["tensors"][-2:]
    first["offset"], second["offset"] = second["offset"], first["offset"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (forget, "'V1' in another file, and the manifest does not"),
        (turn, "'V1' has another shape or dtype than the manifest says"),
        (retype, "'V1' has another shape or dtype than the manifest says"),
        (swap, "lies elsewhere than the manifest says"),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_graph_that_refers_to_other_data_than_the_manifest_is_not_run(
    folder: Path, device: Device, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    edit(folder, change)
    bundle = open_bundle(folder)
    with pytest.raises(ManifestError, match=says):
        StageExecutor(bundle, device)


def test_what_is_not_a_top_level_weight_may_not_lie_in_the_shared_file(folder: Path, device: Device) -> None:
    path = folder / "stages/03.onnx"
    model = ModelProto.FromString(path.read_bytes())
    weight = numpy_helper.from_array(np.ones((6, 4), dtype=np.float32), "hidden")
    made = reference({"name": "V1", "shape": list(weight.dims), "offset": 0})
    node = model.graph.node.add(op_type="Constant", output=["hidden"])
    node.attribute.add(name="value", type=4).t.CopyFrom(made)
    path.write_bytes(model.SerializeToString())
    edit(folder, lambda shared: None)
    with pytest.raises(ManifestError, match="keeps weights in other files"):
        StageExecutor(open_bundle(folder), device)


def test_the_digest_covers_shared_weights(shared_folder: Path) -> None:
    shared = open_bundle(shared_folder).manifest
    written = json.loads(shared.to_bytes())
    written["shared_weights"]["file"]["sha256"] = "0" * 64
    assert Manifest.model_validate(written).model_digest != shared.model_digest

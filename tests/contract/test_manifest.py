import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from offramp_contract.errors import DigestMismatch, ManifestError, UnsupportedFormat
from offramp_contract.files import FolderFiles
from offramp_contract.manifest import MAX_MANIFEST_BYTES, File, Manifest, Tensor, read_manifest, read_verified
from offramp_contract.policy_spec import ConfidenceSpec
from pydantic import ValidationError


def read(written: object) -> Manifest:
    return Manifest.from_bytes(json.dumps(written).encode())


def leaves(written: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    parts = written.items() if isinstance(written, dict) else enumerate(written) if isinstance(written, list) else ()
    if not isinstance(written, dict | list):
        yield path
    for key, part in parts:
        yield from leaves(part, (*path, key))


def with_leaf(written: dict[str, Any], path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(written)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def test_a_manifest_survives_being_written_and_read(written: dict[str, Any], gated: dict[str, Any]) -> None:
    for one in (read(written), read(gated)):
        again = Manifest.from_bytes(one.to_bytes())
        assert again == one
        assert again.to_bytes() == one.to_bytes()
        assert again.model_digest == one.model_digest


def test_what_is_written_is_what_is_read(written: dict[str, Any]) -> None:
    assert json.loads(read(written).to_bytes()) == written


def test_the_digest_is_the_sha256_of_the_written_manifest(written: dict[str, Any]) -> None:
    manifest = read(written)
    assert manifest.model_digest == hashlib.sha256(manifest.to_bytes()).hexdigest()


def test_the_digest_depends_on_neither_the_order_nor_the_spelling_of_the_json(written: dict[str, Any]) -> None:
    turned = dict(reversed(written.items()))
    del turned["gates"]  # empty is the default
    turned["default_policy"] = {"threshold": 0.9, "kind": "confidence"}
    written["provenance"]["versions"] = {"onnx": "1", "torch": "2"}
    turned["provenance"] = written["provenance"] | {"versions": {"torch": "2", "onnx": "1"}}
    assert read(turned).model_digest == read(written).model_digest
    assert Manifest.from_bytes(json.dumps(written, indent=7).encode()).model_digest == read(written).model_digest


def another(value: object) -> object:
    """Give a different value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2
        case str():
            return f"{value}x"
        case _:
            return 1


def test_the_digest_changes_with_every_single_value(gated: dict[str, Any]) -> None:
    digests, num_changed = {read(gated).model_digest}, 0
    for path in leaves(gated):
        value: Any = gated
        for key in path:
            value = value[key]
        try:
            manifest = read(with_leaf(gated, path, another(value)))
        except (ManifestError, UnsupportedFormat):
            continue
        assert manifest.model_digest not in digests, path
        digests.add(manifest.model_digest)
        num_changed += 1
    assert num_changed > 20


@pytest.mark.parametrize("version", [3, 1, 0, "2", None, 2.5, [2]])
def test_a_format_from_the_future_is_refused_by_name(written: dict[str, Any], version: object) -> None:
    with pytest.raises(UnsupportedFormat, match=r"bundle format .* is not known here; this Offramp reads 2"):
        read(written | {"format_version": version})


def test_a_manifest_without_a_version_is_refused(written: dict[str, Any]) -> None:
    del written["format_version"]
    with pytest.raises(UnsupportedFormat):
        read(written)


def test_a_future_format_is_named_before_its_unknown_fields(written: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFormat):
        read(written | {"format_version": 3, "experts": []})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_what_is_no_manifest_at_all_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        Manifest.from_bytes(text)


@pytest.mark.parametrize(
    "path",
    [(), ("inputs", 0), ("stages", 1), ("stages", 0, "graph"), ("exits", 0), ("provenance",), ("preprocessing",)],
)
def test_an_unknown_field_is_refused_by_name(written: dict[str, Any], path: tuple[str | int, ...]) -> None:
    with pytest.raises(ManifestError, match="surprise"):
        read(with_leaf(written, (*path, "surprise"), 1))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("stages", 1, "inputs"), ["h9"], "stage 'stage_1' reads 'h9', which no earlier stage writes"),
        (("stages", 0, "inputs"), ["h1"], "stage 'stage_0' reads 'h1', which no earlier stage writes"),
        (("stages", 1, "outputs"), ["h9"], "stage 'stage_1' writes 'h9', which is not among the carries"),
        (("stages", 1, "outputs"), ["x"], "stage 'stage_1' writes 'x', which is not among the carries"),
        (("stages", 1, "outputs"), ["h0", "h1"], "stage 'stage_1' writes 'h0', which an earlier stage writes too"),
        (("stages", 1, "name"), "stage_0", "two stages have the same name"),
        (("carries", 0, "name"), "x", "two inputs or carries have the same name"),
        (("exits", 0, "name"), "exit_1", "two exits have the same name"),
        (("exits", 0, "stage"), 1, "stages and exits do not name each other"),
        (("exits", 1, "stage"), 99, "stages and exits do not name each other"),
        (("stages", 1, "exit"), 1, "stages and exits do not name each other"),
        (("stages", 0, "exit"), None, "stages and exits do not name each other"),
        (("exits", 0, "logits"), "decision", "exit 'exit_0' gives one name to two tensors"),
        (("exits", 0, "logits"), "h0", "exit 'exit_0' gives one name to two tensors"),
        (("exits", 0, "halting"), "h0", "exit 'exit_0' gives one name to two tensors"),
        (("exits", 0, "temperature"), "x", "exit 'exit_0' gives one name to two tensors"),
        (("exits", 0, "num_classes"), 4, "3 labels do not fit"),
        (("exits", 0, "num_classes"), 1, "exits.0.num_classes"),
        (("labels",), ["a"], "1 labels do not fit"),
        (("min_batch",), 65, "min_batch 65 is above max_batch 64"),
        (("inputs",), [], "inputs"),
        (("exits",), [], "exits"),
        (("name",), "../up", "name"),
        (("name",), "", "name"),
        (("task",), "regression", "task"),
        (("inputs", 0, "dtype"), "complex64", "inputs.0.dtype"),
        (("inputs", 0, "shape"), [-1], "inputs.0.shape"),
        (("stages", 0, "graph", "sha256"), "abc", "stages.0.graph.sha256"),
        (("stages", 0, "flops"), -1, "stages.0.flops"),
        (("default_policy",), {"kind": "nonsense"}, "default_policy"),
        (("default_policy",), {"kind": "confidence", "threshold": [0.5, 0.5]}, "one number per non-final exit, 1"),
        (("default_policy",), {"kind": "fixed", "exit": 2}, "default_policy: exit: must be 0 to 1"),
        (("preprocessing", "width"), 4, "one image of shape .1, 2, 4., which is not what the model reads"),
        (("preprocessing", "mean"), [0.5, 0.5], "mean and std need 1 numbers"),
        (("preprocessing", "std"), [0.0], "std above 0"),
        (("preprocessing", "mean"), [float("nan")], "preprocessing.image.mean.0"),
        (("preprocessing", "std"), [float("inf")], "preprocessing.image.std.0"),
        (("stages", 1, "merges"), [{"run": "h1", "skip": "h0"}], "has merges but no gate"),
        (("stages", 1, "gates"), [0], "names gate 0, which no earlier stage scores"),
    ],
)
def test_an_inconsistency_is_refused_by_name(
    written: dict[str, Any], path: tuple[str | int, ...], value: object, says: str
) -> None:
    with pytest.raises(ManifestError, match=says) as refused:
        read(with_leaf(written, path, value))
    assert refused.value.message.startswith("manifest.json")
    assert "Value error" not in refused.value.message


def test_the_last_stage_must_end_in_the_final_exit(written: dict[str, Any]) -> None:
    written["exits"].pop()
    written["stages"][2]["exit"] = None
    with pytest.raises(ManifestError, match="last stage does not end in the final exit"):
        read(written)


def test_a_policy_nested_without_end_is_refused(written: dict[str, Any]) -> None:
    deep: dict[str, Any] = {"kind": "margin"}
    for _ in range(300):
        deep = {"kind": "any_of", "of": [deep]}
    with pytest.raises(ManifestError, match="nested at most 3 deep"):
        read(written | {"default_policy": deep})


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../a", "a/../../b", "a/..", "/etc/passwd", "//a", "a\\b", "..\\a", "a\0b", "\ud800", "a" * 600],
)
def test_a_path_that_leaves_the_folder_or_names_nothing_is_refused(written: dict[str, Any], path: str) -> None:
    with pytest.raises(ManifestError, match=r"stages\.0\.graph"):
        read(with_leaf(written, ("stages", 0, "graph", "path"), path))


@pytest.mark.parametrize("path", ["a.onnx", "stages/00.onnx", "a/b/c", "..a", "a..b/c", "weird name"])
def test_a_path_inside_the_folder_is_accepted(written: dict[str, Any], path: str) -> None:
    assert read(with_leaf(written, ("stages", 0, "graph", "path"), path)).stages[0].graph.path == path


def test_gated_stages_are_described(gated: dict[str, Any]) -> None:
    manifest = read(gated)
    assert manifest.stages[1].gates == (0,)
    assert (manifest.stages[1].merges[0].run, manifest.stages[1].merges[0].skip) == ("h0_after_body", "h0")
    assert manifest.scored_gates == ((0,), (), (), ())


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("stages", 1, "gates"), [1], "names gate 1, which no earlier stage scores"),
        (("gates", 0, "stage"), 1, "do not agree on whether it scores any"),
        (("gates", 0, "stage"), 9, "names stage 9, which is not there"),
        (("gates", 0, "stage"), None, "needs either a stage that scores it or a priority"),
        (("gates", 0, "priority"), 0.5, "needs either a stage that scores it or a priority"),
        (("gates", 0, "priority"), 1.5, "gates.0.priority"),
        (("stages", 0, "scores"), None, "do not agree on whether it scores any"),
        (("stages", 2, "scores"), "more", "do not agree on whether it scores any"),
        (("stages", 1, "gates"), [], "has merges but no gate"),
        (("stages", 2, "merges"), [{"run": "h1", "skip": "h0"}], "has merges but no gate"),
        (("stages", 3, "gates"), [0], "is gated and ends in an exit"),
        (("stages", 2, "inputs"), ["h0_after_body"], None),
        (("stages", 1, "merges", 0, "run"), "h1", "merges 'h1', which is not among its outputs"),
        (("stages", 1, "merges", 0, "skip"), "h1", "merges with 'h1', which no earlier stage writes"),
        (("stages", 1, "merges", 0, "skip"), "nothing", "merges with 'nothing'"),
        (("stages", 1, "merges", 0, "skip"), "x", "another shape or dtype"),
        (("gates", 0, "threshold"), 1.5, "gates.0.threshold"),
        (("gates", 0, "threshold"), float("nan"), "gates.0.threshold"),
    ],
)
def test_a_gate_that_does_not_fit_its_stages_is_refused_by_name(
    gated: dict[str, Any], path: tuple[str | int, ...], value: object, says: str | None
) -> None:
    changed = with_leaf(gated, path, value)
    if says is None:
        assert read(changed)
        return
    with pytest.raises(ManifestError, match=says):
        read(changed)


def test_a_gate_decides_over_something(gated: dict[str, Any]) -> None:
    gated["gates"].append({"name": "idle", "stage": None, "priority": 0.5})
    with pytest.raises(ManifestError, match="gate 'idle' decides over no stage"):
        read(gated)


def test_what_a_later_stage_reads_must_exist_where_the_body_does_not_run(gated: dict[str, Any]) -> None:
    gated["stages"][1]["merges"] = []
    gated["stages"][2]["inputs"] = ["h0_after_body"]
    with pytest.raises(ManifestError, match="reads 'h0_after_body', which nothing stands for"):
        read(gated)


def test_a_body_inside_another_needs_no_merge_for_what_only_it_reads(gated: dict[str, Any]) -> None:
    """Gate 1 lies inside the body of gate 0, whose first part it reads."""
    gated["carries"] += [{"name": name, "dtype": "float32", "shape": [5]} for name in ("inside", "inner")]
    first, rest = gated["stages"][1], gated["stages"][2:]
    first |= {"outputs": ["inside"], "merges": [], "scores": "inner_scores"}
    inner = {**first, "name": "inner", "inputs": ["inside"], "outputs": ["inner"], "gates": [0, 1], "scores": None}
    inner["merges"] = [{"run": "inner", "skip": "inside"}]
    last = {**first, "name": "last", "inputs": ["inner"], "outputs": ["h0_after_body"], "scores": None}
    last["merges"] = [{"run": "h0_after_body", "skip": "h0"}]
    gated["stages"] = [gated["stages"][0], first, inner, last, *rest]
    gated["exits"][1]["stage"] = 5
    gated["gates"].append({"name": "gate_1", "stage": 1, "priority": None, "threshold": 0.5})
    assert read(gated)

    inner["gates"] = [1]
    with pytest.raises(ManifestError, match="is behind gate 'gate_1', but not behind the gates that one is behind"):
        read(gated)


def test_depths_are_the_share_of_flops_run_when_a_row_stands_at_each_exit(written: dict[str, Any]) -> None:
    manifest = read(written)
    assert manifest.full_flops == 100
    assert manifest.exit_depths == (0.1, 1.0)


def test_a_network_without_flops_has_depths_all_the_same(written: dict[str, Any]) -> None:
    for stage in written["stages"]:
        stage["flops"] = 0
    assert read(written).exit_depths == (0.0, 0.0)


def test_a_tensor_knows_its_bytes_per_row() -> None:
    assert Tensor(name="h", dtype="float16", shape=(7, 2)).row_bytes == 28
    assert Tensor(name="flag", dtype="bool", shape=()).row_bytes == 1


def test_the_files_of_a_bundle_are_its_graphs_and_its_tokenizer(written: dict[str, Any]) -> None:
    tokenizer = {"path": "tokenizer.json", "sha256": "1" * 64}
    text = {"kind": "text", "tokenizer": tokenizer, "ids": "x", "length": 16}
    written |= {"inputs": [{"name": "x", "dtype": "int64", "shape": [16]}], "preprocessing": text}
    assert [file.path for file in read(written).files] == [
        *("stages/00.onnx", "stages/01.onnx", "stages/02.onnx", "tokenizer.json")
    ]
    with pytest.raises(ManifestError, match="makes 8 tokens, but input 'x' has shape"):
        read(with_leaf(written, ("preprocessing", "length"), 8))
    with pytest.raises(ManifestError, match="which are not the model's inputs"):
        read(with_leaf(written, ("preprocessing", "mask"), "attention_mask"))


def test_what_is_left_out_has_its_default(written: dict[str, Any]) -> None:
    for name in ("task", "precision", "gates", "labels", "preprocessing", "default_policy", "min_batch", "max_batch"):
        del written[name]
    manifest = read(written)
    assert manifest.default_policy == ConfidenceSpec(threshold=0.9)
    assert manifest.labels is None
    assert manifest.gates == ()


def test_a_manifest_cannot_be_changed(written: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read(written).name = "other"  # type: ignore[misc]


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"holds no manifest\.json"):
        read_manifest(FolderFiles(tmp_path))


def test_a_manifest_beyond_all_measure_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ManifestError, match="is over"):
        read_manifest(FolderFiles(tmp_path))


def test_a_file_is_read_only_if_it_has_its_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"graph")
    files, digest = FolderFiles(tmp_path), hashlib.sha256(b"graph").hexdigest()
    assert read_verified(files, File(path="a", sha256=digest)) == b"graph"
    with pytest.raises(DigestMismatch, match="'a' does not have the sha256"):
        read_verified(files, File(path="a", sha256="0" * 64))
    with pytest.raises(ManifestError, match="'b' is missing"):
        read_verified(files, File(path="b", sha256=digest))

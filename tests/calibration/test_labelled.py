import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_calibration.array_file import ArrayFile
from offramp_calibration.labelled import Arrays, picture_of
from offramp_calibration.labels import class_ids, ids_of_names
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import ImagePreprocessing
from offramp_runtime import open_bundle
from offramp_server.preprocess import inputs_of_images
from PIL import Image


@pytest.fixture(scope="module")
def manifest(toy_bundle):
    """Four classes: north, east, south, west."""
    return open_bundle(toy_bundle).manifest


@pytest.fixture(scope="module")
def nameless(make_bundle):
    return open_bundle(make_bundle()).manifest


def test_labels_are_class_numbers_of_any_integer_type(manifest):
    for dtype in (np.uint8, np.int16, np.int64, ">i4"):
        label_N = class_ids(np.array([3, 0, 1], dtype), 3, manifest)
        assert label_N.tolist() == [3, 0, 1]
        assert label_N.dtype == np.int64


def test_labels_are_names_or_numbers_in_words(manifest):
    assert class_ids(np.array(["west", "north", "2"]), 3, manifest).tolist() == [3, 0, 2]


def test_a_label_of_the_bundles_wins_over_the_number_it_looks_like(make_bundle):
    manifest = open_bundle(make_bundle(labels=("3", "2", "1", "0"))).manifest
    assert class_ids(np.array(["3", "0"]), 2, manifest).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (np.zeros((3, 4)), "shape (3,); got (3, 4); one-hot rows become class numbers with argmax"),
        (np.zeros((3, 1, 1)), "shape (3,); got (3, 1, 1)"),
        (np.array(1), "shape (3,); got ()"),
        (np.zeros(2, np.int64), "there are 2 for 3 samples"),
        (np.zeros(3), "must be class numbers (integers) or names; got float64"),
        (np.zeros(3, bool), "must be class numbers (integers) or names; got bool"),
        (np.array([0, 4, 1]), "sample 1 has the label 4; the bundle's classes are 0 to 3"),
        (np.array([0, 1, -1]), "sample 2 has the label -1"),
        (np.array([2**64 - 1, 0, 0], np.uint64), "sample 0 has the label 18446744073709551615"),
        (np.array(["north", "up", "west"]), "'up' is not one of the bundle's classes: north, east, south, west"),
        (np.array(["north", "4", "west"]), "'4' is not one of"),
    ],
)
def test_labels_that_are_no_classes_are_refused_in_words(manifest, written, sentence):
    with pytest.raises(UnfitData) as refused:
        class_ids(written, 3, manifest)
    assert refused.value.message.startswith("labels: ")
    assert sentence in refused.value.message


def test_a_bundle_without_names_is_labelled_by_numbers(nameless):
    assert ids_of_names(["3"], nameless)["3"] == 3
    with pytest.raises(UnfitData, match="'north' is not one of the bundle's classes: 0 to 3"):
        ids_of_names(["north"], nameless)


def test_arrays_are_given_in_order_in_batches(manifest):
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    data = Arrays("x", {"x": x}, np.zeros(10, np.int64), manifest)
    batches = [batch["x"] for batch in data.batches(4)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), x)
    assert data.example(3) is None


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("invert", [False, True])
def test_a_picture_comes_back_from_what_the_server_makes_of_it(digits_like_bundle, mode, invert):
    channels = len(mode)
    spec = ImagePreprocessing(
        mode=mode, height=6, width=9, invert=invert, mean=(0.48, 0.4, 0.3)[:channels], std=(0.2, 0.3, 0.25)[:channels]
    )
    manifest = open_bundle(digits_like_bundle).manifest
    tensor = manifest.inputs[0].model_copy(update={"shape": (channels, 6, 9)})
    manifest = manifest.model_copy(update={"preprocessing": spec, "inputs": (tensor,)})
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3)[: 1 + channels]).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    rows = inputs_of_images([file.getvalue()], manifest, 1000)["x"]
    np.testing.assert_array_equal(picture_of({"x": rows[0]}, manifest), picture)


# Files of arrays.


@settings(deadline=None, max_examples=40)
@given(num_rows=st.integers(0, 30), width=st.integers(1, 4), size=st.integers(1, 12), compressed=st.booleans())
def test_the_rows_of_a_file_are_those_of_the_array_however_they_are_read(
    tmp_path_factory, num_rows, width, size, compressed
):
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    x = np.arange(num_rows * width, dtype=np.float64).reshape(num_rows, width)
    (np.savez_compressed if compressed else np.savez)(path, x=x, y=np.arange(num_rows))
    file = ArrayFile(path)
    read = list(file.rows("x", size))
    assert all(len(rows) <= size for rows in read)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, width)), *read]), x)
    for index in {0, num_rows // 2, num_rows - 1} & set(range(num_rows)):
        np.testing.assert_array_equal(file.row("x", index), x[index])


def test_two_arrays_of_a_file_are_read_side_by_side(tmp_path):
    x, z = np.arange(1000.0), -np.arange(1000.0)
    np.savez_compressed(tmp_path / "a.npz", x=x, z=z)
    file = ArrayFile(tmp_path / "a.npz")
    pairs = list(zip(file.rows("x", 7), file.rows("z", 7), strict=True))
    assert all((a == -b).all() for a, b in pairs)
    assert sum(len(a) for a, _ in pairs) == 1000


def test_broken_bytes_are_noticed_while_reading(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(100_000))
    content = bytearray(path.read_bytes())
    content[400_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnfitData, match=r"'a\.npz' is not a readable \.npz"):
        list(ArrayFile(path).rows("x", 64))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a readable .npz"),
        (b"PK\x03\x04 nonsense", "is not a readable .npz"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_file_of_arrays_is_refused(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UnfitData) as refused:
        ArrayFile(tmp_path / "a.npz")
    assert sentence in refused.value.message


def test_objects_are_refused_without_being_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UnfitData, match="array 'x' must hold numbers; objects are never read"):
        ArrayFile(tmp_path / "a.npz")


def test_an_array_in_fortran_order_is_refused_with_the_way_out(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(np.zeros((3, 2))))
    with pytest.raises(UnfitData, match=r"lies in Fortran order; write it with numpy\.ascontiguousarray"):
        ArrayFile(tmp_path / "a.npz")


def test_an_archive_of_very_many_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for index in range(65):
            archive.writestr(f"{index}.npy", b"")
    with pytest.raises(UnfitData, match="holds 65 arrays, more than 64"):
        ArrayFile(tmp_path / "a.npz")

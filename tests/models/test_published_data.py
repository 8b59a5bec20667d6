"""Fashion-MNIST and CIFAR-100, from a folder: small sets in the published formats."""

import gzip
import shutil

import numpy as np
import pytest
from offramp_contract.errors import DataSetError
from offramp_models import load_data

NUM_IMAGES = 5100


@pytest.fixture(params=["fashion_mnist", "cifar100"])
def published(request):
    """The name of a set, and the folder that holds its folder."""
    folder = {"fashion_mnist": "fashion_folder", "cifar100": "cifar_folder"}[request.param]
    return request.param, request.getfixturevalue(folder)


def indices(images):
    """Give which of the published images these are, as their first two (red) pixels say."""
    first = images.pixels_NHW.reshape(len(images), -1, *images.pixels_NHW.shape[3:])[:, :2]
    first = first if first.ndim == 2 else first[..., 0]
    return first.astype(int) @ [1, 256]


def test_what_is_held_out_comes_from_the_training_images_and_nothing_is_lost(published):
    name, folder = published
    data = load_data(name, 3, folder)
    assert [len(data.train), len(data.calibration)] == [NUM_IMAGES - 5000, 5000]
    assert sorted([*indices(data.train), *indices(data.calibration)]) == list(range(NUM_IMAGES))
    num_classes = len(data.label_names)
    for split in (data.train, data.calibration, data.test):
        assert np.array_equal(split.labels_N, indices(split) % num_classes)
    assert np.array_equal(indices(data.test), np.arange(len(data.test)))


def test_the_seed_decides_what_is_held_out(published):
    name, folder = published
    one, same, other = (indices(load_data(name, seed, folder).calibration) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert set(one) != set(other)


def test_images_stay_bytes_and_become_the_networks_shape_a_batch_at_a_time(published):
    name, folder = published
    data = load_data(name, 0, folder)
    assert data.train.pixels_NHW.dtype == np.uint8
    some = data.calibration.rows(slice(0, 3))
    assert data.inputs(some).shape == (3, *data.input_shape)
    assert np.array_equal(data.inputs(some), data.inputs(data.calibration.rows(slice(0, 50)))[:3])


def test_colours_are_the_planes_of_the_file(cifar_folder):
    pixels = load_data("cifar100", 0, cifar_folder).test.pixels_NHW
    assert pixels.shape == (100, 32, 32, 3)
    assert list(pixels[5, 0, 0]) == [5, 7, 7]
    assert list(pixels[5, 1, 0]) == [0, 0, 0]


def test_the_files_may_lie_in_the_folder_itself_or_where_the_environment_says(published, monkeypatch):
    name, folder = published
    (inside,) = folder.iterdir()
    assert len(load_data(name, 0, inside).train) == NUM_IMAGES - 5000
    monkeypatch.setenv("OFFRAMP_DATA", str(folder))
    assert len(load_data(name).train) == NUM_IMAGES - 5000


def test_a_folder_without_the_files_is_refused_with_what_is_looked_for(published, tmp_path):
    with pytest.raises(DataSetError, match=r"holds no (fashion-mnist|cifar-100-binary): it needs \S+\.(gz|bin), "):
        load_data(published[0], 0, tmp_path)


def broken(tmp_path, folder, name, change):
    """Copy a set, with one file changed."""
    shutil.copytree(folder, tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob(name)
    path.write_bytes(change(path.read_bytes()))
    return tmp_path / "copy"


def recompressed(change):
    return lambda content: gzip.compress(change(gzip.decompress(content)), 1)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("train-images-idx3-ubyte.gz", lambda content: content[:-2000], "is no whole gzip file"),
        ("train-images-idx3-ubyte.gz", lambda content: b"not gzip", "is no whole gzip file"),
        ("train-images-idx3-ubyte.gz", recompressed(lambda raw: raw[:-1]), "says it holds 5100 rows, and does not"),
        ("train-images-idx3-ubyte.gz", recompressed(lambda raw: raw + b"x"), "says it holds 5100 rows, and does not"),
        (
            "train-images-idx3-ubyte.gz",
            recompressed(lambda raw: raw[:3] + b"\1" + raw[4:]),
            "is no IDX file of Nx28x28",
        ),
        ("train-images-idx3-ubyte.gz", recompressed(lambda raw: raw[:9]), "is no IDX file of Nx28x28"),
        ("t10k-labels-idx1-ubyte.gz", recompressed(lambda raw: raw[:-1] + b"\12"), "a label is 10; labels are 0 to 9"),
        ("t10k-labels-idx1-ubyte.gz", recompressed(lambda raw: raw[:7] + b"\35" + raw[8:-1]), "holds 30 images, but"),
    ],
)
def test_fashion_mnist_that_is_not_whole_is_refused_by_name(fashion_folder, tmp_path, file, change, sentence):
    folder = broken(tmp_path, fashion_folder, file, change)
    with pytest.raises(DataSetError, match=sentence) as refused:
        load_data("fashion_mnist", 0, folder)
    assert file in refused.value.message


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("train.bin", lambda content: content[:-1], "must be 3074 for each of 1 to 50000 images"),
        ("test.bin", lambda content: b"", "must be 3074 for each of 1 to 50000 images"),
        ("test.bin", lambda content: content[:1] + b"\x64" + content[2:], "a label is 100; labels are 0 to 99"),
        ("train.bin", lambda content: content[: 3074 * 4000], "4000 training images are too few"),
        ("fine_label_names.txt", lambda content: b"cat\ndog\n", "must name 100 classes, one a line; it names 2"),
        ("fine_label_names.txt", lambda content: b"\xff", "must name 100 classes"),
    ],
)
def test_cifar_that_is_not_whole_is_refused(cifar_folder, tmp_path, file, change, sentence):
    folder = broken(tmp_path, cifar_folder, file, change)
    with pytest.raises(DataSetError, match=sentence):
        load_data("cifar100", 0, folder)

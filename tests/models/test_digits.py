import io

import numpy as np
import pytest
from offramp_models import DATA_SETS, load_data
from PIL import Image
from sklearn.datasets import load_digits as bundled_digits


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def rows_of(images):
    return [(image.tobytes(), int(label)) for image, label in zip(images.pixels_NHW, images.labels_N, strict=True)]


def test_the_splits_hold_every_image_once(digits):
    splits = rows_of(digits.train) + rows_of(digits.calibration) + rows_of(digits.test)
    bunch = bundled_digits()
    whole = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    assert sorted(splits) == sorted((image.tobytes(), int(y)) for image, y in zip(whole, bunch.target, strict=True))
    assert [len(digits.train), len(digits.calibration), len(digits.test)] == [897, 400, 500]


def test_the_split_is_the_seeds(digits):
    assert np.array_equal(load_data("digits").test.pixels_NHW, digits.test.pixels_NHW)
    assert not np.array_equal(load_data("digits", seed=1).test.pixels_NHW, digits.test.pixels_NHW)


def test_every_split_holds_every_digit(digits):
    for split in (digits.train, digits.calibration, digits.test):
        assert set(split.labels_N) == set(range(10))


def test_pixels_use_the_whole_range_of_an_image_file(digits):
    assert digits.train.pixels_NHW.dtype == np.uint8
    assert (digits.train.pixels_NHW.min(), digits.train.pixels_NHW.max()) == (0, 255)


def test_inputs_are_centred(digits):
    inputs = digits.inputs(digits.train)
    assert inputs.shape == (897, 1, 8, 8)
    assert inputs.dtype == np.float32
    assert abs(inputs.mean()) < 0.02
    assert abs(inputs.std() - 1.0) < 0.02


def test_inputs_equal_what_the_declared_preprocessing_makes_of_the_image_file(digits):
    file = io.BytesIO()
    Image.fromarray(digits.test.pixels_NHW[0]).save(file, "PNG")
    spec = digits.preprocessing
    reopened = Image.open(file).convert(spec.mode)
    assert reopened.size == (spec.width, spec.height)
    expected = (np.asarray(reopened, dtype=np.float64) / 255 - spec.mean[0]) / spec.std[0]
    np.testing.assert_allclose(digits.inputs(digits.test)[0, 0], expected, atol=1e-6)


def test_labels_are_the_digits(digits):
    assert digits.label_names == tuple("0123456789")


def test_an_unknown_data_set_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=", ".join(DATA_SETS)):
        load_data("imagenet")

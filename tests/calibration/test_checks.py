import numpy as np
import pytest
from offramp_calibration.checks import PixelCheck, check_accuracy, check_labels, recorded_accuracy
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import ImagePreprocessing
from offramp_runtime import open_bundle

RGB = ImagePreprocessing(mode="RGB", height=4, width=4, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))


@pytest.fixture(scope="module")
def manifest(make_bundle):
    return open_bundle(make_bundle(row_shape=(3, 4, 4), num_classes=6, preprocessing=RGB)).manifest


@pytest.fixture(scope="module")
def named(make_bundle):
    labels = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
    return open_bundle(make_bundle(row_shape=(8,), num_classes=8, labels=labels)).manifest


def normalised(pixels_NCHW):
    mean, std = np.array(RGB.mean).reshape(3, 1, 1), np.array(RGB.std).reshape(3, 1, 1)
    return ((pixels_NCHW - mean) / std).astype(np.float32)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).uniform(size=(60, 3, 4, 4))


def look(manifest, images, size=25):
    check = PixelCheck(manifest)
    for start in range(0, len(images), size):
        check.add({"x": images[start : start + size].astype(np.float32)}, start)
    check.finish()


def test_images_normalised_as_the_bundle_says_pass(manifest, pixels):
    look(manifest, normalised(pixels))
    look(manifest, normalised(np.zeros_like(pixels)))
    look(manifest, normalised(np.ones_like(pixels) * (np.arange(60) % 2).reshape(-1, 1, 1, 1)))
    look(manifest, normalised(pixels * 1.04 - 0.02))  # what bicubic interpolation overshoots


def test_raw_pixels_are_refused_with_the_range_that_was_expected(manifest, pixels):
    with pytest.raises(UnfitData) as refused:
        look(manifest, pixels * 255)
    assert "data: sample 0 holds values from " in refused.value.message
    assert "channel 0" in refused.value.message
    assert "(mean 0.5, std 0.25) gives -2 to 2" in refused.value.message


def test_the_sample_and_channel_at_fault_are_named(manifest, pixels):
    images = normalised(pixels)
    images[37, 2, 1, 1] = -1.5
    with pytest.raises(UnfitData, match=r"sample 37 holds values from -1\.5 to .* in channel 2, .* gives -1 to 2\.333"):
        look(manifest, images)


def test_images_scaled_to_one_but_not_normalised_are_refused(manifest, pixels):
    with pytest.raises(UnfitData, match=r"no value is below 0, and normalised images .* go down to -2"):
        look(manifest, pixels)


def test_images_of_another_normalisation_are_refused(manifest, pixels):
    with pytest.raises(UnfitData, match="gives -2 to 2"):
        look(manifest, (pixels - 0.5) / 0.2)


def test_a_bundle_whose_images_never_go_below_nothing_accepts_such(digits_like_bundle):
    look(open_bundle(digits_like_bundle).manifest, np.random.default_rng(0).uniform(size=(60, 1, 8, 8)))


def test_a_model_of_anything_else_accepts_any_numbers(toy_bundle):
    look(open_bundle(toy_bundle).manifest, np.full((60, 4), 1e9))


def test_at_most_five_missing_classes_are_named(named):
    with pytest.raises(UnfitData, match=r"of class 2 \(cat\), 5 \(fox\);"):
        check_labels(np.array([0, 1, 3, 4, 6, 7] * 20), named)
    with pytest.raises(UnfitData, match=r"1 \(bee\), 2 \(cat\), 3 \(dog\), 4 \(elk\), 5 \(fox\) and 2 more"):
        check_labels(np.zeros(60, np.int64), named)
    check_labels(np.zeros(60, np.int64), named, allow_missing_classes=True)


def test_exits_of_different_width_cannot_be_calibrated(named):
    first, *others = named.exits
    coarse = named.model_copy(update={"exits": (first.model_copy(update={"num_classes": 2}), *others)})
    with pytest.raises(UnfitData, match="labels: the exits of this model have different numbers of classes"):
        check_labels(np.arange(80) % 8, coarse)


def test_too_few_samples_are_refused_even_where_classes_may_be_missing(named):
    with pytest.raises(UnfitData, match="1 sample is too few"):
        check_labels(np.zeros(1, np.int64), named, allow_missing_classes=True)
    with pytest.raises(UnfitData, match="0 samples are too few"):
        check_labels(np.zeros(0, np.int64), named)


def trained(manifest, accuracy):
    provenance = manifest.provenance.model_copy(update={"training": {"test_accuracy_E": [0.1, accuracy]}})
    return manifest.model_copy(update={"provenance": provenance})


@pytest.mark.parametrize(
    ("num_right", "num_samples", "recorded", "is_fit"),
    [
        (10, 60, None, False),  # exactly chance
        (12, 60, None, False),  # above it, but not to be told from it
        (25, 60, None, True),
        (81, 100, 0.90, True),  # 9 points below
        (60, 100, 0.90, False),
        (38, 50, 0.90, False),  # 14 points, of which few samples still make sure
        (52, 60, 0.99, False),
        (45, 60, 0.86, True),  # 11 points, which chance explains
        (100, 100, 0.50, True),  # better than recorded is no reason to refuse
    ],
)
def test_accuracy_must_beat_chance_and_be_near_the_training_record(manifest, num_right, num_samples, recorded, is_fit):
    known = manifest if recorded is None else trained(manifest, recorded)
    if is_fit:
        check_accuracy(num_right, num_samples, known)
        return
    with pytest.raises(UnfitData, match="the labels or the preprocessing do not match the bundle") as refused:
        check_accuracy(num_right, num_samples, known)
    assert f"{num_right / num_samples:.1%}" in refused.value.message
    assert f"{recorded or 1 / 6:.1%}" in refused.value.message


@pytest.mark.parametrize(
    "training", [{}, {"test_accuracy_E": []}, {"test_accuracy_E": "x"}, {"test_accuracy_E": ["?"]},
                 {"test_accuracy_E": [7.0]}]
)  # fmt: skip
def test_a_record_without_an_accuracy_says_nothing(training):
    assert recorded_accuracy(training) is None

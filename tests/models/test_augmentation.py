import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_models.data import Augmentation


def variations(image, padding, flips):
    """Every picture that an augmentation may make of one, written down naively."""
    height, width = image.shape[:2]
    padded = np.zeros((height + 2 * padding, width + 2 * padding, *image.shape[2:]), dtype=np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    offsets = range(2 * padding + 1)
    cut = [padded[top : top + height, left : left + width] for top in offsets for left in offsets]
    return cut + ([picture[:, ::-1] for picture in cut] if flips else [])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    channels=st.sampled_from([(), (3,)]),
    padding=st.integers(0, 3),
    flips=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_variation_is_a_part_of_the_padded_picture_perhaps_mirrored(shape, channels, padding, flips, seed):
    random = np.random.default_rng(seed)
    images = random.integers(1, 256, (*shape, *channels), dtype=np.uint8)
    before = images.copy()
    varied = Augmentation(padding, flips).vary(images, random)
    assert varied.shape == images.shape
    assert varied.dtype == np.uint8
    assert np.array_equal(images, before)
    for image, variation in zip(images, varied, strict=True):
        assert any(np.array_equal(variation, one) for one in variations(image, padding, flips))


def test_every_variation_occurs():
    image = np.random.default_rng(0).integers(1, 256, (3, 3), dtype=np.uint8)
    varied = Augmentation(1, flips=True).vary(np.repeat(image[None], 1000, axis=0), np.random.default_rng(1))
    assert {one.tobytes() for one in varied} == {one.tobytes() for one in variations(image, 1, True)}


def test_the_seed_decides_the_variation_and_no_augmentation_draws_nothing():
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)
    one, same, other = (Augmentation(2, flips=True).vary(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    random = np.random.default_rng(3)
    assert np.array_equal(Augmentation().vary(images, random), images)
    assert random.bit_generator.state == np.random.default_rng(3).bit_generator.state

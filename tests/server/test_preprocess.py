import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offramp_contract.errors import InvalidValue, MalformedRequest, TooLarge
from offramp_contract.manifest import ImagePreprocessing, Manifest
from offramp_runtime import open_bundle
from offramp_server.preprocess import inputs_of_images
from PIL import Image

MAX_PIXELS = 100_000


@pytest.fixture(scope="module")
def manifest_for(digits_like_bundle: Path) -> Callable[..., Manifest]:
    manifest = open_bundle(digits_like_bundle).manifest

    def give(mode: str = "L", shape: tuple[int, int, int] = (1, 8, 8), **spec: Any) -> Manifest:
        num_channels = shape[0]
        defaults = {"mean": (0.0,) * num_channels, "std": (1.0,) * num_channels, "interpolation": "nearest"}
        preprocessing = ImagePreprocessing(mode=mode, height=shape[1], width=shape[2], **(defaults | spec))  # type: ignore[arg-type]
        tensor = manifest.inputs[0].model_copy(update={"shape": shape})
        return manifest.model_copy(update={"preprocessing": preprocessing, "inputs": (tensor,)})

    return give


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    return (np.arange(height * width) % 256).reshape(height, width).astype(np.uint8)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_an_image_is_scaled_to_unit_range_and_normalised_per_channel(manifest_for: Callable[..., Manifest]) -> None:
    pixels = np.stack([ramp(8, 8), ramp(8, 8).T, np.full((8, 8), 255, np.uint8)], axis=2)
    manifest = manifest_for("RGB", (3, 8, 8), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    row = inputs_of_images([encoded(Image.fromarray(pixels))], manifest, MAX_PIXELS)["x"]
    expected = (pixels / 255 - np.array([0.1, 0.2, 0.3])) / np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(row, expected.transpose(2, 0, 1)[None], rtol=1e-5, atol=1e-6)
    assert row.dtype == np.float32


def test_the_shorter_side_is_resized_and_the_centre_cropped(manifest_for: Callable[..., Manifest]) -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255  # after scaling to 8 x 24, exactly the centre 8 columns
    row = inputs_of_images([encoded(Image.fromarray(wide))], manifest_for(resize=8), MAX_PIXELS)["x"]
    np.testing.assert_array_equal(row, np.ones((1, 1, 8, 8), np.float32))


def test_without_resize_both_sides_are_scaled_straight_to_the_models_size(
    manifest_for: Callable[..., Manifest],
) -> None:
    left_half = np.zeros((16, 48), np.uint8)
    left_half[:, :24] = 255
    row = inputs_of_images([encoded(Image.fromarray(left_half))], manifest_for(), MAX_PIXELS)["x"]
    np.testing.assert_array_equal(row[0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0])


def test_a_dark_on_light_picture_can_be_inverted(manifest_for: Callable[..., Manifest]) -> None:
    white = encoded(Image.new("L", (8, 8), 255))
    assert not inputs_of_images([white], manifest_for(invert=True), MAX_PIXELS)["x"].any()


def test_sixteen_bit_grey_keeps_its_shades(manifest_for: Callable[..., Manifest]) -> None:
    deep = np.full((8, 8), 128 * 257, np.uint16)
    row = inputs_of_images([encoded(Image.fromarray(deep))], manifest_for(), MAX_PIXELS)["x"]
    np.testing.assert_allclose(row, np.full((1, 1, 8, 8), 128 / 255), rtol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_allowed_format_is_read(kind: str, manifest_for: Callable[..., Manifest]) -> None:
    grey = encoded(Image.new("L", (8, 8), 128), kind)
    row = inputs_of_images([grey], manifest_for(), MAX_PIXELS)["x"]
    np.testing.assert_allclose(row, np.full((1, 1, 8, 8), 128 / 255), atol=0.01)


def test_several_images_of_different_sizes_and_modes_become_one_batch(manifest_for: Callable[..., Manifest]) -> None:
    images = [Image.new("L", (8, 8), 255), Image.new("RGBA", (30, 20), (255, 255, 255, 255)), Image.new("1", (9, 9), 1)]
    rows = inputs_of_images([encoded(image) for image in images], manifest_for(), MAX_PIXELS)["x"]
    np.testing.assert_array_equal(rows, np.ones((3, 1, 8, 8), np.float32))


def test_a_decompression_bomb_is_refused_from_its_header(manifest_for: Callable[..., Manifest]) -> None:
    for width, height in ((400, 400), (10_000, 10_000), (60_000, 60_000)):
        with pytest.raises(TooLarge, match="image"):
            inputs_of_images([png_claiming(width, height)], manifest_for(), MAX_PIXELS)


def test_a_sliver_that_scaling_would_blow_up_is_refused(manifest_for: Callable[..., Manifest]) -> None:
    sliver = encoded(Image.new("L", (50_000, 1)))
    with pytest.raises(TooLarge, match="scaled"):
        inputs_of_images([sliver], manifest_for(resize=8), MAX_PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_truncated_image_is_malformed_wherever_it_is_cut(kind: str, manifest_for: Callable[..., Manifest]) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)), kind)
    for length in (0, 1, 10, len(whole) // 4, len(whole) // 2, int(len(whole) * 0.8)):
        with pytest.raises(MalformedRequest, match="image"):
            inputs_of_images([whole[:length]], manifest_for(), MAX_PIXELS)


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_that_the_library_could_read_are_refused(
    kind: str, manifest_for: Callable[..., Manifest]
) -> None:
    with pytest.raises(MalformedRequest, match="JPEG, PNG, WEBP, BMP or GIF"):
        inputs_of_images([encoded(Image.new("L", (16, 16)), kind)], manifest_for(), MAX_PIXELS)


def test_a_model_without_image_preprocessing_says_so(toy_bundle: Path) -> None:
    with pytest.raises(InvalidValue, match="declares no image preprocessing"):
        inputs_of_images([b""], open_bundle(toy_bundle).manifest, MAX_PIXELS)

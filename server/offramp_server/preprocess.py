"""What the bundle declares between a client's image or text and the model's input.

Images follow the order that vision networks are trained with: shorter side to `resize`, centre crop, divide by 255,
normalise. Everything here is slow compared with the event loop's work, so callers run it on a worker thread.

Shapes: R = rows, C = channels, H = height, W = width, L = tokens.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from offramp_contract.errors import InvalidValue, MalformedRequest, ManifestError, OfframpError, TooLarge
from offramp_contract.manifest import ImagePreprocessing, Manifest, TextPreprocessing
from offramp_runtime import Bundle
from PIL import Image
from tokenizers import Tokenizer

from offramp_server.messages import Inputs

Image.init()  # else the first image waits for every decoder to be imported, some 20 ms
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def image_preprocessing(manifest: Manifest) -> ImagePreprocessing:
    """Give the declared image preprocessing.

    Raises:
        InvalidValue: If the model declares none.
    """
    if not isinstance(manifest.preprocessing, ImagePreprocessing):
        raise InvalidValue("image: this model declares no image preprocessing; send `inputs` instead", "image")
    return manifest.preprocessing


def text_preprocessing(manifest: Manifest) -> TextPreprocessing:
    """Give the declared text preprocessing.

    Raises:
        InvalidValue: If the model declares none.
    """
    if not isinstance(manifest.preprocessing, TextPreprocessing):
        raise InvalidValue("text: this model declares no text preprocessing; send `inputs` instead", "text")
    return manifest.preprocessing


def inputs_of_images(encoded: Sequence[bytes], manifest: Manifest, max_pixels: int) -> Inputs:
    """Decode and prepare images, one row each.

    Returns:
        The model's one input, float32 (R, C, H, W).

    Raises:
        InvalidValue: If the model takes no images.
        MalformedRequest: If one cannot be decoded.
        TooLarge: If one has more than `max_pixels` pixels.
    """
    spec = image_preprocessing(manifest)
    tensor = manifest.inputs[0]
    rows = np.stack([_image_row(image, spec, max_pixels) for image in encoded])
    return {tensor.name: rows.reshape(len(rows), *tensor.shape).astype(tensor.dtype, copy=False)}


def inputs_of_texts(texts: Sequence[str], bundle: Bundle) -> Inputs:
    """Tokenise texts, one row each, cut or padded to the declared length.

    Returns:
        Token ids and, where the model reads one, the mask, each (R, L).

    Raises:
        InvalidValue: If the model takes no texts.
    """
    spec = text_preprocessing(bundle.manifest)
    encodings = [encoding.ids for encoding in _tokenizer(_source(bundle)).encode_batch(list(texts))]
    ids_RL = np.full((len(texts), spec.length), spec.pad_id, dtype=np.int64)
    mask_RL = np.zeros_like(ids_RL)
    for row, ids in enumerate(encodings):
        ids_RL[row, : len(ids)] = ids
        mask_RL[row, : len(ids)] = 1
    tensors = bundle.manifest.tensors
    inputs = {spec.ids: ids_RL.astype(tensors[spec.ids].dtype, copy=False)}
    if spec.mask is not None:
        inputs[spec.mask] = mask_RL.astype(tensors[spec.mask].dtype, copy=False)
    return inputs


def prepare(bundle: Bundle) -> None:
    """Read what a bundle's preprocessing needs beside the manifest, so that serving never goes back to its files.

    Raises:
        ManifestError: If it cannot be used.
    """
    if isinstance(bundle.manifest.preprocessing, TextPreprocessing):
        _tokenizer(_source(bundle))


@dataclass(frozen=True, slots=True)
class _TokenizerSource:
    sha256: str
    length: int
    bundle: Bundle = field(compare=False)


def _source(bundle: Bundle) -> _TokenizerSource:
    spec = text_preprocessing(bundle.manifest)
    return _TokenizerSource(spec.tokenizer.sha256, spec.length, bundle)


@lru_cache(maxsize=64)
def _tokenizer(source: _TokenizerSource) -> Tokenizer:
    file = text_preprocessing(source.bundle.manifest).tokenizer
    try:
        tokenizer = Tokenizer.from_str(source.bundle.read(file).decode())
    except OfframpError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise ManifestError(f"file {file.path!r} is no tokenizer that the tokenizers library reads") from error
    tokenizer.enable_truncation(source.length)
    tokenizer.no_padding()
    return tokenizer


def _image_row(encoded: bytes, spec: ImagePreprocessing, max_pixels: int) -> np.ndarray:
    image = _decode(encoded, max_pixels)
    if image.mode in _WIDE_MODES:  # PIL would clip 16-bit grey at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255).astype(np.uint8))
    image = _fitted(image.convert(spec.mode), spec, max_pixels)
    pixels_HWC = np.asarray(image, dtype=np.float32).reshape(spec.height, spec.width, len(spec.mode)) / np.float32(255)
    if spec.invert:
        pixels_HWC = np.float32(1) - pixels_HWC
    mean_C, std_C = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    normalised_CHW: np.ndarray = ((pixels_HWC - mean_C) / std_C).transpose(2, 0, 1)
    return normalised_CHW


def _decode(encoded: bytes, max_pixels: int) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(max_pixels) from None
    except Exception:  # decoders of hostile bytes raise anything from OSError to struct.error
        raise MalformedRequest(f"image: it is not a readable {_or(IMAGE_FORMATS)} image", "image") from None
    if image.width * image.height > max_pixels:
        raise _too_many_pixels(max_pixels)
    try:
        image.load()
    except Exception:  # as above
        raise MalformedRequest(f"image: its {image.format} data is truncated or broken", "image") from None
    return image


def _fitted(image: Image.Image, spec: ImagePreprocessing, max_pixels: int) -> Image.Image:
    filter_ = _RESAMPLING[spec.interpolation]
    if spec.resize is None:
        size = (spec.width, spec.height)
        return image if image.size == size else image.resize(size, filter_)
    short, long = min(image.size), max(image.size)
    scaled_long = int(spec.resize * long / short)
    if spec.resize * scaled_long > max_pixels:
        raise _too_many_pixels(max_pixels)
    size = (spec.resize, scaled_long) if image.width <= image.height else (scaled_long, spec.resize)
    if image.size != size:
        image = image.resize(size, filter_)
    left, top = round((image.width - spec.width) / 2), round((image.height - spec.height) / 2)
    return image.crop((left, top, left + spec.width, top + spec.height))


def _too_many_pixels(max_pixels: int) -> TooLarge:
    return TooLarge(f"image: it has (or would be scaled to) more than the operator's {max_pixels} pixels", "image")


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"

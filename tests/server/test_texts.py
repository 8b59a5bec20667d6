import hashlib

import numpy as np
import pytest
from offramp_contract.calibration import Calibration
from offramp_contract.errors import InvalidValue, ManifestError
from offramp_contract.manifest import Exit, File, Manifest, Provenance, Stage, Tensor, TextPreprocessing
from offramp_runtime import Bundle
from offramp_server.preprocess import inputs_of_texts, prepare
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = {"[UNK]": 0, "[PAD]": 1, "well": 2, "worth": 3, "seeing": 4}


class OneFile:
    """A bundle's files held in memory."""

    name = "texts"

    def __init__(self, content: bytes) -> None:
        self._content = content

    def has(self, path: str) -> bool:
        return path == "tokenizer.json"

    def read(self, path: str, max_bytes: int = 2**31) -> bytes:
        return self._content


def text_bundle(*, with_mask: bool, content: bytes | None = None) -> Bundle:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_padding(pad_id=1, pad_token="[PAD]", length=50)  # the bundle's own length wins
    content = tokenizer.to_str().encode() if content is None else content
    inputs = [Tensor(name="ids", dtype="int64", shape=(5,))]
    if with_mask:
        inputs.append(Tensor(name="mask", dtype="float32", shape=(5,)))
    manifest = Manifest(
        name="texts",
        inputs=tuple(inputs),
        stages=(
            Stage(
                name="stage_0", graph=File(path="stages/00.onnx", sha256="0" * 64), exit=0, flops=1, carry_bytes=0,
                inputs=tuple(tensor.name for tensor in inputs),
            ),
        ),
        exits=(Exit(name="exit_0", stage=0, logits="l", decision="d", temperature="T", num_classes=2),),
        preprocessing=TextPreprocessing(
            tokenizer=File(path="tokenizer.json", sha256=hashlib.sha256(content).hexdigest()),
            ids="ids", mask="mask" if with_mask else None, length=5, pad_id=1,
        ),
        provenance=Provenance(source="test"),
    )  # fmt: skip
    return Bundle(manifest, Calibration.bare(manifest), OneFile(content))


def test_texts_are_padded_and_cut_to_the_declared_length_with_a_mask() -> None:
    inputs = inputs_of_texts(["well worth seeing", "well " * 9, ""], text_bundle(with_mask=True))
    np.testing.assert_array_equal(inputs["ids"], [[2, 3, 4, 1, 1], [2] * 5, [1] * 5])
    np.testing.assert_array_equal(inputs["mask"], [[1, 1, 1, 0, 0], [1] * 5, [0] * 5])
    assert (inputs["ids"].dtype, inputs["mask"].dtype) == (np.int64, np.float32)


def test_a_model_without_a_mask_gets_ids_alone() -> None:
    assert inputs_of_texts(["seeing strange things"], text_bundle(with_mask=False)).keys() == {"ids"}


def test_a_model_of_images_says_that_it_takes_no_text() -> None:
    bundle = text_bundle(with_mask=False)
    bare = Bundle(bundle.manifest.model_copy(update={"preprocessing": None}), bundle.calibration, bundle.files)
    with pytest.raises(InvalidValue, match="declares no text preprocessing"):
        inputs_of_texts(["x"], bare)


def test_a_prepared_bundle_answers_without_its_files() -> None:
    bundle = text_bundle(with_mask=True, content=None)
    prepare(bundle)
    gone = Bundle(bundle.manifest, bundle.calibration, OneFile(b"replaced by another version"))
    assert inputs_of_texts(["well"], gone)["ids"].shape == (1, 5)


@pytest.mark.parametrize("content", [b"{}", b"no json", b"\xff"])
def test_a_broken_tokenizer_is_refused_by_name_before_it_serves(content: bytes) -> None:
    with pytest.raises(ManifestError, match=r"'tokenizer\.json' is no tokenizer"):
        prepare(text_bundle(with_mask=True, content=content))

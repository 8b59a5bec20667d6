"""What `--data` may name, and that it all becomes what the server would make of it."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from offramp_cli.labelled_data import open_data
from offramp_cli.labelled_data.arrays import MAX_BATCH_BYTES
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import File, ImagePreprocessing, TextPreprocessing
from offramp_models import load_data
from offramp_runtime import open_bundle
from offramp_server.preprocess import inputs_of_texts
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

GREY = ImagePreprocessing(mode="L", height=8, width=8, mean=(0.305,), std=(0.376,))
COLOUR = ImagePreprocessing(mode="RGB", height=6, width=5, resize=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


@pytest.fixture(scope="module")
def grey(make_bundle):
    labels = ("ant", "bee", "cat")
    return open_bundle(make_bundle(row_shape=(1, 8, 8), num_classes=3, labels=labels, preprocessing=GREY))


@pytest.fixture(scope="module")
def colour(make_bundle):
    return open_bundle(make_bundle(row_shape=(3, 6, 5), num_classes=3, preprocessing=COLOUR))


@pytest.fixture(scope="module")
def plain(toy_bundle):
    return open_bundle(toy_bundle)


def read(data, size=7):
    """Give everything that labelled data holds."""
    batches = list(data.batches(size))
    assert all(len(next(iter(batch.values()))) <= size for batch in batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}, data.label_N.tolist()


def pictures(num_pictures, *shape):
    return np.random.default_rng(0).integers(0, 256, (num_pictures, *shape)).astype(np.uint8)


def normalised(pixels_NHW):
    return ((pixels_NHW / np.float32(255) - np.float32(0.305)) / np.float32(0.376))[:, None].astype(np.float32)


# Arrays.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("images", "labels")])
def test_arrays_that_the_model_reads_are_taken_as_they_are(grey, tmp_path, save, x, y):
    images = normalised(pictures(20, 8, 8))
    save(tmp_path / "d.npz", **{x: images, y: np.arange(20) % 3})
    inputs, labels = read(open_data(str(tmp_path / "d.npz"), grey, "test").data)
    np.testing.assert_array_equal(inputs["x"], images)
    assert labels == (np.arange(20) % 3).tolist()


def test_double_precision_becomes_the_models(plain, tmp_path):
    x = np.random.default_rng(0).normal(size=(9, 4))
    np.savez(tmp_path / "d.npz", x=x, y=["north"] * 9)
    inputs, labels = read(open_data(str(tmp_path / "d.npz"), plain, "test").data)
    np.testing.assert_array_equal(inputs["x"], x.astype(np.float32))
    assert labels == [0] * 9


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1)])
def test_raw_pixels_are_prepared_as_the_server_prepares_a_picture(grey, tmp_path, shape):
    pixels = pictures(20, *shape)
    np.savez(tmp_path / "d.npz", x=pixels, y=np.arange(20) % 3)
    data = open_data(str(tmp_path / "d.npz"), grey, "test").data
    inputs, _ = read(data)
    np.testing.assert_allclose(inputs["x"], normalised(pixels.reshape(20, 8, 8)), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(data.example(11), pixels[11].reshape(8, 8))


def test_pixels_of_any_size_are_scaled_and_cropped(colour, tmp_path):
    np.savez(tmp_path / "d.npz", x=pictures(5, 20, 16, 3), y=np.zeros(5, int))
    inputs, _ = read(open_data(str(tmp_path / "d.npz"), colour, "test").data)
    assert inputs["x"].shape == (5, 3, 6, 5)


def test_an_array_shows_its_pictures(grey, plain, tmp_path):
    pixels = pictures(20, 8, 8)
    np.savez_compressed(tmp_path / "d.npz", x=normalised(pixels), y=np.arange(20) % 3)
    np.testing.assert_array_equal(open_data(str(tmp_path / "d.npz"), grey, "test").data.example(17), pixels[17])
    np.savez(tmp_path / "p.npz", x=np.zeros((5, 4), np.float32), y=np.zeros(5, int))
    assert open_data(str(tmp_path / "p.npz"), plain, "test").data.example(0) is None


def test_a_model_of_several_inputs_reads_an_array_for_each(plain, tmp_path):
    (x,) = plain.manifest.inputs
    inputs = (x.model_copy(update={"name": "ids"}), x.model_copy(update={"name": "mask"}))
    both = type(plain)(plain.manifest.model_copy(update={"inputs": inputs}), plain.calibration, plain.files)
    arrays = {"ids": np.ones((5, 4), np.float32), "mask": np.zeros((5, 4), np.float32)}
    np.savez(tmp_path / "d.npz", **arrays, y=np.zeros(5, int))
    read_back, _ = read(open_data(str(tmp_path / "d.npz"), both, "test").data)
    assert all(np.array_equal(read_back[name], array) for name, array in arrays.items())
    np.savez(tmp_path / "d.npz", ids=arrays["ids"], y=np.zeros(5, int))
    with pytest.raises(UnfitData, match="needs an array named mask"):
        open_data(str(tmp_path / "d.npz"), both, "test")
    np.savez(tmp_path / "d.npz", ids=arrays["ids"], mask=arrays["mask"][:3], y=np.zeros(5, int))
    with pytest.raises(UnfitData, match=r"the inputs need the same number of samples; got \{'ids': 5, 'mask': 3\}"):
        open_data(str(tmp_path / "d.npz"), both, "test")


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"y": np.zeros(9, int)}, "needs an array named x"),
        ({"x": np.zeros((9, 4))}, "needs an array of labels, named y"),
        ({"x": np.float64(1), "y": np.zeros(9, int)}, "x is a single number"),
        ({"x": np.zeros((9, 4)), "y": np.zeros((9, 4))}, "shape (9,); got (9, 4); one-hot rows"),
        ({"x": np.zeros((9, 4)), "y": np.zeros(8, int)}, "there are 8 for 9 samples"),
        ({"x": np.zeros((9, 4)), "y": np.full(9, 4)}, "sample 0 has the label 4"),
        (
            {"x": np.zeros((9, 5)), "y": np.zeros(9, int)},
            "x: must be float32 of shape (samples, 4); got float64 (9, 5)",
        ),
        ({"x": np.zeros((9, 4), bool), "y": np.zeros(9, int)}, "convertible to it without loss; got bool"),
        ({"x": np.full((9, 4), 1e300), "y": np.zeros(9, int)}, "must hold finite numbers that fit float32"),
        ({"x": np.diag([1.0, 1, np.nan, 1]), "y": np.zeros(4, int)}, "x: sample 2 holds NaN or infinity"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_words(plain, tmp_path, arrays, sentence):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UnfitData) as refused:
        read(open_data(str(tmp_path / "d.npz"), plain, "test").data)
    assert sentence in refused.value.message


def test_an_array_larger_than_memory_would_be_read_in_pieces(plain, tmp_path):
    x = np.zeros((1_000_000, 4), np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=np.zeros(len(x), np.uint8))
    data = open_data(str(tmp_path / "d.npz"), plain, "test").data
    tracemalloc.start()
    assert sum(len(batch["x"]) for batch in data.batches(256)) == len(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 8


def test_large_rows_make_small_batches(grey, tmp_path):
    side = 2048
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((40, side, side), np.uint8), y=np.zeros(40, int))
    data = open_data(str(tmp_path / "d.npz"), grey, "test").data
    assert len(next(iter(data.batches(256)))["x"]) == MAX_BATCH_BYTES // side**2 < 40


# Folders of images.


@pytest.fixture
def folder(tmp_path):
    """Five pictures of each of three classes."""
    pixels = pictures(15, 8, 8)
    for index, picture in enumerate(pixels):
        name = ("ant", "bee", "cat")[index // 5]
        (tmp_path / "zoo" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "zoo" / name / f"{index:02d}.png")
    return tmp_path / "zoo", pixels


def test_a_folder_holds_a_sub_folder_for_each_class(grey, folder):
    path, pixels = folder
    (path / ".cache").mkdir()
    (path / "ant" / "notes.txt").touch()
    data = open_data(str(path), grey, "test").data
    inputs, labels = read(data)
    assert labels == [0] * 5 + [1] * 5 + [2] * 5
    np.testing.assert_allclose(inputs["x"], normalised(pixels), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(data.example(7), pixels[7])
    assert data.name == "zoo"


def test_sub_folders_may_be_class_numbers(grey, folder):
    path, _ = folder
    (path / "ant").rename(path / "2")
    (path / "cat").rename(path / "0")
    assert read(open_data(str(path), grey, "test").data)[1] == [0] * 5 + [2] * 5 + [1] * 5


def test_a_sub_folder_that_is_no_class_is_named(grey, folder):
    path, _ = folder
    (path / "ant").rename(path / "train")
    with pytest.raises(UnfitData, match="labels: 'train' is not one of the bundle's classes: ant, bee, cat"):
        open_data(str(path), grey, "test")


def test_a_link_that_leads_out_of_the_folder_is_not_followed(grey, folder, tmp_path):
    path, pixels = folder
    Image.fromarray(pixels[0]).save(tmp_path / "secret.png")
    (path / "bee" / "99.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UnfitData, match=r"bee/99\.png is a link that leads out of"):
        open_data(str(path), grey, "test")
    (path / "bee" / "99.png").unlink()
    (tmp_path / "outside").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "outside" / "a.png")
    (path / "0").symlink_to(tmp_path / "outside")
    with pytest.raises(UnfitData, match=r"0/a\.png is a link that leads out of"):
        open_data(str(path), grey, "test")


def test_a_link_within_the_folder_is_another_sample(grey, folder):
    path, _ = folder
    (path / "bee" / "99.png").symlink_to("05.png")
    assert len(open_data(str(path), grey, "test").data.label_N) == 16


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no picture", "'cat/13.png' cannot be used: it is not a readable JPEG"),
        (None, "'cat/13.png' is over"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(grey, folder, content, sentence):
    path, _ = folder
    with (path / "cat" / "13.png").open("wb") as file:
        file.write(content) if content else file.truncate(2**26 + 1)
    with pytest.raises(UnfitData) as refused:
        read(open_data(str(path), grey, "test").data)
    assert sentence in refused.value.message


def test_a_picture_of_too_many_pixels_is_not_decoded(grey, folder):
    path, _ = folder
    Image.new("1", (8192, 8192)).save(path / "bee" / "07.png")
    with pytest.raises(UnfitData, match=r"'bee/07\.png' cannot be used: .* pixels"):
        read(open_data(str(path), grey, "test").data)


def test_a_folder_without_images_and_a_model_without_images_are_refused(grey, plain, folder, tmp_path):
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(UnfitData, match=r"holds no sub-folder of \.png"):
        open_data(str(tmp_path / "empty"), grey, "test")
    with pytest.raises(UnfitData, match="the bundle declares no image preprocessing"):
        open_data(str(folder[0]), plain, "test")


# Tables of texts.


@pytest.fixture(scope="module")
def texts(make_bundle):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "good": 1, "bad": 2, "film": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    content = tokenizer.to_str().encode()
    file = File(path="tokenizer.json", sha256=hashlib.sha256(content).hexdigest())
    spec = TextPreprocessing(tokenizer=file, ids="x", length=4)
    folder = make_bundle(labels=("up", "down", "flat", "odd"), preprocessing=spec)
    (folder / "tokenizer.json").write_bytes(content)
    return open_bundle(folder)


def test_a_table_is_tokenised_as_the_server_does(texts, tmp_path):
    said = ["good film", "bad, bad film", 'a "good"\nfilm', "", "film"]
    lines = [
        "label,more,text",
        "up,1,good film",
        '1,2,"bad, bad film"',
        'flat,3,"a ""good""\nfilm"',
        "odd,4,",
        "3,5,film",
    ]
    (tmp_path / "d.csv").write_text("\ufeff" + "\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    data = open_data(str(tmp_path / "d.csv"), texts, "test").data
    inputs, labels = read(data, 2)
    assert labels == [0, 1, 2, 3, 3]
    np.testing.assert_array_equal(inputs["x"], inputs_of_texts(said, texts)["x"])
    assert [data.example(index) for index in range(5)] == said
    assert data.example(5) is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must name the columns text and label"),
        (b"good film,up\n", "must name the columns text and label"),
        (b"text,label\ngood film,sideways\n", "'sideways' is not one of the bundle's classes: up, down, flat, odd"),
        (b"text,label\ngood, film,up\n", "line 2 of 'd.csv' has 3 columns and the header 2; a text with commas"),
        (b"text,label\ngood\n", "line 2 of 'd.csv' has 1 columns"),
        (b'text,label\n"good film,up\n', "is not CSV"),
        (b"text,label\n" + b"x" * 140_000 + b",up\n", "is not CSV: field larger than field limit"),
        (b"text,label\n" + b"x" * 2**21 + b",up\n", "has a line of over 1,048,576 characters"),
        (b"text,label\ncaf\xe9,up\n", "is not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_words(texts, tmp_path, content, sentence):
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(UnfitData) as refused:
        open_data(str(tmp_path / "d.csv"), texts, "test")
    assert sentence in refused.value.message


def test_a_model_without_texts_and_a_table_that_is_not_there_are_refused(texts, plain, tmp_path):
    with pytest.raises(UnfitData, match="does not exist"):
        open_data(str(tmp_path / "none.csv"), texts, "test")
    with pytest.raises(UnfitData, match="declares no text preprocessing"):
        open_data(str(tmp_path / "none.csv"), plain, "test")


# Data sets by name.


def digits(make_bundle, training, preprocessing=None, labels=tuple("0123456789")):
    bundle = open_bundle(make_bundle(row_shape=(1, 8, 8), num_classes=10, labels=labels, preprocessing=preprocessing))
    provenance = bundle.manifest.provenance.model_copy(update={"training": training})
    return type(bundle)(bundle.manifest.model_copy(update={"provenance": provenance}), bundle.calibration, bundle.files)


@pytest.mark.parametrize("split", ["calibration", "test"])
@pytest.mark.parametrize("preprocessing", [None, GREY])
def test_a_named_data_set_is_split_as_it_was_for_the_training(make_bundle, split, preprocessing):
    bundle = digits(make_bundle, {"data": "digits", "settings": {"seed": 7}}, preprocessing)
    opened = open_data("digits", bundle, split)
    expected = load_data("digits", 7)
    inputs, labels = read(opened.data, 100)
    images = getattr(expected, split)
    np.testing.assert_allclose(inputs["x"], expected.inputs(images), rtol=1e-5, atol=1e-6)
    assert labels == images.labels_N.tolist()
    assert opened.data.name == f"digits ({split})"
    assert "split with seed 7, as for the bundle's training" in opened.remark
    if preprocessing:
        np.testing.assert_array_equal(opened.data.example(3), images.pixels_NHW[3])


@pytest.mark.parametrize(
    ("training", "sentence"),
    [
        ({}, "the bundle's training record names no data set, so see to it"),
        ({"data": "cifar100", "settings": {"seed": 7}}, "the bundle's training record names cifar100, not digits"),
        ({"data": "digits"}, "the bundle's training record names no seed"),
        ({"data": "digits", "settings": "none"}, "the bundle's training record names no seed"),
    ],
)
def test_where_the_training_record_cannot_say_what_was_held_out_a_person_is_told(make_bundle, training, sentence):
    opened = open_data("digits", digits(make_bundle, training), "calibration")
    assert sentence in opened.remark
    assert opened.data.label_N.tolist() == load_data("digits", 0).calibration.labels_N.tolist()


def test_a_bundle_with_its_classes_in_another_order_keeps_its_own(make_bundle):
    bundle = digits(make_bundle, {}, labels=tuple("9876543210"))
    labels = open_data("digits", bundle, "test").data.label_N
    assert labels.tolist() == (9 - load_data("digits", 0).test.labels_N).tolist()


def test_a_bundle_beside_is_not_mistaken_for_the_data_set_of_its_name(make_bundle, monkeypatch):
    folder = make_bundle(name="digits", row_shape=(1, 8, 8), num_classes=10)
    monkeypatch.chdir(folder.parent)
    assert len(open_data("digits", open_bundle(folder), "test").data.label_N) == 500


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("imagenet", "data set 'imagenet' is not one of"),
        ("./digits", "data: './digits' does not exist"),
        ("none/d.npz", "data: 'none/d.npz' does not exist"),
        ("notes.txt", "data: 'notes.txt' is neither an .npz, a .csv nor a folder of images"),
    ],
)
def test_what_is_no_data_is_refused_in_words(plain, tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UnfitData) as refused:
        open_data(text, plain, "test")
    assert sentence in refused.value.message

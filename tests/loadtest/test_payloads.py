import io
import pickle

import numpy as np
import pytest
from offramp_loadtest import LoadTestError, payloads_of_arrays, read_payloads


def test_an_npz_gives_rows_with_their_labels(tmp_path):
    inputs = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "d.npz", x=inputs, y=np.array([2, 0, 1]))
    payloads = read_payloads(tmp_path / "d.npz")
    assert [payload.label for payload in payloads] == [2, 0, 1]
    np.testing.assert_array_equal(np.load(io.BytesIO(payloads[1].npy())), inputs[1:2])


def test_an_npy_gives_rows_without_labels(tmp_path):
    np.save(tmp_path / "d.npy", np.zeros((2, 3)))
    assert [payload.label for payload in read_payloads(tmp_path / "d.npy")] == [None, None]


def test_an_image_folder_numbers_its_classes_in_alphabetical_order(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(name.encode())
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    payloads = read_payloads(tmp_path)
    assert [(p.label, p.image, p.content_type) for p in payloads] == [
        (0, b"cat", "image/png"),
        (1, b"dog", "image/png"),
    ]


def test_pickled_arrays_are_refused_without_being_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    (tmp_path / "d.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    for name in ("d.npy", "d.npz"):
        with pytest.raises(LoadTestError, match="plain arrays"):
            read_payloads(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"z": np.zeros((2, 2))}, "needs an array named one of x, inputs"),
        ({"x": np.zeros((2, 2)), "y": np.zeros(3)}, "2 inputs, but 3 labels"),
        ({"x": np.zeros((0, 2))}, "holds no row"),
        ({"x": np.zeros((2, 2)), "y": np.array(["a", "b"])}, "labels must be class numbers"),
    ],
)
def test_unusable_arrays_are_refused_in_a_sentence(tmp_path, arrays, sentence):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(LoadTestError, match=sentence):
        read_payloads(tmp_path / "d.npz")


def test_a_broken_or_a_bursting_archive_is_refused_in_a_sentence(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((1000, 100)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:200])
    with pytest.raises(LoadTestError, match="plain arrays"):
        read_payloads(tmp_path / "cut.npz")
    monkeypatch.setattr("offramp_loadtest.payloads.MAX_FILE_BYTES", 100_000)
    assert (tmp_path / "d.npz").stat().st_size < 100_000
    with pytest.raises(LoadTestError, match="holds over 100000 bytes"):
        read_payloads(tmp_path / "d.npz")


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    for name in ("10", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    assert sorted(payload.label for payload in read_payloads(tmp_path)) == [2, 10]


def test_more_rows_than_are_kept_lose_no_end_of_the_data(monkeypatch):
    monkeypatch.setattr("offramp_loadtest.payloads.MAX_PAYLOADS", 10)
    payloads = payloads_of_arrays(np.zeros((95, 1)), np.arange(95))
    assert len(payloads) <= 10
    assert payloads[-1].label == 90


def test_missing_data_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(LoadTestError, match="does not exist"):
        read_payloads(tmp_path / "none.npz")
    with pytest.raises(LoadTestError, match="holds no folder of"):
        read_payloads(tmp_path)


def test_labels_must_be_one_per_row():
    with pytest.raises(LoadTestError, match="2 inputs, but 1 labels"):
        payloads_of_arrays(np.zeros((2, 3)), [1])

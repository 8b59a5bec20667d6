import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from offramp_contract.errors import InvalidValue, MalformedRequest, OfframpError, TooLarge
from offramp_contract.manifest import Exit, File, Manifest, Provenance, Stage, Tensor
from offramp_server.inputs import array_of_npy, conform, inputs_of_lists, inputs_of_npy
from offramp_server.messages import Inputs


def manifest_reading(*tensors: Tensor) -> Manifest:
    graph = File(path="stages/00.onnx", sha256="0" * 64)
    names = tuple(tensor.name for tensor in tensors)
    return Manifest(
        name="net",
        inputs=tensors,
        stages=(Stage(name="stage_0", graph=graph, inputs=names, exit=0, flops=1, carry_bytes=0),),
        exits=(Exit(name="exit_0", stage=0, logits="l", decision="d", temperature="T", num_classes=3),),
        provenance=Provenance(source="test"),
    )


PLAIN = manifest_reading(Tensor(name="x", dtype="float32", shape=(2, 3)))
IDS = manifest_reading(Tensor(name="ids", dtype="int32", shape=(4,)))
FLAGS = manifest_reading(Tensor(name="flags", dtype="bool", shape=(2,)))
TWO = manifest_reading(Tensor(name="a", dtype="float32", shape=(2,)), Tensor(name="b", dtype="int64", shape=()))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npy_claiming(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin-1") + data


def test_one_row_of_nested_lists_becomes_a_batch_of_one() -> None:
    inputs = inputs_of_lists([[1, 2, 3], [4, 5.5, 6]], PLAIN, max_rows=4)
    np.testing.assert_array_equal(inputs["x"], np.array([[[1, 2, 3], [4, 5.5, 6]]], dtype=np.float32))
    assert inputs["x"].dtype == np.float32


def test_a_batch_of_nested_lists_keeps_its_rows() -> None:
    rows = [[[1, 2, 3], [4, 5, 6]], [[0, 0, 0], [7, 8, 9]]]
    np.testing.assert_array_equal(inputs_of_lists(rows, PLAIN, 4)["x"], np.array(rows, dtype=np.float32))


def test_several_inputs_are_named_and_need_the_same_number_of_rows() -> None:
    inputs = inputs_of_lists({"a": [[1, 2], [3, 4]], "b": [5, 6]}, TWO, 4)
    assert inputs["a"].shape == (2, 2)
    assert inputs["b"].tolist() == [5, 6]
    with pytest.raises(InvalidValue, match="same number of rows"):
        inputs_of_lists({"a": [[1, 2]], "b": [5, 6]}, TWO, 4)


@pytest.mark.parametrize(
    ("written", "manifest", "message"),
    [
        ([1, 2, 3], PLAIN, r"shape \(2, 3\)"),
        ([[[[1, 2, 3], [4, 5, 6]]]], PLAIN, r"shape \(2, 3\)"),
        ([[1, 2, 3], [4, 5]], PLAIN, "a list of 2 where a list of 3"),
        ([[[1, 2, 3], [4, 5, 6]], 7], PLAIN, "an integer where a list of 2"),
        ([], PLAIN, r"shape \(2, 3\)"),
        ("text", PLAIN, r"shape \(2, 3\)"),
        (5, PLAIN, r"shape \(2, 3\)"),
        ([[1, 2, "3"], [4, 5, 6]], PLAIN, "got a string"),
        ([[1, 2, None], [4, 5, 6]], PLAIN, "got null"),
        ([[1, 2, True], [4, 5, 6]], PLAIN, "got a boolean"),
        ([[1, 2, {}], [4, 5, 6]], PLAIN, "got an object"),
        ([[1, 2, 1e39], [4, 5, 6]], PLAIN, "finite"),
        ([1, 2, 3, 4.5], IDS, "got a fraction"),
        ([1, 2, 3, 2**40], IDS, "does not fit int32"),
        ([1, 0], FLAGS, "got an integer"),
        ({"y": [[1, 2, 3], [4, 5, 6]]}, PLAIN, "exactly x"),
        ([[1, 2]], TWO, "this model reads a, b"),
        ({"a": [[1, 2]]}, TWO, "exactly a, b"),
    ],
)
def test_lists_that_do_not_fit_are_refused_by_name(written: object, manifest: Manifest, message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        inputs_of_lists(written, manifest, max_rows=4)
    assert caught.value.message.startswith("inputs")
    assert caught.value.field is not None


def test_more_rows_than_the_operator_allows_are_too_large() -> None:
    rows = [[[1, 2, 3], [4, 5, 6]]] * 5
    with pytest.raises(TooLarge, match="limit of 4"):
        inputs_of_lists(rows, PLAIN, max_rows=4)
    with pytest.raises(TooLarge, match="limit of 4"):
        inputs_of_npy(npy(np.zeros((5, 2, 3), dtype=np.float32)), PLAIN, max_rows=4)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">i2", "<f2", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npy_file_is_read_in_any_number_type_byte_order_and_memory_order(dtype: str, order: str) -> None:
    array = np.asarray(np.arange(12).reshape(2, 2, 3), dtype=dtype, order=order)  # type: ignore[call-overload]
    read = inputs_of_npy(npy(array), PLAIN, max_rows=4)["x"]
    np.testing.assert_array_equal(read, np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    assert read.dtype == np.float32
    assert read.flags.c_contiguous


def test_an_npy_file_may_leave_out_the_batch_axis() -> None:
    assert inputs_of_npy(npy(np.ones((2, 3), dtype=np.float32)), PLAIN, 4)["x"].shape == (1, 2, 3)


def test_npy_data_that_fits_is_not_copied() -> None:
    body = npy(np.ones((1, 2, 3), dtype=np.float32))
    assert np.shares_memory(inputs_of_npy(body, PLAIN, 4)["x"], np.frombuffer(body, dtype=np.uint8))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not an npy file", "not an .npy file"),
        (b"\x93NUMPY\x01\x00", "not an .npy file"),
        (b"\x93NUMPY\x09\x00" + b"\x00" * 16, "not an .npy file"),
        (npy_claiming("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 2, 3), }\n"), "claims"),
        (npy_claiming("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2, 3), }\n"), "claims"),
        (npy_claiming("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3), }\n", b"\0" * 23), "claims 24"),
        (npy_claiming("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3), }\n", b"\0" * 25), "claims 24"),
        (npy_claiming("{'descr': '|V1099511627776', 'fortran_order': False, 'shape': (), }\n"), "not an .npy file"),
        (npy_claiming("(" * 3000 + "\n"), "not an .npy file"),
        (npy_claiming("{'descr': '<f4', 'shape': (" + "1," * 30000 + ")}\n"), "not an .npy file"),
        (npy(np.array([{"a": 1}], dtype=object)), "objects are never read"),
        (npy(np.array(["a"])), "numbers or booleans"),
        (npy(np.zeros(1, dtype=[("a", "<f4")])), "numbers or booleans"),
        (npy(np.zeros(1, dtype="datetime64[s]")), "numbers or booleans"),
    ],
)
def test_a_hostile_npy_file_is_malformed(body: bytes, message: str) -> None:
    with pytest.raises(MalformedRequest, match=message):
        inputs_of_npy(body, PLAIN, max_rows=4)


@pytest.mark.parametrize(
    ("array", "manifest", "message"),
    [
        (np.zeros((0, 2, 3), np.float32), PLAIN, "at least one row"),
        (np.zeros((1, 3, 2), np.float32), PLAIN, r"must have shape \(2, 3\).*got \(1, 3, 2\)"),
        (np.float32(1), PLAIN, r"got \(\)"),
        (np.full((2, 3), np.nan, np.float32), PLAIN, "NaN or infinity"),
        (np.full((2, 3), 1e300), PLAIN, "NaN or infinity"),
        (np.zeros((2, 3), np.complex64), PLAIN, "float32"),
        (np.zeros((2, 3), bool), PLAIN, "got bool"),
        (np.zeros(4, np.float32), IDS, "got float32"),
        (np.full(4, 2**40), IDS, "do not fit int32"),
        (np.zeros(2, np.uint8), FLAGS, "got uint8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(array: np.ndarray, manifest: Manifest, message: str) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        conform({manifest.inputs[0].name: np.asarray(array)}, manifest, 4, allow_single=True)
    assert caught.value.field == "inputs"


def test_arrays_under_other_names_than_the_models_are_refused() -> None:
    with pytest.raises(InvalidValue, match="exactly x; got y"):
        conform({"y": np.zeros((1, 2, 3), np.float32)}, PLAIN, 4)


def outcome_of(call: Callable[[], Inputs]) -> Inputs | OfframpError:
    try:
        return call()
    except OfframpError as error:
        return error


@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda tail: b"\x93NUMPY\x01\x00" + tail))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_the_npy_reader_raise_anything_but_its_own_errors(body: bytes) -> None:
    outcome = outcome_of(lambda: {"x": array_of_npy(body)})
    assert isinstance(outcome, dict | MalformedRequest)


@given(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
@settings(max_examples=200, deadline=None)
def test_any_array_is_either_converted_to_the_models_type_or_refused(array: np.ndarray) -> None:
    outcome = outcome_of(lambda: inputs_of_npy(npy(array), PLAIN, max_rows=3))
    if isinstance(outcome, OfframpError):
        assert "inputs" in outcome.message
    else:
        assert outcome["x"].dtype == np.float32
        assert outcome["x"].shape[1:] == (2, 3)
        assert np.isfinite(outcome["x"]).all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("xab"), inner, max_size=2),
    max_leaves=12,
)


@given(JSON, st.sampled_from([PLAIN, IDS, FLAGS, TWO]))
@settings(max_examples=300, deadline=None)
def test_any_json_is_either_converted_to_the_models_types_or_refused(written: object, manifest: Manifest) -> None:
    outcome = outcome_of(lambda: inputs_of_lists(written, manifest, max_rows=3))
    if isinstance(outcome, OfframpError):
        assert "inputs" in outcome.message
        return
    for tensor in manifest.inputs:
        assert outcome[tensor.name].dtype == tensor.dtype
        assert outcome[tensor.name].shape[1:] == tensor.shape

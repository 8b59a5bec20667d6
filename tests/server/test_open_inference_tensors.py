import math

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from offramp_contract.errors import InvalidValue, OfframpError
from offramp_contract.manifest import Exit, File, Manifest, Provenance, Stage, Tensor
from offramp_contract.policy_spec import ConfidenceSpec
from offramp_server.api.open_inference.request import json_length_of, read_wording
from offramp_server.api.open_inference.response import chosen_encoding
from offramp_server.api.open_inference.tensors import DATATYPES, OutputTensor, tensor_of_binary, tensor_of_json
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

SHAPES = numpy_strategies.array_shapes(min_dims=1, max_dims=4, max_side=4)
QUICK = settings(max_examples=60, deadline=None)


def arrays(**limits: object) -> st.SearchStrategy[np.ndarray]:
    return st.sampled_from(sorted(DATATYPES)).flatmap(lambda dtype: numpy_strategies.arrays(dtype, SHAPES, **limits))


@QUICK
@given(arrays(), st.integers(0, 9))
def test_binary_data_comes_back_as_it_was_wherever_it_lies_in_the_body(array: np.ndarray, before: int) -> None:
    written = OutputTensor("y", array.shape, array).to_binary()
    stretch = memoryview(bytes(before) + written)[before:]
    read = tensor_of_binary(stretch, array.dtype.name, array.shape, "inputs.x")
    assert read.dtype == array.dtype
    assert read.flags.aligned
    assert read.tobytes() == array.tobytes()


def test_aligned_binary_data_is_not_copied() -> None:
    body = np.arange(12, dtype=np.float32).tobytes()
    assert np.shares_memory(tensor_of_binary(memoryview(body), "float32", (3, 4), "x"), np.frombuffer(body, np.uint8))


@QUICK
@given(arrays())
def test_our_datatypes_are_those_of_the_client(array: np.ndarray) -> None:
    assert triton_to_np_dtype(OutputTensor("y", array.shape, array).datatype) == array.dtype


FINITE = {"allow_nan": False, "allow_infinity": False}


@QUICK
@given(arrays(elements=FINITE), st.booleans())
def test_json_data_comes_back_as_it_was_flat_or_nested(array: np.ndarray, is_nested: bool) -> None:
    written = array.tolist() if is_nested else OutputTensor("y", array.shape, array).to_json()
    data = orjson.loads(orjson.dumps(written, option=orjson.OPT_SERIALIZE_NUMPY))
    read = tensor_of_json(data, array.dtype.name, array.shape, "inputs.x")
    assert read.dtype == array.dtype
    assert read.tobytes() == array.tobytes() or np.array_equal(read, array)  # JSON has one zero, floats have two


@QUICK
@given(st.lists(st.text(), min_size=1, max_size=8))
def test_bytes_are_written_as_the_client_reads_and_writes_them(texts: list[str]) -> None:
    elements = [text.encode() for text in texts]
    written = OutputTensor("y", (len(elements), 1), elements).to_binary()
    assert deserialize_bytes_tensor(written).tolist() == elements
    assert written == serialize_byte_tensor(np.array(elements, dtype=np.object_)).item()


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        ([1, 2, 3], "float32", (2, 2)),
        ([[1, 2], [3]], "float32", (2, 2)),
        ([[1, 2], 3], "float32", (2, 2)),
        ([[1, 2], [3, [4]]], "float32", (2, 2)),
        ([1, "2"], "float32", (1, 2)),
        ([1, True], "float32", (1, 2)),
        ([1, None], "float32", (1, 2)),
        ([1.5, 1], "int32", (1, 2)),
        ([1, 0], "bool", (1, 2)),
        ([256, 0], "uint8", (1, 2)),
        ([2**63, 0], "int64", (1, 2)),
        ({"0": 1}, "float32", (1, 1)),
        ("12", "float32", (1, 2)),
    ],
)
def test_json_data_that_does_not_fit_is_refused_by_name(data: object, dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidValue, match=r"^inputs\.x\.data: "):
        tensor_of_json(data, dtype, shape, "inputs.x")


def test_a_boolean_is_a_zero_or_a_one() -> None:
    with pytest.raises(InvalidValue, match="bytes 0 and 1"):
        tensor_of_binary(memoryview(b"\x00\x02"), "bool", (1, 2), "inputs.x")


MANIFEST = Manifest(
    name="pair",
    inputs=(Tensor(name="x", dtype="float32", shape=(2,)), Tensor(name="n", dtype="int64", shape=())),
    stages=(
        Stage(name="s", graph=File(path="s.onnx", sha256="0" * 64), inputs=("x", "n"), exit=0, flops=1, carry_bytes=0),
    ),
    exits=(Exit(name="e", stage=0, logits="l", decision="d", temperature="T", num_classes=2),),
    default_policy=ConfidenceSpec(),
    provenance=Provenance(source="written by hand"),
)


@QUICK
@given(st.integers(1, 3), st.permutations(["x", "n"]), st.sets(st.sampled_from(["x", "n"])), st.text())
def test_a_request_is_read_whichever_inputs_are_binary(
    num_rows: int, order: list[str], binary: set[str], request_id: str
) -> None:
    sent = {"x": np.random.default_rng(0).random((num_rows, 2), np.float32), "n": np.arange(num_rows)}
    entries, data = [], b""
    for name in order:
        entry = {"name": name, "datatype": DATATYPES[sent[name].dtype.name], "shape": list(sent[name].shape)}
        if name in binary:
            data += sent[name].tobytes()
            entry["parameters"] = {"binary_data_size": sent[name].nbytes}
        else:
            entry["data"] = sent[name].tolist()
        entries.append(entry)
    text = orjson.dumps({"id": request_id, "inputs": entries})
    wording = read_wording(text, len(text + data), MANIFEST, 8)
    assert wording.id == request_id
    assert {name: array.tobytes() for name, array in wording.arrays(text + data).items()} == {
        name: array.tobytes() for name, array in sent.items()
    }


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_sent_is_read_or_refused_on_purpose(data: st.DataObject) -> None:
    """A valid request with one part of it replaced by anything."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    document: dict[str, object] = {
        "id": "1",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
            {"name": "n", "datatype": "INT64", "shape": [1], "data": [7]},
        ],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True, "classification": 2}}],
        "parameters": {"timeout": 5, "policy": "confidence", "threshold": "0.9", "binary_data_output": True},
    }
    part: object = document
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))  # type: ignore[arg-type]
        key = data.draw(st.sampled_from(keys))
        child = part[key]  # type: ignore[index]
        if not isinstance(child, dict | list) or not child or data.draw(st.booleans()):
            part[key] = data.draw(anything)  # type: ignore[index]
            break
        part = child
    text = orjson.dumps(document)
    tail = data.draw(st.sampled_from([b"", bytes(7), bytes(8), bytes(9)]))
    length = data.draw(st.sampled_from([str(len(text)), "0", "-1", "x", "99999999999999999999", None]))
    try:
        body = text + tail
        wording = read_wording(body[: json_length_of(length, len(body))], len(body), MANIFEST, 8)
        arrays_read = wording.arrays(body)
    except OfframpError:
        return
    assert all(math.prod(array.shape) <= 16 for array in arrays_read.values())


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("gzip;q=0", None),
        ("GZIP", "gzip"),
        ("br", None),
        ("gzip;q=nonsense", None),
    ],
)
def test_the_compression_is_the_one_the_client_prefers(accepted: str, chosen: str | None) -> None:
    assert chosen_encoding(accepted) == chosen

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_runtime.gather import FLOAT32, copy_graph, gather_graph
from onnx import helper

DTYPES = ["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool"]
SHAPES = [(), (2,), (2, 1, 3)]


def load(graph: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(graph, providers=["CPUExecutionProvider"])


def element_type(dtype: str) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


SESSIONS = {
    (count, is_ordered): load(gather_graph(FLOAT32, count, is_ordered=is_ordered))
    for count in (1, 3)
    for is_ordered in (False, True)
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_graph_serves_rows_of_every_shape_and_one_every_dtype(dtype: str, shape: tuple[int, ...]) -> None:
    session = load(gather_graph(element_type(dtype), 2))
    sources = [np.ones((3, *shape), dtype=dtype), np.zeros((2, *shape), dtype=dtype)]
    feeds = {"source_0": sources[0], "source_1": sources[1], "rows": np.array([2, 1]), "sizes": np.array([1, 1])}
    (gathered,) = session.run(["gathered"], feeds | {"order": np.array([1, 0])})
    assert gathered.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(gathered, [sources[1][1], sources[0][2]])


@given(st.data(), st.sampled_from(sorted(SESSIONS)))
def test_it_takes_rows_of_each_source_and_puts_them_in_order(data: st.DataObject, kind: tuple[int, bool]) -> None:
    num_sources, is_ordered = kind
    sources = [np.arange(8, dtype=np.float32).reshape(4, 2) + 100 * i for i in range(num_sources)]
    rows = [data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)) for _ in sources]
    together = np.concatenate([source[picked] for source, picked in zip(sources, rows, strict=True)])
    order = np.array(data.draw(st.lists(st.integers(0, len(together) - 1), min_size=1)))
    feeds = {f"source_{i}": source for i, source in enumerate(sources)} | {"rows": np.concatenate(rows)}
    feeds |= {"sizes": np.array([len(picked) for picked in rows])} if num_sources > 1 else {}
    feeds |= {} if is_ordered else {"order": order}
    (gathered,) = SESSIONS[kind].run(["gathered"], feeds)
    np.testing.assert_array_equal(gathered, together if is_ordered else together[order])


@pytest.mark.parametrize("shape", SHAPES)
def test_one_graph_copies_the_same_rows_of_tensors_of_several_dtypes(shape: tuple[int, ...]) -> None:
    session = load(copy_graph([element_type(dtype) for dtype in DTYPES]))
    sources = [np.arange(3 * np.prod(shape, dtype=int)).reshape(3, *shape).astype(dtype) for dtype in DTYPES]
    feeds = {f"source_{i}": source for i, source in enumerate(sources)} | {"rows": np.array([2, 0, 2, 2])}
    for source, copy in zip(sources, session.run(None, feeds), strict=True):
        assert copy.dtype == source.dtype
        np.testing.assert_array_equal(copy, source[[2, 0, 2, 2]])

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_runtime.gather import FLOAT32, gather_graph
from onnx import helper

SESSIONS = {
    count: ort.InferenceSession(gather_graph(FLOAT32, count), providers=["CPUExecutionProvider"]) for count in (1, 3)
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 3)])
def test_one_graph_serves_rows_of_every_shape_and_one_every_dtype(dtype: str, shape: tuple[int, ...]) -> None:
    graph = gather_graph(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), 2)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    sources = [np.ones((3, *shape), dtype=dtype), np.zeros((2, *shape), dtype=dtype)]
    feeds = {"source_0": sources[0], "source_1": sources[1], "rows_0": np.array([2]), "rows_1": np.array([1])}
    (gathered,) = session.run(["gathered"], feeds | {"order": np.array([1, 0])})
    assert gathered.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(gathered, [sources[1][1], sources[0][2]])


@given(st.data(), st.sampled_from(sorted(SESSIONS)))
def test_it_takes_rows_of_each_source_and_puts_them_in_order(data: st.DataObject, num_sources: int) -> None:
    sources = [np.arange(8, dtype=np.float32).reshape(4, 2) + 100 * i for i in range(num_sources)]
    rows = [data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)) for _ in sources]
    together = np.concatenate([source[picked] for source, picked in zip(sources, rows, strict=True)])
    order = np.array(data.draw(st.permutations(range(len(together)))))
    feeds = {f"source_{i}": source for i, source in enumerate(sources)}
    feeds |= {f"rows_{i}": np.array(picked) for i, picked in enumerate(rows)}
    (gathered,) = SESSIONS[num_sources].run(["gathered"], feeds | {"order": order})
    np.testing.assert_array_equal(gathered, together[order])

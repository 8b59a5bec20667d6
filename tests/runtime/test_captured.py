"""Captured graphs through the CPU: the same fixed buffers, filled, run and emptied in the same way."""

import gc
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_runtime import StageExecutor, open_bundle, run_all_exits
from offramp_runtime.captured import MAX_SIZES, CapturedGraph
from offramp_runtime.device import OrtValueDevice
from offramp_runtime.interface import LoadedGraph
from offramp_runtime.ort_values import MAX_SOURCES
from offramp_runtime.providers import CUDA, Acceleration, cuda, on_cpu, tensorrt
from onnx import TensorProto, helper

FLOAT = TensorProto.FLOAT
WIDTH = 3
Draw = Callable[..., dict[str, np.ndarray]]


def clock(plain_s: float, captured_s: float) -> Callable[[], float]:
    """Tell times by which a graph takes so long as it comes, and so long captured."""
    now, spans = [0.0], [0.0, plain_s, captured_s]
    calls = [0]

    def read() -> float:
        now[0] += spans[calls[0] % 3]
        calls[0] += 1
        return now[0]

    return read


def device(plain_s: float = 2.0, captured_s: float = 1.0) -> OrtValueDevice:
    return OrtValueDevice(on_cpu(captures=True), 1, clock(plain_s, captured_s))


def graph() -> bytes:
    """Write `y = x + scale`, `z = 2 x`, `told = -x`: two outputs that stay, one that comes back, a constant."""
    rows = [helper.make_tensor_value_info(name, FLOAT, ["batch", WIDTH]) for name in ("x", "y", "z", "told")]
    nodes = [
        helper.make_node("Add", ["x", "scale"], ["y"]),
        helper.make_node("Add", ["x", "x"], ["z"]),
        helper.make_node("Neg", ["x"], ["told"]),
    ]
    inputs = [rows[0], helper.make_tensor_value_info("scale", FLOAT, [])]
    made = helper.make_graph(nodes, "sums", inputs, rows[1:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def prepared(on: OrtValueDevice, sizes: Sequence[int] = ()) -> LoadedGraph:
    loaded = on.prepare(
        on.load(graph(), "sums"),
        graph(),
        constants={"scale": np.array(5, dtype=np.float32)},
        outputs=["y", "z"],
        host=["told"],
    )
    for size in sizes:
        loaded.tune({"x": on.upload(rows(size))})
    return loaded


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def assert_right(on: OrtValueDevice, values: Any, x: np.ndarray) -> None:
    (y, z), (told,) = values
    np.testing.assert_array_equal(on.download(y), x + np.float32(5))
    np.testing.assert_array_equal(on.download(z), x + x)
    np.testing.assert_array_equal(told, -x)


DEVICE = device()
CAPTURED = prepared(DEVICE, (1, 4, 8))


@given(batches=st.lists(st.tuples(st.integers(1, 10), st.integers(0, 2), st.booleans()), min_size=1, max_size=8))
def test_what_a_captured_graph_gives_is_never_touched_by_what_runs_after_it(
    batches: list[tuple[int, int, bool]],
) -> None:
    given_out = []
    for seed, (count, reads, is_host) in enumerate(batches):
        x = rows(count, seed)
        fed = x.copy() if is_host else DEVICE.upload(x.copy())
        if reads and given_out:  # the outputs of an earlier batch are this one's input: nothing is written to them
            (kept, _), x = given_out[seed % len(given_out)]
            fed, x = kept[reads - 1], x + np.float32(5) if reads == 1 else x + x
        given_out.append((CAPTURED.run({"x": fed}), x))
    for values, x in given_out:
        assert_right(DEVICE, values, x)


@pytest.mark.parametrize("count", range(1, 11))
def test_a_batch_of_any_size_is_answered_row_by_row_as_the_plain_graph_answers_it(count: int) -> None:
    x = rows(count)
    assert_right(DEVICE, CAPTURED.run({"x": DEVICE.upload(x)}), x)
    assert_right(DEVICE, CAPTURED.run({"x": x}), x)


def runs_of(loaded: LoadedGraph, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the batch size of each captured run from now on."""
    assert isinstance(loaded, CapturedGraph)
    sizes: list[int] = []
    for size, buffers in loaded._buffers.items():
        session = buffers._session
        monkeypatch.setattr(buffers, "_session", _Noting(session, size, sizes))
    return sizes


class _Noting:
    def __init__(self, session: ort.InferenceSession, size: int, sizes: list[int]) -> None:
        self.session, self.size, self.sizes = session, size, sizes

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions) -> None:
        assert options.get_run_config_entry("gpu_graph_id") == str(self.size)
        self.sizes.append(self.size)
        self.session.run_with_iobinding(binding, options)


def test_a_batch_runs_at_the_least_captured_size_that_holds_it_and_beyond_the_last_as_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = runs_of(CAPTURED, monkeypatch)
    for count in (1, 2, 4, 5, 8, 9, 3):
        CAPTURED.run({"x": rows(count)})
    assert sizes == [1, 4, 4, 8, 8, 4]


def test_several_threads_never_see_each_others_rows() -> None:
    def answer(seed: int) -> None:
        x = rows(1 + seed % 10, seed)
        assert_right(DEVICE, CAPTURED.run({"x": DEVICE.upload(x)}), x)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(answer, range(400)))


def test_a_captured_graph_always_reads_and_writes_the_same_addresses() -> None:
    assert isinstance(CAPTURED, CapturedGraph)
    buffers = CAPTURED._buffers[4]
    bound = [*buffers._inputs.values(), *buffers._kept, *buffers._told]
    before = [value.data_ptr() for value in bound]
    for count in (1, 4, 3):
        CAPTURED.run({"x": DEVICE.upload(rows(count))})
    assert [value.data_ptr() for value in bound] == before
    assert [value.data_ptr() for value in buffers._binding.get_outputs()] == before[1:]


def test_a_graph_is_captured_where_that_is_faster_and_else_runs_as_it_comes() -> None:
    fast, slow = device(2.0, 1.0), device(1.0, 2.0)
    faster, slower = prepared(fast, (1, 2)), prepared(slow, (1, 2))
    assert isinstance(faster, CapturedGraph)
    assert isinstance(slower, CapturedGraph)
    assert (faster.sizes, slower.sizes) == ((1, 2), ())
    assert (fast.batch_sizes, slow.batch_sizes) == ((1, 2), None)
    assert_right(slow, slower.run({"x": rows(2)}), rows(2))


def test_the_first_size_that_does_not_pay_is_the_last_that_is_tried_and_what_it_held_is_freed() -> None:
    on = device(1.0, 2.0)
    loaded = prepared(on)
    assert isinstance(loaded, CapturedGraph)
    assert loaded._capturing is not None
    session = weakref.ref(loaded._capturing)
    loaded.tune({"x": rows(1)})
    gc.collect()
    assert session() is None
    loaded.tune({"x": rows(2)})
    assert loaded.sizes == ()


def test_a_size_that_is_captured_is_not_captured_again() -> None:
    on = device()
    loaded = prepared(on, (2,))
    assert isinstance(loaded, CapturedGraph)
    buffers = loaded._buffers[2]
    loaded.tune({"x": rows(2)})
    assert loaded._buffers[2] is buffers


def test_no_graph_is_captured_at_more_sizes_than_buffers_are_kept_for() -> None:
    on = device()
    loaded = prepared(on, range(1, MAX_SIZES + 4))
    assert isinstance(loaded, CapturedGraph)
    assert loaded.sizes == tuple(range(1, MAX_SIZES + 1))


def test_a_graph_that_cannot_be_captured_runs_as_it_comes_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on = device()
    loaded = prepared(on)
    assert isinstance(loaded, CapturedGraph)

    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(loaded._capturing, "run_with_iobinding", fail)
    loaded.tune({"x": rows(2)})
    assert loaded.sizes == ()
    assert "cannot be captured at batch size 2" in caplog.text
    assert_right(on, loaded.run({"x": rows(2)}), rows(2))


def test_a_device_that_does_not_capture_has_no_batch_sizes() -> None:
    on = OrtValueDevice(on_cpu(), 1)
    loaded = prepared(on, (1, 2))
    assert not isinstance(loaded, CapturedGraph)
    assert on.batch_sizes is None
    assert_right(on, loaded.run({"x": rows(2)}), rows(2))


def test_a_bundle_answers_alike_captured_or_not(bundle_folder: Path, draw_inputs: Draw) -> None:
    bundle = open_bundle(bundle_folder)
    plain, captured = StageExecutor(bundle, OrtValueDevice(on_cpu(), 1)), StageExecutor(bundle, device())
    for size in (2, 8):
        carries = {name: captured.device.upload(array) for name, array in draw_inputs(size).items()}
        for stage in range(len(captured.manifest.stages)):
            captured.tune(stage, carries)
            carries |= captured.run(stage, carries).carries
    assert captured.device.batch_sizes == (2, 8)
    for size in range(1, 11):
        both = [run_all_exits(one, draw_inputs(size, size)) for one in (plain, captured)]
        for (logits, decision), (other_logits, other_decision) in zip(*both, strict=True):
            np.testing.assert_allclose(other_logits, logits, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(other_decision, decision, rtol=1e-4, atol=1e-5)


def test_carries_are_freed_as_soon_as_nobody_holds_them() -> None:
    x = DEVICE.upload(rows(4))
    values = CAPTURED.run({"x": x})
    seen = [weakref.ref(one) for one in (x, *values[0])]
    gathered = DEVICE.gather([values[0][0], x], [1, 2])
    seen.append(weakref.ref(gathered))
    del x, values, gathered
    assert [one() for one in seen] == [None] * 4


def test_any_number_of_batches_is_gathered_with_few_sessions() -> None:
    on = OrtValueDevice(on_cpu(), 1)
    batches = [on.upload(rows(2, seed)) for seed in range(2 * MAX_SOURCES + 9)]
    for count in range(2, len(batches)):
        gathered = on.download(on.gather(batches[:count], [seed % 2 for seed in range(count)]))
        np.testing.assert_array_equal(gathered, [rows(2, seed)[seed % 2] for seed in range(count)])
    # A power of two each, with an order to follow or without; 32 at once are in steps.
    assert on._gather_session.cache_info().currsize <= 2 * MAX_SOURCES.bit_length()


def test_only_the_session_that_captures_is_asked_to() -> None:
    provider = cuda(1, Acceleration())
    assert provider.captures
    assert provider.all_options == [{"device_id": "1"}]
    assert provider.to_capture().all_options == [{"device_id": "1", "enable_cuda_graph": "1"}]
    assert not cuda(1, Acceleration(cuda_graphs=False)).captures


def test_tensorrt_leaves_to_cuda_what_it_does_not_take_and_keeps_its_engines(tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    provider = tensorrt(1, Acceleration(tensorrt_cache=folder, tensorrt_half=True))
    own, behind = provider.all_options
    assert provider.names[1:] == [CUDA]
    assert behind == {"device_id": "1"}
    assert (own["device_id"], own["trt_fp16_enable"]) == ("1", "1")
    assert (own["trt_engine_cache_enable"], own["trt_engine_cache_path"]) == ("1", str(folder))
    assert folder.is_dir()
    assert tensorrt(0, Acceleration()).all_options[0] == {"device_id": "0", "trt_fp16_enable": "0"}

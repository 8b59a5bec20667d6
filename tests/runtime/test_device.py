from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import DeviceUnavailable, ManifestError
from offramp_runtime import Device, open_device
from offramp_runtime.device import CpuDevice, OrtValueDevice, available_cores, gather_arrays
from offramp_runtime.gather import FLOAT32, gather_graph
from offramp_runtime.providers import Acceleration, Provider, cuda, tensorrt

DTYPES = ["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool"]


@st.composite
def sources_and_rows(draw: st.DrawFn) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Some tensors of one row shape and dtype, and rows to take of them: (tensors, which tensor, which row)."""
    shape = draw(st.sampled_from([(), (3,), (2, 1, 2), (0,)]))
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensors = []
    for i, size in enumerate(sizes):
        count = size * int(np.prod(shape))
        tensors.append((np.arange(count).reshape(size, *shape) + 10 * i).astype(dtype))
    which = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=12))
    rows = [draw(st.integers(0, sizes[i] - 1)) for i in which]
    return tensors, which, rows


def taken(tensors: list[np.ndarray], which: list[int], rows: list[int]) -> np.ndarray:
    return np.stack([tensors[i][row] for i, row in zip(which, rows, strict=True)])


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("kind", ["arrays", "ort_values"])
@given(drawn=sources_and_rows())
def test_gather_takes_any_rows_of_any_tensors_as_numpy_does(
    kind: str, devices: dict[str, Device], drawn: tuple[list[np.ndarray], list[int], list[int]]
) -> None:
    tensors, which, rows = drawn
    placed = [devices[kind].upload(tensor) for tensor in tensors]
    gathered = devices[kind].gather([placed[i] for i in which], rows)
    assert_same(devices[kind].download(gathered), taken(tensors, which, rows))


@pytest.mark.parametrize("kind", ["arrays", "ort_values"])
@given(drawn=sources_and_rows())
def test_gather_places_host_arrays_on_the_device(
    kind: str, devices: dict[str, Device], drawn: tuple[list[np.ndarray], list[int], list[int]]
) -> None:
    tensors, which, rows = drawn
    gathered = devices[kind].gather([tensors[i] for i in which], rows)
    assert isinstance(gathered, np.ndarray) == (kind == "arrays")
    assert_same(devices[kind].download(gathered), taken(tensors, which, rows))


@given(drawn=sources_and_rows())
def test_host_arrays_and_placed_tensors_gather_together(
    devices: dict[str, Device], drawn: tuple[list[np.ndarray], list[int], list[int]]
) -> None:
    tensors, which, rows = drawn
    device = devices["ort_values"]
    mixed = [device.upload(tensor) if i % 2 else tensor for i, tensor in enumerate(tensors)]
    gathered = device.gather([mixed[i] for i in which], rows)
    assert_same(device.download(gathered), taken(tensors, which, rows))


@pytest.mark.parametrize("kind", ["arrays", "ort_values"])
@given(drawn=sources_and_rows())
def test_take_copies_the_rows_it_is_asked_for(
    kind: str, devices: dict[str, Device], drawn: tuple[list[np.ndarray], list[int], list[int]]
) -> None:
    tensors, which, rows = drawn
    source, of_it = tensors[which[0]], [row % len(tensors[which[0]]) for row in rows]
    device = devices[kind]
    assert_same(device.download(device.take(device.upload(source), of_it)), source[of_it])


def test_gathering_a_whole_batch_in_order_gives_the_same_tensor_without_a_copy(device: Device) -> None:
    placed = device.upload(np.arange(12, dtype=np.float32).reshape(4, 3))
    assert device.gather([placed] * 4, [0, 1, 2, 3]) is placed
    other = device.gather([placed] * 4, [0, 1, 3, 2])
    assert other is not placed
    np.testing.assert_array_equal(device.download(other)[3], [6, 7, 8])


@pytest.mark.parametrize("rows", [[0, 0, 2], [0, 2, 1, 3], [1, 1, 3], [3, 2, 1, 0], [0, 3, 2, 3]])
def test_rows_that_only_begin_and_end_like_neighbours_are_gathered_one_by_one(device: Device, rows: list[int]) -> None:
    source = np.arange(12, dtype=np.float32).reshape(4, 3)
    for tensor in (source, device.upload(source)):
        assert_same(device.download(device.gather([tensor] * len(rows), rows)), source[rows])


def test_neighbouring_rows_of_one_array_are_viewed_not_copied() -> None:
    source = np.arange(12).reshape(4, 3)
    assert np.shares_memory(gather_arrays([source] * 2, [1, 2]), source)
    assert not np.shares_memory(gather_arrays([source] * 2, [2, 1]), source)


def test_taken_rows_let_the_rest_be_freed(devices: dict[str, Device]) -> None:
    source = np.arange(12).reshape(4, 3)
    for rows in ([1, 2], [0]):
        assert not np.shares_memory(devices["arrays"].take(source, rows), source)


def test_a_gathered_tensor_does_not_change_with_what_is_gathered_later(device: Device) -> None:
    placed = [device.upload(np.full((2, 2), k, dtype=np.float32)) for k in range(3)]
    first = device.gather([placed[0], placed[1]], [0, 0])
    device.gather([placed[2], placed[2]], [1, 0])
    device.gather([placed[2], placed[1]], [1, 0])
    np.testing.assert_array_equal(device.download(first), [[0, 0], [1, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_what_is_uploaded_comes_back_as_it_was(device: Device, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape)).astype(dtype)
    assert_same(device.download(device.upload(array)), array)


def test_arrays_that_do_not_lie_in_rows_are_placed_all_the_same(device: Device) -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert_same(device.download(device.upload(turned)), turned)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gpu",
        "CUDA:0",
        "cpu:0",
        "auto:1",
        "cuda:-1",
        "cuda:x",
        "cuda:0:1",
        "cuda:²",
        " cpu",
        "tensorrt:-1",
        "TensorRT",
    ],
)
def test_a_device_of_no_known_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(DeviceUnavailable, match="is none of auto, cpu, cuda, cuda:0"):
        open_device(name)


def has_cuda() -> bool:
    return "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1", "tensorrt", "tensorrt:0", "tensorrt:1"])
def test_a_gpu_without_the_gpu_package_is_refused_saying_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_cuda():  # on a GPU machine, look like an install for the CPU
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    kind, _, index = name.partition(":")
    with pytest.raises(
        DeviceUnavailable, match=rf"{kind}:{index or 0} needs the onnxruntime-gpu package \(extra `gpu`\)"
    ):
        open_device(name)


def test_auto_is_a_gpu_where_there_is_one_and_else_the_cpu() -> None:
    assert open_device("auto", threads=1).name in ({"cuda:0", "cpu"} if has_cuda() else {"cpu"})


def test_the_cpu_uses_every_core_it_may_unless_told_otherwise() -> None:
    assert open_device("cpu").threads == available_cores() >= 1
    assert open_device("cpu", threads=3).threads == 3


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")  # ONNX Runtime's word, before it falls back
def test_a_session_that_would_silently_run_elsewhere_is_refused() -> None:
    absent = OrtValueDevice(Provider("QNNExecutionProvider", "npu", 0, "npu:0"), 1)
    with pytest.raises(DeviceUnavailable, match=r"npu:0 was asked for, but .* fell back to CPUExecutionProvider"):
        absent.load(gather_graph(FLOAT32, 1), "probe")


def test_a_graph_that_onnx_runtime_refuses_is_refused_by_name(device: Device) -> None:
    broken = gather_graph(FLOAT32, 1).replace(b"Gather", b"Gathas")
    with pytest.raises(ManifestError, match="refuses the graph of 'stage_7'"):
        device.load(broken, "stage_7")


def test_a_device_is_named_as_the_user_writes_it() -> None:
    assert CpuDevice(1).name == "cpu"
    assert OrtValueDevice(cuda(1, Acceleration()), 1).name == "cuda:1"
    assert OrtValueDevice(tensorrt(0, Acceleration()), 1).name == "tensorrt:0"


def test_a_cache_that_is_no_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceUnavailable, match=r"tensorrt_cache: '.*file' is no folder and cannot be made one"):
        open_device("tensorrt", 1, Acceleration(tensorrt_cache=tmp_path / "file"))


def test_a_device_that_refuses_its_own_probe_is_unavailable_saying_what_to_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ManifestError("ONNX Runtime refuses the graph of 'probe' (RuntimeError)")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr("offramp_runtime.ort_values.create_session", refuse)
    with pytest.raises(DeviceUnavailable, match=r"tensorrt:1 cannot be used; .* CUDA, cuDNN and TensorRT"):
        open_device("tensorrt:1", 1)


@pytest.mark.parametrize("feeds", [{}, {"x": np.zeros((1, 2), dtype=np.float32)}])
def test_the_cpus_short_way_to_a_session_still_refuses_feeds_that_do_not_fit(feeds: dict[str, np.ndarray]) -> None:
    graph = gather_graph(FLOAT32, 1, is_ordered=True)
    device = CpuDevice(1)
    loaded = device.prepare(device.load(graph, "gather"), graph, constants={}, outputs=["gathered"], host=[])
    with pytest.raises(Exception, match=r"[Ii]nput"):
        loaded.run(feeds)

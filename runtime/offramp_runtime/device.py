"""Where stages run, and the tensors that stay there between them.

A `DeviceTensor` is opaque to everyone else: a numpy array on the CPU, an `OrtValue` in device memory on CUDA. A device
can place an array, gather rows of several tensors into one (the survivors of different batches), bring a tensor back,
and run a session on them. It knows nothing of stages or bundles.

A numpy array is the CPU's handle because an `OrtValue` costs 1.3 to 1.8 times as much there at batch 1.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from offramp_contract.errors import DeviceUnavailable, ManifestError

from offramp_runtime.gather import FLOAT32, gather_graph
from offramp_runtime.sessions import create_session
from offramp_runtime.weights import Weights

DeviceTensor: TypeAlias = Any


class Device(ABC):
    """One place that runs sessions.

    Attributes:
        name: As the user writes it: `cpu`, `cuda:0`.
        threads: Size of the CPU thread pool behind each dispatch.
    """

    name: str
    threads: int

    @abstractmethod
    def load(self, graph: bytes, name: str, shared: Weights | None = None) -> ort.InferenceSession:
        """Create a session on this device.

        Args:
            graph: A serialised ONNX model that holds all its data.
            name: For messages.
            shared: Initializers whose data in the graph is the same as these arrays'; a device that can, uses these.

        Raises:
            ManifestError: If ONNX Runtime refuses the graph.
            DeviceUnavailable: If the session would silently run elsewhere.
        """

    @abstractmethod
    def upload(self, array: np.ndarray) -> DeviceTensor:
        """Place an array on the device, its shape kept (a scalar stays one)."""

    @abstractmethod
    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """Bring a tensor back."""

    @abstractmethod
    def gather(self, tensors: Sequence[DeviceTensor], rows: Sequence[int]) -> DeviceTensor:
        """Put row `rows[i]` of `tensors[i]` together, in order, without leaving the device.

        The result may share memory with its source; tensors are never written to.
        """

    @abstractmethod
    def take(self, tensor: DeviceTensor, rows: Sequence[int]) -> DeviceTensor:
        """Copy some rows of one tensor, so that the rest can be freed."""

    @abstractmethod
    def run(
        self,
        session: ort.InferenceSession,
        feeds: Mapping[str, DeviceTensor],
        outputs: Sequence[str],
        host: Sequence[str],
    ) -> tuple[list[DeviceTensor], list[np.ndarray]]:
        """Run a session.

        Args:
            session: One that this device loaded.
            feeds: A tensor of this device, or a host array, per graph input.
            outputs: Names of the graph outputs that stay on the device.
            host: Names of the graph outputs that come back.
        """


class CpuDevice(Device):
    """The CPU: tensors are numpy arrays and nothing is ever copied that can be viewed."""

    def __init__(self, threads: int) -> None:
        self.name = "cpu"
        self.threads = threads

    def load(self, graph: bytes, name: str, shared: Weights | None = None) -> ort.InferenceSession:
        """Create a session that reads shared weights where they lie; see `Device.load`."""
        return create_session(graph, name, ["CPUExecutionProvider"], self.threads, shared=shared)

    def upload(self, array: np.ndarray) -> DeviceTensor:
        """Give the array itself, made contiguous."""
        return np.asarray(array, order="C")

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """Give the array itself."""
        array: np.ndarray = tensor
        return array

    def gather(self, tensors: Sequence[DeviceTensor], rows: Sequence[int]) -> DeviceTensor:
        """Put rows together; see `gather_arrays`."""
        return gather_arrays(tensors, rows)

    def take(self, tensor: DeviceTensor, rows: Sequence[int]) -> DeviceTensor:
        """Copy some rows."""
        return tensor[list(rows)]

    def run(
        self,
        session: ort.InferenceSession,
        feeds: Mapping[str, DeviceTensor],
        outputs: Sequence[str],
        host: Sequence[str],
    ) -> tuple[list[DeviceTensor], list[np.ndarray]]:
        """Run a session; see `Device.run`."""
        values = session.run([*outputs, *host], feeds)
        return values[: len(outputs)], values[len(outputs) :]


class OrtValueDevice(Device):
    """An accelerator reached through IO binding: outputs stay in its memory, survivors are gathered there.

    The device type is a parameter because the same path runs, and is tested, on `cpu`.
    """

    def __init__(self, kind: str, index: int, provider: str, threads: int) -> None:
        self.name = f"{kind}:{index}"
        self.threads = threads
        self._kind, self._index, self._provider = kind, index, provider
        self._gather_sessions: dict[tuple[int, int], ort.InferenceSession] = {}

    def load(self, graph: bytes, name: str, shared: Weights | None = None) -> ort.InferenceSession:
        """Create a session and read its providers back; see `Device.load`. Each has its own copy of the weights."""
        del shared
        return self._load(graph, name, self.threads)

    def _load(self, graph: bytes, name: str, threads: int) -> ort.InferenceSession:
        options = [{"device_id": str(self._index)}] if self._kind == "cuda" else [{}]
        session = create_session(graph, name, [self._provider], threads, options)
        if session.get_providers()[0] != self._provider:
            raise DeviceUnavailable(
                f"device: {self.name} was asked for, but ONNX Runtime fell back to {session.get_providers()[0]}; "
                "check the GPU driver, CUDA and cuDNN, or serve with --device cpu"
            )
        return session

    def upload(self, array: np.ndarray) -> DeviceTensor:
        """Copy an array to the device."""
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), self._kind, self._index)

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """Copy a tensor to the host."""
        array: np.ndarray = tensor.numpy()
        return array

    def gather(self, tensors: Sequence[DeviceTensor], rows: Sequence[int]) -> DeviceTensor:
        """Put rows together with one small graph on the device; host arrays (a model's inputs) are placed there."""
        if all(isinstance(tensor, np.ndarray) for tensor in tensors):
            return self.upload(gather_arrays(tensors, rows))
        sources: list[DeviceTensor] = []
        rows_of: list[list[int]] = []
        slot_of: dict[int, int] = {}
        places: list[tuple[int, int]] = []
        for tensor, row in zip(tensors, rows, strict=True):
            slot = slot_of.setdefault(id(tensor), len(sources))
            if slot == len(sources):
                sources.append(self.upload(tensor) if isinstance(tensor, np.ndarray) else tensor)
                rows_of.append([])
            places.append((slot, len(rows_of[slot])))
            rows_of[slot].append(row)
        if len(sources) == 1 and rows_of[0] == list(range(sources[0].shape()[0])):
            return sources[0]
        starts = np.cumsum([0, *(len(picked) for picked in rows_of)])
        feeds: dict[str, DeviceTensor] = {f"source_{i}": source for i, source in enumerate(sources)}
        feeds |= {f"rows_{i}": np.array(picked, dtype=np.int64) for i, picked in enumerate(rows_of)}
        feeds["order"] = np.array([starts[slot] + place for slot, place in places], dtype=np.int64)
        session = self._gather_session(sources[0].element_type(), len(sources))
        return self.run(session, feeds, ["gathered"], [])[0][0]

    def take(self, tensor: DeviceTensor, rows: Sequence[int]) -> DeviceTensor:
        """Copy some rows on the device."""
        return self.gather([tensor] * len(rows), rows)

    def run(
        self,
        session: ort.InferenceSession,
        feeds: Mapping[str, DeviceTensor],
        outputs: Sequence[str],
        host: Sequence[str],
    ) -> tuple[list[DeviceTensor], list[np.ndarray]]:
        """Run a session through IO binding; see `Device.run`."""
        binding = session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self._kind, self._index)
        for name in host:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return list(values[: len(outputs)]), [value.numpy() for value in values[len(outputs) :]]

    def _gather_session(self, element_type: int, num_sources: int) -> ort.InferenceSession:
        key = (element_type, num_sources)
        if key not in self._gather_sessions:
            # One thread: the rows are copied by the device, and there is a session per number of sources.
            self._gather_sessions[key] = self._load(gather_graph(element_type, num_sources), "gather", threads=1)
        return self._gather_sessions[key]


def gather_arrays(arrays: Sequence[np.ndarray], rows: Sequence[int]) -> np.ndarray:
    """Put row `rows[i]` of `arrays[i]` together: a view where they lie together, one copy where they do not."""
    first, start, count = arrays[0], rows[0], len(rows)
    if all(array is first for array in arrays):
        if all(row == start + i for i, row in enumerate(rows)):
            return first if count == len(first) else first[start : start + count]
        return first[list(rows)]
    gathered = np.empty((count, *first.shape[1:]), dtype=first.dtype)
    for i, (array, row) in enumerate(zip(arrays, rows, strict=True)):
        gathered[i] = array[row]
    return gathered


def open_device(name: str = "auto", threads: int | None = None) -> Device:
    """Open the device that a user named.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, or `auto`: the first CUDA device if ONNX Runtime can really use it, else the CPU.
        threads: CPU threads behind a dispatch; None is every core this process may use.

    Raises:
        DeviceUnavailable: If CUDA was asked for by name and cannot be used, or the name is unknown.
    """
    num_threads = threads or available_cores()
    if name == "cpu":
        return CpuDevice(num_threads)
    if name == "auto":
        try:
            return _open_cuda(0, num_threads)
        except DeviceUnavailable:
            return CpuDevice(num_threads)
    kind, _, index = name.partition(":")
    if kind != "cuda" or not re.fullmatch(r"[0-9]{0,4}", index):
        raise DeviceUnavailable(f"device: {name!r} is none of auto, cpu, cuda, cuda:0, cuda:1, …")
    return _open_cuda(int(index or "0"), num_threads)


def _open_cuda(index: int, threads: int) -> OrtValueDevice:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise DeviceUnavailable(
            f"device: cuda:{index} needs the onnxruntime-gpu package (extra `gpu`); this install runs on the CPU only"
        )
    device = OrtValueDevice("cuda", index, "CUDAExecutionProvider", threads)
    # A session asked for CUDA falls back to the CPU without raising: load a real one and read it back.
    try:
        device.load(gather_graph(FLOAT32, 1), "probe")
    except ManifestError as error:  # the probe's graph is sound: it is the device that ONNX Runtime refuses
        raise DeviceUnavailable(
            f"device: cuda:{index} cannot be used; check that this GPU exists, and its driver, CUDA and cuDNN"
        ) from error
    return device


def available_cores() -> int:
    """Count the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Where stages run, and the tensors that stay there between them.

A `DeviceTensor` is opaque to everyone else: a numpy array on the CPU, an `OrtValue` in device memory on CUDA. A device
can place an array, gather rows of several tensors into one (the survivors of different batches), bring a tensor back,
and run a session on them. It knows nothing of stages or bundles.

A numpy array is the CPU's handle because an `OrtValue` costs 1.3 to 1.8 times as much there at batch 1.
"""

import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from offramp_contract.errors import DeviceUnavailable, ManifestError

from offramp_runtime.gather import FLOAT32, gather_arrays, gather_graph
from offramp_runtime.interface import Device, DeviceTensor, LoadedGraph, Values
from offramp_runtime.ort_values import OrtValueDevice
from offramp_runtime.providers import CPU, Acceleration, Provider, cuda, tensorrt
from offramp_runtime.sessions import create_session
from offramp_runtime.weights import Weights

__all__ = ["CpuDevice", "Device", "DeviceTensor", "OrtValueDevice", "available_cores", "gather_arrays", "open_device"]


class CpuDevice(Device):
    """The CPU: tensors are numpy arrays and nothing is ever copied that can be viewed."""

    def __init__(self, threads: int) -> None:
        self.name = "cpu"
        self.threads = threads

    def part(self, threads: int) -> "CpuDevice":
        """Give some of the cores; arrays are the same everywhere."""
        return CpuDevice(threads)

    def load(self, graph: bytes, name: str, shared: Weights | None = None) -> ort.InferenceSession:
        """Create a session that reads shared weights where they lie; see `Device.load`."""
        return create_session(graph, name, [CPU], self.threads, shared=shared)

    def prepare(
        self,
        session: ort.InferenceSession,
        graph: bytes,
        *,
        constants: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        host: Sequence[str],
    ) -> LoadedGraph:
        """Settle what is the same at every run; see `Device.prepare`."""
        del graph
        return _CpuGraph(session, constants, outputs, host)

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
    ) -> Values:
        """Run a session; see `Device.run`."""
        values = session.run([*outputs, *host], feeds)
        return values[: len(outputs)], values[len(outputs) :]


class _CpuGraph(LoadedGraph):
    """A graph on the CPU, several threads at a time."""

    __slots__ = ("_constants", "_names", "_num_kept", "_options", "_run", "_session")

    def __init__(
        self,
        session: ort.InferenceSession,
        constants: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        host: Sequence[str],
    ) -> None:
        self._session = session
        # The compiled session itself: the Python class around it looks at every feed again, and a dispatch of a small
        # stage takes a third longer for it. A lacking feed still raises.
        self._run = session._sess.run
        self._options = ort.RunOptions()
        self._names = [*outputs, *host]
        self._num_kept = len(outputs)
        self._constants = dict(constants)

    def run(self, feeds: Mapping[str, DeviceTensor]) -> Values:
        """Run it; see `LoadedGraph.run`."""
        values = self._run(self._names, {**feeds, **self._constants}, self._options)
        return values[: self._num_kept], values[self._num_kept :]

    def tune(self, feeds: Mapping[str, DeviceTensor]) -> None:
        """Change nothing; see `LoadedGraph.tune`."""


def open_device(name: str = "auto", threads: int | None = None, acceleration: Acceleration | None = None) -> Device:
    """Open the device that a user named.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, `tensorrt`, `tensorrt:N`, or `auto`: the first CUDA device if ONNX Runtime can
            really use it, else the CPU.
        threads: CPU threads behind a dispatch; None is every core this process may use.
        acceleration: How a GPU is used; the defaults if None.

    Raises:
        DeviceUnavailable: If a GPU was asked for by name and cannot be used, or the name is unknown.
    """
    num_threads, wanted = threads or available_cores(), acceleration or Acceleration()
    if name == "cpu":
        return CpuDevice(num_threads)
    if name == "auto":
        try:
            return _open_gpu(cuda(0, wanted), num_threads)
        except DeviceUnavailable:
            return CpuDevice(num_threads)
    kind, _, index = name.partition(":")
    providers = {"cuda": cuda, "tensorrt": tensorrt}
    if kind not in providers or not re.fullmatch(r"[0-9]{0,4}", index):
        raise DeviceUnavailable(
            f"device: {name!r} is none of auto, cpu, cuda, cuda:0, cuda:1, …, tensorrt, tensorrt:0, …"
        )
    return _open_gpu(providers[kind](int(index or "0"), wanted), num_threads)


def _open_gpu(provider: Provider, threads: int) -> OrtValueDevice:
    if provider.name not in ort.get_available_providers():
        raise DeviceUnavailable(
            f"device: {provider.device} needs the onnxruntime-gpu package (extra `gpu`); this install has no "
            f"{provider.name}"
        )
    device = OrtValueDevice(provider, threads)
    # A session that asks for a GPU falls back to the CPU without raising: load a real one and read it back.
    try:
        device.load(gather_graph(FLOAT32, 1), "probe")
    except ManifestError as error:  # the probe's graph is sound: it is the device that ONNX Runtime refuses
        raise DeviceUnavailable(
            f"device: {provider.device} cannot be used; check that this GPU exists, and its driver, {provider.needs}"
        ) from error
    return device


def available_cores() -> int:
    """Count the cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

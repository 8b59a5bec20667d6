"""Captured CUDA graphs: a stage's kernels are launched all at once, where launching them one by one takes longer.

A captured graph reads and writes the addresses that it was captured with. So there is a set of fixed buffers per batch
size: rows are copied into them, padded to that size by the last row, and out of them; nobody else ever sees a buffer.
Copying costs two more launches, which pays for a stage of many nodes and few rows and else does not: the warm-up
measures both ways and keeps the faster.

On the CPU the same buffers are used in the same way, and nothing is captured.
"""

import logging
from collections.abc import Callable, Mapping
from statistics import median
from threading import Lock
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import onnxruntime as ort

from offramp_runtime.gather import gather_arrays
from offramp_runtime.interface import DeviceTensor, LoadedGraph, Values

if TYPE_CHECKING:
    from offramp_runtime.ort_values import BoundGraph, OrtValueDevice

logger = logging.getLogger(__name__)

Clock: TypeAlias = Callable[[], float]

MAX_SIZES: Final = 16
"""Most batch sizes at which one graph is captured: each holds buffers of its own."""

_TRIALS: Final = 5


class CapturedGraph(LoadedGraph):
    """A graph that is captured at some batch sizes and run as it comes at all others.

    Args:
        device: Where it runs.
        plain: The graph, run as it comes.
        capturing: A session of the same graph that captures what it runs, and runs nothing else.
        known_sizes: The device's collection of captured sizes, extended here.
        clock: Gives seconds.
    """

    def __init__(
        self,
        device: "OrtValueDevice",
        plain: "BoundGraph",
        capturing: ort.InferenceSession,
        known_sizes: set[int],
        clock: Clock,
    ) -> None:
        self._device = device
        self._plain = plain
        self._capturing: ort.InferenceSession | None = capturing
        self._known_sizes = known_sizes
        self._clock = clock
        self._lock = Lock()
        self._buffers: dict[int, _Buffers] = {}
        self._sizes: list[int] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes at which it is captured, ascending."""
        return tuple(self._sizes)

    def run(self, feeds: Mapping[str, DeviceTensor]) -> Values:
        """Run it at the least captured size that holds the rows, or as it comes; see `LoadedGraph.run`."""
        num_rows = _num_rows(feeds)
        for size in self._sizes:
            if size >= num_rows:
                with self._lock:  # the buffers are one batch's until its outputs are copied
                    return self._buffers[size].run(feeds, num_rows)
        return self._plain.run(feeds)

    def tune(self, feeds: Mapping[str, DeviceTensor]) -> None:
        """Capture it at these feeds' number of rows if that is faster; see `LoadedGraph.tune`.

        The more rows there are, the less launching matters: the first size that does not pay is the last one tried.
        """
        size = _num_rows(feeds)
        if self._capturing is None or size in self._buffers:
            return
        captured = self._capture(self._capturing, feeds, size) if len(self._sizes) < MAX_SIZES else None
        if captured is not None and self._is_faster(captured, feeds, size):
            self._buffers[size] = captured
            self._sizes = sorted(self._buffers)
            self._known_sizes.add(size)
        else:
            self._capturing = None  # with what it holds in device memory, unless a smaller size needs it

    def _capture(
        self, capturing: ort.InferenceSession, feeds: Mapping[str, DeviceTensor], size: int
    ) -> "_Buffers | None":
        try:
            captured = _Buffers(self._device, self._plain, capturing, feeds)
            captured.run(feeds, size)
        except Exception:  # ONNX Runtime's errors have no public base
            logger.warning("a stage cannot be captured at batch size %d and runs as it comes", size, exc_info=True)
            return None
        return captured

    def _is_faster(self, captured: "_Buffers", feeds: Mapping[str, DeviceTensor], size: int) -> bool:
        self._plain.run(feeds)
        plain_s, captured_s = [], []
        for _ in range(_TRIALS):
            started = self._clock()
            self._plain.run(feeds)
            between = self._clock()
            captured.run(feeds, size)
            plain_s.append(between - started)
            captured_s.append(self._clock() - between)
        return median(captured_s) < median(plain_s)


class _Buffers:
    """One captured graph: fixed inputs and outputs of one batch size."""

    def __init__(
        self,
        device: "OrtValueDevice",
        plain: "BoundGraph",
        session: ort.InferenceSession,
        feeds: Mapping[str, DeviceTensor],
    ) -> None:
        self._device = device
        self._session = session
        self._size = _num_rows(feeds)
        placed = {name: device.upload(tensor) if _is_host(tensor) else tensor for name, tensor in feeds.items()}
        self._inputs = {name: device.allocate(tensor) for name, tensor in placed.items()}
        # Those that come back, too: a copy to the host is no part of a captured graph.
        names = [*plain.outputs, *plain.host]
        outputs = [
            device.allocate(made) for made in device.run(plain.session, {**placed, **plain.constants}, names, [])[0]
        ]
        self._kept, self._told = outputs[: len(plain.outputs)], outputs[len(plain.outputs) :]
        self._binding = session.io_binding()
        for name, buffer in {**self._inputs, **plain.constants}.items():
            self._binding.bind_ortvalue_input(name, buffer)
        for name, buffer in zip(names, outputs, strict=True):
            self._binding.bind_ortvalue_output(name, buffer)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(self._size))

    def run(self, feeds: Mapping[str, DeviceTensor], num_rows: int) -> Values:
        """Copy a batch of at most the captured size in, run, and copy what it gives out."""
        self._fill(feeds, num_rows)
        self._session.run_with_iobinding(self._binding, self._options)
        told = [buffer.numpy()[:num_rows].copy() for buffer in self._told]
        return self._device.copy(self._kept, np.arange(num_rows)), told

    def _fill(self, feeds: Mapping[str, DeviceTensor], num_rows: int) -> None:
        rows = np.minimum(np.arange(self._size), num_rows - 1)
        resident = {}
        for name, buffer in self._inputs.items():
            tensor = feeds[name]
            if _is_host(tensor):
                padded = tensor if num_rows == self._size else gather_arrays([tensor] * self._size, rows.tolist())
                buffer.update_inplace(np.asarray(padded, order="C"))
            else:
                resident[name] = tensor
        self._device.copy(list(resident.values()), rows, [self._inputs[name] for name in resident])


def _is_host(tensor: DeviceTensor) -> bool:
    return isinstance(tensor, np.ndarray)


def _num_rows(feeds: Mapping[str, DeviceTensor]) -> int:
    tensor = next(iter(feeds.values()))
    return int(tensor.shape[0] if _is_host(tensor) else tensor.shape()[0])

"""An accelerator reached through IO binding: outputs stay in its memory, survivors are gathered there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from typing import Final

import numpy as np
import onnxruntime as ort
from offramp_contract.errors import DeviceUnavailable, ManifestError

from offramp_runtime.captured import CapturedGraph, Clock
from offramp_runtime.gather import copy_graph, gather_arrays, gather_graph
from offramp_runtime.interface import Device, DeviceTensor, LoadedGraph, Values
from offramp_runtime.providers import Provider
from offramp_runtime.sessions import create_session
from offramp_runtime.weights import Weights

MAX_SOURCES: Final = 32
"""Most tensors that one graph gathers from; more are gathered in steps. Their number is rounded up to a power of two,
so that a few sessions serve every number."""

_HOST: Final = ort.OrtDevice.make("cpu", 0)._get_c_device()

MAX_SMALL_SESSIONS: Final = 64
"""Most sessions of each kind that gather and copy, one per element type and number of tensors."""


class OrtValueDevice(Device):
    """An accelerator reached through IO binding.

    What it is, is a parameter, because the same path runs, and is tested, on `cpu`.

    Args:
        provider: The execution provider and the device it runs on.
        threads: CPU threads behind a dispatch.
        clock: Gives seconds; by it the warm-up decides what pays.
    """

    def __init__(self, provider: Provider, threads: int, clock: Clock = perf_counter) -> None:
        self.name = provider.device
        self.threads = threads
        self._provider, self._kind, self._index = provider, provider.kind, provider.index
        self._place = ort.OrtDevice.make(self._kind, self._index)._get_c_device()
        self._clock = clock
        self._captured_sizes: set[int] = set()
        # One thread each: the rows are copied by the device.
        self._gather_session = lru_cache(MAX_SMALL_SESSIONS)(self._load_gather)
        self._copy_session = lru_cache(MAX_SMALL_SESSIONS)(self._load_copy)

    @property
    def batch_sizes(self) -> tuple[int, ...] | None:
        """The numbers of rows at which a graph is captured; see `Device.batch_sizes`."""
        return tuple(sorted(self._captured_sizes)) or None

    def load(self, graph: bytes, name: str, shared: Weights | None = None) -> ort.InferenceSession:
        """Create a session and read its providers back; see `Device.load`. Each has its own copy of the weights."""
        del shared
        return self._load(graph, name, self.threads, self._provider)

    def _load(self, graph: bytes, name: str, threads: int, provider: Provider) -> ort.InferenceSession:
        session = create_session(graph, name, provider.names, threads, provider.all_options)
        if session.get_providers()[0] != provider.name:
            raise DeviceUnavailable(
                f"device: {self.name} was asked for, but ONNX Runtime fell back to {session.get_providers()[0]}; "
                f"check the GPU driver, {provider.needs}, or serve with --device cpu"
            )
        return session

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
        placed = {name: self.upload(array) for name, array in constants.items()}
        bound = BoundGraph(self, session, placed, outputs, host)
        capturing = self._load_capturing(graph) if self._provider.captures else None
        if capturing is None:
            return bound
        return CapturedGraph(self, bound, capturing, self._captured_sizes, self._clock)

    def _load_capturing(self, graph: bytes) -> ort.InferenceSession | None:
        """Load a graph once more, to be captured; None where ONNX Runtime cannot, because a node is not the device's.

        A session of its own: what a captured graph writes in between lies in the session's arena, where another run's
        outputs, which are kept, could lie too.
        """
        try:
            return self._load(graph, "captured stage", self.threads, self._provider.to_capture())
        except ManifestError:
            return None

    def upload(self, array: np.ndarray) -> DeviceTensor:
        """Copy an array to the device."""
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), self._kind, self._index)

    def download(self, tensor: DeviceTensor) -> np.ndarray:
        """Copy a tensor to the host."""
        array: np.ndarray = tensor.numpy()
        return array

    def allocate(self, like: DeviceTensor) -> DeviceTensor:
        """Make room for a tensor of another's shape and element type."""
        return ort.OrtValue.ortvalue_from_shape_and_type(like.shape(), like.element_type(), self._kind, self._index)

    def gather(self, tensors: Sequence[DeviceTensor], rows: Sequence[int]) -> DeviceTensor:
        """Put rows together with one small graph on the device; host arrays (a model's inputs) are placed there."""
        if all(isinstance(tensor, np.ndarray) for tensor in tensors):
            return self.upload(gather_arrays(tensors, rows))
        origin = _Origin.of(tensors, rows)
        if len(origin.sources) > MAX_SOURCES:
            starts = range(0, len(rows), MAX_SOURCES)
            parts = [self.gather(tensors[i : i + MAX_SOURCES], rows[i : i + MAX_SOURCES]) for i in starts]
            places = [divmod(place, MAX_SOURCES) for place in range(len(rows))]
            return self.gather([parts[part] for part, _ in places], [place for _, place in places])
        sources = [self.upload(one) if isinstance(one, np.ndarray) else one for one in origin.sources]
        if len(sources) == 1 and origin.rows_of[0] == list(range(sources[0].shape()[0])):
            return sources[0]
        return self._gather_sources(sources, origin)

    def _gather_sources(self, sources: Sequence[DeviceTensor], origin: "_Origin") -> DeviceTensor:
        lacking = (1 << (len(sources) - 1).bit_length()) - len(sources)
        sources, rows_of = [*sources, *[sources[0]] * lacking], [*origin.rows_of, *[[0]] * lacking]
        order = origin.order
        is_ordered = not lacking and order == list(range(len(order)))
        feeds: dict[str, DeviceTensor] = {f"source_{i}": source for i, source in enumerate(sources)}
        feeds["rows"] = np.array([row for rows in rows_of for row in rows], dtype=np.int64)
        if len(sources) > 1:
            feeds["sizes"] = np.array([len(rows) for rows in rows_of], dtype=np.int64)
        if not is_ordered:
            feeds["order"] = np.array(order, dtype=np.int64)
        session = self._gather_session(sources[0].element_type(), len(sources), is_ordered)
        return self.run(session, feeds, ["gathered"], [])[0][0]

    def take(self, tensor: DeviceTensor, rows: Sequence[int]) -> DeviceTensor:
        """Copy some rows on the device."""
        if isinstance(tensor, np.ndarray):
            return self.upload(tensor[list(rows)])
        return self._gather_sources([tensor], _Origin([tensor], [list(rows)], list(range(len(rows)))))

    def copy(
        self, tensors: Sequence[DeviceTensor], rows: np.ndarray, into: Sequence[DeviceTensor] | None = None
    ) -> list[DeviceTensor]:
        """Copy the same rows of several tensors with one graph.

        Args:
            tensors: Tensors of this device.
            rows: Which rows, int64.
            into: Where the copies go; new tensors if None.
        """
        if not tensors:
            return []
        session = self._copy_session(tuple(tensor.element_type() for tensor in tensors))
        names = [f"copy_{i}" for i in range(len(tensors))]
        feeds = {"rows": rows, **{f"source_{i}": tensor for i, tensor in enumerate(tensors)}}
        if into is None:
            return self.run(session, feeds, names, [])[0]
        binding = session.io_binding()
        binding.bind_cpu_input("rows", rows)
        for i, (tensor, room) in enumerate(zip(tensors, into, strict=True)):
            binding.bind_ortvalue_input(f"source_{i}", tensor)
            binding.bind_ortvalue_output(names[i], room)
        session.run_with_iobinding(binding)
        return list(into)

    def run(
        self,
        session: ort.InferenceSession,
        feeds: Mapping[str, DeviceTensor],
        outputs: Sequence[str],
        host: Sequence[str],
    ) -> Values:
        """Run a session through IO binding; see `Device.run`."""
        # A new binding each time: one that is used again would keep the last run's carries, and write into its outputs.
        # And the compiled one: the Python class around it notes every name once more, which takes as long as binding.
        binding = session.io_binding()._iobinding
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value._ortvalue)
        for name in outputs:
            binding.bind_output(name, self._place)
        for name in host:
            binding.bind_output(name, _HOST)
        session._sess.run_with_iobinding(binding, None)
        values = binding.get_outputs()
        told = range(len(outputs), len(outputs) + len(host))
        return [ort.OrtValue(values[i]) for i in range(len(outputs))], [values[i].numpy() for i in told]

    def _load_gather(self, element_type: int, num_sources: int, is_ordered: bool) -> ort.InferenceSession:
        graph = gather_graph(element_type, num_sources, is_ordered=is_ordered)
        return self._load(graph, "gather", 1, self._provider)

    def _load_copy(self, element_types: tuple[int, ...]) -> ort.InferenceSession:
        return self._load(copy_graph(element_types), "copy", 1, self._provider)


@dataclass(frozen=True, slots=True)
class BoundGraph(LoadedGraph):
    """A graph on an accelerator, run as it comes.

    Attributes:
        device: Where.
        session: What runs it.
        constants: Inputs that never change, on the device.
        outputs: Names of the outputs that stay there.
        host: Names of those that come back.
    """

    device: OrtValueDevice
    session: ort.InferenceSession
    constants: Mapping[str, DeviceTensor]
    outputs: Sequence[str]
    host: Sequence[str]

    def run(self, feeds: Mapping[str, DeviceTensor]) -> Values:
        """Run it; see `LoadedGraph.run`."""
        return self.device.run(self.session, {**feeds, **self.constants}, self.outputs, self.host)

    def tune(self, feeds: Mapping[str, DeviceTensor]) -> None:
        """Change nothing; see `LoadedGraph.tune`."""


@dataclass(frozen=True, slots=True)
class _Origin:
    """Which rows are taken of which tensor, and where each then lies.

    Attributes:
        sources: The different tensors.
        rows_of: The rows taken of each.
        order: The wanted rows among all that are taken, one source's behind the other's.
    """

    sources: list[DeviceTensor]
    rows_of: list[list[int]]
    order: list[int]

    @classmethod
    def of(cls, tensors: Sequence[DeviceTensor], rows: Sequence[int]) -> "_Origin":
        sources: list[DeviceTensor] = []
        rows_of: list[list[int]] = []
        slot_of: dict[int, int] = {}
        places: list[tuple[int, int]] = []
        for tensor, row in zip(tensors, rows, strict=True):
            slot = slot_of.setdefault(id(tensor), len(sources))
            if slot == len(sources):
                sources.append(tensor)
                rows_of.append([])
            places.append((slot, len(rows_of[slot])))
            rows_of[slot].append(row)
        starts = [0]
        for taken in rows_of:
            starts.append(starts[-1] + len(taken))
        return cls(sources, rows_of, [starts[slot] + place for slot, place in places])

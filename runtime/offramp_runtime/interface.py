"""What a device is to those who run stages on one: a place for tensors, and for the graphs that read them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from offramp_runtime.weights import Weights

DeviceTensor: TypeAlias = Any

Values: TypeAlias = tuple[list[DeviceTensor], list[np.ndarray]]
"""What a run gives: the outputs that stay on the device, and those that come back."""


class LoadedGraph(ABC):
    """A graph with all that is the same at every run settled once: its constants, and the outputs that are wanted."""

    @abstractmethod
    def run(self, feeds: Mapping[str, DeviceTensor]) -> Values:
        """Run it.

        Args:
            feeds: A tensor of the device, or a host array, per graph input that is no constant; all with the same
                number of rows. The outputs have that number of rows too and share memory with nothing else.
        """

    @abstractmethod
    def tune(self, feeds: Mapping[str, DeviceTensor]) -> None:
        """Find out by measuring how these feeds' number of rows runs fastest; `run` goes that way from then on.

        For the warm-up, before anybody else runs it: one number of rows after the other, the smallest first. Changes
        nothing where there is one way only.
        """


class Device(ABC):
    """One place that runs sessions, for several threads at a time.

    Attributes:
        name: As the user writes it: `cpu`, `cuda:0`.
        threads: Size of the CPU thread pool behind each dispatch.
    """

    name: str
    threads: int

    @property
    def batch_sizes(self) -> tuple[int, ...] | None:
        """The numbers of rows at which a graph is captured, ascending; None where any number runs as it is.

        A smaller batch takes as long as the next of these, to which the device pads it.
        """
        return None

    def part(self, threads: int) -> "Device | None":
        """Give the same device with so many threads behind a dispatch, for several that run side by side.

        None where dispatches share the device out among them by themselves.
        """
        del threads
        return None

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
    def prepare(
        self,
        session: ort.InferenceSession,
        graph: bytes,
        *,
        constants: Mapping[str, np.ndarray],
        outputs: Sequence[str],
        host: Sequence[str],
    ) -> LoadedGraph:
        """Settle what is the same at every run of a graph.

        Args:
            session: What `load` made of the graph.
            graph: The same bytes, of which a device may make further sessions.
            constants: Inputs that never change, by name.
            outputs: Names of the graph outputs that stay on the device.
            host: Names of the graph outputs that come back.
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
    ) -> Values:
        """Run a session once, without preparing it.

        Args:
            session: One that this device loaded.
            feeds: A tensor of this device, or a host array, per graph input.
            outputs: Names of the graph outputs that stay on the device.
            host: Names of the graph outputs that come back.
        """

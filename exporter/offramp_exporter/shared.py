"""Weights that several stages read: one head or cell for all exits is stored once, beside the stage graphs."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from offramp_contract.manifest import File, SharedWeights
from offramp_contract.parts import SharedTensor
from onnx import ModelProto, TensorProto, numpy_helper

from offramp_exporter.program import Program
from offramp_exporter.split import StagePlan
from offramp_exporter.values import DTYPE_NAMES

WEIGHTS_FILE: Final = "stages/weights.bin"
"""Beside the graphs, whose references are then those of plain ONNX and lead any other tool there, too."""

_MIN_BYTES: Final = 4096
"""A smaller weight costs less in every graph than its reference does in effort."""

_ALIGNMENT: Final = 64
"""Offsets are multiples of it, a cache line."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which weights are stored once.

    Attributes:
        content: The bytes of the weights' file; empty if nothing is shared.
        tensors: Where in it each weight lies, by name.
        names: The one name of each weight that has the same content as another, by its own name.
    """

    content: bytes = b""
    tensors: Mapping[str, SharedTensor] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def described(self) -> SharedWeights | None:
        """Give the manifest's description, or None if nothing is shared."""
        if not self.tensors:
            return None
        file = File(path=WEIGHTS_FILE, sha256=hashlib.sha256(self.content).hexdigest())
        return SharedWeights(file=file, tensors=tuple(self.tensors.values()))

    def refer(self, graph: ModelProto) -> None:
        """Put references in the place of the shared weights of a stage graph."""
        read = {tensor.name: tensor for tensor in graph.graph.initializer}
        for node in graph.graph.node:
            node.input[:] = [self.names.get(name, name) for name in node.input]
        del graph.graph.initializer[:]
        graph.graph.initializer.extend(tensor for name, tensor in read.items() if name not in self.names)
        shared = {self.names[name]: tensor.data_type for name, tensor in read.items() if name in self.names}
        graph.graph.initializer.extend(_reference(self.tensors[name], kind) for name, kind in shared.items())


def share(program: Program, plans: Iterable[StagePlan]) -> Sharing:
    """Find the weights that two or more stages read, equal ones taken for one."""
    readers = [_weights_read(program, plan) for plan in plans]
    large = [name for name in dict.fromkeys(name for read in readers for name in read) if _is_large(program, name)]
    names = _one_name_each(program.initializers, large)
    counts = Counter(one for read in readers for one in {names[name] for name in read if name in names})
    shared = [name for name in dict.fromkeys(names.values()) if counts[name] > 1]
    content, tensors = bytearray(), {}
    for name in shared:
        array = numpy_helper.to_array(program.initializers[name])
        content.extend(bytes(-len(content) % _ALIGNMENT))
        tensors[name] = SharedTensor(
            name=name,
            dtype=DTYPE_NAMES[program.initializers[name].data_type],
            shape=array.shape,
            offset=len(content),
        )
        content.extend(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return Sharing(bytes(content), tensors, {name: one for name, one in names.items() if one in tensors})


def _weights_read(program: Program, plan: StagePlan) -> list[str]:
    read = dict.fromkeys(name for i in sorted((*plan.nodes, *plan.support)) for name in program.nodes[i].input)
    return [name for name in read if name in program.initializers]


def _is_large(program: Program, name: str) -> bool:
    tensor = program.initializers[name]
    return tensor.data_type in DTYPE_NAMES and numpy_helper.to_array(tensor).nbytes >= _MIN_BYTES


def _one_name_each(initializers: Mapping[str, TensorProto], names: Sequence[str]) -> dict[str, str]:
    """Give the weights that hold the same numbers one name: exporters transpose a tied weight once per use."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    one_name = {}
    for name in names:
        tensor = initializers[name]
        digest = hashlib.sha256(numpy_helper.to_array(tensor).tobytes()).digest()
        one_name[name] = first.setdefault((tensor.data_type, tuple(tensor.dims), digest), name)
    return one_name


def _reference(shared: SharedTensor, data_type: int) -> TensorProto:
    tensor = TensorProto(name=shared.name, data_type=data_type, dims=shared.shape)
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": WEIGHTS_FILE.rpartition("/")[2], "offset": shared.offset, "length": shared.num_bytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor

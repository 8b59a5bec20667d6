"""A request's inputs in shared memory: one tensor after another in the manifest's order.

Shapes: R = rows. Both sides know a model's tensors, so a message names a place and a number of rows and nothing more.
"""

import mmap
from collections.abc import Sequence

import numpy as np
from offramp_contract.errors import MalformedRequest
from offramp_contract.manifest import Tensor

from offramp_server.http_workers.arena import ALIGNMENT, aligned
from offramp_server.messages import Inputs


class InputLayout:
    """Where a model's inputs lie.

    Args:
        tensors: The model's inputs, in the manifest's order.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [(tensor.name, tuple(tensor.shape), np.dtype(tensor.dtype)) for tensor in tensors]
        self._row_bytes = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for _, shape, dtype in self._tensors]

    def num_bytes(self, num_rows: int) -> int:
        """Give the bytes that so many rows take."""
        return sum(aligned(row_bytes * num_rows) for row_bytes in self._row_bytes)

    def write(self, inputs: Inputs, memory: mmap.mmap, start: int) -> int:
        """Copy inputs into the memory; gives the number of rows."""
        num_rows = len(next(iter(inputs.values())))
        for name, view in self._views(memory, start, num_rows).items():
            np.copyto(view, inputs[name], casting="no")
        return num_rows

    def read(self, memory: mmap.mmap, start: int, num_rows: int) -> Inputs:
        """Give the inputs as read-only views of the memory, which stays mapped as long as one of them is held.

        Raises:
            MalformedRequest: If they would not lie inside the memory.
        """
        if num_rows < 1 or start < 0 or start % ALIGNMENT or start + self.num_bytes(num_rows) > len(memory):
            raise MalformedRequest(f"inputs: {num_rows} rows do not lie at byte {start} of the shared memory")
        views = self._views(memory, start, num_rows)
        for view in views.values():
            view.flags.writeable = False
        return views

    def _views(self, memory: mmap.mmap, start: int, num_rows: int) -> Inputs:
        views = {}
        for (name, shape, dtype), row_bytes in zip(self._tensors, self._row_bytes, strict=True):
            count = row_bytes * num_rows // dtype.itemsize
            views[name] = np.frombuffer(memory, dtype, count, start).reshape(num_rows, *shape)
            start += aligned(row_bytes * num_rows)
        return views

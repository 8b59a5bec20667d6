"""What a row brings to its next stage, without a copy of its own: a place in a batch that it shares with others."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from offramp_runtime import DeviceTensor

from offramp_server.gating import Hop


class Batch:
    """Tensors of rows that ran a stage together, or came together, under the names by which they are read.

    Args:
        tensors: The tensors, on the device.
        num_rows: How many rows each of them has.

    Attributes:
        tensors: The same.
        num_rows: The same.
        places: Every place in it, in order.
    """

    __slots__ = ("num_rows", "places", "tensors")

    def __init__(self, tensors: Mapping[str, DeviceTensor], num_rows: int) -> None:
        self.tensors = tensors
        self.num_rows = num_rows
        self.places = list(range(num_rows))


EMPTY: Final = Batch({}, 0)


class Carries(Mapping[str, tuple[DeviceTensor, int]]):
    """By name, the tensor that a value of one row lies in, and its row there.

    Nearly all of it lies in one batch, so that rows which stay together are moved on by one assignment each.

    Attributes:
        batch: Where the row ran last.
        place: Its row there.
        earlier: What lies in other batches: a later stage reads it, but the row's last stage did not.
    """

    __slots__ = ("batch", "earlier", "place")

    def __init__(self, batch: Batch, place: int) -> None:
        self.batch = batch
        self.place = place
        self.earlier: dict[str, tuple[DeviceTensor, int]] | None = None

    def __getitem__(self, name: str) -> tuple[DeviceTensor, int]:
        tensor = self.batch.tensors.get(name)
        if tensor is not None:
            return tensor, self.place
        if self.earlier is None:
            raise KeyError(name)
        return self.earlier[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.batch.tensors, **(self.earlier or {})})

    def __len__(self) -> int:
        return len(self.batch.tensors) + len(self.earlier or {})

    def move(self, hop: Hop, batch: Batch, place: int) -> None:
        """Go on with a batch that the row has run in, and with what it needs of earlier ones."""
        self.earlier = self._pick(hop.passed) if hop.passed else None
        self.batch, self.place = batch, place

    def skip(self, hop: Hop) -> None:
        """Go past stages, without one that ran: what was skipped is read from what stands for it."""
        self.earlier = self._pick(hop.reads)
        self.batch = EMPTY

    def drop(self) -> None:
        """Hold nothing any more."""
        self.batch, self.earlier = EMPTY, None

    def _pick(self, reads: Sequence[tuple[str, str]]) -> dict[str, tuple[DeviceTensor, int]]:
        held = ((name, self.get(source)) for name, source in reads)
        return {name: carry for name, carry in held if carry is not None}

"""Which bytes of a shared memory are whose: lent for one request each, and waited for when there are none.

Only the worker's process lends, and on its event loop only, so there is no lock that a dying process could hold. The
engine's process reads what it is told to and gives it back by answering.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from offramp_contract.errors import TooLarge

ALIGNMENT: Final = 64
"""Tensors begin at multiples of this: a cache line, and enough for every vector instruction."""


class Span(NamedTuple):
    """Bytes from `start` to before `end`."""

    start: int
    end: int


def aligned(num_bytes: int) -> int:
    """Round up to where the next tensor may begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Spans:
    """The free bytes of a memory: takes the lowest that suffice, so that what is used stays warm.

    Args:
        num_bytes: Size of the memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._free = [Span(0, num_bytes)] if num_bytes else []

    @property
    def free(self) -> tuple[Span, ...]:
        """The free spans, in order, no two of them adjacent."""
        return tuple(self._free)

    def take(self, num_bytes: int) -> Span | None:
        """Take so many bytes, rounded up to `ALIGNMENT`; None if no free span is long enough."""
        size = aligned(max(num_bytes, 1))
        for index, free in enumerate(self._free):
            if free.end - free.start >= size:
                taken = Span(free.start, free.start + size)
                self._free[index : index + 1] = [Span(taken.end, free.end)] if taken.end < free.end else []
                return taken
        return None

    def give_back(self, span: Span) -> None:
        """Free what was taken, joined to its free neighbours.

        Raises:
            RuntimeError: If some of it is free already, which is a bug.
        """
        index = bisect_left(self._free, span)
        before = self._free[index - 1] if index else None
        behind = self._free[index] if index < len(self._free) else None
        if (before is not None and before.end > span.start) or (behind is not None and behind.start < span.end):
            raise RuntimeError(f"bytes {span.start} to {span.end} are given back twice: this is a bug")
        if before is not None and before.end == span.start:
            self._free.remove(before)
            span = Span(before.start, span.end)
        if behind is not None and behind.start == span.end:
            self._free.remove(behind)
            span = Span(span.start, behind.end)
        insort(self._free, span)


@dataclass(slots=True, eq=False)
class Borrower:
    """Someone who waits for memory, or has stopped waiting.

    Attributes:
        num_bytes: What it asks for.
        take: Gets the span.
    """

    num_bytes: int
    take: Callable[[Span], None]


class Arena:
    """Lends spans of one memory, first come, first served.

    Args:
        num_bytes: Size of the memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._spans = Spans(num_bytes)
        self._waiting: dict[Borrower, None] = {}

    @property
    def free(self) -> tuple[Span, ...]:
        """The bytes that nobody has."""
        return self._spans.free

    def lend(self, num_bytes: int, take: Callable[[Span], None]) -> Borrower | None:
        """Lend so many bytes: at once, or when they are free and it is their turn. Each span is given back once.

        Args:
            num_bytes: How many.
            take: Gets the span; called before this returns, or from `give_back` or `withdraw`.

        Returns:
            Who waits, for `withdraw`; None if the span was lent at once.

        Raises:
            TooLarge: If the memory is smaller than that.
        """
        if aligned(num_bytes) > self._num_bytes:
            raise TooLarge(
                f"inputs: they take {num_bytes} bytes, over the operator's limit of {self._num_bytes} "
                "(http_worker_memory_bytes)",
                "inputs",
            )
        span = None if self._waiting else self._spans.take(num_bytes)
        if span is None:
            borrower = Borrower(num_bytes, take)
            self._waiting[borrower] = None
            return borrower
        take(span)
        return None

    def withdraw(self, borrower: Borrower) -> None:
        """Wait no longer; it may have been in the way of others that need less."""
        if borrower in self._waiting:
            del self._waiting[borrower]
            self._serve()

    def give_back(self, span: Span) -> None:
        """Take a lent span back and lend what is free now to those who wait."""
        self._spans.give_back(span)
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            borrower = next(iter(self._waiting))
            span = self._spans.take(borrower.num_bytes)
            if span is None:
                return
            del self._waiting[borrower]
            borrower.take(span)

"""Which batch sizes a network takes, found by trying."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from offramp_contract.errors import TraceError
from offramp_contract.statistics import FloatArray

from offramp_exporter.examples import Examples
from offramp_exporter.refusal import explain

Reference: TypeAlias = Callable[[Examples], Sequence[FloatArray]]
"""The network itself: inputs -> the scores of every exit, (B, C) each."""

_PROVED: Final = (1, 3, 8)
_TRIED: Final = (1, 2, 3, 8)


@dataclass(frozen=True, slots=True)
class BatchRange:
    """The batch sizes that a network takes; `largest` is None where no limit was met."""

    smallest: int = 1
    largest: int | None = None

    @property
    def proved(self) -> list[int]:
        """The sizes at which parity is proved."""
        largest = self.largest or max(_PROVED)
        return sorted({min(max(self.smallest, batch), largest) for batch in _PROVED})


def find_batch_range(reference: Reference, examples: Examples) -> BatchRange:
    """Try the network itself at several batch sizes.

    Raises:
        TraceError: If it takes none, or fails at one between two that it takes.
    """
    failures = {batch: failure for batch in _TRIED if (failure := _failure(reference, examples, batch)) is not None}
    working = [batch for batch in _TRIED if batch not in failures]
    for batch, failure in failures.items():
        if not working or working[0] < batch < working[-1]:
            raise TraceError(f"the network fails at batch {batch}{failure}")
    return BatchRange(working[0], None if max(_TRIED) in working else working[-1])


def _failure(reference: Reference, examples: Examples, batch: int) -> str | None:
    try:
        scores = reference(examples.with_rows(batch))
    except Exception as error:  # the network's own code raises what it likes
        return explain(error)
    shapes = [scores_BC.shape for scores_BC in scores]
    if any(len(shape) != 2 or shape[0] != batch for shape in shapes):
        return f": its exits then have the shapes {', '.join(map(str, shapes))}"
    return None

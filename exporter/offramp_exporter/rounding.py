"""What rounding may do to an answer, in the precision that a bundle computes in: the tolerances of every proof."""

from dataclasses import dataclass
from typing import Final

from offramp_contract.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Rounding:
    """How exact a precision is, over all the layers of a network.

    Attributes:
        tolerance: How far scores may lie from the network's, absolute and relative to them.
        near: How far a score may lie from a threshold for rounding to decide, absolute or as a share of it.
        nudges: By which shares an input is changed to see whether rounding decides what is answered.
    """

    tolerance: float
    near: float
    nudges: tuple[float, ...]


SINGLE: Final = Rounding(tolerance=1e-4, near=1e-5, nudges=(1e-6, 3e-6, 1e-5))
HALF: Final = Rounding(tolerance=2e-2, near=5e-3, nudges=(1e-3, 3e-3, 1e-2))


def rounding_of(manifest: Manifest) -> Rounding:
    """Give what rounding may do in a bundle."""
    return HALF if manifest.precision == "fp16" else SINGLE

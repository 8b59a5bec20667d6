"""What a trace comes to at given temperatures: the statistics that policies decide on.

Shapes: N = samples, E = exits, C = classes, D = width of a packed decision, M = some of the samples.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from offramp_contract.statistics import BoolArray, Decision, FloatArray, IntArray, decision_of_logits

from offramp_calibration.trace import Trace

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What every exit decided about every sample.

    Attributes:
        label_N: The right class of each sample.
        decision_E: The statistics of each exit, packed float32 (N, D).
        class_NE: The class that each exit predicts, int32.
        depth_E: Share of the full path's FLOPs run at each exit, float64, rising to 1.
    """

    label_N: IntArray
    decision_E: tuple[Decision, ...]
    class_NE: IntArray
    depth_E: FloatArray

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def num_exits(self) -> int:
        """Number of exits."""
        return len(self.decision_E)

    @property
    def right_NE(self) -> BoolArray:
        """Whether each exit's prediction is right."""
        return np.asarray(self.class_NE == self.label_N[:, None])

    @property
    def agrees_NE(self) -> BoolArray:
        """Whether each exit's prediction is the final exit's."""
        return np.asarray(self.class_NE == self.class_NE[:, -1:])

    @classmethod
    def of(cls, trace: Trace, temperatures: Sequence[float] | None = None) -> Self:
        """Compute the statistics of a trace.

        Args:
            trace: The recorded logits.
            temperatures: One a exit; None: all 1.
        """
        temperatures = temperatures or [1.0] * len(trace.logits_ENC)
        packed_END = [
            np.concatenate(
                [
                    decision_of_logits(logits_NC[start : start + _ROWS_AT_ONCE], temperature)
                    for start in range(0, len(trace), _ROWS_AT_ONCE)
                ]
            )
            for logits_NC, temperature in zip(trace.logits_ENC, temperatures, strict=True)
        ]
        decision_E = tuple(Decision(packed_ND) for packed_ND in packed_END)
        class_NE = np.stack([decision.class_B for decision in decision_E], axis=1)
        return cls(np.asarray(trace.label_N), decision_E, class_NE, np.array(trace.about.depth_E))

    def take(self, rows_M: npt.NDArray[np.integer] | slice) -> Self:
        """Give some of the samples."""
        decision_E = tuple(Decision(decision.packed_BD[rows_M]) for decision in self.decision_E)
        return type(self)(self.label_N[rows_M], decision_E, self.class_NE[rows_M], self.depth_E)

    def without_exits(self, dropped: Collection[int]) -> Self:
        """Give what the exits that stay decided; their depths are those in the whole network still.

        Args:
            dropped: Which exits go, 0-based; the final exit cannot.
        """
        kept = [index for index in range(self.num_exits) if index not in dropped]
        decision_E = tuple(self.decision_E[index] for index in kept)
        return type(self)(self.label_N, decision_E, self.class_NE[:, kept], self.depth_E[kept])

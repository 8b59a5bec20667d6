"""What a trace comes to at given temperatures: the statistics that policies decide on.

Shapes: N = samples, E = exits, C = classes, D = width of a packed decision, M = some of the samples.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
from offramp_contract.native import NativeRules
from offramp_contract.statistics import BoolArray, Decision, FloatArray, IntArray, decision_of_logits

from offramp_calibration.about import ALL_OPEN, GateThreshold
from offramp_calibration.trace import Trace

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What every exit decided about every sample.

    Attributes:
        label_N: The right class of each sample.
        decision_E: The statistics of each exit, packed float32 (N, D).
        class_NE: The class that each exit predicts, int32.
        depth_E: Share of the full path's FLOPs run at each exit, float64, rising to 1; of a gated network where every
            gate is open.
        native: The network's own exit rules, if it has any and the trace holds what they compare.
        depth_NE: Of a gated network, what each sample had really run at each exit; None where that is `depth_E`.
        full_class_N: What full depth predicts, where that is not the final exit here because gates are shut.
    """

    label_N: IntArray
    decision_E: tuple[Decision, ...]
    class_NE: IntArray
    depth_E: FloatArray
    native: NativeRules | None = None
    depth_NE: FloatArray | None = None
    full_class_N: IntArray | None = None

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
    def full_N(self) -> IntArray:
        """The class that full depth predicts: the final exit, with every gate open."""
        return self.class_NE[:, -1] if self.full_class_N is None else self.full_class_N

    @property
    def agrees_NE(self) -> BoolArray:
        """Whether each exit's prediction is full depth's."""
        return np.asarray(self.class_NE == self.full_N[:, None])

    @property
    def sample_depth_NE(self) -> FloatArray:
        """Share of the full path's FLOPs that each sample has run at each exit."""
        if self.depth_NE is not None:
            return self.depth_NE
        return np.broadcast_to(self.depth_E, (len(self), self.num_exits))

    @property
    def mean_depth_E(self) -> FloatArray:
        """The same, averaged over the samples."""
        return self.depth_E if self.depth_NE is None else np.asarray(self.depth_NE.mean(axis=0))

    @classmethod
    def of(cls, trace: Trace, temperatures: Sequence[float] | None = None) -> Self:
        """Compute the statistics of a trace.

        Args:
            trace: The recorded logits; of a gated network those of full depth.
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
        for index, native_N in enumerate(trace.native_KN):  # no temperature changes it
            packed_END[index] = np.concatenate([packed_END[index], native_N[:, None]], axis=1)
        decision_E = tuple(Decision(packed_ND) for packed_ND in packed_END)
        class_NE = np.stack([decision.class_B for decision in decision_E], axis=1)
        native = NativeRules(trace.about.native_K) if trace.native_KN else None
        return cls(np.asarray(trace.label_N), decision_E, class_NE, np.array(trace.about.depth_E), native)

    @classmethod
    def by_threshold(cls, trace: Trace, temperatures: Sequence[float] | None = None) -> dict[GateThreshold, Self]:
        """Compute the statistics of every pass of a trace.

        Args:
            trace: The recorded logits.
            temperatures: One a exit; None: all 1.

        Returns:
            By what opened the gates, full depth first; of a network without gates the one pass, under None.
        """
        full = cls.of(trace, temperatures)
        if not trace.passes:
            return {None: full}
        return {
            one.threshold: replace(
                full if one.threshold == ALL_OPEN else cls.of(trace.at(one.threshold), temperatures),
                depth_NE=np.asarray(one.depth_NE, dtype=np.float64),
                full_class_N=full.class_NE[:, -1],
            )
            for one in trace.passes
        }

    def take(self, rows_M: npt.NDArray[np.integer] | slice) -> Self:
        """Give some of the samples."""
        decision_E = tuple(Decision(decision.packed_BD[rows_M]) for decision in self.decision_E)
        return replace(
            self,
            label_N=self.label_N[rows_M],
            decision_E=decision_E,
            class_NE=self.class_NE[rows_M],
            depth_NE=None if self.depth_NE is None else self.depth_NE[rows_M],
            full_class_N=None if self.full_class_N is None else self.full_class_N[rows_M],
        )

    def without_exits(self, dropped: Collection[int]) -> Self:
        """Give what the exits that stay decided; their depths are those in the whole network still.

        Args:
            dropped: Which exits go, 0-based; the final exit cannot.
        """
        kept = [index for index in range(self.num_exits) if index not in dropped]
        decision_E = tuple(self.decision_E[index] for index in kept)
        native = None if self.native is None else self.native.without_exits(dropped)
        return replace(
            self,
            decision_E=decision_E,
            class_NE=self.class_NE[:, kept],
            depth_E=self.depth_E[kept],
            native=native,
            depth_NE=None if self.depth_NE is None else self.depth_NE[:, kept],
        )

"""Gates while a network is served: what a request asks of them, and which stage a row runs next.

A setting is one threshold per gate; open and shut are thresholds that every score and no score reaches. The rules are
here once: the engine, the exporter's proof and the recording of traces follow them.

Shapes: G = gates, B = rows, S = stages, K = gates that one stage scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeAlias

import numpy as np

from offramp_contract.errors import InvalidValue
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import BoolArray, FloatArray

GateChoice: TypeAlias = Literal["own", "open", "shut"] | int

OPEN: Final = -np.inf
"""A threshold that every score reaches."""
SHUT: Final = np.inf
"""A threshold that no score reaches."""


def gate_thresholds(
    manifest: Manifest, gates: GateChoice = "own", threshold: float | Sequence[float] | None = None
) -> FloatArray:
    """Turn what a request says about gates into a threshold per gate.

    Args:
        manifest: Of the network.
        gates: `own` leaves the decision to the scores, `open` and `shut` force all; a count keeps that many gates open,
            those of highest priority (of equal ones the earlier), where depth is the caller's choice.
        threshold: The cut-off of the scores in [0, 1] (survey eq. 8), for all gates or one per gate; None takes the
            network's own.

    Returns:
        float64, shape (G,).

    Raises:
        InvalidValue: Naming `gates` or `gate_threshold` and what is allowed.
    """
    num_gates = len(manifest.gates)
    if not num_gates:
        field = "gates" if threshold is None else "gate_threshold"
        raise InvalidValue(f"{field}: this model has no gates", field)
    if threshold is not None and gates != "own":
        raise InvalidValue(
            f"gates: {gates!r} leaves nothing for gate_threshold to decide; give one of the two", "gates"
        )
    if isinstance(gates, int):
        return _most_important(manifest, gates)
    if gates != "own":
        return np.full(num_gates, OPEN if gates == "open" else SHUT)
    if threshold is None:
        return np.array([gate.threshold for gate in manifest.gates])
    given = np.atleast_1d(np.asarray(threshold, dtype=np.float64))
    if given.shape not in ((1,), (num_gates,)) or not ((given >= 0) & (given <= 1)).all():
        raise InvalidValue(
            f"gate_threshold: one number from 0 to 1, or {num_gates} of them, one per gate", "gate_threshold"
        )
    return np.broadcast_to(given, (num_gates,)).copy()


def _most_important(manifest: Manifest, count: int) -> FloatArray:
    priorities = [gate.priority for gate in manifest.gates]
    known = [priority for priority in priorities if priority is not None]
    if len(known) < len(priorities):
        raise InvalidValue(
            "gates: a count is for networks whose depth is the caller's choice; this one decides by itself, so write "
            "own, open or shut, or gate_threshold",
            "gates",
        )
    if not 0 <= count <= len(known):
        raise InvalidValue(f"gates: a count must be 0 to {len(known)}, the gates of this model", "gates")
    thresholds = np.full(len(known), SHUT)
    thresholds[sorted(range(len(known)), key=lambda gate: -known[gate])[:count]] = OPEN
    return thresholds


@dataclass(frozen=True)
class StagePath:
    """Which stages a row runs, given which of its gates are open.

    Attributes:
        manifest: Of the network.
    """

    manifest: Manifest

    @cached_property
    def gates_S(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the gates that must all be open."""
        return tuple(stage.gates for stage in self.manifest.stages)

    @cached_property
    def scored_S(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the gates that it scores, in the order of its scores' columns."""
        return self.manifest.scored_gates

    def open_at_start(self, threshold_G: FloatArray) -> tuple[bool, ...]:
        """Tell which gates are open before any stage has run: those whose priority reaches the threshold."""
        return tuple(
            gate.priority is not None and gate.priority >= threshold
            for gate, threshold in zip(self.manifest.gates, threshold_G, strict=True)
        )

    def following(self, stage: int, is_open_G: Sequence[bool]) -> int:
        """Find the stage that a row runs next.

        Args:
            stage: The one it has run; -1 before the first.
            is_open_G: Whether each gate is open; those not scored yet are not.

        Returns:
            The next stage, or the number of stages if there is none.
        """
        for following, gates in self._ahead_S[stage + 1]:
            for gate in gates:
                if not is_open_G[gate]:
                    break
            else:
                return following
        return len(self.gates_S)

    @cached_property
    def _ahead_S(self) -> list[tuple[tuple[int, tuple[int, ...]], ...]]:
        """For each stage, itself and those behind it up to the first that no row does without, with their gates."""
        ahead_S: list[tuple[tuple[int, tuple[int, ...]], ...]] = [()]
        for stage in reversed(range(len(self.gates_S))):
            gates = self.gates_S[stage]
            ahead_S.append(((stage, gates), *(ahead_S[-1] if gates else ())))
        return ahead_S[::-1]


def opened(scores_BK: FloatArray, threshold_BK: FloatArray) -> BoolArray:
    """Tell which gates are open: eq. 8, `score >= threshold`. A score that is not a number opens none."""
    return np.asarray(scores_BK >= threshold_BK)


def is_open(score: float, threshold: float) -> bool:
    """Tell whether one gate is open; see `opened`."""
    return score >= threshold

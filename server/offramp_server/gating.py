"""Which of a row's gates are open, and so which stage it runs next. Sees no queue, no tensor's data and no clock.

A gate is decided over where a row comes to a stage behind it: the row goes in (open) or past (shut). A deadline that
runs short shuts it although its score would open it: that is *forced*, and never mixed with shut.

Shapes: B = rows, G = gates, K = gates that one stage scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Final

import numpy as np
from offramp_contract.gates import StagePath, is_open
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray

from offramp_server.messages import GateDecision, GateSeen

START: Final = -1
"""Stands for the stage before the first."""


class RowGates:
    """What has become of one row's gates.

    Attributes:
        threshold_G: What their scores are compared with.
        score_G: Their scores; None for those that were not scored.
        is_open_G: Whether a row may go into the stages behind them.
        decision_G: What was decided over them; None for those that the row has not come to.
        is_hurried: Whether its deadline has shut one that was open; every later one is shut likewise.
    """

    __slots__ = ("decision_G", "is_hurried", "is_open_G", "score_G", "threshold_G")

    def __init__(
        self, threshold_G: Sequence[float], score_G: Sequence[float | None], is_open_G: Sequence[bool]
    ) -> None:
        self.threshold_G = threshold_G
        self.score_G = list(score_G)
        self.is_open_G = list(is_open_G)
        self.decision_G: list[GateDecision | None] = [None] * len(is_open_G)
        self.is_hurried = False

    def copy(self) -> "RowGates":
        """Give the gates of another row that stands where this one does, at the start."""
        return RowGates(self.threshold_G, self.score_G, self.is_open_G) if self.is_open_G else self

    def force(self, gates: Sequence[int]) -> None:
        """Shut gates that are open, because of the deadline."""
        self.is_hurried = True
        for gate in gates:
            if self.is_open_G[gate]:
                self.is_open_G[gate] = False
                self.decision_G[gate] = "forced"

    @property
    def seen(self) -> tuple[GateSeen, ...]:
        """What there is to say about each gate."""
        columns = zip(self.score_G, self.threshold_G, self.decision_G, strict=True)
        return tuple(GateSeen(*column) for column in columns)


@dataclass(frozen=True, slots=True)
class Hop:
    """The way from a stage to the one that a row runs next.

    Attributes:
        stage: Where it begins; `START` before the first.
        following: Where it ends.
        reads: What that stage and those behind it may read, as it is or for an output that is skipped: each name with
            the name under which its value is there.
        fresh: Those of them that the stage before has read or written.
        passed: The others, which lie where they lay.
        skipped: The gated stages in between.
        gates_past: The gates that these stages are behind.
        gates_into: The gates that the next stage is behind.
    """

    stage: int
    following: int
    reads: tuple[tuple[str, str], ...]
    fresh: tuple[tuple[str, str], ...]
    passed: tuple[tuple[str, str], ...]
    skipped: range
    gates_past: tuple[int, ...]
    gates_into: tuple[int, ...]


class Gating:
    """The stages of one network and the gates before them; a network without gates runs one after the other.

    Attributes:
        is_gated_S: Whether each stage is gated.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._path = StagePath(manifest)
        self._live_S = _live_before(manifest)
        self._hops: dict[tuple[int, int], Hop] = {}
        self._own_start = self._start([gate.threshold for gate in manifest.gates])
        self.is_gated_S = [bool(gates) for gates in self._path.gates_S]

    def start(self, threshold_G: Sequence[float] | None) -> RowGates:
        """Give the gates of a row that has run nothing yet; no thresholds stand for the network's own."""
        return self._own_start if threshold_G is None else self._start(threshold_G)

    def _start(self, threshold_G: Sequence[float]) -> RowGates:
        priority_G = [gate.priority for gate in self._manifest.gates]
        return RowGates(threshold_G, priority_G, self._path.open_at_start(np.asarray(threshold_G)))

    def take_scores(self, stage: int, rows: Sequence[RowGates], scores_BK: FloatArray) -> list[int | None]:
        """Let rows know what a stage has scored for them.

        Returns:
            For each row the first gate whose score is not a finite number; None where all are.
        """
        scored_K, blinded = self._path.scored_S[stage], []
        for row, score_K in zip(rows, scores_BK.tolist(), strict=True):
            first = None
            for gate, score in zip(scored_K, score_K, strict=True):
                row.score_G[gate], row.is_open_G[gate] = score, is_open(score, row.threshold_G[gate])
                if first is None and not isfinite(score):
                    first = gate
            blinded.append(first)
        return blinded

    def following(self, stage: int, row: RowGates) -> int:
        """Give the stage that a row runs after one; after `START`, the first."""
        return self._path.following(stage, row.is_open_G)

    def hurry(self, stage: int, row: RowGates) -> int:
        """Shut the open gates of the stages that a row would run next, up to trunk; gives that trunk stage."""
        while self.is_gated_S[following := self.following(stage, row)]:
            row.force(self._path.gates_S[following])
        return following

    def decide(self, hop: Hop, row: RowGates) -> None:
        """Write down what a hop decides over a row's gates."""
        decision_G = row.decision_G
        for gate in hop.gates_past:
            if decision_G[gate] is None and not row.is_open_G[gate]:
                decision_G[gate] = "shut"
        for gate in hop.gates_into:
            if decision_G[gate] is None:
                decision_G[gate] = "open"

    def hop(self, stage: int, following: int) -> Hop:
        """Look up the way from a stage to a later one between which every stage is skipped."""
        hop = self._hops.get((stage, following))
        if hop is None:
            hop = self._hops[stage, following] = self._make_hop(stage, following)
        return hop

    def _make_hop(self, stage: int, following: int) -> Hop:
        skipped = range(stage + 1, following)
        sources: dict[str, str] = {}
        for index in skipped:
            for merge in self._manifest.stages[index].merges:
                sources[merge.run] = sources.get(merge.skip, merge.skip)
        reads = tuple((name, sources.get(name, name)) for name in sorted(self._live_S[following]))
        at_hand = self._at_hand(stage)
        return Hop(
            stage=stage,
            following=following,
            reads=reads,
            fresh=tuple(pair for pair in reads if pair[1] in at_hand),
            passed=tuple(pair for pair in reads if pair[1] not in at_hand),
            skipped=skipped,
            gates_past=tuple(dict.fromkeys(gate for index in skipped for gate in self._path.gates_S[index])),
            gates_into=self._path.gates_S[following],
        )

    def _at_hand(self, stage: int) -> set[str]:
        """Name what a stage has read and written; before the first, what came with the request."""
        if stage == START:
            return {tensor.name for tensor in self._manifest.inputs}
        return {*self._manifest.stages[stage].inputs, *self._manifest.stages[stage].outputs}


def _live_before(manifest: Manifest) -> list[frozenset[str]]:
    """For each stage, the names whose values it or a later one may still need: to read, or for a skipped output."""
    live_S, live = [], frozenset[str]()
    for stage in reversed(manifest.stages):
        standing_in = {merge.skip for merge in stage.merges if merge.run in live}
        live = (live - set(stage.outputs)) | set(stage.inputs) | standing_in
        live_S.append(live)
    return live_S[::-1]

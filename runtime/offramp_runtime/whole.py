"""One batch through all its stages, for those who want every exit: proof, recording, measuring.

The engine does the same stage by stage, with the rows of many requests and without those that have left.

Shapes: B = rows, C = classes, D = width of a packed decision, G = gates, S = stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from offramp_contract.gates import StagePath, gate_thresholds, opened
from offramp_contract.manifest import Merge
from offramp_contract.statistics import BoolArray, FloatArray

from offramp_runtime.execute import StageExecutor, StageOutput
from offramp_runtime.interface import DeviceTensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch.

    Attributes:
        exits: Per exit its logits (B, C) and packed decision (B, D), on the host.
        scores_BG: What each gate scored, float32; NaN where its stage did not run.
        is_open_BG: Which gates were open.
        ran_BS: Which stages each row ran.
    """

    exits: list[tuple[FloatArray, FloatArray]]
    scores_BG: FloatArray
    is_open_BG: BoolArray
    ran_BS: BoolArray


def run_all_exits(executor: StageExecutor, inputs: Mapping[str, np.ndarray]) -> list[tuple[FloatArray, FloatArray]]:
    """Run a batch to the final exit; its gates, if there are any, decide by themselves.

    Args:
        executor: The loaded bundle.
        inputs: One array per model input, batch first.

    Returns:
        Per exit its logits (B, C) and packed decision (B, D), on the host.
    """
    return run_gated(executor, inputs).exits


def run_gated(
    executor: StageExecutor, inputs: Mapping[str, np.ndarray], threshold_BG: FloatArray | None = None
) -> Outcome:
    """Run a batch to the final exit, each row through those gated stages only whose gates are open for it.

    Args:
        executor: The loaded bundle.
        inputs: One array per model input, batch first.
        threshold_BG: A threshold per row and gate, or one row of them for all; None takes the network's own. See
            `offramp_contract.gates.gate_thresholds`.
    """
    manifest = executor.manifest
    num_rows = len(next(iter(inputs.values())))
    if threshold_BG is None:
        threshold_BG = gate_thresholds(manifest) if manifest.gates else np.zeros(0)
    batch = _Batch(executor, inputs, np.broadcast_to(threshold_BG, (num_rows, len(manifest.gates))))
    exits = []
    for stage in range(len(manifest.stages)):
        output = batch.run(stage)
        if output is not None and output.decision_BD is not None:
            exits.append((executor.device.download(output.logits), output.decision_BD))
    return Outcome(exits, batch.scores_BG, batch.is_open_BG, batch.ran_BS)


class _Batch:
    """The rows on their way: every carry holds all of them, those of a row that did not run stand for nothing."""

    def __init__(self, executor: StageExecutor, inputs: Mapping[str, np.ndarray], threshold_BG: FloatArray) -> None:
        self._executor = executor
        self._device = executor.device
        self._path = StagePath(executor.manifest)
        self._threshold_BG = threshold_BG
        self._carries: dict[str, DeviceTensor] = {name: self._device.upload(array) for name, array in inputs.items()}
        num_rows = len(threshold_BG)
        self.scores_BG = np.full(threshold_BG.shape, np.nan, dtype=np.float32)
        self.is_open_BG = np.array([self._path.open_at_start(row_G) for row_G in threshold_BG], dtype=bool)
        self.is_open_BG = self.is_open_BG.reshape(threshold_BG.shape)
        self.ran_BS = np.zeros((num_rows, len(executor.manifest.stages)), dtype=bool)

    def run(self, stage: int) -> StageOutput | None:
        """Run a stage on the rows whose gates are open; None if there are none."""
        runs_B = self.is_open_BG[:, list(self._path.gates_S[stage])].all(axis=1)
        self.ran_BS[:, stage] = runs_B
        rows = np.flatnonzero(runs_B).tolist()
        output = self._run_rows(stage, rows) if rows else None
        self._merge(stage, rows, output)
        for column, gate in enumerate(self._path.scored_S[stage]):
            if output is not None and output.scores_BK is not None:
                self.scores_BG[rows, gate] = output.scores_BK[: len(rows), column]
        scored = list(self._path.scored_S[stage])
        self.is_open_BG[:, scored] = opened(self.scores_BG[:, scored], self._threshold_BG[:, scored])
        return output

    def _run_rows(self, stage: int, rows: Sequence[int]) -> StageOutput:
        """Run a stage on some rows, the last of them repeated where the network needs more at once."""
        manifest = self._executor.manifest
        lacking = manifest.min_batch - len(rows) if manifest.stages[stage].gates else 0
        taken = [*rows, *[rows[-1]] * lacking]
        if len(taken) == len(self._threshold_BG):
            return self._executor.run(stage, self._carries)
        read = manifest.stages[stage].inputs
        return self._executor.run(stage, {name: self._device.take(self._carries[name], taken) for name in read})

    def _merge(self, stage: int, rows: Sequence[int], output: StageOutput | None) -> None:
        """Put a stage's outputs where its rows are, and what stands for them where the others are."""
        written = {} if output is None else output.carries
        merges: dict[str, Merge] = {merge.run: merge for merge in self._executor.manifest.stages[stage].merges}
        for name in self._executor.manifest.stages[stage].outputs:
            merge = merges.get(name)
            skipped = None if merge is None else self._carries.get(merge.skip)
            if len(rows) == len(self._threshold_BG):
                self._carries[name] = written[name]
            elif name in written:
                self._carries[name] = self._spread(written[name], skipped, rows)
            elif skipped is not None:
                self._carries[name] = skipped

    def _spread(self, ran: DeviceTensor, skipped: DeviceTensor | None, rows: Sequence[int]) -> DeviceTensor:
        place = {row: position for position, row in enumerate(rows)}
        everyone = range(len(self._threshold_BG))
        if skipped is None:  # nobody reads the others' rows: any row may stand there
            return self._device.gather([ran] * len(everyone), [place.get(row, 0) for row in everyone])
        tensors = [ran if row in place else skipped for row in everyone]
        return self._device.gather(tensors, [place.get(row, row) for row in everyone])

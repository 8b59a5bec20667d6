"""A pass of a bundle at full depth over labelled data, streamed to a trace: whatever its size, a batch is held.

A gated network runs over the data once for every gate threshold: what a gate decides changes what all behind it see.

Shapes: N = samples, B = batch, E = exits, C = classes, K = exits with a rule of the network's own, G = gates,
S = stages.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from offramp_contract.errors import UnfitData
from offramp_contract.gates import gate_thresholds
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import BoolArray, Decision, FloatArray, IntArray
from offramp_runtime import StageExecutor, run_gated

from offramp_calibration.about import ALL_OPEN, About, GateThreshold
from offramp_calibration.checks import PixelCheck, check_accuracy, check_inputs, check_labels
from offramp_calibration.gate_ladder import DEFAULT_STEPS, check_steps, in_order, ladder, ladder_rows
from offramp_calibration.labelled import Inputs, LabelledData
from offramp_calibration.trace import Trace
from offramp_calibration.trace_writer import TraceWriter, writing

BATCH_SIZE: Final = 256


def record(
    executor: StageExecutor,
    data: LabelledData,
    path: Path,
    *,
    batch_size: int = BATCH_SIZE,
    allow_missing_classes: bool = False,
    gates: int | Collection[GateThreshold] = DEFAULT_STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Run every exit on every sample and write what they say.

    Args:
        executor: The loaded bundle.
        data: What to run it on.
        path: The trace's file; written all at once, in the end, or not at all.
        batch_size: Samples at a time, within what the bundle's graphs run with.
        allow_missing_classes: Record data that lacks some of the bundle's classes.
        gates: For a gated network, at how many gate thresholds at most to record it, all open and its own among them
            (see `ladder`); or at which, beside these two.
        progress: Is told how many samples are done and of how many, every pass counted.

    Raises:
        UnfitData: If the data is not what the bundle can be calibrated or evaluated on.
        InvalidValue: If a number of gate thresholds is asked for that is not allowed.
    """
    if isinstance(gates, int):
        check_steps(gates)
    check_labels(data.label_N, executor.manifest, allow_missing_classes=allow_missing_classes)
    with writing(path) as writer:
        about = _Recording(executor, data, writer, batch_size, progress).run(gates)
        writer.finish(about)
    return Trace.read(path)


class _Recording:
    """The passes over some data, one after the other."""

    def __init__(
        self,
        executor: StageExecutor,
        data: LabelledData,
        writer: TraceWriter,
        batch_size: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._executor = executor
        self._manifest = executor.manifest
        self._data = data
        self._writer = writer
        self._batch_size = _rows_at_once(batch_size, executor.manifest)
        self._progress = progress
        self._num_passes = 1
        self._num_done = 0
        self._digest = DataDigest(executor.manifest)

    def run(self, gates: int | Collection[GateThreshold]) -> About:
        """Record all passes; gives what the trace is about."""
        manifest, is_gated = self._manifest, bool(self._manifest.gates)
        if is_gated:
            self._num_passes = gates if isinstance(gates, int) else len(in_order(gates))
        score_NG = self._run_pass(ALL_OPEN)
        thresholds: tuple[GateThreshold, ...] = ()
        if is_gated:
            rows = np.sort(ladder_rows(len(score_NG)))
            thresholds = ladder(manifest, score_NG[rows], gates) if isinstance(gates, int) else in_order(gates)
            self._num_passes = len(thresholds)
        for threshold in thresholds[1:]:
            self._writer.begin_pass()
            self._run_pass(threshold)
        return About(
            manifest.name,
            manifest.model_digest,
            self._digest.hexdigest(),
            manifest.exit_depths,
            () if manifest.native is None else manifest.native.rules_N,
            thresholds,
            len(manifest.gates),
        )

    def _run_pass(self, threshold: GateThreshold) -> FloatArray:
        """Run all samples; gives the gates' scores (N, G)."""
        is_first, num_right, scores = self._num_done == 0, 0, []
        # The training's record is about the network with its own gates.
        is_judged = threshold is None if self._manifest.gates else True
        for start, inputs, label_B in _checked(self._data, self._manifest, self._batch_size):
            if is_first:
                self._digest.add(inputs, label_B)
            batch = _Batch.run(self._executor, inputs, threshold)
            batch.check(self._manifest, start)
            self._writer.append(label_B, batch.logits_EBC, batch.native_KB)
            if self._manifest.gates:
                self._writer.append_gates(depths(self._manifest, batch.ran_BS), batch.score_BG)
                scores.append(batch.score_BG)
            num_right += int((batch.logits_EBC[-1].argmax(axis=1) == label_B).sum())
            self._tell(len(label_B))
        if is_judged:
            check_accuracy(num_right, len(self._data.label_N), self._manifest)
        return np.concatenate(scores) if scores else np.empty((0, 0), np.float32)

    def _tell(self, num_rows: int) -> None:
        self._num_done += num_rows
        if self._progress is not None:
            self._progress(self._num_done, self._num_passes * len(self._data.label_N))


@dataclass(frozen=True, slots=True)
class _Batch:
    """What became of a batch at one gate threshold.

    Attributes:
        native_KB: What the network's own rules compare.
        ran_BS: Which stages each row ran.
        score_BG: The gates' scores; NaN where none was computed.
    """

    logits_EBC: list[FloatArray]
    native_KB: list[FloatArray]
    ran_BS: BoolArray
    score_BG: FloatArray

    @classmethod
    def run(cls, executor: StageExecutor, inputs: Inputs, threshold: GateThreshold) -> Self:
        """Run it, padded with its last sample where the graphs need more rows."""
        manifest, num_rows = executor.manifest, len(next(iter(inputs.values())))
        lacking = max(manifest.min_batch - num_rows, 0)
        padded = {name: np.concatenate([array, *[array[-1:]] * lacking]) for name, array in inputs.items()}
        threshold_G = gate_thresholds(manifest, threshold=threshold) if manifest.gates else None
        outcome = run_gated(executor, padded if lacking else inputs, threshold_G)
        native_EB = (Decision(decision_BD).native_B for _, decision_BD in outcome.exits)
        return cls(
            logits_EBC=[logits_BC[:num_rows] for logits_BC, _ in outcome.exits],
            native_KB=[native_B[:num_rows] for native_B in native_EB if native_B is not None],
            ran_BS=outcome.ran_BS[:num_rows],
            score_BG=outcome.scores_BG[:num_rows],
        )

    def check(self, manifest: Manifest, start: int) -> None:
        """Check that it holds numbers, and scores where a threshold can stand.

        Args:
            manifest: Of the network.
            start: The place of the batch's first sample among all.

        Raises:
            UnfitData: Naming the first sample of which that is not so.
        """
        _check_finite(self.logits_EBC, manifest, start)
        for index, gate in enumerate(manifest.gates):
            score_B = self.score_BG[:, index]
            if gate.stage is None:
                continue
            is_fit_B = (score_B >= 0) & (score_B <= 1) | ~self.ran_BS[:, gate.stage]
            if not is_fit_B.all():
                sample = start + int((~is_fit_B).argmax())
                raise UnfitData(f"data: {gate.name!r} scores sample {sample} with no number from 0 to 1")


def depths(manifest: Manifest, ran_BS: BoolArray) -> FloatArray:
    """Give the share of the full path's FLOPs that each row had run when it stood at each exit.

    Args:
        manifest: Of the network.
        ran_BS: Which stages each row ran.

    Returns:
        float32, shape (B, E).
    """
    flops_S = np.array([stage.flops for stage in manifest.stages], dtype=np.float64)
    done_BS = np.cumsum(ran_BS * flops_S, axis=1) / max(manifest.full_flops, 1)
    return np.asarray(done_BS[:, [exit_.stage for exit_ in manifest.exits]], dtype=np.float32)


class DataDigest:
    """Sha256 over labelled data: each input's bytes and the labels' (int64), in order, whatever the batches' size."""

    def __init__(self, manifest: Manifest) -> None:
        self._inputs = {tensor: hashlib.sha256() for tensor in manifest.inputs}
        self._labels = hashlib.sha256()

    def add(self, inputs: Inputs, label_B: IntArray) -> None:
        """Add a batch."""
        for tensor, digest in self._inputs.items():
            digest.update(_bytes(inputs[tensor.name], tensor.dtype))
        self._labels.update(_bytes(label_B, "int64"))

    def hexdigest(self) -> str:
        """Give the digest of what has been added."""
        whole = hashlib.sha256()
        for tensor, digest in self._inputs.items():
            whole.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0{digest.hexdigest()}\n".encode())
        whole.update(self._labels.digest())
        return whole.hexdigest()


def digest_of(data: LabelledData, manifest: Manifest, batch_size: int = BATCH_SIZE) -> str:
    """Compute the data digest that `record` writes, without running anything.

    Raises:
        UnfitData: If the data cannot be read.
    """
    digest = DataDigest(manifest)
    for _, inputs, label_B in _checked(data, manifest, batch_size):
        digest.add(inputs, label_B)
    return digest.hexdigest()


def _checked(data: LabelledData, manifest: Manifest, size: int) -> Iterator[tuple[int, Inputs, IntArray]]:
    """Give the place, inputs and labels of each batch, once they are found to be what the model reads."""
    label_N, start, pixels = data.label_N, 0, PixelCheck(manifest)
    for inputs in data.batches(size):
        end = start + check_inputs(inputs, manifest, start)
        if end > len(label_N):
            break
        pixels.add(inputs, start)
        yield start, inputs, label_N[start:end]
        start = end
    else:
        if start == len(label_N):
            pixels.finish()
            return
    raise UnfitData(f"data: {data.name} does not hold one input for each of its {len(label_N):,} labels")


def _check_finite(logits_EBC: Iterable[FloatArray], manifest: Manifest, start: int) -> None:
    for exit_, logits_BC in zip(manifest.exits, logits_EBC, strict=True):
        finite_B = np.isfinite(logits_BC).all(axis=1)
        if not finite_B.all():
            sample = start + int((~finite_B).argmax())
            raise UnfitData(
                f"data: sample {sample} drives {exit_.name!r} to NaN or infinity, which cannot be calibrated"
            )


def _rows_at_once(batch_size: int, manifest: Manifest) -> int:
    return max(min(batch_size, manifest.max_batch or batch_size), manifest.min_batch)


def _bytes(array: np.ndarray, dtype: str) -> memoryview:
    """Give an array's numbers, row by row, in little-endian order on every machine."""
    return np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<")).reshape(-1).view(np.uint8).data

"""One pass of a bundle at full depth over labelled data, streamed to a trace: whatever its size, a batch is held.

Shapes: N = samples, B = batch, E = exits, C = classes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray, IntArray
from offramp_runtime import StageExecutor, run_all_exits

from offramp_calibration.checks import PixelCheck, check_accuracy, check_inputs, check_labels
from offramp_calibration.labelled import Inputs, LabelledData
from offramp_calibration.trace import About, Trace, writing

BATCH_SIZE: Final = 256


def record(
    executor: StageExecutor,
    data: LabelledData,
    path: Path,
    *,
    batch_size: int = BATCH_SIZE,
    allow_missing_classes: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run every exit on every sample and write what they say.

    Args:
        executor: The loaded bundle.
        data: What to run it on.
        path: The trace's file; written all at once, in the end, or not at all.
        batch_size: Samples at a time, within what the bundle's graphs run with.
        allow_missing_classes: Record data that lacks some of the bundle's classes.
        progress: Is told the number of samples that are done.

    Raises:
        UnfitData: If the data is not what the bundle can be calibrated or evaluated on.
    """
    manifest, label_N = executor.manifest, data.label_N
    check_labels(label_N, manifest, allow_missing_classes=allow_missing_classes)
    digest, num_right = DataDigest(manifest), 0
    with writing(path) as writer:
        for start, inputs, label_B in _checked(data, manifest, _rows_at_once(batch_size, manifest)):
            digest.add(inputs, label_B)
            logits_EBC = _logits(executor, inputs, start)
            writer.append(label_B, logits_EBC)
            num_right += int((logits_EBC[-1].argmax(axis=1) == label_B).sum())
            if progress is not None:
                progress(start + len(label_B))
        check_accuracy(num_right, len(label_N), manifest)
        writer.finish(About(manifest.name, manifest.model_digest, digest.hexdigest(), manifest.exit_depths))
    return Trace.read(path)


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


def _logits(executor: StageExecutor, inputs: Inputs, start: int) -> list[FloatArray]:
    """Run a batch, padded with its last sample where the graphs need more rows."""
    num_rows = len(next(iter(inputs.values())))
    lacking = max(executor.manifest.min_batch - num_rows, 0)
    padded = {name: np.concatenate([array, *[array[-1:]] * lacking]) for name, array in inputs.items()}
    exits = run_all_exits(executor, padded if lacking else inputs)
    logits_EBC = [logits_BC[:num_rows] for logits_BC, _ in exits]
    _check_finite(logits_EBC, executor.manifest, start)
    return logits_EBC


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

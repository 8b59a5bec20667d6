"""What data must be to calibrate a bundle on it: labelled rightly, finite, and prepared as the bundle's own inputs are.

A calibration on the wrong data looks like any other, so everything here refuses, in one sentence.

Shapes: N = samples, B = batch, C = channels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from offramp_contract.errors import UnfitData
from offramp_contract.manifest import ImagePreprocessing, Manifest, Tensor
from offramp_contract.statistics import FloatArray, IntArray
from scipy.stats import binom

from offramp_calibration.labelled import Inputs
from offramp_calibration.labels import check_range, named, num_classes_of

LEAST_SAMPLES = 50
"""One part of the data fits, the other certifies: with fewer neither says anything."""
TOLERANCE = 0.05
"""How far, in shares of the range between black and white, an image's interpolation may overshoot it."""
MAX_GAP = 0.10
"""Accuracy that held-out data may be below what training measured, when more than chance explains it."""
SIGNIFICANCE = 0.01


def check_labels(label_N: IntArray, manifest: Manifest, *, allow_missing_classes: bool = False) -> None:
    """Check that there are enough samples, of every class, and that a label means one thing to every exit.

    Raises:
        UnfitData: If not.
    """
    if not manifest.has_common_classes:
        raise UnfitData(
            "labels: the exits of this model have different numbers of classes, so that no label is right or wrong at "
            "all of them; export the exits of one width alone to calibrate them"
        )
    num_classes = num_classes_of(manifest)
    if len(label_N) < LEAST_SAMPLES:
        samples = "1 sample is" if len(label_N) == 1 else f"{len(label_N)} samples are"
        raise UnfitData(f"data: {samples} too few; a part of it fits and a part certifies: at least {LEAST_SAMPLES}")
    check_range(label_N, num_classes)
    missing = np.flatnonzero(np.bincount(label_N, minlength=num_classes) == 0).tolist()
    if missing and not allow_missing_classes:
        raise UnfitData(
            f"labels: no sample is of class {named(missing, manifest)}; data that lacks classes says nothing about "
            "them (--allow-missing-classes calibrates nevertheless)"
        )


def check_inputs(inputs: Inputs, manifest: Manifest, start: int) -> int:
    """Check a batch against what the model reads.

    Args:
        inputs: An array per model input.
        manifest: What the model reads.
        start: The place of the batch's first sample among all.

    Returns:
        The number of samples.

    Raises:
        UnfitData: Naming the input, what it must be and what it is.
    """
    expected = [tensor.name for tensor in manifest.inputs]
    if set(inputs) != set(expected):
        raise UnfitData(f"inputs: must be exactly {', '.join(expected)}; got {', '.join(inputs) or 'none'}")
    for tensor in manifest.inputs:
        array = inputs[tensor.name]
        if array.shape[1:] != tensor.shape or array.dtype != tensor.dtype:
            raise UnfitData(f"{tensor.name}: must be {_described(tensor)}; got {array.dtype.name} {array.shape}")
        check_finite(array, tensor.name, start)
    counts = {len(inputs[name]) for name in expected}
    if len(counts) > 1:
        raise UnfitData(f"inputs: all need the same number of samples; got {sorted(counts)}")
    return counts.pop()


def check_finite(array: np.ndarray, name: str, start: int) -> None:
    """Check that a batch holds numbers only.

    Raises:
        UnfitData: Naming the first sample with NaN or infinity.
    """
    if array.dtype.kind != "f":
        return
    finite_B = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite_B.all():
        raise UnfitData(f"{name}: sample {start + int((~finite_B).argmax())} holds NaN or infinity")


@dataclass(slots=True)
class PixelCheck:
    """Sees whether images have been normalised as the bundle says, from the values that normalising can give.

    Attributes:
        manifest: What declares the preprocessing; any other than an image's passes.
        lowest: Least value so far.
    """

    manifest: Manifest
    lowest: float = np.inf

    def add(self, inputs: Inputs, start: int) -> None:
        """Look at a batch.

        Raises:
            UnfitData: If a value is none that normalising gives, such as one of raw pixels.
        """
        spec, tensor = self.manifest.preprocessing, self.manifest.inputs[0]
        if not isinstance(spec, ImagePreprocessing):
            return
        values_BCP = inputs[tensor.name].reshape(len(inputs[tensor.name]), len(spec.mode), -1).astype(np.float32)
        low_BC, high_BC = values_BCP.min(axis=2), values_BCP.max(axis=2)
        self.lowest = min(self.lowest, float(low_BC.min()))
        least_C, most_C = _range(spec)
        slack_C = TOLERANCE * (most_C - least_C)
        outside_BC = (low_BC < least_C - slack_C) | (high_BC > most_C + slack_C)
        if outside_BC.any():
            row, channel = (int(place) for place in np.unravel_index(outside_BC.argmax(), outside_BC.shape))
            raise UnfitData(
                f"data: sample {start + row} holds values from {low_BC[row, channel]:.4g} to "
                f"{high_BC[row, channel]:.4g} in channel {channel}, and the bundle's preprocessing "
                f"({_normalisation(spec, channel)}) gives {least_C[channel]:.4g} to {most_C[channel]:.4g}"
            )

    def finish(self) -> None:
        """Look back on all batches.

        Raises:
            UnfitData: If nothing is below 0 although black is: the images were scaled to [0, 1] and not normalised.
        """
        spec = self.manifest.preprocessing
        if not isinstance(spec, ImagePreprocessing):
            return
        least_C, _ = _range(spec)
        if self.lowest >= 0 and least_C.max() < 0:
            raise UnfitData(
                f"data: no value is below 0, and normalised images "
                f"({_normalisation(spec, 0)}) go down to {least_C[0]:.4g}: these look scaled but not normalised"
            )


def check_accuracy(num_right: int, num_samples: int, manifest: Manifest) -> None:
    """Check that full depth, or a gated network with its own gates, does what it was trained to do.

    Args:
        num_right: How many samples it is right on.
        num_samples: Of how many.
        manifest: The bundle's.

    Raises:
        UnfitData: If it is right no more often than by chance, or far and significantly (exact binomial test) less
            often than the training record says.
    """
    accuracy, chance = num_right / num_samples, 1 / num_classes_of(manifest)
    what = "the network with its own gates" if manifest.gates else "full depth"
    reason = "the labels or the preprocessing do not match the bundle"
    if binom.sf(num_right - 1, num_samples, chance) > SIGNIFICANCE:
        raise UnfitData(f"data: {what} is right on {accuracy:.1%} of it, and chance on {chance:.1%}: {reason}")
    recorded = recorded_accuracy(manifest.provenance.training)
    if recorded is None or recorded - accuracy <= MAX_GAP:
        return
    if binom.cdf(num_right, num_samples, recorded) < SIGNIFICANCE:
        raise UnfitData(
            f"data: {what} is right on {accuracy:.1%} of it, and on {recorded:.1%} of the test data in its "
            f"training record: {reason}"
        )


def recorded_accuracy(training: dict[str, Any]) -> float | None:
    """Give full depth's test accuracy of a training record, if it holds one."""
    accuracy_E = training.get("test_accuracy_E")
    if not isinstance(accuracy_E, list | tuple) or not accuracy_E:
        return None
    last = accuracy_E[-1]
    return float(last) if isinstance(last, int | float) and 0 <= last <= 1 else None


def _range(spec: ImagePreprocessing) -> tuple[FloatArray, FloatArray]:
    mean_C, std_C = np.array(spec.mean), np.array(spec.std)
    return (0 - mean_C) / std_C, (1 - mean_C) / std_C


def _normalisation(spec: ImagePreprocessing, channel: int) -> str:
    return f"mean {spec.mean[channel]:g}, std {spec.std[channel]:g}"


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape ({', '.join(map(str, ('samples', *tensor.shape)))})"

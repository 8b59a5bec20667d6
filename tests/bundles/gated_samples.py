"""Labelled samples for the gated networks of `gated_bundles`, whose gates' scores are part of the input."""

from pathlib import Path

import numpy as np
from gated_bundles import CLASSES, WIDTH
from offramp_contract.statistics import FloatArray, IntArray
from offramp_runtime import StageExecutor, open_bundle, open_device, run_gated


def draw_gated(folder: Path, num_samples: int, seed: int = 0, noise: float = 0.1) -> tuple[FloatArray, IntArray]:
    """Draw inputs, and labels that are what the network says with its own gates; a share of them is changed.

    Returns:
        float32 (N, 8) and int64 (N,).
    """
    rng = np.random.default_rng(seed)
    x = np.zeros((num_samples, WIDTH), dtype=np.float32)
    x[:, :CLASSES] = 3 * rng.normal(size=(num_samples, CLASSES))
    x[:, CLASSES : WIDTH - 1] = rng.uniform(size=(num_samples, WIDTH - 1 - CLASSES))
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    label_N = run_gated(executor, {"x": x}).exits[-1][0].argmax(axis=1).astype(np.int64)
    label_N[:CLASSES] = np.arange(CLASSES)  # none is missing
    is_changed_N = rng.random(num_samples) < noise
    label_N[is_changed_N] = rng.integers(CLASSES, size=int(is_changed_N.sum()))
    return x, label_N

"""Which gate thresholds a gated network is recorded at: the rungs from every gate open to every gate shut.

Thresholds come from scores that the first pass has seen, of a fixed part of the samples. That part never certifies
(see `ladder_rows`), so the ladder is no more chosen on the samples that certify than the thresholds of exits are.

Shapes: M = samples of the fixed part, G = gates, P = passes.
"""

from collections.abc import Collection
from typing import Final

import numpy as np
from offramp_contract.errors import InvalidValue
from offramp_contract.manifest import Manifest
from offramp_contract.statistics import FloatArray, IntArray

from offramp_calibration.about import ALL_OPEN, GateThreshold
from offramp_calibration.thresholds import cuts_between

DEFAULT_STEPS: Final = 12
LEAST_STEPS: Final = 3
MAX_STEPS: Final = 64
ALL_SHUT: Final = 1.0
LADDER_SHARE: Final = 0.25


def check_steps(num_steps: int) -> None:
    """Check how many passes are asked for.

    Raises:
        InvalidValue: Naming what is allowed.
    """
    if not LEAST_STEPS <= num_steps <= MAX_STEPS:
        raise InvalidValue(f"gate_steps must be {LEAST_STEPS} to {MAX_STEPS}; got {num_steps}", "gate_steps")


def ladder_rows(num_samples: int) -> IntArray:
    """Give the samples, in random order, whose scores choose the ladder: a quarter, and of as many always the same.

    They are among those that choose, never among those that certify, whatever the seed of the split.
    """
    count = max(1, round(LADDER_SHARE * num_samples))
    return np.random.default_rng(0).permutation(num_samples)[:count]


def ladder(manifest: Manifest, score_MG: FloatArray, num_steps: int = DEFAULT_STEPS) -> tuple[GateThreshold, ...]:
    """Choose the gate thresholds to record.

    Where every gate has a priority instead of a score there is a rung for each priority, for no other threshold makes a
    difference; where scores or priorities take more values than there are rungs, the rungs stand at quantiles, midway
    between two values, so that rounding decides about none.

    Args:
        manifest: Of the network.
        score_MG: The gates' scores with every gate open, of the samples of `ladder_rows`.
        num_steps: At most how many.

    Returns:
        All open, the network's own, then rising; the last shuts every gate, where no score is 1.

    Raises:
        InvalidValue: If so few or many are not allowed.
    """
    check_steps(num_steps)
    seen = _scores(manifest, score_MG)
    shut = [ALL_SHUT] if seen.max(initial=0.0) < ALL_SHUT else []
    most = num_steps - 2 - len(shut)
    num_values = len(np.unique(seen))
    if num_values - 1 <= most:
        levels = (np.cumsum(np.unique(seen, return_counts=True)[1])[:-1]) / max(len(seen), 1)
    else:
        levels = np.linspace(0, 1, most + 2)[1:-1]
    cuts = cuts_between(seen, levels).tolist()
    return (ALL_OPEN, None, *cuts, *shut)


def in_order(thresholds: Collection[GateThreshold]) -> tuple[GateThreshold, ...]:
    """Give thresholds as they are recorded: all open, the network's own, then rising, each once."""
    cuts = {threshold for threshold in thresholds if threshold is not None} - {ALL_OPEN}
    return (ALL_OPEN, None, *sorted(cuts))


def _scores(manifest: Manifest, score_MG: FloatArray) -> FloatArray:
    """Give all that a threshold may be compared with, each gate as often as there are samples."""
    columns = [
        score_MG[:, index].astype(np.float64) if gate.priority is None else np.full(len(score_MG), gate.priority)
        for index, gate in enumerate(manifest.gates)
    ]
    return np.concatenate(columns)

"""Whether an exit is as often right as it says: calibration error, likelihood, and how well confidence ranks.

Probabilities come from log-odds in float64. Bins of the diagram hold equally many samples in the order of their
log-odds: of a network's confidences a third round to 1, and bins of equal width would put them all into one.

Shapes: N = samples, C = classes, B = bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from offramp_contract.statistics import BoolArray, FloatArray, IntArray, log_softmax
from scipy.special import expit, ndtri
from scipy.stats import rankdata

NUM_BINS = 15
LEAST_IN_BIN = 40
CONFIDENCE_LEVEL = 0.95
_ROWS_AT_ONCE = 8192

Interval: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bin:
    """Samples of similar confidence: what the exit says on average, and how often it is right."""

    num_samples: int
    confidence: float
    accuracy: float
    interval: Interval


def reliability_bins(log_odds_N: FloatArray, right_N: BoolArray, most: int = NUM_BINS) -> tuple[Bin, ...]:
    """Put samples of similar log-odds into bins of (nearly) equal size, the least sure first.

    There are `most` bins, or as many as leave `LEAST_IN_BIN` samples in each. Samples of equal log-odds share a bin, so
    that the result does not depend on the order of the data.
    """
    num_bins = min(most, max(1, len(log_odds_N) // LEAST_IN_BIN))
    order_N = np.argsort(log_odds_N, kind="stable")
    sorted_N, right_sorted_N = log_odds_N[order_N], right_N[order_N]
    wanted = np.linspace(0, len(order_N), num_bins + 1).round().astype(int)[1:-1]
    # An edge inside a run of equal log-odds moves to the start of the run.
    edges = np.unique([0, *np.searchsorted(sorted_N, sorted_N[wanted[wanted < len(order_N)]]), len(order_N)])
    return tuple(
        _bin(sorted_N[start:stop], right_sorted_N[start:stop]) for start, stop in pairwise(edges) if stop > start
    )


def equal_mass_ece(bins: Sequence[Bin]) -> float:
    """Average |confidence - accuracy| over bins, weighed by their samples."""
    total = sum(each.num_samples for each in bins)
    return sum(each.num_samples * abs(each.confidence - each.accuracy) for each in bins) / total


def ece(log_odds_N: FloatArray, right_N: BoolArray, num_bins: int = NUM_BINS) -> float:
    """Measure the expected calibration error over bins of equal width in confidence, the literature's number.

    https://arxiv.org/abs/1706.04599, eq. 3
    """
    confidence_N = _confidence(log_odds_N)
    bin_N = np.clip(np.ceil(confidence_N * num_bins).astype(int) - 1, 0, num_bins - 1)
    gap_B = np.bincount(bin_N, weights=confidence_N - right_N, minlength=num_bins)
    return float(np.abs(gap_B).sum() / len(right_N))


def nll(logits_NC: FloatArray, label_N: IntArray, temperature: float = 1.0) -> float | None:
    """Average -ln p of the right class, in nats; None if a right class was given probability 0."""
    total = 0.0
    for start in range(0, len(label_N), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_p_BC = log_softmax(np.asarray(logits_NC[rows], dtype=np.float64) / temperature)
        total -= float(np.take_along_axis(log_p_BC, label_N[rows, None], axis=1).sum())
    return total / len(label_N) if np.isfinite(total) else None


def auroc(score_N: FloatArray, right_N: BoolArray) -> float | None:
    """Give the probability that a right answer scores above a wrong one, ties counting half; None if one kind lacks."""
    num_right = int(right_N.sum())
    num_wrong = len(right_N) - num_right
    if not num_right or not num_wrong:
        return None
    above = rankdata(score_N)[right_N].sum() - num_right * (num_right + 1) / 2
    return float(above / (num_right * num_wrong))


def wilson(num_right: int, num_samples: int, level: float = CONFIDENCE_LEVEL) -> Interval:
    """Give Wilson's score interval of a share, which holds for few samples and for shares near 0 and 1.

    Returns:
        Its ends; 0 to 1 where there are no samples.
    """
    if not num_samples:
        return 0.0, 1.0
    z = float(ndtri((1 + level) / 2))
    share, weight = num_right / num_samples, z * z / num_samples
    middle = (share + weight / 2) / (1 + weight)
    half = z * float(np.sqrt(share * (1 - share) / num_samples + weight / (4 * num_samples))) / (1 + weight)
    # Rounding must not push the share out of its own interval.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _bin(log_odds_N: FloatArray, right_N: BoolArray) -> Bin:
    num_right, num_samples = int(right_N.sum()), len(right_N)
    confidence = float(_confidence(log_odds_N).mean())
    return Bin(num_samples, confidence, num_right / num_samples, wilson(num_right, num_samples))


def _confidence(log_odds_N: FloatArray) -> FloatArray:
    confidence_N: FloatArray = expit(log_odds_N.astype(np.float64))
    return confidence_N

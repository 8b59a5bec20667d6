"""Where to put a threshold: between the scores that data has shown, never on a grid of probabilities.

A third of easy samples have a probability that rounds to 1, so confidence is handled as log-odds here. A spec holds a
probability, and float64 tells probabilities apart up to log-odds of about 30; all beyond count as equally certain.

Shapes: N = samples, L = levels.
"""

from typing import Final

import numpy as np
from offramp_contract.statistics import FloatArray
from scipy.special import expit

MAX_LOG_ODDS: Final = 30.0
ALWAYS: Final = 0.0
"""The confidence threshold at which every sample leaves."""
NEVER: Final = 1.0
"""The confidence threshold at which none does."""


def confidence_of(log_odds: float) -> float:
    """Give the probability that a spec holds for a cut at these log-odds; `NEVER` where float64 cannot tell it from 1.

    Minus infinity gives `ALWAYS`.
    """
    return float(expit(log_odds)) if log_odds <= MAX_LOG_ODDS else NEVER


def as_certain(log_odds_N: FloatArray) -> FloatArray:
    """Give log-odds, float64, with all that are beyond the greatest a threshold can tell apart set equal."""
    return np.minimum(log_odds_N.astype(np.float64), MAX_LOG_ODDS)


def cuts_between(score_N: FloatArray, level_L: FloatArray) -> FloatArray:
    """Cut scores at quantiles, each cut midway between two neighbouring scores that differ.

    So no sample stands on a threshold, where rounding would decide about it.

    Args:
        score_N: Finite scores.
        level_L: Shares of the scores that are to lie below a cut, in [0, 1].

    Returns:
        The distinct cuts, rising, float64; fewer than levels where many scores are equal, none if all are.
    """
    distinct, counts = np.unique(score_N.astype(np.float64), return_counts=True)
    if len(distinct) < 2:
        return np.empty(0)
    below = np.searchsorted(np.cumsum(counts), level_L * len(score_N))
    below = np.unique(np.clip(below, 0, len(distinct) - 2))
    cuts: FloatArray = (distinct[below] + distinct[below + 1]) / 2
    return cuts

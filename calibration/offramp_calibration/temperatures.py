"""Temperatures: how much too sure of itself each exit is.

An exit's temperature T minimises the negative log-likelihood of softmax(logits / T) on held-out samples (Guo et al.,
https://arxiv.org/abs/1706.04599). It changes no prediction, and makes one threshold mean the same at every exit.

Shapes: M = samples that it is fitted on, C = classes.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from offramp_contract.statistics import FloatArray, IntArray, log_softmax
from scipy.optimize import minimize_scalar

from offramp_calibration.trace import Trace

LEAST_TEMPERATURE: Final = 0.05
GREATEST_TEMPERATURE: Final = 20.0
MAX_FITTED_SAMPLES: Final = 20_000
_MAX_FITTED_LOGITS = 2**25
_ROWS_AT_ONCE = 2048
_LEAST_LOG_P = -1e6


def fit_temperatures(
    trace: Trace, rows_M: IntArray, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[float, ...]:
    """Fit one temperature per exit.

    Args:
        trace: The recorded logits.
        rows_M: The samples to fit on, in random order; of many, the first `MAX_FITTED_SAMPLES` are enough.
        progress: Called with the number of exits done, and of all.
    """
    temperatures = []
    for index, logits_NC in enumerate(trace.logits_ENC):
        most = max(1, min(MAX_FITTED_SAMPLES, _MAX_FITTED_LOGITS // logits_NC.shape[1]))
        rows = np.sort(rows_M[:most])
        temperatures.append(fit_temperature(logits_NC[rows], trace.label_N[rows]))
        progress(index + 1, len(trace.logits_ENC))
    return tuple(temperatures)


def fit_temperature(logits_MC: FloatArray, label_M: IntArray) -> float:
    """Fit the temperature of one exit.

    Where the likelihood has no optimum, as when every prediction is right, the answer is close to a bound.

    Args:
        logits_MC: Raw scores, shape (M, C).
        label_M: The right classes.

    Returns:
        A temperature in [`LEAST_TEMPERATURE`, `GREATEST_TEMPERATURE`].
    """
    found = minimize_scalar(
        lambda log_t: mean_nll(logits_MC, label_M, math.exp(log_t)),
        bounds=(math.log(LEAST_TEMPERATURE), math.log(GREATEST_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return math.exp(found.x)


def mean_nll(logits_MC: FloatArray, label_M: IntArray, temperature: float) -> float:
    """Give the mean negative log-likelihood of the labels under softmax(logits / T), in nats."""
    total = 0.0
    for start in range(0, len(label_M), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_p_BC = log_softmax(logits_MC[rows] / temperature)
        log_p_B = log_p_BC[np.arange(len(log_p_BC)), label_M[rows]]
        # A right class of logit -inf has no probability at any temperature: it must not hide what the others say.
        total -= np.maximum(log_p_B, _LEAST_LOG_P).sum()
    return total / len(label_M)

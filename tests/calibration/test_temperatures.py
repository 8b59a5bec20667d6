"""Temperatures: fitted by likelihood, recovered where they are known, bounded where there is no optimum."""

from collections.abc import Callable

import numpy as np
import pytest
from offramp_calibration.temperatures import (
    GREATEST_TEMPERATURE,
    LEAST_TEMPERATURE,
    fit_temperature,
    fit_temperatures,
    mean_nll,
)
from offramp_calibration.trace import Trace
from offramp_contract.statistics import log_softmax


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_a_known_temperature_is_found_again(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits_NC = rng.normal(scale=3.0 * temperature, size=(20_000, 10)).astype(np.float32)
    # A class is drawn with the probability that softmax(logits / T) gives it (the Gumbel-max trick).
    label_N = (log_softmax(logits_NC / temperature) + rng.gumbel(size=logits_NC.shape)).argmax(axis=1)
    assert fit_temperature(logits_NC, label_N) == pytest.approx(temperature, rel=0.03)


def test_every_exits_likelihood_rises(trace: Trace) -> None:
    rows = np.arange(len(trace))
    temperatures = fit_temperatures(trace, rows)
    assert len(temperatures) == len(trace.logits_ENC)
    for logits_NC, temperature in zip(trace.logits_ENC, temperatures, strict=True):
        fitted = mean_nll(logits_NC, trace.label_N, temperature)
        assert temperature > 1, "the drawn exits are too sure of themselves"
        assert fitted < mean_nll(logits_NC, trace.label_N, 1.0)
        assert fitted <= min(mean_nll(logits_NC, trace.label_N, temperature * factor) for factor in (0.98, 1.02))


def test_only_the_given_samples_count(trace: Trace) -> None:
    half = np.arange(0, len(trace), 2)
    part = Trace(trace.about, trace.label_N[half], tuple(logits_NC[half] for logits_NC in trace.logits_ENC))
    assert fit_temperatures(trace, half) == pytest.approx(fit_temperatures(part, np.arange(len(half))))


def test_exits_that_are_never_wrong_or_never_right_stay_within_bounds() -> None:
    logits_NC = np.array([[5.0, 0.0], [0.0, 5.0]] * 50, dtype=np.float32)
    label_N = np.array([0, 1] * 50)
    assert LEAST_TEMPERATURE <= fit_temperature(logits_NC, label_N) < 0.2
    assert fit_temperature(logits_NC, 1 - label_N) == pytest.approx(GREATEST_TEMPERATURE, rel=1e-2)


def test_classes_ruled_out_by_an_infinite_logit_do_no_harm() -> None:
    rng = np.random.default_rng(1)
    logits_NC = rng.normal(size=(500, 4)).astype(np.float32)
    label_N = rng.integers(3, size=500)
    logits_NC[:, 3] = -np.inf
    expected = fit_temperature(logits_NC[:, :3], label_N)
    assert fit_temperature(logits_NC, label_N) == pytest.approx(expected, rel=1e-3)
    label_N[0] = 3
    assert LEAST_TEMPERATURE <= fit_temperature(logits_NC, label_N) <= GREATEST_TEMPERATURE


def test_progress_names_every_exit(make_trace: Callable[..., Trace]) -> None:
    heard: list[tuple[int, int]] = []
    fit_temperatures(make_trace(50, 3), np.arange(50), lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]

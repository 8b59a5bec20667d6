"""Certificates over gate thresholds hold: wrong no more often than delta, where taking measurements at their word is.

A population of answers is drawn once: of a network with one exit, at thirty gate thresholds. Some samples depend on one
gate and some on another, so that an answer changes at a threshold of its sample's own, and may change back.
"""

import numpy as np
import pytest
from offramp_calibration.calibrate import CalibrationSettings, operating_points, split
from offramp_calibration.gate_ladder import ladder_rows
from offramp_calibration.gated import certified
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_contract.budgets import ACCURACY_DELTA, certified_accuracy, certified_risk
from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import FixedSpec
from offramp_contract.statistics import Decision
from scipy.stats import binom

DRAWS, SAMPLES, POPULATION = 150, 1000, 10_000
SETTINGS = CalibrationSettings()
DELTA = 0.1
FULL = FixedSpec(exit=0)
PROMISES = (("consistency", 0.05), ("consistency", 0.1), ("accuracy_loss", 0.04), ("accuracy", 0.15))
RISKS = {
    "consistency": lambda replayed: float(replayed.differs_N.mean()),
    "accuracy_loss": lambda replayed: float(replayed.lost_N.mean()),
    "accuracy": lambda replayed: 1 - replayed.accuracy,
}


@pytest.fixture(scope="module")
def population():
    """What comes of every sample, by gate threshold."""
    rng = np.random.default_rng(0)
    label_N = rng.integers(4, size=POPULATION)
    full_N = np.where(rng.random(POPULATION) < 0.9, label_N, (label_N + 1) % 4)
    changes_at_N = rng.uniform(0, 4, POPULATION)  # above 1: the gates do not matter for it
    other_N = np.where(rng.random(POPULATION) < 0.3, label_N, (label_N + 2) % 4)
    by_threshold = {}
    for threshold in (0.0, *np.linspace(0.02, 1, 30).tolist()):
        is_changed_N = (changes_at_N < threshold) & (rng.random(POPULATION) < 0.95)
        class_N = np.where(is_changed_N, other_N, full_N).astype(np.int32)
        depth_N = 1 - 0.8 * threshold * rng.uniform(0.8, 1, POPULATION)
        nothing = Decision(np.zeros((POPULATION, 5), np.float32))
        by_threshold[threshold] = Outcomes(
            label_N,
            (nothing,),
            class_N[:, None],
            np.ones(1),
            depth_NE=depth_N[:, None],
            full_class_N=full_N.astype(np.int32),
        )
    return by_threshold


def take(by_threshold, rows):
    return {threshold: outcomes.take(rows) for threshold, outcomes in by_threshold.items()}


def asked(points, kind, bound):
    try:
        if kind == "accuracy":
            return certified_accuracy(points, 1 - bound).point
        return certified_risk(points, bound, DELTA, kind).point
    except InvalidValue:
        return None


@pytest.fixture(scope="module")
def broken(population):
    """Per promise, whether the certified choice and the naive one broke it, draw by draw."""
    truth = {
        (kind, threshold): risk(replay(FULL, outcomes))
        for kind, risk in RISKS.items()
        for threshold, outcomes in population.items()
    }
    told = {promise: ([], []) for promise in PROMISES}
    for seed in range(DRAWS):
        drawn = take(population, np.random.default_rng(seed).integers(POPULATION, size=SAMPLES))
        rows_a, rows_b = split(SAMPLES, SETTINGS, ladder_rows(SAMPLES))
        points = list(operating_points(certified(drawn, rows_a, rows_b, "0" * 64, SETTINGS.num_steps)))
        held_out = take(drawn, rows_b)
        for (kind, bound), (by_certificate, naively) in told.items():
            chosen = asked(points, kind, bound)
            by_certificate.append(chosen is not None and truth[kind, chosen.gate_threshold] > bound)
            within = [point for point in points if RISKS[kind](replay(FULL, held_out[point.gate_threshold])) <= bound]
            naive = min(within, key=lambda point: point.compute, default=None)
            naively.append(naive is not None and truth[kind, naive.gate_threshold] > bound)
    return told


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_a_certified_gate_threshold_breaks_its_promise_no_more_often_than_delta(broken, promise):
    by_certificate, _ = broken[promise]
    delta = ACCURACY_DELTA if promise[0] == "accuracy" else DELTA
    assert sum(by_certificate) <= binom.ppf(0.999, DRAWS, delta)


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_taking_measurements_at_their_word_breaks_far_more(broken, promise):
    by_certificate, naively = broken[promise]
    assert np.mean(naively) > 0.25
    assert sum(naively) > 3 * sum(by_certificate)

"""Certificates hold: over many draws of calibration data, they are wrong no more often than delta; naive choices are.

A population is drawn once, large enough to know every setting's true risk. Each draw takes calibration data from it
(with replacement: independent samples of this very population), certifies, and asks as the server does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from offramp_calibration.calibrate import CalibrationSettings, certified, operating_points, split
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import Replayed, replay
from offramp_calibration.temperatures import fit_temperatures
from offramp_calibration.trace import Trace
from offramp_contract.budgets import ACCURACY_DELTA, certified_accuracy, certified_risk
from offramp_contract.calibration import OperatingPoint
from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import PolicySpec
from scipy.stats import binom

DRAWS, SAMPLES, POPULATION = 200, 1600, 10_000
SETTINGS = CalibrationSettings(num_steps=60)
DELTA = 0.1
# Of accuracy, the share of wrong answers that it admits; full depth is wrong on 9.7 %.
PROMISES = (
    ("consistency", 0.05),
    ("consistency", 0.1),
    ("accuracy_loss", 0.03),
    ("accuracy_loss", 0.06),
    ("accuracy", 0.13),
    ("accuracy", 0.16),
)


def lost_N(replayed: Replayed) -> np.ndarray:
    right_at_full_depth_N = replayed.outcomes.class_NE[:, -1] == replayed.outcomes.label_N
    return right_at_full_depth_N & ~replayed.right_N


RISKS: dict[str, Callable[[Replayed], float]] = {
    "consistency": lambda replayed: float(replayed.differs_N.mean()),
    "accuracy_loss": lambda replayed: float(lost_N(replayed).mean()),
    "accuracy": lambda replayed: 1 - replayed.accuracy,
}


@dataclass
class Shares:
    """How often a promise was broken: by the certified choice, and by taking a setting at its measured word."""

    certified: list[bool] = field(default_factory=list)
    on_average: list[float] = field(default_factory=list)
    naive: list[bool] = field(default_factory=list)


@pytest.fixture(scope="module")
def population(make_trace: Callable[..., Trace]) -> Outcomes:
    """Scores as a calibrated network gives them: the temperatures come from samples outside the population."""
    others = make_trace(4000, 4, seed=1)
    temperatures = fit_temperatures(others, np.arange(len(others)))
    return Outcomes.of(make_trace(POPULATION, 4, seed=2), temperatures)


@pytest.fixture(scope="module")
def broken(population: Outcomes) -> dict[tuple[str, float], Shares]:
    """Certify on many draws and compare each choice with the truth."""
    shares: dict[tuple[str, float], Shares] = {}
    for seed in range(DRAWS):
        drawn = population.take(np.random.default_rng(seed).integers(len(population), size=SAMPLES))
        rows_a, rows_b = split(SAMPLES, SETTINGS)
        points = list(operating_points(certified(drawn, rows_a, rows_b, "0" * 64, SETTINGS)))
        held_out = drawn.take(rows_b)
        measured = [(point, replay(point.policy, held_out)) for point in points]
        for kind, bound in PROMISES:
            told = shares.setdefault((kind, bound), Shares())
            certain = ask(points, kind, bound, DELTA)
            told.certified.append(certain is not None and truth(certain.policy, population, kind) > bound)
            naive = cheapest_by_measurement(measured, kind, bound)
            told.naive.append(naive is not None and truth(naive.policy, population, kind) > bound)
            if kind != "accuracy" and (on_average := ask(points, kind, bound, None)):
                told.on_average.append(truth(on_average.policy, population, kind))
    return shares


def ask(points: list[OperatingPoint], kind: str, bound: float, delta: float | None) -> OperatingPoint | None:
    """Ask as a request does; None if it is refused, so that nothing is promised."""
    try:
        if kind == "accuracy":
            return certified_accuracy(points, 1 - bound).point
        return certified_risk(points, bound, delta, kind).point  # type: ignore[arg-type]  # one of the two risks
    except InvalidValue:
        return None


def truth(policy: PolicySpec, population: Outcomes, kind: str) -> float:
    """Give the risk over the whole population."""
    return RISKS[kind](replay(policy, population))


def cheapest_by_measurement(
    measured: list[tuple[OperatingPoint, Replayed]], kind: str, bound: float
) -> OperatingPoint | None:
    """Choose naively: the cheapest point whose measured risk is within the bound."""
    within = [point for point, replayed in measured if RISKS[kind](replayed) <= bound]
    return min(within, key=lambda point: point.compute, default=None)


def most_by_chance(delta: float) -> int:
    """Give the most violations that 200 draws show, save one time in a thousand, if delta is their true share."""
    return int(binom.ppf(0.999, DRAWS, delta))


@pytest.mark.parametrize("kind", RISKS)
def test_certificates_are_broken_no_more_often_than_delta(broken: dict[tuple[str, float], Shares], kind: str) -> None:
    delta = ACCURACY_DELTA if kind == "accuracy" else DELTA
    for (of_kind, bound), told in broken.items():
        if of_kind == kind:
            assert len(told.certified) == DRAWS
            assert sum(told.certified) <= most_by_chance(delta), f"{kind} {bound}"


@pytest.mark.parametrize("kind", RISKS)
def test_taking_measurements_at_their_word_breaks_far_more(broken: dict[tuple[str, float], Shares], kind: str) -> None:
    for (of_kind, bound), told in broken.items():
        if of_kind == kind:
            assert np.mean(told.naive) > 0.25, f"{kind} {bound}"
            assert sum(told.naive) > 3 * sum(told.certified), f"{kind} {bound}"


def test_conformal_risk_control_keeps_the_average(broken: dict[tuple[str, float], Shares]) -> None:
    for (kind, bound), told in broken.items():
        if kind != "accuracy":
            noise = 3 * np.std(told.on_average) / np.sqrt(DRAWS)
            assert np.mean(told.on_average) <= bound + noise
            assert np.mean(told.on_average) > 0.6 * bound, "it is not held by never leaving"

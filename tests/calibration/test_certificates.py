"""Certificates: the closed form is the sequential procedure, and what they promise holds."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_calibration.calibrate import CalibrationSettings, certified, operating_points
from offramp_calibration.certificates import RISK_DELTAS, Losses, accuracy_bounds, certify, greatest_risk
from offramp_calibration.greedy import greedy_family
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_contract.budgets import ACCURACY_DELTA, certified_risk, least_samples
from offramp_contract.calibration import OperatingPoint
from offramp_contract.errors import InvalidValue
from scipy.stats import binom

DIGEST = "0" * 64


def walk(counts: Sequence[int], num_samples: int, epsilon: float, delta: float) -> int:
    """Fixed-sequence testing as it is told: stop at the first p-value above delta, return the setting before.

    The first setting is full depth, which needs no test.
    """
    for setting in range(1, len(counts)):
        p_value = binom.cdf(counts[setting], num_samples, epsilon)
        if p_value > delta:
            return setting - 1
    return len(counts) - 1


counts_along_a_walk = st.integers(1, 400).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), min_size=1, max_size=12).map(lambda drawn: [0, *drawn]))
)


@given(counts_along_a_walk, st.floats(0.001, 0.999), st.sampled_from(RISK_DELTAS))
def test_the_bounds_certify_what_the_sequential_walk_returns(
    drawn: tuple[int, list[int]], epsilon: float, delta: float
) -> None:
    num_samples, counts = drawn
    bound_L = Losses(num_samples, np.array(counts), np.array(counts)).ltt_bounds(delta)
    assert int(np.flatnonzero(bound_L <= epsilon).max()) == walk(counts, num_samples, epsilon, delta)


@given(counts_along_a_walk, st.floats(0.001, 0.999))
def test_the_accuracy_bounds_are_those_of_the_walk_over_wrong_answers(
    drawn: tuple[int, list[int]], accuracy: float
) -> None:
    num_samples, wrong = drawn
    bound_L = accuracy_bounds(Losses(num_samples, np.array(wrong), np.array(wrong)), 0.05)
    # Accuracy is no definition: full depth too is tested, so the walk starts before it.
    returned = walk([0, *wrong], num_samples, 1 - accuracy, 0.05) - 1
    assert int((bound_L >= accuracy).sum()) - 1 == returned


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from(RISK_DELTAS))
def test_the_greatest_risk_is_where_the_exact_binomial_tail_is_delta(drawn: tuple[int, int], delta: float) -> None:
    count, num_samples = drawn
    (bound,) = greatest_risk(np.array([count]), num_samples, delta).tolist()
    if count == num_samples:
        assert bound == 1
    else:
        assert binom.cdf(count, num_samples, bound) == pytest.approx(delta, rel=1e-6)


def test_crc_is_the_greatest_setting_that_its_inequality_admits() -> None:
    rng = np.random.default_rng(0)
    loss_LN = [np.zeros(99, bool), *(rng.random(99) < rate for rate in (0.02, 0.01, 0.1, 0.3))]
    losses = Losses.count(loss_LN)
    ever_LN = np.logical_or.accumulate(np.stack(loss_LN))
    for epsilon in (0.01, 0.02, 0.05, 0.2, 0.5):
        admitted = [index for index in range(1, 5) if ever_LN[index].mean() <= (100 * epsilon - 1) / 99 + 1e-12]
        assert (losses.crc_bounds() <= epsilon + 1e-12).sum() == 1 + len(admitted)


def test_full_depth_differs_from_itself_in_nothing_and_needs_no_test(outcomes: Outcomes) -> None:
    family = greedy_family(outcomes.take(slice(0, 1000)), 50)
    first = certify(family, outcomes.take(slice(1000, None)), DIGEST)[0]
    for certificate in first:
        if certificate.kind == "accuracy":
            assert 0.5 < certificate.bound < outcomes.right_NE[1000:, -1].mean()
        else:
            assert certificate.bound == 0


def test_every_setting_says_all_there_is_to_say(outcomes: Outcomes) -> None:
    family = greedy_family(outcomes.take(slice(0, 1000)), 50)
    for setting in certify(family, outcomes.take(slice(1000, None)), DIGEST):
        said = {(certificate.kind, certificate.method, certificate.delta) for certificate in setting}
        assert said == {
            *((kind, "ltt", delta) for kind in ("consistency", "accuracy_loss") for delta in RISK_DELTAS),
            *((kind, "crc", None) for kind in ("consistency", "accuracy_loss")),
            ("accuracy", "ltt", ACCURACY_DELTA),
        }
        assert {certificate.num_samples for certificate in setting} == {1000}
        assert {certificate.data_digest for certificate in setting} == {DIGEST}


def test_promises_loosen_along_the_walk_and_with_certainty(outcomes: Outcomes) -> None:
    family = greedy_family(outcomes.take(slice(0, 1000)), 80)
    certificates = certify(family, outcomes.take(slice(1000, None)), DIGEST)
    bound_LC = np.array([[c.bound for c in setting] for setting in certificates])
    kinds = [c.kind for c in certificates[0]]
    for kind, bound_L in zip(kinds, bound_LC.T, strict=True):
        assert (np.diff(bound_L) * (-1 if kind == "accuracy" else 1) >= 0).all()
    assert (np.diff(bound_LC[:, : len(RISK_DELTAS)], axis=1) <= 0).all(), "a greater delta promises more"
    consistency, accuracy_loss = bound_LC[:, : len(RISK_DELTAS)], bound_LC[:, 4 : 4 + len(RISK_DELTAS)]
    assert (accuracy_loss <= consistency).all(), "who loses a right answer differs"


def points_of(outcomes: Outcomes, num_steps: int = 60) -> list[OperatingPoint]:
    half = len(outcomes) // 2
    rows = np.arange(len(outcomes))
    settings = CalibrationSettings(num_steps=num_steps)
    return list(operating_points(certified(outcomes, rows[:half], rows[half:], DIGEST, settings)))


def test_a_larger_epsilon_never_costs_more(outcomes: Outcomes) -> None:
    points = points_of(outcomes)
    for delta in (*RISK_DELTAS, None):
        computes = [
            certified_risk(points, epsilon, delta).point.compute for epsilon in np.linspace(0.02, 0.4, 30).tolist()
        ]
        assert computes == sorted(computes, reverse=True)
        assert computes[-1] < computes[0]


def test_dropped_settings_are_missed_by_no_promise(outcomes: Outcomes) -> None:
    family = greedy_family(outcomes.take(slice(0, 1000)), 200)
    certificates = certify(family, outcomes.take(slice(1000, None)), DIGEST)
    points = points_of(outcomes, 200)
    assert len(points) < len(family)
    computes = np.array([replay(spec, outcomes).compute for spec in family])
    for epsilon in np.linspace(0.01, 0.4, 40).tolist():
        bounds = np.array([setting[1].bound for setting in certificates])
        cheapest = computes[bounds <= epsilon].min()
        assert certified_risk(points, epsilon, RISK_DELTAS[1]).point.compute == cheapest


@pytest.mark.parametrize(("epsilon", "delta", "least"), [(0.01, 0.1, 230), (0.01, 0.05, 299), (0.01, None, 99)])
def test_too_few_samples_are_refused_with_how_many_it_takes(
    make_outcomes: Callable[..., Outcomes], epsilon: float, delta: float | None, least: int
) -> None:
    assert least_samples(epsilon, delta) == least

    def never_different(num_samples: int) -> list[OperatingPoint]:
        scores = np.random.default_rng(0).normal(size=(2 * num_samples, 3))
        return points_of(make_outcomes(scores), 20)

    enough = certified_risk(never_different(least), epsilon, delta)
    assert enough.point.compute == pytest.approx(1 / 3)
    assert enough.certificate.num_samples == least
    with pytest.raises(InvalidValue, match=rf"at least {least} samples to certify; .* on {least - 1}"):
        certified_risk(never_different(least - 1), epsilon, delta)

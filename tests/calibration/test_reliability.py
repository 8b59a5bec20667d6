import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from offramp_calibration.reliability import (
    LEAST_IN_BIN,
    auroc,
    ece,
    equal_mass_ece,
    nll,
    reliability_bins,
    wilson,
)
from scipy.stats import binomtest

SCORED = st.integers(1, 60).flatmap(
    lambda size: st.tuples(
        hnp.arrays(np.float64, size, elements=st.floats(-20, 60, width=32)), hnp.arrays(np.bool_, size)
    )
)
UNSURE = st.lists(st.tuples(st.floats(-3, 3), st.booleans()), min_size=1, max_size=60).map(
    lambda pairs: (np.array([score for score, _ in pairs]), np.array([right for _, right in pairs]))
)


def logit(probability):
    return math.log(probability / (1 - probability))


def calibrated(num_bins=15, in_bin=2000):
    """Samples of which, at every confidence in the middle of a bin, exactly that share is right."""
    log_odds, right = [], []
    for index in range(num_bins):
        confidence = round((index + 0.5) / num_bins * in_bin) / in_bin
        num_right = round(confidence * in_bin)
        log_odds += [logit(confidence)] * in_bin
        right += [True] * num_right + [False] * (in_bin - num_right)
    return np.array(log_odds), np.array(right)


def ece_by_loop(log_odds, right, num_bins=15):
    confidence = [1 / (1 + math.exp(-one)) for one in log_odds]
    total = 0.0
    for index in range(num_bins):
        low, high = index / num_bins, (index + 1) / num_bins
        inside = [i for i, one in enumerate(confidence) if low < one <= high or (index == 0 and one == 0)]
        if inside:
            said = sum(confidence[i] for i in inside) / len(inside)
            was = sum(bool(right[i]) for i in inside) / len(inside)
            total += len(inside) / len(right) * abs(said - was)
    return total


def auroc_by_pairs(score, right):
    pairs = [(a > b) + 0.5 * (a == b) for a in score[right] for b in score[~right]]
    return sum(pairs) / len(pairs) if pairs else None


def test_a_perfectly_calibrated_exit_has_no_calibration_error():
    log_odds, right = calibrated()
    assert ece(log_odds, right) == pytest.approx(0, abs=1e-9)
    assert equal_mass_ece(reliability_bins(log_odds, right)) == pytest.approx(0, abs=1e-9)


def test_an_exit_that_is_always_sure_and_right_half_the_time_is_off_by_half():
    log_odds, right = np.full(1000, np.inf), np.arange(1000) % 2 == 0
    assert ece(log_odds, right) == pytest.approx(0.5)
    (only,) = reliability_bins(log_odds, right)
    assert (only.confidence, only.accuracy, only.num_samples) == (1.0, 0.5, 1000)


@given(st.one_of(SCORED, UNSURE))
def test_ece_is_what_a_loop_over_bins_counts(scored):
    log_odds, right = scored
    assert ece(log_odds, right) == pytest.approx(ece_by_loop(log_odds, right), abs=1e-6)


@given(SCORED)
def test_auroc_is_the_share_of_pairs_in_order(scored):
    score, right = scored
    assert auroc(score, right) == pytest.approx(auroc_by_pairs(score, right))


@given(SCORED)
def test_auroc_is_symmetric(scored):
    score, right = scored
    forward = auroc(score, right)
    if forward is None:
        assert right.all() or not right.any()
    else:
        assert auroc(-score, right) == pytest.approx(1 - forward)
        assert auroc(score, ~right) == pytest.approx(1 - forward)


def test_auroc_tells_saturated_confidences_apart():
    # All of these probabilities round to 1 in float32; their log-odds do not.
    log_odds = np.array([40.0, 41.0, 42.0, 43.0], dtype=np.float32)
    assert auroc(log_odds, np.array([False, False, True, True])) == 1.0


@given(SCORED)
def test_bins_share_out_all_samples_and_do_not_depend_on_their_order(scored):
    log_odds, right = np.tile(scored[0], 12), np.tile(scored[1], 12)
    bins = reliability_bins(log_odds, right)
    assert sum(one.num_samples for one in bins) == len(right)
    assert sum(one.num_samples * one.accuracy for one in bins) == pytest.approx(right.sum())
    confidences = [one.confidence for one in bins]
    assert confidences == sorted(confidences)
    turned = reliability_bins(log_odds[::-1], right[::-1])
    assert [one.num_samples for one in turned] == [one.num_samples for one in bins]
    assert [one.accuracy for one in turned] == [one.accuracy for one in bins]


def test_bins_are_of_equal_size_where_scores_are_saturated():
    log_odds = np.linspace(20, 60, 1500)
    bins = reliability_bins(log_odds, np.ones(1500, dtype=bool))
    assert [one.num_samples for one in bins] == [100] * 15


def test_few_samples_make_few_bins():
    log_odds = np.linspace(-1, 5, 3 * LEAST_IN_BIN)
    assert len(reliability_bins(log_odds, log_odds > 0)) == 3
    assert len(reliability_bins(log_odds[:3], log_odds[:3] > 0)) == 1


def test_nll_is_worked_out_by_hand():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=np.float32))
    assert nll(logits, np.array([0, 2])) == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=1e-6)


def test_nll_at_a_temperature_is_that_of_the_divided_logits(trace):
    logits, label = trace.logits_ENC[2], trace.label_N
    assert nll(logits, label, 2.5) == pytest.approx(nll(logits / np.float32(2.5), label), rel=1e-6)


def test_nll_of_what_was_ruled_out_is_none():
    assert nll(np.array([[0.0, -np.inf]]), np.array([1])) is None


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilsons_interval_is_scipys(num_right, num_samples):
    num_right = min(num_right, num_samples)
    theirs = binomtest(num_right, num_samples).proportion_ci(0.95, "wilson")
    low, high = wilson(num_right, num_samples)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= low <= num_right / num_samples <= high <= 1


def test_without_samples_nothing_is_known():
    assert wilson(0, 0) == (0.0, 1.0)

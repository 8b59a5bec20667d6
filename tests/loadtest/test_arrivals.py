import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_loadtest.arrivals import due_times_s

RATES = st.floats(1.0, 500.0)
SECONDS = st.floats(0.1, 4.0)


@given(RATES, SECONDS, st.integers(0, 2**32 - 1))
def test_due_times_rise_and_end_before_the_plan_does(rate, seconds, seed):
    times = np.array(list(due_times_s("poisson", rate, seconds, seed)))
    assert (np.diff(times) >= 0).all()
    assert ((times > 0) & (times < seconds)).all()


@given(RATES, SECONDS, st.integers(0, 2**32 - 1))
def test_the_same_seed_gives_the_same_arrivals(rate, seconds, seed):
    first = list(due_times_s("poisson", rate, seconds, seed))
    assert first == list(due_times_s("poisson", rate, seconds, seed))


def test_poisson_gaps_are_exponential():
    gaps = np.diff(list(due_times_s("poisson", 100.0, 200.0, seed=1)))
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > 0.01).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_fixed_arrivals_are_evenly_spaced():
    times = list(due_times_s("fixed", 10.0, 1.0, seed=0))
    np.testing.assert_allclose(np.diff(times), 0.1)
    assert len(times) == 9

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_calibration.curves import Curve, anytime_auc, common_start, gap_closed

POINTS = st.lists(
    st.tuples(st.integers(1, 100).map(lambda n: n / 100), st.integers(0, 100).map(lambda n: n / 100)), min_size=1
)
BUDGETS = st.integers(0, 120).map(lambda n: n / 100)


def best_by_trying_all(points, budget):
    return max((accuracy for cost, accuracy in points if cost <= budget), default=None)


@given(POINTS, BUDGETS)
def test_a_budget_buys_the_best_of_the_points_it_affords(points, budget):
    assert Curve.of(points).accuracy_within(budget) == best_by_trying_all(points, budget)


@given(POINTS, st.integers(0, 100).map(lambda n: n / 100))
def test_an_accuracy_costs_what_the_cheapest_point_that_reaches_it_costs(points, accuracy):
    slow = min((cost for cost, reached in points if reached >= accuracy), default=None)
    assert Curve.of(points).cost_for(accuracy) == slow


@given(POINTS)
def test_a_front_rises_and_holds_only_points_that_were_given(points):
    curve = Curve.of(points)
    assert (np.diff(curve.cost_P) > 0).all()
    assert (np.diff(curve.accuracy_P) > 0).all()
    assert set(zip(curve.cost_P, curve.accuracy_P, strict=True)) <= set(points)


@given(POINTS, BUDGETS, BUDGETS)
def test_an_area_is_the_average_over_fine_budgets(points, low, high):
    curve = Curve.of(points)
    area = curve.area(low, high)
    if low > high or best_by_trying_all(points, low) is None:
        assert area is None
        return
    # Points lie on hundredths, so the middles of hundredths see every step as it is.
    middles = np.arange(round(low * 100), round(high * 100)) / 100 + 0.005
    slow = [best_by_trying_all(points, middle) for middle in middles] or [best_by_trying_all(points, low)]
    assert area == pytest.approx(np.mean(slow), abs=1e-9)


def test_anytime_auc_holds_the_deepest_exit_that_is_done_until_the_next_one_is():
    # 0.5 from 0.2 to 0.5, 0.8 from 0.5 to 1; the last exit is never held: (0.3 * 0.5 + 0.5 * 0.8) / 0.8.
    assert anytime_auc(np.array([0.2, 0.5, 1.0]), np.array([0.5, 0.8, 0.9])) == pytest.approx(0.6875)


def test_anytime_auc_takes_the_deepest_exit_even_where_a_shallower_one_is_better():
    assert anytime_auc(np.array([0.0, 0.5, 1.0]), np.array([0.9, 0.5, 0.9])) == pytest.approx(0.7)


def test_anytime_auc_of_one_exit_is_its_accuracy():
    assert anytime_auc(np.array([1.0]), np.array([0.7])) == 0.7


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_anytime_auc_does_not_depend_on_the_unit_of_cost(accuracies):
    depth_E = np.linspace(0.1, 1.0, len(accuracies)) ** 2
    in_flops, in_ms = (anytime_auc(depth_E * unit, np.array(accuracies)) for unit in (1.0, 7.3))
    assert in_flops == pytest.approx(in_ms)
    assert min(accuracies[:-1]) - 1e-9 <= in_flops <= max(accuracies[:-1]) + 1e-9


def test_curves_are_compared_from_where_all_that_offer_a_choice_have_begun():
    early, late, lone = Curve.of([(0.1, 0.5), (0.6, 0.8)]), Curve.of([(0.3, 0.6), (1.0, 0.9)]), Curve.of([(1.0, 0.9)])
    assert common_start([early, late, lone]) == 0.3
    assert common_start([lone]) == 0.0


@pytest.mark.parametrize(
    ("policy", "oracle", "closed"),
    [(0.4375, 0.25, 0.75), (1.0, 0.2, 0.0), (0.2, 0.2, 1.0), (None, 0.2, None), (0.5, None, None), (0.5, 1.0, None)],
)
def test_the_gap_closed_is_the_share_of_the_oracles_saving_that_is_saved_too(policy, oracle, closed):
    assert gap_closed(1.0, policy, oracle) == closed

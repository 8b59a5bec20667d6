import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from offramp_contract.statistics import (
    MAX_TOP,
    Decision,
    decision_of_logits,
    decision_width,
    log_softmax,
    logit,
    num_top,
)

FLOAT32_NOISE = 2e-6


@st.composite
def logits(draw: st.DrawFn, low: float = -30.0, high: float = 30.0) -> np.ndarray:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(2, 9)))
    return draw(arrays(np.float32, shape, elements=st.floats(low, high, width=32)))


temperatures = st.floats(0.05, 20.0)


def softmax(logits_BC: np.ndarray) -> np.ndarray:
    powers_BC = np.exp(logits_BC.astype(np.float64) - logits_BC.max(axis=1, keepdims=True))
    shares_BC: np.ndarray = powers_BC / powers_BC.sum(axis=1, keepdims=True)
    return shares_BC


def decision(*rows: list[float], temperature: float = 1.0) -> Decision:
    return Decision(decision_of_logits(np.array(rows, dtype=np.float32), temperature))


@pytest.mark.parametrize(
    ("num_classes", "top", "width"), [(2, 2, 7), (4, 4, 11), (5, 5, 13), (6, 5, 13), (1000, 5, 13)]
)
def test_a_decision_holds_three_scores_and_at_most_five_leading_classes(num_classes: int, top: int, width: int) -> None:
    assert num_top(num_classes) == top <= MAX_TOP
    assert decision_width(num_classes) == width
    packed_BD = decision_of_logits(np.zeros((3, num_classes), dtype=np.float32))
    assert packed_BD.shape == (3, width)
    assert packed_BD.dtype == np.float32


def test_the_columns_are_those_of_the_layout() -> None:
    packed_BD = np.array([[1.5, 0.25, 0.5, 0.75, 0.25, 1, 0]], dtype=np.float32)
    read = Decision(packed_BD)
    np.testing.assert_array_equal([read.log_odds_B, read.entropy_B, read.margin_B], [[1.5], [0.25], [0.5]])
    np.testing.assert_array_equal(read.top_probability_BK, [[0.75, 0.25]])
    np.testing.assert_array_equal(read.top_class_BK, [[1, 0]])
    assert read.class_B == [1]
    assert read.class_B.dtype == read.top_class_BK.dtype == np.int32
    assert np.shares_memory(read.log_odds_B, packed_BD)
    assert np.shares_memory(read.top_probability_BK, packed_BD)


@given(logits(), temperatures)
def test_the_leading_probabilities_are_the_largest_of_the_softmax_in_falling_order(
    logits_BC: np.ndarray, temperature: float
) -> None:
    read = Decision(decision_of_logits(logits_BC, temperature))
    p_BC = softmax(logits_BC.astype(np.float64) / temperature)
    expected_BK = -np.sort(-p_BC, axis=1)[:, : num_top(logits_BC.shape[1])]
    np.testing.assert_allclose(read.top_probability_BK, expected_BK, atol=FLOAT32_NOISE)
    np.testing.assert_allclose(np.take_along_axis(p_BC, read.top_class_BK, axis=1), expected_BK, atol=FLOAT32_NOISE)
    assert (np.diff(read.top_probability_BK, axis=1) <= 0).all()


@given(logits(), temperatures)
def test_a_temperature_divides_the_logits(logits_BC: np.ndarray, temperature: float) -> None:
    cooled_BC = logits_BC.astype(np.float64) / temperature
    np.testing.assert_array_equal(decision_of_logits(logits_BC, temperature), decision_of_logits(cooled_BC))


@given(logits(), temperatures, temperatures)
def test_a_higher_temperature_is_never_surer(logits_BC: np.ndarray, one: float, other: float) -> None:
    low, high = sorted((one, other))
    cold, hot = (Decision(decision_of_logits(logits_BC, temperature)) for temperature in (low, high))
    np.testing.assert_array_equal(cold.class_B, hot.class_B)
    assert (hot.log_odds_B <= cold.log_odds_B + 1e-5).all()
    assert (hot.entropy_B >= cold.entropy_B - FLOAT32_NOISE).all()


@given(logits(), st.floats(-1e3, 1e3))
def test_adding_a_constant_to_all_logits_changes_nothing(logits_BC: np.ndarray, shift: float) -> None:
    wide_BC = logits_BC.astype(np.float64).round(3)
    plain, shifted = Decision(decision_of_logits(wide_BC)), Decision(decision_of_logits(wide_BC + shift))
    np.testing.assert_allclose(shifted.packed_BD[:, 1:3], plain.packed_BD[:, 1:3], atol=FLOAT32_NOISE)
    np.testing.assert_allclose(shifted.log_odds_B, plain.log_odds_B, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shifted.top_probability_BK, plain.top_probability_BK, atol=FLOAT32_NOISE)


@given(logits())
def test_entropy_and_margin_lie_between_zero_and_one(logits_BC: np.ndarray) -> None:
    read = Decision(decision_of_logits(logits_BC))
    for scores_B in (read.entropy_B, read.margin_B):
        assert (scores_B >= -FLOAT32_NOISE).all()
        assert (scores_B <= 1 + FLOAT32_NOISE).all()


@given(logits())
def test_entropy_is_shannons_over_its_largest_value(logits_BC: np.ndarray) -> None:
    p_BC = softmax(logits_BC)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_BC = np.where(p_BC > 0, p_BC * np.log(p_BC), 0)
    expected_B = -terms_BC.sum(axis=1) / np.log(p_BC.shape[1])
    np.testing.assert_allclose(Decision(decision_of_logits(logits_BC)).entropy_B, expected_B, atol=FLOAT32_NOISE)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_flat_logits_are_as_unsure_as_can_be(num_classes: int) -> None:
    read = decision([0.0] * num_classes)
    np.testing.assert_allclose(read.entropy_B, 1, rtol=1e-6)
    np.testing.assert_allclose(read.log_odds_B, -np.log(num_classes - 1), rtol=1e-6)
    assert read.margin_B == 0


@given(logits(-12, 12))
def test_log_odds_are_those_of_the_largest_probability(logits_BC: np.ndarray) -> None:
    p_max_B = softmax(logits_BC).max(axis=1)
    read = Decision(decision_of_logits(logits_BC))
    np.testing.assert_allclose(read.log_odds_B, np.log(p_max_B) - np.log1p(-p_max_B), rtol=1e-4, atol=1e-5)


@given(logits())
def test_the_margin_is_the_distance_of_the_two_leading_probabilities(logits_BC: np.ndarray) -> None:
    two_B2 = -np.sort(-softmax(logits_BC), axis=1)[:, :2]
    read = Decision(decision_of_logits(logits_BC))
    np.testing.assert_allclose(read.margin_B, two_B2[:, 0] - two_B2[:, 1], atol=FLOAT32_NOISE)


def test_log_odds_go_on_rising_where_the_probability_rounds_to_one() -> None:
    read = decision([20.0, 0, 0], [30.0, 0, 0], [80.0, 0, 0])
    assert (read.top_probability_BK[:, 0] == 1).all()
    np.testing.assert_allclose(read.log_odds_B, np.array([20, 30, 80]) - np.log(2), rtol=1e-6)


def test_certainty_beyond_floating_point_is_infinite_and_legitimate() -> None:
    read = decision([1e4, 0, 0])
    assert read.log_odds_B == np.inf
    assert read.entropy_B == 0
    assert read.is_finite_B.all()


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    read = decision([1, 3, 3, 0, 3, 1, 1])
    np.testing.assert_array_equal(read.top_class_BK, [[1, 2, 4, 0, 5]])
    assert read.class_B == [1]
    assert read.margin_B == 0


def test_a_class_that_is_masked_out_has_probability_zero_and_no_entropy() -> None:
    masked, plain = decision([2.0, 1.0, -np.inf]), decision([2.0, 1.0])
    assert masked.is_finite_B.all()
    assert masked.top_probability_BK[0, 2] == 0
    np.testing.assert_allclose(masked.log_odds_B, plain.log_odds_B)
    np.testing.assert_allclose(masked.entropy_B * np.log(3), plain.entropy_B * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("broken", [[np.nan, 0, 1], [np.inf, 0, 1], [-np.inf] * 3, [np.nan] * 3])
def test_a_row_that_is_no_number_is_told_from_its_neighbours(broken: list[float]) -> None:
    np.testing.assert_array_equal(decision([1, 2, 3], broken, [0, 0, 0]).is_finite_B, [True, False, True])


@given(logits())
def test_log_softmax_is_a_distribution(logits_BC: np.ndarray) -> None:
    log_p_BC = log_softmax(logits_BC)
    assert log_p_BC.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_p_BC).sum(axis=1), 1)


def test_log_softmax_of_the_largest_float32_does_not_overflow() -> None:
    assert np.isfinite(log_softmax(np.array([[3e38, -3e38]], dtype=np.float32))).all()


@given(st.floats(1e-9, 1 - 1e-9))
def test_logit_undoes_the_logistic_function(probability: float) -> None:
    np.testing.assert_allclose(1 / (1 + np.exp(-logit(np.array(probability)))), probability, rtol=1e-9)


def test_the_log_odds_of_zero_and_one_are_infinite() -> None:
    np.testing.assert_array_equal(logit(np.array([0.0, 0.5, 1.0])), [-np.inf, 0, np.inf])

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.budgets import (
    ACCURACY_DELTA,
    certified_accuracy,
    certified_risk,
    least_samples,
    within_compute,
)
from offramp_contract.calibration import Certificate, OperatingPoint
from offramp_contract.errors import InvalidValue
from offramp_contract.policy_spec import ConfidenceSpec

DIGEST = "a" * 64
MANY = 100_000
tenths = st.integers(1, 10).map(lambda tenth: tenth / 10)


def certificate(kind: str, bound: float, delta: float | None = 0.05, num_samples: int = MANY) -> Certificate:
    method = "crc" if delta is None else "ltt"
    return Certificate.model_validate(
        {"kind": kind, "method": method, "bound": bound, "delta": delta}
        | {"num_samples": num_samples, "data_digest": DIGEST}
    )


def point(name: str, compute: float, accuracy: float, *held: Certificate) -> OperatingPoint:
    return OperatingPoint(
        name=name,
        policy=ConfidenceSpec(threshold=0.5),
        compute=compute,
        accuracy=accuracy,
        exit_rates=(1.0,),
        certificates=held,
    )


certificates = st.builds(
    certificate,
    st.sampled_from(["consistency", "accuracy_loss", "accuracy"]),
    tenths,
    st.sampled_from([0.01, 0.05, 0.1, None]),
)
points = st.builds(
    lambda compute, accuracy, held: point("p", compute, accuracy, *held),
    tenths,
    tenths,
    st.lists(certificates, max_size=3),
)


@given(st.lists(points, max_size=6), tenths)
def test_a_compute_budget_gets_the_most_accurate_point_within_it_and_the_cheapest_of_equals(
    held: list[OperatingPoint], compute: float
) -> None:
    within = [p for p in held if p.compute <= compute]
    if not within:
        with pytest.raises(InvalidValue):
            within_compute(held, compute)
        return
    chosen = within_compute(held, compute)
    assert chosen in within
    assert all(other.accuracy <= chosen.accuracy for other in within)
    assert all(other.compute >= chosen.compute for other in within if other.accuracy == chosen.accuracy)


@given(st.lists(points, min_size=1, max_size=6), tenths, tenths)
def test_more_compute_never_buys_less_accuracy(held: list[OperatingPoint], one: float, other: float) -> None:
    small, large = sorted((one, other))
    if any(p.compute <= small for p in held):
        assert within_compute(held, small).accuracy <= within_compute(held, large).accuracy


@given(st.lists(points, max_size=6), tenths)
def test_an_accuracy_gets_the_cheapest_point_that_is_certified_for_it(
    held: list[OperatingPoint], accuracy: float
) -> None:
    def holds(c: Certificate) -> bool:
        return c.kind == "accuracy" and c.bound >= accuracy and c.delta is not None and c.delta <= ACCURACY_DELTA

    certified = [p for p in held if any(holds(c) for c in p.certificates)]
    if not certified:
        with pytest.raises(InvalidValue):
            certified_accuracy(held, accuracy)
        return
    chosen, reason = certified_accuracy(held, accuracy)
    assert chosen in certified
    assert chosen.compute == min(p.compute for p in certified)
    assert reason in chosen.certificates
    assert holds(reason)


@given(
    st.lists(points, max_size=6),
    tenths.filter(lambda tenth: tenth < 1),
    st.sampled_from([0.01, 0.05, 0.07, 0.1, None]),
    st.sampled_from(["consistency", "accuracy_loss"]),
)
def test_a_risk_gets_the_cheapest_point_whose_one_certificate_holds_both_its_numbers(
    held: list[OperatingPoint], epsilon: float, delta: float | None, kind: Any
) -> None:
    def holds(c: Certificate) -> bool:
        is_sure = c.delta is None if delta is None else c.delta is not None and c.delta <= delta
        return c.kind == kind and c.bound <= epsilon and is_sure

    certified = [p for p in held if any(holds(c) for c in p.certificates)]
    if not certified:
        with pytest.raises(InvalidValue):
            certified_risk(held, epsilon, delta, kind)
        return
    chosen, reason = certified_risk(held, epsilon, delta, kind)
    assert chosen in certified
    assert chosen.compute == min(p.compute for p in certified)
    assert reason in chosen.certificates
    assert holds(reason)


def test_of_equally_accurate_points_the_cheapest_is_chosen_wherever_it_stands() -> None:
    cheap, dear = point("cheap", 0.25, 0.75), point("dear", 0.5, 0.75)
    assert within_compute((cheap, dear), 0.5) == within_compute((dear, cheap), 0.5) == cheap


def test_expected_accuracy_is_no_certificate() -> None:
    lucky, certified = point("lucky", 0.1, 0.99), point("sure", 0.9, 0.95, certificate("accuracy", 0.9))
    assert certified_accuracy((lucky, certified), 0.9).point == certified


def test_two_certificates_that_each_hold_half_hold_nothing() -> None:
    weak = point("a", 0.5, 0.5, certificate("consistency", 0.01, 0.2), certificate("consistency", 0.2, 0.01))
    with pytest.raises(InvalidValue, match=r"best reachable is 0\.2"):
        certified_risk((weak,), 0.05, 0.05)


def test_a_risk_that_so_few_samples_cannot_certify_says_how_many_can() -> None:
    few = point("full", 1.0, 0.9, certificate("consistency", 0.0, 0.1, 200), certificate("consistency", 0.0, None, 200))
    assert certified_risk((few,), 0.05, 0.1).point == few
    with pytest.raises(InvalidValue, match=r"epsilon 0\.01 at delta 0\.1 takes at least 230 samples.* on 200"):
        certified_risk((few,), 0.01, 0.1)
    with pytest.raises(InvalidValue, match=r"epsilon 0\.001 takes at least 999 samples"):
        certified_risk((few,), 0.001)


def test_a_delta_below_all_certificates_is_refused_naming_the_least() -> None:
    held = (point("a", 0.5, 0.5, certificate("consistency", 0.1, 0.05), certificate("consistency", 0.1, 0.01)),)
    with pytest.raises(InvalidValue, match=r"risk\.delta: .* hold at delta 0\.01 or above"):
        certified_risk(held, 0.2, 0.001)


@pytest.mark.parametrize(
    ("epsilon", "delta", "expected"), [(0.01, 0.1, 230), (0.01, 0.05, 299), (0.02, 0.1, 114), (0.01, None, 99)]
)
def test_the_least_number_of_samples_is_the_textbook_one(epsilon: float, delta: float | None, expected: int) -> None:
    assert least_samples(epsilon, delta) == expected


@given(st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_with_the_least_number_of_samples_a_spotless_record_certifies_and_with_one_less_it_does_not(
    epsilon: float, delta: float
) -> None:
    n = least_samples(epsilon, delta)
    p_value = np.exp(n * np.log1p(-epsilon))  # P(Bin(n, epsilon) = 0)
    before = np.exp((n - 1) * np.log1p(-epsilon))
    assert p_value <= delta * (1 + 1e-9)
    assert before > delta * (1 - 1e-9)


@pytest.mark.parametrize(
    ("choose", "field", "best"),
    [
        (lambda held: within_compute(held, 0.1), "compute", "0.25"),
        (lambda held: certified_accuracy(held, 0.99), "accuracy", "0.875"),
        (lambda held: certified_risk(held, 0.001, 0.05), "risk", "0.02"),
    ],
)
def test_what_cannot_be_reached_is_refused_naming_the_best_that_can(
    choose: Callable[[Sequence[OperatingPoint]], object], field: str, best: str
) -> None:
    held = (
        point("a", 0.25, 0.8, certificate("accuracy", 0.75)),
        point("b", 0.5, 0.9, certificate("accuracy", 0.875), certificate("consistency", 0.02)),
        point("c", 0.75, 0.95, certificate("consistency", 0.04)),
    )
    with pytest.raises(InvalidValue) as refused:
        choose(held)
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")
    assert refused.value.message.endswith(f"the best reachable is {best}")
    with pytest.raises(InvalidValue, match=f"{field}: this model has no operating point calibrated for it"):
        choose(())


def test_the_best_reachable_that_is_named_can_be_reached() -> None:
    held = (point("a", 0.123456, 0.8, certificate("accuracy", 0.876543), certificate("consistency", 0.0234567)),)
    assert within_compute(held, 0.1235).name == "a"
    assert certified_accuracy(held, 0.8765).point.name == "a"
    assert certified_risk(held, 0.0235, 0.05).point.name == "a"
    for choose, best in (
        (lambda: within_compute(held, 0.1), "0.1235"),
        (lambda: certified_accuracy(held, 0.9), "0.8765"),
        (lambda: certified_risk(held, 0.01, 0.05), "0.0235"),
    ):
        with pytest.raises(InvalidValue, match=f"best reachable is {best}$"):
            choose()

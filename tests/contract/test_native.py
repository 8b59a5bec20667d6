"""The network's own exit rules: the same side of the same number as in its code, whatever it computes in."""

import math
import operator
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import InvalidValue
from offramp_contract.native import NativeRule, NativeRules, Precision
from offramp_contract.policy import Reason, Seen
from offramp_contract.policy_spec import (
    AllOfSpec,
    FixedSpec,
    NativeSpec,
    PatienceSpec,
    PolicySpec,
    compile_policy,
    parse_policy,
    without_exits,
)
from offramp_contract.statistics import Decision, decision_of_logits

SIGNS = {(True, True): operator.gt, (True, False): operator.ge, (False, True): operator.lt, (False, False): operator.le}


def rule(**changed: Any) -> NativeRule:
    written = {"threshold": 0.8, "above": True, "is_strict": True, "precision": "float32", "is_knob": True}
    return NativeRule(**written | {"sources": ("net.py:7 (if conf > 0.8:)",)} | changed)


KNOB, FIXED, BELOW = rule(), rule(is_knob=False, threshold=0.5, is_strict=False), rule(above=False, threshold=1.5)
RULES = NativeRules((KNOB, FIXED, BELOW))


def leaves(one: NativeRule, threshold: float, score: np.float32) -> bool:
    """Decide a row as the policy does."""
    logits_BC = np.zeros((1, 2), np.float32)
    packed_BD = np.concatenate([decision_of_logits(logits_BC), np.array([[score]], np.float32)], axis=1)
    policy = NativeRules((one,)).policy([threshold])
    (reason,) = policy(Seen(0, Decision(packed_BD), np.zeros((1, 1), np.int32)))
    return bool(reason == Reason.NATIVE)


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[NativeRule, float, np.float32]:
    """Draw a rule, a threshold and a score, most of them neighbours."""
    precision: Precision = draw(st.sampled_from(get_args(Precision)))
    threshold = draw(
        st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.8, 0.1, 0.0, -0.0, 7e4, 1e39])
    )
    with np.errstate(over="ignore"):
        near = np.dtype(precision).type(threshold).astype(np.float32)
    step = draw(st.sampled_from([-np.inf, 0.0, np.inf]))
    score = draw(
        st.just(near if step == 0.0 else np.nextafter(near, np.float32(step))) | st.floats(width=32).map(np.float32)
    )
    if precision == "float16":  # a float16 network has no other scores
        with np.errstate(over="ignore"):
            score = np.float32(np.float16(score))
    return rule(above=draw(st.booleans()), is_strict=draw(st.booleans()), precision=precision), threshold, score


@given(comparisons())
def test_a_row_leaves_where_the_comparison_in_its_own_precision_is_true(
    drawn: tuple[NativeRule, float, np.float32],
) -> None:
    one, threshold, score = drawn
    own = np.dtype(one.precision).type
    if np.isnan(score):
        score = np.float32(-np.inf if one.above else np.inf)  # what a graph hands over for it

    with np.errstate(over="ignore"):
        expected = SIGNS[one.above, one.is_strict](own(score), own(threshold))

    assert leaves(one, threshold, score) == bool(expected)


def test_a_constant_is_rounded_as_the_networks_own_numbers_are() -> None:
    at = np.float32(0.8)  # a little more than 0.8

    assert not leaves(rule(precision="float32"), 0.8, at)
    assert leaves(rule(precision="float32", is_strict=False), 0.8, at)
    assert leaves(rule(precision="float64"), 0.8, at)
    assert not leaves(rule(precision="float16", is_strict=True), 0.8, np.float32(np.float16(0.8)))
    assert leaves(rule(precision="float16", is_strict=False), 0.8, np.float32(np.float16(0.8)))


def test_beyond_the_largest_number_no_score_leaves() -> None:
    for above in (True, False):
        one = rule(precision="float16", above=above)
        assert not leaves(one, 7e4 if above else -7e4, np.float32(np.inf if above else -np.inf))


def test_every_exit_keeps_its_own_threshold_unless_it_is_given_another() -> None:
    def thresholds(threshold: Any) -> list[float | None]:
        policy = compile_policy(NativeSpec(threshold=threshold), 4, RULES)
        return [policy.threshold_at(index) for index in range(4)]

    assert thresholds(None) == [0.8, 0.5, 1.5, None]
    assert thresholds(0.9) == [0.9, 0.5, 0.9, None], "a number speaks for the exits that compare with one"
    assert thresholds((None, None, 2.5)) == [0.8, 0.5, 2.5, None]
    assert thresholds((-3.0, None, None)) == [-3.0, 0.5, 1.5, None]


@pytest.mark.parametrize(
    ("written", "native", "field", "sentence"),
    [
        ({}, None, "policy", "this model has no exit rules of its own; name another kind"),
        ({"threshold": 0.7}, NativeRules((FIXED,)), "threshold", "compare nothing with a constant; leave it out"),
        ({"threshold": [0.7, 0.7, None]}, RULES, "threshold.1", "this exit's rule compares nothing with a constant"),
        ({"threshold": [0.7, None]}, RULES, "threshold", "one number per non-final exit, 3 for this model; got 2"),
        ({"threshold": "high"}, RULES, "threshold", "must be a number"),
        ({"threshold": [None, None, True]}, RULES, "threshold.2", "must be a number"),
        ({"threshold": math.inf}, RULES, "threshold", "finite"),
        ({"patience": 2}, RULES, "patience", "policy 'native' has no such parameter"),
    ],
)
def test_what_the_rules_do_not_have_is_refused(
    written: dict[str, Any], native: NativeRules | None, field: str, sentence: str
) -> None:
    with pytest.raises(InvalidValue, match=r".") as refused:
        compile_policy(parse_policy({"kind": "native"} | written), 4, native)
    assert sentence in refused.value.message
    assert refused.value.field == field


def test_equal_policies_are_one_object_and_rows_that_ask_differently_are_decided_together() -> None:
    assert compile_policy(NativeSpec(threshold=0.9), 4, RULES) is compile_policy(NativeSpec(threshold=0.9), 4, RULES)
    own, given_ = (RULES.policy(threshold) for threshold in (None, 0.4))
    packed_BD = np.concatenate([decision_of_logits(np.zeros((2, 2), np.float32)), [[0.6], [0.6]]], axis=1)

    stacked = type(own).stack([own, given_])

    reasons_B = stacked(Seen(0, Decision(packed_BD.astype(np.float32)), np.zeros((2, 1), np.int32)))
    assert reasons_B.tolist() == [Reason.CONTINUE, Reason.NATIVE]


@pytest.mark.parametrize(
    ("spec", "dropped", "expected"),
    [
        (NativeSpec(), {0}, NativeSpec()),
        (NativeSpec(threshold=0.9), {0}, NativeSpec(threshold=0.9)),
        (NativeSpec(threshold=0.9), {0, 2}, NativeSpec()),
        (NativeSpec(threshold=(0.7, None, 2.0)), {0}, NativeSpec(threshold=(None, 2.0))),
        (NativeSpec(), {0, 1, 2}, FixedSpec(exit=0)),
        (
            AllOfSpec(of=(NativeSpec(threshold=(0.7, None, 2.0)), PatienceSpec())),
            {1},
            AllOfSpec(of=(NativeSpec(threshold=(0.7, 2.0)), PatienceSpec())),
        ),
    ],
)
def test_a_network_without_some_exits_leaves_by_the_rules_of_those_that_stay(
    spec: PolicySpec, dropped: set[int], expected: PolicySpec
) -> None:
    assert without_exits(spec, dropped, 4, RULES) == expected
    compile_policy(expected, 4 - len(dropped), RULES.without_exits(dropped))


def test_a_rule_says_what_it_does() -> None:
    assert [str(one) for one in (KNOB, FIXED, BELOW)] == [
        "where score > 0.8",
        "where the code says so",
        "where score < 1.5",
    ]
    assert str(rule(is_strict=False, above=False)) == "where score <= 0.8"

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.errors import InvalidValue
from offramp_contract.policy import AllOf, Confidence
from offramp_contract.policy_spec import (
    KINDS,
    MAX_EXITS,
    MAX_MEMBERS,
    MAX_NESTING,
    AgreementSpec,
    AllOfSpec,
    AnyOfSpec,
    ConfidenceSpec,
    EntropySpec,
    FixedSpec,
    MarginSpec,
    PatienceSpec,
    PolicySpec,
    WindowSpec,
    compile_policy,
    parse_policy,
)
from pydantic import ValidationError

SENTENCE = re.compile(r"[\w.]+: [a-z].{8,}")
shares = st.floats(0, 1)
thresholds = shares | st.lists(shares, min_size=1, max_size=4)
simple = st.one_of(
    st.fixed_dictionaries({"kind": st.sampled_from(["confidence", "entropy", "margin", "agreement"])}),
    st.fixed_dictionaries({"kind": st.sampled_from(["confidence", "entropy", "margin"]), "threshold": thresholds}),
    st.fixed_dictionaries({"kind": st.just("patience"), "patience": st.integers(1, MAX_EXITS)}),
    st.fixed_dictionaries({"kind": st.just("fixed"), "exit": st.integers(0, MAX_EXITS - 1)}),
    st.fixed_dictionaries({"kind": st.just("window"), "low": st.just(0.25), "high": st.floats(0.25, 1)}),
)


def combination(members: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    of = st.lists(members, min_size=1, max_size=3)
    return st.fixed_dictionaries({"kind": st.sampled_from(["all_of", "any_of"]), "of": of})


written_policies = simple | combination(simple | combination(simple))


def nested(depth: int) -> dict[str, Any]:
    written: dict[str, Any] = {"kind": "margin"}
    for _ in range(depth):
        written = {"kind": "all_of", "of": [written]}
    return written


@pytest.mark.parametrize(
    ("written", "spec"),
    [
        ({"policy": "confidence"}, ConfidenceSpec(threshold=0.9)),
        ({"policy": "confidence", "threshold": 0.5}, ConfidenceSpec(threshold=0.5)),
        ({"policy": "confidence", "threshold": 1}, ConfidenceSpec(threshold=1.0)),
        ({"policy": "margin", "threshold": [0.1, 0.2]}, MarginSpec(threshold=(0.1, 0.2))),
        ({"policy": "entropy"}, EntropySpec(threshold=0.2)),
        ({"policy": "agreement"}, AgreementSpec(threshold=1.0)),
        ({"policy": "patience", "patience": 3}, PatienceSpec(patience=3)),
        ({"policy": {"kind": "fixed", "exit": 0}}, FixedSpec(exit=0)),
        ({"policy": {"kind": "window", "low": 0.1, "high": 0.9}}, WindowSpec(low=0.1, high=0.9)),
        ({"policy": {"kind": "any_of", "of": [{"kind": "patience"}]}}, AnyOfSpec(of=(PatienceSpec(),))),
        ({"policy": ConfidenceSpec(threshold=0.1), "threshold": 0.3}, ConfidenceSpec(threshold=0.3)),
        ({"policy": {"kind": "confidence", "threshold": 0.1}, "threshold": 0.3}, ConfidenceSpec(threshold=0.3)),
    ],
)
def test_a_policy_is_read_as_it_is_written(written: dict[str, Any], spec: PolicySpec) -> None:
    assert parse_policy(**written) == spec


@pytest.mark.parametrize(
    ("written", "field", "says"),
    [
        ({"policy": "nonsense"}, "policy", "one of confidence, entropy"),
        ({"policy": None}, "policy", "one of confidence"),
        ({"policy": 7}, "policy", "one of confidence"),
        ({"policy": ["confidence"]}, "policy", "one of confidence"),
        ({"policy": {}}, "policy", "one of confidence"),
        ({"policy": {"kind": ["confidence"]}}, "policy", "one of confidence"),
        ({"policy": "learned"}, "policy", "one of confidence"),
        ({"policy": "confidence", "threshold": 1.5}, "threshold", "less than or equal to 1"),
        ({"policy": "confidence", "threshold": -0.1}, "threshold", "greater than or equal to 0"),
        ({"policy": "confidence", "threshold": float("nan")}, "threshold", "finite"),
        ({"policy": "confidence", "threshold": float("inf")}, "threshold", "finite"),
        ({"policy": "confidence", "threshold": "0.5"}, "threshold", "must be a number"),
        ({"policy": "confidence", "threshold": True}, "threshold", "must be a number"),
        ({"policy": "confidence", "threshold": {}}, "threshold", "must be a number"),
        ({"policy": "confidence", "threshold": []}, "threshold", "at least 1"),
        ({"policy": "confidence", "threshold": [0.5, 2]}, "threshold.1", "less than or equal to 1"),
        ({"policy": "confidence", "threshold": [0.5, True]}, "threshold.1", "must be a number"),
        ({"policy": "confidence", "threshold": [0.5] * (MAX_EXITS + 1)}, "threshold", "at most 1024"),
        ({"policy": "confidence", "patience": 2}, "patience", "'confidence' has no such parameter"),
        ({"policy": "fixed", "threshold": 0.5}, "exit", "required"),
        ({"policy": "patience", "patience": 0}, "patience", "greater than or equal to 1"),
        ({"policy": "patience", "patience": True}, "patience", "must be a number"),
        ({"policy": "patience", "patience": 1.5}, "patience", "fractional"),
        ({"policy": "patience", "patience": "2"}, "patience", "must be a number"),
        ({"policy": {"kind": "fixed"}}, "exit", "required"),
        ({"policy": {"kind": "fixed", "exit": -1}}, "exit", "greater than or equal to 0"),
        ({"policy": {"kind": "fixed", "exit": False}}, "exit", "must be a number"),
        ({"policy": {"kind": "window", "low": 0.2}}, "high", "required"),
        ({"policy": {"kind": "window", "low": 0.9, "high": 0.1}}, "policy", "low must not be above high"),
        ({"policy": {"kind": "confidence", "margin": 1}}, "margin", "'confidence' has no such parameter"),
        ({"policy": {"kind": "all_of", "of": []}}, "of", "at least 1"),
        ({"policy": {"kind": "all_of"}}, "of", "required"),
        ({"policy": {"kind": "all_of", "of": "margin"}}, "of", "tuple"),
        ({"policy": {"kind": "all_of", "of": [{"kind": "x"}]}}, "of.0", "one of confidence"),
        ({"policy": {"kind": "all_of", "of": [{"threshold": 1}]}}, "of.0", "one of confidence"),
        ({"policy": {"kind": "any_of", "of": [{"kind": "margin"}, 5]}}, "of.1", "valid dictionary"),
        ({"policy": {"kind": "any_of", "of": [{"kind": "margin"}] * (MAX_MEMBERS + 1)}}, "of", "at most 8"),
        (
            {"policy": {"kind": "any_of", "of": [{"kind": "all_of", "of": [{"kind": "margin", "threshold": 3}]}]}},
            "of.0.of.0.threshold",
            "less than or equal to 1",
        ),
        (
            {"policy": {"kind": "any_of", "of": [{"kind": "margin", "patience": 3}]}},
            "of.0.patience",
            "'margin' has no such parameter",
        ),
        ({"policy": nested(MAX_NESTING + 1)}, "policy", "nested at most 3 deep"),
        ({"policy": nested(400)}, "policy", "nested at most 3 deep"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence_that_names_the_field(
    written: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidValue) as refused:
        parse_policy(**written)
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")
    assert SENTENCE.fullmatch(refused.value.message), refused.value.message
    assert says in refused.value.message
    assert refused.value.__context__ is None or refused.value.__suppress_context__, "pydantic's report stays inside"


def test_combinations_nest_as_deep_as_is_allowed_and_no_deeper_however_they_are_made() -> None:
    spec = parse_policy(nested(MAX_NESTING))
    assert isinstance(spec, AllOfSpec)
    with pytest.raises(ValidationError, match="at most 3 deep"):
        AnyOfSpec(of=(spec,))
    with pytest.raises(InvalidValue, match="at most 3 deep"):
        parse_policy({"kind": "any_of", "of": [spec]})


@given(written_policies)
def test_what_is_read_can_be_written_and_read_again(written: dict[str, Any]) -> None:
    spec = parse_policy(written)
    assert parse_policy(spec) is spec
    assert parse_policy(spec.model_dump()) == spec
    assert parse_policy(spec.model_dump(mode="json")) == spec
    assert spec.kind in KINDS


@given(written_policies)
def test_equal_specs_compile_to_the_same_object(written: dict[str, Any]) -> None:
    one, other = parse_policy(written), parse_policy(written)
    assert hash(one) == hash(other)
    try:
        compiled = compile_policy(one, 5)
    except InvalidValue:  # a list of another length, or an exit that five exits do not have
        return
    assert compile_policy(other, 5) is compiled
    assert compiled.kind == one.kind


def test_a_default_that_is_spelled_out_compiles_to_the_same_object() -> None:
    implicit, explicit = parse_policy("confidence"), parse_policy("confidence", threshold=0.9)
    assert compile_policy(implicit, 4) is compile_policy(explicit, 4)
    assert compile_policy(implicit, 4) is not compile_policy(implicit, 5)


def test_a_scalar_threshold_holds_for_every_exit_but_the_final_one() -> None:
    policy = compile_policy(ConfidenceSpec(threshold=0.5), 4)
    assert isinstance(policy, Confidence)
    np.testing.assert_array_equal(policy.threshold_RN, [[0.5, 0.5, 0.5]])


@pytest.mark.parametrize("length", [1, 3])
def test_a_list_of_another_length_than_the_models_is_refused(length: int) -> None:
    with pytest.raises(
        InvalidValue, match=rf"one number per non-final exit, 2 for this model; got {length}"
    ) as refused:
        compile_policy(AllOfSpec(of=(MarginSpec(threshold=(0.5,) * length),)), 3)
    assert refused.value.field == "threshold"


def test_a_fixed_exit_that_the_model_does_not_have_is_refused() -> None:
    compile_policy(FixedSpec(exit=2), 3)
    with pytest.raises(InvalidValue, match="must be 0 to 2") as refused:
        compile_policy(FixedSpec(exit=3), 3)
    assert refused.value.field == "exit"


def test_a_network_of_one_exit_takes_any_scalar_policy() -> None:
    policy = compile_policy(ConfidenceSpec(), 1)
    assert policy.threshold_at(0) is None


def test_a_combination_compiles_its_members() -> None:
    member = ConfidenceSpec(threshold=0.25)
    policy = compile_policy(AllOfSpec(of=(member, PatienceSpec())), 3)
    assert isinstance(policy, AllOf)
    assert policy.members[0] is compile_policy(member, 3)


@pytest.mark.parametrize("name", ["threshold", "kind"])
def test_a_spec_cannot_be_changed(name: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(ConfidenceSpec(), name, 0.1)

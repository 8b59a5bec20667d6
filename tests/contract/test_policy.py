"""Every rule against a slow reading of its definition, one row and one exit at a time."""

import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.policy import Policy, Reason, Seen, decide
from offramp_contract.policy_spec import (
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
    compares_labels,
    compile_policy,
)
from offramp_contract.statistics import Decision, decision_of_logits

# Cut-offs between the values that the logits below can give, so that rounding decides nothing.
CUTS = st.sampled_from([0.0, 0.1234, 0.4111, 0.5777, 0.6789, 0.8123, 0.9321, 0.9987, 1.0])
STEPS = st.integers(-12, 12).map(lambda step: step / 2)


@st.composite
def walks(draw: st.DrawFn, max_rows: int = 5) -> np.ndarray:
    """Logits (E, B, C) of some rows at all exits of a network."""
    shape = draw(st.tuples(st.integers(2, 5), st.integers(1, max_rows), st.integers(2, 4)))
    flat = draw(st.lists(STEPS, min_size=math.prod(shape), max_size=math.prod(shape)))
    return np.array(flat, dtype=np.float32).reshape(shape)


def specs(num_exits: int) -> st.SearchStrategy[PolicySpec]:
    cuts = CUTS | st.lists(CUTS, min_size=num_exits - 1, max_size=num_exits - 1).map(tuple)
    simple = st.one_of(
        st.builds(ConfidenceSpec, threshold=cuts),
        st.builds(EntropySpec, threshold=cuts),
        st.builds(MarginSpec, threshold=cuts),
        st.builds(AgreementSpec, threshold=cuts),
        st.builds(PatienceSpec, patience=st.integers(1, 4)),
        st.builds(FixedSpec, exit=st.integers(0, num_exits - 1)),
        st.tuples(CUTS, CUTS).map(sorted).map(lambda ends: WindowSpec(low=ends[0], high=ends[1])),
    )
    pair = st.lists(simple, min_size=1, max_size=3).map(tuple)
    combined = st.builds(AllOfSpec, of=pair) | st.builds(AnyOfSpec, of=pair)
    nested = st.builds(AnyOfSpec, of=st.tuples(combined, simple)) | st.builds(AllOfSpec, of=st.tuples(simple, combined))
    return simple | combined | nested


@st.composite
def walks_with_specs(draw: st.DrawFn) -> tuple[np.ndarray, list[PolicySpec]]:
    """A walk, and a spec for each of its rows; rows often share one."""
    logits_EBC = draw(walks())
    few = draw(st.lists(specs(len(logits_EBC)), min_size=1, max_size=3))
    return logits_EBC, draw(st.lists(st.sampled_from(few), min_size=logits_EBC.shape[1], max_size=logits_EBC.shape[1]))


def seen_at(logits_EBC: np.ndarray, exit_index: int) -> Seen:
    decisions = [Decision(decision_of_logits(logits_BC)) for logits_BC in logits_EBC[: exit_index + 1]]
    return Seen(exit_index, decisions[-1], np.stack([decision.class_B for decision in decisions], axis=1))


def seen_row(logits_EBC: np.ndarray, exit_index: int, row: int) -> Seen:
    return seen_at(logits_EBC[:, row : row + 1], exit_index)


def deciding_exits(logits_EBC: np.ndarray) -> range:
    return range(len(logits_EBC) - 1)


def first_exit(spec: PolicySpec, logits_EBC: np.ndarray) -> int:
    """Walk one row through the network as the router would."""
    policy = compile_policy(spec, len(logits_EBC))
    leaves = (k for k in deciding_exits(logits_EBC) if policy(seen_row(logits_EBC, k, 0))[0] != Reason.CONTINUE)
    return next(leaves, len(logits_EBC) - 1)


def reference(spec: PolicySpec, logits_EC: list[list[float]], exit_index: int) -> Reason:
    """Read the rule off its definition for one row, in plain Python floats."""
    powers = [math.exp(z - max(logits_EC[exit_index])) for z in logits_EC[exit_index]]
    p = sorted((power / sum(powers) for power in powers), reverse=True)
    labels = [row.index(max(row)) for row in logits_EC[: exit_index + 1]]
    threshold = getattr(spec, "threshold", None)
    cut: Any = threshold[exit_index] if isinstance(threshold, tuple) else threshold
    match spec:
        case ConfidenceSpec():
            fires, reason = p[0] >= cut, Reason.CONFIDENT
        case EntropySpec():
            entropy = -sum(q * math.log(q) for q in p if q > 0) / math.log(len(p))
            fires, reason = entropy <= cut or (cut == 1.0 and math.isclose(entropy, 1.0)), Reason.ENTROPY
        case MarginSpec():
            fires, reason = p[0] - p[1] >= cut, Reason.MARGIN
        case PatienceSpec():
            fires, reason = pabee_counter(labels) >= spec.patience, Reason.PATIENCE
        case AgreementSpec():
            votes = max(labels.count(label) for label in labels)
            fires, reason = len(labels) > 1 and votes / len(labels) >= cut, Reason.AGREEMENT
        case WindowSpec():
            fires, reason = not spec.low <= p[0] <= spec.high, Reason.WINDOW
        case FixedSpec():
            fires, reason = exit_index >= spec.exit, Reason.DEPTH_CAP
        case AllOfSpec():
            reasons = [reference(member, logits_EC, exit_index) for member in spec.of]
            fires, reason = all(reasons), reasons[0]
        case AnyOfSpec():
            reasons = [reference(member, logits_EC, exit_index) for member in spec.of]
            fires, reason = any(reasons), next(filter(None, reasons), Reason.CONTINUE)
    return reason if fires else Reason.CONTINUE


def pabee_counter(labels: list[int]) -> int:
    """Count as PABEE's published loop does: up when the label equals the one before, else back to zero."""
    counter, previous = 0, None
    for label in labels:
        counter = counter + 1 if label == previous else 0
        previous = label
    return counter


@given(walks_with_specs())
def test_every_rule_leaves_when_its_definition_says_so(drawn: tuple[np.ndarray, list[PolicySpec]]) -> None:
    logits_EBC, row_specs = drawn
    for k in deciding_exits(logits_EBC):
        seen = seen_at(logits_EBC, k)
        for row, spec in enumerate(row_specs):
            reasons_B = compile_policy(spec, len(logits_EBC))(seen)
            assert reasons_B.dtype == np.int8
            assert reasons_B.shape == (logits_EBC.shape[1],)
            assert reasons_B[row] == reference(spec, logits_EBC[:, row].tolist(), k), (spec, k)


@given(walks_with_specs())
def test_a_batch_of_mixed_policies_is_decided_as_its_rows_are_one_by_one(
    drawn: tuple[np.ndarray, list[PolicySpec]],
) -> None:
    logits_EBC, row_specs = drawn
    policies = [compile_policy(spec, len(logits_EBC)) for spec in row_specs]
    for k in deciding_exits(logits_EBC):
        alone = [int(policy(seen_row(logits_EBC, k, row))[0]) for row, policy in enumerate(policies)]
        together_B = decide(policies, seen_at(logits_EBC, k))
        assert together_B.dtype == np.int8
        assert together_B.tolist() == alone


@given(walks(), st.lists(CUTS, min_size=2, max_size=2).map(sorted))
def test_a_lower_confidence_threshold_never_raises_the_exit(logits_EBC: np.ndarray, cuts: list[float]) -> None:
    low, high = (first_exit(ConfidenceSpec(threshold=cut), logits_EBC) for cut in cuts)
    assert low <= high


@given(walks(), st.lists(CUTS, min_size=2, max_size=2).map(sorted))
def test_less_is_asked_of_a_row_the_earlier_it_leaves(logits_EBC: np.ndarray, cuts: list[float]) -> None:
    low, high = cuts
    assert first_exit(MarginSpec(threshold=low), logits_EBC) <= first_exit(MarginSpec(threshold=high), logits_EBC)
    assert first_exit(AgreementSpec(threshold=low), logits_EBC) <= first_exit(AgreementSpec(threshold=high), logits_EBC)
    assert first_exit(EntropySpec(threshold=high), logits_EBC) <= first_exit(EntropySpec(threshold=low), logits_EBC)
    exits = [first_exit(PatienceSpec(patience=patience), logits_EBC) for patience in (1, 2, 3)]
    assert exits == sorted(exits)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.integers(1, 5))
def test_patience_counts_as_pabee_does(labels: list[int], patience: int) -> None:
    logits_EBC = np.eye(2, dtype=np.float32)[labels][:, None, :]
    fired = compile_policy(PatienceSpec(patience=patience), 16)(seen_at(logits_EBC, len(labels) - 1))
    assert (fired[0] == Reason.PATIENCE) == (pabee_counter(labels) >= patience)


def test_patience_one_leaves_at_the_second_of_two_equal_labels_and_starts_over_at_a_new_one() -> None:
    logits_EBC = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 2, 2]][:, None, :]
    exits = [first_exit(PatienceSpec(patience=patience), logits_EBC) for patience in (1, 2)]
    assert exits == [2, 5]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_one_vote_agrees_with_nobody(threshold: float) -> None:
    certain = np.array([[[90.0, 0.0]]] * 3, dtype=np.float32)
    assert first_exit(AgreementSpec(threshold=threshold), certain) == 1


def test_agreement_counts_the_leading_label_not_the_latest() -> None:
    logits_EBC = np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 0, 1]][:, None, :]
    assert compile_policy(AgreementSpec(threshold=2 / 3), 9)(seen_at(logits_EBC, 2)) == [Reason.AGREEMENT]
    assert compile_policy(AgreementSpec(threshold=0.67), 9)(seen_at(logits_EBC, 2)) == [Reason.CONTINUE]
    # Two of three voted for 0, then one more for 1: half of four.
    assert compile_policy(AgreementSpec(threshold=0.5), 9)(seen_at(logits_EBC, 3)) == [Reason.AGREEMENT]


def test_a_window_lets_the_undecided_go_on_and_the_sure_and_the_hopeless_leave() -> None:
    rows = np.array([[[0.1, 0, 0], [1.5, 0, 0], [9, 0, 0]]], dtype=np.float32)
    fired = compile_policy(WindowSpec(low=0.5, high=0.9), 2)(seen_at(rows, 0))
    assert fired.tolist() == [Reason.WINDOW, Reason.CONTINUE, Reason.WINDOW]


def test_the_ends_of_a_window_belong_to_it() -> None:
    rows = np.array([[[1e4, 0.0], [0.0, 0.0]]], dtype=np.float32)
    assert compile_policy(WindowSpec(low=0.5, high=1.0), 2)(seen_at(rows, 0)).tolist() == [Reason.CONTINUE] * 2


def test_combinations_of_different_members_stand_in_one_batch() -> None:
    rows = np.array([[[9.0, 0.0], [9.0, 0.0], [0.1, 0.0]]], dtype=np.float32)
    sure, margin = ConfidenceSpec(threshold=0.9), MarginSpec(threshold=0.5)
    combined = [AllOfSpec(of=(sure, margin)), AllOfSpec(of=(margin, sure)), AllOfSpec(of=(margin, sure))]
    fired = decide([compile_policy(spec, 2) for spec in combined], seen_at(rows, 0))
    assert fired.tolist() == [Reason.CONFIDENT, Reason.MARGIN, Reason.CONTINUE]


@given(walks(), st.data())
def test_fixed_leaves_at_its_exit_and_nowhere_else(logits_EBC: np.ndarray, data: st.DataObject) -> None:
    exit_index = data.draw(st.integers(0, len(logits_EBC) - 1))
    assert first_exit(FixedSpec(exit=exit_index), logits_EBC) == exit_index


def test_each_exit_applies_its_own_threshold() -> None:
    logits_EBC = np.array([[[2.0, 0]], [[2.0, 0]], [[2.0, 0]]], dtype=np.float32)
    assert first_exit(ConfidenceSpec(threshold=(0.99, 0.5)), logits_EBC) == 1
    assert first_exit(ConfidenceSpec(threshold=(0.5, 0.99)), logits_EBC) == 0


def test_a_threshold_tells_rows_apart_whose_probability_is_one_in_float32() -> None:
    rows = np.array([[[19.0, 0.0], [22.0, 0.0]]], dtype=np.float32)
    seen = seen_at(rows, 0)
    assert (seen.decision.top_probability_BK[:, 0] == 1).all()
    fired = compile_policy(ConfidenceSpec(threshold=1 - 1e-9), 2)(seen)
    assert fired.tolist() == [Reason.CONTINUE, Reason.CONFIDENT]


def test_threshold_zero_takes_everyone_and_one_nobody() -> None:
    seen = seen_at(np.array([[[0.0, 0.0], [80.0, 0.0], [1e4, 0.0]]], dtype=np.float32), 0)
    assert (compile_policy(ConfidenceSpec(threshold=0.0), 2)(seen) == Reason.CONFIDENT).all()
    assert seen.decision.log_odds_B[-1] == np.inf
    assert (compile_policy(ConfidenceSpec(threshold=1.0), 2)(seen) == Reason.CONTINUE).all()


@pytest.mark.parametrize(
    "spec",
    [ConfidenceSpec(threshold=0.0), EntropySpec(threshold=1.0), MarginSpec(threshold=0.0), WindowSpec(low=1, high=1)],
)
def test_statistics_that_are_no_numbers_fire_no_score_rule(spec: PolicySpec) -> None:
    seen = seen_at(np.array([[[np.nan, 0.0]]], dtype=np.float32), 0)
    assert compile_policy(spec, 2)(seen) == [Reason.CONTINUE]


def masks(kind: type[AllOfSpec] | type[AnyOfSpec], members: Sequence[PolicySpec], logits_EBC: np.ndarray) -> np.ndarray:
    policy = compile_policy(kind(of=tuple(members)), len(logits_EBC))
    return np.array([policy(seen_at(logits_EBC, k)) != Reason.CONTINUE for k in deciding_exits(logits_EBC)])


@given(walks(), st.data())
def test_the_order_of_members_decides_the_reason_but_not_who_leaves(
    logits_EBC: np.ndarray, data: st.DataObject
) -> None:
    members = data.draw(st.lists(specs(len(logits_EBC)), min_size=1, max_size=4))
    shuffled = data.draw(st.permutations(members))
    for kind in (AllOfSpec, AnyOfSpec):
        np.testing.assert_array_equal(masks(kind, members, logits_EBC), masks(kind, shuffled, logits_EBC))


@given(walks(), st.data())
def test_all_of_leaves_no_more_and_any_of_no_fewer_than_each_member(
    logits_EBC: np.ndarray, data: st.DataObject
) -> None:
    members = data.draw(st.lists(st.builds(ConfidenceSpec, threshold=CUTS), min_size=1, max_size=4))
    both, either = masks(AllOfSpec, members, logits_EBC), masks(AnyOfSpec, members, logits_EBC)
    each = [masks(AllOfSpec, [member], logits_EBC) for member in members]
    np.testing.assert_array_equal(both, np.logical_and.reduce(each))
    np.testing.assert_array_equal(either, np.logical_or.reduce(each))


def test_the_reason_of_a_combination_is_its_first_members_that_fires() -> None:
    seen = seen_at(np.array([[[9.0, 0.0], [0.1, 0.0]]], dtype=np.float32), 0)
    sure, margin, never = ConfidenceSpec(threshold=0.9), MarginSpec(threshold=0.9), PatienceSpec(patience=9)
    anyone = AnyOfSpec(of=(never, margin, sure, EntropySpec(threshold=1.0)))
    assert compile_policy(anyone, 2)(seen).tolist() == [Reason.MARGIN, Reason.ENTROPY]
    everyone = AllOfSpec(of=(margin, sure))
    assert compile_policy(everyone, 2)(seen).tolist() == [Reason.MARGIN, Reason.CONTINUE]


@given(st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), specs(n))))
def test_a_compiled_policy_cannot_be_changed(drawn: tuple[int, PolicySpec]) -> None:
    num_exits, spec = drawn
    for policy in leaves_of(compile_policy(spec, num_exits)):
        for field in fields(policy):  # type: ignore[arg-type]
            assert not getattr(policy, field.name).flags.writeable
            with pytest.raises(FrozenInstanceError):
                setattr(policy, field.name, None)


@given(st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), specs(n))))
def test_a_policy_that_compares_no_labels_needs_none(drawn: tuple[int, PolicySpec]) -> None:
    num_exits, spec = drawn
    policy = compile_policy(spec, num_exits)
    assert policy.compares_labels == compares_labels(spec)
    if not policy.compares_labels:
        seen = seen_at(np.array([[[9.0, 0.0], [0.1, 0.0]]], dtype=np.float32), 0)
        blind = Seen(0, seen.decision, np.empty((2, 0), dtype=np.int32))
        assert policy(blind).tolist() == policy(seen).tolist()


def leaves_of(policy: Policy) -> list[Policy]:
    members = getattr(policy, "members", None)
    return [policy] if members is None else [leaf for member in members for leaf in leaves_of(member)]


def test_the_threshold_a_row_is_held_to_is_known_where_it_is_one_number() -> None:
    policy = compile_policy(ConfidenceSpec(threshold=(0.25, 0.75)), 3)
    assert [policy.threshold_at(k) for k in range(3)] == [0.25, 0.75, None]
    assert compile_policy(PatienceSpec(patience=2), 3).threshold_at(0) is None
    combined = AnyOfSpec(of=(EntropySpec(threshold=0.5), ConfidenceSpec()))
    assert compile_policy(combined, 3).threshold_at(1) == 0.5


def test_only_the_deadline_forces_an_exit() -> None:
    assert [reason for reason in Reason if reason.is_forced] == [Reason.DEADLINE]
    assert {reason.label for reason in Reason} == {
        *("continue", "confident", "entropy", "margin", "patience", "learned", "agreement", "window"),
        *("depth_cap", "deadline", "final", "native"),
    }

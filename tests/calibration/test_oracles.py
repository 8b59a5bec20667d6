from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_calibration.oracles import agreement_oracle, label_oracle, label_oracle_curve
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.overthinking import Overthinking
from offramp_calibration.replay import Replayed, replay
from offramp_calibration.sweep import sweeps
from offramp_contract.policy import Reason


def decided(class_NE, label_N):
    """Outcomes of three exits that say so; what they are sure of does not matter here."""
    classes = np.array(class_NE, dtype=np.int32)
    depth_E = np.linspace(1 / classes.shape[1], 1.0, classes.shape[1])
    return Outcomes(np.array(label_N), (None,) * classes.shape[1], classes, depth_E)


BY_HAND = decided([[1, 1, 1], [0, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 2]], [1, 1, 1, 1, 1])

DECIDED = st.integers(1, 30).flatmap(
    lambda num_samples: st.builds(
        decided,
        st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=num_samples, max_size=num_samples),
        st.lists(st.integers(0, 2), min_size=num_samples, max_size=num_samples),
    )
)


def test_the_label_oracle_leaves_at_the_first_right_exit_and_at_the_last_if_none_is():
    replayed = label_oracle(BY_HAND)
    assert replayed.exit_N.tolist() == [0, 1, 1, 0, 2]
    assert replayed.accuracy == 0.8
    assert replayed.reason_N[4] == Reason.FINAL


def test_the_agreement_oracle_leaves_at_the_first_exit_that_says_what_the_last_says():
    replayed = agreement_oracle(BY_HAND)
    assert replayed.exit_N.tolist() == [0, 1, 0, 1, 2]
    assert not replayed.differs_N.any()


@given(DECIDED, st.data())
def test_no_choice_of_exits_is_more_accurate_than_the_label_oracle_or_cheaper_than_its_curve(outcomes, data):
    exit_N = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(outcomes), max_size=len(outcomes))))
    some_choice = Replayed(outcomes, exit_N, np.zeros(len(outcomes), dtype=np.int8))
    assert some_choice.accuracy <= label_oracle(outcomes).accuracy
    least = label_oracle_curve(outcomes).cost_for(some_choice.accuracy - 1e-9)
    assert least is not None
    assert least <= some_choice.compute + 1e-9


@given(DECIDED)
def test_the_label_oracles_curve_ends_at_its_accuracy_and_costs_no_more_than_it(outcomes):
    curve, oracle = label_oracle_curve(outcomes), label_oracle(outcomes)
    assert curve.accuracy_P[-1] == pytest.approx(oracle.accuracy)
    assert curve.cost_P[-1] <= oracle.compute + 1e-9


def test_the_oracles_curve_is_worked_out_by_hand():
    # Two are right at the first exit already; two more cost a third of full depth each; one is never right.
    curve = label_oracle_curve(BY_HAND)
    assert curve.accuracy_P.tolist() == pytest.approx([0.4, 0.6, 0.8])
    assert curve.cost_P.tolist() == pytest.approx([1 / 3, 1 / 3 + 1 / 15, 1 / 3 + 2 / 15])


def test_every_policy_of_a_real_sweep_lies_below_the_oracle(outcomes):
    curve = label_oracle_curve(outcomes)
    for specs in sweeps(outcomes, 12).values():
        for spec in specs:
            replayed = replay(spec, outcomes)
            assert curve.cost_for(replayed.accuracy - 1e-9) <= replayed.compute + 1e-9


def test_the_oracles_curve_reads_in_milliseconds_where_depth_is_milliseconds(outcomes):
    ms_E = np.array([2.0, 3.0, 5.0, 8.0, 9.0])
    curve = label_oracle_curve(replace(outcomes, depth_E=ms_E))
    assert curve.cost_P[0] == pytest.approx(2.0)
    assert curve.cost_P[-1] <= 9.0


def test_overthinking_is_counted_by_hand():
    thinking = Overthinking.of(BY_HAND)
    assert (thinking.wasteful, thinking.destructive, thinking.never_right) == (0.4, 0.4, 0.2)
    assert thinking.lasting == (0.2, 0.2, 0.0)
    assert thinking.lost == (0.2, 0.2, 0.0)


@given(DECIDED)
def test_every_sample_is_first_right_somewhere_or_never(outcomes):
    thinking = Overthinking.of(outcomes)
    assert sum(thinking.lasting) + sum(thinking.lost) + thinking.never_right == pytest.approx(1.0)
    assert sum(thinking.lasting) == pytest.approx(outcomes.right_NE[:, -1].mean())
    assert sum(thinking.lost) == pytest.approx(thinking.destructive)
    assert thinking.wasteful == pytest.approx(sum(thinking.lasting[:-1]))

"""Sweeps: thresholds from the data, in every policy, never where rounding decides; fronts hold only the best."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_calibration.front import Candidate, pareto_front, thin
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_calibration.sweep import LEAST_ENTROPY, LEAST_MARGIN_GAP, OWN, confidence_thresholds, sweeps
from offramp_calibration.thresholds import ALWAYS, MAX_LOG_ODDS, NEVER, confidence_of, cuts_between
from offramp_calibration.trace import Trace
from offramp_contract.native import NativeRule, NativeRules
from offramp_contract.policy_spec import (
    ConfidenceSpec,
    EntropySpec,
    FixedSpec,
    MarginSpec,
    NativeSpec,
    PatienceSpec,
    PolicySpec,
)
from offramp_contract.statistics import Decision


def candidate(compute: float, accuracy: float) -> Candidate:
    return Candidate("fixed", FixedSpec(exit=0), compute, accuracy, (1.0,))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), max_size=60))
def test_a_front_holds_no_beaten_setting_and_beats_all_others(drawn: list[tuple[float, float]]) -> None:
    candidates = [candidate(*values) for values in drawn]
    front = pareto_front(candidates)
    assert [c.compute for c in front] == sorted({c.compute for c in front})
    assert [c.accuracy for c in front] == sorted({c.accuracy for c in front})
    for other in candidates:
        assert any(best.compute <= other.compute and best.accuracy >= other.accuracy for best in front)


@given(st.lists(st.floats(0.01, 1), max_size=80), st.integers(2, 30))
def test_thinning_keeps_the_ends_and_the_limit(computes: list[float], most: int) -> None:
    front = pareto_front([candidate(compute, compute) for compute in computes])
    kept = thin(front, most)
    assert len(kept) <= most
    assert kept == [c for c in front if c in kept]
    assert kept[:1] == front[:1]
    assert kept[-1:] == front[-1:]


@given(st.lists(st.floats(-9, 29, width=32), max_size=40), st.integers(1, 50))
def test_cuts_lie_between_different_scores(drawn: list[float], most: int) -> None:
    score_N = np.array(drawn, dtype=np.float32)
    cuts = cuts_between(score_N, np.linspace(0, 1, most))
    assert cuts.tolist() == sorted(set(cuts.tolist()))
    assert len(cuts) <= max(0, min(most, len(set(drawn)) - 1))
    assert all(score_N.min() < cut < score_N.max() and cut not in score_N for cut in cuts)


@given(st.floats(-20, MAX_LOG_ODDS))
def test_a_confidence_stands_for_its_log_odds(log_odds: float) -> None:
    confidence = confidence_of(log_odds)
    assert 0 < confidence < 1
    assert math.log(confidence) - math.log1p(-confidence) == pytest.approx(
        log_odds, abs=2e-3 if log_odds > 20 else 1e-6
    )


def test_beyond_what_a_probability_can_say_nobody_leaves() -> None:
    assert confidence_of(np.nextafter(MAX_LOG_ODDS, 99)) == 1.0
    assert confidence_of(-math.inf) == 0.0


def test_confidences_reach_from_the_first_exit_to_full_depth_in_even_steps(outcomes: Outcomes) -> None:
    computes = [replay(ConfidenceSpec(threshold=t), outcomes).compute for t in confidence_thresholds(outcomes, 100)]
    assert computes[0] == pytest.approx(outcomes.depth_E[0])
    assert computes[-1] == 1.0
    # A linear grid of 100 probabilities leaves gaps of a fifth of the compute here.
    saturated = 1 - replay(ConfidenceSpec(threshold=confidence_of(MAX_LOG_ODDS)), outcomes).compute
    assert max(np.diff(computes[:-1])) < 0.03
    assert computes[-1] - computes[-2] <= saturated + 1e-9


def test_every_policy_is_swept(outcomes: Outcomes) -> None:
    families = sweeps(outcomes, 60)
    assert set(families) == {
        "fixed",
        "confidence",
        "entropy",
        "margin",
        "agreement",
        "patience",
        "window",
        "patience-and-confidence",
        "patience-or-confidence",
    }
    assert families["fixed"] == [FixedSpec(exit=index) for index in range(4)]
    assert families["patience"] == [PatienceSpec(patience=patience) for patience in range(1, 5)]
    assert all(2 <= len(specs) <= 61 and len(set(specs)) == len(specs) for specs in families.values())


def test_a_networks_own_rules_are_a_family_of_one_and_what_they_compare_is_swept(outcomes: Outcomes) -> None:
    rule = NativeRule(threshold=0.8, above=True, is_strict=True, precision="float32", is_knob=True, sources=("a:1",))
    fixed = rule.model_copy(update={"is_knob": False, "threshold": 0.5})

    def families(*rules: NativeRule) -> dict[str, list[PolicySpec]]:
        scores_N = np.linspace(0, 1, len(outcomes), dtype=np.float32)[:, None]
        scored = [Decision(np.concatenate([decision.packed_BD, scores_N], axis=1)) for decision in outcomes.decision_E]
        decision_E = (*scored[:-1], outcomes.decision_E[-1])
        return sweeps(replace(outcomes, decision_E=decision_E, native=NativeRules(rules)), 20)

    with_knob, without = families(rule, fixed, fixed, fixed), families(fixed, fixed, fixed, fixed)

    assert with_knob[OWN] == without[OWN] == [NativeSpec()]
    assert "native" not in without
    thresholds = [spec.threshold for spec in with_knob["native"] if isinstance(spec, NativeSpec)]
    assert len(thresholds) == 20
    assert all(isinstance(threshold, float) and 0 < threshold < 1 for threshold in thresholds)


def test_statistics_are_not_cut_where_they_are_rounding_noise(outcomes: Outcomes) -> None:
    families = sweeps(outcomes, 200)
    entropies = [spec.threshold for spec in families["entropy"] if isinstance(spec, EntropySpec)]
    margins = [spec.threshold for spec in families["margin"] if isinstance(spec, MarginSpec)]
    assert min(decision.entropy_B.min() for decision in outcomes.decision_E[:-1]) < LEAST_ENTROPY
    assert min(map(float, entropies)) > LEAST_ENTROPY  # type: ignore[arg-type]  # scalars, all of them
    assert max(map(float, margins)) < 1 - LEAST_MARGIN_GAP / 2  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_samples", "num_exits"), [(2, 2), (1, 5), (30, 2), (40, 30)])
def test_small_and_deep_networks_are_swept_too(
    make_trace: Callable[..., Trace], num_samples: int, num_exits: int
) -> None:
    outcomes = Outcomes.of(make_trace(num_samples, num_exits))
    for specs in sweeps(outcomes, 20).values():
        assert specs
        for spec in specs:
            assert 0 < replay(spec, outcomes).compute <= 1


def test_a_network_of_one_exit_has_nothing_to_sweep(make_trace: Callable[..., Trace]) -> None:
    assert sweeps(Outcomes.of(make_trace(20, 1, depth_E=[1.0])), 20) == {}


def test_windows_leave_the_sure_the_hopeless_or_both(outcomes: Outcomes) -> None:
    windows = sweeps(outcomes, 60)["window"]
    assert {(window.low == ALWAYS, window.high == NEVER) for window in windows} == set(product((True, False), repeat=2))
    for window in windows:
        assert window.low < window.high
        if window.low == ALWAYS:  # nobody is hopeless
            confident = ConfidenceSpec(threshold=window.high)
            assert (replay(window, outcomes).exit_N == replay(confident, outcomes).exit_N).all()

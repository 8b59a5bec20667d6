"""The record of numbers: each against a count of its own, and what it refuses and warns of."""

import json
from dataclasses import replace

import numpy as np
import pytest
from offramp_calibration.evaluate import ANY_POLICY, LABEL_ORACLE, SAME_EXIT, evaluate
from offramp_calibration.evaluation import Evaluation, Provenance
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay
from offramp_contract.budgets import certified_accuracy, certified_risk, within_compute
from offramp_contract.errors import BrokenTrace, CalibrationError
from offramp_contract.policy_spec import ConfidenceSpec

MS_E = [0.4, 0.7, 1.1, 1.6, 2.4]


def provenance_of(calibration, trace):
    return Provenance(
        model_digest=calibration.model_digest,
        calibration_digest=calibration.calibration_digest,
        calibration_data_digest=calibration.data_digest,
        calibration_num_samples=calibration.num_samples,
        data="drawn samples",
        data_digest=trace.about.data_digest,
    )


def measured(manifest, calibration, trace, **options):
    return evaluate(trace, manifest, calibration, provenance_of(calibration, trace), **options)


@pytest.fixture(scope="module")
def setting(evaluated):
    return evaluated(num_samples=2000, seed=3)


@pytest.fixture(scope="module")
def evaluation(setting):
    return measured(*setting, milliseconds=MS_E)


def cautions(evaluation):
    return [caution.kind for caution in evaluation.cautions]


def test_every_operating_point_is_measured_by_the_contracts_own_rule(setting, evaluation):
    _, calibration, trace = setting
    outcomes = Outcomes.of(trace, calibration.temperatures)
    assert [point.name for point in evaluation.points] == [point.name for point in calibration.operating_points]
    for point, expected in list(zip(evaluation.points, calibration.operating_points, strict=True))[::7]:
        replayed = replay(expected.policy, outcomes)
        assert point.compute == pytest.approx(replayed.depth_N.mean())
        assert point.accuracy.value == (replayed.class_N == trace.label_N).mean()
        assert point.differs.value == (replayed.class_N != outcomes.class_NE[:, -1]).mean()
        full_right_N = outcomes.class_NE[:, -1] == trace.label_N
        assert point.lost.value == (full_right_N & (replayed.class_N != trace.label_N)).mean()
        assert point.milliseconds == pytest.approx(np.array(MS_E)[replayed.exit_N].mean())
        assert (point.expected_compute, point.expected_accuracy) == (expected.compute, expected.accuracy)


def test_budgets_are_answered_by_the_points_that_the_server_would_choose(setting, evaluation):
    points = setting[1].operating_points
    assert [result.asked for result in evaluation.budgets] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    for result in evaluation.budgets:
        assert result.point.name == within_compute(points, result.asked).name
        assert result.point.name in evaluation.chosen
        assert result.point.compute <= result.asked + 0.03


def test_a_budget_below_the_first_exit_is_refused_as_the_server_refuses_it(setting):
    manifest, calibration, trace = setting
    dear = [point for point in calibration.operating_points if point.compute > 0.45]
    evaluation = measured(manifest, calibration.model_copy(update={"operating_points": tuple(dear)}), trace)
    refused = evaluation.budgets[0]
    assert refused.point is None
    assert "the best reachable is" in refused.refusal


def test_static_exits_and_full_depth_are_the_exits_own_accuracies(setting, evaluation):
    right_NE = Outcomes.of(setting[2], setting[1].temperatures).right_NE
    assert [point.accuracy.value for point in evaluation.static] == right_NE.mean(axis=0).tolist()
    assert [exit_.calibrated.accuracy.value for exit_ in evaluation.exits] == right_NE.mean(axis=0).tolist()
    assert (evaluation.full.compute, evaluation.full.milliseconds) == (1.0, MS_E[-1])


def test_the_label_oracle_closes_all_of_the_gap_and_no_policy_more(evaluation):
    for view in (evaluation.compute, evaluation.milliseconds):
        curves = {curve.name: curve for curve in view.curves}
        assert curves[LABEL_ORACLE].gap_closed == pytest.approx((1.0, 1.0, 1.0))
        for curve in view.curves:
            assert all(gap is None or 0 <= gap <= 1 for gap in curve.gap_closed)
            assert curve.area is None or curve.area <= curves[LABEL_ORACLE].area
        families = [curve for name, curve in curves.items() if name not in (LABEL_ORACLE, ANY_POLICY, SAME_EXIT)]
        assert {"confidence", "entropy", "margin", "patience"} <= {curve.name for curve in families}
        for index, best in enumerate(curves[ANY_POLICY].accuracy_at):
            assert best == max(curve.accuracy_at[index] or 0 for curve in (*families, curves[SAME_EXIT]))


def test_milliseconds_have_the_shape_of_compute_where_they_are_proportional_to_it(setting):
    depths = setting[0].exit_depths
    evaluation = measured(*setting, milliseconds=[5 * depth for depth in depths])
    assert evaluation.milliseconds.anytime_auc == pytest.approx(evaluation.compute.anytime_auc)
    for ours, theirs in zip(evaluation.milliseconds.curves, evaluation.compute.curves, strict=True):
        assert ours.accuracy_at == theirs.accuracy_at
        costs = [None if cost is None else pytest.approx(5 * cost) for cost in theirs.cost_at]
        assert list(ours.cost_at) == costs


def test_without_times_there_are_no_milliseconds_anywhere(setting):
    evaluation = measured(*setting)
    assert evaluation.milliseconds is None
    assert {exit_.milliseconds for exit_ in evaluation.exits} == {None}
    assert {point.milliseconds for point in evaluation.points} == {None}


def test_the_samples_that_reach_an_exit_are_those_that_have_not_left(setting, evaluation):
    _, calibration, trace = setting
    outcomes = Outcomes.of(trace, calibration.temperatures)
    point = within_compute(calibration.operating_points, 0.5)
    assert evaluation.reference.name == point.name
    exit_N = replay(point.policy, outcomes).exit_N
    for index, exit_ in enumerate(evaluation.exits):
        reaching_N = exit_N >= index
        assert exit_.reaching.accuracy.num_samples == reaching_N.sum()
        assert exit_.reaching.accuracy.value == outcomes.right_NE[reaching_N, index].mean()


def test_an_exit_that_nothing_reaches_has_nothing_to_show_there(setting):
    first_only = next(point for point in setting[1].operating_points if point.exit_rates[0] == 1)
    evaluation = measured(*setting, reference=first_only.name)
    assert evaluation.exits[0].reaching.accuracy.num_samples == 2000
    assert [exit_.reaching for exit_ in evaluation.exits[1:]] == [None] * 4


def test_temperatures_lower_the_likelihood_loss_of_every_exit(evaluation):
    for exit_ in evaluation.exits:
        assert exit_.calibrated.nll < exit_.uncalibrated.nll
        assert exit_.calibrated.ece < exit_.uncalibrated.ece


def test_promises_are_those_that_the_server_would_make_and_stand_beside_what_came(setting, evaluation):
    points = setting[1].operating_points
    by_name = {point.name: point for point in evaluation.points}
    assert {promise.kind for promise in evaluation.promises} == {"consistency", "accuracy_loss", "accuracy"}
    for promise in evaluation.promises:
        if promise.kind == "accuracy":
            made = certified_accuracy(points, promise.asked)
            assert promise.held == (by_name[promise.point].accuracy.value >= promise.bound)
        else:
            made = certified_risk(points, promise.asked, promise.delta, promise.kind)
            share = "differs" if promise.kind == "consistency" else "lost"
            assert promise.realised == getattr(by_name[promise.point], share)
            assert promise.held == (promise.realised.value <= promise.bound)
        assert (promise.point, promise.bound) == (made.point.name, made.certificate.bound)
        assert promise.within_noise or not promise.held


def test_certificates_are_counted_one_by_one(setting, evaluation):
    num_certificates = sum(len(point.certificates) for point in setting[1].operating_points)
    assert sum(count.total for count in evaluation.certificates) == num_certificates
    assert all(count.num_held + count.num_refuted <= count.total for count in evaluation.certificates)


def test_certificates_made_for_easier_data_are_seen_to_break(setting):
    manifest, calibration, trace = setting
    rng = np.random.default_rng(0)
    noisy = tuple(logits_NC + 12 * rng.normal(size=logits_NC.shape) for logits_NC in trace.logits_ENC)
    evaluation = measured(
        manifest, calibration, replace(trace, logits_ENC=tuple(logits.astype(np.float32) for logits in noisy))
    )
    broken = [promise for promise in evaluation.promises if not promise.within_noise]
    assert broken
    assert not any(promise.held for promise in broken)
    assert sum(count.num_refuted for count in evaluation.certificates) > 0


def test_examples_are_few_varied_and_what_they_say_they_are(setting, evaluation):
    trace = setting[2]
    groups = {group: [e for e in evaluation.examples if e.group == group] for group in ("early", "late", "cost")}
    assert all(1 <= len(examples) <= 8 for examples in groups.values())
    assert len({example.label for example in groups["early"]}) == len(groups["early"])
    assert all(example.exit_index == 0 and example.prediction == example.label for example in groups["early"])
    assert all(example.exit_index == 4 for example in groups["late"])
    assert all(example.prediction != example.label == example.full_depth for example in groups["cost"])
    for example in evaluation.examples:
        assert example.label == str(trace.label_N[example.index])
        assert 0 <= example.confidence <= 1


def test_a_bundle_without_calibration_still_gives_a_curve_exits_and_oracles_and_says_how_to_calibrate(evaluated):
    manifest, calibration, trace = evaluated(calibrated=False, num_samples=1500)
    evaluation = measured(manifest, calibration, trace)
    assert not evaluation.is_calibrated
    assert not evaluation.budgets
    assert {point.family for point in evaluation.points} == {"confidence"}
    assert 90 <= len(evaluation.points) <= 100
    assert (evaluation.points[0].exit_rates[0], evaluation.points[-1].compute) == (1.0, 1.0)
    assert evaluation.reference.policy == manifest.default_policy == ConfidenceSpec()
    assert cautions(evaluation) == ["not_calibrated"]
    assert "offramp calibrate" in evaluation.cautions[0].sentence


def test_a_bundle_that_meets_the_data_it_was_calibrated_on_is_found_out(setting):
    manifest, calibration, trace = setting
    known = calibration.model_copy(update={"data_digest": trace.about.data_digest})
    evaluation = measured(manifest, known, trace)
    assert evaluation.saw_this_data
    assert cautions(evaluation) == ["same_data"]
    assert not measured(*setting).saw_this_data


def test_few_samples_and_missing_classes_are_said(evaluated):
    manifest, calibration, trace = evaluated(num_samples=60)
    trace.label_N[trace.label_N == 9] = 8
    evaluation = measured(manifest, calibration, trace)
    assert {"few_samples", "missing_classes"} <= set(cautions(evaluation))
    low, high = evaluation.full.accuracy.interval
    (sentence,) = (caution.sentence for caution in evaluation.cautions if caution.kind == "few_samples")
    assert f"{low:.1%} to {high:.1%}" in sentence


def test_data_harder_than_the_calibrations_is_seen_to_exceed_budgets(setting):
    manifest, calibration, trace = setting
    hard = replace(trace, logits_ENC=tuple(logits_NC * np.float32(0.3) for logits_NC in trace.logits_ENC))
    assert "over_budget" in cautions(measured(manifest, calibration, hard))


def test_the_record_reads_back_as_it_was_written(evaluation):
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


def test_the_same_input_gives_the_same_record_without_a_date(setting, evaluation):
    again = measured(*setting, milliseconds=MS_E)
    assert again.to_json() == evaluation.to_json()
    assert not {"date", "time"} & json.loads(evaluation.to_json())["provenance"].keys()


def test_an_unknown_operating_point_is_refused_by_name(setting):
    with pytest.raises(CalibrationError, match="point: this bundle has no operating point 'nonesuch'; it has, among"):
        measured(*setting, reference="nonesuch")


def test_a_trace_of_another_bundle_is_refused(setting):
    manifest, calibration, trace = setting
    with pytest.raises(BrokenTrace, match="another model"):
        measured(manifest.model_copy(update={"name": "other"}), calibration, trace)

"""Measures a bundle on a trace; the same trace, bundle and times give the same record.

Shapes: N = samples, E = exits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from offramp_contract.budgets import within_compute
from offramp_contract.calibration import Calibration, OperatingPoint
from offramp_contract.errors import CalibrationError, InvalidValue
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import ConfidenceSpec, FixedSpec, PolicySpec
from offramp_contract.statistics import FloatArray

from offramp_calibration.about import GateThreshold
from offramp_calibration.advice import Advice
from offramp_calibration.cautions import cautions_of
from offramp_calibration.curves import Curve, anytime_auc, common_start
from offramp_calibration.evaluation import CostView, Evaluation, Provenance
from offramp_calibration.examples import pick_examples
from offramp_calibration.exit_quality import exit_results
from offramp_calibration.gate_results import GateResults, called
from offramp_calibration.gated import GATES
from offramp_calibration.measured import MeasuredPoint, budget_results, chosen_by_budgets, curve_of, summarise
from offramp_calibration.oracles import agreement_oracle, label_oracle, label_oracle_curve
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.overthinking import Overthinking
from offramp_calibration.promises import certificate_counts, promise_results
from offramp_calibration.replay import Replayed, replay
from offramp_calibration.sweep import confidence_thresholds
from offramp_calibration.trace import Trace

NUM_SWEPT: Final = 100
REFERENCE_BUDGET: Final = 0.5
LABEL_ORACLE, AGREEMENT_ORACLE, ANY_POLICY, SAME_EXIT = "label oracle", "agreement oracle", "any policy", "same exit"
DEFAULT_POLICY = "default policy"
STATIC_FAMILY = "fixed"
_NUMBERS = re.compile(r"([-._]?\d+)+$")


def evaluate(
    trace: Trace,
    manifest: Manifest,
    calibration: Calibration,
    provenance: Provenance,
    *,
    milliseconds: Sequence[float] | None = None,
    reference: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    judge: Callable[[Outcomes, PolicySpec], Advice | None] | None = None,
) -> Evaluation:
    """Measure a bundle on a trace.

    Args:
        trace: What every exit said about every sample.
        manifest: The bundle's.
        calibration: The bundle's.
        provenance: For the record.
        milliseconds: Time until each exit's answer at batch 1 on this machine, if known.
        reference: Name of the operating point that exits and examples are shown under; None: what a compute budget
            of one half chooses, or the bundle's default policy if it has no points.
        progress: Is told how many points of how many have been replayed.
        judge: Says which exits pay under the reference's policy; None: nothing is said of it.

    Raises:
        CalibrationError: If no operating point has that name.
        BrokenTrace: If the trace is not one of this bundle.
    """
    trace.check_made_for(manifest)
    for threshold in {point.gate_threshold for point in calibration.operating_points if trace.passes}:
        trace.pass_at(threshold)
    by_threshold = Outcomes.by_threshold(trace, calibration.temperatures)
    outcomes = next(iter(by_threshold.values()))
    chosen, replayed = _reference(reference, manifest, calibration.operating_points, by_threshold, milliseconds)
    points = _points(calibration.operating_points, by_threshold, milliseconds, progress)
    by_name = {point.name: point for point in points}
    exit_names = [exit_.name for exit_ in manifest.exits]
    static = _static(exit_names, outcomes, milliseconds)
    budgets = budget_results(calibration.operating_points, points)
    advice = None if judge is None or chosen.policy is None else judge(outcomes, chosen.policy)
    return Evaluation(
        model=manifest.name,
        num_samples=len(trace),
        num_classes=manifest.exits[-1].num_classes,
        cautions=cautions_of(
            outcomes,
            manifest,
            calibration,
            data_digest=trace.about.data_digest,
            full_accuracy=static[-1].accuracy,
            budgets=budgets,
        ),
        exits=exit_results(
            trace.at(chosen.gate_threshold) if trace.passes else trace,
            calibration.temperatures,
            exit_names,
            milliseconds,
            replayed,
        ),
        static=static,
        label_oracle=_oracle(LABEL_ORACLE, label_oracle, outcomes, milliseconds),
        agreement_oracle=_oracle(AGREEMENT_ORACLE, agreement_oracle, outcomes, milliseconds),
        points=points,
        chosen=tuple(chosen_by_budgets(calibration.operating_points)),
        budgets=budgets,
        compute=_cost_view(outcomes, points, static, None),
        milliseconds=None if milliseconds is None else _cost_view(outcomes, points, static, np.array(milliseconds)),
        overthinking=Overthinking.of(outcomes),
        reference=chosen,
        promises=promise_results(calibration.operating_points, by_name),
        certificates=certificate_counts(calibration.operating_points, by_name),
        examples=pick_examples(replayed, manifest.labels),
        provenance=provenance,
        advice=advice,
        gates=GateResults.of(trace, manifest, by_threshold) if trace.passes else None,
    )


def _static(
    exit_names: Sequence[str], outcomes: Outcomes, milliseconds: Sequence[float] | None
) -> tuple[MeasuredPoint, ...]:
    """Measure the same exit for everyone, for each exit."""
    return tuple(
        MeasuredPoint.of(name, SAME_EXIT, replay(FixedSpec(exit=index), outcomes), milliseconds)
        for index, name in enumerate(exit_names)
    )


def _oracle(
    name: str, choose: Callable[[Outcomes], Replayed], outcomes: Outcomes, milliseconds: Sequence[float] | None
) -> MeasuredPoint | None:
    """Measure an oracle over exits, where the way to them is one and the same."""
    return None if outcomes.depth_NE is not None else MeasuredPoint.of(name, name, choose(outcomes), milliseconds)


def named_point(name: str, points: Sequence[OperatingPoint]) -> OperatingPoint:
    """Find an operating point.

    Raises:
        CalibrationError: If there is none of that name.
    """
    for point in points:
        if point.name == name:
            return point
    has = f"it has, among others, {', '.join(point.name for point in points[:5])}"
    if not points:
        has = "it has none; calibrate it with `offramp calibrate`"
    raise CalibrationError(f"point: this bundle has no operating point {name!r}; {has}")


def _reference(
    name: str | None,
    manifest: Manifest,
    points: Sequence[OperatingPoint],
    by_threshold: Mapping[GateThreshold, Outcomes],
    milliseconds: Sequence[float] | None,
) -> tuple[MeasuredPoint, Replayed]:
    point = named_point(name, points) if name is not None else _middle(points)
    policy = manifest.default_policy if point is None else point.policy
    threshold = None if point is None else point.gate_threshold
    replayed = replay(policy, by_threshold[threshold])
    name, family = (DEFAULT_POLICY, policy.kind) if point is None else (point.name, _family(point))
    measured = MeasuredPoint.of(
        name, family, replayed, milliseconds, policy=policy, expected=point, gate_threshold=threshold
    )
    return measured, replayed


def _middle(points: Sequence[OperatingPoint]) -> OperatingPoint | None:
    try:
        return within_compute(points, REFERENCE_BUDGET)
    except InvalidValue:
        return min(points, key=lambda point: point.compute, default=None)


def _points(
    points: Sequence[OperatingPoint],
    by_threshold: Mapping[GateThreshold, Outcomes],
    milliseconds: Sequence[float] | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[MeasuredPoint, ...]:
    """Replay the operating points, or where there are none a sweep of gate thresholds and confidence thresholds."""
    settings: list[tuple[str, str, PolicySpec, GateThreshold, OperatingPoint | None]] = [
        (point.name, _family(point), point.policy, point.gate_threshold, point) for point in points
    ]
    own = by_threshold[None]
    if not points and own.depth_NE is not None:
        final = FixedSpec(exit=own.num_exits - 1)
        settings += [(called(threshold), GATES, final, threshold, None) for threshold in by_threshold]
    if not points and own.num_exits > 1:
        settings += [
            (f"confidence-{index:03d}", "confidence", ConfidenceSpec(threshold=threshold), None, None)
            for index, threshold in enumerate(confidence_thresholds(own, NUM_SWEPT))
        ]
    measured = []
    for name, family, policy, threshold, expected in settings:
        replayed = replay(policy, by_threshold[threshold])
        measured.append(
            MeasuredPoint.of(
                name, family, replayed, milliseconds, policy=policy, expected=expected, gate_threshold=threshold
            )
        )
        if progress is not None:
            progress(len(measured), len(settings))
    return tuple(measured)


def _family(point: OperatingPoint) -> str:
    """Give how a point was found: its name without the numbers behind it, or else its policy's kind."""
    return _NUMBERS.sub("", point.name) or point.policy.kind


def _cost_view(
    outcomes: Outcomes,
    points: Sequence[MeasuredPoint],
    static: Sequence[MeasuredPoint],
    milliseconds_E: FloatArray | None,
) -> CostView:
    """Read every curve in one kind of cost: the share of full FLOPs, or milliseconds where they are given."""
    cost, cost_E = ("compute", outcomes.depth_E) if milliseconds_E is None else ("milliseconds", milliseconds_E)
    full, accuracy_E = float(cost_E[-1]), np.array([point.accuracy.value for point in static])
    families = dict.fromkeys(point.family for point in points if point.family != STATIC_FAMILY)
    curves: dict[str, Curve] = {}
    if outcomes.depth_NE is None:
        curves[LABEL_ORACLE] = label_oracle_curve(replace(outcomes, depth_E=cost_E))
    if points:
        curves[ANY_POLICY] = curve_of(points, cost)
    curves |= {family: curve_of([point for point in points if point.family == family], cost) for family in families}
    curves[SAME_EXIT] = curve_of(static, cost)
    start = common_start(curves.values())
    return CostView(
        full=full,
        anytime_auc=anytime_auc(cost_E, accuracy_E),
        start=start,
        curves=tuple(
            summarise(
                name,
                curve,
                curves.get(LABEL_ORACLE),
                full_cost=full,
                full_accuracy=float(accuracy_E[-1]),
                start=start,
            )
            for name, curve in curves.items()
        ),
    )

"""The walk of a gated network's settings that certificates are made along, from full depth to ever less.

A setting is a policy and what opens the gates. Full depth is the final exit with every gate open; without another exit
the walk shuts the gates step by step, and where there are exits it goes down the best settings of both.

A network that was trained with gates may be right more often with some shut than at full depth. The tests of accuracy
therefore begin at the setting that is right most often on the samples that choose.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, TypeAlias

from offramp_contract.policy_spec import FixedSpec, PolicySpec
from offramp_contract.statistics import IntArray

from offramp_calibration.about import ALL_OPEN, GateThreshold
from offramp_calibration.certificates import certify_replayed
from offramp_calibration.front import Candidate, pareto_front, telling
from offramp_calibration.greedy import greedy_family
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay

Setting: TypeAlias = tuple[PolicySpec, GateThreshold]
ByThreshold: TypeAlias = Mapping[GateThreshold, Outcomes]

GATES: Final = "gates"
"""The family of settings that leave at the final exit and save by gates alone."""
OWN_GATES: Final = "gates-own"
"""The same with the network's own gate thresholds."""


def certified(
    by_threshold: ByThreshold, rows_a: IntArray, rows_b: IntArray, data_digest: str, num_steps: int
) -> list[Candidate]:
    """Choose a walk on samples A, certify it on samples B, measure it on all; every gate threshold is kept.

    Args:
        by_threshold: What the exits decided, by what opened the gates.
        rows_a: Samples to choose on.
        rows_b: Samples to certify on.
        data_digest: Of all the data, for the record.
        num_steps: At most how many settings the walk may have, where there are exits to choose too.
    """
    chosen_on = {threshold: one.take(rows_a) for threshold, one in by_threshold.items()}
    walk = walk_down(chosen_on, num_steps)
    accuracies = [replay(policy, chosen_on[threshold]).accuracy for policy, threshold in walk]
    held_out = {threshold: one.take(rows_b) for threshold, one in by_threshold.items()}
    certificates = certify_replayed(
        (replay(policy, held_out[threshold]) for policy, threshold in walk),
        data_digest,
        most_accurate=accuracies.index(max(accuracies)),
    )
    measured = [
        replace(_measure(setting, by_threshold), certificates=held)
        for setting, held in zip(walk, certificates, strict=True)
    ]
    kept = measured if _num_exits(by_threshold) == 1 else telling(measured)
    walked = {(candidate.policy, candidate.gate_threshold) for candidate in kept}
    others = [setting for setting in _at_final_exit(by_threshold) if setting not in walked]
    return [*kept, *(_measure(setting, by_threshold) for setting in others)]


def walk_down(by_threshold: ByThreshold, num_steps: int) -> list[Setting]:
    """Choose the walk.

    Args:
        by_threshold: What the exits decided about the samples to choose on; none of them may serve to certify.
        num_steps: At most how many settings, where there are exits to choose too.

    Returns:
        Full depth, and then, without other exits, the gate thresholds rising, the network's own where it costs as much;
        with exits, the settings that no cheaper one beats, the dearest first.
    """
    if _num_exits(by_threshold) == 1:
        return _ladder_down(by_threshold)
    per_threshold = max(2, num_steps // len(by_threshold))
    candidates = [
        Candidate.measure("", policy, outcomes, threshold)
        for threshold, outcomes in by_threshold.items()
        for policy in greedy_family(outcomes, per_threshold)
    ]
    full = _at_final_exit(by_threshold)[0]
    front = [(one.policy, one.gate_threshold) for one in reversed(pareto_front(candidates))]
    return [full, *(setting for setting in front if setting != full)]


def _ladder_down(by_threshold: ByThreshold) -> list[Setting]:
    full, *others = _at_final_exit(by_threshold)
    risen = sorted(((policy, cut) for policy, cut in others if cut is not None), key=lambda setting: setting[1] or 0.0)
    if None not in by_threshold:
        return [full, *risen]
    own = by_threshold[None].mean_depth_E[-1]
    cheaper = (place for place, (_, cut) in enumerate(risen) if by_threshold[cut].mean_depth_E[-1] < own)
    place = next(cheaper, len(risen))
    return [full, *risen[:place], (full[0], None), *risen[place:]]


def _at_final_exit(by_threshold: ByThreshold) -> list[Setting]:
    """Give the final exit at every gate threshold; full depth first."""
    final = FixedSpec(exit=_num_exits(by_threshold) - 1)
    return [(final, ALL_OPEN), *((final, threshold) for threshold in by_threshold if threshold != ALL_OPEN)]


def _measure(setting: Setting, by_threshold: ByThreshold) -> Candidate:
    policy, threshold = setting
    at_end = policy == FixedSpec(exit=_num_exits(by_threshold) - 1)
    family = "certified" if not at_end else OWN_GATES if threshold is None else GATES
    return Candidate.measure(family, policy, by_threshold[threshold], threshold)


def _num_exits(by_threshold: ByThreshold) -> int:
    return by_threshold[ALL_OPEN].num_exits

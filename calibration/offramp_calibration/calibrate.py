"""From a trace to a calibration: temperatures, operating points, certificates.

What is chosen by looking at labels - temperatures, thresholds per exit - is chosen on one part of the samples, A. What
is certified is certified on the other part, B, alone. The gate thresholds of a gated network were chosen by scores of
samples that are always in A.

A bundle has one temperature an exit, whatever the gates do. It is fitted on the pass with the network's own gate
thresholds: these are what the network was trained with, and what serves who asks for nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from offramp_contract.calibration import Calibration, OperatingPoint
from offramp_contract.errors import InvalidValue, UnfitData
from offramp_contract.statistics import FloatArray, IntArray

from offramp_calibration import gated
from offramp_calibration.about import GateThreshold
from offramp_calibration.budgeted_batch import solve
from offramp_calibration.certificates import certify
from offramp_calibration.front import Candidate, pareto_front, telling, thin
from offramp_calibration.gate_ladder import ladder_rows
from offramp_calibration.greedy import greedy_family
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.sweep import OWN, sweeps
from offramp_calibration.temperatures import fit_temperatures
from offramp_calibration.trace import Trace

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of what is being done, how much of it is done, and of how much."""

LEAST_TO_SPLIT: Final = 2
MAX_SETTINGS: Final = 350
"""Of each kind; together they stay below what a calibration may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """How thoroughly to calibrate.

    Attributes:
        seed: Of the split of the samples into A and B.
        fitting_share: Share of the samples in A.
        num_settings: How many settings to try of each policy.
        num_kept: At most how many operating points to keep of each.
        num_budgets: How many budgets to solve for.
        num_steps: At most how many settings the walk has that certificates are made along.
    """

    seed: int = 0
    fitting_share: float = 0.5
    num_settings: int = 200
    num_kept: int = 100
    num_budgets: int = 50
    num_steps: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.fitting_share < 1:
            raise InvalidValue(f"fitting_share must be between 0 and 1; got {self.fitting_share:g}", "fitting_share")
        for name in ("num_settings", "num_kept", "num_budgets", "num_steps"):
            if not 2 <= (value := getattr(self, name)) <= MAX_SETTINGS:
                raise InvalidValue(f"{name} must be 2 to {MAX_SETTINGS}; got {value}", name)


def calibrate(
    trace: Trace,
    settings: CalibrationSettings | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Calibrate the bundle that a trace was recorded from.

    Args:
        trace: Held-out samples, none of which the network was trained on.
        settings: How thoroughly.
        progress: Hears how far it is.

    Raises:
        UnfitData: If the trace has fewer than two samples, or scores that are not numbers.
    """
    settings = settings or CalibrationSettings()
    is_gated = bool(trace.passes)
    rows_a, rows_b = split(len(trace), settings, ladder_rows(len(trace)) if is_gated else None)
    temperatures = fit_temperatures(
        trace.at(None) if is_gated else trace, rows_a, lambda done, total: progress("temperatures", done, total)
    )
    by_threshold = Outcomes.by_threshold(trace, temperatures)
    for outcomes in by_threshold.values():
        _check_numbers(outcomes)
    progress("certificates", 0, 1)
    if is_gated:
        candidates = gated.certified(by_threshold, rows_a, rows_b, trace.about.data_digest, settings.num_steps)
    else:
        (outcomes,) = by_threshold.values()
        candidates = certified(outcomes, rows_a, rows_b, trace.about.data_digest, settings)
    progress("certificates", 1, 1)
    candidates += [*swept(by_threshold, settings, progress), *budgeted(by_threshold, settings, progress)]
    return Calibration(
        model_digest=trace.about.model_digest,
        temperatures=temperatures,
        operating_points=tuple(operating_points(candidates)),
        data_digest=trace.about.data_digest,
        num_samples=len(trace),
    )


def split(
    num_samples: int, settings: CalibrationSettings, choosing: IntArray | None = None
) -> tuple[IntArray, IntArray]:
    """Divide the samples at random into A, to choose on, and B, to certify on.

    Args:
        num_samples: How many there are.
        settings: The seed, and the share of A.
        choosing: Samples that something was chosen on already, and that are in A therefore.

    Raises:
        UnfitData: If there are too few for both.
    """
    if num_samples < LEAST_TO_SPLIT:
        raise UnfitData(f"calibration takes at least {LEAST_TO_SPLIT} samples, and far more to promise anything")
    order = np.random.default_rng(settings.seed).permutation(num_samples)
    num_fitting = min(max(1, round(num_samples * settings.fitting_share)), num_samples - 1)
    if choosing is not None:
        order = np.concatenate([choosing, order[~np.isin(order, choosing)]])
        num_fitting = max(num_fitting, len(choosing))
    return order[:num_fitting], order[num_fitting:]


def swept(
    by_threshold: Mapping[GateThreshold, Outcomes],
    settings: CalibrationSettings,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[Candidate]:
    """Sweep every policy and keep the best settings of each; every early exit of `fixed`, and the network's own.

    Of a gated network every policy is swept at every gate threshold, more coarsely, and early exits compete too.
    """
    num_settings = _share_of(settings.num_settings, len(by_threshold))
    tried = [
        (family, spec, threshold)
        for threshold, outcomes in by_threshold.items()
        for family, specs in sweeps(outcomes, num_settings).items()
        for spec in specs
        if family != OWN or threshold is None
    ]
    measured: dict[str, list[Candidate]] = {}
    for done, (family, spec, threshold) in enumerate(tried, 1):
        candidate = Candidate.measure(family, spec, by_threshold[threshold], threshold)
        measured.setdefault(family, []).append(candidate)
        progress("operating points", done, len(tried))
    for family, candidates in measured.items():
        is_whole = family == OWN or (family == "fixed" and len(by_threshold) == 1)
        yield from candidates if is_whole else thin(pareto_front(candidates), settings.num_kept)


def budgeted(
    by_threshold: Mapping[GateThreshold, Outcomes],
    settings: CalibrationSettings,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[Candidate]:
    """Solve for budgets spread evenly between the first exit's cost and full depth's.

    Of a gated network, at every gate threshold between the costs there, and the best are kept.
    """
    num_budgets = _share_of(settings.num_budgets, len(by_threshold))
    wanted = [
        (threshold, budget)
        for threshold, outcomes in by_threshold.items()
        if outcomes.num_exits > 1
        for budget in _between(outcomes.mean_depth_E, num_budgets)
    ]
    solved = []
    for done, (threshold, budget) in enumerate(wanted, 1):
        solved.append((threshold, solve(by_threshold[threshold], budget).policy))
        progress("budgets", done, len(wanted))
    # Of few samples, or many that score the same, several budgets have the same solution.
    measured = [
        Candidate.measure("budgeted", policy, by_threshold[threshold], threshold)
        for threshold, policy in dict.fromkeys(solved)
    ]
    yield from measured if len(by_threshold) == 1 else thin(pareto_front(measured), settings.num_budgets)


def _between(depth_E: FloatArray, number: int) -> list[float]:
    """Spread so many budgets evenly between the first exit's cost and the last's."""
    budgets: list[float] = np.linspace(float(depth_E[0]), float(depth_E[-1]), number + 2)[1:-1].tolist()
    return budgets


def _share_of(number: int, num_passes: int) -> int:
    """Give how many of a number of settings to try at each gate threshold; together twice as many, to choose from."""
    return number if num_passes == 1 else max(2, min(number, 2 * number // num_passes))


def certified(
    outcomes: Outcomes, rows_a: IntArray, rows_b: IntArray, data_digest: str, settings: CalibrationSettings
) -> list[Candidate]:
    """Choose a walk on samples A, certify it on samples B, measure it on all.

    Of neighbours with the same certificates the earlier, which costs more, is kept only if it is more accurate than all
    that follow.
    """
    walk = greedy_family(outcomes.take(rows_a), settings.num_steps)
    certificates = certify(walk, outcomes.take(rows_b), data_digest)
    measured = [
        replace(Candidate.measure("certified" if index else "fixed", policy, outcomes), certificates=held)
        for index, (policy, held) in enumerate(zip(walk, certificates, strict=True))
    ]
    return telling(measured)


def operating_points(candidates: Sequence[Candidate]) -> Iterator[OperatingPoint]:
    """Name each by its family and its compute in percent, with a number behind where that is taken."""
    taken: Counter[str] = Counter()
    for candidate in candidates:
        name = f"{candidate.family}-{100 * candidate.compute:.1f}"
        taken[name] += 1
        yield OperatingPoint(
            name=name if taken[name] == 1 else f"{name}-{taken[name]}",
            policy=candidate.policy,
            compute=candidate.compute,
            accuracy=candidate.accuracy,
            exit_rates=candidate.exit_rates_E,
            gate_threshold=candidate.gate_threshold,
            certificates=candidate.certificates,
        )


def _check_numbers(outcomes: Outcomes) -> None:
    for index, decision in enumerate(outcomes.decision_E):
        if not decision.is_finite_B.all():
            row = int(np.argmin(decision.is_finite_B))
            raise UnfitData(f"exit {index}: its scores for sample {row} are not numbers")

"""From a trace to a calibration: temperatures, operating points, certificates.

What is chosen by looking at labels - temperatures, thresholds per exit - is chosen on one part of the samples, A. What
is certified is certified on the other part, B, alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from offramp_contract.calibration import Calibration, OperatingPoint
from offramp_contract.errors import InvalidValue, UnfitData
from offramp_contract.statistics import IntArray

from offramp_calibration.budgeted_batch import solve
from offramp_calibration.certificates import certify
from offramp_calibration.front import Candidate, pareto_front, thin
from offramp_calibration.greedy import greedy_family
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.sweep import sweeps
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
    rows_a, rows_b = split(len(trace), settings)
    temperatures = fit_temperatures(trace, rows_a, lambda done, total: progress("temperatures", done, total))
    outcomes = Outcomes.of(trace, temperatures)
    _check_numbers(outcomes)
    progress("certificates", 0, 1)
    candidates = certified(outcomes, rows_a, rows_b, trace.about.data_digest, settings)
    progress("certificates", 1, 1)
    candidates += [*swept(outcomes, settings, progress), *budgeted(outcomes, settings, progress)]
    return Calibration(
        model_digest=trace.about.model_digest,
        temperatures=temperatures,
        operating_points=tuple(operating_points(candidates)),
        data_digest=trace.about.data_digest,
        num_samples=len(trace),
    )


def split(num_samples: int, settings: CalibrationSettings) -> tuple[IntArray, IntArray]:
    """Divide the samples at random into A, to choose on, and B, to certify on.

    Raises:
        UnfitData: If there are too few for both.
    """
    if num_samples < LEAST_TO_SPLIT:
        raise UnfitData(f"calibration takes at least {LEAST_TO_SPLIT} samples, and far more to promise anything")
    order = np.random.default_rng(settings.seed).permutation(num_samples)
    num_fitting = min(max(1, round(num_samples * settings.fitting_share)), num_samples - 1)
    return order[:num_fitting], order[num_fitting:]


def swept(
    outcomes: Outcomes, settings: CalibrationSettings, progress: Progress = lambda stage, done, total: None
) -> Iterator[Candidate]:
    """Sweep every policy and keep the best settings of each; of `fixed`, every early exit."""
    families = sweeps(outcomes, settings.num_settings)
    total = sum(map(len, families.values()))
    done = 0
    for family, specs in families.items():
        measured = []
        for spec in specs:
            measured.append(Candidate.measure(family, spec, outcomes))
            progress("operating points", done := done + 1, total)
        yield from measured if family == "fixed" else thin(pareto_front(measured), settings.num_kept)


def budgeted(
    outcomes: Outcomes, settings: CalibrationSettings, progress: Progress = lambda stage, done, total: None
) -> Iterator[Candidate]:
    """Solve for budgets spread evenly between the first exit's cost and full depth's."""
    if outcomes.num_exits == 1:
        return
    policies = []
    budgets = np.linspace(outcomes.depth_E[0], 1.0, settings.num_budgets + 2)[1:-1].tolist()
    for index, budget in enumerate(budgets):
        policies.append(solve(outcomes, budget).policy)
        progress("budgets", index + 1, len(budgets))
    # Of few samples, or many that score the same, several budgets have the same solution.
    for policy in dict.fromkeys(policies):
        yield Candidate.measure("budgeted", policy, outcomes)


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
        Candidate.measure("certified" if index else "fixed", policy, outcomes, held)
        for index, (policy, held) in enumerate(zip(walk, certificates, strict=True))
    ]
    on_front = pareto_front(measured)
    return [
        candidate
        for candidate, following in zip(measured, [*measured[1:], None], strict=True)
        if following is None or candidate.certificates != following.certificates or candidate in on_front
    ]


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
            certificates=candidate.certificates,
        )


def _check_numbers(outcomes: Outcomes) -> None:
    for index, decision in enumerate(outcomes.decision_E):
        if not decision.is_finite_B.all():
            row = int(np.argmin(decision.is_finite_B))
            raise UnfitData(f"exit {index}: its scores for sample {row} are not numbers")

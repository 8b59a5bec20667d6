"""How good each exit is: how often right, how honest about it, and how well its confidence tells right from wrong.

Shapes: N = samples, E = exits, M = some of the samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from offramp_contract.statistics import BoolArray

from offramp_calibration.measured import Proportion
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.reliability import Bin, auroc, ece, equal_mass_ece, nll, reliability_bins
from offramp_calibration.replay import Replayed
from offramp_calibration.trace import Trace


@dataclass(frozen=True, slots=True)
class Quality:
    """One exit's confidence on some samples.

    Attributes:
        nll: Average -ln p of the right class, in nats; None if one was given probability 0.
        ece: Expected calibration error over 15 bins of equal width.
        equal_mass_ece: The same over `bins`.
        auroc: Probability that a right answer is surer than a wrong one; None without both kinds.
        bins: Equally many samples each, the least sure first.
    """

    accuracy: Proportion
    nll: float | None
    ece: float
    equal_mass_ece: float
    auroc: float | None
    bins: tuple[Bin, ...]

    @classmethod
    def of(cls, trace: Trace, outcomes: Outcomes, exit_index: int, temperature: float, rows_N: BoolArray) -> Self:
        """Measure an exit at a temperature on the samples that a mask keeps, at least one.

        Args:
            trace: What was recorded.
            outcomes: What it comes to at that temperature.
            exit_index: Which exit.
            temperature: Its temperature.
            rows_N: The samples.
        """
        rows_M = np.flatnonzero(rows_N)
        right_M = outcomes.right_NE[rows_M, exit_index]
        log_odds_M = outcomes.decision_E[exit_index].log_odds_B[rows_M]
        bins = reliability_bins(log_odds_M, right_M)
        return cls(
            accuracy=Proportion.of(right_M),
            nll=nll(trace.logits_ENC[exit_index][rows_M], outcomes.label_N[rows_M], temperature),
            ece=ece(log_odds_M, right_M),
            equal_mass_ece=equal_mass_ece(bins),
            auroc=auroc(log_odds_M, right_M),
            bins=bins,
        )


@dataclass(frozen=True, slots=True)
class ExitResult:
    """One exit.

    Attributes:
        depth: Share of the full path's FLOPs that have run, on average, when a sample stands at it.
        milliseconds: Time until its answer at batch 1, if known.
        temperature: The bundle's.
        uncalibrated: On all samples at a temperature of 1.
        calibrated: On all samples at its temperature.
        reaching: On the samples that reach it under the report's operating point; None if none does.
    """

    name: str
    depth: float
    milliseconds: float | None
    temperature: float
    uncalibrated: Quality
    calibrated: Quality
    reaching: Quality | None


def exit_results(
    trace: Trace,
    temperatures: Sequence[float],
    names: Sequence[str],
    milliseconds_E: Sequence[float] | None,
    replayed: Replayed,
) -> tuple[ExitResult, ...]:
    """Measure every exit.

    Args:
        trace: What was recorded, of a gated network at the gate threshold of the report's operating point.
        temperatures: One a exit.
        names: One a exit.
        milliseconds_E: Time until each exit's answer, if known.
        replayed: Where samples leave under the report's operating point, at these temperatures.
    """
    uncalibrated, calibrated, everyone_N = Outcomes.of(trace), replayed.outcomes, np.ones(len(trace), dtype=bool)
    results = []
    for index, (name, temperature) in enumerate(zip(names, temperatures, strict=True)):
        reaching_N = replayed.exit_N >= index
        results.append(
            ExitResult(
                name=name,
                depth=float(calibrated.mean_depth_E[index]),
                milliseconds=None if milliseconds_E is None else float(milliseconds_E[index]),
                temperature=temperature,
                uncalibrated=Quality.of(trace, uncalibrated, index, 1.0, everyone_N),
                calibrated=Quality.of(trace, calibrated, index, temperature, everyone_N),
                reaching=Quality.of(trace, calibrated, index, temperature, reaching_N) if reaching_N.any() else None,
            )
        )
    return tuple(results)

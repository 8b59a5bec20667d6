"""Are certificates broken no more often than they say, and how often is a naive choice wrong?

    python calibration/benchmarks/certificates_hold.py trace.npz

Takes the samples of a recorded trace for a population whose true risks are known. Draws calibration data from it many
times (with replacement: independent samples of this population), certifies anew each time, and compares what a request
would get with the truth over the whole population. Beside it stands the naive choice: the cheapest point whose risk,
as measured on the samples that certify, is within the bound.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from offramp_calibration import Outcomes, Replayed, Trace, replay
from offramp_calibration.calibrate import CalibrationSettings, certified, operating_points, split
from offramp_calibration.temperatures import fit_temperatures
from offramp_contract.budgets import ACCURACY_DELTA, certified_accuracy, certified_risk
from offramp_contract.calibration import OperatingPoint
from offramp_contract.errors import InvalidValue
from rich.console import Console
from rich.progress import track
from rich.table import Table

DELTA = 0.1
EPSILONS = (0.02, 0.05, 0.1)
BELOW_FULL_DEPTH = (0.02, 0.03, 0.05)


RISKS: dict[str, Callable[[Replayed], float]] = {
    "consistency": lambda replayed: float(replayed.differs_N.mean()),
    "accuracy_loss": lambda replayed: float(replayed.lost_N.mean()),
    "accuracy": lambda replayed: 1 - replayed.accuracy,
}


def main(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    draws: Annotated[int, typer.Option(min=1)] = 200,
    samples: Annotated[int, typer.Option(min=2)] = 2000,
) -> None:
    """Draw, certify, compare."""
    recorded = Trace.read(trace)
    if recorded.passes:
        raise typer.BadParameter("it is of a network with gates, whose walk goes over gate thresholds, not exits")
    # Of no draw, so that they favour none.
    population = Outcomes.of(recorded, fit_temperatures(recorded, np.arange(len(recorded))))
    full_depth = float(population.right_NE[:, -1].mean())
    promises = [(kind, epsilon) for kind in ("consistency", "accuracy_loss") for epsilon in EPSILONS]
    promises += [("accuracy", 1 - full_depth + below) for below in BELOW_FULL_DEPTH]
    broken: defaultdict[tuple[str, float], list[tuple[bool, bool, bool]]] = defaultdict(list)
    for seed in track(range(draws), "drawing", console=Console(stderr=True)):
        drawn = population.take(np.random.default_rng(seed).integers(len(population), size=samples))
        for promise, verdict in judge(drawn, population, promises, CalibrationSettings(seed=seed)):
            broken[promise].append(verdict)
    show(broken)


def judge(
    drawn: Outcomes, population: Outcomes, promises: list[tuple[str, float]], settings: CalibrationSettings
) -> list[tuple[tuple[str, float], tuple[bool, bool, bool]]]:
    """Give for every promise whether it was given at all, whether it was broken, and whether the naive choice was."""
    rows_a, rows_b = split(len(drawn), settings)
    points = list(operating_points(certified(drawn, rows_a, rows_b, "0" * 64, settings)))
    held_out = drawn.take(rows_b)
    measured = [(point, replay(point.policy, held_out)) for point in points]
    verdicts = []
    for kind, bound in promises:

        def is_wrong(point: OperatingPoint | None, kind: str = kind, bound: float = bound) -> bool:
            return point is not None and RISKS[kind](replay(point.policy, population)) > bound

        asked = ask(points, kind, bound)
        within = [point for point, replayed in measured if RISKS[kind](replayed) <= bound]
        naive = min(within, key=lambda point: point.compute, default=None)
        verdicts.append(((kind, bound), (asked is not None, is_wrong(asked), is_wrong(naive))))
    return verdicts


def ask(points: list[OperatingPoint], kind: str, bound: float) -> OperatingPoint | None:
    """Ask as a request does; None if it is refused."""
    try:
        if kind == "accuracy":
            return certified_accuracy(points, 1 - bound).point
        return certified_risk(points, bound, DELTA, kind).point  # type: ignore[arg-type]  # one of the two risks
    except InvalidValue:
        return None


def show(broken: dict[tuple[str, float], list[tuple[bool, bool, bool]]]) -> None:
    """Print the shares."""
    table = Table("promise", "delta", "given", "broken", "naive choice wrong", box=None)
    for (kind, bound), verdicts in broken.items():
        given, wrong, naive = np.mean(verdicts, axis=0)
        promise = f"{kind} at least {1 - bound:.3f}" if kind == "accuracy" else f"{kind} at most {bound:g}"
        delta = ACCURACY_DELTA if kind == "accuracy" else DELTA
        table.add_row(promise, f"{delta:.0%}", f"{given:.0%}", f"{wrong:.1%}", f"{naive:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

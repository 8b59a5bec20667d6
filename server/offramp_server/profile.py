"""How long a stage takes at a batch size, on this machine, through the serving path.

Measured at warm-up and kept current by a running estimate: mean and mean deviation, as TCP estimates its round-trip
time (Jacobson 1988; RFC 6298). Milliseconds belong to the machine, so a profile is never part of a bundle.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

MEAN_GAIN = 1 / 16
DEVIATION_GAIN = 1 / 16
DEVIATIONS = 4.0
LEAST_DEVIATION = 0.02
OUTLIER = 4.0
ROW_GAIN = 1 / 64
PEAK_SHARE = 0.95
REFRESH_EVERY = 16
REFRESH_KNEE_EVERY = 256


@dataclass(slots=True)
class _Point:
    """The estimate at one profiled batch size: seconds, and the mean relative deviation from them."""

    batch: int
    mean_s: float
    deviation: float


class StageProfile:
    """The running estimate for one stage.

    Args:
        max_batch: Largest batch size to reckon with.
        on_change: Called when the estimate has changed by more than a few dispatches can change it.
    """

    def __init__(self, max_batch: int, on_change: Callable[[], None] = lambda: None) -> None:
        self._points: list[_Point] = []
        self._max_batch = max_batch
        self._num_observed = 0
        self._knee = 1
        self._predictions: dict[int, tuple[float, float]] = {}
        self._on_change = on_change

    def calibrate(self, batch: int, seconds: Sequence[float]) -> None:
        """Add a profiled batch size, larger than those before, from several timed runs."""
        middle = max(median(seconds), 1e-9)
        deviation = fmean(abs(s - middle) for s in seconds) / middle
        self._points.append(_Point(batch, middle, max(deviation, LEAST_DEVIATION)))
        self._settle(0)
        self._knee = self._find_knee()
        self._on_change()

    def observe(self, batch: int, seconds: float) -> None:
        """Take a dispatch into account.

        The profiled sizes on both sides of `batch` move by the same ratio. A single slow run (another process took the
        core) counts as at most `OUTLIER` times the prediction: a lasting change still gets through, a blip does not.
        """
        ratio = min(seconds / self.mean_s(batch), OUTLIER)
        neighbours = self._neighbours(batch)
        for point in neighbours:
            point.deviation += DEVIATION_GAIN * (abs(ratio - 1.0) - point.deviation)
            point.deviation = max(point.deviation, LEAST_DEVIATION)
            point.mean_s *= 1.0 + MEAN_GAIN * (ratio - 1.0)
        self._settle(self._points.index(neighbours[0]))
        self._num_observed += 1
        if self._num_observed % REFRESH_EVERY == 0:
            self._on_change()
        if self._num_observed % REFRESH_KNEE_EVERY == 0:
            self._knee = self._find_knee()

    def mean_s(self, batch: int) -> float:
        """Expect this many seconds at a batch size: linear between profiled sizes, and beyond the last."""
        return self._predict(batch)[0]

    def bound_s(self, batch: int) -> float:
        """Expect rarely more than this many seconds: mean + 4 mean deviations."""
        return self._predict(batch)[1]

    def _predict(self, batch: int) -> tuple[float, float]:
        # The scheduler asks a dozen times per round for the same few sizes.
        known = self._predictions.get(batch)
        if known is None:
            mean_s = self._interpolate(batch)
            deviation = max(point.deviation for point in self._neighbours(batch))
            known = self._predictions[batch] = (mean_s, mean_s * (1.0 + DEVIATIONS * deviation))
        return known

    def _interpolate(self, batch: int) -> float:
        points = self._points
        if len(points) == 1 or batch <= points[0].batch:
            return points[0].mean_s * max(batch / points[0].batch, 1.0)
        index = next((i for i, point in enumerate(points) if point.batch >= batch), len(points) - 1)
        low, high = points[index - 1], points[index]
        slope = (high.mean_s - low.mean_s) / (high.batch - low.batch)
        return low.mean_s + slope * (batch - low.batch)

    def _settle(self, fresh: int) -> None:
        """Keep the means from falling with the batch size: what one point has just learnt holds for its neighbours."""
        points = self._points
        for larger, smaller in pairwise(reversed(points[: fresh + 1])):
            smaller.mean_s = min(smaller.mean_s, larger.mean_s)
        for smaller, larger in pairwise(points[fresh:]):
            larger.mean_s = max(larger.mean_s, smaller.mean_s)
        self._predictions = {}

    @property
    def knee(self) -> int:
        """The least batch size that reaches 95 % of the stage's best throughput."""
        return self._knee

    @property
    def measured(self) -> dict[int, float]:
        """Expected seconds at each profiled batch size."""
        return {point.batch: point.mean_s for point in self._points}

    def _neighbours(self, batch: int) -> list[_Point]:
        above = next((i for i, point in enumerate(self._points) if point.batch >= batch), len(self._points) - 1)
        exact = self._points[above].batch == batch or above == 0
        return [self._points[above]] if exact else self._points[above - 1 : above + 1]

    def _find_knee(self) -> int:
        sizes = range(1, self._max_batch + 1)
        peak = max(size / self.mean_s(size) for size in sizes)
        return next(size for size in sizes if size / self.mean_s(size) >= PEAK_SHARE * peak)


class Profile:
    """The estimates for every stage of one model, and what follows from them.

    Args:
        exit_stages: For each exit, the stage whose graph computes it, in order.
        num_stages: Number of stages.
        max_batch: Largest batch size to reckon with.
        gated_stages: Those that a row may do without.
    """

    def __init__(
        self, exit_stages: Sequence[int], num_stages: int, max_batch: int, gated_stages: Collection[int] = ()
    ) -> None:
        trunk = [stage for stage in range(num_stages) if stage not in gated_stages]
        self._next_exit_stage = [next(s for s in exit_stages if s >= stage) for stage in range(num_stages)]
        self._next_trunk_stage = [next(s for s in trunk if s >= stage) for stage in range(num_stages)]
        # Of trunk before each exit, by batch size: deep networks have a hundred stages there, and it is asked for a
        # dozen times a round.
        self._behind_s: dict[int, dict[int, dict[int, float]]] = {stage: {} for stage in exit_stages}
        self.stages = [
            StageProfile(max_batch, self._behind_s[last].clear) if stage in trunk else StageProfile(max_batch)
            for stage, last in enumerate(self._next_exit_stage)
        ]
        self._open_rates = dict.fromkeys(gated_stages, 1.0)
        self._row_s: float | None = None

    def bound_s(self, stage: int, batch: int) -> float:
        """Expect one dispatch of a stage to rarely take more than this many seconds."""
        return self.stages[stage].bound_s(batch)

    def to_next_answer_s(self, stage: int, batch: int) -> float:
        """Expect a row waiting at `stage` to need rarely more than this many seconds to its next exit.

        That is the least it must run: every gate behind `stage` can be shut.
        """
        own_s, last = self.stages[stage].bound_s(batch), self._next_exit_stage[stage]
        if stage == last:
            return own_s
        behind_s = self._behind_s[last].get(batch)
        if behind_s is None:
            behind_s = self._behind_s[last][batch] = self._sum_behind(last, batch)
        return own_s + behind_s[stage]

    def _sum_behind(self, last: int, batch: int) -> dict[int, float]:
        """For each stage before an exit, the seconds of the trunk behind it up to there."""
        total_s, behind_s = 0.0, {}
        for stage in range(last, -1, -1):
            if self._next_exit_stage[stage] != last:
                break
            behind_s[stage] = total_s
            total_s += 0.0 if self.is_gated(stage) else self.stages[stage].bound_s(batch)
        return behind_s

    def is_gated(self, stage: int) -> bool:
        """Whether a row may do without a stage."""
        return stage in self._open_rates

    def trunk_from(self, stage: int) -> int:
        """The first stage from `stage` on that no row may do without."""
        return self._next_trunk_stage[stage]

    def open_rate(self, stage: int) -> float:
        """The share of rows that have run a stage lately, of those that came to it; 1 for trunk."""
        return self._open_rates.get(stage, 1.0)

    def observe_gates(self, skipped: Sequence[int], following: int, num_rows: int) -> None:
        """Take into account that so many rows have skipped some gated stages and run the following one next."""
        keep = (1 - ROW_GAIN) ** num_rows
        for stage in skipped:
            self._open_rates[stage] *= keep
        if following in self._open_rates:
            self._open_rates[following] = 1 - (1 - self._open_rates[following]) * keep

    def first_answer_stage(self) -> int:
        """The stage that ends in exit 0."""
        return self._next_exit_stage[0]

    def knee(self, stage: int) -> int:
        """The batch size beyond which a stage gains nothing worth waiting for."""
        return self.stages[stage].knee

    @property
    def row_s(self) -> float:
        """Device seconds that a row takes on average, early exits included; full depth until rows were seen."""
        if self._row_s is None:
            return sum(stage.mean_s(stage.knee) / stage.knee for stage in self.stages)
        return self._row_s

    def observe_row(self, seconds: float) -> None:
        """Take the device seconds of one answered row into account."""
        self._row_s = self.row_s + (seconds - self.row_s) * ROW_GAIN

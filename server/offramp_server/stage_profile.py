"""How long one stage takes at a batch size, on this machine, through the serving path.

Measured at warm-up and kept current by a running estimate: mean and mean deviation, as TCP estimates its round-trip
time (Jacobson 1988; RFC 6298). Milliseconds belong to the machine, so a profile is never part of a bundle.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, median

MEAN_GAIN = 1 / 16
DEVIATION_GAIN = 1 / 16
DEVIATIONS = 4.0
LEAST_DEVIATION = 0.02
OUTLIER = 4.0
PEAK_SHARE = 0.95
REFRESH_EVERY = 16
TRIAL_EVERY = 8
"""One dispatch in so many tries a batch beyond the knee, if enough rows wait: sizes that are never run would never be
known better than the warm-up knew them. Rows take hardly longer in a batch that is larger than it need be."""


class StageProfile:
    """The running estimate for one stage.

    Args:
        max_batch: Largest batch size to reckon with.
        batch_sizes: The sizes that the stage is ever run at, ascending: a batch is padded to the next of them, and
            takes as long. None if it runs at any size.
        on_change: Called when the estimate has changed by more than a few dispatches can change it.
    """

    def __init__(
        self,
        max_batch: int,
        batch_sizes: Sequence[int] | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._sizes: list[int] = []
        self._mean_s: list[float] = []
        self._deviation: list[float] = []
        self._max_batch = max_batch
        self._padded_sizes = batch_sizes
        self._num_observed = 0
        self._observed_last: list[int] = []
        self._tried_last = 0
        self._knee = 1
        self._predictions: dict[int, tuple[float, float]] = {}
        self._neighbours: dict[int, tuple[int, int]] = {}
        self._on_change = on_change

    def calibrate(self, batch: int, seconds: Sequence[float]) -> None:
        """Add a profiled batch size, larger than those before, from several timed runs."""
        middle = max(median(seconds), 1e-9)
        deviation = fmean(abs(s - middle) for s in seconds) / middle
        self._sizes.append(batch)
        self._mean_s.append(max(middle, self._mean_s[-1]) if self._mean_s else middle)
        self._deviation.append(max(deviation, LEAST_DEVIATION))
        self._observed_last.append(0)
        self._neighbours.clear()
        self._predictions.clear()
        self._find_knee()
        self._on_change()

    def observe(self, batch: int, seconds: float) -> None:
        """Take a dispatch into account.

        The profiled sizes on both sides of `batch` move by the same ratio. A single slow run (another process took the
        core) counts as at most `OUTLIER` times the prediction: a lasting change still gets through, a blip does not.
        """
        change = min(seconds / self._predict(batch)[0], OUTLIER) - 1.0
        self._num_observed += 1
        if batch > self._knee:
            self._tried_last = self._num_observed
        low, high = self._around(self.padded(batch))
        for place in (low,) if low == high else (low, high):
            deviation = self._deviation[place]
            deviation += DEVIATION_GAIN * (abs(change) - deviation)
            self._deviation[place] = deviation if deviation > LEAST_DEVIATION else LEAST_DEVIATION
            self._mean_s[place] *= 1.0 + MEAN_GAIN * change
            self._observed_last[place] = self._num_observed
        self._settle(low, high)
        self._predictions.clear()
        if self._num_observed % REFRESH_EVERY == 0:
            self._on_change()
            self._find_knee()

    def mean_s(self, batch: int) -> float:
        """Expect this many seconds at a batch size: linear between profiled sizes, and beyond the last."""
        return self._predict(batch)[0]

    def bound_s(self, batch: int) -> float:
        """Expect rarely more than this many seconds: mean + 4 mean deviations."""
        return self._predict(batch)[1]

    @property
    def knee(self) -> int:
        """The least batch size that reaches 95 % of the stage's best throughput."""
        return self._knee

    @property
    def measured(self) -> dict[int, float]:
        """Expected seconds at each profiled batch size."""
        return dict(zip(self._sizes, self._mean_s, strict=True))

    def padded(self, batch: int) -> int:
        """The size that a batch is run at: the next one that the device has, or its own."""
        sizes = self._padded_sizes
        if sizes is None or batch > sizes[-1]:
            return batch
        return sizes[bisect_left(sizes, batch)]

    def fill(self, num_waiting: int) -> int:
        """Choose how many of the rows that wait run together, up to the knee.

        Where batches are padded, a few rows beyond a size cost as much as the whole next size: they stay if the rows
        below do better without them.
        """
        size = num_waiting if num_waiting < self._knee else self._knee
        sizes = self._padded_sizes
        if sizes is None or size < sizes[0]:
            return size
        below = sizes[bisect_left(sizes, size + 1) - 1]
        return below if self.rate(below) > self.rate(size) else size

    def trial(self, num_waiting: int) -> int | None:
        """Give the size beyond the knee that was run longest ago, if it is time to try one that so many rows fill."""
        if num_waiting <= self._knee or self._num_observed + 1 - self._tried_last < TRIAL_EVERY:
            return None
        places = [place for place, size in enumerate(self._sizes) if self._knee < size <= num_waiting]
        return self._sizes[min(places, key=self._observed_last.__getitem__)] if places else None

    def rate(self, batch: int) -> float:
        """Rows per second at a batch size."""
        return batch / self._predict(batch)[0]

    def efficiency(self, batch: int) -> float:
        """The share of its best throughput that the stage reaches at a batch size; from the knee on, all of it."""
        if batch >= self._knee:
            return 1.0
        share = self.rate(batch) / self.rate(self._knee)
        return 1.0 if share >= PEAK_SHARE else share

    def _predict(self, batch: int) -> tuple[float, float]:
        # The scheduler asks several times per round for the same few sizes.
        known = self._predictions.get(batch)
        if known is None:
            size = self.padded(batch)
            low, high = self._around(size)
            mean_s = self._interpolate(size, low, high)
            deviation = max(self._deviation[low], self._deviation[high])
            known = self._predictions[batch] = (mean_s, mean_s * (1.0 + DEVIATIONS * deviation))
        return known

    def _interpolate(self, size: int, low: int, high: int) -> float:
        """Lay a line through two profiled sizes; with only one, seconds are in proportion beyond it."""
        first_s, first = self._mean_s[low], self._sizes[low]
        if low == high:
            return first_s * max(size / first, 1.0)
        slope = (self._mean_s[high] - first_s) / (self._sizes[high] - first)
        return first_s + slope * (size - first)

    def _around(self, size: int) -> tuple[int, int]:
        """Places of the profiled sizes on both sides; the same one twice if it is that size, or none is smaller."""
        known = self._neighbours.get(size)
        if known is None:
            above = min(bisect_left(self._sizes, size), len(self._sizes) - 1)
            alone = self._sizes[above] == size or above == 0
            known = self._neighbours[size] = (above, above) if alone else (above - 1, above)
        return known

    def _settle(self, low: int, high: int) -> None:
        """Keep the means from falling with the batch size: what one size has just learnt holds for its neighbours."""
        mean_s = self._mean_s
        for place in range(low, 0, -1):
            if mean_s[place - 1] <= mean_s[place]:
                break
            mean_s[place - 1] = mean_s[place]
        for place in range(high + 1, len(mean_s)):
            if mean_s[place] >= mean_s[place - 1]:
                break
            mean_s[place] = mean_s[place - 1]

    def _find_knee(self) -> None:
        """Find the least size near the best throughput.

        Between two sizes that are run or profiled, throughput only rises or only falls: the best is at one of them, and
        the knee in the first stretch that ends near it.
        """
        ends = sorted({1, *(size for size in self._padded_sizes or self._sizes if size <= self._max_batch)})
        ends = ends if ends[-1] == self._max_batch else [*ends, self._max_batch]
        target = PEAK_SHARE * max(self.rate(end) for end in ends)
        self._knee = 1
        if self.rate(1) < target:
            low, high = next(stretch for stretch in pairwise(ends) if self.rate(stretch[1]) >= target)
            self._knee = low + 1 + bisect_left(range(low + 1, high), True, key=lambda size: self.rate(size) >= target)

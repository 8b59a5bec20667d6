"""Histograms for Prometheus whose values are counted many at a time: observing one is putting it on a list.

The client library counts each value when it comes, with two locks and half a dozen calls. An answer is observed four
times, and a dispatch three times more, on the threads that people wait for. Here the values of a series lie in a list
until it is read, or until there are `FOLD_AT` of them, and are sorted into their buckets together.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

FOLD_AT: Final = 1024
"""Values that lie uncounted at most, in each series: this bounds their memory."""


class HistogramSeries:
    """The values of one combination of labels. Thread-safe.

    Args:
        bounds: Upper bounds of the buckets, ascending, each inclusive; the last bucket has none.
    """

    __slots__ = ("_bounds", "_counts", "_lock", "_sum", "_values")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds, dtype=np.float64)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._values: list[float] = []
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Take a value into account."""
        self._values.append(value)
        if len(self._values) >= FOLD_AT:
            self._fold()

    def observe_all(self, values: Iterable[float]) -> None:
        """Take several values into account."""
        self._values.extend(values)
        if len(self._values) >= FOLD_AT:
            self._fold()

    def read(self) -> tuple[list[int], float]:
        """Give how many values are in each bucket or in one below it, the one without a bound last, and their sum."""
        self._fold()
        with self._lock:
            return np.cumsum(self._counts).tolist(), self._sum

    def _fold(self) -> None:
        with self._lock:
            values = self._values[:]
            # Others may have added some since: only what was taken goes.
            del self._values[: len(values)]
            if values:
                places = np.searchsorted(self._bounds, values, side="left")
                self._counts += np.bincount(places, minlength=len(self._counts))
                self._sum += float(np.sum(values))


class Histogram:
    """A histogram with labels; a collector of the registry that it is given.

    Args:
        name: Of the metric.
        text: What it measures.
        label_names: Of every series.
        registry: Where it is registered.
        bounds: Upper bounds of the buckets, ascending.
    """

    def __init__(
        self,
        name: str,
        text: str,
        label_names: Sequence[str],
        *,
        registry: CollectorRegistry,
        bounds: Sequence[float],
    ) -> None:
        self._name, self._text, self._label_names = name, text, tuple(label_names)
        self._bounds = tuple(bounds)
        self._written = [*map(floatToGoString, bounds), "+Inf"]
        self._series: dict[tuple[str, ...], HistogramSeries] = {}
        registry.register(self)

    def labels(self, *values: str) -> HistogramSeries:
        """Give the series of these labels, new and empty if there is none; one value per name, in order."""
        if len(values) != len(self._label_names):
            raise ValueError(f"{self._name} has {len(self._label_names)} labels; got {len(values)}")
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = HistogramSeries(self._bounds)
        return series

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Forget the series that carry these labels, among others."""
        wanted = [(self._label_names.index(name), value) for name, value in labels.items()]
        gone = [key for key in self._series if all(key[place] == value for place, value in wanted)]
        for key in gone:
            del self._series[key]

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Give the metric without its series, by which the registry knows its name."""
        yield self._family()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Give the metric as it stands now."""
        family = self._family()
        for key, series in list(self._series.items()):
            counts, total = series.read()
            buckets = list(zip(self._written, map(float, counts), strict=True))
            family.add_metric(key, buckets, total)
            if (
                self._bounds[0] < 0
            ):  # of values below 0 it leaves out the sum, which may fall, and the count, which cannot
                family.add_sample(
                    f"{self._name}_count", dict(zip(self._label_names, key, strict=True)), float(counts[-1])
                )
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._text, labels=self._label_names)

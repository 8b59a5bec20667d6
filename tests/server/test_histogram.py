"""Histograms that count many values at a time show what the client library's would have shown."""

import threading

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_server.histogram import FOLD_AT, Histogram
from prometheus_client import CollectorRegistry, generate_latest

values = st.lists(st.integers(-40, 400).map(lambda eighth: eighth / 8), max_size=40)  # sums are exact, in any order
bounds = st.lists(st.integers(-24, 200).map(lambda eighth: eighth / 8), min_size=1, max_size=6, unique=True).map(sorted)


def shown(registry):
    """Give an exposition without the creation times that the library adds."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


@given(bounds=bounds, first=values, second=values, other=values)
def test_every_series_is_what_the_library_shows(bounds, first, second, other):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram("h", "text", ("model", "stage"), registry=ours, bounds=bounds)
    reference = prometheus_client.Histogram("h", "text", ("model", "stage"), registry=theirs, buckets=bounds)
    for several, label in ((first, "a"), (other, "b"), (second, "a")):
        mine.labels("m", label).observe_all(several)
        for value in several:
            reference.labels("m", label).observe(value)
        reference.labels("m", label)
        assert shown(ours) == shown(theirs)


def test_one_value_at_a_time_is_the_same_as_several():
    one, several = (
        Histogram("h", "text", (), registry=CollectorRegistry(), bounds=(1.0, 2.0)).labels() for _ in range(2)
    )
    for value in (0.5, 1.0, 1.5, 9.0):
        one.observe(value)
    several.observe_all([0.5, 1.0, 1.5, 9.0])
    assert one.read() == several.read() == ([2, 3, 4], 12.0)


def test_values_that_nobody_reads_do_not_pile_up():
    series = Histogram("h", "text", (), registry=CollectorRegistry(), bounds=(1.0,)).labels()
    for _ in range(5 * FOLD_AT + 3):
        series.observe(0.5)
        assert len(series._values) < FOLD_AT
    series.observe_all([2.0] * FOLD_AT)
    assert len(series._values) < FOLD_AT
    assert series.read() == ([5 * FOLD_AT + 3, 6 * FOLD_AT + 3], (5 * FOLD_AT + 3) * 0.5 + FOLD_AT * 2.0)


def test_nothing_is_lost_or_counted_twice_when_others_read_meanwhile():
    series = Histogram("h", "text", (), registry=CollectorRegistry(), bounds=(1.0,)).labels()
    num_threads, num_values = 4, 20_000
    go = threading.Barrier(num_threads + 1)

    def observe():
        go.wait()
        for _ in range(num_values):
            series.observe(0.5)

    threads = [threading.Thread(target=observe) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    go.wait()
    last = 0
    while any(thread.is_alive() for thread in threads):
        counts, total = series.read()
        assert counts[-1] >= last
        assert total == counts[-1] * 0.5
        last = counts[-1]
    for thread in threads:
        thread.join()
    assert series.read() == ([num_threads * num_values] * 2, num_threads * num_values * 0.5)


def test_series_go_by_some_of_their_labels():
    registry = CollectorRegistry()
    histogram = Histogram("h", "text", ("model", "version", "stage"), registry=registry, bounds=(1.0,))
    for key in (("a", "1", "x"), ("a", "1", "y"), ("a", "2", "x"), ("b", "1", "x")):
        histogram.labels(*key).observe(0.5)
    histogram.remove_by_labels({"model": "a", "version": "1"})
    left = {(s.labels["model"], s.labels["version"]) for family in registry.collect() for s in family.samples}
    assert left == {("a", "2"), ("b", "1")}
    assert histogram.labels("a", "1", "x").read() == ([0, 0], 0.0)


def test_a_label_too_few_is_refused():
    histogram = Histogram("h", "text", ("model", "version"), registry=CollectorRegistry(), bounds=(1.0,))
    with pytest.raises(ValueError, match="h has 2 labels; got 1"):
        histogram.labels("a")


def test_a_registry_refuses_a_second_metric_of_the_name():
    registry = CollectorRegistry()
    Histogram("h", "text", (), registry=registry, bounds=(1.0,))
    with pytest.raises(ValueError, match="Duplicated"):
        Histogram("h", "text", (), registry=registry, bounds=(1.0,))

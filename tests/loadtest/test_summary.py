import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_loadtest.metrics import ServerSide
from offramp_loadtest.summary import OUTCOMES, Record, summarise
from offramp_loadtest.targets import Answer


@st.composite
def records(draw):
    due_s = draw(st.floats(0.0, 10.0))
    sent_s = due_s + draw(st.floats(0.0, 1.0))
    outcome = draw(st.sampled_from(OUTCOMES))
    answer = None
    if outcome == "ok":
        depth = draw(st.floats(0.1, 1.0))
        answer = Answer(draw(st.integers(0, 3)), "exit_0", "confident", draw(st.booleans()), depth, 1.0, 2.0)
    return Record(due_s, sent_s, sent_s + draw(st.floats(0.0, 2.0)), outcome, draw(st.integers(0, 3)), answer)


@given(st.lists(records(), min_size=1, max_size=50), st.floats(1.0, 3000.0))
def test_every_arrival_is_counted_once_and_goodput_never_exceeds_what_it_is_part_of(drawn, slo_ms):
    summary = summarise(drawn, 10.0, slo_ms, seed=0)
    assert sum(summary.outcomes.values()) == summary.arrivals == len(drawn)
    assert 0 <= summary.correct_goodput <= summary.goodput <= summary.offered_rate + 1e-9
    assert summary.goodput == pytest.approx(summary.attainment * summary.offered_rate)
    assert summary.attainment <= summary.outcomes["ok"] / summary.arrivals + 1e-9
    assert summary.seconds >= 10.0


def test_latency_counts_from_when_a_request_was_due_not_from_when_it_was_sent():
    late = Record(due_s=1.0, sent_s=5.0, done_s=5.5, outcome="ok", label=1, answer=Answer(1))
    summary = summarise([late], 2.0, slo_ms=1000.0, seed=0)
    assert summary.latency_ms["p50"] == pytest.approx(4500.0)
    assert summary.client_lag_ms["p50"] == pytest.approx(4000.0)
    assert summary.attainment == 0.0


def test_rejects_and_failures_are_misses_of_the_attainment():
    on_time = Record(0.0, 0.0, 0.01, "ok", 1, Answer(1))
    wrong = Record(0.0, 0.0, 0.01, "ok", 2, Answer(1))
    refused = Record(0.0, 0.0, 0.001, "rejected", 1)
    timed_out = Record(0.0, 0.0, 2.0, "timeout", 1)
    summary = summarise([on_time, wrong, refused, timed_out], 4.0, slo_ms=50.0, seed=0)
    assert summary.attainment == 0.5
    assert summary.goodput == pytest.approx(0.5)
    assert summary.correct_goodput == pytest.approx(0.25)
    assert summary.accuracy == 0.5


def test_without_labels_or_an_objective_nothing_is_made_up():
    summary = summarise([Record(0.0, 0.0, 0.1, "ok", None, Answer(3))], 1.0, slo_ms=None, seed=0)
    assert summary.accuracy is summary.goodput is summary.correct_goodput is summary.attainment is None
    assert summary.mean_depth is None
    assert summary.queue_ms == {}
    json.dumps(summary.to_json())


def test_a_client_that_is_behind_and_counts_that_do_not_add_up_are_said():
    records = [Record(0.0, 0.1, 0.2, "ok", 1, Answer(1)) for _ in range(10)]
    (behind, odd) = summarise(records, 1.0, 50.0, 0, server=ServerSide({"ok": 9})).notes
    assert "got to 1 % of the requests 100.0 ms or more after they were due" in behind
    assert "The server counts 9 requests, the client 10" in odd
    assert not summarise(records, 1.0, 5000.0, 0, server=ServerSide({"ok": 10})).notes


def test_a_client_that_left_may_be_counted_by_the_server_or_not():
    records = [Record(0.0, 0.0, 0.01, "ok", 1, Answer(1)), Record(0.0, 0.0, 0.01, "left", 1, None, "leave")]
    for counted in (1, 2):
        assert not summarise(records, 1.0, 50.0, 0, server=ServerSide({"ok": counted})).notes
    assert summarise(records, 1.0, 50.0, 0, server=ServerSide({"ok": 3})).notes

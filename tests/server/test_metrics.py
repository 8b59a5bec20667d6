"""What the engine tells is what a scrape shows."""

import itertools

import numpy as np
import pytest
from offramp_contract.errors import OfframpError, Overloaded
from offramp_contract.policy import Reason
from offramp_runtime import open_bundle, open_device
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.messages import Departure, Loaded, RequestDone, StageRun
from offramp_server.metrics import Metrics
from prometheus_client.parser import text_string_to_metric_families

MODEL, VERSION = "digits", "0123456789ab"
LOADED = Loaded(
    MODEL, VERSION, (("stage_0", "fp32"), ("stage_1", "fp32"), ("stage_2", "fp32")), ("exit_0", "exit_1", "exit_2")
)


class Scrape:
    """What one scrape shows."""

    def __init__(self, metrics):
        body, self.content_type = metrics.exposition()
        self.text = body.decode()
        self.families = list(text_string_to_metric_families(self.text))

    def samples(self, **labels):
        """Give the samples with these labels among theirs."""
        every = itertools.chain.from_iterable(family.samples for family in self.families)
        return [sample for sample in every if labels.items() <= sample.labels.items()]

    def __call__(self, name, **labels):
        """Give the value of a sample, summed over the labels that are not given."""
        found = [sample.value for sample in self.samples(**labels) if sample.name == name]
        assert found, f"no {name} with {labels}"
        return sum(found)


@pytest.fixture
def metrics():
    metrics = Metrics()
    metrics.model_added(LOADED)
    return metrics


def departure(exit_index, reason, depth):
    return Departure(MODEL, VERSION, exit_index, f"exit_{exit_index}", reason, depth)


def run(stage="stage_0", seconds=0.003, queue_seconds=(0.001, 0.002)):
    return StageRun(MODEL, VERSION, stage, "fp32", seconds, queue_seconds)


def test_every_series_of_a_model_exists_at_zero_from_the_moment_it_is_loaded(metrics):
    scrape = Scrape(metrics)
    samples = scrape.samples(model=MODEL, version=VERSION)
    assert {sample.value for sample in samples} == {0.0}
    for outcome in ("ok", "error", "invalid", "cancelled", "deadline", "rejected"):
        assert scrape("offramp_requests_total", outcome=outcome) == 0
    for reason in ("overloaded", "not_ready", "deadline_exceeded", "invalid_value", "malformed", "too_large"):
        assert scrape("offramp_rejected_total", reason=reason) == 0
    for reason in ("not_finite", "stage_failed", "deadline_exceeded", "cancelled", "not_ready"):
        assert scrape("offramp_failed_samples_total", reason=reason) == 0
    assert scrape("offramp_samples_total", exit="exit_1", reason="deadline") == 0
    assert scrape("offramp_samples_total", exit="exit_2", reason="final") == 0


def test_no_series_but_the_process_own_lacks_the_model_and_its_version(metrics):
    metrics.stage_ran(run())
    without = {sample.name for sample in Scrape(metrics).samples() if not {"model", "version"} <= sample.labels.keys()}
    of_the_process = ("process_", "offramp_build_info", "offramp_http_worker")
    assert all(name.startswith(of_the_process) for name in without)


def test_rows_that_left_are_counted_by_exit_and_reason(metrics):
    metrics.rows_left([departure(0, Reason.CONFIDENT, 0.25), departure(0, Reason.CONFIDENT, 0.25)])
    metrics.rows_left([departure(1, Reason.DEADLINE, 0.5), departure(2, Reason.FINAL, 1.0)])
    scrape = Scrape(metrics)
    assert scrape("offramp_samples_total", exit="exit_0", reason="confident") == 2
    assert scrape("offramp_samples_total", exit="exit_1", reason="deadline") == 1
    assert scrape("offramp_samples_total", exit="exit_2", reason="final") == 1
    assert scrape("offramp_samples_total") == 4


def test_only_exits_that_the_deadline_forced_are_counted_as_forced(metrics):
    voluntary = (Reason.CONFIDENT, Reason.ENTROPY, Reason.DEPTH_CAP, Reason.PATIENCE)
    metrics.rows_left([departure(0, reason, 0.25) for reason in voluntary])
    assert Scrape(metrics)("offramp_forced_exits_total") == 0
    metrics.rows_left([departure(0, Reason.DEADLINE, 0.25)])
    assert Scrape(metrics)("offramp_forced_exits_total") == 1


def test_what_gates_decided_is_counted_by_gate_and_decision(metrics):
    metrics.model_added(Loaded("gated", VERSION, LOADED.stages, LOADED.exits, ("gate_0", "gate_1")))
    every = [(gate, decision) for gate in ("gate_0", "gate_1") for decision in ("open", "shut", "forced")]
    scrape = Scrape(metrics)
    assert [scrape("offramp_gate_decisions_total", gate=gate, decision=decision) for gate, decision in every] == [0] * 6
    decided = [("open", "shut"), ("open", "forced"), ("open", None), ("shut", None)]
    metrics.rows_left([Departure("gated", VERSION, 0, "exit_0", Reason.MARGIN, 0.5, gates) for gates in decided])
    scrape = Scrape(metrics)
    counts = [scrape("offramp_gate_decisions_total", gate=gate, decision=decision) for gate, decision in every]
    assert counts == [3, 1, 0, 0, 1, 1]
    assert not [sample for sample in scrape.samples(model=MODEL) if "gate" in sample.labels]


def test_a_row_whose_gate_a_deadline_shut_leaves_the_final_exit_by_force(metrics):
    metrics.model_added(Loaded("gated", VERSION, LOADED.stages, LOADED.exits, ("gate_0",)))
    metrics.rows_left([Departure("gated", VERSION, 2, "exit_2", Reason.DEADLINE, 0.5, ("forced",))])
    scrape = Scrape(metrics)
    assert scrape("offramp_samples_total", exit="exit_2", reason="deadline") == 1
    assert scrape("offramp_forced_exits_total") == 1
    finals = {sample.labels["reason"] for sample in scrape.samples(model=MODEL, exit="exit_2")}
    assert finals == {"final"}, "without gates nothing but the end is a reason to leave there"


def test_depths_give_the_average_depth_and_the_compute_saved(metrics):
    metrics.rows_left([departure(0, Reason.CONFIDENT, 0.25), departure(2, Reason.FINAL, 1.0)])
    metrics.rows_left([departure(1, Reason.MARGIN, 0.5)])
    scrape = Scrape(metrics)
    assert scrape("offramp_depth_ratio_sum") / scrape("offramp_depth_ratio_count") == pytest.approx(1.75 / 3)
    assert scrape("offramp_compute_saved_ratio") == pytest.approx(1 - 1.75 / 3)
    assert [scrape("offramp_exit_depth_bucket", le=le) for le in ("0.0", "1.0", "2.0")] == [1, 2, 3]


def test_a_dispatch_shows_its_duration_its_size_and_each_rows_wait(metrics):
    metrics.stage_ran(run(seconds=0.003, queue_seconds=(0.001, 0.002, 0.2)))
    scrape = Scrape(metrics)
    assert scrape("offramp_stage_duration_seconds_sum", stage="stage_0", variant="fp32") == pytest.approx(0.003)
    assert scrape("offramp_stage_batch_size_sum", stage="stage_0") == 3
    assert scrape("offramp_stage_batch_size_count", stage="stage_0") == 1
    assert scrape("offramp_queue_seconds_count", stage="stage_0") == 3
    assert scrape("offramp_queue_seconds_bucket", stage="stage_0", le="0.0025") == 2
    assert scrape("offramp_stage_batch_size_count", stage="stage_1") == 0


def test_a_request_shows_its_outcome_its_duration_and_its_slack(metrics):
    metrics.request_done(RequestDone(MODEL, VERSION, "ok", 0.02, 0.004))
    metrics.request_done(RequestDone(MODEL, VERSION, "ok", 0.03, -0.02))
    metrics.request_done(RequestDone(MODEL, VERSION, "error", 0.04, None))
    scrape = Scrape(metrics)
    assert scrape("offramp_requests_total", outcome="ok") == 2
    assert scrape("offramp_requests_total", outcome="error") == 1
    assert scrape("offramp_request_duration_seconds_sum") == pytest.approx(0.09)
    assert scrape("offramp_deadline_slack_seconds_count") == 2, "a request without a deadline has no slack"
    assert scrape("offramp_deadline_slack_seconds_bucket", le="0.0") == 1
    assert scrape("offramp_deadline_missed_total") == 1


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("overloaded", "rejected"),
        ("not_ready", "rejected"),
        ("deadline_exceeded", "deadline"),
        ("cancelled", "cancelled"),
        ("invalid_value", "invalid"),
        ("malformed", "invalid"),
        ("too_large", "invalid"),
        ("unsupported_body", "invalid"),
    ],
)
def test_a_refused_request_has_a_reason_and_an_outcome(metrics, reason, outcome):
    metrics.rejected(MODEL, VERSION, reason)
    scrape = Scrape(metrics)
    assert scrape("offramp_rejected_total", reason=reason) == scrape("offramp_rejected_total") == 1
    assert scrape("offramp_requests_total", outcome=outcome) == scrape("offramp_requests_total") == 1


def test_a_reason_nobody_expected_makes_no_series_of_its_own(metrics):
    before = len(Scrape(metrics).samples())
    metrics.rejected(MODEL, VERSION, "../../etc/passwd")
    metrics.rows_failed(MODEL, VERSION, "surprise", 3)
    scrape = Scrape(metrics)
    assert len(scrape.samples()) == before
    assert scrape("offramp_rejected_total", reason=OfframpError.code) == 1
    assert scrape("offramp_failed_samples_total", reason=OfframpError.code) == 3


def test_series_go_with_the_model_and_what_comes_late_does_not_bring_them_back(metrics):
    metrics.rows_left([departure(0, Reason.CONFIDENT, 0.25)])
    metrics.model_removed(MODEL, VERSION)
    metrics.stage_ran(run())
    metrics.rows_left([departure(0, Reason.CONFIDENT, 0.25)])
    metrics.rows_failed(MODEL, VERSION, "not_ready", 1)
    metrics.request_done(RequestDone(MODEL, VERSION, "ok", 0.02, 0.004))
    metrics.rejected(MODEL, VERSION, Overloaded.code)
    metrics.inflight_changed(MODEL, VERSION, 1)
    assert Scrape(metrics).samples(model=MODEL) == []


def test_the_series_of_another_version_stay(metrics):
    other = Loaded(MODEL, "ffff", LOADED.stages, LOADED.exits)
    metrics.model_added(other)
    metrics.model_removed(MODEL, VERSION)
    scrape = Scrape(metrics)
    assert scrape.samples(version=VERSION) == []
    assert scrape("offramp_samples_total", version="ffff") == 0


def test_a_version_that_is_loaded_again_while_its_first_load_drains_goes_on_counting(metrics):
    metrics.rejected(MODEL, VERSION, "overloaded")
    metrics.model_added(LOADED)
    metrics.model_removed(MODEL, VERSION)
    metrics.rejected(MODEL, VERSION, "overloaded")
    assert Scrape(metrics)("offramp_rejected_total", reason="overloaded") == 2
    metrics.model_removed(MODEL, VERSION)
    assert Scrape(metrics).samples(version=VERSION) == []


def test_a_scrape_is_prometheus_text_without_creation_times(metrics):
    scrape = Scrape(metrics)
    assert scrape.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert not [sample.name for sample in scrape.samples() if sample.name.endswith("_created")]
    assert scrape("offramp_build_info") == 1
    assert scrape("process_resident_memory_bytes") > 0


def answer(engine, rows, **fields):
    return engine.classify(np.asarray(rows, dtype=np.float32), **fields)


def test_every_row_that_an_engine_admits_is_counted_once(toy_bundle):
    metrics = Metrics()
    overflowing = [3e38, -3e38, 3e38, 1.0]  # finite, but ten times it is not
    with Engine(open_device("cpu", 1), EngineSettings(warm_up_s=0.05), metrics) as engine:
        engine.add_model(open_bundle(toy_bundle))
        answer(engine, [[9, 0, 0, 0], [0.1, 0, 0, 0]], threshold=0.9)
        answer(engine, [[0.1, 0, 0, 0], overflowing], policy={"kind": "fixed", "exit": 2})
        with pytest.raises(OfframpError):
            answer(engine, [[1, 0, 0, 0]] * 5000)
    scrape = Scrape(metrics)
    assert scrape("offramp_samples_total") == 3
    assert scrape("offramp_samples_total", exit="exit_0", reason="confident") == 1
    assert scrape("offramp_failed_samples_total", reason="not_finite") == 1
    assert scrape("offramp_requests_total", outcome="ok") == 1
    assert scrape("offramp_requests_total", outcome="invalid") == 1
    assert scrape("offramp_inflight_samples") == 0


def test_a_model_that_an_engine_unloads_leaves_no_series(toy_bundle):
    metrics = Metrics()
    with Engine(open_device("cpu", 1), EngineSettings(warm_up_s=0.05), metrics) as engine:
        served = engine.add_model(open_bundle(toy_bundle))
        assert Scrape(metrics).samples(model=served.name, version=served.version)
        answer(engine, [[9, 0, 0, 0]])
        engine.remove_model(served)
    assert Scrape(metrics).samples(model=served.name) == []

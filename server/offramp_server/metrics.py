"""Counts what the engine does, for Prometheus.

It and its histograms are the only importers of prometheus_client. Every series carries `model` and `version`; all other
labels have a set of values that the model's manifest and the code's own enumerations fix. A model's series exist, at 0,
from the moment it is loaded, and go when it is unloaded. Observing costs little: a model's series are looked up once,
not for each event, histograms count many values at a time, and gauges are read when somebody asks.
"""

import threading
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from importlib.metadata import version as installed_version
from platform import python_version
from typing import TypeVar

from offramp_contract import errors
from offramp_contract.policy import Reason
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from offramp_server.histogram import Histogram
from offramp_server.messages import Departure, GateDecision, Loaded, Outcome, RequestDone, StageRun

M = TypeVar("M", bound=MetricWrapperBase | Histogram)

MODEL = ("model", "version")
OUTCOMES: tuple[Outcome, ...] = ("ok", "error", "invalid", "cancelled", "deadline", "rejected")
GATE_DECISIONS: tuple[GateDecision, ...] = ("open", "shut", "forced")

# What each reason of a refusal makes of the request; the keys are also the values of `offramp_rejected_total{reason}`.
REFUSALS: dict[str, Outcome] = {
    errors.Overloaded.code: "rejected",
    errors.NotReady.code: "rejected",
    errors.DeadlineExceeded.code: "deadline",
    errors.Cancelled.code: "cancelled",
    errors.MalformedRequest.code: "invalid",
    errors.InvalidValue.code: "invalid",
    errors.BodyTimeout.code: "invalid",
    errors.TooLarge.code: "invalid",
    errors.UnsupportedBody.code: "invalid",
    errors.RequestError.code: "invalid",
    errors.OfframpError.code: "error",
}
FAILURES = tuple(
    kind.code
    for kind in (errors.NotFinite, errors.StageFailed, errors.DeadlineExceeded, errors.Cancelled, errors.NotReady)
)

# 0.5 ms .. 10 s: from a small network on an idle server to the longest budget people wait for.
REQUEST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# 50 us .. 2.5 s: one stage of a toy network to one of a large network with a full batch on a CPU.
STAGE_SECONDS = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# 50 us .. 2.5 s: an idle device to the longest wait at which admission still lets requests in by default.
QUEUE_SECONDS = STAGE_SECONDS
# -1 s .. 10 s: below 0 the deadline was missed by that much; finest just above 0, where promises are nearly broken.
SLACK_SECONDS = (-1.0, -0.1, -0.01, 0.0, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# 1 .. 4096: the largest batch the settings allow.
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Exits 0 .. 15 one by one, which holds most published networks; deeper ones in growing steps up to 1023, the most.
EXIT_INDICES = (*range(16), 23, 31, 63, 127, 255, 1023)
# 0.05 .. 1: shares of the full path in twentieths.
DEPTH_RATIOS = tuple(step / 20 for step in range(1, 21))


class Metrics:
    """Observes the engine and renders what it has seen. Thread-safe."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._families = _Families(self._registry)
        self._models: dict[tuple[str, str], _ModelMetrics] = {}
        self._num_loads: Tally[tuple[str, str]] = Tally()
        self._lock = threading.Lock()
        ProcessCollector(registry=self._registry)
        self._http_workers = Gauge("offramp_http_workers", "Processes that serve HTTP.", registry=self._registry)
        self._http_workers.set(1)
        self._http_worker_crashes = Counter(
            "offramp_http_worker_crashes_total",
            "HTTP workers that ended unasked; each is started again.",
            registry=self._registry,
        )
        build = Gauge(
            "offramp_build_info", "1; the labels say what runs.", ("release", "python"), registry=self._registry
        )
        build.labels(installed_version("offramp"), python_version()).set(1)

    def exposition(self) -> tuple[bytes, str]:
        """Give the body of an answer to a scrape, and its content type."""
        return generate_latest(_WithoutCreationTimes(self._registry)), CONTENT_TYPE_PLAIN_0_0_4

    def http_workers_changed(self, num_serving: int) -> None:
        """Show how many processes serve HTTP."""
        self._http_workers.set(num_serving)

    def http_worker_crashed(self) -> None:
        """Count an HTTP worker that has ended unasked."""
        self._http_worker_crashes.inc()

    def model_added(self, loaded: Loaded) -> None:
        """Begin a model's series at 0."""
        key = loaded.model, loaded.version
        with self._lock:
            self._num_loads[key] += 1
            if key not in self._models:
                self._models[key] = _ModelMetrics(self._families, loaded)

    def model_removed(self, model: str, version: str) -> None:
        """End a model's series, once its last load is gone."""
        with self._lock:
            self._num_loads[model, version] -= 1
            if self._num_loads[model, version] <= 0:
                del self._num_loads[model, version]
                self._models.pop((model, version), None)
                self._families.forget(model, version)

    # An event of a model that is not loaded (any more) is not counted: its series would never go again.

    def stage_ran(self, run: StageRun) -> None:
        """Observe a dispatch: its duration, its size, its rows' waits."""
        seen = self._models.get((run.model, run.version))
        if seen is not None:
            seen.stages[run.stage, run.variant].observe(run)

    def rows_left(self, departures: list[Departure]) -> None:
        """Observe where rows left, why, and how much of the network they ran."""
        by_model: dict[tuple[str, str], list[Departure]] = {}
        for departure in departures:
            by_model.setdefault((departure.model, departure.version), []).append(departure)
        for key, rows in by_model.items():
            seen = self._models.get(key)
            if seen is not None:
                seen.rows_left(rows)

    def rows_failed(self, model: str, version: str, reason: str, num_samples: int) -> None:
        """Count rows that were answered with an error."""
        seen = self._models.get((model, version))
        if seen is not None:
            seen.failed[reason if reason in seen.failed else errors.OfframpError.code].inc(num_samples)

    def request_done(self, done: RequestDone) -> None:
        """Observe an admitted request's outcome, duration and distance from its deadline."""
        seen = self._models.get((done.model, done.version))
        if seen is not None:
            seen.request_done(done)

    def rejected(self, model: str, version: str, reason: str) -> None:
        """Count a request that was not admitted."""
        seen = self._models.get((model, version))
        if seen is not None:
            known = reason if reason in REFUSALS else errors.OfframpError.code
            seen.outcomes[REFUSALS[known]].inc()
            seen.rejected[known].inc()

    def gear_changed(self, model: str, version: str, gear: int) -> None:
        """Show the gear that requests get."""
        seen = self._models.get((model, version))
        if seen is not None:
            seen.gear = gear

    def inflight_changed(self, model: str, version: str, num_samples: int) -> None:
        """Show how many rows are admitted and unanswered."""
        seen = self._models.get((model, version))
        if seen is not None:
            seen.num_inflight = num_samples


class _Families:
    """The metrics, all models together."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._all: list[MetricWrapperBase | Histogram] = []

        def counter(name: str, text: str, *labels: str) -> Counter:
            return self._kept(Counter(name, text, (*MODEL, *labels), registry=registry))

        def gauge(name: str, text: str) -> Gauge:
            return self._kept(Gauge(name, text, MODEL, registry=registry))

        def histogram(name: str, text: str, bounds: Sequence[float], *labels: str) -> Histogram:
            return self._kept(Histogram(name, text, (*MODEL, *labels), registry=registry, bounds=bounds))

        self.requests = counter("offramp_requests_total", "Requests, by what became of them.", "outcome")
        self.rejected = counter("offramp_rejected_total", "Requests that were not admitted, by error code.", "reason")
        self.request_s = histogram(
            "offramp_request_duration_seconds", "Arrival to answer of admitted requests.", REQUEST_SECONDS
        )
        self.slack_s = histogram(
            "offramp_deadline_slack_seconds", "Deadline minus time of the answer; negative if missed.", SLACK_SECONDS
        )
        self.missed = counter("offramp_deadline_missed_total", "Requests answered after their deadline.")
        self.inflight = gauge("offramp_inflight_samples", "Rows that are admitted and unanswered.")
        self.gear = gauge("offramp_gear", "How far the load has moved a model down its gears; 0 is not at all.")
        self.gear_requests = counter(
            "offramp_gear_requests_total", "Answered requests that left the choice to the server, by gear.", "gear"
        )
        self.samples = counter(
            "offramp_samples_total", "Rows answered by an exit, by exit and reason for leaving.", "exit", "reason"
        )
        self.failed = counter("offramp_failed_samples_total", "Rows answered with an error, by error code.", "reason")
        self.forced = counter("offramp_forced_exits_total", "Rows that left because of their deadline.")
        self.exit_depth = histogram("offramp_exit_depth", "Index of the exit that answered a row.", EXIT_INDICES)
        self.depth_ratio = histogram(
            "offramp_depth_ratio", "Share of the full path's FLOPs that an answered row ran.", DEPTH_RATIOS
        )
        self.saved = gauge(
            "offramp_compute_saved_ratio", "Share of FLOPs that answered rows did not run, since the model was loaded."
        )
        self.gates = counter(
            "offramp_gate_decisions_total",
            "Answered rows that came to a gate, by what was decided; forced: the deadline shut it.",
            "gate",
            "decision",
        )
        self.stage_s = histogram(
            "offramp_stage_duration_seconds", "Duration of a dispatch of a stage.", STAGE_SECONDS, "stage", "variant"
        )
        self.stage_batch = histogram("offramp_stage_batch_size", "Rows in a dispatch of a stage.", BATCH_SIZES, "stage")
        self.queue_s = histogram("offramp_queue_seconds", "Wait of a row before a stage.", QUEUE_SECONDS, "stage")

    def _kept(self, metric: M) -> M:
        self._all.append(metric)
        return metric

    def forget(self, model: str, version: str) -> None:
        """Remove a model's series from every metric."""
        for metric in self._all:
            metric.remove_by_labels({"model": model, "version": version})


class _StageMetrics:
    """One stage of one model."""

    def __init__(self, families: _Families, loaded: Loaded, stage: str, variant: str) -> None:
        key = loaded.model, loaded.version, stage
        self._duration_s = families.stage_s.labels(*key, variant)
        self._batch = families.stage_batch.labels(*key)
        self._queue_s = families.queue_s.labels(*key)

    def observe(self, run: StageRun) -> None:
        self._duration_s.observe(run.seconds)
        self._batch.observe(run.batch_size)
        self._queue_s.observe_all(run.queue_seconds)


class _ModelMetrics:
    """The series of one model."""

    def __init__(self, families: _Families, loaded: Loaded) -> None:
        key = loaded.model, loaded.version
        self.outcomes = {outcome: families.requests.labels(*key, outcome) for outcome in OUTCOMES}
        self.rejected = {reason: families.rejected.labels(*key, reason) for reason in REFUSALS}
        self.failed = {reason: families.failed.labels(*key, reason) for reason in (*FAILURES, errors.OfframpError.code)}
        self.num_inflight = self.gear = 0
        families.inflight.labels(*key).set_function(lambda: self.num_inflight)
        families.gear.labels(*key).set_function(lambda: self.gear)
        self._gear_requests = [families.gear_requests.labels(*key, gear) for gear in range(max(loaded.num_gears, 1))]
        self.stages = {
            (name, variant): _StageMetrics(families, loaded, name, variant) for name, variant in loaded.stages
        }
        self._request_s = families.request_s.labels(*key)
        self._slack_s = families.slack_s.labels(*key)
        self._missed = families.missed.labels(*key)
        self._forced = families.forced.labels(*key)
        self._exit_depth = families.exit_depth.labels(*key)
        self._depth_ratio = families.depth_ratio.labels(*key)
        families.saved.labels(*key).set_function(self._saved_share)
        self._samples = {
            (exit_name, reason): families.samples.labels(*key, exit_name, reason.label)
            for exit_name, reason in _possible_exits(loaded)
        }
        self._gates = [
            {decision: families.gates.labels(*key, gate, decision) for decision in GATE_DECISIONS}
            for gate in loaded.gates
        ]
        self._num_rows, self._depth_sum = 0, 0.0

    def request_done(self, done: RequestDone) -> None:
        self.outcomes[done.outcome].inc()
        self._request_s.observe(done.seconds)
        if done.gear is not None:
            self._gear_requests[done.gear].inc()
        if done.slack_s is not None:
            self._slack_s.observe(done.slack_s)
            if done.slack_s < 0:
                self._missed.inc()

    def rows_left(self, rows: list[Departure]) -> None:
        left: dict[tuple[str, Reason], int] = {}
        num_forced = 0
        for row in rows:
            way = row.exit_name, row.reason
            left[way] = left.get(way, 0) + 1
            num_forced += row.reason.is_forced
            self._depth_sum += row.depth
        self._num_rows += len(rows)
        for way, count in left.items():
            self._samples[way].inc(count)
        if num_forced:
            self._forced.inc(num_forced)
        self._exit_depth.observe_all([row.exit_index for row in rows])
        self._depth_ratio.observe_all([row.depth for row in rows])
        if self._gates:
            self._gates_decided(rows)

    def _gates_decided(self, rows: list[Departure]) -> None:
        decided = Tally(decision for row in rows for decision in enumerate(row.gate_decisions))
        for (gate, decision), count in decided.items():
            if decision is not None:
                self._gates[gate][decision].inc(count)

    def _saved_share(self) -> float:
        return 1.0 - self._depth_sum / self._num_rows if self._num_rows else 0.0


def _possible_exits(loaded: Loaded) -> Iterator[tuple[str, Reason]]:
    """Give every pair of an exit and a reason to leave there.

    Everyone leaves at the final exit: as `FINAL`, or as `DEADLINE` if a deadline has shut a gate on the way.
    """
    for exit_name in loaded.exits[:-1]:
        for reason in Reason:
            if reason not in (Reason.CONTINUE, Reason.FINAL):
                yield exit_name, reason
    yield loaded.exits[-1], Reason.FINAL
    if loaded.gates:
        yield loaded.exits[-1], Reason.DEADLINE


class _WithoutCreationTimes:
    """A registry less the `_created` series, which double the exposition and which Prometheus does not read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

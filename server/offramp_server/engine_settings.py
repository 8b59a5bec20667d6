"""The engine's knobs; `offramp_server.settings` fills them from flags, environment and file."""

from dataclasses import dataclass

from offramp_contract.errors import InvalidValue


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the operator decides about scheduling and admission.

    Attributes:
        max_batch: Most rows in one dispatch. Higher gives throughput where the device gains from batches, and longer
            dispatches for everyone; the measured profile picks the size actually used, up to this.
        max_inflight_samples: Most admitted, unanswered rows. Bounds memory; above it requests are refused with 429.
        max_wait_ms: Longest predicted wait for the device at which requests are still admitted. Lower refuses sooner
            under load instead of answering late.
        default_latency_ms: Deadline of rows whose request names none, so that nothing starves; a true deadline, at
            which a row leaves with the answer it has. None gives them no deadline.
        margin_ms: Time kept free between the predicted end of a dispatch and a deadline, for handing the answer to
            the client. Higher keeps more promises and cuts depth sooner.
        warm_up_s: Time spent on profiling each model when it is loaded. Longer gives better first predictions.
        fair_share_ms: Device time by which one model may run ahead of another that also has work waiting. Lower is
            fairer from moment to moment, higher keeps more deadlines of the busier model.
    """

    max_batch: int = 32
    max_inflight_samples: int = 4096
    max_wait_ms: float = 2000.0
    default_latency_ms: float | None = 2000.0
    margin_ms: float = 2.5
    warm_up_s: float = 3.0
    fair_share_ms: float = 50.0

    def __post_init__(self) -> None:
        counts = {"max_batch": self.max_batch, "max_inflight_samples": self.max_inflight_samples}
        for name, count in counts.items():
            if count < 1:
                raise InvalidValue(f"{name}: must be at least 1", field=name)
        times = {"max_wait_ms": self.max_wait_ms, "warm_up_s": self.warm_up_s, "fair_share_ms": self.fair_share_ms}
        if self.default_latency_ms is not None:
            times["default_latency_ms"] = self.default_latency_ms
        for name, value in times.items():
            if not value > 0:
                raise InvalidValue(f"{name}: must be above 0", field=name)
        if not self.margin_ms >= 0:
            raise InvalidValue("margin_ms: must not be negative", field="margin_ms")

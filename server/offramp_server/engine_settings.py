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
        runners: How many stages may run side by side, each with all of the device's threads. More give throughput
            where a stage cannot keep every core busy by itself, and each stage takes longer. None shares the threads
            out: a lone row's stages get all of them, and while many rows wait as many run side by side, with a part
            each, as was measured to do most when the model was loaded.
        inline_ms: A row that comes alone to an idle CPU runs on the thread that brings it if all of the model's stages
            take at most so long; that saves waking a runner and being woken by it. Higher holds other connections up
            for so long. 0 leaves every row to a runner.
        rebatch: Whether survivors of different batches run together. Off, a batch stays one to its end, and what leaves
            early leaves it smaller.
        hold: Whether a part-full batch waits for rows that are on their way to it, where the profile says that it pays.
        batch_timeout_ms: A batch that is not full starts when its oldest row has waited for so long. None starts it as
            soon as the device is free.
        forced_exits: Whether a row that is short of time leaves with the answer it has, and goes past gated stages.
            Off, it runs on to where its policy lets it leave, however late.
        gears: Whether a backlog may move requests that leave the choice to the server along certified operating
            points. There are none without a floor.
        gear_floor_accuracy: Least accuracy that each of them is certified for. Lower gives more room under load.
        gear_floor_risk: Greatest share of answers that may differ from full depth's, certified likewise.
    """

    max_batch: int = 32
    max_inflight_samples: int = 4096
    max_wait_ms: float = 2000.0
    default_latency_ms: float | None = 2000.0
    margin_ms: float = 2.5
    warm_up_s: float = 3.0
    fair_share_ms: float = 50.0
    runners: int | None = None
    inline_ms: float = 2.0
    rebatch: bool = True
    hold: bool = True
    batch_timeout_ms: float | None = None
    forced_exits: bool = True
    gears: bool = True
    gear_floor_accuracy: float | None = None
    gear_floor_risk: float | None = None

    def __post_init__(self) -> None:
        counts = {"max_batch": self.max_batch, "max_inflight_samples": self.max_inflight_samples}
        if self.runners is not None:
            counts["runners"] = self.runners
        for name, count in counts.items():
            if count < 1:
                raise InvalidValue(f"{name}: must be at least 1", field=name)
        times = {"max_wait_ms": self.max_wait_ms, "warm_up_s": self.warm_up_s, "fair_share_ms": self.fair_share_ms}
        if self.default_latency_ms is not None:
            times["default_latency_ms"] = self.default_latency_ms
        if self.batch_timeout_ms is not None:
            times["batch_timeout_ms"] = self.batch_timeout_ms
        for name, value in times.items():
            if not value > 0:
                raise InvalidValue(f"{name}: must be above 0", field=name)
        shares = {"gear_floor_accuracy": self.gear_floor_accuracy, "gear_floor_risk": self.gear_floor_risk}
        for name, share in shares.items():
            if share is not None and not 0 < share < 1:
                raise InvalidValue(f"{name}: must be above 0 and below 1", field=name)
        for name, value in {"margin_ms": self.margin_ms, "inline_ms": self.inline_ms}.items():
            if not value >= 0:
                raise InvalidValue(f"{name}: must not be negative", field=name)

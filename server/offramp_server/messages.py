"""What travels between the server's parts: reading this file is reading the architecture.

`api/` turns HTTP into a `Submission`'s inputs and `RequestOptions`; the engine answers with a `Result`, on the way with
`Progress`, and tells an `Observer` what happened. Nothing here knows HTTP, queues or devices. What is made anew for
every row or dispatch is a named tuple: as immutable as a frozen dataclass, and sooner made.

Shapes: R = rows of a request, C = classes, K = leading classes kept in the decision statistics.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from offramp_contract.errors import OfframpError
from offramp_contract.policy import Policy, Reason
from offramp_contract.policy_spec import PolicySpec
from offramp_contract.statistics import FloatArray, IntArray

Combine = Literal["last", "mean", "geometric"]
OnMiss = Literal["answer", "reject"]
Outcome = Literal["ok", "error", "invalid", "cancelled", "deadline", "rejected"]
GateDecision = Literal["open", "shut", "forced"]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How the rows of one request are to be routed.

    Attributes:
        policy: The compiled exit policy.
        policy_spec: The same as it is written down, for answers.
        operating_point: Name of the calibrated point the policy came from, if it came from one.
        latency_ms: Budget from the request's arrival to its answer; None takes the operator's default.
        min_exit: No voluntary exit before this one.
        max_exit: No stage beyond this exit; None is the final exit.
        gate_thresholds: What each gate's score is compared with; None takes the network's own.
        combine: How the answer combines the exits seen. The decision looks at the exit's own statistics.
        on_miss: What to do with a row whose deadline passes before its first exit.
        explain: Keep every exit's answer in `RowAnswer.seen` and every gate's in `RowAnswer.gates_seen`.
        wants_progress: Report each exit reached while the request runs.
        wants_logits: Keep the answering exit's logits in `RowAnswer.logits`.
        is_free: Whether the request leaves the choice of the policy to the server, so that gears apply to it.
    """

    policy: Policy
    policy_spec: PolicySpec
    operating_point: str | None = None
    latency_ms: float | None = None
    min_exit: int = 0
    max_exit: int | None = None
    gate_thresholds: tuple[float, ...] | None = None
    combine: Combine = "last"
    on_miss: OnMiss = "answer"
    explain: bool = False
    wants_progress: bool = False
    wants_logits: bool = False
    is_free: bool = False


class ExitAnswer(NamedTuple):
    """What one exit says about one row.

    Attributes:
        exit_index: The exit, 0-based.
        top_class_K: Leading classes, int32, shape (K,).
        top_probability_K: Their probabilities, float32, shape (K,), falling.
        log_odds: `ln(p_max / (1 - p_max))`.
        entropy: Normalised entropy in [0, 1].
        margin: Difference of the two largest probabilities.
        native: Score of the network's own exit rule, if it has one here.
        logits_C: float32, shape (C,), if they were asked for.
    """

    exit_index: int
    top_class_K: IntArray
    top_probability_K: FloatArray
    log_odds: float
    entropy: float
    margin: float
    native: float | None = None
    logits_C: FloatArray | None = None


class GateSeen(NamedTuple):
    """What one gate decided over one row.

    Attributes:
        score: Its score, or its priority where depth is the caller's choice; None if it was not scored.
        threshold: What the score is compared with; infinite where the request leaves nothing to it.
        decision: `forced` is a deadline's; None if the row did not come to it.
    """

    score: float | None
    threshold: float
    decision: GateDecision | None


class RowAnswer(NamedTuple):
    """The one answer of one row.

    Attributes:
        answer: The answer, of the exit the row left at or combined over the exits it has seen.
        reason: Why it left there.
        depth: Share of the full path's FLOPs that the row ran, in (0, 1].
        stages: Indices of the stages it ran, in order.
        threshold: The cut-off the policy applied at that exit, where it is a single number.
        score: The statistic that cut-off is compared with (confidence, entropy, margin, native); p_max for others.
        seen: Every exit's own answer, if `explain` was asked for.
        gate_decisions: What was decided over each gate; None for those that the row did not come to.
        gates_seen: The same with scores and thresholds, if `explain` was asked for.
    """

    answer: ExitAnswer
    reason: Reason
    depth: float
    stages: tuple[int, ...]
    score: float
    threshold: float | None
    seen: tuple[ExitAnswer, ...] = ()
    gate_decisions: tuple[GateDecision | None, ...] = ()
    gates_seen: tuple[GateSeen, ...] = ()


class Progress(NamedTuple):
    """A row has reached an exit and goes on."""

    row: int
    answer: ExitAnswer
    depth: float


class Result(NamedTuple):
    """The answer to one request: per row an answer or the error that is its answer.

    Attributes:
        rows: One entry per row, in order.
        queue_s: Seconds the slowest row waited for the device, all stages together.
        compute_s: Seconds the slowest row's stages ran.
        total_s: Seconds from arrival to answer.
        budget_ms: The latency budget in force, the operator's default included; None if unlimited.
        gear: The gear that served it; None if the request chose for itself or the model has no gears.
    """

    rows: tuple[RowAnswer | OfframpError, ...]
    queue_s: float
    compute_s: float
    total_s: float
    budget_ms: float | None
    gear: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model is served from now on. Everything observed about it names one of these stages, exits and gates.

    Attributes:
        stages: Name and variant of each stage.
        exits: Names of the exits, the final one last.
        gates: Names of the gates.
        num_gears: Length of its ladder of gears; 0 if it has none.
    """

    model: str
    version: str
    stages: tuple[tuple[str, str], ...]
    exits: tuple[str, ...]
    gates: tuple[str, ...] = ()
    num_gears: int = 0


class StageRun(NamedTuple):
    """One dispatch: a stage ran once, over rows of any number of requests."""

    model: str
    version: str
    stage: str
    variant: str
    seconds: float
    queue_seconds: tuple[float, ...]

    @property
    def batch_size(self) -> int:
        """Number of rows that ran together."""
        return len(self.queue_seconds)


class Departure(NamedTuple):
    """One row has been answered by an exit.

    Attributes:
        gate_decisions: As in `RowAnswer`.
    """

    model: str
    version: str
    exit_index: int
    exit_name: str
    reason: Reason
    depth: float
    gate_decisions: tuple[GateDecision | None, ...] = ()


class RequestDone(NamedTuple):
    """One request has got its one answer.

    Attributes:
        seconds: From arrival to answer.
        slack_s: Deadline minus the time of the answer; negative if it was missed; None without a deadline.
        gear: As in `Result`.
    """

    model: str
    version: str
    outcome: Outcome
    seconds: float
    slack_s: float | None
    gear: int | None = None


class Observer(Protocol):
    """Is told what happens; `metrics` implements it. Calls come from several threads and must be quick."""

    def model_added(self, loaded: Loaded) -> None:
        """A model is about to be served. The same model and version may be loaded several times at once."""

    def model_removed(self, model: str, version: str) -> None:
        """One load of a model has answered its last request and is gone."""

    def stage_ran(self, run: StageRun) -> None:
        """A dispatch has finished."""

    def rows_left(self, departures: list[Departure]) -> None:
        """Rows of one dispatch have been answered."""

    def rows_failed(self, model: str, version: str, reason: str, num_samples: int) -> None:
        """Rows have been answered with an error; `reason` is its code."""

    def request_done(self, done: RequestDone) -> None:
        """An admitted request has got its answer."""

    def rejected(self, model: str, version: str, reason: str) -> None:
        """A request was refused before it was admitted; `reason` is an error code."""

    def inflight_changed(self, model: str, version: str, num_samples: int) -> None:
        """The number of admitted, unanswered rows of a model is now `num_samples`."""

    def gear_changed(self, model: str, version: str, gear: int) -> None:
        """Requests that leave the choice to the server now get this gear of a model; told again where it is asked."""


@dataclass(frozen=True, slots=True)
class NoObserver:
    """Looks away: for in-process use without metrics."""

    def model_added(self, loaded: Loaded) -> None:
        """Ignore it."""

    def model_removed(self, model: str, version: str) -> None:
        """Ignore it."""

    def stage_ran(self, run: StageRun) -> None:
        """Ignore it."""

    def rows_left(self, departures: list[Departure]) -> None:
        """Ignore it."""

    def rows_failed(self, model: str, version: str, reason: str, num_samples: int) -> None:
        """Ignore it."""

    def request_done(self, done: RequestDone) -> None:
        """Ignore it."""

    def rejected(self, model: str, version: str, reason: str) -> None:
        """Ignore it."""

    def inflight_changed(self, model: str, version: str, num_samples: int) -> None:
        """Ignore it."""

    def gear_changed(self, model: str, version: str, gear: int) -> None:
        """Ignore it."""


Inputs = dict[str, np.ndarray]
__all__ = [
    "Combine", "Departure", "ExitAnswer", "GateDecision", "GateSeen", "Inputs", "Loaded", "NoObserver", "Observer",
    "OnMiss", "Outcome", "Progress", "RequestDone", "RequestOptions", "Result", "RowAnswer", "StageRun",
]  # fmt: skip

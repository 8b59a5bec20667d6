"""A request inside the engine, and its rows as they move through the stages."""

import math
import threading
from concurrent.futures import Future
from typing import Final, Protocol

import numpy as np
from offramp_contract.errors import Cancelled, DeadlineExceeded, NotReady, OfframpError, RequestError
from offramp_contract.policy import Policy, Reason

from offramp_server.admission import Lot
from offramp_server.carries import Batch, Carries
from offramp_server.exits import Sighting, combined_answer
from offramp_server.gating import RowGates
from offramp_server.messages import (
    Departure,
    ExitAnswer,
    Outcome,
    Progress,
    RequestDone,
    RequestOptions,
    Result,
    RowAnswer,
)
from offramp_server.served import ServedModel

SCORED_KINDS: Final = frozenset({"entropy", "margin", "native"})
"""Policies whose score is the statistic of that name; all others go by p_max."""


class Listener(Protocol):
    """Takes a submission's events. Called on the engine's thread, once per dispatch, and must be quick."""

    def deliver(self, events: "list[tuple[Submission, Progress | Result]]") -> None:
        """Take events of submissions that were made with this listener, in order."""


class Waiter:
    """Lets a thread wait for one submission's result."""

    def __init__(self) -> None:
        self.result: Future[Result] = Future()

    def deliver(self, events: "list[tuple[Submission, Progress | Result]]") -> None:
        """Take the result; progress is nobody's business here."""
        for _, event in events:
            if isinstance(event, Result):
                self.result.set_result(event)


class Submission:
    """One admitted request. It gets exactly one `Result`, whatever happens.

    Attributes:
        served: The model it asks.
        options: How its rows are routed.
        arrival_s: When it arrived, on the engine's clock.
        deadline_s: When its answer is due; infinite without a deadline.
        gear: The gear that serves it; None if it chose for itself or its model has no gears.
        lot: Where admission counts its rows; set when it lets them in.
        is_cancelled: Whether its client has gone.
    """

    lot: Lot
    __slots__ = (
        "_answers",
        "_cancel_signal",
        "arrival_s",
        "budget_ms",
        "compute_s",
        "deadline_s",
        "gear",
        "is_cancelled",
        "listener",
        "lot",
        "options",
        "queue_s",
        "rows_left",
        "samples",
        "served",
    )

    def __init__(
        self,
        served: ServedModel,
        inputs: dict[str, np.ndarray],
        options: RequestOptions,
        *,
        listener: Listener,
        arrival_s: float,
        budget_ms: float | None,
        cancel_signal: threading.Event,
        gear: int | None = None,
    ) -> None:
        self.served = served
        self.options = options
        self.listener = listener
        self.arrival_s = arrival_s
        self.budget_ms = budget_ms
        self.deadline_s = math.inf if budget_ms is None else arrival_s + budget_ms / 1e3
        self.is_cancelled = False
        self.gear = gear
        self.queue_s = 0.0
        self.compute_s = 0.0
        num_rows = len(next(iter(inputs.values())))
        self.rows_left = num_rows
        self._answers: list[RowAnswer | OfframpError | None] = [None] * num_rows
        self._cancel_signal = cancel_signal
        gates = served.gating.start(options.gate_thresholds)
        batch = Batch(inputs, num_rows)
        self.samples = [Sample(self, row, batch, gates) for row in range(num_rows)]

    @property
    def num_rows(self) -> int:
        """Number of rows that were sent."""
        return len(self._answers)

    @property
    def unanswered(self) -> "list[Sample]":
        """The rows that have no answer yet."""
        return [sample for sample in self.samples if self._answers[sample.row] is None]

    def cancel(self) -> None:
        """Say that nobody waits for the answer any more; its work is freed at the next stage boundary."""
        if self.rows_left:
            self.is_cancelled = True
            self._cancel_signal.set()

    def settle(self, sample: "Sample", answer: RowAnswer | OfframpError) -> bool:
        """Give a row its one answer; true when it was the request's last row."""
        if self._answers[sample.row] is not None:
            raise RuntimeError("a row was answered twice: this is a bug")
        self._answers[sample.row] = answer
        self.queue_s = max(self.queue_s, sample.queue_s)
        self.compute_s = max(self.compute_s, sample.compute_s)
        self.rows_left -= 1
        if self.rows_left:
            return False
        self.samples = []  # each knows its request: as a circle they would wait for the garbage collector
        return True

    def result(self, now: float) -> Result:
        """Put the rows' answers together, once all are there."""
        rows = tuple(answer for answer in self._answers if answer is not None)
        return Result(rows, self.queue_s, self.compute_s, now - self.arrival_s, self.budget_ms, self.gear)

    def done(self, outcome: Outcome, now: float) -> RequestDone:
        """Say for the record what became of it."""
        slack_s = None if self.budget_ms is None else self.deadline_s - now
        served = self.served
        return RequestDone(served.name, served.version, outcome, now - self.arrival_s, slack_s, self.gear)

    def outcome(self) -> Outcome:
        """Name what became of the request, for metrics; the worst row decides."""
        errors = [answer for answer in self._answers if isinstance(answer, OfframpError)]
        if not errors:
            return "ok"
        for kind, name in _OUTCOMES:
            if any(isinstance(error, kind) for error in errors):
                return name
        return "ok"


_OUTCOMES: tuple[tuple[type[OfframpError], Outcome], ...] = (
    (Cancelled, "cancelled"),
    (NotReady, "error"),
    (DeadlineExceeded, "deadline"),
    (RequestError, "invalid"),
    (OfframpError, "error"),
)


class Sample:
    """One row of a request, on its way through the stages.

    Attributes:
        row: Its place in the request.
        deadline_s: When its answer is due; infinite without a deadline.
        budget_s: Seconds from its arrival to then.
        carries: What later stages read.
        gates: What has become of its gates.
        next_stage: The stage it waits for.
        stages: Stages it has run.
        sighting: What the last exit it has seen said, about it and others; None before the first.
        place: Its place there.
        seen: What each exit said about it, if the options need all.
        classes: Predicted class at each exit so far, if its policy compares them.
        needs_logits: Whether its exits' raw scores are to be kept.
        cohort: The batch it stays in where batches stay one to their end; the scheduler's.
        enqueued_s: When it began to wait where it waits now.
        queue_s: Seconds it has waited.
        compute_s: Seconds its stages have run.
    """

    __slots__ = (
        "budget_s",
        "carries",
        "classes",
        "cohort",
        "compute_s",
        "deadline_s",
        "enqueued_s",
        "gates",
        "keeps_all",
        "max_exit",
        "may_be_dropped",
        "min_exit",
        "needs_logits",
        "next_stage",
        "place",
        "policy",
        "queue_s",
        "row",
        "seen",
        "sighting",
        "stages",
        "submission",
    )

    def __init__(self, submission: Submission, row: int, batch: Batch, gates: RowGates) -> None:
        options = submission.options
        final_exit = submission.served.num_exits - 1
        self.submission = submission
        self.row = row
        self.carries = Carries(batch, row)
        self.deadline_s = submission.deadline_s
        self.budget_s = submission.deadline_s - submission.arrival_s
        self.may_be_dropped = options.on_miss == "reject"
        self.policy: Policy = options.policy
        self.min_exit = options.min_exit
        self.max_exit = final_exit if options.max_exit is None else options.max_exit
        self.gates = gates.copy()
        self.next_stage = 0
        self.stages: list[int] = []
        self.sighting: Sighting | None = None
        self.place = 0
        self.keeps_all = options.explain or options.combine != "last"
        self.seen: list[ExitAnswer] = []
        self.classes: list[int] = []
        self.needs_logits = options.wants_logits or options.combine != "last"
        self.cohort = 0
        self.enqueued_s = 0.0
        self.queue_s = 0.0
        self.compute_s = 0.0

    @property
    def is_cancelled(self) -> bool:
        """Whether its request's client has gone."""
        return self.submission.is_cancelled

    def leave(self, reason: Reason, last: ExitAnswer) -> RowAnswer:
        """Give the row's answer for leaving at the last exit it has seen, which said so much.

        A row for which the deadline has shut a gate leaves because of the deadline, wherever it does.
        """
        kind = self.policy.kind
        score = getattr(last, kind) if kind in SCORED_KINDS else None
        gates, explain = self.gates, self.submission.options.explain
        return RowAnswer(
            answer=self.combined_answer(last),
            reason=Reason.DEADLINE if gates.is_hurried else reason,
            depth=self.depth,
            stages=tuple(self.stages),
            score=float(last.top_probability_K[0]) if score is None else score,
            threshold=self.policy.threshold_at(last.exit_index),
            seen=tuple(self.seen) if explain else (),
            gate_decisions=tuple(gates.decision_G),
            gates_seen=gates.seen if explain else (),
        )

    def departure(self, answer: RowAnswer) -> Departure:
        """Say for the record where and why it left."""
        served, exit_index = self.submission.served, answer.answer.exit_index
        exit_name = served.manifest.exits[exit_index].name
        return Departure(
            served.name, served.version, exit_index, exit_name, answer.reason, answer.depth, answer.gate_decisions
        )

    @property
    def depth(self) -> float:
        """Share of the full path's FLOPs that it has run."""
        return self.submission.served.depth_of(self.stages)

    def combined_answer(self, last: ExitAnswer) -> ExitAnswer:
        """Give the row's answer: the last exit's, or all exits' combined as the request asked."""
        options = self.submission.options
        if options.combine == "last":
            return last
        return combined_answer(self.seen, options.combine, self.submission.served.temperature)

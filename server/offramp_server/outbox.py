"""Hands answers over: one to each row, one result to each request, and the record of both to those who count."""

from collections import Counter
from collections.abc import Callable, Sequence

from offramp_contract.errors import OfframpError
from offramp_contract.policy import Reason

from offramp_server.admission import Lot
from offramp_server.messages import Departure, Observer, Progress, Result, RowAnswer
from offramp_server.served import Clock
from offramp_server.shield import tell
from offramp_server.sightings import last_answers
from offramp_server.submission import Listener, Sample, Submission


class Outbox:
    """Keeps a round's answers and hands them over at its end, at once for each listener.

    Args:
        observer: Is told what became of rows and requests.
        clock: Gives seconds.
        on_settled: Called with a lot of rows in flight and how many of them were just answered.
    """

    def __init__(self, observer: Observer, clock: Clock, on_settled: Callable[[Lot, int], None]) -> None:
        self._observer = observer
        self._clock = clock
        self._on_settled = on_settled
        self._events: dict[Listener, list[tuple[Submission, Progress | Result]]] = {}
        self._departures: list[Departure] = []
        self._settled: dict[Lot, int] = {}
        self._owed: dict[Submission, None] = {}

    def owe(self, submission: Submission) -> None:
        """Remember that a request is to be answered."""
        self._owed[submission] = None

    def report_progress(self, samples: Sequence[Sample]) -> None:
        """Tell those who asked for it that rows have reached an exit and go on."""
        curious = [sample for sample in samples if sample.submission.options.wants_progress]
        if curious:
            for sample, last in zip(curious, last_answers(curious), strict=True):
                self._post(sample.submission, Progress(sample.row, sample.combined_answer(last), sample.depth))

    def leave(self, samples: Sequence[Sample], reason: Reason) -> None:
        """Answer rows from the last exit each has seen."""
        if not samples:
            return
        for sample, last in zip(samples, last_answers(samples), strict=True):
            answer = sample.leave(reason, last)
            submission, exit_index, is_forced = sample.submission, last.exit_index, answer.reason.is_forced
            submission.served.costs.observe(submission.gear, exit_index, answer.depth, is_forced=is_forced)
            self._departures.append(sample.departure(answer))
            self._settle(sample, answer)

    def settle(self, samples: Sequence[Sample], error: OfframpError) -> None:
        """Give rows an error as their one answer."""
        for served, num_rows in Counter(sample.submission.served for sample in samples).items():
            self._observer.rows_failed(served.name, served.version, error.code, num_rows)
        for sample in samples:
            self._settle(sample, error)

    def _settle(self, sample: Sample, answer: RowAnswer | OfframpError) -> None:
        """Give a row its one answer, and the request whose last row it was its result."""
        submission = sample.submission
        sample.carries.drop()
        self._settled[submission.lot] = self._settled.get(submission.lot, 0) + 1
        if not submission.settle(sample, answer):
            return
        del self._owed[submission]
        now = self._clock()
        result, outcome = submission.result(now), submission.outcome()
        submission.served.tally.count_request(result, outcome)
        self._post(submission, result)
        self._observer.request_done(submission.done(outcome, now))

    def abandon(self, error: OfframpError) -> None:
        """Answer everyone who is still owed an answer with an error."""
        for submission in list(self._owed):
            self.settle(submission.unanswered, error)

    def flush(self) -> None:
        """Hand the round's events over, once per listener."""
        if self._departures:  # counted first: who has an answer finds it in the metrics
            departures, self._departures = self._departures, []
            self._observer.rows_left(departures)
        if self._events:
            outgoing, self._events = self._events, {}
            for listener, events in outgoing.items():
                tell(listener.deliver, events)
        if self._settled:
            settled, self._settled = self._settled, {}
            for lot, num_rows in settled.items():
                self._on_settled(lot, num_rows)

    def _post(self, submission: Submission, event: Progress | Result) -> None:
        self._events.setdefault(submission.listener, []).append((submission, event))

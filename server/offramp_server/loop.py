"""The device's loop, one round at a time: schedule -> run -> route.

A round gives up what cannot wait, lets the scheduler choose a dispatch, runs that stage, lets the router decide about
each row, answers those that leave *now* and queues the survivors. It has no thread and no clock of its own, so that a
test can drive it as a simulation.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from offramp_contract.errors import Cancelled, DeadlineExceeded, NotFinite, OfframpError, StageFailed
from offramp_contract.policy import Reason
from offramp_contract.statistics import Decision, FloatArray
from offramp_runtime import DeviceTensor, StageOutput

from offramp_server.messages import Departure, Observer, Progress, Result, RowAnswer, StageRun
from offramp_server.router import route
from offramp_server.scheduler import Dispatch, QueueKey, Scheduler
from offramp_server.served import Clock, ServedModel
from offramp_server.shield import tell
from offramp_server.submission import Listener, Sample, Submission, exit_answers

logger = logging.getLogger(__name__)
T = TypeVar("T")


class DeviceLoop:
    """Moves samples through the stages of the models on one device.

    Args:
        scheduler: Chooses what runs next.
        observer: Is told what happens.
        clock: Gives seconds.
        margin_s: Time kept free before a deadline for handing the answer over.
        on_settled: Called with a model and the number of its rows that were just answered.
        cancel_signal: Set whenever a submission was cancelled.
    """

    def __init__(
        self,
        scheduler: Scheduler[Sample],
        *,
        observer: Observer,
        clock: Clock,
        margin_s: float,
        on_settled: Callable[[ServedModel, int], None],
        cancel_signal: threading.Event,
    ) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._clock = clock
        self._margin_s = margin_s
        self._on_settled = on_settled
        self._cancel_signal = cancel_signal
        self._models: dict[str, ServedModel] = {}
        self._outbox: dict[Listener, list[tuple[Submission, Progress | Result]]] = {}
        self._departures: list[Departure] = []
        self._settled: Counter[ServedModel] = Counter()
        self._owed: dict[Submission, None] = {}

    @property
    def has_work(self) -> bool:
        """Whether any sample waits."""
        return len(self._scheduler) > 0

    @property
    def slack_s(self) -> float:
        """Seconds the device may do something else before a promise is broken; infinite if nothing waits."""
        return self._scheduler.slack_s(self._clock())

    def add_model(self, served: ServedModel) -> None:
        """Open the queues of a warmed-up model."""
        self._models[served.key] = served
        self._scheduler.add_model(served.queue_keys, served.profile)

    def remove_model(self, served: ServedModel, error: OfframpError) -> None:
        """Close a model's queues; rows that still waited are answered with `error`."""
        self._models.pop(served.key, None)
        self._settle(self._scheduler.remove_model(served.key), error)
        self._flush()

    def enqueue(self, submission: Submission, since_s: float) -> None:
        """Let a request's rows wait for the first stage, where they have waited since it was admitted."""
        self._owed[submission] = None
        for sample in submission.samples:
            sample.enqueued_s = since_s
        if submission.is_cancelled:  # before it stood anywhere: the signal may have come and gone
            self._cancel_signal.set()
        self._scheduler.put(submission.served.queue_keys[0], submission.samples)

    def step(self) -> bool:
        """Do one round.

        Returns:
            Whether a stage ran.
        """
        self._give_up()
        dispatch = self._scheduler.next(self._clock())
        if dispatch is not None:
            self._run(dispatch)
        self._flush()
        return dispatch is not None

    def abandon(self, error: OfframpError) -> None:
        """Answer everyone who is still owed an answer with an error: the loop will not go on."""
        for submission in list(self._owed):
            self._settle(submission.unanswered, error)
        self._flush()

    def _give_up(self) -> None:
        if self._cancel_signal.is_set():
            self._cancel_signal.clear()
            self._settle(self._scheduler.take_cancelled(), Cancelled("the client went away"))
        expired = self._scheduler.take_expired(self._clock())
        for sample in expired:
            sample.queue_s += self._clock() - sample.enqueued_s
        self._leave([sample for sample in expired if sample.seen], Reason.DEADLINE)
        late = DeadlineExceeded("latency_ms: the deadline passes before the first exit can answer")
        self._settle([sample for sample in expired if not sample.seen], late)

    def _run(self, dispatch: Dispatch[Sample]) -> None:
        served, stage, samples = self._models[dispatch.key.model], dispatch.key.stage, dispatch.samples
        started = self._clock()
        waited = tuple(started - sample.enqueued_s for sample in samples)
        ran = self._attempt(served, stage, samples, lambda: self._execute(served, stage, samples))
        ran_s = self._clock() - started
        if ran is None:
            self._scheduler.charge(dispatch.key.model, ran_s)
            return
        feeds, output, logits_BC = ran
        for sample, queue_s in zip(samples, waited, strict=True):
            sample.stages += (stage,)
            sample.queue_s += queue_s
            sample.compute_s += ran_s
            sample.device_s += ran_s / len(samples)
        survivors = self._route(served, dispatch.key, samples, output.decision_BD, logits_BC)
        self._carry_on(served, stage, samples, survivors, feeds | output.carries)
        seconds = self._clock() - started
        served.profile.stages[stage].observe(len(samples), seconds)
        served.tally.count_dispatch(stage, len(samples), seconds)
        self._scheduler.charge(dispatch.key.model, seconds)
        name = served.manifest.stages[stage].name
        self._observer.stage_ran(StageRun(served.name, served.version, name, dispatch.key.variant, seconds, waited))

    def _attempt(
        self, served: ServedModel, stage: int, samples: Sequence[Sample], device_work: Callable[[], T]
    ) -> T | None:
        """Do some rows' work on the device; whatever it raises is their answer, and every other row goes on."""
        try:
            return device_work()
        except Exception:
            name = served.manifest.stages[stage].name
            logger.exception("stage %s of model %s failed", name, served.name)
            self._settle(samples, StageFailed(f"stage {name!r} failed on this input"))
            return None

    def _execute(
        self, served: ServedModel, stage: int, samples: Sequence[Sample]
    ) -> tuple[dict[str, DeviceTensor], StageOutput, FloatArray | None]:
        """Run a stage; gives what it read, what it wrote, and the exit's logits if a row needs them."""
        feeds = self._gather(served, stage, samples)
        output = served.executor.run(stage, feeds)
        needs_logits = output.logits is not None and any(sample.needs_logits for sample in samples)
        return feeds, output, served.executor.device.download(output.logits) if needs_logits else None

    def _gather(self, served: ServedModel, stage: int, samples: Sequence[Sample]) -> dict[str, DeviceTensor]:
        padded = [*samples, *[samples[-1]] * (served.manifest.min_batch - len(samples))]
        feeds = {}
        for name in served.manifest.stages[stage].inputs:
            tensors, rows = zip(*(sample.carries[name] for sample in padded), strict=True)
            feeds[name] = served.executor.device.gather(tensors, rows)
        return feeds

    def _route(
        self,
        served: ServedModel,
        key: QueueKey,
        samples: Sequence[Sample],
        decision_BD: FloatArray | None,
        logits_BC: FloatArray | None,
    ) -> list[int]:
        """Answer the rows that leave; give the places of those that go on."""
        exit_index = served.manifest.stages[key.stage].exit
        if exit_index is None or decision_BD is None:
            return list(range(len(samples)))
        decision_BD = decision_BD[: len(samples)]
        finite_B = Decision(decision_BD).is_finite_B
        _look(exit_index, samples, decision_BD, logits_BC)
        if not finite_B.all():
            for sample in (samples[int(i)] for i in np.flatnonzero(~finite_B)):
                self._settle([sample], _not_finite(served, exit_index, sample))
        standing = [int(i) for i in np.flatnonzero(finite_B)]
        rows = [samples[i] for i in standing]
        if not rows:
            return []
        reachable_by_s = self._reachable_by_s(served, key, len(rows))
        reasons = route(exit_index, served.num_exits, decision_BD[standing], rows, reachable_by_s)
        for reason in set(reasons) - {Reason.CONTINUE}:
            self._leave([row for row, why in zip(rows, reasons, strict=True) if why is reason], reason)
        going_on = [i for i, reason in zip(standing, reasons, strict=True) if reason is Reason.CONTINUE]
        self._report_progress([samples[i] for i in going_on])
        return going_on

    def _reachable_by_s(self, served: ServedModel, key: QueueKey, num_rows: int) -> float:
        """Predict when rows that go on now could have their next exit's answer at the client."""
        following = key.stage + 1
        if following == len(served.queue_keys):
            return self._clock()
        waiting = num_rows + self._scheduler.num_waiting(served.queue_keys[following])
        likely_batch = min(waiting, served.profile.knee(following), served.max_batch)
        return self._clock() + served.profile.to_next_answer_s(following, likely_batch) + self._margin_s

    def _carry_on(
        self,
        served: ServedModel,
        stage: int,
        samples: Sequence[Sample],
        survivors: list[int],
        tensors: dict[str, DeviceTensor],
    ) -> None:
        """Queue the survivors for the next stage with what later stages read, and nothing else."""
        if not survivors:
            return
        staying = [samples[i] for i in survivors]
        live = served.live_after[stage]
        places = None if len(survivors) == len(samples) else survivors
        kept = self._attempt(served, stage, staying, lambda: served.compact(stage, tensors, places))
        if kept is None:
            return
        now = self._clock()
        for place, sample in enumerate(staying):
            sample.carries = {name: carry for name, carry in sample.carries.items() if name in live}
            for name, tensor in kept.items():
                sample.carries[name] = (tensor, place)
            sample.enqueued_s = now
        self._scheduler.put(served.queue_keys[stage + 1], staying)

    def _report_progress(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            submission = sample.submission
            if submission.options.wants_progress:
                self._post(submission, Progress(sample.row, sample.combined_answer(), sample.depth))

    def _leave(self, samples: Sequence[Sample], reason: Reason) -> None:
        """Answer rows from the last exit each has seen."""
        for sample in samples:
            served = sample.submission.served
            answer = sample.leave(reason)
            served.profile.observe_row(sample.device_s)
            self._departures.append(sample.departure(answer))
            self._settle([sample], answer)

    def _settle(self, samples: Sequence[Sample], answer: RowAnswer | OfframpError) -> None:
        """Give rows their one answer, and the requests whose last row that was their result."""
        if isinstance(answer, OfframpError):
            for served, num_rows in Counter(sample.submission.served for sample in samples).items():
                self._observer.rows_failed(served.name, served.version, answer.code, num_rows)
        for sample in samples:
            submission = sample.submission
            sample.carries = {}
            is_complete = submission.settle(sample, answer)
            self._settled[submission.served] += 1
            if is_complete:
                del self._owed[submission]
                now = self._clock()
                result = submission.result(now)
                submission.served.tally.count_request(result, submission.outcome())
                self._post(submission, result)
                self._observer.request_done(submission.done(now))

    def _post(self, submission: Submission, event: Progress | Result) -> None:
        self._outbox.setdefault(submission.listener, []).append((submission, event))

    def _flush(self) -> None:
        """Hand the round's events over, once per listener."""
        if self._departures:  # counted first: who has an answer finds it in the metrics
            departures, self._departures = self._departures, []
            self._observer.rows_left(departures)
        outbox, self._outbox = self._outbox, {}
        for listener, events in outbox.items():
            tell(listener.deliver, events)
        if self._settled:
            settled, self._settled = self._settled, Counter()
            for served, num_rows in settled.items():
                self._on_settled(served, num_rows)


def _look(exit_index: int, samples: Sequence[Sample], decision_BD: FloatArray, logits_BC: FloatArray | None) -> None:
    """Let each row remember what the exit says about it."""
    kept = None
    if logits_BC is not None:  # longer than the rows where a network needs more at once
        kept = (logits_C if sample.needs_logits else None for sample, logits_C in zip(samples, logits_BC, strict=False))
    for sample, answer in zip(samples, exit_answers(exit_index, decision_BD, kept), strict=True):
        sample.see(answer)
        sample.classes.append(int(answer.top_class_K[0]))


def _not_finite(served: ServedModel, exit_index: int, sample: Sample) -> NotFinite:
    name = served.manifest.exits[exit_index].name
    return NotFinite(f"inputs: row {sample.row} gives no finite answer at exit {name!r}", field="inputs")

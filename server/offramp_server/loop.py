"""The device's loop, one round at a time: schedule -> run -> route.

A round gives up what cannot wait, lets the scheduler choose a dispatch, runs that stage, lets the router decide about
each row, answers those that leave *now* and queues the survivors, each for the stage that its gates let it run next. It
has no thread and no clock of its own, so that a test can drive it as a simulation.

Rounds may overlap, one per runner: `choose` and `finish` are for one thread at a time, `execute` touches nothing but
the rows of its own dispatch.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from offramp_contract.errors import Cancelled, DeadlineExceeded, NotReady, OfframpError, StageFailed
from offramp_contract.policy import Reason

from offramp_server.admission import Lot
from offramp_server.boundary import Boundary, Ran
from offramp_server.messages import Observer, StageRun
from offramp_server.outbox import Outbox
from offramp_server.scheduler import Dispatch, Scheduler
from offramp_server.served import Clock, ServedModel
from offramp_server.submission import Sample, Submission

logger = logging.getLogger(__name__)


class DeviceLoop:
    """Moves samples through the stages of the models on one device.

    Args:
        scheduler: Chooses what runs next.
        observer: Is told what happens.
        clock: Gives seconds.
        margin_s: Time kept free before a deadline for handing the answer over.
        on_settled: Called with a lot of rows in flight and how many of them were just answered.
        cancel_signal: Set whenever a submission was cancelled.
    """

    def __init__(
        self,
        scheduler: Scheduler[Sample],
        *,
        observer: Observer,
        clock: Clock,
        margin_s: float,
        on_settled: Callable[[Lot, int], None],
        cancel_signal: threading.Event,
    ) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._clock = clock
        self._cancel_signal = cancel_signal
        self._models: dict[str, ServedModel] = {}
        self._outbox = Outbox(observer, clock, on_settled)
        self._boundary = Boundary(scheduler, self._outbox, clock, margin_s)

    @property
    def has_work(self) -> bool:
        """Whether any sample waits."""
        return len(self._scheduler) > 0

    @property
    def has_room(self) -> bool:
        """Whether the device has a thread free for another dispatch. May be read from any thread."""
        return self._scheduler.has_room

    @property
    def may_start(self) -> bool:
        """Whether a sample waits that does not wait for what runs to end."""
        return self._scheduler.may_start

    @property
    def slack_s(self) -> float:
        """Seconds the device may do something else before a promise is broken; infinite if nothing waits."""
        return self._scheduler.slack_s(self._clock())

    @property
    def wait_s(self) -> float:
        """Seconds until something may run; 0 unless all that waits is held back.

        Infinite if nothing waits, or if it waits for what runs to end.
        """
        return self._scheduler.wait_s(self._clock())

    def num_unseen(self, served: ServedModel) -> int:
        """Count the rows of a model that wait and have not seen an exit yet. May be called from any thread."""
        keys = served.queue_keys[: served.profile.first_answer_stage() + 1]
        with suppress(KeyError, RuntimeError):  # the model was removed meanwhile, or the queues changed
            return sum(self._scheduler.num_waiting(key) for key in keys)
        return 0

    def add_model(self, served: ServedModel) -> None:
        """Open the queues of a warmed-up model."""
        self._models[served.key] = served
        self._scheduler.add_model(served.queue_keys, served.wide, served.narrow)

    def remove_model(self, served: ServedModel, error: OfframpError) -> None:
        """Close a model's queues; rows that still waited are answered with `error`."""
        self._models.pop(served.key, None)
        self._outbox.settle(self._scheduler.remove_model(served.key), error)
        self._outbox.flush()

    def enqueue(self, submission: Submission, since_s: float) -> None:
        """Let a request's rows wait for their first stage, where they have waited since it was admitted."""
        self._outbox.owe(submission)
        if submission.is_cancelled:  # before it stood anywhere: the signal may have come and gone
            self._cancel_signal.set()
        self._boundary.enter(submission.served, submission.samples, since_s)

    def step(self) -> bool:
        """Do one round.

        Returns:
            Whether a stage ran.
        """
        dispatch = self.choose()
        if dispatch is None:
            return False
        self.finish(dispatch, self.execute(dispatch))
        return True

    def choose(self) -> Dispatch[Sample] | None:
        """Begin a round: give up what cannot wait, and take what runs now; None if nothing waits."""
        now = self._clock()
        self._give_up(now)
        dispatch = self._scheduler.next(now)
        if dispatch is not None:
            self._force_out(dispatch.overtaken, now)
        self._outbox.flush()
        return dispatch

    def execute(self, dispatch: Dispatch[Sample]) -> Ran | float:
        """Run a stage; gives what came of it, or the seconds after which it failed, which is its rows' answer."""
        samples, stage = dispatch.samples, dispatch.key.stage
        served = samples[0].submission.served
        executor = served.executor_of(dispatch.width)
        started_s = self._clock()
        try:
            feeds = served.gather(stage, [sample.carries for sample in samples], dispatch.num_padded)
            output = executor.run(stage, feeds)
            needs_logits = output.logits is not None and any(sample.needs_logits for sample in samples)
            logits_BC = executor.device.download(output.logits) if needs_logits else None
        except Exception:
            logger.exception("stage %s of model %s failed", served.manifest.stages[stage].name, served.name)
            return self._clock() - started_s
        return Ran(started_s, self._clock() - started_s, feeds, output, logits_BC)

    def finish(self, dispatch: Dispatch[Sample], ran: Ran | float) -> None:
        """End a round: answer the rows that leave, queue those that go on, and take note of what it cost."""
        samples, key, others_wait = dispatch.samples, dispatch.key, self.has_work
        served = samples[0].submission.served
        seconds = ran.seconds if isinstance(ran, Ran) else ran
        if key.model not in self._models:  # it was removed while the stage ran
            self._outbox.settle(samples, NotReady(f"model {served.name!r} was unloaded"))
        elif isinstance(ran, Ran):
            waited = _book(samples, key.stage, ran)
            self._boundary.cross(served, key.stage, samples, ran)
            seconds = self._clock() - ran.started_s
            served.observe_round(dispatch.width, key.stage, len(samples), seconds, others_wait=others_wait)
            self._note(served, dispatch, waited, seconds)
        else:
            name = served.manifest.stages[key.stage].name
            self._outbox.settle(samples, StageFailed(f"stage {name!r} failed on this input"))
        self._scheduler.finish(dispatch, seconds)
        self._outbox.flush()

    def abandon(self, error: OfframpError) -> None:
        """Answer everyone who is still owed an answer with an error: the loop will not go on."""
        self._outbox.abandon(error)
        self._outbox.flush()

    def _give_up(self, now: float) -> None:
        if self._cancel_signal.is_set():
            self._cancel_signal.clear()
            self._outbox.settle(self._scheduler.take_cancelled(), Cancelled("the client went away"))
        for sample in self._scheduler.take_hurried(now):
            self._boundary.hurry(sample)
        self._force_out(self._scheduler.take_expired(now), now)

    def _force_out(self, expired: Sequence[Sample], now: float) -> None:
        """Answer rows that must not wait any longer with what they have, or with an error."""
        if not expired:
            return
        for sample in expired:
            sample.queue_s += now - sample.enqueued_s
        self._outbox.leave([sample for sample in expired if sample.sighting is not None], Reason.DEADLINE)
        late = DeadlineExceeded("latency_ms: the deadline passes before the first exit can answer")
        self._outbox.settle([sample for sample in expired if sample.sighting is None], late)

    def _note(self, served: ServedModel, dispatch: Dispatch[Sample], waited: tuple[float, ...], seconds: float) -> None:
        """Take note of a dispatch."""
        key, stage, num_rows = dispatch.key, dispatch.key.stage, len(waited)
        dispatch.width.profile.stages[stage].observe(num_rows, seconds)
        served.tally.count_dispatch(num_rows, seconds, is_first=stage == served.profile.trunk_from(0))
        name = served.manifest.stages[stage].name
        self._observer.stage_ran(StageRun(served.name, served.version, name, key.variant, seconds, waited))


def _book(samples: Sequence[Sample], stage: int, ran: Ran) -> tuple[float, ...]:
    """Write down what a dispatch was to each of its rows; gives the seconds each has waited for it."""
    started_s, ran_s = ran.started_s, ran.seconds
    waited = []
    for sample in samples:
        queue_s = started_s - sample.enqueued_s
        waited.append(queue_s)
        sample.stages.append(stage)
        sample.queue_s += queue_s
        sample.compute_s += ran_s
    return tuple(waited)

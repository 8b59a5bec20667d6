"""The device's loop, one round at a time: schedule -> run -> route.

A round gives up what cannot wait, lets the scheduler choose a dispatch, runs that stage, lets the router decide about
each row, answers those that leave *now* and queues the survivors, each for the stage that its gates let it run next. It
has no thread and no clock of its own, so that a test can drive it as a simulation.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from offramp_contract.errors import Cancelled, DeadlineExceeded, NotFinite, OfframpError, StageFailed
from offramp_contract.policy import Reason
from offramp_contract.statistics import Decision, FloatArray
from offramp_runtime import DeviceTensor, StageOutput

from offramp_server.gating import START, Hop
from offramp_server.messages import Observer, StageRun
from offramp_server.outbox import Outbox
from offramp_server.router import hurry, part, route
from offramp_server.scheduler import Dispatch, Scheduler
from offramp_server.served import Clock, ServedModel
from offramp_server.submission import Carries, Sample, Submission, look

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
        self._cancel_signal = cancel_signal
        self._models: dict[str, ServedModel] = {}
        self._outbox = Outbox(observer, clock, on_settled)

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
        self._outbox.settle(self._scheduler.remove_model(served.key), error)
        self._outbox.flush()

    def enqueue(self, submission: Submission, since_s: float) -> None:
        """Let a request's rows wait for their first stage, where they have waited since it was admitted."""
        self._outbox.owe(submission)
        if submission.is_cancelled:  # before it stood anywhere: the signal may have come and gone
            self._cancel_signal.set()
        served, samples = submission.served, submission.samples
        for following, places in self._part(served, START, samples, range(len(samples))).items():
            hop = served.gating.hop(START, following)
            self._queue_up(hop, [samples[i] for i in places], [{}] * len(places), since_s)

    def step(self) -> bool:
        """Do one round.

        Returns:
            Whether a stage ran.
        """
        self._give_up()
        dispatch = self._scheduler.next(self._clock())
        if dispatch is not None:
            self._run(dispatch)
        self._outbox.flush()
        return dispatch is not None

    def abandon(self, error: OfframpError) -> None:
        """Answer everyone who is still owed an answer with an error: the loop will not go on."""
        self._outbox.abandon(error)
        self._outbox.flush()

    def _give_up(self) -> None:
        if self._cancel_signal.is_set():
            self._cancel_signal.clear()
            self._outbox.settle(self._scheduler.take_cancelled(), Cancelled("the client went away"))
        for sample in self._scheduler.take_hurried(self._clock()):
            hop = hurry(sample.submission.served.gating, sample.next_stage - 1, sample)
            self._queue_up(hop, [sample], [{}], sample.enqueued_s)
        expired = self._scheduler.take_expired(self._clock())
        for sample in expired:
            sample.queue_s += self._clock() - sample.enqueued_s
        self._outbox.leave([sample for sample in expired if sample.seen], Reason.DEADLINE)
        late = DeadlineExceeded("latency_ms: the deadline passes before the first exit can answer")
        self._outbox.settle([sample for sample in expired if not sample.seen], late)

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
        survivors = self._route(served, stage, samples, output.decision_BD, logits_BC)
        if output.scores_BK is not None:
            survivors = self._take_scores(served, stage, samples, survivors, output.scores_BK)
        for following, places in self._part(served, stage, samples, survivors).items():
            # The half that parts from the rest copies its rows; where rows have left, nobody holds on to theirs.
            keeps = len(survivors) == len(samples) and 2 * len(places) >= len(samples)
            hop = served.gating.hop(stage, following)
            self._carry_on(hop, samples, places, feeds | output.carries, keeps=keeps)
        seconds = self._clock() - started
        served.profile.stages[stage].observe(len(samples), seconds)
        served.tally.count_dispatch(len(samples), seconds, is_first=stage == served.profile.trunk_from(0))
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
            self._outbox.settle(samples, StageFailed(f"stage {name!r} failed on this input"))
            return None

    def _execute(
        self, served: ServedModel, stage: int, samples: Sequence[Sample]
    ) -> tuple[dict[str, DeviceTensor], StageOutput, FloatArray | None]:
        """Run a stage; gives what it read, what it wrote, and the exit's logits if a row needs them."""
        feeds = served.gather(stage, [sample.carries for sample in samples])
        output = served.executor.run(stage, feeds)
        needs_logits = output.logits is not None and any(sample.needs_logits for sample in samples)
        return feeds, output, served.executor.device.download(output.logits) if needs_logits else None

    def _route(
        self,
        served: ServedModel,
        stage: int,
        samples: Sequence[Sample],
        decision_BD: FloatArray | None,
        logits_BC: FloatArray | None,
    ) -> Sequence[int]:
        """Answer the rows that leave; give the places of those that go on."""
        exit_index = served.manifest.stages[stage].exit
        if exit_index is None or decision_BD is None:
            return range(len(samples))
        decision_BD = decision_BD[: len(samples)]
        finite_B = Decision(decision_BD).is_finite_B
        look(exit_index, samples, decision_BD, logits_BC)
        where = f"exit {served.manifest.exits[exit_index].name!r}"
        if not finite_B.all():
            self._refuse([samples[int(i)] for i in np.flatnonzero(~finite_B)], where)
        standing = [int(i) for i in np.flatnonzero(finite_B)]
        rows = [samples[i] for i in standing]
        if not rows:
            return []
        reachable_by_s = self._next_exit_by_s(served, stage, len(rows))
        reasons = route(exit_index, served.num_exits, decision_BD[standing], rows, reachable_by_s)
        for reason in set(reasons) - {Reason.CONTINUE}:
            self._outbox.leave([row for row, why in zip(rows, reasons, strict=True) if why is reason], reason)
        going_on = [i for i, reason in zip(standing, reasons, strict=True) if reason is Reason.CONTINUE]
        self._outbox.report_progress([samples[i] for i in going_on])
        return going_on

    def _take_scores(
        self,
        served: ServedModel,
        stage: int,
        samples: Sequence[Sample],
        places: Sequence[int],
        scores_BK: FloatArray,
    ) -> list[int]:
        """Let the rows at some places know what their gates scored; give the places of those who got numbers."""
        rows = [samples[i] for i in places]
        blinded = served.gating.take_scores(stage, [row.gates for row in rows], scores_BK[list(places)])
        for row, gate in zip(rows, blinded, strict=True):
            if gate is not None:
                self._refuse([row], f"gate {served.manifest.gates[gate].name!r}")
        return [i for i, gate in zip(places, blinded, strict=True) if gate is None]

    def _refuse(self, samples: Sequence[Sample], where: str) -> None:
        for sample in samples:
            sentence = f"inputs: row {sample.row} gives no finite answer at {where}"
            self._outbox.settle([sample], NotFinite(sentence, field="inputs"))

    def _next_exit_by_s(self, served: ServedModel, stage: int, num_rows: int) -> float:
        """Predict when rows that go on now could have their next exit's answer at the client, every gate shut."""
        following = stage + 1
        if following == len(served.queue_keys):
            return self._clock()
        return self._reachable_by_s(served, served.profile.trunk_from(following), num_rows)

    def _reachable_by_s(self, served: ServedModel, following: int, num_rows: int) -> float:
        """Predict when rows that run a stage next could have their next exit's answer at the client."""
        waiting = num_rows + self._scheduler.num_waiting(served.queue_keys[following])
        likely_batch = min(waiting, served.profile.knee(following), served.max_batch)
        return self._clock() + served.profile.to_next_answer_s(following, likely_batch) + self._margin_s

    def _part(
        self, served: ServedModel, stage: int, samples: Sequence[Sample], places: Sequence[int]
    ) -> Mapping[int, Sequence[int]]:
        """Part the rows at some places by the stage they run next."""
        if not served.manifest.gates:
            return {stage + 1: places} if places else {}
        rows = [samples[i] for i in places]
        parts = part(served.gating, stage, rows, partial(self._reachable_by_s, served))
        for following, members in parts.items():
            num_free = sum(not rows[i].gates.is_hurried for i in members)
            served.profile.observe_gates(served.gating.hop(stage, following).skipped, following, num_free)
        return {following: [places[i] for i in members] for following, members in parts.items()}

    def _carry_on(
        self,
        hop: Hop,
        samples: Sequence[Sample],
        places: Sequence[int],
        tensors: Mapping[str, DeviceTensor],
        *,
        keeps: bool,
    ) -> None:
        """Queue the rows at some places for the stage they run next, with what is needed from there on.

        They keep the whole tensors, or are given copies of their rows.
        """
        staying = [samples[i] for i in places]
        served, taken = staying[0].submission.served, None if keeps else places
        kept = self._attempt(served, hop.stage, staying, lambda: served.compact(hop, tensors, taken))
        if kept is not None:
            rows = places if keeps else range(len(places))
            self._queue_up(hop, staying, [{name: (kept[name], row) for name in kept} for row in rows], self._clock())

    def _queue_up(self, hop: Hop, samples: Sequence[Sample], fresh: Sequence[Carries], since_s: float) -> None:
        """Let samples of one model wait for the stage they run next, each with what it holds and what is fresh."""
        for sample, carries in zip(samples, fresh, strict=True):
            held = sample.carries
            sample.carries = {name: carry for name, carry in held.items() if name in hop.live}
            if hop.aliases:
                sample.carries |= {name: held[source] for name, source in hop.aliases if source in held}
            sample.carries |= carries
            sample.next_stage = hop.following
            sample.enqueued_s = since_s
        self._scheduler.put(samples[0].submission.served.queue_keys[hop.following], samples)

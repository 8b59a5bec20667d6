"""The device's loop, one round at a time: schedule -> run -> route.

A round gives up what cannot wait, lets the scheduler choose a dispatch, runs that stage, lets the router decide about
each row, answers those that leave *now* and queues the survivors, each for the stage that its gates let it run next. It
has no thread and no clock of its own, so that a test can drive it as a simulation.

Rounds may overlap, one per runner: `choose` and `finish` are for one thread at a time, `execute` touches nothing but
the rows of its own dispatch.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from offramp_contract.errors import Cancelled, DeadlineExceeded, NotFinite, OfframpError, StageFailed
from offramp_contract.policy import Reason
from offramp_contract.statistics import Decision, FloatArray
from offramp_runtime import DeviceTensor, StageOutput

from offramp_server.exits import Sighting
from offramp_server.gating import START, Hop
from offramp_server.messages import Observer, StageRun
from offramp_server.outbox import Outbox
from offramp_server.router import hurry, part, route
from offramp_server.scheduler import Dispatch, QueueKey, Scheduler
from offramp_server.served import Clock, ServedModel
from offramp_server.submission import Sample, Submission, look

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ran:
    """A stage that has run over a dispatch's rows.

    Attributes:
        started_s: When it began, on the engine's clock.
        seconds: How long it took, rows put together and all.
        feeds: What it read.
        output: What it wrote; None if it failed.
        logits_BC: The exit's raw scores, if a row needs them.
    """

    started_s: float
    seconds: float
    feeds: Mapping[str, DeviceTensor]
    output: StageOutput | None
    logits_BC: FloatArray | None = None


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
        if not served.manifest.gates:
            self._queue_up(served, 0, samples, since_s)
            return
        for following, places in self._part(served, START, samples, range(len(samples))).items():
            hop, entering = served.gating.hop(START, following), [samples[i] for i in places]
            came = entering[0].carries.batch
            batch = served.compact(hop, came.tensors, came.num_rows, None)
            for sample in entering:
                sample.carries.move(hop, batch, sample.row)
            self._queue_up(served, following, entering, since_s)

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
        self._outbox.flush()
        return dispatch

    def execute(self, dispatch: Dispatch[Sample]) -> Ran:
        """Run a stage; whatever is raised is its rows' answer."""
        samples, stage = dispatch.samples, dispatch.key.stage
        served = samples[0].submission.served
        started_s = self._clock()
        try:
            feeds = served.gather(stage, [sample.carries for sample in samples])
            output = served.executor.run(stage, feeds)
            needs_logits = output.logits is not None and any(sample.needs_logits for sample in samples)
            logits_BC = served.executor.device.download(output.logits) if needs_logits else None
        except Exception:
            logger.exception("stage %s of model %s failed", served.manifest.stages[stage].name, served.name)
            return Ran(started_s, self._clock() - started_s, {}, None)
        return Ran(started_s, self._clock() - started_s, feeds, output, logits_BC)

    def finish(self, dispatch: Dispatch[Sample], ran: Ran) -> None:
        """End a round: answer the rows that leave, queue those that go on, and take note of what it cost."""
        samples, key = dispatch.samples, dispatch.key
        served = samples[0].submission.served
        if ran.output is None:
            name = served.manifest.stages[key.stage].name
            self._outbox.settle(samples, StageFailed(f"stage {name!r} failed on this input"))
            self._scheduler.charge(key.model, ran.seconds)
        else:
            waited = _book(samples, key.stage, ran)
            self._move_on(served, key.stage, samples, ran, ran.output)
            self._note(served, key, waited, self._clock() - ran.started_s)
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
            served = sample.submission.served
            hop = hurry(served.gating, sample.next_stage - 1, sample)
            sample.carries.skip(hop)
            self._queue_up(served, hop.following, [sample], sample.enqueued_s)
        expired = self._scheduler.take_expired(now)
        if not expired:
            return
        for sample in expired:
            sample.queue_s += now - sample.enqueued_s
        self._outbox.leave([sample for sample in expired if sample.sighting is not None], Reason.DEADLINE)
        late = DeadlineExceeded("latency_ms: the deadline passes before the first exit can answer")
        self._outbox.settle([sample for sample in expired if sample.sighting is None], late)

    def _move_on(
        self, served: ServedModel, stage: int, samples: Sequence[Sample], ran: Ran, output: StageOutput
    ) -> None:
        """Answer or queue the rows that have run a stage."""
        places: Sequence[int] = range(len(samples))
        if output.decision_BD is not None:
            places = self._route(served, stage, samples, output.decision_BD, ran.logits_BC)
        if output.scores_BK is not None and places:
            places = self._take_scores(served, stage, samples, places, output.scores_BK)
        tensors = {**ran.feeds, **output.carries}
        for following, members in self._part(served, stage, samples, places).items():
            # The half that parts from the rest copies its rows; where rows have left, nobody holds on to theirs.
            keeps = len(places) == len(samples) and 2 * len(members) >= len(samples)
            hop = served.gating.hop(stage, following)
            self._carry_on(hop, samples, members, tensors, keeps=keeps)

    def _note(self, served: ServedModel, key: QueueKey, waited: tuple[float, ...], seconds: float) -> None:
        """Take note of a dispatch."""
        stage, num_rows = key.stage, len(waited)
        served.profile.stages[stage].observe(num_rows, seconds)
        served.tally.count_dispatch(num_rows, seconds, is_first=stage == served.profile.trunk_from(0))
        self._scheduler.charge(key.model, seconds)
        name = served.manifest.stages[stage].name
        self._observer.stage_ran(StageRun(served.name, served.version, name, key.variant, seconds, waited))

    def _route(
        self,
        served: ServedModel,
        stage: int,
        samples: Sequence[Sample],
        decision_BD: FloatArray,
        logits_BC: FloatArray | None,
    ) -> Sequence[int]:
        """Answer the rows that leave; give the places of those that go on."""
        exit_index = served.manifest.stages[stage].exit
        if exit_index is None:
            return range(len(samples))
        decision_BD = decision_BD[: len(samples)]
        look(Sighting(exit_index, decision_BD, logits_BC), samples)
        standing: Sequence[int] = range(len(samples))
        if not Decision(decision_BD).is_finite:
            standing = self._refuse_unfinished(exit_index, served, samples, decision_BD)
            if not standing:
                return []
            decision_BD = decision_BD[standing]
        rows = [samples[i] for i in standing]
        reachable_by_s = self._next_exit_by_s(served, stage, len(rows))
        reasons = route(exit_index, served.num_exits, decision_BD, rows, reachable_by_s)
        leaving: dict[Reason, list[Sample]] = {}
        going_on = []
        for place, row, reason in zip(standing, rows, reasons, strict=True):
            if reason is Reason.CONTINUE:
                going_on.append(place)
            else:
                leaving.setdefault(reason, []).append(row)
        for reason, leavers in leaving.items():
            self._outbox.leave(leavers, reason)
        self._outbox.report_progress([samples[i] for i in going_on])
        return going_on

    def _refuse_unfinished(
        self, exit_index: int, served: ServedModel, samples: Sequence[Sample], decision_BD: FloatArray
    ) -> list[int]:
        """Answer the rows of which an exit says what is no number; give the places of the others."""
        finite_B = Decision(decision_BD).is_finite_B.tolist()
        where = f"exit {served.manifest.exits[exit_index].name!r}"
        self._refuse([sample for sample, is_finite in zip(samples, finite_B, strict=True) if not is_finite], where)
        return [place for place, is_finite in enumerate(finite_B) if is_finite]

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
        scored_BK = scores_BK[: len(rows)] if len(rows) == len(samples) else scores_BK[places]
        blinded = served.gating.take_scores(stage, [row.gates for row in rows], scored_BK)
        if not any(gate is not None for gate in blinded):
            return list(places)
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
        served = staying[0].submission.served
        try:
            batch = served.compact(hop, tensors, len(samples), None if keeps else places)
        except Exception:
            name = served.manifest.stages[hop.stage].name
            logger.exception("rows of stage %s of model %s cannot be kept", name, served.name)
            self._outbox.settle(staying, StageFailed(f"stage {name!r} failed on this input"))
            return
        for sample, place in zip(staying, places if keeps else batch.places, strict=True):
            sample.carries.move(hop, batch, place)
        self._queue_up(served, hop.following, staying, self._clock())

    def _queue_up(self, served: ServedModel, following: int, samples: Sequence[Sample], since_s: float) -> None:
        """Let samples of one model wait for the stage they run next."""
        for sample in samples:
            sample.next_stage = following
            sample.enqueued_s = since_s
        self._scheduler.put(served.queue_keys[following], samples)


def _book(samples: Sequence[Sample], stage: int, ran: Ran) -> tuple[float, ...]:
    """Write down what a dispatch was to each of its rows; gives the seconds each has waited for it."""
    started_s, ran_s, share_s = ran.started_s, ran.seconds, ran.seconds / len(samples)
    waited = []
    for sample in samples:
        queue_s = started_s - sample.enqueued_s
        waited.append(queue_s)
        sample.stages.append(stage)
        sample.queue_s += queue_s
        sample.compute_s += ran_s
        sample.device_s += share_s
    return tuple(waited)

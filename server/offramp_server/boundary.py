"""Where rows go when a stage has run: out with an answer, or into the queue of the stage that their gates let them run.

Shapes: B = rows of a dispatch, C = classes, D = width of a decision, K = gates that the stage scores.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from offramp_contract.errors import NotFinite, StageFailed
from offramp_contract.policy import Reason
from offramp_contract.statistics import Decision, FloatArray
from offramp_runtime import DeviceTensor, StageOutput

from offramp_server.exits import Sighting
from offramp_server.gating import START, Hop
from offramp_server.outbox import Outbox
from offramp_server.router import hurry, part, route
from offramp_server.scheduler import Scheduler
from offramp_server.served import Clock, ServedModel
from offramp_server.sightings import look
from offramp_server.submission import Sample

logger = logging.getLogger(__name__)


LEAST_SHARE_KEPT: Final = 0.25
"""Rows that part as fewer of their batch get copies of their own; those that keep it hold all of it until the last of
them has run."""


class Ran(NamedTuple):
    """A stage that has run over a dispatch's rows.

    Attributes:
        started_s: When it began, on the engine's clock.
        seconds: How long it took, rows put together and all.
        feeds: What it read.
        output: What it wrote.
        logits_BC: The exit's raw scores, if a row needs them.
    """

    started_s: float
    seconds: float
    feeds: Mapping[str, DeviceTensor]
    output: StageOutput
    logits_BC: FloatArray | None = None


class Boundary:
    """Moves rows over the boundaries between stages.

    Args:
        scheduler: Holds those that wait.
        outbox: Answers those that leave.
        clock: Gives seconds.
        margin_s: Time kept free before a deadline for handing the answer over.
    """

    def __init__(self, scheduler: Scheduler[Sample], outbox: Outbox, clock: Clock, margin_s: float) -> None:
        self._scheduler = scheduler
        self._outbox = outbox
        self._clock = clock
        self._margin_s = margin_s

    def enter(self, served: ServedModel, samples: Sequence[Sample], since_s: float) -> None:
        """Let a request's rows wait for their first stage, where they have waited since a time."""
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

    def hurry(self, sample: Sample) -> None:
        """Let a row that has no time for the gated stage it waits for go past it."""
        served = sample.submission.served
        hop = hurry(served.gating, sample.next_stage - 1, sample)
        sample.carries.skip(hop)
        self._queue_up(served, hop.following, [sample], sample.enqueued_s)

    def cross(self, served: ServedModel, stage: int, samples: Sequence[Sample], ran: Ran) -> None:
        """Answer or queue the rows that have run a stage."""
        output = ran.output
        places: Sequence[int] = range(len(samples))
        if output.decision_BD is not None:
            places = self._route(served, stage, samples, output.decision_BD, ran.logits_BC)
        if output.scores_BK is not None and places:
            places = self._take_scores(served, stage, samples, places, output.scores_BK)
        tensors = {**ran.feeds, **output.carries}
        for following, members in self._part(served, stage, samples, places).items():
            # Few that part from the rest copy their rows; where rows have left, nobody holds on to theirs.
            keeps = len(places) == len(samples) and LEAST_SHARE_KEPT * len(samples) <= len(members)
            hop = served.gating.hop(stage, following)
            self._carry_on(hop, samples, members, tensors, keeps=keeps)

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
        """Predict when rows that run a stage next could have their next exit's answer at the client.

        Where no exit is forced, that is always soon enough.
        """
        if not self._scheduler.rules.forced_exits:
            return -math.inf
        needed_s = self._scheduler.to_next_answer_s(served.queue_keys[following], num_rows)
        return self._clock() + needed_s + self._margin_s

    def _part(
        self, served: ServedModel, stage: int, samples: Sequence[Sample], places: Sequence[int]
    ) -> Mapping[int, Sequence[int]]:
        """Part the rows at some places by the stage they run next."""
        if not places:
            return {}
        if not served.gating.is_gated_S[stage + 1]:
            return {stage + 1: places}
        rows = [samples[i] for i in places]
        parts = part(served.gating, stage, rows, partial(self._reachable_by_s, served))
        for following, members in parts.items():
            num_free = sum(not rows[i].gates.is_hurried for i in members)
            served.profile.observe_gates(served.gating.hop(stage, following).skipped, following, num_free)
        if len(rows) == len(samples):
            return parts
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

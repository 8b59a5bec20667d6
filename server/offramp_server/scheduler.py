"""Which stage runs next, with which samples. Pure Python: time is an argument, and a tensor is never seen.

One scheduler serves one device. It holds a queue per (model, stage, variant), ordered by deadline, and forms a batch
when asked for one: work waits only because the device is busy. Rows that wait for the same stage run together,
whatever batch they came from (continuous, stage-level batching).

* No batch breaks a promise: a dispatch's predicted time is capped by the tightest slack in play, and where even one row
  would break another's promise, a queue whose dispatch breaks none goes first.
* When a dispatch would cost some row its chance of one more exit, the row with the least laxity goes first. Otherwise
  the queue that comes closest to its stage's best throughput does, ties to the deepest, which bounds the carries held.
* A batch that more rows would speed up waits for those in the gated stages before it: rows whose gates disagreed come
  together again, where otherwise every disagreement would leave smaller batches for good.
* Models that wait at the same time share the device's seconds evenly (start-time fair queueing, Goyal 1996).
"""

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

from offramp_server.profile import PEAK_SHARE, Profile


class Waiting(Protocol):
    """What the scheduler must know of a sample."""

    deadline_s: float
    """On the engine's clock; infinite without one."""
    may_be_dropped: bool
    """Whether the request would rather be refused than answered late."""

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


W = TypeVar("W", bound=Waiting)


@dataclass(frozen=True, slots=True)
class QueueKey:
    """One place where samples wait: a stage of a model, in one numeric variant."""

    model: str
    stage: int
    variant: str = "fp32"


@dataclass(frozen=True, slots=True)
class Dispatch(Generic[W]):
    """Samples that run one stage together, earliest deadline first; rows that are late anyway may come last."""

    key: QueueKey
    samples: list[W]


def _deadline_of(entry: tuple[float, int, object]) -> float:
    return entry[0]


@dataclass(slots=True)
class _Queue(Generic[W]):
    key: QueueKey
    profile: Profile
    is_gated: bool
    entries: list[tuple[float, int, W]] = field(default_factory=list)

    @property
    def holds_answers(self) -> bool:
        """Whether the samples that wait here have passed an exit, and so can leave at any time."""
        return self.key.stage > self.profile.first_answer_stage()

    @property
    def needed_s(self) -> float:
        """Seconds from dispatch to the next exit, for one row."""
        return self.profile.to_next_answer_s(self.key.stage, 1)

    def take(self, first: int, num: int) -> list[W]:
        """Remove and give some samples that wait side by side."""
        taken = [entry[2] for entry in self.entries[first : first + num]]
        del self.entries[first : first + num]
        return taken

    def first_deadline_from(self, time_s: float) -> float:
        """The earliest deadline here that is not before a time; infinite if there is none."""
        index = bisect_left(self.entries, time_s, key=_deadline_of)
        return self.entries[index][0] if index < len(self.entries) else math.inf


@dataclass(slots=True)
class _Share:
    """Device seconds of one model, counted from the moment it had work together with others."""

    used_s: float = 0.0
    num_waiting: int = 0


@dataclass(slots=True)
class _Candidate(Generic[W]):
    """A queue that could run now, and what its most pressing row allows; see `Scheduler._slacks`."""

    queue: _Queue[W]
    laxity_s: float
    slack_s: float
    own_slack_s: float
    size: int = 1
    efficiency: float = 1.0
    breaks_a_promise: bool = False

    @property
    def predicted_s(self) -> float:
        """Seconds its dispatch will rarely exceed."""
        return self.queue.profile.bound_s(self.queue.key.stage, self.size)

    def settle(self, size: int, others_s: float) -> None:
        """Fix the size of its batch, beside the slack of all others.

        Its efficiency is the share of the stage's best throughput that it reaches; near enough counts as all.
        """
        stage = self.queue.profile.stages[self.queue.key.stage]
        share = (size / stage.mean_s(size)) / (stage.knee / stage.mean_s(stage.knee))
        self.size, self.efficiency = size, 1.0 if share >= PEAK_SHARE else share
        self.breaks_a_promise = self.predicted_s > others_s

    def may_join(self, other: "_Candidate[W]") -> bool:
        """Whether rows that wait here for a gated stage may run with another queue's next."""
        key, deeper = self.queue.key, other.queue.key
        return key.model == deeper.model and key.stage < deeper.stage <= self.queue.profile.trunk_from(key.stage)


class Scheduler(Generic[W]):
    """Holds the waiting samples of every model on one device.

    Args:
        max_batch: Most rows in one dispatch.
        margin_s: Time kept free before a deadline for handing the answer over.
        fair_share_s: Device time by which one model may run ahead of another that waits.
    """

    def __init__(self, max_batch: int, margin_s: float, fair_share_s: float) -> None:
        self._max_batch = max_batch
        self._margin_s = margin_s
        self._fair_share_s = fair_share_s
        self._queues: dict[QueueKey, _Queue[W]] = {}
        self._shares: dict[str, _Share] = {}
        self._virtual_s = 0.0
        self._arrivals = count()

    def __len__(self) -> int:
        return sum(share.num_waiting for share in self._shares.values())

    def add_model(self, keys: Iterable[QueueKey], profile: Profile) -> None:
        """Open the queues of a model, one per stage."""
        for key in keys:
            self._queues[key] = _Queue(key, profile, profile.is_gated(key.stage))
            self._shares.setdefault(key.model, _Share())

    def remove_model(self, model: str) -> list[W]:
        """Close a model's queues and give back what still waited there."""
        left = [entry[2] for key, queue in self._queues.items() if key.model == model for entry in queue.entries]
        self._queues = {key: queue for key, queue in self._queues.items() if key.model != model}
        self._shares.pop(model, None)
        return left

    def put(self, key: QueueKey, samples: Sequence[W]) -> None:
        """Let samples wait for a stage."""
        queue, share = self._queues[key], self._shares[key.model]
        if share.num_waiting == 0:  # idling earns no credit
            share.used_s = max(share.used_s, self._virtual_s)
        share.num_waiting += len(samples)
        for sample in samples:
            insort(queue.entries, (sample.deadline_s, next(self._arrivals), sample))

    def num_waiting(self, key: QueueKey) -> int:
        """Count the samples that wait for a stage."""
        return len(self._queues[key].entries)

    def slack_s(self, now: float) -> float:
        """Seconds the device may do something else before a waiting row misses its promise; infinite if none waits."""
        return min((self._slacks(queue, now)[1] for queue in self._queues.values() if queue.entries), default=math.inf)

    def charge(self, model: str, seconds: float) -> None:
        """Book device time on a model's share."""
        if model in self._shares:
            self._shares[model].used_s += seconds

    def take_cancelled(self) -> list[W]:
        """Remove and give the samples that nobody waits for any more."""
        cancelled: list[W] = []
        for queue in self._queues.values():
            gone = [entry[2] for entry in queue.entries if entry[2].is_cancelled]
            if gone:
                queue.entries = [entry for entry in queue.entries if not entry[2].is_cancelled]
                self._shares[queue.key.model].num_waiting -= len(gone)
                cancelled += gone
        return cancelled

    def take_expired(self, now: float) -> list[W]:
        """Remove and give the samples that must not wait any longer.

        These are rows with an answer in hand that cannot reach another exit in time, and rows without one that would
        rather be refused than late and cannot reach their first exit in time. Those before gated stages are
        `take_hurried`'s.
        """
        expired: list[W] = []
        for queue in self._queues.values():
            if queue.entries and not queue.is_gated:
                expired += self._take_late(queue, now)
        return expired

    def take_hurried(self, now: float) -> list[W]:
        """Remove and give the samples that wait for a gated stage and have no time for it."""
        hurried: list[W] = []
        for queue in self._queues.values():
            if queue.entries and queue.is_gated:
                hurried += self._take_late(queue, now)
        return hurried

    def next(self, now: float) -> Dispatch[W] | None:
        """Choose what runs now and remove it from its queue; None if nothing waits."""
        waiting = [_Candidate(queue, *self._slacks(queue, now)) for queue in self._queues.values() if queue.entries]
        if not waiting:
            return None
        fair = self._within_share(waiting)
        if len(waiting) == 1:
            only = waiting[0]
            only.size = self._batch_size(only.queue, only.own_slack_s)
            return self._pop(only, now)
        least_s, second_s = sorted(candidate.slack_s for candidate in waiting)[:2]
        for candidate in waiting:
            others_s = second_s if candidate.slack_s == least_s else least_s
            candidate.settle(self._batch_size(candidate.queue, min(candidate.own_slack_s, others_s)), others_s)
        safe = [candidate for candidate in fair if not candidate.breaks_a_promise] or fair
        ready = [it for it in safe if it.efficiency == 1.0 or not any(other.may_join(it) for other in safe)]
        best = max(ready, key=lambda candidate: (candidate.efficiency, candidate.queue.key.stage))
        urgent = [candidate for candidate in safe if 0.0 <= candidate.laxity_s < best.predicted_s]
        return self._pop(min(urgent, key=lambda candidate: candidate.laxity_s) if urgent else best, now)

    def _slacks(self, queue: _Queue[W], now: float) -> tuple[float, float, float]:
        """Measure the most pressing row of a queue that can still be on time.

        Returns:
            Its laxity: seconds it may wait and yet reach its next exit. Its slack: seconds the device may do something
            else before it can no longer be answered in time. Its own slack: seconds a dispatch that includes it may
            take. Rows that are late whatever happens press nobody.
        """
        handed_over_s = now + self._margin_s
        reached_s = handed_over_s + queue.needed_s
        to_exit_s = queue.first_deadline_from(reached_s) - reached_s
        if not queue.holds_answers:
            return to_exit_s, to_exit_s, to_exit_s + queue.profile.bound_s(queue.key.stage, 1)
        in_hand_s = queue.first_deadline_from(handed_over_s) - handed_over_s
        return to_exit_s, in_hand_s, in_hand_s

    def _batch_size(self, queue: _Queue[W], slack_s: float) -> int:
        """Largest batch, up to the knee, within the slack; one row always goes."""
        stage = queue.key.stage
        size = min(len(queue.entries), queue.profile.knee(stage), self._max_batch)
        while size > 1 and queue.profile.bound_s(stage, size) > slack_s:
            size -= 1
        return size

    def _within_share(self, waiting: list[_Candidate[W]]) -> list[_Candidate[W]]:
        """Leave out the models that are ahead; the least-served that waits sets the virtual time, which never falls."""
        least_s = min(self._shares[candidate.queue.key.model].used_s for candidate in waiting)
        self._virtual_s = max(self._virtual_s, least_s)
        limit_s = least_s + self._fair_share_s
        return [candidate for candidate in waiting if self._shares[candidate.queue.key.model].used_s <= limit_s]

    def _pop(self, chosen: _Candidate[W], now: float) -> Dispatch[W]:
        queue = chosen.queue
        first = self._first_place(chosen, now)
        samples = queue.take(first, chosen.size)
        samples += queue.take(0, chosen.size - len(samples))
        self._shares[queue.key.model].num_waiting -= len(samples)
        return Dispatch(queue.key, samples)

    def _first_place(self, chosen: _Candidate[W], now: float) -> int:
        """Give the place its batch starts at: behind the rows that are late anyway if one behind them cannot wait."""
        entries = chosen.queue.entries
        reached_s = now + self._margin_s + chosen.queue.needed_s
        num_late = bisect_left(entries, reached_s, key=_deadline_of)
        left_behind = max(chosen.size, num_late)
        if left_behind == len(entries) or entries[left_behind][0] - reached_s >= chosen.predicted_s:
            return 0
        return num_late

    def _take_late(self, queue: _Queue[W], now: float) -> list[W]:
        if queue.entries[0][0] == math.inf:
            return []
        scanned = bisect_left(queue.entries, now + self._margin_s + queue.needed_s, key=_deadline_of)
        front, may_go = queue.entries[:scanned], queue.is_gated or queue.holds_answers
        staying = [entry for entry in front if not (may_go or entry[2].may_be_dropped)]
        if len(staying) == scanned:
            return []
        queue.entries[:scanned] = staying
        self._shares[queue.key.model].num_waiting -= scanned - len(staying)
        return [entry[2] for entry in front if may_go or entry[2].may_be_dropped]

"""Which stage runs next, with which samples. Pure Python: time is an argument, and a tensor is never seen.

One scheduler serves one device. It holds a queue per (model, stage, variant), ordered by deadline, and forms a batch
when asked for one: work waits only because the device is busy. Rows that wait for the same stage run together,
whatever batch they came from (continuous, stage-level batching).

* No batch breaks a promise: a dispatch's predicted time is capped by the tightest slack in play, and where even one row
  would break another's promise, a queue whose dispatch breaks none goes first.
* When a dispatch would cost some row its chance of one more exit, the row with the least laxity goes first. Otherwise
  the queue that comes closest to its stage's best throughput does, ties to the deepest, which bounds the carries held.
* A part-full batch is held for rows that are on their way to it only if it pays; see `offramp_server.hold`.
* Models that wait at the same time share the device's seconds evenly (start-time fair queueing, Goyal 1996).
"""

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import count
from typing import Generic

from offramp_server.hold import is_held
from offramp_server.queues import Dispatch, QueueKey, Share, StageQueue, W, Waiting
from offramp_server.rules import Rules
from offramp_server.widths import Width

__all__ = ["Dispatch", "QueueKey", "Scheduler", "Waiting"]

FORGET_EVERY = 16
"""Rounds after which every queue measures itself again, as the profile has moved."""


class Scheduler(Generic[W]):
    """Holds the waiting samples of every model on one device.

    Args:
        max_batch: Most rows in one dispatch.
        margin_s: Time kept free before a deadline for handing the answer over.
        fair_share_s: Device time by which one model may run ahead of another that waits.
        rules: What is done beyond running what waits.
        num_threads: How many the models' dispatches share out; 0 if they share none, so that nothing ever waits for a
            thread to be free.

    Attributes:
        rules: The same.
    """

    def __init__(
        self, max_batch: int, margin_s: float, fair_share_s: float, rules: Rules | None = None, num_threads: int = 0
    ) -> None:
        self._max_batch = max_batch
        self._margin_s = margin_s
        self._fair_share_s = fair_share_s
        self.rules = rules or Rules()
        self._num_threads = num_threads
        self._num_waiting = 0
        self._num_taken = 0
        self._waits_for_threads = False
        self._queues: dict[QueueKey, StageQueue[W]] = {}
        self._cohorts: dict[tuple[QueueKey, int], StageQueue[W]] = {}
        self._busy: dict[StageQueue[W], None] = {}
        self._running: dict[StageQueue[W], None] = {}
        self._shares: dict[str, Share] = {}
        self._virtual_s = 0.0
        self._late_after_s = math.inf
        self._num_rounds = 0
        self._next_cohort = count(1)

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def has_room(self) -> bool:
        """Whether threads are free for another dispatch, as far as is known. May be read from any thread."""
        return not self._waits_for_threads and (not self._num_threads or self._num_taken < self._num_threads)

    @property
    def may_start(self) -> bool:
        """Whether something waits that does not wait for threads of what runs."""
        return self._num_waiting > 0 and self.has_room

    def add_model(self, keys: Iterable[QueueKey], wide: Width, narrow: Width | None = None) -> None:
        """Open the queues of a model, one per stage.

        Args:
            keys: Those of its stages.
            wide: How its dispatches run.
            narrow: How they run side by side, if that pays while many rows wait.
        """
        for key in keys:
            self._queues[key] = self._open(key, self._shares.setdefault(key.model, Share(wide, narrow)))

    def remove_model(self, model: str) -> list[W]:
        """Close a model's queues and give back what still waited there."""
        gone = [queue for queue in self._busy if queue.key.model == model]
        for queue in gone:
            self._leave_busy(queue)
        for key in [key for key in self._queues if key.model == model]:
            self._running.pop(self._queues.pop(key), None)
        self._shares.pop(model, None)
        samples = [entry[2] for queue in gone for entry in queue.entries]
        self._num_waiting -= len(samples)
        return samples

    def put(self, key: QueueKey, samples: Sequence[W]) -> None:
        """Let samples wait for a stage."""
        if not samples:
            return
        queue = self._queues[key]
        share = queue.share
        share.note_hurry(samples)
        if share.num_waiting == 0 and share.used_s < self._virtual_s:  # idling earns no credit
            share.used_s = self._virtual_s
        share.num_waiting += len(samples)
        self._num_waiting += len(samples)
        if self.rules.rebatch:
            self._add(queue, samples)
            return
        for cohort in dict.fromkeys([sample.cohort for sample in samples]):
            self._add(self._cohort_queue(queue, cohort), [sample for sample in samples if sample.cohort == cohort])

    def num_waiting(self, key: QueueKey) -> int:
        """Count the samples that wait for a stage. May be called from any thread."""
        if self.rules.rebatch:
            return len(self._queues[key].entries)
        return sum([len(queue.entries) for queue in list(self._busy) if queue.key == key])

    def to_next_answer_s(self, key: QueueKey, num_rows: int) -> float:
        """Expect so many rows more that come to wait for a stage to need rarely more than this to their next exit."""
        profile, stage = self._queues[key].profile, key.stage
        likely_batch = min(num_rows + self.num_waiting(key), profile.stages[stage].knee)
        return profile.to_next_answer_s(stage, likely_batch)

    def slack_s(self, now: float) -> float:
        """Seconds the device may do something else before a waiting row misses its promise; infinite if none waits."""
        self._measure(now)
        return min([queue.slack_by_s for queue in self._busy], default=math.inf) - now

    def wait_s(self, now: float) -> float:
        """Seconds until something may start: 0 unless a timeout holds back all that waits.

        Infinite if none waits, or if it waits for threads of what runs.
        """
        if not self.may_start:
            return math.inf
        if self.rules.batch_timeout_s is None:
            return 0.0
        return max(min([self._starts_at_s(queue) for queue in self._busy]) - now, 0.0)

    def finish(self, dispatch: Dispatch[W], seconds: float) -> None:
        """Book what a dispatch took on its model's share; its rows run no longer."""
        self._num_taken -= dispatch.width.num_threads
        self._waits_for_threads = False
        queue = self._queues.get(dispatch.key)
        if queue is None:
            return
        queue.share.used_s += seconds * self._part(dispatch.width)
        queue.num_running -= len(dispatch.samples)
        if queue.num_running == 0:
            self._running.pop(queue, None)

    def take_cancelled(self) -> list[W]:
        """Remove and give the samples that nobody waits for any more."""
        cancelled: list[W] = []
        for queue in list(self._busy):
            cancelled += self._let_go(queue, queue.take_cancelled())
        return cancelled

    def take_expired(self, now: float) -> list[W]:
        """Remove and give the samples that must not wait any longer.

        These are rows with an answer in hand that cannot reach another exit in time, and rows without one that would
        rather be refused than late and cannot reach their first exit in time. Those before gated stages are
        `take_hurried`'s.
        """
        if now <= self._late_after_s:
            return []
        expired: list[W] = []
        for queue in list(self._busy):
            if not queue.is_gated:
                expired += self._let_go(queue, queue.take_late(now))
        self._late_after_s = min([queue.late_after_s for queue in self._busy], default=math.inf)
        return expired

    def take_hurried(self, now: float) -> list[W]:
        """Remove and give the samples that wait for a gated stage and have no time for it."""
        self._settle_widths(now)
        if now <= self._late_after_s:
            return []
        hurried: list[W] = []
        for queue in list(self._busy):
            if queue.is_gated:
                hurried += self._let_go(queue, queue.take_late(now))
        return hurried

    def next(self, now: float) -> Dispatch[W] | None:
        """Choose what runs now and remove it from its queue; None if nothing waits, or nothing may start yet."""
        if not self.has_room:
            return None
        self._settle_widths(now)
        ready: Collection[StageQueue[W]] = self._busy
        if self.rules.batch_timeout_s is not None:
            ready = [queue for queue in self._busy if self._starts_at_s(queue) <= now]
        if not ready:
            return None
        self._num_rounds += 1
        if self._num_rounds % FORGET_EVERY == 0:
            self._forget()
        self._measure(now)
        if len(ready) == 1:
            (chosen,) = ready
            self._virtual_s = max(self._virtual_s, chosen.share.used_s)
            if chosen.bound_s > chosen.own_by_s - now:
                chosen.shrink(chosen.own_by_s - now)
            breaks_a_promise = False
        else:
            chosen, breaks_a_promise = self._choose(ready, now)
        self._waits_for_threads = self._num_taken + chosen.share.width.num_threads > self._num_threads
        if self._waits_for_threads:
            return None
        return self._start(chosen, now, self._take_overtaken(chosen, now) if breaks_a_promise else ())

    def _settle_widths(self, now: float) -> None:
        """Let dispatches run side by side as long as there are rows for all, and none of them is in a hurry."""
        for share in self._shares.values():
            if share.narrow is None:
                continue
            is_many = self._num_taken > 0 or len(self) >= share.narrow.num_abreast
            if share.turn(is_narrow=is_many and now >= share.hurried_until_s):
                self._forget()

    def _part(self, width: Width) -> float:
        """The part of the device that a dispatch has to itself."""
        return width.num_threads / self._num_threads if width.num_threads else 1.0

    def _choose(self, ready: Collection[StageQueue[W]], now: float) -> tuple[StageQueue[W], bool]:
        """Fix the size of each queue's batch, beside the slack of all others, and choose among them.

        Returns:
            What runs, and whether that breaks a promise, as any other choice would.
        """
        least_by_s = second_by_s = math.inf
        for queue in ready:
            if queue.slack_by_s < least_by_s:
                least_by_s, second_by_s = queue.slack_by_s, least_by_s
            elif queue.slack_by_s < second_by_s:
                second_by_s = queue.slack_by_s
        least_s, second_s = least_by_s - now, second_by_s - now
        fair, safe = self._within_share(ready), []
        for queue in fair:
            others_s = second_s if queue.slack_by_s == least_by_s else least_s
            own_s = queue.own_by_s - now
            slack_s = own_s if own_s < others_s else others_s
            if queue.bound_s > slack_s and queue.size > 1:
                queue.shrink(slack_s)
            if queue.bound_s <= others_s:
                safe.append(queue)
        candidates = safe or list(fair)
        best = self._best(candidates, now)
        most_urgent, least_laxity_s = best, best.bound_s
        for queue in candidates:
            if queue.exit_by_s - now < least_laxity_s:
                most_urgent, least_laxity_s = queue, queue.exit_by_s - now
        return most_urgent, not safe

    def _best(self, candidates: list[StageQueue[W]], now: float) -> StageQueue[W]:
        """Find the queue closest to its stage's best throughput, the deepest of equals, that is not better held."""
        left = candidates
        while True:
            best = left[0]
            for queue in left:
                if queue.efficiency > best.efficiency or (
                    queue.efficiency == best.efficiency and queue.stage > best.stage
                ):
                    best = queue
            if len(left) == 1 or not self.rules.hold or not is_held(best, candidates, self._running, now):
                return best
            left = [queue for queue in left if queue is not best]

    def _within_share(self, ready: Collection[StageQueue[W]]) -> Collection[StageQueue[W]]:
        """Leave out the models that are ahead; the least-served that waits sets the virtual time, which never falls."""
        least_s = min([queue.share.used_s for queue in ready])
        self._virtual_s = max(self._virtual_s, least_s)
        if len(self._shares) == 1:
            return ready
        limit_s = least_s + self._fair_share_s
        return [queue for queue in ready if queue.share.used_s <= limit_s]

    def _take_overtaken(self, chosen: StageQueue[W], now: float) -> list[W]:
        """Remove and give the rows elsewhere that keep their promise only by leaving before a dispatch."""
        overtaken: list[W] = []
        for queue in list(self._busy):
            if queue.holds_answers and queue is not chosen:
                overtaken += self._let_go(queue, queue.take_before(now + self._margin_s + chosen.bound_s))
        return overtaken

    def _start(self, queue: StageQueue[W], now: float, overtaken: Sequence[W] = ()) -> Dispatch[W]:
        width = queue.share.width
        if width.num_abreast > 1:
            queue.size = min(queue.size, self._runners_share(width.num_abreast))
        samples = queue.take_batch(now)
        size = len(samples)
        self._let_go(queue, samples)
        home = queue
        if not self.rules.rebatch:
            home = self._queues[queue.key]
            cohort = samples[0].cohort or next(self._next_cohort)
            for sample in samples:
                sample.cohort = cohort
        home.num_running += size
        self._running[home] = None
        self._num_taken += width.num_threads
        return Dispatch(queue.key, samples, width.profile.stages[queue.stage].padded(size), width, overtaken)

    def _runners_share(self, num_abreast: int) -> int:
        """How many rows are one runner's of all that wait and run: none takes everything while the others idle."""
        in_flight = len(self) + sum([queue.num_running for queue in self._running])
        return math.ceil(in_flight / num_abreast)

    def _open(self, key: QueueKey, share: Share) -> StageQueue[W]:
        forced_exits = self.rules.forced_exits
        return StageQueue(key, share, self._max_batch, self._margin_s, forced_exits=forced_exits)

    def _cohort_queue(self, home: StageQueue[W], cohort: int) -> StageQueue[W]:
        """Find or open the queue of one batch; those that have not run yet wait together."""
        if cohort == 0:
            return home
        queue = self._cohorts.get((home.key, cohort))
        if queue is None:
            queue = self._cohorts[home.key, cohort] = self._open(home.key, home.share)
            queue.cohort = cohort
        return queue

    def _add(self, queue: StageQueue[W], samples: Sequence[W]) -> None:
        queue.add(samples)
        self._busy[queue] = None
        if not queue.late_after_s >= self._late_after_s:
            self._late_after_s = queue.late_after_s

    def _let_go(self, queue: StageQueue[W], samples: list[W]) -> list[W]:
        """Take note that samples no longer wait in a queue."""
        if samples:
            queue.share.num_waiting -= len(samples)
            self._num_waiting -= len(samples)
            if not queue.entries:
                self._leave_busy(queue)
        return samples

    def _leave_busy(self, queue: StageQueue[W]) -> None:
        del self._busy[queue]
        if queue.cohort:
            del self._cohorts[queue.key, queue.cohort]

    def _measure(self, now: float) -> None:
        for queue in self._busy:
            if now > queue.valid_until_s:
                queue.measure(now)

    def _forget(self) -> None:
        self._late_after_s = -math.inf
        for queue in self._busy:
            queue.valid_until_s = -math.inf

    def _starts_at_s(self, queue: StageQueue[W]) -> float:
        """When a queue's batch may start under a timeout: at once if it is full, or one from its first dispatch on."""
        limit = min(queue.profile.knee(queue.stage), self._max_batch)
        if queue.cohort or len(queue.entries) >= limit or self.rules.batch_timeout_s is None:
            return -math.inf
        return min([entry[2].enqueued_s for entry in queue.entries]) + self.rules.batch_timeout_s

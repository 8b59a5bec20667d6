"""Where rows wait: one queue per (model, stage, variant), ordered by deadline, and what its most pressing row allows.

A queue keeps in mind what it has measured of itself, as moments on the engine's clock. That holds until a row comes or
goes, or until one of those moments passes, so that a round looks again only at the queues that have changed.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from offramp_server.profile import Profile
from offramp_server.widths import Width


class Waiting(Protocol):
    """What the scheduler must know of a sample."""

    deadline_s: float
    """On the engine's clock; infinite without one."""
    budget_s: float
    """Seconds it had when it arrived; infinite without a deadline. Read where dispatches may run side by side."""
    may_be_dropped: bool
    """Whether the request would rather be refused than answered late."""
    enqueued_s: float
    """Since when it waits; read where batches wait for a timeout."""
    cohort: int
    """The batch it belongs to where batches stay one to their end; 0 before its first dispatch, written here."""

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""


W = TypeVar("W", bound=Waiting)


class QueueKey(NamedTuple):
    """One place where samples wait: a stage of a model, in one numeric variant."""

    model: str
    stage: int
    variant: str = "fp32"


class Dispatch(NamedTuple, Generic[W]):
    """Samples that run one stage together, earliest deadline first; rows that are late anyway may come last.

    Attributes:
        key: The stage.
        samples: The rows.
        num_padded: Number of rows the stage is run over, at least as many; the last one may stand in for the rest.
        overtaken: Rows with an answer in hand, taken out of other queues: they must leave with it now, as it would be
            late behind this dispatch.
        width: How it runs.
    """

    key: QueueKey
    samples: list[W]
    num_padded: int
    width: Width
    overtaken: Sequence[W] = ()


@dataclass(slots=True)
class Share:
    """One model's part in a device.

    Attributes:
        wide: How its dispatches run while few rows wait, or are in a hurry.
        narrow: How they run side by side while many do; None if that does not pay, or cannot be.
        width: Which of the two they run by now.
        hurried_until_s: Until when rows that were in a hurry on arrival may wait.
        used_s: Device seconds, counted from the moment it had work together with others.
        num_waiting: Its rows that wait.
    """

    wide: Width
    narrow: Width | None = None
    width: Width = field(init=False)
    hurried_until_s: float = -math.inf
    used_s: float = 0.0
    num_waiting: int = 0

    def __post_init__(self) -> None:
        self.width = self.wide

    def turn(self, *, is_narrow: bool) -> bool:
        """Have dispatches run by the one or the other from now on; gives whether that is a change."""
        width = self.narrow if is_narrow and self.narrow is not None else self.wide
        changes = width is not self.width
        self.width = width
        return changes

    def note_hurry(self, samples: "Sequence[Waiting]") -> None:
        """Take note of rows that come: as long as one of them has no time to run side by side with others, none do."""
        if self.narrow is None:
            return
        short_s = self.narrow.short_budget_s
        for sample in samples:
            if sample.budget_s < short_s and sample.deadline_s > self.hurried_until_s:
                self.hurried_until_s = sample.deadline_s


class StageQueue(Generic[W]):
    """The rows that wait for one stage.

    Args:
        key: The stage.
        share: The model's.
        max_batch: Most rows in one dispatch.
        margin_s: Time kept free before a deadline for handing the answer over.
        forced_exits: Whether a row that is short of time leaves with the answer it has, or goes past a gated stage.

    Attributes:
        stage: The stage's place in its network.
        is_gated: Whether rows may do without the stage.
        num_running: Rows that run the stage now.
        cohort: The batch whose rows wait here; 0 for those of any.
        exit_by_s: Until when the most pressing row may wait and yet reach its next exit.
        slack_by_s: Until when the device may do something else and that row can still be answered in time.
        own_by_s: When a dispatch that includes that row must have ended.
        size: How many rows would run together, if time allows.
        bound_s: Seconds these will rarely exceed.
        efficiency: The share of the stage's best throughput that they reach.
        valid_until_s: Until when these numbers hold.
    """

    __slots__ = (
        "_has_droppable",
        "_margin_s",
        "_may_refuse",
        "_num_arrived",
        "bound_s",
        "cohort",
        "efficiency",
        "entries",
        "exit_by_s",
        "holds_answers",
        "is_gated",
        "key",
        "late_after_s",
        "max_batch",
        "may_pass_on",
        "needed_s",
        "num_running",
        "own_by_s",
        "share",
        "size",
        "slack_by_s",
        "stage",
        "valid_until_s",
    )

    def __init__(self, key: QueueKey, share: Share, max_batch: int, margin_s: float, *, forced_exits: bool) -> None:
        profile = share.wide.profile
        self.key = key
        self.stage = key.stage
        self.share = share
        self.entries: list[tuple[float, int, W]] = []
        self.is_gated = profile.is_gated(key.stage)
        self.holds_answers = forced_exits and key.stage > profile.first_answer_stage()
        """Whether the samples that wait here have passed an exit, and so can leave at any time."""
        self.may_pass_on = forced_exits and (self.is_gated or self.holds_answers)
        """Whether a row that is short of time need not run the stage."""
        self._may_refuse = key.stage <= profile.first_answer_stage() and not self.is_gated
        self.num_running = 0
        self.cohort = 0
        self.valid_until_s = -math.inf
        self.needed_s, self.late_after_s = math.inf, -math.inf
        self.exit_by_s = self.slack_by_s = self.own_by_s = math.inf
        self.size, self.bound_s, self.efficiency = 1, 0.0, 1.0
        self._margin_s = margin_s
        self.max_batch = max_batch
        self._num_arrived = 0
        self._has_droppable = False

    @property
    def profile(self) -> Profile:
        """How long the model's stages take, the way its dispatches run now."""
        return self.share.width.profile

    def add(self, samples: Sequence[W]) -> None:
        """Let rows wait here."""
        entries, number = self.entries, self._num_arrived
        for sample in samples:
            deadline_s = sample.deadline_s
            if entries and deadline_s < entries[-1][0]:
                insort(entries, (deadline_s, number, sample))
            else:
                entries.append((deadline_s, number, sample))
            number += 1
            if sample.may_be_dropped and self._may_refuse:
                self._has_droppable = True
        self._num_arrived = number
        self.late_after_s = entries[0][0] - self._margin_s - self.needed_s
        self.valid_until_s = -math.inf

    def measure(self, now: float) -> None:
        """Look at what the most pressing row that can still be on time allows; late rows press nobody."""
        stage_profile = self.profile.stages[self.stage]
        needed_s = self.needed_s = self.profile.to_next_answer_s(self.stage, 1)
        handed_over_s, ahead_s = now + self._margin_s, self._margin_s + needed_s
        exit_by_s = self.exit_by_s = max(self._first_deadline_from(handed_over_s + needed_s) - ahead_s, now)
        if self.holds_answers:
            by_s = self._first_deadline_from(handed_over_s) - self._margin_s
            self.slack_by_s = self.own_by_s = max(by_s, now)
        else:
            self.slack_by_s, self.own_by_s = exit_by_s, exit_by_s + stage_profile.bound_s(1)
        num_waiting = min(len(self.entries), self.max_batch)
        self.size = stage_profile.trial(num_waiting) or stage_profile.fill(num_waiting)
        self.bound_s = stage_profile.bound_s(self.size)
        self.efficiency = stage_profile.efficiency(self.size)
        self.valid_until_s = min(exit_by_s, self.slack_by_s)

    def shrink(self, slack_s: float) -> None:
        """Cut the batch down to what runs within the slack, for this round; one row always goes."""
        stage_profile = self.profile.stages[self.stage]
        self.size = max(bisect_right(range(1, self.size), slack_s, key=stage_profile.bound_s), 1)
        self.bound_s = stage_profile.bound_s(self.size)
        self.efficiency = stage_profile.efficiency(self.size)
        self.valid_until_s = -math.inf

    def take_batch(self, now: float) -> list[W]:
        """Remove and give the rows that run together."""
        entries, size = self.entries, self.size
        self.valid_until_s = -math.inf
        if size == len(entries):
            self.entries = []
            self._has_droppable = False
            return [entry[2] for entry in entries]
        first = self._first_place(now)
        samples = self._take(first, size)
        return samples + self._take(0, size - len(samples))

    def take_late(self, now: float) -> list[W]:
        """Remove and give the rows that cannot reach their next exit in time, as far as they may leave or pass on."""
        self.needed_s = self.profile.to_next_answer_s(self.stage, 1)
        horizon_s, entries = now + self._margin_s + self.needed_s, self.entries
        num_late = bisect_left(entries, (horizon_s,))
        if num_late == len(entries):
            self.late_after_s = math.inf
        else:
            self.late_after_s = entries[num_late][0] - self._margin_s - self.needed_s
        if num_late == 0 or not (self.may_pass_on or self._has_droppable):
            return []
        late, staying = entries[:num_late], []
        if not self.may_pass_on:
            staying = [entry for entry in late if not entry[2].may_be_dropped]
        if len(staying) == num_late:
            return []
        entries[:num_late] = staying
        self.valid_until_s = -math.inf
        return [entry[2] for entry in late if self.may_pass_on or entry[2].may_be_dropped]

    def take_before(self, deadline_s: float) -> list[W]:
        """Remove and give the rows whose deadline is before a time."""
        num = bisect_left(self.entries, (deadline_s,))
        if num:
            self.valid_until_s = -math.inf
        return self._take(0, num)

    def take_cancelled(self) -> list[W]:
        """Remove and give the rows that nobody waits for any more."""
        gone = [entry[2] for entry in self.entries if entry[2].is_cancelled]
        if gone:
            self.entries = [entry for entry in self.entries if not entry[2].is_cancelled]
            self.valid_until_s = -math.inf
        return gone

    def _first_deadline_from(self, time_s: float) -> float:
        """The earliest deadline here that is not before a time; infinite if there is none."""
        entries = self.entries
        if entries[0][0] >= time_s:
            return entries[0][0]
        place = bisect_left(entries, (time_s,))
        return entries[place][0] if place < len(entries) else math.inf

    def _take(self, first: int, num: int) -> list[W]:
        taken = [entry[2] for entry in self.entries[first : first + num]]
        del self.entries[first : first + num]
        return taken

    def _first_place(self, now: float) -> int:
        """Give the place the batch starts at: behind the rows that are late anyway if one behind them cannot wait."""
        entries = self.entries
        reached_s = now + self._margin_s + self.needed_s
        num_late = bisect_left(entries, (reached_s,))
        left_behind = max(self.size, num_late)
        if left_behind == len(entries) or entries[left_behind][0] - reached_s >= self.bound_s:
            return 0
        return num_late

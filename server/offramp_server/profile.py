"""What follows for a model from how long its stages take: the way to the next answer, and which rows come how far."""

from collections.abc import Collection, Sequence
from functools import partial

from offramp_server.stage_profile import StageProfile

ROW_GAIN = 1 / 64
ROUND_GAIN = 1 / 64
DISPATCHES_AHEAD = 4
"""Of others, which a row may meet at each stage on its way while the device has more to do than it can. With fewer,
rows keep too little time and many are late; with more, gates are shut that there was time for."""
CHANGES_PER_STAGE = 8
"""What lies before an exit is summed up anew when one in so many of its stages has changed."""


class Profile:
    """The estimates for every stage of one model, and what follows from them.

    Args:
        exit_stages: For each exit, the stage whose graph computes it, in order.
        num_stages: Number of stages.
        max_batch: Largest batch size to reckon with.
        gated_stages: Those that a row may do without.
        batch_sizes: The sizes that stages are ever run at, ascending; None if any.
    """

    def __init__(
        self,
        exit_stages: Sequence[int],
        num_stages: int,
        max_batch: int,
        gated_stages: Collection[int] = (),
        batch_sizes: Sequence[int] | None = None,
    ) -> None:
        self._network = (exit_stages, num_stages, max_batch, gated_stages, batch_sizes)
        trunk = [stage for stage in range(num_stages) if stage not in gated_stages]
        self._next_exit_stage = [next(s for s in exit_stages if s >= stage) for stage in range(num_stages)]
        self._next_trunk_stage = [next(s for s in trunk if s >= stage) for stage in range(num_stages)]
        # Of trunk before each exit, by batch size: deep networks have a hundred stages there, and it is asked for a
        # dozen times a round.
        self._behind_s: dict[int, dict[int, dict[int, float]]] = {stage: {} for stage in exit_stages}
        self._num_changes = dict.fromkeys(exit_stages, 0)
        self._stages_before = {
            last: [s for s in reversed(range(num_stages)) if self._next_exit_stage[s] == last] for last in exit_stages
        }
        self.stages = [
            StageProfile(max_batch, batch_sizes, partial(self._note_change, last)) for last in self._next_exit_stage
        ]
        self._alone_s: float | None = None
        self._open_rates = dict.fromkeys(gated_stages, 1.0)
        self._busy_s = self._at_knee_s = self._crowded_s = 0.0
        self._num_behind = [sum(stage < t <= last for t in trunk) for stage, last in enumerate(self._next_exit_stage)]
        self._trunk_before = [max((t for t in trunk if t < stage), default=-1) for stage in range(num_stages)]

    def beside(self) -> "Profile":
        """Give an empty profile of the same network, for another way to run its stages; gates open alike in both."""
        other = Profile(*self._network)
        other._open_rates = self._open_rates
        return other

    def bound_s(self, stage: int, batch: int) -> float:
        """Expect one dispatch of a stage to rarely take more than this many seconds."""
        return self.stages[stage].bound_s(batch)

    @property
    def alone_s(self) -> float:
        """Expect a row that nobody else is with to take this many seconds through every stage."""
        if self._alone_s is None:
            self._alone_s = sum([stage.mean_s(1) for stage in self.stages])
        return self._alone_s

    def to_next_answer_s(self, stage: int, batch: int) -> float:
        """Expect a row waiting at `stage` to need rarely more than this many seconds to its next exit.

        That is the least it must run: every gate behind `stage` can be shut. At a stage that it can do without it also
        keeps time for a few dispatches of others at each stage on the way, as long as others have lately waited: rows
        that went into bodies until they had just the time left that the trunk takes alone would all be late together.
        """
        own_s, last = self.stages[stage].bound_s(batch), self._next_exit_stage[stage]
        ahead_s = DISPATCHES_AHEAD * self._crowded_s if stage in self._open_rates else 0.0
        if stage == last:
            return own_s + ahead_s
        behind_s = self._behind_s[last].get(batch)
        if behind_s is None:
            behind_s = self._behind_s[last][batch] = self._sum_behind(last, batch)
        return own_s + behind_s[stage] + ahead_s * (1 + self._num_behind[stage])

    def _sum_behind(self, last: int, batch: int) -> dict[int, float]:
        """For each stage before an exit, the seconds of the trunk behind it up to there."""
        total_s, behind_s = 0.0, {}
        for stage in self._stages_before[last]:
            behind_s[stage] = total_s
            if stage not in self._open_rates:
                total_s += self.stages[stage].bound_s(batch)
        return behind_s

    def _note_change(self, last: int) -> None:
        """Sum up anew what lies before an exit once its stages have changed by something, taken together."""
        self._alone_s = None
        self._num_changes[last] += 1
        if self._num_changes[last] * CHANGES_PER_STAGE >= len(self._stages_before[last]):
            self._num_changes[last] = 0
            self._behind_s[last].clear()

    def is_gated(self, stage: int) -> bool:
        """Whether a row may do without a stage."""
        return stage in self._open_rates

    def trunk_from(self, stage: int) -> int:
        """The first stage from `stage` on that no row may do without."""
        return self._next_trunk_stage[stage]

    def open_rate(self, stage: int) -> float:
        """The share of rows that have run a stage lately, of those that came to it; 1 for trunk."""
        return self._open_rates.get(stage, 1.0)

    def observe_gates(self, skipped: Sequence[int], following: int, num_rows: int) -> None:
        """Take into account that so many rows have skipped some gated stages and run the following one next."""
        keep = (1 - ROW_GAIN) ** num_rows
        for stage in skipped:
            self._open_rates[stage] *= keep
        if following in self._open_rates:
            self._open_rates[following] = 1 - (1 - self._open_rates[following]) * keep

    def trunk_before(self, stage: int) -> int:
        """The last stage before this one that no row may do without; -1 if there is none."""
        return self._trunk_before[stage]

    def joining_share(self, body: int, following: int) -> float:
        """Expect this share of the rows in a body to run a later stage with those that wait there.

        All of them come to the trunk behind it; to another body in between, those whose gates open.
        """
        return self.open_rate(following) if self.trunk_before(following) < body < following else 0.0

    def first_answer_stage(self) -> int:
        """The stage that ends in exit 0."""
        return self._next_exit_stage[0]

    def knee(self, stage: int) -> int:
        """The batch size beyond which a stage gains nothing worth waiting for."""
        return self.stages[stage].knee

    @property
    def strain(self) -> float:
        """How much longer rows take while others wait than they would in batches at the knee; 1 or more.

        Deadlines, gates and exits keep batches small, and a dispatch costs more than its graph: where that is much of a
        stage's time, a backlog is worked off more slowly than the knee promises.
        """
        return max(self._busy_s / self._at_knee_s, 1.0) if self._at_knee_s else 1.0

    def observe_round(self, stage: int, num_rows: int, seconds: float, *, others_wait: bool) -> None:
        """Take into account what a dispatch took, all told, and whether rows waited meanwhile."""
        self._crowded_s += ROUND_GAIN * ((seconds if others_wait else 0.0) - self._crowded_s)
        if others_wait:
            at_knee_s = num_rows / self.stages[stage].rate(self.knee(stage))
            self._busy_s += ROUND_GAIN * (seconds - self._busy_s)
            self._at_knee_s += ROUND_GAIN * (at_knee_s - self._at_knee_s)

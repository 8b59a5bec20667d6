"""Which exits cost more than they save, under a policy, on the machine where they were timed.

An exit saves what lies behind it for the rows that leave there, and costs its head for every row that passes it. Its
*utility* is the difference per row: what an average row would take longer without it. It is computed by replaying the
policy with the exit masked, so that what rows do instead, and what policies with a memory make of it, is in it.

Shapes: E = exits.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

import numpy as np
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import PolicySpec, without_exits
from offramp_contract.statistics import FloatArray

from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import Replayed, replay
from offramp_calibration.timing import HeadCost, StageTimes

Verdict: TypeAlias = Literal["keep", "merge", "even", "unknown"]


@dataclass(frozen=True, slots=True)
class PathCosts:
    """What it costs one row to reach each exit.

    Attributes:
        flops_E: Floating-point operations, heads on the way included.
        ms_E: Milliseconds, likewise.
        heads: What each non-final exit costs a row that passes it; empty if it is not known.
        batch_size: Rows a run, where `ms_E` was measured.
    """

    flops_E: FloatArray
    ms_E: FloatArray
    heads: tuple[HeadCost, ...]
    batch_size: int

    @classmethod
    def of(cls, times: StageTimes, heads: Sequence[HeadCost] = ()) -> Self:
        """Take the costs of a bundle from its manifest and its stages' times."""
        return cls(_flops_to_exit(times.manifest), times.ms_to_exit_E, tuple(heads), times.batch_size)

    def without_exits(self, dropped: Collection[int]) -> tuple[FloatArray, FloatArray]:
        """Give FLOPs and milliseconds to each exit that stays: what passes a dropped one saves its head."""
        kept = [index for index in range(len(self.ms_E)) if index not in dropped]
        saved_flops = [sum(self.heads[gone].flops for gone in dropped if gone < index) for index in kept]
        saved_ms = [sum(self.heads[gone].ms for gone in dropped if gone < index) for index in kept]
        return self.flops_E[kept] - saved_flops, self.ms_E[kept] - saved_ms


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy comes to on the data: accuracy, average share of the whole bundle's FLOPs, average milliseconds."""

    accuracy: float
    compute: float
    ms: float


@dataclass(frozen=True, slots=True)
class ExitAdvice:
    """What is to be said of one exit that is not the final one.

    Attributes:
        exit: Its index.
        name: Its name.
        reach: Share of rows that come to it.
        exit_rate: Share of rows that leave there.
        behind_compute: What lies behind it for a row that leaves there, as a share of the whole bundle's FLOPs.
        behind_ms: The same in milliseconds.
        bearable_ms: What its head may cost a row that passes it for the exit still to pay.
        head_compute: What it does cost; None if that is not known, as are the next four.
        head_ms: The same in milliseconds.
        utility_compute: What an average row saves by it; negative: what it costs.
        utility_ms: The same in milliseconds.
        noise_ms: What `utility_ms` may be off by.
        accuracy_without: Accuracy if it alone were dropped.
        verdict: `merge` and `keep` where `utility_ms` is beyond its noise, `even` where it is not.
    """

    exit: int
    name: str
    reach: float
    exit_rate: float
    behind_compute: float
    behind_ms: float
    bearable_ms: float
    head_compute: float | None
    head_ms: float | None
    utility_compute: float | None
    utility_ms: float | None
    noise_ms: float | None
    accuracy_without: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Advice:
    """Which exits to merge, and what that gives.

    Attributes:
        policy: The policy that it is about.
        batch_size: Rows a run where the times were measured.
        exits: One a non-final exit.
        merge: Exits to merge, by index: the worst first taken off until none costs more than it saves.
        now: The policy with all exits.
        merged: The policy without those of `merge`; None if there are none.
        note: What could not be said, as a sentence.
    """

    policy: PolicySpec
    batch_size: int
    exits: tuple[ExitAdvice, ...]
    merge: tuple[int, ...]
    now: Setting
    merged: Setting | None = None
    note: str | None = None


def advise(outcomes: Outcomes, policy: PolicySpec, names: Sequence[str], costs: PathCosts) -> Advice:
    """Judge every exit under a policy.

    Args:
        outcomes: What the exits decided about held-out data.
        policy: The rule, or that of an operating point.
        names: One an exit.
        costs: What reaching and passing them costs.

    Raises:
        InvalidValue: If the policy does not fit the number of exits.
    """
    replayed = replay(policy, outcomes)
    exits = tuple(_judge(replayed, policy, names[index], costs, index) for index in range(outcomes.num_exits - 1))
    advice = Advice(policy, costs.batch_size, exits, (), setting_of(replayed, costs.flops_E, costs.ms_E, costs))
    if not costs.heads:
        return advice
    merge = _worst(outcomes, policy, costs, [said.reach for said in exits])
    return replace(advice, merge=merge, merged=_setting(outcomes, policy, costs, merge) if merge else None)


def setting_of(replayed: Replayed, flops_E: FloatArray, ms_E: FloatArray, whole: PathCosts) -> Setting:
    """Say what a replay comes to.

    Args:
        replayed: Where the rows left.
        flops_E: Of one row, to each of its exits.
        ms_E: Of one row, to each of its exits.
        whole: Costs of the bundle with all its exits, whose FLOPs are the unit of compute.
    """
    flops, ms = float(flops_E[replayed.exit_N].mean()), float(ms_E[replayed.exit_N].mean())
    return Setting(replayed.accuracy, flops / max(float(whole.flops_E[-1]), 1.0), ms)


def _setting(outcomes: Outcomes, policy: PolicySpec, costs: PathCosts, dropped: Collection[int]) -> Setting:
    spec = without_exits(policy, dropped, outcomes.num_exits, outcomes.native)
    return setting_of(replay(spec, outcomes.without_exits(dropped)), *costs.without_exits(dropped), costs)


def _judge(replayed: Replayed, policy: PolicySpec, name: str, costs: PathCosts, index: int) -> ExitAdvice:
    outcomes, full_flops = replayed.outcomes, max(float(costs.flops_E[-1]), 1.0)
    fewer = without_exits(policy, {index}, outcomes.num_exits, outcomes.native)
    masked = replay(fewer, outcomes.without_exits({index}))
    leaves_N = replayed.exit_N == index
    reach, exit_rate = float((replayed.exit_N >= index).mean()), float(leaves_N.mean())
    went_on_to = masked.exit_N[leaves_N] + (masked.exit_N[leaves_N] >= index)  # as the whole bundle counts
    behind_flops, behind_ms = (
        float((cost_E[went_on_to] - cost_E[index]).mean()) if exit_rate else 0.0
        for cost_E in (costs.flops_E, costs.ms_E)
    )
    said = ExitAdvice(
        exit=index,
        name=name,
        reach=reach,
        exit_rate=exit_rate,
        behind_compute=behind_flops / full_flops,
        behind_ms=behind_ms,
        bearable_ms=exit_rate * behind_ms / reach if reach else 0.0,
        head_compute=None,
        head_ms=None,
        utility_compute=None,
        utility_ms=None,
        noise_ms=None,
        accuracy_without=masked.accuracy,
        verdict="unknown",
    )
    if not costs.heads:
        return said
    now = setting_of(replayed, costs.flops_E, costs.ms_E, costs)
    then = setting_of(masked, *costs.without_exits({index}), costs)
    utility_ms, noise_ms = then.ms - now.ms, costs.heads[index].noise_ms * reach
    return replace(
        said,
        head_compute=costs.heads[index].flops / full_flops,
        head_ms=costs.heads[index].ms,
        utility_compute=then.compute - now.compute,
        utility_ms=utility_ms,
        noise_ms=noise_ms,
        verdict="even" if abs(utility_ms) <= noise_ms else "keep" if utility_ms > 0 else "merge",
    )


def _worst(outcomes: Outcomes, policy: PolicySpec, costs: PathCosts, reach_E: Sequence[float]) -> tuple[int, ...]:
    """Drop the exit that costs most beyond its noise, look again, and stop when none is left that does."""
    dropped: tuple[int, ...] = ()
    while True:
        now = _setting(outcomes, policy, costs, dropped)
        gains = {
            index: now.ms - _setting(outcomes, policy, costs, (*dropped, index)).ms - head.noise_ms * reach_E[index]
            for index, head in enumerate(costs.heads)
            if index not in dropped
        }
        worst = max(gains, key=lambda index: gains[index], default=None)
        if worst is None or gains[worst] <= 0:
            return tuple(sorted(dropped))
        dropped = (*dropped, worst)


def _flops_to_exit(manifest: Manifest) -> FloatArray:
    flops_K = np.cumsum([stage.flops for stage in manifest.stages], dtype=np.float64)
    return np.asarray(flops_K[[exit_.stage for exit_ in manifest.exits]])

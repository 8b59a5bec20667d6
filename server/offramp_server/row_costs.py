"""What a row costs the device, by the gear it was admitted in: what calibration expects, then what rows really do.

Costs are reckoned at each stage's knee, the batch that rows meet when many wait, and at what backlogs have really taken
beside that: what rows took alone on an idle device says nothing about a backlog. Shares of the full path are learnt, so
that a device that slows down is believed at once in every gear.

With gates, what comes before the first exit is reckoned as it is asked for. It could do with the trunk alone, but what
a row says whose gates were all shut by force is as good as nothing: better that some are refused than that all are so
answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import FixedSpec

from offramp_server.ladder import Gear
from offramp_server.profile import Profile

ROW_GAIN: Final = 1 / 256
REFRESH_EVERY: Final = 64


class RowCost(NamedTuple):
    """Device seconds of one row.

    Attributes:
        asked_s: On average, if no deadline cuts it short.
        taken_s: As rows have lately taken on average, those that a deadline cut short included.
        first_s: Up to the first exit; on average as asked for, where gates decide how much that is.
    """

    asked_s: float
    taken_s: float
    first_s: float


@dataclass(slots=True)
class _Share:
    """The same as shares of the full path, for one gear."""

    asked: float
    taken: float


class RowCosts:
    """The running estimates for one model.

    Args:
        manifest: The model.
        profile: How long its stages take.
        ladder: Its gears; rows of a request that chose for itself are in none of them, None.
    """

    def __init__(self, manifest: Manifest, profile: Profile, ladder: Sequence[Gear]) -> None:
        self._exit_stages = [exit_.stage for exit_ in manifest.exits]
        self._is_gated = bool(manifest.gates)
        self._profile = profile
        self._ladder = ladder
        self._full_s = 0.0
        self._exit_shares: list[float] = []
        self._shares: dict[int | None, _Share] = {}
        self._costs: dict[int | None, RowCost] = {}
        self._num_observed = 0

    def of(self, gear: int | None) -> RowCost:
        """Give what a row of a gear takes; None is a request that chose for itself."""
        cost = self._costs.get(gear)
        if cost is None:
            self._refresh()
            cost = self._costs[gear]
        return cost

    def asked_s(self, gear: int | None) -> float:
        """Give the first of these alone."""
        return self.of(gear).asked_s

    def observe(self, gear: int | None, exit_index: int, depth: float, *, is_forced: bool) -> None:
        """Take a row into account that has been answered.

        Args:
            gear: The one it was admitted in.
            exit_index: Where it left.
            depth: The share of the full path's FLOPs that it ran.
            is_forced: Whether its deadline cut it short. How far it would have gone is not known; those who had not
                left by then mostly go far, so it counts as one that asked for everything.
        """
        self._num_observed += 1
        if not self._exit_shares or self._num_observed % REFRESH_EVERY == 0:
            self._refresh()
        taken = depth if self._is_gated else self._exit_shares[exit_index]
        share = self._shares[gear]
        share.taken += ROW_GAIN * (taken - share.taken)
        share.asked += ROW_GAIN * ((1.0 if is_forced else taken) - share.asked)
        self._costs[gear] = self._cost(share)

    def _refresh(self) -> None:
        """Look at the profile again; for the first time, expect of each gear what calibration does."""
        done_s = list(accumulate(stage.mean_s(stage.knee) / stage.knee for stage in self._profile.stages))
        self._full_s = self._profile.strain * done_s[-1]
        self._exit_shares = [done_s[stage] / done_s[-1] for stage in self._exit_stages]
        if not self._shares:
            expected = [(gear, self._expected(step)) for gear, step in enumerate(self._ladder)]
            self._shares = {gear: _Share(share, share) for gear, share in [(None, 1.0), *expected]}
        self._costs = {gear: self._cost(share) for gear, share in self._shares.items()}

    def _cost(self, share: _Share) -> RowCost:
        first_s = self._exit_shares[0] * self._full_s
        return RowCost(
            asked_s=share.asked * self._full_s,
            taken_s=share.taken * self._full_s,
            first_s=share.asked * first_s if self._is_gated else first_s,
        )

    def _expected(self, gear: Gear) -> float:
        if gear.point is None:
            is_known = isinstance(gear.policy_spec, FixedSpec) and not self._is_gated
            return self._exit_shares[gear.policy_spec.exit] if is_known else 1.0  # type: ignore[union-attr]
        if self._is_gated:
            return gear.point.compute
        return sum(rate * share for rate, share in zip(gear.point.exit_rates, self._exit_shares, strict=True))

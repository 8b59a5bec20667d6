"""A model's gears: what a request gets now, and below it the certified operating points that cost less.

Every step but the first rests on a certificate for the floor that the operator has set. A calibration's certificates
hold together: with probability 1 - delta none of those that meet a floor is wrong, so it holds for any mix of them.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from offramp_contract.budgets import ACCURACY_DELTA
from offramp_contract.calibration import Calibration, Certificate, OperatingPoint
from offramp_contract.gates import gate_thresholds
from offramp_contract.manifest import Manifest
from offramp_contract.policy import Policy
from offramp_contract.policy_spec import FixedSpec, PolicySpec, compile_policy
from offramp_runtime import Bundle

from offramp_server.choice import Choice
from offramp_server.engine_settings import EngineSettings
from offramp_server.messages import RequestOptions

logger = logging.getLogger("offramp.server")

MAX_GEARS: Final = 12
RISK_DELTA: Final = 0.05
"""A floor on risk holds with probability 1 - this, at least, as one on accuracy does."""


@dataclass(frozen=True, slots=True)
class Floor:
    """How far down the operator lets a server go; both hold where both are given.

    Attributes:
        accuracy: Least share of right answers.
        risk: Greatest share of answers that differ from full depth's.
    """

    accuracy: float | None = None
    risk: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is one."""
        return self.accuracy is not None or self.risk is not None

    def certificates(self, point: OperatingPoint) -> tuple[Certificate, ...] | None:
        """Give the certificates by which a point is above the floor; None if it is not, or not for certain."""
        kept = []
        if self.accuracy is not None:
            promised = point.certificate("accuracy", ACCURACY_DELTA)
            if promised is None or promised.bound < self.accuracy:
                return None
            kept.append(promised)
        if self.risk is not None:
            promised = point.certificate("consistency", RISK_DELTA)
            if promised is None or promised.bound > self.risk:
                return None
            kept.append(promised)
        return tuple(kept)

    def __str__(self) -> str:
        given = {"accuracy": self.accuracy, "risk": self.risk}
        return " and ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Gear:
    """One step of the ladder.

    Attributes:
        policy_spec: The rule as it is written down.
        policy: The same, compiled.
        point: The operating point it is; None where gear 0 is a policy that was not calibrated.
        certificates: Those by which it is above the floor; gear 0, which is no step, may have none.
        gate_thresholds: What each gate's score is compared with; None takes the network's own.
    """

    policy_spec: PolicySpec
    policy: Policy
    point: OperatingPoint | None
    certificates: tuple[Certificate, ...] = ()
    gate_thresholds: tuple[float, ...] | None = None

    def applied_to(self, options: RequestOptions) -> RequestOptions:
        """Give a request's options with this gear's rule in the place of their own."""
        return replace(
            options,
            policy=self.policy,
            policy_spec=self.policy_spec,
            operating_point=None if self.point is None else self.point.name,
            gate_thresholds=self.gate_thresholds,
        )


def ladder_under(settings: EngineSettings, name: str, bundle: Bundle, default: Choice | None) -> tuple[Gear, ...]:
    """Give the gears that an operator's settings leave a model, and say in the log what they are.

    Args:
        settings: With the floor.
        name: What the model is served as.
        bundle: The model and its calibration.
        default: What serves requests that choose nothing; None is the bundle's default policy.
    """
    floor = Floor(settings.gear_floor_accuracy, settings.gear_floor_risk)
    if not settings.gears or not floor.is_set:
        return ()
    manifest = bundle.manifest
    ladder = ladder_of(manifest, bundle.calibration, default or Choice(manifest.default_policy), floor)
    if not ladder:
        logger.warning("model %s has no gears: no cheaper operating point is certified for %s", name, floor)
    elif ladder[-1].point is not None:
        cheapest = ladder[-1].point.name
        logger.info("model %s has %d gears above %s, down to operating point %s", name, len(ladder), floor, cheapest)
    return ladder


def ladder_of(manifest: Manifest, calibration: Calibration, start: Choice, floor: Floor) -> tuple[Gear, ...]:
    """Give the gears of a model, from what a request gets now to the cheapest point above the floor.

    Args:
        manifest: The model.
        calibration: Its operating points.
        start: What serves a request that chooses nothing, without a backlog.
        floor: The operator's.

    Returns:
        At most `MAX_GEARS`, each cheaper than the one before; none if there is no step to take.
    """
    if not floor.is_set:
        return ()
    certified = [(point, floor.certificates(point)) for point in calibration.operating_points]
    above = {point.name: kept for point, kept in certified if kept is not None}
    cheaper = [point for point in calibration.operating_points if point.name in above]
    limit = compute_of(start, manifest)
    steps = _spaced(_best(point for point in cheaper if point.compute < limit), limit)
    if not steps:
        return ()
    first = Gear(start.policy, _compiled(start.policy, manifest), start.point, (), _thresholds(start.point, manifest))
    return first, *(
        Gear(point.policy, _compiled(point.policy, manifest), point, above[point.name], _thresholds(point, manifest))
        for point in steps
    )


def compute_of(choice: Choice, manifest: Manifest) -> float:
    """Give the share of full depth's FLOPs that a choice is expected to take; 1 where nothing is known of it."""
    if choice.point is not None:
        return choice.point.compute
    if isinstance(choice.policy, FixedSpec) and not manifest.gates:
        return manifest.exit_depths[choice.policy.exit]
    return 1.0


def _best(points: Iterable[OperatingPoint]) -> list[OperatingPoint]:
    """Leave out what another point beats in cost and accuracy at once; the dearest and most accurate comes first."""
    best: list[OperatingPoint] = []
    for point in sorted(points, key=lambda point: (point.compute, -point.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best[::-1]


def _spaced(points: Sequence[OperatingPoint], limit: float) -> list[OperatingPoint]:
    """Choose so many points that each step saves about the same share of what is left."""
    num_steps = MAX_GEARS - 1
    if len(points) <= num_steps:
        return list(points)
    deepest = math.log(points[-1].compute)
    span = math.log(limit) - deepest
    wanted = [deepest + span * (num_steps - step) / num_steps for step in range(1, num_steps + 1)]
    nearest = [min(points, key=lambda point: abs(math.log(point.compute) - level)) for level in wanted]
    return list({point.name: point for point in nearest}.values())


def _compiled(policy: PolicySpec, manifest: Manifest) -> Policy:
    return compile_policy(policy, len(manifest.exits), manifest.native)


def _thresholds(point: OperatingPoint | None, manifest: Manifest) -> tuple[float, ...] | None:
    if point is None or point.gate_threshold is None:
        return None
    return tuple(gate_thresholds(manifest, "own", point.gate_threshold).tolist())

"""How a request chooses the rule it is served by: a policy, a calibrated point by name, or what it wants of the answer.

`compute`, `accuracy` and `risk` say what is wanted; the bundle's calibration knows which operating point gives it. What
a request leaves open, the operator's default operating point may decide, and else the bundle's default policy.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import orjson
from offramp_contract.budgets import certified_accuracy, certified_risk, within_compute
from offramp_contract.calibration import Calibration, Certificate, CertificateKind, OperatingPoint
from offramp_contract.errors import InvalidValue
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import KINDS, PolicySpec, parse_policy

Fields = Mapping[str, Any]

POLICY_FIELDS: Final = ("policy", "threshold", "patience")
BUDGET_FIELDS: Final = ("compute", "accuracy", "risk")
CHOICE_FIELDS: Final = (*POLICY_FIELDS, "operating_point", *BUDGET_FIELDS)
RISKS: Final[tuple[CertificateKind, ...]] = ("consistency", "accuracy_loss")


@dataclass(frozen=True, slots=True)
class Choice:
    """The rule that serves a request.

    Attributes:
        policy: The rule.
        point: The calibrated point it comes from, if it comes from one.
        certificate: What the point was chosen for, if a certified one was asked for.
    """

    policy: PolicySpec
    point: OperatingPoint | None = None
    certificate: Certificate | None = None

    @property
    def gate_threshold(self) -> float | None:
        """What the gates' scores are compared with unless the request says so itself; None is the network's own."""
        return None if self.point is None else self.point.gate_threshold


def choose(given: Fields, manifest: Manifest, calibration: Calibration, otherwise: Fields) -> Choice:
    """Find the rule that a request's fields ask for.

    Args:
        given: The request's fields, without those that are None.
        manifest: Its default policy serves those who ask for nothing.
        calibration: Its operating points.
        otherwise: Fields that stand in for a request that gives none of `CHOICE_FIELDS`.

    Raises:
        InvalidValue: If two fields contradict each other, or no operating point gives what is wanted.
    """
    if not any(name in given for name in CHOICE_FIELDS):
        given = otherwise
    _refuse_contradictions(given)
    if "operating_point" in given:
        point = _named_point(given["operating_point"], calibration.operating_points)
        return Choice(point.policy, point)
    if not any(name in given for name in BUDGET_FIELDS):
        return Choice(_written_policy(given, manifest))
    return _chosen_by(_read_budgets(given), calibration)


class _Budgets(NamedTuple):
    """What a request wants of its answers; of accuracy and risk at most one, and compute where neither is given."""

    kind: str | None
    compute: float | None
    accuracy: float | None
    risk: tuple[float, float | None, CertificateKind] | None


def _read_budgets(given: Fields) -> _Budgets:
    kind = given.get("policy")
    if kind is not None and kind not in KINDS:
        raise InvalidValue(f"policy: the kind must be one of {', '.join(KINDS)}", "policy")
    return _Budgets(
        kind,
        number(given["compute"], "compute", 0.0, 1.0, above=True) if "compute" in given else None,
        number(given["accuracy"], "accuracy", 0.0, 1.0) if "accuracy" in given else None,
        _risk(given["risk"]) if "risk" in given else None,
    )


# Clients ask for the same few budgets again and again, and looking through hundreds of points and thousands of
# certificates takes as long as the rest of a request.
@lru_cache(maxsize=1024)
def _chosen_by(wanted: _Budgets, calibration: Calibration) -> Choice:
    points = [point for point in calibration.operating_points if wanted.kind in (None, point.policy.kind)]
    certificate = None
    if wanted.accuracy is not None:
        point, certificate = certified_accuracy(points, wanted.accuracy)
    elif wanted.risk is not None:
        point, certificate = certified_risk(points, *wanted.risk)
    else:
        point = within_compute(points, wanted.compute or 0.0)
    if wanted.compute is not None and point.compute > wanted.compute:
        raise InvalidValue(
            f"compute: the cheapest operating point certified for this takes {point.compute:.4g} on average", "compute"
        )
    return Choice(point.policy, point, certificate)


@lru_cache(maxsize=8)
def parse_defaults(text: str) -> Mapping[str | None, Fields]:
    """Read an operator's default operating points: `compute=0.4`, or `digits:accuracy=0.9,scenes:confidence-40.2`.

    Returns:
        The fields that stand in, by model; None is every model that is not named.

    Raises:
        ValueError: If it cannot be read, naming the part.
    """
    defaults: dict[str | None, Fields] = {}
    for part in text.split(","):
        model, colon, wanted = part.strip().rpartition(":")
        name, equals, value = wanted.partition("=")
        if not wanted or (colon and not model) or (equals and name not in ("compute", "accuracy")):
            raise ValueError(
                f"{part.strip()!r} is neither a point's name nor compute=SHARE or accuracy=SHARE, after MODEL: or alone"
            )
        if (model or None) in defaults:
            raise ValueError(f"{model or 'every model'} has two default operating points")
        defaults[model or None] = {name: _share(name, value)} if equals else {"operating_point": wanted}
    return defaults


def number(value: object, field: str, low: float, high: float, *, above: bool = False, below: bool = False) -> float:
    """Check a number that a request gives.

    Args:
        value: What was given.
        field: What to call it.
        low: The least number allowed.
        high: The greatest.
        above: Whether `low` itself is not allowed.
        below: Whether `high` itself is not allowed.

    Raises:
        InvalidValue: If it is not a number in that range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (above and value == low) or (below and value == high):  # type: ignore[operator]
        bounds = f"{'above' if above else 'at least'} {low:g} and {'below' if below else 'at most'} {high:g}"
        raise InvalidValue(f"{field}: must be a number {bounds}", field)
    return float(value)  # type: ignore[arg-type]


def _refuse_contradictions(given: Fields) -> None:
    ways = [name for name in ("policy", "threshold", "patience") if name in given][:1]
    ways += [name for name in ("operating_point", "accuracy", "risk") if name in given]
    if "compute" in given and not any(name in given for name in ("accuracy", "risk")):
        ways.append("compute")
    is_kind_alone = isinstance(given.get("policy"), str) and not {"threshold", "patience"} & set(given)
    if is_kind_alone and "operating_point" not in given:
        ways = ways[1:]  # a kind's name says among which points to choose
    if len(ways) > 1:
        raise InvalidValue(
            f"{ways[1]}: {' and '.join(ways)} each choose the thresholds; give exactly one of them", ways[1]
        )


def _named_point(name: object, points: Sequence[OperatingPoint]) -> OperatingPoint:
    for point in points:
        if point.name == name:
            return point
    examples = ", ".join(point.name for point in points[:3])
    known = f"it has {len(points)}, such as {examples}" if points else "it is not calibrated"
    raise InvalidValue(f"operating_point: this model has no point of that name; {known}", "operating_point")


def _written_policy(given: Fields, manifest: Manifest) -> PolicySpec:
    policy, threshold, patience = given.get("policy"), given.get("threshold"), given.get("patience")
    if isinstance(policy, dict) and (threshold is not None or patience is not None):
        beside = "threshold" if threshold is not None else "patience"
        raise InvalidValue(f"{beside}: write it inside policy when policy is an object", beside)
    if policy is None:
        if threshold is None and patience is None:
            return manifest.default_policy
        policy = manifest.default_policy
    elif not isinstance(policy, str | dict):
        raise InvalidValue(f"policy: must be an object or one of the names {', '.join(KINDS)}", "policy")
    if isinstance(threshold, str) or isinstance(patience, str):  # pydantic would read numbers out of strings
        beside = "threshold" if isinstance(threshold, str) else "patience"
        raise InvalidValue(f"{beside}: must be a number, not a string", beside)
    return parse_policy(policy, threshold, patience)


def _risk(written: object) -> tuple[float, float | None, CertificateKind]:
    if not isinstance(written, dict) or "epsilon" not in written or set(written) - {"epsilon", "delta", "kind"}:
        raise InvalidValue(
            'risk: must be an object like {"epsilon": 0.02, "delta": 0.05}; without delta the risk is kept on average, '
            f"and kind may be one of {', '.join(RISKS)}",
            "risk",
        )
    epsilon = number(written["epsilon"], "risk.epsilon", 0.0, 1.0, above=True, below=True)
    delta = written.get("delta")
    if delta is not None:
        delta = number(delta, "risk.delta", 0.0, 1.0, above=True, below=True)
    kind = written.get("kind", RISKS[0])
    if kind not in RISKS:
        raise InvalidValue(f"risk.kind: must be one of {', '.join(RISKS)}", "risk.kind")
    return epsilon, delta, kind


def _share(name: str, text: str) -> float:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    try:
        return number(value, name, 0.0, 1.0, above=True)
    except InvalidValue as error:
        raise ValueError(error.message) from None


DefaultsOf = Callable[[str], Fields]
"""Gives the fields that stand in where a request to a model, given by name, chooses nothing."""


def no_defaults(model: str) -> Fields:
    """Leave it to the bundle's default policy, whichever the model."""
    return {}

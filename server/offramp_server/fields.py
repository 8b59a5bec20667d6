"""The fields of a request that say how its rows are routed, read and checked.

The same names serve JSON bodies, query parameters, form fields and the parameters of /v2. JSON values keep their types;
values written as text are read as numbers, lists or objects where the field holds those.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

import orjson
from offramp_contract.calibration import Calibration, Certificate
from offramp_contract.errors import InvalidValue, MalformedRequest
from offramp_contract.gates import gate_thresholds
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import COMPARING_KINDS, KINDS, PolicySpec, compares_labels, compile_policy
from offramp_contract.statistics import MAX_TOP

from offramp_server.choice import CHOICE_FIELDS, Choice, Fields, choose, number
from offramp_server.messages import RequestOptions

FIELDS: Final = (
    *CHOICE_FIELDS, "latency_ms", "min_exit", "max_exit", "gate_threshold", "gates", "combine", "on_miss", "top_k",
    "explain",
)  # fmt: skip
CHOOSING_FIELDS: Final = (*CHOICE_FIELDS, "gate_threshold", "gates")
"""Those with which a request chooses its rule itself, so that no gear does."""
COMBINATIONS: Final = ("last", "mean", "geometric")
ON_MISS: Final = ("answer", "reject")


class Limits(Protocol):
    """What the operator allows a request to ask for; `ServerSettings` is one."""

    @property
    def max_latency_ms(self) -> float:
        """Largest budget a request may name."""

    @property
    def depth_floor(self) -> int:
        """No voluntary exit before this one."""

    @property
    def depth_cap(self) -> int | None:
        """No stage beyond this exit."""


@dataclass(frozen=True, slots=True)
class NoLimits:
    """No operator stands between the caller and the model: in-process use."""

    max_latency_ms: float = math.inf
    depth_floor: int = 0
    depth_cap: int | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """What the fields of one request ask for.

    Attributes:
        options: For the engine.
        top_k: How many leading classes the answer lists.
        certificate: The certificate that the chosen operating point was chosen for, if a certified one was asked for.
    """

    options: RequestOptions
    top_k: int
    certificate: Certificate | None = None


def read_routing(
    fields: Fields,
    manifest: Manifest,
    calibration: Calibration,
    limits: Limits,
    *,
    otherwise: Fields = MappingProxyType({}),
    wants_progress: bool = False,
    wants_logits: bool = False,
) -> Routing:
    """Check the fields of a request against the model and the operator's limits.

    Args:
        fields: Any of `FIELDS`, typed; None counts as not given. See `fields_of_text` for values written as text.
        manifest: The model.
        calibration: Its operating points.
        limits: The operator's limits.
        otherwise: The fields of the operator's default operating point, for a request that chooses nothing.
        wants_progress: Passed on to the engine.
        wants_logits: Passed on to the engine.

    Raises:
        InvalidValue: With a sentence that names the field and what is allowed.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    _refuse_unknown(given)
    choice = choose(given, manifest, calibration, otherwise)
    min_exit, max_exit = _exit_range(given, len(manifest.exits), limits)
    combine = _one_of(given, "combine", COMBINATIONS)
    _refuse_comparing(choice.policy, combine, manifest)
    options = RequestOptions(
        policy=compile_policy(choice.policy, len(manifest.exits), manifest.native),
        policy_spec=choice.policy,
        operating_point=choice.point.name if choice.point is not None else None,
        latency_ms=_latency(given, limits),
        min_exit=min_exit,
        max_exit=max_exit,
        gate_thresholds=_gate_thresholds(given, manifest, choice),
        combine=combine,
        on_miss=_one_of(given, "on_miss", ON_MISS),
        explain=_boolean(given, "explain"),
        wants_progress=wants_progress,
        wants_logits=wants_logits,
        is_free=given.keys().isdisjoint(CHOOSING_FIELDS),
    )
    return Routing(options, _integer(given, "top_k", 1, MAX_TOP, default=MAX_TOP), choice.certificate)


def combinations_of(manifest: Manifest) -> tuple[str, ...]:
    """Give the ways in which a model's exits can be combined to one answer."""
    return COMBINATIONS if manifest.has_common_classes else COMBINATIONS[:1]


def kinds_of(manifest: Manifest) -> list[str]:
    """Give the kinds of policy that a model can be asked for."""
    missing = set() if manifest.has_common_classes else set(COMPARING_KINDS)
    if manifest.native is None:
        missing.add("native")
    return [kind for kind in KINDS if kind not in missing]


def fields_of_text(written: Mapping[str, str]) -> dict[str, Any]:
    """Read fields written as text: query parameters and form fields.

    Numbers, booleans, lists and objects are JSON; a list of numbers may also be written `0.9,0.8`. A name stands for
    itself.

    Raises:
        InvalidValue: If a field is not known.
        MalformedRequest: If an object or list is not valid JSON.
    """
    _refuse_unknown(written)
    return {name: _of_text(name, text) for name, text in written.items()}


def _of_text(name: str, text: str) -> Any:
    text = text.strip()
    if name in ("combine", "on_miss", "operating_point") or (name == "policy" and not text.startswith("{")):
        return text
    if name in ("threshold", "gate_threshold") and "," in text and not text.startswith("["):
        text = f"[{text}]"
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if text[:1] in ("{", "["):
            raise MalformedRequest(f"{name}: it is not valid JSON", name) from None
        return text  # the field's own check says what belongs here


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    unknown = next((name for name in given if name not in FIELDS), None)
    if unknown is not None:
        raise InvalidValue(f"{unknown[:80]}: there is no such field; the fields are {', '.join(FIELDS)}", unknown[:80])


def _gate_thresholds(given: Fields, manifest: Manifest, choice: Choice) -> tuple[float, ...] | None:
    """Give what each gate's score is compared with; None is the network's own.

    Raises:
        InvalidValue: Naming `gates` or `gate_threshold` and what is allowed.
    """
    gates, threshold = given.get("gates", "own"), given.get("gate_threshold")
    if gates == "own" and threshold is None:
        threshold = choice.gate_threshold
    if threshold is None and "gates" not in given:
        return None
    if gates not in ("own", "open", "shut") and type(gates) is not int:
        raise InvalidValue(
            "gates: must be own, open or shut, or a count of blocks where depth is the caller's choice", "gates"
        )
    if threshold is not None and not _are_numbers(threshold):
        raise InvalidValue(
            "gate_threshold: must be a number from 0 to 1, or a list with one per gate", "gate_threshold"
        )
    return tuple(gate_thresholds(manifest, gates, threshold).tolist())


def _are_numbers(value: object) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def _exit_range(given: Fields, num_exits: int, limits: Limits) -> tuple[int, int | None]:
    final = num_exits - 1
    floor = min(limits.depth_floor, final)
    cap = final if limits.depth_cap is None else min(limits.depth_cap, final)
    min_exit = _integer(given, "min_exit", 0, cap, default=floor)
    max_exit = _integer(given, "max_exit", floor, cap, default=cap)
    if "max_exit" in given and "min_exit" in given and min_exit > max_exit:
        raise InvalidValue(f"min_exit: {min_exit} is above max_exit, {max_exit}", "min_exit")
    return min(max(min_exit, floor), max_exit), max_exit if max_exit < final else None


def _latency(given: Fields, limits: Limits) -> float | None:
    if "latency_ms" not in given:
        return None
    return number(given["latency_ms"], "latency_ms", 0.0, limits.max_latency_ms, above=True)


def _integer(given: Fields, name: str, low: int, high: int, *, default: int) -> int:
    if name not in given:
        return default
    value = given[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidValue(f"{name}: must be an integer from {low} to {high}", name)
    return value


def _boolean(given: Fields, name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise InvalidValue(f"{name}: must be true or false", name)
    return value


def _refuse_comparing(policy: PolicySpec, combine: str, manifest: Manifest) -> None:
    """Exits of different width have different classes: a label of one says nothing at another."""
    if manifest.has_common_classes:
        return
    differ = "the exits of this model have different numbers of classes"
    if combine not in combinations_of(manifest):
        raise InvalidValue(f"combine: {differ}, so the answer can only be that of the last exit", "combine")
    if compares_labels(policy):
        raise InvalidValue(f"policy: patience and agreement compare labels, and {differ}", "policy")


def _one_of(given: Fields, name: str, allowed: tuple[Any, ...]) -> Any:
    value = given.get(name, allowed[0])
    if value not in allowed:
        raise InvalidValue(f"{name}: must be one of {', '.join(allowed)}", name)
    return value

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
from offramp_contract.manifest import Manifest
from offramp_contract.policy_spec import compile_policy
from offramp_contract.statistics import MAX_TOP

from offramp_server.choice import CHOICE_FIELDS, Fields, choose, number
from offramp_server.messages import RequestOptions

FIELDS: Final = (
    *CHOICE_FIELDS, "latency_ms", "min_exit", "max_exit", "gate_threshold", "gates", "combine", "on_miss", "top_k",
    "explain",
)  # fmt: skip
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
    _refuse_gates(given)
    choice = choose(given, manifest, calibration, otherwise)
    min_exit, max_exit = _exit_range(given, len(manifest.exits), limits)
    options = RequestOptions(
        policy=compile_policy(choice.policy, len(manifest.exits)),
        policy_spec=choice.policy,
        operating_point=choice.point.name if choice.point is not None else None,
        latency_ms=_latency(given, limits),
        min_exit=min_exit,
        max_exit=max_exit,
        combine=_one_of(given, "combine", COMBINATIONS),
        on_miss=_one_of(given, "on_miss", ON_MISS),
        explain=_boolean(given, "explain"),
        wants_progress=wants_progress,
        wants_logits=wants_logits,
    )
    return Routing(options, _integer(given, "top_k", 1, MAX_TOP, default=MAX_TOP), choice.certificate)


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
    if name in ("combine", "on_miss", "operating_point") or (name in ("policy", "gates") and not text.startswith("{")):
        return text
    if name == "threshold" and "," in text and not text.startswith("["):
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


def _refuse_gates(given: Fields) -> None:
    for name in ("gate_threshold", "gates"):
        if name in given:
            raise InvalidValue(f"{name}: this model has no gates", name)


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


def _one_of(given: Fields, name: str, allowed: tuple[Any, ...]) -> Any:
    value = given.get(name, allowed[0])
    if value not in allowed:
        raise InvalidValue(f"{name}: must be one of {', '.join(allowed)}", name)
    return value

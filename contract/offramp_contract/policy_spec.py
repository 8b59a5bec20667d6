"""Policies as they are written down: in a request, in a manifest, in a calibration.

A spec is validated and immutable; `compile_policy` turns it into the callable of `offramp_contract.policy` for a
network with a given number of exits. Equal specs compile to the same object, so rows that ask alike share it.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from numbers import Real
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from offramp_contract.errors import InvalidValue
from offramp_contract.native import NativeRules
from offramp_contract.policy import (
    Agreement,
    AllOf,
    AnyOf,
    Confidence,
    Entropy,
    Fixed,
    Margin,
    Patience,
    Policy,
    Window,
)

MAX_MEMBERS = 8
MAX_NESTING = 3
MAX_EXITS = 1024


def _number(value: object) -> object:
    # pydantic would read numbers out of strings and booleans.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("must be a number")
    return value


Share: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False), BeforeValidator(_number)]
Thresholds: TypeAlias = Share | Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_EXITS)]
Number: TypeAlias = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Count: TypeAlias = Annotated[int, Field(ge=1, le=MAX_EXITS), BeforeValidator(_number)]
ExitIndex: TypeAlias = Annotated[int, Field(ge=0, lt=MAX_EXITS), BeforeValidator(_number)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ConfidenceSpec(_Spec):
    """Leave when the largest probability reaches the threshold."""

    kind: Literal["confidence"] = "confidence"
    threshold: Thresholds = 0.9


class EntropySpec(_Spec):
    """Leave when the normalised entropy is down to the threshold."""

    kind: Literal["entropy"] = "entropy"
    threshold: Thresholds = 0.2


class MarginSpec(_Spec):
    """Leave when the two largest probabilities differ by the threshold."""

    kind: Literal["margin"] = "margin"
    threshold: Thresholds = 0.7


class AgreementSpec(_Spec):
    """Leave when a large enough share of the exits so far agree on a label."""

    kind: Literal["agreement"] = "agreement"
    threshold: Thresholds = 1.0


class PatienceSpec(_Spec):
    """Leave when the label has stayed the same for so many exits."""

    kind: Literal["patience"] = "patience"
    patience: Count = 1


class WindowSpec(_Spec):
    """Go on while the largest probability lies in [low, high]."""

    kind: Literal["window"] = "window"
    low: Share
    high: Share

    @model_validator(mode="after")
    def _ordered(self) -> "WindowSpec":
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


class FixedSpec(_Spec):
    """Leave at one exit, always."""

    kind: Literal["fixed"] = "fixed"
    exit: ExitIndex


class NativeSpec(_Spec):
    """Leave where the network itself would have returned; its own thresholds hold where none is given."""

    kind: Literal["native"] = "native"
    threshold: Number | Annotated[tuple[Number | None, ...], Field(min_length=1, max_length=MAX_EXITS)] | None = None


class _CombinationSpec(_Spec):
    of: tuple["PolicySpec", ...] = Field(min_length=1, max_length=MAX_MEMBERS)

    @model_validator(mode="before")
    @classmethod
    def _shallow(cls, written: object) -> object:
        # Before, not after: the outermost combination refuses before anything recurses into the inner ones.
        if _nesting(written) > MAX_NESTING:
            raise ValueError(f"combinations may be nested at most {MAX_NESTING} deep")
        return written


class AllOfSpec(_CombinationSpec):
    """Leave when all members say so."""

    kind: Literal["all_of"] = "all_of"


class AnyOfSpec(_CombinationSpec):
    """Leave when a member says so."""

    kind: Literal["any_of"] = "any_of"


def _nesting(written: object, limit: int = MAX_NESTING) -> int:
    members = written.get("of") if isinstance(written, dict) else getattr(written, "of", None)
    if limit < 0 or not isinstance(members, list | tuple):
        return 0
    return 1 + max((_nesting(member, limit - 1) for member in members), default=0)


PolicySpec: TypeAlias = Annotated[
    ConfidenceSpec
    | EntropySpec
    | MarginSpec
    | AgreementSpec
    | PatienceSpec
    | WindowSpec
    | FixedSpec
    | NativeSpec
    | AllOfSpec
    | AnyOfSpec,
    Field(discriminator="kind"),
]
AllOfSpec.model_rebuild()
AnyOfSpec.model_rebuild()
_ADAPTER: TypeAdapter[PolicySpec] = TypeAdapter(PolicySpec)

COMPARING_KINDS = ("patience", "agreement")
"""Policies that compare what one exit answers with what another does."""

KINDS = ("confidence", "entropy", "margin", "patience", "agreement", "window", "fixed", "native", "all_of", "any_of")


def parse_policy(policy: object, threshold: object = None, patience: object = None) -> PolicySpec:
    """Read a policy as a request writes it.

    Args:
        policy: A kind's name, an object with `kind` and its parameters, or a spec.
        threshold: The `threshold` beside a kind's name, a number or one number per non-final exit.
        patience: The `patience` beside a kind's name.

    Raises:
        InvalidValue: With a sentence that names the field and what is allowed.
    """
    if isinstance(policy, _Spec) and threshold is None and patience is None:
        return policy  # type: ignore[return-value]
    written = {"kind": policy} if isinstance(policy, str) else policy
    if isinstance(written, _Spec):
        written = written.model_dump()
    if not isinstance(written, dict) or written.get("kind") not in KINDS:
        raise InvalidValue(f"policy: the kind must be one of {', '.join(KINDS)}", field="policy")
    beside = {"threshold": threshold, "patience": patience}
    written = written | {name: value for name, value in beside.items() if value is not None}
    try:
        return _ADAPTER.validate_python(written)
    except ValidationError as error:
        raise InvalidValue(*_sentence(error)) from None


def _sentence(error: ValidationError) -> tuple[str, str]:
    # Of the union branches that pydantic tried, the one that got furthest is the one the person meant: deepest into
    # the value, or past its type to its length.
    problem = max(
        error.errors(include_url=False, include_context=False, include_input=False),
        key=lambda p: (len(p["loc"]), p["type"] in {"too_short", "too_long"}),
    )
    # Its path also names the branches, and the kind at the start and behind each index; a person wrote neither.
    before = (0, *problem["loc"])
    path = [
        str(part)
        for previous, part in zip(before, problem["loc"], strict=False)
        if not isinstance(previous, int) and re.fullmatch(r"[a-z_]+|\d+", str(part))
    ]
    field = ".".join(path) or "policy"
    if problem["type"] == "extra_forbidden":
        return f"{field}: policy {problem['loc'][-2]!r} has no such parameter", field
    if problem["type"].startswith("union_tag"):
        return f"{field}: the kind must be one of {', '.join(KINDS)}", field
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message[0].lower()}{message[1:]}", field


def compile_policy(spec: PolicySpec, num_exits: int, native: NativeRules | None = None) -> Policy:
    """Turn a spec into its callable for a network of `num_exits` exits.

    Args:
        spec: What is written down.
        num_exits: Number of exits of the network.
        native: The network's own exit rules (`Manifest.native`); None if it has none.

    Raises:
        InvalidValue: If a threshold list is not one per non-final exit, a fixed exit does not exist, or the network has
            no rules, or no thresholds, of its own where they are asked for.
    """
    return _compiled(spec, num_exits, native)


@lru_cache(maxsize=4096)
def _compiled(spec: PolicySpec, num_exits: int, native: NativeRules | None) -> Policy:
    match spec:
        case ConfidenceSpec():
            return Confidence(_thresholds(spec.threshold, num_exits))
        case EntropySpec():
            return Entropy(_thresholds(spec.threshold, num_exits))
        case MarginSpec():
            return Margin(_thresholds(spec.threshold, num_exits))
        case AgreementSpec():
            return Agreement(_thresholds(spec.threshold, num_exits))
        case PatienceSpec():
            return Patience(_row(spec.patience))
        case WindowSpec():
            return Window(_row(spec.low), _row(spec.high))
        case FixedSpec():
            if spec.exit >= num_exits:
                raise InvalidValue(f"exit: must be 0 to {num_exits - 1}, the exits of this model", field="exit")
            return Fixed(_row(spec.exit))
        case NativeSpec():
            if native is None:
                raise InvalidValue("policy: this model has no exit rules of its own; name another kind", field="policy")
            return native.policy(spec.threshold)
        case AllOfSpec():
            return AllOf(tuple(_compiled(member, num_exits, native) for member in spec.of))
        case AnyOfSpec():
            return AnyOf(tuple(_compiled(member, num_exits, native) for member in spec.of))


def compares_labels(spec: PolicySpec) -> bool:
    """Tell whether a policy compares the answers of several exits, which must have the same classes for that."""
    return spec.kind in COMPARING_KINDS or any(map(compares_labels, getattr(spec, "of", ())))


def without_exits(
    spec: PolicySpec, dropped: Collection[int], num_exits: int, native: NativeRules | None = None
) -> PolicySpec:
    """Give the policy that does the same in a network that lacks some of the exits.

    A list loses the dropped exits' thresholds; a fixed exit that is dropped gives way to the next one that stays; where
    no exit with a rule of the network's own is left, the final exit answers.

    Args:
        spec: A policy for a network of `num_exits` exits.
        dropped: Which exits go, 0-based; the final exit cannot.
        num_exits: How many there were.
        native: The network's own exit rules before.

    Raises:
        InvalidValue: If the spec does not fit `num_exits` exits.
    """
    compile_policy(spec, num_exits, native)
    match spec:
        case ConfidenceSpec() | EntropySpec() | MarginSpec() | AgreementSpec() if isinstance(spec.threshold, tuple):
            kept = tuple(value for index, value in enumerate(spec.threshold) if index not in dropped)
            return spec.model_copy(update={"threshold": kept or spec.threshold[0]})
        case NativeSpec() if len(set(dropped)) == num_exits - 1:
            return FixedSpec(exit=0)
        case NativeSpec() if isinstance(spec.threshold, tuple):
            chosen = tuple(value for index, value in enumerate(spec.threshold) if index not in dropped)
            return NativeSpec(threshold=chosen)
        case NativeSpec() if spec.threshold is not None and native is not None:
            # A number speaks for the exits that have a knob; what stays may have none.
            left = native.without_exits(dropped)
            has_knob = left is not None and any(rule.is_knob for rule in left.rules_N)
            return spec if has_knob else NativeSpec()
        case FixedSpec():
            return FixedSpec(exit=spec.exit - sum(index < spec.exit for index in set(dropped)))
        case AllOfSpec() | AnyOfSpec():
            members = tuple(without_exits(member, dropped, num_exits, native) for member in spec.of)
            return spec.model_copy(update={"of": members})
        case _:
            return spec


def _thresholds(threshold: float | tuple[float, ...], num_exits: int) -> np.ndarray:
    num_deciding = num_exits - 1
    if isinstance(threshold, tuple) and len(threshold) != num_deciding:
        raise InvalidValue(
            f"threshold: a list holds one number per non-final exit, {num_deciding} for this model; "
            f"got {len(threshold)}",
            field="threshold",
        )
    return np.broadcast_to(np.asarray(threshold, dtype=np.float64), (1, num_deciding))


def _row(value: float) -> np.ndarray:
    """Give the parameter of one row. Broadcast, it is read-only: compiled policies are shared."""
    return np.broadcast_to(np.asarray(value), 1)

"""The exit policies: at an exit, which rows stop and which go on.

A policy is a small immutable callable over what a batch of rows has shown so far. It returns one `Reason` per row;
`Reason.CONTINUE` means the rule does not fire. Its parameters are arrays with one row per sample, or a single row that
holds for all, so that rows of different requests, each with its own thresholds, are decided in one call (`stack`).
Policies compose with `AllOf` and `AnyOf`. Calibration, replay and serving all call this code: the rule from score to
"leave" exists nowhere else.

A policy knows nothing of deadlines, caps or the final exit; the router applies those.

Shapes: B = batch, K = exits seen so far, R = 1 or B, N = non-final exits.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import ClassVar, Final, Self

import numpy as np

from offramp_contract.statistics import Decision, FloatArray, IntArray, logit


class Reason(IntEnum):
    """Why a sample leaves at an exit. `CONTINUE` is the absence of a reason."""

    CONTINUE = 0
    CONFIDENT = 1
    ENTROPY = 2
    MARGIN = 3
    PATIENCE = 4
    LEARNED = 5
    AGREEMENT = 6
    WINDOW = 7
    DEPTH_CAP = 8
    DEADLINE = 9
    FINAL = 10
    NATIVE = 11

    @property
    def label(self) -> str:
        """The reason's name in answers and metrics."""
        return self.name.lower()

    @property
    def is_forced(self) -> bool:
        """Whether the deadline, not the policy or the request's caps, made the sample leave."""
        return self is Reason.DEADLINE


@dataclass(frozen=True, slots=True)
class Seen:
    """What B rows have shown at exits 0 .. exit_index.

    Attributes:
        exit_index: The exit that all rows stand at, 0-based.
        decision: The statistics of that exit.
        class_BK: Predicted class at each exit so far, shape (B, exit_index + 1); the last column is this exit's. It may
            be left empty, shape (B, 0), where no policy compares labels.
    """

    exit_index: int
    decision: Decision
    class_BK: IntArray

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.decision.packed_BD)


class Policy(ABC):
    """One rule. Subclasses are frozen dataclasses whose fields are arrays (R, ...) or tuples of policies.

    Policies are compared by identity: equal specs compile to one object.
    """

    kind: ClassVar[str]

    @abstractmethod
    def __call__(self, seen: Seen) -> IntArray:
        """Decide a batch.

        Returns:
            int8, shape (B,): a `Reason` per row, `CONTINUE` where the rule does not fire.
        """

    @property
    def signature(self) -> tuple[object, ...]:
        """What two policies must have in common to be stacked."""
        return (type(self),)

    @property
    def compares_labels(self) -> bool:
        """Whether the rule looks at `Seen.class_BK`."""
        return False

    @classmethod
    def stack(cls, policies: Sequence[Self]) -> Self:
        """Join single-row policies of one signature into one with a row of parameters for each."""
        names = [it.name for it in fields(cls) if it.init]  # type: ignore[arg-type]  # every subclass is a dataclass
        return cls(*(np.concatenate([getattr(policy, name) for policy in policies]) for name in names))

    def threshold_at(self, exit_index: int) -> float | None:
        """The cut-off a single-row policy applies at an exit, or None where it has no single number."""
        return None


_CODES: Final = tuple(np.int8(reason) for reason in Reason)


def _fired(mask_B: np.ndarray, reason: Reason) -> IntArray:
    return mask_B * _CODES[reason]  # `CONTINUE` is 0


@dataclass(frozen=True, slots=True, eq=False)
class _Threshold(Policy):
    """A policy with one threshold per non-final exit, shape (R, N)."""

    threshold_RN: FloatArray

    def threshold_at(self, exit_index: int) -> float | None:
        return float(self.threshold_RN[0, exit_index]) if exit_index < self.threshold_RN.shape[1] else None


@dataclass(frozen=True, slots=True, eq=False)
class Confidence(_Threshold):
    """Leave when `p_max >= threshold` (BranchyNet, SDN, MSDNet; the plain reading of survey eq. 12).

    Both sides are compared as log-odds: a third of easy samples have a p_max that rounds to 1. No softmax of finite
    scores reaches 1, so a threshold of 1 never fires, though log-odds in float32 may overflow to infinity.
    """

    kind: ClassVar[str] = "confidence"
    bar_RN: FloatArray = field(init=False)
    """The thresholds as log-odds; what never fires is NaN, which nothing reaches."""

    def __post_init__(self) -> None:
        bar_RN = logit(self.threshold_RN)
        bar_RN = np.where(bar_RN < np.inf, bar_RN, np.nan)
        bar_RN.setflags(write=False)
        object.__setattr__(self, "bar_RN", bar_RN)

    def __call__(self, seen: Seen) -> IntArray:
        return _fired(seen.decision.log_odds_B >= self.bar_RN[:, seen.exit_index], Reason.CONFIDENT)


@dataclass(frozen=True, slots=True, eq=False)
class Entropy(_Threshold):
    """Leave when `H(p) / ln C <= threshold` (BranchyNet, DeeBERT; survey eq. 11)."""

    kind: ClassVar[str] = "entropy"

    def __call__(self, seen: Seen) -> IntArray:
        return _fired(seen.decision.entropy_B <= self.threshold_RN[:, seen.exit_index], Reason.ENTROPY)


@dataclass(frozen=True, slots=True, eq=False)
class Margin(_Threshold):
    """Leave when `p_(1) - p_(2) >= threshold`."""

    kind: ClassVar[str] = "margin"

    def __call__(self, seen: Seen) -> IntArray:
        return _fired(seen.decision.margin_B >= self.threshold_RN[:, seen.exit_index], Reason.MARGIN)


@dataclass(frozen=True, slots=True, eq=False)
class Patience(Policy):
    """Leave when the label has stayed the same for `patience` consecutive exits (PABEE).

    As in PABEE the count starts at the first exit that repeats its predecessor's label: patience 1 leaves at the
    second of two equal labels.
    """

    kind: ClassVar[str] = "patience"
    patience_R: IntArray

    @property
    def compares_labels(self) -> bool:
        return True

    def __call__(self, seen: Seen) -> IntArray:
        repeats_BK = seen.class_BK[:, :-1] == seen.class_BK[:, -1:]
        streak_B = np.cumprod(repeats_BK[:, ::-1], axis=1).sum(axis=1)
        return _fired(streak_B >= self.patience_R, Reason.PATIENCE)


@dataclass(frozen=True, slots=True, eq=False)
class Agreement(_Threshold):
    """Leave when the share of exits so far that vote for the leading label is `>= threshold` (ABC).

    One vote agrees with nobody: the rule speaks from the second exit on.
    """

    kind: ClassVar[str] = "agreement"

    @property
    def compares_labels(self) -> bool:
        return True

    def __call__(self, seen: Seen) -> IntArray:
        num_votes = seen.class_BK.shape[1]
        if num_votes < 2:
            return np.zeros(seen.num_rows, dtype=np.int8)
        leading_B = (seen.class_BK[:, :, None] == seen.class_BK[:, None, :]).sum(axis=2).max(axis=1)
        return _fired(leading_B / num_votes >= self.threshold_RN[:, seen.exit_index], Reason.AGREEMENT)


@dataclass(frozen=True, slots=True, eq=False)
class Window(Policy):
    """Go on while `low <= p_max <= high`; leave above (sure) and below (hopeless)."""

    kind: ClassVar[str] = "window"
    low_R: FloatArray
    high_R: FloatArray

    def __call__(self, seen: Seen) -> IntArray:
        log_odds_B = seen.decision.log_odds_B
        outside_B = (log_odds_B < logit(self.low_R)) | (log_odds_B > logit(self.high_R))
        return _fired(outside_B, Reason.WINDOW)


@dataclass(frozen=True, slots=True, eq=False)
class Fixed(Policy):
    """Leave at one exit, always: the static baseline."""

    kind: ClassVar[str] = "fixed"
    exit_R: IntArray

    def __call__(self, seen: Seen) -> IntArray:
        fired_R = _fired(seen.exit_index >= self.exit_R, Reason.DEPTH_CAP)
        return fired_R if len(fired_R) == seen.num_rows else np.repeat(fired_R, seen.num_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Native(_Threshold):
    """Leave where the network itself would have returned: its own predicate, its threshold a knob where it has one.

    A rule compares the exit's native score with a threshold from above or below; `sign * score >= bar` says both, and
    `offramp_contract.native` makes the bar such that the comparison equals the network's own in its own precision.
    """

    kind: ClassVar[str] = "native"
    sign_RN: FloatArray
    bar_RN: FloatArray

    def __call__(self, seen: Seen) -> IntArray:
        native_B = seen.decision.native_B
        if native_B is None:
            return np.zeros(seen.num_rows, dtype=np.int8)
        at = seen.exit_index
        return _fired(self.sign_RN[:, at] * native_B >= self.bar_RN[:, at], Reason.NATIVE)


@dataclass(frozen=True, slots=True, eq=False)
class _Combination(Policy):
    members: tuple[Policy, ...]

    @property
    def signature(self) -> tuple[object, ...]:
        return (type(self), *(member.signature for member in self.members))

    @property
    def compares_labels(self) -> bool:
        return any(member.compares_labels for member in self.members)

    @classmethod
    def stack(cls, policies: Sequence[Self]) -> Self:
        return cls(tuple(type(column[0]).stack(column) for column in zip(*(p.members for p in policies), strict=True)))

    def threshold_at(self, exit_index: int) -> float | None:
        return self.members[0].threshold_at(exit_index)


@dataclass(frozen=True, slots=True, eq=False)
class AllOf(_Combination):
    """Leave when every member fires; the reason is the first member's."""

    kind: ClassVar[str] = "all_of"

    def __call__(self, seen: Seen) -> IntArray:
        reasons_MB = np.stack([member(seen) for member in self.members])
        return np.where((reasons_MB != Reason.CONTINUE).all(axis=0), reasons_MB[0], np.int8(Reason.CONTINUE))


@dataclass(frozen=True, slots=True, eq=False)
class AnyOf(_Combination):
    """Leave when a member fires; the reason is that of the first that does."""

    kind: ClassVar[str] = "any_of"

    def __call__(self, seen: Seen) -> IntArray:
        reasons_MB = np.stack([member(seen) for member in self.members])
        first_B = (reasons_MB != Reason.CONTINUE).argmax(axis=0)
        reasons_B: IntArray = reasons_MB[first_B, np.arange(reasons_MB.shape[1])]
        return reasons_B


def decide(policies: Sequence[Policy], seen: Seen) -> IntArray:
    """Apply each row's own policy.

    Args:
        policies: One single-row policy per row of `seen`. Rows that share the same object cost nothing extra.
        seen: What the rows have shown.

    Returns:
        int8, shape (B,): a `Reason` per row.
    """
    first = policies[0]
    if policies.count(first) == len(policies):
        return first(seen)
    reasons_B = np.zeros(len(policies), dtype=np.int8)
    rows_by_signature: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for row, policy in enumerate(policies):
        rows_by_signature[policy.signature].append(row)
    for rows in rows_by_signature.values():
        members = [policies[row] for row in rows]
        reasons_B[rows] = type(members[0]).stack(members)(_take(seen, rows))
    return reasons_B


def _take(seen: Seen, rows: list[int]) -> Seen:
    return Seen(seen.exit_index, Decision(seen.decision.packed_BD[rows]), seen.class_BK[rows])

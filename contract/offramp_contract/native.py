"""The network's own exit rules: where its `forward` returned early, as the exits' rules from score to "leave".

The stage graph computes an exit's native score. Where the network compared a number with a constant the score is that
number and the constant a knob; where it did anything else (`and`, counters, equality) the score is 1 where the network
leaves and 0 where it goes on.

Shapes: N = non-final exits.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from offramp_contract.errors import InvalidValue
from offramp_contract.parts import Name, Part
from offramp_contract.policy import Native

Precision = Literal["float16", "float32", "float64"]


class NativeRule(Part):
    """How the network itself leaves at an exit: where `score > threshold`, or one of `>=`, `<`, `<=`.

    Attributes:
        threshold: The network's own constant; 0.5 where it compares nothing with a constant.
        above: Whether high scores leave.
        is_strict: Whether a score equal to the threshold goes on.
        precision: In what the network compares: a constant beside a float32 tensor is rounded to float32.
        is_knob: Whether requests may set the threshold.
        sources: The lines of code that decide.
    """

    threshold: float = Field(allow_inf_nan=False)
    above: bool
    is_strict: bool
    precision: Precision
    is_knob: bool
    sources: tuple[str, ...]

    def __str__(self) -> str:
        if not self.is_knob:
            return "where the code says so"
        return f"where score {'>' if self.above else '<'}{'' if self.is_strict else '='} {self.threshold:g}"

    @property
    def sign(self) -> float:
        """1 if high scores leave, -1 if low ones do."""
        return 1.0 if self.above else -1.0

    def bar(self, threshold: float) -> float:
        """Give the least `sign * score`, a float32, that leaves at a threshold; NaN where none does."""
        with np.errstate(over="ignore"):
            meant = float(np.dtype(self.precision).type(threshold)) * self.sign
            nearest = np.float32(meant)
        is_short = float(nearest) < meant or (self.is_strict and float(nearest) == meant)
        if not is_short:
            return float(nearest)
        return math.nan if nearest == np.inf else float(np.nextafter(nearest, np.float32(np.inf)))


class Predicate(Part):
    """A question that the network's code asked of a tensor's value.

    Attributes:
        source: The line of code.
        comparison: What it compares, such as `score > 0.8`; None where it is no comparison with a constant.
        answers: Per exit what was answered on the way there: None where it was not asked, or either answer leads there.
        raises_on: The answer on which the network raises, if it does on one.
    """

    source: str
    comparison: str | None = None
    answers: dict[Name, bool | None] = Field(default_factory=dict)
    raises_on: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NativeRules:
    """The rules of a network's non-final exits; compared by identity, one object per manifest."""

    rules_N: tuple[NativeRule, ...]

    def without_exits(self, dropped: Collection[int]) -> "NativeRules | None":
        """Give the rules of the exits that stay; None where the final one is alone.

        Args:
            dropped: Which exits go, 0-based; the final exit cannot.
        """
        kept_N = tuple(rule for index, rule in enumerate(self.rules_N) if index not in dropped)
        return NativeRules(kept_N) if kept_N else None

    def policy(self, threshold: float | Sequence[float | None] | None) -> Native:
        """Make the policy.

        Args:
            threshold: One for every exit that has a knob, or one per non-final exit with None where the network's own
                holds; None keeps all of them.

        Raises:
            InvalidValue: If there is no knob where a threshold is given.
        """
        wanted_N = self._wanted(threshold)
        own_N = [rule.threshold for rule in self.rules_N]
        threshold_N = [own if wanted is None else wanted for own, wanted in zip(own_N, wanted_N, strict=True)]
        bar_N = [rule.bar(value) for rule, value in zip(self.rules_N, threshold_N, strict=True)]
        return Native(_row(threshold_N), _row([rule.sign for rule in self.rules_N]), _row(bar_N))

    def _wanted(self, threshold: float | Sequence[float | None] | None) -> list[float | None]:
        if threshold is None:
            return [None] * len(self.rules_N)
        if isinstance(threshold, int | float):
            if not any(rule.is_knob for rule in self.rules_N):
                raise InvalidValue(
                    "threshold: the exit rules of this model compare nothing with a constant; leave it out", "threshold"
                )
            return [threshold if rule.is_knob else None for rule in self.rules_N]
        if len(threshold) != len(self.rules_N):
            raise InvalidValue(
                f"threshold: a list holds one number per non-final exit, {len(self.rules_N)} for this model; "
                f"got {len(threshold)}",
                "threshold",
            )
        for index, (rule, value) in enumerate(zip(self.rules_N, threshold, strict=True)):
            if value is not None and not rule.is_knob:
                raise InvalidValue(
                    f"threshold.{index}: this exit's rule compares nothing with a constant; write null there",
                    f"threshold.{index}",
                )
        return list(threshold)


def _row(values_N: Sequence[float]) -> np.ndarray:
    """Give the parameters of one row. Broadcast, they are read-only: compiled policies are shared."""
    return np.broadcast_to(np.asarray(values_N, dtype=np.float64), (1, len(values_N)))

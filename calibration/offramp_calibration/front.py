"""Settings of policies with what came of them, and the best of them.

Shapes: E = exits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
from offramp_contract.calibration import Certificate
from offramp_contract.policy_spec import PolicySpec

from offramp_calibration.about import GateThreshold
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.replay import replay


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting that may become an operating point.

    Attributes:
        family: How it was found; the first part of its name.
        compute: Average share of the full path's FLOPs.
        accuracy: Share of right answers.
        exit_rates_E: Share of samples that left at each exit.
        gate_threshold: What opens the gates; None: the network's own, or it has none.
    """

    family: str
    policy: PolicySpec
    compute: float
    accuracy: float
    exit_rates_E: tuple[float, ...]
    gate_threshold: GateThreshold = None
    certificates: tuple[Certificate, ...] = ()

    @classmethod
    def measure(cls, family: str, policy: PolicySpec, outcomes: Outcomes, gate_threshold: GateThreshold = None) -> Self:
        """Replay a policy.

        Args:
            family: How it was found.
            policy: The rule.
            outcomes: What the exits decided.
            gate_threshold: What opened the gates for them.
        """
        replayed = replay(policy, outcomes)
        exit_rates_E = tuple(replayed.exit_rates_E.tolist())
        return cls(family, policy, replayed.compute, replayed.accuracy, exit_rates_E, gate_threshold)


class Costed(Protocol):
    """What a front is made of."""

    @property
    def compute(self) -> float:
        """What it costs."""

    @property
    def accuracy(self) -> float:
        """What it gets."""


Setting = TypeVar("Setting", bound=Costed)


def pareto_front(settings: Iterable[Setting]) -> list[Setting]:
    """Keep those that no other beats: none is as cheap and more accurate, or as accurate and cheaper.

    Returns:
        The cheapest first; of equal ones the first given.
    """
    front: list[Setting] = []
    for setting in sorted(settings, key=lambda one: (one.compute, -one.accuracy)):
        if not front or setting.accuracy > front[-1].accuracy:
            front.append(setting)
    return front


def thin(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """Keep at most so many, spread evenly over their compute; the cheapest and the dearest stay.

    Args:
        candidates: The cheapest first.
        most: At least 2.
    """
    if len(candidates) <= most:
        return list(candidates)
    computes = np.array([candidate.compute for candidate in candidates])
    wanted = np.linspace(computes[0], computes[-1], most)
    kept = np.unique(np.searchsorted(computes, wanted))
    return [candidates[index] for index in kept]


def telling(walk: Sequence[Candidate]) -> list[Candidate]:
    """Keep of a certified walk what anyone may want.

    Of neighbours with the same certificates the earlier, which costs more, is kept only if it is more accurate than all
    that follow.
    """
    on_front = pareto_front(walk)
    return [
        candidate
        for candidate, following in zip(walk, [*walk[1:], None], strict=True)
        if following is None or candidate.certificates != following.certificates or candidate in on_front
    ]

"""What a policy would have done, without running the network again.

The rule from score to "leave" is the contract's own code, the one that serves: `replay` shows it, exit by exit, what
the samples have shown so far.

Shapes: N = samples, E = exits.
"""

from dataclasses import dataclass

import numpy as np
from offramp_contract.policy import Policy, Reason, Seen
from offramp_contract.policy_spec import PolicySpec, compile_policy
from offramp_contract.statistics import BoolArray, FloatArray, IntArray

from offramp_calibration.outcomes import Outcomes


@dataclass(frozen=True, slots=True)
class Replayed:
    """Where every sample left, and what that comes to.

    Attributes:
        outcomes: What was replayed.
        exit_N: The exit that answered each sample.
        reason_N: A `Reason` each, int8; `FINAL` where the policy never fired.
    """

    outcomes: Outcomes
    exit_N: IntArray
    reason_N: IntArray

    @property
    def class_N(self) -> IntArray:
        """The answer that each sample got."""
        return np.take_along_axis(self.outcomes.class_NE, self.exit_N[:, None], axis=1)[:, 0]

    @property
    def right_N(self) -> BoolArray:
        """Whether it was right."""
        return np.asarray(self.class_N == self.outcomes.label_N)

    @property
    def differs_N(self) -> BoolArray:
        """Whether it differs from what full depth would have answered."""
        return np.asarray(self.class_N != self.outcomes.full_N)

    @property
    def lost_N(self) -> BoolArray:
        """Whether it was wrong where full depth would have been right."""
        return np.asarray((self.outcomes.full_N == self.outcomes.label_N) & ~self.right_N)

    @property
    def depth_N(self) -> FloatArray:
        """Share of the full path's FLOPs that each sample ran."""
        if self.outcomes.depth_NE is None:
            return np.asarray(self.outcomes.depth_E[self.exit_N])
        return np.take_along_axis(self.outcomes.depth_NE, self.exit_N[:, None], axis=1)[:, 0]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right_N.mean())

    @property
    def compute(self) -> float:
        """Average share of the full path's FLOPs."""
        return float(self.depth_N.mean())

    @property
    def exit_rates_E(self) -> FloatArray:
        """Share of samples that left at each exit."""
        counts_E = np.bincount(self.exit_N, minlength=self.outcomes.num_exits)
        return np.asarray(counts_E / len(self.outcomes))


def replay(policy: Policy | PolicySpec, outcomes: Outcomes) -> Replayed:
    """Let every sample leave where a policy first fires, and at the final exit otherwise.

    Args:
        policy: The rule; a spec is compiled for the network's number of exits.
        outcomes: What the exits decided.

    Raises:
        InvalidValue: If the spec does not fit the number of exits, or asks for rules that the network does not have.
    """
    if not isinstance(policy, Policy):
        policy = compile_policy(policy, outcomes.num_exits, outcomes.native)
    final = outcomes.num_exits - 1
    exit_N = np.full(len(outcomes), final)
    reason_N = np.full(len(outcomes), Reason.FINAL, dtype=np.int8)
    for exit_index in reversed(range(final)):
        fired_N = policy(Seen(exit_index, outcomes.decision_E[exit_index], outcomes.class_NE[:, : exit_index + 1]))
        leaves_N = fired_N != Reason.CONTINUE
        exit_N[leaves_N] = exit_index
        reason_N[leaves_N] = fired_N[leaves_N]
    return Replayed(outcomes, exit_N, reason_N)

"""What each row does next: leave, with the reason, or go on. Never sees a queue or a tensor's place.

The policy decides on the exit's statistics; around it stand the request's caps and the deadline. A deadline that cuts
is a *forced* exit, a policy that fires a *voluntary* one; they are never mixed in one number.

Shapes: B = rows of the dispatch, D = width of a decision, K = exits seen so far.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from offramp_contract.policy import Policy, Reason, Seen, decide
from offramp_contract.statistics import Decision, FloatArray


class Routed(Protocol):
    """What the router must know of a row."""

    policy: Policy
    min_exit: int
    max_exit: int
    deadline_s: float
    classes: list[int]
    """Predicted class at each exit so far, this one included."""


def route(
    exit_index: int, num_exits: int, decision_BD: FloatArray, rows: Sequence[Routed], reachable_by_s: float
) -> list[Reason]:
    """Decide what the rows that stand at an exit do next.

    The policy wins over the caps and both over the deadline, so that an exit which was voluntary is never counted as
    forced. `min_exit` holds back the policy, not the deadline. At the final exit everyone leaves.

    Args:
        exit_index: The exit.
        num_exits: Number of exits of the network.
        decision_BD: The exit's packed statistics, one row per entry of `rows`, none of them NaN.
        rows: The rows.
        reachable_by_s: When the next exit's answer could be with the client, on the engine's clock.

    Returns:
        A reason per row; `CONTINUE` for those that go on.
    """
    if exit_index == num_exits - 1:
        return [Reason.FINAL] * len(rows)
    class_BK = np.array([row.classes for row in rows], dtype=np.int32)
    fired_B = decide([row.policy for row in rows], Seen(exit_index, Decision(decision_BD), class_BK))
    reasons = (Reason(fired) for fired in fired_B)
    return [_settle(row, exit_index, fired, reachable_by_s) for row, fired in zip(rows, reasons, strict=True)]


def _settle(row: Routed, exit_index: int, fired: Reason, reachable_by_s: float) -> Reason:
    if fired is not Reason.CONTINUE and exit_index >= row.min_exit:
        return fired
    if exit_index >= row.max_exit:
        return Reason.DEPTH_CAP
    if reachable_by_s > row.deadline_s:
        return Reason.DEADLINE
    return Reason.CONTINUE

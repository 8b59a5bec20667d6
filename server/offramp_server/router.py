"""What each row does next: leave, with the reason, or go on, and whereto. Never sees a queue or a tensor's place.

The policy decides on the exit's statistics; around it stand the request's caps and the deadline. A deadline that cuts
is a *forced* exit, a policy that fires a *voluntary* one; they are never mixed in one number. Whereto a row goes is up
to its gates, and again to its deadline: what it has no time for is shut.

Shapes: B = rows of the dispatch, D = width of a decision, K = exits seen so far.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
from offramp_contract.policy import Policy, Reason, Seen, decide
from offramp_contract.statistics import Decision, FloatArray, IntArray

from offramp_server.gating import Gating, Hop, RowGates

REASONS: Final = tuple(Reason)


class Routed(Protocol):
    """What the router must know of a row."""

    policy: Policy
    min_exit: int
    max_exit: int
    deadline_s: float
    classes: list[int]
    """Predicted class at each exit so far, this one included, if the policy compares them."""


class Parted(Protocol):
    """What the router must know of a row before stages that it may do without."""

    deadline_s: float
    gates: RowGates


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
    seen = Seen(exit_index, Decision(decision_BD), _labels(exit_index, rows))
    fired_B = decide([row.policy for row in rows], seen).tolist()
    return [_settle(row, exit_index, REASONS[fired], reachable_by_s) for row, fired in zip(rows, fired_B, strict=True)]


def _labels(exit_index: int, rows: Sequence[Routed]) -> IntArray:
    """Put the classes of rows that compare them together; others get any, and if none compares them there are none."""
    comparing = [place for place, row in enumerate(rows) if row.policy.compares_labels]
    class_BK = np.zeros((len(rows), exit_index + 1 if comparing else 0), dtype=np.int32)
    for place in comparing:
        class_BK[place] = rows[place].classes
    return class_BK


def _settle(row: Routed, exit_index: int, fired: Reason, reachable_by_s: float) -> Reason:
    if fired is not Reason.CONTINUE and exit_index >= row.min_exit:
        return fired
    if exit_index >= row.max_exit:
        return Reason.DEPTH_CAP
    if reachable_by_s > row.deadline_s:
        return Reason.DEADLINE
    return Reason.CONTINUE


def part(
    gating: Gating, stage: int, rows: Sequence[Parted], reachable_by_s: Callable[[int, int], float]
) -> dict[int, list[int]]:
    """Part rows by the stage they run next, and write down what that decides over their gates.

    A row goes into a gated stage if its gates are open and it has the time for that stage and the trunk up to its next
    exit; if not, that gate is shut by force, and so is every later one.

    Args:
        gating: The network's stages and gates.
        stage: The stage the rows have run; `START` before the first.
        rows: The rows, of a network with gates.
        reachable_by_s: Given a stage and how many rows run it, says when they could have their next exit's answer at
            the client, every later gate shut.

    Returns:
        For each stage the places of the rows that run it next, in order.
    """
    parts: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        gates = row.gates
        following = gating.hurry(stage, gates) if gates.is_hurried else gating.following(stage, gates)
        parts.setdefault(following, []).append(place)
    for following in [following for following in parts if gating.is_gated_S[following]]:
        if all(rows[place].deadline_s == math.inf for place in parts[following]):
            continue
        by_s = reachable_by_s(following, len(parts[following]))
        late = [place for place in parts[following] if by_s > rows[place].deadline_s]
        parts[following] = [place for place in parts[following] if by_s <= rows[place].deadline_s]
        for place in late:
            parts.setdefault(gating.hurry(stage, rows[place].gates), []).append(place)
    for following, places in parts.items():
        hop = gating.hop(stage, following)
        for place in places:
            gating.decide(hop, rows[place].gates)
    return {following: sorted(places) for following, places in parts.items() if places}


def hurry(gating: Gating, stage: int, row: Parted) -> Hop:
    """Shut by force the gates that a row would go through behind a stage; gives the way to the trunk."""
    hop = gating.hop(stage, gating.hurry(stage, row.gates))
    gating.decide(hop, row.gates)
    return hop

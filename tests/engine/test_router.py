"""Who leaves, and why: the policy over the caps, both over the deadline."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from offramp_contract.policy import Policy, Reason
from offramp_contract.policy_spec import compile_policy, parse_policy
from offramp_contract.statistics import decision_of_logits
from offramp_server.router import route

NUM_EXITS = 4
LEAVES = compile_policy(parse_policy("confidence", 0.0), NUM_EXITS)
STAYS = compile_policy(parse_policy({"kind": "fixed", "exit": 3}), NUM_EXITS)
REACHABLE_BY_S = 50.0


@dataclass
class Row:
    policy: Policy = LEAVES
    min_exit: int = 0
    max_exit: int = NUM_EXITS - 1
    deadline_s: float = np.inf
    classes: list[int] = field(default_factory=lambda: [0])


def decisions(num_rows):
    return decision_of_logits(np.tile(np.array([3.0, 1.0, 0.0, 0.0], dtype=np.float32), (num_rows, 1)))


def reason_of(row, exit_index=1, reachable_by_s=REACHABLE_BY_S):
    row.classes = [0] * (exit_index + 1)
    (reason,) = route(exit_index, NUM_EXITS, decisions(1), [row], reachable_by_s)
    return reason


@pytest.mark.parametrize(
    ("fires", "min_exit", "max_exit", "deadline_s", "reason"),
    [
        # fires, floor, cap, deadline (the next exit is reachable by 50)
        (True, 0, 3, np.inf, Reason.CONFIDENT),
        (True, 1, 3, np.inf, Reason.CONFIDENT),
        (True, 2, 3, np.inf, Reason.CONTINUE),
        (True, 0, 1, np.inf, Reason.CONFIDENT),
        (True, 0, 3, 0.0, Reason.CONFIDENT),
        (True, 0, 1, 0.0, Reason.CONFIDENT),
        (True, 2, 3, 0.0, Reason.DEADLINE),
        (True, 2, 1, np.inf, Reason.DEPTH_CAP),
        (False, 0, 3, np.inf, Reason.CONTINUE),
        (False, 0, 3, 50.0, Reason.CONTINUE),
        (False, 0, 3, 49.999, Reason.DEADLINE),
        (False, 2, 3, 49.999, Reason.DEADLINE),
        (False, 0, 1, np.inf, Reason.DEPTH_CAP),
        (False, 0, 0, np.inf, Reason.DEPTH_CAP),
        (False, 0, 1, 0.0, Reason.DEPTH_CAP),
    ],
)  # fmt: skip
def test_the_policy_wins_over_the_caps_and_both_over_the_deadline(fires, min_exit, max_exit, deadline_s, reason):
    assert reason_of(Row(LEAVES if fires else STAYS, min_exit, max_exit, deadline_s)) is reason


@pytest.mark.parametrize("row", [Row(), Row(STAYS), Row(deadline_s=0.0), Row(min_exit=3), Row(max_exit=0)])
def test_at_the_final_exit_everyone_leaves_as_final(row):
    assert reason_of(row, NUM_EXITS - 1) is Reason.FINAL


def test_only_a_deadline_is_forced():
    assert [reason for reason in Reason if reason.is_forced] == [Reason.DEADLINE]


KINDS = ("confidence", "entropy", "margin", {"kind": "patience", "patience": 1}, {"kind": "fixed", "exit": 2})
policies = st.one_of(
    st.tuples(st.sampled_from(KINDS[:3]), st.floats(0.0, 1.0)),
    st.tuples(st.sampled_from(KINDS[3:]), st.none()),
)
rows = st.builds(
    lambda policy, min_exit, max_exit, deadline_s, classes: Row(
        compile_policy(parse_policy(*policy), NUM_EXITS), min_exit, max_exit, deadline_s, classes
    ),
    policies,
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.0, 50.0, 51.0, np.inf]),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
)


@given(st.lists(rows, min_size=1, max_size=8), st.integers(0, 3), st.data())
def test_a_batch_of_any_rows_is_routed_as_each_alone(batch, exit_index, data):
    logits_BC = np.array(
        data.draw(
            st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=len(batch), max_size=len(batch))
        )
    )
    decision_BD = decision_of_logits(logits_BC)
    for row in batch:
        row.classes = row.classes[: exit_index + 1]
    together = route(exit_index, NUM_EXITS, decision_BD, batch, REACHABLE_BY_S)
    alone = [
        route(exit_index, NUM_EXITS, decision_BD[i : i + 1], [row], REACHABLE_BY_S)[0] for i, row in enumerate(batch)
    ]
    assert together == alone

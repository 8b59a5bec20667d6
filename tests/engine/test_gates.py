"""Gates in the device's loop, as a simulation: each row runs the stages that its own gates open, and no other."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
from gated_bundles import (
    APART,
    CENTRAL,
    CHOICE,
    CLASSES,
    CROSSED,
    DEADLY,
    MINE,
    NESTED,
    ONE_EXIT,
    PRIORITIES,
    TWO,
    Block,
    gated_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.calibration import OperatingPoint
from offramp_contract.errors import Cancelled, DeadlineExceeded, NotFinite, StageFailed
from offramp_contract.gates import OPEN, SHUT
from offramp_contract.policy import Reason
from offramp_contract.policy_spec import FixedSpec
from offramp_server import profile
from offramp_server.admission import Admission
from offramp_server.engine_settings import EngineSettings
from offramp_server.messages import RowAnswer

BOTH, FIRST, SECOND, NONE = (0.9, 0.9), (0.9, 0.1), (0.1, 0.9), (0.1, 0.1)
"""Which of two gates a row's scores open."""
FAMILIES = {
    "two": TWO, "one exit": ONE_EXIT, "nested": NESTED, "crossed": CROSSED, "apart": APART, "central": CENTRAL,
    "choice": CHOICE,
}  # fmt: skip


@pytest.fixture(scope="session")
def nets(make_gated):
    return {
        name: make_gated(blocks, priorities=PRIORITIES if name == "choice" else ()) for name, blocks in FAMILIES.items()
    }


@pytest.fixture(scope="session")
def to_the_end(options):
    """Route rows to the final exit of a network."""

    def make(net, **given_):
        return options(num_exits=len(net.bundle.manifest.exits), **given_)

    return make


def decisions(result):
    return [row.gate_decisions for row in result.rows]


# --- the same answers as the runtime gives ---------------------------------------------------------------------------

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=3).map(tuple)
thresholds = st.lists(st.sampled_from([OPEN, SHUT, 0.0, 0.3, 0.5, 0.7, 1.0]), min_size=3, max_size=3)
asked = st.lists(
    st.tuples(st.lists(scores, min_size=1, max_size=4), thresholds, st.integers(0, 3)), min_size=1, max_size=5
)
paces = {"even": lambda stage, rows: 0.01, "by the row": lambda stage, rows: 0.01 * rows}


@pytest.mark.parametrize("name", FAMILIES)
@given(st.tuples(asked, st.sampled_from(sorted(paces)), st.integers(1, 8)))
@settings(max_examples=30, deadline=None)
def test_every_row_is_answered_as_the_runtime_answers_it(simulate, nets, to_the_end, name, drawn):
    (requests, pace, max_batch), net = drawn, nets[name]
    sim = simulate(max_batch=max_batch)
    served = sim.add(net, paces[pace])
    submissions = []
    for rows, threshold_any, num_steps in requests:
        x_BD, threshold_G = gated_rows(*rows), threshold_any[: len(net.bundle.manifest.gates)]
        given_ = to_the_end(net, gate_thresholds=tuple(threshold_G), explain=True, wants_logits=True)
        submissions.append((x_BD, threshold_G, sim.submit(served, x_BD, given_)))
        for _ in range(num_steps):
            sim.loop.step()
    sim.finish()
    for x_BD, threshold_G, submission in submissions:
        expected = net.run(x_BD, np.array(threshold_G))
        for i, row in enumerate(sim.inbox.result(submission).rows):
            assert row.stages == tuple(np.flatnonzero(expected.ran_BS[i]))
            assert [seen.logits_C.tolist() for seen in row.seen] == [logits[i].tolist() for logits, _ in expected.exits]
            assert [seen.score is None for seen in row.gates_seen] == [
                math.isnan(score) and gate.stage is not None
                for gate, score in zip(net.bundle.manifest.gates, expected.scores_BG[i], strict=True)
            ]
            assert row.depth == pytest.approx(served.depth_of(row.stages))
            assert row.reason is Reason.FINAL
        assert all(sample.carries == {} for sample in submission.samples)
    assert sim.settled[served] == sum(len(rows) for rows, *_ in requests)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stage_runs_over_as_many_rows_as_have_its_gates_open(simulate, nets, to_the_end, name):
    net = nets[name]
    sim = simulate(max_batch=4)
    served = sim.add(net)
    rng = np.random.default_rng(0)
    x_BD = gated_rows(*(tuple(row) for row in rng.uniform(size=(13, 3))))
    for part in np.array_split(x_BD, 5):
        sim.submit(served, part, to_the_end(net))
    sim.finish()
    ran_S = net.run(x_BD).ran_BS.sum(axis=0)
    assert [served.executor.rows_at(stage) for stage in range(len(ran_S))] == ran_S.tolist()


def test_a_body_that_fails_on_a_row_is_never_run_for_it_if_its_gate_is_shut(simulate, make_gated, to_the_end):
    net = make_gated((*ONE_EXIT[:3], Block(("h2",), "h3", gates=(1,), skip="h2", is_mined=True), ONE_EXIT[4]))
    sim = simulate()
    served = sim.add(net)
    deadly = gated_rows(FIRST, NONE)
    deadly[:, MINE] = DEADLY
    harmless = sim.submit(served, gated_rows(BOTH, SECOND), to_the_end(net))
    result = sim.answer(served, deadly, to_the_end(net))
    assert all(isinstance(row, RowAnswer) for row in (*result.rows, *sim.inbox.result(harmless).rows))
    deadly[0, CLASSES + 1] = 0.9
    failed, answered = sim.answer(served, deadly, to_the_end(net)).rows
    assert isinstance(failed, StageFailed), "the body runs, so the mine does not work"
    assert isinstance(answered, RowAnswer)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_rows_of_different_requests_with_the_same_decision_run_together(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["two"])
    for rows in ((FIRST, NONE), (NONE, FIRST), (FIRST,)):
        sim.submit(served, gated_rows(*rows), to_the_end(nets["two"]))
    sim.finish()
    assert served.executor.batches == [(0, 5), (1, 3), (2, 5), (4, 5)]


def test_rows_that_disagreed_are_together_again_in_the_next_trunk_stage(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["two"])
    sim.answer(served, gated_rows(BOTH, NONE, FIRST, SECOND), to_the_end(nets["two"]))
    assert served.executor.batches == [(0, 4), (1, 2), (2, 4), (3, 2), (4, 4)]


def test_rows_inside_a_body_come_together_before_its_end(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["nested"])
    sim.answer(served, gated_rows(BOTH, FIRST, NONE, BOTH), to_the_end(nets["nested"]))
    assert served.executor.batches == [(0, 4), (1, 3), (2, 2), (3, 3), (4, 4)]


def test_a_batch_that_gains_nothing_by_more_rows_does_not_wait_for_them(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["two"], lambda stage, rows: 0.01 * rows)
    sim.answer(served, gated_rows(BOTH, NONE), to_the_end(nets["two"]))
    assert all(rows == 1 for _, rows in served.executor.batches)


def test_rows_of_one_batch_have_thresholds_of_their_own(simulate, nets, to_the_end):
    net = nets["two"]
    sim = simulate()
    served = sim.add(net)
    cuts = [(0.5, 0.5), (0.3, 0.7), (SHUT, OPEN), (OPEN, SHUT)]
    submissions = [sim.submit(served, gated_rows((0.4, 0.6)), to_the_end(net, gate_thresholds=cut)) for cut in cuts]
    sim.finish()
    assert served.executor.batches[0] == (0, 4)
    stages = [sim.inbox.result(submission).rows[0].stages for submission in submissions]
    assert stages == [(0, 2, 3, 4), (0, 1, 2, 4), (0, 2, 3, 4), (0, 1, 2, 4)]


def test_a_gated_stage_gets_its_rows_padded_where_the_network_takes_no_batch_of_one(simulate, make_gated, to_the_end):
    net = make_gated(TWO, name="wide", min_batch=3)
    sim = simulate()
    served = sim.add(net)
    rows = sim.answer(served, gated_rows(BOTH, NONE), to_the_end(net, wants_logits=True)).rows
    assert served.executor.batches == [(0, 3), (1, 3), (2, 3), (3, 3), (4, 3)]
    assert [row.stages for row in rows] == [(0, 1, 2, 3, 4), (0, 2, 4)]
    expected = net.run(np.concatenate([gated_rows(BOTH, NONE), gated_rows(BOTH, NONE)]))
    assert [row.answer.logits_C.tolist() for row in rows] == expected.exits[-1][0][:2].tolist()


# --- what a row holds ------------------------------------------------------------------------------------------------


def held(samples):
    return [set(sample.carries) for sample in samples]


def test_a_row_that_skips_a_body_holds_one_tensor_under_the_bodys_name(simulate, nets, to_the_end):
    sim = simulate()
    samples = sim.submit(sim.add(nets["two"]), gated_rows(FIRST, NONE), to_the_end(nets["two"])).samples
    sim.loop.step()
    assert held(samples) == [{"x", "h0"}, {"x", "h1"}]
    assert [sample.next_stage for sample in samples] == [1, 2]
    sim.loop.step()
    assert held(samples) == [{"x", "h1"}, {"x", "h1"}]
    sim.loop.step()
    assert held(samples) == [{"x", "h3"}, {"x", "h3"}]


def test_what_only_stands_for_a_skipped_output_is_kept_until_it_is_known_and_no_longer(simulate, nets, to_the_end):
    """`h0` stands for `c` where the outer gate is shut; the inner body's `a` is read inside only."""
    sim = simulate()
    samples = sim.submit(sim.add(nets["nested"]), gated_rows(BOTH, FIRST, NONE), to_the_end(nets["nested"])).samples
    sim.loop.step()
    assert held(samples) == [{"h0"}, {"h0"}, {"c"}]
    sim.loop.step()
    assert held(samples) == [{"h0", "a"}, {"h0", "b"}, {"c"}]
    sim.loop.step()
    assert held(samples) == [{"h0", "b"}, {"h0", "b"}, {"c"}]
    sim.loop.step()
    assert held(samples) == [{"c"}] * 3


def test_what_stands_for_a_body_is_held_although_nobody_else_reads_it(simulate, nets, to_the_end):
    sim = simulate()
    samples = sim.submit(sim.add(nets["apart"]), gated_rows((0.9,), (0.1,)), to_the_end(nets["apart"])).samples
    for _ in range(2):
        sim.loop.step()
    assert held(samples) == [{"h0", "n"}] * 2
    sim.loop.step()
    assert held(samples) == [{"h0", "m"}, {"h1"}]
    sim.loop.step()
    assert held(samples) == [{"h1"}, {"h1"}]


def test_rows_that_part_from_most_of_a_batch_do_not_hold_the_others_tensors(simulate, nets, to_the_end):
    sim = simulate()
    rows = gated_rows(FIRST, NONE, NONE, NONE, NONE)
    samples = sim.submit(sim.add(nets["one exit"]), rows, to_the_end(nets["one exit"])).samples
    sim.loop.step()
    (tensor, place), *others = [sample.carries.get("h0") or sample.carries["h1"] for sample in samples]
    assert (len(tensor), place) == (1, 0)
    assert tensor.base is None
    assert [(len(other), place) for other, place in others] == [(5, 1), (5, 2), (5, 3), (5, 4)]


def test_rows_that_part_where_others_leave_hold_their_own_only(simulate, nets, options):
    sim = simulate()
    served = sim.add(nets["two"])
    leaving = sim.submit(served, gated_rows(NONE), options({"kind": "fixed", "exit": 0}, 2))
    staying = sim.submit(served, gated_rows(SECOND, SECOND, SECOND, NONE), options(num_exits=2))
    (left,) = leaving.samples
    sim.loop.step()
    sim.loop.step()
    assert left.carries == {}
    carries = [sample.carries.get("h2") or sample.carries["h3"] for sample in staying.samples]
    assert [(len(tensor), place) for tensor, place in carries] == [(3, 0), (3, 1), (3, 2), (1, 0)]


# --- depth and decisions ---------------------------------------------------------------------------------------------


def test_depth_is_the_share_of_flops_that_a_row_has_really_run(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["two"])
    result = sim.answer(served, gated_rows(BOTH, FIRST, SECOND, NONE), to_the_end(nets["two"]))
    assert [row.depth for row in result.rows] == pytest.approx([1.0, 5 / 9, 7 / 9, 3 / 9])
    assert sorted(departure.depth for departure in sim.log.departures) == sorted(row.depth for row in result.rows)


@pytest.mark.parametrize(
    ("name", "decided"),
    [
        ("two", {FIRST: ("open", "shut"), SECOND: ("shut", "open")}),
        ("nested", {BOTH: ("open", "open"), FIRST: ("open", "shut"), SECOND: ("shut", "shut")}),
        ("crossed", {BOTH: ("open", "open"), FIRST: ("open", "shut"), SECOND: ("shut", None)}),
        ("central", {(0.9, 0.1, 0.9): ("open", "shut", "open")}),
    ],
)
def test_the_answer_says_what_each_gate_decided(simulate, nets, to_the_end, name, decided):
    rows, expected = decided.keys(), list(decided.values())
    sim = simulate()
    result = sim.answer(sim.add(nets[name]), gated_rows(*rows), to_the_end(nets[name]))
    assert decisions(result) == expected
    assert sorted(departure.gate_decisions for departure in sim.log.departures) == sorted(expected)


def test_a_gate_behind_the_exit_that_a_row_left_at_has_decided_nothing(simulate, nets, options):
    sim = simulate()
    result = sim.answer(sim.add(nets["two"]), gated_rows(BOTH), options({"kind": "fixed", "exit": 0}, 2, explain=True))
    assert decisions(result) == [("open", None)]
    assert result.rows[0].gates_seen[1].decision is None
    assert result.rows[0].stages == (0, 1, 2)


def test_explain_gives_scores_and_thresholds(simulate, nets, to_the_end):
    sim = simulate()
    given_ = to_the_end(nets["nested"], explain=True, gate_thresholds=(0.6, SHUT))
    result = sim.answer(sim.add(nets["nested"]), gated_rows((0.75, 0.5), (0.5, 0.5)), given_)
    seen = [[(gate.score, gate.threshold, gate.decision) for gate in row.gates_seen] for row in result.rows]
    assert seen == [[(0.75, 0.6, "open"), (0.5, SHUT, "shut")], [(0.5, 0.6, "shut"), (None, SHUT, "shut")]]


def test_where_depth_is_the_callers_choice_the_priorities_decide_from_the_first_stage_on(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["choice"])
    stages = [
        sim.answer(served, gated_rows(()), to_the_end(nets["choice"], gate_thresholds=(cut,) * 3)).rows[0].stages
        for cut in (0.5, 0.6, 0.8, 1.0)
    ]
    assert stages == [(0, 1, 2, 3, 4), (0, 2, 3, 4), (0, 2, 4), (2, 4)]
    assert served.tally.num_executions == 4


def test_a_policy_and_gates_work_together(simulate, nets, options):
    net = nets["two"]
    sim = simulate()
    served = sim.add(net)
    given_ = options("confidence", 2, threshold=0.9, gate_thresholds=(0.5, 0.5))
    rows = sim.answer(served, gated_rows(BOTH, NONE, FIRST), given_).rows
    confidence_B = net.run(gated_rows(BOTH, NONE, FIRST)).exits[0][1][:, 3]
    assert [row.answer.exit_index for row in rows] == [int(confidence < 0.9) for confidence in confidence_B]
    assert {row.answer.exit_index for row in rows} == {0, 1}


# --- deadlines -------------------------------------------------------------------------------------------------------


def test_a_budget_that_runs_short_shuts_the_remaining_gates(simulate, nets, to_the_end):
    """Five stages of 10 ms and 45 ms: the first body fits, the second does not."""
    sim = simulate()
    served = sim.add(nets["one exit"])
    result = sim.answer(served, gated_rows(BOTH), to_the_end(nets["one exit"], explain=True), 0.045)
    (row,) = result.rows
    assert row.stages == (0, 1, 2, 4)
    assert row.gate_decisions == ("open", "forced")
    assert (row.reason, row.answer.exit_index, row.reason.is_forced) == (Reason.DEADLINE, 0, True)
    assert result.total_s <= 0.045
    assert row.gates_seen[1].score == pytest.approx(0.9)
    assert served.executor.rows_at(3) == 0
    assert [departure.reason for departure in sim.log.departures] == [Reason.DEADLINE]


def test_a_budget_that_suffices_shuts_nothing(simulate, nets, to_the_end):
    sim = simulate()
    (row,) = sim.answer(sim.add(nets["one exit"]), gated_rows(BOTH), to_the_end(nets["one exit"]), 0.06).rows
    assert (row.gate_decisions, row.reason) == (("open", "open"), Reason.FINAL)


def test_a_gate_that_was_shut_by_itself_is_not_called_forced(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["one exit"])
    rows = sim.answer(served, gated_rows(NONE, BOTH, FIRST), to_the_end(nets["one exit"]), 0.035).rows
    assert [row.gate_decisions for row in rows] == [("shut", "shut"), ("forced", "forced"), ("forced", "shut")]
    assert [row.reason for row in rows] == [Reason.FINAL, Reason.DEADLINE, Reason.DEADLINE]
    assert [served.executor.rows_at(stage) for stage in range(5)] == [3, 0, 3, 0, 3]


def test_a_gate_once_shut_by_force_is_followed_by_none_that_opens(simulate, make_gated, to_the_end):
    """The first body takes long and the second no time: there would be time for it, but gates stay shut."""
    net = make_gated(ONE_EXIT, name="uneven")
    sim = simulate()
    served = sim.add(net, lambda stage, rows: (0.01, 0.05, 0.01, 0.001, 0.01)[stage])
    (row,) = sim.answer(served, gated_rows(BOTH), to_the_end(net), 0.05).rows
    assert row.gate_decisions == ("forced", "forced")


def test_only_what_the_trunk_up_to_the_next_exit_takes_counts_before_a_body(simulate, nets, to_the_end):
    """30 ms and a little: the first body and the trunk to exit 0 fit, exit 1 does not."""
    sim = simulate()
    (row,) = sim.answer(sim.add(nets["two"]), gated_rows(BOTH), to_the_end(nets["two"]), 0.034).rows
    assert row.stages == (0, 1, 2)
    assert (row.reason, row.gate_decisions) == (Reason.DEADLINE, ("open", None))


def test_a_row_goes_on_to_the_next_exit_if_the_trunk_alone_can_reach_it(simulate, nets, to_the_end):
    sim = simulate()
    (row,) = sim.answer(sim.add(nets["two"]), gated_rows(BOTH), to_the_end(nets["two"]), 0.045).rows
    assert row.stages == (0, 1, 2, 4)
    assert (row.reason, row.answer.exit_index, row.gate_decisions) == (Reason.DEADLINE, 1, ("open", "forced"))


def test_a_row_whose_time_runs_out_before_a_body_goes_on_without_it(simulate, nets, to_the_end):
    """At the boundary there was time for the body; then the device was taken away."""
    sim = simulate()
    served = sim.add(nets["one exit"])
    submission = sim.submit(served, gated_rows(BOTH), to_the_end(nets["one exit"]), 0.055)
    sim.loop.step()
    assert submission.samples[0].next_stage == 1
    sim.clock.now += 0.015
    sim.finish()
    result = sim.inbox.result(submission)
    assert result.rows[0].stages == (0, 2, 4)
    assert result.rows[0].gate_decisions == ("forced", "forced")
    assert result.total_s <= 0.055
    assert result.queue_s == pytest.approx(0.015)


def test_a_row_that_would_rather_be_refused_is_refused_once_even_the_trunk_is_late(simulate, nets, to_the_end):
    sim = simulate()
    served = sim.add(nets["one exit"])
    given_ = to_the_end(nets["one exit"], on_miss="reject")
    submission = sim.submit(served, gated_rows(BOTH), given_, 0.055)
    sim.loop.step()
    sim.clock.now += 0.03
    sim.finish()
    assert [row.code for row in sim.inbox.result(submission).rows] == ["deadline_exceeded"]
    assert served.executor.batches == [(0, 1)]


def test_a_row_that_is_late_whatever_happens_runs_the_trunk_and_is_answered(simulate, nets, to_the_end):
    sim = simulate()
    (row,) = sim.answer(sim.add(nets["one exit"]), gated_rows(BOTH), to_the_end(nets["one exit"]), 0.001).rows
    assert (row.stages, row.reason) == ((0, 2, 4), Reason.DEADLINE)


def test_where_depth_is_the_callers_choice_a_short_budget_shuts_gates_before_the_first_stage(
    simulate, nets, to_the_end
):
    sim = simulate()
    (row,) = sim.answer(sim.add(nets["choice"]), gated_rows(()), to_the_end(nets["choice"]), 0.021).rows
    assert (row.stages, row.reason) == ((2, 4), Reason.DEADLINE)
    assert row.gate_decisions == ("forced", "forced", "forced")


def test_a_body_half_run_is_left_where_its_rest_has_no_time(simulate, nets, to_the_end):
    """Inside the outer body the inner one no longer fits: what stands for the outer one's result is its input."""
    net = nets["nested"]
    sim = simulate()
    (row,) = sim.answer(sim.add(net), gated_rows(BOTH), to_the_end(net, wants_logits=True), 0.035).rows
    assert row.stages == (0, 1, 4)
    assert row.gate_decisions == ("forced", "forced")
    shut = net.run(gated_rows(BOTH), np.array([SHUT, SHUT]))
    assert row.answer.logits_C.tolist() == shut.exits[-1][0][0].tolist()


LONG = (
    Block(("x",), "t0", scores=(0,)),
    Block(("t0",), "b0", gates=(0,), skip="t0", flops=1000),
    Block(("b0",), "t1"),
    Block(("t1",), "t2", scores=(1,)),
    Block(("t2",), "b1", gates=(1,), skip="t2", flops=1000),
    Block(("b1",), "t3"),
    Block(("t3",), "t4", scores=(2,)),
    Block(("t4",), "b2", gates=(2,), skip="t4", flops=1000),
    Block(("b2",), "t5"),
    Block(("t5",), "t6"),
    Block(("t6",), "t7", has_exit=True),
)
"""A trunk of eight stages with one exit, at its end, and all that can be left out in three bodies."""


def pace_of(net):
    """Seconds of a stage: some for the dispatch, then for each row by its FLOPs; 37 ms for a full path alone."""
    flops = [stage.flops for stage in net.bundle.manifest.stages]
    return lambda stage, rows: 1e-3 + 1e-5 * flops[stage] * rows * 0.7


def attainment(sim, net, options, load, budget_s):
    """Serve rows that come evenly, with every gate open, at a multiple of what full paths in batches of eight allow."""
    pace = pace_of(net)
    served = sim.add(net, pace)
    full_s = sum(pace(stage, 8) for stage in range(len(served.manifest.stages))) / 8
    due = [sim.clock.now + number * full_s / load for number in range(400)]
    submissions, coming = [], iter([*due, math.inf])
    following = next(coming)
    while following < math.inf or sim.loop.has_work:
        if not sim.loop.has_work:
            sim.clock.now = max(sim.clock.now, following)
        while following <= sim.clock.now:
            submissions.append((following, sim.submit(served, gated_rows((0.9, 0.9, 0.9)), options, budget_s)))
            following = next(coming)
        sim.loop.step()
    assert all(len(sim.inbox.result(submission).rows) == 1 for _, submission in submissions)
    late = [sim.inbox.result(one).total_s > budget_s for _, one in submissions]
    return 1 - sum(late) / len(late)


def test_under_overload_bodies_are_given_up_early_enough_for_the_trunk(simulate, make_gated, to_the_end, monkeypatch):
    net = make_gated(LONG)

    def attained(load):
        return attainment(simulate(max_batch=8), net, to_the_end(net), load, budget_s=0.4)

    assert attained(1.5) > 0.95
    monkeypatch.setattr(profile, "DISPATCHES_AHEAD", 0)
    assert attained(1.5) < 0.75


def test_one_rows_deadline_does_not_shut_anothers_gate(simulate, nets, to_the_end):
    net = nets["one exit"]
    sim = simulate()
    served = sim.add(net)
    hurried, patient = (sim.submit(served, gated_rows(BOTH), to_the_end(net), budget) for budget in (0.035, None))
    sim.finish()
    assert sim.inbox.result(hurried).rows[0].stages == (0, 2, 4)
    assert sim.inbox.result(hurried).total_s <= 0.035
    assert sim.inbox.result(patient).rows[0].stages == (0, 1, 2, 3, 4)


budgets = st.one_of(st.none(), st.floats(0.001, 0.2))


@pytest.mark.parametrize("name", FAMILIES)
@given(st.lists(st.tuples(st.lists(scores, min_size=1, max_size=3), budgets, st.floats(0, 0.03)), max_size=6))
@settings(max_examples=30, deadline=None)
def test_under_any_deadlines_every_row_gets_one_answer_that_adds_up(simulate, nets, to_the_end, name, drawn):
    net = nets[name]
    gates_S = [stage.gates for stage in net.bundle.manifest.stages]
    sim = simulate(max_batch=4)
    served = sim.add(net)
    submissions = []
    for rows, budget_s, pause_s in drawn:
        submissions.append(sim.submit(served, gated_rows(*rows), to_the_end(net), budget_s))
        sim.loop.step()
        sim.clock.now += pause_s
    sim.finish()
    for submission in submissions:
        for row in sim.inbox.result(submission).rows:
            was_forced = "forced" in row.gate_decisions
            assert row.reason is (Reason.DEADLINE if was_forced else row.reason)
            assert row.reason in (Reason.DEADLINE, Reason.FINAL)
            assert submission.deadline_s < math.inf or row.reason is Reason.FINAL
            assert all(stage in row.stages or gates for stage, gates in enumerate(gates_S[: row.stages[-1]]))
            assert all(row.gate_decisions[gate] != "shut" for stage in row.stages for gate in gates_S[stage])
    assert len(sim.log.departures) == sum(len(rows) for rows, *_ in drawn)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [math.nan, math.inf])
@pytest.mark.parametrize("gate", [0, 1, 2])
def test_a_score_that_is_no_number_is_its_rows_answer(simulate, nets, to_the_end, gate, score):
    net = nets["central"]
    x_BD = gated_rows((0.9, 0.1, 0.9), (0.1, 0.1, 0.1), (0.1, 0.9, 0.9))
    x_BD[1, CLASSES + gate] = score
    sim = simulate()
    served = sim.add(net)
    rows = sim.answer(served, x_BD, to_the_end(net)).rows
    assert isinstance(rows[1], NotFinite)
    assert "row 1" in rows[1].message
    assert f"gate_{gate}" in rows[1].message
    assert [row.stages for row in (rows[0], rows[2])] == [(0, 1, 3, 4, 5, 6), (0, 2, 3, 4, 6)]
    assert sim.log.failures == {"not_finite": 1}


def test_a_row_that_leaves_where_its_gate_scores_no_number_keeps_its_answer(simulate, nets, options):
    x_BD = gated_rows(BOTH)
    x_BD[0, CLASSES + 1] = math.nan
    sim = simulate()
    served = sim.add(nets["two"])
    (row,) = sim.answer(served, x_BD, options({"kind": "fixed", "exit": 0}, 2)).rows
    assert row.answer.exit_index == 0
    assert isinstance(sim.answer(served, x_BD, options(num_exits=2)).rows[0], NotFinite)


def test_a_body_that_raises_answers_the_rows_in_it_and_the_others_go_on(simulate, nets, to_the_end):
    net = nets["one exit"]
    sim = simulate()
    served = sim.add(net)

    def fail(stage, feeds):
        if stage == 1:
            raise RuntimeError("a secret of the machine")

    served.executor.before = fail
    rows = sim.answer(served, gated_rows(BOTH, NONE, SECOND, FIRST), to_the_end(net)).rows
    assert [isinstance(row, StageFailed) for row in rows] == [True, False, False, True]
    assert "stage_1" in rows[0].message
    assert "secret" not in rows[0].message
    assert sim.settled[served] == 4


def test_a_client_that_goes_away_frees_its_rows_before_a_body(simulate, nets, to_the_end):
    net = nets["one exit"]
    sim = simulate()
    served = sim.add(net)
    gone, stays = (sim.submit(served, gated_rows(BOTH, NONE), to_the_end(net)) for _ in range(2))
    sim.loop.step()
    gone.cancel()
    sim.finish()
    assert all(isinstance(row, Cancelled) for row in sim.inbox.result(gone).rows)
    assert [row.stages for row in sim.inbox.result(stays).rows] == [(0, 1, 2, 3, 4), (0, 2, 4)]
    assert [served.executor.rows_at(stage) for stage in range(5)] == [4, 1, 2, 1, 2]


def test_rows_in_every_queue_are_answered_when_a_model_goes(simulate, nets, to_the_end):
    net = nets["one exit"]
    sim = simulate()
    served = sim.add(net)
    submission = sim.submit(served, gated_rows(BOTH, NONE), to_the_end(net))
    sim.loop.step()
    sim.loop.remove_model(served, Cancelled("the model goes"))
    assert all(isinstance(row, Cancelled) for row in sim.inbox.result(submission).rows)
    assert not sim.loop.has_work


# --- expectations ----------------------------------------------------------------------------------------------------


def test_the_open_rate_of_a_body_follows_the_rows(simulate, nets, to_the_end):
    net = nets["one exit"]
    sim = simulate()
    served = sim.add(net)
    assert served.profile.open_rate(1) == 1.0
    for _ in range(100):
        sim.answer(served, gated_rows(FIRST, NONE, NONE, NONE), to_the_end(net))
    assert served.profile.open_rate(1) == pytest.approx(0.25, abs=0.05)
    assert served.profile.open_rate(3) == pytest.approx(0.0, abs=0.01)
    assert served.profile.open_rate(2) == 1.0


def test_gates_that_a_deadline_shut_do_not_lower_the_open_rate(simulate, nets, to_the_end):
    net = nets["one exit"]
    sim = simulate()
    served = sim.add(net)
    for _ in range(20):
        sim.answer(served, gated_rows(BOTH), to_the_end(net), 0.03)
    assert served.profile.open_rate(1) == 1.0


def test_an_operating_point_is_expected_to_run_as_much_of_a_body_as_rows_do(simulate, nets, to_the_end):
    net = nets["one exit"]
    sim = simulate()
    served = sim.add(net)
    point = OperatingPoint(name="p", policy=FixedSpec(exit=0), compute=1.0, accuracy=1.0, exit_rates=(1.0,))
    assert served.expected_s(point) == pytest.approx(0.05)
    for _ in range(300):
        sim.answer(served, gated_rows(FIRST), to_the_end(net))
    assert served.expected_s(point) == pytest.approx(0.04, abs=0.001)


@pytest.mark.parametrize(("remaining_s", "is_refused"), [(0.005, True), (0.015, False)])
def test_admission_reckons_with_the_trunk_only(simulate, nets, to_the_end, remaining_s, is_refused):
    """The first exit is one trunk stage of 10 ms away, with two bodies before it."""
    served = simulate().add(nets["choice"])
    admission = Admission(EngineSettings(margin_ms=0.0))
    asked = to_the_end(nets["choice"], on_miss="reject")
    with pytest.raises(DeadlineExceeded) if is_refused else nullcontext():
        admission.admit(served, 1, asked, remaining_s, now=0.0)


def test_warm_up_profiles_gated_stages_too(open_engine, nets):
    engine = open_engine(nets["nested"])
    assert all(stage.measured for stage in engine.models[0].profile.stages)


def test_the_engine_serves_gates_in_process(open_engine, nets):
    engine = open_engine(nets["nested"])
    x_BD = gated_rows(BOTH, FIRST, NONE)
    assert [row.stages for row in engine.classify(x_BD).rows] == [(0, 1, 2, 3, 4), (0, 1, 3, 4), (0, 4)]
    assert [row.stages for row in engine.classify(x_BD, gates="shut").rows] == [(0, 4)] * 3
    assert [row.stages for row in engine.classify(x_BD, gate_threshold=[0.0, 0.95]).rows] == [(0, 1, 3, 4)] * 3

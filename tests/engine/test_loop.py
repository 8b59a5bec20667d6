"""The device's loop as a simulation: real stages over scripted time, without a thread."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_contract.errors import Cancelled, DeadlineExceeded, NotFinite, NotReady, StageFailed
from offramp_contract.policy import Reason
from offramp_contract.statistics import decision_of_logits, log_softmax
from offramp_server.admission import Lot
from offramp_server.messages import Progress, Result, RowAnswer
from offramp_server.rules import Rules
from offramp_server.submission import Submission

SURE = (9.0, 0.0, 0.0, 0.0)
"""p_max is above 0.999 at the first exit."""
UNSURE = (0.2, 0.0, 0.0, 0.0)
"""p_max is 0.29, 0.71 and 1.0 at the exits of the chain."""
FLAT = (0.0, 0.0, 0.0, 0.0)
"""p_max is 0.25 at every exit."""


def confident(options, threshold=0.9, **given_):
    return options("confidence", threshold=threshold, **given_)


def test_a_row_leaves_at_the_first_exit_where_its_policy_fires(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    result = sim.answer(served, [SURE, UNSURE, FLAT], confident(options, 0.7))
    assert [row.answer.exit_index for row in result.rows] == [0, 1, 2]
    assert [row.reason for row in result.rows] == [Reason.CONFIDENT, Reason.CONFIDENT, Reason.FINAL]
    assert [row.stages for row in result.rows] == [(0,), (0, 1), (0, 1, 2)]
    assert [row.depth for row in result.rows] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_a_stage_behind_a_rows_exit_does_not_run_for_it(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    sim.answer(served, [SURE, SURE, SURE, UNSURE, FLAT], confident(options, 0.7))
    assert [served.executor.rows_at(stage) for stage in range(3)] == [5, 2, 1]
    sim.answer(served, [SURE, SURE], confident(options, 0.7))
    assert [served.executor.rows_at(stage) for stage in range(3)] == [7, 2, 1]


def test_the_answer_is_the_exits(simulate, chain, options):
    sim = simulate()
    x = np.array([[1.0, 3.0, -2.0, 0.5]], dtype=np.float32)
    (row,) = sim.answer(sim.add(chain), x, options({"kind": "fixed", "exit": 1}, wants_logits=True)).rows
    expected = decision_of_logits(10 * x)[0]
    assert row.answer.top_class_K.tolist() == [1, 0, 3, 2]
    assert row.answer.top_probability_K == pytest.approx(expected[3:7], abs=1e-6)
    assert (row.answer.log_odds, row.answer.entropy, row.answer.margin) == pytest.approx(tuple(expected[:3]), abs=1e-4)
    assert row.answer.logits_C == pytest.approx(10 * x[0])


@pytest.mark.parametrize(
    ("policy", "score"),
    [(("confidence", 0.25), 0.29), (("entropy", 0.999), 0.9953), (("margin", 0.05), 0.0524)],
)
def test_the_answer_says_the_score_and_the_cut_off_that_made_it_leave(simulate, chain, options, policy, score):
    sim = simulate()
    (row,) = sim.answer(sim.add(chain), [UNSURE], options(policy[0], threshold=policy[1])).rows
    assert (row.answer.exit_index, row.threshold) == (0, policy[1])
    assert row.score == pytest.approx(score, abs=2e-3)


# --- deadlines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_s", "exit_index"), [(0.012, 0), (0.018, 0), (0.025, 1), (0.029, 1)])
def test_a_budget_below_full_depth_ends_at_the_last_exit_in_time(simulate, chain, options, budget_s, exit_index):
    sim = simulate()
    served = sim.add(chain)
    result = sim.answer(served, [FLAT], options(), budget_s)
    (row,) = result.rows
    assert (row.answer.exit_index, row.reason) == (exit_index, Reason.DEADLINE)
    assert result.total_s <= budget_s
    assert served.executor.rows_at(exit_index + 1) == 0
    assert sim.log.done[0].slack_s >= 0.0


def test_a_budget_that_suffices_changes_nothing(simulate, chain, options):
    sim = simulate()
    (row,) = sim.answer(sim.add(chain), [FLAT], options(), 0.04).rows
    assert (row.answer.exit_index, row.reason) == (2, Reason.FINAL)


def test_the_margin_is_kept_free_for_handing_the_answer_over(simulate, chain, options):
    sim = simulate(margin_s=0.01)
    (row,) = sim.answer(sim.add(chain), [FLAT], options(), 0.04).rows
    assert (row.answer.exit_index, row.reason) == (1, Reason.DEADLINE)


def test_an_exit_that_was_voluntary_is_not_counted_as_forced(simulate, chain, options):
    sim = simulate()
    result = sim.answer(sim.add(chain), [SURE, FLAT], confident(options), 0.012)
    assert [row.reason for row in result.rows] == [Reason.CONFIDENT, Reason.DEADLINE]
    assert sorted(departure.reason.label for departure in sim.log.departures) == ["confident", "deadline"]


def test_a_deadline_that_passes_while_a_row_waits_is_answered_from_the_exit_in_hand(simulate, chain, options):
    """At the first exit there was time for the second; another model's dispatch then took it away."""
    sim = simulate(fair_share_s=10.0)
    served = sim.add(chain)
    submission = sim.submit(served, [FLAT], options(), 0.03)
    sim.loop.step()
    sim.clock.now += 0.012
    sim.finish()
    (row,) = sim.inbox.result(submission).rows
    assert (row.answer.exit_index, row.reason) == (0, Reason.DEADLINE)
    assert served.executor.rows_at(1) == 0


def test_one_rows_deadline_does_not_cut_another_in_the_same_batch(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    hurried, patient = sim.submit(served, [FLAT], options(), 0.012), sim.submit(served, [FLAT], options(), None)
    sim.finish()
    assert sim.inbox.result(hurried).rows[0].answer.exit_index == 0
    assert sim.inbox.result(patient).rows[0].answer.exit_index == 2
    assert served.executor.batches[0] == (0, 2)


def test_a_row_that_cannot_reach_its_first_exit_in_time_is_answered_late(simulate, chain, options):
    sim = simulate()
    result = sim.answer(sim.add(chain), [FLAT], options(), 0.001)
    assert (result.rows[0].answer.exit_index, result.rows[0].reason) == (0, Reason.DEADLINE)
    assert sim.log.done[0].outcome == "ok"
    assert sim.log.done[0].slack_s == pytest.approx(-0.009)


def test_a_row_that_would_rather_be_refused_is_refused_without_running(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    result = sim.answer(served, [FLAT, SURE], options(on_miss="reject"), 0.001)
    assert [type(row) for row in result.rows] == [DeadlineExceeded] * 2
    assert served.executor.batches == []
    assert sim.log.done[0].outcome == "deadline"


def test_a_row_that_would_rather_be_refused_still_gets_the_answer_it_has(simulate, chain, options):
    sim = simulate()
    (row,) = sim.answer(sim.add(chain), [FLAT], options(on_miss="reject"), 0.012).rows
    assert (row.answer.exit_index, row.reason) == (0, Reason.DEADLINE)


def test_a_budget_is_kept_beside_a_model_whose_batches_are_long(simulate, chain, late, options):
    """No dispatch is longer than the tightest slack in play: the long batch waits, or is cut to what fits."""
    sim = simulate(fair_share_s=10.0)
    quick = sim.add(chain, lambda stage, rows: 0.002)
    slow = sim.add(late, lambda stage, rows: 0.02 + 0.02 * rows)
    rows = {name: np.zeros((8, 4), dtype=np.float32) for name in ("x", "y")}
    sim.submit(slow, rows, options(num_exits=3))
    hurried = sim.submit(quick, [FLAT], options(), 0.01)
    sim.finish()
    result = sim.inbox.result(hurried)
    assert result.total_s <= 0.01
    assert result.rows[0].reason is Reason.FINAL


# --- batches -------------------------------------------------------------------------------------------------------


def test_survivors_of_different_batches_run_together(simulate, chain, options):
    sim = simulate(fair_share_s=10.0)
    served = sim.add(chain, lambda stage, rows: (0.01, 0.01, 0.01)[stage])
    sim.submit(served, [UNSURE, SURE], confident(options, 0.95))
    sim.loop.step()
    sim.submit(served, [FLAT, SURE, SURE, SURE, SURE, SURE, SURE, SURE], confident(options, 0.95))
    sim.finish()
    assert served.executor.batches[:3] == [(0, 2), (0, 8), (1, 2)]


POLICIES = [
    ("confidence", 0.7),
    ("confidence", (0.99, 0.3)),
    ("entropy", 0.5),
    ("margin", 0.6),
    ("agreement", 1.0),
    ({"kind": "patience", "patience": 1}, None),
    ({"kind": "window", "low": 0.3, "high": 0.9}, None),
    ({"kind": "fixed", "exit": 1}, None),
    ({"kind": "all_of", "of": [{"kind": "margin", "threshold": 0.2}, {"kind": "patience", "patience": 2}]}, None),
    ({"kind": "any_of", "of": [{"kind": "entropy", "threshold": 0.1}, {"kind": "fixed", "exit": 1}]}, None),
]
values = st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4)
requests = st.lists(
    st.tuples(
        st.lists(st.tuples(values, values), min_size=1, max_size=3),
        st.sampled_from(POLICIES),
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from(["last", "mean", "geometric"]),
    ),
    min_size=2,
    max_size=5,
)


def told(row):
    """Give what a client could compare: everything but the last bits."""
    answer = row.answer
    return answer.exit_index, row.reason, row.stages, row.depth, row.threshold, len(row.seen)


@settings(max_examples=40, deadline=None)
@given(requests)
def test_requests_that_run_in_one_batch_are_answered_as_each_alone(simulate, late, options, drawn):
    def ask(sim, served, one):
        pairs, policy, min_exit, max_exit, combine = one
        x, y = (np.array(column, dtype=np.float32) for column in zip(*pairs, strict=True))
        limits = {"min_exit": min(min_exit, max_exit), "max_exit": max_exit, "combine": combine, "explain": True}
        return sim.submit(served, {"x": x, "y": y}, options(policy[0], threshold=policy[1], **limits))

    together = simulate(max_batch=16)
    served = together.add(late)
    submissions = [ask(together, served, one) for one in drawn]
    together.finish()
    assert served.executor.batches[0] == (0, sum(len(pairs) for pairs, *_ in drawn))
    for one, submission in zip(drawn, submissions, strict=True):
        alone = simulate(max_batch=1)
        lone_served = alone.add(late)
        lone = ask(alone, lone_served, one)
        alone.finish()
        for row, same in zip(together.inbox.result(submission).rows, alone.inbox.result(lone).rows, strict=True):
            assert told(row) == told(same)
            assert row.answer.top_probability_K == pytest.approx(same.answer.top_probability_K, abs=1e-5)
            assert row.score == pytest.approx(same.score, abs=1e-5)


def test_what_a_late_stage_reads_again_is_each_rows_own(simulate, late, options):
    """`y` waits from the request to stage 2; `x` and the first carry are read again by the last stage."""
    sim = simulate()
    served = sim.add(late)
    rng = np.random.default_rng(0)
    asked = []
    for num_rows in (3, 1, 4):
        inputs = {name: rng.standard_normal((num_rows, 4)).astype(np.float32) for name in ("x", "y")}
        asked.append((inputs, sim.submit(served, inputs, confident(options, 0.8, explain=True, wants_logits=True))))
        sim.loop.step()
    sim.finish()
    exits = set()
    for inputs, submission in asked:
        expected = late.decisions(inputs)
        logits = late.logits(inputs)
        for i, row in enumerate(sim.inbox.result(submission).rows):
            exits.add(row.answer.exit_index)
            assert len(row.seen) == row.answer.exit_index + 1
            for seen in row.seen:
                assert seen.logits_C == pytest.approx(logits[seen.exit_index][i], abs=1e-4)
                assert seen.top_probability_K == pytest.approx(expected[seen.exit_index][i][3:7], abs=1e-5)
    assert len(exits) > 1


def test_survivors_keep_what_later_stages_read_and_nothing_else(simulate, late, options):
    sim = simulate()
    served = sim.add(late)
    x = np.array([SURE, FLAT, SURE, FLAT], dtype=np.float32)
    submission = sim.submit(served, {"x": x, "y": np.zeros_like(x)}, confident(options))
    left, staying = submission.samples[::2], submission.samples[1::2]
    sim.loop.step()
    assert all(sample.carries == {} for sample in left)
    assert all(set(sample.carries) == {"x", "y", "h0"} for sample in staying)
    sim.loop.step()
    assert all(set(sample.carries) == {"x", "y", "h0", "h1"} for sample in staying)
    sim.loop.step()
    assert all(set(sample.carries) == {"x", "h0", "h2"} for sample in staying)
    sim.finish()
    assert all(sample.carries == {} for sample in submission.samples)


def test_carries_of_rows_that_left_are_not_held_by_those_that_stay(simulate, chain, options):
    sim = simulate()
    submission = sim.submit(sim.add(chain), [SURE, FLAT, SURE, SURE], confident(options))
    sim.loop.step()
    tensor, place = submission.samples[1].carries["h0"]
    assert (len(tensor), place) == (1, 0)
    assert tensor.base is None


def test_a_model_that_takes_no_batch_of_one_gets_its_rows_padded(simulate, make_net, options):
    sim = simulate()
    served = sim.add(make_net(name="wide", min_batch=3))
    first, second = sim.submit(served, [SURE], confident(options)), sim.submit(served, [FLAT], confident(options))
    sim.finish()
    assert served.executor.batches == [(0, 3), (1, 3), (2, 3)]
    assert [sim.inbox.result(one).rows[0].answer.exit_index for one in (first, second)] == [0, 2]
    assert [run.batch_size for run in sim.log.runs] == [2, 1, 1]


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "exit_name"), [((np.nan, 0, 0, 0), "exit_0"), ((1e38, 0, 0, 0), "exit_1")])
def test_a_row_without_a_finite_answer_is_named_and_the_others_go_on(simulate, chain, options, bad, exit_name):
    sim = simulate()
    served = sim.add(chain)
    other = sim.submit(served, [FLAT], options())
    mixed = sim.submit(served, [SURE, bad, FLAT], options())
    sim.finish()
    rows = sim.inbox.result(mixed).rows
    assert isinstance(rows[1], NotFinite)
    assert exit_name in rows[1].message
    assert "row 1" in rows[1].message
    assert [row.answer.exit_index for row in (rows[0], rows[2], *sim.inbox.result(other).rows)] == [2, 2, 2]
    assert {done.outcome for done in sim.log.done} == {"ok", "invalid"}
    assert sim.log.failures == {"not_finite": 1}
    assert served.executor.rows_at(2) == 3


def test_a_stage_that_raises_answers_its_own_rows_and_the_rest_go_on(simulate, chain, options):
    sim = simulate(max_batch=2)
    served = sim.add(chain)

    def fail_on_the_marked(stage, feeds):
        if stage == 1 and (feeds["h0"] == 7.0).any():
            raise RuntimeError("a secret of the machine")

    served.executor.before = fail_on_the_marked
    failing = sim.submit(served, [FLAT, (7.0, 7.0, 7.0, 7.0), SURE], confident(options))
    going = sim.submit(served, [FLAT, FLAT], confident(options))
    sim.finish()
    rows = sim.inbox.result(failing).rows
    assert isinstance(rows[1], StageFailed)
    assert "stage_1" in rows[1].message
    assert "secret" not in rows[1].message
    assert isinstance(rows[2], RowAnswer)
    assert all(isinstance(row, RowAnswer) for row in sim.inbox.result(going).rows)
    assert sim.settled[served] == 5
    assert sim.answer(served, [FLAT], confident(options)).rows[0].reason is Reason.FINAL


@pytest.mark.parametrize("operation", ["gather", "take", "download"])
def test_device_work_that_raises_between_stages_is_its_own_rows_answer_too(simulate, chain, options, operation):
    sim = simulate()
    served = sim.add(chain)
    real = served.executor.device

    class Failing(type(real)):
        def __init__(self):
            self.__dict__.update(real.__dict__)
            setattr(self, operation, self._fail)

        def _fail(self, *_):
            raise MemoryError("out of device memory")

    served.executor.device = Failing()
    failing = [sim.submit(served, [row], confident(options, wants_logits=True)) for row in (SURE, FLAT, FLAT)]
    sim.finish()
    for submission in failing[1:]:
        (row,) = sim.inbox.result(submission).rows
        assert isinstance(row, StageFailed)
    served.executor.device = real
    assert isinstance(sim.answer(served, [FLAT], confident(options)).rows[0], RowAnswer)


def test_a_model_whose_stage_always_raises_pays_for_the_time_it_takes(simulate, make_net, options):
    sim = simulate(max_batch=1)
    bad, good = sim.add(make_net(name="bad")), sim.add(make_net(name="good"))

    def fail(stage, feeds):
        raise RuntimeError("broken")

    bad.executor.before = fail
    for served in (bad, good):
        sim.submit(served, [FLAT] * 60, options())
    for _ in range(60):
        sim.loop.step()
    assert abs(len(bad.executor.batches) - len(good.executor.batches)) <= 12


# --- cancellation --------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_work_at_the_next_boundary(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    gone, other = sim.submit(served, [FLAT, FLAT], options()), sim.submit(served, [FLAT], options())
    sim.loop.step()
    gone.cancel()
    sim.finish()
    assert [type(row) for row in sim.inbox.result(gone).rows] == [Cancelled] * 2
    assert [served.executor.rows_at(stage) for stage in range(3)] == [3, 1, 1]
    assert sim.inbox.result(other).rows[0].reason is Reason.FINAL
    assert sorted(done.outcome for done in sim.log.done) == ["cancelled", "ok"]


def test_rows_that_had_left_keep_their_answer_when_the_rest_is_cancelled(simulate, chain, options):
    sim = simulate()
    submission = sim.submit(sim.add(chain), [SURE, FLAT], confident(options))
    sim.loop.step()
    submission.cancel()
    sim.finish()
    rows = sim.inbox.result(submission).rows
    assert isinstance(rows[0], RowAnswer)
    assert isinstance(rows[1], Cancelled)


def test_a_client_that_leaves_before_its_rows_wait_anywhere_frees_them_too(simulate, chain, options):
    """Its signal is taken while the request is still on its way to the device's thread."""
    sim = simulate()
    served = sim.add(chain)
    x = np.zeros((1, 4), dtype=np.float32)
    early = Submission(
        served, {"x": x}, options(), listener=sim.inbox, arrival_s=0.0, budget_ms=None, cancel_signal=sim.cancel_signal
    )
    early.lot = Lot(served, None, 0)
    early.cancel()
    sim.loop.step()
    sim.loop.enqueue(early, sim.clock.now)
    sim.finish()
    assert isinstance(sim.inbox.result(early).rows[0], Cancelled)
    assert served.executor.batches == []


def test_cancelling_what_is_answered_changes_nothing(simulate, chain, options):
    sim = simulate()
    submission = sim.submit(sim.add(chain), [FLAT], options())
    sim.finish()
    submission.cancel()
    sim.loop.step()
    assert sim.inbox.result(submission).rows[0].reason is Reason.FINAL


# --- answers that combine exits, and news on the way -----------------------------------------------------------------


def combined(late, inputs, exit_index, how):
    """Combine the exits up to one in numpy."""
    pairs = zip(late.logits(inputs), late.bundle.calibration.temperatures, strict=True)
    log_p = np.stack([log_softmax(logits[0] / temperature) for logits, temperature in pairs])[: exit_index + 1]
    p = np.exp(log_p).mean(axis=0) if how == "mean" else np.exp(log_p.mean(axis=0))
    return p / p.sum()


@pytest.mark.parametrize("how", ["mean", "geometric"])
@pytest.mark.parametrize("budget_s", [None, 0.035])
def test_a_combined_answer_uses_every_exit_seen(simulate, late, options, how, budget_s):
    inputs = {"x": np.array([[0.5, 0.1, -0.3, 0.2]], np.float32), "y": np.array([[-0.9, 1.1, 0.4, 0.0]], np.float32)}
    sim = simulate()
    (row,) = sim.answer(sim.add(late), inputs, options(combine=how), budget_s).rows
    assert row.answer.exit_index == (2 if budget_s is None else 1)
    assert row.reason is (Reason.FINAL if budget_s is None else Reason.DEADLINE)
    expected = combined(late, inputs, row.answer.exit_index, how)
    order = np.argsort(-expected)
    assert row.answer.top_class_K.tolist() == order.tolist()
    assert row.answer.top_probability_K == pytest.approx(expected[order], abs=1e-5)
    assert row.seen == ()


@pytest.mark.parametrize("how", ["mean", "geometric"])
def test_the_decision_looks_at_the_exits_own_statistics_whatever_the_answer_combines(simulate, late, options, how):
    rng = np.random.default_rng(1)
    inputs = {name: rng.standard_normal((8, 4)).astype(np.float32) for name in ("x", "y")}
    sim = simulate()
    served = sim.add(late)
    plain = sim.answer(served, inputs, confident(options, 0.7))
    mixed = sim.answer(served, inputs, confident(options, 0.7, combine=how))
    assert [told(row)[:5] for row in plain.rows] == [told(row)[:5] for row in mixed.rows]
    assert [row.score for row in plain.rows] == pytest.approx([row.score for row in mixed.rows])


def test_explain_keeps_what_every_exit_said(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    row = sim.answer(served, [UNSURE], options(explain=True)).rows[0]
    assert [seen.exit_index for seen in row.seen] == [0, 1, 2]
    assert [seen.top_probability_K[0] for seen in row.seen] == pytest.approx([0.289, 0.711, 1.0], abs=1e-3)
    assert sim.answer(served, [UNSURE], options()).rows[0].seen == ()


def test_progress_is_told_at_every_exit_passed_and_only_to_who_asked(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    asked = sim.submit(served, [SURE, UNSURE, FLAT], confident(options, 0.7, wants_progress=True))
    quiet = sim.submit(served, [FLAT], confident(options))
    sim.finish()
    *progress, result = sim.inbox.events[asked]
    assert [(news.row, news.answer.exit_index) for news in progress] == [(1, 0), (2, 0), (2, 1)]
    assert all(isinstance(news, Progress) for news in progress)
    assert isinstance(result, Result)
    assert len(sim.inbox.events[quiet]) == 1


def test_a_listener_is_told_once_per_round(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    for _ in range(5):
        sim.submit(served, [SURE], confident(options))
    sim.finish()
    assert sim.inbox.deliveries == 1


# --- accounts --------------------------------------------------------------------------------------------------------


def test_waiting_and_running_add_up_to_the_time_it_took(simulate, chain, options):
    sim = simulate(max_batch=1)
    served = sim.add(chain)
    submissions = [sim.submit(served, [FLAT], options()) for _ in range(3)]
    sim.finish()
    for submission in submissions:
        result = sim.inbox.result(submission)
        assert result.compute_s == pytest.approx(0.03)
        assert result.queue_s + result.compute_s == pytest.approx(result.total_s)
    assert sim.inbox.result(submissions[-1]).queue_s > 0.0


def test_a_row_has_waited_since_it_was_admitted(simulate, chain, options):
    """It stood in no queue while the device was busy with the dispatch before."""
    sim = simulate()
    served = sim.add(chain)
    submission = Submission(
        served,
        {"x": np.zeros((1, 4), dtype=np.float32)},
        options(),
        listener=sim.inbox,
        arrival_s=sim.clock.now,
        budget_ms=None,
        cancel_signal=sim.cancel_signal,
    )
    submission.lot = Lot(served, None, 0)
    admitted_s = sim.clock.now
    sim.clock.now += 0.5
    sim.loop.enqueue(submission, admitted_s)
    sim.finish()
    assert sim.inbox.result(submission).queue_s == pytest.approx(0.5)
    assert sim.log.runs[0].queue_seconds == pytest.approx((0.5,))


def test_every_answered_row_is_told_to_the_observer_and_given_back_to_admission(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)
    sim.submit(served, [SURE, FLAT, (np.nan, 0, 0, 0)], confident(options))
    sim.finish()
    assert sim.settled == {served: 3}
    assert [(d.exit_name, d.reason.label) for d in sim.log.departures] == [("exit_0", "confident"), ("exit_2", "final")]
    assert [run.stage for run in sim.log.runs] == ["stage_0", "stage_1", "stage_2"]
    assert [run.batch_size for run in sim.log.runs] == [3, 1, 1]
    assert len(sim.log.done) == 1


def test_a_listener_that_raises_costs_nobody_else_an_answer(simulate, chain, options):
    sim = simulate()
    served = sim.add(chain)

    class Broken:
        def deliver(self, events):
            raise RuntimeError("the event loop is gone")

    good = sim.inbox
    sim.inbox = Broken()
    sim.submit(served, [SURE], confident(options))
    sim.inbox = good
    submission = sim.submit(served, [SURE], confident(options))
    sim.finish()
    assert isinstance(good.result(submission).rows[0], RowAnswer)
    assert sim.settled[served] == 2


def test_abandoning_answers_everyone_who_is_owed_an_answer_and_nobody_twice(simulate, chain, late, options):
    sim = simulate()
    served, other = sim.add(chain), sim.add(late)
    done = sim.submit(served, [SURE], confident(options))
    half = sim.submit(served, [SURE, FLAT], confident(options))
    sim.loop.step()
    waiting = sim.submit(other, {"x": np.zeros((2, 4), np.float32), "y": np.zeros((2, 4), np.float32)}, options())
    sim.loop.abandon(NotReady("the engine is closed"))
    assert isinstance(sim.inbox.result(done).rows[0], RowAnswer)
    assert [type(row) for row in sim.inbox.result(half).rows] == [RowAnswer, NotReady]
    assert [type(row) for row in sim.inbox.result(waiting).rows] == [NotReady] * 2
    assert sim.settled == {served: 3, other: 2}


def test_removing_a_model_answers_its_rows_and_leaves_the_others(simulate, chain, make_net, options):
    sim = simulate()
    served, other = sim.add(chain), sim.add(make_net(name="other"))
    gone, going = sim.submit(served, [FLAT], options()), sim.submit(other, [FLAT], options())
    sim.loop.step()
    sim.loop.remove_model(served, NotReady("model 'chain' was unloaded"))
    sim.finish()
    assert isinstance(sim.inbox.result(gone).rows[0], NotReady)
    assert sim.inbox.result(going).rows[0].reason is Reason.FINAL


# --- whatever happens ----------------------------------------------------------------------------------------------

BAD_INPUT = [np.nan, np.inf, 1e38, 7.0]
any_rows = st.lists(st.one_of(values, st.sampled_from(BAD_INPUT).map(lambda v: [v] * 4)), min_size=1, max_size=4)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            any_rows,
            st.sampled_from(POLICIES),
            st.sampled_from([None, 0.0, 0.005, 0.02, 0.05, 0.3]),
            st.sampled_from(["answer", "reject"]),
            st.sampled_from(["last", "mean"]),
        ),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("pass"), st.floats(0.0, 0.05)),
        st.tuples(st.just("remove")),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(operations, st.booleans())
def test_every_request_gets_exactly_one_result_whatever_happens(simulate, chain, options, drawn, abandoned):
    sim = simulate(max_batch=3)
    served = sim.add(chain, lambda stage, rows: 0.004 + 0.002 * rows)

    def fail_on_the_marked(stage, feeds):
        if stage == 1 and (feeds["h0"] == 7.0).any():
            raise RuntimeError("broken")

    served.executor.before = fail_on_the_marked
    asked = []
    for name, *args in drawn:
        if name == "submit":
            rows, (policy, threshold), budget_s, on_miss, combine = args
            given_ = {"on_miss": on_miss, "combine": combine, "wants_progress": True}
            asked.append(sim.submit(served, rows, options(policy, threshold=threshold, **given_), budget_s))
        elif name == "step":
            for _ in range(args[0]):
                sim.loop.step()
        elif name == "cancel" and asked:
            asked[args[0] % len(asked)].cancel()
        elif name == "pass":
            sim.clock.now += args[0]
        elif name == "remove":
            sim.loop.remove_model(served, NotReady("unloaded"))
            sim.loop.add_model(served)
    if abandoned:
        sim.loop.abandon(NotReady("closed"))
    else:
        sim.finish()
        assert not sim.loop.has_work
    for submission in asked:
        result = sim.inbox.result(submission)
        assert len(result.rows) == submission.num_rows
        assert submission.unanswered == []
    assert sim.settled[served] == sum(submission.num_rows for submission in asked)
    assert len(sim.log.done) == len(asked)


def test_without_forced_exits_a_row_runs_to_where_its_policy_lets_it_leave_however_late(simulate, chain, options):
    reasons = []
    for forced_exits in (True, False):
        simulation = simulate(rules=Rules(forced_exits=forced_exits))
        served = simulation.add(chain, lambda stage, rows: 0.1)
        (row,) = simulation.answer(served, FLAT, options(), budget_s=0.15).rows
        reasons.append((row.reason, row.answer.exit_index))
    assert reasons == [(Reason.DEADLINE, 0), (Reason.FINAL, 2)]


def test_a_row_whose_answer_would_be_late_behind_a_stage_that_cannot_wait_leaves_with_it_before(
    simulate, chain, options
):
    simulation = simulate()
    served = simulation.add(chain, lambda stage, rows: 0.5 if stage == 0 else 0.1)
    in_hand = simulation.submit(served, FLAT, options(), budget_s=0.8)
    simulation.loop.step()
    simulation.submit(served, FLAT, options(), budget_s=0.6)
    left_at = simulation.clock.now
    simulation.loop.step()
    (row,) = simulation.inbox.result(in_hand).rows
    assert (row.reason, row.answer.exit_index) == (Reason.DEADLINE, 0)
    assert simulation.clock.now == left_at + 0.5
    assert simulation.inbox.result(in_hand).total_s < 0.8

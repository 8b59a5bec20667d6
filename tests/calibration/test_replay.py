"""Replay is what the contract's rules say, sample by sample, and what the engine does."""

import functools
import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offramp_calibration.labelled import Arrays
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.record import record
from offramp_calibration.replay import replay
from offramp_calibration.trace import About, Trace
from offramp_calibration.write import write_calibration
from offramp_contract.calibration import Calibration
from offramp_contract.errors import InvalidValue
from offramp_contract.policy import Reason, Seen
from offramp_contract.policy_spec import KINDS, compile_policy, parse_policy
from offramp_contract.statistics import Decision, logit
from offramp_runtime import StageExecutor, open_bundle, open_device, run_all_exits
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings

NEAR = 1e-5
TEMPERATURES = (0.7, 1.3, 0.9, 1.1)

shares = st.floats(0.0, 1.0)


def policies(num_exits):
    """Draw specs of every kind for a network of so many exits."""
    thresholds = shares | st.lists(shares, min_size=num_exits - 1, max_size=num_exits - 1).map(tuple)
    if num_exits == 1:
        thresholds = shares
    plain = st.one_of(
        *(
            st.fixed_dictionaries({"kind": st.just(kind), "threshold": thresholds})
            for kind in ("confidence", "entropy", "margin", "agreement")
        ),
        st.fixed_dictionaries({"kind": st.just("patience"), "patience": st.integers(1, 4)}),
        st.tuples(shares, shares).map(lambda pair: {"kind": "window", "low": min(pair), "high": max(pair)}),
        st.fixed_dictionaries({"kind": st.just("fixed"), "exit": st.integers(0, num_exits - 1)}),
    )
    members = st.lists(plain, min_size=1, max_size=3)
    combined = st.fixed_dictionaries({"kind": st.sampled_from(["all_of", "any_of"]), "of": members})
    return (plain | combined).map(parse_policy)


@st.composite
def replays(draw):
    """Draw outcomes, with ties and certainties among them, and a policy."""
    num_exits, num_samples = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.5, 3.0, 200.0]))
    logits = np.round(rng.normal(size=(num_exits, num_samples, 4)) * scale, 1).astype(np.float32)
    make = functools.partial(outcomes_of, rng.integers(4, size=num_samples))
    return make(logits), draw(policies(num_exits))


def outcomes_of(labels, logits):
    depths = tuple(((np.arange(len(logits)) + 1) / len(logits)).tolist())
    return Outcomes.of(Trace(About("m", "0" * 64, "0" * 64, depths), labels, tuple(logits)))


def one_by_one(spec, outcomes):
    """Walk every sample through the exits alone."""
    policy, left = compile_policy(spec, outcomes.num_exits), []
    for row in range(len(outcomes)):
        for index in range(outcomes.num_exits - 1):
            decision = Decision(outcomes.decision_E[index].packed_BD[row : row + 1])
            (reason,) = policy(Seen(index, decision, outcomes.class_NE[row : row + 1, : index + 1]))
            if reason != Reason.CONTINUE:
                left.append((index, int(reason)))
                break
        else:
            left.append((outcomes.num_exits - 1, int(Reason.FINAL)))
    return left


@settings(deadline=None, max_examples=300)
@given(replays())
def test_replay_is_the_contracts_rule_applied_to_each_sample_alone(drawn):
    outcomes, spec = drawn
    replayed = replay(spec, outcomes)
    assert list(zip(replayed.exit_N.tolist(), replayed.reason_N.tolist(), strict=True)) == one_by_one(spec, outcomes)


@settings(deadline=None, max_examples=100)
@given(replays(), st.data())
def test_the_replay_of_some_samples_is_that_part_of_the_replay_of_all(drawn, data):
    outcomes, spec = drawn
    rows = np.array(data.draw(st.lists(st.integers(0, len(outcomes) - 1), min_size=1, max_size=20)))
    np.testing.assert_array_equal(replay(spec, outcomes.take(rows)).exit_N, replay(spec, outcomes).exit_N[rows])


@settings(deadline=None, max_examples=100)
@given(replays())
def test_accuracy_compute_and_rates_are_those_of_the_exits_taken(drawn):
    outcomes, spec = drawn
    replayed = replay(spec, outcomes)
    exits = replayed.exit_N.tolist()
    answers = [int(outcomes.class_NE[row, index]) for row, index in enumerate(exits)]
    assert replayed.class_N.tolist() == answers
    assert replayed.accuracy == pytest.approx(np.mean(np.array(answers) == outcomes.label_N))
    assert replayed.compute == pytest.approx(np.mean([outcomes.depth_E[index] for index in exits]))
    assert replayed.exit_rates_E.sum() == pytest.approx(1.0)
    assert replayed.differs_N.tolist() == [a != b for a, b in zip(answers, outcomes.class_NE[:, -1], strict=True)]


def test_a_rule_that_never_fires_is_full_depth(outcomes):
    replayed = replay(parse_policy("entropy", 0.0), outcomes.take(np.flatnonzero(~is_certain(outcomes))))
    assert (replayed.exit_N == outcomes.num_exits - 1).all()
    assert (replayed.reason_N == Reason.FINAL).all()
    assert replayed.compute == 1.0
    assert not replayed.differs_N.any()


def is_certain(outcomes):
    return np.stack([decision.entropy_B <= 0 for decision in outcomes.decision_E]).any(axis=0)


def test_a_threshold_of_nothing_is_the_first_exit(outcomes):
    for kind in ("confidence", "margin"):
        replayed = replay(parse_policy(kind, 0.0), outcomes)
        assert (replayed.exit_N == 0).all()
        assert replayed.compute == pytest.approx(outcomes.depth_E[0])


def test_a_fixed_exit_is_everyones(outcomes):
    for index in range(outcomes.num_exits):
        assert (replay(parse_policy({"kind": "fixed", "exit": index}), outcomes).exit_N == index).all()


@pytest.mark.parametrize(("kind", "rises"), [("confidence", True), ("margin", True), ("entropy", False)])
def test_no_sample_leaves_earlier_at_a_stricter_threshold(outcomes, kind, rises):
    settings_ = np.linspace(0, 1, 21) if rises else np.linspace(1, 0, 21)
    exits = [replay(parse_policy(kind, float(threshold)), outcomes).exit_N for threshold in settings_]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(exits))


def test_a_policy_for_another_number_of_exits_is_refused(outcomes):
    with pytest.raises(InvalidValue, match="one number per non-final exit"):
        replay(parse_policy("confidence", (0.5, 0.5)), outcomes)


# The engine, on a real bundle with temperatures.

POLICIES = [
    *({"kind": "confidence", "threshold": threshold} for threshold in (0.3, 0.6, 0.9, 0.999, 0.999999)),
    {"kind": "confidence", "threshold": (0.95, 0.6, 0.8)},
    *({"kind": "entropy", "threshold": threshold} for threshold in (0.01, 0.2, 0.5)),
    *({"kind": "margin", "threshold": threshold} for threshold in (0.1, 0.5, 0.99)),
    *({"kind": "patience", "patience": patience} for patience in (1, 2, 3)),
    *({"kind": "agreement", "threshold": threshold} for threshold in (0.6, 1.0)),
    {"kind": "window", "low": 0.35, "high": 0.9},
    *({"kind": "fixed", "exit": index} for index in range(4)),
    {"kind": "all_of", "of": [{"kind": "patience", "patience": 1}, {"kind": "confidence", "threshold": 0.6}]},
    {"kind": "any_of", "of": [{"kind": "patience", "patience": 2}, {"kind": "entropy", "threshold": 0.1}]},
]


NATIVE = [
    {"kind": "native"},
    {"kind": "native", "threshold": 0.55},
    {"kind": "native", "threshold": (0.9, None, None)},
    {"kind": "all_of", "of": [{"kind": "native"}, {"kind": "confidence", "threshold": 0.8}]},
    {"kind": "any_of", "of": [{"kind": "native", "threshold": 0.9}, {"kind": "entropy", "threshold": 0.2}]},
]


@pytest.fixture(scope="module")
def served(exported, tmp_path_factory):
    """The bundle with temperatures, its inputs, and what replay makes of its trace."""
    return recorded(exported, tmp_path_factory)


@pytest.fixture(scope="module")
def served_native(returning, tmp_path_factory):
    """The same of a network that leaves by rules of its own."""
    return recorded(returning, tmp_path_factory)


def recorded(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "copy"
    shutil.copytree(exported, folder)
    bundle = open_bundle(folder)
    write_calibration(Calibration(model_digest=bundle.manifest.model_digest, temperatures=TEMPERATURES), folder)
    bundle = open_bundle(folder)
    executor = StageExecutor(bundle, open_device("cpu", 1))
    x = np.random.default_rng(3).normal(size=(2000, 12)).astype(np.float32) * 1.5
    final_NC, _ = run_all_exits(executor, {"x": x})[-1]
    data = Arrays("drawn", {"x": x}, final_NC.argmax(axis=1), bundle.manifest)
    trace = record(executor, data, tmp_path_factory.mktemp("trace") / "t.npz")
    return folder, x, Outcomes.of(trace, bundle.calibration.temperatures)


RELAXED = EngineSettings(default_latency_ms=None, max_wait_ms=1e6, warm_up_s=0.2)


@pytest.fixture(scope="module")
def engine(served):
    with Engine.open(served[0], "cpu", RELAXED) as opened:
        yield opened


@pytest.fixture(scope="module")
def native_engine(served_native):
    with Engine.open(served_native[0], "cpu", RELAXED) as opened:
        yield opened


def test_every_kind_of_policy_is_compared_with_the_engine():
    assert {policy["kind"] for policy in [*POLICIES, *NATIVE]} == set(KINDS)


@pytest.mark.parametrize("written", POLICIES, ids=str)
def test_the_engine_lets_every_sample_leave_where_replay_says(served, engine, written, record_property):
    compare(served, engine, written, record_property)


@pytest.mark.parametrize("written", NATIVE, ids=str)
def test_the_engine_follows_a_networks_own_rules_as_replay_does(served_native, native_engine, written, record_property):
    compare(served_native, native_engine, written, record_property)


def test_a_replay_of_the_networks_own_rules_is_the_network_itself(served_native, returning_network):
    folder, x, outcomes = served_native
    replayed = replay(open_bundle(folder).manifest.default_policy, outcomes)

    assert (replayed.exit_rates_E > 0.01).all()
    is_early_N = replayed.exit_N < 3
    assert (replayed.reason_N == np.where(is_early_N, Reason.NATIVE, Reason.FINAL)).all()
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    rows = np.concatenate([np.flatnonzero(replayed.exit_N == index)[:20] for index in range(4)])
    logits_E = [logits_BC for logits_BC, _ in run_all_exits(executor, {"x": x[rows]})]
    for place, row in enumerate(rows.tolist()):
        with torch.no_grad():
            own_C = returning_network(torch.from_numpy(x[row : row + 1]))[0].numpy()
        np.testing.assert_allclose(logits_E[replayed.exit_N[row]][place], own_C, rtol=1e-4, atol=1e-4)


def test_temperatures_do_not_move_a_networks_own_rules(served_native, tmp_path):
    folder, x, outcomes = served_native
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    data = Arrays("drawn", {"x": x}, outcomes.label_N, executor.manifest)
    trace = record(executor, data, tmp_path / "t.npz")

    hot = Outcomes.of(trace, (9.0, 0.1, 3.0, 1.0))

    spec = parse_policy("native")
    np.testing.assert_array_equal(replay(spec, hot).exit_N, replay(spec, outcomes).exit_N)


def test_a_network_that_lacks_exits_leaves_by_the_rules_of_those_that_stay(served_native):
    _, _, outcomes = served_native
    whole, fewer = outcomes.native.rules_N, outcomes.without_exits({0})

    assert fewer.native.rules_N == whole[1:]
    before, after = (replay(parse_policy("native"), one).exit_N for one in (outcomes, fewer))
    np.testing.assert_array_equal(after[before > 0], before[before > 0] - 1)
    assert outcomes.without_exits({0, 1, 2}).native is None


def test_a_policy_of_rules_that_the_network_does_not_have_is_refused(outcomes):
    with pytest.raises(InvalidValue, match="no exit rules of its own"):
        replay(parse_policy("native"), outcomes)


def compare(served, engine, written, record_property):
    _, x, outcomes = served
    spec = parse_policy(written)
    replayed = replay(spec, outcomes)
    result = engine.classify(x, policy=written)
    exit_N = np.array([row.answer.exit_index for row in result.rows])
    reason_N = np.array([row.reason for row in result.rows])
    near_N = is_near(spec, outcomes)
    record_property("share of samples within 1e-5 of a threshold", near_N.mean())
    assert near_N.mean() < 0.01
    np.testing.assert_array_equal(exit_N[~near_N], replayed.exit_N[~near_N])
    np.testing.assert_array_equal(reason_N[~near_N], replayed.reason_N[~near_N])
    depth_N = np.array([row.depth for row in result.rows])
    np.testing.assert_allclose(depth_N[~near_N], replayed.depth_N[~near_N])
    class_N = np.array([row.answer.top_class_K[0] for row in result.rows])
    np.testing.assert_array_equal(class_N[~near_N], replayed.class_N[~near_N])


def test_the_policies_compared_use_every_exit(served):
    _, _, outcomes = served
    assert all(
        (replay(parse_policy({"kind": "confidence", "threshold": threshold}), outcomes).exit_rates_E > 0.01).all()
        for threshold in (0.6, 0.9)
    )


def is_near(spec, outcomes):
    """Say which samples lie so close to a threshold, at any exit, that rounding may decide.

    Confidence is compared as log-odds, which do not saturate and lie no closer together than log-probabilities do.
    """
    near_N = np.zeros(len(outcomes), bool)
    if spec.kind in ("all_of", "any_of"):
        return np.any([is_near(member, outcomes) for member in spec.of], axis=0)
    for index, decision in enumerate(outcomes.decision_E[:-1]):
        near_N |= decision.margin_B < NEAR  # the class itself
        threshold = compile_policy(spec, outcomes.num_exits, outcomes.native).threshold_at(index)
        match spec.kind:
            case "confidence":
                near_N |= np.abs(decision.log_odds_B - logit(np.float64(threshold))) < NEAR
            case "entropy":
                near_N |= np.abs(decision.entropy_B - threshold) < NEAR
            case "native":
                near_N |= np.abs(decision.native_B - threshold) < NEAR
            case "margin":
                near_N |= np.abs(decision.margin_B - threshold) < NEAR
            case "window":
                for bound in (spec.low, spec.high):
                    near_N |= np.abs(decision.log_odds_B - logit(np.float64(bound))) < NEAR
    return near_N

"""A gated network's trace holds, pass by pass, what the network does at that gate threshold, sample by sample."""

import json
from dataclasses import replace

import numpy as np
import pytest
from gated_bundles import CENTRAL, CHOICE, CLASSES, NESTED, ONE_EXIT, PRIORITIES, WIDTH, write_gated
from offramp_calibration.labelled import Arrays
from offramp_calibration.outcomes import Outcomes
from offramp_calibration.record import record
from offramp_calibration.replay import replay
from offramp_calibration.trace import Trace
from offramp_contract.errors import BrokenTrace, UnfitData
from offramp_contract.gates import gate_thresholds
from offramp_contract.policy_spec import FixedSpec, parse_policy
from offramp_runtime import StageExecutor, open_bundle, open_device, run_gated
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings

FAMILIES = {"one exit": ONE_EXIT, "central": CENTRAL, "nested": NESTED, "choice": CHOICE}
NUM_SAMPLES = 240
STEPS = 7
RELAXED = EngineSettings(default_latency_ms=None, max_wait_ms=1e6, warm_up_s=0.05)


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request, gated_folder, gated_samples, tmp_path_factory):
    """A folder, its executor, samples and the trace of them."""
    folder = gated_folder(request.param)
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    data = gated_samples(folder, NUM_SAMPLES)
    trace = record(executor, data, tmp_path_factory.mktemp("t") / "t.npz", batch_size=64, gates=STEPS)
    return folder, executor, data, trace


def test_every_pass_is_the_network_at_its_gate_threshold_one_sample_at_a_time(recorded):
    _, executor, data, trace = recorded
    manifest = executor.manifest
    flops_S = np.array([stage.flops for stage in manifest.stages])
    assert [one.threshold for one in trace.passes][:2] == [0.0, None]
    assert trace.about.threshold_P == tuple(one.threshold for one in trace.passes)
    for one in trace.passes:
        threshold_G = gate_thresholds(manifest, threshold=one.threshold)
        for row in range(0, NUM_SAMPLES, 12):
            alone = run_gated(executor, {"x": data.inputs["x"][row : row + 1]}, threshold_G)
            for logits_NC, (logits_BC, _) in zip(one.logits_ENC, alone.exits, strict=True):
                np.testing.assert_allclose(logits_NC[row], logits_BC[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(one.score_NG[row], alone.scores_BG[0])
            spent = [flops_S[: exit_.stage + 1] @ alone.ran_BS[0, : exit_.stage + 1] for exit_ in manifest.exits]
            np.testing.assert_allclose(one.depth_NE[row], np.array(spent) / manifest.full_flops, rtol=1e-6)


def test_the_first_pass_is_full_depth_and_each_further_rung_runs_less(recorded):
    _, _, _, trace = recorded
    full = trace.passes[0]
    np.testing.assert_array_equal(full.depth_NE, np.broadcast_to(np.float32(trace.about.depth_E), full.depth_NE.shape))
    assert all(np.array_equal(a, b) for a, b in zip(full.logits_ENC, trace.logits_ENC, strict=True))
    means = [one.depth_NE[:, -1].mean() for one in trace.passes if one.threshold is not None]
    assert means == sorted(set(means), reverse=True)
    assert means[-1] < 0.5


def test_batches_of_any_size_record_the_same(recorded, tmp_path):
    _, executor, data, trace = recorded
    again = record(executor, data, tmp_path / "t.npz", batch_size=NUM_SAMPLES, gates=STEPS)
    assert again.about == trace.about
    for one, other in zip(trace.passes, again.passes, strict=True):
        np.testing.assert_array_equal(one.depth_NE, other.depth_NE)
        np.testing.assert_allclose(one.logits_ENC[-1], other.logits_ENC[-1], rtol=1e-5, atol=1e-5)


def test_compute_is_the_average_of_what_each_sample_ran_up_to_the_exit_it_took(recorded):
    _, _, _, trace = recorded
    for threshold, outcomes in Outcomes.by_threshold(trace).items():
        one = trace.pass_at(threshold)
        replayed = replay(parse_policy("confidence", 0.9), outcomes)
        spent = [one.depth_NE[row, index] for row, index in enumerate(replayed.exit_N.tolist())]
        assert replayed.compute == pytest.approx(np.mean(spent))
        full_N = trace.logits_ENC[-1].argmax(axis=1)
        np.testing.assert_array_equal(replayed.differs_N, replayed.class_N != full_N)
        np.testing.assert_array_equal(replayed.lost_N, (full_N == trace.label_N) & ~replayed.right_N)


def test_some_samples_and_fewer_exits_keep_what_belongs_to_them(recorded):
    _, _, _, trace = recorded
    outcomes = Outcomes.by_threshold(trace)[None]
    rows = np.array([5, 3, 3])
    some = outcomes.take(rows)
    np.testing.assert_array_equal(some.sample_depth_NE, outcomes.sample_depth_NE[rows])
    np.testing.assert_array_equal(some.full_N, outcomes.full_N[rows])
    if outcomes.num_exits > 1:
        fewer = outcomes.without_exits({0})
        np.testing.assert_array_equal(fewer.sample_depth_NE, outcomes.sample_depth_NE[:, 1:])


@pytest.fixture(scope="module")
def engine(recorded):
    with Engine.open(recorded[0], "cpu", RELAXED) as opened:
        yield opened


def test_the_engine_gives_every_sample_the_depth_and_answer_of_the_trace(recorded, engine):
    _, executor, data, trace = recorded
    last = len(executor.manifest.exits) - 1
    specs = [FixedSpec(exit=last)] if last == 0 else [FixedSpec(exit=last), parse_policy("confidence", 0.9)]
    for threshold, outcomes in Outcomes.by_threshold(trace).items():
        asked = {} if threshold is None else {"gate_threshold": threshold}
        for spec in specs:
            replayed = replay(spec, outcomes)
            rows = engine.classify(data.inputs["x"], policy=spec.model_dump(mode="json"), **asked).rows
            np.testing.assert_allclose([row.depth for row in rows], replayed.depth_N, rtol=1e-6)
            assert [row.answer.exit_index for row in rows] == replayed.exit_N.tolist()
            assert [row.answer.top_class_K[0] for row in rows] == replayed.class_N.tolist()


def test_thresholds_that_are_named_are_those_that_are_recorded(gated_folder, gated_samples, tmp_path):
    folder = gated_folder("one exit")
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    heard = []
    trace = record(
        executor,
        gated_samples(folder, 100),
        tmp_path / "t.npz",
        gates={0.8, None, 0.3},
        progress=lambda done, total: heard.append((done, total)),
    )
    assert trace.about.threshold_P == (0.0, None, 0.3, 0.8)
    assert heard == [(100, 400), (200, 400), (300, 400), (400, 400)]
    with pytest.raises(BrokenTrace, match=r"no pass at gate threshold 0\.5; remove it to record it anew"):
        trace.pass_at(0.5)


def test_what_full_depth_is_right_on_does_not_matter_where_the_networks_own_gates_are(
    gated_folder, gated_samples, tmp_path
):
    folder = gated_folder("one exit")
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    data = gated_samples(folder, 200)
    wrong = Arrays(data.name, data.inputs, (data.label_N + 1) % CLASSES, executor.manifest)
    with pytest.raises(UnfitData, match="the network with its own gates is right on"):
        record(executor, wrong, tmp_path / "t.npz", gates=3)
    assert not (tmp_path / "t.npz").exists()


def test_data_on_which_only_full_depth_is_wrong_is_fit(gated_folder, gated_samples, tmp_path):
    folder = gated_folder("one exit")
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    x = gated_samples(folder, 3000).inputs["x"]
    own_N = run_gated(executor, {"x": x}).exits[-1][0].argmax(axis=1)
    differs_N = own_N != run_gated(executor, {"x": x}, gate_thresholds(executor.manifest, "open")).exits[-1][0].argmax(
        1
    )
    data = Arrays("unlike", {"x": x[differs_N]}, own_N[differs_N], executor.manifest)
    trace = record(executor, data, tmp_path / "t.npz", gates=3)
    assert (trace.logits_ENC[-1].argmax(axis=1) != trace.label_N).all()


def test_a_score_that_is_no_number_is_not_taken_for_one_that_was_not_computed(gated_folder, gated_samples, tmp_path):
    executor = StageExecutor(open_bundle(gated_folder("one exit")), open_device("cpu", 1))
    data, run = gated_samples(gated_folder("one exit"), 100), executor.run

    def without_a_number(stage, carries):
        output = run(stage, carries)
        if output.scores_BK is None:
            return output
        return output._replace(scores_BK=np.where(np.arange(len(output.scores_BK))[:, None] == 7, np.nan, 0.5))

    executor.run = without_a_number
    with pytest.raises(UnfitData, match="'gate_0' scores sample 7 with no number from 0 to 1"):
        record(executor, data, tmp_path / "t.npz")


@pytest.mark.parametrize("score", [1.5, -0.25])
def test_a_score_that_no_threshold_can_stand_for_is_refused(gated_folder, gated_samples, tmp_path, score):
    folder = gated_folder("one exit")
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    data = gated_samples(folder, 100)
    x = data.inputs["x"].copy()
    x[17, CLASSES + 1] = score
    with pytest.raises(UnfitData, match="'gate_1' scores sample 17 with no number from 0 to 1"):
        record(executor, Arrays("spoilt", {"x": x}, data.label_N, executor.manifest), tmp_path / "t.npz")


def test_a_gated_trace_is_format_3_and_numpy_reads_it(recorded, tmp_path):
    _, executor, data, _ = recorded
    trace = record(executor, data, tmp_path / "t.npz", gates=3)
    assert json.loads(trace.about.to_json())["format_version"] == 3
    with np.load(tmp_path / "t.npz") as arrays:
        exits = range(len(trace.logits_ENC))
        assert {"depth", "scores", "depth_at_1", "scores_at_2", *(f"logits_{k}_at_1" for k in exits)} < set(arrays)
        np.testing.assert_array_equal(arrays["logits_0_at_2"], trace.passes[2].logits_ENC[0])
    read = Trace.read(tmp_path / "t.npz")
    assert read.about == trace.about
    read.check_made_for(executor.manifest)
    ungated = replace(trace, about=replace(trace.about, threshold_P=(), num_gates=0), passes=())
    with pytest.raises(BrokenTrace, match="recorded with 0 gates"):
        ungated.check_made_for(executor.manifest)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"depth_at_1": None}, "holds no depth_at_1"),
        ({"scores": None}, "holds no scores"),
        ({"logits_0_at_2": None}, "holds no logits_0_at_2"),
        ({"depth": lambda a: a[:-1]}, "the trace's depth must be float32, one number a sample and exit"),
        ({"depth_at_1": lambda a: a * np.float32(3)}, "depth_at_1 holds more than full depth"),
        ({"depth_at_1": lambda a: a * np.float32(np.nan)}, "depth_at_1 holds more than full depth, or no number"),
        ({"scores_at_2": lambda a: a.astype(np.float64)}, "scores_at_2 must be float32, one number a sample and gate"),
        ({"logits_0_at_1": lambda a: a[:, 0]}, "logits_0_at_1 must be float32, one row a sample"),
        ({"threshold_P": [0.5, None]}, "gate thresholds must begin with 0"),
        ({"threshold_P": [0.0, 0.5, 0.5]}, "gate thresholds must begin with 0"),
        ({"threshold_P": 7}, "does not say which bundle"),
        ({"num_gates": 0}, "gate thresholds must begin with 0"),
    ],
)
def test_passes_that_record_did_not_write_are_refused_in_words(
    gated_folder, gated_samples, tmp_path, changed, sentence
):
    folder = gated_folder("one exit")
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    record(executor, gated_samples(folder, 60), tmp_path / "t.npz", gates=3)
    with np.load(tmp_path / "t.npz") as arrays:
        parts = dict(arrays)
    for name, change in changed.items():
        if name in ("threshold_P", "num_gates"):
            about = json.loads(parts["about"].tobytes()) | {name: change}
            parts["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        elif change is None:
            del parts[name]
        else:
            parts[name] = change(parts[name])
    np.savez(tmp_path / "spoilt.npz", **parts)
    with pytest.raises(BrokenTrace) as refused:
        Trace.read(tmp_path / "spoilt.npz")
    assert sentence in refused.value.message


def test_a_network_that_needs_several_rows_is_recorded_too(gated_samples, tmp_path):
    folder = write_gated(tmp_path / "pairs", CHOICE, priorities=PRIORITIES, min_batch=2)
    executor = StageExecutor(open_bundle(folder), open_device("cpu", 1))
    data = gated_samples(folder, 61)
    trace = record(executor, data, tmp_path / "t.npz", batch_size=4)
    assert len(trace) == 61
    assert data.inputs["x"].shape == (61, WIDTH)

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from offramp_calibration.labelled import Arrays
from offramp_calibration.record import digest_of, record
from offramp_calibration.trace import Trace
from offramp_contract.errors import UnfitData
from offramp_runtime import StageExecutor, open_bundle, open_device
from offramp_runtime.device import OrtValueDevice
from offramp_runtime.providers import on_cpu

NUM_SAMPLES = 300


@pytest.fixture(scope="module")
def executor(exported):
    return StageExecutor(open_bundle(exported), open_device("cpu", 1))


@pytest.fixture(scope="module")
def data(network, executor):
    """Inputs, labelled with what full depth says, so that it is right."""
    x = np.random.default_rng(0).normal(size=(NUM_SAMPLES, 12)).astype(np.float32)
    with torch.inference_mode():
        label_N = network(torch.from_numpy(x))[-1].argmax(1).numpy()
    return Arrays("drawn", {"x": x}, label_N, executor.manifest)


def other(data, **changed):
    parts = {"name": data.name, "inputs": data.inputs, "label_N": data.label_N, "manifest": data.manifest}
    return Arrays(**(parts | changed))


def test_a_trace_holds_what_the_network_says_at_every_exit(network, executor, data, tmp_path):
    trace = record(executor, data, tmp_path / "t.npz", batch_size=77)
    with torch.inference_mode():
        expected = network(torch.from_numpy(data.inputs["x"]))
    assert len(trace.logits_ENC) == 4
    for logits_NC, wanted in zip(trace.logits_ENC, expected, strict=True):
        np.testing.assert_allclose(logits_NC, wanted.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(trace.label_N, data.label_N)
    manifest = executor.manifest
    assert (trace.about.model, trace.about.model_digest) == (manifest.name, manifest.model_digest)
    assert trace.about.depth_E == manifest.exit_depths
    trace.check_made_for(manifest)
    assert trace.about == Trace.read(tmp_path / "t.npz").about


def test_the_logits_are_raw_whatever_the_temperatures(exported, data, executor, tmp_path):
    shutil.copytree(exported, tmp_path / "b")
    digest = executor.manifest.model_digest
    calibration = {"format_version": 1, "model_digest": digest, "temperatures": [9.0, 0.1, 2.0, 3.0]}
    (tmp_path / "b" / "calibration.json").write_text(json.dumps(calibration))
    calibrated = StageExecutor(open_bundle(tmp_path / "b"), executor.device)
    one, two = record(executor, data, tmp_path / "1.npz"), record(calibrated, data, tmp_path / "2.npz")
    assert one.about == two.about
    assert all(np.array_equal(a, b) for a, b in zip(one.logits_ENC, two.logits_ENC, strict=True))


def test_an_accelerator_records_what_the_cpu_does(exported, executor, data, tmp_path):
    accelerator = StageExecutor(open_bundle(exported), OrtValueDevice(on_cpu(), 1))
    one, two = record(executor, data, tmp_path / "1.npz"), record(accelerator, data, tmp_path / "2.npz")
    assert one.about == two.about
    for logits_NC, wanted_NC in zip(two.logits_ENC, one.logits_ENC, strict=True):
        np.testing.assert_allclose(logits_NC, wanted_NC, rtol=1e-5, atol=1e-5)


def test_recording_twice_gives_the_same_file(executor, data, tmp_path):
    for name in ("1.npz", "2.npz"):
        record(executor, data, tmp_path / name)
    one, two = Trace.read(tmp_path / "1.npz"), Trace.read(tmp_path / "2.npz")
    assert all(np.array_equal(a, b) for a, b in zip(one.logits_ENC, two.logits_ENC, strict=True))
    assert one.about == two.about


def test_the_data_digest_is_the_datas_and_not_the_batches(executor, data, tmp_path):
    digests = {record(executor, data, tmp_path / "t.npz", batch_size=size).about.data_digest for size in (1, 64, 300)}
    assert digests == {digest_of(data, executor.manifest), digest_of(data, executor.manifest, 7)}
    assert len(digests) == 1


def test_any_change_of_the_data_changes_its_digest(executor, data):
    x, order = data.inputs["x"], np.arange(NUM_SAMPLES)
    nudged, relabelled = x.copy(), data.label_N.copy()
    nudged[17, 3] = np.nextafter(nudged[17, 3], np.float32(9))
    relabelled[5] = (relabelled[5] + 1) % 5
    order[[3, 4]] = order[[4, 3]]
    changed = [
        data,
        other(data, inputs={"x": nudged}),
        other(data, label_N=relabelled),
        other(data, inputs={"x": x[order]}, label_N=data.label_N[order]),
        other(data, inputs={"x": x[:-1]}, label_N=data.label_N[:-1]),
    ]
    assert len({digest_of(one, executor.manifest) for one in changed}) == len(changed)


@pytest.fixture
def counting(exported, tmp_path):
    """Give an executor of the bundle with limits on its batches, and the list of the batches it ran."""

    def make(**limits):
        folder = tmp_path / "limited"
        shutil.copytree(exported, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | limits))
        executor, sizes = StageExecutor(open_bundle(folder), open_device("cpu", 1)), []
        run = executor.run

        def counted(stage, carries):
            sizes.append(len(carries["x"]))
            return run(stage, carries)

        executor.run = counted
        return executor, sizes

    return make


def test_no_batch_is_larger_than_the_graphs_run_with(counting, data, tmp_path):
    executor, sizes = counting(max_batch=70)
    record(executor, data, tmp_path / "t.npz", batch_size=256)
    assert set(sizes) == {70, 300 % 70}


def test_a_batch_that_is_too_small_is_padded_and_the_padding_forgotten(counting, executor, data, tmp_path):
    limited, sizes = counting(min_batch=64)
    trace = record(limited, data, tmp_path / "1.npz", batch_size=8)
    assert set(sizes) == {64}
    expected = record(executor, data, tmp_path / "2.npz")
    assert len(trace) == NUM_SAMPLES
    assert trace.about.data_digest == expected.about.data_digest
    for logits_NC, wanted_NC in zip(trace.logits_ENC, expected.logits_ENC, strict=True):
        np.testing.assert_allclose(logits_NC, wanted_NC, rtol=1e-4, atol=1e-5)


def test_progress_rises_to_the_number_of_samples(executor, data, tmp_path):
    seen = []
    record(executor, data, tmp_path / "t.npz", batch_size=128, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(128, 300), (256, 300), (300, 300)]


class Endless:
    """Labelled data that is made while it is read."""

    name = "made"

    def __init__(self, network, num_samples):
        x = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
        with torch.inference_mode():
            label_N = network(torch.from_numpy(x))[-1].argmax(1).numpy()
        self.x, self.label_N = x, np.tile(label_N, num_samples // 64)

    def batches(self, size):
        assert size == 64
        for _ in range(len(self.label_N) // 64):
            yield {"x": self.x.copy()}

    def example(self, index):
        return None


def test_memory_does_not_grow_with_the_data(network, executor, tmp_path):
    def peak(num_samples):
        data = Endless(network, num_samples)
        tracemalloc.start()
        record(executor, data, tmp_path / "t.npz", batch_size=64)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(64_000), peak(192_000)
    growth = 4 * (192_000 - 64_000)  # far below the 80 bytes of logits, 48 of inputs and 8 of label that a sample takes
    assert many < few + growth
    assert len(Trace.read(tmp_path / "t.npz")) == 192_000


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x, y: (x[:1], y[:1]), "data: 1 sample is too few"),
        (lambda x, y: (x[:49], y[:49]), "data: 49 samples are too few"),
        (lambda x, y: (x, np.where(y == 2, 5, y)), "the bundle's classes are 0 to 4"),
        (lambda x, y: (x[y != 2], y[y != 2]), "no sample is of class 2"),
        (lambda x, y: (put(x, 211, np.nan), y), "x: sample 211 holds NaN or infinity"),
        (lambda x, y: (put(x, 299, -np.inf), y), "x: sample 299 holds NaN or infinity"),
        (lambda x, y: (put(x, 120, 3e38), y), "sample 120 drives 'exit_"),
        (lambda x, y: (x.astype(np.float64), y), "x: must be float32 of shape (samples, 12); got float64 (64, 12)"),
        (lambda x, y: (x[:, :11], y), "x: must be float32 of shape (samples, 12); got float32 (64, 11)"),
        (lambda x, y: (x[:-3], y), "does not hold one input for each of its 300 labels"),
        (lambda x, y: (np.concatenate([x, x]), y), "does not hold one input for each of its 300 labels"),
        (lambda x, y: (x, (y + 1) % 5), "full depth is right on 0.0% of it, and chance on 20.0%"),
        (lambda x, y: (x, np.random.default_rng(1).integers(5, size=300)), "and chance on 20.0%: the labels or"),
    ],
)
def test_unfit_data_is_refused_in_words_and_leaves_nothing_behind(executor, data, tmp_path, spoil, sentence):
    x, label_N = spoil(data.inputs["x"], data.label_N)
    with pytest.raises(UnfitData) as refused:
        record(executor, other(data, inputs={"x": x}, label_N=label_N), tmp_path / "t.npz", batch_size=64)
    assert sentence in refused.value.message
    assert not list(tmp_path.iterdir())


def put(x, row, value):
    spoiled = x.copy()
    spoiled[row] = value
    return spoiled


def test_inputs_by_other_names_are_refused(executor, data, tmp_path):
    with pytest.raises(UnfitData, match="inputs: must be exactly x; got images"):
        record(executor, other(data, inputs={"images": data.inputs["x"]}), tmp_path / "t.npz")


def test_a_refusal_leaves_the_trace_that_was_there(executor, data, tmp_path):
    record(executor, data, tmp_path / "t.npz")
    before = (tmp_path / "t.npz").read_bytes()
    with pytest.raises(UnfitData):
        record(executor, other(data, label_N=(data.label_N + 1) % 5), tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == before


def test_missing_classes_are_recorded_on_request(executor, data, tmp_path):
    rows = data.label_N != 2
    partial = other(data, inputs={"x": data.inputs["x"][rows]}, label_N=data.label_N[rows])
    assert len(record(executor, partial, tmp_path / "t.npz", allow_missing_classes=True)) == rows.sum()


def test_data_far_below_the_training_record_is_refused_with_both_numbers(exported, data, tmp_path):
    shutil.copytree(exported, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["provenance"]["training"] = {"test_accuracy_E": [0.5, 0.6, 0.8, 0.95]}
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    executor = StageExecutor(open_bundle(tmp_path / "b"), open_device("cpu", 1))
    label_N = data.label_N.copy()
    label_N[:90] = (label_N[:90] + 1) % 5
    with pytest.raises(
        UnfitData, match=r"right on 70\.0% of it, and on 95\.0% of the test data in its training record"
    ):
        record(executor, other(data, label_N=label_N), tmp_path / "t.npz")
    label_N[20:90] = data.label_N[20:90]
    assert len(record(executor, other(data, label_N=label_N), tmp_path / "t.npz")) == NUM_SAMPLES

import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from offramp_cli.__main__ import app
from offramp_contract.budgets import certified_risk, within_compute
from offramp_contract.calibration import CALIBRATION_FILE
from offramp_exporter import export
from offramp_models import load_data
from offramp_models.networks import MultiExitCNN
from offramp_models.training import TrainingSettings, train
from offramp_runtime import open_bundle
from offramp_server.engine import Engine
from offramp_server.engine_settings import EngineSettings
from offramp_server.repository import Repository
from typer.testing import CliRunner

SEED = 3


@pytest.fixture
def offramp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network trained on the digits with a seed of its own, exported."""
    data = load_data("digits", SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MultiExitCNN(widths=(8, 16, 24), blocks=(1, 1, 1), strides=(1, 2, 1), upscale=1)
    with one_thread():  # several would wait for each other at every step, on a machine with other work
        record = train(network, data, TrainingSettings(epochs=3, seed=SEED))
    folder = tmp_path_factory.mktemp("trained") / "digits"
    described = {"labels": data.label_names, "preprocessing": data.preprocessing, "training": record.to_json()}
    export(network, torch.from_numpy(data.inputs(data.calibration)[:8]), folder, name="digits", **described)
    return folder, data


@pytest.fixture
def bundle(trained, tmp_path):
    """A copy of the bundle, to calibrate."""
    shutil.copytree(trained[0], tmp_path / "b")
    return tmp_path / "b"


@pytest.fixture
def held_out(trained, tmp_path):
    """Write the calibration split as a file of arrays, spoilt as a test wants it."""

    def write(spoil=lambda x, y: (x, y), name="d.npz"):
        data = trained[1]
        x, y = spoil(data.inputs(data.calibration), data.calibration.labels_N)
        np.savez(tmp_path / name, x=x, y=y)
        return name

    return write


CPU = ("--device", "cpu", "--threads", "1")


def test_a_bundle_knows_itself_after_calibrating_on_what_was_held_out_from_its_training(offramp, bundle):
    done = offramp("calibrate", "b", "--data", "digits", *CPU)
    assert done.exit_code == 0, done.output
    opened = open_bundle(bundle)
    calibration = opened.calibration
    assert calibration.num_samples == 400
    assert any(temperature != 1 for temperature in calibration.temperatures)
    assert within_compute(calibration.operating_points, 0.5).compute <= 0.5
    assert certified_risk(calibration.operating_points, 0.1, 0.05).certificate.data_digest == calibration.data_digest
    assert "digits (calibration), 400 images: split with seed 3, as for the bundle's training" in done.output
    for index, (depth, temperature) in enumerate(
        zip(opened.manifest.exit_depths, calibration.temperatures, strict=True)
    ):
        assert re.search(rf"^exit_{index} +{depth:.1%} .* {temperature:.3f}$", done.output, re.MULTILINE)
    for budget in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        assert any(line.startswith(f"{budget} ") for line in done.output.splitlines())
    chosen = within_compute(calibration.operating_points, 0.4)
    assert f"{chosen.name} " in done.output
    assert f"{chosen.accuracy:.1%}" in done.output
    assert f"{len(calibration.operating_points)} operating points from 400 samples" in done.output


def test_the_same_data_and_seed_give_the_same_bytes_however_they_arrive(offramp, bundle, trained, held_out):
    data = trained[1]
    held_out()
    np.savez_compressed("pixels.npz", x=data.calibration.pixels_NHW, y=data.calibration.labels_N.astype(str))
    written = []
    for source in ("digits", "digits", "d.npz", "pixels.npz"):
        assert offramp("calibrate", "b", "--data", source, *CPU).exit_code == 0
        written.append((bundle / CALIBRATION_FILE).read_bytes())
    assert written[0] == written[1] == written[3]
    assert json.loads(written[2])["temperatures"] == pytest.approx(json.loads(written[0])["temperatures"], rel=1e-4)
    assert offramp("calibrate", "b", "--data", "digits", "--seed", 1, *CPU).exit_code == 0
    assert (bundle / CALIBRATION_FILE).read_bytes() != written[0]


def test_a_trace_is_kept_and_used_instead_of_the_network(offramp, bundle, tmp_path):
    assert offramp("calibrate", "b", "--data", "digits", "--trace", "kept/t.npz", *CPU).exit_code == 0
    written = (bundle / CALIBRATION_FILE).read_bytes()
    kept = (tmp_path / "kept" / "t.npz").read_bytes()
    for arguments in ((), ("--data", "digits")):
        (bundle / CALIBRATION_FILE).unlink()
        done = offramp("calibrate", "b", "--trace", "kept/t.npz", *arguments)
        assert done.exit_code == 0, done.output
        assert "using the trace in kept/t.npz, 400 samples" in done.output
        assert "recording" not in done.output
        assert (bundle / CALIBRATION_FILE).read_bytes() == written
    assert (tmp_path / "kept" / "t.npz").read_bytes() == kept


def test_a_trace_of_other_data_or_another_model_is_refused(offramp, bundle, held_out, digits_like_bundle):
    assert offramp("calibrate", "b", "--data", "digits", "--trace", "t.npz", *CPU).exit_code == 0
    written = (bundle / CALIBRATION_FILE).read_bytes()
    other = offramp("calibrate", "b", "--data", held_out(lambda x, y: (x[:399], y[:399])), "--trace", "t.npz")
    assert other.exit_code == 1
    assert "error: 't.npz' was recorded on other data than d.npz" in other.output
    foreign = offramp("calibrate", digits_like_bundle, "--trace", "t.npz")
    assert foreign.exit_code == 1
    assert "error: the trace was recorded with another model than this bundle's, 'digits'" in foreign.output
    assert (bundle / CALIBRATION_FILE).read_bytes() == written
    assert not (digits_like_bundle / CALIBRATION_FILE).exists()


def test_a_zipped_bundle_is_calibrated_into_a_new_folder(offramp, bundle, tmp_path):
    shutil.make_archive("z", "zip", bundle)
    refused = offramp("calibrate", "z.zip", "--data", "digits", *CPU)
    assert refused.exit_code == 1
    assert (
        "z.zip is not a folder, and only a folder is calibrated in place; name a new one with --out" in refused.output
    )
    done = offramp("calibrate", "z.zip", "--data", "digits", "--out", "new/c", *CPU)
    assert done.exit_code == 0, done.output
    assert open_bundle(tmp_path / "new" / "c").calibration.operating_points
    assert open_bundle(tmp_path / "new" / "c").manifest == open_bundle(bundle).manifest
    again = offramp("calibrate", "z.zip", "--data", "digits", "--out", "new/c", *CPU)
    assert again.exit_code == 1
    assert "new/c exists; name a new folder with --out" in again.output


def test_out_leaves_the_bundle_as_it_was(offramp, bundle, tmp_path):
    assert offramp("calibrate", "b", "--data", "digits", "--out", "c", *CPU).exit_code == 0
    assert not (bundle / CALIBRATION_FILE).exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b", "c"]


def first(number):
    return lambda x, y: (x[:number], y[:number])


def without(label):
    return lambda x, y: (x[y != label], y[y != label])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x, y: (x, np.eye(10)[y]), "labels: must be one class a sample, shape (400,); got (400, 10); one-hot"),
        (lambda x, y: (x, y[:-1]), "labels: there are 399 for 400 samples"),
        (lambda x, y: (x, y.astype(float)), "labels: must be class numbers (integers) or names; got float64"),
        (lambda x, y: (x, y + 1), "the bundle's classes are 0 to 9"),
        (without(7), "labels: no sample is of class 7 (7); data that lacks classes says nothing"),
        (lambda x, y: (np.where(np.arange(400).reshape(-1, 1, 1, 1) == 9, np.nan, x), y), "x: sample 9 holds NaN"),
        (first(1), "data: 1 sample is too few"),
        (lambda x, y: (x[:, :, :7], y), "must be float32 of shape (samples, 1, 8, 8); got float32 (400, 1, 7, 8)"),
        (lambda x, y: ((x * 0.376 + 0.305) * 255, y), "(mean 0.305, std 0.376) gives -0.8112 to 1.848"),
        (lambda x, y: (x * 0.376 + 0.305 + 1e-6, y), "no value is below 0"),
        (
            lambda x, y: (x.transpose(0, 1, 3, 2), y),
            "and chance on 10.0%: the labels or the preprocessing do not match",
        ),
        (
            lambda x, y: (x, np.where(np.arange(400) % 4, y, 9 - y)),
            "of the test data in its training record: the labels",
        ),
        (lambda x, y: (x, (y + 1) % 10), "and chance on 10.0%: the labels or the preprocessing do not match"),
    ],
)
def test_unfit_data_is_refused_in_one_sentence_and_nothing_is_written(offramp, bundle, held_out, spoil, sentence):
    def contiguous(x, y):
        x, y = spoil(x, y)
        return np.ascontiguousarray(x, np.float32), y

    before = sorted(bundle.rglob("*"))
    done = offramp("calibrate", "b", "--data", held_out(contiguous), "--trace", "t.npz", *CPU)
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert sentence in done.output
    assert sorted(bundle.rglob("*")) == before
    assert sorted(entry.name for entry in bundle.parent.iterdir()) == ["b", "d.npz"]


def test_missing_classes_are_accepted_on_request(offramp, bundle, held_out):
    asked = ("calibrate", "b", "--data", held_out(without(7)), "--trace", "t.npz", *CPU)
    done = offramp(*asked, "--allow-missing-classes")
    assert done.exit_code == 0, done.output
    assert "no sample is of class 7" in offramp(*asked).output  # the trace that was kept does not hide it
    assert open_bundle(bundle).calibration.operating_points


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["b"], "name labelled data with --data, or a trace that is there with --trace"),
        (["b", "--trace", "none.npz"], "name labelled data with --data"),
        (["b", "--data", "imagenet"], "data set 'imagenet' is not one of"),
        (["b", "--data", "none.npz"], "data: 'none.npz' does not exist"),
        (["none", "--data", "digits"], "neither a bundle folder nor a .zip"),
        (["b", "--data", "digits", "--device", "tpu"], "none of auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_sentence(offramp, bundle, arguments, sentence):
    done = offramp("calibrate", *arguments)
    assert done.exit_code == 1
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not (bundle / CALIBRATION_FILE).exists()


def test_a_server_that_watches_the_bundle_takes_its_calibration_up(offramp, bundle):
    with Engine(settings=EngineSettings(warm_up_s=0.1)) as engine:
        repository = Repository(engine, bundle)
        repository.load_all()
        assert not repository.find("digits").calibration.operating_points
        assert offramp("calibrate", "b", "--data", "digits", *CPU).exit_code == 0
        repository.refresh()
        served = repository.find("digits")
        assert served.calibration == open_bundle(bundle).calibration
        image = np.zeros((1, 1, 8, 8), np.float32)
        chosen = within_compute(served.calibration.operating_points, 0.4)
        assert engine.classify(image, model="digits", compute=0.4).rows[0].depth <= 1
        assert repository.find().calibration.operating_points
        assert chosen in served.calibration.operating_points
